"""Continuous batching: admission of sequences to slots and pages, chunked prefill, preemption, and the prefix cache.

The engine dispatches a step before it has read the results of the one before. So the scheduler plans with bounds: the most
positions that a sequence may have filled, and the fewest tokens that it may have produced. On a mesh, slots and pages are
split into equal shards; a sequence lives in one of them.
"""

from __future__ import annotations

import bisect
import operator

from dsv3_jax.config.checks import check
from dsv3_jax.infer.cache import EngineConfig, pages_for
from dsv3_jax.infer.request import Chunk, Sequence, Step

_arrival = operator.attrgetter("arrival")


class Scheduler:
    """Admits in order of arrival, prefills in chunks, decodes all running sequences, preempts the youngest if pages run out.

    Each round: `schedule`, dispatch, then `accept` the results of the dispatch before, and `finish` each sequence that has
    its max_tokens or met a stop.
    """

    def __init__(self, sizes: EngineConfig, *, prefix_cache: bool = True) -> None:
        """Create an empty schedule; with `prefix_cache`, sequences share the pages of equal beginnings."""
        self._sizes, self._prefix_cache = sizes, prefix_cache
        self._pools = [PageAllocator(sizes.pages_per_shard, sizes.page_size) for _ in range(sizes.num_shards)]
        self._slots: list[Sequence | None] = [None] * sizes.slots
        self._waiting: list[Sequence] = []
        self._arrivals = 0
        self._tables_changed = False
        self.preemptions = 0
        """Number of times that a sequence lost its slot for lack of pages."""

    @property
    def free_pages(self) -> int:
        """Number of empty pages, over all shards."""
        return sum(pool.num_free for pool in self._pools)

    @property
    def cached_pages(self) -> int:
        """Number of pages, over all shards, that no sequence uses and only the prefix cache keeps."""
        return sum(pool.num_kept for pool in self._pools)

    @property
    def idle(self) -> bool:
        """True if no sequence waits or has a slot."""
        return not self._waiting and not any(self._slots)

    def check(self, sequence: Sequence) -> None:
        """Raise ValueError for an empty prompt, max_tokens below 1, or a sum of both beyond max_length or a shard's pages."""
        prompt, most, sizes = len(sequence.prompt), sequence.max_tokens, self._sizes
        check(prompt >= 1, "the prompt is empty; give at least one token")
        check(most >= 1, f"max_tokens is {most}; it must be at least 1")
        asked, remedy = f"{prompt} prompt tokens and max_tokens {most}", "shorten the prompt, lower max_tokens or"
        fits = prompt + most <= sizes.max_length
        check(fits, f"{asked} are {prompt + most}, more than max_length {sizes.max_length}; {remedy} raise max_length")
        pages, room = self._num_pages(prompt + most), sizes.pages_per_shard
        needed = f"{asked} need {pages} pages of {sizes.page_size} tokens"
        check(pages <= room, f"{needed}, more than the {room} there are; {remedy} raise cache_tokens")

    def submit(self, sequence: Sequence) -> None:
        """Append a new sequence to the queue and set its `arrival`. Raises as `check`."""
        self.check(sequence)
        assert sequence.arrival == -1, "a sequence is submitted once"
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self._waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """End a sequence, releasing its slot and pages if any; results in flight become void. A second call does nothing."""
        if sequence.state == "done":
            return
        if sequence.state == "waiting":
            self._waiting.remove(sequence)
        else:
            self._vacate(sequence)
        sequence.state = "done"

    def schedule(self) -> Step:
        """Admit and preempt sequences, and return the next step. Dispatch it at once: later calls count its writes as done."""
        # Running sequences come first: they may preempt a younger one, which must not get a chunk then.
        decoding = self._decoding()
        self._admit()
        chunks = []
        for shard in range(self._sizes.num_shards):
            prefilling = [sequence for sequence in self._in_shard(shard) if sequence.state == "prefilling"]
            if prefilling:
                chunks.append(self._next_chunk(min(prefilling, key=_arrival)))
        changed, self._tables_changed = self._tables_changed, False
        return Step(chunks, decoding, changed)

    def accept(self, sequence: Sequence, epoch: int, tokens: list[int]) -> bool:
        """Append the tokens that a last chunk or a decode step has yielded, up to max_tokens, and return True.

        `epoch` is the sequence's at the dispatch; if it has lost its slot since, nothing changes and the result is False.
        """
        if epoch != sequence.epoch:
            return False
        assert tokens, "a step yields at least one token"
        # The results of a sequence arrive in the order of dispatch, its last chunk's before any decode step's.
        if sequence.sampling:
            sequence.sampling = False
        else:
            assert sequence.decodes > 0, "a result of a step that was not scheduled"
            sequence.decodes -= 1
        sequence.tokens += tokens[: sequence.max_tokens - len(sequence.tokens)]
        sequence.cached = sequence.length - 1
        self._publish(sequence)
        return True

    def _num_pages(self, length: int) -> int:
        return pages_for(length, self._sizes.drafts, self._sizes.page_size)

    def _in_shard(self, shard: int) -> list[Sequence]:
        first = shard * self._sizes.slots_per_shard
        return [sequence for sequence in self._slots[first : first + self._sizes.slots_per_shard] if sequence]

    def _decoding(self) -> list[Sequence]:
        """Return the running sequences to decode, oldest first; allocate the pages that the step may write, or preempt."""
        decoding = []
        for sequence in sorted(filter(None, self._slots), key=_arrival):
            # Not one that will certainly have all its tokens with the results in flight, or that an older one just preempted.
            certain = len(sequence.tokens) + sequence.decodes + sequence.sampling
            if sequence.state == "running" and certain < sequence.max_tokens and self._grow(sequence):
                sequence.decodes += 1
                decoding.append(sequence)
        return decoding

    def _grow(self, sequence: Sequence) -> bool:
        """Allocate the pages of one more decode step, preempting the youngest if needed; False if that is `sequence` itself."""
        shard, _ = sequence.place
        pool = self._pools[shard]
        longest = sequence.cached + (self._sizes.drafts + 1) * sequence.decodes
        # The device may write beyond the pages, for tokens past max_tokens; such writes are dropped.
        missing = self._num_pages(min(longest, len(sequence.prompt) + sequence.max_tokens)) - len(sequence.pages)
        if missing <= 0:
            return True
        while missing > pool.available:
            youngest = max(self._in_shard(shard), key=_arrival)
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.pages += pool.allocate(missing)
        self._tables_changed = True
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take slot and pages from a sequence and queue it again; its generated tokens are later prefilled like a prompt."""
        self._vacate(sequence)
        sequence.state = "waiting"
        bisect.insort(self._waiting, sequence, key=_arrival)
        self.preemptions += 1

    def _vacate(self, sequence: Sequence) -> None:
        """Release the slot and the pages of a sequence; its results in flight become void."""
        # Programs in flight may still write to these pages. The device works in order, so the next owner writes later.
        shard, slot = sequence.place
        self._pools[shard].release(sequence.pages)
        self._slots[slot] = None
        sequence.shard = sequence.slot = None
        sequence.pages = []
        sequence.cached = sequence.reused = sequence.published = sequence.decodes = 0
        sequence.sampling = False
        sequence.epoch += 1
        self._tables_changed = True

    def _admit(self) -> None:
        """Give slots and pages to the oldest waiting sequences. If one does not fit, no younger one overtakes it."""
        while self._waiting:
            sequence = self._waiting[0]
            # With the pages of the first decode step, without which it could be preempted before it has done anything.
            needed = self._num_pages(sequence.length + 1)
            best = self._best_shard(sequence.text(), needed)
            if best is None:
                return
            del self._waiting[0]
            shard, shared = best
            self._pools[shard].share(shared)
            sequence.pages = shared + self._pools[shard].allocate(needed - len(shared))
            sequence.shard, sequence.slot = shard, self._slots.index(None, shard * self._sizes.slots_per_shard)
            sequence.cached = sequence.reused = len(shared) * self._sizes.page_size
            sequence.published = len(shared)
            sequence.state = "prefilling"
            self._slots[sequence.slot] = sequence
            self._tables_changed = True

    def _best_shard(self, text: list[int], needed: int) -> tuple[int, list[int]] | None:
        """Return a shard for `text`, and pages of its prefix cache to share; None if none has a free slot and enough pages.

        The shard that shares most pages is preferred, then the one with most pages available.
        """
        candidates = []
        for shard, pool in enumerate(self._pools):
            others = len(self._in_shard(shard))
            if others < self._sizes.slots_per_shard:
                found = pool.match(text)
                # With a page for each other sequence to grow, without which they would soon preempt the new one.
                if pool.fits(found, needed - len(found) + others):
                    candidates.append((len(found), pool.available, -shard, found))
        if not candidates:
            return None
        _, _, shard, found = max(candidates)
        return -shard, found

    def _next_chunk(self, sequence: Sequence) -> Chunk:
        if sequence.cached == sequence.reused:
            self._share_late(sequence)
        start, stop = sequence.cached, min(sequence.cached + self._sizes.chunk, sequence.length)
        following = sequence.text(stop, stop + 1)
        sequence.cached = stop
        if not following:
            sequence.state, sequence.sampling = "running", True
        self._publish(sequence)
        return Chunk(sequence, start, sequence.text(start, stop), following[0] if following else None)

    def _share_late(self, sequence: Sequence) -> None:
        """Before the first chunk, replace its pages by equal ones of the prefix cache published since the admission.

        So of many sequences that arrive together with the same beginning, only the first computes it.
        """
        pool, have = self._pools[sequence.place[0]], sequence.reused // self._sizes.page_size
        found = pool.match(sequence.text())
        if len(found) > have:
            pool.share(found[have:])
            pool.release(sequence.pages[have : len(found)])
            sequence.pages[have : len(found)] = found[have:]
            sequence.cached = sequence.reused = len(found) * self._sizes.page_size
            sequence.published = len(found)
            self._tables_changed = True

    def _publish(self, sequence: Sequence) -> None:
        """Add the sequence's full pages whose following token is known to the prefix cache, if that is enabled."""
        if not self._prefix_cache:
            return
        size, pool = self._sizes.page_size, self._pools[sequence.place[0]]
        full = min(sequence.cached, sequence.length - 1) // size
        for i in range(sequence.published, full):
            before = sequence.pages[i - 1] if i else None
            pool.publish(sequence.pages[i], before, sequence.text(i * size, (i + 1) * size + 1))
        sequence.published = full


# ----------------------------------------------------------------------------------------------------------------------
# Pages of one shard's latent cache: their holders, and the prefix cache that finds them by text.


# The page before it (None for a text's first), and its tokens with the one that follows. Compared, not only hashed.
Key = tuple[int | None, tuple[int, ...]]


class PageAllocator:
    """Pages by number: free, held by one or more sequences, or kept for the prefix cache until the room is needed.

    A holder of a published page holds those before it too, and releases the last one first. So `_kept`, the pages without a
    holder, has the end of each text before its beginning, the least recently used first: evicting its first entry never
    leaves a page whose predecessor is gone, and a page number in a key always refers to the same content.
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
        """Number of pages without a holder or content to keep."""
        return len(self._free)

    @property
    def num_kept(self) -> int:
        """Number of published pages without a holder, which `allocate` may evict."""
        return len(self._kept)

    @property
    def available(self) -> int:
        """Number of pages that `allocate` can return: free ones and evictable ones."""
        return self.num_free + self.num_kept

    def match(self, text: list[int]) -> list[int]:
        """Return the published pages that hold the longest beginning of `text`, short of its last token; no holder is added."""
        found: list[int] = []
        # A key holds the token after the page too, so the text must be longer than its pages.
        for start in range(0, len(text) - self.page_size, self.page_size):
            page = self._page_of.get((found[-1] if found else None, tuple(text[start : start + self.page_size + 1])))
            if page is None:
                break
            found.append(page)
        return found

    def fits(self, shared: list[int], fresh: int) -> bool:
        """Return True if `fresh` pages can be allocated after `share` of the published pages `shared`."""
        return fresh <= self.available - sum(page in self._kept for page in shared)

    def share(self, pages: list[int]) -> None:
        """Add one holder to each of these published pages."""
        for page in pages:
            self._kept.pop(page, None)
            self._holders[page] += 1

    def allocate(self, count: int) -> list[int]:
        """Return `count` pages to write to: free ones, then the least recently used of the prefix cache, which are evicted."""
        assert count <= self.available, f"{count} pages of {self.available}"
        while len(self._free) < count:
            evicted = next(iter(self._kept))
            del self._kept[evicted], self._page_of[self._key_of.pop(evicted)]
            self._free.append(evicted)
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def release(self, pages: list[int]) -> None:
        """Remove one holder from each page (in the text's order); one left without is kept if published, else free."""
        for page in reversed(pages):
            self._holders[page] -= 1
            assert self._holders[page] >= 0, f"page {page} is released once too often"
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._kept[page] = None
                else:
                    self._free.append(page)

    def publish(self, page: int, before: int | None, tokens: list[int]) -> None:
        """Let `match` find a full page by its text, unless an equal page is published or the page before is not.

        The caller holds the page and `before`, the one before it (None for the first). `tokens`: the page's and the next one.
        """
        assert len(tokens) == self.page_size + 1, f"{len(tokens)} tokens for a page of {self.page_size}"
        key = (before, tuple(tokens))
        if key not in self._page_of and (before is None or before in self._key_of):
            self._page_of[key], self._key_of[page] = page, key
