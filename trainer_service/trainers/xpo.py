"""XPO over an inference service."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.nn.functional import logsigmoid

from tandem.errors import invalid
from trainer_service._trl_experimental import OnlineDPOConfig
from trainer_service.trainers.against import AgainstTrainer, Side
from trainer_service.trainers.pairs import PromptBatch, Schedule, check_schedule


@dataclass
class XPOConfig(OnlineDPOConfig):
    """OnlineDPOConfig, and TRL 1.13's field of XPO.

    alpha: weight of the exploration bonus, or a list, one for each epoch, of which the last stays.
    """

    alpha: Any = field(
        default_factory=lambda: [1e-5],
        metadata={"help": "Weight of the exploration bonus, or one for each epoch."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        if isinstance(self.alpha, list) and len(self.alpha) == 1:
            self.alpha = self.alpha[0]


class XPOTrainer(AgainstTrainer):
    """Exploratory preference optimization (Xie et al. 2024, https://arxiv.org/abs/2405.21046).

    Each prompt has a completion of the policy and one of the reference, both sampled by the engine. The loss is online
    DPO's of this pair, and `alpha` times the policy's logprob of the reference's completion: the policy is drawn away
    from what the reference knows. It equals TRL 1.13.0's.
    """

    _tag_names = ["trl", "xpo"]  # noqa: RUF012  # TRL's own way
    _name = "XPO"
    _paper = {  # noqa: RUF012
        "title": "Exploratory Preference Optimization: Harnessing Implicit Q*-Approximation for Sample-Efficient RLHF",
        "id": "2405.21046",
        "citation": textwrap.dedent("""\
            @article{xie2024exploratory,
                title  = {{Exploratory Preference Optimization: Harnessing Implicit Q*-Approximation for
                           Sample-Efficient RLHF}},
                author = {Tengyang Xie and others},
                year   = 2024,
                eprint = {arXiv:2405.21046}
            }"""),
    }

    _config = XPOConfig
    _statistics: ClassVar[tuple[str, ...]] = (
        "loss/dpo",
        "loss/xpo",
        "objective/kl",
        "objective/entropy",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "val/model_contain_eos_token",
        "val/ref_contain_eos_token",
        "objective/model_scores",
        "objective/ref_scores",
        "objective/scores_margin",
        "alpha",
        "beta",
    )

    def _check(self, args: Any) -> None:
        super()._check(args)
        check_schedule("alpha", args.alpha, args)
        if args.loss_type not in ("sigmoid", "ipo"):
            raise invalid("loss_type", f"must be sigmoid or ipo, is {args.loss_type!r}")

    @property
    def alpha(self) -> float:
        """This epoch's."""
        schedule: Schedule = self.args.alpha
        return self._scheduled(schedule)

    @property
    def _other(self) -> float:
        return 1.0  # the reference alone

    def _losses(self, model: Any, batch: PromptBatch, mine: Side, other: Side) -> torch.Tensor:
        # Of the policy's own completion, then of the reference's.
        policy = self._policy_logprobs(model, batch, mine).sum(1)
        bonus = self._policy_logprobs(model, batch, other).sum(1)
        known = self._reference_logprobs(model, batch, mine).sum(1)
        usual = self._reference_logprobs(model, batch, other).sum(1)
        preferred = mine.scores >= other.scores
        mine_ratio, other_ratio = policy - known, bonus - usual
        chosen = torch.where(preferred, mine_ratio, other_ratio)
        rejected = torch.where(preferred, other_ratio, mine_ratio)
        logits = chosen - rejected
        if self.args.loss_type == "sigmoid":
            dpo = -logsigmoid(self.beta * logits)
        else:
            dpo = (logits - 1 / (2 * self.beta)) ** 2
        xpo = self.alpha * bonus
        margin = self.beta * logits
        eos = self.eos_token_ids
        self._record(
            loss__dpo=dpo,
            loss__xpo=xpo,
            objective__model_scores=mine.scores,
            objective__ref_scores=other.scores,
            objective__scores_margin=mine.scores - other.scores,
            # TRL 1.13 logs these two as the sum of policy and reference.
            logps__chosen=torch.where(preferred, policy + known, bonus + usual),
            logps__rejected=torch.where(preferred, bonus + usual, policy + known),
            rewards__chosen=self.beta * chosen,
            rewards__rejected=self.beta * rejected,
            objective__kl=(mine_ratio + other_ratio) / 2,
            objective__entropy=-(policy + bonus) / 2,
            rewards__margins=margin,
            rewards__accuracies=margin > 0,
            val__model_contain_eos_token=mine.contains_eos(eos),
            val__ref_contain_eos_token=other.contains_eos(eos),
            alpha=self.alpha,
            beta=self.beta,
        )
        return dpo + xpo
