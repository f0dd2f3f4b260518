"""Measurements beside the peer and the floor, in the same run. `make bench`; see docs/benchmarks.md."""
