"""One front for the schedulers of all page pools; every copy of the model has a pool of its own."""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Pools

import numpy as np
from jaxtyping import Int

from jaxserve.engine.pace import FREE, StreamRules
from jaxserve.engine.scheduler import Scheduler
from jaxserve.types import Sequence, Work

Plan = list[Work | None]  # of one step: what each pool does in it
WAITING_WEIGHT = 4  # a sequence that waits counts as many that run (vLLM's rule for its own replicas)


class Balancer:
    """Gives each request to the pool with the least to do, and plans the steps that all pools run together.

    A step is one program on all devices, so its pools share its shape: they run several decodes at once only when all
    of them can.
    """

    def __init__(self, pools: Pools[Scheduler]):
        self.pools = list(pools)
        self._last: tuple[str, int] = ("", 0)  # request and pool of the sequence added last

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence; those of one request share a pool, and so their prompt. Raises as `Scheduler.add`."""
        request_id, pool = self._last
        if request_id != seq.request.request_id:
            loads = [WAITING_WEIGHT * pool.num_waiting + pool.num_running for pool in self.pools]
            pool = loads.index(min(loads))
        self.pools[pool].add(seq)
        seq.pool = pool
        self._last = seq.request.request_id, pool

    def finish(self, seq: Sequence, reason: str, stop_reason: int | str | None = None) -> bool:
        """As `Scheduler.finish`."""
        return self.pools[seq.pool].finish(seq, reason, stop_reason)

    def schedule(self, rules: StreamRules = FREE) -> Plan | None:
        """Plan the next step of all pools; None if none has anything to compute."""
        if len(self.pools) == 1:
            plan: Plan = [self.pools[0].schedule(rules)]
        else:
            decodes = min(pool.most_decodes(rules) for pool in self.pools)
            plan = [pool.schedule(rules, decodes=decodes) for pool in self.pools]
        return None if all(work is None for work in plan) else plan

    def commit(self, work: Work, tokens: Int[np.ndarray, "steps S"]) -> list[Sequence]:
        """As `Scheduler.commit`, for one pool's part of a step."""
        return self.pools[work.sequences[0].pool].commit(work, tokens)

    def take_failed(self) -> list[Sequence]:
        """As `Scheduler.take_failed`, of all pools."""
        return [seq for pool in self.pools for seq in pool.take_failed()]

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix; False while pages are in use."""
        if self.num_running:
            return False
        done = [pool.pages.reset() for pool in self.pools]
        return all(done)

    @property
    def num_running(self) -> int:
        return self._sum(lambda pool: pool.num_running)

    @property
    def num_waiting(self) -> int:
        return self._sum(lambda pool: pool.num_waiting)

    @property
    def waiting_tokens(self) -> int:
        """Tokens of the sequences that wait; other threads may ask."""
        return self._sum(lambda pool: pool.waiting.num_tokens)

    @property
    def num_preemptions(self) -> int:
        return self._sum(lambda pool: pool.num_preemptions)

    @property
    def queried_tokens(self) -> int:
        """Tokens whose prefix was looked up in the cache."""
        return self._sum(lambda pool: pool.pages.queried_tokens)

    @property
    def hit_tokens(self) -> int:
        """Tokens found there."""
        return self._sum(lambda pool: pool.pages.hit_tokens)

    @property
    def usage(self) -> float:
        """Share of all pages that are in use."""
        return sum(pool.pages.usage for pool in self.pools) / len(self.pools)

    def _sum(self, count: Callable[[Scheduler], int]) -> int:
        return sum(count(pool) for pool in self.pools)

    def check_integrity(self) -> None:
        """As `Scheduler.check_integrity`, for all pools."""
        for pool in self.pools:
            pool.check_integrity()


def parts(plan: Plan) -> Iterator[Work]:
    """What the pools with something to do in a step do."""
    return (work for work in plan if work is not None)
