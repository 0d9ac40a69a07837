"""Store: memories under names that have versions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import islice

import torch

from kvedit.errors import CorruptMemory, InvalidArgument, NotFound, UnknownName
from kvedit.memory import KVMemory
from kvedit.memory.show import human_bytes
from kvedit.store.diff import MemoryDiff, diff_memories
from kvedit.store.draft import Draft, Labels
from kvedit.store.forecast import Forecast, forecast
from kvedit.store.reader import VERIFY, Verify
from kvedit.store.recipes import RECIPE, is_recipe
from kvedit.store.records import Details, Entry, Listing, Record
from kvedit.store.refs import check_name
from kvedit.store.tiering import Tiering
from kvedit.store.where import parse_where

__all__ = ["Store"]

_KINDS = ("keys", "values", "positions", "source", "bias")


class Store(Tiering):
    """Named, versioned, content-addressed memories. The format is in ``docs/store.md``.

    Threads and processes may use one folder at once. What was put stays until it is removed.

    Args:
        path: a local folder, made by the first put; or the place of a remote store
            (``s3://bucket/prefix``, ``gs://…``, ``az://…``, ``file:///…``), which is worked on
            through a folder in the cache.
        durability: what an acknowledged put survives. ``"full"``: power loss. ``"process"``: the
            death of the process; after power loss recent puts may be gone. ``"none"``: as
            ``"process"``, and after power loss the index may need to be made again.
        namespace: the tenant. Each has names, bytes and keys of its own; nothing is shared.
        key: 32 bytes, 64 hex characters, or a file with these: everything is encrypted at rest.
        signer: signs what is put.
        trusted_keys: public keys; what none of them signed is not read.
        replay: rebuilds memories that are stored as recipes: ``kvedit.rebuild``.
        capacity: bytes that the folder may hold, as a number or a text like ``"10GiB"``.
        ram: bytes of live memories to keep in RAM.
        device: a device and the bytes of live memories to keep there.
        remote: a remote store below this folder.
        remote_options: how to reach it: endpoint, credentials, timeouts.
        pool: a shared pool of memories, a ``MooncakePool``.
        write: ``"through"`` puts to the remote before it returns; ``"back"`` when :meth:`flush`
            is called or in the background.

    Attributes:
        counters: what this object read, checked and wrote.

    Raises:
        InvalidArgument: if the path holds something else or a newer format, or an option is wrong.
        CorruptMemory: if the folder's marker is damaged.
    """

    def put(
        self,
        memory: KVMemory,
        name: str,
        message: str = "",
        tags: Iterable[str] = (),
        expect: str | None = None,
        *,
        force: bool = False,
        source: str = "",
        licence: str = "",
        metrics: Mapping[str, float] | None = None,
        ttl: float | None = None,
        codec: str = "raw",
        recipe: bool = False,
    ) -> Record:
        """Returns the newest version of ``name``, which ``memory`` has become.

        When it returns, the memory is as safe as the store's durability says; when it raises,
        nothing has changed (only a KeyboardInterrupt may leave it done). If the newest version is
        this very record, nothing is written and that version is returned.

        Args:
            memory: the memory.
            name: ASCII letters, digits and ``._-/``.
            message: what to say about this version.
            tags: labels of this version.
            expect: record digest that the name must point to, ``""`` for a name that must not
                exist; None for where it points when the put begins.
            force: put wherever the name points; accept a codec that is coarser than the edit.
            source: where the text came from.
            licence: of the text.
            metrics: evaluation results by name.
            ttl: seconds until this version goes by itself.
            codec: ``"raw"``, ``"planes-zstd"`` (lossless), ``"int8"``, ``"int4"``, ``"int2"``
                (lossy: what is stored is another memory with another digest, see docs/codecs.md).
            recipe: keep only the steps, if they give the same memory again, bit by bit.

        Raises:
            InvalidArgument: if an argument can't be used, or the codec's error is not far below
                the edit.
            MutatedMemory: if a tensor of the memory was written in place.
            RaceLost: if somebody else moved the name meanwhile.
            CapacityExceeded: if there is no room, and nothing that may go.
        """
        labels = Labels.of(message, tags, source, licence, metrics, ttl)
        draft = Draft(memory, name, labels, RECIPE if recipe else codec, expect, force)
        return self._put([draft])[0]

    def put_many(
        self,
        memories: Mapping[str, KVMemory],
        message: str = "",
        tags: Iterable[str] = (),
        *,
        force: bool = False,
        source: str = "",
        licence: str = "",
        ttl: float | None = None,
        codec: str = "raw",
    ) -> list[Record]:
        """Returns the newest versions of many names: all are put or none, in one write.

        Args:
            memories: name to memory.
            message: what to say about each.
            tags: labels of each.
            force: put wherever the names point.
            source: where the text came from.
            licence: of the text.
            ttl: seconds until they go by themselves.
            codec: how to store them.

        Raises:
            InvalidArgument: if there is none, or an argument can't be used.
            MutatedMemory: if a tensor of a memory was written in place.
            RaceLost: if somebody else moved one of the names meanwhile.
            CapacityExceeded: if there is no room, and nothing that may go.
        """
        if not memories:
            raise InvalidArgument("put_many needs at least one memory: {name: memory}")
        labels = Labels.of(message, tags, source, licence, None, ttl)
        items = memories.items()
        return self._put([Draft(m, name, labels, codec, None, force) for name, m in items])

    def get(
        self,
        ref: str,
        layers: Iterable[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        verify: Verify = "full",
        slots: tuple[int, int] | None = None,
        prefill: float | None = None,
    ) -> KVMemory:
        """Returns a memory, every byte of it checked.

        Tensors that lie in one piece on the disk are mapped, not copied. Where the folder has
        been made room in, the bytes come from the tiers below.

        Args:
            ref: ``"name"``, ``"name@{k}"`` (k versions before the newest), a record or content
                digest, or at least six characters of one. A name goes before a prefix.
            layers: only these layers; negative numbers count from the end.
            device: where to put the tensors.
            dtype: dtype of keys and values; another dtype changes the content digest.
            verify: ``"full"`` checks every byte: BLAKE3 of every block that this store object
                reads for the first time, which no other bytes have, and XXH3-128 of what is
                stored from then on, which finds damage and no forgery. ``"deep"`` checks BLAKE3
                each time (so does ``"full"`` where there are trusted keys), ``"fast"`` XXH3-128
                alone. ``"off"`` checks nothing but sizes and the manifest, and marks the memory
                as unverified.
            slots: only these slots of each layer, first and one past the last.
            prefill: tokens per second of the model here: warns where, by the speeds seen so far,
                computing the memory again would have been faster.

        Raises:
            NotFound: if the store has no such memory.
            InvalidArgument: if several memories fit the prefix, or an argument is wrong.
            CorruptMemory: if stored bytes are not those that were put.
            UnknownName: if the memory lacks one of the layers.
            UntrustedMemory: if the store has trusted keys and none of them signed it.
        """
        if verify not in VERIFY:
            raise InvalidArgument(f"verify must be one of {', '.join(VERIFY)}, found {verify!r}")
        try:
            record = self._resolve(ref)
        except NotFound:
            self.counters.add(misses=1)
            raise
        wanted = None if layers is None else list(layers)
        if prefill is not None and (seen := self._forecast(record, prefill)).recompute:
            warnings.warn(f"{record.name}: {seen}", RuntimeWarning, stacklevel=2)
        try:
            if wanted is None and slots is None:
                memory = self._get_whole(record, verify)
            else:
                memory = self._read(record, wanted, slots, verify)
        except CorruptMemory as error:
            if self._shelf.index.by_digest(record.record) is None:  # removed while we read
                raise self._finder.unknown(ref) from error
            raise
        self.counters.add(hits=1)
        return memory if device is None and dtype is None else memory.to(device, dtype)

    def forecast(self, ref: str, prefill: float) -> Forecast:
        """Returns whether loading a memory will be faster than computing it again.

        It knows the speeds that this object has seen: get something first.

        Args:
            ref: as in :meth:`get`.
            prefill: tokens per second of the model here.

        Raises:
            NotFound: if the store has no such memory.
            InvalidArgument: if no prefill can make it, or the speed is not positive.
        """
        return self._forecast(self._resolve(ref), prefill)

    def _forecast(self, record: Record, prefill: float) -> Forecast:
        return forecast(self._shelf, self._finder, record, prefill)

    def peek(
        self,
        ref: str,
        layers: Iterable[int] | None = None,
        kinds: Collection[str] = ("keys", "values"),
        heads: Iterable[int] | None = None,
        slots: tuple[int, int] | None = None,
    ) -> dict[int, dict[str, torch.Tensor]]:
        """Returns some tensors of a memory by layer and kind; only their blocks are read.

        Args:
            ref: as in :meth:`get`.
            layers: only these layers.
            kinds: ``"keys"``, ``"values"``, ``"positions"``, ``"source"``, ``"bias"``.
            heads: only these heads (query heads for ``"bias"``).
            slots: only these slots, first and one past the last.

        Raises:
            NotFound: if the store has no such memory.
            UnknownName: if it lacks one of the layers, or there is no such kind.
            InvalidArgument: if it lacks one of the heads or slots.
            CorruptMemory: if stored bytes are not those that were put.
        """
        record = self._resolve(ref)
        wanted = None if layers is None else list(layers)
        chosen = {kinds} if isinstance(kinds, str) else set(kinds)
        for kind in sorted(chosen - set(_KINDS)):
            raise UnknownName("kind", kind, _KINDS)
        found: dict[int, dict[str, torch.Tensor]] = {}
        for (layer, kind), tensor in self._tensors(record, wanted, chosen, slots).items():
            of_heads = heads is not None and tensor.ndim > 1
            part = _heads(tensor, list(heads or ()), kind) if of_heads else tensor
            found.setdefault(layer, {})[kind] = part
        return found

    def show(self, ref: str) -> Details:
        """Returns what is known of a memory without reading its blocks.

        Raises:
            NotFound: if the store has no such memory.
            CorruptMemory: if its manifest is damaged.
        """
        record = self._resolve(ref)
        if is_recipe(record):
            return self._show_recipe(record)
        manifest = self._finder.manifest(record.record, record.content)
        blocks = {block.digest: block for part in manifest.parts.values() for block in part.blocks}
        packs = {pack for pack, _, _ in self._shelf.index.locate(blocks).values()}
        source = manifest.document["source"]
        return Details(
            record=record,
            codec=manifest.codec,
            blocks=len(blocks),
            stored=sum(block.nbytes for block in blocks.values()),
            packs=tuple(sorted(packs)),
            next_position=manifest.document["next_position"],
            rules=len(manifest.document["rules"]),
            biased=tuple(layer for layer, kind in sorted(manifest.parts) if kind == "bias"),
            text=None if source is None else source["text"],
            lineage=tuple(manifest.lineage.describe().splitlines()),
        )

    def ls(
        self,
        where: str | Callable[[Entry], bool] | None = None,
        limit: int | None = None,
        after: str = "",
    ) -> list[Entry]:
        """Returns names with their newest versions, in order of the names.

        Args:
            where: a pattern for names (``"handbook/*"``), a condition (``"tag = refunds and
                metric.kl < 0.01"``, see docs/store.md), or a function of entries.
            limit: how many at most.
            after: only names behind this one: the last one of the page before.

        Raises:
            InvalidArgument: if the condition can't be understood.
        """
        self._learn()
        most = -1 if limit is None else limit
        if callable(where):
            entries = self._shelf.index.entries(after=after)
            return Listing(islice(filter(where, entries), limit))
        if where is None:
            return Listing(self._shelf.index.entries(after=after, limit=most))
        condition, values = parse_where(where).sql()
        return Listing(self._shelf.index.entries(condition, values, after, most))

    def log(self, name: str) -> list[Record]:
        """Returns the versions of a name, the newest first.

        Raises:
            NotFound: if there is no such name.
        """
        self._resolve(check_name(name))
        versions = self._shelf.index.versions(name)
        if not versions:
            raise self._finder.unknown(name)
        return Listing(versions)

    def names(self) -> list[str]:
        """Returns all names in order."""
        self._learn()
        return self._shelf.index.names()

    def diff(self, a: str, b: str, slots: int = 10) -> MemoryDiff:
        """Returns where two memories differ: blocks, layers and heads, slots, steps.

        How differently they behave is :func:`kvedit.divergence`.

        Args:
            a: one memory.
            b: the other.
            slots: how many of the slots that changed most to name.

        Raises:
            NotFound: if one is not there.
            CorruptMemory: if stored bytes are not those that were put.
            IncompatibleModel: if they come from models of different shape.
        """
        return diff_memories(self, a, b, slots)

    def rebuild_index(self) -> None:
        """Makes the index again from the log; a missing or unreadable index does so by itself.

        Raises:
            CorruptMemory: if the log is damaged.
        """
        if self._shelf.layout.exists():
            with self._shelf.layout.lock:
                self._shelf.index.rebuild()

    def __contains__(self, ref: object) -> bool:
        """Whether ``ref`` names exactly one memory."""
        try:
            self._ask(ref)
            return self._finder.find(ref) is not None
        except (NotFound, InvalidArgument):
            return False

    def __len__(self) -> int:
        """Number of names."""
        return len(self.names())

    def __bool__(self) -> bool:
        """True, also while empty."""
        return True

    def __repr__(self) -> str:
        """Folder, names and size."""
        names, size = self._shelf.index.totals()
        return (
            f"Store({str(self.path)!r}): {names} names, {human_bytes(size)} in their newest "
            "versions"
        )


def _heads(tensor: torch.Tensor, heads: list[int], kind: str) -> torch.Tensor:
    for head in heads:
        if not -tensor.shape[0] <= head < tensor.shape[0]:
            raise InvalidArgument(f"{kind} have heads 0 to {tensor.shape[0] - 1}, found {head}")
    return tensor[torch.tensor(heads, dtype=torch.int64)]
