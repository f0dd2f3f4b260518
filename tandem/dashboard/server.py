"""The dashboard's life: bind, serve, end."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from aiohttp import web

from tandem.client import AsyncTandemClient
from tandem.dashboard.app import Dashboard
from tandem.dashboard.engines import Engines
from tandem.dashboard.guard import Guard
from tandem.errors import FailedPrecondition, Reason, invalid
from tandem.rpc.address import Address, parse

#: Deadline in seconds of each call to a service. A page waits for it.
_CALL_S = 5.0
_FAREWELL_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Where the page is, and where the services are."""

    address: str = "127.0.0.1:8321"
    """`host:port`. Port 0 takes a free port."""
    insecure: bool = False
    """Whether the address may be one that other hosts reach, over plain HTTP."""
    trainer: str | None = None
    """The trainer service's address; None is the one that a client takes by default."""
    inference: str | None = None
    """The inference service's, likewise."""
    token: str | None = None
    """The token of both."""
    ca_file: Path | None = None
    """PEM file of the authorities to trust, for TLS to them."""


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[str]:
    """Serve while the context is open, and give the address to open, with the token.

    Raises:
        InvalidArgument: an address or the token is malformed, or other hosts could reach the page.
        FailedPrecondition: ADDRESS_IN_USE.
    """
    wanted = parse(settings.address)
    if wanted.is_unix:
        raise invalid("address", f"{wanted} is a Unix socket, which no browser opens: write host:port")
    if not wanted.is_loopback and not settings.insecure:
        raise invalid("address", f"{wanted} is open to other hosts, over plain HTTP: that takes --insecure")
    listening = _bound(wanted)
    try:
        address = replace(wanted, port=listening.getsockname()[1])
        guard = Guard(address)
        options = {"ca_file": settings.ca_file}
        client = AsyncTandemClient(
            settings.trainer, None, settings.token, timeout_s=_CALL_S, patience_s=0.0, **options
        )
        engines = Engines(settings.inference, settings.token, settings.ca_file, _CALL_S)
        # No log of requests: the first one's address has the token.
        application = Dashboard(client, engines, guard).application()
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=_FAREWELL_S)
        await runner.setup()
        try:
            await web.SockSite(runner, listening).start()
            yield f"http://{address}/?token={guard.token}"
        finally:
            await runner.cleanup()
    finally:
        listening.close()


async def run(settings: Settings, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM, or until cancelled.

    Args:
        settings: what and where.
        ready: gets the address to open.

    Raises:
        InvalidArgument, FailedPrecondition: as `serving`.
    """
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with serving(settings) as url:
        ready(url)
        await stop.wait()


def _bound(address: Address) -> socket.socket:
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
    except OSError as error:
        raise invalid("address", f"cannot serve at {address}: {error.strerror}") from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(where)
        made.setblocking(False)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            text = f"{address} is in use: stop what serves there, or choose another with --address"
            raise FailedPrecondition(Reason.ADDRESS_IN_USE, text) from error
        raise invalid("address", f"cannot serve at {address}: {error.strerror}") from error
    return made
