"""The bytes of single tokens, which log-probabilities are reported with: a token may be part of a character."""

from __future__ import annotations

import json
import re
from typing import Any

from dsv3_jax.data.tokenizer import Tokenizer


class TokenBytes:
    """Token ids to bytes, as the tokenizer.json spells them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Reads the vocabulary; a large one takes a second."""
        self._tokenizer = tokenizer
        content = json.loads(tokenizer.to_json())
        vocabulary = content["model"]["vocab"]
        # A list of [piece, score] for Unigram, a dict for the others.
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((each[0], i) for i, each in enumerate(vocabulary))
        self._pieces = {token: piece for piece, token in pairs}
        self._is_byte_level = _mentions_byte_level(content.get("decoder"))

    def __call__(self, token: int) -> bytes:
        """The bytes of a token; an added token's are those of its name, an id without a token has none."""
        if token in self._tokenizer.added_tokens:
            return self._tokenizer.added_tokens[token].encode()
        piece = self._pieces.get(token)
        if piece is None:
            return b""
        if self._is_byte_level:
            return bytes(_BYTES[character] for character in piece)
        if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            return bytes([int(byte[1], 16)])
        return self._tokenizer.decode([token]).encode()

    def shown(self, token: int) -> bytes:
        """What of a token is in a completion's text: of a special token nothing."""
        return b"" if token in self._tokenizer.special_tokens else self(token)

    def text(self, token: int) -> str:
        """A token as OpenAI writes it: its text, or its bytes where they are no text."""
        raw = self(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _mentions_byte_level(decoder: dict[str, Any] | None) -> bool:
    if not decoder:
        return False
    return decoder["type"] == "ByteLevel" or any(map(_mentions_byte_level, decoder.get("decoders", ())))


def _byte_level_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte: itself if it can be seen, else one from U+0100 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_level_alphabet()
