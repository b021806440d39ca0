"""Settings of the method: frozen, checked models, and how they are read and overridden."""
