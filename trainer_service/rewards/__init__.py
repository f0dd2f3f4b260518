"""Rewards for TRL's trainers: functions, models, judges and services, checked before anything is learnt from them."""

from trainer_service.rewards.checks import check_rows, checked
from trainer_service.rewards.engine_judge import EngineJudge
from trainer_service.rewards.judges import JudgeReward, PairwiseJudge, RewardJudge
from trainer_service.rewards.named import builtin, prepared, reward
from trainer_service.rewards.named_judges import judge
from trainer_service.rewards.remote import RemoteReward
from trainer_service.rewards.server import serve

__all__ = [
    "EngineJudge",
    "JudgeReward",
    "PairwiseJudge",
    "RemoteReward",
    "RewardJudge",
    "builtin",
    "check_rows",
    "checked",
    "judge",
    "prepared",
    "reward",
    "serve",
]
