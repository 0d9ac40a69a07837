"""A model for lm-evaluation-harness that runs any of its tasks behind a memory, or steered.

The harness is imported when the model is made, not before::

    lm = evaluated(model, tokenizer, memory)
    lm_eval.simple_evaluate(model=lm, tasks=["arc_easy"])

Its cache of answers (``use_cache``) knows the request and not the memory: one file per memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from kvedit.errors import InvalidArgument, MissingDependency
from kvedit.interop.answering import Answers
from kvedit.memory import Delta, KVMemory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["evaluated", "model_class"]

_HEAT = ("temperature", "top_p", "top_k", "min_p")
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_NEW_TOKENS = 256  # the harness's own default


def evaluated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    memory: KVMemory | None = None,
    *,
    delta: Delta | KVMemory | None = None,
    strength: float = 1.0,
    steering: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Returns a model for ``lm_eval.simple_evaluate(model=…)``.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        memory: stands in front of every request; None for the model alone.
        delta: added while the model runs; None for no steering.
        strength: of the delta.
        steering: further arguments of :func:`kvedit.steering.steered`, such as ``scope``.
        **options: of :class:`~kvedit.interop.answering.Answers`: ``batch``, ``chat``, ``prefix``,
            ``max_length``, ``strict``.

    Raises:
        MissingDependency: without lm-eval.
        InvalidArgument: if steering is described without a delta.
        IncompatibleModel: if memory or delta is of another model.
    """
    made = model_class()
    if delta is None:
        if strength != 1.0 or steering:
            raise InvalidArgument("strength and steering need a delta: pass delta=")
        return made(Answers(model, tokenizer, memory, **options))
    around = _steered(model, Delta.of(delta), strength, steering or {})
    return made(Answers(model, tokenizer, memory, around=around, **options))


def _steered(
    model: PreTrainedModel, delta: Delta, strength: float, options: dict[str, Any]
) -> partial[AbstractContextManager[Any]]:
    from kvedit.steering import steered

    return partial(steered, model, delta, strength, **options)


@cache
def model_class() -> Any:
    """Returns the subclass of ``lm_eval.api.model.LM``; its one argument is an ``Answers``.

    Raises:
        MissingDependency: without lm-eval.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise MissingDependency("lm_eval", "lm-eval", "a model for lm-eval") from error

    class MemoryLM(LM):
        """lm-evaluation-harness's model over a memory.

        Args:
            answers: what answers its requests.
        """

        def __init__(self, answers: Answers) -> None:
            super().__init__()
            self.answers = answers

        def loglikelihood(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[tuple[float, bool]]:
            """Returns log-probability and greediness of each continuation."""
            found = self.answers.likelihoods([request.args for request in requests])
            return self._kept("loglikelihood", requests, found)

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[float]:
            """Returns the log-probability of each text, as it would follow the memory."""
            found = self.answers.rolling([request.args[0] for request in requests])
            return self._kept("loglikelihood_rolling", requests, found)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            """Returns what the model says behind the memory and each context."""
            found: dict[int, str] = {}
            for rows in _grouped(requests):
                settings = _settings(requests[rows[0]].args[1])
                contexts = [requests[row].args[0] for row in rows]
                answers = self.answers.replies(contexts, **settings)
                found |= dict(zip(rows, answers, strict=True))
            listed = [found[row] for row in range(len(requests))]
            return self._kept("generate_until", requests, listed)

        def _kept(self, name: str, requests: list[Any], found: list[Any]) -> list[Any]:
            for request, answer in zip(requests, found, strict=True):
                self.cache_hook.add_partial(name, request.args, answer)
            return found

        @property
        def tokenizer_name(self) -> str:
            """What requests rendered by a chat template are kept under."""
            return str(self.answers.tokenizer.name_or_path).replace("/", "__")

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            """Returns the tokenizer's own template, if one is asked for."""
            found = self.answers.tokenizer.chat_template if chat_template else None
            return found if isinstance(found, str) else None

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            """Returns a chat as text, which then stands behind the memory."""
            return str(
                self.answers.tokenizer.apply_chat_template(
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )

    return MemoryLM


def _grouped(requests: Sequence[Any]) -> list[list[int]]:
    """Returns the rows of requests that want to be generated alike, together."""
    groups: dict[str, list[int]] = defaultdict(list)
    for row, request in enumerate(requests):
        groups[repr(sorted(request.args[1].items()))].append(row)
    return list(groups.values())


def _settings(asked: dict[str, Any]) -> dict[str, Any]:
    """Returns the harness's generation arguments as ours: greedy unless it asks for sampling."""
    given = dict(asked)
    until = given.pop("until", None) or []
    stop = [until] if isinstance(until, str) else list(until)
    new = [given.pop(name, None) for name in _LIMITS]
    sampling = given.pop("do_sample", None)
    if sampling is None:
        sampling = float(given.get("temperature") or 0.0) > 0
    if sampling:
        given["do_sample"] = True
    else:
        for name in _HEAT:
            given.pop(name, None)
    limit = next((one for one in new if one is not None), _NEW_TOKENS)
    return {"max_new_tokens": int(limit), "stop": [one for one in stop if one], **given}
