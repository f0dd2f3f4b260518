"""Adapters that trainers update, in the service: what is refused before anything changes, and what a failure leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
import torch

from inference_service.loras import Loras
from inference_service.policy import Policy, WeightState
from inference_service.trained import trained_adapter
from inference_service.transports import STREAM, Way
from inference_service.update import Update
from tandem.errors import FailedPrecondition, InvalidArgument, NotFound, Reason, Unavailable
from tests.policy_machine import Engine as BareEngine
from tests.weight_service import engine_arenas, network
from weight_transfer.digest import combine, digest_tensors
from weight_transfer.manifest import TensorSpec

A, B = "0.lora_A.weight", "0.lora_B.weight"
SPECS = [TensorSpec(B, "float32", (8, 2)), TensorSpec(A, "float32", (2, 6))]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


class Engine(BareEngine):
    """One that takes adapters, and whose workers cannot adapt what is in `missing`."""

    def __init__(self) -> None:
        super().__init__()
        config = SimpleNamespace(lora_dtype=torch.bfloat16, max_lora_rank=4)
        self.vllm_config = SimpleNamespace(lora_config=config)
        self.loras = Loras(self)
        self.missing: list[str] = []

    async def call_workers(self, method: str, *args: Any) -> list[Any]:  # type: ignore[override]
        await self.step(method)
        return [self.missing] if method == "tandem_adapter_missing" else [None]


@pytest.fixture
def policy() -> Iterator[Policy]:
    policy = Policy(Engine(), engine_arenas(network()))  # type: ignore[arg-type]
    yield policy
    policy.engine.loras.close()


def opened(policy: Policy, specs: list[TensorSpec] = SPECS, **options: Any) -> Any:
    async def open_one() -> Any:
        digest = await policy.digest()
        return await trained_adapter(
            policy, **{"name": "a", "tensors": specs, "base_digest": digest} | options
        )

    return asyncio.run(open_one())


async def begun(policy: Policy, adapter: Any) -> tuple[Update, int]:
    """An update of all ones, and its digest."""
    update = await policy.begin(policy.version, Way(STREAM, in_place=False, adapter=adapter))
    ones = [torch.ones(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in adapter.manifest]
    for i, tensor in enumerate(ones):
        update.chunk(i, 0, tensor.view(torch.uint8).numpy().tobytes())
    return update, combine(digest_tensors(ones))


async def updated(policy: Policy, adapter: Any) -> int:
    update, digest = await begun(policy, adapter)
    return await update.commit(digest)


def test_what_updates_carry_is_in_the_engines_dtype_and_order(policy: Policy) -> None:
    adapter = opened(policy)
    assert [str(spec) for spec in adapter.manifest] == [f"{A} bfloat16[2, 6]", f"{B} bfloat16[8, 2]"]


@pytest.mark.parametrize(
    ("specs", "fields", "said"),
    [
        ([TensorSpec(A, "float32", (2, 6))], {A}, "0.lora_B.weight is missing"),
        ([*SPECS, SPECS[0]], {B}, "given 2 times"),
        (
            [*SPECS, TensorSpec("0.lora_magnitude_vector", "float32", (8,))],
            {"0.lora_magnitude_vector"},
            "are lora_A",
        ),
        ([TensorSpec(A, "int8", (2, 6)), SPECS[0]], {A}, "dtype int8"),
        ([TensorSpec(A, "float32", (2, 7)), SPECS[0]], {A}, "0.weight [8, 6]"),
        ([TensorSpec(A, "float32", (12,)), SPECS[0]], {A}, "two dimensions"),
        ([TensorSpec(A, "float32", (3, 6)), SPECS[0]], {A}, "has rank 3"),
        ([TensorSpec(A, "float32", (5, 6)), TensorSpec(B, "float32", (8, 5))], {A}, "max_lora_rank is 4"),
        (
            [TensorSpec("7" + s.name[1:], s.dtype, s.shape) for s in SPECS],
            {"7" + A[1:], "7" + B[1:]},
            "does not have",
        ),
    ],
    ids=["half", "twice", "part", "dtype", "shape", "dimensions", "ranks", "rank", "module"],
)
def test_tensors_that_are_no_adapter_of_the_policy(
    policy: Policy, specs: list[TensorSpec], fields: set[str], said: str
) -> None:
    with pytest.raises(InvalidArgument) as raised:
        opened(policy, specs)
    assert raised.value.reason == Reason.MANIFEST_MISMATCH
    assert {v.field for v in raised.value.violations} == {f"adapter.tensors[{name}]" for name in fields}
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"name": ""}, "adapter.name"),
        ({"name": "a" * 257}, "adapter.name"),
        ({"specs": []}, "adapter.tensors"),
        ({"base_digest": None}, "adapter.base_digest"),
        ({"base_digest": 1}, "adapter.base_digest"),
    ],
)
def test_the_field_at_fault_is_named(policy: Policy, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        opened(policy, **options)
    assert [violation.field for violation in raised.value.violations] == [field]


def test_a_module_that_vllm_cannot_adapt(policy: Policy) -> None:
    policy.engine.missing = ["0"]  # type: ignore[attr-defined]
    with pytest.raises(InvalidArgument, match="no place for an adapter") as raised:
        opened(policy)
    assert [violation.field for violation in raised.value.violations] == [f"adapter.tensors[{A}]"]


def test_an_engine_without_lora(policy: Policy) -> None:
    policy.engine.llm.vllm_config.lora_config = None
    with pytest.raises(FailedPrecondition) as raised:
        opened(policy)
    assert raised.value.reason == Reason.LORA_OFF


def test_a_commit_raises_the_version_and_writes_no_weight(policy: Policy) -> None:
    adapter, before = opened(policy), policy.arenas.digest()  # type: ignore[attr-defined]
    with pytest.raises(NotFound):
        policy.engine.loras.get("a")
    assert asyncio.run(updated(policy, adapter)) == 2
    first = policy.engine.loras.get("a")
    assert asyncio.run(updated(policy, adapter)) == 3
    assert policy.engine.loras.get("a") is first, "what runs with it goes on with the new one"
    assert (policy.state, policy.arenas.digest()) == (WeightState.COMMITTED, before)  # type: ignore[attr-defined]
    calls = policy.engine.calls  # type: ignore[attr-defined]
    assert calls[-4:] == ["tandem_adapter_prepare", "pause keep", "tandem_adapter_swap", "resume"]


@pytest.mark.parametrize("call", ["tandem_adapter_prepare", "pause keep", "tandem_adapter_swap"])
def test_a_failure_leaves_the_old_one_serving(policy: Policy, call: str) -> None:
    adapter = opened(policy)
    asyncio.run(updated(policy, adapter))
    held, engine = policy.engine.loras.get("a"), policy.engine
    digest = held.digest
    engine.failing[call] = RuntimeError("no memory")  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="no memory"):
        asyncio.run(updated(policy, adapter))
    assert (policy.version, policy.state, policy.torn) == (2, WeightState.COMMITTED, "")
    assert engine.generating  # type: ignore[attr-defined]
    assert (engine.loras.get("a"), held.digest) == (held, digest)
    assert ("tandem_adapter_revert" in engine.calls) == (call == "tandem_adapter_swap")  # type: ignore[attr-defined]
    del engine.failing[call]  # type: ignore[attr-defined]
    assert asyncio.run(updated(policy, adapter)) == 3


def test_a_mix_of_two_adapters_is_never_served(policy: Policy) -> None:
    adapter = opened(policy)
    asyncio.run(updated(policy, adapter))
    engine: Any = policy.engine
    for call in ("tandem_adapter_swap", "tandem_adapter_revert"):
        engine.failing[call] = RuntimeError("a worker is stuck")
    with pytest.raises(RuntimeError):
        asyncio.run(updated(policy, adapter))
    assert policy.state is WeightState.TORN
    assert not engine.generating
    with pytest.raises(NotFound):
        engine.loras.get("a")
    engine.failing.clear()
    with pytest.raises(Unavailable) as raised:  # it does not carry what heals
        asyncio.run(updated(policy, adapter))
    assert raised.value.reason == Reason.ENGINE_TORN
    with pytest.raises(Unavailable):
        opened(policy)


def test_an_adapter_is_of_the_weights_that_it_was_opened_on(policy: Policy) -> None:
    adapter = opened(policy)
    asyncio.run(policy.restore())
    with pytest.raises(FailedPrecondition, match="open another") as raised:
        asyncio.run(updated(policy, adapter))
    assert raised.value.reason == Reason.BASE_VERSION_MISMATCH


class Manager:
    """vLLM's WorkerLoRAManager, as far as it is used, with room for one adapter."""

    def __init__(self) -> None:
        self.lora_config = SimpleNamespace(lora_dtype=torch.float32)
        modules = {"x.qkv": None, "x.o": None}
        packed = {"x.qkv": ["x.q", "x.k"]}
        self._adapter_manager = SimpleNamespace(modules=modules, packed_modules=packed, model=None)
        self.loaded: dict[int, Any] = {}
        self.failing = 0

    def _load_adapter(self, request: Any) -> Any:
        return "from its folder"

    def add_adapter(self, request: Any) -> None:
        if self.failing:
            self.failing -= 1
            raise ValueError("no free slots")
        self.loaded = {request.lora_int_id: self._load_adapter(request)}

    def remove_adapter(self, number: int) -> None:
        self.loaded.pop(number, None)


def one(value: float) -> dict[str, torch.Tensor]:
    return {"x.o.lora_A.weight": torch.full((2, 3), value), "x.o.lora_B.weight": torch.full((3, 2), value)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestInAWorker:
    """WorkerAdapters between vLLM's manager and its folders."""

    def test_modules_that_vllm_has_fused_or_not(self) -> None:
        from inference_service.worker_adapters import WorkerAdapters

        found = WorkerAdapters(Manager()).missing(["x.q", "x.k", "x.qkv", "x.o", "y.o"])
        assert found == ["x.qkv", "y.o"]

    def test_a_failed_swap_and_a_revert_bring_the_old_one_back(self) -> None:
        from vllm.lora.request import LoRARequest

        from inference_service.worker_adapters import WorkerAdapters

        manager = Manager()
        adapters, request = WorkerAdapters(manager), LoRARequest("a", 4, "/nowhere")

        def held() -> float | None:
            model = manager.loaded.get(4)
            return None if model is None else float(model.loras["x.o"].lora_b.max())

        adapters.prepare(4, one(1))
        assert held() is None
        manager.failing = 1
        with pytest.raises(ValueError, match="slots"):
            adapters.swap(request)
        assert held() is None
        adapters.prepare(4, one(1))
        adapters.swap(request)
        assert held() == 1
        adapters.prepare(4, one(2))
        manager.failing = 1
        with pytest.raises(ValueError, match="slots"):
            adapters.swap(request)
        assert held() == 1
        adapters.prepare(4, one(2))
        adapters.swap(request)
        assert held() == 2
        adapters.revert()  # another worker could not
        adapters.revert()
        assert held() == 1
        manager.add_adapter(LoRARequest("b", 5, "/somewhere"))
        assert manager.loaded == {5: "from its folder"}
        manager.add_adapter(request)  # whose place was taken: there is no folder
        assert held() == 1
        adapters.forget(4)
        with pytest.raises(RuntimeError, match="no weights were prepared"):
            adapters.swap(request)
