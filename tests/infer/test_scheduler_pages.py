"""The page pool: what is found again, what is shared, and what is evicted, against texts laid out by hand."""

from __future__ import annotations

import pytest

from dsv3_jax.infer.scheduler import PageAllocator

SIZE = 2


def store(pool: PageAllocator, text: list[int], held: list[int] | None = None) -> list[int]:
    """Holds pages for all of a text, publishes those that are full, as a sequence does, and returns them."""
    pages = list(held or [])
    pages += pool.allocate(-(-len(text) // SIZE) - len(pages))
    for i in range((len(text) - 1) // SIZE):
        pool.publish(pages[i], pages[i - 1] if i else None, text[i * SIZE : (i + 1) * SIZE + 1])
    return pages


def counts(pool: PageAllocator) -> tuple[int, int, int]:
    return pool.num_free, pool.num_kept, pool.available


def test_a_page_is_found_by_its_tokens_and_the_one_that_follows() -> None:
    pool = PageAllocator(8, SIZE)
    pages = store(pool, [1, 2, 3, 4, 5])
    assert pool.match([1, 2, 3, 4, 5]) == pages[:2]
    assert pool.match([1, 2, 3, 4, 5, 6, 7, 8]) == pages[:2]
    # Its last latent of the MTP layer belongs to 1, 2, 3 and to no other text.
    assert pool.match([1, 2, 3, 4, 9]) == pages[:1]
    assert pool.match([1, 2, 9]) == []
    # The page before must be the same too.
    assert pool.match([3, 4, 5]) == []


@pytest.mark.parametrize(("length", "found"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (6, 2)])
def test_at_least_one_token_is_left_to_compute(length: int, found: int) -> None:
    pool = PageAllocator(8, SIZE)
    pages = store(pool, [1, 2, 3, 4, 5, 6])
    assert pool.match([1, 2, 3, 4, 5, 6][:length]) == pages[:found]


def test_equal_tokens_behind_different_beginnings_are_different_pages() -> None:
    pool = PageAllocator(8, SIZE)
    first, second = store(pool, [1, 2, 7, 7, 7]), store(pool, [3, 4, 7, 7, 7])
    assert pool.match([1, 2, 7, 7, 7]) == first[:2]
    assert pool.match([3, 4, 7, 7, 7]) == second[:2]


def test_tokens_with_equal_hashes_are_not_mistaken() -> None:
    """hash(-1) == hash(-2) in CPython, and so for the tuples that hold them."""
    assert hash((None, (-1, 5, 5))) == hash((None, (-2, 5, 5)))
    pool = PageAllocator(8, SIZE)
    store(pool, [-1, 5, 5])
    assert pool.match([-2, 5, 5]) == []


def test_a_shared_page_is_kept_until_the_last_holder_has_released_it() -> None:
    pool = PageAllocator(4, SIZE)
    pages = store(pool, [1, 2, 3])
    assert counts(pool) == (2, 0, 2)
    pool.share(pages[:1])
    pool.release(pages)
    assert counts(pool) == (3, 0, 3)
    pool.release(pages[:1])
    assert counts(pool) == (3, 1, 4)
    pool.share(pages[:1])
    assert counts(pool) == (3, 0, 3)


def test_what_is_not_published_is_free_when_it_is_released() -> None:
    pool = PageAllocator(4, SIZE)
    pool.release(pool.allocate(3))
    assert counts(pool) == (4, 0, 4)


def test_allocation_takes_free_pages_first_and_then_the_longest_unused() -> None:
    pool = PageAllocator(4, SIZE)
    old, young = store(pool, [1, 2, 3])[:1], store(pool, [4, 5, 6])[:1]
    # Of each text, the last page was not full: only the first is kept.
    pool.release([*old, 1])
    pool.release([*young, 3])
    assert counts(pool) == (2, 2, 4)
    assert sorted(pool.allocate(2)) == [1, 3]
    assert counts(pool) == (0, 2, 2)
    assert pool.allocate(1) == old
    assert pool.match([1, 2, 3]) == []
    assert pool.match([4, 5, 6]) == young


def test_use_makes_a_page_young_again() -> None:
    pool = PageAllocator(2, SIZE)
    for text in ([1, 2, 3], [4, 5, 6]):
        page = pool.allocate(1)
        pool.publish(page[0], None, text)
        pool.release(page)
    first = pool.match([1, 2, 3])
    pool.share(first)
    pool.release(first)
    pool.allocate(1)
    assert pool.match([1, 2, 3]) == first
    assert pool.match([4, 5, 6]) == []


def test_a_text_is_evicted_from_its_end_so_that_its_beginning_stays_of_use() -> None:
    pool = PageAllocator(3, SIZE)
    text = [1, 2, 3, 4, 5, 6, 7]
    pages = pool.allocate(3)
    for i in range(3):
        pool.publish(pages[i], pages[i - 1] if i else None, text[i * SIZE : (i + 1) * SIZE + 1])
    pool.release(pages)
    for left in (2, 1, 0):
        assert pool.allocate(1) == pages[left : left + 1]
        assert pool.match(text) == pages[:left]


def test_an_evicted_page_leads_to_nothing_under_its_new_text() -> None:
    """Page 0 gets another text; what once followed it must not be found behind that one."""
    pool = PageAllocator(2, SIZE)
    old = pool.allocate(2)
    pool.publish(old[0], None, [1, 2, 3])
    pool.publish(old[1], old[0], [3, 4, 5])
    pool.release(old)
    new = pool.allocate(2)
    pool.publish(old[0], None, [8, 9, 3])
    assert sorted(new) == sorted(old)
    assert pool.match([8, 9, 3, 4, 5]) == [old[0]]


def test_the_second_to_compute_a_text_keeps_its_own_pages_unpublished() -> None:
    pool = PageAllocator(8, SIZE)
    text = [1, 2, 3, 4, 5]
    first, second = store(pool, text), store(pool, text)
    assert pool.match(text) == first[:2]
    # Nor what follows them: whoever found that would not hold the pages before it.
    pool.publish(second[2], second[1], [5, 6, 7])
    assert pool.match([1, 2, 3, 4, 5, 6, 7]) == first[:2]
    pool.release(second)
    assert counts(pool) == (5, 0, 5)


def test_room_counts_kept_pages_once() -> None:
    """Kept pages are room to allocate, but not those that the same sequence is about to share."""
    pool = PageAllocator(4, SIZE)
    pages = store(pool, [1, 2, 3, 4, 5])
    pool.release(pages)
    assert counts(pool) == (2, 2, 4)
    assert pool.fits([], 4)
    assert not pool.fits([], 5)
    assert pool.fits(pages[:2], 2)
    assert not pool.fits(pages[:2], 3)
    # Shared with a holder, they were no room before either.
    pool.share(pages[:2])
    assert pool.fits(pages[:2], 2)
    assert not pool.fits(pages[:2], 3)


def test_misuse_is_caught() -> None:
    pool = PageAllocator(2, SIZE)
    with pytest.raises(AssertionError, match="3 pages of 2"):
        pool.allocate(3)
    page = pool.allocate(1)
    pool.release(page)
    with pytest.raises(AssertionError, match="once too often"):
        pool.release(page)
    with pytest.raises(AssertionError, match="2 tokens for a page of 2"):
        pool.publish(0, None, [1, 2])
