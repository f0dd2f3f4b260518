"""What attention layers make of their weights follows the weights, in vLLM's own latent attention and in layers that do
what some of its kernels do.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from weight_transfer.arena import Arena

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what vLLM imports
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.attention import MLAAttention
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend
    from vllm.v1.attention.backends.mla.prefill.cpu_sdpa import CPUSDPAMLAPrefillBackend

    from inference_service import loader
    from inference_service.derived import Derived, why_unknown
    from inference_service.loader import HeldWeights
    from inference_service.rewritten import Loaded

HEADS, RANK, NOPE, VALUE = 2, 512, 8, 4
REASON = "attention computes with copies of its weights, of which vLLM does not make the same again"


class Projection(nn.Module):
    """Stands for kv_b_proj, without the process groups that vLLM's linear layers want."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        shape = HEADS * (NOPE + VALUE), RANK
        self.weight = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
        self.quant_method = UnquantizedLinearMethod()


class Model(nn.Module):
    """vLLM's latent attention in float32, whose projection has a dtype of its own."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.projection = Projection(dtype)
        self.attention = MLAAttention(
            num_heads=HEADS,
            scale=1.0,
            qk_nope_head_dim=NOPE,
            qk_rope_head_dim=64,
            v_head_dim=VALUE,
            q_lora_rank=None,
            kv_lora_rank=RANK,
            kv_b_proj=self.projection,  # type: ignore[arg-type]
            prefix="attention",
            attn_backend=CPUMLABackend,
            prefill_backend_cls=CPUSDPAMLAPrefillBackend,
        )

    def write(self, seed: int) -> None:
        value = torch.randn(self.projection.weight.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.projection.weight.copy_(value)

    def process(self) -> None:
        self.attention.process_weights_after_loading(torch.float32)


class Layer(nn.Module, AttentionLayerBase):  # type: ignore[misc]
    """Attention whose kernel is `impl`."""

    def __init__(self, impl: Any, weight: nn.Parameter) -> None:
        super().__init__()
        impl.source = weight
        self.impl = impl

    def get_attn_backend(self) -> Any:
        raise NotImplementedError

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> Any:
        raise NotImplementedError

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """As vLLM's do."""
        self.impl.process(act_dtype)
        self.scale, self.scale_float = torch.tensor(1.0), 1.0  # of the key-value cache: no checkpoint has it


class Casting:
    """Has its weight in float32, in memory of its own."""

    source: nn.Parameter

    def process(self, dtype: torch.dtype) -> None:
        self.sinks = self.source.to(dtype)


class CastingOnce(Casting):
    """Does so the first time only."""

    def process(self, dtype: torch.dtype) -> None:
        if not hasattr(self, "sinks"):
            super().process(dtype)


class CastingElse(Casting):
    """Makes something else of it each time."""

    times = 0

    def process(self, dtype: torch.dtype) -> None:
        self.times += 1
        self.sinks = self.source.to(dtype) + self.times


class Failing(Casting):
    """Cannot do it twice."""

    def process(self, dtype: torch.dtype) -> None:
        if hasattr(self, "sinks"):
            raise RuntimeError("again?")
        super().process(dtype)


class Plain(Casting):
    """Leaves its weight as it is."""

    def process(self, dtype: torch.dtype) -> None:
        """See the class."""


@pytest.fixture(scope="module")
def config() -> VllmConfig:
    made = VllmConfig()
    made.model_config = SimpleNamespace(dtype=torch.float32, use_mla=True)  # type: ignore[assignment]
    return made


@pytest.fixture
def vllm() -> Iterator[None]:
    """What vLLM's layers ask for while they are made."""
    with set_current_vllm_config(VllmConfig()):
        yield


def loaded(model: Any) -> tuple[Arena, Derived]:
    """As the loader loads."""
    arena = loader._rebind(model, torch.device("cpu"))
    model.write(0)
    derived = Derived(model)
    model.process()
    derived.find(arena)
    return arena, derived


def products(attention: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return attention.W_UK_T, attention.W_UV


def cut(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For keys and for values, by hand."""
    heads = weight.float().unflatten(0, (HEADS, NOPE + VALUE))
    return heads[:, :NOPE], heads[:, NOPE:].transpose(1, 2)


def assert_follows(model: Model) -> None:
    for found, wanted in zip(products(model.attention), cut(model.projection.weight), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.usefixtures("vllm")
def test_what_is_cut_of_a_weight_is_the_weight(config: VllmConfig) -> None:
    model = Model()
    arena, derived = loaded(model)
    assert_follows(model)
    assert derived.copies == []
    assert {id(p) for p in derived.parameters} == {id(p) for p in products(model.attention)}
    assert derived.why_not(config) == why_unknown(model) == ""
    assert not HeldWeights([arena], derived=derived).reloads
    model.write(1)
    assert_follows(model)


@pytest.mark.usefixtures("vllm")
def test_what_is_cut_of_another_dtype_is_made_anew_where_it_is(config: VllmConfig) -> None:
    model = Model(torch.bfloat16)
    arena, derived = loaded(model)
    first = cut(model.projection.weight.clone())
    where = [product.data_ptr() for product in products(model.attention)]
    assert derived.why_not(config) == ""
    assert_follows(model)
    held = HeldWeights([arena], derived=derived)
    assert held.reloads
    model.write(1)
    assert all(torch.equal(a, b) for a, b in zip(products(model.attention), first, strict=True))
    for seed in (2, 3):
        model.write(seed)
        held.reload(model, config)
        assert_follows(model)
        assert [product.data_ptr() for product in products(model.attention)] == where


@pytest.mark.usefixtures("vllm")
def test_a_weight_that_vllm_drops_for_a_packed_one_stays(config: VllmConfig) -> None:
    """As for AMX: what is packed stands in for its kernel's layout."""
    model = Model()
    impl: Any = model.attention.impl

    def pack(dtype: torch.dtype) -> None:
        impl.packed = 2 * model.projection.weight.t().contiguous()

    impl.process_weights_after_loading, model.attention.is_amx_bmm_enabled = pack, True
    weight = model.projection.weight
    _, derived = loaded(model)
    packed = impl.packed
    assert derived.why_not(config) == ""
    for seed in (1, 2):
        model.write(seed)
        derived.renew(config)
        assert impl.packed is packed
        assert model.projection.weight is weight
        assert torch.equal(packed, 2 * weight.t())


@pytest.mark.usefixtures("vllm")
def test_the_cut_is_no_module_to_load_anew() -> None:
    model = Model()
    arena = loader._rebind(model, torch.device("cpu"))
    before, derived = Loaded(model), Derived(model)
    model.write(0)
    before.mark()
    model.process()
    derived.find(arena)
    assert before.rewritten(model).modules == [model.attention]
    assert before.rewritten(model, derived.parameters).modules == []


class Kernel(nn.Module):
    """A layer of a kernel."""

    def __init__(self, impl: Casting, heads: int = 8) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.zeros(heads, dtype=torch.bfloat16), requires_grad=False)
        self.layer = Layer(impl, self.sinks)

    def write(self, seed: int) -> None:
        self.sinks.copy_(torch.randn(len(self.sinks), generator=torch.Generator().manual_seed(seed)))

    def process(self) -> None:
        self.layer.process_weights_after_loading(torch.float32)


@pytest.mark.parametrize("heads", [8, 1])
def test_a_kernels_copy_is_made_anew_where_it_is(config: VllmConfig, heads: int) -> None:
    impl = Casting()
    model = Kernel(impl, heads)
    _, derived = loaded(model)
    copy, layer = impl.sinks, model.layer
    assert derived.why_not(config) == ""
    model.write(1)
    scale, layer.scale_float = layer.scale.fill_(0.5), 0.5  # as calculated of what was generated since
    derived.renew(config)
    assert impl.sinks is copy
    assert torch.equal(copy, model.sinks.float())
    assert (layer.scale is scale, scale.item(), layer.scale_float) == (True, 0.5, 0.5)


def test_a_scale_alone_is_no_copy_of_weights() -> None:
    _, derived = loaded(Kernel(Plain()))
    assert ([made.name for made in derived.made], derived.copies) == (["scale"], [])


@pytest.mark.parametrize("impl", [CastingOnce, CastingElse, Failing])
def test_a_copy_that_does_not_come_out_the_same_is_refused_and_left(
    impl: type[Casting], config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Kernel(made := impl())
    arena, derived = loaded(model)
    copy, value = made.sinks, made.sinks.clone()
    other: Any = SimpleNamespace(dtype=torch.float32, use_mla=False)
    monkeypatch.setattr(config, "model_config", other)
    held = loader._renewing(HeldWeights([arena]), derived, model, config)
    assert (held.arenas, held.reason) == ([], REASON)
    assert made.sinks is copy
    assert torch.equal(copy, value)


def test_models_whose_attention_is_unknown_are_refused(config: VllmConfig) -> None:
    model = Kernel(Plain())
    _, derived = loaded(model)
    held = loader._renewing(HeldWeights(), derived, model, config)
    assert held.reason == "Kernel makes something of its own of its weights, which an update would not renew"


@pytest.mark.usefixtures("vllm")
def test_models_that_do_something_of_their_own_once_loaded_are_refused() -> None:
    model: Any = Model()
    model.process_weights_after_loading = lambda: None
    assert why_unknown(model).startswith("Model makes something of its own")


def test_quantized_latent_attention_is_refused() -> None:
    model = SimpleNamespace(use_mla=True, quantization="fp8")
    config: Any = SimpleNamespace(model_config=model, additional_config={})
    assert "latent attention" in loader._why_not(torch.device("cpu"), config)
