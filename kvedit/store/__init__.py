"""Store: named, versioned, content-addressed memories, in a folder and in tiers around it."""

from kvedit.store.counters import Counters
from kvedit.store.records import Details, Entry, Record
from kvedit.store.sign import Signer
from kvedit.store.store import Store

__all__ = ["Counters", "Details", "Entry", "Record", "Signer", "Store"]
