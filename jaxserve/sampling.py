"""Sampling on the device: every `SamplingParams` field that changes which token comes next, in vLLM's order.

allowed ids -> bad words, min_tokens, logit bias -> repetition, frequency, presence penalty -> greedy, or temperature
-> min-p -> top-k -> top-p -> draw. `draw` is the part after the penalties, without branches; `sample` is all of it, and
skips by a run-time branch what no row of the step asks for, so one program serves every mixture. A branch costs a GPU
tens of microseconds, as the host reads its condition: hence two levels. A row's random key is `fold_in(seed,
position)`: the batch around a request never changes its draw.

Where the vocabulary is split over devices, each works on the logits of its part; what they exchange are maxima, sums
and candidates, never logits.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxserve.batch import Edits, SamplingRows
from jaxserve.kv_cache import Chunks
from pallas_kernels.top_k_top_p import top_k_top_p_floor
from sharding.collectives import MODEL, gathered, most, shard, shards, total

BLOCK, BLOCKS = 128, 32  # tokens of a block, blocks of an outer block, when a row's token is drawn


class Scores(NamedTuple):
    """Log-probabilities (or logits, by `logprobs_mode`) of `R` positions, of the token itself and the `k` best."""

    value: Float[Array, "R"]
    rank: Int[Array, "R"]  # from 1
    top_ids: Int[Array, "R k"]
    top_values: Float[Array, "R k"]


def sample(
    logits: Float[Array, "S V"],
    rows: SamplingRows,
    edits: Edits,
    last_token: Int[Array, "S"],
    tokens: Int[Array, "pages p"],
    chunks: Chunks,
) -> tuple[Int[Array, "S"], Float[Array, "S V"]]:
    """Draw one token a row; also return the processed logits (after masks, penalties, temperature, top-k, top-p)."""
    any_edit = jnp.any(edits.rows < logits.shape[0]) | jnp.any(rows.allow_only)
    any_penalty = _any_penalty(rows)

    def change(x: Float[Array, "S V"]) -> Float[Array, "S V"]:
        x = lax.cond(any_edit, lambda x: apply_edits(x, rows.allow_only, edits, last_token), lambda x: x, x)
        return lax.cond(any_penalty, lambda x: apply_penalties(x, rows, tokens, chunks), lambda x: x, x)

    logits = lax.cond(any_edit | any_penalty, change, lambda x: x, logits)
    any_random = jnp.any(rows.temperature > 0)
    return lax.cond(any_random, lambda x: draw(x, rows, chunks.kv_lens), lambda x: (best_token(x), x), logits)


def best_token(logits: Float[Array, "S V"]) -> Int[Array, "S"]:
    """The first of the largest entries of each row."""

    def twice(logits: Float[Array, "S V"]) -> Int[Array, "S"]:
        """Two plain reductions: on CPU an argmax is many times slower."""
        size = logits.shape[1]
        best = logits == jnp.max(logits, axis=1, keepdims=True)
        return jnp.minimum(jnp.min(jnp.where(best, jnp.arange(size, dtype=jnp.int32), size), axis=1), size - 1)

    def once(logits: Float[Array, "S V"]) -> Int[Array, "S"]:
        return jnp.argmax(logits, axis=1).astype(jnp.int32)

    ids = lax.platform_dependent(logits, cpu=twice, default=once)
    if shards() == 1:
        return ids
    best = jnp.take_along_axis(logits, ids[:, None], axis=1)
    bits = lax.bitcast_convert_type(best, jnp.int32)  # so that values and tokens travel together
    pairs = gathered(jnp.concatenate([bits, (ids + first_token(logits))[:, None]], axis=1)).reshape(len(ids), -1, 2)
    values = lax.bitcast_convert_type(pairs[:, :, 0], jnp.float32)
    winner = jnp.argmax(values, axis=1)[:, None]  # of equals the first: shards are in the order of the vocabulary
    return jnp.take_along_axis(pairs[:, :, 1], winner, axis=1)[:, 0]


def first_token(logits: Float[Array, "S V"]) -> int | Int[Array, ""]:
    """The token of the first logit that this device holds."""
    return shard() * logits.shape[1]


def own_columns(tokens: Int[Array, "*n"], logits: Float[Array, "S V"]) -> Int[Array, "*n"]:
    """Where tokens stand in this device's logits; `V`, which is out of bounds, for those that others hold."""
    local = tokens - first_token(logits)
    return jnp.where((local >= 0) & (local < logits.shape[1]), local, logits.shape[1])


def _any_penalty(rows: SamplingRows) -> Bool[Array, ""]:
    additive = (rows.presence_penalty != 0) | (rows.frequency_penalty != 0)
    return jnp.any(additive | (rows.repetition_penalty != 1))


def apply_edits(
    logits: Float[Array, "S V"], allow_only: Bool[Array, "S"], edits: Edits, last_token: Int[Array, "S"]
) -> Float[Array, "S V"]:
    """Apply the sparse edits; rows with `allow_only` first lose every token that none of their edits names."""
    columns = own_columns(edits.tokens, logits)
    named = jnp.zeros(logits.shape, bool).at[edits.rows, columns].set(True, mode="drop")
    logits = jnp.where(allow_only[:, None] & ~named, -jnp.inf, logits)
    row_last = last_token.at[edits.rows].get(mode="clip")
    values = jnp.where((edits.prev < 0) | (edits.prev == row_last), edits.values, 0)
    return logits.at[edits.rows, columns].add(values, mode="drop")


def apply_penalties(
    logits: Float[Array, "S V"], rows: SamplingRows, tokens: Int[Array, "pages p"], chunks: Chunks
) -> Float[Array, "S V"]:
    """Repetition penalty over prompt and output, then frequency and presence penalties over the output alone.

    Repetition: Keskar et al. 2019 (CTRL), https://arxiv.org/abs/1909.05858; the others as in the OpenAI API.
    """
    in_prompt, counts = token_counts(logits, rows.prompt_lens, tokens, chunks)
    penalty = jnp.where(in_prompt | (counts > 0), rows.repetition_penalty[:, None], 1)
    logits = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits -= rows.frequency_penalty[:, None] * counts
    return logits - rows.presence_penalty[:, None] * (counts > 0)


def token_counts(
    logits: Float[Array, "S V"], prompt_lens: Int[Array, "S"], tokens: Int[Array, "pages p"], chunks: Chunks
) -> tuple[Bool[Array, "S V"], Float[Array, "S V"]]:
    """Which tokens each row's prompt holds, and how often its output holds each; read from the paged history."""
    shape, page_size = logits.shape, tokens.shape[1]
    row = jnp.arange(shape[0], dtype=jnp.int32)[:, None]

    def count_page(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        in_prompt, counts = carry
        ids = own_columns(tokens[chunks.page_table[:, i]], logits)
        position = i * page_size + jnp.arange(page_size, dtype=jnp.int32)
        is_prompt = position < prompt_lens[:, None]
        is_output = (position < chunks.kv_lens[:, None]) & ~is_prompt
        in_prompt = in_prompt.at[row, jnp.where(is_prompt, ids, shape[1])].set(True, mode="drop")
        return in_prompt, counts.at[row, ids].add(is_output.astype(jnp.float32), mode="drop")

    start = (jnp.zeros(shape, bool), jnp.zeros(shape, jnp.float32))
    return lax.fori_loop(0, -(-jnp.max(chunks.kv_lens) // page_size), count_page, start)


def draw(
    logits: Float[Array, "S V"], rows: SamplingRows, positions: Int[Array, "S"]
) -> tuple[Int[Array, "S"], Float[Array, "S V"]]:
    """Temperature, min-p, top-k, top-p, then one draw a row; the best token of greedy rows.

    Also returns the logits after temperature and filters; those of greedy rows are unchanged.
    """
    is_random = rows.temperature > 0
    # Not `logits / temperature`: XLA makes that this product in some programs and places and not in others, but every
    # part of the row must be rounded as the floor was.
    inverse = 1 / jnp.where(is_random, rows.temperature, 1)
    scaled = logits * inverse[:, None]
    top_k = jnp.where(is_random, rows.top_k, 0)
    top_p, min_p = jnp.where(is_random, rows.top_p, 1), jnp.where(is_random, rows.min_p, 0)
    axis = MODEL if shards() > 1 else None
    floor = top_k_top_p_floor(logits, top_k, top_p, min_p, inverse, axis=axis)[:, None]
    best = most(jnp.max(logits, axis=1, keepdims=True)) * inverse[:, None]

    def weight(part: Float[Array, "S n"]) -> Float[Array, "S n"]:
        """Unnormalised probabilities of some of the logits; of a greedy row, 1 for the best."""
        part = part * inverse[:, None]
        random = jnp.where(part >= floor, jnp.exp(part - best), 0)
        return jnp.where(is_random[:, None], random, (part == best).astype(jnp.float32))

    def uniform(high: Array, low: Array, position: Array) -> Array:
        key = jax.random.wrap_key_data(jnp.stack([high, low]), impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(key, position), (4,))

    numbers = jax.vmap(uniform)(rows.seed_high, rows.seed_low, positions)
    token = invert(logits, weight, jnp.where(is_random[:, None], numbers, 0))
    return token, jnp.where(scaled >= floor, scaled, -jnp.inf)


def invert(
    logits: Float[Array, "S V"],
    weight: Callable[[Float[Array, "S _"]], Float[Array, "S _"]],
    uniforms: Float[Array, "S 4"],
) -> Int[Array, "S"]:
    """The token at which the running sum of the weights passes a uniform share of the whole: 0 gives the first.

    Found in three levels of blocks (and one of devices, if they share the row) with a number for each, so that every
    choice is among few weights, whose float32 sums are exact enough. It reads the logits once and needs no random
    number per token, unlike the Gumbel-max trick, whose random numbers cost several times the reading.
    """
    rows, size = logits.shape
    blocks = weight(logits)
    blocks = jnp.pad(blocks, ((0, 0), (0, -size % (BLOCKS * BLOCK)))).reshape(rows, -1, BLOCKS, BLOCK).sum(axis=3)
    outer = pick(blocks.sum(axis=2), uniforms[:, 0])
    inner = pick(jnp.take_along_axis(blocks, outer[:, None, None], axis=1)[:, 0], uniforms[:, 1])
    first = (outer * BLOCKS + inner) * BLOCK
    tokens = first[:, None] + jnp.arange(BLOCK, dtype=jnp.int32)
    values = jnp.take_along_axis(logits, jnp.minimum(tokens, size - 1), axis=1)
    token = first + pick(jnp.where(tokens < size, weight(values), 0), uniforms[:, 2])
    if shards() == 1:
        return token
    owner = pick(gathered(blocks.sum(axis=(1, 2))[:, None]), uniforms[:, 3])
    return total(jnp.where(owner == shard(), first_token(logits) + token, 0))


def pick(weights: Float[Array, "S n"], uniforms: Float[Array, "S"]) -> Int[Array, "S"]:
    """Where each row's running sum passes `uniforms` of its total: never a weight of 0, unless all are."""
    index = jnp.arange(weights.shape[1], dtype=jnp.int32)
    upto = jnp.sum(jnp.where(index[:, None] >= index, weights[:, None], 0), axis=2)  # faster than cumsum on a GPU
    passed = jnp.sum(upto <= (uniforms * upto[:, -1])[:, None], axis=1, dtype=jnp.int32)
    return jnp.minimum(passed, jnp.max(jnp.where(weights > 0, index, 0), axis=1))  # rounding may pass them all


def score(logits: Float[Array, "R V"], ids: Int[Array, "R"], k: int, *, as_logprobs: bool) -> Scores:
    """Value and rank of `ids`, and the `k` best tokens, of each row."""
    values = log_softmax(logits) if as_logprobs else logits
    columns = own_columns(ids, logits)
    value = jnp.take_along_axis(values, jnp.minimum(columns, logits.shape[1] - 1)[:, None], axis=1)
    value = total(jnp.where(columns[:, None] < logits.shape[1], value, 0))
    rank = total(jnp.sum(values > value, axis=-1, dtype=jnp.int32)) + 1
    top_values, top_ids = lax.top_k(values, min(k, logits.shape[1]))
    if shards() > 1:
        top_values, order = lax.top_k(gathered(top_values), k)
        top_ids = jnp.take_along_axis(gathered(top_ids + first_token(logits)), order, axis=1)
    return Scores(value[:, 0], rank, top_values=top_values, top_ids=top_ids.astype(jnp.int32))


def log_softmax(logits: Float[Array, "R V"]) -> Float[Array, "R V"]:
    """Logarithms of the probabilities; those of other devices' logits count, too."""
    shifted = logits - most(jnp.max(logits, axis=-1, keepdims=True))
    return shifted - jnp.log(total(jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True)))
