"""Rotary position embedding (Su et al., 2021, RoFormer)."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

Tables = tuple[Array, Array]  # cos and sin, float32 [T, R], R = half the number of rotated features


@dataclass(frozen=True)
class Rope:
    """One kind of rotary embedding.

    Attributes:
        inv_freq: radians per position of each of the `R` rotated pairs, float32 values. The first `2 R` features of a
            head are rotated, the rest pass unchanged.
        scale: factor of the rotated features (the "attention factor" of YaRN and LongRoPE).
    """

    inv_freq: tuple[float, ...]
    scale: float = 1.0

    def tables(self, positions: Int[Array, "T"]) -> Tables:
        """Cosine and sine of every position, computed once per step and shared by all layers of this kind."""
        angles = positions[:, None].astype(jnp.float32) * np.asarray(self.inv_freq, np.float32)
        return jnp.cos(angles) * self.scale, jnp.sin(angles) * self.scale
