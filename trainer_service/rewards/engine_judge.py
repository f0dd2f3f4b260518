"""A judge that asks a model: any inference service, the policy's own too."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tandem.errors import Internal, Reason, Unavailable, invalid
from tandem.inference.v1 import inference_pb2 as pb
from trainer_service.client import Group, InferenceClient
from trainer_service.rewards.judges import Text

SYSTEM = (
    "You compare two answers to the same prompt. Prefer the one that is correct, does what was asked, and is clear. "
    "Length and order do not count. Write 0 if answer 0 is better and 1 if answer 1 is better, and nothing else."
)
QUESTION = "# Prompt\n\n{prompt}\n\n# Answer 0\n\n{first}\n\n# Answer 1\n\n{second}\n\nWhich answer is better, 0 or 1?"

_CHOICES = ("0", "1")


class EngineJudge:
    """Shows a chat model each pair in both orders, and lets it write 0 or 1.

    What it decides by is not what was sampled, but how probable the model finds each of the two, over both orders: a
    model that likes what comes first says nothing by that.
    """

    def __init__(
        self,
        client: InferenceClient,
        *,
        system: str = SYSTEM,
        question: str = QUESTION,
        lora: str = "",
        timeout_s: float = 600.0,
    ) -> None:
        """Make it; nothing is called yet.

        Args:
            client: of the service that judges.
            system: the system message. None is sent if it is empty.
            question: the user's message, with `{prompt}`, `{first}` and `{second}`.
            lora: a loaded adapter to judge with.
            timeout_s: deadline in seconds of a batch.

        Raises:
            InvalidArgument: the question lacks one of the three, or has others.
        """
        try:
            shown = question.format(prompt="\0p", first="\0a", second="\0b")
        except (KeyError, IndexError, ValueError) as error:
            raise invalid(
                "question", f"has {{prompt}}, {{first}} and {{second}} to fill in, not {error}"
            ) from error
        if not all(mark in shown for mark in ("\0p", "\0a", "\0b")):
            raise invalid("question", "needs {prompt}, {first} and {second}")
        self._client = client
        self._system = system
        self._question = question
        self._lora = lora
        self._timeout_s = timeout_s
        self._sampling = pb.SamplingParams(
            temperature=0,
            max_tokens=8,  # one and the end, in most vocabularies
            structured_output=pb.StructuredOutput(choice=pb.Choice(values=_CHOICES)),
        )

    def judge(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Sequence[Text]],
        shuffle_order: bool = True,
        return_scores: bool = False,
    ) -> list[int] | list[float]:
        """Ask.

        Args:
            prompts: texts or chats.
            completions: a pair for each.
            shuffle_order: whether each pair is shown in both orders. Else in the given one alone, which costs half.
            return_scores: whether to return probabilities.

        Returns:
            For each prompt the index of the better completion, the first where both are equally good; or the
            probability that the first is better.

        Raises:
            InvalidArgument: PROMPT_TOO_LONG, or the model has no chat template.
            TandemError: what else the service says.
        """
        orders = ((0, 1), (1, 0)) if shuffle_order else ((0, 1),)
        pairs = list(zip(prompts, completions, strict=True))
        if not pairs:
            return []
        chats = [self._chat(prompt, pair[a], pair[b]) for a, b in orders for prompt, pair in pairs]
        prompt_ids = self._client.tokenize(chats, timeout_s=self._timeout_s)
        rollouts = self._client.generate(
            [Group(ids) for ids in prompt_ids],
            self._sampling,
            text=True,
            lora=self._lora,
            timeout_s=self._timeout_s,
        )
        zero = [_probability_of_zero(rollout) for (rollout,) in rollouts]
        first = zero[: len(pairs)]
        if shuffle_order:
            first = [(a + 1 - b) / 2 for a, b in zip(first, zero[len(pairs) :], strict=True)]
        return first if return_scores else [0 if value >= 0.5 else 1 for value in first]

    def _chat(self, prompt: Text, first: Text, second: Text) -> list[dict[str, str]]:
        question = self._question.format(prompt=_flat(prompt), first=_flat(first), second=_flat(second))
        system = [{"role": "system", "content": self._system}] if self._system else []
        return [*system, {"role": "user", "content": question}]


def _probability_of_zero(rollout: pb.Rollout) -> float:
    """Between the two choices, whichever was written."""
    if rollout.finish_reason == pb.FINISH_REASON_ABORTED:
        raise Unavailable(Reason.INTERRUPTED, "The judge was interrupted: somebody paused the engine.")
    if rollout.text not in _CHOICES:
        raise Internal(Reason.BUG, f"The judge wrote {rollout.text!r}, though it may only write 0 or 1.")
    written = math.exp(min(sum(rollout.logprobs), 0.0))
    return written if rollout.text == "0" else 1 - written


def _flat(text: Text) -> str:
    """A text, or a chat as one. A chat of one message is what that says."""
    if isinstance(text, str):
        return text
    said = []
    for message in text:
        content = message.get("content") or ""
        if not isinstance(content, str):
            content = "".join(part.get("text", "") for part in content)
        said.append((message.get("role", ""), content))
    if len(said) == 1:
        return said[0][1]
    return "\n\n".join(f"{role}: {content}" for role, content in said)
