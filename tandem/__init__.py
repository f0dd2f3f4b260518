"""Tandem's contract in Python: generated protobuf code, the error catalogue, and the gRPC plumbing that both
services share.

Importing it loads nothing heavy: no gRPC, no torch.
"""
