"""How the keys and values of a head lie in a page of the cache.

A page holds `[kinds, K, p, width]`. Usually there are two kinds, key and value, of the head's own width. TPUs keep the
last axis in lanes of 128, and XLA lays out arrays that do not fill them in an order that no kernel can use. There heads
are widened to whole lanes; narrow ones share them, the key in the first half and the value in the second, in a page of
one kind. Both stay invisible outside the ops: queries get zeros where there is no key, results lose what is no value.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

TPU_LANES = 128


def page_layout(head_width: int, *, lanes: int | None = None) -> tuple[int, int]:
    """Kinds and width of a page for heads of a width, on a device that tiles the last axis by `lanes`, or does not."""
    if lanes is None:
        return 2, head_width
    if 2 * head_width <= lanes:
        return 1, lanes
    return 2, -(-head_width // lanes) * lanes


def as_cells(
    k: Float[Array, "T K H"], v: Float[Array, "T K H"], kinds: int, width: int
) -> Float[Array, "T kinds K width"]:
    """Keys and values as a page of this layout holds them."""
    if kinds == 2:
        return _widened(jnp.stack((k, v), axis=1), width)
    return jnp.concatenate((_widened(k, width // 2), _widened(v, width // 2)), axis=-1)[:, None]


def as_queries(q: Float[Array, "T N H"], width: int) -> Float[Array, "T N width"]:
    """Queries whose products with such cells are those with the keys."""
    return _widened(q, width)


def from_values(out: Float[Array, "T N width"], head_width: int, kinds: int) -> Float[Array, "T N H"]:
    """Of a mix of such cells, the mix of the values."""
    if out.shape[-1] == head_width:
        return out
    start = 0 if kinds == 2 else out.shape[-1] // 2
    return out[..., start : start + head_width]


def _widened(x: Array, width: int) -> Array:
    missing = width - x.shape[-1]
    return x if missing == 0 else jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
