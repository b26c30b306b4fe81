"""Answers as OpenAI's clients read them, made from the engine's outputs."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxserve.text import Tokenizer
from jaxserve.types import CompletionOutput, PositionLogprobs, RequestOutput

LOWEST = -9999.0  # stands for minus infinity, which JSON cannot write

Json = dict[str, Any]


def clamp(value: float) -> float:
    """A log-probability that JSON can write."""
    return max(value, LOWEST)


@dataclass
class Usage:
    """Tokens of a whole HTTP request: each prompt counts once, whatever `n` is."""

    prompts: dict[str, int] = field(default_factory=dict)
    cached: dict[str, int] = field(default_factory=dict)
    completion: int = 0

    def add(self, output: RequestOutput) -> None:
        """Count an output: a delta, or a final one."""
        self.prompts[output.request_id] = len(output.prompt_token_ids)
        self.cached[output.request_id] = output.num_cached_tokens
        for completion in output.outputs:
            self.completion += len(completion.token_ids)

    def json(self) -> Json:
        """The `usage` object."""
        prompt = sum(self.prompts.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion,
            "total_tokens": prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
        }


@dataclass(frozen=True)
class TokenNames:
    """Tokens as text, or as `token_id:N` where the client asked for that."""

    tokenizer: Tokenizer | None
    as_ids: bool

    def __call__(self, token_id: int, decoded: str | None = None) -> str:
        """The name of one token."""
        if self.as_ids or self.tokenizer is None:
            return f"token_id:{token_id}"
        return self.tokenizer.token_text(token_id) if decoded is None else decoded

    def entry(self, token_id: int, logprob: float, decoded: str | None = None) -> Json:
        """One token of a chat's `logprobs`."""
        name = self(token_id, decoded)
        return {"token": name, "logprob": clamp(logprob), "bytes": list(name.encode("utf-8", "surrogatepass"))}


def chat_logprobs(
    ids: Sequence[int], positions: Sequence[PositionLogprobs] | None, top: int, names: TokenNames
) -> Json | None:
    """The `logprobs` of a chat choice; `top` entries besides each sampled token."""
    if positions is None:
        return None
    content = []
    for token_id, position in zip(ids, positions, strict=True):
        own = position[token_id]
        best = sorted(position.items(), key=lambda item: item[1].rank or 0)[:top]
        entry = names.entry(token_id, own.logprob, own.decoded_token)
        entry["top_logprobs"] = [names.entry(key, value.logprob, value.decoded_token) for key, value in best]
        content.append(entry)
    return {"content": content}


def completion_logprobs(
    ids: Sequence[int], positions: Sequence[PositionLogprobs | None] | None, top: int, names: TokenNames, offset: int
) -> Json | None:
    """The `logprobs` of a completion choice; text offsets count characters from `offset`."""
    if positions is None:
        return None
    found: Json = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for token_id, position in zip(ids, positions, strict=True):
        own = None if position is None else position[token_id]
        name = names(token_id, None if own is None else own.decoded_token)
        found["text_offset"].append(offset)
        found["tokens"].append(name)
        found["token_logprobs"].append(None if own is None else clamp(own.logprob))
        best = sorted((position or {}).items(), key=lambda item: item[1].rank or 0)[: max(top, 1)]
        shown = {names(key, value.decoded_token): clamp(value.logprob) for key, value in best}
        found["top_logprobs"].append(None if own is None else shown | {name: clamp(own.logprob)})
        offset += len(name)
    return found


def prompt_logprobs_json(positions: Sequence[PositionLogprobs | None] | None) -> list[Json | None] | None:
    """`prompt_logprobs` as vLLM writes them: token id -> logprob, rank and text."""
    if positions is None:
        return None
    return [
        None
        if position is None
        else {
            str(key): {"logprob": clamp(value.logprob), "rank": value.rank, "decoded_token": value.decoded_token}
            for key, value in position.items()
        }
        for position in positions
    ]


def without_continuation(output: RequestOutput) -> RequestOutput:
    """An output of a request that asked for nothing after its prompt."""
    ended = {None: None, "stop": "length"}
    nothing = [
        replace(
            one,
            text="",
            token_ids=[],
            logprobs=None if one.logprobs is None else [],
            stop_reason=None,
            finish_reason=ended.get(one.finish_reason, one.finish_reason),
        )
        for one in output.outputs
    ]
    return replace(output, outputs=nothing)


def head(kind: str, answer_id: str, model: str, fingerprint: str) -> Json:
    """What every answer and chunk begins with."""
    return {
        "id": answer_id,
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": fingerprint,
    }


def chat_choice(completion: CompletionOutput, logprobs: Json | None, role: str, extras: Mapping[str, Any]) -> Json:
    """A whole answer of a chat."""
    message = {"role": role, "content": completion.text, "refusal": None, "annotations": None, "audio": None}
    return {
        "index": completion.index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        **extras,
    }


def completion_choice(
    index: int, text: str, completion: CompletionOutput, logprobs: Json | None, extras: Mapping[str, Any]
) -> Json:
    """A completion, or a piece of one."""
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        **extras,
    }
