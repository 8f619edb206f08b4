"""Networks that are built with any of the methods of `nfnet.normalizers`."""
