"""Every state of the weight state machine, how it comes about, and what can happen in it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from inference_service.policy import WeightState
from inference_service.rollouts import Track
from tandem.errors import Reason
from tests.policy_machine import Machine, Trainer, outcome
from weight_transfer.digest import combine, digest_tensors

# The states, and how they come about.


async def committed(m: Machine) -> None:
    pass


async def staging(m: Machine) -> None:
    await m.begin(in_place=False)


async def writing(m: Machine) -> None:
    await m.begin(in_place=True)


async def torn(m: Machine) -> None:
    await writing(m)
    m.tensors[0].fill_(-1.0)
    m.trainer.alive = False
    assert m.update is not None
    await m.update.lose("it died")
    m.update = None
    m.trainer = Trainer()


async def torn_staging(m: Machine) -> None:
    await torn(m)
    await staging(m)


async def torn_writing(m: Machine) -> None:
    await torn(m)
    await writing(m)


async def stray(m: Machine) -> None:
    """Torn by a trainer that lost its lease and still has the memory."""
    await writing(m)
    m.tensors[0].fill_(-1.0)
    assert m.update is not None
    await m.update.lose("not heard of")
    m.update = None


STATES = (committed, staging, writing, torn, torn_staging, torn_writing, stray)


C, S, W, T = WeightState
HELD, BASE, ORDER = Reason.LEASE_HELD, Reason.BASE_VERSION_MISMATCH, Reason.UPDATE_ORDER
DIGEST, TORN = Reason.DIGEST_MISMATCH, Reason.ENGINE_TORN


# The events. Those of an update that is not open are its trainer's alone, and cannot happen.


async def begin_writing(m: Machine) -> str:
    return await outcome(m.begin(in_place=True))


async def begin_writing_as_another(m: Machine) -> str:
    return await outcome(m.begin(in_place=True, trainer=m.another))


async def begin_staging(m: Machine) -> str:
    return await outcome(m.begin(in_place=False))


async def begin_on_old_base(m: Machine) -> str:
    return await outcome(m.begin(in_place=True, base=m.policy.version - 1))


async def begin_on_future_base(m: Machine) -> str:
    return await outcome(m.begin(in_place=False, base=m.policy.version + 1))


async def restore(m: Machine) -> str:
    m.engine.step = _restoring(m, m.engine.step)  # type: ignore[method-assign]
    return await outcome(m.policy.restore())


def _restoring(m: Machine, step: Callable[[str], Awaitable[None]]) -> Callable[[str], Awaitable[None]]:
    async def restored(call: str) -> None:
        if call == "tandem_restore":
            for tensor, value in zip(m.tensors, m.values(m.policy.version + 1), strict=True):
                tensor.copy_(value)
        await step(call)

    return restored


async def read_digest(m: Machine) -> str:
    return await outcome(m.policy.digest())


async def write_and_commit(m: Machine) -> str:
    assert m.update is not None
    return await outcome(m.update.commit(m.write()))


async def commit_with_a_wrong_digest(m: Machine) -> str:
    assert m.update is not None
    return await outcome(m.update.commit(m.write() ^ 1))


async def commit_half(m: Machine) -> str:
    """One tensor of two: unfinished if staged, of another digest than the trainer's if in place."""
    assert m.update is not None
    value = m.values(m.policy.version + 1)
    if m.update.in_place:
        m.tensors[0].copy_(value[0])
    else:
        m.update.chunk(0, 0, value[0].numpy().tobytes())
    return await outcome(m.update.commit(combine(digest_tensors(value))))


async def stage_out_of_order(m: Machine) -> str:
    async def chunk() -> None:
        assert m.update is not None
        m.update.chunk(0, 8, b"12345678")

    return await outcome(chunk())


async def abort_untouched(m: Machine) -> str:
    assert m.update is not None
    return await outcome(m.update.abort(untouched=True, reason="thought better of it"))


async def abort_touched(m: Machine) -> str:
    assert m.update is not None
    if m.update.in_place:
        m.tensors[1].fill_(-2.0)
    return await outcome(m.update.abort(untouched=False, reason="an exception"))


async def lose(m: Machine) -> str:
    assert m.update is not None
    if m.update.in_place:
        m.tensors[1].fill_(-2.0)
    return await outcome(m.update.lose("the trainer vanished"))


# What breaks, and when.


async def in_place(m: Machine) -> Any:
    update = await m.begin(in_place=True)
    return await update.commit(m.write())


async def in_place_aliased(m: Machine) -> Any:
    update = await m.begin(in_place=True)
    m.write()
    return await update.commit()


async def staged(m: Machine) -> Any:
    update = await m.begin(in_place=False)
    return await update.commit(m.write())


async def restored(m: Machine) -> Any:
    assert not await restore(m)


async def lost(m: Machine) -> Any:
    update = await m.begin(in_place=True)
    m.policy.rollouts._running["r"] = Track(added=True)
    m.tensors[0].fill_(-1.0)
    await update.lose("it died")


async def aborted(m: Machine) -> Any:
    update = await m.begin(in_place=True)
    await update.abort(untouched=True, reason="")
