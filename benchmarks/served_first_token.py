"""Time to the first token behind a stored memory, in vLLM: injected, against prefill of its tokens.

    .venv-vllm/bin/python benchmarks/served_first_token.py [--slots 1024] [--pairs 15]

One engine, prefix caching off, so that nothing is remembered between requests. Pairs alternate in
order; each request asks for one token, so its time is that to the first one. The memory is read
from a store on disk, its bytes checked, once; later requests find it in the worker's memory, as a
server's do; the first one is told apart.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import kvedit as kv
from kvedit.models.packaged import packaged_folder
from kvedit.serving import request

TEXT = Path(__file__).resolve().parents[1] / "docs"
QUESTION = "\nIn one word, what is this text about? It is about"


def tokens_of(tokenizer: Any, count: int) -> torch.Tensor:
    """Returns so many tokens of the project's own pages."""
    text = "\n".join(page.read_text("utf-8") for page in sorted(TEXT.glob("*.md")))
    ids: list[int] = tokenizer(text[: 12 * count], add_special_tokens=False).input_ids
    return torch.tensor(ids[:count])


def engine(model: str, store: Path, slots: int) -> Any:
    """Returns a stock engine with the connector."""
    from vllm import LLM
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(
        kv_connector="MemoryConnector", kv_role="kv_consumer",
        kv_connector_module_path="kvedit.serving.vllm.connector",
        kv_connector_extra_config={"store": str(store)},
    )  # fmt: skip
    return LLM(model=model, dtype="float32", max_model_len=slots + 256, enforce_eager=True,
               max_num_batched_tokens=slots + 256, enable_prefix_caching=False,
               kv_transfer_config=transfer)  # fmt: skip


def seconds(llm: Any, ids: list[int], extra: dict[str, Any] | None) -> tuple[float, Any]:
    """Returns the time of one request for one token, and its output."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0.0, extra_args=extra)
    start = time.perf_counter()
    (output,) = llm.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False)
    return time.perf_counter() - start, output


def main() -> None:
    """Measures pairs and prints the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=15)
    options = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    torch.set_num_threads(1)
    model, tokenizer = kv.load("smollm2-135m")
    ids = tokens_of(tokenizer, options.slots)
    with tempfile.TemporaryDirectory() as folder, kv.Store(folder) as store:
        store.put(kv.capture(model, tokenizer, ids), "pages")
        question = tokenizer(QUESTION, add_special_tokens=False).input_ids
        ask = request(store, "pages", torch.tensor(question), tokenizer)
        llm = engine(str(packaged_folder()), Path(folder), options.slots)
        rows = {"prefill": (ids.tolist() + question, None),
                "memory": (list(ask.prompt_ids), ask.extra_args)}  # fmt: skip
        first = {name: seconds(llm, *row)[0] for name, row in rows.items()}
        times: dict[str, list[float]] = {name: [] for name in rows}
        for pair in range(options.pairs):
            for name in sorted(rows, reverse=bool(pair % 2)):
                took, output = seconds(llm, *rows[name])
                times[name].append(took)
                if name == "memory":
                    ask.check(output)
    ratios = sorted(a / b for a, b in zip(times["prefill"], times["memory"], strict=True))
    for name, values in times.items():
        print(f"{name}: median {1e3 * statistics.median(values):.0f} ms of {options.pairs}, "
              f"first request {1e3 * first[name]:.0f} ms")  # fmt: skip
    print(f"prefill / memory: {statistics.median(ratios):.1f} "
          f"({ratios[0]:.1f} to {ratios[-1]:.1f})")  # fmt: skip


if __name__ == "__main__":
    main()
