"""Nash-MD over an inference service."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from tandem.errors import invalid
from trainer_service._trl_experimental import OnlineDPOConfig
from trainer_service.trainers.against import AgainstTrainer, Side
from trainer_service.trainers.pairs import PromptBatch, Schedule, check_schedule


@dataclass
class NashMDConfig(OnlineDPOConfig):
    """OnlineDPOConfig, and TRL 1.13's field of Nash-MD.

    mixture_coef: weight of the reference in the mixture that the policy is set against, in [0, 1]; or a list, one for
        each epoch, of which the last stays.
    """

    mixture_coef: Any = field(
        default_factory=lambda: [0.5],
        metadata={"help": "Weight of the reference in the mixture, or one for each epoch."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        if isinstance(self.mixture_coef, list) and len(self.mixture_coef) == 1:
            self.mixture_coef = self.mixture_coef[0]


class NashMDTrainer(AgainstTrainer):
    """Nash learning from human feedback by mirror descent (Munos et al. 2023, https://arxiv.org/abs/2312.00886).

    Each prompt has a completion of the policy and one of the geometric mixture of policy and reference, both sampled by
    the engine. The loss is the policy gradient of the probability that the first is preferred, with the divergence from
    the reference as regularisation; it equals TRL 1.13.0's. What is preferred is said by `judge`, or by the sigmoid of
    the difference of `reward_funcs`.
    """

    _tag_names = ["trl", "nash-md"]  # noqa: RUF012  # TRL's own way
    _name = "Nash-MD"
    _paper = {  # noqa: RUF012
        "title": "Nash Learning from Human Feedback",
        "id": "2312.00886",
        "citation": textwrap.dedent("""\
            @inproceedings{munos2024nash,
                title     = {{Nash Learning from Human Feedback}},
                author    = {R{\\'{e}}mi Munos and others},
                year      = 2024,
                booktitle = {Forty-first International Conference on Machine Learning, {ICML} 2024},
            }"""),
    }

    _config = NashMDConfig
    _statistics: ClassVar[tuple[str, ...]] = (
        "loss/kl",
        "objective/entropy",
        "loss/score",
        "rewards/probabilities",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "val/model_contain_eos_token",
        "val/ref_contain_eos_token",
        "rewards/chosen",
        "rewards/rejected",
        "beta",
        "mixture_coef",
    )

    def _check(self, args: Any) -> None:
        super()._check(args)
        check_schedule("mixture_coef", args.mixture_coef, args)
        for value in args.mixture_coef if isinstance(args.mixture_coef, list) else [args.mixture_coef]:
            if not 0 <= value <= 1:
                raise invalid("mixture_coef", f"must be in [0, 1], is {value}")

    @property
    def mixture_coef(self) -> float:
        """This epoch's."""
        schedule: Schedule = self.args.mixture_coef
        return self._scheduled(schedule)

    @property
    def _other(self) -> float:
        return self.mixture_coef

    def _losses(self, model: Any, batch: PromptBatch, mine: Side, other: Side) -> torch.Tensor:
        probability = mine.scores if self._judged else torch.sigmoid(mine.scores - other.scores)
        policy = self._policy_logprobs(model, batch, mine)
        reference = self._reference_logprobs(model, batch, mine)
        # A half is the control variate: the probability of winning against oneself.
        score = (probability - 0.5) * policy.sum(1)
        log_ratio = (policy - reference).detach()
        losses = self.beta * (log_ratio * policy).sum(1) - score
        margin = log_ratio.sum(1)
        eos = self.eos_token_ids
        self._record(
            loss__score=score,
            loss__kl=margin,
            logps__chosen=policy.sum(1),
            logps__rejected=reference.sum(1),
            rewards__chosen=mine.scores,
            rewards__rejected=other.scores,
            rewards__probabilities=probability,
            objective__entropy=-policy.sum(1),
            rewards__margins=margin,
            rewards__accuracies=margin > 0,
            val__model_contain_eos_token=mine.contains_eos(eos),
            val__ref_contain_eos_token=other.contains_eos(eos),
            beta=self.beta,
            mixture_coef=self.mixture_coef,
        )
        return losses
