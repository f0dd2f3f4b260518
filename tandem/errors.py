"""Tandem's errors: one tree, one catalogue of reasons. docs/errors.md explains each to users.

An error has a class, which is its gRPC status code, and a reason, which programs match on. It is the same in
the service that raises it and in the client, where `tandem.rpc.translate` rebuilds it. A class inherits the
nearest exception of the standard library, so that `except ValueError` works as one would guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import grpc

DOMAIN = "tandem"
"""The domain of every google.rpc.ErrorInfo that Tandem sends."""


class Reason(StrEnum):
    """What went wrong, as programs read it. Reasons are never renamed and never change their class."""

    FIELD_INVALID = "FIELD_INVALID"
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG"
    MANIFEST_MISMATCH = "MANIFEST_MISMATCH"
    REWARD_INVALID = "REWARD_INVALID"
    LORA_NOT_FOUND = "LORA_NOT_FOUND"
    SESSION_NOT_FOUND = "SESSION_NOT_FOUND"
    SERVICE_NOT_FOUND = "SERVICE_NOT_FOUND"
    JOB_NOT_FOUND = "JOB_NOT_FOUND"
    BASE_VERSION_MISMATCH = "BASE_VERSION_MISMATCH"
    TRANSPORT_UNAVAILABLE = "TRANSPORT_UNAVAILABLE"
    SLEEP_MODE_OFF = "SLEEP_MODE_OFF"
    LORA_OFF = "LORA_OFF"
    REFERENCE_OFF = "REFERENCE_OFF"
    REFERENCE_MISMATCH = "REFERENCE_MISMATCH"
    UPDATE_ORDER = "UPDATE_ORDER"
    ADDRESS_IN_USE = "ADDRESS_IN_USE"
    STORE_IN_USE = "STORE_IN_USE"
    JOB_STATE = "JOB_STATE"
    JOB_FAILED = "JOB_FAILED"
    LEASE_HELD = "LEASE_HELD"
    LEASE_LOST = "LEASE_LOST"
    MESSAGE_TOO_LARGE = "MESSAGE_TOO_LARGE"
    QUEUE_FULL = "QUEUE_FULL"
    DISK_FULL = "DISK_FULL"
    ENGINE_LOADING = "ENGINE_LOADING"
    ENGINE_TORN = "ENGINE_TORN"
    ENGINE_DEAD = "ENGINE_DEAD"
    ENGINE_ASLEEP = "ENGINE_ASLEEP"
    WEIGHTS_TOO_OLD = "WEIGHTS_TOO_OLD"
    DRAINING = "DRAINING"
    INTERRUPTED = "INTERRUPTED"
    UNREACHABLE = "UNREACHABLE"
    DIGEST_MISMATCH = "DIGEST_MISMATCH"
    DEADLINE = "DEADLINE"
    CANCELLED = "CANCELLED"
    JOB_CANCELLED = "JOB_CANCELLED"
    TOKEN_INVALID = "TOKEN_INVALID"  # noqa: S105  # no password
    METHOD_UNKNOWN = "METHOD_UNKNOWN"
    BUG = "BUG"


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing wrong with a request."""

    field: str
    """Path of the field as the proto names it, `sampling.top_p`; for a manifest, the tensor's name."""
    description: str
    """What is wrong with it and what would be right."""


class TandemError(Exception):
    """Base of every error that Tandem raises on purpose. Raise its subclasses."""

    code_name: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        reason: Reason | str,
        message: str,
        *,
        violations: Iterable[Violation] = (),
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        """Make an error.

        Args:
            reason: one of the catalogue's for this class. A plain string is for reasons of newer peers.
            message: one sentence for people: what to do, and no secret, since it goes over the wire.
            violations: the fields at fault.
            metadata: what the message has that programs may want: `{"weight_version": "3"}`.
            retry_after: seconds after which another try may succeed.
        """
        if isinstance(reason, Reason) and CATALOGUE[reason] is not type(self):
            right, wrong = CATALOGUE[reason].__name__, type(self).__name__
            raise TypeError(f"{reason} is a reason of {right}, not of {wrong}")
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.violations = list(violations)
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC status code of the error's class."""
        import grpc  # here, so that catching errors costs no import of gRPC

        return grpc.StatusCode[self.code_name]

    def __str__(self) -> str:
        more = [f"{v.field}: {v.description}" for v in self.violations]
        shown = [line for line in more if line != self.message]
        return "\n  ".join([f"{self.reason}: {self.message}", *shown])

    def __reduce__(self) -> tuple[Any, ...]:
        state = (self.reason, self.message, self.violations, self.metadata, self.retry_after)
        return (_rebuild, (type(self), *state))


def _rebuild(
    cls: type[TandemError],
    reason: Reason | str,
    message: str,
    violations: list[Violation],
    metadata: dict[str, str],
    retry_after: float | None,
) -> TandemError:
    return cls(reason, message, violations=violations, metadata=metadata, retry_after=retry_after)


class InvalidArgument(TandemError, ValueError):
    """The request is wrong whatever the service's state. `violations` names each field at fault."""

    code_name = "INVALID_ARGUMENT"


class NotFound(TandemError, LookupError):
    """The request names something that does not exist."""

    code_name = "NOT_FOUND"


class FailedPrecondition(TandemError, RuntimeError):
    """The service is in a state in which this cannot be done; the same call fails until that changes."""

    code_name = "FAILED_PRECONDITION"


class Aborted(TandemError, RuntimeError):
    """Another caller was first. Start over from the beginning of the update."""

    code_name = "ABORTED"


class ResourceExhausted(TandemError, RuntimeError):
    """A limit was reached."""

    code_name = "RESOURCE_EXHAUSTED"


class Unavailable(TandemError, ConnectionError):
    """The service cannot answer now. Trying again later is safe and may work."""

    code_name = "UNAVAILABLE"


class DataLoss(TandemError, RuntimeError):
    """Bytes differ between the two sides."""

    code_name = "DATA_LOSS"


class DeadlineExceeded(TandemError, TimeoutError):
    """The call's deadline passed. Whether the call took effect is not known."""

    code_name = "DEADLINE_EXCEEDED"


class Cancelled(TandemError, RuntimeError):
    """The call, or the job that it waited for, was cancelled."""

    code_name = "CANCELLED"


class Unauthenticated(TandemError, PermissionError):
    """The caller did not say who it is, or lied."""

    code_name = "UNAUTHENTICATED"


class Unimplemented(TandemError, NotImplementedError):
    """The service does not know the method: it is older or newer than the caller."""

    code_name = "UNIMPLEMENTED"


class Internal(TandemError, RuntimeError):
    """A bug. The text is in the service's log, under the incident id in `metadata`."""

    code_name = "INTERNAL"


CATALOGUE: dict[Reason, type[TandemError]] = {
    Reason.FIELD_INVALID: InvalidArgument,
    Reason.PROMPT_TOO_LONG: InvalidArgument,
    Reason.MANIFEST_MISMATCH: InvalidArgument,
    Reason.REWARD_INVALID: InvalidArgument,
    Reason.LORA_NOT_FOUND: NotFound,
    Reason.SESSION_NOT_FOUND: NotFound,
    Reason.SERVICE_NOT_FOUND: NotFound,
    Reason.JOB_NOT_FOUND: NotFound,
    Reason.BASE_VERSION_MISMATCH: FailedPrecondition,
    Reason.TRANSPORT_UNAVAILABLE: FailedPrecondition,
    Reason.SLEEP_MODE_OFF: FailedPrecondition,
    Reason.LORA_OFF: FailedPrecondition,
    Reason.REFERENCE_OFF: FailedPrecondition,
    Reason.REFERENCE_MISMATCH: FailedPrecondition,
    Reason.UPDATE_ORDER: FailedPrecondition,
    Reason.ADDRESS_IN_USE: FailedPrecondition,
    Reason.STORE_IN_USE: FailedPrecondition,
    Reason.JOB_STATE: FailedPrecondition,
    Reason.JOB_FAILED: FailedPrecondition,
    Reason.LEASE_HELD: Aborted,
    Reason.LEASE_LOST: Aborted,
    Reason.MESSAGE_TOO_LARGE: ResourceExhausted,
    Reason.QUEUE_FULL: ResourceExhausted,
    Reason.DISK_FULL: ResourceExhausted,
    Reason.ENGINE_LOADING: Unavailable,
    Reason.ENGINE_TORN: Unavailable,
    Reason.ENGINE_DEAD: Unavailable,
    Reason.ENGINE_ASLEEP: Unavailable,
    Reason.WEIGHTS_TOO_OLD: Unavailable,
    Reason.DRAINING: Unavailable,
    Reason.INTERRUPTED: Unavailable,
    Reason.UNREACHABLE: Unavailable,
    Reason.DIGEST_MISMATCH: DataLoss,
    Reason.DEADLINE: DeadlineExceeded,
    Reason.CANCELLED: Cancelled,
    Reason.JOB_CANCELLED: Cancelled,
    Reason.TOKEN_INVALID: Unauthenticated,
    Reason.METHOD_UNKNOWN: Unimplemented,
    Reason.BUG: Internal,
}
"""The class of each reason."""


def invalid(field: str, description: str, reason: Reason = Reason.FIELD_INVALID) -> InvalidArgument:
    """Make the error for one wrong field: `raise invalid("sampling.top_p", "must be in (0, 1], is 3")`."""
    return InvalidArgument(reason, f"{field}: {description}", violations=[Violation(field, description)])
