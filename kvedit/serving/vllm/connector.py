"""MemoryConnector: vLLM's KV connector that reads memories of a kvedit store.

vLLM makes two of them, one beside its scheduler and one beside its worker; they talk through the
metadata of each step alone. Start it with
``--kv-transfer-config '{"kv_connector": "MemoryConnector", "kv_role": "kv_consumer",
"kv_connector_module_path": "kvedit.serving.vllm.connector",
"kv_connector_extra_config": {"store": FOLDER}}'``, or let ``kvedit serve --engine vllm`` do it.
"""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from typing import Any

from kvedit.errors import InvalidArgument
from kvedit.serving.vllm.catalogue import Catalogue
from kvedit.serving.vllm.demands import check_engine
from kvedit.serving.vllm.loading import Loader
from kvedit.serving.vllm.matching import ServedModel, fingerprint_of_files
from kvedit.serving.vllm.plans import Load, Plans
from kvedit.serving.vllm.scheduling import Scheduling
from kvedit.serving.vllm.versions import check_version
from kvedit.serving.vllm.writing import layer_order, write
from kvedit.store import Store

try:
    from vllm.distributed.kv_transfer.kv_connector.v1 import base
except ImportError:  # so that documentation can be made where vLLM is not
    base = None

__all__ = ["MemoryConnector"]

_Base: Any = object if base is None else base.KVConnectorBase_V1
_OPTIONS = {"store", "model", "namespace", "key", "trusted_keys", "remote", "verify", "capacity"}
_STORE_OPTIONS = ("namespace", "key", "trusted_keys", "remote")
_log = logging.getLogger("vllm.kvedit")


class MemoryConnector(_Base):
    """Both halves of the connector; vLLM calls one half of the methods on each.

    ``kv_connector_extra_config`` takes ``store`` (the folder), ``model`` (the model's folder,
    where vLLM was given something else), ``namespace``, ``key`` (a file), ``trusted_keys`` and
    ``remote`` of the store, ``verify`` and ``capacity`` (bytes of loaded memories to keep).

    Args:
        vllm_config: vLLM's configuration.
        role: which half it is.
        kv_cache_config: vLLM's layout of pages.

    Raises:
        UnsupportedModel: for another version of vLLM, or if the engine can't serve memories.
        InvalidArgument: if an option is missing or unknown.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        import vllm

        check_version(vllm.__version__)
        check_engine(vllm_config, kv_cache_config)
        self._config, self._options = vllm_config, _options(vllm_config)
        group = kv_cache_config.kv_cache_groups[0]
        self._page: int = group.kv_cache_spec.block_size
        self._order = layer_order(group.layer_names)
        self._failed_pages: set[int] = set()
        self._turned_away: set[str] = set()
        # Made now, so that a model without fingerprint fails at start, and no request waits.
        if role == base.KVConnectorRole.SCHEDULER:
            _log.info("kvedit: %s answers from memories of %s", self.model.name, self.store)
            self.scheduling = Scheduling(Catalogue(self.store, self.model))
        else:
            self.loader = self._loader()

    @cached_property
    def store(self) -> Store:
        """The store that memories are read from."""
        options = {name: self._options[name] for name in _STORE_OPTIONS if name in self._options}
        if "key" in options:  # a file: the options of a server are no place for a secret
            options["key"] = Path(options["key"])
        return Store(self._options["store"], **options)

    @cached_property
    def model(self) -> ServedModel:
        """The model that the engine runs."""
        model = self._config.model_config
        name = str(self._options.get("model") or model.model)
        return ServedModel(name, fingerprint_of_files(name, model.revision), model.dtype)

    def _loader(self) -> Loader:
        names = [name for name in ("verify", "capacity") if name in self._options]
        return Loader(self.store, self.model, **{name: self._options[name] for name in names})

    # Scheduler

    def on_new_request(self, request: Any) -> None:
        """Finds the memory of a request, or refuses the request."""
        self.scheduling.arrive(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Returns how many tokens the connector brings, and whether they come later."""
        return self.scheduling.wanted(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plans the transfer into the pages that the request was given."""
        self.scheduling.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Plans:
        """Returns what the worker is to do in this step."""
        return self.scheduling.step()

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Returns that the pages may go, and the receipt for the client."""
        return False, self.scheduling.leave(request)

    # Worker

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Loads what the step needs; what fails is reported, and ends its request."""
        plans: Plans = self._get_connector_metadata()
        self._turned_away.update(plans.refused)
        for load in plans.loads:
            try:
                self._load(load, forward_context.no_compile_layers)
            except Exception as error:  # whatever it is, the engine must go on
                _log.error("kvedit: memory %s is not served: %s", load.memory[:12], error)
                self._failed_pages |= load.touched(self._page)

    def _load(self, load: Load, layers: Any) -> None:
        memory = self.loader.load(load.memory)
        if memory.slots != load.slots:
            raise InvalidArgument(f"expected {load.slots} slots, found {memory.slots}")
        write(layers, self._order, memory, load.start, load.places(self._page))

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Returns the pages whose transfer failed since the last call."""
        found, self._failed_pages = self._failed_pages, set()
        return found

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Returns the requests that are refused, as transfers that failed."""
        found, self._turned_away = self._turned_away, set()
        return base.KVConnectorTransferResults(finished_recving=set(found), failed_recving=found)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Does nothing: everything is loaded before the step runs."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Does nothing: memories are only read."""

    def wait_for_save(self) -> None:
        """Does nothing."""


def _options(config: Any) -> dict[str, Any]:
    options = dict(config.kv_transfer_config.kv_connector_extra_config)
    unknown = sorted(set(options) - _OPTIONS)
    if unknown or not options.get("store"):
        raise InvalidArgument(
            f"kv_connector_extra_config: expected store, and some of {sorted(_OPTIONS)}; found "
            f"{sorted(options)}"
        )
    return options
