"""Addresses: `unix:///absolute/path` or `host:port`."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path

from tandem.errors import invalid

MAX_UNIX_PATH_BYTES = 107
"""Linux keeps a socket's path in 108 bytes, one of which ends it."""

_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")
_SHAPES = "an address is unix:///absolute/path or host:port"


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed address: either `path` is set, or `host` and `port` are."""

    path: Path | None = None
    host: str = ""
    port: int = 0

    @property
    def is_unix(self) -> bool:
        """Whether it is a Unix socket."""
        return self.path is not None

    @property
    def is_loopback(self) -> bool:
        """Whether only this host can reach it. A name other than localhost counts as reachable by others."""
        if self.is_unix or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def target(self) -> str:
        """The address for gRPC, which would count the slashes of `unix://` among the path's 107 bytes."""
        return str(self) if self.path is None else f"unix:{self.path}"

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix://{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse(address: str, *, field: str = "address") -> Address:
    """Parse an address.

    Args:
        address: `unix:///absolute/path` or `host:port`; the port may be 0 where a server is to choose one.
        field: what to call the address in the error.

    Raises:
        InvalidArgument: it is neither, or the path is longer than a socket's may be.
    """
    if address.startswith("unix:"):
        return _unix(address, field)
    host, colon, port = address.rpartition(":")
    if not colon or not port.isascii() or not port.isdecimal() or int(port) > 65535:
        raise invalid(field, f"{address!r} has no port from 0 to 65535; {_SHAPES}")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise invalid(field, f"{address!r} has no IPv6 address in its brackets") from None
    elif not _HOST.fullmatch(host):
        raise invalid(field, f"{address!r} has no host name; {_SHAPES}")
    return Address(host=host, port=int(port))


def _unix(address: str, field: str) -> Address:
    path = address.removeprefix("unix://")
    if path == address or not path.startswith("/") or "\0" in path or path.endswith("/"):
        raise invalid(field, f"{address!r} has no absolute path to a socket; write unix:///absolute/path")
    size = len(os.fsencode(path))
    if size > MAX_UNIX_PATH_BYTES:
        raise invalid(field, f"the socket's path has {size} bytes, at most {MAX_UNIX_PATH_BYTES} do: {path}")
    return Address(path=Path(path))
