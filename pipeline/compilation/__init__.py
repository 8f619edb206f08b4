"""The passes of a run's network through torch.compile, compared with eager ones before the first step."""
