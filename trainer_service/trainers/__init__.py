"""TRL's online trainers with rollouts from an inference service. All but import and address stays.

A trainer is imported when its name is first asked for: nobody waits for the others.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer_service.trainers.async_grpo import AsyncGRPOTrainer
    from trainer_service.trainers.distillation import DistillationTrainer
    from trainer_service.trainers.gmpo import GMPOTrainer
    from trainer_service.trainers.gold import GOLDTrainer
    from trainer_service.trainers.grpo import GRPOTrainer
    from trainer_service.trainers.iw_opd import IWOPDTrainer
    from trainer_service.trainers.nash_md import NashMDConfig, NashMDTrainer
    from trainer_service.trainers.online_dpo import OnlineDPOTrainer
    from trainer_service.trainers.rloo import RLOOTrainer
    from trainer_service.trainers.sdft import SDFTTrainer
    from trainer_service.trainers.sdpo import SDPOTrainer
    from trainer_service.trainers.server_distillation import ServerDistillationTrainer
    from trainer_service.trainers.xpo import XPOConfig, XPOTrainer

_MODULES = {
    "AsyncGRPOTrainer": "async_grpo",
    "DistillationTrainer": "distillation",
    "GMPOTrainer": "gmpo",
    "GOLDTrainer": "gold",
    "GRPOTrainer": "grpo",
    "IWOPDTrainer": "iw_opd",
    "NashMDConfig": "nash_md",
    "NashMDTrainer": "nash_md",
    "OnlineDPOTrainer": "online_dpo",
    "RLOOTrainer": "rloo",
    "SDFTTrainer": "sdft",
    "SDPOTrainer": "sdpo",
    "ServerDistillationTrainer": "server_distillation",
    "XPOConfig": "xpo",
    "XPOTrainer": "xpo",
}

__all__ = [
    "AsyncGRPOTrainer",
    "DistillationTrainer",
    "GMPOTrainer",
    "GOLDTrainer",
    "GRPOTrainer",
    "IWOPDTrainer",
    "NashMDConfig",
    "NashMDTrainer",
    "OnlineDPOTrainer",
    "RLOOTrainer",
    "SDFTTrainer",
    "SDPOTrainer",
    "ServerDistillationTrainer",
    "XPOConfig",
    "XPOTrainer",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
