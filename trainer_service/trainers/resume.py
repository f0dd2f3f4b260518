"""What a checkpoint has beside transformers' own files, so that a resumed run goes on bit for bit.

Data order, optimizer, schedule and random numbers are transformers'. Beside them: the number of the next weight
version, and what a trainer adds to `_run_state`.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trainer_service.reaching import Weights

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

logger = logging.getLogger(__name__)

#: Names of transformers' trainer that ResumeMixin hangs on.
RELIED_ON = ("_save_rng_state", "_load_optimizer_and_scheduler")

_STATE, _TENSOR = "state", "tensor"


class ResumeMixin(_Trainer):
    """For trainers whose checkpoints shall have what their runs need to go on."""

    policy_weights: Weights | None

    def _run_state(self) -> dict[str, Any]:
        """What must outlive this rank's process: tensors and plain values, in lists and dicts."""
        weights = self.policy_weights
        if weights is None:
            return {}
        # Where the parameters are the engine's memory, the step itself made a version. Else the next sync will.
        synced = weights.aliased or getattr(self, "_last_loaded_step", -1) == self.state.global_step
        return {"weight_version": weights.weight_version + (not synced), "aliased": weights.aliased}

    def _set_run_state(self, found: dict[str, Any]) -> None:
        """Go on from what `_run_state` gave."""
        if self.policy_weights is not None:
            self.policy_weights.least = found.get("weight_version", 0)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        _save(self._run_state(), _file(output_dir, self.args.process_index))
        # What the main process writes next is what makes a checkpoint complete: of all ranks.
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        file = _file(checkpoint, self.args.process_index)
        if file.is_file():
            self._set_run_state(_loaded(file))
        else:
            logger.warning("%s is not there: rollouts may differ from those of an uninterrupted run.", file)


def _file(checkpoint: str, rank: int) -> Path:
    return Path(checkpoint) / f"tandem_{rank}.safetensors"


def _save(state: dict[str, Any], file: Path) -> None:
    """Tensors as safetensors; around them, what is no tensor as JSON, with their names in their places."""
    tensors: dict[str, torch.Tensor] = {}

    def without_tensors(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            name = str(len(tensors))
            # Batches are views of one memory.
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {_TENSOR: name}
        if isinstance(value, dict):
            return {key: without_tensors(item) for key, item in value.items()}
        return [without_tensors(item) for item in value] if isinstance(value, list) else value

    plain = json.dumps(without_tensors(state))
    save_file(tensors, file, {_STATE: plain})


def _loaded(file: Path) -> dict[str, Any]:
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        plain = opened.metadata()[_STATE]
    found: dict[str, Any] = json.loads(
        plain, object_hook=lambda value: tensors[value[_TENSOR]] if _TENSOR in value else value
    )
    return found
