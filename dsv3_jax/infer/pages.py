"""The pages of one shard's latent cache: who holds them, and which can be found again by the text that is in them.

A page holds the latents of `page_size` tokens. A full one is published under its text, so that a later sequence with the
same beginning shares it instead of computing it. The text of a page includes the token after it: the last row of the
MTP layer is computed from that token too (section 2.2 of the report).
"""

from __future__ import annotations

from collections.abc import Sequence

# The page before it (None for a text's first), and its tokens with the one that follows. Compared, not only hashed.
Key = tuple[int | None, tuple[int, ...]]


class PagePool:
    """Pages by number, each free, held by one or more sequences, or kept for its text until the room is needed.

    Whoever holds a published page holds those before it too, and gives back the last one first. So pages that nobody
    holds lie in `_kept` with each text's end before its beginning, the longest unused first: to evict the first of them
    never leaves a page whose predecessor is gone, and a page number in a key always means what it meant.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self._free = list(reversed(range(num_pages)))
        self._holders = [0] * num_pages
        self._page_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}
        self._kept: dict[int, None] = {}

    @property
    def num_free(self) -> int:
        """Pages with nothing in them."""
        return len(self._free)

    @property
    def num_kept(self) -> int:
        """Published pages that nobody holds."""
        return len(self._kept)

    @property
    def available(self) -> int:
        """Pages that `allocate` can hand out."""
        return self.num_free + self.num_kept

    def match(self, text: Sequence[int]) -> list[int]:
        """The published pages with the longest beginning of `text`; at least its last token is in none of them."""
        found: list[int] = []
        # A page is asked for together with the token after it, so the text must be longer than its pages.
        for start in range(0, len(text) - self.page_size, self.page_size):
            page = self._page_of.get((found[-1] if found else None, tuple(text[start : start + self.page_size + 1])))
            if page is None:
                break
            found.append(page)
        return found

    def fits(self, shared: list[int], fresh: int) -> bool:
        """Whether `fresh` pages can still be allocated once the published pages `shared` are held."""
        return fresh <= self.available - sum(page in self._kept for page in shared)

    def share(self, pages: list[int]) -> None:
        """Holds published pages once more."""
        for page in pages:
            self._kept.pop(page, None)
            self._holders[page] += 1

    def allocate(self, count: int) -> list[int]:
        """Holds `count` pages to write to: free ones, then those kept longest, which are forgotten."""
        assert count <= self.available, f"{count} pages of {self.available}"
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def release(self, pages: list[int]) -> None:
        """Gives back pages in a text's order. One without other holders is kept if it is published, else free."""
        for page in reversed(pages):
            self._holders[page] -= 1
            assert self._holders[page] >= 0, f"page {page} is released once too often"
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._kept[page] = None
                else:
                    self._free.append(page)

    def publish(self, page: int, before: int | None, tokens: Sequence[int]) -> None:
        """Makes a full page known by its text.

        Nothing happens if another page is known by this text already, or if the page before is not published.

        Args:
          page: a page that the caller holds, with the latents of its tokens written or dispatched.
          before: the caller's page before it, None for the first.
          tokens: the page's tokens and the one that follows, [page_size + 1].
        """
        assert len(tokens) == self.page_size + 1, f"{len(tokens)} tokens for a page of {self.page_size}"
        key = (before, tuple(tokens))
        if key not in self._page_of and (before is None or before in self._key_of):
            self._page_of[key], self._key_of[page] = page, key

    def _evict(self) -> int:
        page = next(iter(self._kept))
        del self._kept[page], self._page_of[self._key_of.pop(page)]
        return page
