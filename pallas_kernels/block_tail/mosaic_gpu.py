"""The second half of a layer for Hopper in Pallas Mosaic GPU: one kernel for few tokens, bound by reading weights.

It is the kernel of the gated feed-forward layer with a product before it, the projection of the heads. Each cluster of
two CTAs owns 64 outputs of this product as well and adds them to what went into the layer. All CTAs need the sums of
squares of whole rows for the norm, and wait for each other a second time; the weights that are wanted next arrive in
shared memory meanwhile. A token's factor is the same for all features, so it is applied after the product with gates
and ups, of which the tokens that go into it know nothing but the norm's scales.

A lone token takes another kernel (`lone`), where a layer's weights fit the shared memory of all multiprocessors.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.block_tail import lone
from pallas_kernels.block_tail.mosaic_gpu_kernel import MAX_CLUSTERS, kernel, scratch
from pallas_kernels.gated_mlp.mosaic_gpu import require_room
from pallas_kernels.gated_mlp.mosaic_gpu_kernel import Sizes
from pallas_kernels.platform import require_hopper
from pallas_kernels.tuning import tuned

Shaped = jax.Array | jax.ShapeDtypeStruct


def block_tail(
    x: Float[Array, "T D"],
    heads: Float[Array, "T N"],
    projection: Float[Array, "D N"],
    scale: Float[Array, "D"],
    gate_up: Float[Array, "F 2 D"],
    down: Float[Array, "D F"],
    activation: Callable[[Array], Array],
    product: Callable[[Array, Array], Array],
    *,
    norm_eps: float,
    norm_offset: float = 0.0,
) -> Float[Array, "T D"]:
    """See `pallas_kernels.block_tail.block_tail`."""
    del product  # there are none outside the kernel
    multiprocessors = require_hopper()
    arrays = x, heads, projection, scale, gate_up, down
    if check(arrays, activation, norm_offset) == "lone":
        return lone.call(*arrays, norm_eps=norm_eps, multiprocessors=multiprocessors)
    require_room(len(down), multiprocessors)
    return call(*arrays, norm_eps=norm_eps)


def check(arrays: tuple[Shaped, ...], activation: Callable[[Array], Array], norm_offset: float) -> str:
    """Which kernel serves the arrays of the op: "lone" for one token and small models, or "stream".

    Raises:
        NotImplementedError: neither was measured to be faster than XLA on an H100; it names the values.
    """
    x, heads, _, _, _, down = arrays
    (tokens, width), inner, inputs = x.shape, down.shape[1], heads.shape[1]
    dtypes = {str(array.dtype) for array in arrays}
    if dtypes != {"bfloat16"}:
        raise NotImplementedError(f"dtypes are {sorted(dtypes)}, not bfloat16")
    if activation is not jax.nn.silu or norm_offset:
        raise NotImplementedError(f"{activation=} and {norm_offset=}, not jax.nn.silu and 0")
    this = {"heads": inputs, "width": width, "inner": inner}
    measured = [one for one in tuned("hopper", "block_tail")["faster"] if this.items() <= one.items()]
    kinds = [kind for one in measured for kind in ("lone", "stream") if tokens in one[kind]]
    if not kinds:
        raise NotImplementedError(
            f"not known to be faster for {tokens} tokens, heads of {inputs} features, width {width}, {inner} inner"
        )
    return kinds[0]


@jax.jit(static_argnames="norm_eps")
def call(
    x: Float[Array, "T D"],
    heads: Float[Array, "T N"],
    projection: Float[Array, "D N"],
    scale: Float[Array, "D"],
    gate_up: Float[Array, "F 2 D"],
    down: Float[Array, "D F"],
    *,
    norm_eps: float,
) -> Float[Array, "T D"]:
    """The kernel, whether or not it is faster than XLA; see `require_room`.

    Raises:
        NotImplementedError: it cannot serve these shapes; the message names the values.
    """
    (tokens, width), inner = x.shape, len(gate_up)
    sizes = Sizes.fit(tokens, width, inner, width, x.dtype, heads.shape[1])
    if sizes.clusters > MAX_CLUSTERS:
        raise NotImplementedError(f"{width=} is more than {MAX_CLUSTERS * width // sizes.clusters}")

    def block_tail_stream(*refs: object) -> None:  # names the kernel in profiles
        kernel(sizes, norm_eps, *refs)

    squares = jax.ShapeDtypeStruct((sizes.clusters, 2 * sizes.share), jnp.float32)
    results = (jax.ShapeDtypeStruct((tokens, features), x.dtype) for features in (width, inner, width))
    return plgpu.kernel(
        block_tail_stream,
        out_type=(squares, *results),
        grid=(sizes.clusters,),
        grid_names=("cluster",),
        cluster=(2,),
        cluster_names=("half",),
        num_threads=2,
        thread_name="wg",
        scratch_types=scratch(sizes),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(x, heads, projection, scale, gate_up, down)[-1]
