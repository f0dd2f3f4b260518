"""Public names and signatures do not change unseen, and the documentation knows every error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import surface

from tandem.errors import CATALOGUE, Reason

ERRORS = Path(__file__).parents[2] / "docs" / "errors.md"


@pytest.mark.parametrize("name", surface.MODULES)
def test_the_public_surface_is_the_frozen_one(name: str) -> None:
    changed = surface.difference(name)
    assert not changed, f"the public surface changed; if that is meant: {surface.__doc__}\n{changed}"


def test_a_changed_signature_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    import tandem.errors

    def invalid(field: str) -> None: ...

    invalid.__module__ = "tandem.errors"
    monkeypatch.setattr(tandem.errors, "invalid", invalid)
    assert "-tandem.errors.invalid(field: str, description: str" in surface.difference("tandem")


def test_every_reason_has_a_class_and_only_one() -> None:
    assert set(CATALOGUE) == set(Reason)


def test_the_catalogue_of_errors_is_documented() -> None:
    """Each reason has a row with its code and class, and each row is of a reason."""
    rows = re.findall(
        r"^\| `([A-Z_]+)` \| `([A-Z_]+)` \| `(\w+)` \| (.+?) \| (.+?) \|$", ERRORS.read_text(), re.M
    )
    documented = {reason: (code, cls) for reason, code, cls, _, _ in rows}
    assert len(documented) == len(rows)
    assert documented == {reason: (cls.code_name, cls.__name__) for reason, cls in CATALOGUE.items()}
