"""Channels to a service: credentials by the kind of address, and Tandem's channel arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from tandem.errors import InvalidArgument, invalid
from tandem.rpc import options
from tandem.rpc.address import Address, parse
from tandem.rpc.trust import check_place, check_token


class _Bearer(grpc.AuthMetadataPlugin):
    """Sends the token over a Unix socket, after a look at whose it is: the channel may connect to a later one."""

    def __init__(self, token: str, path: Path) -> None:
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._path = path

    def __call__(self, context: Any, callback: Any) -> None:
        try:
            check_place(self._path, "address")
        except InvalidArgument as error:
            callback((), error)
        else:
            callback(self._metadata, None)


def connect(
    address: str,
    *,
    token: str | None = None,
    ca_file: str | Path | None = None,
    cert_file: str | Path | None = None,
    key_file: str | Path | None = None,
    insecure: bool = False,
    max_message_bytes: int = options.MAX_MESSAGE_BYTES,
    extra_options: Sequence[tuple[str, int | str]] = (),
) -> grpc.Channel:
    """Open a channel for sync stubs. It connects with the first call, and again after a lost connection.

    Args:
        address: `unix:///absolute/path` or `host:port`.
        token: the service's bearer token. It needs a Unix socket that no other user could have put there, or TLS, so
            that nobody else reads it.
        ca_file: PEM file of the authorities that sign services' certificates; turns TLS on.
        cert_file: PEM file of the client's own certificate, for mutual TLS.
        key_file: PEM file of its key.
        insecure: allow another host without TLS.
        max_message_bytes: limit of one message in bytes, both ways.
        extra_options: further gRPC channel arguments; they win over Tandem's.

    Raises:
        InvalidArgument: the address is malformed, or what is asked for would not be safe.
    """
    target, credentials = _resolve(address, token, ca_file, cert_file, key_file, insecure)
    arguments = options.merge(options.client_options(max_message_bytes), extra_options)
    if credentials is None:
        return grpc.insecure_channel(target, arguments)
    return grpc.secure_channel(target, credentials, arguments)


def connect_aio(
    address: str,
    *,
    token: str | None = None,
    ca_file: str | Path | None = None,
    cert_file: str | Path | None = None,
    key_file: str | Path | None = None,
    insecure: bool = False,
    max_message_bytes: int = options.MAX_MESSAGE_BYTES,
    extra_options: Sequence[tuple[str, int | str]] = (),
) -> grpc.aio.Channel:
    """Open a channel for asyncio. Call it inside the running loop: the channel belongs to that loop.

    Arguments and errors are those of `connect`.
    """
    target, credentials = _resolve(address, token, ca_file, cert_file, key_file, insecure)
    arguments = options.merge(options.client_options(max_message_bytes), extra_options)
    if credentials is None:
        return grpc.aio.insecure_channel(target, arguments)
    return grpc.aio.secure_channel(target, credentials, arguments)


def _resolve(
    address: str,
    token: str | None,
    ca_file: str | Path | None,
    cert_file: str | Path | None,
    key_file: str | Path | None,
    insecure: bool,
) -> tuple[str, grpc.ChannelCredentials | None]:
    parsed = parse(address)
    if not parsed.is_unix and parsed.port == 0:
        raise invalid("address", f"{address!r} has port 0, to which nobody can connect")
    if (cert_file is None) != (key_file is None):
        raise invalid("cert_file", "a client certificate needs both cert_file and key_file")
    if cert_file is not None and ca_file is None:
        raise invalid("cert_file", "a client certificate needs ca_file, which turns TLS on")
    credentials = _transport(parsed, ca_file, cert_file, key_file, insecure)
    if token is not None:
        check_token(token)
        if credentials is None:
            raise invalid("token", "would be readable on the way: use a unix:/// address, or TLS by ca_file")
        if parsed.path is not None:
            check_place(parsed.path, "address")
            bearer = grpc.metadata_call_credentials(_Bearer(token, parsed.path))
        else:
            bearer = grpc.access_token_call_credentials(token)
        credentials = grpc.composite_channel_credentials(credentials, bearer)
    return parsed.target, credentials


def _transport(
    address: Address,
    ca_file: str | Path | None,
    cert_file: str | Path | None,
    key_file: str | Path | None,
    insecure: bool,
) -> grpc.ChannelCredentials | None:
    if address.is_unix:
        if ca_file is not None:
            raise invalid("ca_file", "has no use with a Unix socket, whose file permissions guard it")
        # gRPC takes these for private, so that a token may travel; on the wire they are nothing.
        return grpc.local_channel_credentials(grpc.LocalConnectionType.UDS)
    if ca_file is not None:
        key, cert = _read(key_file, "key_file"), _read(cert_file, "cert_file")
        return grpc.ssl_channel_credentials(_read(ca_file, "ca_file"), key, cert)
    if not address.is_loopback and not insecure:
        raise invalid("address", f"{address} is another host: give ca_file for TLS, or insecure=True")
    return None


def _read(path: str | Path | None, field: str) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise invalid(field, f"cannot read {path}: {error.strerror}") from error
