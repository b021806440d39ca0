"""Settings of the method: frozen, checked models, loading and overrides."""
