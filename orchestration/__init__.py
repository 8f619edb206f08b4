"""Floor 3: machines and records. Commands, launching, sweeps, tracking."""
