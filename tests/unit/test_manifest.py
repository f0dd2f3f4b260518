"""The manifest, and what is wrong with a trainer's."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.weights.v1 import weights_pb2 as pb
from weight_transfer.manifest import CASTABLE, ITEMSIZE, Manifest, Mismatch, TensorSpec, mismatches

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\n\t\r"), min_size=1, max_size=12)
SPECS = st.builds(
    TensorSpec,
    NAMES,
    st.sampled_from(sorted(ITEMSIZE)),
    st.lists(st.integers(0, 2**40), max_size=4).map(tuple),
)
MANIFESTS = st.lists(SPECS, max_size=6, unique_by=lambda s: s.name).map(lambda t: Manifest(tuple(t)))

ENGINE = Manifest(
    (
        TensorSpec("a", "bfloat16", (4, 2)),
        TensorSpec("b", "bfloat16", (2,)),
        TensorSpec("c", "int8", (3,)),
        TensorSpec("d", "float32", ()),
    )
)


def problems(*trainer: TensorSpec) -> dict[str, str]:
    """Of a trainer that has ENGINE's tensors, but for `trainer`'s."""
    given = {t.name: t for t in ENGINE} | {t.name: t for t in trainer}
    return {m.name: m.problem for m in mismatches(ENGINE, list(given.values()))}


def test_the_engines_own_tensors_in_any_order_are_right() -> None:
    assert mismatches(ENGINE, ENGINE.tensors) == []
    assert mismatches(ENGINE, ENGINE.tensors[::-1]) == []


@pytest.mark.parametrize("ours", sorted(ITEMSIZE))
@pytest.mark.parametrize("theirs", sorted(ITEMSIZE))
def test_floats_are_cast_and_nothing_else_is(ours: str, theirs: str) -> None:
    found = mismatches(Manifest((TensorSpec("x", ours, (2,)),)), [TensorSpec("x", theirs, (2,))])
    castable = ours == theirs or {ours, theirs} <= {"float64", "float32", "float16", "bfloat16"}
    assert found == ([] if castable else [Mismatch("x", f"dtype {theirs} cannot become the engine's {ours}")])


def test_everything_wrong_is_named_at_once() -> None:
    trainer = [
        TensorSpec("a", "float32", (2, 4)),  # another shape, and a dtype that is cast
        TensorSpec("c", "float32", (4,)),  # both wrong
        TensorSpec("d", "float32", ()),
        TensorSpec("d", "float32", ()),  # twice
        TensorSpec("e", "float32", (1,)),  # unknown
    ]  # and b is missing
    assert sorted((m.name, m.problem) for m in mismatches(ENGINE, trainer)) == [
        ("a", "shape [2, 4] is not the engine's [4, 2]"),
        ("b", "missing; the engine has bfloat16[2]"),
        ("c", "dtype float32 cannot become the engine's int8"),
        ("c", "shape [4] is not the engine's [3]"),
        ("d", "given 2 times"),
        ("e", "unexpected; the engine has no such tensor"),
    ]


def test_shapes_of_equal_size_are_not_equal() -> None:
    assert problems(TensorSpec("a", "bfloat16", (8,))).keys() == {"a"}
    assert problems(TensorSpec("d", "float32", (1,))).keys() == {"d"}


@given(MANIFESTS, st.data())
def test_any_one_change_is_found_under_its_name(engine: Manifest, data: st.DataObject) -> None:
    if not len(engine):
        return
    trainer = list(engine)
    i = data.draw(st.integers(0, len(trainer) - 1))
    name = trainer[i].name
    change = data.draw(st.sampled_from(["drop", "repeat", "shape", "dtype", "rename"]))
    match change:
        case "drop":
            del trainer[i]
        case "repeat":
            trainer.append(trainer[i])
        case "shape":
            trainer[i] = dataclasses.replace(trainer[i], shape=(*trainer[i].shape, 1))
        case "dtype":
            others = (
                set(ITEMSIZE) - {trainer[i].dtype} - (CASTABLE if trainer[i].dtype in CASTABLE else set())
            )
            trainer[i] = dataclasses.replace(trainer[i], dtype=data.draw(st.sampled_from(sorted(others))))
        case "rename":
            trainer[i] = dataclasses.replace(trainer[i], name=name + "'" * 13)
    found = {m.name for m in mismatches(engine, trainer)}
    assert found == ({name, name + "'" * 13} if change == "rename" else {name})


@given(MANIFESTS)
def test_the_digest_is_of_names_dtypes_shapes_and_order(manifest: Manifest) -> None:
    assert Manifest(manifest.tensors).digest == manifest.digest
    assert 0 <= manifest.digest < 2**64
    for i, spec in enumerate(manifest.tensors):
        others = [
            dataclasses.replace(spec, name=spec.name + "x"),
            dataclasses.replace(spec, shape=(*spec.shape, 1)),
            dataclasses.replace(spec, dtype="int8" if spec.dtype != "int8" else "uint8"),
        ]
        for other in others:
            changed = (*manifest.tensors[:i], other, *manifest.tensors[i + 1 :])
            assert Manifest(changed).digest != manifest.digest
    if len(manifest) > 1:
        assert Manifest(manifest.tensors[::-1]).digest != manifest.digest


def test_the_digest_is_the_same_everywhere() -> None:
    """Other languages compute it too: b2sum -l 64, read little-endian."""
    assert ENGINE.digest == 0xA93716F1FE1F7B5


def test_sizes() -> None:
    assert (ENGINE.tensors[0].numel, ENGINE.tensors[0].nbytes) == (8, 16)
    assert (ENGINE.tensors[3].numel, ENGINE.tensors[3].nbytes) == (1, 4)
    assert ENGINE.nbytes == 16 + 4 + 3 + 4
    assert ENGINE.positions == {"a": 0, "b": 1, "c": 2, "d": 3}
    assert TensorSpec("z", "float32", (2**40, 0)).nbytes == 0


def test_every_dtype_of_the_contract_has_a_size_as_torch_has_it() -> None:
    torch = pytest.importorskip("torch")
    names = {name.removeprefix("DTYPE_").lower() for name in pb.Dtype.keys()} - {"unspecified"}  # noqa: SIM118
    assert names == set(ITEMSIZE)
    assert {name: getattr(torch, name).itemsize for name in names} == ITEMSIZE
