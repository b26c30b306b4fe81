"""The gated feed-forward layer for Hopper in Pallas Mosaic GPU.

Few tokens are bound by reading the weights and take one kernel. Between two kernels the memory idles for some
microseconds. Here, while all CTAs finish the activations and wait for each other at a counter in global memory, the
first weights of the second product arrive in shared memory already.

Clusters of two CTAs, one per SM and all resident at once, each own 64 outputs of the second product, of whose sums
either computes one half; they exchange halves through shared memory and add them up in a fixed order. The inner
features are dealt out in tiles of 32, whose weights for gate and up are the 64 rows of a wgmma.

More tokens take a kernel for gate, up and activation (`hopper_tiled`), and the second product is a plain one.
"""

from collections.abc import Callable

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.gated_mlp import hopper_tiled
from pallas_kernels.gated_mlp.mosaic_gpu_kernel import Sizes, kernel, scratch
from pallas_kernels.matmul.hopper import TILE
from pallas_kernels.platform import require_hopper
from pallas_kernels.tuning import tuned

Shaped = jax.Array | jax.ShapeDtypeStruct


def gated_mlp(
    x: Float[Array, "T D"],
    gate_up: Float[Array, "F 2 D"],
    down: Float[Array, "E F"],
    activation: Callable[[Array], Array],
    product: Callable[[Array, Array], Array],
) -> Float[Array, "T E"]:
    """See `pallas_kernels.gated_mlp.gated_mlp`."""
    if check(x, gate_up, down, activation, require_hopper()) == "tiled":
        return product(hopper_tiled.call(x, gate_up), down)
    return call(x, gate_up, down)


def check(x: Shaped, gate_up: Shaped, down: Shaped, activation: Callable[[Array], Array], multiprocessors: int) -> str:
    """Which kernel serves, "stream" for few tokens or "tiled".

    Raises:
        NotImplementedError: neither was measured to be faster than XLA on an H100; it names the values.
    """
    (tokens, width), (outputs, inner) = x.shape, down.shape
    dtypes = {str(array.dtype) for array in (x, gate_up, down)}
    if dtypes != {"bfloat16"}:
        raise NotImplementedError(f"dtypes are {sorted(dtypes)}, not bfloat16")
    if activation is not jax.nn.silu:
        raise NotImplementedError(f"{activation=}, not jax.nn.silu")
    this = {"width": width, "inner": inner, "outputs": outputs}
    measured = [one for one in tuned("hopper", "gated_mlp")["faster"] if this.items() <= one.items()]
    kinds = [kind for one in measured for kind in ("stream", "tiled") if tokens in one[kind]]
    if not kinds:
        raise NotImplementedError(
            f"not known to be faster for {tokens} tokens, {width} -> {inner} -> {outputs} features"
        )
    if kinds[0] == "stream":
        require_room(outputs, multiprocessors)
    return kinds[0]


def require_room(outputs: int, multiprocessors: int) -> None:
    """Raise `NotImplementedError` unless all CTAs of the kernel for few tokens run at once, since they wait for all."""
    if outputs // TILE * 2 > multiprocessors:
        raise NotImplementedError(f"{outputs // TILE * 2} CTAs at once on {multiprocessors} multiprocessors")


@jax.jit
def call(x: Float[Array, "T D"], gate_up: Float[Array, "F 2 D"], down: Float[Array, "E F"]) -> Float[Array, "T E"]:
    """The kernel for few tokens, whether or not it is faster than XLA; see `require_room`.

    Raises:
        NotImplementedError: it cannot serve these shapes; the message names the values.
    """
    (tokens, width), (outputs, inner) = x.shape, down.shape
    sizes = Sizes.fit(tokens, width, inner, outputs, x.dtype)

    def gated_mlp_stream(*refs: object) -> None:  # names the kernel in profiles
        kernel(sizes, *refs)

    shapes = (jax.ShapeDtypeStruct((tokens, features), x.dtype) for features in (inner, outputs))
    return plgpu.kernel(
        gated_mlp_stream,
        out_type=tuple(shapes),
        grid=(sizes.clusters,),
        grid_names=("cluster",),
        cluster=(2,),
        cluster_names=("half",),
        num_threads=2,
        thread_name="wg",
        scratch_types=scratch(sizes),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(x, gate_up, down)[1]
