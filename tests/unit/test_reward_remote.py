"""RemoteReward against plain gRPC servers that answer what the test says, and against none."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from tandem.errors import (
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    Reason,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
    invalid,
)
from tandem.reward.v1 import reward_pb2 as pb
from tandem.rpc import to_status
from tests import rewards
from tests.rewards import Scripted
from trainer_service.rewards import RemoteReward

Serve = Callable[..., Scripted]


@pytest.fixture
def serve(socket_folder: Path) -> Iterator[Serve]:
    """Start a server with `serve(answer)`."""
    with ExitStack() as stack:
        yield lambda answer: stack.enter_context(rewards.scripted(socket_folder, answer))


@pytest.fixture
def remote(socket_folder: Path) -> Iterator[Callable[..., RemoteReward]]:
    """Make a RemoteReward of that server with `remote(**arguments)`."""
    made: list[RemoteReward] = []

    def make(**values: Any) -> RemoteReward:
        made.append(RemoteReward(f"unix://{socket_folder}/scripted.sock", **({"timeout_s": 20} | values)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def lengths(request: pb.ScoreRequest, context: Any) -> list[float | None]:
    return [float(len(rollout.completion.text)) for rollout in request.rollouts]


def fail(context: Any, error: Any) -> None:
    status = to_status(error)
    context.set_trailing_metadata(status.trailing_metadata)
    context.abort(status.code, status.details)


Make = Callable[..., RemoteReward]
PROMPTS = ["p"] * 7
COMPLETIONS = ["x" * i for i in range(7)]


def test_rewards_come_in_order_from_batches_that_run_at_once(serve: Serve, remote: Make) -> None:
    together = threading.Barrier(4, timeout=10)

    def answer(request: pb.ScoreRequest, context: Any) -> list[float | None]:
        together.wait()
        return lengths(request, context)

    server = serve(answer)
    function = remote(batch_size=2)
    state = SimpleNamespace(global_step=5)
    found = function(
        PROMPTS, COMPLETIONS, [[i] for i in range(7)], trainer_state=state, answer=list("abcdefg")
    )
    assert found == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    requests = sorted(server.requests, key=lambda request: request.rollouts[0].token_ids[0])
    assert [len(request.rollouts) for request in requests] == [2, 2, 2, 1]
    assert {request.global_step for request in requests} == {5}
    assert len({request.request_id for request in requests}) == 4
    assert requests[3].rollouts[0] == pb.Rollout(
        prompt=pb.Turn(text="p"),
        completion=pb.Turn(text="xxxxxx"),
        token_ids=[6],
        columns={"answer": "g"},
    )


def test_a_request_is_no_larger_than_it_may_be(serve: Serve, remote: Make) -> None:
    server = serve(lengths)
    assert remote(max_request_bytes=170)(["p"] * 4, ["x" * 60] * 4) == [60.0] * 4
    assert [len(request.rollouts) for request in server.requests] == [2, 2]
    remote(batch_size=10**6)(["p"] * 5, ["x" * 2**20] * 5)  # 5 MiB, of which gRPC takes 4 at once


def test_no_opinion_is_none(serve: Serve, remote: Make) -> None:
    serve(lambda request, context: [None, 0.0])
    assert remote()(["p"] * 2, ["x"] * 2) == [None, 0.0]


def test_nothing_asks_for_nothing(serve: Serve, remote: Make) -> None:
    server = serve(lengths)
    assert remote()([], []) == []
    assert server.requests == []
    remote().check()
    assert [len(request.rollouts) for request in server.requests] == [0]


def test_a_request_that_failed_is_sent_again_and_no_other(serve: Serve, remote: Make) -> None:
    failures = [2]

    def answer(request: pb.ScoreRequest, context: Any) -> list[float | None]:
        if request.rollouts[0].token_ids[0] == 2 and failures[0]:
            failures[0] -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
        return lengths(request, context)

    server = serve(answer)
    found = remote(batch_size=2)(PROMPTS, COMPLETIONS, [[i] for i in range(7)])
    assert found == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    names = [request.request_id for request in server.requests]
    assert sorted(names.count(name) for name in set(names)) == [1, 1, 1, 3]


def test_a_service_that_asks_for_patience_gets_it(serve: Serve, remote: Make) -> None:
    times: list[float] = []

    def answer(request: pb.ScoreRequest, context: Any) -> list[float | None]:
        times.append(time.monotonic())
        if len(times) == 1:
            fail(context, ResourceExhausted(Reason.QUEUE_FULL, "full", retry_after=0.5))
        return lengths(request, context)

    serve(answer)
    assert remote()(["p"], ["x"]) == [1.0]
    assert times[1] - times[0] > 0.45


def test_it_is_sent_no_more_often_than_it_may(serve: Serve, remote: Make) -> None:
    def answer(request: pb.ScoreRequest, context: Any) -> list[float | None]:
        context.abort(grpc.StatusCode.UNAVAILABLE, "never")

    server = serve(answer)
    function = remote(max_attempts=3, name="math")
    with pytest.raises(
        Unavailable, match=r"the reward service math at unix:///.*down \(3 tries.*never"
    ) as caught:
        function(["p"], ["x"])
    assert len(server.requests) == 3
    assert caught.value.metadata == {"reward_function": "math", "address": function.address}


@pytest.mark.parametrize(
    ("error", "cls", "why"),
    [
        (invalid("rollouts[0].columns", "has no answer"), InvalidArgument, "has no answer"),
        (ResourceExhausted(Reason.QUEUE_FULL, "too many"), ResourceExhausted, "too many"),
    ],
)
def test_what_the_service_refuses_is_not_tried_again(
    serve: Serve, remote: Make, error: Any, cls: type[Exception], why: str
) -> None:
    server = serve(lambda request, context: fail(context, error))
    with pytest.raises(cls, match=f"the reward service scripted at unix:///.* failed: .*{why}") as caught:
        remote()(["p"], ["x"])
    assert len(server.requests) == 1
    assert caught.value.violations == error.violations


def test_a_bug_in_a_plain_server_is_told(serve: Serve, remote: Make) -> None:
    def answer(request: pb.ScoreRequest, context: Any) -> list[float | None]:
        raise KeyError("solution")

    serve(answer)
    with pytest.raises(Internal, match="solution"):
        remote()(["p"], ["x"])


def test_the_first_failure_ends_the_other_requests(serve: Serve, remote: Make) -> None:
    ended, begun = threading.Event(), threading.Event()

    def answer(request: pb.ScoreRequest, context: Any) -> list[float | None]:
        if request.rollouts[0].token_ids[0] == 0:
            begun.wait(10)
            fail(context, invalid("rollouts", "are not nice"))
        if not context.add_callback(ended.set):
            ended.set()
        begun.set()
        ended.wait(10)
        return []

    serve(answer)
    with pytest.raises(InvalidArgument, match="are not nice"):
        remote(batch_size=1)(["p"] * 2, ["x"] * 2, [[0], [1]])
    assert ended.wait(10)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ([1.0], r"scripted at unix:///.* returned 1 rewards for 2 rollouts"),
        ([1.0] * 3, r"returned 3 rewards for 2 rollouts"),
        ([], r"returned 0 rewards for 2 rollouts"),
        (
            [0.0, float("nan")],
            r"scripted at unix:///.* failed: scripted\[1\] is nan, which is no finite number",
        ),
        ([float("-inf"), 0.0], r"scripted\[0\] is -inf"),
    ],
    ids=str,
)
def test_rewards_that_cannot_be_are_refused(
    serve: Serve, remote: Make, answer: list[float | None], why: str
) -> None:
    serve(lambda request, context: answer)
    with pytest.raises(InvalidArgument, match=why) as caught:
        remote()(["p"] * 2, ["x"] * 2)
    assert caught.value.reason is Reason.REWARD_INVALID
    assert caught.value.violations


def test_the_index_is_that_of_the_whole_batch(serve: Serve, remote: Make) -> None:
    serve(lambda request, context: [float("nan") if request.rollouts[0].token_ids[0] == 3 else 0.0])
    with pytest.raises(InvalidArgument, match=r"scripted\[3\] is nan"):
        remote(batch_size=1)(["p"] * 5, ["x"] * 5, [[i] for i in range(5)])


def test_nobody_there_is_told_in_time_and_with_the_address(remote: Make) -> None:
    function = remote(timeout_s=0.5)
    for call in (function.check, lambda: function(["p"], ["x"])):
        begin = time.monotonic()
        with pytest.raises(Unavailable, match="is down") as caught:
            call()
        assert time.monotonic() - begin < 2.5
        assert caught.value.reason is Reason.UNREACHABLE
        assert function.address in caught.value.message


def test_one_that_comes_up_late_is_waited_for(serve: Serve, remote: Make) -> None:
    function, found = remote(), []
    calling = threading.Thread(target=lambda: found.append(function(["p"], ["xyz"])))
    calling.start()
    time.sleep(0.3)
    serve(lengths)
    calling.join(20)
    assert found == [[3.0]]


def test_one_that_does_not_answer_is_not_waited_for_longer_than_it_may(serve: Serve, remote: Make) -> None:
    go = threading.Event()

    def answer(request: pb.ScoreRequest, context: Any) -> list[float | None]:
        go.wait(10)
        return lengths(request, context)

    serve(answer)
    try:
        begin = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"scripted at unix:///.* has not answered in 0\.4 s"):
            remote(timeout_s=0.4)(["p"], ["x"])
        assert time.monotonic() - begin < 2.4
    finally:
        go.set()


def test_another_service_at_the_address_is_told(socket_folder: Path, remote: Make) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        server.add_insecure_port(f"unix:{socket_folder}/scripted.sock")
        server.start()
        with pytest.raises(Unimplemented, match="the reward service scripted at"):
            remote().check()
        server.stop(0).wait()


def test_a_copy_calls_by_itself(serve: Serve, remote: Make) -> None:
    serve(lengths)
    function = remote(batch_size=3, name="lengths")
    assert function(["p"], ["xy"]) == [2.0]
    for copied in (copy.deepcopy(function), pickle.loads(pickle.dumps(function))):  # noqa: S301  # our own
        assert copied(["p"], ["xyz"]) == [3.0]
        assert (copied.__name__, copied.address) == ("lengths", function.address)
        copied.close()
    function.close()
    assert function(["p"], ["x"]) == [1.0]


@pytest.mark.parametrize(
    ("address", "values", "field"),
    [
        ("somewhere", {}, "address"),
        ("unix:///tmp/s", {"token": "two words"}, "token"),
        ("unix:///tmp/s", {"timeout_s": 0}, "timeout_s"),
        ("unix:///tmp/s", {"batch_size": 0}, "batch_size"),
        ("unix:///tmp/s", {"max_attempts": 0}, "max_attempts"),
        ("unix:///tmp/s", {"max_request_bytes": 0}, "max_request_bytes"),
    ],
)
def test_what_is_wrong_from_the_start_is_told_then(address: str, values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        RemoteReward(address, **values)
    assert [v.field for v in caught.value.violations] == [field]


def test_a_channel_that_would_not_be_safe_is_refused_by_name() -> None:
    with pytest.raises(InvalidArgument, match=r"the reward service rewards\.example:7000 at .* another host"):
        RemoteReward("rewards.example:7000").check()


def test_the_name_is_the_sockets_or_the_hosts() -> None:
    assert RemoteReward("unix:///run/math.sock").__name__ == "math"
    assert RemoteReward("localhost:7000").__name__ == "localhost:7000"
    assert "secret" not in repr(RemoteReward("unix:///run/math.sock", token="secret"))
