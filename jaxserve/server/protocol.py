"""Requests as clients write them: OpenAI's API reference, with vLLM's additional sampling fields.

Unknown fields are kept, so that they can be named or refused. Fields that are None count as not given.
"""

import json
import math
import re
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from jaxserve.checks import ParameterError, suggest
from jaxserve.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

# Book-keeping of OpenAI's own service: no meaning for an answer, so they are neither unknown nor an error.
BOOKKEEPING = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
})  # fmt: skip

# Not supported yet, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "suffix": (None, ""),
    "prompt_embeds": (None,),
    "use_beam_search": (None, False),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "web_search_options": (None,),
    "documents": (None, []),
    "mm_processor_kwargs": (None, {}),
    "kv_transfer_params": (None,),
    "reasoning_effort": (None, "none"),
    "thinking_token_budget": (None, -1),
}


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


Number = Annotated[float, AfterValidator(_finite)]
PRINTABLE = r"^[ -~]*$"  # ids come back in a header


class StreamOptions(BaseModel):
    """What a stream holds besides the text."""

    model_config = ConfigDict(extra="allow")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ResponseFormat(BaseModel):
    """The form of the text; "text" is plain."""

    model_config = ConfigDict(extra="allow")

    type: str


class Generate(BaseModel):
    """What completions and chat completions have in common; the fields of `SamplingParams` mean the same as there."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: int | None = None
    min_p: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, Number] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    repetition_detection: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    priority: int | None = None
    request_id: str | None = Field(default=None, max_length=256, pattern=PRINTABLE)
    cache_salt: str | None = Field(default=None, min_length=1)
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    x_effective_params: bool | None = None

    @property
    def unknown(self) -> list[str]:
        """Names of fields that mean nothing here."""
        return sorted((self.model_extra or {}).keys() - BOOKKEEPING - UNSUPPORTED.keys())

    def check(self) -> None:
        """Refuse what does not fit together or is not there yet; raises `ParameterError`."""
        for name, harmless in UNSUPPORTED.items():
            value = (self.model_extra or {}).get(name)
            if value not in harmless:
                raise ParameterError(f"{name} is not supported yet; leave it out.", parameter=name)
        if self.response_format is not None and self.response_format.type != "text":
            message = f"response_format of type {self.response_format.type!r} is not supported yet; use 'text'."
            raise ParameterError(message, parameter="response_format")
        if self.stream_options is not None and not self.stream:
            raise ParameterError("stream_options needs stream=true.", parameter="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise ParameterError("prompt_logprobs is not available with stream=true.", parameter="prompt_logprobs")

    def sampling_fields(self) -> dict[str, Any]:
        """The given fields that `SamplingParams` has, by its names."""
        given = {name: getattr(self, name) for name in SAMPLING_FIELDS if getattr(self, name) is not None}
        if "repetition_detection" in given:
            given["repetition_detection"] = _made(RepetitionDetectionParams, "repetition_detection", given)
        if "structured_outputs" in given:
            given["structured_outputs"] = _made(StructuredOutputsParams, "structured_outputs", given)
        return given

    def tokenization(self) -> dict[str, Any]:
        """How a prompt's text becomes tokens, for the engine."""
        names = ("truncate_prompt_tokens", "truncation_side")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def _made[Params](kind: type[Params], name: str, given: dict[str, Any]) -> Params:
    """The field `name` as one of the engine's own objects."""
    known = [item.name for item in fields(kind)]  # type: ignore[arg-type]
    for key in sorted(given[name].keys() - set(known)):
        raise ParameterError(f"{name} has no field {key!r}.{suggest(key, known)}", parameter=name)
    return kind(**given[name])


SAMPLING_FIELDS = (
    "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens", "logit_bias",
    "allowed_token_ids", "bad_words", "skip_special_tokens", "spaces_between_special_tokens", "prompt_logprobs",
    "repetition_detection", "structured_outputs",
)  # fmt: skip


class CompletionRequest(Generate):
    """`POST /v1/completions`. `max_tokens` is 16 when it is not given."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None

    def check(self) -> None:
        """As for all requests, and what only completions have."""
        super().check()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ParameterError(f"best_of={self.best_of} must equal n={self.n or 1}.", parameter="best_of")
        if not self.prompts():
            raise ParameterError("prompt is an empty list; give at least one prompt.", parameter="prompt")

    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]

    @property
    def only_echo(self) -> bool:
        """Whether nothing but the prompt is wanted, such as for its log-probabilities."""
        return bool(self.echo) and self.max_tokens == 0

    def tokenization(self) -> dict[str, Any]:
        options = super().tokenization()
        return options if self.add_special_tokens is None else options | {"add_special_tokens": self.add_special_tokens}

    def sampling_fields(self) -> dict[str, Any]:
        most = 16 if self.max_tokens is None else 1 if self.only_echo else self.max_tokens
        given = super().sampling_fields() | {"max_tokens": most}
        if self.logprobs is not None:
            given["logprobs"] = self.logprobs
            if self.echo:
                given.setdefault("prompt_logprobs", self.logprobs)
        return given


class ChatCompletionRequest(Generate):
    """`POST /v1/chat/completions`. Without `max_tokens` the answer may fill the context."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        """As for all requests, and what only chats have."""
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise ParameterError("top_logprobs needs logprobs=true.", parameter="top_logprobs")
        if self.top_logprobs is not None and self.top_logprobs < 0:
            raise ParameterError(f"top_logprobs must be at least 0, got {self.top_logprobs}.", parameter="top_logprobs")
        if self.add_generation_prompt and self.continue_final_message:
            message = "continue_final_message and add_generation_prompt exclude each other; set one of them."
            raise ParameterError(message, parameter="continue_final_message")

    def sampling_fields(self) -> dict[str, Any]:
        most = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        given = super().sampling_fields() | {"max_tokens": most}
        return given | {"logprobs": self.top_logprobs or 0} if self.logprobs else given

    def template_options(self) -> dict[str, Any]:
        """Arguments of `Tokenizer.render_chat`."""
        going_on = bool(self.continue_final_message)
        opening = not going_on if self.add_generation_prompt is None else self.add_generation_prompt
        return template_options(self.chat_template_kwargs, opening, going_on)


def length_field(body: Generate) -> str:
    """The field that limits the answer."""
    newer = isinstance(body, ChatCompletionRequest) and body.max_completion_tokens is not None
    return "max_completion_tokens" if newer else "max_tokens"


def in_clients_words(error: ValueError | TypeError, body: Generate) -> ParameterError:
    """What the engine says about a value, under the name that the client gave it (None if it was none of its own)."""
    names = {"prompt_token_ids": "prompt"}
    if isinstance(body, ChatCompletionRequest):
        names = {"logprobs": "top_logprobs", "prompt": "messages", "prompt_token_ids": "messages"}
        names["max_tokens"] = length_field(body)
    message = str(error) or type(error).__name__
    place = error.parameter if isinstance(error, ParameterError) and error.parameter else message
    own = re.match(r"\w*", place)
    name = own[0] if own else ""
    new = names.get(name, name)
    if new not in type(body).model_fields:
        return ParameterError(message, parameter=error.parameter if isinstance(error, ParameterError) else None)
    told = new + message[len(name) :] if message.startswith(name) else message
    return ParameterError(told, parameter=new + place[len(name) :] if place != message else new)


def template_options(kwargs: dict[str, Any] | None, opening: bool, going_on: bool) -> dict[str, Any]:
    """Arguments of `Tokenizer.render_chat` with a request's own variables, which must not choose a template file."""
    own = {"add_generation_prompt": opening, "continue_final_message": going_on}
    clash = (kwargs or {}).keys() & {*own, "messages", "tools", "chat_template"}
    if clash:
        message = f"chat_template_kwargs may not hold {sorted(clash)[0]!r}."
        raise ParameterError(message, parameter="chat_template_kwargs")
    return (kwargs or {}) | own


def check_unicode(body: Any) -> None:
    """Refuse halves of surrogate pairs in a JSON value: no encoding can write them, wherever they would turn up."""
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ParameterError("the body holds half of a surrogate pair, which is no valid Unicode.") from error


class TokenizeRequest(BaseModel):
    """`POST /tokenize`: a text, or a conversation for the chat template."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False

    def template_options(self) -> dict[str, Any]:
        """Arguments of `Tokenizer.render_chat`."""
        return template_options(self.chat_template_kwargs, self.add_generation_prompt, self.continue_final_message)


class DetokenizeRequest(BaseModel):
    """`POST /detokenize`: token ids."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    tokens: list[int]
