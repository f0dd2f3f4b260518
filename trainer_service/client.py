"""A client of the inference service: a few verbs, each with a deadline, over one channel."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem import rpc
from tandem.engine.v1 import engine_pb2
from tandem.engine.v1.engine_pb2 import ServingState
from tandem.engine.v1.engine_pb2_grpc import EngineServiceStub
from tandem.errors import DeadlineExceeded, Internal, Reason, TandemError, Unavailable
from tandem.inference.v1 import inference_pb2 as pb
from tandem.inference.v1.inference_pb2_grpc import InferenceServiceStub
from tandem.rpc import options
from tandem.weights.v1.weights_pb2_grpc import WeightServiceStub
from trainer_service.batches import Sampling, Wanted, complete
from trainer_service.sampling import sampling_params

READY = (ServingState.SERVING_STATE_SERVING, ServingState.SERVING_STATE_PAUSED)
#: States in which the engine takes an update: a sleeping one too, and a torn one is healed by it.
WRITABLE = (*READY, ServingState.SERVING_STATE_ASLEEP, ServingState.SERVING_STATE_TORN)
#: In which it may sleep. A torn one does where its trainer died in a step that it made while the engine slept.
PERHAPS_ASLEEP = (ServingState.SERVING_STATE_ASLEEP, ServingState.SERVING_STATE_TORN)


class Group(NamedTuple):
    """One prompt: token ids, how many rollouts to sample, and encoded images in the order of their places.

    seed: of the first rollout; each next one's is one more. None leaves it to the sampling parameters.
    """

    token_ids: Sequence[int]
    n: int = 1
    images: Sequence[bytes] = ()
    seed: int | None = None


class InferenceClient:
    """Calls of a trainer to one inference service. Safe to use from several threads; not across a fork."""

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        timeout_s: float = 60.0,
        max_request_bytes: int = options.MAX_MESSAGE_BYTES // 4,
        **channel: Any,
    ) -> None:
        """Open a channel; nothing is called yet.

        Args:
            address: `unix:///absolute/path` or `host:port`.
            token: the service's token.
            timeout_s: deadline in seconds of the calls that take no `timeout_s` of their own.
            max_request_bytes: a batch of more bytes is sent in several calls, which the engine runs together.
            channel: further arguments of `tandem.rpc.connect`, such as `ca_file`.

        Raises:
            InvalidArgument: the address or the token is malformed.
        """
        self.address = address
        self._timeout_s = timeout_s
        self._max_request_bytes = max_request_bytes
        self._channel = rpc.connect(address, token=token, **channel)
        self._inference = InferenceServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._engine = EngineServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._health = health_pb2_grpc.HealthStub(self._channel)
        #: The weight plane's calls, for `trainer_service.session`.
        self.weights = WeightServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def get_model(self, timeout_s: float | None = None) -> pb.GetModelResponse:
        """Ask what is served.

        Raises:
            Unavailable: nobody answers.
        """
        with rpc.translated():
            timeout_s = timeout_s or self._timeout_s
            model: pb.GetModelResponse = self._inference.GetModel(pb.GetModelRequest(), timeout=timeout_s)
            return model

    def wait_until_serving(
        self, timeout_s: float, *, accept: Sequence[ServingState] = READY
    ) -> pb.GetModelResponse:
        """Wait until the engine's state is one of `accept`.

        Raises:
            Unavailable: it is not after `timeout_s` seconds; the message has the last reason.
            TandemError: an answer that waiting does not change, such as a wrong token.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            left = deadline - time.monotonic()
            try:
                model = self.get_model(timeout_s=max(0.1, min(left, 5.0)))
                if model.state in accept:
                    return model
                name = ServingState.Name(model.state).removeprefix("SERVING_STATE_")
                why = f"{name}, {model.reason}" if model.reason else name
            except (Unavailable, DeadlineExceeded) as error:
                why = error.message
            if left <= 0:
                message = (
                    f"The inference service at {self.address} is not serving after {timeout_s:.0f} s: {why}"
                )
                raise Unavailable(Reason.UNREACHABLE, message)
            time.sleep(min(0.2, max(left, 0.0)))

    def generate(
        self,
        batch: Sequence[Group | tuple[Sequence[int], int]],
        sampling: pb.SamplingParams | Mapping[str, Any] | None = None,
        *,
        timeout_s: float = 3600.0,
        **wanted: Any,
    ) -> list[list[pb.Rollout]]:
        """Sample rollouts.

        Args:
            batch: prompts; a plain (token_ids, n) pair will do.
            sampling: how, as the message or under vLLM's names.
            timeout_s: deadline in seconds of the whole batch.
            wanted: fields of `Wanted`.

        Returns:
            For each prompt in order its `n` whole rollouts, in order.

        Raises:
            InvalidArgument: names the field; nothing was sampled.
            TandemError: what the service says; the rest of the batch is cancelled.
        """
        groups = [Group(*group) for group in batch]
        done: list[list[pb.Rollout | None]] = [[None] * g.n for g in groups]
        for group, k, rollout in self.sample(groups, sampling, Wanted(**wanted), timeout_s):
            done[group][k] = rollout
        return complete(done)

    def sample(
        self,
        groups: Sequence[Group],
        sampling: pb.SamplingParams | Mapping[str, Any] | None,
        wanted: Wanted,
        timeout_s: float,
    ) -> Sampling:
        """Begin what `generate` does, and return what gives the rollouts."""
        params = sampling if isinstance(sampling, pb.SamplingParams) else sampling_params(sampling or {})
        prompts = [
            pb.Prompt(token_ids=pb.TokenIds(ids=g.token_ids), images=g.images, n=g.n, seed=g.seed)
            for g in groups
        ]
        calls, before = [], 0
        for part in _parts(prompts, self._max_request_bytes):
            request = wanted.request(prompts[part.start : part.stop], params)
            if params.HasField("seed"):  # as if the batch had been one request
                request.sampling.seed = params.seed + before
            before += sum(g.n for g in groups[part.start : part.stop])
            calls.append((part.start, self._inference.Generate(request, timeout=timeout_s)))
        return Sampling(calls)

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        top_logprobs: int = 0,
        lora: str = "",
        timeout_s: float = 3600.0,
    ) -> list[pb.SequenceScore]:
        """Get the logprobs of `sequences` of token ids, in their order. Errors are those of `generate`."""
        messages = [pb.TokenIds(ids=ids) for ids in sequences]
        requests = [
            (
                part.start,
                pb.ScoreRequest(
                    sequences=messages[part.start : part.stop], top_logprobs=top_logprobs, lora=lora
                ),
            )
            for part in _parts(messages, self._max_request_bytes)
        ]
        scores: dict[int, pb.SequenceScore] = {}
        for start, response in self._stream(self._inference.Score, requests, timeout_s):
            scores |= {start + score.sequence_index: score for score in response.scores}
        if len(scores) != len(sequences):
            raise Internal(Reason.BUG, f"The service scored {len(scores)} of {len(sequences)} sequences.")
        return [scores[index] for index in range(len(sequences))]

    def tokenize(
        self, texts: Sequence[str | Sequence[Mapping[str, str]]], timeout_s: float | None = None
    ) -> list[list[int]]:
        """Get the token ids that the service makes of each of `texts`, with its special tokens.

        Messages, each with role and content, are rendered with the model's template.
        """
        request = pb.TokenizeRequest(prompts=[_prompt(text) for text in texts])
        with rpc.translated():
            answer = self._inference.Tokenize(request, timeout=timeout_s or self._timeout_s)
        return [list(prompt.ids) for prompt in answer.prompts]

    def sleep(self, timeout_s: float | None = None) -> int:
        """Have the engine free its KV cache, once what runs has ended. The weights stay, and take updates.

        Returns:
            Bytes that were freed on the device on which it was most; 0 of an engine that slept before.

        Raises:
            FailedPrecondition: SLEEP_MODE_OFF, the engine was started without enable_sleep_mode.
        """
        with rpc.translated():
            answer = self._engine.Sleep(engine_pb2.SleepRequest(), timeout=timeout_s or self._timeout_s)
        return int(answer.released_bytes)

    def wake_up(self, timeout_s: float | None = None) -> None:
        """Have the engine rebuild what `sleep` freed. Nothing happens where it is awake."""
        with rpc.translated():
            self._engine.WakeUp(engine_pb2.WakeUpRequest(), timeout=timeout_s or self._timeout_s)

    def reset_prefix_cache(self, timeout_s: float | None = None) -> None:
        """Have the engine forget the prefixes that it has cached."""
        with rpc.translated():
            self._engine.ResetPrefixCache(
                engine_pb2.ResetPrefixCacheRequest(), timeout=timeout_s or self._timeout_s
            )

    def check_health(self, timeout_s: float) -> grpc.Future[Any]:
        """Ask whether it serves, without waiting: what the future has is a HealthCheckResponse."""
        request = health_pb2.HealthCheckRequest(service="tandem.inference.v1.InferenceService")
        future: grpc.Future[Any] = self._health.Check.future(request, timeout=timeout_s)
        return future

    def close(self) -> None:
        """Close the channel. Calls that run are cancelled."""
        self._channel.close()

    def _stream(
        self, method: Callable[..., Any], requests: Sequence[tuple[int, Any]], timeout_s: float
    ) -> Iterator[tuple[int, Any]]:
        """(first index, response) of all requests, which run at once; all are cancelled when one fails."""
        with rpc.translated():
            calls = [(start, method(request, timeout=timeout_s)) for start, request in requests]
            try:
                for start, call in calls:
                    for response in call:
                        yield start, response
            finally:
                for _, call in calls:
                    call.cancel()


def _prompt(text: str | Sequence[Mapping[str, str]]) -> pb.Prompt:
    if isinstance(text, str):
        return pb.Prompt(text=text)
    messages = [pb.ChatMessage(role=message["role"], content=message["content"]) for message in text]
    return pb.Prompt(chat=pb.Chat(messages=messages))


def _parts(messages: Sequence[Any], limit: int) -> Iterator[range]:
    """Ranges of `messages`, each as long as its bytes stay under `limit`, and at least one long."""
    start, size = 0, 0
    for index, message in enumerate(messages):
        more = message.ByteSize() + 8
        if index > start and size + more > limit:
            yield range(start, index)
            start, size = index, 0
        size += more
    if messages:
        yield range(start, len(messages))


def is_gone(error: TandemError) -> bool:
    """Whether the engine cannot be reached or went away, so that waiting for it may help."""
    return isinstance(error, Unavailable) or error.reason == Reason.SESSION_NOT_FOUND
