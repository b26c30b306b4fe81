"""Small host objects between the processes of one program: the leader tells its followers what each step does.

TCP connections from the leader (rank 0) to every follower. Messages are numbered, waits are bounded, a dead peer is
noticed at once when its process ends and after seconds when its machine does. Addresses and the token that both ends
must know come through a `Store`, which jax's coordination service is.
"""

import contextlib
import hmac
import secrets
import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from sharding.codec import decode, encode

DATA, END, FAILURE = range(3)  # kinds of frames
FRAME = struct.Struct("<BQI")  # kind, number of the message, bytes that follow
HELLO = struct.Struct("<I32s")  # rank, proof
NONCE_BYTES = 16
LARGEST_MESSAGE = 1 << 30  # bytes
HANDSHAKE_SECONDS = 5.0  # for a stranger who connects and says nothing
RETRY_SECONDS = 0.05
ANSWER_SECONDS = 5.0  # that a follower waits longer than the leader, whose message names who is missing
DEAD_AFTER = 15  # seconds without an answer from the other machine


class ChannelError(RuntimeError):
    """The other end is gone, failed, or does not speak this protocol."""


class ChannelClosed(ChannelError):
    """The other end closed the channel in order; nothing more comes."""


@runtime_checkable
class Store(Protocol):
    """What is used of the client of jax's coordination service: text under a key, seen by all ranks."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str: ...


class Connection:
    """One end of a connection to `peer` (a rank)."""

    def __init__(self, sock: socket.socket, peer: int) -> None:
        self.sock = sock
        self.peer = peer
        self.num_sent = 0
        self.num_received = 0
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sys.platform == "linux":
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_AFTER * 1000)

    def send(self, kind: int, data: bytes, timeout: float) -> None:
        """Send one frame.

        Raises:
            TimeoutError: the peer takes nothing any more.
            ChannelError: it is gone.
        """
        try:
            self.sock.settimeout(timeout)
            self.sock.sendall(FRAME.pack(kind, self.num_sent, len(data)) + data)
        except TimeoutError as error:
            raise TimeoutError(f"rank {self.peer} took no message for {timeout:g} s; it hangs, see its log") from error
        except OSError as error:
            raise self._lost(error) from error
        self.num_sent += 1

    def receive(self, timeout: float | None) -> tuple[int, bytes]:
        """The kind and content of the next frame; timeout None waits as long as the peer lives.

        Raises:
            TimeoutError: nothing came.
            ChannelError: the peer is gone or out of step.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            kind, number, length = FRAME.unpack(_read(self.sock, FRAME.size, deadline))
            if number != self.num_received or kind > FAILURE or length > LARGEST_MESSAGE:
                raise ChannelError(f"rank {self.peer} sent message {number} where {self.num_received} was due")
            data = _read(self.sock, length, deadline)
        except TimeoutError as error:
            raise TimeoutError(f"rank {self.peer} sent nothing for {timeout:g} s; it hangs, see its log") from error
        except OSError as error:
            raise self._lost(error) from error
        self.num_received += 1
        return kind, data

    def close(self) -> None:
        self.sock.close()

    def _lost(self, error: OSError) -> ChannelError:
        return ChannelError(f"rank {self.peer} is gone ({error}); its own log says why")


class Leader:
    """Rank 0's end: connections to all followers."""

    def __init__(self, connections: Iterable[Connection], timeout: float) -> None:
        self.timeout = timeout
        self._peers = {connection.sock.fileno(): connection for connection in connections}
        self._inbox: dict[int, deque[bytes]] = {connection.peer: deque() for connection in self._peers.values()}
        self._poll = select.poll()
        for number in self._peers:
            self._poll.register(number, select.POLLIN)

    def send(self, value: Any) -> None:
        """Send an object to every follower.

        Raises:
            CodecError: it cannot travel.
            TimeoutError, ChannelError: a follower hangs, is gone or failed; the message names it.
        """
        data = encode(value)
        self.check()
        for connection in self._peers.values():
            connection.send(DATA, data, self.timeout)

    def check(self) -> None:
        """Look, without waiting, whether all followers are there.

        Raises:
            ChannelError: one is gone or failed; the message names it and says what it said.
        """
        self._take(0.0)

    def collect(self, timeout: float | None = None) -> dict[int, Any]:
        """One object from each follower, by rank; `timeout` None is the channel's own.

        Raises:
            TimeoutError, ChannelError: a follower sent none.
        """
        limit = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        while missing := [rank for rank, box in self._inbox.items() if not box]:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"rank {', '.join(map(str, sorted(missing)))} sent nothing for {limit:g} s")
            self._take(left)
        return {rank: decode(box.popleft()) for rank, box in sorted(self._inbox.items())}

    def fail(self, message: str) -> None:
        """Tell the followers, whose next call then raises it, why this rank ends."""
        for connection in self._peers.values():
            with contextlib.suppress(ChannelError, TimeoutError):  # those that are gone need no reason
                connection.send(FAILURE, message.encode(), 1.0)

    def close(self) -> None:
        """Tell the followers that nothing more comes."""
        for connection in self._peers.values():
            _say_goodbye(connection)
        self._peers.clear()

    def _take(self, seconds: float) -> None:
        """Move what followers sent into the inbox, waiting at most `seconds` for the first."""
        for number, _ in self._poll.poll(seconds * 1000):
            connection = self._peers[number]
            kind, data = connection.receive(self.timeout)
            if kind != DATA:
                self._poll.unregister(number)
            if kind == FAILURE:
                raise ChannelError(f"rank {connection.peer} failed: {data.decode(errors='replace')}")
            if kind == END:
                raise ChannelClosed(f"rank {connection.peer} left")
            self._inbox[connection.peer].append(data)


class Follower:
    """Another rank's end: the connection to the leader."""

    def __init__(self, connection: Connection, timeout: float) -> None:
        self.timeout = timeout
        self._connection = connection

    def receive(self, timeout: float | None = None) -> Any:
        """The leader's next object; timeout None waits as long as the leader lives.

        Raises:
            TimeoutError: nothing came.
            ChannelClosed: the leader closed the channel in order.
            ChannelError: the leader is gone.
        """
        kind, data = self._connection.receive(timeout)
        if kind == END:
            raise ChannelClosed(f"rank {self._connection.peer} closed the channel")
        if kind == FAILURE:
            raise ChannelError(f"rank {self._connection.peer} failed: {data.decode(errors='replace')}")
        return decode(data)

    def send(self, value: Any) -> None:
        """Send an object to the leader, who takes it by `collect`."""
        self._connection.send(DATA, encode(value), self.timeout)

    def fail(self, message: str) -> None:
        """Tell the leader, whose next call then raises it, why this rank ends."""
        self._connection.send(FAILURE, message.encode(), self.timeout)

    def close(self) -> None:
        """Leave; the leader learns of it."""
        _say_goodbye(self._connection)


def open_channel(store: Store, rank: int, size: int, host: str, name: str, timeout: float) -> Leader | Follower:
    """The channel of all ranks, made by all of them together.

    Args:
        store: where the address and the token are exchanged.
        rank: of this process; 0 leads.
        size: processes.
        host: where followers reach rank 0.
        name: of the channel; a later channel may have the same.
        timeout: seconds until all have come, and that one message may take.

    Raises:
        TimeoutError: not all came; names them.
    """
    key = f"jaxserve/channel/{name}"
    if rank == 0:
        token = secrets.token_bytes(32)
        with listener(host, 0, size) as server:
            port = server.getsockname()[1]
            store.key_value_set(key, f"{token.hex()} {port} {host}", allow_overwrite=True)
            return Leader(accept_all(server, size, token, timeout), timeout)
    deadline = time.monotonic() + timeout
    while True:
        # Read again each time: what stands there may be an earlier channel of this name.
        try:
            text = store.blocking_key_value_get(key, max(1, int(1000 * (deadline - time.monotonic()))))
            token_text, port_text, address = text.split(" ")
            left = max(0.1, min(HANDSHAKE_SECONDS, deadline - time.monotonic()))
            return Follower(connect(address, int(port_text), rank, bytes.fromhex(token_text), left), timeout)
        except (RuntimeError, OSError) as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {rank} found no channel {name!r} of rank 0 in {timeout:g} s") from error
        time.sleep(RETRY_SECONDS)


def open_program_channel(name: str, timeout: float) -> Leader | Follower | None:
    """`open_channel` between the processes that `jax.distributed` joined, None where there is one process only."""
    from jax._src.distributed import global_state

    if global_state.client is None or global_state.num_processes == 1:
        return None
    host = (global_state.coordinator_address or "").rpartition(":")[0].strip("[]")
    rank, size = global_state.process_id, global_state.num_processes
    return open_channel(global_state.client, rank, size, host, name, timeout)


def listener(host: str, port: int, size: int) -> socket.socket:
    """A listening socket on the interface of `host`, or on all where that address is not this machine's own (NAT)."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=size)
    except OSError:  # also a name that cannot be looked up yet, as of a pod that has just started
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", port), family=family, backlog=size, dualstack_ipv6=both)


def accept_all(server: socket.socket, size: int, token: bytes, timeout: float) -> list[Connection]:
    """The connections of ranks 1 to `size` - 1, in this order; strangers are turned away.

    Raises:
        TimeoutError: some did not come; names them.
    """
    found: dict[int, Connection] = {}
    deadline = time.monotonic() + timeout
    while len(found) < size - 1:
        try:
            server.settimeout(max(0.001, deadline - time.monotonic()))
            sock, _ = server.accept()
        except TimeoutError as error:
            missing = ", ".join(str(rank) for rank in range(1, size) if rank not in found)
            message = f"rank {missing} did not connect to rank 0 in {timeout:g} s; see its log"
            waiting = Leader(found.values(), 1.0)
            waiting.fail(message)
            waiting.close()
            raise TimeoutError(message) from error
        rank = _admit(sock, size, token)
        if rank is None:
            sock.close()
            continue
        if rank in found:  # it gave up on its first attempt
            found[rank].close()
        found[rank] = Connection(sock, rank)
    return [found[rank] for rank in sorted(found)]


def connect(host: str, port: int, rank: int, token: bytes, timeout: float) -> Connection:
    """This rank's connection to rank 0.

    Raises:
        OSError: nobody listens there.
        ChannelError: the listener does not know the token.
    """
    deadline = time.monotonic() + timeout
    sock = socket.create_connection((host, port), timeout)
    try:
        nonce = _read(sock, NONCE_BYTES, deadline)
        sock.sendall(HELLO.pack(rank, _proof(token, nonce, rank)))
        if not hmac.compare_digest(_read(sock, 32, deadline), _proof(token, nonce, 0)):
            raise ChannelError(f"what listens at {host} port {port} is not rank 0 of this program")
    except BaseException:
        sock.close()
        raise
    return Connection(sock, 0)


def connect_until(host: str, port: int, rank: int, token: bytes, timeout: float) -> Connection:
    """`connect`, again and again until rank 0 listens.

    Raises:
        TimeoutError: it did not; names the address.
        ChannelError: the listener does not know the token.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            return connect(host, port, rank, token, HANDSHAKE_SECONDS)
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"rank {rank} could not reach rank 0 at {host} port {port} in {timeout:g} s ({error}); see the log "
                    "of rank 0"
                ) from error
        time.sleep(RETRY_SECONDS)


def _admit(sock: socket.socket, size: int, token: bytes) -> int | None:
    """The rank of whoever connected and knows the token."""
    deadline = time.monotonic() + HANDSHAKE_SECONDS
    nonce = secrets.token_bytes(NONCE_BYTES)
    try:
        sock.settimeout(HANDSHAKE_SECONDS)
        sock.sendall(nonce)
        rank, proof = HELLO.unpack(_read(sock, HELLO.size, deadline))
        if not 0 < rank < size or not hmac.compare_digest(proof, _proof(token, nonce, rank)):
            return None
        sock.sendall(_proof(token, nonce, 0))
    except OSError:
        return None
    return rank


def _proof(token: bytes, nonce: bytes, rank: int) -> bytes:
    return hmac.digest(token, nonce + rank.to_bytes(4, "little"), "sha256")


def _read(sock: socket.socket, size: int, deadline: float | None) -> bytes:
    """Exactly `size` bytes.

    Raises:
        TimeoutError, OSError: they did not come.
    """
    parts = bytearray()
    while len(parts) < size:
        sock.settimeout(None if deadline is None else max(0.001, deadline - time.monotonic()))
        part = sock.recv(min(size - len(parts), 1 << 20))
        if not part:
            raise ConnectionResetError("connection closed")
        parts += part
    return bytes(parts)


def _say_goodbye(connection: Connection) -> None:
    try:
        connection.send(END, b"", 1.0)
    except (ChannelError, TimeoutError):
        pass  # it is gone already
    finally:
        connection.close()
