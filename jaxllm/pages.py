"""Who holds which page of the KV cache, and which full pages can be shared by prompts that begin alike.

Host ints only. The pool owns page numbers and their reference counts; what is in the pages lives in the cache on the
device, which page a token goes to is the scheduler's to say. Every page is in exactly one of three states:
free (nobody's, nothing worth keeping), cached (nobody's, but a prompt may find it again) or held (by one or more
sequences); `free + cached + held == size` always.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

ROOT = b""  # the parent of a first page's digest


class OutOfPages(Exception):
    """More pages were wanted than are free or evictable; none were taken."""


def digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Names a full page by its tokens and everything before them, so that equal names mean equal K and V."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


def chain(tokens: Sequence[int], page_size: int, parent: bytes = ROOT) -> list[bytes]:
    """The digests of the full pages that `tokens` fill, the first of them after `parent`."""
    names = []
    for start in range(0, len(tokens) - page_size + 1, page_size):
        names.append(parent := digest(parent, tokens[start : start + page_size]))
    return names


class PagePool:
    """Pages 1 to `size`. Page 0 is the trash page: padding writes there and nobody reads it."""

    def __init__(self, size: int):
        self.size = size
        self._free = list(range(size, 0, -1))
        self._holders = [0] * (size + 1)
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first: the next to be evicted
        self._page_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def held(self) -> int:
        return sum(count > 0 for count in self._holders)

    @property
    def available(self) -> int:
        """Pages that `take` can give: the free ones and the cached ones nobody holds."""
        return len(self._free) + len(self._cached)

    def take(self, count: int) -> list[int]:
        """`count` pages, one holder each. Raises OutOfPages, and takes none, if fewer are available."""
        if count > self.available:
            raise OutOfPages(f"{count} pages wanted, {self.available} of {self.size} available")
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        del self._page_of[self._name_of.pop(page)]
        return page

    def share(self, names: Iterable[bytes]) -> list[int]:
        """The pages of the longest known run of `names`, held once more each."""
        pages = []
        for name in names:
            if (page := self._page_of.get(name)) is None:
                break
            self._holders[page] += 1
            self._cached.pop(page, None)
            pages.append(page)
        return pages

    def publish(self, page: int, name: bytes) -> None:
        """Makes a held, full page findable. If a twin is findable already, this one stays private."""
        if name not in self._page_of and page not in self._name_of:
            self._page_of[name] = page
            self._name_of[page] = name

    def forget(self) -> None:
        """No page can be found any more; what was cached is free."""
        self._free += self._cached
        self._cached.clear()
        self._page_of.clear()
        self._name_of.clear()

    def release(self, pages: Sequence[int]) -> None:
        """One holder fewer each. Last page first, so that a prefix outlives what grew from it."""
        for page in reversed(pages):
            self._holders[page] -= 1
            assert self._holders[page] >= 0, f"page {page} was released more often than it was taken"
            if self._holders[page] == 0:
                if page in self._name_of:
                    self._cached[page] = None
                else:
                    self._free.append(page)
