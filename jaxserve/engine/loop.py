"""The thread that runs an engine: it obeys commands between two steps and reports what came of them."""

import concurrent.futures
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import LLMEngine
from jaxserve.engine.errors import EngineDeadError
from jaxserve.sampling_params import RequestOutputKind
from jaxserve.text import Tokenizer
from jaxserve.types import Request, RequestOutput

ADD_SECONDS = 2e-3  # for new requests between two steps: a crowd that arrives is taken up over several


@dataclass(frozen=True)
class Add:
    """Take up a request; its outputs are reported under the number, since ids may be used again."""

    number: int
    request: Request


@dataclass(frozen=True)
class Abort:
    """End a request now, if it is there."""

    request_id: str


@dataclass(frozen=True)
class Taken:
    """The callers of the requests with these numbers have taken all outputs so far."""

    numbers: list[int]


@dataclass(frozen=True)
class Call:
    """Call a function with the engine; the result is reported under the number."""

    number: int
    function: Callable[[LLMEngine], Any]


@dataclass(frozen=True)
class Close:
    """End the thread, and free the device memory."""


Command = Add | Abort | Taken | Call | Close


@dataclass(frozen=True)
class Queue:
    """What has arrived and what waits.

    Attributes:
        added: requests that were taken up so far.
        waiting: sequences that have not begun, or were preempted.
        waiting_tokens: theirs.
    """

    added: int = 0
    waiting: int = 0
    waiting_tokens: int = 0


@dataclass(frozen=True)
class Report:
    """What has happened since the report before.

    Attributes:
        outputs: of requests, by number, in order; an exception says that the request was not taken up.
        results: of calls, by number: the value, or what was raised.
        dead: why there are no reports after this one.
    """

    queue: Queue
    outputs: list[tuple[int, RequestOutput | Exception]] = field(default_factory=list)
    results: list[tuple[int, Any, Exception | None]] = field(default_factory=list)
    dead: EngineDeadError | None = None


@runtime_checkable
class EngineLink(Protocol):
    """An engine at work somewhere, which takes commands and reports."""

    @property
    def config(self) -> EngineConfig:
        """The engine's settings."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The engine's tokenizer, or one like it."""
        ...

    def start(self, report: Callable[[Report], object]) -> None:
        """Begin; reports come from another thread, one after the other."""
        ...

    def put(self, command: Command) -> None:
        """Obey soon. Any thread may call this."""
        ...

    def join(self) -> None:
        """Wait for the end, after `Close`."""
        ...


class EngineLoop:
    """An engine in a thread of this process. Nobody else may touch the engine any more."""

    def __init__(self, engine: LLMEngine):
        self._engine = engine
        self.config, self.tokenizer = engine.config, engine.tokenizer
        self._commands: queue.SimpleQueue[Add | Abort | Call | Close] = queue.SimpleQueue()
        self._arrived: dict[str, Add] = {}  # not taken up yet, by id, in order
        self._numbers: dict[str, int] = {}  # of the requests that are here, by id
        self._busy: set[int] = set()  # those with an output that its caller has not taken; threads share it
        self._added = 0
        self._told = Queue()
        self._outputs: list[tuple[int, RequestOutput | Exception]] = []
        self._results: list[tuple[int, Any, Exception | None]] = []
        self._report: Callable[[Report], object] = id
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, report: Callable[[Report], object]) -> None:
        """Begin; the engine's thread calls `report`."""
        self._report = report
        self._thread.start()

    def put(self, command: Command) -> None:
        """Obey a command: `Taken` at once, which a step under way may look at, others between two steps."""
        if isinstance(command, Taken):
            self._busy.difference_update(command.numbers)
        else:
            self._commands.put(command)

    def join(self) -> None:
        """Wait for the thread's end."""
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._obey():
                if self._engine.has_unfinished_requests():
                    self._deliver(self._engine.step())
                self._tell()
        except BaseException as error:
            dead = EngineDeadError(f"the engine has failed: {error!r}")
            dead.__cause__ = error
            self._end(dead)
        else:
            self._end(EngineDeadError("the engine has been shut down"))
            self._engine.close()

    def _obey(self) -> bool:
        """Carry out waiting commands, and take up requests for a moment; sleeps while there is nothing to do.

        False at the end.
        """
        idle = not self._engine.has_unfinished_requests() and not self._arrived
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._commands.get(block=idle)
                idle = False
                match command:
                    case Close():
                        return False
                    case Abort(request_id):
                        if request_id in self._arrived:
                            self._add(request_id)
                        self._deliver(self._engine.abort_request(request_id))
                    case Call(number, function):
                        self._results.append((number, *self._call(function)))
                    case Add(_, request):
                        self._arrived[request.request_id] = command
        end = time.perf_counter() + ADD_SECONDS
        while self._arrived and time.perf_counter() < end:
            self._add(next(iter(self._arrived)))
        return True

    def _call(self, function: Callable[[LLMEngine], Any]) -> tuple[Any, Exception | None]:
        try:
            return function(self._engine), None
        except Exception as error:
            return None, error

    def _add(self, key: str) -> None:
        """Take up a request that has arrived."""
        arrived = self._arrived.pop(key)
        number, request = arrived.number, arrived.request
        self._added += 1
        deltas = request.params.output_kind is RequestOutputKind.DELTA
        ready = {"ready": lambda: number not in self._busy} if deltas else {}
        try:
            self._engine.add_request(key, request, **ready)
        except (TypeError, ValueError) as error:
            self._outputs.append((number, error))
        else:
            self._numbers[key] = number

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            number = self._numbers[output.request_id]
            if output.finished:
                self._busy.discard(number)
                del self._numbers[output.request_id]
            else:
                self._busy.add(number)
            self._outputs.append((number, output))

    def _tell(self) -> None:
        """Report if there is anything new."""
        scheduler = self._engine.scheduler
        now = Queue(self._added, scheduler.num_waiting, scheduler.waiting_tokens)
        if self._outputs or self._results or now != self._told:
            self._told = now
            report = Report(now, self._outputs, self._results)
            self._outputs, self._results = [], []
            self._report(report)

    def _end(self, dead: EngineDeadError) -> None:
        """The last report; calls that nobody obeys any more fail."""
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._commands.get_nowait()
                if isinstance(command, Call):
                    self._results.append((command.number, None, dead))
        self._report(Report(self._told, self._outputs, self._results, dead))


class Futures:
    """Calls whose results have not come yet."""

    def __init__(self) -> None:
        self._open: dict[int, concurrent.futures.Future] = {}
        self._next = 0
        self._lock = threading.Lock()

    def new(self) -> tuple[int, concurrent.futures.Future]:
        """A number and the future of the result that will come under it."""
        with self._lock:
            self._next += 1
            future = self._open[self._next] = concurrent.futures.Future()
            return self._next, future

    def settle(self, number: int, value: Any, error: Exception | None) -> None:
        """The result is there."""
        with self._lock:
            future = self._open.pop(number)
        if not future.set_running_or_notify_cancel():
            return  # nobody waits any more
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)

    def fail(self, error: Exception) -> None:
        """No more results will come."""
        with self._lock:
            numbers = list(self._open)
        for number in numbers:
            self.settle(number, None, error)
