"""Fill-in-the-middle: some documents become prefix, suffix, middle, so that the middle is learnt from both sides.

Section 4.1 of the report (arXiv 2412.19437): at the level of documents, before packing, for a tenth of them, as

    <｜fim▁begin｜> prefix <｜fim▁hole｜> suffix <｜fim▁end｜> middle <eos>

A document is chosen, and cut at two of its characters, by a hash of the seed and its name: the same ones whoever tokenises
them, in whatever order. It is cut before it becomes tokens, since at inference the hole is not at the border of a token.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from dsv3_jax.config import DataConfig
from dsv3_jax.config.checks import require
from dsv3_jax.data.sources import Document
from dsv3_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class FillInTheMiddle:
    """Which documents are cut, and the ids that stand before the three parts."""

    rate: float
    seed: int
    begin: int
    hole: int
    end: int

    @classmethod
    def of(cls, rate: float, tokens: Sequence[str], seed: int, tokenizer: Tokenizer) -> FillInTheMiddle | None:
        """What the three tokens are to `tokenizer`; None where the rate is 0.

        Raises:
          ValueError: naming the tokens that the tokenizer lacks.
        """
        if rate == 0:
            return None
        known = {text: id_ for id_, text in tokenizer.added_tokens.items()}
        missing = [token for token in tokens if token not in known]
        require(
            not missing,
            f"the tokenizer has no tokens {missing} to fill in the middle with; name those it has (data.fim_tokens), or set "
            "data.fim_rate to 0",
        )
        return cls(rate, seed, *(known[token] for token in tokens))

    def cuts(self, document: Document) -> tuple[int, int] | None:
        """The characters at which the document is cut, uniform over all pairs of places; None if it stays whole."""
        name = document.name.encode("utf-8", "surrogatepass")
        drawn = hashlib.blake2b(name, digest_size=24, key=self.seed.to_bytes(8, "little"), person=b"fim").digest()
        chosen, one, other = (int.from_bytes(drawn[at : at + 8], "little") for at in (0, 8, 16))
        if chosen >= self.rate * 2**64:
            return None
        # The product of a 64-bit number and the count of places, without its lower 64 bits: uniform over the places.
        first, last = sorted(number * (len(document.text) + 1) >> 64 for number in (one, other))
        return first, last

    def join(self, prefix: list[int], middle: list[int], suffix: list[int]) -> list[int]:
        """The ids of a cut document, marks aside."""
        return [self.begin, *prefix, self.hole, *suffix, self.end, *middle]

    def unfim(self, ids: Sequence[int], tokenizer: Tokenizer) -> str:
        """The text of a document from its ids, cut or whole, marks or not.

        Raises:
          ValueError: if the three ids stand in it otherwise than `join` writes them.
        """
        ids = [int(id_) for id_ in ids]
        marks = [id_ for id_ in ids if id_ in (self.begin, self.hole, self.end)]
        if not marks:
            return tokenizer.decode(ids)
        require(
            marks == [self.begin, self.hole, self.end],
            f"the marks of a filled-in document are {marks}; they must be {[self.begin, self.hole, self.end]}, once each",
        )
        hole, end = ids.index(self.hole), ids.index(self.end)
        return "".join(map(tokenizer.decode, (ids[:hole], ids[end:], ids[hole:end])))


def fill_in_the_middle(data: DataConfig, seed: int, tokenizer: Tokenizer) -> FillInTheMiddle | None:
    """As the config of a run says; None where nothing is filled in.

    Raises:
      ValueError: naming the tokens that the tokenizer lacks.
    """
    return FillInTheMiddle.of(data.fim_rate, data.fim_tokens, seed, tokenizer)
