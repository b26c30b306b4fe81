"""The replicas behind a router: which of them work, how busy they are, and the choice of one for a request."""

import asyncio
import contextlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from jaxserve.server.errors import ApiError
from jaxserve.server.router_affinity import Affinity, Choice
from jaxserve.server.router_upstream import Headers, Upstream, UpstreamError

logger = logging.getLogger(__name__)

CHECK_SECONDS = 2.0  # between looks at a replica that works; also the age of its queue figures
CHECK_TIMEOUT = 5.0  # seconds; a replica that computes answers at once, also under load
FIRST_RECHECK, LONGEST_RECHECK = 0.5, 5.0  # seconds between looks at one that does not, doubled each time


@dataclass
class Replica:
    """One server.

    Attributes:
        index: its number, as `X-data-parallel-rank` and the metrics give it.
        url: where it is; "" while it is not known yet.
        problem: why it gets no requests; "" if it does.
        in_flight: requests of this router that it has not finished.
        foreign: sequences in its engine beyond those, as last seen: other routers', or a request's further choices.
        waiting: sequences that waited there for a place, as last seen.
    """

    index: int
    url: str
    problem: str = "it was not checked yet"
    in_flight: int = 0
    foreign: int = 0
    waiting: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def healthy(self) -> bool:
        """Whether it gets requests."""
        return not self.problem

    @property
    def load(self) -> int:
        """Requests it has to deal with; waiting ones count twice, for they show that no place is free."""
        return self.in_flight + self.foreign + self.waiting

    @property
    def name(self) -> str:
        """In messages."""
        return self.url or f"replica {self.index}"

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Count a request for as long as it lasts."""
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1


class Fleet:
    """All replicas.

    Args:
        key: sent as a bearer token with the router's own questions for queue figures.
    """

    def __init__(self, urls: Sequence[str], upstream: Upstream, *, key: str | None = None):
        self.replicas = [Replica(index, url) for index, url in enumerate(urls)]
        self.affinity = Affinity()
        self._upstream = upstream
        self._headers: Headers = [(b"authorization", f"Bearer {key}".encode())] if key else []

    @property
    def healthy(self) -> list[Replica]:
        """Those that get requests."""
        return [replica for replica in self.replicas if replica.healthy]

    @property
    def in_flight(self) -> int:
        """Requests on their way through the router."""
        return sum(replica.in_flight for replica in self.replicas)

    def pick(self, blocks: Sequence[bytes], tried: Collection[int]) -> tuple[Replica, Choice] | None:
        """A healthy replica that was not tried yet, and why it is this one; None if there is none left."""
        loads = {replica.index: replica.load for replica in self.healthy if replica.index not in tried}
        if not loads:
            return None
        index, choice = self.affinity.choose(loads, blocks)
        self.affinity.remember(blocks, index)
        return self.replicas[index], choice

    def pinned(self, rank: bytes) -> Replica:
        """The replica that a request asks for by its number; raises `ApiError` 400 or 503."""
        number = int(rank) if rank.isdigit() and len(rank) < 9 else -1
        if not 0 <= number < len(self.replicas):
            message = f"the header X-data-parallel-rank must be a whole number in [0, {len(self.replicas)})"
            raise ApiError(400, message, param="X-data-parallel-rank")
        replica = self.replicas[number]
        if not replica.healthy:
            raise ApiError(503, f"replica {number} takes no requests: {replica.problem}", retry_after=1)
        return replica

    def describe_problems(self, failures: Mapping[int, str] | None = None) -> str:
        """Why no replica takes requests; what one request met (by replica) comes before what was known."""
        problems = [(replica.name, (failures or {}).get(replica.index, replica.problem)) for replica in self.replicas]
        return "; ".join(f"{name}: {problem}" for name, problem in problems if problem)

    def report(self, replica: Replica, problem: str) -> None:
        """Take a replica out at once. It is looked at right away: after a single broken connection it is back soon."""
        self._set(replica, problem)
        replica.changed.set()

    def moved(self, replica: Replica, url: str, problem: str) -> None:
        """A replica is somewhere else now, or nowhere (""), and its cache is empty."""
        replica.url = url
        self.report(replica, problem)

    def _set(self, replica: Replica, problem: str) -> None:
        if problem == replica.problem:
            return
        if problem and replica.healthy:
            logger.warning("replica %d is out: %s", replica.index, problem)
            self.affinity.forget(replica.index)  # most problems end with a new process
            replica.foreign = replica.waiting = 0
        elif not problem:
            logger.info("replica %d at %s takes requests", replica.index, replica.url)
        replica.problem = problem

    async def check(self, replica: Replica) -> None:
        """Ask a replica how it is."""
        if replica.url:
            url = replica.url
            problem = await self._ask(replica)
            if url == replica.url:  # else this is about the process before
                self._set(replica, problem)

    async def _ask(self, replica: Replica) -> str:
        """What is wrong with a replica, "" for nothing; reads its queue figures."""
        try:
            status, body = await self._get(replica, "/ready")
            if status in (404, 405):  # other servers than ours may know /health only
                status, body = await self._get(replica, "/health")
            if status != 200:
                return f"it answers {status}: {reason(body)}"
            before = replica.in_flight
            status, body = await self._get(replica, "/load")
        except UpstreamError as error:
            return str(error)
        figures = parse_load(body) if status == 200 else {}
        # Of requests that came or went while it answered, as many may be in its figure as not.
        replica.foreign = max(0, figures.get("server_load", 0) - max(before, replica.in_flight))
        replica.waiting = figures.get("waiting", 0)
        return ""

    async def _get(self, replica: Replica, path: str) -> tuple[int, bytes]:
        answer, body = await self._upstream.fetch(replica.url + path, self._headers, CHECK_TIMEOUT)
        return answer.status, body

    async def watch(self, replica: Replica, seconds: float = CHECK_SECONDS) -> None:
        """Look at a replica again and again; runs until it is cancelled."""
        pause = FIRST_RECHECK
        while True:
            replica.changed.clear()
            await self.check(replica)
            wait = seconds if replica.healthy else pause
            pause = FIRST_RECHECK if replica.healthy else min(2 * pause, LONGEST_RECHECK)
            try:
                await asyncio.wait_for(replica.changed.wait(), wait)
                pause = FIRST_RECHECK
            except TimeoutError:
                pass


def reason(body: bytes) -> str:
    """The message of an error's body, shortened."""
    try:
        text = json.loads(body)["error"]["message"]
    except (ValueError, RecursionError, KeyError, TypeError):
        text = body.decode("utf-8", "replace")
    return " ".join(str(text).split())[:200] or "no reason given"


def parse_load(body: bytes) -> dict[str, int]:
    """The whole numbers of an answer to /load."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if type(value) is int and value >= 0}
