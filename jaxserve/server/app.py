"""The routes. Each one reads its body, asks the service and answers; all rules are elsewhere."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Annotated, Any

import jax
from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from jaxserve.engine.engine import LLMEngine
from jaxserve.engine.errors import EngineDeadError
from jaxserve.server.errors import ApiError, as_api_error
from jaxserve.server.middleware import Authenticate, LimitBody, Observe, Turns
from jaxserve.server.observe import EngineMetrics
from jaxserve.server.options import AppOptions
from jaxserve.server.protocol import (
    PRINTABLE,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generate,
    TokenizeRequest,
    check_unicode,
)
from jaxserve.server.service import Service
from jaxserve.version import __version__

ADMIN_ROUTES = ("/reset_prefix_cache", "/start_profile", "/stop_profile")
STARTED = int(time.time())

RequestId = Annotated[str | None, Header(alias="X-Request-Id", max_length=256, pattern=PRINTABLE)]


def make_app(service: Service, metrics: EngineMetrics, options: AppOptions) -> FastAPI:
    """The ASGI application of one service."""
    schema = "/openapi.json" if options.docs else None
    app = FastAPI(title="jaxserve", version=__version__, openapi_url=schema)
    for kind in (ApiError, ValueError, TypeError, EngineDeadError, HTTPException, RequestValidationError, RuntimeError):
        app.add_exception_handler(kind, _answer_error)
    add_generation(app, service, options)
    add_information(app, service, metrics)
    add_tokens(app, service)
    add_admin(app, service, options)
    # The last one added sees a request first. Whose body is still on its way takes nobody's turn.
    app.add_middleware(Turns)  # type: ignore[arg-type]
    app.add_middleware(LimitBody, most=options.max_body_bytes)  # type: ignore[arg-type]
    app.add_middleware(
        Authenticate,  # type: ignore[arg-type]
        keys=options.keys,
        admin_keys=options.admin_keys,
        admin_routes=ADMIN_ROUTES,
    )
    if options.allowed_origins:  # errors are for pages of those, too
        origins = list(options.allowed_origins)
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(Observe, registry=metrics.registry, access_log=options.access_log)  # type: ignore[arg-type]
    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    return as_api_error(error).response()


async def check_text(request: Request) -> None:
    """Refuse bodies that are not declared as JSON, or hold halves of surrogate pairs."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(400, "the header Content-Type must be application/json")
    body = await request.body()
    if b"\\ud" in body or b"\\uD" in body:
        try:
            parsed = json.loads(body)
        except (ValueError, RecursionError):
            return  # reported as what it is by the parser
        check_unicode(parsed)


async def unless_gone[Result](request: Request, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled when the client leaves."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has closed the connection")
        return task.result()
    finally:
        watcher.cancel()
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def add_generation(app: FastAPI, service: Service, options: AppOptions) -> None:
    """Completions and chats."""

    async def generate(body: Generate, request: Request, request_id: str | None) -> Response:
        unknown = body.unknown
        if unknown and options.strict:
            raise ApiError(400, f"unknown field {unknown[0]!r} (--strict-requests refuses them)", param=unknown[0])
        try:
            job = await service.prepare(body, request_id)
            headers = {"X-Request-Id": job.answer_id}
            if unknown:
                shown = ", ".join(name for name in unknown[:10] if name.isascii() and name.isprintable())
                headers["X-Ignored-Fields"] = shown[:500]
            if body.stream:
                return StreamingResponse(service.stream(job), media_type="text/event-stream", headers=headers)
            return JSONResponse(await unless_gone(request, service.answer(job)), headers=headers)
        except Exception as error:
            return as_api_error(error).response()

    checks = [Depends(check_text)]

    @app.post("/v1/chat/completions", dependencies=checks)
    async def chat_completions(body: ChatCompletionRequest, request: Request, request_id: RequestId = None) -> Response:
        return await generate(body, request, request_id)

    @app.post("/v1/completions", dependencies=checks)
    async def completions(body: CompletionRequest, request: Request, request_id: RequestId = None) -> Response:
        return await generate(body, request, request_id)

    @app.post("/abort/{request_id}")
    async def abort(request_id: str) -> dict[str, Any]:
        """End an answer now, by its id."""
        return {"aborted": await service.abort(request_id)}


def add_information(app: FastAPI, service: Service, metrics: EngineMetrics) -> None:
    """What load balancers, dashboards and clients ask."""

    async def alive() -> Response:
        try:
            await service.engine.check_health()
        except EngineDeadError as error:
            return ApiError(503, str(error)).response()
        return Response(status_code=200)

    for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
        name = f"{method.lower()}{path.replace('/', '_')}"
        app.add_api_route(path, alive, methods=[method], response_class=Response, operation_id=name)

    @app.get("/ready")
    async def ready() -> Response:
        """200 while new requests are taken."""
        if service.draining:
            return ApiError(503, "the server is shutting down").response()
        return await alive()

    for path, check in (("/health", alive), ("/ping", alive), ("/ready", ready)):
        app.add_api_route(path, check, methods=["HEAD"], response_class=Response, include_in_schema=False)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__, "jax": jax.__version__}

    @app.get("/load")
    async def load() -> dict[str, int]:
        return {"server_load": service.engine.num_active, "waiting": service.engine.num_waiting}

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(await metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.describe_model(name, STARTED) for name in service.models]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return service.describe_model(service.resolve_model(name), STARTED)


def add_tokens(app: FastAPI, service: Service) -> None:
    """Text to tokens and back."""

    def tokenizer() -> Any:
        if service.engine.tokenizer is None:
            raise ApiError(400, "there is no tokenizer: the server runs with skip_tokenizer_init")
        return service.engine.tokenizer

    @app.post("/tokenize", dependencies=[Depends(check_text)])
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        service.resolve_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", param="prompt")
        own = tokenizer()
        ids = await asyncio.to_thread(service.tokenize, own, body)
        strings = {"token_strs": [own.token_text(i) for i in ids]} if body.return_token_strs else {}
        return {"count": len(ids), "max_model_len": service.engine.config.max_model_len, "tokens": ids, **strings}

    @app.post("/detokenize", dependencies=[Depends(check_text)])
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        service.resolve_model(body.model)
        most = service.engine.config.vocab_size
        for place, token in enumerate(body.tokens):
            if not 0 <= token < most:
                raise ApiError(400, f"tokens[{place}]={token} is not in [0, {most})", param="tokens")
        return {"prompt": tokenizer().decode(body.tokens, skip_special_tokens=False)}


def start_trace(folder: str, engine: LLMEngine) -> None:
    """Begin a profile where the engine is."""
    jax.profiler.start_trace(folder)


def stop_trace(engine: LLMEngine) -> None:
    """End it and write it."""
    jax.profiler.stop_trace()


async def _profiling(service: Service, change: Callable[[LLMEngine], None]) -> None:
    """Start or stop a trace; 409 where one runs already, or none does."""
    try:
        await service.engine.call(change)
    except EngineDeadError:
        raise
    except RuntimeError as error:
        raise ApiError(409, str(error)) from error


def add_admin(app: FastAPI, service: Service, options: AppOptions) -> None:
    """Routes behind the admin key."""

    @app.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> dict[str, bool]:
        return {"reset": await service.engine.call(LLMEngine.reset_prefix_cache)}

    @app.post("/start_profile")
    async def start_profile() -> dict[str, str]:
        folder = options.profile_folder
        if folder is None:
            raise ApiError(400, "profiling needs a folder: start the server with --profile-dir")
        await _profiling(service, partial(start_trace, folder))
        return {"folder": folder}

    @app.post("/stop_profile")
    async def stop_profile() -> dict[str, str | None]:
        await _profiling(service, stop_trace)
        return {"folder": options.profile_folder}
