"""The life of a gRPC server: bind, serve, drain. It knows nothing of what it serves."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import grpc.aio
import prometheus_client
import structlog

from tandem.errors import FailedPrecondition, Reason, invalid
from tandem.rpc import options
from tandem.rpc.address import Address, parse
from tandem.rpc.health import SERVICE as HEALTH_SERVICE
from tandem.rpc.health import WATCH as HEALTH_WATCH
from tandem.rpc.health import Health
from tandem.rpc.interceptors import Gate
from tandem.rpc.lag import LagMonitor
from tandem.rpc.listen import Tls, bind
from tandem.rpc.notify import Notifier
from tandem.rpc.trust import check_token

_log = structlog.get_logger("tandem.rpc")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A client drops what it received and did not read when its connection breaks, so last words need a moment:
# first that health is NOT_SERVING, then the last responses.
_FAREWELL_S = 0.1
# What cancelled handlers get for their clean-up.
_CLEAN_UP_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingConfig:
    """How to serve."""

    addresses: tuple[str, ...]
    """`unix:///absolute/path` or `host:port`, at least one. Port 0 takes a free port."""
    token: str | None = None
    """Bearer token that callers must send. None lets everybody call who can connect: to a Unix socket, or with a
    certificate, or by TCP where `insecure` allows it."""
    tls: Tls | None = None
    """TLS for the TCP addresses."""
    insecure: bool = False
    """Whether TCP addresses may go without TLS where other hosts can reach them, and serve all who connect."""
    socket_mode: int = 0o600
    """Permissions of Unix sockets. Who may write to one may connect."""
    max_message_bytes: int = options.MAX_MESSAGE_BYTES
    """Limit of one message in bytes, both ways."""
    grace_s: float = 10.0
    """Seconds that running RPCs get to end when the service stops."""
    drain_delay_s: float = 0.0
    """Seconds between NOT_SERVING and the refusal of new RPCs, for load balancers to look away."""
    reflection: bool | None = None
    """Whether to serve reflection. None: only where no other host can reach the service."""
    metrics_address: str | None = None
    """`host:port` of Prometheus's /metrics over plain HTTP. None serves none."""
    handle_signals: bool = True
    """Whether SIGTERM and SIGINT drain, and a second one stops at once. Needs the main thread."""


class Serving:
    """A gRPC server with health, errors, metrics and an orderly end, to be used from one event loop.

    serving = Serving(config)
    serving.add(add_EngineServiceServicer_to_server, servicer, "tandem.engine.v1.EngineService")
    await serving.start()
    serving.set_serving("tandem.engine.v1.EngineService", True)
    await serving.wait()
    """

    def __init__(self, config: ServingConfig) -> None:
        """Make it; nothing is bound yet. Raises InvalidArgument for malformed addresses or a malformed token."""
        if not config.addresses:
            raise invalid("addresses", "at least one is needed")
        if config.token is not None:
            check_token(config.token)
        self._config = config
        self._wanted = [parse(address, field="addresses") for address in config.addresses]
        self._metrics_wanted = _metrics_address(config)
        self._parts: list[tuple[Callable[[Any, Any], None], Any]] = []
        self._services: list[str] = []
        self._long_lived = [HEALTH_WATCH]
        self._on_stop: list[Callable[[], Awaitable[None]]] = []
        #: Set when new RPCs are refused, for streams that wait for what their callers want next.
        self.ending = asyncio.Event()
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._lag = LagMonitor()
        self._notifier = Notifier()
        self._ready = False
        self._health: Health | None = None
        self._server: grpc.aio.Server | None = None
        self._gate: Gate | None = None
        self._exporter: tuple[Any, threading.Thread] | None = None
        self._bound: list[Address] = []

    def add(
        self,
        add_to_server: Callable[[Any, Any], None],
        servicer: Any,
        name: str,
        *,
        long_lived: Iterable[str] = (),
    ) -> None:
        """Add a servicer, before `start`.

        Args:
            add_to_server: the generated `add_…Servicer_to_server`.
            servicer: an instance of it.
            name: the service's full name, `tandem.engine.v1.EngineService`.
            long_lived: names of its methods that stream without an end of their own (Watch…). They are ended,
                with status OK, when the service drains.
        """
        if self._server is not None:
            raise RuntimeError("servicers are added before start")
        self._parts.append((add_to_server, servicer))
        self._services.append(name)
        self._long_lived.extend(f"{name}/{method}" for method in long_lived)

    def on_stop(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Have `callback` awaited after the last RPC has ended. Callbacks run in the order given."""
        self._on_stop.append(callback)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where the service is, with the ports that were bound."""
        return tuple(str(address) for address in self._bound)

    @property
    def metrics_port(self) -> int | None:
        """The port of /metrics, if it is served."""
        return self._exporter[0].server_port if self._exporter else None

    @property
    def draining(self) -> bool:
        """Whether the service is about to stop."""
        return self._stop.is_set()

    @property
    def max_lag_s(self) -> float:
        """The longest that the event loop was late in the last ten seconds, in seconds."""
        return self._lag.max_s

    async def start(self) -> None:
        """Bind and answer. Health: the process is SERVING, each servicer NOT_SERVING until `set_serving`.

        Raises:
            InvalidArgument: an address cannot be served as configured.
            FailedPrecondition: ADDRESS_IN_USE.
        """
        self._gate = Gate(self._config.token, self._long_lived, self.ending)
        self._server = grpc.aio.server(
            interceptors=[self._gate], options=options.server_options(self._config.max_message_bytes)
        )
        try:
            self._bind(self._server)
            self._health = self._add_all(self._server)
            await self._server.start()
        except BaseException:
            self._stop_exporter()
            # gRPC lets go of what it bound by stopping, and only what was started stops.
            with contextlib.suppress(grpc.aio.UsageError):
                await self._server.start()
            await self._server.stop(None)
            raise
        self._tasks.append(asyncio.create_task(self._lag.run()))
        if self._notifier.watchdog_s:
            self._tasks.append(asyncio.create_task(self._feed_watchdog()))
        if self._config.handle_signals:
            for number in _SIGNALS:
                asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)
        _log.info("serving", addresses=self.addresses, metrics_port=self.metrics_port)

    def set_serving(self, name: str, serving: bool) -> None:
        """Set a servicer's health, or the process's by the name `""`.

        systemd is told READY when all serve for the first time. Once the service drains, nothing serves.
        Raises KeyError for a name that was not added.
        """
        if self._health is None:
            raise RuntimeError("health is set after start")
        self._health.set(name, serving)
        if not self._ready and self._health.all_serving:
            self._ready = True
            self._notifier.send("READY=1")

    def status(self, text: str) -> None:
        """Tell systemd what the service is doing, for people to read."""
        self._notifier.send(f"STATUS={text}")

    def request_stop(self, *, now: bool = False) -> None:
        """Begin the drain, or cut it short. `wait` does it and returns when it is done."""
        self._stop.set()
        if now:
            self._stop_now.set()

    async def wait(self) -> None:
        """Serve until a signal or `request_stop`, then drain.

        That is: say NOT_SERVING, let load balancers look away, end the long-lived streams, give the others
        the grace to end, run the `on_stop` callbacks.
        """
        if self._server is None or self._health is None or self._gate is None:
            raise RuntimeError("wait comes after start")
        try:
            await self._stop.wait()
        finally:  # also where our own task is cancelled: nothing may stay behind
            self._stop.set()
            _log.info("draining", grace_s=self._config.grace_s)
            self._health.shut_down()
            self._notifier.send("STOPPING=1")
            await self._pause(max(self._config.drain_delay_s, _FAREWELL_S))
            self._gate.drain()
            await self._stop_server(self._server, self._gate)
            for callback in self._on_stop:
                try:
                    await callback()
                except Exception:  # noqa: BLE001  # the others must run
                    _log.exception("an on_stop callback failed")
            await self._clean_up()
            _log.info("stopped")

    async def __aenter__(self) -> Serving:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.request_stop()
        await self.wait()

    def _bind(self, server: grpc.aio.Server) -> None:
        config = self._config
        for address in self._wanted:
            bound = bind(
                server,
                address,
                tls=config.tls,
                token=config.token is not None,
                insecure=config.insecure,
                socket_mode=config.socket_mode,
            )
            self._bound.append(bound)
        if self._metrics_wanted is not None:
            self._exporter = _start_exporter(self._metrics_wanted)

    def _add_all(self, server: grpc.aio.Server) -> Health:
        from grpc_health.v1 import health_pb2_grpc

        health = Health(self._services)
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        for add_to_server, servicer in self._parts:
            add_to_server(servicer, server)
        reflection = self._config.reflection
        if reflection if reflection is not None else all(address.is_loopback for address in self._wanted):
            from grpc_reflection.v1alpha import reflection as reflector

            reflector.enable_server_reflection(
                [*self._services, HEALTH_SERVICE, reflector.SERVICE_NAME], server
            )
        return health

    def _on_signal(self, number: int) -> None:
        _log.info("signal", signal=signal.Signals(number).name)
        self.request_stop(now=self._stop.is_set())
        if self._stop_now.is_set():
            self._forget_signals()  # a third one kills

    def _forget_signals(self) -> None:
        if self._config.handle_signals:
            for number in _SIGNALS:
                asyncio.get_running_loop().remove_signal_handler(number)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop_now.wait(), seconds)

    async def _stop_server(self, server: grpc.aio.Server, gate: Gate) -> None:
        # gRPC's own grace would close connections with the last responses still on their way.
        idle, hurry = asyncio.ensure_future(gate.idle()), asyncio.ensure_future(self._stop_now.wait())
        await asyncio.wait({idle, hurry}, timeout=self._config.grace_s, return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        hurry.cancel()
        await self._pause(_FAREWELL_S)
        await server.stop(None)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(gate.idle(), _CLEAN_UP_S)

    async def _clean_up(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._forget_signals()
        await asyncio.to_thread(self._stop_exporter)  # it may take half a second

    def _stop_exporter(self) -> None:
        if self._exporter is not None:
            server, thread = self._exporter
            self._exporter = None
            server.shutdown()
            server.server_close()
            thread.join()

    async def _feed_watchdog(self) -> None:
        """Prove to systemd that the event loop turns."""
        while True:
            self._notifier.send("WATCHDOG=1")
            await asyncio.sleep(self._notifier.watchdog_s / 2)


def _metrics_address(config: ServingConfig) -> Address | None:
    if config.metrics_address is None:
        return None
    address = parse(config.metrics_address, field="metrics_address")
    if address.is_unix:
        raise invalid("metrics_address", "must be host:port")
    return address


def _start_exporter(address: Address) -> tuple[Any, threading.Thread]:
    try:
        return prometheus_client.start_http_server(address.port, address.host)
    except OSError as error:
        raise FailedPrecondition(
            Reason.ADDRESS_IN_USE,
            f"cannot serve metrics at {address}: {error.strerror}",
            metadata={"address": str(address)},
        ) from error
