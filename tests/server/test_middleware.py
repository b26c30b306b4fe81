"""Who may pass, whatever a path looks like; without a server."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from jaxserve.server.middleware import Authenticate, Keys, Message, Receive, Send

CALLER, ADMIN = "caller", "admin"


def status(path: str, key: str, *, root_path: str = "", admin_keys: tuple[str, ...] = (ADMIN,)) -> int:
    """What a request gets; 200 is from the application behind. uvicorn puts the root path before the path."""
    answers: list[int] = []

    async def app(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        answers.append(200)

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    async def send(message: Message) -> None:
        answers.append(message.get("status", 0))

    guard = Authenticate(app, keys=Keys([CALLER]), admin_keys=Keys(admin_keys), admin_routes=("/reset_prefix_cache",))
    headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
    scope = {"type": "http", "method": "POST", "path": root_path + path, "root_path": root_path, "headers": headers}
    asyncio.run(guard(scope, receive, send))
    return answers[0]


@pytest.mark.parametrize("root_path", ["", "/llm", "/llm/"])
def test_keys_below_a_root_path(root_path: str):
    assert status("/health", "", root_path=root_path) == 200
    assert status("/v1/models", "", root_path=root_path) == 401
    assert status("/v1/models", CALLER, root_path=root_path) == 200
    assert status("/reset_prefix_cache", CALLER, root_path=root_path) == 401
    assert status("/reset_prefix_cache", ADMIN, root_path=root_path) == 200
    assert status("/reset_prefix_cache", CALLER, root_path=root_path, admin_keys=()) == 404
