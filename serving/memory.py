"""What outlives a request: stored responses, by key, the least recently used going first. It is kept by the engine's process, so that every
API process finds what any of them stored; without one, by this process."""

from collections import OrderedDict
from typing import Protocol

LIMIT = 256 * 2**20  # bytes


class Memory(Protocol):
    async def keep(self, key: str, value: bytes | None) -> None:
        """Keeps `value` until it is pushed out; None drops what was kept."""
        ...

    async def recall(self, key: str) -> bytes | None: ...


class Store:
    """At most `limit` bytes of values."""

    def __init__(self, limit: int = LIMIT):
        self._limit, self._size = limit, 0
        self._values: OrderedDict[str, bytes] = OrderedDict()

    def keep(self, key: str, value: bytes | None) -> None:
        self._size -= len(self._values.pop(key, b""))
        if value is not None:
            self._values[key] = value
            self._size += len(value)
        while self._size > self._limit:
            self._size -= len(self._values.popitem(last=False)[1])

    def recall(self, key: str) -> bytes | None:
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)


class LocalMemory:
    """Memory for an engine in this process."""

    def __init__(self):
        self._store = Store()

    async def keep(self, key: str, value: bytes | None) -> None:
        self._store.keep(key, value)

    async def recall(self, key: str) -> bytes | None:
        return self._store.recall(key)
