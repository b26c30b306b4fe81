"""The Hopper kernels of `paged_attention`: interpreted, lowered for CUDA, and run where there is a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Arrays, Case, attention, make
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import OP, hopper_stream, mosaic_gpu, paged_attention
from pallas_kernels.attention.hopper_stream_kernel import RUN_WORDS, TILE_WORDS

PAGED = Case("", (), (), page=64, dtype="bfloat16")


def case(name: str, rows: tuple[int, ...], lens: tuple[int, ...], **changes) -> Case:
    pages = max(-(-n // 64) for n in lens) + 1
    return dataclasses.replace(PAGED, name=name, rows=rows, lens=lens, pages_per_seq=pages, **changes)


SMALL = (
    case("decode", (1, 1, 1), (100, 1, 65), heads=(4, 2), width=64, pad_rows=1, pad_seqs=1),
    case("multi-query, odd group", (1, 0, 1), (70, 0, 64), heads=(7, 1), width=128),
    case("rows as sequences, not a decode", (3, 1), (66, 20), heads=(4, 2), width=64, pad_seqs=2),
    case("short chunks", (5, 1, 3), (70, 10, 3), heads=(6, 2), width=64, pad_rows=4),
    case("mixed", (1, 40, 2), (70, 45, 65), heads=(2, 1), width=64, pad_rows=3),
    case("window and soft cap", (2, 36), (100, 70), heads=(2, 1), width=64, window=20, soft_cap=5.0),
    case("width 80", (1, 20), (70, 33), heads=(4, 1), width=80),
    case("width 96, float16", (1, 20), (70, 33), heads=(4, 2), width=96, dtype="float16"),
)
INTERPRETED_BY_HAND = ("rows as sequences, not a decode", "short chunks", "width 80")  # others hold what they show
ONCE_EACH = [pytest.param(c, marks=[pytest.mark.slow] if c.name in INTERPRETED_BY_HAND else []) for c in SMALL]
LARGE = (
    case("partial results of many CTAs", (1,), (5000,), heads=(8, 2), width=128),
    case("partial results of few CTAs", (1,) * 5, (3000, 900, 64, 1, 2000), heads=(8, 2), width=128),
    case("partial results of whole tiles", (1, 1), (3000, 70), heads=(2, 1), width=256),
    case("partial results of a large group", (1,), (5000,), heads=(32, 1), width=128),
    case("no partial results", (1,) * 40, (300,) * 40, heads=(32, 8), width=128),
    case("every strip of the last page", (1,) * 64, tuple(range(65, 129)), heads=(8, 2), width=128),
    case("few pages", (1, 1), (3, 70), heads=(8, 2), width=128),
    case("odd group", (1, 1), (3000, 70), heads=(9, 3), width=64),
    case("long chunks", (300, 1, 129, 32), (1000, 700, 129, 500), heads=(8, 2), width=128, pad_rows=30),
    case("long chunks, window", (300, 1, 129), (1000, 700, 129), heads=(4, 2), width=128, window=200, soft_cap=20.0),
    case("width 256", (200, 1, 33), (500, 700, 40), heads=(2, 1), width=256),
)


def inputs(case: Case) -> tuple[Arrays, list[jax.Array]]:
    arrays = make(case)
    q, kv = jnp.asarray(2 * arrays.q, case.dtype), jnp.asarray(arrays.kv, case.dtype)
    rounded = dataclasses.replace(arrays, q=np.asarray(q, np.float32), kv=np.asarray(kv, np.float32))
    return rounded, [q, kv, *map(jnp.asarray, (arrays.page_table, arrays.cu_q_lens, arrays.kv_lens))]


def options(case: Case) -> dict:
    return {"scale": case.width**-0.5, "window": case.window, "soft_cap": case.soft_cap}


def relative(case: Case, arrays: Arrays, got: jax.Array) -> float:
    expected = attention(arrays, case.width**-0.5, case.window, case.soft_cap)
    return float(np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected))


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # keys that are not read are NaN, and masked
@pytest.mark.parametrize("case", ONCE_EACH, ids=lambda case: case.name)
def test_interpreted(case: Case):
    """On CPU with race detection; without the merge of partial results, which needs semaphores."""
    arrays, (q, kv, *rest) = inputs(case)
    params = plgpu.InterpretGPUParams(detect_races=True)
    got = mosaic_gpu.hopper_attention(q, kv, arrays.layer, *rest, **options(case), ctas=3, interpret=params)
    assert relative(case, arrays, got) < 5e-3
    assert not np.asarray(got, np.float32)[arrays.cu_q_lens[-1] :].any()


@pytest.mark.parametrize("case", [*SMALL, LARGE[0], LARGE[2]], ids=lambda case: case.name)
def test_lowers_for_cuda(case: Case):
    """Checks layouts, TMA boxes and shared memory; that mixed batches write into one array shows in the aliases."""
    _, (q, kv, *rest) = inputs(case)

    def call(q, kv, layer, *rest):
        return mosaic_gpu.hopper_attention(q, kv, layer, *rest, **options(case))

    text = jax.jit(call).trace(q, kv, jnp.int32(1), *rest).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == (2 if max(case.rows) > mosaic_gpu.short_rows() else 1)


@pytest.mark.parametrize(
    ("lens", "runs_share_groups"),
    [
        ((130, 1, 0, 700), True),
        ((640, 640, 0, 640), False),  # 6 groups of 10 pages for 7 CTAs
        ((130, 100, 0, 90), False),  # 6 groups of 2 or 3 pages
        ((300, 300, 0, 5000), True),
        ((1, 1, 0, 1), False),
    ],
    ids=str,
)
def test_plan_visits_every_page_once(lens: tuple[int, ...], runs_share_groups: bool):
    config = hopper_stream.StreamConfig.fit(7, 1, 128, mixed=False)
    starts = jnp.array([0, 1, 2, 2, 3], jnp.int32)
    table = jnp.arange(4 * 80, dtype=jnp.int32).reshape(4, 80)
    plan = hopper_stream.plan_stream(starts, jnp.array(lens, jnp.int32), table, 4, 1, 4, 2, None, config)
    parts = np.split(np.asarray(plan.words), np.cumsum([7 * (RUN_WORDS + TILE_WORDS), 2, 4 * TILE_WORDS]))
    runs, totals, tiles = parts[0].reshape(7, -1), parts[1], parts[2].reshape(-1, TILE_WORDS)
    np.testing.assert_array_equal(parts[3].reshape(table.shape), table)
    seen = []
    for run in runs.tolist():
        first, start, place, size, touched, last = run[:RUN_WORDS]
        assert run[RUN_WORDS:] == tiles[first // 2].tolist()
        assert place == 80 * tiles[first // 2, 2] + start or not size
        left = size
        for group in range(first, first + touched):
            page = start if group == first else 0
            pages = min(int(tiles[group // 2, 5]) - page, left)
            seen += [(int(tiles[group // 2, 2]), group % 2, page + i) for i in range(pages)]
            left -= pages
            assert left or page + pages == last
        assert left == 0
    pages = [(s, -(-lens[s] // 64)) for s in (0, 1, 3)]
    assert seen == [(s, h, p) for s, n in pages for h in range(2) for p in range(n)]
    assert totals.tolist() == [2 * sum(n for _, n in pages), 3]
    assert runs[:, 1].any() == runs_share_groups
    if runs_share_groups:
        assert max(runs[:, 3]) - min(runs[:, 3]) <= 1


def test_plan_reads_no_further_than_the_page_table():
    """Decodes in one launch go on past the end of a sequence that has no page more; what they make is dropped."""
    config = hopper_stream.StreamConfig.fit(7, 1, 128, mixed=False)
    table = jnp.arange(4 * 3, dtype=jnp.int32).reshape(4, 3)
    lens = jnp.array([64 * 3 + 1, 64 * 3, 10_000, 5], jnp.int32)
    starts = jnp.arange(5, dtype=jnp.int32)
    plan = hopper_stream.plan_stream(starts, lens, table, 4, 1, 4, 2, None, config)
    tiles = np.asarray(plan.words)[7 * (RUN_WORDS + TILE_WORDS) + 2 :][: 4 * TILE_WORDS].reshape(4, TILE_WORDS)
    np.testing.assert_array_equal(tiles[:, 4:], [[0, 3], [0, 3], [0, 3], [0, 1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float32"}, "float32"),
        ({"page": 32, "pages_per_seq": 9}, "pages of 32"),
        ({"heads": (130, 1)}, "130 query heads"),
        ({"width": 320}, "width 320"),
        ({"width": 40}, "40"),
        ({"width": 80, "heads": (3, 1)}, "group=3 x width=80"),
    ],
)
def test_names_what_it_cannot_serve(change: dict, message: str):
    arrays, (q, kv, *rest) = inputs(dataclasses.replace(SMALL[0], **change))
    with pytest.raises(NotImplementedError, match=message):
        mosaic_gpu.hopper_attention(q, kv, arrays.layer, *rest, scale=1.0)


def test_names_a_table_that_no_plan_holds():
    arrays, (q, kv, _, starts, _) = inputs(SMALL[0])
    table, lens = (jax.ShapeDtypeStruct(shape, "int32") for shape in ((1 << 16, 1 << 15), (1 << 16,)))
    with pytest.raises(NotImplementedError, match="65536 sequences of 32768 pages"):
        jax.eval_shape(
            lambda table, lens: mosaic_gpu.hopper_attention(q, kv, arrays.layer, table, starts, lens, scale=1.0),
            table,
            lens,
        )


def test_needs_a_hopper_gpu():
    arrays, (q, kv, *rest) = inputs(SMALL[0])
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU, the platform is 'cpu'"):
        paged_attention(q, kv, arrays.layer, *rest, scale=1.0, implementation="mosaic_gpu")
    assert OP.choice(None, q, kv, arrays.layer, *rest, scale=1.0, window=None, soft_cap=None) == "xla"


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*SMALL, *LARGE], ids=lambda case: case.name)
def test_on_the_gpu(case: Case):
    arrays, (q, kv, *rest) = inputs(case)
    poison = [jnp.full(q.size * 64, jnp.nan, q.dtype).block_until_ready() for _ in range(4)]
    del poison  # so that a row which is never written shows
    call = jax.jit(lambda *args: paged_attention(*args, **options(case), implementation="mosaic_gpu"))
    got = call(q, kv, jnp.int32(arrays.layer), *rest)
    assert relative(case, arrays, got) < 1e-2
    np.testing.assert_array_equal(np.asarray(got), np.asarray(call(q, kv, jnp.int32(arrays.layer), *rest)))
