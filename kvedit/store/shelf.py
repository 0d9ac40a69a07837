"""Shelf: the parts of one open store, which its verbs share."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from kvedit.errors import CorruptMemory
from kvedit.store.counters import Counters
from kvedit.store.crypt import Cipher
from kvedit.store.index import Index
from kvedit.store.journal import Journal
from kvedit.store.layout import Layout
from kvedit.store.sign import Signer

__all__ = ["Shelf"]


@dataclass(eq=False)
class Shelf:
    """What a store is made of.

    Args:
        layout: its files.
        journal: its log.
        index: names, versions and places.
        counters: what was done.
        cipher: seals and opens, or None.
        signer: signs what is put, or None.
        trusted: public keys that a record must be signed by; empty for no such demand.
        make_room: called with the bytes of a pack before it is written.
    """

    layout: Layout
    journal: Journal
    index: Index
    counters: Counters = field(default_factory=Counters)
    cipher: Cipher | None = None
    signer: Signer | None = None
    trusted: Collection[str] = ()
    make_room: Callable[[int], None] = lambda size: None

    @property
    def namespace(self) -> str:
        """The tenant."""
        return self.layout.namespace

    def tidy(self) -> None:
        """Removes what writers that died left behind; the caller holds the lock."""
        if not self.layout.log.exists():
            return  # lost: what the notes name may be needed, and nothing goes
        packs = self.layout.intended()
        try:
            self.index.catch_up()  # it may lack what a writer wrote down and died
        except CorruptMemory:
            return  # of the log: what it names is not known; readers go on by the index
        for pack in packs:
            if not self.index.knows_pack(pack):
                self.layout.pack(pack).unlink(missing_ok=True)
                self.layout.header(pack).unlink(missing_ok=True)
        self.layout.sweep()
