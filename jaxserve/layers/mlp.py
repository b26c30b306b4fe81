"""The gated feed-forward block."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxserve.layers.linear import Linear, contract
from pallas_kernels.gated_mlp import gated_mlp
from pallas_kernels.gated_mlp.reference import gated

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {
        "silu": jax.nn.silu,
        "gelu": partial(jax.nn.gelu, approximate=False),
        "gelu_new": partial(jax.nn.gelu, approximate=True),
        "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    }
)


class GatedMLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))`, gate and up in one projection `[F, 2]` (Shazeer, 2020, GLU variants)."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, activation: str, *, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        width, inner = (("D", hidden_size),), ("F", intermediate_size)
        self.gate_up = Linear(width, (inner, (None, 2)), bias=bias, dtype=dtype, rngs=rngs)
        self.down = Linear((inner,), width, bias=bias, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        activation = ACTIVATIONS[self.activation]
        with jax.named_scope("mlp"):
            if self.gate_up.bias is None and self.down.bias is None:
                return gated_mlp(x, self.gate_up.kernel[...], self.down.kernel[...], activation, contract)
            return self.down(gated(self.gate_up(x), activation))
