"""For trainers that compare two completions of each prompt: Online DPO, Nash-MD, XPO."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from trl.data_utils import maybe_apply_chat_template

from tandem.errors import invalid
from trainer_service.account import Place, digest
from trainer_service.trainers.mixin import RemoteMixin, replaced

#: A float, or one for each epoch, of which the last stays.
Schedule = float | list[float]


@dataclass(frozen=True)
class PromptBatch:
    """Prompts as the loss sees them, and as the engine does.

    ids, mask: (prompts, longest), padded on the left. rows: token ids of each. vision: what else the model's forward
    pass takes, for these rows.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    rows: list[list[int]]
    images: list[list[Any] | None] | None
    vision: dict[str, torch.Tensor] | None


class PairMixin(RemoteMixin):
    """RemoteMixin for TRL's OnlineDPOTrainer and what stands on it."""

    _relied_on: ClassVar[tuple[str, ...]] = (
        "_generate",
        "_forward",
        "_calculate_rewards_from_functions",
        "_tokenizer",
        "stats",
    )

    _tokenizer: Any
    processing_class: Any
    eos_token_ids: list[int]
    _forward: Any
    stats: dict[str, list[float]]
    _eval_stats: dict[str, list[float]]
    _drawn: list[tuple[list[int], list[int]]]  # prompts and completions of the batch under way

    def _max_completion_length(self, args: Any) -> int:
        return int(args.max_new_tokens)

    def _prompts(self, prompts: list[Any], images: list[Any] | None) -> PromptBatch:
        """Render and tokenize as TRL's `_generate` does."""
        examples: list[dict[str, Any]] = [{"prompt": prompt} for prompt in prompts]
        if images is not None:
            examples = [example | {"image": image} for example, image in zip(examples, images, strict=True)]
        texts = [maybe_apply_chat_template(example, self.processing_class)["prompt"] for example in examples]
        pictures = (
            [[image] if image is not None else None for image in images] if images is not None else None
        )
        batch = self.processing_class(
            text=texts,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            **({"images": [picture or [] for picture in pictures]} if pictures is not None else {}),
        )
        batch = {name: value.to(self.accelerator.device) for name, value in batch.items()}
        ids, mask = batch.pop("input_ids"), batch.pop("attention_mask")
        rows = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
        return PromptBatch(ids, mask, rows, pictures, batch or None)

    def _completions(self, batch: PromptBatch, **values: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """A completion of each prompt from the engine, with sampling parameters `values`.

        Returns:
            ids and mask, (prompts, longest), padded on the right.
        """
        self._sync()
        rollouts = self.vllm_generation.rollouts(batch.rows, batch.images, logprobs=None, **values)
        self._drawn += [
            (row, list(rollout.token_ids)) for row, rollout in zip(batch.rows, rollouts, strict=True)
        ]
        ids = [torch.tensor(list(rollout.token_ids)) for rollout in rollouts]
        pad = torch.nn.utils.rnn.pad_sequence
        mask = pad([torch.ones_like(row) for row in ids], batch_first=True)
        padded = pad(ids, batch_first=True, padding_value=self._tokenizer.pad_token_id)
        return padded.to(self.accelerator.device), mask.to(self.accelerator.device)

    @contextmanager
    def _accounted(self, prompts: int) -> Iterator[None]:
        """Goes around what samples two completions of each prompt of a batch, and trains on them."""
        self._drawn = []
        yield
        if self._evaluating:
            return
        call, first = self._generations.next(), self.accelerator.process_index * prompts
        rollouts = [
            (Place(call.step, call.number, first + row % prompts, row // prompts), digest(*drawn))
            for row, drawn in enumerate(self._drawn)
        ]
        if self.account is not None:
            self.account.generated(rollouts, self.vllm_generation.weight_version)
            self.account.trained(rollouts)

    def _sync(self) -> None:
        """Have the engine hold the policy of this step."""
        if self.state.global_step != self._last_loaded_step:
            self.vllm_generation.sync_weights()
            self._last_loaded_step = self.state.global_step

    def _rest(self) -> None:
        """Have the engine sleep, if it shall, when every rank has its completions."""
        if self.vllm_generation.enable_sleep_mode:
            self.accelerator.wait_for_everyone()
            self.vllm_generation.rest()

    def _scheduled(self, schedule: Schedule) -> float:
        """The value of this epoch."""
        if not isinstance(schedule, list):
            return schedule
        return schedule[min(int(self.state.epoch or 0), len(schedule) - 1)]

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, None, None]:
        """The loss of a batch, and its statistics under `eval_`. TRL's has none for these trainers."""
        with torch.no_grad(), self._aside():
            loss = self.training_step(model, inputs) * self.args.gradient_accumulation_steps
        model.eval()
        return loss, None, None

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """A training step that trains nothing, and counts apart."""
        training, self.stats = self.stats, self._eval_stats
        try:
            with replaced(self.accelerator, {"backward": lambda loss, **_: None}):
                yield
        finally:
            self.stats = training

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, with the means of what `stats` counts."""
        self._eval_stats = {name: [] for name in self.stats}
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        means = {
            f"{prefix}_{name}": sum(values) / len(values)
            for name, values in self._eval_stats.items()
            if values
        }
        return output._replace(metrics=(output.metrics or {}) | means)


def check_schedule(field: str, schedule: Schedule, args: Any) -> None:
    """Refuse one with no value, or with more than there are epochs."""
    if not isinstance(schedule, list):
        return
    if not schedule:
        raise invalid(field, "needs a value, or one for each epoch")
    if args.max_steps <= 0 and len(schedule) > max(args.num_train_epochs, 1):
        raise invalid(field, f"has {len(schedule)} values for {args.num_train_epochs:g} epochs")
