"""How a device's mailbox lies in memory, and the table that tells a kernel where all of them are.

A mailbox is `[2, ranks, MAX_ROWS, THREADS, PAIRS]` times word, flag, word, flag; it starts with zeros. The table of a
device holds its own rank, its own mailbox's address and those of all ranks, as int32 words since jax has no pointers.
"""

from collections.abc import Sequence

import numpy as np

THREADS, WORDS = 128, 4  # of a row: a thread moves 16 bytes
ROW_BYTES = THREADS * WORDS * 4
PAIRS, PAIR_BYTES = WORDS // 2, 16
MAX_ROWS = 256  # of an array; above, NCCL was as fast, and here every row has a block of threads that must run at once
MAX_RANKS = 8  # that share a mailbox: of one host
TABLE_WORDS = 64  # Mosaic wants operands at multiples of 256 bytes
OWN_ADDRESS, FIRST_ADDRESS = 2, 4  # words of the table


def mailbox_bytes(ranks: int) -> int:
    """Of one device's mailbox among so many devices."""
    return 2 * ranks * MAX_ROWS * THREADS * PAIRS * PAIR_BYTES


def make_table(rank: int, addresses: Sequence[int]) -> np.ndarray:
    """The table `[TABLE_WORDS]` int32 of this rank, from the mailboxes' addresses in order of rank.

    Raises:
        ValueError: more than `MAX_RANKS` addresses.
    """
    if len(addresses) > MAX_RANKS:
        raise ValueError(f"{len(addresses)} mailboxes; sums are made among at most {MAX_RANKS} devices")
    table = np.zeros(TABLE_WORDS, np.int32)
    table[0] = rank
    words = np.asarray([addresses[rank], *addresses], np.uint64).view(np.int32)  # low, high, low, high ...
    table[OWN_ADDRESS : OWN_ADDRESS + len(words)] = words
    return table
