"""Binding a server to its addresses, with nobody let in by accident."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from tandem.errors import FailedPrecondition, Reason, invalid
from tandem.rpc.address import Address
from tandem.rpc.trust import check_place


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files for TLS."""

    cert_file: Path
    """The service's certificate chain."""
    key_file: Path
    """Its key."""
    client_ca_file: Path | None = None
    """Authorities that must have signed the clients' certificates. None asks for no certificates."""

    def credentials(self) -> grpc.ServerCredentials:
        """Read the files. Raises InvalidArgument if one cannot be read."""
        pair = (_read(self.key_file, "tls.key_file"), _read(self.cert_file, "tls.cert_file"))
        authorities = _read(self.client_ca_file, "tls.client_ca_file") if self.client_ca_file else None
        return grpc.ssl_server_credentials([pair], authorities, require_client_auth=authorities is not None)


def bind(
    server: grpc.aio.Server,
    address: Address,
    *,
    tls: Tls | None,
    token: bool,
    insecure: bool,
    socket_mode: int,
) -> Address:
    """Bind a server that has not been started.

    Args:
        server: the server.
        address: where; TCP port 0 takes a free one.
        tls: for TCP; without it only loopback is bound, unless `insecure`.
        token: whether callers must send one. TCP needs that or clients' certificates, unless `insecure`: every user
            of the host can connect to loopback.
        insecure: allow other hosts without TLS, and TCP to everybody.
        socket_mode: permissions of a Unix socket; who may write to it may connect.

    Returns:
        The address with the port that was bound.

    Raises:
        InvalidArgument: the address cannot be bound as configured.
        FailedPrecondition: ADDRESS_IN_USE, somebody else serves there.
    """
    if address.path is not None:
        return _bind_unix(server, address, address.path, socket_mode)
    if tls is None and not address.is_loopback and not insecure:
        raise invalid("addresses", f"{address} can be reached by other hosts: set TLS up, or allow insecure")
    if not token and not insecure and (tls is None or tls.client_ca_file is None):
        raise invalid(
            "addresses",
            f"{address} would serve everybody who can connect: set token_file or tls_client_ca, or allow insecure",
        )
    try:
        if tls is None:
            port = server.add_insecure_port(address.target)
        else:
            port = server.add_secure_port(address.target, tls.credentials())
    except RuntimeError as error:
        raise _in_use(address, "it is in use, or no address of this host") from error
    return Address(host=address.host, port=port)


def _bind_unix(server: grpc.aio.Server, address: Address, path: Path, mode: int) -> Address:
    if not path.parent.is_dir():
        raise invalid("addresses", f"the folder of {address} does not exist")
    check_place(path, "addresses")
    with _locked(path.parent):  # or two servers starting together would each remove the other's socket
        _remove_stale(path, address)
        # The permissions must be right from the start: whoever connected before a chmod would stay connected.
        umask = os.umask(0o777 & ~mode)
        try:
            server.add_secure_port(
                address.target, grpc.local_server_credentials(grpc.LocalConnectionType.UDS)
            )
        except RuntimeError as error:
            raise _in_use(address, "its folder cannot be written") from error
        finally:
            os.umask(umask)
    return address


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_stale(path: Path, address: Address) -> None:
    """Remove the socket of a server that died. gRPC would remove a living one's as well, without a word."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise invalid("addresses", f"{path} exists and is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)  # a full backlog answers EAGAIN: somebody is there
        result = probe.connect_ex(str(path))
    if result == errno.ECONNREFUSED:
        path.unlink(missing_ok=True)
    elif result != errno.ENOENT:
        raise _in_use(address, "another server answers there")


def _in_use(address: Address, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        Reason.ADDRESS_IN_USE, f"cannot serve at {address}: {why}", metadata={"address": str(address)}
    )


def _read(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise invalid(field, f"cannot read {path}: {error.strerror}") from error
