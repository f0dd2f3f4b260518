"""Whether a service at an address serves."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.rpc import connect

#: The services by what they are called on the command line.
NAMES = {
    "inference": "tandem.inference.v1.InferenceService",
    "trainer": "tandem.trainer.v1.TrainingJobService",
}


def health(address: str, service: str, timeout_s: float = 2.0) -> str:
    """SERVING, NOT_SERVING, or the code of the error that the question met: UNAVAILABLE where nobody answers.

    Raises:
        InvalidArgument: the address is malformed.
    """
    request = health_pb2.HealthCheckRequest(service=NAMES[service])
    with connect(address, insecure=True) as channel:  # the question is no secret, and takes no token
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
        except grpc.RpcError as error:
            return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
