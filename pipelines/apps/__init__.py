"""Applications of finished models: generate, evaluate, serve, study, paper."""
