"""The bytes of tokens, put together, are the bytes of the text."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models

from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.serve.worker import TokenBytes
from tests.data.test_chat_template import BOS, IDS, TOKENIZER, USER

TEXT = "Hello ünïcödé 漢字 🙂\n\t\x00\x7f"


def test_byte_level_tokens_spell_the_text() -> None:
    token_bytes = TokenBytes(TOKENIZER)
    ids = TOKENIZER.encode(TEXT)
    assert b"".join(map(token_bytes, ids)) == TEXT.encode()
    assert any(token_bytes.text(token).startswith("bytes:\\x") for token in ids)


def test_added_tokens_are_their_names_and_special_ones_are_not_in_the_text() -> None:
    token_bytes = TokenBytes(TOKENIZER)
    for name in (BOS, USER):
        assert token_bytes(IDS[name]) == name.encode()
        assert token_bytes.text(IDS[name]) == name
        assert token_bytes.shown(IDS[name]).decode() == TOKENIZER.decode([IDS[name]])
    assert token_bytes.shown(IDS[BOS]) == b""


def test_an_id_without_a_token_has_no_bytes() -> None:
    assert TokenBytes(TOKENIZER)(TOKENIZER.vocab_size + 5) == b""


def test_bytes_that_stand_in_for_what_a_vocabulary_lacks() -> None:
    backend = tokenizers.Tokenizer(models.BPE({"<unk>": 0, "▁a": 1, "<0xE2>": 2, "<0x41>": 3}, [], unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    token_bytes = TokenBytes(Tokenizer(backend))
    assert [token_bytes(token) for token in (1, 2, 3)] == [b" a", b"\xe2", b"A"]
    assert token_bytes.text(2) == "bytes:\\xe2"
