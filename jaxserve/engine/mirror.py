"""One engine over several processes: the leader plans, and all launch the same programs in the same order.

Only the leader (process 0) has requests, a scheduler and a tokenizer's work. Before each launch it sends the step's
bucket and packed inputs to the others, which do nothing but launch it, too. So what the devices of all processes are
told to do is the same, as collectives need it.
"""

import atexit
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sharding.agreement import Disagreement, differences
from sharding.channel import Follower, Leader, open_program_channel

SECONDS = 600.0  # that processes may be apart while they load weights and compile


@dataclass(frozen=True)
class Mirror:
    """This process's end of the channel; both ends are None where there is one process only."""

    leader: Leader | None = None
    follower: Follower | None = None

    @classmethod
    def open(cls, facts: Mapping[str, str]) -> "Mirror":
        """Connect all processes that `jax.distributed` joined.

        Raises:
            Disagreement: the facts, by name, differ; names the ranks and their values.
            TimeoutError, ChannelError: a process is missing or gone; names it.
        """
        channel = open_program_channel("engine", SECONDS)
        if isinstance(channel, Leader):
            atexit.register(channel.close)  # programs that end without closing their engine end well, too
            problem = differences({0: dict(facts), **channel.collect()})
            channel.send(problem)
        elif isinstance(channel, Follower):
            channel.send(dict(facts))
            problem = channel.receive(SECONDS)
        else:
            return cls()
        if problem:
            raise Disagreement(problem)
        return cls(channel, None) if isinstance(channel, Leader) else cls(None, channel)

    @property
    def alone(self) -> bool:
        """Whether there is one process only."""
        return self.leader is None and self.follower is None

    def least(self, number: int) -> int:
        """The smallest of all processes' numbers; all ask."""
        if self.leader is not None:
            number = min([number, *self.leader.collect().values()])
            self.leader.send(number)
        elif self.follower is not None:
            self.follower.send(number)
            number = int(self.follower.receive(SECONDS))
        return number

    def tell(self, bucket: list[int], buffer: np.ndarray) -> None:
        """Let the others launch this step.

        Raises:
            TimeoutError, ChannelError: one of them hangs, is gone or failed; the message names it.
        """
        if self.leader is not None:
            self.leader.send({"bucket": bucket, "buffer": buffer})

    def hear(self) -> tuple[list[int], np.ndarray]:
        """The bucket and the packed inputs of the leader's next step.

        Raises:
            ChannelClosed: the leader launches no more.
            ChannelError: it is gone.
        """
        if self.follower is None:
            raise RuntimeError("only a follower hears of steps")
        message: dict[str, Any] = self.follower.receive(None)
        return message["bucket"], message["buffer"]

    def fail(self, message: str) -> None:
        """Tell the others why this process ends."""
        end = self.leader or self.follower
        if end is not None:
            end.fail(message)

    def close(self) -> None:
        """Tell the others that nothing more comes."""
        end = self.leader or self.follower
        if end is not None:
            end.close()
