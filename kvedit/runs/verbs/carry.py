"""``export`` and ``import``: one memory out of a store and into another, or to and from others."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from kvedit.runs.verbs.base import Outcome, Verb
from kvedit.runs.verbs.foreign import (
    OWN,
    add_foreign_export,
    add_foreign_import,
    check_own,
    export_to,
    form_of,
    import_from,
)
from kvedit.runs.verbs.options import REF, add_store, open_store

__all__ = ["EXPORT", "IMPORT"]


def _add_export(parser: ArgumentParser) -> None:
    parser.add_argument("ref", help=REF)
    parser.add_argument("file", help="the file, or folder, to write; it must not exist")
    # --key-file is the store's.
    parser.add_argument("--file-key", metavar="FILE", help="encrypt the file with this key")
    parser.add_argument(
        "--plain", action="store_true", help="let an encrypted memory leave in the clear"
    )
    add_foreign_export(parser)
    add_store(parser)


def _export(args: Namespace) -> Outcome:
    if args.to != OWN:
        return export_to(args)
    check_own(args, "--to")
    from kvedit.memory.show import human_bytes

    store = open_store(args)
    record = store.show(args.ref).record
    key = Path(args.file_key) if args.file_key else None
    size = store.export(args.ref, args.file, key=key, plain=args.plain)
    data = {"name": record.name, "record": record.record, "file": args.file, "bytes": size}
    text = f"{record.name} {record.record[:12]} is in {args.file} ({human_bytes(size)})"
    return Outcome(data, text)


def _add_import(parser: ArgumentParser) -> None:
    parser.add_argument("file", help="a file that kvedit export wrote, or what --from says")
    parser.add_argument(
        "--name", help="where to put it; default: the name that it had, else that of the file"
    )
    parser.add_argument("--record", metavar="DIGEST", help="the record digest that it must have")
    parser.add_argument("--file-key", metavar="FILE", help="opens an encrypted file")
    parser.add_argument(
        "--force", action="store_true", help="put also where somebody else moved the name"
    )
    add_foreign_import(parser)
    add_store(parser)


def _import(args: Namespace) -> Outcome:
    form = form_of(args)
    if form != OWN:
        return import_from(args, form)
    check_own(args, "--from")
    key = Path(args.file_key) if args.file_key else None
    record = open_store(args).import_(args.file, args.name, args.record, key, args.force)
    return Outcome(record, str(record))


EXPORT = Verb(
    "export",
    "write a memory with all it needs to one file, or as another library has it",
    _add_export,
    _export,
    "kvedit export handbook handbook.safetensors",
)
IMPORT = Verb(
    "import",
    "put the memory of an exported file, or of another library's, into a store",
    _add_import,
    _import,
    "kvedit import handbook.safetensors --name theirs/handbook",
)
