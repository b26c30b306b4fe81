"""How a request is to be sampled: names, defaults, bounds and errors as vLLM users know them.

The classes are mutable, because users change fields after construction. The engine therefore never keeps the caller's
object: it takes `SamplingParams.validated()`, a checked private copy. Wrong types raise `TypeError`, wrong values
`ParameterError` (a `ValueError`); the message names the field, the value, the limit and what to do.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any, Self, no_type_check

from jaxserve.checks import (
    check_bool,
    check_float,
    check_int,
    check_strings,
    check_token_ids,
    require,
    shorten,
    suggest,
)

GREEDY_TEMPERATURE = 1e-5  # below it the most likely token is taken
MAX_TEMPERATURE = 2.0
MAX_N = 16_384
MAX_LOGPROB_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 100.0  # `from_optional` clamps to it, as the OpenAI API documents
_INT64 = (-(2**63), 2**63 - 1)


class RequestOutputKind(Enum):
    """What each output of a running request holds: everything so far, only what is new, or only the final result."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@no_type_check  # for annotation checkers: every field is checked when it is set up, with a message of its own
@dataclass
class StructuredOutputsParams:
    """A constraint on the generated text: exactly one of json, regex, choice, grammar, json_object, structural_tag."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | None = None

    def __post_init__(self) -> None:
        for name in ("regex", "grammar", "structural_tag", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"structured_outputs.{name} must be a string, got {shorten(value)}.")
        if self.json is not None and not isinstance(self.json, str | dict):
            raise TypeError(f"structured_outputs.json must be a JSON schema (str or dict), got {shorten(self.json)}.")
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            check_bool(f"structured_outputs.{name}", getattr(self, name))
        if self.json_object is not None:
            check_bool("structured_outputs.json_object", self.json_object)
        given = [name for name in ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
                 if getattr(self, name) not in (None, False)]  # fmt: skip
        rule = "have exactly one of json, regex, choice, grammar, json_object and structural_tag"
        require(len(given) == 1, "structured_outputs", given, rule)
        if self.choice is not None:
            self.choice = check_strings("structured_outputs.choice", self.choice)
            require(bool(self.choice), "structured_outputs.choice", self.choice, "not be empty")
        if self.grammar is not None:
            require(bool(self.grammar.strip()), "structured_outputs.grammar", self.grammar, "not be blank")


@no_type_check  # for annotation checkers: every field is checked when it is set up, with a message of its own
@dataclass
class RepetitionDetectionParams:
    """End a request whose output repeats itself, with `finish_reason="repetition"`.

    It ends when its last tokens are some pattern of `min_pattern_size` to `max_pattern_size` tokens, repeated
    `min_count` times in a row. `max_pattern_size=0` is off; `min_pattern_size=0` counts as 1.
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0

    def __post_init__(self) -> None:
        for name in ("max_pattern_size", "min_pattern_size", "min_count"):
            number = check_int(f"repetition_detection.{name}", getattr(self, name))
            require(number >= 0, f"repetition_detection.{name}", number, "be 0 or more")
            setattr(self, name, number)
        rule = f"be at most max_pattern_size ({self.max_pattern_size})"
        require(
            self.min_pattern_size <= self.max_pattern_size,
            "repetition_detection.min_pattern_size",
            self.min_pattern_size,
            rule,
        )
        if self.max_pattern_size > 0:
            require(self.min_count >= 2, "repetition_detection.min_count", self.min_count, "be 2 or more")


@no_type_check  # for annotation checkers: every field is checked when it is set up, with a message of its own
@dataclass(kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, when it ends and what its output holds.

    Attributes:
        n: continuations per prompt, 1 to 16384; more than one needs a temperature above 0. Continuation `i` of a
            seeded request samples with `seed + i`.
        presence_penalty: subtracted from the logits of tokens that were generated already, [-2, 2].
        frequency_penalty: the same times the number of occurrences, [-2, 2].
        repetition_penalty: divides positive and multiplies negative logits of prompt and generated tokens, > 0.
        temperature: [0, 2]; below 1e-5 decoding is greedy. Small values are used as given, never raised.
        top_p: keep the most likely tokens that together reach this probability, (0, 1].
        top_k: keep this many most likely tokens; 0 or -1 keeps all.
        min_p: drop tokens less likely than this fraction of the most likely one, [0, 1].
        seed: int64; None or -1 draws one. The same seed gives the same tokens whatever else runs beside the request.
        stop: a string or strings that end the text; they are cut off unless `include_stop_str_in_output`.
        stop_token_ids: token ids that end it; kept in `token_ids`, dropped from the text in the same way.
        ignore_eos: go on after the end-of-sequence token.
        max_tokens: the most tokens to generate; None is what is left of the context.
        min_tokens: end-of-sequence and stop tokens are masked and stop strings ignored before this many tokens.
        logprobs: log-probabilities of this many most likely tokens and of the sampled one; -1 is the vocabulary.
        prompt_logprobs: the same for the prompt; the request then does not read the prefix cache.
        logprob_token_ids: log-probabilities of exactly these tokens, at most 128.
        flat_logprobs: a compact container instead of dicts.
        detokenize: produce text; without it stop strings cannot be used.
        skip_special_tokens, spaces_between_special_tokens: how text is made of special tokens.
        output_kind: see `RequestOutputKind`.
        structured_outputs: a constraint on the text.
        logit_bias: added to the logits of these token ids.
        allowed_token_ids: the only token ids that may be sampled.
        bad_words: words that must not be completed.
        thinking_token_budget: the most tokens of a reasoning section, -1 unlimited.
        repetition_detection: end a request that repeats itself.
        extra_args: values for extensions of the engine.
        skip_reading_prefix_cache: compute the whole prompt; None is True exactly when `prompt_logprobs` is set.

    Raises:
        ParameterError: (a `ValueError`) a value outside these bounds.
        TypeError: a value of the wrong type; a bool is no number here.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    structured_outputs: StructuredOutputsParams | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    thinking_token_budget: int | None = None
    repetition_detection: RepetitionDetectionParams | None = None
    extra_args: dict[str, Any] | None = None
    skip_reading_prefix_cache: bool | None = None

    def __post_init__(self) -> None:
        self._check_types()
        self._check_distribution()
        self._check_lengths()
        self._check_logprobs()

    def _check_types(self) -> None:
        """Give every field its plain Python type; lists and dicts become the object's own."""
        for name in ("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p"):
            setattr(self, name, check_float(name, getattr(self, name)))
        for name in ("n", "top_k", "min_tokens"):
            setattr(self, name, check_int(name, getattr(self, name)))
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)  # OpenAI clients send a bool
            setattr(self, name, (1 if value else None) if isinstance(value, bool) else value)
        for name in ("seed", "max_tokens", "logprobs", "prompt_logprobs", "thinking_token_budget"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else check_int(name, value))
        for name in ("ignore_eos", "flat_logprobs", "detokenize", "skip_special_tokens",
                     "spaces_between_special_tokens", "include_stop_str_in_output"):  # fmt: skip
            check_bool(name, getattr(self, name))
        if self.skip_reading_prefix_cache is not None:
            check_bool("skip_reading_prefix_cache", self.skip_reading_prefix_cache)
        self.stop = check_strings("stop", [self.stop] if isinstance(self.stop, str) else self.stop)
        self.bad_words = check_strings("bad_words", self.bad_words)
        self.stop_token_ids = check_token_ids("stop_token_ids", self.stop_token_ids)
        self._check_classes()
        self._check_biases()

    def _check_classes(self) -> None:
        classes = {
            "output_kind": (RequestOutputKind,),
            "structured_outputs": (StructuredOutputsParams, type(None)),
            "repetition_detection": (RepetitionDetectionParams, type(None)),
            "extra_args": (dict, type(None)),
        }
        for name, allowed in classes.items():
            value = getattr(self, name)
            if not isinstance(value, allowed):
                names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in allowed)
                raise TypeError(f"{name} must be {names}, got {shorten(value)} of type {type(value).__name__}.")
        for name in ("structured_outputs", "repetition_detection"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else replace(value))  # a copy, checked again
        self.extra_args = None if self.extra_args is None else dict(self.extra_args)

    def _check_biases(self) -> None:
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise TypeError(f"logit_bias must be a dict of token id to number, got {shorten(self.logit_bias)}.")
            check_token_ids("logit_bias", list(self.logit_bias))
            self.logit_bias = {int(key): check_float(f"logit_bias[{key}]", v) for key, v in self.logit_bias.items()}
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = check_token_ids("allowed_token_ids", self.allowed_token_ids)
            rule = "not be empty; use None to allow every token"
            require(bool(self.allowed_token_ids), "allowed_token_ids", self.allowed_token_ids, rule)

    def _check_distribution(self) -> None:
        require(1 <= self.n <= MAX_N, "n", self.n, f"be between 1 and {MAX_N}")
        for name in ("presence_penalty", "frequency_penalty"):
            require(-2.0 <= getattr(self, name) <= 2.0, name, getattr(self, name), "be between -2 and 2")
        require(self.repetition_penalty > 0.0, "repetition_penalty", self.repetition_penalty, "be greater than 0")
        rule = f"be between 0 (greedy) and {MAX_TEMPERATURE:g}"
        require(0.0 <= self.temperature <= MAX_TEMPERATURE, "temperature", self.temperature, rule)
        require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "be greater than 0 and at most 1 (1 is off)")
        require(self.top_k >= -1, "top_k", self.top_k, "be 1 or more, or 0 or -1 for off")
        self.top_k = max(self.top_k, 0)
        require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "be between 0 (off) and 1")
        self.seed = None if self.seed == -1 else self.seed
        if self.seed is not None:
            require(_INT64[0] <= self.seed <= _INT64[1], "seed", self.seed, "fit in 64 bits (-2**63 to 2**63 - 1)")
        rule = "be 1 with greedy sampling, since all continuations would be equal; raise temperature"
        require(self.n == 1 or not self.greedy, "n", self.n, rule)

    def _check_lengths(self) -> None:
        if self.max_tokens is not None:
            rule = "be 1 or more, or None for what is left of the context"
            require(self.max_tokens >= 1, "max_tokens", self.max_tokens, rule)
            rule = f"be between 0 and max_tokens ({self.max_tokens})"
            require(self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, rule)
        require(self.min_tokens >= 0, "min_tokens", self.min_tokens, "be 0 or more")
        rule = "be empty when detokenize is False, since it is found in the text; use stop_token_ids"
        require(self.detokenize or not self.stop, "stop", self.stop, rule)
        if self.thinking_token_budget is not None:
            budget = self.thinking_token_budget
            require(budget >= -1, "thinking_token_budget", budget, "be 0 or more, or -1 for no limit")

    def _check_logprobs(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            require(value is None or value >= -1, name, value, "be 0 or more, or -1 for the whole vocabulary")
        if self.logprob_token_ids is None:
            return
        ids = self.logprob_token_ids = check_token_ids("logprob_token_ids", self.logprob_token_ids)
        rule = f"hold at most {MAX_LOGPROB_TOKEN_IDS} ids"
        require(len(ids) <= MAX_LOGPROB_TOKEN_IDS, "logprob_token_ids", ids, rule)
        rule = f"be None or the number of logprob_token_ids ({len(ids)})"
        require(self.logprobs in (None, len(ids)), "logprobs", self.logprobs, rule)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def stopcheck_strings(self) -> list[str]:
        """`stop` as a list, whatever form it was given in."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def clone(self) -> Self:
        """A deep copy, not checked."""
        return copy.deepcopy(self)

    def validated(self) -> Self:
        """A checked private copy with the derived values filled in; the engine works on it, never on the caller's.

        Greedy sampling turns top_p, top_k and min_p off, and `skip_reading_prefix_cache` becomes a bool.

        Raises:
            ParameterError, TypeError: a field was set to something invalid after construction.
        """
        own = replace(self)
        if own.greedy:
            own.top_p, own.top_k, own.min_p = 1.0, 0, 0.0
        if own.skip_reading_prefix_cache is None:
            own.skip_reading_prefix_cache = own.prompt_logprobs is not None
        return own

    @classmethod
    def from_optional(cls, **values: Any) -> Self:
        """Build from values that may be None, which means the default (for `max_tokens` the rest of the context).

        Keys of `logit_bias` may be strings of digits and its values are clamped to [-100, 100], as JSON clients expect.
        """
        known = [item.name for item in fields(cls)]
        for name in values.keys() - set(known):
            raise TypeError(f"SamplingParams has no field {name!r}.{suggest(name, known)}")
        given: dict[str, Any] = {**values}
        for name in [key for key, value in values.items() if value is None and key != "max_tokens"]:
            del given[name]
        if isinstance(given.get("logit_bias"), Mapping):
            given["logit_bias"] = dict(_json_biases(given["logit_bias"].items()))
        return cls(**given)


def _json_biases(items: Iterable[tuple[object, object]]) -> Iterable[tuple[int, float]]:
    for key, value in items:
        token = int(key) if isinstance(key, str) and key.isascii() and key.removeprefix("-").isdigit() else key
        bias = check_float(f"logit_bias[{key!r}]", value)
        yield check_int("logit_bias key", token), max(-MAX_LOGIT_BIAS, min(MAX_LOGIT_BIAS, bias))


@no_type_check  # for annotation checkers: every field is checked when it is set up, with a message of its own
@dataclass(kw_only=True)
class BeamSearchParams:
    """Beam search: keep the `beam_width` most likely continuations, ranked by log-probability / length**length_penalty.

    Raises:
        ParameterError: a value out of bounds.
        TypeError: a value of the wrong type.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        for name in ("beam_width", "max_tokens"):
            setattr(self, name, check_int(name, getattr(self, name)))
            require(getattr(self, name) >= 1, name, getattr(self, name), "be 1 or more")
        for name in ("temperature", "length_penalty"):
            setattr(self, name, check_float(name, getattr(self, name)))
        rule = f"be between 0 and {MAX_TEMPERATURE:g}"
        require(0.0 <= self.temperature <= MAX_TEMPERATURE, "temperature", self.temperature, rule)
        for name in ("ignore_eos", "include_stop_str_in_output"):
            check_bool(name, getattr(self, name))
        if self.structured_outputs is not None and not isinstance(self.structured_outputs, StructuredOutputsParams):
            raise TypeError(f"structured_outputs must be StructuredOutputsParams, got {self.structured_outputs!r}.")
