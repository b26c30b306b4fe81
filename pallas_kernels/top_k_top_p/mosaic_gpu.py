"""The sampling floor on Hopper GPUs: one pass over the logits, then an exact search among the few that can matter.

`gather` cuts each row into `PARTS` x 128 lanes of V / (128 PARTS) logits. Every lane keeps its `KEEP` largest and the
sum of its exponentials. Lanes take every (128 PARTS)-th logit, so neighbours in the vocabulary, which tend to be likely
together, fall into different lanes.

`search` gives each row to one block of threads. All logits above the largest of the lanes' smallest kept ones (the
`rim`) are known to be on the lists. Where the answer is among these, it is found there by comparing the lists, held in
registers, with three thresholds at a time, in the integer order of the floats. Elsewhere (sets of many thousands of
tokens, or many equal logits) the same search goes over the row itself.

Both kernels skip rows that use no filter.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.platform import require_hopper

LANES = 128  # threads of a warpgroup: one logit each per vector
PARTS = 16  # blocks that share a row in `gather`
KEEP = 8  # logits each lane keeps
UNROLL = 8  # vectors in flight per warpgroup
WARPGROUPS = 2  # of a block of `search`
LOWEST = -3.0e38  # stands for -inf where differences are taken

VECTOR = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)
# The same values in each warp, 4 a lane: sums of these need no memory, which two warpgroups would have to share.
SHARED = plgpu.Layout.TILED(
    plgpu.Tiling(((LANES,), (4,))), warp_dims=(plgpu.Replicated(4),), lane_dims=(-2,), vector_dim=-1
)


def top_k_top_p_floor(
    logits: Float[Array, "S V"], top_k: Int[Array, "S"], top_p: Float[Array, "S"], min_p: Float[Array, "S"]
) -> Float[Array, "S"]:
    """See `pallas_kernels.top_k_top_p.top_k_top_p_floor`.

    Raises:
        NotImplementedError: not on a Hopper GPU, or fewer than 128 logits.
    """
    require_hopper()
    if logits.shape[1] < LANES:
        raise NotImplementedError(f"{logits.shape[1]} logits a row are fewer than {LANES}")
    return floor(logits, top_k, top_p, min_p)


def floor(
    logits: Float[Array, "S V"],
    top_k: Int[Array, "S"],
    top_p: Float[Array, "S"],
    min_p: Float[Array, "S"],
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "S"]:
    """The kernels on whatever device they are lowered for."""
    top_k = jnp.where((top_k > 0) & (top_k < logits.shape[1]), top_k, 0)
    active = ((top_k > 0) | (top_p < 1) | (min_p > 0)).astype(jnp.int32)
    best, sums = gather(logits, active, interpret)
    return search(logits, active, top_k, top_p, jnp.log(min_p), best, sums, interpret)


def gather(
    logits: Float[Array, "S V"], active: Int[Array, "S"], interpret: plgpu.InterpretGPUParams | None
) -> tuple[Float[Array, "S K W"], Float[Array, "S W"]]:
    """The `K` largest logits of each of `W` lanes in descending order, and the sums of `exp(logit - largest)`.

    Lanes with fewer logits are filled up with -inf. Rows that are not `active` stay undefined.
    """
    rows, size = logits.shape
    groups = pl.cdiv(size, LANES * PARTS * UNROLL)

    def body(active_ref: jax.Ref, logits_ref: jax.Ref, best_ref: jax.Ref, sums_ref: jax.Ref) -> None:
        row, part = lax.axis_index("row"), lax.axis_index("part")

        def group(i: Array, carry: tuple[list[Array], Array]) -> tuple[list[Array], Array]:
            best, total = carry
            old = jnp.maximum(best[0], LOWEST)
            vectors = [_load(logits_ref.at[row], (i * UNROLL + u) * PARTS + part, size) for u in range(UNROLL)]
            for vector in vectors:
                best = _insert(best, vector)
            new = jnp.maximum(best[0], LOWEST)
            return best, total * jnp.exp(old - new) + sum(jnp.exp(vector - new) for vector in vectors)

        @pl.when(active_ref[row] > 0)
        def _() -> None:
            best, total = lax.fori_loop(0, groups, group, ([_full(-jnp.inf)] * KEEP, _full(0.0)))
            lanes = pl.ds(part * LANES, LANES)
            for rank, values in enumerate(best):
                best_ref[row, rank, lanes] = values
            sums_ref[row, lanes] = total

    width = PARTS * LANES
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((rows, KEEP, width), jnp.float32),
            jax.ShapeDtypeStruct((rows, width), jnp.float32),
        ),
        grid=(rows, PARTS), grid_names=("row", "part"), num_threads=1, thread_name="warpgroup", interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(active, logits)  # fmt: skip


def _full(value: float) -> Float[Array, "128"]:
    return plgpu.layout_cast(jnp.full((LANES,), value, jnp.float32), VECTOR)


def _load(row_ref: jax.Ref, index: Array, size: int) -> Float[Array, "128"]:
    """Vector `index` of a row of `size` logits; -inf past the end. The last vectors are read from further left."""
    start = jnp.minimum(index * LANES, size - LANES)
    values = plgpu.load(row_ref.at[pl.ds(start, LANES)], layout=VECTOR, optimized=False)
    lane = plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=VECTOR)
    return jnp.where(lane >= index * LANES - start, values, -jnp.inf)


def _insert(best: list[Array], values: Array) -> list[Array]:
    """Each lane's descending list with one more value and without its smallest."""
    kept = []
    for rank in best:
        kept.append(jnp.maximum(rank, values))
        values = jnp.minimum(rank, values)
    return kept


def search(
    logits: Float[Array, "S V"],
    active: Int[Array, "S"],
    top_k: Int[Array, "S"],
    top_p: Float[Array, "S"],
    log_min_p: Float[Array, "S"],
    best: Float[Array, "S K W"],
    sums: Float[Array, "S W"],
    interpret: plgpu.InterpretGPUParams | None,
) -> Float[Array, "S"]:
    """The floor of each row; -inf for rows that are not `active`. `top_k` is 0 where it is off."""
    rows, size = logits.shape
    share = PARTS // WARPGROUPS  # vectors of a list rank per warpgroup

    def body(logits_ref, active_ref, k_ref, p_ref, min_ref, best_ref, sums_ref, out_ref, scratch, barrier) -> None:
        row, group = lax.axis_index("row"), lax.axis_index("warpgroup")

        def across(partials: Sequence[Array], reduce: Callable) -> list[Array]:
            """Scalars from one vector per warpgroup each."""
            for i, partial in enumerate(partials):
                scratch[i, pl.ds(group * LANES, LANES)] = partial
            plgpu.barrier_arrive(barrier)
            plgpu.barrier_wait(barrier)
            whole = range(len(partials))
            totals = [reduce(plgpu.load(scratch.at[i], layout=SHARED, optimized=False)) for i in whole]
            plgpu.barrier_arrive(barrier)  # the scratch is free again
            plgpu.barrier_wait(barrier)
            return totals

        def add(partials: Sequence[Array]) -> list[Array]:
            return across(partials, jnp.sum)

        def read(ref: jax.Ref, i: int) -> Array:
            return plgpu.load(ref.at[pl.ds((group * share + i) * LANES, LANES)], layout=VECTOR, optimized=False)

        def row_floor() -> Array:
            ranks = [[read(best_ref.at[row, rank], i) for i in range(share)] for rank in range(KEEP)]
            top, rim = (_fold(jnp.maximum, ranks[rank]) for rank in (0, KEEP - 1))
            top, rim = across((top, rim), jnp.max)
            base = jnp.maximum(top, LOWEST)
            sum_parts = [
                read(sums_ref.at[row], i) * jnp.exp(jnp.maximum(m, LOWEST) - base) for i, m in enumerate(ranks[0])
            ]
            (everything,) = add([_fold(jnp.add, sum_parts)])
            listed = [values for rank in ranks for values in rank]
            weights = [jnp.exp(values - base) for values in listed]
            k, p, low = k_ref[row].astype(jnp.float32), p_ref[row], top + min_ref[row]

            def count_listed(thresholds: Sequence[Array]) -> list[Array]:
                return add([_fold(jnp.add, [jnp.where(x >= t, 1.0, 0.0) for x in listed]) for t in thresholds])

            def weigh_listed(thresholds: Sequence[Array]) -> list[Array]:
                pairs = list(zip(listed, weights, strict=True))
                return add([_fold(jnp.add, [jnp.where(x >= t, w, 0.0) for x, w in pairs]) for t in thresholds])

            def over_row(weight: Callable, thresholds: Sequence[Array]) -> list[Array]:
                def step(i: Array, sums: list[Array]) -> list[Array]:
                    for u in range(UNROLL):
                        x = _load(logits_ref.at[row], (i * UNROLL + u) * WARPGROUPS + group, size)
                        w = weight(x)
                        sums = [s + jnp.where(x >= t, w, 0.0) for s, t in zip(sums, thresholds, strict=True)]
                    return sums

                groups = pl.cdiv(size, LANES * WARPGROUPS * UNROLL)
                return add(lax.fori_loop(0, groups, step, [_full(0.0) for _ in thresholds]))

            def count_all(thresholds: Sequence[Array]) -> list[Array]:
                return over_row(jnp.ones_like, thresholds)

            def weigh_all(thresholds: Sequence[Array]) -> list[Array]:
                return over_row(lambda x: jnp.exp(x - base), thresholds)

            last = _order(top)
            inside = _order(rim) + 1  # thresholds from here on are decided by the lists
            nothing = jnp.float32(-jnp.inf)

            (enough,) = count_listed([rim])
            kth = _value(_largest(count_listed, k, jnp.where(k > 0, inside - 1, last), last))
            first = jnp.maximum(low, jnp.where(k > 0, kth, nothing))
            (kept,) = weigh_listed([first])
            budget = p * jnp.where(first > rim, kept, everything)
            (above,) = weigh_listed([_value(inside)])
            start = jnp.maximum(inside, _order(first))
            nucleus = _value(_largest(weigh_listed, budget, jnp.where(p < 1, start, last), last))
            found = jnp.where(p < 1, jnp.maximum(nucleus, first), first)
            known_k = (k == 0) | (enough >= k)
            known_p = (p >= 1) | (first > rim) | ((first == nothing) & (above >= budget))

            def over_all() -> Array:
                bottom = _order(nothing)
                kth = _value(_largest(count_all, k, jnp.where(k > 0, bottom, last), last))
                first = jnp.maximum(low, jnp.where(k > 0, kth, nothing))
                (kept,) = weigh_all([first])
                start = jnp.where(p < 1, _order(first), last)
                nucleus = _value(_largest(weigh_all, p * kept, start, last))
                return jnp.where(p < 1, jnp.maximum(nucleus, first), first)

            return lax.cond(known_k & known_p, lambda: found, over_all)

        result = lax.cond(active_ref[row] > 0, row_floor, lambda: jnp.float32(-jnp.inf))

        @pl.when(group == 0)
        def _() -> None:
            out_ref[row] = result

    return plgpu.kernel(
        body, out_type=jax.ShapeDtypeStruct((rows,), jnp.float32),
        grid=(rows,), grid_names=("row",), num_threads=WARPGROUPS, thread_name="warpgroup", interpret=interpret,
        scratch_types=[plgpu.SMEM((3, WARPGROUPS * LANES), jnp.float32), plgpu.Barrier(num_arrivals=WARPGROUPS)],
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(logits, active, top_k, top_p, log_min_p, best, sums)  # fmt: skip


def _fold(join: Callable, vectors: Sequence[Array]) -> Array:
    """Join pairwise, for short chains of dependent instructions."""
    while len(vectors) > 1:
        pairs = [join(a, b) for a, b in zip(vectors[::2], vectors[1::2], strict=False)]
        vectors = pairs + list(vectors[len(pairs) * 2 :])
    return vectors[0]


def _largest(measure: Callable[[Sequence[Array]], list[Array]], need: Array, low: Array, high: Array) -> Int[Array, ""]:
    """The largest integer of `low` to `high` whose float has `measure >= need`, known to hold at `low`.

    `measure` falls from float to float. Every round tries three thresholds.
    """

    def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        second = _middle(low, high)
        first, third = _middle(low, second - 1), _middle(second, high)
        holds = [value >= need for value in measure([_value(t) for t in (first, second, third)])]
        above = jnp.where(holds[0], second - 1, first - 1)
        above = jnp.where(holds[1], third - 1, above)
        below = jnp.where(holds[1], second, jnp.where(holds[0], first, low))
        return jnp.where(holds[2], third, below), jnp.where(holds[2], high, above)

    return lax.while_loop(lambda bounds: bounds[0] < bounds[1], halve, (low, high))[0]


def _middle(low: Int[Array, ""], high: Int[Array, ""]) -> Int[Array, ""]:
    """Their mean, rounded up, without overflow."""
    return (low | high) - lax.shift_right_arithmetic(low ^ high, 1)


def _order(value: Float[Array, ""]) -> Int[Array, ""]:
    """Integers in the order of the floats."""
    return _flip(lax.bitcast_convert_type(value, jnp.int32))


def _value(order: Int[Array, ""]) -> Float[Array, ""]:
    return lax.bitcast_convert_type(_flip(order), jnp.float32)


def _flip(bits: Int[Array, ""]) -> Int[Array, ""]:
    """Float bits to ordered integers, and back."""
    return bits ^ (lax.shift_right_arithmetic(bits, 31) & 0x7FFFFFFF)
