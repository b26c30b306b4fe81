"""What the scheduler keeps in order: the sequences that wait, and the rows of the step it is planning."""

import heapq
import itertools
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxserve.types import Sequence, Work


class WaitingQueue:
    """Sequences that wait, in order: by ticket (fcfs), or by priority, arrival and then ticket."""

    def __init__(self, by_priority: bool) -> None:
        """`by_priority` orders by `Request.priority` and arrival; otherwise only by when they were pushed."""
        self._by_priority = by_priority
        self._heap: list[tuple[Any, ...]] = []  # (priority, arrival, ticket, sequence); tickets are unique
        self._tail = itertools.count()
        self._head = itertools.count(-1, -1)
        self._num_left = 0  # entries that left from the middle and are still in the heap
        self._sizes: dict[Sequence, int] = {}  # tokens when they were pushed
        self.num_tokens = 0  # of all sequences; other threads may ask

    def __len__(self) -> int:
        return len(self._heap) - self._num_left

    def push(self, seq: Sequence, first: bool = False) -> None:
        """Add a sequence, behind its equals or, with `first`, in front of them."""
        ticket = next(self._head if first else self._tail)
        request = seq.request
        order = (request.priority, request.arrival_time) if self._by_priority else (0, 0.0)
        heapq.heappush(self._heap, (*order, ticket, seq))
        self._sizes[seq] = seq.num_tokens
        self.num_tokens += seq.num_tokens

    def peek(self) -> Sequence | None:
        """The first sequence, or None."""
        while self._heap and self._heap[0][-1].finished:
            heapq.heappop(self._heap)
            self._num_left -= 1
        return self._heap[0][-1] if self._heap else None

    def pop(self) -> None:
        """Remove what `peek` returned."""
        self.num_tokens -= self._sizes.pop(heapq.heappop(self._heap)[-1])

    def forget(self, seq: Sequence) -> None:
        """Note that a sequence has just been marked as finished; its entry goes later."""
        self.num_tokens -= self._sizes.pop(seq)
        self._num_left += 1
        if self._num_left > len(self) + 64:
            self._heap = [entry for entry in self._heap if not entry[-1].finished]
            heapq.heapify(self._heap)
            self._num_left = 0

    def first_tokens(self, count: int) -> int:
        """About how many tokens the first `count` sequences have."""
        return self.num_tokens * count // len(self) if count < len(self) else self.num_tokens

    def all(self) -> list[Sequence]:
        """Every sequence, in no particular order; other threads may ask."""
        return [entry[-1] for entry in list(self._heap) if not entry[-1].finished]


class StepRows:
    """A step under construction: one row a sequence, filled in by the scheduler."""

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self.starts: list[int] = []
        self.counts: list[int] = []
        self.samples: list[bool] = []
        self.steps = 1

    def work(self, page_table: Int[np.ndarray, "slots P"]) -> Work | None:
        """The finished step with int32 `[slots, P]` pages by slot, or None without rows."""
        if not self.sequences:
            return None
        slots = np.array([seq.slot for seq in self.sequences], np.int32)
        starts, counts = np.array(self.starts, np.int32), np.array(self.counts, np.int32)
        return Work(self.sequences, slots, starts, counts, np.array(self.samples, np.bool_), page_table, self.steps)
