"""How a client joins a Mooncake pool."""

from __future__ import annotations

from dataclasses import dataclass

from kvedit.errors import InvalidArgument

__all__ = ["MooncakeConfig"]

_MIB = 1 << 20
_LEAST_SEGMENT = 16 << 20


@dataclass(frozen=True)
class MooncakeConfig:
    """How a client joins a pool; sizes in bytes.

    The segment is memory of this machine that it lends to the pool; what lies in it is gone when
    the client leaves. With 0 the client lends nothing and uses what others lend.

    Args:
        master: host and port of ``mooncake_master``.
        metadata: ``"P2PHANDSHAKE"`` (no metadata server), or the URL of one.
        local_host: name or address under which other clients reach this machine.
        segment_bytes: memory lent to the pool: 0, or at least 16 MiB (less is refused by Mooncake).
        buffer_bytes: staging memory of the client: at least one value.
        protocol: ``"tcp"`` or ``"rdma"``.
        device: RDMA devices, comma-separated; empty for TCP.
        value_bytes: objects are cut into values of this size. A client can only read objects whose
            values are not larger than its own setting.
        seconds: how long one call of the native client may take, and joining the pool.

    Raises:
        InvalidArgument: if a size or a time is out of range, or ``master`` has no port.
    """

    master: str = "127.0.0.1:50051"
    metadata: str = "P2PHANDSHAKE"
    local_host: str = "127.0.0.1"
    segment_bytes: int = 512 * _MIB
    buffer_bytes: int = 64 * _MIB
    protocol: str = "tcp"
    device: str = ""
    value_bytes: int = 16 * _MIB
    seconds: float = 30.0

    def __post_init__(self) -> None:
        """Checks sizes, time and address."""
        if self.segment_bytes != 0 and self.segment_bytes < _LEAST_SEGMENT:
            raise InvalidArgument(
                f"segment_bytes is 0 or at least {_LEAST_SEGMENT}, found {self.segment_bytes}"
            )
        if not 1024 <= self.value_bytes <= self.buffer_bytes:
            raise InvalidArgument(
                f"value_bytes lies between 1024 and buffer_bytes ({self.buffer_bytes}), "
                f"found {self.value_bytes}"
            )
        if not self.seconds > 0:
            raise InvalidArgument(f"seconds must be positive, found {self.seconds}")
        self.address()

    def address(self) -> tuple[str, int]:
        """Returns host and port of the master.

        Raises:
            InvalidArgument: if ``master`` is not written as host:port.
        """
        host, _, port = self.master.rpartition(":")
        if not host or not port.isascii() or not port.isdigit():
            raise InvalidArgument(f"master is written as host:port, found {self.master!r}")
        return host.strip("[]"), int(port)
