"""Token ids to text one at a time, equal to decoding all of them together.

Most decoders are a table: every token stands for fixed bytes, whatever is around it (byte-level BPE), or for text or
one byte (SentencePiece with byte fallback), but for spaces stripped at the very start. `PieceStream` reads such a
table at a fraction of a microsecond per token. `WindowStream` serves every other decoder by decoding a short window
twice and taking the difference.
"""

import json
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import tokenizers

REPLACEMENT = "\ufffd"
CONTEXT = 8  # prompt tokens that can matter to the text behind them: a character has at most 4 bytes


class Pieces(dict[int, str | bytes]):
    """Token id -> its text, or its bytes where they are no complete characters. Filled as ids are looked up.

    Attributes:
        per_byte: each undecodable byte shows as one U+FFFD (byte fallback), else each undecodable sequence does.
        strip: how many leading `strip_char` the whole text loses.
    """

    def __init__(self, backend: tokenizers.Tokenizer, steps: list[dict[str, Any]]):
        super().__init__()
        self._backend = backend
        kinds = [step["type"] for step in steps]
        self._bytes = {char: byte for byte, char in enumerate(byte_level_alphabet())} if "ByteLevel" in kinds else None
        self._replace = [(step["pattern"]["String"], step["content"]) for step in steps if step["type"] == "Replace"]
        self.per_byte = "ByteFallback" in kinds
        strip = steps[-1] if kinds[-1] == "Strip" else {"content": " ", "start": 0}
        self.strip, self.strip_char = strip["start"], strip["content"]

    def __missing__(self, token_id: int) -> str | bytes:
        piece = self[token_id] = self._make(self._backend.id_to_token(token_id) or "")
        return piece

    def _make(self, token: str) -> str | bytes:
        if self._bytes is not None:
            table = self._bytes
            data = bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
        elif self.per_byte and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            data = bytes.fromhex(token[3:5])
            return data if data[0] > 0x7F else data.decode()
        else:
            for old, new in self._replace:
                token = token.replace(old, new)
            return token
        try:
            return data.decode()
        except UnicodeDecodeError:
            return data


def byte_level_alphabet() -> str:
    """The character that stands for each of the 256 bytes in byte-level BPE (GPT-2's `bytes_to_unicode`)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


def read_decoder(backend: tokenizers.Tokenizer) -> Pieces | None:
    """The table behind a tokenizer's decoder, or None when it is not one of the known kinds."""
    decoder = backend.decoder
    if decoder is None:
        return None
    state = json.loads(decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    rest = [step["type"] for step in steps]
    while rest and rest[0] == "Replace":
        rest.pop(0)
    known = (["ByteLevel"], ["ByteFallback"], ["ByteFallback", "Fuse"], ["ByteFallback", "Fuse", "Strip"],
             ["Fuse"], ["Fuse", "Strip"])  # fmt: skip
    plain = all("String" in step["pattern"] for step in steps if step["type"] == "Replace")
    if rest not in known or not plain or ("ByteLevel" in rest and len(steps) > 1) or steps[-1].get("stop", 0):
        return None
    return Pieces(backend, steps)


class PieceStream:
    """Text over a table of pieces. `prompt_ids` come before the first token and give no text."""

    def __init__(self, pieces: Pieces, hidden: frozenset[int], prompt_ids: Sequence[int] | np.ndarray):
        self._pieces, self._hidden = pieces, hidden
        self._pending = b""
        self._strip = pieces.strip
        for token_id in prompt_ids:
            if not self._strip:
                break
            self.feed(int(token_id))
        self._pending = b""
        for piece in _unfinished(pieces, hidden, prompt_ids):
            self._drain(piece)

    def feed(self, token_id: int) -> str:
        """The text that became certain with this token."""
        piece = "" if token_id in self._hidden else self._pieces[token_id]
        if not piece:
            return ""
        if isinstance(piece, bytes):
            text = self._drain(piece)
        elif self._pending:
            text, self._pending = self.tail() + piece, b""
        else:
            text = piece
        if self._strip and text:
            kept = text.lstrip(self._pieces.strip_char)
            stripped = min(self._strip, len(text) - len(kept))
            self._strip = 0 if kept else self._strip - stripped
            text = text[stripped:]
        return text

    def feed_all(self, token_ids: Sequence[int]) -> str:
        """The text that became certain with these tokens."""
        if not self._pending and not self._strip and self._hidden.isdisjoint(token_ids):
            pieces = [self._pieces[token_id] for token_id in token_ids]
            if not any(isinstance(piece, bytes) for piece in pieces):
                return "".join(pieces)  # type: ignore[arg-type]
        return "".join([self.feed(token_id) for token_id in token_ids])

    def tail(self) -> str:
        """What remains when no token follows: U+FFFD for an unfinished character, or nothing."""
        return REPLACEMENT * (len(self._pending) if self._pieces.per_byte else min(len(self._pending), 1))

    def _drain(self, data: bytes) -> str:
        """Append bytes; returns the complete characters and keeps an unfinished one."""
        data, out = self._pending + data, []
        self._pending = b""
        while data:
            try:
                out.append(data.decode())
                break
            except UnicodeDecodeError as error:
                out.append(data[: error.start].decode())
                if error.reason == "unexpected end of data":
                    self._pending = data[error.start :]
                    break
                bad = error.end - error.start
                out.append(REPLACEMENT * (bad if self._pieces.per_byte else 1))
                data = data[error.end :]
        return "".join(out)


def _unfinished(pieces: Pieces, hidden: frozenset[int], prompt_ids: Sequence[int] | np.ndarray) -> list[bytes]:
    """The bytes at the end of the prompt that may begin a character which the next token finishes."""
    found: list[bytes] = []
    for token_id in map(int, reversed(prompt_ids)):
        piece = "" if token_id in hidden else pieces[token_id]
        if isinstance(piece, bytes):
            found.append(piece)
        elif piece:
            break
        if len(found) == CONTEXT:
            break
    return found[::-1]


class WindowStream:
    """Text by any decoder: that of a short window with the new tokens minus that without them.

    `added_tokens` are those between which `spaces_between_special_tokens=False` removes the decoder's spaces.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        hidden: frozenset[int],
        prompt_ids: Sequence[int] | np.ndarray,
        *,
        added_tokens: dict[int, str],
        spaces_between_special_tokens: bool,
    ):
        self._backend, self._hidden = backend, hidden
        self._added, self._spaces = added_tokens, spaces_between_special_tokens
        visible = (token_id for token_id in map(int, reversed(prompt_ids)) if token_id not in hidden)
        self._window = [*islice(visible, CONTEXT)][::-1]
        self._shown = len(self._window)  # tokens of the window whose text is out
        self._prefix = self._decode()

    def feed(self, token_id: int) -> str:
        """The text that became certain with this token."""
        if token_id in self._hidden:
            return ""
        adjacent = self._shown == len(self._window) > 0 and self._window[-1] in self._added
        self._window.append(token_id)
        text = self._decode()
        waiting = len(self._window) - self._shown
        if text.endswith(REPLACEMENT) and waiting < CONTEXT:
            return ""
        new = text[len(self._prefix) :]
        if adjacent and not self._spaces and token_id in self._added:
            new = self._added[token_id]
        if new:
            del self._window[: self._shown]
        self._shown = len(self._window)
        self._prefix = self._decode()
        return new

    def feed_all(self, token_ids: Sequence[int]) -> str:
        """The text that became certain with these tokens."""
        return "".join([self.feed(token_id) for token_id in token_ids])

    def tail(self) -> str:
        """What remains when no token follows."""
        return self._decode()[len(self._prefix) :]

    def _decode(self) -> str:
        return self._backend.decode(self._window, skip_special_tokens=False)
