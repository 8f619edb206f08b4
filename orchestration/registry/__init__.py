"""MLflow's model registry and the models that are registered there."""
