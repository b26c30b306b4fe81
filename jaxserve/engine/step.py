"""The step: one pure function from weights, state and a packed batch to a new state and packed results."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxserve.batch import Batch, Bucket, Limits, State, advance, unpack
from jaxserve.models.decoder import CausalLM
from jaxserve.sampling import Scores, best_token, draw, sample, score

PROMPT_BLOCK = 64  # prompt positions whose logits exist at one time


class ScoreMode(NamedTuple):
    """`logprobs_mode` taken apart: before or after the processors, log-probabilities or logits."""

    processed: bool
    as_logprobs: bool

    @classmethod
    def parse(cls, mode: str) -> "ScoreMode":
        """From `raw_logprobs`, `processed_logprobs`, `raw_logits` or `processed_logits`."""
        stage, _, kind = mode.partition("_")
        return cls(stage == "processed", kind == "logprobs")


def step(
    model: CausalLM, state: State, buffer: Int[Array, "words"], bucket: Bucket, limits: Limits, mode: ScoreMode
) -> tuple[State, Int[Array, "results"]]:
    """Run one batch: embed, layers, logits of each row's last token, sample, remember the samples.

    With `bucket.steps > 1` every row is a decode, and that many of them run one after another: the tokens go from step
    to step on the device. Returns the new state and every result in one int32 array; `Results` reads it back.
    """
    batch = unpack(buffer, bucket, limits)
    if bucket.steps == 1:
        state, results = _single(model, state, batch, limits, mode)
        return state, jnp.concatenate([_bits(x) for x in results])

    def body(i: Array, carry: tuple[State, Batch, Array]) -> tuple[State, Batch, Array]:
        state, batch, sampled = carry
        state, results = _single(model, state, batch, limits, mode)
        return state, advance(batch, limits), sampled.at[i].set(results[0])

    sampled = jnp.zeros((bucket.steps, bucket.seqs), jnp.int32)
    state, _, sampled = lax.fori_loop(0, bucket.steps, body, (state, batch, sampled))
    return state, sampled.reshape(-1)


def _single(model: CausalLM, state: State, batch: Batch, limits: Limits, mode: ScoreMode) -> tuple[State, list[Array]]:
    """One step; the first result is the sampled tokens `[S]`, the others are scores where the level has them."""
    chunks = batch.chunks
    carried = state.last_token.at[batch.slots[batch.row_ids]].get(mode="clip")
    ids = jnp.where(batch.token_ids >= 0, batch.token_ids, carried)
    tokens = state.tokens.at[chunks.pages, chunks.offsets].set(ids, mode="drop")
    hidden, cache = model(ids, chunks, state.cache, state.sums)
    last_row = jnp.maximum(chunks.cu_q_lens[1:] - 1, 0)
    logits = model.logits(hidden[last_row])
    if batch.sampling is None:
        sampled = best_token(logits)
        results = [sampled]
    elif batch.edits is None:
        with jax.named_scope("draw"):
            sampled, _ = draw(logits, batch.sampling, chunks.kv_lens)
        results = [sampled]
    else:
        with jax.named_scope("sample"):
            sampled, processed = sample(logits, batch.sampling, batch.edits, ids[last_row], tokens, chunks)
        shown = processed if mode.processed else logits
        results = [sampled, *_row_scores(shown, sampled, batch.sampling.logprobs, limits, mode)]
    if batch.targets is not None:
        results += _prompt_scores(model, hidden, batch.targets, limits, mode)
    last_token = state.last_token.at[batch.slots].set(sampled, mode="drop")
    return State(cache, tokens, last_token, state.sums.after(model.num_sums)), results


def _bits(x: Array) -> Int[Array, "n"]:
    return (lax.bitcast_convert_type(x, jnp.int32) if x.dtype == jnp.float32 else x).reshape(-1)


def _row_scores(
    logits: Float[Array, "S V"], sampled: Int[Array, "S"], wanted: Array, limits: Limits, mode: ScoreMode
) -> Scores:
    s, k = sampled.shape[0], limits.max_logprobs
    nothing = Scores(
        jnp.zeros(s, jnp.float32), jnp.zeros(s, jnp.int32), jnp.zeros((s, k), jnp.int32), jnp.zeros((s, k), jnp.float32)
    )
    return lax.cond(
        jnp.any(wanted), lambda: score(logits, sampled, k, as_logprobs=mode.as_logprobs), lambda: nothing
    )  # fmt: skip


def _prompt_scores(
    model: CausalLM, hidden: Float[Array, "T D"], targets: Int[Array, "T"], limits: Limits, mode: ScoreMode
) -> Scores:
    """Scores of the prompt's own tokens, a block of positions at a time: `[T, V]` logits never exist."""
    t = hidden.shape[0]
    block = min(PROMPT_BLOCK, t)
    pad = -t % block
    blocks = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, block, hidden.shape[1])
    ids = jnp.pad(targets, (0, pad), constant_values=-1).reshape(-1, block)

    def one(block_inputs: tuple[Array, Array]) -> Scores:
        rows, wanted = block_inputs
        logits = model.logits(rows)
        return score(logits, jnp.maximum(wanted, 0), limits.max_logprobs, as_logprobs=mode.as_logprobs)

    scores = lax.map(one, (blocks, ids))
    return Scores(*(x.reshape(-1, *x.shape[2:])[:t] for x in scores))
