"""The sampler where devices hold parts of the vocabulary, against itself on whole rows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxserve.batch import Edits, SamplingRows
from jaxserve.kv_cache import Chunks
from jaxserve.sampling import Scores, best_token, draw, sample, score
from pallas_kernels.top_k_top_p import top_k_top_p_floor
from sharding.collectives import MODEL
from sharding.mesh import make_mesh

QUICK = {"xla_backend_optimization_level": 0}  # compiling is most of the time of these tests
COLUMNS = P(None, MODEL)
INF = float("inf")


def whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on one device."""
    return jax.jit(function, compiler_options=QUICK)


def split(
    function: Callable[..., Any], parts: int, out_specs: Any, options: dict[str, int] = QUICK
) -> Callable[..., Any]:
    """The function `(logits, *others)` where each of so many devices gets its columns of the logits."""

    def call(logits: jax.Array, *others: Any) -> Any:
        specs = (COLUMNS, *[P()] * len(others))
        mesh = make_mesh(model=parts)
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)(logits, *others)

    return jax.jit(call, compiler_options=options)


def make_rows(size: int, **columns: Any) -> SamplingRows:
    """Neutral values but for those given, one or one a row."""
    names = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    defaults = dict(zip(names, (1.0, 1.0, 0.0, 0.0, 0.0, 1.0), strict=True))
    defaults |= {"top_k": 0, "seed_high": 7, "seed_low": np.arange(size), "prompt_lens": 0}
    defaults |= {"allow_only": False, "logprobs": False}
    kinds = dict.fromkeys(names, jnp.float32) | dict.fromkeys(("seed_high", "seed_low"), jnp.uint32)
    kinds |= dict.fromkeys(("allow_only", "logprobs"), jnp.bool_)
    values = {
        name: jnp.asarray(np.broadcast_to(value, size), kinds.get(name, jnp.int32))
        for name, value in (defaults | columns).items()
    }
    return SamplingRows(**values)


def make_edits(*edits: tuple[int, int, int, float], spare_row: int) -> Edits:
    """`(row, prev, token, value)`, and two entries that are not used."""
    rows, prev, tokens, values = zip(*edits, *[(spare_row, -1, 0, 9.0)] * 2, strict=True)
    ints = (jnp.asarray(column, jnp.int32) for column in (rows, prev, tokens))
    return Edits(*ints, jnp.asarray(values, jnp.float32))


def make_history(histories: list[list[int]], page: int = 4) -> tuple[jax.Array, Chunks]:
    """The paged tokens of some sequences, about to decode."""
    width = max(-(-len(history) // page) for history in histories)
    table = np.arange(len(histories) * width, dtype=np.int32).reshape(-1, width)[:, ::-1]
    tokens = np.zeros((table.size, page), np.int32)
    for pages, history in zip(table, histories, strict=True):
        for position, token in enumerate(history):
            tokens[pages[position // page], position % page] = token
    rows = len(histories)
    nothing, lens = jnp.zeros(rows, jnp.int32), jnp.asarray([len(history) for history in histories], jnp.int32)
    bounds = jnp.arange(rows + 1, dtype=jnp.int32)
    return jnp.asarray(tokens), Chunks(nothing, nothing, nothing, jnp.asarray(table), bounds, lens)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_the_best_token_is_the_first_of_equals_on_any_device(parts: int) -> None:
    size = 16
    logits = np.random.default_rng(0).standard_normal((size + 6, size)).astype(np.float32)
    logits[np.arange(size), np.arange(size)] = 5.0  # once on every column
    for row, equals in enumerate(([7, 8], [3, 4], [1, 2, 15], [15, 14], range(size)), size):
        logits[row, list(equals)] = 6.0
    logits[-1] = -INF
    expected = np.argmax(logits, axis=1)
    assert split(best_token, parts, P())(logits).tolist() == expected.tolist()


@pytest.mark.parametrize(("k", "as_logprobs"), [(1, False), (5, True), (24, True)])
def test_scores_count_every_device(k: int, as_logprobs: bool) -> None:
    """Also more of the best tokens than a device has, and more than are possible."""
    rng = np.random.default_rng(k)
    logits = (4 * rng.standard_normal((24, 24))).astype(np.float32)
    logits[6:12] = np.round(logits[6:12])  # ties, within and over borders
    logits[12:16, rng.integers(24, size=8)] = -INF
    logits[16, :18] = -INF
    ids = jnp.arange(24, dtype=jnp.int32)  # on every device

    def scores(logits: jax.Array, ids: jax.Array) -> Scores:
        return score(logits, ids, k, as_logprobs=as_logprobs)

    expected, found = whole(scores)(logits, ids), split(scores, 4, P())(logits, ids)
    np.testing.assert_array_equal(found.rank, expected.rank)
    np.testing.assert_array_equal(found.top_ids, expected.top_ids)
    for mine, theirs in ((found.value, expected.value), (found.top_values, expected.top_values)):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=3e-6 if as_logprobs else 0)
    exact = logits.astype(np.float64)
    assert found.rank.tolist() == (1 + (exact > np.diag(exact)[:, None]).sum(axis=1)).tolist()


def tight(rng: np.random.Generator, rows: int, size: int) -> dict[str, np.ndarray]:
    """Sets of at most 128 tokens: the best candidates decide."""
    return {
        "top_k": rng.choice([0, 1, 2, 20, size // 8 - 1, 50], rows),
        "top_p": rng.choice([0.9137, 0.5211, 0.1, 1e-6, 0.0], rows),
        "min_p": rng.choice([0.0, 0.0313, 0.21], rows),
    }


def wide(rng: np.random.Generator, rows: int, size: int) -> dict[str, np.ndarray]:
    """Sets of any size: the floor is searched."""
    return {
        "top_k": rng.choice([-1, 0, 1, 129, size // 4, size // 2 + 3, size - 1, size, size + 7], rows),
        "top_p": rng.choice([1.0, 1.5, 0.99613, 0.9137, 0.5211], rows),
        "min_p": rng.choice([0.0, 0.0, 1e-4], rows),
    }


FILTERS = {"tight": (tight, 4.0), "wide": (wide, 0.4)}  # and how far the logits spread


@pytest.mark.parametrize(("parts", "size"), [(4, 1024), (8, 640)])
def test_the_sets_are_exactly_those_of_whole_rows(parts: int, size: int) -> None:
    """Of 8 x 80, a device has fewer than the 128 candidates of a row."""

    def floor(logits: jax.Array, *filters: jax.Array, axis: str | None = None) -> jax.Array:
        return top_k_top_p_floor(logits, *filters, axis=axis)

    of_whole, of_parts = whole(floor), split(lambda *args: floor(*args, axis=MODEL), parts, P())
    rows, rng = 32, np.random.default_rng(parts)
    for kind, (choose, spread) in FILTERS.items():
        logits = (spread * rng.standard_normal((rows, size))).astype(np.float32)
        logits[4:8] = np.round(4 * logits[4:8]) / 4  # ties over borders
        logits[8:12, : size // parts] = -INF  # nothing on the first device
        logits[12:16, size // parts :] = -INF  # all on the first device
        logits[16:20] = np.sort(logits[16:20], axis=1)  # the best on the last device
        filters = choose(rng, rows, size)
        arrays = [jnp.asarray(filters[name], t) for name, t in (("top_k", "i4"), ("top_p", "f4"), ("min_p", "f4"))]
        expected, found = (logits >= np.asarray(f(logits, *arrays))[:, None] for f in (of_whole, of_parts))
        np.testing.assert_array_equal(found, expected)
        kept = (expected & (logits > -INF)).sum(axis=1)
        assert kept.min() >= 1
        assert (kept.max() > 128) == (kind == "wide")


SIZE, PARTS = 32, 4  # of the vocabulary of what follows; a device has 8 tokens
HISTORIES = [np.random.default_rng(n).integers(0, SIZE, 5 + n).tolist() for n in range(10)]
PROMPTS = 4  # tokens of each history that are the prompt
LAST = [history[-1] for history in HISTORIES]
EDITS = make_edits(
    *[(0, -1, token, 2.0 + token / 7) for token in (0, 7, 8, 15, 16, 31)],  # logit_bias
    *[(1, -1, token, 0.0) for token in (3, 9, 17)],  # the only ones allowed, one of them with a bias
    (1, -1, 9, 1.5),
    (2, -1, 30, 0.0),  # the only one of all devices
    *[(3, -1, token, -INF) for token in range(24)],  # a ban of all but the last device's
    *[(4, LAST[4], token, -INF) for token in range(4, SIZE)],  # bad words whose beginnings have been said
    *[(5, (LAST[5] + 1) % SIZE, token, -INF) for token in range(SIZE)],  # and some that have not
    spare_row=10,
)
ROWS = make_rows(
    10,
    temperature=[1.0, 0.7, 1.0, 1.3, 0.9, 1.0, 0.8, 0.0, 1.1, 0.0],
    top_k=[0, 2, 0, 4, 0, 7, 12, 0, 0, 0],
    top_p=[1.0, 1.0, 0.9, 0.83, 1.0, 1.0, 0.77, 1.0, 0.95, 1.0],
    min_p=[0.0, 0.0, 0.0, 0.0, 0.05, 0.0, 0.0, 0.0, 0.02, 0.0],
    presence_penalty=[0, 0, 0, 0, 0, 0, 1.5, 0.7, -0.4, 0],
    frequency_penalty=[0, 0, 0, 0, 0, 0, -0.8, 1.3, 0, 0],
    repetition_penalty=[1, 1, 1, 1, 1, 1, 1.7, 1, 0.6, 1.4],
    allow_only=[False, True, True] + [False] * 7,
    prompt_lens=PROMPTS,
)


@pytest.fixture(scope="module")
def samplers() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`sample` for whole rows, and for rows that are split."""
    return whole(sample), split(sample, PARTS, (P(), COLUMNS))


def test_edits_and_penalties_reach_every_device(samplers: tuple[Callable[..., Any], Callable[..., Any]]) -> None:
    tokens, chunks = make_history(HISTORIES)
    for seed in range(20):
        logits = (2 * np.random.default_rng(seed).standard_normal((10, SIZE))).astype(np.float32)
        arguments = logits, ROWS, EDITS, jnp.asarray(LAST, jnp.int32), tokens, chunks
        (theirs, expected), (mine, found) = (sampler(*arguments) for sampler in samplers)
        np.testing.assert_array_equal(found, expected)
        assert np.isfinite(np.asarray(found)[np.arange(10), mine]).all()
        assert mine[7] == theirs[7]
        assert mine[9] == theirs[9]
        allowed = np.flatnonzero(np.isfinite(found[1]))
        assert set(allowed) <= {3, 9, 17}
        assert mine[2] == 30
        assert mine[3] >= 24
        assert mine[4] < 4


def test_a_step_without_edits_and_penalties_changes_nothing(
    samplers: tuple[Callable[..., Any], Callable[..., Any]],
) -> None:
    tokens, chunks = make_history(HISTORIES)
    logits = np.random.default_rng(1).standard_normal((10, SIZE)).astype(np.float32)
    edits = jax.tree.map(lambda x: x.at[:].set(10) if x.dtype == jnp.int32 else x, EDITS)
    rest = edits, jnp.asarray(LAST, jnp.int32), tokens, chunks
    drawn, left = samplers[1](logits, make_rows(10), *rest)
    np.testing.assert_array_equal(left, logits)
    assert ((drawn >= 0) & (drawn < SIZE)).all()
    greedy, _ = samplers[1](logits, make_rows(10, temperature=0.0), *rest)
    assert greedy.tolist() == logits.argmax(axis=1).tolist()


def shares(logits: np.ndarray, temperature: float, kept: np.ndarray) -> np.ndarray:
    """The distribution of a draw among the kept tokens, in float64."""
    weights = np.where(kept, np.exp(logits.astype(np.float64) / temperature), 0)
    return weights / weights.sum()


DRAWS = 500  # rows of a step


@pytest.fixture(scope="module")
def drawer() -> Callable[..., Any]:
    """`draw` for rows that are split, compiled to run fast."""
    return split(draw, PARTS, (P(), COLUMNS), {})


def test_greedy_rows_of_a_draw_take_the_first_of_equals(drawer: Callable[..., Any]) -> None:
    logits = np.random.default_rng(0).standard_normal((DRAWS, 40)).astype(np.float32)
    logits[::2] = np.round(logits[::2])
    assert len({tuple(np.flatnonzero(row == row.max()) // 10) for row in logits}) > 10  # ties over borders
    rows = make_rows(DRAWS, temperature=0.0, top_k=3, top_p=0.5, min_p=0.3)
    tokens, left = drawer(logits, rows, jnp.arange(DRAWS, dtype=jnp.int32))
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))
    np.testing.assert_array_equal(left, logits)


@pytest.mark.parametrize(
    "filters",
    [{}, {"top_k": 9}, {"top_p": 0.8, "temperature": 0.8}, {"min_p": 0.3, "top_k": 20}],
    ids=["all", "top_k", "top_p", "min_p"],
)
def test_draws_follow_the_distribution(drawer: Callable[..., Any], filters: dict[str, float]) -> None:
    """Each token within 4.5 standard deviations of its share, over seeds and positions."""
    positions = 8
    logits = np.random.default_rng(4).standard_normal(40).astype(np.float32)
    rows, many = make_rows(DRAWS, **filters), np.tile(logits, (DRAWS, 1))
    drawn = [drawer(many, rows, jnp.full(DRAWS, n, jnp.int32)) for n in range(positions)]
    kept = np.isfinite(drawn[0][1][0])
    assert len({token // 10 for token in np.flatnonzero(kept)}) >= 3  # on several devices
    wanted = shares(logits, filters.get("temperature", 1.0), kept)
    count = DRAWS * positions
    got = np.bincount(np.concatenate([tokens for tokens, _ in drawn]), minlength=40) / count
    assert not got[~kept].any()
    deviation = np.sqrt(wanted[kept] * (1 - wanted[kept]) / count)
    np.testing.assert_array_less(np.abs(got - wanted)[kept], 4.5 * deviation)


def test_many_tokens_are_drawn_as_often_as_they_should_be(drawer: Callable[..., Any]) -> None:
    """Each device has more than one outer block; groups of tokens from all of them."""
    seeds, positions, size = 256, 5, PARTS * 4600
    logits = (1.5 * np.random.default_rng(0).standard_normal(size)).astype(np.float32)
    rows, many = make_rows(seeds, top_p=0.9), np.tile(logits, (seeds, 1))
    drawn = [drawer(many, rows, jnp.full(seeds, n, jnp.int32)) for n in range(positions)]
    tokens, kept = np.concatenate([tokens for tokens, _ in drawn]), np.isfinite(drawn[0][1][0])
    assert kept[tokens].all()
    wanted = shares(logits, 1.0, kept)
    for group in (np.arange(size) // 2300, np.random.default_rng(2).integers(0, 12, size)):
        share = np.bincount(group, wanted)
        got = np.bincount(group[tokens], minlength=len(share)) / len(tokens)
        np.testing.assert_array_less(np.abs(got - share), 4.5 * np.sqrt(share / len(tokens)))


def test_a_draw_depends_on_seed_and_position_alone(drawer: Callable[..., Any]) -> None:
    logits = np.random.default_rng(1).standard_normal((DRAWS, 40)).astype(np.float32)
    positions = jnp.arange(DRAWS, dtype=jnp.int32)
    first, _ = drawer(logits, make_rows(DRAWS), positions)
    order = np.random.default_rng(2).permutation(DRAWS)
    again, _ = drawer(logits[order], make_rows(DRAWS, seed_low=order), positions[order])
    assert again.tolist() == first[order].tolist()
