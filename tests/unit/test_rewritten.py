"""Modules that vLLM rewrites once they are loaded are found, and loaded anew by vLLM's own layerwise reload."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
import torch
from torch import nn

from weight_transfer.arena import Arena
from weight_transfer.manifest import Manifest, TensorSpec
from weight_transfer.placement import packed

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what vLLM imports
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader
    from vllm.model_executor.utils import replace_parameter

    from inference_service import loader
    from inference_service.loader import HeldWeights
    from inference_service.rewritten import Loaded, Rewritten
    from inference_service.worker import TandemWorker

Tensors = dict[str, torch.Tensor]
SHAPES = {"first.weight": (4, 6), "second.weight": (6, 4), "head.weight": (4, 6)}


class Method(QuantizeMethodBase):
    """Leaves the weights as they are."""

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError

    def process_weights_after_loading(self, layer: Any) -> None:
        """See the class."""


class Packing(Method):
    """Makes another parameter of another shape of them."""

    def process_weights_after_loading(self, layer: Any) -> None:
        replace_parameter(layer, "weight", 2 * layer.weight.t().contiguous())


class Scaling(Method):
    """Scales them where they lie."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.weight.data.mul_(3)


class Turning(Method):
    """Reads the same bytes in another shape."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.weight.data = layer.weight.data.view(-1)


class Adding(Method):
    """Puts a scale beside them."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.scale = nn.Parameter(layer.weight.abs().max()[None], requires_grad=False)


@dataclass
class Reads:
    """As a kernel of experts is told where their scales are."""

    scale: torch.Tensor


class Reading(Adding):
    """As `Adding`, with a kernel that reads the scale."""

    moe_kernel: Any = None

    def process_weights_after_loading(self, layer: Any) -> None:
        super().process_weights_after_loading(layer)
        self.moe_kernel, self.moe_quant_config = object(), Reads(layer.scale)


class Moody(Method):
    """Makes something else of them each time."""

    count = 0

    def process_weights_after_loading(self, layer: Any) -> None:
        self.count += 1
        replace_parameter(layer, "weight", layer.weight + self.count)


class Layer(nn.Module):
    def __init__(self, shape: tuple[int, ...], method: Method) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape), requires_grad=False)
        self.quant_method = method


class Model(nn.Module):
    """Two layers of a method, and one that nothing is done to."""

    def __init__(self, method: type[Method]) -> None:
        super().__init__()
        self.first = Layer(SHAPES["first.weight"], method())
        self.second = Layer(SHAPES["second.weight"], method())
        self.head = Layer(SHAPES["head.weight"], Method())
        record_metadata_for_reloading(self)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        parameters: dict[str, Any] = dict(self.named_parameters())
        for name, tensor in weights:
            getattr(parameters[name], "weight_loader", default_weight_loader)(parameters[name], tensor)

    def process(self) -> None:
        for layer in self.children():
            assert isinstance(layer, Layer)
            layer.quant_method.process_weights_after_loading(layer)

    def values(self) -> Tensors:
        return {name: p.detach().clone() for name, p in self.named_parameters()}


def checkpoint(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def expected(method: type[Method], tensors: Tensors) -> Tensors:
    """What a model computes with that never had other weights."""
    model = Model(method)
    model.load_weights(tensors.items())
    model.process()
    return model.values()


def same(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def load(method: type[Method]) -> tuple[Model, Arena, Rewritten]:
    model = Model(method)
    arena = loader._rebind(model, torch.device("cpu"))
    loaded = Loaded(model)
    model.load_weights(checkpoint().items())
    loaded.mark()
    model.process()
    return model, arena, loaded.rewritten(model)


@pytest.fixture(scope="module")
def config() -> VllmConfig:
    made = VllmConfig()
    made.model_config = SimpleNamespace(dtype=torch.float32)  # type: ignore[assignment]
    return made


@pytest.mark.parametrize("method", [Packing, Scaling, Turning, Adding])
def test_what_is_rewritten_is_found_and_nothing_else(method: type[Method]) -> None:
    model, arena, rewritten = load(method)
    assert rewritten.modules == [model.first, model.second]
    sizes = sorted((end - start, dtype) for start, end, dtype in rewritten.spans)
    assert sizes == [(96, torch.float32)] * 2
    assert all(
        arena.address <= start < end <= arena.address + arena.size for start, end, _ in rewritten.spans
    )


def test_a_model_that_stays_as_it_was_loaded_has_none() -> None:
    _, _, rewritten = load(Method)
    assert (rewritten.modules, rewritten.spans) == ([], set())


def test_a_layer_that_is_tied_to_another_after_loading_is_not_rewritten() -> None:
    model = Model(Method)
    arena = loader._rebind(model, torch.device("cpu"))
    loaded = Loaded(model)
    model.load_weights(checkpoint().items())
    loaded.mark()
    model.head.weight = model.first.weight
    assert loaded.rewritten(model).modules == []
    assert arena.size > 0


@pytest.mark.parametrize("method", [Packing, Scaling, Turning, Adding])
def test_loading_anew_makes_the_same_of_other_weights_where_the_first_were(
    config: VllmConfig, method: type[Method]
) -> None:
    model, _, rewritten = load(method)
    homes = {name: p.data_ptr() for name, p in model.named_parameters()}
    head = model.head.weight.clone()
    for seed in (1, 2):
        tensors = checkpoint(seed)
        with torch.no_grad(), rewritten.loading(config):
            model.load_weights((n, t) for n, t in tensors.items() if not n.startswith("head"))
        same(model.values(), expected(method, tensors | {"head.weight": head}))
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == homes


def test_a_kernel_goes_on_reading_where_graphs_read(config: VllmConfig) -> None:
    model, _, rewritten = load(Reading)
    method: Any = model.first.quant_method
    kernel, scale = method.moe_kernel, model.first.scale
    with torch.no_grad(), rewritten.loading(config):
        model.load_weights(checkpoint(1).items())
    assert method.moe_kernel is kernel
    assert method.moe_quant_config.scale is model.first.scale is scale
    assert torch.equal(scale, checkpoint(1)["first.weight"].abs().max()[None])


def test_a_scale_that_the_checkpoint_lacks_still_says_so() -> None:
    model = Model(Method)
    model.first.scale = nn.Parameter(torch.tensor(-1.0), requires_grad=False)
    arena = loader._rebind(model, torch.device("cpu"))
    assert model.first.scale.item() == -1
    assert arena.address <= model.first.scale.data_ptr() < arena.address + arena.size


def test_what_breaks_off_leaves_whole_layers_and_is_healed(config: VllmConfig) -> None:
    model, _, rewritten = load(Packing)
    homes = {name: p.data_ptr() for name, p in model.named_parameters()}
    old, new = expected(Packing, checkpoint()), expected(Packing, checkpoint(1))

    def half() -> Iterable[tuple[str, torch.Tensor]]:
        yield "first.weight", checkpoint(1)["first.weight"]
        raise OSError("it broke off")

    with pytest.raises(OSError, match="it broke off"), torch.no_grad(), rewritten.loading(config):
        model.load_weights(half())
    same(model.values(), old | {"first.weight": new["first.weight"]})
    with torch.no_grad(), rewritten.loading(config):
        model.load_weights(checkpoint(1).items())
    same(model.values(), new)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == homes


def test_a_layer_that_cannot_be_processed_keeps_what_it_had(config: VllmConfig) -> None:
    model, _, rewritten = load(Packing)
    good, model.second.quant_method = model.second.quant_method, Failing()
    with pytest.raises(ArithmeticError), torch.no_grad(), rewritten.loading(config):
        model.load_weights(checkpoint(1).items())
    old = expected(Packing, checkpoint())
    assert torch.equal(model.second.weight, old["second.weight"])
    model.second.quant_method = good
    with torch.no_grad(), rewritten.loading(config):
        model.load_weights(checkpoint(2).items())
    same(model.values(), expected(Packing, checkpoint(2)))


class Failing(Method):
    """Cannot."""

    def process_weights_after_loading(self, layer: Any) -> None:
        raise ArithmeticError


def held_of(arena: Arena, rewritten: Rewritten) -> HeldWeights:
    """As the loader makes it, with the checkpoint in an arena of its own."""
    specs = [TensorSpec(name, "float32", shape) for name, shape in SHAPES.items()]

    placements = packed(Manifest(tuple(specs)))
    for placement, tensor in zip(placements, checkpoint().values(), strict=True):
        placement.view([arena]).copy_(tensor)
    return HeldWeights([arena], placements, ["first.weight", "second.weight"], rewritten)


def reloading(model: nn.Module, rewritten: Rewritten, config: VllmConfig) -> HeldWeights:
    with structlog.testing.capture_logs():
        return loader._reloading(held_of(Arena.create("test", 4096), rewritten), model, config)


def test_only_what_comes_out_the_same_again_is_offered(config: VllmConfig) -> None:
    model, _, rewritten = load(Packing)
    held = reloading(model, rewritten, config)
    assert (held.reason, held.reloaded) == ("", ["first.weight", "second.weight"])
    same(model.values(), expected(Packing, checkpoint()))


@pytest.mark.parametrize("bad", [Moody, Failing])
def test_what_does_not_is_served_as_it_was_and_not_offered(config: VllmConfig, bad: type[Method]) -> None:
    model, _, rewritten = load(Packing)
    model.second.quant_method = bad()
    refused = reloading(model, rewritten, config)
    assert refused.reason.endswith("once they are loaded, and does not make the same again")
    assert (refused.arenas, refused.placements) == ([], [])
    same(model.values(), expected(Packing, checkpoint()))


@pytest.mark.parametrize("method", [Packing, Scaling])
def test_what_fails_at_the_end_leaves_no_layer_without_weights(
    config: VllmConfig, method: type[Method]
) -> None:
    """vLLM processes a layer of which not every element was loaded last of all."""
    model, _, rewritten = load(method)
    for layer in (model.first, model.second):
        layer.weight.weight_loader_numel = 100
        get_layerwise_info(layer).restore_metadata[0]["weight"].weight_loader_numel = 100
    model.first.quant_method = Failing()
    with pytest.raises(ArithmeticError), torch.no_grad(), rewritten.loading(config):
        model.load_weights(checkpoint(1).items())
    same(model.values(), expected(method, checkpoint()) | {"head.weight": checkpoint(1)["head.weight"]})
    model.first.quant_method = method()
    with torch.no_grad(), rewritten.loading(config):
        model.load_weights(checkpoint(2).items())
    same(model.values(), expected(method, checkpoint(2)))


def test_nothing_is_offered_where_adapters_stand_around_the_modules(config: VllmConfig) -> None:
    model, _, rewritten = load(Packing)
    beside: Any = SimpleNamespace(lora_config=object(), model_config=config.model_config)
    assert reloading(model, rewritten, beside).reason.endswith("does not load them anew where adapters are")


class Sleeper(TandemWorker):
    """A worker's part that sleeps: what vLLM made of the weights is away meanwhile."""

    def __init__(self, model: nn.Module, config: VllmConfig) -> None:
        self.model, self.vllm_config = model, config
        self.away: list[torch.Tensor] = []

    def get_model(self) -> nn.Module:
        return self.model

    def sleep(self, level: int) -> None:
        assert level == 1
        for tensor in self.model.tandem.rewritten.tensors():
            self.away.append(tensor.clone())
            tensor.fill_(float("nan"))

    def wake_up(self) -> None:
        for tensor, value in zip(self.model.tandem.rewritten.tensors(), self.away, strict=True):
            tensor.copy_(value)
        self.away = []


def test_what_is_written_while_the_worker_sleeps_is_made_anew_as_it_wakes(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any
    model, _, rewritten = load(Packing)
    model.tandem = held = reloading(model, rewritten, config)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5, 9))
    worker = Sleeper(model, config)
    assert worker.tandem_sleep() == 0
    for placement, tensor in zip(held.placements, checkpoint(1).values(), strict=True):
        placement.view(held.arenas).copy_(tensor)
    worker.tandem_reload()
    assert all(tensor.isnan().all() for tensor in rewritten.tensors()), "nothing is written that is away"
    good, model.second.quant_method = model.second.quant_method, Failing()
    with pytest.raises(ArithmeticError):
        worker.tandem_wake_up()
    model.second.quant_method = good
    worker.tandem_wake_up()  # it woke before, and is still owed
    same(model.values(), expected(Packing, checkpoint(1)) | {"head.weight": model.head.weight})
    worker.tandem_wake_up()
    same(model.values(), expected(Packing, checkpoint(1)) | {"head.weight": model.head.weight})
