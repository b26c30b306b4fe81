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
        longest = max(map(len, self._stops), default=1)
        self._reach = longest - 1  # characters before a token that a stop string ending in it may take
        self._held = 0 if self._include else self._reach
        self._parts: list[str] = []  # the text; joining it at each token would make long texts quadratic
        self._given = 0  # parts that `new_text` has returned
        self._tail = ""  # the last `_reach` characters
        self._ended = False
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
        shown = ids[:-1] if stop_token and not self._include else ids
        if self._stops:
            return self._search(ids, shown)
        self.num_tokens += len(ids)
        new = self._stream.feed(shown[0]) if len(shown) == 1 else self._stream.feed_all(shown)
        if new:
            self._parts.append(new)
        return None

    def _search(self, ids: Sequence[int], shown: Sequence[int]) -> str | None:
        """Take the ids one by one, up to the one that completes a stop string."""
        for i in range(len(ids)):
            if self.stop_reason is not None:
                break
            self.num_tokens += 1
            new = self._stream.feed(shown[i]) if i < len(shown) else ""
            if new:
                self._parts.append(new)
                near = self._tail + new
                self._tail = near[-self._reach :] if self._reach else ""
                if self.num_tokens >= self._min_tokens:
                    self._find_stop(near, len(new))
        return self.stop_reason

    def _find_stop(self, near: str, new: int) -> None:
        """Cut the text at the earliest stop string that ends in the last `new` characters of `near`, the text's end."""
        found = []
        for order, stop in enumerate(self._stops):
            start = near.find(stop, max(len(near) - new - len(stop) + 1, 0))
            if start >= 0:
                found.append((start, order, stop))
        if found:
            start, _, stop = min(found)
            self.stop_reason = stop
            dropped = len(near) - start - (len(stop) if self._include else 0)
            fresh = "".join(self._parts[self._given :])  # what was given out never holds a part of a stop string
            self._parts[self._given :] = [fresh[: len(fresh) - dropped]]

    def text(self, finished: bool) -> str:
        """The text so far; without `finished` it only ever grows.

        Until then `max(len(stop)) - 1` characters at its end are held back, as they may begin a stop string, and so
        are the bytes of an unfinished character.
        """
        text = "".join(self._parts) + (self._rest() if finished else "")
        if self.stop_reason is not None or finished or not self._held:
            return text
        return text[: -self._held]

    def new_text(self, finished: bool) -> str:
        """What `text` has gained since the last call; costs nothing for the text before."""
        parts, given = self._parts, self._given
        new = parts[given] if len(parts) == given + 1 else "".join(parts[given:])
        if finished:
            rest, self._ended = self._rest(), True
            parts.append(rest)
            new += rest
        elif self._held and self.stop_reason is None:
            parts[given:] = [new[: -self._held], new[-self._held :]]
            self._given += 1
            return parts[given]
        self._given = len(parts)
        return new

    def _rest(self) -> str:
        """What the bytes of an unfinished character show as when nothing follows."""
        return "" if self._ended or self.stop_reason is not None else self._stream.tail()


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
