"""Vectors of other libraries: ``.svec`` files, and objects of steering-vectors and repeng."""

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvedit.errors import CorruptMemory, InvalidArgument, ShapeMismatch
from kvedit.interop import detect, from_repeng, from_steering_vectors, from_svec
from kvedit.models.inspection import inspect
from kvedit.models.tiny import tiny_model


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def svec(path, directions, model_type="llama", **more):
    listed = {str(layer): rows.tolist() for layer, rows in directions.items()}
    path.write_text(json.dumps({"model_type": model_type, "directions": listed, **more}))
    return path


def test_svec_of_activation_steering(llama, tmp_path):
    rows = {0: numbers(64), 2: numbers(64, seed=1)}
    path = svec(tmp_path / "v.svec", rows, explained_variances={"0": 0.5, "2": 0.25})
    assert detect(path) == "svec"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delta = from_svec(path, *llama)
    assert (delta.sites, delta.layers) == (("residual",), (0, 2))
    for layer, row in rows.items():
        assert torch.equal(delta.vectors["residual"][layer], torch.tensor(row))
    assert delta.facts["format"] == "svec of activation-steering"
    assert delta.facts["explained_variances"] == {"0": 0.5, "2": 0.25}
    assert delta.model.fingerprint == inspect(*llama).spec.fingerprint
    with pytest.warns(UserWarning, match="'phi3'"):
        from_svec(svec(path, rows, "phi3"), *llama)


def test_svec_of_aisteer360(llama, tmp_path):
    path = tmp_path / "v.svec"
    delta = from_svec(svec(path, {1: numbers(1, 64)}, meta={"package": "1"}), *llama)
    assert torch.equal(delta.vectors["residual"][1], torch.tensor(numbers(1, 64)[0]))
    assert delta.facts["format"] == "svec of aisteer360"
    for rows, more, match in (
        (numbers(5, 64), {}, "5 rows, which are positions"),
        (numbers(4, 16), {"num_heads": 4, "head_dim": 16}, "single query heads"),
        (numbers(1, 64), {"probe_accuracies": {"1:0": 0.9}}, "single query heads"),
    ):
        with pytest.raises(InvalidArgument, match=match):
            from_svec(svec(path, {1: rows}, **more), *llama)


def test_svec_that_is_none(llama, tmp_path):
    path = tmp_path / "v.svec"
    for text in ("", "[]", "{}", '{"model_type": "llama"}', '{"model_type": 1, "directions": {}}',
                 '{"model_type": "llama", "directions": {"x": [1.0]}}',
                 '{"model_type": "llama", "directions": {"1": ["a"]}}',
                 '{"model_type": "llama", "directions": {"1": [[1.0], [2.0, 3.0]]}}'):  # fmt: skip
        path.write_text(text)
        with pytest.raises(CorruptMemory):
            from_svec(path, *llama)
    with pytest.raises(CorruptMemory, match="explained_variances"):
        from_svec(svec(path, {1: numbers(64)}, explained_variances={"1": "x"}), *llama)
    path.write_text('{"model_type": "llama", "directions": {"1": [NaN]}}')
    with pytest.raises(ShapeMismatch, match="another model"):
        from_svec(path, *llama)
    with pytest.raises(InvalidArgument, match="no vectors"):
        from_svec(svec(path, {}), *llama)
    with pytest.raises(InvalidArgument, match="pass the model"):
        from_svec(svec(path, {1: numbers(64)}), None)
    with pytest.raises(InvalidArgument, match="missing"):
        from_svec(tmp_path / "nowhere.svec", *llama)


def test_pickles_are_refused_by_name(llama, tmp_path):
    path = tmp_path / "v.svec"
    for data in (b"PK\x03\x04 and so on", b"\x80\x04\x95"):
        path.write_bytes(data)
        with pytest.raises(InvalidArgument, match=r"pickle.*can run anything"):
            from_svec(path, *llama)
    for vector in (path, str(path), data):
        for read in (from_repeng, from_steering_vectors):
            with pytest.raises(InvalidArgument, match="pickles"):
                read(vector, *llama)


def test_steering_vectors(llama):
    rows = {0: torch.tensor(numbers(64)), -1: torch.tensor(numbers(64, seed=1)).double()}
    for kind, site in (("decoder_block", "residual"), ("self_attn", "attention")):
        found = [
            from_steering_vectors(one, *llama)
            for one in (
                SimpleNamespace(layer_activations=rows, layer_type=kind),
                {"layer_activations": rows, "layer_type": kind},
            )
        ]
        assert found[0].digest == found[1].digest
        assert (found[0].sites, found[0].layers) == ((site,), (0, 2))
        assert torch.equal(found[0].vectors[site][2], rows[-1].float())
    with pytest.raises(InvalidArgument, match=r"acts on 'mlp'.*decoder_block, self_attn"):
        from_steering_vectors({"layer_activations": rows, "layer_type": "mlp"}, *llama)
    twice = {-1: rows[0], 2: rows[0]}
    with pytest.raises(InvalidArgument, match="layer 2 twice"):
        from_steering_vectors({"layer_activations": twice}, *llama)
    rows[0].zero_()  # the delta has its own numbers
    assert found[0].vectors["attention"][0].abs().sum() > 0


def test_repeng(llama):
    rows = {1: numbers(64), 2: numbers(64, seed=1)}
    for one in (
        SimpleNamespace(model_type="llama", directions=rows),
        {"model_type": "llama", "directions": rows},
        {"directions": {"1": rows[1], "2": rows[2].tolist()}},
        rows,
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            delta = from_repeng(one, *llama)
        assert delta.layers == (1, 2)
        assert torch.equal(delta.vectors["residual"][2], torch.tensor(rows[2]))
    with pytest.warns(UserWarning, match="'mistral'"):
        from_repeng(SimpleNamespace(model_type="mistral", directions=rows), *llama)


def test_objects_that_do_not_fit(llama):
    for vector, error, match in (
        (SimpleNamespace(), InvalidArgument, "'directions'"),
        ({"directions": [1]}, InvalidArgument, "'directions'"),
        ({"directions": {}}, InvalidArgument, "no vectors"),
        ({1: numbers(2, 64)}, ShapeMismatch, r"found shape \[2, 64\]"),
        ({1: numbers(32)}, ShapeMismatch, r"\[64\].*\[32\]"),
        ({1: np.zeros(64, np.int64)}, InvalidArgument, "no floating-point"),
        ({1: object()}, InvalidArgument, "found object"),
        ({"a": numbers(64)}, CorruptMemory, "'a' is no number"),
        ({True: numbers(64)}, CorruptMemory, "no number"),
        ({7: numbers(64)}, InvalidArgument, "has 3 layers"),
        ({-4: numbers(64)}, InvalidArgument, "has 3 layers"),
    ):
        with pytest.raises(error, match=match):
            from_repeng(vector, *llama)
    # Facts alone do not know the width; the vectors must agree with each other.
    spec = inspect(*llama).spec
    assert from_repeng({1: numbers(32)}, spec).hidden == 32
    with pytest.raises(ShapeMismatch):
        from_repeng({1: numbers(32), 2: numbers(64)}, spec)
