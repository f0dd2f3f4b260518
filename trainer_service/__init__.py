"""TRL in front of a Tandem inference service: trainers, and the client they use. Never imports vLLM."""
