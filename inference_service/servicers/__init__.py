"""Servicers: they translate between protobuf and Python, and do nothing else."""
