"""The gRPC plumbing of both services and their clients. Names load what they need when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tandem.rpc.channel import connect, connect_aio
    from tandem.rpc.serving import Serving, ServingConfig
    from tandem.rpc.status import to_status, translate, translated

_HOME = {
    "connect": "channel",
    "connect_aio": "channel",
    "Serving": "serving",
    "ServingConfig": "serving",
    "to_status": "status",
    "translate": "status",
    "translated": "status",
}

__all__ = ["Serving", "ServingConfig", "connect", "connect_aio", "to_status", "translate", "translated"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
