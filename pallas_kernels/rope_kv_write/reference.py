"""Head norms, rotary embedding and cache write in plain jax: the specification."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.kv_write import write_kv
from pallas_kernels.norm import rms_norm


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
    q = qkv[:, :, :-2].reshape(qkv.shape[0], -1, qkv.shape[-1])
    k, v = qkv[:, :, -2], qkv[:, :, -1]
    q = q if q_scale is None else rms_norm(q, q_scale, norm_eps, norm_offset)
    k = k if k_scale is None else rms_norm(k, k_scale, norm_eps, norm_offset)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return q, write_kv(kv, layer, k.astype(kv.dtype), v.astype(kv.dtype), pages, offsets)


def rotate(
    x: Float[Array, "T heads H"], cos: Float[Array, "T R"], sin: Float[Array, "T R"]
) -> Float[Array, "T heads H"]:
    """Rotate feature `i` with feature `i + R`, for `i < R`, in float32."""
    half = cos.shape[-1]
    wide = x.astype(jnp.float32)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if rest.shape[-1] == 0 else jnp.concatenate([turned, rest], axis=-1)
