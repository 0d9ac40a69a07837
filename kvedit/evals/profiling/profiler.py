"""profile: try heads on probes and write down which of them carry emphasis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import kvedit
from kvedit.errors import InvalidArgument
from kvedit.evals.journal import Journal
from kvedit.evals.profiling.atlas import HeadAtlas
from kvedit.evals.profiling.candidates import candidates_digest, single_heads, single_layers
from kvedit.evals.profiling.effects import Effects
from kvedit.evals.profiling.measuring import Case, Setting, measure
from kvedit.evals.profiling.probe import Probe, set_digest
from kvedit.evals.profiling.search import Measure, coarse_to_fine, exhaustive, greedy
from kvedit.memory import ModelSpec
from kvedit.memory.heads import HeadSet, Kind
from kvedit.models.inspection import inspect

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Search", "measure_all", "profile"]

Search = Literal["heads", "layers", "coarse", "greedy"]


def profile(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Probe],
    setting: Setting,
    *,
    kind: Kind = "kv",
    search: Search = "heads",
    layers: int = 4,
    count: int = 10,
    pool: int | None = 24,
    seed: int = 0,
    task: str = "",
    out: str | Path | None = None,
    progress: bool = False,
) -> HeadAtlas:
    """Returns the atlas of a model's heads on some probes.

    With ``out``, finished cases are kept beside it (``NAME.cases.jsonl``), and a second start
    skips them; probes and head sets may be added in between.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        probes: the cases.
        setting: strength, and what is read under it.
        kind: query heads, or KV heads with their groups.
        search: each head alone, each layer, coarse to fine, or greedy.
        layers: of ``"coarse"``: layers to look into.
        count: of ``"greedy"``: heads at most.
        pool: of ``"greedy"``: how many of the best single heads stay in the race; None: all.
        seed: of the bootstrap; nothing else is drawn.
        task: a name for the probes.
        out: where the atlas goes; None writes nothing.
        progress: whether to show a progress bar over probes.

    Raises:
        InvalidArgument: if an option is out of range, a probe is there twice, or the kept cases
            belong to another model or setting.
        SpanNotFound: if a context does not hold its span.
    """
    if search not in get_args(Search) or kind not in get_args(Kind):
        raise InvalidArgument(
            f"expected a search of {get_args(Search)} and a kind of {get_args(Kind)}, "
            f"found {search!r}, {kind!r}"
        )
    spec = inspect(model, tokenizer).spec
    target = None if out is None else Path(out)
    journal = _journal(model, spec, setting, target)
    spent: dict[str, float] = {}

    def run(sets: Sequence[HeadSet]) -> Effects:
        return measure_all(
            model, tokenizer, probes, sets, setting, journal=journal, spent=spent, progress=progress
        )

    effects = _search(run, spec, search, kind, layers, count, pool)
    atlas = HeadAtlas(
        effects.scores(seed), kind, search, setting.strength, "decode", setting.rerun,
        setting.continuation, len(probes), seed, float(effects.base.mean()),
        float((effects.base > 0).double().mean()), set_digest(probes), spec,
        kvedit.__version__, sum(spent.values()) / 60, task,
    )  # fmt: skip
    if target is not None:
        atlas.write(target)
    return atlas


def measure_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Probe],
    sets: Sequence[HeadSet],
    setting: Setting,
    *,
    strengths: Sequence[float] | None = None,
    journal: Journal | None = None,
    spent: dict[str, float] | None = None,
    progress: bool = False,
) -> Effects:
    """Returns the effects of head sets on all probes.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        probes: the cases.
        sets: head sets to try.
        setting: strength, and what is read under it.
        strengths: one strength per set in place of the setting's; not together with a journal.
        journal: where finished cases are looked up and kept.
        spent: filled with the seconds of each case, by its key.
        progress: whether to show a progress bar.

    Raises:
        InvalidArgument: if a probe is there twice, or strengths would get into a journal.
    """
    if strengths is not None and journal is not None:
        raise InvalidArgument("a journal holds cases of one strength: pass strengths without it")
    digests = [probe.digest for probe in probes]
    if len(set(digests)) < len(digests):
        raise InvalidArgument("a probe is there twice: intervals would look surer than they are")
    tried = candidates_digest(sets)
    cases = []
    for probe, digest in _progress(list(zip(probes, digests, strict=True)), len(sets), progress):
        key = f"{tried}:{digest}"
        if journal is not None and key in journal.done:
            case = Case.from_json(journal.done[key])
        else:
            case = measure(model, tokenizer, probe, sets, setting, strengths)
            if journal is not None:
                journal.add({"key": key, **case.to_json()})
        if spent is not None:
            spent[key] = case.seconds
        cases.append(case)
    return Effects.of(sets, cases)


def _search(
    run: Measure,
    spec: ModelSpec,
    search: Search,
    kind: Kind,
    layers: int,
    count: int,
    pool: int | None,
) -> Effects:
    if search == "coarse":
        return coarse_to_fine(run, spec, kind, layers)
    if search == "greedy":
        return greedy(run, single_heads(spec, kind), count, pool)
    tried = single_layers(spec, kind) if search == "layers" else single_heads(spec, kind)
    return exhaustive(run, tried)


def _journal(
    model: PreTrainedModel, spec: ModelSpec, setting: Setting, out: Path | None
) -> Journal:
    path = None if out is None else out.with_suffix(".cases.jsonl")
    shown = {"strength", "rerun", "continuation"}
    configuration: dict[str, Any] = {name: getattr(setting, name) for name in sorted(shown)}
    fingerprint = spec.to_json()["fingerprint"]
    return Journal(path, {**configuration, "model": fingerprint, "dtype": str(model.dtype)})


def _progress(items: list[Any], sets: int, shown: bool) -> Any:
    if not shown:
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc=f"{sets} head sets", unit="probe", disable=None)
