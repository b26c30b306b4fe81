"""Write new keys and values on TPUs (Pallas Mosaic TPU): whole tiles of rows, several in flight.

Memory is written by tiles of 8 (or 16) rows of a page. Each run of new rows within a tile is one item: its tile is
fetched unless the run fills it, the rows are put in their places, and the tile goes back. The rows come token by token,
all heads together, and leave head by head, which is a transpose in registers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.platform import require_tpu

IN_FLIGHT = 8  # power of two: items whose copies run at the same time
AHEAD = IN_FLIGHT // 2  # items that are fetched before the first of them is finished
LANES = 128

Ref = Any
Index = Int[Array, ""]


def write_kv(
    kv: Float[Array, "L pages kinds K p H"],
    layer: int | Int[Array, ""],
    cells: Float[Array, "T kinds K H"],
    pages: Int[Array, "T"],
    offsets: Int[Array, "T"],
) -> Float[Array, "L pages kinds K p H"]:
    """See `pallas_kernels.kv_write.write_kv`; `cells` are keys and values as a page holds them."""
    info = require_tpu()
    rows = info.get_sublane_tiling(kv.dtype)
    page, width = kv.shape[4:]
    if kv.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"a cache of {kv.dtype}, the kernel serves bfloat16 and float32")
    if page % rows or width % LANES:
        raise NotImplementedError(f"pages of {page} x {width}, the kernel serves multiples of {rows} x {LANES}")
    if (needed := 4 * 4 * len(pages)) > info.smem_capacity_bytes // 2:
        raise NotImplementedError(f"{len(pages):,} rows need {needed:,} bytes of scalar memory")
    return tpu_write(kv, jnp.asarray(layer, jnp.int32), cells, pages, offsets, rows=rows, cores=info.num_cores)


@functools.partial(jax.jit, static_argnames=("rows", "cores", "interpret"))
def tpu_write(
    kv: Float[Array, "L pages kinds K p H"],
    layer: Int[Array, ""],
    cells: Float[Array, "T kinds K H"],
    pages: Int[Array, "T"],
    offsets: Int[Array, "T"],
    *,
    rows: int,
    cores: int,
    interpret: Any = False,
) -> Float[Array, "L pages kinds K p H"]:
    """The kernel for a device with tiles of `rows` rows, whatever this process runs on; one trace for all layers."""
    num_tokens, kinds, key_heads, width = cells.shape
    heads = kinds * key_heads
    starts, ends, count = find_runs(pages, offsets, kv.shape[1], rows)
    own = jnp.minimum(starts, num_tokens - 1)  # past the last run there is nothing to find
    scalars = starts, ends - starts, pages[own], offsets[own], jnp.stack((count, layer))
    tile = (IN_FLIGHT, kinds, key_heads, rows, width)
    call = pl.pallas_call(
        functools.partial(_kernel, rows=rows),
        out_shape=jax.ShapeDtypeStruct(kv.shape, kv.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(cores,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((IN_FLIGHT, rows, heads, width), kv.dtype),
                pltpu.VMEM(tile, kv.dtype),
                *[pltpu.SemaphoreType.DMA((IN_FLIGHT,))] * 3,
            ],
        ),
        input_output_aliases={len(scalars) + 1: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="write_kv",
    )
    return call(*scalars, cells.reshape(num_tokens, heads, width), kv)


def find_runs(
    pages: Int[Array, "T"], offsets: Int[Array, "T"], num_pages: int, rows: int
) -> tuple[Int[Array, "T"], Int[Array, "T"], Int[Array, ""]]:
    """First and one past the last row of each run of consecutive cells in a tile of `rows`, and the number of runs.

    All layers of a step share them, and XLA computes them once.
    """
    total = pages.shape[0]
    row = jnp.arange(total, dtype=jnp.int32)
    kept = (pages >= 0) & (pages < num_pages)
    follows = jnp.concatenate([
        jnp.zeros(1, bool),
        kept[:-1] & (pages[1:] == pages[:-1]) & (offsets[1:] == offsets[:-1] + 1) & (offsets[1:] % rows != 0),
    ])  # fmt: skip
    first = kept & ~follows
    last = kept & ~jnp.concatenate([follows[1:], jnp.zeros(1, bool)])
    starts, ends = (jnp.sort(jnp.where(edge, row, total)) for edge in (first, last))
    return starts, ends + 1, jnp.sum(first, dtype=jnp.int32)


def _kernel(
    starts_ref: Ref,  # int32 [T] first row of each run,
    sizes_ref: Ref,  # int32 [T] how many rows,
    pages_ref: Ref,  # int32 [T] their page
    offsets_ref: Ref,  # int32 [T] and where in it
    counts_ref: Ref,  # int32 [2]: runs, layer
    cells_ref: Ref,  # [T heads H], in HBM
    _: Ref,
    kv_ref: Ref,  # [L pages kinds K p H], in HBM
    incoming: Ref,
    tiles: Ref,
    cell_sems: Ref,
    tile_sems: Ref,
    out_sems: Ref,
    *,
    rows: int,
) -> None:
    core, cores = pl.program_id(0), pl.num_programs(0)
    mine = (counts_ref[0] - core + cores - 1) // cores
    layer = counts_ref[1]

    def place(number: Index) -> tuple[Index, Index, Index, Any]:
        """Of the core's item: first row, how many, their offset in the tile, and the tile in the cache."""
        run = core + number * cores
        offset = offsets_ref[run] & (rows - 1)  # masks, since remainders mind the sign
        tile = pl.ds(pl.multiple_of(offsets_ref[run] - offset, rows), rows)
        return starts_ref[run], sizes_ref[run], offset, kv_ref.at[layer, pages_ref[run], :, :, tile]

    def bring(number: Index) -> Any:
        slot, (start, count, offset, _) = number & (IN_FLIGHT - 1), place(number)
        source, target = cells_ref.at[pl.ds(start, count)], incoming.at[slot, pl.ds(offset, count)]
        return pltpu.make_async_copy(source, target, cell_sems.at[slot])

    def fetch(number: Index) -> Any:
        slot = number & (IN_FLIGHT - 1)
        return pltpu.make_async_copy(place(number)[3], tiles.at[slot], tile_sems.at[slot])

    def store(number: Index) -> Any:
        slot = number & (IN_FLIGHT - 1)
        return pltpu.make_async_copy(tiles.at[slot], place(number)[3], out_sems.at[slot])

    def begin(number: Index) -> None:
        bring(number).start()

        @pl.when(place(number)[1] < rows)
        def _partial() -> None:
            fetch(number).start()

    def finish(number: Index) -> None:
        slot, (_, count, offset, _) = number & (IN_FLIGHT - 1), place(number)
        bring(number).wait()

        @pl.when(count < rows)
        def _partial() -> None:
            fetch(number).wait()

        found = jnp.swapaxes(incoming[slot].astype(jnp.float32), 0, 1).reshape(tiles.shape[1:])
        row = lax.broadcasted_iota(jnp.int32, tiles.shape[1:], 2)
        new = (row >= offset) & (row < offset + count)
        tiles[slot] = jnp.where(new, found, tiles[slot].astype(jnp.float32)).astype(tiles.dtype)
        store(number).start()

    def turn(number: Index, _: None) -> None:
        @pl.when(number >= IN_FLIGHT)
        def _slot_is_free() -> None:
            store(number - IN_FLIGHT).wait()

        pl.when(number < mine)(lambda: begin(number))
        pl.when((number >= AHEAD) & (number < mine + AHEAD))(lambda: finish(number - AHEAD))

    lax.fori_loop(0, mine + IN_FLIGHT, turn, None)
