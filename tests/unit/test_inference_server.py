"""How the service ends when its engine does, or never came to be. The engine is made up."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from inference_service import server
from inference_service.config import InferenceSettings
from inference_service.policy import WeightState
from tandem.errors import Reason, Unavailable


class Engine:
    """Stands for the engine: remembers whether it was stopped."""

    def __init__(self) -> None:
        self.info = SimpleNamespace(model="m")
        self.asleep = self.paused = self.dead = False
        self.ended: list[str] = []
        self.loaded = asyncio.Event()

    def stop_listening(self) -> None:
        self.ended.append("deaf")

    def stop(self) -> None:
        self.ended.append("stopped")
        self.dead = True


class Sessions:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    made = Engine()

    async def start(*args: Any, **_: Any) -> Engine:
        return made

    async def collect(*args: Any) -> Any:
        return SimpleNamespace(close=lambda: None)

    def policy(engine: Engine, arenas: Any) -> Any:
        manifest = type("Manifest", (list,), {"nbytes": 0})()
        return SimpleNamespace(
            engine=engine, version=1, changed=[], manifest=manifest, torn=False, state=WeightState.COMMITTED
        )

    async def loaded(sessions: Sessions) -> None:  # the last that loading waits for
        made.loaded.set()

    monkeypatch.setattr(server, "Engine", SimpleNamespace(start=start))
    monkeypatch.setattr(server, "collect", collect)
    monkeypatch.setattr(server, "Policy", policy)
    monkeypatch.setattr(server, "Sessions", Sessions)
    monkeypatch.setattr(Sessions, "start", loaded)
    yield made
    gc.unfreeze()  # what the service froze may be garbage now
    gc.collect()
    gc.freeze()


@pytest.fixture
def address() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        yield f"unix://{folder}/s"


def settings(address: str, **fields: Any) -> InferenceSettings:
    return InferenceSettings(model="m", addresses=[address], **fields)


@pytest.mark.parametrize("where", ["collect", "sessions"])
async def test_a_start_that_fails_after_the_engines_ends_the_engine(
    monkeypatch: pytest.MonkeyPatch, engine: Engine, address: str, where: str
) -> None:
    async def fail(*args: Any) -> None:
        raise OSError("no memory")

    if where == "collect":
        monkeypatch.setattr(server, "collect", fail)
    else:
        monkeypatch.setattr(Sessions, "start", fail)
    async with asyncio.timeout(10):
        with pytest.raises(OSError, match="no memory"):
            await server.serve(settings(address))
    assert engine.ended == ["deaf", "stopped"]


async def test_the_service_ends_with_its_engine_where_it_is_told_to(engine: Engine, address: str) -> None:
    serving = asyncio.ensure_future(server.serve(settings(address, exit_on_engine_death=True)))
    await asyncio.wait_for(engine.loaded.wait(), 10)
    await asyncio.sleep(0.7)
    assert not serving.done()
    engine.dead = True
    async with asyncio.timeout(10):
        with pytest.raises(Unavailable) as raised:
            await serving
    assert raised.value.reason is Reason.ENGINE_DEAD
    assert engine.ended == ["deaf", "stopped"]


@pytest.mark.parametrize("dead", [False, True])
async def test_it_outlives_its_engine_otherwise_and_ends_when_asked_without_an_error(
    monkeypatch: pytest.MonkeyPatch, engine: Engine, address: str, dead: bool
) -> None:
    made: list[Any] = []
    real = server.Serving
    monkeypatch.setattr(server, "Serving", lambda config: made.append(real(config)) or made[0])
    # Told to exit on a death that does not come, and not told to on one that does.
    serving = asyncio.ensure_future(server.serve(settings(address, exit_on_engine_death=not dead)))
    await asyncio.wait_for(engine.loaded.wait(), 10)
    engine.dead = dead
    await asyncio.sleep(1.2)
    assert not serving.done()
    made[0].request_stop()
    async with asyncio.timeout(10):
        await serving
    assert engine.ended == ["deaf", "stopped"]


@pytest.mark.parametrize("what", ["sessions", "arenas"])
async def test_the_engine_ends_whatever_else_cannot(
    monkeypatch: pytest.MonkeyPatch, engine: Engine, address: str, what: str
) -> None:
    async def fail(*args: Any) -> Any:
        raise OSError("no memory")

    def close() -> None:
        raise OSError("no memory")

    async def collect(*args: Any) -> Any:
        return SimpleNamespace(close=close)

    if what == "sessions":
        monkeypatch.setattr(Sessions, "stop", fail)
    else:
        monkeypatch.setattr(server, "collect", collect)
    made: list[Any] = []
    real = server.Serving
    monkeypatch.setattr(server, "Serving", lambda config: made.append(real(config)) or made[0])
    serving = asyncio.ensure_future(server.serve(settings(address)))
    await asyncio.wait_for(engine.loaded.wait(), 10)
    made[0].request_stop()
    async with asyncio.timeout(10):
        await serving
    assert engine.ended == ["deaf", "stopped"]


FAILING = """
import sys, threading, time
from inference_service import server
from tandem.cli import main

class Engine:
    @classmethod
    async def start(cls, *args, **_):
        threading.Thread(target=time.sleep, args=(300,)).start()  # as vLLM's, which nobody ends
        return cls()
    def stop_listening(self): pass
    def stop(self): print("stopped")

async def collect(engine):
    raise RuntimeError("no memory")

server.Engine, server.collect = Engine, collect
sys.exit(main(["inference", "--model=m", "--addresses=" + sys.argv[1]]))
"""


def test_a_failed_start_says_why_and_exits_whatever_threads_are_left(address: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILING, address],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == "stopped\n"
    assert done.stderr.splitlines()[-1] == "tandem: RuntimeError: no memory (--debug shows all)"
