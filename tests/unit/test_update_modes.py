"""Which way an update goes: staged or in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from inference_service.arenas import HostArenas
from inference_service.device_arenas import DeviceArenas
from inference_service.memory import HEADROOM, free_bytes
from inference_service.modes import Modes
from inference_service.transports import SHARED, STREAM, Way, incoming
from tandem.errors import FailedPrecondition, Reason
from tests.update_plane import Plane


@pytest.mark.parametrize(
    ("setting", "transport", "asked", "mode"),
    [
        ("auto", SHARED, "", "in_place"),
        ("auto", STREAM, "", ""),
        ("staged", SHARED, "", "staged"),
        ("in_place", STREAM, "", "in_place"),
        ("staged", SHARED, "in_place", "in_place"),
        ("in_place", STREAM, "staged", "staged"),
    ],
)
def test_the_trainer_chooses_and_then_the_service(
    setting: Any, transport: str, asked: str, mode: str
) -> None:
    assert Modes(Plane().arenas, setting).for_session(transport, asked) == mode


def test_what_is_not_chosen_depends_on_free_memory() -> None:
    arenas, free = Plane().arenas, [0]
    modes = Modes(arenas, free=lambda: free[0])
    need = arenas.manifest.nbytes + HEADROOM
    for free[0], in_place in ((0, True), (need - 1, True), (need, False)):
        assert modes.in_place("") is in_place
        assert modes.in_place("staged") is False
        assert modes.in_place("in_place") is True


@pytest.mark.parametrize("gpus", [(), ("GPU-1",)])
async def test_an_engine_on_a_gpu_has_its_kernels_done_before_anybody_writes(
    monkeypatch: pytest.MonkeyPatch, gpus: tuple[str, ...]
) -> None:
    plane = Plane()
    monkeypatch.setattr(HostArenas, "gpus", gpus)
    update = await plane.policy.begin(plane.policy.version, Way(SHARED, in_place=True))
    assert plane.engine.settled == [bool(gpus)]
    await update.abort(untouched=True, reason="seen")


def test_what_streams_to_a_gpu_or_is_an_adapter_is_staged() -> None:
    arenas = DeviceArenas(None, [], Plane().arenas.placements)  # type: ignore[arg-type]
    for modes, adapter in ((Modes(arenas, "in_place"), False), (Modes(Plane().arenas, "in_place"), True)):
        assert modes.for_session(STREAM, adapter=adapter) == "staged"
        with pytest.raises(FailedPrecondition) as caught:
            modes.for_session(STREAM, "in_place", adapter=adapter)
        assert caught.value.reason == Reason.TRANSPORT_UNAVAILABLE
    with pytest.raises(ValueError, match="come like this"):
        incoming(Way(STREAM, in_place=True), arenas, None)  # type: ignore[arg-type]


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    host = free_bytes(tmp_path)  # no limits there
    assert host > 0
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 50\n")
    for limit, free in (("1000\n", 350), ("600\n", 0), ("max\n", None)):
        (tmp_path / "memory.max").write_text(limit)
        found = free_bytes(tmp_path)
        assert found == free if free is not None else found > 1000
