"""Calls of one service over one channel, each with a deadline, and Tandem's errors."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from tandem import rpc
from tandem.errors import Unavailable, invalid

_PAUSES_S = (0.1, 0.3, 0.9)


class Calls:
    """A service's methods by name. The channel opens with the first call."""

    def __init__(
        self, stub: Callable[[Any], Any], field: str, address: str | None, channel: Mapping[str, Any]
    ) -> None:
        """Nothing is called yet, nor looked for.

        Args:
            stub: the generated stub's class.
            field: the service's name among the client's arguments.
            address: where it is; None asks the environment, and then for the user's own socket.
            channel: further arguments of `tandem.rpc.connect_aio`.
        """
        self._make, self._field, self._address = stub, field, address
        self._options = channel
        self._channel: Any = None
        self._stub: Any = None

    @property
    def address(self) -> str:
        """Where the service is."""
        if self._address is None:
            self._address = os.environ.get(f"TANDEM_{self._field.upper()}_ADDRESS") or _own(self._field)
        return self._address

    async def one(self, method: str, request: Any, timeout_s: float, *, repeat: bool = False) -> Any:
        """Call a method with one response.

        Args:
            method: its name.
            request: its request.
            timeout_s: deadline in seconds of the call.
            repeat: whether to try again where nobody answers: the call may happen twice without harm.

        Raises:
            TandemError: what the service says.
        """
        for pause in (*_PAUSES_S, None) if repeat else (None,):
            try:
                with rpc.translated():
                    return await getattr(self._open(), method)(request, timeout=timeout_s)
            except Unavailable:
                if pause is None:
                    raise
                await asyncio.sleep(pause)
        raise AssertionError("the last try returns or raises")

    async def many(self, method: str, request: Any, timeout_s: float) -> AsyncGenerator[Any, None]:
        """The responses of a streaming method. The call is cancelled when the iterator is closed."""
        with rpc.translated():
            call = getattr(self._open(), method)(request, timeout=timeout_s)
            try:
                async for response in call:
                    yield response
            finally:
                call.cancel()

    async def close(self) -> None:
        """Close the channel. The next call opens another."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    def _open(self) -> Any:
        if self._channel is None:
            self._channel = rpc.connect_aio(self.address, **self._options)
            self._stub = self._make(self._channel)
        return self._stub


def _own(service: str) -> str:
    from tandem.settings import default_address  # here, since it loads what checks settings

    try:
        return default_address(service)
    except ValueError as error:
        raise invalid(service, str(error)) from error
