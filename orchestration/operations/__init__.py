"""What people ask before, during and after a run: plan, doctor, status, logs, drill."""
