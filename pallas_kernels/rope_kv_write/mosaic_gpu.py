"""Head norms, rotary embedding and cache write for Hopper in Pallas Mosaic GPU.

One block serves one token: TMA brings its heads into shared memory, where queries and keys are normed and rotated in
place; values never pass through registers. TMA also takes the results to the query array and to the token's rows in
the cache, which is updated in place. Three copies each way move everything, whatever the number of heads.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.platform import require_hopper

VECTOR = 4  # consecutive features in a thread
WARPS, LANES = 4, 32
MAX_SMEM = 64 * 1024  # bytes of one token's heads, so that several blocks share a multiprocessor
MAX_BOX = 256  # elements of a TMA box along one axis


def rope_kv_write(
    qkv: Float[Array, "T K heads H"],
    kv: Float[Array, "L pages kinds K p width"],
    layer: int | Int[Array, ""],
    cos: Float[Array, "T R"],
    sin: Float[Array, "T R"],
    pages: Int[Array, "T"],
    offsets: Int[Array, "T"],
    *,
    q_scale: Float[Array, "H"] | None = None,
    k_scale: Float[Array, "H"] | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
) -> tuple[Float[Array, "T N H"], Float[Array, "L pages kinds K p width"]]:
    """See `pallas_kernels.rope_kv_write.rope_kv_write`."""
    require_hopper()
    check(qkv, kv, cos, q_scale is not None or k_scale is not None)
    return call(
        qkv, kv, layer, cos, sin, pages, offsets,
        q_scale=q_scale, k_scale=k_scale, norm_eps=norm_eps, norm_offset=norm_offset,
    )  # fmt: skip


def check(qkv: Array, kv: Array, cos: Array, norm: bool) -> None:
    """Raise `NotImplementedError`, naming the values, for what the kernel does not serve."""
    _, num_kv, heads, width = qkv.shape
    half = cos.shape[1]
    if kv.shape[2] != 2 or kv.shape[5] != width:
        raise NotImplementedError(f"pages that hold {kv.shape[2]} x {kv.shape[5]} for heads of {width} features")
    if qkv.dtype != kv.dtype or qkv.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"dtypes of qkv and kv are {qkv.dtype} and {kv.dtype}, not one 16-bit float")
    if half % 8 or width % 8 or cos.dtype != jnp.float32:
        raise NotImplementedError(f"{half} rotated pairs of {width} features, not multiples of 8 with float32 tables")
    if num_kv * width % 64:
        raise NotImplementedError(f"{num_kv} KV heads of {width} features, which TMA moves in multiples of 64")
    if norm and width != 2 * half:
        raise NotImplementedError(f"norms with partly rotated heads ({2 * half} of {width} features)")
    if num_kv * heads * width * 2 > MAX_SMEM or max(num_kv, heads, width) > MAX_BOX:
        raise NotImplementedError(f"{num_kv} x {heads} heads of {width} features are too large for one block")


def row_layout(half: int) -> tuple[Any, int]:
    """How `[rows, half]` lies in registers, and the rows it comes in multiples of; a row is within one warp."""
    width = min(half & -half, 64)  # a power of two that divides it
    rows = LANES // (width // VECTOR)
    tiling = plgpu.Tiling(((WARPS * rows, width), (rows, width), (VECTOR,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1), WARPS * rows


def call(
    qkv: Float[Array, "T K heads H"],
    kv: Float[Array, "L pages 2 K p H"],
    layer: int | Int[Array, ""],
    cos: Float[Array, "T R"],
    sin: Float[Array, "T R"],
    pages: Int[Array, "T"],
    offsets: Int[Array, "T"],
    *,
    q_scale: Float[Array, "H"] | None,
    k_scale: Float[Array, "H"] | None,
    norm_eps: float,
    norm_offset: float,
    interpret: Any = None,
) -> tuple[Float[Array, "T N H"], Float[Array, "L pages 2 K p H"]]:
    """The kernel without its checks of platform and shapes; `interpret` as `plgpu.kernel` takes it."""
    tokens, num_kv, heads, width = qkv.shape
    group, half, dtype = heads - 2, cos.shape[1], qkv.dtype
    layout, multiple = row_layout(half)
    scales = {0: q_scale, 1: k_scale}
    given = [i for i in scales if scales[i] is not None]

    def padded(rows: int) -> Any:  # whole register tiles; the rows past the end are computed and never stored
        return plgpu.SMEM((pl.cdiv(rows, multiple) * multiple, width), dtype)

    # The interpreter knows no reshaped references: there, one copy moves the queries of one KV head.
    def smem_parts(rows_ref: Any) -> list[Any]:
        if interpret is None:
            return [rows_ref.at[pl.ds(0, num_kv * group)].reshape(num_kv, group, width)]
        return [rows_ref.at[pl.ds(k * group, group)] for k in range(num_kv)]

    def query_parts(token_ref: Any) -> list[Any]:
        if interpret is None:
            return [token_ref.at[:, pl.ds(0, group)]]
        return [token_ref.at[k, pl.ds(0, group)] for k in range(num_kv)]

    def spread(x: Array, axis: int, shape: tuple[int, ...]) -> Array:
        return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, (axis,)), layout)

    def body(layer_ref, qkv_ref, cos_ref, sin_ref, page_ref, offset_ref, *refs):
        scale_refs = dict(zip(given, refs, strict=False))
        kv_ref, q_out, q_s, k_s, v_s, q_loaded, k_loaded, v_loaded = refs[len(given) :]
        t = lax.axis_index("token")
        keys = k_s.at[pl.ds(0, num_kv)]
        for source, target in zip(query_parts(qkv_ref.at[t]), smem_parts(q_s), strict=True):
            plgpu.copy_gmem_to_smem(source, target, q_loaded)
        plgpu.copy_gmem_to_smem(qkv_ref.at[t, :, group], keys, k_loaded)
        plgpu.copy_gmem_to_smem(qkv_ref.at[t, :, group + 1], v_s, v_loaded)
        page, offset, which = page_ref[t], offset_ref[t], layer_ref[0]
        kept = (page >= 0) & (page < kv.shape[1])
        table = layout.reduce(0)
        c, s = (plgpu.load(ref.at[t], layout=table, optimized=False) for ref in (cos_ref, sin_ref))

        def turn(i: int, rows_ref: Any) -> None:
            """Norm and rotate all rows in place."""
            first, second = (
                plgpu.load(rows_ref.at[:, pl.ds(j * half, half)], layout=layout, optimized=False).astype(jnp.float32)
                for j in range(2)
            )
            shape = first.shape
            if i in scale_refs:
                mean = (first * first + second * second).sum(axis=1) / width
                inverse = spread(lax.rsqrt(mean + norm_eps), 0, shape)
                scale = [
                    plgpu.load(scale_refs[i].at[pl.ds(j * half, half)], layout=table, optimized=False) for j in range(2)
                ]
                first, second = (
                    (x * inverse * spread(y.astype(jnp.float32) + norm_offset, 1, shape))
                    .astype(dtype)
                    .astype(jnp.float32)
                    for x, y in zip((first, second), scale, strict=True)
                )
            wide_c, wide_s = (spread(x, 1, shape) for x in (c, s))
            rows_ref[:, pl.ds(0, half)] = (first * wide_c - second * wide_s).astype(dtype)
            rows_ref[:, pl.ds(half, half)] = (second * wide_c + first * wide_s).astype(dtype)

        plgpu.barrier_wait(q_loaded)
        turn(0, q_s)
        plgpu.commit_smem()
        for source, target in zip(smem_parts(q_s), query_parts(q_out.at[t]), strict=True):
            plgpu.copy_smem_to_gmem(source, target)
        plgpu.barrier_wait(k_loaded)
        turn(1, k_s)
        plgpu.commit_smem()
        plgpu.barrier_wait(v_loaded)

        @pl.when(kept)
        def _():
            plgpu.copy_smem_to_gmem(keys, kv_ref.at[which, page, 0, :, offset])
            plgpu.copy_smem_to_gmem(v_s, kv_ref.at[which, page, 1, :, offset])

        plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((tokens, num_kv, group, width), dtype),
        grid=(tokens,),
        grid_names=("token",),
        num_threads=1,
        thread_name="wg",
        scratch_types=[
            padded(num_kv * group),
            padded(num_kv),
            plgpu.SMEM((num_kv, width), dtype),
            plgpu.Barrier(num_arrivals=1 if interpret is None else num_kv),
            plgpu.Barrier(),
            plgpu.Barrier(),
        ],
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    cache = jax.new_ref(kv)
    extra = [scales[i] for i in given]
    q = kernel(jnp.full(1, layer, jnp.int32), qkv, cos, sin, pages, offsets, *extra, cache)
    return q.reshape(tokens, num_kv * group, width), jax.freeze(cache)
