"""Orchestration of the method: the only importer of Ray, DeepSpeed and MLflow."""
