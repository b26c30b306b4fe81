"""From what a caller hands in to a `Request` the engine can run: prompt forms, tokenising, checks against the model.

Every bad input ends in its own error: `TypeError` for a wrong type, `ParameterError` (a `ValueError`) for a value that
cannot be used. The caller's objects are never changed.
"""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, no_type_check, runtime_checkable

import numpy as np

from jaxserve.checks import (
    ParameterError,
    UnsupportedError,
    check_bool,
    check_choice,
    check_float,
    check_int,
    require,
    shorten,
    suggest,
)
from jaxserve.config import EngineConfig
from jaxserve.sampling_params import BeamSearchParams, SamplingParams
from jaxserve.types import LogitEdits, PromptType, Request, Sequence

PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
UNSUPPORTED_PROMPT_KEYS = (
    "prompt_embeds",
    "multi_modal_data",
    "multi_modal_uuids",
    "mm_processor_kwargs",
    "token_type_ids",
    "encoder_prompt",
    "decoder_prompt",
)


@runtime_checkable
class PromptTokenizer(Protocol):
    """What this module needs of a tokenizer; `max_chars_per_token` is the length of its longest token's text."""

    @property
    def max_chars_per_token(self) -> int: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class TokenizationOptions:
    """`tokenization_kwargs`, checked.

    Attributes:
        truncate_prompt_tokens: keep at most this many tokens; -1 is `max_length`, or all that leaves room for one.
        truncation_side: the end that is cut off, "left" or "right".
        add_special_tokens: whether the tokenizer adds the model's own tokens to a text.
        max_length: a longer prompt is refused, or cut to it by `truncate_prompt_tokens=-1`.
    """

    truncate_prompt_tokens: int | None = None
    truncation_side: str = "left"
    add_special_tokens: bool = True
    max_length: int | None = None

    @classmethod
    @no_type_check
    def parse(cls, given: Mapping[str, Any] | None) -> "TokenizationOptions":
        """Check the caller's mapping.

        Raises:
            TypeError, ParameterError: an unknown name or a bad value.
        """
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(f"tokenization_kwargs must be a dict, got {shorten(given)}.")
        values = {name: value for name, value in (given or {}).items() if value is not None}
        for name in values.keys() - cls.__dataclass_fields__.keys():
            known = ", ".join(cls.__dataclass_fields__)
            raise TypeError(f"tokenization_kwargs has no option {shorten(name)}; the options are {known}.")
        for name, low in (("truncate_prompt_tokens", -1), ("max_length", 1)):
            if name in values:
                values[name] = check_int(name, values[name])
                require(
                    values[name] >= low and values[name] != 0, name, values[name], "be 1 or more (or -1 to truncate)"
                )
        if "truncation_side" in values:
            check_choice("truncation_side", values["truncation_side"], ("left", "right"))
        check_bool("add_special_tokens", values.get("add_special_tokens", True))
        return cls(**values)


@no_type_check  # for annotation checkers: whatever a caller passes gets a message of its own
def make_request(
    request_id: str,
    prompt: PromptType,
    params: SamplingParams | None = None,
    *,
    tokenizer: PromptTokenizer | None,
    config: EngineConfig,
    arrival_time: float | None = None,
    priority: int = 0,
    tokenization_kwargs: Mapping[str, Any] | None = None,
) -> Request:
    """Check and tokenise one prompt.

    Args:
        request_id: names the request in outputs.
        prompt: text, token ids, or a dict with one of them.
        params: None takes the model's defaults. A private copy with every limit filled in goes into the request.
        tokenizer: None when the engine has none; then only token ids are prompts.
        config: the engine's limits.
        arrival_time: wall-clock seconds; None is now.
        priority: lower runs first; needs `scheduling_policy="priority"`.
        tokenization_kwargs: see `TokenizationOptions`.

    Raises:
        TypeError: something has the wrong type.
        ParameterError: (a `ValueError`) a value cannot be used; the message says which, why and what to do.
        UnsupportedError: (also a `NotImplementedError`) a feature that does not exist yet.
    """
    if not isinstance(request_id, str):
        raise TypeError(f"request_id must be a string, got {shorten(request_id)} of type {type(request_id).__name__}.")
    priority = check_int("priority", priority)
    rule = 'be 0 unless the engine has scheduling_policy="priority"'
    require(priority == 0 or config.scheduling_policy == "priority", "priority", priority, rule)
    parts = split_prompt(prompt)
    options = TokenizationOptions.parse(tokenization_kwargs)
    ids = _token_ids(parts, tokenizer, config, options)
    own = resolve_params(params, len(ids), config, has_tokenizer=tokenizer is not None)
    return Request(
        request_id=request_id,
        prompt_token_ids=ids,
        params=own,
        prompt=parts.get("prompt"),
        arrival_time=time.time() if arrival_time is None else check_float("arrival_time", arrival_time),
        priority=priority,
        cache_keys={"salt": parts["cache_salt"].encode("utf-8")} if "cache_salt" in parts else {},
        edits=logit_edits(own, tokenizer, config.vocab_size),
    )


@no_type_check
def split_prompt(prompt: PromptType) -> dict[str, Any]:
    """A prompt of any form as a dict with `prompt` or `prompt_token_ids` (or both: the text is then only echoed).

    Raises:
        TypeError, ParameterError, UnsupportedError: it has another form.
    """
    if isinstance(prompt, str):
        parts = {"prompt": prompt}
    elif isinstance(prompt, Mapping):
        parts = {key: value for key, value in prompt.items() if value is not None}
    elif isinstance(prompt, list | tuple | np.ndarray):
        parts = {"prompt_token_ids": prompt}
    else:
        raise TypeError(
            f"A prompt must be a string, a list of token ids, or a dict with one of them, got {shorten(prompt)} "
            f"of type {type(prompt).__name__}."
        )
    for key in parts.keys() - set(PROMPT_KEYS):
        if key in UNSUPPORTED_PROMPT_KEYS:
            raise UnsupportedError(f"{key} in a prompt is not supported yet.", parameter=key, value=parts[key])
        close = suggest(key, PROMPT_KEYS) if isinstance(key, str) else ""
        raise TypeError(f"A prompt dict has no key {shorten(key)}; the keys are {', '.join(PROMPT_KEYS)}.{close}")
    if "prompt" not in parts and "prompt_token_ids" not in parts:
        raise TypeError("A prompt dict must have the key prompt (text) or prompt_token_ids (token ids).")
    for key in ("prompt", "cache_salt"):
        if key in parts:
            _check_text(key, parts[key])
    require(parts.get("cache_salt") != "", "cache_salt", "", "not be empty; leave it out")
    return parts


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a string, got {shorten(text)} of type {type(text).__name__}.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ParameterError(
            f"{name} is not valid Unicode: character {error.start} is {text[error.start]!r}, half of a surrogate pair. "
            'Repair the text, for example with text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").',
            parameter=name,
            value=text,
        ) from error


def _token_ids(
    parts: Mapping[str, Any], tokenizer: PromptTokenizer | None, config: EngineConfig, options: TokenizationOptions
) -> np.ndarray:
    """Checked token ids of a prompt, int32 `[num_prompt]`, a new array."""
    most = min(options.max_length or config.max_model_len, config.max_model_len)
    if "prompt_token_ids" in parts:
        ids = check_prompt_ids(parts["prompt_token_ids"], config.vocab_size)
    else:
        ids = _encode(parts["prompt"], tokenizer, config, options, most)
    require(len(ids) > 0, "prompt", [], "not be empty: it needs at least one token")
    keep = options.truncate_prompt_tokens
    if keep is not None:
        keep = min(most, config.max_model_len - 1) if keep == -1 else keep
        ids = (ids[max(len(ids) - keep, 0) :] if options.truncation_side == "left" else ids[:keep]).copy()
    if len(ids) > most or len(ids) >= config.max_model_len:
        raise _too_long(f"{len(ids)} tokens", most, config, options)
    return ids


def _too_long(size: str, most: int, config: EngineConfig, options: TokenizationOptions) -> ParameterError:
    if options.max_length is not None and most < config.max_model_len:
        limit = f"the max_length of {most} tokens given with it"
    else:
        limit = f"the context: max_model_len is {config.max_model_len} tokens and one is needed for the output"
    return ParameterError(
        f"The prompt of {size} is too long for {limit}. Shorten it, pass "
        'tokenization_kwargs={"truncate_prompt_tokens": -1}, or raise max_model_len if the model allows it.',
        parameter="prompt",
        value=size,
    )


def _encode(
    text: str, tokenizer: PromptTokenizer | None, config: EngineConfig, options: TokenizationOptions, most: int
) -> np.ndarray:
    if tokenizer is None:
        raise ParameterError(
            "A text prompt needs a tokenizer, but the engine was made with skip_tokenizer_init=True; "
            "pass prompt_token_ids.",
            parameter="prompt",
            value=text,
        )
    # Tokenising costs time in the length of the text: what cannot fit is refused first.
    if options.truncate_prompt_tokens is None and len(text) > most * tokenizer.max_chars_per_token:
        least = -(-len(text) // tokenizer.max_chars_per_token)
        raise _too_long(f"{len(text)} characters (at least {least} tokens)", most, config, options)
    ids = tokenizer.encode(text, add_special_tokens=options.add_special_tokens)
    return check_prompt_ids(ids, config.vocab_size)


@no_type_check
def check_prompt_ids(ids: Any, vocab_size: int) -> np.ndarray:
    """A caller's token ids as a new int32 array `[num_prompt]`.

    Raises:
        TypeError: it is no list (tuple, one-dimensional array) of integers; names the index.
        ParameterError: an id is negative or not in the vocabulary; names id and index.
    """
    if isinstance(ids, np.ndarray):
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise TypeError(f"prompt_token_ids must be a list of integers, got an array {ids.dtype}{list(ids.shape)}.")
        ids = ids.tolist()
    if not isinstance(ids, list | tuple):
        raise TypeError(
            f"prompt_token_ids must be a list of integers, got {shorten(ids)} of type {type(ids).__name__}."
        )
    plain = ids
    if not set(map(type, ids)) <= {int}:  # the loop over a long prompt is for the rare case
        plain = [check_int(f"prompt_token_ids[{i}]", token) for i, token in enumerate(ids)]
    if plain and (min(plain) < 0 or max(plain) >= vocab_size):
        index = next(i for i, token in enumerate(plain) if not 0 <= token < vocab_size)
        rule = f"be in the vocabulary, 0 to {vocab_size - 1}"
        require(False, f"prompt_token_ids[{index}]", plain[index], rule)
    return np.array(plain, np.int32)


@no_type_check
def resolve_params(
    params: SamplingParams | None, num_prompt: int, config: EngineConfig, *, has_tokenizer: bool
) -> SamplingParams:
    """A private copy of the params, checked against the model, with `max_tokens` cut to what is left of the context.

    `logprobs=-1` and `prompt_logprobs=-1` become the vocabulary's size, and without a tokenizer `detokenize` False.

    Raises:
        TypeError, ParameterError, UnsupportedError: as `make_request`.
    """
    params = SamplingParams(**config.default_sampling) if params is None else params
    if isinstance(params, BeamSearchParams):
        raise TypeError("BeamSearchParams are for LLM.beam_search; generate takes SamplingParams.")
    if not isinstance(params, SamplingParams):
        raise TypeError(
            f"sampling_params must be SamplingParams, got {shorten(params)} of type {type(params).__name__}."
        )
    own = params.validated()
    _refuse_unsupported(own)
    left = config.max_model_len - num_prompt
    own.max_tokens = left if own.max_tokens is None else min(own.max_tokens, left)
    rule = f"be at most max_tokens, which is {own.max_tokens} after a prompt of {num_prompt} tokens in a context of "
    require(own.min_tokens <= own.max_tokens, "min_tokens", own.min_tokens, rule + f"{config.max_model_len}")
    _check_vocabulary(own, config.vocab_size)
    most = config.max_logprobs
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(own, name)
        wanted = config.vocab_size if value == -1 else value
        if value is not None:
            rule = f"be at most max_logprobs ({most}); raise max_logprobs (-1 is no limit)"
            require(most == -1 or wanted <= most, name, value, rule)
            require(wanted <= config.vocab_size, name, value, f"be at most the vocabulary ({config.vocab_size} tokens)")
        setattr(own, name, wanted)
    if not has_tokenizer:
        for name in ("stop", "bad_words"):
            rule = "be empty without a tokenizer (skip_tokenizer_init=True)"
            require(not getattr(own, name), name, getattr(own, name), rule)
        own.detokenize = False
    return own


def _refuse_unsupported(params: SamplingParams) -> None:
    for name in ("structured_outputs", "thinking_token_budget", "logprob_token_ids", "flat_logprobs", "extra_args"):
        value = getattr(params, name)
        if value is not None and value is not False and value != {}:
            raise UnsupportedError(f"{name} is not supported yet; leave it out.", parameter=name, value=value)


def _check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    fields: Mapping[str, Collection[int]] = {
        "stop_token_ids": params.stop_token_ids or (),
        "allowed_token_ids": params.allowed_token_ids or (),
        "logit_bias": params.logit_bias or (),
    }
    for name, ids in fields.items():
        outside = [token for token in ids if token >= vocab_size]
        rule = f"have ids in the vocabulary, 0 to {vocab_size - 1}"
        require(not outside, name, outside, rule)


def logit_edits(params: SamplingParams, tokenizer: PromptTokenizer | None, vocab_size: int) -> LogitEdits | None:
    """The params' constraints on single tokens, resolved to ids; None when there are none.

    Raises:
        ParameterError: a bad word has no tokens.
    """
    words = bad_word_ids(params.bad_words, tokenizer) if params.bad_words and tokenizer is not None else ()
    outside = [word for word in words if max(word) >= vocab_size]
    require(not outside, "bad_words", outside, f"have token ids in the vocabulary, 0 to {vocab_size - 1}")
    bias = tuple((params.logit_bias or {}).items())
    allowed = None if params.allowed_token_ids is None else frozenset(params.allowed_token_ids)
    if not (bias or words or allowed):
        return None
    return LogitEdits(bias, allowed, tuple(words))


def bad_word_ids(bad_words: Collection[str], tokenizer: PromptTokenizer) -> list[tuple[int, ...]]:
    """The token sequences that spell the words, each at the start of a text and after a space, without duplicates.

    Raises:
        ParameterError: a word has no tokens.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in bad_words:
        _check_text("bad_words", word)
        for text in (word, " " + word.lstrip()):
            ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            require(bool(ids), "bad_words", word, "have words that the tokenizer knows tokens for")
            found[ids] = None
    return list(found)


def make_sequences(
    request: Request, *, eos_ids: Collection[int], max_model_len: int, fallback_seed: int
) -> list[Sequence]:
    """The `n` continuations of a request, each with its own token buffer and seed (the request's seed + index).

    Args:
        request: as `make_request` made it.
        eos_ids: the model's end-of-sequence ids.
        max_model_len: bounds the buffers.
        fallback_seed: for a request without a seed.
    """
    params, prompt = request.params, request.prompt_token_ids
    eos = frozenset() if params.ignore_eos else frozenset(eos_ids)
    left = max_model_len - len(prompt)
    room = left if params.max_tokens is None else min(params.max_tokens, left)
    seed = fallback_seed if params.seed is None else params.seed
    stop = eos | frozenset(params.stop_token_ids or ())
    sequences = []
    for index in range(params.n):
        tokens = np.zeros(len(prompt) + room, np.int32)
        tokens[: len(prompt)] = prompt
        sequences.append(
            Sequence(
                request=request,
                index=index,
                seed=(seed + index) % 2**64,
                tokens=tokens,
                num_prompt=len(prompt),
                num_tokens=len(prompt),
                stop_ids=stop,
                eos_ids=eos,
                free_from=len(prompt) + params.min_tokens if stop else 0,
            )
        )
    return sequences
