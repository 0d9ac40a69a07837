"""The README beside exported files: how to use them, and what stands in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

__all__ = ["PRIVACY", "card"]

PRIVACY = (
    "Keys and values hold the text that they were made from: whoever has these files can have a "
    "model repeat it, word by word. Share them only with those who may read the text."
)
"""The warning that goes with every export of a memory."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# What the hub takes as a licence by itself; all else is "other", with a name.
_LICENCES = (
    "apache-2.0",
    "bsd-3-clause",
    "cc-by-4.0",
    "cc-by-nc-4.0",
    "cc-by-sa-4.0",
    "cc0-1.0",
    "mit",
    "unknown",
)


def card(
    title: str,
    body: str,
    base_model: str,
    library: str,
    tags: Iterable[str] = (),
    licence: str = "",
    *,
    holds_text: bool = True,
) -> str:
    """Returns the text of a README with the front matter that the hub reads.

    Args:
        title: the first heading.
        body: Markdown that says how to use the files.
        base_model: the model that reads them; named to the hub if it is one of its repositories.
        library: ``library_name`` for the hub.
        tags: more tags.
        licence: of the text that the files stand for.
        holds_text: whether they are keys and values of a text, which the card then warns of.
    """
    # JSON is YAML, whatever stands in a name.
    front = [f"library_name: {json.dumps(library)}"]
    if _REPOSITORY.fullmatch(base_model):
        front.append(f"base_model: {json.dumps(base_model)}")
    if licence:
        known = licence.lower() in _LICENCES
        front.append(f"license: {json.dumps(licence.lower() if known else 'other')}")
        front += [] if known else [f"license_name: {json.dumps(licence)}"]
    own = ["kv-cache", "cartridge"] if holds_text else []
    front.append(f"tags: {json.dumps([*own, *tags])}")
    warning = [f"> **The source text is in here.** {PRIVACY}", ""] if holds_text else []
    made = f"For the model `{base_model.replace('`', '')}` and no other. Written by kvedit."
    lines = ["---", *front, "---", "", f"# {title}", "", *warning, made, "", body.strip(), ""]
    return "\n".join(lines)
