"""DepotTier: memories as objects of a remote store."""

from __future__ import annotations

from kvedit.errors import CorruptMemory
from kvedit.memory import KVMemory
from kvedit.store.crypt import Cipher
from kvedit.store.holding import HeldPack
from kvedit.store.manifest import Manifest
from kvedit.store.plan import plan_parts
from kvedit.store.reader import assemble, read_planned
from kvedit.store.remote.depot import Depot
from kvedit.store.sealed import open_buffer, read_paper, seal
from kvedit.store.tiers.base import Tier, TierUsage

__all__ = ["DepotTier"]


class DepotTier(Tier):
    """A remote store as a tier of whole memories.

    Args:
        depot: the remote store.
        cipher: seals and opens, or None.
    """

    durable = True

    def __init__(self, depot: Depot, cipher: Cipher | None = None) -> None:
        self.name = "remote"
        self._depot = depot
        self._cipher = cipher

    def put(self, record: str, memory: KVMemory, paper: bytes) -> None:
        """Holds a memory as one pack of its own."""
        if record in self:
            return
        pack = seal(memory, paper, self._cipher)
        self._depot.put_pack(pack.digest, b"".join(pack.chunks))
        self._depot.put_record(record, {"packs": [pack.digest], "content": memory.digest})

    def get(self, record: str) -> KVMemory | None:
        """Returns the memory of a record, every byte checked, or None."""
        document = self._depot.get_record(record)
        if document is None:
            return None
        held: list[HeldPack] = []
        for pack in document["packs"]:
            data = self._depot.read_pack(pack)
            if data is None:
                raise CorruptMemory(f"remote record {record} needs pack {pack}, which is missing")
            found = open_buffer(data, f"remote pack {pack}")
            if found.pack.digest != pack:
                raise CorruptMemory(f"remote pack {pack} is another pack")
            held.append(found)
        owner = next((one for one in held if record in one.pack.manifests), None)
        if owner is None:
            raise CorruptMemory(f"remote record {record} has no manifest in its packs")
        manifest = Manifest.parse(
            read_paper(owner, record, self._cipher), record, f"remote manifest {record}"
        )
        packs = {block: one for one in held for block in one.pack.entries}
        plan = plan_parts(list(manifest.parts.values()), packs, self._cipher)
        by_digest = {one.pack.digest: one for one in held}
        tensors = read_planned(plan, by_digest, "full", self._cipher)
        return assemble(manifest, tensors, True)

    def discard(self, record: str) -> None:
        """Forgets a record; a collection of garbage removes its packs."""
        self._depot.drop_record(record)

    def records(self) -> list[str]:
        """Returns the digests of what it holds, in order."""
        return self._depot.records()

    def usage(self) -> TierUsage:
        """Returns what it holds."""
        return TierUsage(len(self.records()), self._depot.pack_bytes())

    def __contains__(self, record: object) -> bool:
        return isinstance(record, str) and self._depot.get_record(record) is not None
