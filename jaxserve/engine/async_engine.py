"""The engine behind asyncio: it runs elsewhere, generators receive their request's outputs."""

import asyncio
import contextlib
import functools
import itertools
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Mapping, Sized
from typing import Any, no_type_check

from jaxserve.config import EngineArgs, EngineConfig
from jaxserve.engine.engine import LLMEngine
from jaxserve.engine.errors import EngineDeadError
from jaxserve.engine.loop import Abort, Add, Call, Close, EngineLink, EngineLoop, Futures, Queue, Report, Taken
from jaxserve.engine.metrics import Metric
from jaxserve.inputs import make_request
from jaxserve.sampling_params import RequestOutputKind, SamplingParams
from jaxserve.text import Tokenizer
from jaxserve.types import PromptType, Request, RequestOutput

SHORT = 1000  # characters or tokens, for which going to a thread and back is not worth while


class _Stream:
    """Where a request's outputs go. All but its making happens in its event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, taken: Callable[[], None]):
        """`taken` says that nothing is left to take."""
        self.loop = loop
        self._taken = taken
        self._items: list[Any] = []
        self._waiter: asyncio.Future[None] | None = None  # of who waits for the next

    async def take(self) -> list[Any]:
        """What is there, at least one item."""
        if not self._items:
            self._taken()
            self._waiter = self.loop.create_future()
            await self._waiter
        items, self._items = self._items, []
        return items

    def put(self, items: list[Any]) -> None:
        """There is more to take."""
        self._items += items
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class AsyncLLMEngine:
    """Serve many callers of one event loop (or several) from one engine.

    All calls are thread-safe; the engine itself is touched by its own thread alone, here or in another process.
    """

    def __init__(self, link: EngineLink):
        """`link` must not have been started."""
        self._link = link
        self._streams: dict[int, _Stream] = {}  # by the number of their request
        self._active: set[str] = set()
        self._calls = Futures()
        self._queue = Queue()  # as last reported
        self._sent = 0  # requests, which is the number of the last one
        self._taken: dict[asyncio.AbstractEventLoop, list[int]] = {}  # by their callers in this turn of a loop
        self._lock = threading.Lock()
        self._ids = itertools.count()
        self._dead: EngineDeadError | None = None
        link.start(self._on_report)

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> "AsyncLLMEngine":
        """Load the model and start the engine's thread. Raises as `LLMEngine.from_engine_args` does."""
        return cls(EngineLoop(LLMEngine.from_engine_args(engine_args)))

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The engine's tokenizer; None with `skip_tokenizer_init`."""
        return self._link.tokenizer

    @property
    def config(self) -> EngineConfig:
        """The engine's settings."""
        return self._link.config

    @no_type_check  # for annotation checkers: whatever a caller passes gets a message of its own
    async def make_request(
        self, request_id: str, prompt: PromptType, sampling_params: SamplingParams | None = None, **options: Any
    ) -> Request:
        """Check and tokenise a prompt, a long one in another thread; it can then be given to `run`.

        Raises:
            TypeError, ValueError: a bad prompt or bad parameters.
            EngineDeadError: the engine has failed; the cause is attached.
        """
        self._check_alive()
        options |= {"tokenizer": self.tokenizer, "config": self.config}
        if _size(prompt) <= SHORT:
            return make_request(request_id, prompt, sampling_params, **options)
        return await asyncio.to_thread(make_request, request_id, prompt, sampling_params, **options)

    @no_type_check
    async def generate(
        self,
        prompt: PromptType,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the request's outputs as they come; closing or cancelling the generator aborts the request.

        Raises:
            TypeError, ValueError: a bad prompt, bad parameters, or an id in use.
            EngineDeadError: the engine has failed; the cause is attached.
        """
        key = f"async-{next(self._ids)}" if request_id is None else request_id
        request = await self.make_request(
            key, prompt, sampling_params, priority=priority, tokenization_kwargs=tokenization_kwargs
        )
        async with contextlib.aclosing(self.run(request)) as outputs:
            async for output in outputs:
                yield output

    async def run(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """Yield the outputs of a request that `make_request` made; closing the generator aborts it.

        Tokens that came while the caller was busy are yielded as one delta, so a crowd of slow callers is no brake.

        Raises:
            ValueError: the request's id is in use.
            EngineDeadError: the engine has failed; the cause is attached.
        """
        key = request.request_id
        deltas = request.params.output_kind == RequestOutputKind.DELTA
        loop = asyncio.get_running_loop()
        with self._lock:
            self._check_alive()
            if key in self._active:
                raise ValueError(f"request_id {key!r} is in use by an unfinished request; choose another.")
            self._active.add(key)
            self._sent += 1
            taken = functools.partial(self._take, self._sent) if deltas else _nothing
            stream = self._streams[self._sent] = _Stream(loop, taken)
            self._link.put(Add(self._sent, request))  # in the order of their numbers
        finished = False
        try:
            while not finished:
                items = await stream.take()
                for item in _joined(items) if deltas and len(items) > 1 else items:
                    if isinstance(item, BaseException):
                        finished = True
                        raise item
                    finished = item.finished
                    yield item
        finally:
            if not finished:
                self._link.put(Abort(key))
            with self._lock:
                self._active.discard(key)

    async def call[Result](self, function: Callable[[LLMEngine], Result]) -> Result:
        """What `function` returns when the engine's thread calls it, between two steps.

        It must be a function of a module (or made of some with `functools.partial`), which another process can find.

        Raises:
            EngineDeadError: the engine has failed; the cause is attached.
            Exception: what the function raises.
        """
        with self._lock:
            self._check_alive()
            number, future = self._calls.new()
        self._link.put(Call(number, function))
        return await asyncio.wrap_future(future)

    @property
    def active_ids(self) -> list[str]:
        """Ids of the requests that somebody waits for."""
        with self._lock:
            return list(self._active)

    @property
    def num_active(self) -> int:
        """Requests that somebody waits for."""
        return len(self._active)

    @property
    def num_waiting(self) -> int:
        """Sequences that have not begun, or were preempted, and requests that the engine has not taken up yet."""
        return self._queue.waiting + self._sent - self._queue.added

    @property
    def waiting_tokens(self) -> int:
        """Tokens of the sequences that wait."""
        return self._queue.waiting_tokens

    async def abort(self, request_id: str) -> None:
        """End a request now; its generator yields a last output with `finish_reason="abort"`."""
        self._link.put(Abort(request_id))

    async def check_health(self) -> None:
        """Raise `EngineDeadError` if the engine cannot serve."""
        self._check_alive()

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(str(self._dead)) from self._dead.__cause__

    async def get_metrics(self) -> list[Metric]:
        """A snapshot of the engine's metrics, made between two steps; raises as `call` and the engine's own do."""
        return await self.call(LLMEngine.get_metrics)

    def shutdown(self) -> None:
        """Abort what runs, stop the thread and free the device memory."""
        with self._lock:
            if self._dead is None:
                self._dead = EngineDeadError("the engine has been shut down")
        self._link.put(Close())
        self._link.join()

    def _take(self, number: int) -> None:
        """A caller waits for its next output: the engine is told with all others of this turn of the event loop."""
        loop = asyncio.get_running_loop()
        if loop in self._taken:  # only its own thread asks for it
            self._taken[loop].append(number)
        else:
            self._taken[loop] = [number]
            loop.call_soon(self._tell_taken, loop)

    def _tell_taken(self, loop: asyncio.AbstractEventLoop) -> None:
        self._link.put(Taken(self._taken.pop(loop)))

    def _on_report(self, report: Report) -> None:
        """Hand out what the engine's side reports; one wake-up an event loop."""
        self._queue = report.queue
        found: dict[_Stream, list[RequestOutput | Exception]] = defaultdict(list)
        with self._lock:
            for number, output in report.outputs:
                found[self._streams[number]].append(output)
                if isinstance(output, Exception) or output.finished:
                    del self._streams[number]
            if report.dead is not None:
                self._dead = self._dead or report.dead  # the first says why
                for stream in self._streams.values():
                    found[stream].append(report.dead)
                self._streams.clear()
        for number, value, error in report.results:
            self._calls.settle(number, value, error)
        if report.dead is not None:
            self._calls.fail(report.dead)
        _send(found)


def _size(prompt: PromptType) -> int:
    """Characters or tokens that checking a prompt goes through."""
    parts = prompt.values() if isinstance(prompt, Mapping) else [prompt]
    return sum(len(part) for part in parts if isinstance(part, Sized))


def _nothing() -> None:
    """For callers who get one output only."""


def _joined(items: list[RequestOutput | BaseException]) -> list[RequestOutput | BaseException]:
    """The deltas as one, and an error behind them."""
    deltas = [item for item in items if isinstance(item, RequestOutput)]
    whole = [functools.reduce(RequestOutput.followed_by, deltas)] if deltas else []
    return whole + [item for item in items if not isinstance(item, RequestOutput)]


def _send(items: Mapping[_Stream, list[Any]]) -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, list[Any]]]] = defaultdict(list)
    for stream, values in items.items():
        by_loop[stream.loop].append((stream, values))
    for loop, deliveries in by_loop.items():
        with contextlib.suppress(RuntimeError):  # that loop is closed: nobody listens any more
            loop.call_soon_threadsafe(_put_all, deliveries)


def _put_all(deliveries: list[tuple[_Stream, list[Any]]]) -> None:
    for stream, values in deliveries:
        stream.put(values)
