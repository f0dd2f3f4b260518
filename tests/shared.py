"""Services that several files of tests share, since each takes seconds to start."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tandem.engine.v1 import engine_pb2
from tandem.weights.v1 import weights_pb2
from tests.services import Service, inference_service

#: Those that run, and the digest of their checkpoints' weights.
_running: list[tuple[Service, int]] = []


def _digest(service: Service) -> int:
    request = weights_pb2.GetWeightVersionRequest(include_digest=True)
    return int(service.weights.GetWeightVersion(request, timeout=30).digest)


@contextlib.contextmanager
def shared_service(model: Path, *flags: str, **engine: object) -> Iterator[Service]:
    """A service that `restore_all` restores. For tests that leave it committed, serving and without a session."""
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        with inference_service(model, Path(folder), *flags, **engine) as service:
            entry = (service, _digest(service))
            _running.append(entry)
            try:
                yield service
            finally:
                _running.remove(entry)


def restore_all() -> None:
    """Give every shared service its checkpoint's weights, if it has others, without adapters, and let it generate."""
    for service, digest in _running:
        now = service.engine.GetStats(engine_pb2.GetStatsRequest(), timeout=30)
        if now.state == engine_pb2.SERVING_STATE_PAUSED:
            service.engine.Resume(engine_pb2.ResumeRequest(), timeout=30)
        for name in now.loras:
            service.engine.UnloadLora(engine_pb2.UnloadLoraRequest(name=name), timeout=30)
        if _digest(service) != digest:
            service.weights.RestoreCheckpoint(weights_pb2.RestoreCheckpointRequest(), timeout=30)
