"""The paged key/value cache on the device, and where a step's tokens stand in it.

The pytrees are exempt from annotation checkers: jax also fills them with abstract shapes and placeholders.
"""

from dataclasses import dataclass
from typing import no_type_check

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import paged_attention
from pallas_kernels.kv_layout import TPU_LANES, page_layout
from pallas_kernels.rope_kv_write import rope_kv_write

Index = int | Int[Array, ""]  # of a layer in the stacked cache, static or traced


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunks:
    """How a ragged batch of `T` tokens lies in `S` sequences and in the pages of the cache.

    Sequence `s` owns the query rows `cu_q_lens[s]:cu_q_lens[s + 1]`; they are its last positions, so row `i` of them
    stands at position `kv_lens[s] - q_len + i`. Padding rows have `page == num_pages`, so that their writes are
    dropped; padding sequences have `kv_lens == 0` and no rows.
    """

    positions: Int[Array, "T"]
    pages: Int[Array, "T"]  # page and offset in it where the token's key and value go
    offsets: Int[Array, "T"]
    page_table: Int[Array, "S P"]
    cu_q_lens: Int[Array, "S+1"]
    kv_lens: Int[Array, "S"]


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers in one donated array `[L, pages, kinds, K, p, width]`.

    The kinds are key and value, as wide as the heads; TPUs want whole lanes (`pallas_kernels.kv_layout`).
    """

    kv: Float[Array, "L pages kinds K p width"]

    @staticmethod
    def shape(
        num_layers: int, num_pages: int, num_kv_heads: int, page_size: int, head_dim: int, *, platform: str
    ) -> tuple[int, ...]:
        """The array's shape; its product times the item size is its memory."""
        kinds, width = page_layout(head_dim, lanes=TPU_LANES if platform == "tpu" else None)
        return (num_layers, num_pages, kinds, num_kv_heads, page_size, width)

    @property
    def num_pages(self) -> int:
        return self.kv.shape[1]

    @property
    def page_size(self) -> int:
        return self.kv.shape[4]

    def write(
        self,
        layer: Index,
        qkv: Float[Array, "T K heads H"],
        rope: tuple[Float[Array, "T R"], Float[Array, "T R"]],
        chunks: Chunks,
        *,
        q_scale: Float[Array, "H"] | None = None,
        k_scale: Float[Array, "H"] | None = None,
        norm_eps: float = 0.0,
        norm_offset: float = 0.0,
    ) -> tuple[Float[Array, "T N H"], "KVCache"]:
        """Store the step's keys and values of one layer, cast to the cache's dtype, and return its queries.

        `qkv` holds, for each KV head, its query heads, its key and its value, as they come from the projection; queries
        and keys are normed where a scale is given and rotated by `rope` (cosine, sine) on the way.
        """
        q, kv = rope_kv_write(
            qkv, self.kv, layer, *rope, chunks.pages, chunks.offsets,
            q_scale=q_scale, k_scale=k_scale, norm_eps=norm_eps, norm_offset=norm_offset,
        )  # fmt: skip
        return q, KVCache(kv)

    def attend(
        self,
        layer: Index,
        q: Float[Array, "T N H"],
        chunks: Chunks,
        *,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> Float[Array, "T N H"]:
        """Causal attention of every row over its sequence's cached positions (its own included)."""
        return paged_attention(
            q, self.kv, layer, chunks.page_table, chunks.cu_q_lens, chunks.kv_lens,
            scale=scale, window=window, soft_cap=soft_cap,
        )  # fmt: skip
