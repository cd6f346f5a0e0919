"""Continuous batching: which sequences get a slot and pages, and what the device does next.

The engine dispatches a step before it has read the results of the one before. So the scheduler plans with what is
certain: the most places a sequence may have filled, and the fewest tokens it may have got. On a mesh, slots and pages
come in equal shards; a sequence lives in one of them.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence as Ids

from dsv3_jax.infer.cache import EngineConfig
from dsv3_jax.infer.request import Chunk, Sequence, Step


class Scheduler:
    """Admits in order of arrival, prefills in chunks, decodes all that run, and preempts the youngest when pages run out.

    Each round: `schedule`, dispatch, then `accept` what the dispatch before has yielded, and `finish` each sequence that
    has its max_tokens or met a stop.
    """

    def __init__(self, sizes: EngineConfig, *, prefix_cache: bool = True) -> None:
        """An empty schedule; `prefix_cache`: whether sequences share the pages of equal beginnings."""
        self._sizes, self._prefix_cache = sizes, prefix_cache
        self._pools = [PageAllocator(sizes.pages_per_shard, sizes.page_size) for _ in range(sizes.num_shards)]
        self._slots: list[Sequence | None] = [None] * sizes.slots
        self._waiting: list[Sequence] = []
        self._arrivals = 0
        self._tables_changed = False
        self.preemptions = 0
        """How often a sequence had to give up its place for an older one."""

    @property
    def free_pages(self) -> int:
        """Pages with nothing in them, of all shards."""
        return sum(pool.num_free for pool in self._pools)

    @property
    def cached_pages(self) -> int:
        """Pages that no sequence holds and the prefix cache keeps, of all shards."""
        return sum(pool.num_kept for pool in self._pools)

    @property
    def idle(self) -> bool:
        """Whether no sequence waits or has a slot."""
        return not self._waiting and not any(self._slots)

    def check(self, sequence: Sequence) -> None:
        """Raises ValueError if there is nothing to do, or it would not fit even alone."""
        prompt, most = len(sequence.prompt), sequence.max_tokens
        if prompt < 1:
            raise ValueError("the prompt is empty; give at least one token")
        if most < 1:
            raise ValueError(f"max_tokens is {most}; it must be at least 1")
        if prompt + most > self._sizes.max_length:
            raise ValueError(
                f"{prompt} prompt tokens and max_tokens {most} are {prompt + most}, more than max_length "
                f"{self._sizes.max_length}; shorten the prompt, lower max_tokens or raise max_length"
            )
        pages, room = self._num_pages(self._most_positions(sequence)), self._sizes.pages_per_shard
        if pages > room:
            raise ValueError(
                f"{prompt} prompt tokens and max_tokens {most} need {pages} pages of {self._sizes.page_size} tokens, more than "
                f"the {room} there are; shorten the prompt, lower max_tokens or give the cache more pages"
            )

    def submit(self, sequence: Sequence) -> None:
        """Puts a new sequence at the end of the waiting line. Raises as `check`."""
        self.check(sequence)
        assert sequence.arrival == -1, "a sequence is submitted once"
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self._waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence, wherever it is; results still in flight are not for it. A second call does nothing."""
        if sequence.state == "done":
            return
        if sequence.state == "waiting":
            self._waiting.remove(sequence)
        else:
            self._vacate(sequence)
        sequence.epoch += 1
        sequence.state = "done"

    def schedule(self) -> Step:
        """The next step, to be dispatched at once: its writes count as done for all that is scheduled after."""
        # Those that run come first: what they need may cost a younger one its place, before it is given a chunk.
        decoding = self._decoding()
        self._admit()
        chunks = [self._next_chunk(oldest) for oldest in map(self._oldest_prefilling, range(len(self._pools))) if oldest]
        changed, self._tables_changed = self._tables_changed, False
        return Step(chunks, decoding, changed)

    def accept(self, sequence: Sequence, epoch: int, tokens: list[int]) -> bool:
        """Takes what a last chunk or a decode step has yielded, up to max_tokens.

        Args:
          sequence: the sequence it was dispatched for.
          epoch: the sequence's epoch at that time.
          tokens: at least one.

        Returns:
          False if the sequence has lost its place since; then nothing changes.
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

    def _num_pages(self, positions: int) -> int:
        return -(-positions // self._sizes.page_size)

    def _most_positions(self, sequence: Sequence) -> int:
        """Places that a sequence can need. The device may write further, for tokens past max_tokens; that is dropped."""
        return len(sequence.prompt) + sequence.max_tokens + 2 * self._sizes.drafts + 1

    def _in_shard(self, shard: int) -> list[Sequence]:
        first = shard * self._sizes.slots_per_shard
        return [sequence for sequence in self._slots[first : first + self._sizes.slots_per_shard] if sequence]

    def _decoding(self) -> list[Sequence]:
        """The sequences to decode, oldest first, each with the pages that the step may write to."""
        running = [sequence for sequence in self._slots if sequence and sequence.state == "running"]
        decoding = []
        for sequence in sorted(running, key=lambda sequence: sequence.arrival):
            # One that is sure to have all its tokens, once what is in flight has arrived, needs no more steps.
            certain = len(sequence.tokens) + sequence.decodes + sequence.sampling
            # An older one may just have taken its place. None in the list can lose it: they are all older.
            if sequence.state == "running" and certain < sequence.max_tokens and self._grow(sequence):
                sequence.decodes += 1
                decoding.append(sequence)
        return decoding

    def _grow(self, sequence: Sequence) -> bool:
        """Gives a sequence the pages for one more decode step; False if that cost it its own place."""
        assert sequence.shard is not None
        pool = self._pools[sequence.shard]
        longest = sequence.cached + (self._sizes.drafts + 1) * sequence.decodes
        positions = min(longest + 2 * self._sizes.drafts + 1, self._most_positions(sequence))
        missing = self._num_pages(positions) - len(sequence.pages)
        if missing <= 0:
            return True
        while missing > pool.available:
            youngest = max(self._in_shard(sequence.shard), key=lambda other: other.arrival)
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.pages += pool.allocate(missing)
        self._tables_changed = True
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Sends a sequence back to the waiting line; it will prefill its generated tokens like a prompt."""
        self._vacate(sequence)
        sequence.epoch += 1
        sequence.state = "waiting"
        bisect.insort(self._waiting, sequence, key=lambda other: other.arrival)
        self.preemptions += 1

    def _vacate(self, sequence: Sequence) -> None:
        # What is in flight may still write to these pages. The device works in order, so whoever gets them writes later.
        assert sequence.shard is not None
        assert sequence.slot is not None
        self._pools[sequence.shard].release(sequence.pages)
        self._slots[sequence.slot] = None
        sequence.shard = sequence.slot = None
        sequence.pages = []
        sequence.cached = sequence.reused = sequence.published = sequence.decodes = 0
        sequence.sampling = False
        self._tables_changed = True

    def _admit(self) -> None:
        """Gives slots and pages to the oldest that wait. While one of them does not fit, nobody overtakes it."""
        while self._waiting:
            sequence = self._waiting[0]
            text = sequence.text(0, sequence.length)
            # The pages of the first decode step too, or it could be preempted before it has done anything.
            needed = self._num_pages(len(text) + 2 * self._sizes.drafts + 2)
            if (best := self._best_shard(text, needed)) is None:
                return
            del self._waiting[0]
            self._place(sequence, *best, needed)

    def _best_shard(self, text: list[int], needed: int) -> tuple[int, list[int]] | None:
        """Where a text fits with most of it in the prefix cache, then with most room: the shard and the pages to share."""
        merits = []
        for shard, pool in enumerate(self._pools):
            others = len(self._in_shard(shard))
            if others < self._sizes.slots_per_shard:
                found = pool.match(text)
                # And a page for each of the others to grow, or the newcomer would soon have to give way to them.
                if pool.fits(found, needed - len(found) + others):
                    merits.append((len(found), pool.available, -shard, found))
        if not merits:
            return None
        _, _, shard, found = max(merits)
        return -shard, found

    def _place(self, sequence: Sequence, shard: int, shared: list[int], needed: int) -> None:
        pool = self._pools[shard]
        pool.share(shared)
        sequence.pages = shared + pool.allocate(needed - len(shared))
        sequence.shard, sequence.slot = shard, self._slots.index(None, shard * self._sizes.slots_per_shard)
        sequence.cached = sequence.reused = len(shared) * self._sizes.page_size
        sequence.published = len(shared)
        sequence.state = "prefilling"
        self._slots[sequence.slot] = sequence
        self._tables_changed = True

    def _oldest_prefilling(self, shard: int) -> Sequence | None:
        prefilling = [sequence for sequence in self._in_shard(shard) if sequence.state == "prefilling"]
        return min(prefilling, key=lambda sequence: sequence.arrival, default=None)

    def _next_chunk(self, sequence: Sequence) -> Chunk:
        if sequence.cached == sequence.reused:
            self._share_late(sequence)
        start, stop = sequence.cached, min(sequence.cached + self._sizes.chunk, sequence.length)
        following = sequence.text(stop, stop + 1)
        sequence.cached = stop
        if not following:
            sequence.state, sequence.sampling = "running", True
        self._publish(sequence)
        return Chunk(sequence, sequence.epoch, start, sequence.text(start, stop), following[0] if following else None)

    def _share_late(self, sequence: Sequence) -> None:
        """Before the first chunk: exchanges pages for those that others have published since the admission.

        So of many that arrive at once with the same beginning, only the first computes it.
        """
        assert sequence.shard is not None
        pool, have = self._pools[sequence.shard], sequence.reused // self._sizes.page_size
        found = pool.match(sequence.text(0, sequence.length))
        if len(found) > have:
            pool.share(found[have:])
            pool.release(sequence.pages[have : len(found)])
            sequence.pages[have : len(found)] = found[have:]
            sequence.cached = sequence.reused = len(found) * self._sizes.page_size
            sequence.published = len(found)
            self._tables_changed = True

    def _publish(self, sequence: Sequence) -> None:
        """Publishes the pages that are full by now, and whose following token is known."""
        if not self._prefix_cache:
            return
        assert sequence.shard is not None
        size = self._sizes.page_size
        full = min(sequence.cached, sequence.length - 1) // size
        for i in range(sequence.published, full):
            before = sequence.pages[i - 1] if i else None
            self._pools[sequence.shard].publish(sequence.pages[i], before, sequence.text(i * size, (i + 1) * size + 1))
        sequence.published = full


# ----------------------------------------------------------------------------------------------------------------------
# The pages of one shard's latent cache: who holds them, and which can be found again by the text that is in them.


# The page before it (None for a text's first), and its tokens with the one that follows. Compared, not only hashed.
Key = tuple[int | None, tuple[int, ...]]


class PageAllocator:
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

    def match(self, text: Ids[int]) -> list[int]:
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

    def publish(self, page: int, before: int | None, tokens: Ids[int]) -> None:
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
