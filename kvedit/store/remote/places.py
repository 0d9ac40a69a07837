"""Places: from a URL and options to a store of ``obstore``."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from kvedit.errors import InvalidArgument, MissingDependency, TierUnavailable
from kvedit.store.remote.failures import describe
from kvedit.store.remote.keys import check_prefix

__all__ = ["need_obstore", "open_place", "single_try"]

_CLIENT = ("allow_http", "allow_invalid_certificates", "connect_timeout", "proxy_url")
_SECONDS = frozenset({"connect_timeout", "timeout"})
_SCHEMES = (
    "s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, file:///folder, memory:///"
)


def need_obstore() -> None:
    """Checks that ``obstore`` is installed.

    Raises:
        MissingDependency: if not.
    """
    try:
        import obstore  # noqa: F401
    except ImportError as error:
        raise MissingDependency("obstore", "s3", "object storage") from error


def open_place(url: str, options: dict[str, Any], seconds: float) -> tuple[Any, str]:
    """Returns a store of ``obstore`` and the prefix of all keys in it.

    Args:
        url: where; see :meth:`Objects.open`.
        options: settings of the connection.
        seconds: how long ``obstore`` tries again by itself.

    Raises:
        InvalidArgument: if scheme, options or endpoint are not understood.
        MissingDependency: if ``obstore`` is not installed.
        TierUnavailable: if the folder can't be made.
    """
    need_obstore()
    parts = urlsplit(url)
    if parts.query or parts.fragment or "@" in parts.netloc:
        raise InvalidArgument(
            f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}: a place has no credentials, "
            "query or fragment in its URL: pass options, or use the environment"
        )
    if parts.scheme in {"s3", "gs", "az"}:
        return _bucket(parts, options, seconds), check_prefix(parts.path.strip("/"))
    if parts.scheme not in {"file", "memory"}:
        raise InvalidArgument(f"{url!r}: expected one of {_SCHEMES}")
    if options:
        raise InvalidArgument(f"{parts.scheme}:// has no options, found {', '.join(options)}")
    from obstore.exceptions import BaseError
    from obstore.store import LocalStore, MemoryStore

    if parts.scheme == "memory":
        return MemoryStore(), check_prefix(parts.path.strip("/"))
    if parts.netloc not in {"", "localhost"} or not parts.path.strip("/"):
        raise InvalidArgument(f"{url!r}: expected file:///folder with three slashes and a folder")
    try:
        return LocalStore(Path(unquote(parts.path)), mkdir=True), ""
    except (BaseError, OSError) as error:
        raise TierUnavailable(f"{url} can't be opened: {describe(error)}") from error


def _bucket(parts: SplitResult, options: dict[str, Any], seconds: float) -> Any:
    """Returns the store of one bucket or container."""
    from obstore import store
    from obstore.exceptions import BaseError

    endpoint = urlsplit(str(options.get("endpoint", "https://host")))
    if not parts.netloc:
        raise InvalidArgument(f"{parts.scheme}:// names no bucket: expected one of {_SCHEMES}")
    # obstore panics on an endpoint that is no URL.
    if endpoint.scheme not in {"http", "https"} or not endpoint.hostname:
        raise InvalidArgument(
            f"endpoint {options['endpoint']!r}: expected https://host or http://host:port"
        )
    kinds = {"s3": store.S3Store, "gs": store.GCSStore, "az": store.AzureStore}
    client, config = {"timeout": timedelta(seconds=30)}, {}
    for name, value in options.items():
        if name in _SECONDS:
            client[name] = timedelta(seconds=value)
        elif name in _CLIENT:
            client[name] = value
        else:
            config[name] = value
    backoff = {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5)}
    retry = {"max_retries": 10, "retry_timeout": timedelta(seconds=seconds), "backoff": backoff}
    try:
        return kinds[parts.scheme](
            parts.netloc, client_options=client, retry_config=retry, config=config
        )
    except (BaseError, TypeError, ValueError) as error:
        place = f"{parts.scheme}://{parts.netloc}"
        raise InvalidArgument(f"{place} can't be opened: {describe(error)}") from error


def single_try(store: Any) -> Any:
    """Returns ``store`` without retries of its own.

    A retry hidden inside would turn an ambiguous failure (stored, then the answer was lost) into a
    plain "exists already", which looks like a lost race.
    """
    if not hasattr(store, "retry_config"):
        return store
    positional, named = store.__getnewargs_ex__()
    once = {"max_retries": 0, "retry_timeout": timedelta(0)}
    return type(store)(*positional, **{**named, "retry_config": once})
