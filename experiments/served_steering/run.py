"""PASTA in a stock vLLM: compiled into the keys, against the run-time bias in transformers.

    make vllm-env
    .venv-vllm/bin/python experiments/served_steering/run.py FOLDER [--n 120]

One process of the serving environment does both sides. Answers of the transformers side are kept
in FOLDER, and so are the memories: a run that is cut goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import kvedit as kv
from kvedit.editors import Compile, Pasta
from kvedit.evals import bootstrap
from kvedit.evals.conflict_library import fact_conflicts
from kvedit.evals.conflicts import Conflict
from kvedit.evals.journal import Journal
from kvedit.models.packaged import packaged_folder
from kvedit.runs.operands import supply
from kvedit.serving import request

SEED, ALPHA = 7, 0.03
"""PASTA's factor; all heads, the memory's other slots as reference. 3.5 nats."""
ROWS = ("plain", "bias", "compiled")


def memories(case: Conflict, model: Any, tokenizer: Any, queries: kv.KVMemory) -> dict[str, Any]:
    """Returns the memory unedited, with PASTA's bias, and with the bias in its keys."""
    plain = kv.capture(model, tokenizer, case.context)
    biased = Pasta(spans=(case.span_text,), alpha=ALPHA, reference="all_others", phase="decode")
    made = biased(plain)
    return {"plain": plain, "bias": made, "compiled": Compile(on_fail="refuse")(made, queries)}


def scored(model: Any, tokenizer: Any, memory: kv.KVMemory, case: Conflict) -> list[float]:
    """Returns log P of the new answer and of the old one, nats, as transformers has them."""
    found = kv.score(model, tokenizer, memory, case.prompt, [case.new, case.old])
    return [float(each.logprob) for each in found]


def steps(tokenizer: Any, memory: kv.KVMemory, case: Conflict) -> Iterator[tuple[int, str, int]]:
    """Yields every answer token as (which answer, the text before it, its id)."""
    for index, answer in enumerate((case.new, case.old)):
        ids = tokenizer(case.prompt + answer, add_special_tokens=False).input_ids
        start = len(tokenizer(case.prompt, add_special_tokens=False).input_ids)
        for at in range(start, len(ids)):
            yield index, ids[:at], ids[at]


def ask(llm: Any, store: kv.Store, tokenizer: Any, cases: Sequence[Conflict], row: str
        ) -> list[list[float]]:  # fmt: skip
    """Returns the same two numbers per case from vLLM, token by token, in one batch."""
    from vllm import SamplingParams

    prompts, sampling, places, requests = [], [], [], []
    for number, case in enumerate(cases):
        name = f"{case.key}-{row}"
        for index, before, token in steps(tokenizer, store, case):
            made = request(store, name, torch.tensor(before), tokenizer)
            prompts.append({"prompt_token_ids": list(made.prompt_ids)})
            sampling.append(SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=[token],
                                           extra_args=made.extra_args))  # fmt: skip
            places.append((number, index, token))
            requests.append(made)
    found = [[0.0, 0.0] for _ in cases]
    outputs = llm.generate(prompts, sampling, use_tqdm=True)
    for made, output, (number, index, token) in zip(requests, outputs, places, strict=True):
        made.check(output)
        found[number][index] += output.outputs[0].logprobs[0][token].logprob
    return found


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n", type=int, default=120)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    cases = fact_conflicts(args.n, SEED)
    model, tokenizer = kv.load("smollm2-135m")
    journal = Journal(args.folder / "hf.jsonl", {"kind": "served steering", "alpha": ALPHA})
    with kv.Store(args.folder / "memories") as store:
        (queries,) = supply(Compile(), store, model, tokenizer, print)
        for case in cases:
            if case.key not in journal.done:
                made = memories(case, model, tokenizer, queries)
                for row in ("plain", "compiled"):
                    store.put(made[row], f"{case.key}-{row}")
                hf = {row: scored(model, tokenizer, memory, case) for row, memory in made.items()}
                journal.add({"key": case.key, **hf})
        hf = [journal.done[case.key] for case in cases]
        del model
        served = vllm_rows(
            str(packaged_folder()), args.folder / "memories", store, tokenizer, cases
        )
    (args.folder / "served.json").write_text(json.dumps(served))
    print(table(hf, served))


def vllm_rows(folder: str, root: Path, store: kv.Store, tokenizer: Any, cases: Sequence[Conflict]
              ) -> dict[str, list[list[float]]]:  # fmt: skip
    """Returns what a stock engine says over the plain and over the compiled memories."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(
        kv_connector="MemoryConnector", kv_role="kv_consumer",
        kv_connector_module_path="kvedit.serving.vllm.connector",
        kv_connector_extra_config={"store": str(root)},
    )  # fmt: skip
    llm = LLM(model=folder, dtype="float32", max_model_len=1024, enforce_eager=True,
              enable_prefix_caching=True, kv_transfer_config=transfer)  # fmt: skip
    return {row: ask(llm, store, tokenizer, cases, row) for row in ("plain", "compiled")}


def table(hf: Sequence[Any], served: dict[str, list[list[float]]]) -> str:
    """Returns efficacy by row, paired against the run-time bias, and how far both engines are."""
    prefers: Callable[[Sequence[float]], float] = lambda pair: float(pair[0] > pair[1])  # noqa: E731
    rows = {f"transformers, {row}": [prefers(each[row]) for each in hf] for row in ROWS}
    rows |= {f"vLLM, {row}": [prefers(pair) for pair in found] for row, found in served.items()}
    base = rows["transformers, bias"]
    lines = ["| memory | efficacy | minus run-time bias |", "|---|---|---|"]
    for name, values in rows.items():
        apart = [one - other for one, other in zip(values, base, strict=True)]
        lines.append(f"| {name} | {bootstrap.mean(values, SEED)} | {bootstrap.mean(apart, SEED)} |")
    for row, found in served.items():
        worst = max(abs(a - b) for one, pair in zip(hf, found, strict=True)
                    for a, b in zip(one[row], pair, strict=True))  # fmt: skip
        lines.append(f"worst difference of an answer's log P, {row}: {worst:.2e} nats")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
