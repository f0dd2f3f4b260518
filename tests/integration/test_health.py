"""What monitors and strangers find: health per service, as it changes, and reflection."""

from __future__ import annotations

import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.integration.calls import pause, resume
from tests.services import Service

SERVICES = [
    "tandem.engine.v1.EngineService",
    "tandem.inference.v1.InferenceService",
    "tandem.weights.v1.WeightService",
]
STATUS = health_pb2.HealthCheckResponse.ServingStatus


@pytest.mark.parametrize("service", ["", *SERVICES])
def test_each_service_has_its_health(llama: Service, service: str) -> None:
    assert llama.health(service) == "SERVING"


def test_a_service_that_is_not_there_is_not_found(llama: Service) -> None:
    assert llama.health("tandem.nonsense.v1.NonsenseService") == "NOT_FOUND"


def test_a_pause_is_no_illness(llama: Service) -> None:
    """Callers are answered after it. A load balancer that looked away would make it worse."""
    pause(llama)
    try:
        assert [llama.health(service) for service in ["", *SERVICES]] == ["SERVING"] * 4
    finally:
        resume(llama)


def test_health_can_be_watched(llama: Service) -> None:
    asked = health_pb2.HealthCheckRequest(service=SERVICES[1])
    watch = health_pb2_grpc.HealthStub(llama.channel).Watch(asked, timeout=30)
    assert next(watch).status == STATUS.SERVING
    watch.cancel()


def test_strangers_can_ask_what_there_is(llama: Service) -> None:
    database = ProtoReflectionDescriptorDatabase(llama.channel)
    assert set(SERVICES) | {"grpc.health.v1.Health"} <= set(database.get_services())
    file = database.FindFileContainingSymbol("tandem.inference.v1.InferenceService")
    assert "Generate" in {method.name for method in file.service[0].method}


def test_many_watchers_cost_nothing(llama: Service) -> None:
    asked = health_pb2.HealthCheckRequest()
    watches = [health_pb2_grpc.HealthStub(llama.channel).Watch(asked, timeout=30) for _ in range(50)]
    assert {next(watch).status for watch in watches} == {STATUS.SERVING}
    ended = threading.Event()
    watches[-1].add_callback(ended.set)
    for watch in watches:
        watch.cancel()
    assert ended.wait(5)
    assert all(watch.code() == grpc.StatusCode.CANCELLED for watch in watches)
