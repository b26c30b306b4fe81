"""Parts of a list by rank, and results brought together."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.distributed import current_rank, from_plain, gather, partition, to_plain
from jaxserve.types import CompletionOutput, Logprob, RequestOutput, RequestStateStats
from sharding.channel import ChannelError
from sharding.codec import CodecError, decode, encode
from sharding.launch import DataParallelRank, LaunchError
from sharding.processes import free_port


@given(st.integers(0, 200), st.integers(1, 40))
def test_parts_cover_everything_once_in_order(number: int, size: int):
    items = list(range(number))
    parts = [partition(items, rank, size) for rank in range(size)]
    assert list(itertools.chain(*parts)) == items
    lengths = [len(part) for part in parts]
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) - min(lengths) <= 1


def test_partition_as_vllm_users_write_it():
    floor, rest = 7 // 3, 7 % 3

    def begin(rank: int) -> int:
        return rank * floor + min(rank, rest)

    for rank in range(3):
        assert partition(range(7), rank, 3) == list(range(7))[begin(rank) : begin(rank + 1)]
    assert partition(["a"], 1, 2) == []
    assert partition("abc") == ["a", "b", "c"]


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, None), (None, 2), (0, 0)])
def test_impossible_parts(rank: int | None, size: int | None):
    with pytest.raises(ValueError, match="rank"):
        partition([1], rank, size)


def test_rank_comes_from_the_environment():
    assert current_rank({}) == DataParallelRank(0, 1, "127.0.0.1", 29501)
    dp = {"JAXSERVE_DP_RANK": "1", "JAXSERVE_DP_SIZE": "2", "JAXSERVE_DP_MASTER_PORT": "5", "JAXSERVE_DP_TOKEN": "t"}
    assert current_rank(dp) == DataParallelRank(1, 2, "127.0.0.1", 5, "t")
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "100"}
    assert current_rank(torchrun) == DataParallelRank(3, 4, "h", 101)
    assert current_rank(torchrun | dp).size == 2
    with pytest.raises(LaunchError, match="does not say where rank 0 runs"):
        current_rank({"RANK": "3", "WORLD_SIZE": "4"})


# Fields only: the checks of the classes use `random`, which strategies must not.
entries = st.tuples(st.floats(-9, 0), st.none() | st.integers(1, 9), st.none() | st.text())
logprobs = st.dictionaries(st.integers(0, 9), entries, max_size=3)
completions = st.fixed_dictionaries(
    {
        "index": st.integers(0, 3),
        "text": st.text(),
        "token_ids": st.lists(st.integers(0, 9)),
        "cumulative_logprob": st.none() | st.floats(-9, 0),
        "logprobs": st.none() | st.lists(logprobs, max_size=3),
        "finish_reason": st.sampled_from([None, "stop", "length"]),
        "stop_reason": st.none() | st.integers(0, 9) | st.text(),
    }
)
outputs = st.fixed_dictionaries(
    {
        "request_id": st.text(),
        "prompt": st.none() | st.text(),
        "prompt_token_ids": st.lists(st.integers(0, 9)),
        "outputs": st.lists(completions, max_size=2),
        "finished": st.booleans(),
        "prompt_logprobs": st.none() | st.lists(st.none() | logprobs, max_size=3),
        "metrics": st.none() | st.fixed_dictionaries({"arrival_time": st.floats(0, 9)}),
        "num_cached_tokens": st.integers(0, 9),
        "error": st.none() | st.text(),
    }
)


def with_logprobs(positions: list[Any] | None) -> Any:
    if positions is None:
        return None
    return [None if p is None else {token: Logprob(*entry) for token, entry in p.items()} for p in positions]


def output_of(fields: dict[str, Any]) -> RequestOutput:
    completions = [CompletionOutput(**c | {"logprobs": with_logprobs(c["logprobs"])}) for c in fields["outputs"]]
    metrics = fields["metrics"] and RequestStateStats(**fields["metrics"])
    prompt_logprobs = with_logprobs(fields["prompt_logprobs"])
    return RequestOutput(**fields | {"outputs": completions, "metrics": metrics, "prompt_logprobs": prompt_logprobs})


@settings(max_examples=50)
@given(outputs)
def test_outputs_travel_whole(fields: dict[str, Any]):
    output = output_of(fields)
    back = from_plain(decode(encode(to_plain(output))))
    assert back == output
    for completion in back.outputs:
        for position in completion.logprobs or []:
            assert all(isinstance(entry, Logprob) for entry in position.values())


def in_ranks(size: int, function: Any, port: int | None = None) -> list[Any]:
    """Results, or exceptions, of `function(ranks)` as every rank at the same time."""
    port = port or free_port()
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(function, DataParallelRank(r, size, "127.0.0.1", port, "t")) for r in range(size)]
    return [future.exception() or future.result() for future in futures]


@pytest.mark.parametrize(("number", "size"), [(7, 3), (2, 4), (0, 2), (5, 1)])
def test_gather_keeps_order(number: int, size: int):
    items = [RequestOutput(str(i), None, [i], [CompletionOutput(0, "x" * i, [i])], True) for i in range(number)]

    def work(ranks: DataParallelRank) -> Any:
        part = partition(items, ranks.rank, ranks.size)
        return gather(part, ranks=ranks, timeout=5.0), gather(part, ranks=ranks, timeout=5.0, to_all=False)

    for rank, result in enumerate(in_ranks(size, work)):
        assert result == (items, items if rank == 0 else [])


def test_many_gathers_one_after_another():
    """A fast rank must not meet the gather before the one it wants."""

    def work(ranks: DataParallelRank) -> Any:
        return [gather([(10 * i + ranks.rank)], ranks=ranks, to_all=False, timeout=5.0) for i in range(20)]

    first, *others = in_ranks(3, work)
    assert first == [[10 * i, 10 * i + 1, 10 * i + 2] for i in range(20)]
    assert others == [[[]] * 20] * 2


def test_plain_objects_and_arrays_gather():
    first, _ = in_ranks(2, lambda ranks: gather([{"a": np.arange(ranks.rank + 1)}], ranks=ranks, timeout=5.0))
    assert [item["a"].tolist() for item in first] == [[0], [0, 1]]


def test_a_rank_that_does_not_come_is_named_everywhere():
    here = threading.Event()

    def work(ranks: DataParallelRank) -> Any:
        if ranks.rank == 1:
            return here.wait(0)
        return gather([1], ranks=ranks, timeout=0.5)

    first, _, third = in_ranks(3, work)
    assert isinstance(first, TimeoutError)
    assert "rank 1 did not connect to rank 0 in 0.5 s" in str(first)
    assert isinstance(third, ChannelError)
    assert "rank 1 did not connect to rank 0" in str(third)


def test_no_first_rank():
    ranks = DataParallelRank(1, 2, "127.0.0.1", free_port())
    with pytest.raises(TimeoutError, match=r"rank 1 could not reach rank 0 at 127\.0\.0\.1 port \d+ in 0\.2 s"):
        gather([1], ranks=ranks, timeout=0.2)


def test_what_cannot_travel_is_said_at_once():
    first, second = in_ranks(2, lambda ranks: gather([object()] if ranks.rank else [1], ranks=ranks, timeout=1.0))
    assert isinstance(second, CodecError)
    assert isinstance(first, ChannelError)
