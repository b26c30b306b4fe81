"""Everything on the device: weights, state and programs. Plans go in, results come out later."""

import logging
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.batch import Bucket, Level, Limits, SlotTable, State, pack
from jaxserve.config import EngineConfig
from jaxserve.engine.edits import step_edits
from jaxserve.engine.memory import MemoryPlan, estimate_working, plan_memory
from jaxserve.engine.programs import Buckets, Programs
from jaxserve.engine.results import Results
from jaxserve.engine.step import ScoreMode
from jaxserve.kv_cache import KVCache
from jaxserve.types import Work
from jaxserve.weights import LoadedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InFlight:
    """A launched step; `results` waits for it."""

    work: Work
    bucket: Bucket
    limits: Limits
    packed: jax.Array

    def results(self) -> Results:
        """Wait for the step and read its results."""
        return Results.read(np.asarray(self.packed), self.bucket, self.limits, len(self.work.sequences))


class Runner:
    """Owns the device side of one engine: launches steps and keeps the donated state.

    `config` is the one given, with the context shortened if the memory plan had to.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        device: jax.Device,  # pyright: ignore[reportInvalidTypeForm]
        *,
        threads: int,
    ) -> None:
        self.config = config
        self._loaded = loaded
        self._device = device
        self._threads = threads
        self.buckets = Buckets(
            config.max_num_seqs,
            config.max_num_batched_tokens,
            config.decode_steps,
            accelerator=device.platform != "cpu",
        )
        self.plan, self.programs = self._plan()
        logger.info("%s", self.plan.table())
        self._limits = self.limits(self.plan)
        self._table = SlotTable(config.max_num_seqs)
        self._state = _zeros(self._abstract_state(self.plan))
        if config.warmup != "none":
            self.programs.warm_up(self.buckets.all(), wait=config.warmup == "full")

    def _plan(self) -> tuple[MemoryPlan, Programs]:
        """Plan with an estimate; where programs are compiled ahead anyway, let the compiler's own figure correct it."""
        model, dtype = self._loaded.model_config, self._cache_dtype
        working = estimate_working(model, self.buckets.largest, dtype)
        while True:
            plan = plan_memory(
                self.config, model, self._device, weights=self._loaded.total_bytes, working=working, dtype=dtype
            )
            self.config = self.config.fitted(plan.max_model_len)
            programs = self._programs(plan)
            if self._device.platform == "cpu" or self.config.warmup == "none":
                return plan, programs
            analysis = programs.get(self.buckets.largest).memory_analysis()
            if analysis is None or analysis.temp_size_in_bytes <= working:
                return plan, programs
            working = int(analysis.temp_size_in_bytes * 1.02)
            programs.close()

    @property
    def _cache_dtype(self) -> np.dtype:
        return np.dtype(self._loaded.dtype)

    def limits(self, plan: MemoryPlan) -> Limits:
        """The sizes no step changes, under a memory plan."""
        vocab = self._loaded.model_config.vocab_size
        most = self.config.max_logprobs
        return Limits(
            max_num_seqs=self.config.max_num_seqs,
            pages_per_seq=-(-self.config.max_model_len // plan.page_size),
            page_size=plan.page_size,
            num_pages=plan.num_pages,
            max_logprobs=vocab if most < 0 else min(most, vocab),
        )

    def _abstract_state(self, plan: MemoryPlan) -> State:
        model = self._loaded.model_config
        shape = KVCache.shape(model.num_layers, plan.num_pages, model.num_kv_heads, plan.page_size, model.head_dim)
        sharding = jax.sharding.SingleDeviceSharding(self._device)

        def array(shape: tuple[int, ...], dtype: np.dtype) -> Any:  # stands where State wants an array
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        return State(
            cache=KVCache(array(shape, self._cache_dtype)),
            tokens=array((plan.num_pages, plan.page_size), np.dtype(np.int32)),
            last_token=array((self.config.max_num_seqs,), np.dtype(np.int32)),
        )

    def _programs(self, plan: MemoryPlan) -> Programs:
        return Programs(
            self._loaded.merge,
            self._loaded.leaves,
            self.limits(plan),
            ScoreMode.parse(self.config.logprobs_mode),
            self._abstract_state(plan),
            threads=self._threads,
        )

    def launch(self, work: Work) -> InFlight:
        """Start a step and return at once; the copy of its results to the host is under way."""
        self._table.update(work.sequences)
        level = self._table.level(work)
        edits = step_edits(work) if level >= Level.SAMPLE else []
        exact = self.buckets.choose(work.total_tokens, len(work.sequences), level, len(edits), work.steps)
        bucket = self.programs.choose(exact)
        limits = self._limits
        buffer = pack(work, bucket, limits, self._table, edits)
        self._state, packed = self.programs.run(self._state, buffer, bucket)
        packed.copy_to_host_async()
        return InFlight(work, bucket, limits, packed)

    def close(self) -> None:
        """Stop compiling and free the device state."""
        self.programs.close()
        for array in jax.tree.leaves(self._state):
            array.delete()


def _zeros(state: State) -> State:
    """The empty state. Cache rows past a sequence's length must stay finite, so nothing is left uninitialised."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state), out_shardings=shardings)()
