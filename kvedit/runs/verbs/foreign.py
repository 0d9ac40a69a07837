"""``export --to`` and ``import --from``: other libraries' formats, each read back and compared."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvedit.errors import InvalidArgument
from kvedit.runs.verbs.base import Outcome
from kvedit.runs.verbs.deltas import check_no_delta, export_delta, import_delta
from kvedit.runs.verbs.options import add_model, load_model, load_model_of, note, open_store

if TYPE_CHECKING:
    from kvedit.interop.checking import ReadBack
    from kvedit.interop.formats import Format
    from kvedit.memory import KVMemory

__all__ = [
    "OWN",
    "add_foreign_export",
    "add_foreign_import",
    "check_own",
    "export_to",
    "form_of",
    "import_from",
]

OWN = "kvedit"
"""kvedit's own one-file format: packs, checked byte by byte, encrypted where that is asked for."""

# Named here: the parser imports no format.
_MEMORIES = (OWN, "peft", "hazy", "hub", "safetensors")
_TO, _FROM = (*_MEMORIES, "delta", "gguf", "lm_eval"), (*_MEMORIES, "delta", "gguf", "svec")

# From what a user types to the argument of a format's export.
_OPTIONS = {
    "kind": "kind",
    "frozen": "frozen",
    "file_dtype": "dtype",
    "base_model": "base_model",
    "revision": "revision",
    "remainder": "remainder",
    "with_source": "source",
    "licence": "licence",
    "strength": "strength",
    "overwrite": "overwrite",
}
_OTHERS = ("refit", "push", "public", "no_check", "no_strict", "model", "dtype", "device", "attn")


def add_foreign_export(parser: ArgumentParser) -> None:
    """Adds ``--to`` and what the formats take."""
    parser.add_argument(
        "--to",
        choices=_TO,
        default=OWN,
        help="kvedit, the default: one file with everything; peft: an adapter; hazy: tensors of "
        "a HazyResearch cartridge; hub: a folder with a card; safetensors: one plain file; of a "
        "steering delta, delta: one plain file; gguf: a control vector; lm_eval: a folder "
        "for its model steered",
    )
    other = parser.add_argument_group("other formats (docs/interop.md)")
    other.add_argument("--kind", choices=("cartridge", "prefix-tuning"), help="of a PEFT adapter")
    other.add_argument(
        "--frozen", type=int, metavar="N", help="leading slots left alone in training (1)"
    )
    other.add_argument("--file-dtype", metavar="DTYPE", help="float32, bfloat16 or float16")
    other.add_argument("--base-model", metavar="NAME", help="what PEFT shall load")
    other.add_argument("--revision", metavar="REV", help="of the base model, for PEFT")
    other.add_argument(
        "--remainder",
        choices=("keep", "refuse", "drop"),
        help="hazy: slots beyond whole pages of 16, which Tokasaurus cuts off",
    )
    other.add_argument(
        "--refit",
        action="store_true",
        help="peft, hazy: fit values anew where there is attention bias, which they can't say",
    )
    other.add_argument(
        "--with-source", action="store_true", help="hub, safetensors: tokens and text go along"
    )
    other.add_argument("--licence", metavar="TEXT", help="of the text; default: as stored")
    other.add_argument("--strength", type=float, metavar="X", help="lm_eval: the coefficient (1)")
    other.add_argument("--overwrite", action="store_true", help="replace what such an export wrote")
    other.add_argument("--push", metavar="OWNER/NAME", help="put the folder on the hub, too")
    other.add_argument("--public", action="store_true", help="a repository that all may read")
    _add_check(parser)


def add_foreign_import(parser: ArgumentParser) -> None:
    """Adds ``--from``, and the model that the files are checked against."""
    parser.add_argument(
        "--from",
        dest="form",
        choices=_FROM,
        help="the format; default: told by what lies there. With hub, peft or hazy, the file may "
        "be a repository OWNER/NAME",
    )
    parser.add_argument("--revision", metavar="REV", help="of a repository")
    _add_check(parser)


def _add_check(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--no-check", action="store_true", help="other formats: don't read back and compare logits"
    )
    parser.add_argument(
        "--no-strict", action="store_true", help="other formats: take another model of this shape"
    )
    add_model(parser, default="the one that the memory, or the file, names; other formats only")


def check_own(args: Namespace, flag: str) -> None:
    """Raises InvalidArgument if an option is given that kvedit's own format does not know."""
    for name in (*_OPTIONS, *_OTHERS):
        if _is_given(getattr(args, name, None)):
            raise InvalidArgument(
                f"--{name.replace('_', '-')} is for other formats: say which with {flag}"
            )


def form_of(args: Namespace) -> str:
    """Returns the name of the format to import: the user's word, or what lies there."""
    if args.form is not None:
        return str(args.form)
    from kvedit.interop import detect

    return detect(args.file) or OWN


def export_to(args: Namespace) -> Outcome:
    """Returns what an export to another format did, after reading it back.

    Raises:
        InvalidArgument: if an option does not fit, or the memory can't be said in that format.
    """
    from kvedit.interop.formats import format_of

    form = format_of(args.to)
    options = _options(args, form)
    store = open_store(args)
    record = store.show(args.ref).record
    memory = store.get(record.record)
    if form.delta:
        return export_delta(args, form, record, memory, options)
    check_no_delta(record, memory, form)
    if "licence" in form.options:
        options.setdefault("licence", record.licence)
    # Loaded first: without the model nothing is written either.
    live = None if args.no_check and not args.refit else _fitting(memory, args)
    if args.refit:
        options["refit"] = _refit(live)
    done = form.write(memory, args.file, **options)
    found = None
    if live is not None and not args.no_check:
        found = _compared(live, memory, form.read(args.file, *live, **_strict(args)), args)
    address = _pushed(args) if args.push else None
    data = {
        "name": record.name,
        "record": record.record,
        "file": args.file,
        "format": done.format,
        "slots": done.slots,
        "moved": done.moved,
        "notes": done.notes,
        "check": _as_data(found),
        "address": address,
    }
    moved = f", keys turned by {done.moved} positions" if done.moved else ""
    lines = [f"{record.name} {record.record[:12]} is in {args.file} ({done.slots} slots{moved})"]
    lines += [str(found)] if found else []
    lines += [f"note: {one}" for one in done.notes] + ([address] if address else [])
    return Outcome(data, "\n".join(lines))


def import_from(args: Namespace, name: str) -> Outcome:
    """Returns what an import from another format did, after reading it back from the store.

    Raises:
        InvalidArgument: if an option does not fit, or a model must be named.
    """
    from kvedit.interop.formats import format_of
    from kvedit.interop.live import imported_facts
    from kvedit.store.refs import check_name

    form = format_of(name)
    form.check_way("from")
    if args.record or args.file_key or args.trusted:
        raise InvalidArgument(
            f"--record, --file-key and --trusted are for kvedit's own files: {name} has neither "
            "records nor signatures"
        )
    target = check_name(args.name or Path(args.file).resolve().stem)
    if form.delta:
        return import_delta(args, form, target)
    memory, live = _read(args, form)
    store = open_store(args)
    licence = str(imported_facts(memory).get("licence", ""))
    record = store.put(memory, target, f"imported from {name}", licence=licence, force=args.force)
    found = _compared(live, memory, store.get(record.record), args) if live else None
    data = {**vars(record), "format": name, "check": _as_data(found)}
    return Outcome(data, "\n".join([str(record), *([str(found)] if found else [])]))


def _is_given(value: Any) -> bool:
    return value is not None and value is not False  # 0 is a number like any other


def _options(args: Namespace, form: Format) -> dict[str, Any]:
    given = {name: value for name in _OPTIONS if _is_given(value := getattr(args, name))}
    for name in given:
        if _OPTIONS[name] not in form.options:
            raise InvalidArgument(f"--{name.replace('_', '-')} means nothing to {form.name}")
    if args.refit and (form.delta or not form.needs_model):
        raise InvalidArgument(f"--refit means nothing to {form.name}, which keeps the bias")
    if args.file_key:
        raise InvalidArgument(f"--file-key: files of {form.name} are not encrypted")
    if args.key_file and not args.plain:
        raise InvalidArgument(
            f"the store is encrypted and files of {form.name} are not: --plain lets it leave"
        )
    if (args.push or args.public) and (form.delta or not (form.folder and args.push)):
        raise InvalidArgument("--push puts a folder on the hub: --to hub, peft or hazy")
    if "kind" in given:
        given["kind"] = given["kind"].upper().replace("-", "_")
    return {_OPTIONS[name]: value for name, value in given.items()}


def _fitting(memory: KVMemory, args: Namespace) -> Any:
    """Returns model and tokenizer of a memory, which can be attached to the model."""
    from kvedit.models.inspection import inspect
    from kvedit.runtime.gate import admit

    model, tokenizer = load_model_of(memory, args)
    admit(memory, inspect(model, tokenizer).spec, model.dtype, not args.no_strict)
    return model, tokenizer


def _refit(live: Any) -> Any:
    """Returns what fits values anew for no bias: Attention Matching of all slots."""
    from kvedit.editors import build
    from kvedit.runtime import ModelReader

    editor = build("attention_matching", budget=1.0, bias=False, fold_bias=True)
    return lambda memory: editor(memory, reader=ModelReader(*live))


def _pushed(args: Namespace) -> str:
    from kvedit.interop import push_folder

    if not args.public:
        note(f"{args.push} is made private if it is new; --public lets all read it")
    return str(push_folder(args.file, args.push, private=not args.public))


def _read(args: Namespace, form: Format) -> tuple[KVMemory, Any]:
    """Returns the memory of a file, and the live model that it is checked against, or None."""
    options = _strict(args) | ({"revision": args.revision} if args.revision else {})
    if args.revision and not form.folder:
        raise InvalidArgument("--revision is of a repository on the hub")
    name = args.model
    if not name and form.needs_model:
        name = _model_named_by(args.file, form)
    if name:
        live = load_model(name, args.dtype, args.device, args.attn)
        return form.read(args.file, *live, **options), None if args.no_check else live
    memory = form.read(args.file, **options)
    if args.no_check:
        return memory, None
    live = load_model_of(memory, args)
    return form.read(args.file, *live, **options), live


def _model_named_by(place: str, form: Format) -> str:
    from kvedit.interop.peft import base_model_of

    found = base_model_of(place) if form.name == "peft" else ""
    if not found:
        raise InvalidArgument(f"{place} does not say which model it is for: name it with --model")
    return found


def _strict(args: Namespace) -> dict[str, Any]:
    return {"strict": not args.no_strict}


def _compared(live: Any, memory: KVMemory, again: KVMemory, args: Namespace) -> ReadBack:
    from kvedit.interop import check

    found: ReadBack = check(*live, memory, again, strict=not args.no_strict)
    return found


def _as_data(found: ReadBack | None) -> dict[str, Any] | None:
    return None if found is None else {**vars(found), "relative": found.relative}
