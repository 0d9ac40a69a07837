"""An engine to ask, and the HF oracle that it must agree with."""

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import kvedit as kv
from kvedit.memory import KVMemory

STEPS = 24
TOP = 5
TOLERANCE = 1e-3  # nats
MODULE = "kvedit.serving.vllm.connector"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}


@dataclass(frozen=True)
class Said:
    """What was said: token ids, and for each of them log-probabilities by id."""

    tokens: tuple[int, ...]
    logprobs: tuple[dict[int, float], ...]


@dataclass(frozen=True, eq=False)
class Ask:
    """One request: what the engine is sent, and what HF continues by the same tokens."""

    name: str
    ids: tuple[int, ...]
    behind: tuple[int, ...]
    memory: KVMemory | None = None
    params: dict[str, Any] | None = None
    request: Any = None


@torch.no_grad()
def said_by_hf(model: Any, ask: Ask, steps: int = STEPS) -> Said:
    """Greedy continuation over the memory as it is: own positions, bias, gaps."""
    if ask.memory is None:
        return _continued(model, None, ask.ids, steps)
    with kv.attach(model, ask.memory) as session:
        return _continued(model, session, ask.behind, steps)


def _continued(model: Any, session: Any, ids: Sequence[int], steps: int) -> Said:
    tokens, found, past = [], [], None
    step = torch.tensor([list(ids)])
    for _ in range(steps):
        if session is None:
            output = model(input_ids=step, past_key_values=past, use_cache=True)
            past, logits = output.past_key_values, output.logits[0, -1]
        else:
            logits = session.forward(step, keep=1)[0, -1]
        logprobs = logits.float().log_softmax(-1)
        top = logprobs.topk(TOP)
        found.append(dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
        tokens.append(int(logprobs.argmax()))
        step = torch.tensor([[tokens[-1]]])
    return Said(tuple(tokens), tuple(found))


def differences(expected: Said, found: Said) -> list[str]:
    """Everything in which an engine's answer differs from HF's."""
    if expected.tokens != found.tokens:
        first = next(i for i, pair in enumerate(zip(*_padded(expected, found), strict=True))
                     if pair[0] != pair[1])  # fmt: skip
        return [f"token {first} differs: {expected.tokens} != {found.tokens}"]
    wrong = []
    for step, (a, b) in enumerate(zip(expected.logprobs, found.logprobs, strict=True)):
        missing = set(a) - set(b)
        if missing:
            wrong.append(f"step {step}: tokens {missing} are not in the engine's list")
        worst = max((abs(a[token] - b[token]) for token in a if token in b), default=0.0)
        if worst >= TOLERANCE:
            wrong.append(f"step {step}: a log-probability is off by {worst:.3g}")
    return wrong


def worst(expected: Said, found: Said) -> float:
    pairs = zip(expected.logprobs, found.logprobs, strict=True)
    return max(abs(a[token] - b.get(token, float("-inf"))) for a, b in pairs for token in a)


def _padded(a: Said, b: Said) -> tuple[list[int], list[int]]:
    size = max(len(a.tokens), len(b.tokens))
    return tuple([*x.tokens, *[-1] * (size - len(x.tokens))] for x in (a, b))  # type: ignore[return-value]


class Engine:
    """A vLLM engine in a process of its own, with the connector."""

    def __init__(self, folder: Any, store: Any, module: str = MODULE, **options: Any) -> None:
        os.environ.update(ENVIRONMENT)
        from vllm import LLM
        from vllm.config import KVTransferConfig

        extra = options.pop("extra", {})
        transfer = {
            "kv_connector": "MemoryConnector",
            "kv_connector_module_path": module,
            "kv_role": "kv_consumer",
            "kv_connector_extra_config": {"store": str(store), **extra},
            **options.pop("transfer", {}),
        }
        settings: dict[str, Any] = {
            "dtype": "float32",
            "max_model_len": 1024,
            "enforce_eager": True,
            "enable_prefix_caching": True,
            "block_size": 32,
            "disable_log_stats": True,
            **options,
        }
        self.llm = LLM(str(folder), kv_transfer_config=KVTransferConfig(**transfer), **settings)

    def outputs(self, asks: Sequence[Ask], steps: int = STEPS, **options: Any) -> list[Any]:
        """vLLM's own outputs, of one batch."""
        from vllm import SamplingParams

        plain = {"temperature": 0.0, "max_tokens": steps, "ignore_eos": True, "logprobs": 20}
        sampling = []
        for ask in asks:
            extra = {"extra_args": {"kv_transfer_params": ask.params}} if ask.params else {}
            sampling.append(SamplingParams(**{**plain, **options, **extra}))
        prompts = [{"prompt_token_ids": list(ask.ids)} for ask in asks]
        return list(self.llm.generate(prompts, sampling, use_tqdm=False))

    def answers(self, asks: Sequence[Ask], one_by_one: bool = False) -> list[Said]:
        """What it says, checked to be from the memory where one was named."""
        batches = [[ask] for ask in asks] if one_by_one else [list(asks)]
        outputs = [output for batch in batches for output in self.outputs(batch)]
        for ask, output in zip(asks, outputs, strict=True):
            if ask.request is not None:
                ask.request.check(output)
        return [_said(output) for output in outputs]

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()


def _said(output: Any) -> Said:
    one = output.outputs[0]
    found = tuple({token: p.logprob for token, p in step.items()} for step in one.logprobs or ())
    return Said(tuple(one.token_ids), found)


def as_request(ask: Ask, made: Any) -> Ask:
    """The ask, sent as kvedit's own request says."""
    slots = made.slots
    return replace(
        ask,
        ids=made.prompt_ids,
        behind=made.prompt_ids[slots:],
        params=made.kv_transfer_params,
        request=made,
    )
