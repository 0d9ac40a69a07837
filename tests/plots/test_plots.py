"""Figures: what stands on their axes, that odd values have a colour, and that nothing is shown."""

import builtins
import dataclasses
import sys

import pytest
import torch

import kvedit as kv
from kvedit import plots
from kvedit.errors import InvalidArgument, MissingDependency, ShapeMismatch
from kvedit.models import tiny_model

pytest.importorskip("matplotlib")

TEXT = "Shipping costs $4 or $5.\nRefunds are possible within 60 days."


@pytest.fixture(scope="module")
def tapped():
    model, tokenizer = tiny_model("llama")
    with kv.tap(model, sites=("received",)) as tap:
        memory = kv.capture(model, tokenizer, TEXT)
    return memory, {layer: tap["received", layer] for layer in memory.layers}


def image(figure, panel=0):
    panels = [axes for axes in figure.axes if axes.images]
    return panels[panel].images[0]


def drawn(figure):
    """Draws it, as saving would: labels that can't be set fail here."""
    return figure._repr_png_().startswith(b"\x89PNG")


def test_heatmap_shows_its_values_and_labels():
    values = torch.tensor([[0.0, 1.0, 2.0], [3.0, float("nan"), float("inf")]])
    figure = plots.heatmap(
        values,
        title="cost in $ and $",
        x="slot",
        y="layer",
        colour="nats",
        columns=["$a", "b", "c"],
    )
    axes, bar = figure.axes
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == (
        "cost in $ and $",
        "slot",
        "layer",
    )
    assert bar.get_ylabel() == "nats\n(red: infinite)"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["$a", "b", "c"]
    shown = image(figure).get_array()
    assert shown[0].tolist() == [0, 1, 2]
    assert shown.mask[1].tolist() == [False, True, False]
    assert shown[1, 2] > image(figure).norm.vmax == 3
    assert drawn(figure)


@pytest.mark.parametrize(
    "values", [torch.zeros(2, 3), torch.full((1, 1), 5.0)], ids=["zero", "one"]
)
@pytest.mark.parametrize("log", [False, True])
def test_flat_values_can_be_drawn(values, log):
    assert drawn(plots.heatmap(values, log=log))


def test_only_infinite_cells_are_red():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    def red(values):
        canvas = FigureCanvasAgg(plots.heatmap(values, log=True))
        canvas.draw()
        pixels = torch.tensor(canvas.buffer_rgba().tolist())[..., :3]
        return bool((pixels == torch.tensor([220, 20, 60])).all(dim=-1).any())

    # Drawing rounds: the largest value must not come out beyond the scale.
    narrow = torch.tensor([[23.18363380432129], [23.95876121520996], [24.621103286743164]])
    assert not red(narrow)
    assert red(torch.cat((narrow, torch.tensor([[torch.inf]]))))


@pytest.mark.parametrize(
    ("values", "some"),
    [([[0.001, 0.01, 0.1, 1.0, 10.0]], {"0.01", "0.1", "1"}), ([[0.3, 0.4, 0.6]], {"0.4", "0.6"})],
    ids=["decades", "within one"],
)
def test_logarithmic_colours_have_plain_numbers(values, some):
    figure = plots.heatmap(torch.tensor(values), log=True)
    assert drawn(figure)
    axis = figure.axes[1].yaxis
    written = {
        label.get_text() for label in (*axis.get_ticklabels(), *axis.get_ticklabels("minor"))
    }
    assert some <= written
    assert all(float(text) > 0 for text in written if text)


def test_many_labels_are_thinned():
    figure = plots.heatmap(torch.rand(2, 1000), columns=[f"token{i}" for i in range(1000)])
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert len(labels) <= 64
    assert labels[0] == "token0"
    assert figure.get_size_inches()[0] <= 14


def test_heatmap_refuses_what_is_no_matrix():
    with pytest.raises(ShapeMismatch, match="row, column"):
        plots.heatmap(torch.zeros(3))
    with pytest.raises(InvalidArgument, match="nothing to draw"):
        plots.heatmap(torch.zeros(0, 3))
    with pytest.raises(InvalidArgument, match="3 labels of columns"):
        plots.heatmap(torch.zeros(2, 3), columns=["a"])


def test_norms_by_head_and_position(tapped):
    memory, _ = tapped
    by_head = image(plots.norms(memory, "values")).get_array()
    expected = torch.stack([x.values.norm(dim=2).mean(dim=1) for x in memory.layers.values()])
    torch.testing.assert_close(torch.tensor(by_head.data), expected)
    short = kv.editors.Drop(span={"tokens": (2, 5)}, layers=(1,))(memory)
    shown = image(plots.norms(short, by="position")).get_array()
    assert shown.shape == (3, memory.next_position)
    assert torch.tensor(shown.mask).nonzero().tolist() == [[1, 2], [1, 3], [1, 4]]
    with pytest.raises(InvalidArgument, match="'queries'"):
        plots.norms(memory, "queries")


def test_received_is_a_share_per_head_or_layer(tapped):
    memory, received = tapped
    tokens = plots.token_labels(memory)
    assert len(tokens) == memory.tokens_count
    assert tokens[0] == "<s>"
    assert "↵" in tokens
    assert any(token.startswith("␣") for token in tokens)
    heads = plots.received(received[1], tokens)
    assert torch.tensor(image(heads).get_array().data).sum(dim=1).tolist() == pytest.approx([1] * 4)
    assert drawn(heads)
    layers = plots.received(received, tokens)
    assert image(layers).get_array().shape == (3, len(tokens))
    assert [label.get_text() for label in layers.axes[0].get_yticklabels()] == ["0", "1", "2"]
    bars = plots.received(received[1][0].mean(dim=0), tokens)
    assert len(bars.axes[0].patches) == len(tokens)
    assert drawn(bars)
    assert drawn(plots.received(received[1], log=False))


def test_received_refuses_other_shapes(tapped):
    _, received = tapped
    with pytest.raises(ShapeMismatch, match="query_head, slot"):
        plots.received(torch.zeros(1, 1, 1, 1))
    with pytest.raises(InvalidArgument, match="equally many slots"):
        plots.received({0: received[0], 1: received[1][..., :3]})
    with pytest.raises(InvalidArgument, match="no layers"):
        plots.received({})
    with pytest.raises(InvalidArgument, match="labels of columns"):
        plots.received(received[0], ["one"])


def test_a_memory_without_tokens_has_no_labels(tapped):
    memory, _ = tapped
    layers = {
        index: dataclasses.replace(layer, source=torch.full_like(layer.source, -1))
        for index, layer in memory.layers.items()
    }
    with pytest.raises(InvalidArgument, match="no tokens"):
        plots.token_labels(dataclasses.replace(memory, layers=layers, source=None))


def test_comparison_has_a_panel_per_kind(tapped):
    memory, _ = tapped
    evicted = kv.editors.Drop(span="within 60 days", heads=(0,), layers=(1,))(memory)
    figure = plots.comparison(kv.compare(memory, evicted), "before, after")
    titles = [axes.get_title() for axes in figure.axes if axes.images]
    assert titles == ["Keys", "Values", "Bias"]
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts == ["no difference"] * 2
    assert any("infinite" in axes.get_ylabel() for axes in figure.axes)
    assert drawn(figure)


def test_nothing_touches_pyplot(tapped):
    if "matplotlib.pyplot" in sys.modules:
        pytest.skip("something else imported it")
    plots.norms(tapped[0])
    assert "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependency, match=r"kvedit\[plots\]"):
        plots.heatmap(torch.zeros(2, 2))
