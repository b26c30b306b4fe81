"""The router's routes: what is passed to one replica, what all are asked together, and what it answers itself."""

import asyncio
import json

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jaxserve.server.errors import ApiError, as_api_error
from jaxserve.server.middleware import LimitBody, Observe
from jaxserve.server.router import Router, read_request
from jaxserve.server.router_metrics import MergedMetrics, page
from jaxserve.server.router_replicas import parse_load
from jaxserve.server.router_upstream import Answer, Headers, Upstream, UpstreamError

GATHER_SECONDS = 5.0  # for a question to all replicas

PASSED = {  # route -> methods; what OPTIONS answers (CORS) is the replicas' business
    "/v1/chat/completions": ["POST", "OPTIONS"],
    "/v1/completions": ["POST", "OPTIONS"],
    "/v1/models": ["GET", "OPTIONS"],
    "/v1/{path:path}": ["GET", "POST", "OPTIONS"],
    "/tokenize": ["POST", "OPTIONS"],
    "/detokenize": ["POST", "OPTIONS"],
    "/version": ["GET"],
}


def make_router_app(router: Router, upstream: Upstream, *, max_body_bytes: int, access_log: bool = True) -> Starlette:
    """The ASGI application of one router."""
    together = Together(router, upstream)
    routes = [Route(path, router, methods=methods) for path, methods in PASSED.items()]
    routes += own_routes(router)
    routes += [
        Route("/load", together.load),
        Route("/metrics", together.metrics),
        Route("/abort/{answer_id}", together.abort, methods=["POST"]),
    ]
    middleware = [
        Middleware(Observe, registry=router.metrics.registry, access_log=access_log),  # type: ignore[arg-type]
        Middleware(LimitBody, most=max_body_bytes),  # type: ignore[arg-type]
    ]
    return Starlette(routes=routes, middleware=middleware, exception_handlers={ApiError: _error, HTTPException: _error})


async def _error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code == 404:
        error = ApiError(404, f"the router passes no requests for {request.url.path[:200]!r} on")
    return as_api_error(error).response()


def own_routes(router: Router) -> list[Route]:
    """Whether anyone here takes requests."""

    async def health(request: Request) -> Response:
        if not router.fleet.healthy:
            return ApiError(503, f"no healthy replica: {router.fleet.describe_problems()}").response()
        return Response(status_code=200)

    async def ready(request: Request) -> Response:
        if router.draining:
            return ApiError(503, "the server is shutting down").response()
        return await health(request)

    return [
        Route("/health", health),
        Route("/ping", health, methods=["GET", "POST"]),
        Route("/ready", ready),
    ]


class Together:
    """Asks all healthy replicas at the same time, with the caller's own key."""

    def __init__(self, router: Router, upstream: Upstream):
        self._router, self._upstream, self._merged = router, upstream, MergedMetrics()

    async def ask(self, request: Request, path: str) -> dict[int, tuple[Answer, bytes]]:
        """The answers with status 200 by replica. Those that do not answer in time are left out.

        Raises:
            ApiError: 401 or 403, if that is what they say.
        """
        key = request.headers.get("authorization")
        headers: Headers = [(b"authorization", key.encode("latin-1"))] if key is not None else []
        replicas = self._router.fleet.healthy
        questions = [
            self._upstream.fetch(replica.url + path, headers, GATHER_SECONDS, request.method) for replica in replicas
        ]
        answers = await asyncio.gather(*questions, return_exceptions=True)
        found = {}
        for replica, got in zip(replicas, answers, strict=True):
            if isinstance(got, UpstreamError):
                continue
            if isinstance(got, BaseException):
                raise got
            if got[0].status in (401, 403):
                raise ApiError(got[0].status, "a valid API key is needed in the header 'Authorization: Bearer KEY'")
            if got[0].status == 200:
                found[replica.index] = got
        return found

    async def load(self, request: Request) -> Response:
        """The sums of the replicas' figures."""
        total = {"server_load": 0, "waiting": 0}
        for _, body in (await self.ask(request, "/load")).values():
            for name, value in parse_load(body).items():
                total[name] = total.get(name, 0) + value
        return JSONResponse(total)

    async def metrics(self, request: Request) -> Response:
        """The page of all replicas, and the router's own figures, also while no replica answers."""
        answers = await self.ask(request, "/metrics")
        pages = {index: body.decode("utf-8", "replace") for index, (_, body) in answers.items()}
        families = self._merged.merge(pages) if pages else []
        text = page(families, self._router.metrics.registry)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def abort(self, request: Request) -> Response:
        """End an answer wherever it is: ids are made by the replicas, so each is asked whether it has this one."""
        incoming = await read_request(request.scope, request.receive)
        answers = await self.ask(request, incoming.target)
        return JSONResponse({"aborted": any(json.loads(body)["aborted"] for _, body in answers.values())})
