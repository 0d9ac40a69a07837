"""Measures how fast cartridges are trained, beside the loop of PEFT's cartridge example.

Per round one document, its questions and answers, one start (its first p tokens), one epoch. kvedit
reads the document once, asks it for the teacher's columns of all samples, and trains on packed
rows. PEFT's example runs the teacher over document, question and answer in every step, and one
sample at a time; its loop is written anew here on the peft package: cross-entropy to the teacher's
20 likeliest tokens at all positions of the student's sequence, AdamW. Both run at the same
constant rate (of 2e-2, 5e-3 and 1e-3 the best for both is the default), and are timed from the text
to the cartridge, teacher and start included; loading the model and looking at it are not.
``--pack 1`` gives each sample a row and a step of its own, so kvedit makes as many steps as PEFT.

    pip install 'kvedit[peft]'
    python benchmarks/cartridge_training.py
    python benchmarks/cartridge_training.py --lr 2e-2 5e-3 1e-3 --seeds 0 --json training.json

Tokens are counted alike: those of answers, end included. PEFT's loss has question tokens as well;
they are given beside. Then all cartridges are asked the document's other questions. A round is a
document and a seed (of the order of samples); who goes first changes from round to round. Speed is
by CPU seconds, since other work moves the wall clock.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

import kvedit as kv
from kvedit.cartridges import Sample, TrainPlan, initial, train
from kvedit.cartridges.study import context_of, samples_from
from kvedit.evals.bootstrap import mean, paired_difference
from kvedit.evals.recall import RecallQuestion, RecallReport, recall
from kvedit.interop.peft import from_peft
from kvedit.memory import KVMemory

DOCUMENTS = Path(__file__).resolve().parents[1] / "experiments" / "cartridges" / "documents"
TOP_K = 20
ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Work:
    """What both are given."""

    model: Any
    tokenizer: Any
    context: Any
    pairs: list[tuple[str, str | None]]
    slots: int
    seed: int


@dataclass(frozen=True)
class Timed:
    """One training: what it took, from the text to the cartridge."""

    cpu: float
    wall: float
    teacher_cpu: float | None
    steps: int
    supervised: int
    all_positions: int
    memory: KVMemory

    @property
    def speed(self) -> float:
        """Answer tokens per CPU second."""
        return self.supervised / self.cpu


def kvedit_run(work: Work, lr: float, pack: int) -> Timed:
    """Trains with kvedit."""
    cpu, wall = time.process_time(), time.perf_counter()
    full = kv.capture(work.model, work.tokenizer, work.context)
    samples = samples_from(work.model, work.tokenizer, work.pairs, full, top_k=TOP_K)
    teacher = time.process_time() - cpu
    start = initial.first_tokens(work.model, work.tokenizer, full, work.slots)
    steps = []
    plan = TrainPlan(epochs=1, lr=lr, pack=pack, seed=work.seed)
    made = train(work.model, start, samples, plan, tokenizer=work.tokenizer,
                 on_eval=lambda step, memory: steps.append(step))  # fmt: skip
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    answers = sum(len(sample) - sample.start for sample in samples)
    return Timed(cpu, wall, teacher, steps[-1], answers, answers, made)


def peft_run(work: Work, lr: float, samples: Sequence[Sample], base: Any) -> Timed:
    """Trains with peft, as its example does. ``samples`` give tokens alone, made outside."""
    from peft import CartridgeConfig, get_peft_model
    from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values
    from transformers import DynamicCache

    cpu, wall = time.process_time(), time.perf_counter()
    context = kv.runtime.text.encode(work.tokenizer, work.context).tokens
    config = CartridgeConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=work.slots, num_frozen_tokens=1
    )
    student = get_peft_model(base, config)
    with torch.no_grad(), student.disable_adapter():
        cache = DynamicCache()
        student(input_ids=context[None, : work.slots], past_key_values=cache, use_cache=True)
    prefix = [(layer.keys, layer.values) for layer in cache.layers]
    initialize_kv_prefix_from_past_key_values(student, past_key_values=prefix)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(work.seed))
    for number in order.tolist():
        _distil(student, context, samples[number].tokens, optimizer)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    memory = _imported(work, student, base, samples[0].tokens)
    answers = sum(len(sample) - sample.start for sample in samples)
    positions = sum(len(sample) - 1 for sample in samples)
    return Timed(cpu, wall, None, len(samples), answers, positions, memory)


def _distil(student: Any, context: torch.Tensor, tokens: torch.Tensor, optimizer: Any) -> None:
    """Makes one step of the example: a teacher pass with the adapter off, then the student's."""
    read = torch.cat((context, tokens))[None]
    with torch.no_grad(), student.disable_adapter():
        wanted = student(input_ids=read, use_cache=False).logits[0, len(context) : -1]
    logits = student(input_ids=tokens[None], use_cache=False).logits[0, :-1]
    ids = wanted.topk(TOP_K, dim=-1).indices
    teacher = wanted.log_softmax(dim=-1).gather(-1, ids)
    found = logits.log_softmax(dim=-1).gather(-1, ids)
    loss = -(teacher.exp() * found).sum(dim=-1).mean()
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()


def _imported(work: Work, student: Any, base: Any, tokens: torch.Tensor) -> KVMemory:
    """Returns the adapter as a memory, after both gave the same logits over it."""
    with tempfile.TemporaryDirectory() as folder:
        student.save_pretrained(folder)
        source = kv.runtime.text.encode(work.tokenizer, work.context)
        memory = from_peft(folder, work.model, work.tokenizer, source=source, strict=False)
    with torch.no_grad():
        theirs = student(input_ids=tokens[None], use_cache=False).logits[0]
        with student.disable_adapter():
            alone = student(input_ids=tokens[None], use_cache=False).logits[0]
    with kv.attach(work.model, memory) as session:
        ours = session.forward(tokens[None])[0]
    apart, unread = float((theirs - ours).abs().max()), float((theirs - alone).abs().max())
    if apart > 1e-3 or unread < 0.1:
        raise SystemExit(
            f"peft's forward does not attend to its prefix as kvedit does: logits differ by "
            f"{apart:.2g} from kvedit's over the same prefix, and by {unread:.2g} without it"
        )
    return memory


@dataclass(frozen=True)
class Round:
    """One document and seed: every arm's training, and what its cartridge recalls."""

    document: str
    seed: int
    timed: dict[str, Timed]
    report: RecallReport


def main() -> None:
    """Trains in turns, asks, prints."""
    options = _options()
    torch.set_num_threads(1)
    model, tokenizer = kv.load(options.model)
    base, _ = kv.load(options.model)  # peft changes the model that it is given
    rounds: list[Round] = []
    for seed in options.seeds:
        for document in options.documents:
            rounds.append(_round(model, tokenizer, base, document, seed, len(rounds), options))
            if options.json:
                _write(Path(options.json), rounds)
    _print(rounds)


def _round(
    model: Any, tokenizer: Any, base: Any, document: str, seed: int, turn: int, options: Any
) -> Round:
    text = (DOCUMENTS / f"{document}.txt").read_text(encoding="utf-8").strip()
    facts = json.loads((DOCUMENTS / f"{document}.json").read_text(encoding="utf-8"))
    context = context_of(tokenizer, document.replace("_", " ").title(), text)
    pairs = [(q, a) for fact in facts for q, a in fact["train"]][: options.samples]
    work = Work(model, tokenizer, context, pairs, options.slots, seed)
    full = kv.capture(model, tokenizer, context)  # also: the model is looked at before any timing
    samples = samples_from(model, tokenizer, pairs, full, top_k=TOP_K)
    print(f"round {turn}: {document}, seed {seed}: {full.slots} tokens, {options.slots} slots, "
          f"{len(samples)} samples", flush=True)  # fmt: skip
    arms: dict[str, tuple[Any, ...]] = {}
    for lr in options.lr:
        for pack in options.pack:
            arms[f"kvedit, lr {lr:g}, pack {pack}"] = (kvedit_run, lr, pack)
        arms[f"peft, lr {lr:g}"] = (peft_run, lr, samples, base)
    timed = _timed(work, arms, turn)
    start = initial.first_tokens(model, tokenizer, full, options.slots)
    memories = {"start": start, **{name: one.memory for name, one in timed.items()}}
    probes = [RecallQuestion(f["probe"], tuple(f["answers"]), grading=("f1",)) for f in facts]
    report = recall(model, tokenizer, memories, probes, full=full, max_new_tokens=ANSWER_TOKENS)
    return Round(document, seed, timed, report)


def _timed(work: Work, arms: dict[str, tuple[Any, ...]], turn: int) -> dict[str, Timed]:
    found = {}
    for name in list(arms)[:: -1 if turn % 2 else 1]:
        run, *given = arms[name]
        found[name] = run(work, *given)
        one = found[name]
        teacher = "" if one.teacher_cpu is None else f", teacher {one.teacher_cpu:.1f} s of it"
        print(f"  {name}: {one.steps} steps, {one.supervised} answer tokens "
              f"({one.all_positions} with loss), CPU {one.cpu:.1f} s{teacher}, wall "
              f"{one.wall:.1f} s", flush=True)  # fmt: skip
    return {name: found[name] for name in arms}


def _cases(rounds: list[Round], name: str, metric: str) -> dict[str, float]:
    """Returns document and question to the mean over seeds: questions are the cases."""
    found: dict[str, list[float]] = {}
    for one in rounds:
        for key, value in one.report.values(name, metric).items():
            found.setdefault(f"{one.document}/{key}", []).append(value)
    return {key: fmean(values) for key, values in found.items()}


def _print(rounds: list[Round]) -> None:
    arms, names = list(rounds[0].timed), list(rounds[0].report.names)
    print(f"\n{'':28} {'tokens/CPU s':>12} {'KL':>24} {'KL, gold':>24} {'NLL, gold':>9}")
    for name in names:
        speed = f"{median(r.timed[name].speed for r in rounds):.1f}" if name in arms else ""
        kl, gold, nll = (
            mean(list(_cases(rounds, name, metric).values()))
            for metric in ("kl", "kl_gold", "nll_gold")
        )
        print(f"{name:28} {speed:>12} {kl!s:>24} {gold!s:>24} {nll.value:9.3f}")
    print(f"\n{'kvedit against peft':48} {'speed':>20} {'KL':>26} {'KL, gold':>26}")
    theirs = [name for name in arms if name.startswith("peft")]
    for ours in (name for name in arms if name not in theirs):
        for other in theirs:
            each = sorted(r.timed[ours].speed / r.timed[other].speed for r in rounds)
            ratio = f"{median(each):.2f} ({each[0]:.2f} to {each[-1]:.2f})"
            apart = [
                str(paired_difference(_cases(rounds, ours, m), _cases(rounds, other, m)))
                for m in ("kl", "kl_gold")
            ]
            print(f"{f'{ours} - {other}':48} {ratio:>20} {apart[0]:>26} {apart[1]:>26}")
    print(f"{len(rounds)} rounds. Answer tokens per CPU second, median; ratios of pairs, median, "
          f"least and most.\nKL to the full context, nats per token, on "
          f"{len(_cases(rounds, names[0], 'kl'))} held-out questions, means over seeds first;\n"
          "95 % bootstrap intervals over questions, paired below.")  # fmt: skip


def _write(path: Path, rounds: list[Round]) -> None:
    data = [
        {
            "document": one.document,
            "seed": one.seed,
            "timed": {
                name: {k: v for k, v in vars(timed).items() if k != "memory"}
                for name, timed in one.timed.items()
            },
            "recall": one.report.to_json(),
        }
        for one in rounds
    ]
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    known = sorted(path.stem for path in DOCUMENTS.glob("*.txt"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--documents", nargs="+", default=known, choices=known)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--slots", type=int, default=60)
    parser.add_argument("--lr", type=float, nargs="+", default=[5e-3], help="of both")
    parser.add_argument("--pack", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", help="file for all figures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
