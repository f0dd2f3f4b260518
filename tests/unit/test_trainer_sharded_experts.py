"""A model whose experts are one parameter in memory, spread over two ranks: what the engine gets, and what it costs."""

from __future__ import annotations

from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from inference_service import sessions
from inference_service.arenas import EngineArenas
from tests import host_nccl
from tests.faults import checkpoints
from tests.ranks import ON_CPU, ROOT, of_script, succeeded, two_ranks
from tests.split_service import split
from tests.weight_service import WeightService, idle, of_checkpoint
from trainer_service.client import InferenceClient

pytestmark = pytest.mark.slow


def on_a_gpu(model: nn.Module) -> tuple[Any, EngineArenas]:
    """An engine that takes all of the policy in one window, in which its tensors lie by their names."""
    found = host_nccl.on_a_gpu(model)
    sessions.WINDOW_BYTES = sessions.MIRROR_BYTES = 1 << 30
    return found


#: Engines, by the transport that they are reached by.
ENGINES = {"stream": idle, "shared": idle, "nccl": on_a_gpu, "together": split}

REACHES = """
    import os, sys, time
    from contextlib import nullcontext
    import torch
    from accelerate import Accelerator
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.multiprocessing.reductions import StorageWeakRef
    from transformers import AutoModelForCausalLM
    from tests import host_nccl
    from tests.split_service import Rank
    from trainer_service import policy_tensors as names
    from trainer_service.policy_tensors import policy_tensors
    from weight_transfer.digest import combine, digest_tensor

    checkpoint, how, *ways = sys.argv[1:]
    Accelerator(cpu=True)
    if how == "zero3":
        import deepspeed
        # Collectives over shared memory, which it would compile for half a minute: gloo does.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    shapes, found = [], []  # of what was gathered, and it itself, in how many dimensions
    held = []  # dimensions of what was whole too long

    def still_whole(allowed=()):
        end = time.monotonic() + 5  # gloo's threads hold on to it for a moment
        while there := [dims for value, dims in found if not value.expired() and dims not in allowed]:
            if time.monotonic() > end:
                break
            time.sleep(0.001)
        return there

    def count(cls, name, shape_of):
        before = getattr(cls, name)

        def counting(self, *arguments, **options):
            if not held:  # told later: the other rank waits here
                held.extend(still_whole((1, 2) if way == "nccl" else ()))  # a bucket is of many
            shapes.append(shape_of(self))
            value = before(self, *arguments, **options)
            if value is not None:
                found.append((StorageWeakRef(value.untyped_storage()), value.ndim))
            return value

        setattr(cls, name, counting)

    if how == "fsdp2":
        count(DTensor, "full_tensor", lambda tensor: tuple(tensor.shape))
    else:
        count(deepspeed.zero.GatheredParameters, "__enter__", lambda these: tuple(these.params[0].ds_shape))

    def loaded():
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)

    def spread(model):
        if how == "fsdp2":
            for layer in model.model.layers:
                fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        else:
            zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
            config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
            deepspeed.zero.Init(module=model, config_dict_or_path=config)
        return model

    def step():
        own = list(rank.model.parameters())
        writing = deepspeed.zero.GatheredParameters(own, modifier_rank=0) if how == "zero3" else nullcontext()
        with torch.no_grad(), writing:
            for parameter in [*own, *twin.parameters()]:
                parameter.mul_(1.5)

    def sync():
        shapes.clear()
        found.clear()
        try:
            rank.sync()
        finally:
            held.extend(still_whole())
            assert held == [], (way, held)

    def assert_same():
        "The engine holds what a trainer of one process would have given it."
        sources = {source.name: source for source in policy_tensors(twin)}
        digests = [digest_tensor(sources[name].read().to(torch.bfloat16)) for name in sorted(sources)]
        assert rank.digest() == combine(digests)
        rank.accelerator.wait_for_everyone()

    def fail(policy, send, **how):
        "In the middle of a layer's experts."
        places = [i for i, source in enumerate(policy) if ".experts.1." in source.name]
        for source in policy[: places[0] + 1]:
            source.read()
        raise ZeroDivisionError("no such weights")

    for way, address in (pair.split("=") for pair in ways):
        with host_nccl.instead_of_nccl() if way == "nccl" else nullcontext():
            twin = loaded()
            each_once = sorted(tuple(parameter.shape) for parameter in twin.parameters())
            assert len(each_once) < len(policy_tensors(twin)), "the checkpoint has more tensors"
            transport = "shared" if way == "together" else way
            rank = Rank(address, spread(loaded()), transport=transport)
            for version in (1, 2):
                sync()
                assert sorted(shapes) == each_once, (way, shapes)
                assert_same()
                step()
            if way != "together":
                if rank.number == 0:
                    moving = rank.weights._session.transport
                    moving.move = fail
                try:
                    sync()
                except Exception as error:
                    assert "no such weights" in str(error), error
                else:
                    raise AssertionError("it was committed")
                assert len(shapes[-1]) == 3 and 0 < len(shapes) < len(each_once), shapes
                step()
                rank.accelerator.wait_for_everyone()
                if rank.number == 0:
                    del moving.move
            sync()
            assert sorted(shapes) == each_once, (way, shapes)
            assert_same()
            if rank.number == 0:
                assert rank.weights.transport == transport and not rank.weights.aliased
                assert (rank.together is not None and rank.together._shared is not None) == (way == "together")
            rank.accelerator.wait_for_everyone()
            print("REACHED", way, flush=True)
            rank.close()

    # A main process that cannot gather does not wait for those who do.
    def no_room(tensor):
        raise MemoryError("no room")

    rank = Rank(dict(pair.split("=") for pair in ways)["stream"], rank.model, transport="stream")
    if rank.number == 0:
        names._whole = no_room
    try:
        rank.sync()
    except Exception as error:
        print("ENDED", type(error).__name__, error, flush=True)
    os._exit(0)  # the libraries' own ends would wait for the other
"""


@pytest.mark.parametrize(
    ("architecture", "how"), [("mixtral", "fsdp2"), ("qwen3_moe", "fsdp2"), ("qwen3_moe", "zero3")]
)
def test_each_parameter_is_gathered_once_for_all_its_pieces(
    architecture: str, how: str, tmp_path: Path, socket_folder: Path
) -> None:
    checkpoint = checkpoints.make(tmp_path, architecture)
    with ExitStack() as stack:
        ways = []
        for way, engine_of in ENGINES.items():
            service = WeightService(
                f"unix://{socket_folder}/{way}", 5.0, partial(of_checkpoint, checkpoint), engine_of
            )
            service.start()
            stack.callback(service.kill)
            client = stack.enter_context(closing(InferenceClient(service.address)))
            client.wait_until_serving(60)
            ways.append(f"{way}={service.address}")
        environment = ON_CPU
        if how == "zero3":
            environment |= {"DS_ACCELERATOR": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT}/.venv/deepspeed"}
        with two_ranks(*of_script(REACHES, checkpoint, how, *ways), **environment) as ranks:
            outputs = succeeded(ranks, 200)
            assert [output.count("REACHED") for output in outputs] == [len(ENGINES)] * 2
            assert (
                "ENDED OutOfStepError model.embed_tokens.weight could not be gathered: MemoryError: no room"
                in outputs[0]
            )
            assert ["ENDED" in output for output in outputs] == [True, True]
