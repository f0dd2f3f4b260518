"""Waiting for a weight version: until it is there, for so long, or until the engine can give none."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from inference_service.host import Host
from tandem.errors import Reason, Unavailable


@pytest.fixture
async def policy() -> Any:
    torn = Unavailable(Reason.ENGINE_TORN, "torn")
    engine = SimpleNamespace(dead=False, asleep=False)
    return SimpleNamespace(version=3, torn="", torn_error=lambda: torn, changed=[], engine=engine)


@pytest.fixture
def host(policy: Any) -> Host:
    host = Host()
    host.load(policy, SimpleNamespace())  # type: ignore[arg-type]
    return host


def tell(policy: Any) -> None:
    for told in list(policy.changed):
        told()


async def test_a_version_that_is_there_is_not_waited_for(host: Host, policy: Any) -> None:
    await host.at_least(3, 0)
    await host.at_least(1, 0)
    assert policy.changed == []


async def test_a_version_is_waited_for_until_it_is_committed(host: Host, policy: Any) -> None:
    waiting = asyncio.ensure_future(host.at_least(5, None))
    for version in (3, 4):
        policy.version = version
        await asyncio.sleep(0)
        tell(policy)
        await asyncio.sleep(0)
        assert not waiting.done()
    policy.version = 6  # a later one will do
    tell(policy)
    await asyncio.wait_for(waiting, 60)
    assert policy.changed == []


@pytest.mark.parametrize("seconds", [0, 0.01])
async def test_who_cannot_wait_is_told_which_version_there_is(
    host: Host, policy: Any, seconds: float
) -> None:
    with pytest.raises(Unavailable) as raised:
        await host.at_least(5, seconds)
    assert raised.value.reason is Reason.WEIGHTS_TOO_OLD
    assert raised.value.metadata == {"weight_version": "3", "min_weight_version": "5"}
    assert policy.changed == []


def die(host: Host, policy: Any) -> None:
    policy.engine.dead = True


def tear(host: Host, policy: Any) -> None:
    policy.torn = "torn"
    tell(policy)


def fall_asleep(host: Host, policy: Any) -> None:
    policy.engine.asleep = True


def drain(host: Host, policy: Any) -> None:
    host.draining = lambda: True


@pytest.mark.parametrize(
    ("happens", "reason"),
    [
        (die, Reason.ENGINE_DEAD),
        (tear, Reason.ENGINE_TORN),
        (fall_asleep, Reason.ENGINE_ASLEEP),
        (drain, Reason.DRAINING),
    ],
)
async def test_nobody_waits_for_what_will_not_come(
    host: Host, policy: Any, happens: Any, reason: Reason
) -> None:
    waiting = asyncio.ensure_future(host.at_least(5, None))
    await asyncio.sleep(0)
    happens(host, policy)
    with pytest.raises(Unavailable) as raised:
        await asyncio.wait_for(waiting, 60)
    assert raised.value.reason is reason
    assert policy.changed == []


async def test_who_leaves_waits_no_more(host: Host, policy: Any) -> None:
    waiting = asyncio.ensure_future(host.at_least(5, None))
    await asyncio.sleep(0)
    assert policy.changed
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert policy.changed == []
