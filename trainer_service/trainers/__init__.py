"""TRL's online trainers with their rollouts from an inference service. Everything but the import and the address stays."""

from trainer_service.trainers.grpo import GRPOTrainer
from trainer_service.trainers.rloo import RLOOTrainer

__all__ = ["GRPOTrainer", "RLOOTrainer"]
