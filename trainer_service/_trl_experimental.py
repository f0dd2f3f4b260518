"""TRL's distillation trainers and those of its experimental corner, imported without vLLM and without its notice.

They are apart from `_trl`, so that who trains with GRPO or RLOO does not wait for them.
"""

from __future__ import annotations

import warnings

from trl.import_utils import TRLExperimentalWarning

from trainer_service._trl import without_vllm

with without_vllm(), warnings.catch_warnings():
    # That these may change in any release is told in docs/trainers.md; `_check_contract` and the tests hold them.
    warnings.simplefilter("ignore", TRLExperimentalWarning)
    from trl.experimental.gmpo.gmpo_config import GMPOConfig
    from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer as TrlGMPOTrainer
    from trl.experimental.gold.gold_config import GOLDConfig
    from trl.experimental.gold.gold_trainer import GOLDTrainer as TrlGOLDTrainer
    from trl.experimental.iw_opd.iw_opd_config import IWOPDConfig
    from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer as TrlIWOPDTrainer
    from trl.experimental.online_dpo.online_dpo_config import OnlineDPOConfig
    from trl.experimental.online_dpo.online_dpo_trainer import OnlineDPOTrainer as TrlOnlineDPOTrainer
    from trl.experimental.sdft.sdft_config import SDFTConfig
    from trl.experimental.sdft.sdft_trainer import SDFTTrainer as TrlSDFTTrainer
    from trl.experimental.sdpo.sdpo_config import SDPOConfig
    from trl.experimental.sdpo.sdpo_trainer import SDPOTrainer as TrlSDPOTrainer
    from trl.experimental.server_distillation.server_distillation_config import ServerDistillationConfig
    from trl.experimental.server_distillation.server_distillation_trainer import (
        ServerDistillationTrainer as TrlServerDistillationTrainer,
    )
    from trl.experimental.utils import empty_cache
    from trl.trainer.distillation_config import DistillationConfig
    from trl.trainer.distillation_trainer import DistillationTrainer as TrlDistillationTrainer

__all__ = [
    "DistillationConfig",
    "GMPOConfig",
    "GOLDConfig",
    "IWOPDConfig",
    "OnlineDPOConfig",
    "SDFTConfig",
    "SDPOConfig",
    "ServerDistillationConfig",
    "TrlDistillationTrainer",
    "TrlGMPOTrainer",
    "TrlGOLDTrainer",
    "TrlIWOPDTrainer",
    "TrlOnlineDPOTrainer",
    "TrlSDFTTrainer",
    "TrlSDPOTrainer",
    "TrlServerDistillationTrainer",
    "empty_cache",
]
