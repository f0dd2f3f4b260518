"""TRL's online trainers with rollouts from an inference service. All but import and address stays."""

from trainer_service.trainers.grpo import GRPOTrainer
from trainer_service.trainers.rloo import RLOOTrainer

__all__ = ["GRPOTrainer", "RLOOTrainer"]
