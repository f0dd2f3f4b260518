"""Two ranks that write the memory of an engine's two workers, each its own. All is real but the engine."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tandem.weights.v1 import weights_pb2 as pb
from tests.ranks import ON_CPU, of_script, succeeded, two_ranks
from tests.split_service import network, split
from tests.weight_service import WeightService
from trainer_service.client import InferenceClient

pytestmark = pytest.mark.slow


@pytest.fixture
def address() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        service = WeightService(f"unix://{folder}/s", 2.0, network, split)
        service.start()
        try:
            with closing(InferenceClient(service.address)) as client:
                client.wait_until_serving(30)
            yield service.address
        finally:
            service.kill()


def now(client: InferenceClient) -> Any:
    return client.weights.GetWeightVersion(pb.GetWeightVersionRequest(), timeout=5)


WRITES = """
    import sys
    import torch
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.distributed import init_device_mesh
    from tests.split_service import Rank, network

    gathered, whole = [], DTensor.full_tensor

    def full_tensor(tensor, *args, **kwargs):
        gathered.append(tuple(tensor.shape))
        return whole(tensor, *args, **kwargs)

    def bytes_of(arena):
        return bytes(arena.tensor(0, (arena.size,), torch.uint8).numpy())

    def add(value):
        with torch.no_grad():
            for parameter in rank.model.parameters():
                parameter.add_(value)

    def sync():
        gathered.clear()
        DTensor.full_tensor = full_tensor
        try:
            rank.sync()
        finally:
            DTensor.full_tensor = whole

    for how, dtype in [("ddp", torch.bfloat16), ("ddp", torch.float32), ("fsdp2", torch.bfloat16),
                       ("fsdp2", torch.float32)]:
        model = network(dtype)
        if how == "fsdp2":
            mesh = init_device_mesh("cpu", (2,))
            for layer in model:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        rank = Rank(sys.argv[1], model)
        version = rank.state().weight_version
        for step in range(3):
            add(0.1 * (step + 1))
            sync()
            # Rows are where they are needed. Columns, and what both workers hold, are gathered.
            assert sorted(gathered) == ([] if how == "ddp" else [(8,), (8,), (8, 32)]), gathered
            assert rank.digest() == rank.policys_digest()
            assert rank.generation.weight_version == rank.state().weight_version == version + step + 1
        part = rank.together._shared.part
        (arena,) = part._arenas  # its own, and no other
        if rank.number == 0:
            session = rank.weights._session
            assert rank.weights.transport == "shared" and not rank.weights.aliased
            assert session.alias_reasons.keys() == {spec.name for spec in session.carried}
            assert "" not in session.alias_reasons.values()
        # Where the other rank keeps still its worker's memory stays as it was. The engine takes no half of an update.
        before = bytes_of(arena)
        if rank.number == 1:
            part.write = lambda values: dict.fromkeys(values, 0)
        add(1)
        try:
            sync()
        except Exception as error:
            assert "the ranks hold different values of 2.bias" in str(error), error
        else:
            raise AssertionError("the engine took half of an update")
        assert (bytes_of(arena) != before) == (rank.number == 0)
        assert rank.state().state == 4 and rank.state().reason == "the ranks hold different values of 2.bias"
        part.__dict__.pop("write", None)
        rank.accelerator.wait_for_everyone()
        sync()
        assert rank.digest() == rank.policys_digest() and rank.state().state == 1
        rank.accelerator.wait_for_everyone()
        rank.close()
        print("DONE", how, dtype, flush=True)
    torch.distributed.destroy_process_group()
"""


def test_each_rank_writes_its_own_worker(address: str) -> None:
    with two_ranks(*of_script(WRITES, address), **ON_CPU) as ranks:
        for output in succeeded(ranks):
            assert output.count("DONE") == 4


FAILS = """
    import os, signal, sys, time
    import torch
    from tests.split_service import Rank, network
    from weight_transfer.transports.part import Part

    rank = Rank(sys.argv[1], network())

    def no_memory(*_):
        raise OSError("no memory")

    def fail(values):
        if where == "half":
            before(dict(list(values.items())[:2]))
        raise ZeroDivisionError("no such weights")

    def listing(*_):
        raise ZeroDivisionError("no such weights")

    for where, who in [(where, who) for where in ("at once", "half", "listing") for who in (0, 1)]:
        rank.sync()
        part = rank.together._shared.part
        before = part.write
        if rank.number == who:
            part.__dict__ |= {} if where == "listing" else {"write": fail}
            rank.together._listing.__dict__ |= {"policy": listing} if where == "listing" else {}
        with torch.no_grad():
            for parameter in rank.model.parameters():
                parameter.add_(1)
        try:
            rank.sync()
        except Exception as raised:
            error = raised
        else:
            raise AssertionError("it was committed")
        if rank.number == who:
            assert type(error) is ZeroDivisionError and str(error) == "no such weights", error
        else:
            assert type(error).__name__ == "OtherRankError", repr(error)
            assert str(error) == f"ZeroDivisionError: no such weights (rank {who})", error
        state = rank.state()  # torn, unless no rank had begun to write
        assert (state.state, bool(state.reason)) == ((1, False) if where == "listing" else (4, True)), state
        assert where == "listing" or "no such weights" in state.reason
        rank.accelerator.wait_for_everyone()
        part.__dict__.pop("write", None)
        rank.together._listing.__dict__.pop("policy", None)
        rank.sync()
        assert rank.digest() == rank.policys_digest() and rank.state().state == 1
        rank.accelerator.wait_for_everyone()
        print("FAILED", where, who, flush=True)

    def refused(rank_0, rank_1):
        try:
            rank.sync()
        except Exception as error:
            assert (rank_0, rank_1)[rank.number] in repr(error), repr(error)
            found = error
        else:
            raise AssertionError("a session was opened")
        assert rank.state().state == 1, "nothing was written"
        rank.accelerator.wait_for_everyone()
        return found

    # A rank that cannot map its memory.
    if rank.number == 0:
        rank.weights.detach()
    rank.accelerator.wait_for_everyone()
    connect = Part.__dict__["connect"]
    if rank.number == 1:
        Part.connect = no_memory
    error = refused("could not be opened: OSError: no memory (rank 1)", "OSError('no memory')")
    Part.connect = connect
    # And one in a container of its own.
    if rank.number == 0:
        rank.together.identities[1].pid_namespace += 1
    error = refused("members[0].pid_namespace: the two processes are in different PID namespaces", "could not sync")
    if rank.number == 0:
        assert [violation.field for violation in error.violations] == ["members[0].pid_namespace"]
        rank.together.identities[1].pid_namespace -= 1
    rank.sync()
    assert rank.digest() == rank.policys_digest()
    rank.accelerator.wait_for_everyone()

    # The others are at work elsewhere: the main process says so, and waits for nobody.
    if rank.number == 0:
        rank.weights.detach()
        began = time.monotonic()
        try:
            rank.weights.sync()
        except Exception as error:
            assert "in sync_weights alone" in str(error), error
        else:
            raise AssertionError("it wrote alone")
        assert time.monotonic() - began < 5
    rank.accelerator.wait_for_everyone()
    rank.sync()
    assert rank.digest() == rank.policys_digest()
    rank.accelerator.wait_for_everyone()
    rank.close()
    torch.distributed.destroy_process_group()
"""


def test_a_rank_that_fails_tears_the_engine_and_all_say_why(address: str) -> None:
    with two_ranks(*of_script(FAILS, address), **ON_CPU) as ranks:
        for output in succeeded(ranks):
            assert output.count("FAILED") == 6


LIVES = """
    import sys, time
    from pathlib import Path
    import torch
    from tests.split_service import Rank, network

    folder = Path(sys.argv[2])
    rank = Rank(sys.argv[1], network())
    rank.sync()
    life = rank.client.get_model().engine_id
    rank.accelerator.wait_for_everyone()
    (folder / f"synced{rank.number}").touch()
    while not (folder / "restarted").exists():
        time.sleep(0.02)
    assert rank.client.get_model().engine_id != life
    for version in (2, 3):  # the very weights keep their number
        rank.sync()
        assert rank.generation.weight_version == rank.state().weight_version == version
        assert rank.digest() == rank.policys_digest()
        with torch.no_grad():
            for parameter in rank.model.parameters():
                parameter.add_(1)
    rank.accelerator.wait_for_everyone()
    rank.close()
    torch.distributed.destroy_process_group()
"""


def test_an_engine_that_was_started_again_is_given_everything(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        service = WeightService(f"unix://{folder}/s", 2.0, network, split)
        service.start()
        try:
            with two_ranks(*of_script(LIVES, service.address, tmp_path), **ON_CPU) as ranks:
                end = time.monotonic() + 120
                while not all((tmp_path / f"synced{rank}").exists() for rank in range(2)):
                    assert time.monotonic() < end
                    assert [rank.poll() for rank in ranks] == [None, None]
                    time.sleep(0.05)
                service.kill()
                service.start()
                with closing(InferenceClient(service.address)) as client:
                    client.wait_until_serving(30)
                (tmp_path / "restarted").touch()
                succeeded(ranks)
        finally:
            service.kill()


DIES = """
    import os, signal, sys, time
    from dataclasses import replace
    import torch
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from tests.split_service import Rank, network

    address, how = sys.argv[1:]
    model = network()
    if how == "cannot gather":
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model, mesh=mesh)
    rank = Rank(address, model)
    rank.sync()
    part = rank.together._shared.part
    write, listing = part.write, rank.together._listing.policy

    def fails():
        print("DIES", flush=True)
        raise MemoryError("no room")

    def listed(*arguments):
        return [replace(s, read=fails) if s.name == "1.weight" else s for s in listing(*arguments)]

    def dies(values):
        write(dict(list(values.items())[:2]))
        print("DIES", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    if rank.number == 1 and how == "killed":
        part.write = dies
    elif rank.number == 1:
        rank.together._listing.policy = listed
    began = time.monotonic()
    try:
        rank.sync()
    except Exception as error:
        print("RAISED", type(error).__name__, error, time.monotonic() - began, flush=True)
        os._exit(0)  # the libraries' own ends would wait for the other
"""


@pytest.mark.parametrize("how", ["killed", "cannot gather"])
def test_a_rank_that_goes_as_it_writes_tears_the_engine_at_once(address: str, how: str) -> None:
    with closing(InferenceClient(address)) as client:
        with two_ranks(*of_script(DIES, address, how), **ON_CPU) as ranks:
            assert ranks[1].stdout is not None
            while "DIES" not in ranks[1].stdout.readline():
                assert ranks[1].poll() is None
            died = time.monotonic()
            while (state := now(client)).state != pb.WEIGHT_STATE_TORN:
                assert time.monotonic() - died < 1
                time.sleep(0.01)
            assert state.reason == f"the trainer (process {ranks[1].pid}) closed its session or died"
            assert state.weight_version == 2
            output, _ = ranks[0].communicate(timeout=20)
            assert (ranks[0].returncode, "RAISED" in output) == (0, True), output
            assert ranks[1].wait(10) == (-signal.SIGKILL if how == "killed" else 0)
            gathering = "RAISED OutOfStepError 1.weight could not be gathered: MemoryError: no room"
            assert how == "killed" or gathering in ranks[1].stdout.read()
            ranks[1].stdout.close()
        if how != "killed":
            return
        with two_ranks(*of_script(WRITES, address), **ON_CPU) as ranks:  # a new run heals it
            succeeded(ranks)
