"""What the scheduler works with: a sequence on its way, and the step that the engine dispatches."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple


@dataclasses.dataclass(eq=False)
class Sequence:
    """A prompt, what has come of it, and where it lives."""

    prompt: list[int]
    max_tokens: int
    arrival: int = -1
    """Place in the order of `submit`; lower is older."""
    tokens: list[int] = dataclasses.field(default_factory=list)
    """Generated and accepted."""
    pages: list[int] = dataclasses.field(default_factory=list)
    """Page numbers of its shard, in the order of the text. Some may be shared; those are full and only read."""
    shard: int | None = None
    slot: int | None = None
    """Counted over all shards: shard * slots_per_shard + i."""
    cached: int = 0
    """How many tokens of the text have their latents in the pages, or dispatched to be written there."""
    reused: int = 0
    """How many of them were found in the prefix cache since the last admission."""
    epoch: int = 0
    """Raised when it loses its place: results that were dispatched before are not for it any more."""
    state: Literal["waiting", "prefilling", "running", "done"] = "waiting"
    sampling: bool = False
    """Its last chunk is in flight, which yields a token."""
    decodes: int = 0
    """Decode steps in flight; each yields at least one token."""
    published: int = 0
    """Pages that were offered to the prefix cache, or came from it."""

    @property
    def length(self) -> int:
        """Tokens of the text: prompt and generated."""
        return len(self.prompt) + len(self.tokens)

    @property
    def place(self) -> tuple[int, int]:
        """Shard and slot of a sequence that has them."""
        assert self.shard is not None
        assert self.slot is not None
        return self.shard, self.slot

    def text(self, start: int, stop: int) -> list[int]:
        """Tokens start to stop of prompt and generated, without joining the two."""
        first = len(self.prompt)
        return self.prompt[start:stop] + self.tokens[max(start - first, 0) : max(stop - first, 0)]


class Chunk(NamedTuple):
    """Tokens of one text to prefill."""

    sequence: Sequence
    epoch: int
    start: int
    """Where the tokens stand in the text; the latents of all before are in the pages."""
    tokens: list[int]
    following: int | None
    """The token after the chunk. None after a text's last chunk: the device samples it."""


class Step(NamedTuple):
    """What to dispatch: the chunks, then one decode step."""

    chunks: list[Chunk]
    """At most one a shard."""
    decoding: list[Sequence]
    """Every one to decode, in order of arrival. None of them is in `chunks`."""
    tables_changed: bool
    """Whether the pages of any slot are others than at the step before."""
