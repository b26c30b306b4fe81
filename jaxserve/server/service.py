"""Completions and chats: from a checked HTTP body to the engine and back, whole or as a stream."""

import asyncio
import contextlib
import hashlib
import json
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from jaxserve.engine.async_engine import AsyncLLMEngine
from jaxserve.sampling_params import RequestOutputKind, SamplingParams
from jaxserve.server.answers import (
    Json,
    TokenNames,
    Usage,
    chat_choice,
    chat_logprobs,
    completion_choice,
    completion_logprobs,
    head,
    prompt_logprobs_json,
    without_continuation,
)
from jaxserve.server.errors import ApiError, as_api_error
from jaxserve.server.options import Limits
from jaxserve.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    Generate,
    TokenizeRequest,
    in_clients_words,
    length_field,
)
from jaxserve.server.streaming import Job, Opening, StreamWriter, event
from jaxserve.text import Tokenizer
from jaxserve.types import CompletionOutput, PromptType, Request, RequestOutput, TokensPrompt
from jaxserve.version import __version__

NOT_SHOWN = ("output_kind", "detokenize", "extra_args", "flat_logprobs", "skip_reading_prefix_cache")


class Service:
    """Answers completions and chats with one engine."""

    def __init__(self, engine: AsyncLLMEngine, limits: Limits, *, response_role: str = "assistant"):
        self.engine = engine
        self.limits = limits
        self.role = response_role
        self.draining = False
        self._clocks: set[asyncio.Timeout] = set()  # of the answers that are under way
        self._over = False
        config = engine.config
        self.models = config.served_model_names
        facts = f"{self.models}{config.dtype}{config.max_model_len}{config.vocab_size}"
        self.fingerprint = f"jaxserve-{__version__}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"

    def resolve_model(self, name: str | None) -> str:
        """The served model that a request names; none or "" is the first.

        Raises:
            ApiError: 404.
        """
        if not name:
            return self.models[0]
        if name not in self.models:
            shown = name if len(name) <= 200 else name[:200] + "..."
            raise ApiError(404, f"The model {shown!r} does not exist; served: {', '.join(self.models)}.", param="model")
        return name

    def admit(self, sequences: int) -> None:
        """Refuse work while the server is ending or its queue is full; raises `ApiError` 503 or 429."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", retry_after=5)
        limits, waiting = self.limits, self.engine.num_waiting
        if limits.max_queue_requests is not None and waiting + sequences > limits.max_queue_requests:
            message = f"the queue is full: {waiting} requests wait, at most {limits.max_queue_requests} may"
            raise ApiError(429, message, retry_after=1)
        if limits.max_queue_tokens is not None:
            tokens = self.engine.waiting_tokens
            if tokens >= limits.max_queue_tokens:
                message = f"the queue is full: {tokens} tokens wait, at most {limits.max_queue_tokens} may"
                raise ApiError(429, message, retry_after=1)

    def params(self, body: Generate) -> SamplingParams:
        """The model's defaults with what the request gives."""
        given = dict(self.engine.config.default_sampling) | body.sampling_fields()
        kind = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
        return SamplingParams.from_optional(**given, output_kind=kind)

    async def prepare(self, body: Generate, request_id: str | None) -> Job:
        """Check, template and tokenise everything, so that whatever is wrong is known before anything runs.

        Raises:
            ApiError: the answer is an error.
            ParameterError: so it is, and the client's fault.
        """
        try:
            return await self._prepare(body, request_id)
        except (ValueError, TypeError) as error:
            raise in_clients_words(error, body) from error

    async def _prepare(self, body: Generate, request_id: str | None) -> Job:
        model = self.resolve_model(body.model)
        body.check()
        params = self.params(body)
        chat = isinstance(body, ChatCompletionRequest)
        prompts: Sequence[PromptType]
        if isinstance(body, ChatCompletionRequest):
            prompts = [await asyncio.to_thread(self.render, body)]
        else:
            assert isinstance(body, CompletionRequest)
            prompts = body.prompts()
        self.admit(len(prompts) * params.n)
        answer_id = f"{'chatcmpl' if chat else 'cmpl'}-{body.request_id or request_id or uuid.uuid4().hex}"
        options = {"priority": body.priority or 0, "tokenization_kwargs": body.tokenization()}
        requests = [
            await self.engine.make_request(f"{answer_id}-{i}", with_salt(prompt, body.cache_salt), params, **options)
            for i, prompt in enumerate(prompts)
        ]
        for request in requests:
            check_room(request, params.max_tokens, self.engine.config.max_model_len, length_field(body))
        names = TokenNames(self.engine.tokenizer, bool(body.return_tokens_as_token_ids))
        return Job(body, answer_id, model, requests, names)

    def render(self, body: ChatCompletionRequest) -> PromptType:
        """The prompt of a conversation."""
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise ApiError(400, "chats need a tokenizer, and the server runs with skip_tokenizer_init")
        if body.chat_template is not None:
            message = "chat_template of a request is not taken; start the server with --chat-template."
            raise ApiError(400, message, param="chat_template")
        text = tokenizer.render_chat(body.messages, **body.template_options())
        ids = tokenizer.encode(text, add_special_tokens=bool(body.add_special_tokens))
        return TokensPrompt(prompt=text, prompt_token_ids=ids)

    async def answer(self, job: Job) -> Json:
        """The whole answer of a job that does not stream.

        Raises:
            ApiError: the engine could not finish it, 504 after the time limit, or 503 when the server ends.
        """
        try:
            async with self._in_time(), asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._last(request, job.only_echo)) for request in job.requests]
        except ExceptionGroup as several:
            raise several.exceptions[0] from None
        outputs, usage = [task.result() for task in tasks], Usage()
        for output in outputs:
            usage.add(output)
        chat = isinstance(job.body, ChatCompletionRequest)
        result = head("chat.completion" if chat else "text_completion", job.answer_id, job.model, self.fingerprint)
        result["choices"] = [choice for i, output in enumerate(outputs) for choice in self._choices(job, i, output)]
        result["usage"] = usage.json()
        if chat:
            result |= {"prompt_logprobs": prompt_logprobs_json(outputs[0].prompt_logprobs)}
        if job.body.return_token_ids:
            result |= {"prompt_token_ids": outputs[0].prompt_token_ids}
        return result | self.effective(job)

    async def _last(self, request: Request, only_echo: bool) -> RequestOutput:
        async with contextlib.aclosing(self.engine.run(request)) as outputs:
            async for output in outputs:
                last = output
        check_finished(last)
        return last if not only_echo else without_continuation(last)

    def _choices(self, job: Job, number: int, output: RequestOutput) -> list[Json]:
        """The choices of one prompt."""
        body, found = job.body, []
        for completion in output.outputs:
            extras: Json = {"token_ids": completion.token_ids} if body.return_token_ids else {}
            if isinstance(body, ChatCompletionRequest):
                logprobs = chat_logprobs(completion.token_ids, completion.logprobs, job.top, job.names)
                echo = str(body.messages[-1].get("content") or "") if body.echo and body.messages else ""
                whole = replace(completion, text=echo + completion.text)
                found.append(chat_choice(whole, logprobs, self.role, extras))
                continue
            if output.prompt_logprobs is not None:
                extras["prompt_logprobs"] = prompt_logprobs_json(output.prompt_logprobs)
            index = number * job.params.n + completion.index
            found.append(completion_choice(index, *self._echoed(job, output, completion), extras))
        return found

    def _echoed(
        self, job: Job, output: RequestOutput, completion: CompletionOutput
    ) -> tuple[str, CompletionOutput, Json | None]:
        """A completion's text and log-probabilities, after the prompt's where the request asks for an echo."""
        ids, positions, text = completion.token_ids, completion.logprobs, completion.text
        if getattr(job.body, "echo", None):
            text = self.prompt_text(output) + text
            if positions is not None and output.prompt_logprobs is not None:
                ids, positions = [*output.prompt_token_ids, *ids], [*output.prompt_logprobs, *positions]
        return text, completion, completion_logprobs(ids, positions, job.top, job.names, 0)

    def prompt_text(self, output: RequestOutput) -> str:
        """What an echo begins with."""
        if output.prompt is not None or self.engine.tokenizer is None:
            return output.prompt or ""
        return self.engine.tokenizer.decode(output.prompt_token_ids)

    def effective(self, job: Job) -> Json:
        """The parameters that were really used, if the request wants to know."""
        if not job.body.x_effective_params:
            return {}
        shown = {name: value for name, value in vars(job.params).items() if name not in NOT_SHOWN}
        return {"x_effective_params": json.loads(json.dumps(shown, default=vars))}

    def describe_model(self, name: str, created: int) -> Json:
        """An entry of the list of models."""
        config = self.engine.config
        return {
            "id": name, "object": "model", "created": created, "owned_by": "jaxserve", "root": config.model,
            "parent": None, "max_model_len": config.max_model_len, "permission": [],
        }  # fmt: skip

    def tokenize(self, tokenizer: Tokenizer, body: TokenizeRequest) -> list[int]:
        """Token ids of a text or a conversation."""
        if body.messages is None:
            special = True if body.add_special_tokens is None else body.add_special_tokens
            return tokenizer.encode(body.prompt or "", add_special_tokens=special)
        text = tokenizer.render_chat(body.messages, **body.template_options())
        return tokenizer.encode(text, add_special_tokens=bool(body.add_special_tokens))

    async def abort(self, answer_id: str) -> bool:
        """End the requests of an answer; False if there are none."""
        found = [key for key in self.engine.active_ids if key.rpartition("-")[0] == answer_id]
        for key in found:
            await self.engine.abort(key)
        return bool(found)

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """The time that an answer may take."""
        try:
            async with asyncio.timeout(self.limits.request_timeout) as clock:
                self._clocks.add(clock)
                try:
                    yield
                finally:
                    self._clocks.discard(clock)
        except TimeoutError:
            if self._over:
                raise ApiError(503, "the server has shut down before the answer was complete", retry_after=5) from None
            if (most := self.limits.request_timeout) is None:
                raise
            message = f"the answer was not complete after {most:g} s (--request-timeout); ask for less, or later"
            raise ApiError(504, message, retry_after=1) from None

    def end(self) -> None:
        """End all answers now, whatever the engine is doing; their clients are told."""
        self.draining = self._over = True
        for clock in self._clocks:
            clock.reschedule(asyncio.get_running_loop().time())

    async def outputs(self, job: Job) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """(prompt number, delta) of all prompts as they come; closing it aborts what runs."""
        if len(job.requests) > 1:
            async with contextlib.aclosing(self._merged(job)) as merged:
                async for item in merged:
                    yield item
            return
        async with (
            self._in_time(),
            contextlib.aclosing(self.engine.run(job.requests[0])) as outputs,
        ):
            async for output in outputs:
                yield 0, output

    async def _merged(self, job: Job) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        merged: asyncio.Queue[tuple[int, RequestOutput | BaseException]] = asyncio.Queue()

        async def forward(number: int, request: Request) -> None:
            try:
                async with contextlib.aclosing(self.engine.run(request)) as outputs:
                    async for output in outputs:
                        merged.put_nowait((number, output))
            except Exception as error:
                merged.put_nowait((number, error))

        tasks = [asyncio.create_task(forward(i, request)) for i, request in enumerate(job.requests)]
        open_ones = len(tasks)
        try:
            async with self._in_time():
                while open_ones:
                    number, item = await merged.get()
                    if isinstance(item, BaseException):
                        raise item
                    open_ones -= item.finished
                    yield number, item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def stream(self, job: Job) -> AsyncIterator[str]:
        """The server-sent events of a job. What goes wrong on the way becomes an event before `[DONE]`."""
        opening = Opening(self.fingerprint, self.role, self.effective(job), self.prompt_text)
        writer, only_echo = StreamWriter(job, opening), job.only_echo
        try:
            async with contextlib.aclosing(self.outputs(job)) as outputs:
                async for number, output in outputs:
                    events = writer.events(number, without_continuation(output) if only_echo else output)
                    if events:
                        yield events
                    check_finished(output)
            if writer.final_usage:
                yield writer.usage_event()
        except Exception as error:
            yield event(as_api_error(error).body())
        yield "data: [DONE]\n\n"


def check_room(request: Request, max_tokens: int | None, most: int, field: str) -> None:
    """Raise `ApiError` 400, about `field`, if prompt and answer together cannot fit the context."""
    prompt = len(request.prompt_token_ids)
    if max_tokens is not None and prompt + max_tokens > most:
        message = (
            f"the model's context holds {most} tokens, but {prompt + max_tokens} were requested: {prompt} in the "
            f"prompt and {field}={max_tokens}; shorten the prompt or lower {field} to at most {most - prompt}"
        )
        raise ApiError(400, message, param=field)


def with_salt(prompt: PromptType, salt: str | None) -> PromptType:
    """A prompt whose cached prefix is shared only with requests of the same salt."""
    if salt is None:
        return prompt
    if isinstance(prompt, str):
        return {"prompt": prompt, "cache_salt": salt}
    own: Any = {"prompt_token_ids": prompt} if isinstance(prompt, list) else dict(prompt)
    return own | {"cache_salt": salt}


def check_finished(output: RequestOutput) -> None:
    """Raise `ApiError` 500 if the engine gave a request up."""
    if output.error is not None:
        raise ApiError(500, output.error)
