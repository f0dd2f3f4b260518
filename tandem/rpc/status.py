"""The one place where errors become gRPC statuses and statuses become errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2

from tandem.errors import (
    CATALOGUE,
    DOMAIN,
    FailedPrecondition,
    Internal,
    Reason,
    TandemError,
    Violation,
)

DETAILS_KEY = "grpc-status-details-bin"

# Trailers travel in one header block, of which peers take 8 KiB (gRPC's soft limit, Netty's hard one). The
# message is in there twice, once percent-encoded, and the details in base64.
MAX_MESSAGE_BYTES = 1000
MAX_DETAIL_BYTES = 2400

_BY_CODE = {cls.code_name: cls for cls in CATALOGUE.values()}
# What a status without details means: it was made by gRPC itself, here or there.
_BARE = {
    grpc.StatusCode.UNAVAILABLE: Reason.UNREACHABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: Reason.DEADLINE,
    grpc.StatusCode.CANCELLED: Reason.CANCELLED,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Reason.MESSAGE_TOO_LARGE,
    grpc.StatusCode.UNIMPLEMENTED: Reason.METHOD_UNKNOWN,
    grpc.StatusCode.UNAUTHENTICATED: Reason.TOKEN_INVALID,
}


class Status(NamedTuple):
    """What `context.abort` takes."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, bytes], ...]


def to_status(error: TandemError) -> Status:
    """Return the status of an error: its code and message, and the rest as a google.rpc.Status."""
    message = _cut(error.message, MAX_MESSAGE_BYTES)
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code_name), message=message)
    budget = MAX_DETAIL_BYTES
    info = error_details_pb2.ErrorInfo(reason=str(error.reason), domain=DOMAIN)
    for key, value in error.metadata.items():
        value = _cut(value, 300)
        if (budget := budget - len(key) - len(value.encode()) - 8) < 0:
            break
        info.metadata[key] = value
    status.details.add().Pack(info)
    if error.retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after * 1e9))
        status.details.add().Pack(retry)
    if error.violations:
        status.details.add().Pack(_bad_request(error.violations, budget))
    elif isinstance(error, FailedPrecondition):
        failure = error_details_pb2.PreconditionFailure()
        failure.violations.add(type=str(error.reason), description=_cut(message, 300))
        status.details.add().Pack(failure)
    return Status(error.code, message, ((DETAILS_KEY, status.SerializeToString()),))


def _bad_request(violations: list[Violation], budget: int) -> error_details_pb2.BadRequest:
    """Put in as many violations as fit, and say how many did not."""
    bad = error_details_pb2.BadRequest()
    for done, violation in enumerate(violations):
        field, description = _cut(violation.field, 200), _cut(violation.description, 300)
        if (budget := budget - len(field.encode()) - len(description.encode()) - 8) < 0:
            bad.field_violations.add(field="...", description=f"and {len(violations) - done} more")
            break
        bad.field_violations.add(field=field, description=description)
    return bad


def _cut(text: str, size: int) -> str:
    raw = text.encode("utf-8", "replace")
    return raw.decode() if len(raw) <= size else raw[: size - 3].decode("utf-8", "ignore") + "..."


def translate(error: grpc.RpcError) -> TandemError:
    """Rebuild the error that the service raised, or make the one that says how the call failed.

    Args:
        error: of a sync or an aio call. What it lacks, since a proxy or gRPC made it, is filled in.
    """
    call = cast(Any, error)
    if not hasattr(error, "code"):  # not of a call: the channel is closed, or another misuse
        return Internal(Reason.BUG, str(error))
    code: grpc.StatusCode = call.code()
    message: str = call.details() or code.name
    details = _details(call)
    info = details.get("ErrorInfo")
    if info is None or info.domain != DOMAIN:
        reason = _BARE.get(code)
        if reason is None:
            return Internal(Reason.BUG, f"{code.name}: {message}")
        return CATALOGUE[reason](reason, message)
    cls = _BY_CODE.get(code.name, Internal)
    bad, retry = details.get("BadRequest"), details.get("RetryInfo")
    return cls(
        _reason(info.reason, cls),
        message,
        violations=[Violation(v.field, v.description) for v in bad.field_violations] if bad else (),
        metadata=dict(info.metadata),
        retry_after=retry.retry_delay.ToNanoseconds() / 1e9 if retry else None,
    )


def _reason(text: str, cls: type[TandemError]) -> Reason | str:
    """A newer peer may send reasons that are not in our catalogue, or are there under another class."""
    if text in Reason.__members__ and CATALOGUE[Reason(text)] is cls:
        return Reason(text)
    return text


def _details(call: Any) -> dict[str, Any]:
    """The known details by message name; none if what was sent cannot be read."""
    found: dict[str, Any] = {}
    for key, value in call.trailing_metadata() or ():
        if key != DETAILS_KEY:
            continue
        try:
            for packed in status_pb2.Status.FromString(value).details:
                name = packed.TypeName().rpartition(".")[2]
                if packed.TypeName().startswith("google.rpc.") and hasattr(error_details_pb2, name):
                    detail = getattr(error_details_pb2, name)()
                    packed.Unpack(detail)
                    found[name] = detail
        except DecodeError:
            return {}
    return found


@contextmanager
def translated() -> Iterator[None]:
    """Translate what calls inside it raise: `with translated(): stub.Resume(...)`, also around `await`."""
    try:
        yield
    except grpc.RpcError as error:
        raise translate(error) from error
