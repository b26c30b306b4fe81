"""The engine behind asyncio: a thread runs the steps, generators receive their request's outputs."""

import asyncio
import concurrent.futures
import contextlib
import functools
import itertools
import queue
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, no_type_check

from jaxserve.config import EngineArgs, EngineConfig
from jaxserve.engine.engine import LLMEngine
from jaxserve.engine.errors import EngineDeadError
from jaxserve.engine.metrics import Metric
from jaxserve.sampling_params import RequestOutputKind, SamplingParams
from jaxserve.text import Tokenizer
from jaxserve.types import PromptType, Request, RequestOutput


@dataclass(eq=False)
class _Stream:
    """Where a request's outputs go; `busy` from the moment one is on its way until the caller waits for the next."""

    loop: asyncio.AbstractEventLoop
    outputs: asyncio.Queue
    busy: bool = False

    def ready(self) -> bool:
        return not self.busy

    async def take(self) -> list[Any]:
        """What is there, at least one item."""
        if self.outputs.empty():
            self.busy = False
        items = [await self.outputs.get()]
        while not self.outputs.empty():
            items.append(self.outputs.get_nowait())
        return items


@dataclass(frozen=True)
class _Add:
    request: Request
    stream: _Stream


@dataclass(frozen=True)
class _Abort:
    request_id: str


@dataclass(frozen=True)
class _Call:
    function: Callable[[LLMEngine], Any]
    future: concurrent.futures.Future

    def run(self, engine: LLMEngine) -> None:
        try:
            self.future.set_result(self.function(engine))
        except Exception as error:
            self.future.set_exception(error)


class AsyncLLMEngine:
    """Serve many callers of one event loop (or several) from one engine.

    All calls are thread-safe; the engine itself is touched by its own thread alone.
    """

    def __init__(self, engine: LLMEngine):
        self._engine = engine
        self._commands: queue.SimpleQueue[_Add | _Abort | _Call | None] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._active: set[str] = set()
        self._arriving = 0  # requests that the engine's thread has not taken up yet
        self._lock = threading.Lock()
        self._ids = itertools.count()
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> "AsyncLLMEngine":
        """Load the model and start the engine's thread. Raises as `LLMEngine.from_engine_args` does."""
        return cls(LLMEngine.from_engine_args(engine_args))

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The engine's tokenizer; None with `skip_tokenizer_init`."""
        return self._engine.tokenizer

    @property
    def config(self) -> EngineConfig:
        """The engine's settings."""
        return self._engine.config

    @no_type_check  # for annotation checkers: whatever a caller passes gets a message of its own
    async def make_request(
        self, request_id: str, prompt: PromptType, sampling_params: SamplingParams | None = None, **options: Any
    ) -> Request:
        """Check and tokenise a prompt in another thread; it can then be given to `run`.

        Raises:
            TypeError, ValueError: a bad prompt or bad parameters.
            EngineDeadError: the engine has failed; the cause is attached.
        """
        self._check_alive()
        return await asyncio.to_thread(self._engine.make_request, request_id, prompt, sampling_params, **options)

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
        self._check_alive()
        with self._lock:
            if key in self._active:
                raise ValueError(f"request_id {key!r} is in use by an unfinished request; choose another.")
            self._active.add(key)
            self._arriving += 1
        stream = _Stream(asyncio.get_running_loop(), asyncio.Queue())
        deltas = request.params.output_kind == RequestOutputKind.DELTA
        self._commands.put(_Add(request, stream))
        finished = False
        try:
            while not finished:
                items = await stream.take()
                for item in _joined(items) if deltas else items:
                    if isinstance(item, BaseException):
                        finished = True
                        raise item
                    finished = item.finished
                    yield item
        finally:
            if not finished:
                self._commands.put(_Abort(key))
            with self._lock:
                self._active.discard(key)

    async def call[Result](self, function: Callable[[LLMEngine], Result]) -> Result:
        """What `function` returns when the engine's thread calls it, between two steps.

        Raises:
            EngineDeadError: the engine has failed; the cause is attached.
            Exception: what the function raises.
        """
        self._check_alive()
        future: concurrent.futures.Future[Result] = concurrent.futures.Future()
        self._commands.put(_Call(function, future))
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
        return self._engine.scheduler.num_waiting + self._arriving

    @property
    def waiting_tokens(self) -> int:
        """Tokens of the sequences that wait."""
        return self._engine.scheduler.waiting_tokens

    async def abort(self, request_id: str) -> None:
        """End a request now; its generator yields a last output with `finish_reason="abort"`."""
        self._commands.put(_Abort(request_id))

    async def check_health(self) -> None:
        """Raise `EngineDeadError` if the engine cannot serve."""
        self._check_alive()

    def _check_alive(self) -> None:
        if self._error is not None:
            raise EngineDeadError(f"the engine has failed: {self._error!r}") from self._error
        if self._closed:
            raise EngineDeadError("the engine has been shut down")

    def get_metrics(self) -> list[Metric]:
        """A snapshot of the engine's metrics."""
        return self._engine.get_metrics()

    def shutdown(self) -> None:
        """Abort what runs, stop the thread and free the device memory."""
        self._closed = True
        self._commands.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._obey():
                if self._engine.has_unfinished_requests():
                    self._deliver(self._engine.step())
        except BaseException as error:
            self._error = error
            self._fail(error)
        else:
            self._fail(EngineDeadError("the engine has been shut down"))
            self._engine.close()

    def _obey(self) -> bool:
        """Carry out waiting commands; sleeps while there is nothing to do. False at shutdown."""
        idle = not self._engine.has_unfinished_requests()
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._commands.get(block=idle)
                idle = False
                if command is None:
                    return False
                if isinstance(command, _Abort):
                    self._deliver(self._engine.abort_request(command.request_id))
                elif isinstance(command, _Call):
                    command.run(self._engine)
                else:
                    self._add(command)
        return True

    def _add(self, command: _Add) -> None:
        key = command.request.request_id
        self._streams[key] = command.stream
        with self._lock:
            self._arriving -= 1
        try:
            deltas = command.request.params.output_kind == RequestOutputKind.DELTA
            ready = {"ready": command.stream.ready} if deltas else {}
            self._engine.add_request(key, command.request, **ready)
        except (TypeError, ValueError) as error:
            del self._streams[key]
            self._send({command.stream: [error]})

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """Hand outputs to their streams, with one wake-up an event loop."""
        found: dict[_Stream, list[RequestOutput | BaseException]] = defaultdict(list)
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.busy = True
                found[stream].append(output)
            if output.finished:
                self._streams.pop(output.request_id, None)
        self._send(found)

    def _send(self, items: Mapping[_Stream, list[Any]]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue, list[Any]]]] = defaultdict(list)
        for stream, values in items.items():
            by_loop[stream.loop].append((stream.outputs, values))
        for loop, deliveries in by_loop.items():
            with contextlib.suppress(RuntimeError):  # that loop is closed: nobody listens any more
                loop.call_soon_threadsafe(_put_all, deliveries)

    def _fail(self, error: BaseException) -> None:
        """Tell every caller, also those whose request is still in the queue."""
        dead = error if isinstance(error, EngineDeadError) else EngineDeadError(f"the engine has failed: {error!r}")
        dead.__cause__ = None if dead is error else error
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._commands.get_nowait()
                if isinstance(command, _Add):
                    self._streams[command.request.request_id] = command.stream
                elif isinstance(command, _Call):
                    command.future.set_exception(dead)
        self._send({stream: [dead] for stream in self._streams.values()})
        self._streams.clear()


def _joined(items: list[RequestOutput | BaseException]) -> list[RequestOutput | BaseException]:
    """The deltas as one, and an error behind them."""
    deltas = [item for item in items if isinstance(item, RequestOutput)]
    whole = [functools.reduce(RequestOutput.followed_by, deltas)] if deltas else []
    return whole + [item for item in items if not isinstance(item, RequestOutput)]


def _put_all(deliveries: list[tuple[asyncio.Queue, list[Any]]]) -> None:
    for outputs, values in deliveries:
        for value in values:
            outputs.put_nowait(value)
