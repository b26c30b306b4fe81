"""The memory plan: how many cache pages fit next to the weights and the programs' working memory."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractDevice

from jaxserve.batch import Bucket
from jaxserve.config import EngineConfig
from jaxserve.kv_cache import KVCache
from jaxserve.models import ModelConfig
from sharding.topology import generation_of

GIB = 1 << 30
HOLE_BYTES = 64 << 20  # kept free among the arrays that live long, for the small ones that come and go
LEAST_GPU_BYTES = 128 << 20  # of a step, however small
SAMPLER_COPIES = 7  # of the float32 logits, at most at one time
TPU_LAYER_BYTES = 1 << 20  # whatever the batch
CPU_CACHE_BYTES = 2 * GIB  # default pool on CPU, where the engine shares the memory with everything else


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose on one device, and the pages they leave. `limit` is what the engine may use in all."""

    limit: int
    weights: int
    working: int
    page_bytes: int
    num_pages: int
    page_size: int
    max_model_len: int

    @property
    def cache(self) -> int:
        """Bytes of all pages."""
        return self.page_bytes * self.num_pages

    @property
    def cache_tokens(self) -> int:
        """Tokens that the whole pool holds."""
        return self.num_pages * self.page_size

    def table(self) -> str:
        """The plan as the table printed at start."""
        rows = [
            ("memory the engine may use", self.limit),
            ("weights", self.weights),
            ("working memory of the largest step", self.working),
            (f"cache: {self.num_pages:,} pages of {self.page_size} tokens", self.cache),
            ("left", self.limit - self.weights - self.working - self.cache),
        ]
        lines = [f"  {name:<42} {size / GIB:9.2f} GiB" for name, size in rows]
        most = self.cache_tokens / self.max_model_len
        lines.append(f"  room for {self.cache_tokens:,} tokens: {most:.1f} requests of {self.max_model_len:,} tokens")
        return "\n".join(["memory plan", *lines])


def page_bytes(model: ModelConfig, page_size: int, dtype: np.dtype, platform: str, parts: int = 1) -> int:
    """Bytes of one page over all layers on each of `parts` devices that share it, its token ids included."""
    heads = model.num_kv_heads // parts
    shape = KVCache.shape(model.num_layers, 1, heads, page_size, model.head_dim, platform=platform)
    return int(np.prod(shape)) * np.dtype(dtype).itemsize + page_size * np.dtype(np.int32).itemsize


def estimate_working(model: ModelConfig, bucket: Bucket, dtype: np.dtype, platform: str, parts: int = 1) -> int:
    """First guess of a step's working memory, before its program has been compiled: what must exist at one time.

    Either a layer's activations or, later, the sampler's copies of the logits, and the hidden states beside both. The
    number of copies is what XLA needed on a GPU for 1,024 sequences and 151,936 tokens, with two sizes of layers.
    `parts` devices share vocabulary, heads and MLP width. The TPU compiler keeps twice as many
    copies of the MLP's activations and takes a little for every layer: so it was with models of 8 and 70 billion
    parameters on 4 and 8 chips. A GPU's step of 32 tokens of SmolLM2 in float32 takes 62 MiB.
    """
    sampler = SAMPLER_COPIES * bucket.seqs * model.vocab_rows // parts * np.dtype(np.float32).itemsize
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    copies = 4 if platform == "tpu" else 2
    widest = 2 * model.hidden_size + copies * max(2 * model.intermediate_size, 2 * heads) // parts
    size = max(np.dtype(dtype).itemsize, 4)
    layers = model.num_layers * TPU_LAYER_BYTES if platform == "tpu" else 0
    least = LEAST_GPU_BYTES if platform == "gpu" else 0
    return max(sampler, bucket.tokens * widest * size, least) + 2 * bucket.tokens * model.hidden_size * size + layers


def plan_memory(
    config: EngineConfig,
    model: ModelConfig,
    limit: int | None,
    *,
    weights: int,
    working: int,
    dtype: np.dtype,
    parts: int = 1,
) -> MemoryPlan:
    """Divide a device's memory. With `fit_max_model_len` the plan may shorten the context to what fits.

    Args:
        config: of the engine; its options may fix the size of the cache.
        model: whose cache it is.
        limit: bytes for weights, working memory and cache together, as `memory_limit` says.
        weights: their bytes.
        working: bytes that a step needs besides.
        dtype: of the cache.
        parts: devices that share a copy of the model; all bytes are those of one device.

    Raises:
        ValueError: when what is left cannot hold one request of `max_model_len` tokens; it names the numbers and flags.
    """
    page = page_bytes(model, config.block_size, dtype, config.platform, parts)
    needed = -(-config.max_model_len // config.block_size)
    if config.num_gpu_blocks_override is not None:
        pages = config.num_gpu_blocks_override
    elif config.kv_cache_memory_bytes is not None:
        pages = config.kv_cache_memory_bytes // page
    elif limit is None:
        pages = _cpu_pages(page, needed, config.max_num_seqs * needed)
    else:
        pages = _rounded(max(0, limit - weights - working) // page)
    limit = weights + working + pages * page if limit is None else limit
    context = config.max_model_len
    if config.fit_max_model_len and pages:
        context = min(context, pages * config.block_size)
    plan = MemoryPlan(limit, weights, working, page, int(pages), config.block_size, context)
    if pages * config.block_size < context or not pages:
        raise ValueError(_too_small(plan, needed))
    return plan


def _rounded(pages: int) -> int:
    """At most 1 % fewer: compiled programs hold the number, and a little more or less memory should find them again."""
    return pages - pages % (1 << max(pages.bit_length() - 8, 0))


def _cpu_pages(page: int, needed: int, most: int) -> int:
    """A modest pool, larger if one full-length request needs it and half of the free memory allows it."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return min(max(CPU_CACHE_BYTES // page, min(needed, free // 2 // page)), most)


def memory_limit(devices: Sequence[Any], utilization: float, reserved: int = 0) -> int | None:
    """Bytes that each accelerator has left for the engine, less `reserved`; None on CPU. Ask before a model takes any.

    The allocator of a GPU was given its share when jax started; a TPU's has all of the memory. TPUs that are only
    compiled for have no allocator: there it is what the compiler allows.
    """
    if devices[0].platform == "cpu":
        return None
    stats = [_allocator(device) for device in devices]
    share = utilization if devices[0].platform == "tpu" else 1.0
    return min(int(one["bytes_limit"] * share) - one["bytes_in_use"] for one in stats) - HOLE_BYTES - reserved


def total_memory(device: Any, utilization: float) -> int | None:
    """Bytes of the device, as far as known."""
    limit = _allocator(device)["bytes_limit"] if device.platform != "cpu" else 0
    return int(limit / utilization if device.platform == "gpu" else limit) or None


def _allocator(device: Any) -> dict[str, int]:
    """The allocator's limit and what is in use, in bytes."""
    known = generation_of(device.device_kind)
    nothing = {"bytes_limit": 0 if known is None else known.hbm_bytes, "bytes_in_use": 0}
    if isinstance(device, AbstractDevice):
        return nothing
    try:
        return nothing | (device.memory_stats() or {})
    except jax.errors.JaxRuntimeError:  # the device is only compiled for
        return nothing


def _too_small(plan: MemoryPlan, needed: int) -> str:
    fits = plan.cache_tokens
    numbers = (
        f"weights {plan.weights / GIB:.2f} GiB, working memory {plan.working / GIB:.2f} GiB, "
        f"limit {plan.limit / GIB:.2f} GiB"
    )
    if not fits:
        return (
            f"There is no room for the cache ({numbers} on each device). Use more devices (tensor_parallel_size), "
            "raise gpu_memory_utilization, or lower max_num_batched_tokens or max_num_seqs."
        )
    return (
        f"The cache has room for {plan.num_pages} pages of {plan.page_size} tokens ({fits:,} tokens), but one request "
        f"of max_model_len={plan.max_model_len:,} tokens needs {needed} pages "
        f"({needed * plan.page_bytes / GIB:.2f} GiB; {numbers}). Lower max_model_len to at most {fits:,} or "
        "max_num_batched_tokens, or raise gpu_memory_utilization, kv_cache_memory_bytes or num_gpu_blocks_override."
    )
