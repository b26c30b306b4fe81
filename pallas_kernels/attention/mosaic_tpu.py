"""Ragged paged attention for TPUs (Pallas Mosaic TPU): one kernel streams the pages of tile after tile of query rows.

A tile is a sequence, or a part of one, whose query rows see one run of cache blocks. All key heads of a tile are served
at once, so that a page is one contiguous copy; the copy of the next block, be it of the next tile, runs beside the
products of this one. Sequences with few rows are one small tile each, longer ones are cut into large tiles.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.mosaic_tpu_kernel import COLUMNS, LANES, SUBLANES, Sizes, kernel
from pallas_kernels.platform import require_tpu
from pallas_kernels.tuning import tuned


@dataclasses.dataclass(frozen=True)
class TpuConfig:
    """Sizes of the kernel's blocks.

    Attributes:
        short_rows: rows of a sequence up to which it is one small tile.
        long_rows: rows of the tiles that longer sequences are cut into.
        block_tokens: cached positions that are copied at once, at most.
        unrolled_rows: rows of a tile times query heads per key head, up to which the key heads run side by side; more
            keep the units busy by themselves, and are slow to compile.
        cores: that the tiles are dealt to.
        vmem_bytes, smem_bytes: vector and scalar memory of a core that the kernel may use.
    """

    short_rows: int
    long_rows: int
    block_tokens: int
    unrolled_rows: int
    cores: int
    vmem_bytes: int
    smem_bytes: int

    @classmethod
    def of(cls, info: pltpu.TpuInfo) -> "TpuConfig":
        """For a generation; a part of each memory is left to the compiler."""
        vmem, smem = info.vmem_capacity_bytes * 3 // 4, info.smem_capacity_bytes * 3 // 4
        return cls(
            **tuned(f"tpu_{info.chip_version}", "paged_attention"),
            cores=info.num_cores,
            vmem_bytes=vmem,
            smem_bytes=smem,
        )


def paged_attention(
    q: Float[Array, "T N H"],
    kv: Float[Array, "L pages kinds K p H"],
    layer: int | Int[Array, ""],
    page_table: Int[Array, "S P"],
    cu_q_lens: Int[Array, "S+1"],
    kv_lens: Int[Array, "S"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "T N H"]:
    """See `pallas_kernels.attention.paged_attention`."""
    config = TpuConfig.of(require_tpu())
    return tpu_attention(
        q, kv, layer, page_table, cu_q_lens, kv_lens, scale=scale, window=window, soft_cap=soft_cap, config=config
    )


def tpu_attention(
    q: Float[Array, "T N H"],
    kv: Float[Array, "L pages kinds K p H"],
    layer: int | Int[Array, ""],
    page_table: Int[Array, "S P"],
    cu_q_lens: Int[Array, "bounds"],
    kv_lens: Int[Array, "S"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    config: TpuConfig,
    interpret: Any = False,
) -> Float[Array, "T N H"]:
    """The op with given sizes, whatever this process runs on (to lower or to interpret it).

    Raises:
        NotImplementedError: what the kernel cannot serve, with its values.
    """
    # One traced function for all layers: lowering the kernel takes most of a second.
    return _attend(
        q,
        kv,
        jnp.asarray(layer, jnp.int32),
        page_table,
        cu_q_lens,
        kv_lens,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        config=config,
        interpret=interpret,
    )


@functools.partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "config", "interpret"))
def _attend(
    q: Float[Array, "T N H"],
    kv: Float[Array, "L pages kinds K p H"],
    layer: Int[Array, ""],
    page_table: Int[Array, "S P"],
    cu_q_lens: Int[Array, "bounds"],
    kv_lens: Int[Array, "S"],
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    config: TpuConfig,
    interpret: Any,
) -> Float[Array, "T N H"]:
    _check(q, kv)
    num_tokens, heads, width = q.shape
    num_pages, key_heads = kv.shape[1], kv.shape[3]
    seqs, pages_per_seq = page_table.shape
    sizes = fit(num_tokens, seqs, heads, kv, config, interpret=bool(interpret))
    tiles, count = plan(cu_q_lens, kv_lens, num_tokens, sizes, window)
    # In bounds whatever the caller left in unused entries.
    table, paired = pack_pages(jnp.clip(page_table, 0, num_pages - 1).reshape(-1), num_pages)
    scalars = tiles.reshape(-1), table, jnp.stack((count, cu_q_lens[-1], layer))
    words = sum(x.size for x in scalars)
    if words * 4 > config.smem_bytes:
        raise NotImplementedError(
            f"page tables of {seqs} sequences x {pages_per_seq} pages need {words * 4:,} bytes of scalar memory, "
            f"there are {config.smem_bytes:,}"
        )
    group = heads // key_heads
    call = pl.pallas_call(
        functools.partial(
            kernel,
            sizes=sizes,
            pages_per_seq=pages_per_seq,
            paired=paired,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
        ),
        out_shape=jax.ShapeDtypeStruct((num_tokens, key_heads, group, width), q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(config.cores,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=sizes.scratch(q.dtype, kv.dtype),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=config.vmem_bytes),
        interpret=interpret,
        name="paged_attention",
    )
    return call(*scalars, q.reshape(num_tokens, key_heads, group, width), kv).reshape(q.shape)


def pack_pages(pages: Int[Array, "n"], num_pages: int) -> tuple[Int[Array, "words"], bool]:
    """The page table for scalar memory, which long contexts of many sequences fill; and whether a word holds two."""
    if num_pages > 1 << 16:
        return pages, False
    half = -(-len(pages) // 2)
    return pages[:half] | (jnp.pad(pages[half:], (0, 2 * half - len(pages))) << 16), True


def _check(q: Float[Array, "T N H"], kv: Float[Array, "L pages kinds K p H"]) -> None:
    if q.dtype != kv.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"queries {q.dtype} and cache {kv.dtype} must both be bfloat16 or both float32")


def fit(
    num_tokens: int,
    seqs: int,
    heads: int,
    kv: Float[Array, "L pages kinds K p H"],
    config: TpuConfig,
    *,
    interpret: bool = False,
) -> Sizes:
    """The largest blocks up to the configured ones that the vector memory holds.

    Raises:
        NotImplementedError: not even the smallest fit, or the compiler cannot tile these pages.
    """
    kinds, key_heads, page, width = kv.shape[2:]
    packed = SUBLANES * 4 // kv.dtype.itemsize
    if not interpret and (page % packed or width % LANES):
        raise NotImplementedError(f"pages of {page} x {width}, the kernel serves multiples of {packed} x {LANES}")
    short = 1 if num_tokens == seqs else min(config.short_rows, num_tokens)
    long = short if num_tokens <= short or num_tokens == seqs else min(config.long_rows, num_tokens)
    pages = max(config.block_tokens // page, 1)
    while True:
        sizes = Sizes(short, long, pages, page, kinds, key_heads, heads // key_heads, width, config.unrolled_rows)
        needed = sizes.vmem_bytes(kv.dtype.itemsize)
        if needed <= config.vmem_bytes:
            return sizes
        if long > max(short, SUBLANES) and long * sizes.group >= pages * page:
            long //= 2
        elif pages > 1:
            pages //= 2
        elif long > max(short, SUBLANES):
            long //= 2
        else:
            raise NotImplementedError(
                f"{key_heads} key heads with pages of {page} x {width} need {needed:,} bytes of vector memory, "
                f"there are {config.vmem_bytes:,}"
            )


def plan(
    cu_q_lens: Int[Array, "bounds"], kv_lens: Int[Array, "S"], num_tokens: int, sizes: Sizes, window: int | None
) -> tuple[Int[Array, "tiles columns"], Int[Array, ""]]:
    """Cut every sequence's rows into tiles, the table's columns being `COLUMNS`; and how many tiles there are."""
    starts, ends = cu_q_lens[:-1], cu_q_lens[1:]
    rows = ends - starts
    size = jnp.where(rows <= sizes.short_rows, sizes.short_rows, sizes.long_rows)
    counts = (rows + size - 1) // size
    upto = jnp.cumsum(counts, dtype=jnp.int32)
    tile = jnp.arange(num_tokens // sizes.long_rows + len(counts), dtype=jnp.int32)
    seq = jnp.minimum(jnp.sum(upto[None] <= tile[:, None], axis=1, dtype=jnp.int32), len(counts) - 1)
    first = starts[seq] + (tile - (upto - counts)[seq]) * size[seq]
    count = jnp.minimum(size[seq], ends[seq] - first)
    position = kv_lens[seq] - ends[seq] + first  # of the first row
    block = sizes.block_tokens
    low = jnp.zeros_like(first) if window is None else jnp.maximum(position - window + 1, 0) // block
    high = jnp.maximum((position + count + block - 1) // block, low + 1)
    columns = {"seq": seq, "first": first, "count": count, "position": position, "low": low, "high": high}
    return jnp.stack([columns[name] for name in COLUMNS], axis=1).astype(jnp.int32), upto[-1]
