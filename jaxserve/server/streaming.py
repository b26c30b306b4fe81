"""A job on its way through the server, and what a stream says of it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxserve.sampling_params import SamplingParams
from jaxserve.server.answers import (
    Json,
    TokenNames,
    Usage,
    chat_logprobs,
    completion_choice,
    completion_logprobs,
    head,
)
from jaxserve.server.protocol import ChatCompletionRequest, CompletionRequest, Generate
from jaxserve.types import CompletionOutput, PositionLogprobs, Request, RequestOutput

COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # made once: a stream has an event a token
MARK = "\0 where the text goes"


@dataclass(frozen=True)
class Job:
    """One HTTP request on its way: a prompt each in `requests`, whose outputs make the choices."""

    body: Generate
    answer_id: str
    model: str
    requests: list[Request]
    names: TokenNames

    @property
    def params(self) -> SamplingParams:
        """Of all its prompts."""
        return self.requests[0].params

    @property
    def only_echo(self) -> bool:
        """Whether the one token that the engine generates at least is not wanted."""
        return isinstance(self.body, CompletionRequest) and self.body.only_echo

    @property
    def top(self) -> int:
        """Entries of the most likely tokens that are shown."""
        return self.params.logprobs or 0


@dataclass(frozen=True)
class Opening:
    """What a stream begins with, from the service: its fingerprint, a chat's role, extras, and a prompt's text."""

    fingerprint: str
    role: str
    extras: Json
    prompt_text: Callable[[RequestOutput], str]


class StreamWriter:
    """Chunks of one stream: what was said already decides what comes next."""

    def __init__(self, job: Job, opening: Opening):
        options = job.body.stream_options
        self._job, self._start = job, opening
        self._chat = isinstance(job.body, ChatCompletionRequest)
        self._begun: set[int] = set()
        self._offsets: dict[int, int] = {}  # characters of a completion's tokens so far
        self._usage = Usage()
        self.final_usage = bool(options and options.include_usage)
        self._every = self.final_usage and bool(options and options.continuous_usage_stats)
        self._choices = job.params.n
        # Pieces of text in chunks that hold nothing else new: what is before and behind the text, by choice.
        plain = not (self._every or job.body.return_token_ids or job.params.logprobs is not None)
        self._around: dict[int, tuple[str, str]] | None = {} if plain else None
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        self._head = head(kind, job.answer_id, job.model, opening.fingerprint)
        self._first_extras = opening.extras

    def _chunk(self, choices: list[Json]) -> Json:
        extras, self._first_extras = self._first_extras, {}
        usage = {"usage": self._usage.json()} if self._every else {}
        return self._head | {"choices": choices} | usage | extras

    def usage_event(self) -> str:
        """The last event of a stream that wants to know its tokens."""
        return event(self._head | {"choices": [], "usage": self._usage.json()})

    def events(self, number: int, output: RequestOutput) -> str:
        """The events that a delta of one prompt makes."""
        self._usage.add(output)
        found = ""
        for completion in output.outputs:
            index = number * self._choices + completion.index
            if index not in self._begun:
                self._begun.add(index)
                found += "".join(map(event, self._opening(index, output)))
            if self._around is not None and completion.finish_reason is None and not self._first_extras:
                found += self._text(index, completion.text) if completion.text else ""
            elif completion.text or completion.logprobs or completion.finish_reason or self._job.body.return_token_ids:
                found += self._piece(index, completion)
        return found

    def _text(self, index: int, text: str) -> str:
        """The event of a piece of plain text, of which there is one for most tokens."""
        assert self._around is not None
        if index not in self._around:
            before, behind = self._piece(index, CompletionOutput(index, MARK, [])).split(COMPACT.encode(MARK))
            self._around[index] = before, behind
        before, behind = self._around[index]
        return before + COMPACT.encode(text) + behind

    def _piece(self, index: int, completion: CompletionOutput) -> str:
        make = self._chat_piece if self._chat else self._completion_piece
        return event(self._chunk([make(index, completion)]))

    def _opening(self, index: int, output: RequestOutput) -> list[Json]:
        """What comes before the first piece of a choice: the role, or an echo."""
        body = self._job.body
        extras: Json = {"prompt_token_ids": output.prompt_token_ids} if body.return_token_ids else {}
        if isinstance(body, ChatCompletionRequest):
            echo = str(body.messages[-1].get("content") or "") if body.echo else ""
            delta = {"role": self._start.role, "content": echo}
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            return [self._chunk([choice]) | extras]
        assert isinstance(body, CompletionRequest)
        if not body.echo and not extras:
            return []
        text = self._start.prompt_text(output) if body.echo else ""
        echoed = output.prompt_logprobs if body.echo and self._job.params.logprobs is not None else None
        logprobs = self._logprobs(index, output.prompt_token_ids, echoed)
        return [self._chunk([completion_choice(index, text, CompletionOutput(index, text, []), logprobs, extras)])]

    def _chat_piece(self, index: int, completion: CompletionOutput) -> Json:
        job = self._job
        logprobs = chat_logprobs(completion.token_ids, completion.logprobs, job.top, job.names)
        piece: Json = {"index": index, "delta": {"content": completion.text}, "logprobs": logprobs}
        piece["finish_reason"] = completion.finish_reason
        if completion.finish_reason is not None:
            piece["stop_reason"] = completion.stop_reason
        return piece | ({"token_ids": completion.token_ids} if job.body.return_token_ids else {})

    def _completion_piece(self, index: int, completion: CompletionOutput) -> Json:
        extras: Json = {"token_ids": completion.token_ids} if self._job.body.return_token_ids else {}
        logprobs = self._logprobs(index, completion.token_ids, completion.logprobs)
        return completion_choice(index, completion.text, completion, logprobs, extras)

    def _logprobs(self, index: int, ids: list[int], positions: Sequence[PositionLogprobs | None] | None) -> Json | None:
        """Of a piece of a completion, after those before."""
        job, offset = self._job, self._offsets.get(index, 0)
        found = completion_logprobs(ids, positions, job.top, job.names, offset)
        if found is not None:
            self._offsets[index] = offset + sum(map(len, found["tokens"]))
        return found


def event(content: Json) -> str:
    """A server-sent event."""
    return f"data: {COMPACT.encode(content)}\n\n"
