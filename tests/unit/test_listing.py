"""The policy's tensors are listed anew where anything about them may have changed, and only there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from trainer_service.listing import Listing


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4))


NAMES = [name for name, _ in network().named_parameters()]


def replace(model: nn.Sequential) -> None:
    model[1].weight = nn.Parameter(torch.zeros(4, 4))


def swap(model: nn.Sequential) -> None:
    model[1].weight, model[2].weight = model[2].weight, model[1].weight


def cast(model: nn.Sequential) -> None:
    model[1].to(torch.bfloat16)


def move(model: nn.Sequential) -> None:
    model[1].weight.data = model[1].weight.data.clone()


def grow(model: nn.Sequential) -> None:
    model.append(nn.Linear(4, 2))


def tie(model: nn.Sequential) -> None:
    model[2].weight = model[1].weight


def replace_a_module(model: nn.Sequential) -> None:
    model[0] = nn.Linear(3, 4)


CHANGES = [replace, swap, cast, move, grow, tie, replace_a_module]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_seen(change: Callable[[nn.Sequential], None]) -> None:
    model, listing = network(), Listing()
    before = listing.policy(model, NAMES)
    held = list(model.parameters())
    assert listing.policy(model, NAMES) is before
    assert listing.same(model)
    change(model)
    after = listing.policy(model, NAMES)
    assert after is not before
    assert [(s.name, s.spec.dtype) for s in after] == [
        (name, str(p.dtype).removeprefix("torch."))
        for name, p in model.named_parameters(remove_duplicate=False)
    ]
    for source in after:
        assert torch.equal(source.read(), model.get_parameter(source.name))
    assert held


@pytest.mark.parametrize("change", [replace, swap, grow, tie, replace_a_module], ids=lambda c: c.__name__)
def test_other_parameters_are_not_the_same(change: Callable[[nn.Sequential], None]) -> None:
    model, listing = network(), Listing()
    listing.policy(model, NAMES)
    held = list(model.parameters())
    change(model)
    assert not listing.same(model)
    assert held


def test_values_are_read_as_they_are() -> None:
    model, listing = network(), Listing()
    listing.policy(model, NAMES)
    with torch.no_grad():
        model[0].weight.fill_(7)
    assert listing.policy(model, NAMES)[0].read().eq(7).all()


def test_other_names_are_another_list() -> None:
    model, listing = network(), Listing()
    model[2].weight = model[1].weight
    assert [s.name for s in listing.policy(model, [])] == [name for name in NAMES if name != "2.weight"]
    assert [s.name for s in listing.policy(model, NAMES)] == NAMES


def test_buffers_and_adapters_are_listed_each_time() -> None:
    peft = pytest.importorskip("peft")
    model, listing = network(), Listing()
    model.register_buffer("extra", torch.zeros(2))
    first = listing.policy(model, [*NAMES, "extra"])
    model.register_buffer("extra", torch.ones(2))
    assert listing.policy(model, [*NAMES, "extra"]) is not first
    adapted = peft.get_peft_model(network(), peft.LoraConfig(target_modules=["1"], r=2))
    listing.policy(adapted, NAMES)
    assert not listing.same(adapted)
