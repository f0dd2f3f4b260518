"""The client against a servicer that answers what the test says, over real gRPC."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from tandem.engine.v1 import engine_pb2
from tandem.errors import DeadlineExceeded, Internal, InvalidArgument, Reason, Unavailable, invalid
from tandem.inference.v1 import inference_pb2 as pb
from tandem.inference.v1 import inference_pb2_grpc
from tandem.rpc import to_status
from trainer_service.client import Group, InferenceClient


class Scripted(inference_pb2_grpc.InferenceServiceServicer):
    """Answers a prompt of tokens [a, …] with rollouts [a, number of the rollout in its request], the last
    first."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.states: list[tuple[int, str]] = []
        self.refuse: int | None = None
        self.drop = 0
        self.ended = threading.Event()

    def GetModel(self, request: Any, context: Any) -> pb.GetModelResponse:
        state, reason = self.states.pop(0) if self.states else (engine_pb2.SERVING_STATE_SERVING, "")
        return pb.GetModelResponse(state=state, reason=reason, max_model_len=64)

    def Generate(self, request: Any, context: Any) -> Iterator[pb.GenerateResponse]:
        self.requests.append(request)
        first = request.prompts[0].token_ids.ids[0]
        if self.refuse is not None:
            if first == self.refuse:
                while len(self.requests) < len(GROUPS):  # the others have begun
                    time.sleep(0.01)
                status = to_status(invalid("prompts[0]", "is not nice"))
                context.abort_with_status(_Status(*status))
            if not context.add_callback(self.ended.set):  # it was cancelled before
                self.ended.set()
            self.ended.wait(20)
        rollouts, k = [], 0
        for i, prompt in enumerate(request.prompts):
            for j in range(prompt.n):
                ids = [prompt.token_ids.ids[0], request.sampling.seed + k]
                rollouts.append(pb.Rollout(prompt_index=i, rollout_index=j, token_ids=ids))
                k += 1
        for rollout in reversed(rollouts[self.drop :]):
            yield pb.GenerateResponse(rollouts=[rollout])

    def Score(self, request: Any, context: Any) -> Iterator[pb.ScoreResponse]:
        self.requests.append(request)
        for i, sequence in reversed(list(enumerate(request.sequences))):
            yield pb.ScoreResponse(scores=[pb.SequenceScore(sequence_index=i, logprobs=[-sequence.ids[0]])])


class _Status(grpc.Status):
    def __init__(self, code: grpc.StatusCode, details: str, trailing_metadata: Any) -> None:
        self.code, self.details, self.trailing_metadata = code, details, trailing_metadata


@pytest.fixture
def scripted() -> Scripted:
    return Scripted()


@pytest.fixture
def address(scripted: Scripted) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="tdm") as folder, ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(scripted, server)
        address = f"unix://{folder}/s"
        server.add_insecure_port(address)
        server.start()
        yield address
        server.stop(0).wait()


GROUPS = [Group([1, 7, 7], 2), Group([2, 7, 7], 1), Group([3, 7, 7], 3), ([4, 7, 7], 1)]


@pytest.mark.parametrize(("limit", "calls"), [(1 << 20, 1), (45, 2), (1, 4)])
def test_a_batch_is_split_by_its_bytes_and_is_one_batch_nevertheless(
    address: str, scripted: Scripted, limit: int, calls: int
) -> None:
    client = InferenceClient(address, max_request_bytes=limit)
    rollouts = client.generate(GROUPS, {"seed": 100, "max_tokens": 5})
    assert len(scripted.requests) == calls
    # In order, and each with the seed that it has in one undivided request.
    assert [[list(r.token_ids) for r in group] for group in rollouts] == [
        [[1, 100], [1, 101]],
        [[2, 102]],
        [[3, 103], [3, 104], [3, 105]],
        [[4, 106]],
    ]
    assert all(request.sampling.max_tokens == 5 for request in scripted.requests)
    client.close()


def test_what_is_needed_of_the_rollouts_is_said(address: str, scripted: Scripted) -> None:
    client = InferenceClient(address)
    client.generate(GROUPS[:1])
    with pytest.raises(InvalidArgument, match="keep_cache"):
        client.generate([Group([1], 1)], one_version=True, keep_cache=True)
    client.generate([Group([1], 1)], keep_cache=True)
    assert scripted.requests.pop().on_commit == pb.ON_COMMIT_CONTINUE_CACHED
    client.generate([Group([1, 7], 2, (), 9)], min_weight_version=4, version_wait_s=0.25, one_version=True)
    first, second = scripted.requests
    assert (first.min_weight_version, first.on_commit) == (0, pb.ON_COMMIT_UNSPECIFIED)
    assert not first.HasField("max_version_wait")
    assert not first.prompts[0].HasField("seed")
    assert (second.min_weight_version, second.on_commit) == (4, pb.ON_COMMIT_STOP)
    assert second.max_version_wait.ToNanoseconds() == 250_000_000
    assert second.prompts[0].seed == 9
    with pytest.raises(TypeError, match="version"):
        client.generate(GROUPS[:1], version=3)
    client.close()


def test_scores_come_back_in_order(address: str, scripted: Scripted) -> None:
    client = InferenceClient(address, max_request_bytes=1)
    scores = client.score([[3, 1], [1, 1], [2, 1]], top_logprobs=2)
    assert [list(score.logprobs) for score in scores] == [[-3.0], [-1.0], [-2.0]]
    assert [request.top_logprobs for request in scripted.requests] == [2, 2, 2]
    client.close()


def test_nothing_to_do(address: str, scripted: Scripted) -> None:
    client = InferenceClient(address)
    assert (client.generate([]), client.score([]), scripted.requests) == ([], [], [])
    client.close()


def test_missing_rollouts_are_an_error(address: str, scripted: Scripted) -> None:
    scripted.drop = 2
    client = InferenceClient(address)
    with pytest.raises(Internal, match="2 rollouts missing"):
        client.generate(GROUPS)
    client.close()


def test_one_refusal_cancels_the_rest_of_the_batch(address: str, scripted: Scripted) -> None:
    scripted.refuse = 1
    client = InferenceClient(address, max_request_bytes=1)
    started = time.monotonic()
    with pytest.raises(InvalidArgument) as raised:
        client.generate(GROUPS)
    assert raised.value.violations[0].field == "prompts[0]"
    assert time.monotonic() - started < 5
    assert scripted.ended.wait(5), "the others were told"
    client.close()


def test_every_call_has_a_deadline(address: str, scripted: Scripted) -> None:
    scripted.refuse = 99
    client = InferenceClient(address)
    with pytest.raises(DeadlineExceeded):
        client.generate(GROUPS, timeout_s=0.3)
    client.close()


def test_waiting_goes_on_through_loading_and_says_what_it_waited_for(
    address: str, scripted: Scripted
) -> None:
    scripted.states = [
        (engine_pb2.SERVING_STATE_LOADING, "reading shards"),
        (engine_pb2.SERVING_STATE_TORN, "half written"),
    ]
    client = InferenceClient(address)
    assert client.wait_until_serving(5).max_model_len == 64
    scripted.states = [(engine_pb2.SERVING_STATE_TORN, "half written")] * 100
    with pytest.raises(Unavailable, match="not serving after 3 s: TORN, half written"):
        client.wait_until_serving(3.0)
    client.close()


def test_nobody_there() -> None:
    client = InferenceClient("unix:///nowhere/at/all")
    with pytest.raises(Unavailable) as raised:
        client.wait_until_serving(0.3)
    assert raised.value.reason == Reason.UNREACHABLE
    client.close()
