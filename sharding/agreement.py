"""All ranks are there and were started alike: checked before jax joins them, and later about anything else."""

import time
from collections.abc import Mapping

from sharding.channel import ANSWER_SECONDS, Follower, Leader, Store, accept_all, connect_until, listener

TOKEN = b"jaxserve"  # nothing secret is exchanged here; it tells a rank from a stranger


class Disagreement(ValueError):
    """Ranks that must be started alike differ."""


def meet(rank: int, size: int, host: str, port: int, facts: Mapping[str, str], timeout: float) -> None:
    """Wait until all ranks are there, and compare their facts. The port is free again afterwards.

    Args:
        rank: of this process.
        size: processes.
        host: where rank 0 is.
        port: where it listens.
        facts: name -> value of what must be the same everywhere.
        timeout: seconds.

    Raises:
        TimeoutError: a rank did not come; names it.
        Disagreement: the facts differ; names the ranks and their values.
        ChannelError: a rank is gone or failed; names it.
        OSError: rank 0 cannot listen there.
    """
    if rank == 0:
        with listener(host, port, size) as server:
            leader = Leader(accept_all(server, size, TOKEN, timeout), timeout)
        try:
            told = {0: dict(facts), **leader.collect()}
            problem = differences(told)
            leader.send(problem)
        finally:
            leader.close()
    else:
        follower = Follower(connect_until(host, port, rank, TOKEN, timeout), timeout)
        try:
            follower.send(dict(facts))
            problem = follower.receive(timeout + ANSWER_SECONDS)
        finally:
            follower.close()
    if problem:
        raise Disagreement(problem)


def differences(told: Mapping[int, Mapping[str, str]]) -> str:
    """What to say about ranks whose facts differ, "" when they do not."""
    names = dict.fromkeys(name for facts in told.values() for name in facts)
    found = [difference(name, {rank: facts.get(name, "none") for rank, facts in told.items()}) for name in names]
    return "; ".join(filter(None, found))


def agree(store: Store, rank: int, size: int, name: str, value: str, timeout: float) -> None:
    """Make sure that all ranks have the same `value`; each calls this once for a name.

    Raises:
        Disagreement: they differ; names the ranks and their values.
        TimeoutError: a rank did not answer; names it.
    """
    store.key_value_set(f"jaxserve/agree/{name}/{rank}", value)
    deadline = time.monotonic() + timeout
    told: dict[int, str] = {}
    for other in range(size):
        left = max(1, int(1000 * (deadline - time.monotonic())))
        try:
            told[other] = store.blocking_key_value_get(f"jaxserve/agree/{name}/{other}", left)
        except RuntimeError as error:
            raise TimeoutError(f"rank {other} did not tell its {name} in {timeout:g} s; see its log") from error
    if problem := difference(name, told):
        raise Disagreement(problem)


def difference(name: str, told: Mapping[int, str]) -> str:
    """What to say about ranks that differ in `name`, "" when they do not."""
    ranks_of: dict[str, list[str]] = {}
    for rank, value in sorted(told.items()):
        ranks_of.setdefault(value, []).append(str(rank))
    if len(ranks_of) < 2:
        return ""
    groups = "; ".join(f"rank {', '.join(ranks)}: {value}" for value, ranks in ranks_of.items())
    return f"the ranks differ in their {name} ({groups}); start all of them alike"
