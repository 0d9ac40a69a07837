"""HazyResearch cartridges: their pickle is read as data and never run; ours becomes theirs."""

import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import kvedit as kv
from kvedit.errors import CorruptMemory, IncompatibleModel, InvalidArgument, NotFound, ShapeMismatch
from kvedit.interop import from_hazy, to_hazy
from kvedit.interop.live import imported_facts
from kvedit.models.tiny import tiny_model

SLOTS, FROZEN = 11, 3


def as_theirs(memory, frozen=FROZEN, part="frozen", wrap=nn.ParameterList):
    """Lists of parameters as their cache saves them: ``[1, head, slot, dim]`` per layer."""
    found = {}
    for kind in ("keys", "values"):
        states = [getattr(layer, kind)[None] for layer in memory.layers.values()]
        trainable = wrap([nn.Parameter(one[:, :, frozen:].clone()) for one in states])
        fixed = [nn.Parameter(one[:, :, :frozen].clone(), requires_grad=False) for one in states]
        found |= {f"trainable_{kind}": trainable, f"{part}_{kind}": wrap(fixed)}
    return found


def save(parts, path):
    torch.save(parts, path)  # noqa: TID251 - stands for their code, whose files we read
    return path


@pytest.fixture
def plain(llama):
    """A memory that needs no turning: its first tokens, the next one behind them."""
    return kv.capture(llama.model, None, llama.whole.tokens[:SLOTS])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("part", ["frozen", "fixed"])
def test_their_file_is_read(case_of, far, tmp_path, family, part):
    case = case_of(family)
    plain = kv.capture(case.model, None, case.whole.tokens[:SLOTS])
    path = save(as_theirs(plain, part=part), tmp_path / "cache-step40.pt")
    memory = from_hazy(path, case.model, case.tokenizer)
    assert far(case.logits(memory), case.logits(plain)) == 0.0
    assert (memory.slots, memory.next_position) == (SLOTS, SLOTS)
    assert memory.source is None
    # the slots of the frozen tensors; their own loader takes the KV heads, of which there are 2
    assert imported_facts(memory)["frozen"] == FROZEN
    assert list(imported_facts(memory)["files"]) == ["pt"]
    assert (
        from_hazy(tmp_path, case.model, case.tokenizer).digest == memory.digest
    )  # the folder's only one


@pytest.mark.parametrize("how", ["none", "empty", "absent", "lists", "ordered"])
def test_other_shapes_of_their_file(llama, plain, tmp_path, how):
    parts = as_theirs(plain, 0, wrap=list if how == "lists" else nn.ParameterList)
    for kind in ("keys", "values"):
        if how == "none":
            parts[f"frozen_{kind}"] = None
        elif how == "empty":
            parts[f"frozen_{kind}"] = nn.ParameterList()
        elif how != "lists":
            del parts[f"frozen_{kind}"]
    path = save(OrderedDict(parts) if how == "ordered" else parts, tmp_path / "a.pt")
    memory = from_hazy(path, llama.model, dtype=torch.float32)
    assert imported_facts(memory)["frozen"] == 0
    assert torch.equal(memory.layers[2].keys, plain.layers[2].keys)


def test_half_precision(llama, plain, tmp_path):
    path = save(as_theirs(plain.to(dtype=torch.bfloat16)), tmp_path / "cartridge.pt")
    assert from_hazy(path, llama.model).dtype == torch.float32
    memory = from_hazy(path, llama.model, dtype="bfloat16")
    assert torch.equal(memory.layers[1].values, plain.layers[1].values.bfloat16())


class Evil:
    """What unpickling would call."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("place", ["whole", "entry", "inside", "hook"])
def test_a_hostile_pickle_is_refused_and_nothing_runs(llama, plain, tmp_path, place):
    marker = tmp_path / "ran"
    evil = Evil(Path.touch, marker)
    parts = as_theirs(plain)
    if place == "entry":
        parts["trainable_keys"] = evil
    elif place == "inside":
        parts["trainable_keys"] = [evil]
    elif place == "hook":
        parts["trainable_keys"].__dict__["_forward_pre_hooks"] = OrderedDict({0: evil})
    path = save(evil if place == "whole" else parts, tmp_path / "a.pt")
    with pytest.raises(CorruptMemory, match="nothing else is run"):
        from_hazy(path, llama.model)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # noqa: TID251 - the pickle does what it says
    assert marker.exists()


def test_the_list_of_what_is_let_in_ends_with_the_read(llama, plain, tmp_path):
    path = save(as_theirs(plain), tmp_path / "a.pt")
    before = set(torch.serialization.get_safe_globals())
    assert nn.ParameterList not in before
    from_hazy(path, llama.model)
    assert set(torch.serialization.get_safe_globals()) == before


def test_a_parameter_list_that_lies_about_itself(llama, plain, tmp_path):
    parts = as_theirs(plain)
    parts["trainable_keys"]._size = 10**12  # going through it would never end
    memory = from_hazy(save(parts, tmp_path / "a.pt"), llama.model)
    assert memory.slots == SLOTS
    parts = as_theirs(plain)
    del parts["trainable_keys"]._parameters["1"]
    with pytest.raises(CorruptMemory, match="damaged"):
        from_hazy(save(parts, tmp_path / "b.pt"), llama.model)
    claims = torch.zeros(1).expand(1, 2, 1 << 40, 16)
    parts = as_theirs(plain, wrap=list)
    parts["trainable_keys"][0] = claims
    with pytest.raises(CorruptMemory, match="fewer bytes"):
        from_hazy(save(parts, tmp_path / "c.pt"), llama.model)


def test_files_that_do_not_fit(llama, plain, tmp_path):
    def changed(name, **parts):
        return save(as_theirs(plain) | parts, tmp_path / f"{name}.pt")

    states = [layer.keys[None] for layer in plain.layers.values()]
    cases = [
        (changed("layers", trainable_keys=states[:2]), ShapeMismatch, "2 layers"),
        (changed("heads", trainable_keys=[s[:, :1] for s in states]), ShapeMismatch, "needs"),
        (changed("axes", trainable_keys=[s[0] for s in states]), ShapeMismatch, "needs"),
        (changed("slots", trainable_keys=states), ShapeMismatch, "slot"),
        (changed("more", optimizer=states), InvalidArgument, "no cartridge"),
        (changed("number", frozen_keys=3), CorruptMemory, "list of tensors"),
        (changed("texts", frozen_keys=["a"]), CorruptMemory, "expected tensors"),
        (changed("ints", frozen_keys=[s.int() for s in states]), InvalidArgument, "fit together"),
        (save([states], tmp_path / "list.pt"), CorruptMemory, "mapping"),
        (save({}, tmp_path / "empty.pt"), InvalidArgument, "no cartridge"),
        (tmp_path / "none.pt", NotFound, "is not here"),
    ]
    (tmp_path / "text.pt").write_text("cos\nsystem\n(S'true'\ntR.")  # a bare pickle of protocol 0
    (tmp_path / "cut.pt").write_bytes((tmp_path / "layers.pt").read_bytes()[:-200])
    cases += [(tmp_path / f"{name}.pt", CorruptMemory, name) for name in ("text", "cut")]
    for path, error, says in cases:
        with pytest.raises(error, match=says):
            from_hazy(path, llama.model)
    with pytest.raises(InvalidArgument, match="name the file"):
        from_hazy(tmp_path, llama.model)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("which", ["whole", "compact"])
def test_round_trip(case_of, far, tmp_path, family, which):
    case = case_of(family)
    memory = case.memory(which)
    done = to_hazy(memory, tmp_path / "out", frozen=2)
    back = from_hazy(tmp_path / "out", case.model, case.tokenizer)
    assert far(case.logits(back), case.logits(memory)) <= 1e-5
    if which == "whole":
        assert far(case.logits(back), case.full_context_logits()) <= 1e-5
    assert imported_facts(back)["frozen"] == 2
    assert done.moved == memory.slots - memory.next_position
    names = load_file(tmp_path / "out" / "cartridge.safetensors")
    assert names["frozen_keys.0"].shape == (1, 2, 2, case.whole.model.layers[0].key_dim)
    assert names["trainable_values.1"].shape[2] == memory.slots - 2


@pytest.mark.parametrize("frozen", [0, 1, 20])
def test_the_lines_on_the_card_make_their_file(llama, far, tmp_path, monkeypatch, frozen):
    folder = tmp_path / "out"
    to_hazy(llama.compact, folder, frozen=frozen)
    assert not list(folder.glob("*.pt"))  # no pickle by us
    card = (folder / "README.md").read_text()
    lines = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    monkeypatch.chdir(folder)
    exec(lines, {})
    parts = torch.load("cartridge.pt", weights_only=False)  # noqa: TID251 - as their code does
    assert set(parts) == {f"{p}_{k}" for p in ("trainable", "frozen") for k in ("keys", "values")}
    assert all(isinstance(one, nn.ParameterList) for one in parts.values())
    assert len(parts["trainable_keys"]) == 3
    if 0 < frozen < 20:
        assert parts["frozen_keys"][0].shape == (1, 2, frozen, 16)
        assert not parts["frozen_keys"][0].requires_grad
        assert parts["trainable_keys"][0].requires_grad
    back = from_hazy("cartridge.pt", llama.model)
    assert far(llama.logits(back), llama.logits(llama.compact)) <= 1e-5
    assert imported_facts(back)["frozen"] == frozen


def test_pages_of_their_server(llama, far, tmp_path):
    compact = llama.compact  # 20 slots: one page and 4
    done = to_hazy(compact, tmp_path / "keep")
    assert "cut off the last 4" in done.notes[0]
    assert "cut off the last 4 of these 20" in (tmp_path / "keep" / "README.md").read_text()
    with pytest.raises(InvalidArgument, match="16 or 32 slots"):
        to_hazy(compact, tmp_path / "refuse", remainder="refuse")
    done = to_hazy(compact, tmp_path / "drop", remainder="drop")
    assert (done.slots, done.moved) == (16, 16 - compact.next_position)
    shorter = compact.with_layers(
        {index: layer.select(torch.arange(16)) for index, layer in compact.layers.items()}
    )
    back = from_hazy(tmp_path / "drop", llama.model)
    assert far(llama.logits(back), llama.logits(shorter)) <= 1e-5
    # what their server would do with the file as it is: fewer slots, asked from the wrong place
    cut = from_hazy(tmp_path / "keep", llama.model).layers
    for index in cut:
        same = torch.allclose(cut[index].keys[:, :16], back.layers[index].keys, atol=1e-3)
        assert not same
    small = kv.capture(llama.model, None, llama.whole.tokens[:5])
    with pytest.raises(InvalidArgument, match="a cartridge of 16 slots"):
        to_hazy(small, tmp_path / "small", remainder="drop")
    ragged = kv.editors.Drop(span={"tokens": [5, 9]}, layers=[1])(llama.whole)
    with pytest.raises(InvalidArgument, match="layers differ in slots"):
        to_hazy(ragged, tmp_path / "ragged", remainder="drop")
    with pytest.raises(InvalidArgument, match="remainder"):
        to_hazy(compact, tmp_path / "pad", remainder="pad")
    whole = kv.capture(llama.model, None, llama.whole.tokens[:32])
    assert not any("Tokasaurus" in one for one in to_hazy(whole, tmp_path / "32").notes)


def test_their_code_runs_two_families(case_of, tmp_path):
    done = to_hazy(case_of("gemma3").compact, tmp_path / "a")
    assert any("llama and qwen3" in one for one in done.notes)


def test_a_file_of_ours_knows_its_model(llama, tmp_path):
    to_hazy(llama.compact, tmp_path / "a")
    other, _ = tiny_model("llama", seed=1)
    with pytest.raises(IncompatibleModel, match="weights"):
        from_hazy(tmp_path / "a", other)
    assert from_hazy(tmp_path / "a", other, strict=False).slots == 20
