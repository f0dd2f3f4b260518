"""Rollouts over several services: who is asked for what, and what becomes of it when one is lost. Over real gRPC, with
services that do what the test says.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.engine.v1 import engine_pb2
from tandem.errors import (
    InvalidArgument,
    NotFound,
    Reason,
    ResourceExhausted,
    TandemError,
    Unavailable,
    invalid,
)
from tandem.inference.v1 import inference_pb2 as pb
from tandem.inference.v1 import inference_pb2_grpc
from tandem.rpc import to_status
from trainer_service.client import Group, InferenceClient
from trainer_service.prefixes import Prefixes
from trainer_service.replicas import Replicas

GONE = Unavailable(Reason.UNREACHABLE, "gone")
TOO_OLD = Unavailable(Reason.WEIGHTS_TOO_OLD, "too old")
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Service(inference_pb2_grpc.InferenceServiceServicer, health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """A rollout of a prompt [a, …] with seed s is [a, s]. `errors` are raised by the next calls, each after as many
    rollouts as it has with it. While it is frozen, nothing is said.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.requests: list[pb.GenerateRequest] = []
        self.given: list[tuple[int, int]] = []
        self.errors: list[tuple[int, TandemError]] = []
        self.freeze_after: int | None = None
        self.thawed = threading.Event()
        self.thawed.set()
        self.status = SERVING
        self.model = pb.GetModelResponse(
            state=engine_pb2.SERVING_STATE_SERVING, max_model_len=64, weight_version=1
        )
        self.broken_off = threading.Event()
        self.before_it_refuses: Callable[[], None] = lambda: None
        self.address = ""

    def GetModel(self, request: Any, context: Any) -> pb.GetModelResponse:
        return self.model

    def Check(self, request: Any, context: Any) -> Any:
        self.thawed.wait(60)
        return health_pb2.HealthCheckResponse(status=self.status)

    def Generate(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        self.requests.append(request)
        context.add_callback(self.broken_off.set)
        most, error = self.errors.pop(0) if self.errors else (1 << 30, None)
        for i, prompt in enumerate(request.prompts):
            for j in range(prompt.n):
                if self.freeze_after is not None and len(self.given) >= self.freeze_after:
                    self.thawed.clear()
                    self.thawed.wait(60)
                if most == 0 and error is not None:
                    self.before_it_refuses()
                    refuse(context, error)
                most -= 1
                ids = [prompt.token_ids.ids[0], (prompt.seed + j) % 2**32]
                self.given.append((ids[0], ids[1]))
                yield pb.GenerateResponse(
                    rollouts=[pb.Rollout(prompt_index=i, rollout_index=j, token_ids=ids)]
                )
        if most == 0 and error is not None:
            refuse(context, error)

    @property
    def asked(self) -> list[tuple[int, int]]:
        """(prompt, rollouts) of all that it was asked for."""
        return [(p.token_ids.ids[0], p.n) for request in self.requests for p in request.prompts]


def refuse(context: Any, error: TandemError) -> None:
    status = to_status(error)
    context.set_trailing_metadata(status.trailing_metadata)
    context.abort(status.code, status.details)


@contextmanager
def served(service: Service) -> Iterator[Service]:
    with tempfile.TemporaryDirectory(prefix="tdm") as folder, ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, server)
        health_pb2_grpc.add_HealthServicer_to_server(service, server)
        service.address = f"unix://{folder}/s"
        server.add_insecure_port(service.address)
        server.start()
        try:
            yield service
        finally:
            service.thawed.set()
            server.stop(0).wait()


@pytest.fixture
def services() -> Iterator[list[Service]]:
    with ExitStack() as stack:
        yield [stack.enter_context(served(Service(name))) for name in "abc"]


@pytest.fixture
def replicas(services: list[Service]) -> Iterator[Replicas]:
    before = set(threading.enumerate())
    replicas = Replicas([InferenceClient(service.address) for service in services])
    yield replicas
    for service in services:
        service.thawed.set()
    replicas.close()
    ours = [thread.name for thread in set(threading.enumerate()) - before]
    assert not [name for name in ours if name.startswith("tandem")], "close() leaves no thread"


GROUPS = [Group([1, 7], 4), Group([2, 7], 4), Group([3, 7], 4), Group([4, 7], 4), Group([5, 7], 2)]
SEEDED = {"seed": 100, "max_tokens": 5}
EXPECTED = [
    [[1, 100], [1, 101], [1, 102], [1, 103]],
    [[2, 104], [2, 105], [2, 106], [2, 107]],
    [[3, 108], [3, 109], [3, 110], [3, 111]],
    [[4, 112], [4, 113], [4, 114], [4, 115]],
    [[5, 116], [5, 117]],
]


def tokens(rollouts: list[list[pb.Rollout]]) -> list[list[list[int]]]:
    return [[list(rollout.token_ids) for rollout in group] for group in rollouts]


def given(services: list[Service]) -> list[tuple[int, int]]:
    return sorted(place for service in services for place in service.given)


def test_a_batch_is_what_one_service_would_give(replicas: Replicas, services: list[Service]) -> None:
    assert tokens(replicas.generate(GROUPS, SEEDED)) == EXPECTED
    assert len(given(services)) == 18, "each rollout was sampled once"
    assert all(
        request.sampling == pb.SamplingParams(max_tokens=5) for s in services for request in s.requests
    )
    assert replicas.generate([]) == []


def test_prompts_are_spread_and_groups_are_not(replicas: Replicas, services: list[Service]) -> None:
    replicas.generate(GROUPS, SEEDED)
    assert sorted(n for service in services for _, n in service.asked) == [2, 4, 4, 4, 4]
    assert sorted(sum(n for _, n in service.asked) for service in services) == [4, 6, 8]
    assert [replica.load for replica in replicas._replicas] == [0, 0, 0]


def test_a_prompt_comes_back_to_who_has_read_it(replicas: Replicas, services: list[Service]) -> None:
    prompts = [[first, *range(40)] for first in range(6)]
    replicas.generate([Group(prompt, 2) for prompt in prompts])
    first = {service.name: {prompt for prompt, _ in service.asked} for service in services}
    assert all(len(read) == 2 for read in first.values())
    # Each goes on from what came before, as in a conversation, and in another order.
    replicas.generate([Group([*prompt, 90, 91], 2) for prompt in reversed(prompts)])
    assert {service.name: {prompt for prompt, _ in service.asked} for service in services} == first


def test_one_prefix_for_all_does_not_make_one_do_everything(
    replicas: Replicas, services: list[Service]
) -> None:
    system = list(range(64))
    replicas.generate([Group([*system, 100 + i], 4) for i in range(18)])
    loads = [sum(n for _, n in service.asked) for service in services]
    assert sum(loads) == 72
    assert max(loads) - min(loads) <= 16


def test_who_has_less_to_do_gets_more(replicas: Replicas, services: list[Service]) -> None:
    busy = replicas._replicas[0]
    busy.load = 100
    replicas.generate([Group([i], 2) for i in range(6)])
    assert [len(service.asked) for service in services] == [0, 3, 3]
    assert busy.load == 100


LOSSES: dict[str, TandemError] = {
    "gone": GONE,
    "engine died": Unavailable(Reason.ENGINE_DEAD, "dead"),
    "torn": Unavailable(Reason.ENGINE_TORN, "torn"),
    "drains": Unavailable(Reason.DRAINING, "drains"),
    "another life": NotFound(Reason.SESSION_NOT_FOUND, "no such session"),
    "no adapter": NotFound(Reason.LORA_NOT_FOUND, "no adapter"),
    "full": ResourceExhausted(Reason.QUEUE_FULL, "full", retry_after=60.0),
}


@pytest.mark.parametrize("error", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("after", [0, 3])
def test_what_a_lost_replica_did_not_give_is_asked_of_the_others(
    replicas: Replicas, services: list[Service], error: TandemError, after: int
) -> None:
    services[0].errors = [(after, error)]
    assert tokens(replicas.generate(GROUPS, SEEDED)) == EXPECTED
    assert len(services[0].given) == after
    everything = sorted((ids[0], ids[1]) for group in EXPECTED for ids in group)
    assert given(services) == everything, "no rollout is lost, and none is sampled twice"
    assert [replica.load for replica in replicas._replicas] == [0, 0, 0]


def test_all_but_one_may_be_lost(replicas: Replicas, services: list[Service]) -> None:
    services[0].errors = [(1, GONE)]
    services[1].errors = [(2, GONE), (1, GONE)]
    assert tokens(replicas.generate(GROUPS, SEEDED)) == EXPECTED


def test_a_replica_that_stands_still_is_given_up(replicas: Replicas, services: list[Service]) -> None:
    services[1].freeze_after = 1
    assert tokens(replicas.generate(GROUPS, SEEDED)) == EXPECTED
    assert services[1].broken_off.wait(60), "it is told, should it ever move again"
    assert services[1].address not in replicas.alive
    before = len(services[1].requests)
    assert tokens(replicas.generate(GROUPS, SEEDED)) == EXPECTED
    assert len(services[1].requests) == before
    services[1].freeze_after = None
    services[1].thawed.set()
    until(lambda: services[1].address in replicas.alive)
    replicas.generate([Group([prompt]) for prompt in range(10, 16)])
    assert len(services[1].requests) > before, "it has its part again"


def test_the_last_one_is_waited_for_while_it_stands_still(
    replicas: Replicas, services: list[Service]
) -> None:
    """A slow replica is better than none."""
    for service in services[1:]:
        service.status = NOT_SERVING
    replicas.generate([Group([1])])
    until(lambda: replicas.alive == [services[0].address])
    services[0].freeze_after = 2
    with ThreadPoolExecutor(1) as thread:
        batch = thread.submit(replicas.generate, GROUPS, SEEDED)
        until(lambda: replicas.alive == [])
        services[0].freeze_after = None
        services[0].thawed.set()
        assert tokens(batch.result(60)) == EXPECTED
    assert not services[0].errors
    assert len(services[0].requests) == 2


def test_who_says_that_it_does_not_serve_is_not_asked(replicas: Replicas, services: list[Service]) -> None:
    services[2].status = NOT_SERVING
    replicas.generate(GROUPS)
    until(lambda: len(replicas.alive) == 2)
    before = len(services[2].requests)
    replicas.generate(GROUPS)
    assert len(services[2].requests) == before


def test_who_holds_older_weights_gives_nothing(replicas: Replicas, services: list[Service]) -> None:
    services[0].errors = [(0, TOO_OLD)] * 9
    assert tokens(replicas.generate(GROUPS, SEEDED, min_weight_version=4)) == EXPECTED
    assert services[0].given == []
    for request in (request for service in services for request in service.requests):
        assert request.min_weight_version == 4
        assert request.HasField("max_version_wait")
        assert request.max_version_wait.ToNanoseconds() == 0
    replicas.holding = lambda: {services[1].address}
    before = [len(service.requests) for service in services]
    assert tokens(replicas.generate(GROUPS, SEEDED)) == EXPECTED
    assert [len(s.requests) - n for s, n in zip(services, before, strict=True)] == [0, 1, 0]


def test_where_all_are_full_they_are_asked_again(replicas: Replicas, services: list[Service]) -> None:
    for service in services:
        service.errors = [(0, ResourceExhausted(Reason.QUEUE_FULL, "full", retry_after=0.05))]
    assert tokens(replicas.generate(GROUPS, SEEDED)) == EXPECTED


def test_where_none_is_left_the_reason_is_told(replicas: Replicas, services: list[Service]) -> None:
    for service in services:
        service.errors = [(0, TOO_OLD)]
    with pytest.raises(Unavailable) as raised:
        replicas.generate([Group([1], 2)])
    assert raised.value.reason == Reason.WEIGHTS_TOO_OLD
    assert tokens(replicas.generate(GROUPS, SEEDED)) == EXPECTED, "the next batch finds them again"
    replicas.holding = set
    with pytest.raises(Unavailable, match="no replica holds the weights"):
        replicas.generate(GROUPS)


def test_a_wrong_request_is_wrong_everywhere(replicas: Replicas, services: list[Service]) -> None:
    services[0].errors = [(0, invalid("prompts[0]", "is not nice"))]
    services[1].freeze_after = 0
    services[0].before_it_refuses = lambda: until(lambda: bool(services[1].requests))
    with pytest.raises(InvalidArgument, match="is not nice"):
        replicas.generate(GROUPS)
    assert services[1].broken_off.wait(60), "the rest of the batch is cancelled"
    assert all(replica.load == 0 for replica in replicas._replicas)
    assert all(not replica.parts for replica in replicas._replicas)


def test_rollouts_have_seeds_in_any_case(replicas: Replicas, services: list[Service]) -> None:
    """Engines that were started alike would sample alike."""
    first, second = (tokens(replicas.generate([Group([1], 2), Group([2], 2)])) for _ in range(2))
    seeds = [ids[1] for batch in (first, second) for group in batch for ids in group]
    assert len(set(seeds)) == 8
    own = tokens(replicas.generate([Group([1], 2, (), 50), Group([2], 2)], {"seed": 7}))
    assert own == [[[1, 50], [1, 51]], [[2, 9], [2, 10]]]


def test_what_is_served_is_what_the_newest_serves(replicas: Replicas, services: list[Service]) -> None:
    services[1].model.weight_version = 7
    services[2].model.max_model_len = 32
    model = replicas.wait_until_serving(60)
    assert (model.weight_version, model.max_model_len, model.sleep_mode) == (7, 32, False)
    for service in services[1:]:
        service.model.sleep_mode = True
    assert not replicas.wait_until_serving(60).sleep_mode, "one cannot"
    services[0].model.sleep_mode = True
    assert replicas.wait_until_serving(60).sleep_mode
    assert replicas.get_model().weight_version == 7
    services[1].model.state = engine_pb2.SERVING_STATE_LOADING
    assert replicas.wait_until_serving(60).weight_version == 1
    for service in services:
        service.model.state, service.model.reason = engine_pb2.SERVING_STATE_TORN, "it tore"
    with pytest.raises(Unavailable, match=f"{services[0].address}: TORN it tore"):
        replicas.wait_until_serving(0)


def test_addresses_are_several_and_different() -> None:
    with pytest.raises(InvalidArgument, match="addresses"):
        Replicas([])
    clients = [InferenceClient("unix:///tmp/a"), InferenceClient("unix:///tmp/a")]
    with pytest.raises(InvalidArgument, match="addresses"):
        Replicas(clients)
    for client in clients:
        client.close()


def test_prefixes_are_known_block_by_block() -> None:
    prefixes = Prefixes()
    prompt = list(range(50))
    prefixes.add(prompt, 0)
    prefixes.add([*prompt[:32], 99], 1)
    assert prefixes.shared(prompt) == {0: 4, 1: 2}
    assert prefixes.shared([*prompt[:48], 1, 2, 3]) == {0: 3, 1: 2}
    assert prefixes.shared([1, *prompt]) == {}
    prefixes.forget(0)
    assert prefixes.shared(prompt) == {1: 2}


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    waited = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        waited.wait(0.02)
    raise AssertionError("it did not come")
