"""Ragged batches that every attention implementation must serve, and numpy brute force for the kernels."""

from dataclasses import dataclass

import numpy as np

QUICK = {"xla_backend_optimization_level": 0}  # compiling is most of the time of these tests


@dataclass(frozen=True)
class Case:
    """One ragged batch: `rows[s]` query rows of sequence `s`, which then has `lens[s]` cached positions."""

    name: str
    rows: tuple[int, ...]
    lens: tuple[int, ...]
    pad_rows: int = 0
    pad_seqs: int = 0
    heads: tuple[int, int] = (6, 2)  # query heads, key heads
    width: int = 16
    page: int = 4
    pages_per_seq: int = 12
    pages: int | None = None  # in the cache; otherwise a few more than are used
    window: int | None = None
    soft_cap: float | None = None
    dtype: str = "float32"


# Compiling is most of the time of these cases: those of one shape share a program.
FOUR = {"pages_per_seq": 80, "pages": 112}  # as many rows as sequences
EIGHT = {"pages_per_seq": 12, "pages": 40}  # 64 rows, 8 sequences
TWO = {"pages_per_seq": 80, "pages": 80}  # 200 rows, 2 sequences
CASES = (
    Case("decode", (1, 1, 1, 1), (1, 7, 33, 48), **FOUR),
    Case("decode with padding", (1, 1), (9, 4), pad_rows=2, pad_seqs=2, **FOUR),
    Case("decode, some sequences without rows", (1, 0, 1, 1), (5, 3, 17, 48), pad_rows=1, **FOUR),
    Case("as many rows as sequences, not a decode", (2, 1), (3, 20), pad_rows=1, pad_seqs=2, **FOUR),
    Case("long decodes", (1, 1), (300, 129), pad_rows=2, pad_seqs=2, **FOUR),
    Case("one prefill", (20,), (20,), pad_rows=44, pad_seqs=7, **EIGHT),
    Case("chunk on a cached prefix", (9,), (41,), pad_rows=55, pad_seqs=7, **EIGHT),
    Case("mixed", (1, 13, 1, 30, 1), (40, 13, 1, 47, 8), pad_rows=18, pad_seqs=3, **EIGHT),
    Case("mostly decodes", (1, 1, 1, 1, 1, 1, 1, 2), (9, 48, 1, 2, 33, 16, 17, 5), pad_rows=55, **EIGHT),
    Case("only padding", (), (), pad_rows=64, pad_seqs=8, **EIGHT),
    Case("prefill of several tiles", (200,), (300,), pad_seqs=1, **TWO),
    Case("tiles that end past the batch", (130, 70), (130, 81), **TWO),
    Case("one head", (1, 6), (6, 11), heads=(1, 1)),
    Case("multi-query, odd group", (1, 5), (30, 5), heads=(7, 1)),
    Case("grouped, odd group", (1, 5, 2), (30, 5, 40), heads=(9, 3), width=64),
    Case("every head its own key", (1, 5), (30, 5), heads=(5, 5)),
    Case("window", (1, 13, 1), (40, 13, 3), window=5, pad_rows=3),
    Case("window on decodes", (1, 1, 1), (40, 13, 3), window=7),
    Case("window of one", (4, 1), (9, 2), window=1),
    Case("window over many blocks", (70, 2), (300, 280), window=40, pages_per_seq=80, pad_rows=8),
    Case("soft cap", (1, 13), (40, 20), soft_cap=2.0),
    Case("window and soft cap", (1, 13), (40, 20), window=6, soft_cap=1.5),
    Case("page of one token", (1, 9), (20, 12), page=1, pages_per_seq=21),
    Case("page of 16", (1, 40), (100, 90), page=16),
    Case("page of 64", (1, 40, 1), (200, 90, 64), page=64, pages_per_seq=5),
    Case("page of 256", (1, 40), (300, 257), page=256, pages_per_seq=2),
    Case("bfloat16", (1, 13, 1), (40, 13, 3), dtype="bfloat16", pad_rows=1),
    Case("bfloat16 decode", (1, 1, 1), (40, 13, 3), dtype="bfloat16", window=9),
)


@dataclass(frozen=True)
class Arrays:
    """A case's arrays (numpy), and the layer to attend to."""

    q: np.ndarray
    kv: np.ndarray
    layer: int
    page_table: np.ndarray
    cu_q_lens: np.ndarray
    kv_lens: np.ndarray


def make(case: Case, seed: int = 0) -> Arrays:
    """Random arrays: scattered pages, out-of-range page ids in the unused columns, finite junk in unused cells."""
    rng = np.random.default_rng(seed)
    (heads, key_heads), seqs = case.heads, len(case.rows) + case.pad_seqs
    used = [-(-n // case.page) for n in case.lens]
    num_pages = case.pages or sum(used) + 3
    kv = rng.standard_normal((2, num_pages, 2, key_heads, case.page, case.width)).astype(np.float32)
    free = iter(rng.permutation(num_pages))
    page_table = np.full((seqs, case.pages_per_seq), num_pages + 5, np.int32)
    for s, count in enumerate(used):
        page_table[s, :count] = [next(free) for _ in range(count)]
    q = rng.standard_normal((sum(case.rows) + case.pad_rows, heads, case.width)).astype(np.float32)
    rows, lens = (np.array([*x, *[0] * case.pad_seqs], np.int32) for x in (case.rows, case.lens))
    cu_q_lens = np.concatenate([[0], np.cumsum(rows)]).astype(np.int32)
    return Arrays(q, kv, 1, page_table, cu_q_lens, lens)


def attention(arrays: Arrays, scale: float, window: int | None, soft_cap: float | None) -> np.ndarray:
    """Paged attention token by token and head by head in float64."""
    q, kv = arrays.q.astype(np.float64), arrays.kv[arrays.layer].astype(np.float64)
    group, page = q.shape[1] // kv.shape[2], kv.shape[3]
    out = np.zeros(q.shape)
    for s, length in enumerate(arrays.kv_lens):
        first, end = arrays.cu_q_lens[s : s + 2]
        cells = np.arange(length)
        pages, offsets = arrays.page_table[s, cells // page], cells % page
        for t in range(first, end):
            position = length - end + t
            seen = slice(0 if window is None else max(position - window + 1, 0), position + 1)
            for n in range(q.shape[1]):
                keys, values = (kv[pages[seen], kind, n // group, offsets[seen]] for kind in (0, 1))
                scores = keys @ q[t, n] * scale
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                weights = np.exp(scores - scores.max())
                out[t, n] = weights @ values / weights.sum()
    return out
