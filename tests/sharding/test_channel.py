"""Messages between ranks: what travels, order, waits, dead and failed peers, strangers."""

import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding import channel
from sharding.agreement import Disagreement, agree, meet
from sharding.channel import ChannelClosed, ChannelError, Follower, Leader, open_channel
from sharding.codec import CodecError, decode, encode
from sharding.config import MeshConfig
from sharding.processes import free_port

scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text()
plain = st.recursive(
    scalars | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(0, 99), inner, max_size=4),
    max_leaves=12,
)


@given(plain)
def test_plain_objects_travel(value: Any):
    assert decode(encode(value)) == value


@given(st.data())
def test_arrays_travel(data: st.DataObject):
    dtype = data.draw(st.sampled_from(["int32", "float32", "int64", "bool", "uint8", "float16"]))
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=3)))
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    for sent in (array, array.T, array[::-1] if array.ndim else array):
        (back,) = decode(encode([sent]))
        assert (back.dtype, back.shape) == (sent.dtype, sent.shape)
        np.testing.assert_array_equal(back, sent)


def test_numpy_scalars_arrive_as_numbers():
    assert decode(encode([np.int32(7), np.float32(0.5), np.bool_(True)])) == [7, 0.5, True]


@pytest.mark.parametrize(
    "value", [(1, 2), {1, 2}, object(), np.array(["a"]), np.array([None]), 2**64, [MeshConfig], np.datetime64("2020")]
)
def test_other_things_are_refused(value: Any):
    with pytest.raises(CodecError, match="cannot travel between processes"):
        encode({"a": [value]})


@given(st.binary(max_size=40))
def test_any_bytes_give_an_object_or_one_kind_of_error(data: bytes):
    with suppress(CodecError):
        decode(data)


def test_damaged_arrays_are_refused():
    good = encode(np.arange(4, dtype=np.int32))
    for bad in (good[:-1], good.replace(b"<i4", b"|O4"), good.replace(b"<i4", b"<i8")):
        with pytest.raises(CodecError):
            decode(bad)


class MemoryStore:
    """What jax's coordination service does, for threads."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.changed = threading.Condition()

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        with self.changed:
            if key in self.values and not allow_overwrite:
                raise RuntimeError("ALREADY_EXISTS")
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, timeout_in_ms / 1000):
                raise RuntimeError("DEADLINE_EXCEEDED")
            return self.values[key]


@contextmanager
def channels(size: int, store: MemoryStore | None = None, timeout: float = 5.0) -> Iterator[tuple[Leader, Any]]:
    store = store or MemoryStore()
    with ThreadPoolExecutor(size) as pool:
        ends = list(pool.map(lambda rank: open_channel(store, rank, size, "127.0.0.1", "t", timeout), range(size)))
    try:
        yield ends[0], ends[1:]  # pyright: ignore[reportReturnType]
    finally:
        for end in ends:
            end.close()


def test_messages_reach_all_followers_in_order():
    with channels(4) as (leader, followers):
        for number in range(100):
            leader.send({"step": number, "tokens": np.full(number, number, np.int32)})
        for follower in followers:
            for number in range(100):
                message = follower.receive(5.0)
                assert message["step"] == number
                assert message["tokens"].tolist() == [number] * number
        for rank, follower in enumerate(followers, start=1):
            follower.send({"rank": rank})
        assert leader.collect() == {rank: {"rank": rank} for rank in (1, 2, 3)}
        leader.close()
        for follower in followers:
            with pytest.raises(ChannelClosed, match="rank 0 closed the channel"):
                follower.receive(5.0)


def test_a_large_message_does_not_need_a_reader_at_once():
    with channels(2) as (leader, (follower,)), ThreadPoolExecutor(1) as pool:
        data = bytes(20 << 20)
        sent = pool.submit(leader.send, data)
        assert hashlib.sha256(follower.receive(5.0)).digest() == hashlib.sha256(data).digest()
        sent.result(5)


def test_a_silent_leader_is_a_timeout():
    with channels(2) as (_, (follower,)), pytest.raises(TimeoutError, match=r"rank 0 sent nothing for 0\.05 s"):
        follower.receive(0.05)


def test_a_follower_that_does_not_read_is_a_timeout():
    with (
        channels(3, timeout=0.5) as (leader, _),
        pytest.raises(TimeoutError, match=r"rank 1 took no message for 0\.5 s"),
    ):
        leader.send(bytes(64 << 20))


def test_collect_names_who_is_missing():
    with channels(4) as (leader, followers):
        followers[1].send(1)
        with pytest.raises(TimeoutError, match=r"rank 1, 3 sent nothing for 0\.1 s"):
            leader.collect(0.1)


def test_a_dead_peer_is_noticed():
    with channels(3) as (leader, followers):
        followers[1]._connection.sock.close()  # what the kernel does when a process ends
        time.sleep(0.05)
        with pytest.raises(ChannelError, match="rank 2 is gone"):
            leader.send("hello")
    with channels(2) as (leader, (follower,)):
        for connection in leader._peers.values():
            connection.sock.close()
        with pytest.raises(ChannelError, match="rank 0 is gone"):
            follower.receive(None)


def test_a_failure_is_told():
    with channels(3) as (leader, followers):
        leader.check()
        followers[1].fail("ValueError: out of memory")
        time.sleep(0.05)
        with pytest.raises(ChannelError, match="rank 2 failed: ValueError: out of memory"):
            leader.check()
        followers[0].close()
        time.sleep(0.05)
        with pytest.raises(ChannelClosed, match="rank 1 left"):
            leader.send(1)


def test_a_second_channel_of_a_name():
    store = MemoryStore()
    for number in range(2):
        with channels(2, store) as (leader, (follower,)):
            leader.send(number)
            assert follower.receive(5.0) == number


def test_missing_ranks_are_named():
    store = MemoryStore()
    with pytest.raises(TimeoutError, match=r"rank 1, 2 did not connect to rank 0 in 0\.1 s"):
        open_channel(store, 0, 3, "127.0.0.1", "t", 0.1)
    with pytest.raises(TimeoutError, match=r"rank 1 found no channel 't' of rank 0 in 0\.1 s"):
        open_channel(store, 1, 3, "127.0.0.1", "t", 0.1)


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-name.invalid", "::1"])
def test_a_listener_at_an_address_that_is_not_its_own(host: str):
    """Such as behind a NAT, or a name that cannot be looked up yet: it listens on all interfaces."""
    if host == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with channel.listener(host, 0, 2) as server, ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(channel.accept_all, server, 2, b"", 5.0)
        port = server.getsockname()[1]
        channel.connect_until("::1" if host == "::1" else "127.0.0.1", port, 1, b"", 5.0).close()
        accepted.result(5)[0].close()


def test_strangers_are_turned_away(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(channel, "HANDSHAKE_SECONDS", 0.1)
    token = b"secret"
    with channel.listener("127.0.0.1", 0, 3) as server, ThreadPoolExecutor(1) as pool:
        port = server.getsockname()[1]
        accepted = pool.submit(channel.accept_all, server, 2, token, 5.0)
        with (
            socket.create_connection(("127.0.0.1", port)) as silent,
            socket.create_connection(("127.0.0.1", port)) as bad,
        ):
            bad.sendall(b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n")
            for wrong_token, rank in ((b"guess", 1), (token, 2)):
                with pytest.raises((OSError, ChannelError)):
                    channel.connect("127.0.0.1", port, rank, wrong_token, 5.0)
            right = channel.connect("127.0.0.1", port, 1, token, 5.0)
            assert silent.recv(100)  # a nonce, and nothing after it
        (connection,) = accepted.result(5)
        assert connection.peer == 1
        for end in (right, connection):
            end.close()


def test_a_listener_without_the_token_is_found_out():
    with channel.listener("127.0.0.1", 0, 2) as server, ThreadPoolExecutor(1) as pool:

        def pretend() -> None:
            sock, _ = server.accept()
            with sock:
                sock.sendall(bytes(16) + bytes(32))
                time.sleep(0.1)

        done = pool.submit(pretend)
        with pytest.raises((OSError, ChannelError)):
            channel.connect("127.0.0.1", server.getsockname()[1], 1, b"secret", 2.0)
        done.result(5)


def test_a_step_message_takes_far_less_than_a_step():
    """4 KiB there and an answer back; the bound leaves room for a busy machine."""
    payload = {"step": 1, "tokens": np.arange(1024, dtype=np.int32)}
    with channels(2) as (leader, (follower,)), ThreadPoolExecutor(1) as pool:

        def answer() -> None:
            for _ in range(300):
                follower.receive(5.0)
                follower.send(None)

        done = pool.submit(answer)
        times = []
        for _ in range(300):
            begun = time.perf_counter()
            leader.send(payload)
            leader.collect()
            times.append(time.perf_counter() - begun)
        done.result(5)
    assert sorted(times)[150] < 2 * 0.3e-3


def in_ranks(size: int, function: Any) -> list[BaseException | None]:
    with ThreadPoolExecutor(size) as pool:
        return [future.exception() for future in [pool.submit(function, rank) for rank in range(size)]]


def test_ranks_agree_or_say_who_differs():
    store = MemoryStore()
    assert in_ranks(3, lambda rank: agree(store, rank, 3, "version", "1", 5.0)) == [None] * 3
    errors = in_ranks(3, lambda rank: agree(store, rank, 3, "config", "b" if rank == 1 else "a", 5.0))
    assert all(isinstance(error, Disagreement) for error in errors)
    assert {str(e) for e in errors} == {
        "the ranks differ in their config (rank 0, 2: a; rank 1: b); start all of them alike"
    }
    (error,) = in_ranks(1, lambda rank: agree(store, rank, 2, "mesh", "a", 0.1))
    assert isinstance(error, TimeoutError)
    assert "rank 1 did not tell its mesh in 0.1 s" in str(error)


def test_ranks_meet_before_jax_starts():
    port = free_port()

    def work(rank: int, size: int = 3, odd: int = -1) -> None:
        meet(rank, size, "127.0.0.1", port, {"code version": "2" if rank == odd else "1", "mesh config": "m"}, 1.0)

    assert in_ranks(3, work) == [None] * 3
    errors = in_ranks(3, lambda rank: work(rank, odd=2))
    told = "the ranks differ in their code version (rank 0, 1: 1; rank 2: 2); start all of them alike"
    assert [str(error) for error in errors] == [told] * 3
    missing, told = in_ranks(2, work)
    assert "rank 2 did not connect to rank 0 in 1 s" in str(missing)
    assert "rank 2 did not connect to rank 0 in 1 s" in str(told)


def test_the_ends_have_names():
    with channels(2) as (leader, (follower,)):
        assert isinstance(leader, Leader)
        assert isinstance(follower, Follower)
