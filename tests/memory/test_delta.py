"""Delta: arithmetic, parts, identity, and the ways to disk and back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kvedit as kv
from kvedit.errors import (
    CorruptMemory,
    IncompatibleModel,
    InvalidArgument,
    ShapeMismatch,
    UnknownName,
)
from kvedit.memory import Delta, Fingerprint, HeadSet, Lineage
from kvedit.memory.operand import operand_kind

HIDDEN = 21  # no multiple of the 2 heads of 8 dims that a slot of the operand has room for
FACTS = {"estimator": {"name": "mean"}, "read": "last", "pairs": 3}


def build(spec, seed=0, sites=("keys", "values", "residual", "attention"), facts=FACTS):
    draw = torch.Generator().manual_seed(seed)
    shapes = {"keys": (2, 8), "values": (2, 6), "residual": (HIDDEN,), "attention": (HIDDEN,)}
    layers = {"keys": (0, 1, 2), "values": (0, 2), "residual": (1, 2), "attention": (2,)}
    vectors = {
        site: {i: torch.randn(shapes[site], generator=draw) for i in layers[site]} for site in sites
    }
    return Delta(vectors, spec, facts)


@pytest.fixture
def spec(make):
    return make.spec()


def equal(one, other):
    assert one.sites == other.sites
    for site in one.sites:
        assert list(one.vectors[site]) == list(other.vectors[site])
        for layer, vector in one.vectors[site].items():
            torch.testing.assert_close(vector, other.vectors[site][layer], atol=0, rtol=0)


def snapshot(delta):
    return {(s, i): v.clone() for s, each in delta.vectors.items() for i, v in each.items()}


# -- arithmetic --------------------------------------------------------------------------------


def test_arithmetic_is_that_of_the_vectors(spec):
    a, b = build(spec), build(spec, 1)
    for site, layers in a.vectors.items():
        for layer, x in layers.items():
            y = b.vectors[site][layer]
            for delta, expected in (
                (a + b, x + y), (a - b, x - y), (2.5 * a, x * 2.5), (a * 2, x * 2),
                (a / 4, x / 4), (-a, -x),
            ):  # fmt: skip
                torch.testing.assert_close(delta.vectors[site][layer], expected)


def test_a_vector_that_one_lacks_counts_as_zero(spec):
    a, b = build(spec, sites=("keys", "residual")), build(spec, 1, sites=("values", "keys"))
    both, apart = a + b, a - b
    assert both.sites == ("keys", "values", "residual")
    torch.testing.assert_close(both.vectors["residual"][1], a.vectors["residual"][1])
    torch.testing.assert_close(apart.vectors["values"][0], -b.vectors["values"][0])


def test_normalized_and_projected_out(spec):
    a, b = build(spec), build(spec, 1)
    for each in a.normalized(3.0).norms().values():
        assert all(size == pytest.approx(3.0, rel=1e-6) for size in each.values())
    rest = a.project_out(b)
    for site, layers in rest.vectors.items():
        for layer, x in layers.items():
            assert float((x * b.vectors[site][layer]).sum()) == pytest.approx(0, abs=1e-5)
    # What is left and what was taken make the whole, by Pythagoras.
    taken = (a - rest).norms()["keys"][1] ** 2 + rest.norms()["keys"][1] ** 2
    assert taken == pytest.approx(a.norms()["keys"][1] ** 2, rel=1e-5)
    zero = a.only(layers=[0]).map(lambda site, layer, x: x * 0, "zero")
    equal(zero.normalized(), zero)
    equal(a.only(layers=[0]).project_out(zero), a.only(layers=[0]))


def test_at_norms_of(spec):
    a, b = build(spec), build(spec, 1, sites=("values", "residual"))
    found = a.at_norms_of(b)
    assert found.sites == b.sites
    for site, layers in found.norms().items():
        for layer, size in layers.items():
            assert size == pytest.approx(b.norms()[site][layer], rel=1e-6)
            cosine = torch.cosine_similarity(
                found.vectors[site][layer].flatten(), a.vectors[site][layer].flatten(), dim=0
            )
            assert float(cosine) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -float("inf")])
def test_factors_that_are_no_numbers_are_refused(spec, factor):
    with pytest.raises(InvalidArgument, match="finite number"):
        build(spec) * factor


def test_other_operands_are_refused(spec):
    a = build(spec)
    with pytest.raises(InvalidArgument, match="finite number"):
        a / 0
    for wrong in (lambda: a + 1, lambda: a - "x", lambda: a * "x", lambda: a * True, lambda: a * a):
        with pytest.raises(TypeError, match=r"unsupported operand|can't multiply"):
            wrong()
    for norm in (0, -1.0, float("nan")):
        with pytest.raises(InvalidArgument, match="norm"):
            a.normalized(norm)


# -- parts -------------------------------------------------------------------------------------


def test_parts_by_site_layer_and_head(spec):
    a = build(spec)
    assert a.only(sites="keys").sites == ("keys",)
    assert a.only(layers=[-1, 0]).layers == (0, 2)
    part = a.only(heads=HeadSet.of([(0, 1), (2, 0)], "kv"))
    assert list(part.vectors["keys"]) == [0, 2]  # layer 1 has none of the heads
    assert list(part.vectors["residual"]) == [1, 2]  # the stream has no heads
    assert not part.vectors["keys"][0][0].any() and part.vectors["keys"][0][1].any()
    torch.testing.assert_close(part.vectors["values"][2][0], a.vectors["values"][2][0])
    both = a.only(heads=HeadSet.of([(0, 0), (0, 1)], "kv"), sites="keys")
    torch.testing.assert_close(both.vectors["keys"][0], a.vectors["keys"][0])


def test_parts_that_are_not_there_are_refused(spec):
    a = build(spec)
    with pytest.raises(UnknownName, match=r"site of a delta 'kyes'.*keys"):
        a.only(sites="kyes")
    with pytest.raises(UnknownName, match="unknown layer '3'"):
        a.only(layers=[3])
    with pytest.raises(InvalidArgument, match="a vector at least"):
        a.only(sites="attention", layers=[0])
    with pytest.raises(InvalidArgument, match="query heads"):
        a.only(heads=HeadSet.of([(0, 1)]))
    with pytest.raises(InvalidArgument, match="2 kv heads, found head 5"):
        a.only(heads=HeadSet.of([(0, 5)], "kv"))


# -- what is let in ----------------------------------------------------------------------------


def test_vectors_that_do_not_fit_are_refused(spec):
    with pytest.raises(InvalidArgument, match="a vector at least"):
        Delta({}, spec)
    with pytest.raises(UnknownName, match="site"):
        Delta({"queries": {0: torch.ones(2, 8)}}, spec)
    with pytest.raises(UnknownName, match="layer '3'"):
        Delta({"keys": {3: torch.ones(2, 8)}}, spec)
    with pytest.raises(ShapeMismatch, match=r"values of layer 0: expected shape \[2, 6\]"):
        Delta({"values": {0: torch.ones(2, 8)}}, spec)
    with pytest.raises(ShapeMismatch, match="attention of layer 1"):
        Delta({"residual": {0: torch.ones(7)}, "attention": {1: torch.ones(8)}}, spec)
    with pytest.raises(ShapeMismatch, match="residual of layer 0"):
        Delta({"residual": {0: torch.ones(2, 7)}}, spec)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(InvalidArgument, match="NaN or infinity"):
            Delta({"residual": {0: torch.tensor([1.0, bad])}}, spec)
    with pytest.raises(InvalidArgument, match="plain data"):
        Delta({"residual": {0: torch.ones(3)}}, spec, {"estimator": object()})


def test_vectors_become_float32_and_sorted(spec):
    half = torch.ones(2, 8, dtype=torch.bfloat16)
    delta = Delta({"values": {2: torch.ones(2, 6), 0: torch.ones(2, 6)}, "keys": {0: half}}, spec)
    assert delta.sites == ("keys", "values")
    assert list(delta.vectors["values"]) == [0, 2]
    assert delta.vectors["keys"][0].dtype == torch.float32
    with pytest.raises(TypeError):
        delta.vectors["keys"][0] = half


# -- identity, purity --------------------------------------------------------------------------


def test_equal_contents_are_equal_and_others_are_not(spec):
    a = build(spec)
    assert a.digest == build(spec).digest
    assert (a + build(spec, 1)).digest == (build(spec) + build(spec, 1)).digest
    others = [build(spec, 1), build(spec, facts={"read": "mean"}), a * 2, a.only(layers=[0])]
    assert len({a.digest, *(other.digest for other in others)}) == 5
    moved = replace(spec, name="other name")
    assert build(moved).digest == a.digest  # a name is for people
    assert (a * 1.0).digest == a.digest  # how it was made is lineage


def test_nothing_changes_its_inputs(spec):
    a, b = build(spec), build(spec, 1)
    before, digest = snapshot(a), a.digest
    a + b, a - b, a * 3, a / 2, -a
    a.normalized(), a.project_out(b), a.at_norms_of(b), a.operand()
    a.only(heads=HeadSet.of([(0, 0)], "kv"))
    for key, vector in snapshot(a).items():
        assert torch.equal(vector, before[key])
    assert Delta(a.vectors, spec, FACTS).digest == digest


def test_a_delta_keeps_nothing_of_the_tensors_it_was_given(spec):
    given = torch.ones(2, 8)
    delta = Delta({"keys": {0: given}}, spec)
    given += 1
    assert float(delta.vectors["keys"][0].sum()) == 16


def test_lineage_tells_the_steps(spec):
    a, b = build(spec), build(spec, 1)
    made = (2 * (a + b)).only(layers=[0])
    assert [node.name for node in made.lineage.nodes] == ["add", "scale", "only"]
    first, second, third = made.lineage.nodes
    assert first.inputs == (a.digest, b.digest)
    assert second.inputs == (first.id,) and '"factor":2.0' in second.parameters
    assert third.inputs == (second.id,)


def test_deltas_of_two_models_do_not_mix(spec):
    a = build(spec)
    b = build(replace(spec, name="second", fingerprint=Fingerprint("c", "v" * 20, "t")))
    for wrong in (
        lambda: a + b, lambda: a - b, lambda: a.project_out(b), lambda: a.at_norms_of(b),
        lambda: a.require_same_model(b.model),
    ):  # fmt: skip
        with pytest.raises(IncompatibleModel, match=r"toy.*second.*weights: w and vvvvvvvvvvvv"):
            wrong()


# -- store and files ---------------------------------------------------------------------------

PARTS = [
    ("keys", "values", "residual", "attention"),
    ("keys",),
    ("values",),
    ("residual",),
    ("attention",),
    ("values", "attention"),
]


@pytest.mark.parametrize("sites", PARTS, ids="+".join)
def test_operand_round_trip_through_a_store(spec, tmp_path, sites):
    delta = build(spec, sites=sites) * 0.5
    operand = delta.operand()
    assert operand_kind(operand) == "delta"
    with kv.Store(tmp_path / "store") as store:
        store.put(operand, "step-by-step")
        found = Delta.of(store.get("step-by-step"))
    equal(found, delta)
    assert found.digest == delta.digest == operand.digest
    assert dict(found.facts) == dict(delta.facts) == FACTS
    assert found.lineage.head.name == "scale"
    assert Delta.of(delta) is delta


def test_other_operands_are_no_delta(toy):
    with pytest.raises(InvalidArgument, match="kind 'delta'"):
        Delta.of(toy())


@pytest.mark.parametrize("sites", PARTS, ids="+".join)
def test_file_round_trip(spec, tmp_path, sites):
    delta = build(spec, sites=sites) - build(spec, 1, sites=sites)
    path = delta.save(tmp_path / "a.safetensors")
    found = Delta.load(path)
    equal(found, delta)
    assert (found.digest, found.model, found.lineage) == (delta.digest, spec, delta.lineage)
    assert dict(found.facts) == FACTS
    before = path.read_bytes()
    found.save(path)  # replaces, and writes the same bytes
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_files_are_plain_safetensors(spec, tmp_path):
    from safetensors.torch import load_file

    delta = build(spec)
    tensors = load_file(delta.save(tmp_path / "a.safetensors"))
    assert sorted(tensors) == sorted(
        f"{site}.{layer}" for site, layers in delta.vectors.items() for layer in layers
    )
    assert torch.equal(tensors["residual.2"], delta.vectors["residual"][2])


def test_foreign_files_are_refused(spec, tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(InvalidArgument, match="missing"):
        Delta.load(tmp_path / "none.safetensors")
    with pytest.raises(InvalidArgument, match="another file"):
        build(spec).save(tmp_path)
    with pytest.raises(InvalidArgument, match="another file"):
        build(spec).save(tmp_path / "no" / "a.safetensors")
    save_file({"keys.0": torch.ones(2, 8)}, tmp_path / "plain.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors", {"kvedit": '{"format": "x/1"}'})
    for name in ("plain", "other"):
        with pytest.raises(InvalidArgument, match="holds no delta of ours"):
            Delta.load(tmp_path / f"{name}.safetensors")
    for number, data in enumerate((b"", b"abc", b"\xff" * 64, b"\x80\x04K\x01.")):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(data)
        with pytest.raises(CorruptMemory, match="no safetensors file, or damaged"):
            Delta.load(path)


def test_every_flipped_byte_and_every_cut_is_noticed(spec, tmp_path):
    delta = build(spec, sites=("keys", "residual")) * 2
    path = delta.save(tmp_path / "a.safetensors")
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    bodies = range(8 + size, len(whole), 7)
    heads = range(8, 8 + size, 41)
    for at in [0, 3, *heads, *bodies]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x11]) + whole[at + 1 :])
        try:
            found = Delta.load(path)
        except (CorruptMemory, InvalidArgument):
            continue
        assert at < 8 + size  # white space and the like
        equal(found, delta)
        assert (found.digest, found.lineage) == (delta.digest, delta.lineage)
        assert found.model == delta.model
    for stop in (4, 8, size // 2, size + 8, len(whole) - 1):
        path.write_bytes(whole[:stop])
        with pytest.raises(CorruptMemory):
            Delta.load(path)


def test_a_failed_save_leaves_what_was_there(spec, tmp_path, monkeypatch):
    path = build(spec).save(tmp_path / "a.safetensors")
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        build(spec, 1).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_repr_names_sites_and_norms(spec):
    shown = repr(build(spec, sites=("keys", "residual")).normalized())
    assert shown == "Delta(keys of 3 layers, norms 1-1; residual of 2 layers, norms 1-1; toy)"
    assert build(spec).lineage == Lineage()
