"""Generation over a cache, by transformers' own ``generate``, with every trap made explicit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from kvedit.errors import ContextTooLong, InvalidArgument, UnsupportedModel
from kvedit.models.cache_argument import CACHE_ARGUMENTS, cache_argument
from kvedit.runtime.cache import MemoryCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Stream", "sample", "sample_expanded"]

Stream = Callable[[str], None]

# What generate may not be asked for over a session, and what to do instead.
_REFUSED = {
    "num_beams": "beam search reorders rows: use kv.generate, which runs it on a cache of its own",
    "num_return_sequences": "ask for rows=n in attach, or use kv.generate",
    "assistant_model": "assisted decoding is not supported over a memory",
    "prompt_lookup_num_tokens": "assisted decoding is not supported over a memory",
    "cache_implementation": "a memory brings its own cache; static caches are not supported",
    **dict.fromkeys(CACHE_ARGUMENTS, "a session brings its own cache"),
    "position_ids": "a session knows its positions",
    "attention_mask": "a session knows its mask",
    "inputs_embeds": "pass text, messages or token ids",
}


def sample(
    model: PreTrainedModel,
    cache: MemoryCache,
    ids: torch.Tensor,
    valid: torch.Tensor,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    max_new_tokens: int,
    stop: str | Sequence[str] | None = None,
    stream: Stream | None = None,
    seed: int | None = None,
    **options: Any,
) -> list[list[int]]:
    """Returns each row's new ids, generated behind ``cache``, an end token included.

    The cache then holds the prompt and all new tokens but each row's last.

    Args:
        model: the live model, with the cache announced.
        cache: the rows' cache.
        ids: ``[batch, query]`` prompt ids, padded on the left.
        valid: ``[batch, query]`` bool; False marks padding.
        tokenizer: for stop strings, streaming and the padding id.
        max_new_tokens: tokens at most.
        stop: strings that end a row.
        stream: called with text as it comes; one row only.
        seed: seed of sampling.
        **options: passed on to ``generate``.

    Raises:
        InvalidArgument: if an option can't be combined with a session.
        ContextTooLong: if the reply could run past the model's positions.
        UnsupportedModel: if an option names a mechanism that is not supported.
    """
    _check_options(max_new_tokens, options, set())
    _check_room(cache, valid, max_new_tokens)
    settings = _settings(model, tokenizer, stop, stream, cache.rows, options)
    first = cache.fed
    made = _generate(model, cache, ids, valid, max_new_tokens, seed, settings)
    ends = _end_ids(model, settings)
    lists = [_until_end(tokens, ends) for tokens in made]
    if stop is not None and len(lists) > 1:
        counts = _until_stop(tokenizer, stop, ids.cpu(), made)
        lists = [tokens[:count] for tokens, count in zip(lists, counts, strict=True)]
    _tidy(cache, first + ids.shape[1], lists)
    return lists


def sample_expanded(
    model: PreTrainedModel,
    cache: MemoryCache,
    ids: torch.Tensor,
    valid: torch.Tensor,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    max_new_tokens: int,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    **options: Any,
) -> list[list[int]]:
    """Like :func:`sample`, for beam search and several samples per row; ends the cache's use.

    Returns:
        ``num_return_sequences`` lists of ids per row, row by row.
    """
    _check_options(max_new_tokens, options, {"num_beams", "num_return_sequences"})
    _check_room(cache, valid, max_new_tokens)
    settings = _settings(model, tokenizer, stop, None, cache.rows, options)
    # transformers repeats prompts by this number, and expects a cache that has as many rows.
    repeats = max(int(options.get(name) or 1) for name in ("num_beams", "num_return_sequences"))
    made = _generate(model, cache, ids, valid, max_new_tokens, seed, settings, repeats)
    ends = _end_ids(model, settings)
    return [_until_end(tokens, ends) for tokens in made]


def _generate(
    model: PreTrainedModel,
    cache: MemoryCache,
    ids: torch.Tensor,
    valid: torch.Tensor,
    max_new_tokens: int,
    seed: int | None,
    settings: dict[str, Any],
    repeats: int = 1,
) -> list[list[int]]:
    cache.recover()
    device = model.device
    ids, valid = ids.to(device), valid.to(device)
    starts = cache.next_positions.to(device)
    before = torch.ones(cache.rows, cache.get_seq_length(), dtype=torch.int64, device=device)
    cache.reserve(ids.shape[1] + max_new_tokens)
    if repeats > 1:
        cache.batch_repeat_interleave(repeats)
    with _seeded(seed), torch.no_grad():
        output = model.generate(
            ids,
            attention_mask=torch.cat((before, valid.long()), dim=1),
            position_ids=(starts[:, None] + valid.cumsum(dim=1) - 1).clamp_min(0),
            max_new_tokens=max_new_tokens,
            **{cache_argument(model): cache},
            **settings,
        )
    made: list[list[int]] = output[:, ids.shape[1] :].tolist()
    return made


def _check_options(max_new_tokens: int, options: dict[str, Any], allowed: set[str]) -> None:
    if max_new_tokens < 1:
        raise InvalidArgument(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    for name, value in options.items():
        harmless = value is None or (name.startswith("num_") and value == 1)
        if name in _REFUSED and name not in allowed and not harmless:
            raise UnsupportedModel(f"generate option {name}={value!r}: {_REFUSED[name]}")


def _check_room(cache: MemoryCache, valid: torch.Tensor, new: int) -> None:
    if cache.limit is None:
        return
    prompt = valid.sum(dim=1).cpu()
    last = int((cache.next_positions.cpu() + prompt).max())
    if last + new - 1 > cache.limit:
        fit = max(0, cache.limit - last + 1)
        raise ContextTooLong(
            f"{cache.spec.name} has {cache.limit} positions; memory and prompt end at {last} and "
            f"max_new_tokens={new} could run past them; at most {fit} fit"
        )


def _settings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    stop: str | Sequence[str] | None,
    stream: Stream | None,
    rows: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    asked = {name: value for name, value in options.items() if value is not None}
    sampling = any(name in asked for name in ("temperature", "top_p", "top_k", "min_p"))
    settings = {"do_sample": sampling, **asked, "use_cache": True, "disable_compile": True}
    if not settings["do_sample"]:
        # A model's own defaults for sampling would draw warnings in greedy decoding.
        settings.update(temperature=None, top_p=None, top_k=None)
    end = model.generation_config.eos_token_id
    pad = model.generation_config.pad_token_id
    if pad is None:
        first_end = end[0] if isinstance(end, list) else end
        settings["pad_token_id"] = 0 if first_end is None else first_end
    if stop is not None or stream is not None:
        if tokenizer is None:
            raise InvalidArgument("stop strings and streaming need a tokenizer")
        if stop is not None:
            settings.update(stop_strings=stop, tokenizer=tokenizer)
        if stream is not None:
            settings["streamer"] = _streamer(tokenizer, stream, rows)
    return settings


def _streamer(tokenizer: PreTrainedTokenizerBase, stream: Stream, rows: int) -> Any:
    from transformers import TextStreamer

    if rows != 1:
        raise InvalidArgument(f"streaming needs one row, this session has {rows}")

    class Caller(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                stream(text)

    return Caller(tokenizer, skip_prompt=True, skip_special_tokens=True)


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _end_ids(model: PreTrainedModel, settings: dict[str, Any]) -> set[int]:
    end = settings.get("eos_token_id", model.generation_config.eos_token_id)
    return set(end) if isinstance(end, list | tuple) else ({end} if end is not None else set())


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    for index, token in enumerate(tokens):
        if token in ends:
            return tokens[: index + 1]
    return tokens


def _until_stop(
    tokenizer: Any, stop: str | Sequence[str], ids: torch.Tensor, made: list[list[int]]
) -> list[int]:
    """Returns after how many new tokens each row met a stop string; behind that it was padded."""
    from transformers import StopStringCriteria

    met = StopStringCriteria(tokenizer, stop)
    whole = torch.cat((ids, torch.tensor(made, dtype=ids.dtype)), dim=1)
    counts = [len(tokens) for tokens in made]
    for count in range(counts[0], 0, -1):
        # The criterion looks at the end of what is there, as it did while tokens came.
        done = met(whole[:, : ids.shape[1] + count], None)
        for row in done.nonzero().flatten().tolist():
            counts[row] = count
    return counts


def _tidy(cache: MemoryCache, prompt_end: int, lists: list[list[int]]) -> None:
    # Rows that ended early were fed padding; those slots must not be seen by what comes next.
    longest = max(map(len, lists))
    surplus = cache.fed - (prompt_end + longest - 1)
    if surplus > 0:
        cache.crop(-surplus)
    for row, tokens in enumerate(lists):
        cache.invalidate(row, prompt_end + len(tokens) - 1)
