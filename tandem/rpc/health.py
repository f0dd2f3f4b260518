"""grpc.health.v1.Health. `""` is the process; each service has its full name.

grpcio-health-checking's own servicer writes to watchers while it holds the lock that a change of status
needs: one watcher who does not read keeps the service from saying that it is down. Here a change never waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.errors import NotFound, Reason

SERVICE = "grpc.health.v1.Health"
WATCH = f"{SERVICE}/Watch"

_Response = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # it has no annotations
    """The health service. Use it from the event loop only."""

    def __init__(self, services: Iterable[str]) -> None:
        """Make it with the process serving and `services`, full names, not yet."""
        self._serving = {"": True} | dict.fromkeys(services, False)
        self._pinned = False
        self._changed = asyncio.Event()

    def set(self, service: str, serving: bool) -> None:
        """Say whether a service, or the process, serves. Raises KeyError for a service not named before."""
        if service not in self._serving:
            raise KeyError(service)
        if self._pinned or self._serving[service] == serving:
            return
        self._serving[service] = serving
        self._notify()

    def shut_down(self) -> None:
        """Say NOT_SERVING of everything, from now on and for good."""
        self._pinned = True
        self._serving = dict.fromkeys(self._serving, False)
        self._notify()

    @property
    def all_serving(self) -> bool:
        """Whether the process and every service serve."""
        return all(self._serving.values())

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _status(self, service: str) -> Any:
        serving = self._serving.get(service)
        if serving is None:
            return _Response.SERVICE_UNKNOWN
        return _Response.SERVING if serving else _Response.NOT_SERVING

    async def Check(self, request: Any, context: Any) -> Any:
        """Answer with a service's status."""
        if request.service not in self._serving:
            raise NotFound(Reason.SERVICE_NOT_FOUND, f"there is no service {request.service!r} here")
        return _Response(status=self._status(request.service))

    async def List(self, request: Any, context: Any) -> Any:
        """Answer with every service's status."""
        return health_pb2.HealthListResponse(
            statuses={name: _Response(status=self._status(name)) for name in self._serving}
        )

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Send a service's status now and whenever it changes."""
        last = None
        while True:
            changed, status = self._changed, self._status(request.service)
            if status != last:
                yield _Response(status=status)
                last = status
            await changed.wait()
