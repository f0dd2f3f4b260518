"""Judges say which of two completions is better. TRL 1.16 has none any more; these keep its former convention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from tandem.errors import InvalidArgument, Reason, Violation, invalid
from trainer_service.rewards.checks import RewardFunction, check_callable, is_async, name_of, verified

#: A text, or the messages of a chat.
Text = str | Sequence[dict[str, Any]]


@runtime_checkable
class PairwiseJudge(Protocol):
    """What a judge has to have. It may also take `return_scores`, for probabilities in place of ranks."""

    def judge(
        self, prompts: Sequence[Text], completions: Sequence[Sequence[Text]], shuffle_order: bool = True
    ) -> Sequence[int]:
        """Compare the completions of each prompt.

        Args:
            prompts: what was asked.
            completions: a pair for each prompt.
            shuffle_order: whether to see to it that the order in which the two are shown does not matter.

        Returns:
            For each prompt the index of the better completion, 0 or 1. With `return_scores=True`, where a judge takes
            that, the probability that the first is better.
        """
        ...


class JudgeReward:
    """A reward function for trainers that compare pairs: the better completion earns 1, the other one 0.

    Completions come in blocks: the first of each prompt, then the second of each.
    """

    def __init__(
        self,
        judge: PairwiseJudge,
        *,
        probabilities: bool = False,
        shuffle_order: bool = True,
        name: str | None = None,
    ) -> None:
        """Make it.

        Args:
            judge: who compares.
            probabilities: whether completions earn the probability of being the better one, for a judge that takes
                `return_scores`.
            shuffle_order: given to the judge.
            name: in metrics and errors. By default the judge's class.

        Raises:
            InvalidArgument: the judge cannot judge.
        """
        if not isinstance(judge, PairwiseJudge) or isinstance(judge, type):
            raise invalid("judge", f"is an object with a method `judge`, not {type(judge).__name__}")
        self.judge = judge
        self.probabilities = probabilities
        self.shuffle_order = shuffle_order
        self.__name__ = name or type(judge).__name__

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
    ) -> list[float]:
        """Rewards of completions in blocks.

        Raises:
            InvalidArgument: they are not in blocks; or REWARD_INVALID, the judge returned the wrong number of ranks, or
                one that is none.
        """
        half, odd = divmod(len(completions), 2)
        if odd or len(prompts) != len(completions) or list(prompts[:half]) != list(prompts[half:]):
            raise invalid(
                "reward_funcs",
                f"the judge {self.__name__} compares two completions of each prompt, which come in blocks: it is for "
                "OnlineDPOTrainer, NashMDTrainer and XPOTrainer",
            )
        pairs = [[completions[i], completions[half + i]] for i in range(half)]
        more = {"return_scores": True} if self.probabilities else {}
        given = self.judge.judge(list(prompts[:half]), pairs, shuffle_order=self.shuffle_order, **more)
        first = self._first(verified(given, half, self.__name__))
        return [*first, *(1.0 - value for value in first)]

    def _first(self, given: Sequence[float | None]) -> list[float]:
        """What the first completion of each pair earns."""
        found, violations = [], []
        for i, value in enumerate(given):
            if value is not None and (0 <= value <= 1 if self.probabilities else value in (0, 1)):
                found.append(value if self.probabilities else 1.0 - value)
            else:
                allowed = (
                    "a probability" if self.probabilities else "0 or 1, the index of the better completion"
                )
                violations.append(Violation(f"{self.__name__}[{i}]", f"is {value}, and has to be {allowed}"))
        if violations:
            raise InvalidArgument(
                Reason.REWARD_INVALID,
                f"the judge {self.__name__} failed: {violations[0].field} {violations[0].description}",
                violations=violations,
                metadata={"reward_function": self.__name__},
            )
        return found


class RewardJudge:
    """A judge that compares by a reward function. The order of the two does not matter to it."""

    def __init__(self, reward_func: RewardFunction) -> None:
        """Make it.

        Args:
            reward_func: with TRL's signature. It gets prompts and completions alone.

        Raises:
            InvalidArgument: it is no function, or an async one.
        """
        check_callable(reward_func, "reward_func")
        if is_async(reward_func):
            raise invalid("reward_func", f"{name_of(reward_func)} is async, and a judge does not wait")
        self.reward_func = reward_func

    def judge(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Sequence[Text]],
        shuffle_order: bool = True,
        return_scores: bool = False,
    ) -> list[int] | list[float]:
        """Compare.

        Args:
            prompts: what was asked.
            completions: a pair for each prompt.
            shuffle_order: not needed.
            return_scores: whether to return probabilities: the logistic function of the difference.

        Returns:
            For each prompt the index of the completion with more reward, the first where they are equal; or the
            probability that the first is better.

        Raises:
            InvalidArgument: REWARD_INVALID, the function returned something that cannot be compared.
        """
        pairs = [*(pair[0] for pair in completions), *(pair[1] for pair in completions)]
        name = name_of(self.reward_func)
        rewards = verified(
            self.reward_func(prompts=[*prompts, *prompts], completions=pairs), len(pairs), name
        )
        found = [value for value in rewards if value is not None]
        if len(found) != len(rewards):
            index = rewards.index(None)
            raise InvalidArgument(
                Reason.REWARD_INVALID,
                f"the reward function {name} failed: it has no opinion on completion {index}, and the judge needs one",
                violations=[Violation(f"{name}[{index}]", "is None")],
                metadata={"reward_function": name},
            )
        ahead = [a - b for a, b in zip(found[: len(prompts)], found[len(prompts) :], strict=True)]
        if return_scores:
            return [_logistic(value) for value in ahead]
        return [0 if value >= 0 else 1 for value in ahead]


def _logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
