"""Paged attention for long chunks on Hopper: bound by the tensor cores.

A work item is 128 query rows of one head. Two compute warpgroups of 64 rows each take turns on the tensor cores: one
multiplies while the other does its softmax (FlashAttention-3, Shah et al. 2024, https://arxiv.org/abs/2407.08608). A
third warpgroup fills a ring of key and value blocks, page by page, through TMA. CTAs are persistent, so that the next
item's queries, keys and values arrive while the current one finishes; items are dealt longest first, back and forth.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.hopper import PAGE, WG_ROWS, below, running_sum, swizzled
from pallas_kernels.attention.hopper_prefill_kernel import Sizes, kernel
from pallas_kernels.tuning import tuned

TILE_ROWS = 2 * WG_ROWS


@dataclass(frozen=True)
class PrefillConfig:
    """Sizes of the kernel.

    Attributes:
        ctas: persistent CTAs.
        block: keys per block, a multiple of `PAGE`.
        stages: blocks (key and value) in flight per CTA.
        shared: arriving queries and leaving results share a buffer; no queries are fetched ahead then.
    """

    ctas: int
    block: int
    stages: int
    shared: bool

    @classmethod
    def fit(cls, ctas: int, width: int) -> "PrefillConfig":
        """The sizes for 16-bit heads of this width."""
        wide = width > 128
        return cls(ctas, **tuned("hopper", "paged_attention")["wide" if wide else "long"], shared=wide)


def plan_prefill(
    cu_q_lens: Int[Array, "bounds"], kv_lens: Int[Array, "S"], num_tokens: int, min_q_len: int
) -> Int[Array, "words"]:
    """Query tiles of the sequences with at least `min_q_len` rows, longest first, and their number at the end."""
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    upto = running_sum(jnp.where(q_lens >= min_q_len, (q_lens + TILE_ROWS - 1) // TILE_ROWS, 0))
    tile = jnp.arange(num_tokens // TILE_ROWS + min(len(kv_lens), num_tokens // min_q_len), dtype=jnp.int32)
    seq = jnp.minimum(below(upto, tile), len(kv_lens) - 1)
    before = jnp.where(seq > 0, upto[seq - 1], 0)
    skipped = (tile - before) * TILE_ROWS
    rows = jnp.where(tile < upto[-1], jnp.clip(q_lens[seq] - skipped, 0, TILE_ROWS), 0)
    position = kv_lens[seq] - q_lens[seq] + skipped
    keys = jnp.where(rows > 0, position + rows, 0)
    words = jnp.stack([cu_q_lens[seq] + skipped, position, rows, seq, keys], axis=1)
    # Ranks from one fused comparison: a sort costs more than the kernel's smallest launches.
    longer = (keys[None] > keys[:, None]) | ((keys[None] == keys[:, None]) & (tile[None] < tile[:, None]))
    words = jnp.zeros_like(words).at[jnp.sum(longer, axis=1)].set(words)
    return jnp.append(words.reshape(-1), upto[-1]).astype(jnp.int32)


def prefill_attention(
    q: Float[Array, "T N H"],
    kv: Float[Array, "L pages 2 K p H"],
    layer: int | Int[Array, ""],
    page_table: Int[Array, "S P"],
    plan: Int[Array, "words"],
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    config: PrefillConfig,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "T N H"]:
    """Attention of the rows in the plan; the other rows of the result are undefined."""
    num_tokens, heads, width = q.shape
    sizes = Sizes(
        config.ctas, config.block, config.stages, config.shared, heads, heads // kv.shape[3], width, q.dtype, scale,
        window, soft_cap, interpret is not None,
    )  # fmt: skip
    if sizes.interpreted:  # the interpreter clamps boxes past the end, TMA fills them with zeros
        q = jnp.pad(q, ((0, TILE_ROWS), (0, 0), (0, 0)))

    def paged_attention_prefill(*refs: Any) -> None:  # names the kernel in profiles
        kernel(sizes, *refs)

    return plgpu.kernel(
        paged_attention_prefill,
        out_type=jax.ShapeDtypeStruct((num_tokens, heads, width), q.dtype),
        grid=(config.ctas,),
        grid_names=("cta",),
        num_threads=3,
        thread_name="wg",
        interpret=interpret,
        scratch_types=_scratch(sizes),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=128),
    )(jnp.reshape(jnp.asarray(layer, jnp.int32), 1), page_table, plan, q, kv)


def _scratch(sizes: Sizes) -> list[Any]:
    """Shared memory and barriers, in the order of `Refs`."""
    stages, block, pages = sizes.stages, sizes.block, sizes.block // PAGE

    def barriers(number: int, arrivals: int = 1) -> plgpu.Barrier:
        return plgpu.Barrier(num_barriers=number, num_arrivals=arrivals)

    def tiled(*shape: int) -> pl.MemoryRef:
        return plgpu.SMEM(shape, sizes.dtype, transforms=swizzled(2 * shape[-1]))

    plain = plgpu.SMEM((2, WG_ROWS, sizes.width), sizes.dtype)
    return [
        tiled(2, WG_ROWS, sizes.width),
        plain,
        None if sizes.shared else plain,
        tiled(stages, block, sizes.width),
        tiled(stages, block, sizes.width),
        tiled(2, WG_ROWS, block) if sizes.interpreted else None,
        barriers(2),
        barriers(2),
        barriers(stages, pages),
        barriers(stages, pages),
        barriers(stages, 2),
        barriers(stages, 2),
        barriers(1, 2),
    ]
