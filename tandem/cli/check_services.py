"""Checks of the addresses, and of the services at them."""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from tandem.cli.findings import Finding, bad, note, ok
from tandem.errors import TandemError
from tandem.rpc.address import Address, parse
from tandem.rpc.trust import check_place


def folders(addresses: dict[str, str]) -> Iterator[Finding]:
    """Where the sockets lie, and whether there is room."""
    for name, text in addresses.items():
        try:
            path = parse(text, field=name).path
            if path is not None:
                check_place(path, name)
        except TandemError as error:
            yield bad(f"{name} address", error.message, "choose another with --addresses")
            continue
        if path is None:
            continue
        if not path.parent.is_dir():
            yield bad(f"{name} address", f"{path.parent} is not there", f"mkdir -m 700 {path.parent}")
        elif not os.access(path.parent, os.W_OK | os.X_OK):
            yield bad(f"{name} address", f"{path.parent} cannot be written to", "choose a folder of your own")
        elif path.exists() and not stat.S_ISSOCK(path.lstat().st_mode):
            yield bad(f"{name} address", f"{path} is no socket", "move it away, or choose another address")
        else:
            yield ok(f"{name} address", str(path))


def services(addresses: dict[str, str]) -> Iterator[Finding]:
    """Whether the services answer, and whether weights can be shared with them."""
    from tandem.cli.health import health

    for name, text in addresses.items():
        try:
            state = health(text, name)
        except TandemError:
            continue  # `folders` told of it
        if state == "SERVING":
            yield ok(f"{name} service", f"serves at {text}")
        elif state == "UNAVAILABLE" and _listens(parse(text)):
            yield bad(
                f"{name} service",
                f"something listens at {text} that does not answer as a service does, or wants TLS",
                "stop it, or choose another address",
            )
        elif state == "UNAVAILABLE":
            yield note(f"{name} service", f"nobody answers at {text}", f"tandem {name}, or tandem up")
        elif state in ("NOT_FOUND", "UNIMPLEMENTED"):
            yield bad(
                f"{name} service", f"another service is at {text}", f"give each its own address: --{name}"
            )
        else:
            yield bad(
                f"{name} service", f"{state} at {text}", "its log says why; tandem generate shows its reason"
            )
        path = parse(text).path
        if path is not None and state != "UNAVAILABLE":
            yield _peer(name, path)


def _listens(address: Address) -> bool:
    try:
        if address.path is None:
            socket.create_connection((address.host, address.port), timeout=2).close()
        else:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(2)
                probe.connect(str(address.path))
    except OSError:
        return False
    return True


def _peer(name: str, path: Path) -> Finding:
    """Whether a service is in our PID namespace: the kernel gives 0 for a peer that we have no number for."""
    check = f"{name} processes"
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.settimeout(2)
            probe.connect(str(path))
            raw = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        except OSError as error:
            return note(check, f"cannot be asked for: {error.strerror}")
    pid, uid, _ = struct.unpack("3i", raw)
    if pid == 0:
        return bad(
            check,
            "the service is in another PID namespace: weights cannot be shared with it",
            "shareProcessNamespace: true in the pod, or --pid=host",
        )
    if uid != os.geteuid():
        return note(check, f"process {pid} is user {uid}'s", "name this user in its trainer_uids")
    return ok(check, f"process {pid}, in the same PID namespace")
