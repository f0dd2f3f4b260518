"""For TRL's trainers that generate groups of rollouts and train on them in pieces, perhaps again: GRPO and RLOO."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast  # type: ignore[import-untyped]
from safetensors.torch import load_model, save_model
from trl.trainer.utils import RepeatSampler

from trainer_service.account import Account, Place, digest
from trainer_service.seeds import Numbering
from trainer_service.trainers.resume import ResumeMixin

logger = logging.getLogger(__name__)

#: Where a rollout's place goes with it, through TRL's shuffling and cutting of batches: (rollouts, 4).
_PLACES = "tandem_places"
#: Where a checkpoint has the reference model, if that changes.
_REFERENCE = "tandem_reference.safetensors"
#: Names of TRL's trainers that GroupMixin hangs on.
RELIED_ON = ("_prepare_inputs", "_get_train_sampler", "_step", "_buffered_inputs", "num_iterations")


class GroupMixin(ResumeMixin):
    """Names each rollout, and has checkpoints keep the rollouts that later steps are to be trained on."""

    args: Any
    model: Any
    account: Account | None
    vllm_generation: Any
    num_generations: Any
    num_iterations: int
    ref_model: Any
    _generations: Numbering
    _step: int
    _buffered_inputs: Any

    @property
    def passes(self) -> int:
        """How often each rollout is trained on."""
        return self.num_iterations

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = cast(dict[str, Any], cast(Any, super())._generate_and_score_completions(inputs))
        if not self.model.training:
            return output
        call, rows = self._generations.next(), len(output["completion_ids"])
        row = self.accelerator.process_index * rows + torch.arange(rows)
        own = torch.tensor([call.step, call.number]).expand(rows, 2)
        output[_PLACES] = torch.cat(
            [own, torch.stack([row // self.num_generations, row % self.num_generations], 1)], 1
        )
        if self.account is not None:
            self.account.generated(_rollouts(output), self.vllm_generation.weight_version)
        return output

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepared = cast(Any, super())._prepare_inputs(inputs)
        if self.account is not None and self.model.training:
            self.account.trained(_rollouts(prepared))
        return {name: value for name, value in prepared.items() if name != _PLACES}

    def _run_state(self) -> dict[str, Any]:
        found = super()._run_state() | {"micro_step": self._step}
        if self._step % (self.args.steps_per_generation * self.num_iterations):
            found["rollouts"] = self._buffered_inputs  # later steps have them to go
        return found

    def _set_run_state(self, found: dict[str, Any]) -> None:
        super()._set_run_state(found)
        self._step = found.get("micro_step", self._step)
        held = found.get("rollouts")
        self._buffered_inputs = None if held is None else [self._on_device(batch) for batch in held]
        if held is not None and self._main_says(found.get("aliased", False)):
            # Steps make versions before rollouts are needed, as they did: the engine has to have the parameters.
            self.vllm_generation.sync_weights()
            self._last_loaded_step = self.state.global_step

    def _main_says(self, value: bool) -> bool:
        return bool(
            broadcast(torch.tensor([int(value)], device=self.accelerator.device), from_process=0).item()
        )

    def _save_rng_state(self, output_dir: str) -> None:
        if self.args.sync_ref_model and self._has_whole_reference() and self.accelerator.is_main_process:
            save_model(self.accelerator.unwrap_model(self.ref_model), str(Path(output_dir) / _REFERENCE))
        super()._save_rng_state(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.args.sync_ref_model and self._has_whole_reference():
            load_model(self.accelerator.unwrap_model(self.ref_model), Path(checkpoint) / _REFERENCE)

    def _has_whole_reference(self) -> bool:
        whole = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
        if not whole:
            logger.warning(
                "A checkpoint has no reference model that is spread over ranks: a resumed run begins anew."
            )
        return whole

    def _on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        device = self.accelerator.device
        return {
            name: value.to(device) if isinstance(value, torch.Tensor) and name != _PLACES else value
            for name, value in batch.items()
        }

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        return EpochSampler(sampler, self._epoch) if isinstance(sampler, RepeatSampler) else sampler

    def _epoch(self) -> int:
        return int(self.state.epoch or 0)


class EpochSampler(RepeatSampler):
    """TRL's, of which a resumed run draws the order of the epoch that it is in, and not that of the first."""

    def __init__(self, sampler: RepeatSampler, epoch: Callable[[], int]) -> None:
        """`epoch` tells which one begins, or goes on."""
        super().__init__(
            sampler.data_source,
            mini_repeat_count=sampler.mini_repeat_count,
            batch_size=sampler.batch_size,
            repeat_count=sampler.repeat_count,
            shuffle=sampler.shuffle,
            seed=sampler.seed,
        )
        self._epoch, self._drawn = epoch, 0

    def __iter__(self) -> Iterator[int]:
        while self._drawn < self._epoch():  # by the run that was interrupted
            next(self._order(), None)
            self._drawn += 1
        self._drawn += 1
        yield from self._order()

    def _order(self) -> Iterator[int]:
        return cast(Iterator[int], super().__iter__())  # type: ignore[no-untyped-call]


def _rollouts(batch: dict[str, Any]) -> Iterator[tuple[Place, str]]:
    """Each rollout of a batch, by the token ids that it is trained on, padding included."""
    rows = zip(
        batch[_PLACES].tolist(), batch["prompt_ids"].tolist(), batch["completion_ids"].tolist(), strict=True
    )
    for place, prompt, completion in rows:
        yield Place(*place), digest(prompt, completion)
