"""The translation of records to MLflow, and their upload."""
