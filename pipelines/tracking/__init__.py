"""MLflow: client, runs, registry, champion, and the model that it serves."""
