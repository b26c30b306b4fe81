"""Who may pass, whatever a path looks like, and when; without a server."""

import asyncio
import itertools
from collections.abc import MutableMapping
from typing import Any

import pytest

from jaxserve.server.middleware import BEGIN_AT_ONCE, Authenticate, Keys, Message, Receive, Send, Turns

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


def test_a_crowd_begins_a_few_at_a_time_and_others_are_not_held_up():
    """In each turn of the event loop; in order, whoever leaves meanwhile; and GET never waits."""
    begun: list[int] = []

    async def app(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        begun.append(scope["number"])

    async def nothing(*_: Any) -> Any:
        return {}

    async def main() -> None:
        turns, loop = Turns(app), asyncio.get_running_loop()
        scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
        tasks = [loop.create_task(turns(scope | {"number": i}, nothing, nothing)) for i in range(50)]
        counts = []
        for turn in range(30):
            counts.append(len(begun))
            if turn == 2:
                for i in range(20, 30):
                    tasks[i].cancel()
                await turns(scope | {"method": "GET", "number": -1}, nothing, nothing)
                assert begun.pop() == -1
            await asyncio.sleep(0)
        gained = [after - before for before, after in itertools.pairwise(counts)]
        assert max(gained) == BEGIN_AT_ONCE
        assert sum(gained) == 40
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.wait_for(turns(scope | {"number": 99}, nothing, nothing), 1)  # and once all is quiet again

    asyncio.run(main())
    assert begun == [*range(20), *range(30, 50), 99]
