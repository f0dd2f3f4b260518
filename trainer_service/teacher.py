"""A teacher for TRL's distillation trainers: an inference service that scores what the policy wrote."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tandem.errors import FailedPrecondition, Reason, TandemError, invalid
from tandem.inference.v1 import inference_pb2 as pb
from trainer_service.client import InferenceClient, is_gone
from trainer_service.replicas import Replicas
from trainer_service.tokenizers import check_tokenizer
from trainer_service.updates import ATTEMPTS

_TRY_AGAIN = (Reason.QUEUE_FULL, Reason.BASE_VERSION_MISMATCH)

Array = np.ndarray[Any, Any]


class Teacher:
    """Takes the place of TRL's VLLMClient where that asks a teacher's server for logprobs, and only there."""

    def __init__(
        self,
        client: InferenceClient | Replicas,
        *,
        timeout_s: float = 240.0,
        recover: Callable[[TandemError], None] | None = None,
        version: Callable[[], int] | None = None,
    ) -> None:
        """Prepare; nothing is called yet.

        Args:
            client: the service; closed by `close`.
            timeout_s: how many seconds to wait for a service that went away to come back.
            recover: called instead, for a teacher whose weights are not those that it started with.
            version: gives the weight version that must have scored; any will do where it is None.
        """
        self._client = client
        self._timeout_s = timeout_s
        self._recover = recover or self._wait
        self._version = version
        self._vocab_size = 0  # of the student, when `check_vocabulary` was told

    def wait_until_serving(self) -> pb.GetModelResponse:
        """Wait `timeout_s` seconds at most. See InferenceClient."""
        return self._client.wait_until_serving(self._timeout_s)

    def check_vocabulary(self, tokenizer: Any, vocab_size: int, field: str = "teacher_address") -> None:
        """Refuse a service whose token ids do not mean what the student's do.

        Args:
            tokenizer: the student's.
            vocab_size: of the student; more than its tokenizer has where it is padded, and the teacher's may be
                another.
            field: where the service's address was given.

        Raises:
            InvalidArgument: names `field`.
        """
        info = self.wait_until_serving()
        if info.vocab_size < len(tokenizer):
            raise invalid(
                field, f"its vocabulary has {info.vocab_size} tokens, the tokenizer here {len(tokenizer)}"
            )
        check_tokenizer(self._client, tokenizer, field)
        self._vocab_size = vocab_size

    def get_sequence_logprobs(
        self,
        sequences: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int],
        top_logprobs: int = 100,
        temperature: float = 1.0,
        chunk_size: int = 0,
        max_concurrent_requests: int = 4,
    ) -> dict[str, list[Any]]:
        """Score the completions in `sequences`. As TRL's, but for the temperature, which vLLM's server ignores.

        Args:
            sequences: token ids of prompt and completion.
            prompt_lengths: how many of them are the prompt's, at least 1.
            top_logprobs: K, of the most probable tokens at each position.
            temperature: of the distribution. Other than 1 needs the logprobs of the whole vocabulary.
            chunk_size: not needed: the service runs what it is sent as one batch.
            max_concurrent_requests: not needed, likewise.

        Returns:
            Lists over sequences and their completions' tokens: `logprobs` and `logprob_token_ids`, of K, the most
            probable first (tokens that the student does not have are -inf, of id 0), `actual_logprobs` and
            `actual_token_ids`, of 1.
        """
        if temperature <= 0:
            raise invalid("temperature", f"must be positive, got {temperature}")
        for row, length in enumerate(prompt_lengths):
            if length < 1:
                raise invalid(f"prompt_lengths[{row}]", "the first token has no logprob")
        asked = [i for i, ids in enumerate(sequences) if len(ids) > prompt_lengths[i]]
        top = top_logprobs if temperature == 1 else self._client.get_model().vocab_size
        scores = dict(zip(asked, self._score([sequences[i] for i in asked], top), strict=True))
        result: dict[str, list[Any]] = {
            name: [] for name in ("logprobs", "logprob_token_ids", "actual_logprobs", "actual_token_ids")
        }
        for i, (ids, length) in enumerate(zip(sequences, prompt_lengths, strict=True)):
            completion = list(ids[length:])
            actual = top_values = np.zeros((0, 1), np.float32)
            top_ids = np.zeros((0, 1), np.int64)
            if i in scores:
                actual, top_values, top_ids = _rows(scores[i], length, top_logprobs, temperature)
            if self._vocab_size:
                absent = top_ids >= self._vocab_size
                top_values, top_ids = np.where(absent, -np.inf, top_values), np.where(absent, 0, top_ids)
            result["logprobs"].append(top_values.tolist())
            result["logprob_token_ids"].append(top_ids.tolist())
            result["actual_logprobs"].append(actual.tolist())
            result["actual_token_ids"].append([[token] for token in completion])
        return result

    def close(self) -> None:
        """Close the client."""
        self._client.close()

    def _score(self, sequences: list[Sequence[int]], top: int) -> list[pb.SequenceScore]:
        for left in reversed(range(ATTEMPTS)):
            try:
                scores = self._client.score(sequences, top_logprobs=top)
                self._check_versions(scores)
            except TandemError as error:
                if not left or not (is_gone(error) or error.reason in _TRY_AGAIN):
                    raise
                self._recover(error)
            else:
                return scores
        raise AssertionError  # the loop returns or raises

    def _check_versions(self, scores: list[pb.SequenceScore]) -> None:
        if self._version is None:
            return
        versions, wanted = {score.weight_version for score in scores}, self._version()
        if versions - {wanted}:
            raise FailedPrecondition(
                Reason.BASE_VERSION_MISMATCH,
                f"Scores are of weight versions {sorted(versions)}, not of {wanted}, which was synced last: the "
                "engine was restarted, or has another trainer.",
            )

    def _wait(self, error: TandemError) -> None:
        if error.reason == Reason.QUEUE_FULL:
            time.sleep(error.retry_after or 1.0)
        else:
            self.wait_until_serving()


def check_scoring(info: pb.GetModelResponse, *, temperature: float, top_logprobs: int, field: str) -> None:
    """Refuse a teacher that cannot give the scores that are needed.

    Args:
        info: what its service says.
        temperature: of the loss.
        top_logprobs: that the loss needs at each position.
        field: what the config calls that.

    Raises:
        InvalidArgument: names `temperature` or `field`.
    """
    limit = info.vocab_size if info.max_logprobs < 0 else info.max_logprobs
    more = f"the teacher's service gives at most {limit}; start it with --engine=max_logprobs=-1"
    if temperature <= 0:
        raise invalid("temperature", f"must be positive, got {temperature}")
    if top_logprobs > limit:
        raise invalid(field, f"{top_logprobs} logprobs at each position: {more}")
    if temperature != 1 and limit < info.vocab_size:
        raise invalid(
            "temperature",
            f"scores are of temperature 1. For {temperature}, those of the whole vocabulary are needed, "
            f"{info.vocab_size} at each position: {more}",
        )


def _rows(score: pb.SequenceScore, length: int, top: int, temperature: float) -> tuple[Array, Array, Array]:
    """Of the tokens after the first `length`: their logprobs (tokens, 1), the top ones (tokens, top) and their ids."""
    actual = np.array(score.logprobs, np.float32)[:, None]
    shape = (len(actual), score.top_logprobs.k)
    values = np.array(score.top_logprobs.logprobs, np.float32).reshape(shape)[length - 1 :]
    ids = np.array(score.top_logprobs.token_ids, np.int64).reshape(shape)[length - 1 :]
    actual = actual[length - 1 :]
    if temperature != 1:
        scaled = values.astype(np.float64) / temperature
        norm = np.logaddexp.reduce(scaled, axis=1, keepdims=True)
        values, actual = scaled - norm, actual / temperature - norm
    return actual, values[:, :top], ids[:, :top]
