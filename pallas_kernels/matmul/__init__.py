"""Products of token rows with a weight matrix as checkpoints store it."""

from jaxtyping import Array, DTypeLike, Float

from pallas_kernels.dispatch import Op, only_on
from pallas_kernels.matmul import reference

OP = Op(
    "matmul",
    {"mosaic_gpu": only_on("gpu", "pallas_kernels.matmul.mosaic_gpu", "matmul"), "xla": reference.matmul},
)


def matmul(
    x: Float[Array, "T I"],
    weights: Float[Array, "O I"],
    out_dtype: DTypeLike | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "T O"]:
    """`y[t, o] = sum over i of x[t, i] * weights[o, i]`, accumulated in float32 or better.

    float32 operands are multiplied in full float32. The result has `out_dtype`, by default that of `x`.

    Raises:
        ValueError: the implementation is unknown.
        NotImplementedError: no implementation (or not the named one) serves these shapes.
    """
    return OP(implementation, x, weights, x.dtype if out_dtype is None else out_dtype)
