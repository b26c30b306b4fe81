"""Ragged paged attention for Hopper GPUs (Pallas Mosaic GPU): decodes and short chunks stream, long chunks multiply."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.hopper import PAGE, WG_ROWS, swizzled
from pallas_kernels.attention.hopper_prefill import PrefillConfig, plan_prefill, prefill_attention
from pallas_kernels.attention.hopper_stream import StreamConfig, plan_stream, stream_attention
from pallas_kernels.platform import require_hopper
from pallas_kernels.tuning import tuned


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
    ctas = require_hopper()
    return hopper_attention(
        q, kv, layer, page_table, cu_q_lens, kv_lens, scale=scale, window=window, soft_cap=soft_cap, ctas=ctas
    )


def hopper_attention(
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
    ctas: int = 132,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "T N H"]:
    """The op for a device with `ctas` SMs, whatever this process runs on (to lower or to interpret it).

    Raises:
        NotImplementedError: what the kernels cannot serve, with its values.
    """
    _check(q, kv)
    _check_table(page_table)
    num_tokens, heads, width = q.shape
    key_heads, seqs = kv.shape[3], kv_lens.shape[0]
    config = StreamConfig.fit(ctas, heads // key_heads, width, mixed=num_tokens != seqs)
    config = dataclasses.replace(config, whole=interpret is not None)
    tokens = config.tile_tokens(heads // key_heads)
    # In bounds whatever the caller left in unused entries, and never a slice of something: operands must be aligned.
    page_table = jnp.clip(page_table, 0, kv.shape[1] - 1)
    options = {"scale": scale, "window": window, "soft_cap": soft_cap, "interpret": interpret}
    if num_tokens in (1, seqs):
        tiles, longest = num_tokens, num_tokens
    else:
        longest = short_rows()
        tiles = min(seqs * -(-longest // tokens), seqs + num_tokens // tokens)
    plan = plan_stream(cu_q_lens, kv_lens, page_table, tiles, tokens, longest, key_heads, window, config)
    if num_tokens <= longest:
        out = stream_attention(q, kv, layer, plan, config=config, **options)
        return out.reshape(q.shape)
    _check_long(width)
    long_plan = plan_prefill(cu_q_lens, kv_lens, num_tokens, longest + 1)
    long = prefill_attention(
        q, kv, layer, page_table, long_plan, config=PrefillConfig.fit(ctas, width), **options
    )  # fmt: skip
    out = jax.new_ref(long.reshape(num_tokens * heads, width))
    return stream_attention(q, kv, layer, plan, config=config, out=out, **options).reshape(q.shape)


def short_rows() -> int:
    """Rows of a sequence up to which reading its cache costs more than multiplying with it."""
    return tuned("hopper", "paged_attention")["short_rows"]


def _check(q: Float[Array, "T N H"], kv: Float[Array, "L pages kinds K p H"]) -> None:
    if q.dtype != kv.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"queries {q.dtype} and cache {kv.dtype} must both be bfloat16 or both float16")
    if kv.shape[2] != 2:
        raise NotImplementedError("keys and values side by side in a page")
    if kv.shape[4] != PAGE:
        raise NotImplementedError(f"pages of {kv.shape[4]} tokens, the kernel serves {PAGE}")
    group, width = q.shape[1] // kv.shape[3], q.shape[2]
    if group > WG_ROWS:
        raise NotImplementedError(f"{group} query heads per key head, the kernel serves up to {WG_ROWS}")
    if width > 256:
        raise NotImplementedError(f"heads of width {width}, the kernel serves up to 256")
    if group * width % 64:
        raise NotImplementedError(f"{group=} x {width=} is not a multiple of 64")
    swizzled(width * 2)


def _check_table(page_table: Int[Array, "S P"]) -> None:
    seqs, pages = page_table.shape
    if seqs << pages.bit_length() >= 1 << 31:
        raise NotImplementedError(f"{seqs} sequences of {pages} pages: their plan needs more than 31 bits")


def _check_long(width: int) -> None:
    if width % WG_ROWS:
        raise NotImplementedError(
            f"more than {short_rows()} rows with heads of {width=}: a lone row is no multiple of 128 bytes"
        )
