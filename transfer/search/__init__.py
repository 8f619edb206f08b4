"""Which hyper-parameters are tried next."""
