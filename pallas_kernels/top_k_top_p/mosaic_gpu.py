"""The sampling floor on Hopper GPUs: one pass over the logits, then an exact search among the few that can matter.

`gather` cuts each row into `parts` x 128 lanes of V / (128 parts) logits. Every lane keeps its `keep` largest and the
sum of its exponentials. Lanes take every (128 parts)-th logit, so neighbours in the vocabulary, which tend to be likely
together, fall into different lanes.

`search` gives each row to one block of threads. All logits above the largest of the lanes' smallest kept ones (the
rim) are known to be on the lists. Where the floor is among these, it is found by comparing the lists with three
thresholds at a time, in the integer order of the floats. Elsewhere (sets of many thousands of tokens, or many equal
logits) the same search goes over the row itself.

Both kernels skip rows that use no filter.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.platform import require_hopper
from pallas_kernels.top_k_top_p.search import LOWEST, between, order_of, value_of

Ref = Any  # a jax.Ref or a part of one, for which pallas has no public type

LANES = 128  # threads of a warpgroup: one logit each per vector
LIST_BITS, ROW_BITS = 2, 3  # found by one pass over the lists, the row

VECTOR = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)
# The same values in each warp, 4 a lane: sums of these need no memory, which two warpgroups would have to share.
SHARED = plgpu.Layout.TILED(
    plgpu.Tiling(((LANES,), (4,))), warp_dims=(plgpu.Replicated(4),), lane_dims=(-2,), vector_dim=-1
)


@dataclass(frozen=True)
class Sizes:
    """How the work is cut."""

    parts: int = 16  # blocks that share a row in `gather`
    keep: int = 8  # logits each lane keeps
    unroll: int = 8  # vectors in flight per warpgroup
    warpgroups: int = 4  # of a block of `search`; they divide `parts`


def top_k_top_p_floor(
    logits: Float[Array, "S V"],
    top_k: Int[Array, "S"],
    top_p: Float[Array, "S"],
    min_p: Float[Array, "S"],
    scale: Float[Array, "S"],
    *,
    axis: str | None = None,
) -> Float[Array, "S"]:
    """See `pallas_kernels.top_k_top_p.top_k_top_p_floor`.

    Raises:
        NotImplementedError: not on a Hopper GPU, fewer than 128 logits, or rows that several devices share.
    """
    require_hopper()
    if axis is not None:
        raise NotImplementedError(f"rows shared by the devices of the mesh axis {axis!r}")
    if logits.shape[1] < LANES:
        raise NotImplementedError(f"{logits.shape[1]} logits a row are fewer than {LANES}")
    return floor(logits, top_k, top_p, min_p, scale)


def floor(
    logits: Float[Array, "S V"],
    top_k: Int[Array, "S"],
    top_p: Float[Array, "S"],
    min_p: Float[Array, "S"],
    scale: Float[Array, "S"],
    sizes: Sizes = Sizes(),
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "S"]:
    """The kernels on whatever device they are lowered for. They scale what they read: an array more would cost more."""
    top_k = jnp.where((top_k > 0) & (top_k < logits.shape[1]), top_k, 0)
    active = ((top_k > 0) | (top_p < 1) | (min_p > 0)).astype(jnp.int32)
    best, sums = gather(logits, scale, active, sizes, interpret)
    return search(logits, scale, active, top_k, top_p, jnp.log(min_p), best, sums, sizes, interpret)


def gather(
    logits: Float[Array, "S V"],
    scale: Float[Array, "S"],
    active: Int[Array, "S"],
    sizes: Sizes,
    interpret: plgpu.InterpretGPUParams | None,
) -> tuple[Float[Array, "S KW"], Float[Array, "S W"]]:
    """The `K` largest scaled logits of each of `W` lanes, rank by rank, and the sums of `exp(logit - largest)`.

    Lanes with fewer logits are filled up with -inf. Rows that are not `active` stay undefined.
    """
    rows, size = logits.shape
    groups = pl.cdiv(size, LANES * sizes.parts * sizes.unroll)

    def body(active_ref: Ref, scale_ref: Ref, logits_ref: Ref, best_ref: Ref, sums_ref: Ref) -> None:
        row, part = lax.axis_index("row"), lax.axis_index("part")
        factor = scale_ref[row]

        def group(i: Array, carry: tuple[list[Array], Array]) -> tuple[list[Array], Array]:
            best, total = carry
            old = jnp.maximum(best[0], LOWEST)
            vectors = [
                _load(logits_ref.at[row], factor, (i * sizes.unroll + u) * sizes.parts + part, size)
                for u in range(sizes.unroll)
            ]
            for vector in vectors:
                best = _insert(best, vector)
            new = jnp.maximum(best[0], LOWEST)
            return best, total * jnp.exp(old - new) + sum(jnp.exp(vector - new) for vector in vectors)

        @pl.when(active_ref[row] > 0)
        def _() -> None:
            best, total = lax.fori_loop(0, groups, group, ([_full(-jnp.inf)] * sizes.keep, _full(0.0)))
            lanes = pl.ds(part * LANES, LANES)
            for rank, values in enumerate(best):
                best_ref[row, pl.ds((rank * sizes.parts + part) * LANES, LANES)] = values
            sums_ref[row, lanes] = total

    width = sizes.parts * LANES
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((rows, sizes.keep * width), jnp.float32),
            jax.ShapeDtypeStruct((rows, width), jnp.float32),
        ),
        grid=(rows, sizes.parts), grid_names=("row", "part"), num_threads=1, thread_name="warpgroup",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(active, scale, logits)  # fmt: skip


def _full(value: float) -> Float[Array, "128"]:
    return plgpu.layout_cast(jnp.full((LANES,), value, jnp.float32), VECTOR)


def _load(row_ref: Ref, factor: Array, index: Array, size: int) -> Float[Array, "128"]:
    """Vector `index` of a row of `size` logits, times a factor; -inf past the end.

    The last vectors are read from further left.
    """
    start = jnp.minimum(index * LANES, size - LANES)
    values = _read(row_ref.at[pl.ds(start, LANES)]) * factor
    lane = plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=VECTOR)
    return jnp.where(lane >= index * LANES - start, values, -jnp.inf)


def _read(ref: Ref) -> Float[Array, "128"]:
    return plgpu.load(ref, layout=VECTOR, optimized=False)


def _insert(best: list[Array], values: Array) -> list[Array]:
    """Each lane's descending list with one more value and without its smallest."""
    kept = []
    for rank in best:
        kept.append(jnp.maximum(rank, values))
        values = jnp.minimum(rank, values)
    return kept


def search(
    logits: Float[Array, "S V"],
    scale: Float[Array, "S"],
    active: Int[Array, "S"],
    top_k: Int[Array, "S"],
    top_p: Float[Array, "S"],
    log_min_p: Float[Array, "S"],
    best: Float[Array, "S KW"],
    sums: Float[Array, "S W"],
    sizes: Sizes,
    interpret: plgpu.InterpretGPUParams | None,
) -> Float[Array, "S"]:
    """The floor of each row; -inf for rows that are not `active`. `top_k` is 0 where it is off."""
    rows, size = logits.shape
    width, groups, unroll = sums.shape[1], sizes.warpgroups, sizes.unroll
    share = width // LANES // groups  # vectors of a rank per warpgroup
    most = max(sizes.keep, 2**ROW_BITS - 1)  # vectors that are reduced at once

    def body(
        logits_ref, scale_ref, active_ref, k_ref, p_ref, min_ref, best_ref, sums_ref, out_ref, scratch, barrier
    ) -> None:
        row, group, nothing = lax.axis_index("row"), lax.axis_index("warpgroup"), jnp.float32(-jnp.inf)

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

        def read(ref: Ref, rank: int | Array = 0) -> list[Array]:
            """This warpgroup's share of a rank."""
            first = rank * width + group * share * LANES
            return [_read(ref.at[row, pl.ds(first + i * LANES, LANES)]) for i in range(share)]

        def row_floor() -> Array:
            maxima = [functools.reduce(jnp.maximum, read(best_ref, rank)) for rank in range(sizes.keep)]
            tops = across(maxima, jnp.max)  # of each rank
            base, last, bottom = jnp.maximum(tops[0], LOWEST), order_of(tops[0]), order_of(tops[-1]) + 1
            pairs = zip(read(sums_ref), read(best_ref), strict=True)
            parts = [total * jnp.exp(jnp.maximum(best, LOWEST) - base) for total, best in pairs]
            (everything,) = across([functools.reduce(jnp.add, parts)], jnp.sum)
            k, p, low = k_ref[row].astype(jnp.float32), p_ref[row], tops[0] + min_ref[row]

            def add(counting: Array, thresholds: list[Array], totals: list[Array], vectors: list[Array]) -> list[Array]:
                for values in vectors:
                    weights = jnp.where(counting, 1.0, jnp.exp(values - base))
                    pairs = zip(totals, thresholds, strict=True)
                    totals = [total + jnp.where(values >= t, weights, 0.0) for total, t in pairs]
                return totals

            def over_lists(counting: Array, thresholds: list[Array]) -> list[Array]:
                def rank(i: Array, totals: list[Array]) -> list[Array]:
                    return add(counting, thresholds, totals, read(best_ref, i))

                used = sum((top >= thresholds[0]).astype(jnp.int32) for top in tops)
                return across(lax.fori_loop(0, used, rank, [_full(0.0) for _ in thresholds]), jnp.sum)

            def over_row(counting: Array, thresholds: list[Array]) -> list[Array]:
                def some(i: Array, totals: list[Array]) -> list[Array]:
                    indices = [(i * unroll + u) * groups + group for u in range(unroll)]
                    vectors = [_load(logits_ref.at[row], scale_ref[row], j, size) for j in indices]
                    return add(counting, thresholds, totals, vectors)

                steps = pl.cdiv(size, LANES * groups * unroll)
                return across(lax.fori_loop(0, steps, some, [_full(0.0) for _ in thresholds]), jnp.sum)

            def find(measure: Callable, bottom: Array, bits: int) -> tuple[Array, Array]:
                """The floor, and whether values from `bottom` on suffice to know it."""

                def stage(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
                    """First raise the floor of min-p to that of top-k, then to that of top-p."""
                    (floor, known), counting = found, i == 0
                    filtered = ~counting & (floor > nothing)
                    kept = lax.cond(filtered, lambda: measure(counting, [floor])[0], lambda: everything)
                    need = jnp.where(counting, k, p * kept)
                    # If all logits were under this, they would not have the share 1 - p.
                    least = jnp.where(counting, nothing, base + jnp.log((1 - p) * kept / size) - 0.01)
                    start = jnp.maximum(jnp.maximum(order_of(floor), order_of(least)), bottom)
                    on = jnp.where(counting, k > 0, p < 1)
                    order = _largest(functools.partial(measure, counting), need, jnp.where(on, start, last), last, bits)
                    sure = (order > bottom) & (~filtered | (order_of(floor) > bottom))
                    return jnp.where(on, jnp.maximum(floor, value_of(order)), floor), known & (sure | ~on)

                return lax.fori_loop(0, 2, stage, (low, jnp.bool_(True)))

            floor, known = find(over_lists, bottom, LIST_BITS)
            # This way round, since the branch of the false condition is lowered twice.
            return lax.cond(~known, lambda: find(over_row, order_of(nothing), ROW_BITS)[0], lambda: floor)

        result = lax.cond(active_ref[row] > 0, row_floor, lambda: nothing)

        @pl.when(group == 0)
        def _() -> None:
            out_ref[row] = result

    return plgpu.kernel(
        body, out_type=jax.ShapeDtypeStruct((rows,), jnp.float32),
        grid=(rows,), grid_names=("row",), num_threads=groups, thread_name="warpgroup", interpret=interpret,
        scratch_types=[plgpu.SMEM((most, groups * LANES), jnp.float32), plgpu.Barrier(num_arrivals=groups)],
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(logits, scale, active, top_k, top_p, log_min_p, best, sums)  # fmt: skip


def _largest(
    measure: Callable[[list[Array]], list[Array]], need: Array, low: Array, high: Array, bits: int
) -> Int[Array, ""]:
    """The largest integer of `low` to `high` whose float has `measure >= need`, known to hold at `low`.

    `measure` falls from float to float. Every round tries `2**bits - 1` thresholds.
    """

    def narrow(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        orders = between(low, high, bits)
        for order, value in zip(orders, measure([value_of(order) for order in orders]), strict=True):
            low = jnp.where(value >= need, jnp.maximum(low, order), low)
            high = jnp.where(value >= need, high, jnp.minimum(high, order - 1))
        return low, high

    return lax.while_loop(lambda bounds: bounds[0] < bounds[1], narrow, (low, high))[0]
