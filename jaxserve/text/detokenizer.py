"""The text of one running sequence: incremental decoding and stop strings."""

from collections.abc import Sequence

import numpy as np

from jaxserve.sampling_params import SamplingParams
from jaxserve.text.decoding import PieceStream, WindowStream
from jaxserve.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns the generated ids of one sequence into text and finds its stop strings.

    The text is what decoding prompt and generated ids together adds to the prompt's own text, up to the earliest stop
    string. A stop string counts when the token that completes it is number `min_tokens` or later; it is looked for in
    the generated text alone. Tokens are taken one by one, so that the result does not depend on how they are grouped.

    In a run of byte-fallback tokens, those that are no valid UTF-8 turn into U+FFFD as they come; decoding all at once
    would void the whole run, characters that are shown already included.

    Attributes:
        num_tokens: generated tokens taken; those after a stop string are not.
        stop_reason: the stop string that matched, or None.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] | np.ndarray, params: SamplingParams):
        """Costs microseconds: of the prompt only the tokens at its ends are looked at."""
        self._stream = _make_stream(tokenizer, prompt_ids, params)
        self._stops = params.stopcheck_strings
        self._min_tokens = params.min_tokens
        self._include = params.include_stop_str_in_output
        self._held = 0 if self._include else max(map(len, self._stops), default=1) - 1
        self._text = ""
        self.num_tokens = 0
        self.stop_reason: str | None = None

    def update(self, new_ids: Sequence[int] | np.ndarray, stop_token: bool = False) -> str | None:
        """Take more generated ids; returns the stop string that ended the text, if one did.

        Args:
            new_ids: generated since the last call, in order.
            stop_token: the last of them ended the sequence (end-of-sequence or one of `stop_token_ids`). Its text is
                dropped unless `include_stop_str_in_output`.
        """
        ids = new_ids.tolist() if isinstance(new_ids, np.ndarray) else new_ids
        dropped = len(ids) - 1 if stop_token and not self._include else len(ids)
        for i, token_id in enumerate(ids):
            if self.stop_reason is not None:
                break
            self.num_tokens += 1
            if i == dropped:
                break
            new = self._stream.feed(token_id)
            if new:
                self._text += new
                if self._stops and self.num_tokens >= self._min_tokens:
                    self._find_stop(len(new))
        return self.stop_reason

    def text(self, finished: bool) -> str:
        """The text so far; without `finished` it only ever grows.

        Until then `max(len(stop)) - 1` characters at its end are held back, as they may begin a stop string, and so
        are the bytes of an unfinished character.
        """
        if self.stop_reason is not None:
            return self._text
        if finished:
            return self._text + self._stream.tail()
        return self._text[: max(len(self._text) - self._held, 0)] if self._held else self._text

    def _find_stop(self, new: int) -> None:
        """Cut the text at the earliest stop string that ends in its last `new` characters."""
        text, found = self._text, []
        for order, stop in enumerate(self._stops):
            start = text.find(stop, max(len(text) - new - len(stop) + 1, 0))
            if start >= 0:
                found.append((start, order, stop))
        if found:
            start, _, stop = min(found)
            self.stop_reason = stop
            self._text = text[: start + len(stop) if self._include else start]


def _make_stream(
    tokenizer: Tokenizer, prompt_ids: Sequence[int] | np.ndarray, params: SamplingParams
) -> PieceStream | WindowStream:
    hidden = tokenizer.special_ids if params.skip_special_tokens else frozenset()
    pieces = tokenizer.pieces
    if pieces is not None:  # such decoders put no spaces between special tokens
        return PieceStream(pieces, hidden, prompt_ids)
    return WindowStream(
        tokenizer.backend,
        hidden,
        prompt_ids,
        added_tokens=tokenizer.added_tokens,
        spaces_between_special_tokens=params.spaces_between_special_tokens,
    )
