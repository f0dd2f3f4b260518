"""gRPC in front of vLLM: rollouts with weight versions, and an engine whose weights a trainer can share."""
