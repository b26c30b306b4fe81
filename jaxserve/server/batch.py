"""Requests of a file, answered as the HTTP server would: OpenAI's batch format, in runs that go on where they stopped.

The output is the only state. A line is appended, whole, when its request has finished; the next run reads which ones
are there, cuts off what a killed run left half-written, and does the rest.
"""

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from tqdm import tqdm

from jaxserve.checks import shorten
from jaxserve.config import EngineArgs
from jaxserve.engine.async_engine import AsyncLLMEngine
from jaxserve.engine.errors import EngineDeadError
from jaxserve.server.answers import Json
from jaxserve.server.batch_files import BatchFiles, Line, pending
from jaxserve.server.errors import ApiError, as_api_error
from jaxserve.server.options import Limits
from jaxserve.server.protocol import ChatCompletionRequest, CompletionRequest, Generate, check_unicode
from jaxserve.server.service import Service

logger = logging.getLogger(__name__)

ROUTES: Mapping[str, type[Generate]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
}


@dataclass
class Outcome:
    """How a run went; `done` and `failed` count its own lines, `stopped_by` what ended it early."""

    done: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    stopped_by: signal.Signals | None = None


class Batch:
    """One run: a thread reads lines, as many as may be in flight are answered at once, results are appended."""

    def __init__(self, service: Service, files: BatchFiles, concurrency: int, *, show_progress: bool = False):
        self._service, self._files = service, files
        self._room = threading.Semaphore(concurrency)
        self._arrivals: asyncio.Queue[Line | Exception | None] = asyncio.Queue()
        self._stopped = False
        self.outcome = Outcome()
        done = files.output.written.total
        self._bar = tqdm(
            total=files.total, initial=done, desc="Batch", unit="request", dynamic_ncols=True, disable=not show_progress
        )

    async def run(self) -> Outcome:
        """Answer everything, or until SIGINT or SIGTERM.

        Raises:
            EngineDeadError: the engine has failed; what it had not finished stays for the next run.
            OSError: the input cannot be read, or the output cannot be written.
        """
        loop, start = asyncio.get_running_loop(), time.perf_counter()
        main = asyncio.current_task()
        assert main is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number, main)
        self._files.output.begin()
        threading.Thread(target=self._read, args=(loop,), name="batch input", daemon=True).start()
        try:
            await self._answer_all()
        except asyncio.CancelledError:
            if self.outcome.stopped_by is None:
                raise
        except ExceptionGroup as group:
            raise innermost(group) from None
        finally:
            self._stopped = True
            self._room.release()
            self._bar.close()
            self.outcome.seconds = time.perf_counter() - start
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
        return self.outcome

    def _on_signal(self, number: int, main: asyncio.Task) -> None:
        if self.outcome.stopped_by is not None:
            os._exit(128 + number)
        self.outcome.stopped_by = signal.Signals(number)
        main.cancel()

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hand over lines while there is room; runs in a thread of its own, as input may be slow to come."""
        end = None
        with contextlib.suppress(RuntimeError):  # the loop is closed: the run has ended
            try:
                with self._files.source as file:
                    for line in pending(file, self._files.output.written):
                        self._room.acquire()
                        if self._stopped:
                            return
                        loop.call_soon_threadsafe(self._arrivals.put_nowait, line)
            except Exception as error:
                end = error
            loop.call_soon_threadsafe(self._arrivals.put_nowait, end)

    async def _answer_all(self) -> None:
        async with asyncio.TaskGroup() as group:
            while (line := await self._arrivals.get()) is not None:
                if isinstance(line, Exception):
                    raise line
                group.create_task(self._serve(line))

    async def _serve(self, line: Line) -> None:
        record = await self._record(line)
        self._files.output.write(record)
        self._room.release()
        self._count(record)

    async def _record(self, line: Line) -> Json:
        """The line of the output."""
        key = uuid.uuid4().hex
        record: Json = {"id": f"batch_req_{key}", "custom_id": line.custom_id, "response": None, "error": None}
        if line.error is not None:
            message = f"line {line.number}: {line.error}"
            error = {"code": "invalid_line", "message": message, "param": None, "line": line.number}
            return record | {"error": error}
        try:
            status, body = 200, await self._answer(line.request, key)
        except Exception as error:
            found = innermost(error)
            if isinstance(found, EngineDeadError):
                raise found from None  # not this request's fault: it stays for the next run
            answer = as_api_error(found)
            if answer.status == 500:
                logger.error("line %d: %s", line.number, answer.message, exc_info=found)
            status, body = answer.status, answer.body()
        return record | {"response": {"status_code": status, "request_id": key, "body": body}}

    async def _answer(self, request: Json, key: str) -> Json:
        body = read_request(request)
        return await self._service.answer(await self._service.prepare(body, key))

    def _count(self, record: Json) -> None:
        outcome, response = self.outcome, record["response"]
        outcome.done += 1
        if response is None or response["status_code"] != 200:
            outcome.failed += 1
        else:
            outcome.prompt_tokens += response["body"]["usage"]["prompt_tokens"]
            outcome.completion_tokens += response["body"]["usage"]["completion_tokens"]
        if self._bar.disable:
            return
        elapsed = max(self._bar.format_dict["elapsed"], 1e-9)
        speeds = f"in {outcome.prompt_tokens / elapsed:.1f} tok/s, out {outcome.completion_tokens / elapsed:.1f} tok/s"
        failed = self._files.output.written.failed + outcome.failed
        self._bar.set_postfix_str(f"{failed} failed, {speeds}", refresh=False)
        self._bar.update()


def innermost(error: Exception) -> Exception:
    """The first exception that is no group."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def read_request(request: Json) -> Generate:
    """The body of a request, checked as the server's route would.

    Raises:
        ApiError, RequestValidationError: it cannot be served.
    """
    url, method, body = request.get("url"), request.get("method"), request.get("body")
    kind = ROUTES.get(url) if isinstance(url, str) else None
    if kind is None:
        raise ApiError(404, f"url {shorten(url)} is not served; there is: {', '.join(ROUTES)}.", param="url")
    if method != "POST":
        raise ApiError(405, f'method must be "POST", got {shorten(method)}.', param="method")
    if not isinstance(body, dict):
        raise ApiError(400, f"body must be a JSON object, got {type(body).__name__}.", param="body")
    check_unicode(body)
    try:
        found = kind.model_validate(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    if found.stream:
        raise ApiError(400, "a batch does not stream; leave stream out.", param="stream")
    return found


def run_batch(
    engine_args: EngineArgs, files: BatchFiles, *, max_concurrency: int | None = None, show_progress: bool = False
) -> Outcome:
    """Load the model, if there is anything to do, and answer a file.

    Without `max_concurrency` twice `max_num_seqs` requests are in flight.

    Raises:
        ValueError: an argument, the model's files or the memory do not fit.
        EngineDeadError, OSError: as `Batch.run`.
    """
    if files.total is not None and files.total == files.output.written.total:
        files.output.begin()
        return Outcome()
    engine = AsyncLLMEngine.from_engine_args(engine_args)
    try:
        concurrency = max_concurrency or 2 * engine.config.max_num_seqs
        batch = Batch(Service(engine, Limits()), files, concurrency, show_progress=show_progress)
        return asyncio.run(batch.run())
    finally:
        engine.shutdown()
