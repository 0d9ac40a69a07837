"""A small, fixed byte-level BPE tokenizer, so that tests need no download."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

__all__ = ["SPECIAL_TOKENS", "printable_ids", "tiny_tokenizer"]

SPECIAL_TOKENS: tuple[str, ...] = ("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>")
"""Special tokens in id order: their ids are 0, 1, 2, 3, 4."""

# Written out rather than trained at run time: a trainer's tie-breaking may change between versions
# of `tokenizers`, and token ids enter the digests of stored memories. `_` stands for a space.
# Later lines build on earlier ones, so the order matters.
_MERGES = """
t+h _+th _th+e _+a e+r i+n _+w _a+n o+r _+s _+i _+o r+e _+c _an+d a+t e+n in+g _+b m+e o+u s+t
_+f _+t _i+s T+h a+l l+e _+h _+n _+in _i+t _o+f g+e o+n _+Th _th+at a+n o+m r+i u+m v+er _+d _+re
_w+h _s+t _f+or _t+o _Th+e Th+e a+d a+s a+y b+er e+m k+e s+s _+m _+p _+y th+er _w+i _s+h _o+n _n+o
_d+o a+r c+h c+t i+s i+on l+d l+l q+u r+o u+st w+n _+P _+S _+e _+l _+or _+qu th+ing _th+is
_a+re er+e _w+e _w+as _c+on _c+om en+t _b+u ou+ld _y+ou _wi+th
"""

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Returns token -> id: the special tokens, the 256 bytes, then one token per merge."""
    from tokenizers.pre_tokenizers import ByteLevel

    # `alphabet()` comes in arbitrary order: sort it, ids must not depend on the process.
    pieces = [*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet()), *(a + b for a, b in merges)]
    return {piece: index for index, piece in enumerate(pieces)}


def _backend() -> Tokenizer:
    """Returns the `tokenizers` object: no normalizer, byte-level BPE, `<s>` put in front."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    parts = [rule.split("+") for rule in _MERGES.replace("_", "\u0120").split()]
    merges = [(left, right) for left, right in parts]
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(merges), merges=merges))
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # trim_offsets=False: a token that begins with a space owns that space, so the offsets of one
    # text tile it without gaps.
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
            ),
        ]
    )
    return tokenizer


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a new byte-level BPE tokenizer; every call, on every machine, gives the same one.

    It has about 370 tokens: five specials, 256 bytes, and common English pieces such as " the" and
    "ing". Decoding restores any text. `add_special_tokens=True` puts `<s>` in front; the ChatML
    template writes no `<s>`. Offsets count characters of the text and include a leading space.

    Example:
        >>> tiny_tokenizer().tokenize("in the box")
        ['in', '\u0120the', '\u0120b', 'o', 'x']
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=_backend(),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=_CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=16384,
    )


def printable_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Returns the ids whose text is printable ASCII, in order; specials are left out."""
    first = len(SPECIAL_TOKENS)
    texts = {index: tokenizer.decode([index]) for index in range(first, len(tokenizer))}
    return [index for index, text in texts.items() if text.isascii() and text.isprintable()]
