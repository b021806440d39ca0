"""Built on finished models: generate, evaluate, serve, study, paper."""
