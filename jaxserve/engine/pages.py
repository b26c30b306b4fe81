"""The pool of cache pages: who holds which page, and which page already holds which tokens.

Every page is in exactly one of three places: in use (one or more references), idle (no reference, but its content is
registered and may be found again) or free. Allocation takes free pages first and then evicts idle ones, least
recently used first.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from hashlib import sha256

import numpy as np
from jaxtyping import Int

from jaxserve.types import Sequence


def root_hash(cache_keys: Mapping[str, bytes]) -> bytes:
    """Digest of the typed extra keys of a request, the parent of its first page's hash.

    Names and values are each preceded by their length, so that no two different mappings encode alike: an adapter
    called "X" and a salt "X" differ. Every page's hash depends on the root through its chain of parents.
    """
    digest = sha256()
    for name, value in sorted(cache_keys.items()):
        for part in (name.encode(), value):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.digest()


def extend_hashes(
    hashes: list[bytes], tokens: Int[np.ndarray, " T"], page_size: int, cache_keys: Mapping[str, bytes]
) -> None:
    """Append to `hashes` those of the full pages of `tokens` that it does not cover yet.

    A page's hash is sha256(parent hash, token bytes); both parts have a fixed length, so the encoding is unambiguous.
    """
    num_full = len(tokens) // page_size
    if len(hashes) >= num_full:
        return
    parent = hashes[-1] if hashes else root_hash(cache_keys)
    for start in range(len(hashes) * page_size, num_full * page_size, page_size):
        parent = sha256(parent + tokens[start : start + page_size].tobytes()).digest()
        hashes.append(parent)


def extend_known(seq: Sequence, page_size: int) -> None:
    """Hash the full pages of a sequence's known tokens."""
    extend_hashes(seq.page_hashes, seq.tokens[: seq.num_tokens], page_size, seq.request.cache_keys)


class Pages:
    """A reference-counted pool of `num_pages` pages of `page_size` tokens with a prefix cache over their content.

    Attributes:
        queried_tokens: tokens of the sequences that looked for cached pages when they were admitted.
        hit_tokens: those of them that were found.
    """

    def __init__(self, num_pages: int, page_size: int, enable_prefix_caching: bool = True) -> None:
        """Raises ValueError for a pool without pages or pages without tokens."""
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"a page pool needs num_pages >= 1 and page_size >= 1, got {num_pages=}, {page_size=}")
        self.num_pages = num_pages
        self.page_size = page_size
        self.enable_prefix_caching = enable_prefix_caching
        self.queried_tokens = 0
        self.hit_tokens = 0
        self._references = [0] * num_pages
        self._hash_of: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._free = list(range(num_pages - 1, -1, -1))  # a stack, page 0 on top
        # In the order of their release, the least recently used first. A plain dict would scan its deleted front.
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Pages that can be allocated now, idle ones included."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Pages that somebody holds."""
        return self.num_pages - self.num_free

    @property
    def num_cached(self) -> int:
        """Pages whose content can be found, in use or idle."""
        return len(self._page_of)

    @property
    def usage(self) -> float:
        """Fraction of the pool in use, 0 to 1."""
        return self.num_used / self.num_pages

    def lookup(self, hashes: Iterable[bytes], take: bool = False) -> list[int]:
        """Pages of the longest cached prefix of `hashes`; with `take` the caller also gets a reference to each."""
        found = []
        page_of = self._page_of
        for key in hashes:
            page = page_of.get(key)
            if page is None:
                break
            found.append(page)
        if take:
            self.take(found)
        return found

    def take(self, pages: Iterable[int]) -> None:
        """Add a reference to pages that `lookup` just found."""
        for page in pages:
            if self._references[page] == 0:
                del self._idle[page]
            self._references[page] += 1

    def fits(self, found: Iterable[int], num_new: int) -> bool:
        """Whether `num_new` pages could be allocated once the `found` ones are taken."""
        num_idle = sum(1 for page in found if self._references[page] == 0)
        return num_new <= self.num_free - num_idle

    def allocate(self, num: int) -> list[int]:
        """Take `num` pages with unknown content, evicting idle ones if need be.

        Raises:
            ValueError: if fewer are free; nothing is taken then.
        """
        if num > self.num_free:
            raise ValueError(f"{num} pages wanted, {self.num_free} of {self.num_pages} are free; preempt a sequence")
        pages = []
        for _ in range(num):
            page = self._free.pop() if self._free else self._evict()
            self._references[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: list[int]) -> None:
        """Drop one reference to each page of one sequence, given in the sequence's order.

        The tail goes first: of a sequence released as a whole the head is evicted last, since a tail is of no use
        without its head.
        """
        references = self._references
        for page in reversed(pages):
            if references[page] < 1:
                raise ValueError(f"page {page} is released, but nobody holds it; release each reference once")
            references[page] -= 1
            if references[page] == 0:
                if self._hash_of[page] is None:
                    self._free.append(page)
                else:
                    self._idle[page] = None

    def register(self, page: int, key: bytes) -> None:
        """Make a held page's content findable under its hash; the first page registered under a hash stays."""
        if self.enable_prefix_caching and key not in self._page_of and self._hash_of[page] is None:
            self._page_of[key] = page
            self._hash_of[page] = key

    def reset(self) -> bool:
        """Forget all cached content. Returns False, and does nothing, while any page is in use."""
        if self.num_used:
            return False
        self._free.extend(reversed(self._idle))
        self._idle.clear()
        self._page_of.clear()
        self._hash_of = [None] * self.num_pages
        return True

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        key = self._hash_of[page]
        if key is not None:  # always so for an idle page
            del self._page_of[key]
        self._hash_of[page] = None
        return page

    def check_integrity(self, holders: Iterable[list[int]] | None = None) -> None:
        """Assert that every page is in one place and that both hash maps agree.

        With `holders`, the page lists of all who hold pages, the reference counts must be exactly theirs.
        """
        used = {page for page, count in enumerate(self._references) if count}
        free, idle = set(self._free), set(self._idle)
        if min(self._references) < 0 or len(free) != len(self._free):
            raise AssertionError(f"a reference below 0 or a page free twice: {self._references}, {self._free}")
        if used & free or used & idle or free & idle or len(used) + len(free) + len(idle) != self.num_pages:
            raise AssertionError(f"pages lost or in two places: {used=}, {free=}, {idle=}, {self.num_pages=}")
        inverse = {key: page for page, key in enumerate(self._hash_of) if key is not None}
        if inverse != self._page_of or len(inverse) != self.num_pages - self._hash_of.count(None):
            raise AssertionError("the maps hash -> page and page -> hash disagree")
        if any(self._hash_of[page] is not None for page in free) or any(self._hash_of[page] is None for page in idle):
            raise AssertionError("a free page is registered or an idle one is not")
        if holders is not None:
            counts = [0] * self.num_pages
            for page in (page for pages in holders for page in pages):
                counts[page] += 1
            if counts != self._references:
                raise AssertionError(f"references {self._references}, but held {counts}")
