"""The weight plane that both services share: manifest, placement, arena, digest and the transports.

Knows nothing of gRPC, vLLM or TRL. Import what you need from its modules; this package itself imports
nothing, so that reading a manifest costs no torch.
"""
