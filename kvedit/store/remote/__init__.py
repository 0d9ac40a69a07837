"""Remote places: object stores that hold packs, manifests and refs."""

from kvedit.store.remote.objects import Objects

__all__ = ["Objects"]
