"""Misspelt names in the environment: nothing else would ever tell of them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping

import structlog

from tandem.settings import ServiceSettings

#: Variables of Tandem's that are no service's settings.
DOCUMENTED = (
    *(f"TANDEM_INFERENCE_{name}" for name in ("ADDRESS", "TOKEN", "CA_FILE", "CERT_FILE", "KEY_FILE")),
    *(f"TANDEM_TEACHER_{name}" for name in ("ADDRESS", "TOKEN", "CA_FILE", "CERT_FILE", "KEY_FILE")),
    *(f"TANDEM_REWARD_{name}" for name in ("TOKEN", "CA_FILE", "CERT_FILE", "KEY_FILE")),
    *("TANDEM_TRAINER_ADDRESS", "TANDEM_SERVICE_PID", "TANDEM_JOB", "TANDEM_WERROR", "TANDEM_BUILD_JOBS"),
)
#: Under this prefix are settings of the trainer service, beside one of the inference service's own.
TRAINER = "TANDEM_TRAINER_"
#: Under these are settings of other services, though the inference service's own prefix is theirs too.
_OTHERS = (TRAINER, "TANDEM_REWARD_")
#: One of each that looks like another's slip.
_NO_SLIPS = (f"{TRAINER}UIDS", "TANDEM_REWARD_TOKEN_FILE")
_NEAR = 0.9

_log = structlog.get_logger("tandem.settings")


def unknown_variables(
    settings: type[ServiceSettings], environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Variables that look as if they were meant for `settings`, and set nothing.

    That is: an unknown one under the service's own prefix, and any of TANDEM_ that is one slip away from a known one.

    Returns:
        By name, the known one that it is like, or nothing.
    """
    prefix = settings.model_config["env_prefix"]
    known = {f"{prefix}{name}".upper() for name in settings.model_fields} | {f"{prefix}CONFIG", *DOCUMENTED}
    tables = tuple(f"{prefix}{name}__".upper() for name in settings.tables)
    found = {}
    for name in environment:
        upper = name.upper()
        if not upper.startswith("TANDEM_") or upper in known or upper.startswith(tables):
            continue
        near = difflib.get_close_matches(upper, sorted(known), n=1, cutoff=_NEAR)
        own = upper.startswith(prefix) and not upper.startswith(
            tuple(other for other in _OTHERS if other != prefix)
        )
        if (own or near) and upper not in _NO_SLIPS:
            found[name] = near[0] if near else ""
    return found


def warn_of_unknown(settings: type[ServiceSettings]) -> None:
    """Log each of them."""
    for name, near in unknown_variables(settings).items():
        hint = f"; did you mean {near}?" if near else ""
        _log.warning(f"the environment's {name} is no setting and is not read{hint}")
