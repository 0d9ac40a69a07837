"""Store: named, versioned, content-addressed memories in a local folder."""

from kvedit.store.records import Counters, Details, Entry, Record
from kvedit.store.store import Store

__all__ = ["Counters", "Details", "Entry", "Record", "Store"]
