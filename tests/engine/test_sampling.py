"""The sampler against a float64 reference written with numpy loops."""

import dataclasses
import math
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.batch import (
    ALIGNMENT,
    COLUMNS,
    Batch,
    Bucket,
    Edits,
    Level,
    Limits,
    SamplingRows,
    SlotTable,
    layout,
    pack,
    sampling_constants,
    sampling_level,
    unpack,
)
from jaxserve.engine.edits import step_edits
from jaxserve.kv_cache import Chunks
from jaxserve.sampling import draw as draw_only
from jaxserve.sampling import sample, score
from jaxserve.sampling_params import SamplingParams
from jaxserve.types import LogitEdits, Request, Sequence, Work

QUICK = {"xla_backend_optimization_level": 0}  # compiling is most of the time of these tests
quick_sample, quick_draw = (jax.jit(function, compiler_options=QUICK) for function in (sample, draw_only))
VOCAB, PAGE, PAGES, SLOTS = 13, 4, 40, 8
LIMITS = Limits(SLOTS, pages_per_seq=8, page_size=PAGE, num_pages=PAGES, max_logprobs=4)


def make_sequence(rng, params: SamplingParams, prompt: list[int], output: list[int], slot: int, edits=None) -> Sequence:
    request = Request(f"r{slot}", np.array(prompt, np.int32), params, edits=edits)
    tokens = np.zeros(len(prompt) + 20, np.int32)
    tokens[: len(prompt) + len(output)] = prompt + output
    return Sequence(
        request=request, index=0, seed=int(rng.integers(2**63)), tokens=tokens, num_prompt=len(prompt),
        num_tokens=len(prompt) + len(output), stop_ids=frozenset({2, 3}), eos_ids=frozenset({2}), slot=slot,
        free_from=len(prompt) + params.min_tokens,
    )  # fmt: skip


def expected_probabilities(logits: np.ndarray, sequence: Sequence) -> np.ndarray:
    """The distribution the parameters describe, in float64, written straight from the field descriptions."""
    params, edits = sequence.params, sequence.request.edits or LogitEdits()
    z = logits.astype(np.float64).copy()
    history = sequence.tokens[: sequence.num_tokens].tolist()
    output = history[sequence.num_prompt :]
    for token in range(VOCAB):
        if edits.allowed is not None and token not in edits.allowed:
            z[token] = -math.inf
    for *head, last in edits.bad_words:
        if history[len(history) - len(head) :] == head:
            z[last] = -math.inf
    if len(output) < params.min_tokens:
        z[list(sequence.stop_ids)] = -math.inf
    for token, value in edits.bias:
        z[token] += value
    for token in range(VOCAB):
        if token in history:
            z[token] = z[token] / params.repetition_penalty if z[token] > 0 else z[token] * params.repetition_penalty
        z[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty * (token in output)
    if params.greedy:
        return np.eye(VOCAB)[int(np.argmax(z))]
    p = np.exp(z / params.temperature - np.max(z / params.temperature))
    p /= p.sum()
    p[p < params.min_p * p.max()] = 0
    if 0 < params.top_k < VOCAB:
        p[p < np.sort(p)[-params.top_k]] = 0
    p /= p.sum()
    keep = [p[p > p[token]].sum() < params.top_p and p[token] > 0 for token in range(VOCAB)]
    p = np.where(keep, p, 0)
    return p / p.sum()


CASES = {
    "greedy": ({"temperature": 0.0}, None),
    "plain": ({}, None),
    "temperature": ({"temperature": 0.3}, None),
    "top_k": ({"top_k": 3}, None),
    "top_p": ({"top_p": 0.7}, None),
    "min_p": ({"min_p": 0.2, "temperature": 1.5}, None),
    "all_three": ({"top_k": 6, "top_p": 0.8, "min_p": 0.05, "temperature": 0.9}, None),
    "repetition": ({"repetition_penalty": 1.7}, None),
    "presence": ({"presence_penalty": 1.5, "temperature": 0.7}, None),
    "frequency": ({"frequency_penalty": -0.8}, None),
    "penalties_greedy": ({"temperature": 0.0, "frequency_penalty": 1.3, "repetition_penalty": 1.4}, None),
    "bias": ({}, LogitEdits(bias=((4, 3.0), (5, -2.0)))),
    "allowed": ({"top_k": 2}, LogitEdits(allowed=frozenset({1, 4, 9}), bias=((4, 1.0), (7, 50.0)))),
    "min_tokens": ({"min_tokens": 9}, None),
    "bad_words": ({}, LogitEdits(bad_words=((7,), (5, 6), (4, 5, 8), (9, 5, 10)))),
}
OUTPUT = [1, 1, 6, 4, 5]


def build_work(rng) -> Work:
    sequences = []
    for slot, (fields, edits) in enumerate(CASES.values()):
        prompt = rng.integers(0, VOCAB, 3 + slot % 5).tolist()
        params = SamplingParams(**fields, max_tokens=20)
        sequences.append(make_sequence(rng, params, prompt, OUTPUT, slot % SLOTS, edits))
    return sequences


def as_work(sequences: list[Sequence], pending: bool) -> tuple[Work, np.ndarray]:
    """A decode step of these sequences, and the paged history a device would hold."""
    table = np.arange(SLOTS * 5, dtype=np.int32).reshape(SLOTS, 5)
    table = np.pad(table, ((0, 0), (0, 3)))
    tokens = np.full((PAGES, PAGE), 12, np.int32)  # stale entries must not count
    for sequence in sequences:
        for position in range(sequence.num_tokens):
            tokens[table[sequence.slot, position // PAGE], position % PAGE] = sequence.tokens[position]
        if pending:
            sequence.num_tokens -= 1
            sequence.num_pending = 1
    starts = np.array([sequence.length - 1 for sequence in sequences], np.int32)
    ones = np.ones(len(sequences), np.int32)
    slots = np.array([sequence.slot for sequence in sequences], np.int32)
    return Work(sequences, slots, starts, ones, ones.astype(bool), table), tokens


@pytest.mark.parametrize("pending", [False, True], ids=["known", "one_step_ahead"])
def test_processed_logits_give_the_described_distribution(pending: bool) -> None:
    rng = np.random.default_rng(3)
    everything = build_work(rng)
    for first in range(0, len(everything), SLOTS):
        sequences = everything[first : first + SLOTS]
        logits = rng.normal(size=(SLOTS, VOCAB)).astype(np.float32) * 2
        expected = [expected_probabilities(logits[row], sequence) for row, sequence in enumerate(sequences)]
        work, tokens = as_work(sequences, pending)
        table = SlotTable(SLOTS)
        table.update(sequences)
        bucket = Bucket(SLOTS, SLOTS, Level.SAMPLE, 64)
        batch = unpack(jnp.asarray(pack(work, bucket, LIMITS, table, step_edits(work))), bucket, LIMITS)
        last = np.zeros(SLOTS, np.int32)
        last[: len(sequences)] = OUTPUT[-1]
        token, processed = quick_sample(
            jnp.asarray(logits), batch.sampling, batch.edits, jnp.asarray(last), jnp.asarray(tokens), batch.chunks
        )
        for row, sequence in enumerate(sequences):
            if sequence.params.greedy:
                assert int(token[row]) == int(np.argmax(expected[row]))
            else:
                actual = np.asarray(jax.nn.softmax(processed[row]))
                np.testing.assert_allclose(actual, expected[row], atol=2e-6)
                assert expected[row][int(token[row])] > 0


@pytest.mark.parametrize(
    ("fields", "edits", "level"),
    [
        ({"temperature": 0.0}, None, Level.GREEDY),
        ({"temperature": 0.0, "top_k": 4}, None, Level.GREEDY),
        ({"top_k": 4, "top_p": 0.9, "min_p": 0.1, "temperature": 0.7}, None, Level.DRAW),
        ({"temperature": 0.0, "logprobs": 2}, None, Level.SAMPLE),
        ({"presence_penalty": 0.1}, None, Level.SAMPLE),
        ({"frequency_penalty": 0.1}, None, Level.SAMPLE),
        ({"repetition_penalty": 1.1}, None, Level.SAMPLE),
        ({"min_tokens": 3}, None, Level.SAMPLE),
        ({}, LogitEdits(bias=((4, 1.0),)), Level.SAMPLE),
    ],
)
def test_level_of_a_sequence(fields: dict, edits: LogitEdits | None, level: Level) -> None:
    sequence = make_sequence(np.random.default_rng(0), SamplingParams(**fields), [1, 2], [3], 5, edits)
    assert sampling_level(sequence) is level


def test_level_draw_gives_what_level_sample_gives() -> None:
    rng = np.random.default_rng(4)
    names = ("greedy", "plain", "temperature", "top_k", "top_p", "min_p", "all_three")
    params = [SamplingParams(**CASES[name][0], max_tokens=20) for name in names]
    work, tokens = as_work([make_sequence(rng, p, [1, 2, 3], OUTPUT, slot) for slot, p in enumerate(params)], True)
    table = SlotTable(SLOTS)
    table.update(work.sequences)
    assert table.level(work) is Level.DRAW
    logits, last = jnp.asarray(rng.normal(size=(SLOTS, VOCAB)), jnp.float32), jnp.zeros(SLOTS, jnp.int32)

    def batch(level: Level) -> Batch:
        bucket = Bucket(SLOTS, SLOTS, level, 16 if level is Level.SAMPLE else 0)
        return unpack(jnp.asarray(pack(work, bucket, LIMITS, table, [])), bucket, LIMITS)

    full, alone = batch(Level.SAMPLE), batch(Level.DRAW)
    assert alone.edits is None
    expected = quick_sample(logits, full.sampling, full.edits, last, jnp.asarray(tokens), full.chunks)
    for mine, theirs in zip(quick_draw(logits, alone.sampling, alone.chunks.kv_lens), expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def rows_of(seeds: np.ndarray, **fields: float) -> SamplingRows:
    rng = np.random.default_rng(0)
    columns = []
    for seed in seeds:
        sequence = make_sequence(rng, SamplingParams(**fields), [1, 4], [], 0)
        sequence.seed = int(seed)
        columns.append(sampling_constants(sequence))
    values = dict(zip(COLUMNS, np.stack(columns, 1), strict=True))
    arrays = {}
    for item in dataclasses.fields(SamplingRows):
        value = values[item.name]
        is_float = item.name.endswith("penalty") or item.name in ("temperature", "top_p", "min_p")
        kind = np.float32 if is_float else np.uint32 if item.name.startswith("seed") else np.int32
        arrays[item.name] = jnp.asarray(value.view(kind))
    arrays |= {name: arrays[name] != 0 for name in ("allow_only", "logprobs")}
    return SamplingRows(**arrays)


def draw(logits: np.ndarray, rows: SamplingRows, position: int) -> np.ndarray:
    s = logits.shape[0]
    chunks = Chunks(
        positions=jnp.zeros(s, jnp.int32), pages=jnp.zeros(s, jnp.int32), offsets=jnp.zeros(s, jnp.int32),
        page_table=jnp.zeros((s, 1), jnp.int32), cu_q_lens=jnp.arange(s + 1, dtype=jnp.int32),
        kv_lens=jnp.full(s, position, jnp.int32),
    )  # fmt: skip
    empty = jnp.zeros(0, jnp.int32)
    edits = Edits(empty, empty, empty, jnp.zeros(0))
    last, pages = jnp.zeros(s, jnp.int32), jnp.zeros((1, 4), jnp.int32)
    token, _ = quick_sample(jnp.asarray(logits), rows, edits, last, pages, chunks)
    return np.asarray(token)


def test_draws_follow_the_distribution() -> None:
    """Over seeds and positions."""
    seeds, positions = 2000, 10
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.06, 0.04], np.float32))
    rows = rows_of(np.random.default_rng(5).integers(-(2**63), 2**63, seeds))
    tokens = [draw(np.tile(logits, (seeds, 1)), rows, position) for position in range(positions)]
    count = seeds * positions
    frequency = np.bincount(np.concatenate(tokens), minlength=5) / count
    # four standard deviations of a binomial share
    np.testing.assert_array_less(np.abs(frequency - np.exp(logits)), 4 * np.sqrt(np.exp(logits) / count))


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits = np.random.default_rng(1).normal(size=(6, 50)).astype(np.float32)
    seeds = np.array([1, 2, -3, 2**62, 5, 6])
    together = draw(logits, rows_of(seeds), 9)
    alone = [draw(logits[i : i + 1], rows_of(seeds[i : i + 1]), 9)[0] for i in range(6)]
    assert together.tolist() == alone
    many = np.tile(logits[:1], (200, 1))
    assert len(set(draw(many, rows_of(np.arange(200)), 9).tolist())) > 5
    assert len({int(draw(logits[:1], rows_of(seeds[:1]), position)[0]) for position in range(60)}) > 5


def test_scores_rank_and_top_values() -> None:
    logits = np.array([[1.0, 3.0, 2.0, -np.inf], [0.0, 0.0, 0.0, 0.0]], np.float32)
    scores = score(jnp.asarray(logits), jnp.array([2, 1]), 3, as_logprobs=True)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    np.testing.assert_allclose(scores.value, [exact[0, 2], exact[1, 1]], rtol=1e-6)
    assert scores.rank.tolist() == [2, 1]
    assert scores.top_ids[0].tolist() == [1, 2, 0]
    np.testing.assert_allclose(scores.top_values[0], exact[0, [1, 2, 0]], rtol=1e-6)
    raw = score(jnp.asarray(logits), jnp.array([2, 1]), 2, as_logprobs=False)
    assert raw.value.tolist() == [2.0, 0.0]


def test_packed_fields_follow_each_other_at_aligned_places() -> None:
    bucket = Bucket(32, 8, Level.PROMPT_LOGPROBS, 16)
    places = [place for place, _ in layout(bucket, LIMITS).values()]
    assert places[0].start == 0
    assert all(place.start % ALIGNMENT == 0 for place in places)
    assert all(0 <= second.start - first.stop < ALIGNMENT for first, second in pairwise(places))


def test_unpack_gives_positions_and_places() -> None:
    rng = np.random.default_rng(0)
    sequences = [make_sequence(rng, SamplingParams(), list(range(7)), [], slot) for slot in (2, 5)]
    table = np.zeros((SLOTS, 8), np.int32)
    table[2, :2], table[5, :2] = (30, 31), (10, 11)
    work = Work(
        sequences, np.array([2, 5], np.int32), np.array([3, 0], np.int32), np.array([4, 5], np.int32),
        np.array([True, False]), table,
    )  # fmt: skip
    bucket = Bucket(16, 4)
    batch = unpack(jnp.asarray(pack(work, bucket, LIMITS, SlotTable(SLOTS), [])), bucket, LIMITS)
    chunks = batch.chunks
    assert batch.token_ids[:9].tolist() == [3, 4, 5, 6, 0, 1, 2, 3, 4]
    assert chunks.positions[:9].tolist() == [3, 4, 5, 6, 0, 1, 2, 3, 4]
    assert chunks.pages[:9].tolist() == [30, 31, 31, 31, 10, 10, 10, 10, 11]
    assert chunks.offsets[:9].tolist() == [3, 0, 1, 2, 0, 1, 2, 3, 0]
    assert set(chunks.pages[9:].tolist()) == {PAGES}
    assert chunks.cu_q_lens.tolist() == [0, 4, 9, 9, 9]
    assert chunks.kv_lens.tolist() == [7, 5, 0, 0]
    assert batch.slots.tolist() == [2, 5, SLOTS, SLOTS]
