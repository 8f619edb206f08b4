"""MLflow's server over runs and sweeps, for one person or a team."""
