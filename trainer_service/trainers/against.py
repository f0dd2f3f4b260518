"""For trainers that set a completion of the policy against one of another distribution: Nash-MD, XPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers.training_args import OptimizerNames

from tandem.errors import FailedPrecondition, Reason, invalid
from tandem.inference.v1 import inference_pb2 as pb
from trainer_service._trl_experimental import empty_cache
from trainer_service.client import Group
from trainer_service.reaching import Addresses
from trainer_service.trainers.online_dpo import OnlineDPOTrainer
from trainer_service.trainers.pairs import PromptBatch

#: Mean difference of logprobs, in nats, beyond which two references are not one model in two precisions.
_APART = 0.25


@dataclass(frozen=True)
class Side:
    """One completion of each prompt. ids, mask: (prompts, longest). scores: (prompts,), by the reward functions."""

    ids: torch.Tensor
    mask: torch.Tensor
    scores: torch.Tensor

    def contains_eos(self, eos: list[int]) -> torch.Tensor:
        """(prompts,), of bool."""
        found = torch.isin(self.ids, torch.tensor(eos, device=self.ids.device)) & self.mask.bool()
        return found.any(1)


class AgainstTrainer(OnlineDPOTrainer):
    """OnlineDPOTrainer, of which a step compares the policy's completion with the other's.

    The other completion is the engine's too: of the mixture of policy and reference that `_other` gives the coefficient
    of. The service therefore needs a `reference_model`, which has to be this trainer's reference.
    """

    args: Any

    _statistics: ClassVar[tuple[str, ...]] = ()

    def _check_service(self, info: pb.GetModelResponse) -> None:
        if not info.reference_model:
            raise FailedPrecondition(
                Reason.REFERENCE_OFF,
                f"{type(self).__name__} needs a reference in the inference service: start it with --reference-model.",
            )

    def _check_columns(self, columns: list[str] | None) -> None:
        _check_blind(columns or [])

    def _start(self, init: Any, args: Any, address: Addresses | None, token: str | None) -> None:
        self._compared = False
        super()._start(init, args, address, token)
        self.stats = {name: [] for name in self._statistics}

    @property
    def _other(self) -> float:
        """Weight of the reference in the distribution of the other completion."""
        raise NotImplementedError

    def _losses(self, model: Any, batch: PromptBatch, mine: Side, other: Side) -> torch.Tensor:
        """The loss of each prompt; records statistics."""
        raise NotImplementedError

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        """Sample, score, and take the gradient of one batch."""
        model.train()
        _check_blind(list(inputs))  # of a dataset that tells no columns
        batch = self._prompts(list(inputs["prompt"]), None)
        if not self._compared:
            self._compare(model, batch)
        with self._accounted(len(batch.rows)):
            drawn = [self._completions(batch), self._completions(batch, mixture_coef=self._other)]
        self._rest()
        mine, other = self._scored(inputs, drawn)
        loss = self._losses(model, batch, mine, other).mean()
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            empty_cache()
        lomo = self.args.optim in (OptimizerNames.LOMO, OptimizerNames.ADALOMO)
        self.accelerator.backward(loss, **({"learning_rate": self._get_learning_rate()} if lomo else {}))
        return loss.detach() / int(self.args.gradient_accumulation_steps)

    def _scored(self, inputs: dict[str, Any], drawn: list[tuple[torch.Tensor, torch.Tensor]]) -> list[Side]:
        prompts: list[Any] = inputs["prompt"]
        columns = {name: value for name, value in inputs.items() if name != "prompt"}
        texts: list[Any] = []
        tokens: list[list[int]] = []
        for ids, mask in drawn:
            rows = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
            tokens += rows
            texts += self.processing_class.batch_decode(rows, skip_special_tokens=True)
        if isinstance(prompts[0], list):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        scores = self._calculate_rewards_from_functions(
            prompts=prompts * 2,
            completions=texts,
            completion_ids_list=tokens,
            **{name: value * 2 if isinstance(value, list) else value for name, value in columns.items()},
        )
        sides = [
            Side(ids, mask, part)
            for (ids, mask), part in zip(drawn, torch.split(scores, len(prompts)), strict=True)
        ]
        if (penalty := self.args.missing_eos_penalty) is not None:
            for side in sides:
                side.scores[~side.contains_eos(self.eos_token_ids)] -= penalty
        return sides

    def _policy_logprobs(self, model: Any, batch: PromptBatch, side: Side) -> torch.Tensor:
        """The policy's, (prompts, longest), 0 where padded."""
        logprobs = self._forward(model, batch.ids, batch.mask, side.ids, side.mask)
        return logprobs.masked_fill(~side.mask.bool(), 0.0)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _reference_logprobs(self, model: Any, batch: PromptBatch, side: Side) -> torch.Tensor:
        if self.ref_model is not None:
            return self._policy_logprobs(self.ref_model, batch, side)
        with self.accelerator.unwrap_model(model).disable_adapter():
            return self._policy_logprobs(model, batch, side)

    def _compare(self, model: Any, batch: PromptBatch) -> None:
        """Refuse a service with another reference than this trainer's, by the logprobs of one rollout."""
        self._sync()
        sampling = {"max_tokens": 16, "ignore_eos": True, "mixture_coef": 1.0}
        rollout = self.vllm_generation.client.generate([Group(batch.rows[0])], sampling)[0][0]
        ids = torch.tensor([list(rollout.token_ids)], device=batch.ids.device)
        prompt = torch.tensor([batch.rows[0]], device=batch.ids.device)
        one = PromptBatch(prompt, torch.ones_like(prompt), batch.rows[:1], None, None)
        mine = self._reference_logprobs(model, one, Side(ids, torch.ones_like(ids), ids.new_zeros(1)))[0]
        apart = (mine.float().cpu() - torch.tensor(list(rollout.logprobs))).abs().mean().item()
        if not apart < _APART:
            raise FailedPrecondition(
                Reason.REFERENCE_MISMATCH,
                "The inference service's reference_model is not this trainer's reference: their logprobs of a rollout "
                f"are {apart:.2f} apart on average.",
            )
        # What comes now is sampled as it is where nothing was compared: a cached prefix has other rounding errors.
        self.vllm_generation.client.reset_prefix_cache()
        self._compared = True

    def _record(self, **values: torch.Tensor | float) -> None:
        """Means over all ranks, by name: `__` stands for `/`."""
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                value = self.accelerator.gather_for_metrics(value.detach().float()).mean().item()
            self.stats[name.replace("__", "/")].append(value)


def _check_blind(columns: list[str]) -> None:
    for name in ("image", "images"):
        if name in columns:
            raise invalid("train_dataset", f"the reference cannot see: no column {name!r}")
