import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine.pages import Pages, extend_hashes, root_hash


def hashes_of(tokens, page_size=4, keys=None):
    hashes: list[bytes] = []
    extend_hashes(hashes, np.asarray(tokens, np.int32), page_size, keys or {})
    return hashes


def cached_run(pool: Pages, tokens, keys=None) -> tuple[list[int], int]:
    """Pages of a sequence that reuses what it can and registers the rest, and how many were reused."""
    hashes = hashes_of(tokens, pool.page_size, keys)
    found = pool.lookup(hashes, take=True)
    pages = found + pool.allocate(len(hashes) - len(found))
    for page, key in zip(pages, hashes, strict=True):
        pool.register(page, key)
    return pages, len(found)


def test_only_full_pages_have_a_hash_and_it_depends_on_everything_before():
    assert hashes_of([1, 2, 3]) == []
    one, two = hashes_of([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert hashes_of([1, 2, 3, 4, 5, 6, 7, 9])[0] == one
    assert hashes_of([1, 2, 3, 4, 5, 6, 7, 9])[1] != two
    assert hashes_of([0, 2, 3, 4, 5, 6, 7, 8])[1] != two
    assert hashes_of([5, 6, 7, 8])[0] != two


def test_hashes_extend_as_tokens_come():
    tokens = np.arange(23, dtype=np.int32)
    grown: list[bytes] = []
    for length in range(24):
        extend_hashes(grown, tokens[:length], 4, {"salt": b"s"})
        assert len(grown) == length // 4
    assert grown == hashes_of(tokens, 4, {"salt": b"s"})


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ({"adapter": b"X"}, {"salt": b"X"}),
        ({"a": b"bc"}, {"ab": b"c"}),
        ({"a": b"1", "b": b"2"}, {"a": b"1b2"}),
        ({"a": b""}, {}),
        ({"a": b"\0"}, {"a": b""}),
    ],
)
def test_different_typed_keys_never_share(left, right):
    assert root_hash(left) != root_hash(right)
    pool = Pages(8, 4)
    cached_run(pool, range(8), left)
    assert cached_run(pool, range(8), right)[1] == 0


def test_key_order_does_not_matter():
    assert root_hash({"a": b"1", "b": b"2"}) == root_hash({"b": b"2", "a": b"1"})


def test_a_shared_page_is_free_only_after_its_last_release():
    pool = Pages(4, 4)
    first, _ = cached_run(pool, range(8))
    second, reused = cached_run(pool, range(8))
    assert (second, reused) == (first, 2)
    pool.release(first)
    assert pool.num_used == 2
    pool.release(second)
    assert pool.num_used == 0
    pool.check_integrity()
    with pytest.raises(ValueError, match="nobody holds it"):
        pool.release(second)


def test_free_pages_go_before_cached_ones_and_heads_survive_longest():
    pool = Pages(5, 4)
    old, _ = cached_run(pool, range(0, 8))
    new, _ = cached_run(pool, range(100, 108))
    pool.release(old)
    pool.release(new)
    assert pool.num_cached == 4
    held = pool.allocate(1)
    assert held[0] not in old + new
    assert [pool.allocate(1)[0] for _ in range(4)] == [old[1], old[0], new[1], new[0]]
    assert pool.num_free == pool.num_cached == 0


def test_use_renews_a_page():
    pool = Pages(2, 4)
    first, _ = cached_run(pool, range(4))
    second, _ = cached_run(pool, range(50, 54))
    pool.release(first)
    pool.release(second)
    pool.release(pool.lookup(hashes_of(range(4)), take=True))
    assert pool.allocate(1) == second


def test_the_first_of_two_equal_pages_stays_registered():
    pool = Pages(2, 4)
    (key,) = hashes_of(range(4))
    first, second = pool.allocate(2)
    pool.register(first, key)
    pool.register(second, key)
    assert pool.lookup([key]) == [first]
    pool.release([second])
    assert pool.allocate(1) == [second]
    pool.check_integrity()


def test_fits_counts_idle_pages_once():
    pool = Pages(3, 4)
    pages, _ = cached_run(pool, range(8))
    pool.release(pages)
    found = pool.lookup(hashes_of(range(8)))
    assert pool.fits(found, 1)
    assert not pool.fits(found, 2)
    assert pool.fits([], 3)


def test_allocation_beyond_the_pool_takes_nothing():
    pool = Pages(3, 4)
    pool.allocate(2)
    with pytest.raises(ValueError, match=re.escape("2 pages wanted, 1 of 3 are free")):
        pool.allocate(2)
    assert pool.num_free == 1
    assert pool.usage == pytest.approx(2 / 3)


def test_reset_waits_for_the_last_user():
    pool = Pages(3, 4)
    pages, _ = cached_run(pool, range(8))
    assert not pool.reset()
    assert pool.lookup(hashes_of(range(8))) == pages
    pool.release(pages)
    assert pool.reset()
    assert pool.lookup(hashes_of(range(8))) == []
    assert pool.num_free == 3
    pool.check_integrity()


def test_without_prefix_caching_nothing_is_found():
    pool = Pages(3, 4, enable_prefix_caching=False)
    cached_run(pool, range(4))
    assert cached_run(pool, range(4))[1] == 0


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (-1, 4)])
def test_an_empty_pool_is_refused(size):
    with pytest.raises(ValueError, match="num_pages >= 1"):
        Pages(*size)


def _leak(pool):
    pool._free.pop()


def _twice(pool):
    pool._free[0] = pool._free[1]


def _stale_hash(pool):
    pool._page_of[b"x"] = 0


def _negative(pool):
    pool._references[0] = -1


def _wrong_place(pool):
    pool._idle[pool._free.pop()] = None


@pytest.mark.parametrize("damage", [_leak, _twice, _stale_hash, _negative, _wrong_place])
def test_check_integrity_sees_damage(damage):
    pool = Pages(4, 4)
    pool.check_integrity([])
    damage(pool)
    with pytest.raises(AssertionError):
        pool.check_integrity()


def test_check_integrity_compares_the_holders():
    pool = Pages(4, 4)
    pages = pool.allocate(2)
    pool.check_integrity([pages])
    with pytest.raises(AssertionError, match="but held"):
        pool.check_integrity([pages, pages[:1]])


PROMPTS = st.tuples(st.integers(0, 2), st.integers(1, 6), st.integers(0, 1))


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 12), st.lists(st.tuples(st.sampled_from("arR"), PROMPTS, st.integers(0, 9)), max_size=40))
def test_any_use_keeps_the_pool_whole_and_finds_only_true_content(num_pages, uses):
    pool = Pages(num_pages, 2)
    content: dict[int, tuple] = {}  # what each page was last filled with: keys and all tokens up to its end
    held: list[list[int]] = []
    for use, (family, length, salt), which in uses:
        keys = {"salt": b"s"} if salt else {}
        tokens = [family] * 2 + list(range(2 * length - 2))
        hashes = hashes_of(tokens, 2, keys)
        if use == "a" and pool.fits(found := pool.lookup(hashes), length - len(found)):
            pages, _ = cached_run(pool, tokens, keys)
            for i, page in enumerate(pages):
                truth = (salt, tuple(tokens[: 2 * i + 2]))
                assert i >= len(found) or content[page] == truth
                content[page] = truth
            held.append(pages)
        elif use == "r" and held:
            pool.release(held.pop(which % len(held)))
        elif use == "R":
            assert pool.reset() == (not held)
        pool.check_integrity(held)
        assert pool.num_used == len(Counter(page for pages in held for page in pages))
