"""What tests of the weight service's messages share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tandem.errors import (
    Reason,
    TandemError,
)
from tests.faults import raw

SHARED, STREAM = raw.SHARED, raw.STREAM
BOTH = pytest.mark.parametrize("transport", [SHARED, STREAM], ids=["shared", "stream"])

Tensors = raw.Tensors
#: A trainer that falls silent is given up after 2 s; the rest is for a busy machine.
NOTICED_S = 2.0 + 6.0


def reason_of(call: Callable[[], object], kind: type[TandemError]) -> Reason | str:
    with pytest.raises(kind) as caught:
        call()
    return caught.value.reason


def digest_now(session: raw.Session) -> int:
    """Of what the engine holds: an update that changes nothing."""
    held = {name: placement.gather(session.arenas) for name, placement in session.placements.items()}
    return session.digest(held)
