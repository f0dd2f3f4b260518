"""What a loader did with a checkpoint, told from watching it. Each loader here does what some model does.

Either a tensor is placed, and then an update that writes there does what loading did, or vLLM loads it again.
What must never happen is a place that is wrong.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import nn

from inference_service.placer import Placer
from inference_service.recorder import Recorder
from weight_transfer.arena import Arena, align
from weight_transfer.placement import Placement
from weight_transfer.scatter import scatter

Loader = Callable[["Model", Iterable[tuple[str, torch.Tensor]]], None]


class Model(nn.Module):
    """A fused layer, a padded embedding, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.zeros(8, 4, dtype=torch.bfloat16))
        self.embed = nn.Parameter(torch.zeros(10, 4, dtype=torch.bfloat16))
        self.register_buffer("scale", torch.zeros(3))


def checkpoint() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"q": (4, 4), "k": (2, 4), "v": (2, 4), "embed": (7, 4), "scale": (3,), "unused": (5,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


ROWS = {"q": (0, 4), "k": (4, 2), "v": (6, 2)}


def into(model: Model, name: str) -> torch.Tensor | None:
    """Where a tensor of a plain checkpoint goes, as a narrowed parameter."""
    if name in ROWS:
        return model.qkv.data.narrow(0, *ROWS[name])
    return {"embed": model.embed.data[:7], "scale": model.scale}.get(name)


def in_arena() -> tuple[Model, Arena]:
    model, arena = Model(), Arena.create("test", 512)
    offset = 0
    for parameter in model.parameters():
        parameter.data = arena.tensor(offset, parameter.shape, parameter.dtype)
        offset += align(parameter.nbytes)
    return model, arena


def run(load: Loader) -> tuple[Model, Placer, dict[str, Placement | None]]:
    """Load, and place each tensor that is used."""
    model, arena = in_arena()
    recorder = Recorder()
    with recorder, torch.no_grad():
        load(model, recorder.watch(checkpoint().items()))
    placer = Placer(arena, model, recorder, whole=True)
    return model, placer, {n: placer.place(n, t) for n, t in checkpoint().items() if placer.used(n)}


def plain(model: Model, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    for name, tensor in weights:
        if (place := into(model, name)) is not None:
            place.copy_(tensor)


def test_fused_padded_and_cast() -> None:
    model, placer, found = run(plain)
    assert {name for name, placement in found.items() if placement} == {"q", "k", "v", "embed"}
    arena = placer.arena
    for name, (row, count) in ROWS.items():
        placement = found[name]
        assert placement is not None
        (block,) = placement.blocks
        assert arena.address + block.arena_offset == model.qkv[row].data_ptr()
        assert (block.shape, placement.spec.dtype) == ((count, 4), "bfloat16")
        assert placement.alias_reason("bfloat16") == ""
    assert found["embed"] is not None
    assert found["embed"].spec.shape == (7, 4), "the padding is nobody's"
    assert not placer.conflict
    new = torch.randn(4, 4)
    scatter(found["q"].pairs([arena], new))  # type: ignore[union-attr]
    assert torch.equal(model.qkv[:4], new.bfloat16())


def test_what_is_used_and_what_is_not() -> None:
    _, _, found = run(plain)
    assert "unused" not in found
    assert found["scale"] is None, "a buffer is no parameter: vLLM loads it again"


def transposed(model: Model, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    for name, tensor in weights:
        if name == "q":
            model.qkv.data[:4].copy_(tensor.t())


def test_a_transposed_copy_is_a_place() -> None:
    model, placer, found = run(transposed)
    q = found["q"]
    assert q is not None
    assert q.alias_reason("bfloat16") == "the engine holds it in another memory order"
    new = torch.randn(4, 4)
    scatter(q.pairs([placer.arena], new))
    assert torch.equal(model.qkv[:4], new.t().bfloat16())
    assert torch.equal(q.gather([placer.arena]), new.bfloat16())


def in_halves(model: Model, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    for name, tensor in weights:
        if name == "q":
            model.qkv.data[:2].copy_(tensor[2:])
            model.qkv.data[2:4].copy_(tensor[:2])


def test_a_permutation_by_copies_is_a_place() -> None:
    _, placer, found = run(in_halves)
    q = found["q"]
    assert q is not None
    assert len(q.blocks) == 2
    assert torch.equal(q.gather([placer.arena]), checkpoint()["q"].bfloat16())


def one_by_one(model: Model, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Indexing assignment, which is a copy too."""
    for name, tensor in weights:
        if name == "q":
            for i in range(4):
                model.qkv.data[i] = tensor[i]


def test_assignments_are_copies() -> None:
    q = run(one_by_one)[2]["q"]
    assert q is not None
    assert len(q.blocks) == 1, "the rows lie there as they did in the tensor"
    assert q.alias_reason("bfloat16") == ""


def repeated(model: Model, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    for name, tensor in weights:
        if name == "q":
            model.qkv.data[:4].copy_(tensor)
            model.qkv.data[:4].copy_(tensor)


def test_the_same_copy_twice_is_one() -> None:
    q = run(repeated)[2]["q"]
    assert q is not None
    assert len(q.blocks) == 1


# Loaders that don't just copy.


def reshaped(model: Model, q: torch.Tensor) -> None:
    """bloom, gpt_neox: a reshape that must copy."""
    model.qkv.data[:4].copy_(q.view(2, 2, 4).transpose(0, 1).reshape(4, 4))


def scaled(model: Model, q: torch.Tensor) -> None:
    model.qkv.data[:4].copy_(q * 2)


def scaled_in_place(model: Model, q: torch.Tensor) -> None:
    """The result is the tensor's own memory, as a view's is."""
    model.qkv.data[:4].copy_(q.mul_(2))


def changed_afterwards(model: Model, q: torch.Tensor) -> None:
    model.qkv.data[:4].copy_(q)
    model.qkv.data[:4].neg_()


def changed_in_the_checkpoint(model: Model, q: torch.Tensor) -> None:
    q[0] = 5.0
    model.qkv.data[:4].copy_(q)


def by_way_of_another(model: Model, q: torch.Tensor) -> None:
    between = torch.empty(4, 4)
    between.copy_(q)
    model.qkv.data[:4].copy_(between)


def concatenated(model: Model, q: torch.Tensor) -> None:
    model.qkv.data.copy_(torch.cat([q, q]))


def broadcast(model: Model, q: torch.Tensor) -> None:
    model.qkv.data.view(2, 4, 4).copy_(q)


def in_two_places(model: Model, q: torch.Tensor) -> None:
    model.qkv.data[:4].copy_(q)
    model.qkv.data[4:].copy_(q)


def in_part(model: Model, q: torch.Tensor) -> None:
    model.qkv.data[:3].copy_(q[:3])


def by_foreach(model: Model, q: torch.Tensor) -> None:
    torch._foreach_copy_([model.qkv.data[:4]], [q])


def by_index(model: Model, q: torch.Tensor) -> None:
    model.qkv.data.index_copy_(0, torch.arange(4), q.bfloat16())


def read_too(model: Model, q: torch.Tensor) -> None:
    """Copied plainly, but what was read of it may matter elsewhere."""
    model.qkv.data[:4].copy_(q)
    model.scale.fill_(q.max().item())


OTHERWISE = (
    reshaped,
    scaled,
    scaled_in_place,
    changed_afterwards,
    changed_in_the_checkpoint,
    by_way_of_another,
    concatenated,
    broadcast,
    in_two_places,
    in_part,
    by_foreach,
    by_index,
    read_too,
)


@pytest.mark.parametrize("load_q", OTHERWISE, ids=lambda f: f.__name__)
def test_what_is_more_than_a_copy_is_loaded_again(load_q: Callable[[Model, torch.Tensor], None]) -> None:
    def load(model: Model, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            if name == "q":
                load_q(model, tensor)
            elif name == "embed":
                model.embed.data[:7].copy_(tensor)

    _, placer, found = run(load)
    assert found["q"] is None
    assert found["embed"] is not None, "its neighbours are placed"
    assert not placer.conflict


def later(model: Model, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Keeps tensors until all parts of a layer are there."""
    kept = {name: tensor for name, tensor in weights if name in ROWS}
    model.qkv.data.copy_(torch.cat([kept["q"], kept["k"], kept["v"]]))


def test_what_is_used_only_once_others_came_is_not_forgotten() -> None:
    _, _, found = run(later)
    assert {name: found[name] for name in ROWS} == dict.fromkeys(ROWS)


def later_plainly(model: Model, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    for name, tensor in dict(weights).items():
        if (place := into(model, name)) is not None:
            place.copy_(tensor)


def test_what_is_copied_only_later_is_placed() -> None:
    assert all(run(later_plainly)[2][name] for name in ROWS)


def reusing_memory(model: Model, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """A checkpoint's tensor is gone, and something else is where it was."""
    for name, tensor in weights:
        if name in ROWS:
            into(model, name).copy_(tensor)  # type: ignore[union-attr]
        elif name == "unused":
            address = tensor.data_ptr()
            tensor.set_(torch.empty(0))  # type: ignore[call-overload]
            del tensor
            gc.collect()
            reused = [torch.full((5,), 3.0) for _ in range(64)]
            for other in reused:
                if other.data_ptr() == address:
                    model.embed.data.view(-1)[:5].copy_(other)


def test_memory_that_is_used_again_gives_no_wrong_place() -> None:
    _, _, found = run(reusing_memory)
    assert found.get("unused") is None
    assert all(found[name] for name in ROWS)


def test_two_tensors_in_one_place_make_updates_impossible() -> None:
    same = torch.randn(2, 4)
    model, arena = in_arena()
    recorder = Recorder()
    with recorder, torch.no_grad():
        for _, tensor in recorder.watch([("k", same.clone()), ("v", same.clone())]):
            model.qkv.data[:2].copy_(tensor)
    placer = Placer(arena, model, recorder, whole=True)
    assert placer.place("k", same)
    assert not placer.conflict
    placer.place("v", same)
    assert placer.conflict == "k and v were loaded into the same memory"


def test_a_layer_that_was_tied_after_all_is_out_of_use() -> None:
    model, arena = in_arena()
    recorder = Recorder()
    with recorder, torch.no_grad():
        for name, tensor in recorder.watch(checkpoint().items()):
            if (place := into(model, name)) is not None:
                place.copy_(tensor)
    del model.qkv  # as vLLM does with an output layer that equals the embedding
    placer = Placer(arena, model, recorder, whole=True)
    assert not placer.used("q")
    assert placer.used("embed")


def test_a_ranks_part_is_placed_where_the_rest_is_elsewhere() -> None:
    model, arena = in_arena()
    recorder = Recorder()
    with recorder, torch.no_grad():
        for name, tensor in recorder.watch(checkpoint().items()):
            if name == "q":
                model.qkv.data[:2].copy_(tensor[2:])
    q = Placer(arena, model, recorder, whole=False).place("q", checkpoint()["q"])
    assert q is not None
    assert [(b.tensor_offset, b.shape) for b in q.blocks] == [(8, (2, 4))]
    assert Placer(arena, model, recorder, whole=True).place("q", checkpoint()["q"]) is None


def test_a_parameter_that_attention_cut_of_another_hides_no_place() -> None:
    """Its heads' columns begin in the middle of that, and end before its end."""
    model, arena = in_arena()
    recorder = Recorder()
    with recorder, torch.no_grad():
        plain(model, recorder.watch(checkpoint().items()))
    cut = nn.Parameter(model.qkv.data.unflatten(0, (2, 4))[:, 1:3], requires_grad=False)
    model.register_parameter("cut", cut)
    assert Placer(arena, model, recorder, whole=True).place("v", checkpoint()["v"]) is None
    placer = Placer(arena, model, recorder, whole=True, derived=[cut])
    assert all(placer.place(name, checkpoint()[name]) for name in ROWS)


def test_a_nan_does_not_hide_a_place() -> None:
    values = checkpoint() | {"q": torch.full((4, 4), torch.nan)}

    model, arena = in_arena()
    recorder = Recorder()
    with recorder, torch.no_grad():
        plain(model, recorder.watch(values.items()))
    assert Placer(arena, model, recorder, whole=True).place("q", values["q"])


def test_watching_passes_on_what_it_watches() -> None:
    tensors = list(checkpoint().items())

    def source() -> Iterator[tuple[str, torch.Tensor]]:
        yield from tensors

    assert [(n, t.data_ptr()) for n, t in Recorder().watch(source())] == [
        (n, t.data_ptr()) for n, t in tensors
    ]
