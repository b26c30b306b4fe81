"""The sampling floor on TPUs: rows come to VMEM once, eight at a time, and are searched there.

A block holds 8 rows, one per sublane, while the next block is on its way from HBM. One pass over it keeps the `keep`
largest logits of each of `groups` x 128 lanes of a row. Lanes take every (128 groups)-th logit, so neighbours in the
vocabulary, which tend to be likely together, fall into different lanes. All logits above the largest of the lanes'
smallest kept ones (the rim) are known to be on the lists. Where the floors of the 8 rows are among these, they are
found by comparing the lists with three thresholds at a time, in the integer order of the floats. Elsewhere (sets of
many thousands of tokens, or many equal logits) the same search goes over the rows themselves.

Blocks without a filter are neither read nor searched, blocks with min-p alone are not searched.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.platform import require_tpu
from pallas_kernels.top_k_top_p.search import LOWEST, any_of, largest, order_of, share_bound, value_of

Ref = Any  # a jax.Ref or a part of one, for which pallas has no public type
Sums = list[tuple[Array, Array]]  # for each threshold, how many logits and how much weight there is from it on

ROWS, LANES = 8, 128  # of a vector register
LIST_BITS, ROW_BITS = 2, 1  # found by one pass over the lists, the rows
NOTHING, BEST, SEARCH = 0, 1, 2  # what a block of rows needs


@dataclass(frozen=True)
class Sizes:
    """How the work is cut."""

    groups: int = 16  # of 128 lanes each, which share a row
    keep: int = 6  # logits each lane keeps
    paired: int = 2  # groups whose lists grow at the same time; they divide `groups`
    inserts: int = 16  # vectors that they take in one turn
    unroll: int = 32  # vectors of a row that are compared in one turn


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
        NotImplementedError: not on a TPU, 8 rows that do not fit in its VMEM, or rows that several devices share.
    """
    capacity = require_tpu().vmem_capacity_bytes
    if axis is not None:
        raise NotImplementedError(f"rows shared by the devices of the mesh axis {axis!r}")
    return floor(logits, top_k, top_p, min_p, scale, vmem_bytes=capacity)


def vmem_use(size: int, buffers: int, sizes: Sizes = Sizes()) -> int:
    """Bytes of VMEM for rows of `size` logits, of which `buffers` blocks are there at a time."""
    blocks = buffers * ROWS * pl.cdiv(size, LANES) * LANES
    lists = ROWS * sizes.keep * sizes.groups * LANES
    return 4 * (blocks + lists) + (1 << 20)  # and what the compiler needs, such as parameters and spilled registers


def floor(
    logits: Float[Array, "S V"],
    top_k: Int[Array, "S"],
    top_p: Float[Array, "S"],
    min_p: Float[Array, "S"],
    scale: Float[Array, "S"],
    *,
    vmem_bytes: int,
    sizes: Sizes = Sizes(),
    interpret: pltpu.InterpretParams | None = None,
) -> Float[Array, "S"]:
    """The kernel on whatever TPU it is lowered for, with so much VMEM."""
    rows, size = logits.shape
    buffers = next((n for n in (2, 1) if vmem_use(size, n, sizes) <= vmem_bytes), None)
    if buffers is None:
        needed = vmem_use(size, 1, sizes)
        raise NotImplementedError(f"{ROWS} rows of {size} logits need {needed} bytes of VMEM of {vmem_bytes}")
    blocks = pl.cdiv(rows, ROWS)

    def blocked(values: Array, neutral: int) -> Array:
        return jnp.pad(values, (0, blocks * ROWS - rows), constant_values=neutral).reshape(blocks, ROWS)

    top_k = blocked(jnp.where(top_k < size, jnp.maximum(top_k, 0), 0), 0)
    top_p, min_p, scale = blocked(top_p, 1), blocked(min_p, 0), blocked(scale, 1)
    needs = jnp.where((top_k > 0) | (top_p < 1), SEARCH, jnp.where(min_p > 0, BEST, NOTHING)).astype(jnp.int32)
    need = jnp.max(needs, axis=1)
    # A block that is not needed stands for the one before, which need not be read again.
    source = lax.cummax(jnp.where(need > NOTHING, jnp.arange(blocks, dtype=jnp.int32), 0))
    column = pl.BlockSpec((ROWS, 1), lambda i, *_: (i, 0))
    block = pl.BlockSpec(
        (ROWS, pl.cdiv(size, LANES) * LANES),
        lambda i, need, source: (source[i], 0),
        pipeline_mode=pl.Buffered(buffers),
    )
    return pl.pallas_call(
        functools.partial(_kernel, size=size, sizes=sizes),
        out_shape=jax.ShapeDtypeStruct((blocks * ROWS, 1), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(blocks,),
            in_specs=[block, column, column, column, column],
            out_specs=column,
            scratch_shapes=[pltpu.VMEM((sizes.keep, ROWS, sizes.groups * LANES), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=vmem_use(size, buffers, sizes)
        ),
        interpret=interpret or False,
    )(need, source, logits, *(one.reshape(-1, 1) for one in (scale, top_k, top_p, jnp.log(min_p))))[:rows, 0]


def _kernel(
    need_ref: Ref,
    source_ref: Ref,
    logits_ref: Ref,
    scale_ref: Ref,
    k_ref: Ref,
    p_ref: Ref,
    log_min_p_ref: Ref,
    out_ref: Ref,
    lists_ref: Ref,
    *,
    size: int,
    sizes: Sizes,
) -> None:
    """The floors of 8 rows; -inf for rows without a filter, and anything for rows past the last."""
    need = need_ref[pl.program_id(0)]
    row, lists = _Row(logits_ref, scale_ref[...], size, sizes.unroll), _Lists(lists_ref, sizes)

    @pl.when(need == NOTHING)
    def _() -> None:
        out_ref[...] = jnp.full((ROWS, 1), -jnp.inf, jnp.float32)

    @pl.when(need == BEST)
    def _() -> None:
        out_ref[...] = row.best() + log_min_p_ref[...]

    @pl.when(need == SEARCH)
    def _() -> None:
        lists.fill(row)
        tops = lists.tops()
        k, p, low = k_ref[...], p_ref[...], tops[0] + log_min_p_ref[...]
        search = _Search(k, p, low, best=tops[0], size=size)
        over_lists = functools.partial(lists.scan, tops)
        found, known = search.floor(over_lists, row.scan, order_of(tops[-1]) + 1, LIST_BITS)
        out_ref[...] = found

        @pl.when(any_of(~known))
        def _() -> None:
            every = jnp.full((ROWS, 1), order_of(jnp.float32(-jnp.inf)), jnp.int32)
            out_ref[...] = search.floor(row.scan, row.scan, every, ROW_BITS)[0]


@dataclass(frozen=True)
class _Row:
    """8 rows of `size` logits in VMEM, to be scaled; what follows up to a whole number of vectors is undefined."""

    ref: Ref
    scale: Float[Array, "8 1"]
    size: int
    unroll: int

    def fold[T](
        self, step: Callable[[T, list[Array]], T], start: T, *, first: int, width: int, stride: int, times: int
    ) -> T:
        """Take `width` vectors of every `stride` from `first` on, `times` times `width` in one turn."""
        full, every = self.size // LANES, pl.cdiv(self.size, LANES)
        turns = max(0, (full - first - width) // stride + 1) // times
        span = ((times - 1) * stride + width) * LANES

        def turn(i: Array, carry: T) -> T:
            begin = pl.multiple_of((i * times * stride + first) * LANES, LANES)
            some = self.ref.at[:, pl.ds(begin, span)]  # one address for all of them
            places = [n * stride + q for n in range(times) for q in range(width)]
            return step(carry, [_vector(some, place) * self.scale for place in places])

        carry = lax.fori_loop(0, turns, turn, start) if turns else start  # the span may be longer than the row
        for begin in range(turns * times * stride + first, every, stride):
            carry = step(carry, [self._masked(index) for index in range(begin, min(begin + width, every))])
        return carry

    def _masked(self, index: int) -> Float[Array, "8 128"]:
        """A vector with -inf past the end of the row."""
        values, left = _vector(self.ref, index) * self.scale, self.size - index * LANES
        return values if left >= LANES else jnp.where(_lanes() < left, values, -jnp.inf)

    def best(self) -> Float[Array, "8 1"]:
        def step(best: Array, vectors: list[Array]) -> Array:
            return jnp.maximum(best, _tree(jnp.maximum, vectors))

        found = self.fold(step, _full(-jnp.inf), first=0, width=self.unroll, stride=self.unroll, times=1)
        return jnp.max(found, axis=1, keepdims=True)

    def scan(self, scan: "_Scan") -> Sums:
        width = self.unroll
        return scan.over_lanes(self.fold(scan.step, scan.start(), first=0, width=width, stride=width, times=1))


@dataclass(frozen=True)
class _Lists:
    """The largest logits of each lane of each group, rank by rank, in VMEM."""

    ref: Ref
    sizes: Sizes

    def fill(self, row: _Row) -> None:
        keep, paired, groups = self.sizes.keep, self.sizes.paired, self.sizes.groups

        def insert(lists: list[list[Array]], vectors: list[Array]) -> list[list[Array]]:
            for i, values in enumerate(vectors):
                lists = [_insert(best, values) if q == i % paired else best for q, best in enumerate(lists)]
            return lists

        for group in range(0, groups, paired):
            empty = [[_full(-jnp.inf)] * keep for _ in range(paired)]
            times = max(1, self.sizes.inserts // paired)
            found = row.fold(insert, empty, first=group, width=paired, stride=groups, times=times)
            for q, best in enumerate(found):
                for rank, values in enumerate(best):
                    self.ref[rank, :, pl.ds((group + q) * LANES, LANES)] = values

    def read(self, rank: int | Array) -> list[Array]:
        some = self.ref.at[rank]
        return [_vector(some, group) for group in range(self.sizes.groups)]

    def tops(self) -> list[Array]:
        """The largest logit of each rank, `[8, 1]`."""
        maxima = [_tree(jnp.maximum, self.read(rank)) for rank in range(self.sizes.keep)]
        return [jnp.max(values, axis=1, keepdims=True) for values in maxima]

    def scan(self, tops: list[Array], scan: "_Scan") -> Sums:
        """Ranks that are below the first threshold in all rows are left out."""
        used = jnp.max(sum(jnp.where(top >= scan.thresholds[0], 1.0, 0.0) for top in tops)).astype(jnp.int32)
        found = lax.fori_loop(0, used, lambda rank, carry: scan.step(carry, self.read(rank)), scan.start())
        return scan.over_lanes(found)


@dataclass(frozen=True)
class _Scan:
    """One pass over logits that are compared with ascending thresholds, `[8, 1]` each; no `weigh` counts only."""

    thresholds: list[Array]
    weigh: Callable[[Array], Array] | None

    def start(self) -> Sums:
        count, weight = jnp.zeros((ROWS, LANES), jnp.int32), _full(0.0)
        return [(count, count if self.weigh is None else weight) for _ in self.thresholds]

    def step(self, sums: Sums, vectors: list[Array]) -> Sums:
        """Add some logits to each lane's sums."""
        some = 8  # at a time, or the registers would not do
        for begin in range(0, len(vectors), some):
            sums = self._add(sums, vectors[begin : begin + some])
        return sums

    def _add(self, sums: Sums, vectors: list[Array]) -> Sums:
        weights = [] if self.weigh is None else [self.weigh(values) for values in vectors]
        added = []
        for threshold, (old_count, old_total) in zip(self.thresholds, sums, strict=True):
            above = [values >= threshold for values in vectors]
            count = old_count + _tree(jnp.add, [jnp.where(flags, 1, 0) for flags in above])
            heavy = [jnp.where(flags, weight, 0.0) for flags, weight in zip(above, weights, strict=False)]
            added.append((count, old_total + _tree(jnp.add, heavy) if heavy else count))
        return added

    def over_lanes(self, sums: Sums) -> Sums:
        return [(jnp.sum(c, axis=1, keepdims=True), jnp.sum(t, axis=1, keepdims=True)) for c, t in sums]


def _vector(ref: Ref, index: int) -> Float[Array, "8 128"]:
    return ref[:, index * LANES : (index + 1) * LANES]


def _lanes() -> Int[Array, "8 128"]:
    return lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)


def _full(value: float) -> Float[Array, "8 128"]:
    return jnp.full((ROWS, LANES), value, jnp.float32)


def _insert(best: list[Array], values: Array) -> list[Array]:
    """Each lane's descending list with one more value and without its smallest."""
    kept = []
    for rank in best:
        kept.append(jnp.maximum(rank, values))
        values = jnp.minimum(rank, values)
    return kept


def _tree(combine: Callable[[Array, Array], Array], values: list[Array]) -> Array:
    """By halves: in a chain each step would wait for the one before."""
    middle = len(values) // 2
    return values[0] if middle == 0 else combine(_tree(combine, values[:middle]), _tree(combine, values[middle:]))


@dataclass(frozen=True)
class _Search:
    """What is wanted of 8 rows: the `k` best (0: all), a share `p`, nothing below `low`; `best` is their maximum."""

    k: Int[Array, "8 1"]
    p: Float[Array, "8 1"]
    low: Float[Array, "8 1"]
    best: Float[Array, "8 1"]
    size: int

    def floor(
        self,
        scan: Callable[[_Scan], Sums],
        scan_row: Callable[[_Scan], Sums],
        bottom: Int[Array, "8 1"],
        bits: int,
    ) -> tuple[Float[Array, "8 1"], Bool[Array, "8 1"]]:
        """The floor, and for which rows it is known for certain.

        `scan` sees all logits whose order is at least `bottom`, perhaps not the others; `scan_row` sees all.
        """
        last, base, floor = order_of(self.best), jnp.maximum(self.best, LOWEST), self.low

        def weigh(values: Array) -> Array:
            return jnp.exp(values - base)

        def find(weigh: Callable[[Array], Array] | None, need: Array, start: Array) -> tuple[Array, Array]:
            found, seen = largest(lambda thresholds: scan(_Scan(thresholds, weigh)), need, start, last, bits)
            return value_of(found), seen | (start > bottom)

        on = self.k > 0
        kth, sure = find(None, self.k, jnp.where(on, jnp.maximum(order_of(floor), bottom), last))
        floor, known = jnp.where(on, jnp.maximum(floor, kth), floor), ~on | sure

        on = self.p < 1
        below = any_of(on & (order_of(floor) < bottom))
        whole = _Scan([floor], weigh)
        kept = lax.cond(below, lambda: scan_row(whole)[0][1], lambda: scan(whole)[0][1])
        least = share_bound(self.best, self.p, kept, self.size)
        start = jnp.maximum(jnp.maximum(order_of(floor), order_of(least)), bottom)
        nucleus, sure = find(weigh, self.p * kept, jnp.where(on, start, last))
        return jnp.where(on, jnp.maximum(floor, nucleus), floor), known & (~on | sure)
