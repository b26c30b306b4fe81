"""Everything on the device: weights, state and programs. Plans go in, results come out later."""

import collections
import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.batch import Bucket, EditRows, Level, Limits, SlotTable, State, pack
from jaxserve.config import EngineConfig
from jaxserve.engine.balancer import Plan
from jaxserve.engine.edits import step_edits
from jaxserve.engine.helpers import Tracers
from jaxserve.engine.memory import HOLE_BYTES, MemoryPlan, estimate_working, memory_limit, plan_memory
from jaxserve.engine.mirror import Mirror
from jaxserve.engine.programs import Buckets, Programs, StepCompiler
from jaxserve.engine.results import Results
from jaxserve.engine.step import ScoreMode
from jaxserve.engine.tracing import ProgramStore, Recipe, Tracer, read_bucket, state_shapes, write_bucket
from jaxserve.types import Work
from jaxserve.weights import ModelPlan
from sharding.channel import ChannelClosed
from sharding.place import place

logger = logging.getLogger(__name__)

AHEAD = 2  # steps that a follower launches before it waits for the oldest

# Of XLA, by platform. Rematerialization counts the donated cache twice, finds the program far over its limit and spends
# most of the compilation on shrinking what needs no shrinking. Tuning Triton's matrix products takes 15 of the 18
# seconds of CPU time of a program's compilation, and cuBLAS's are as fast (docs/decisions.md). Tuning the choice among
# those runs them, with operands of its own, in memory that steps count on when a program compiles beside them.
COMPILER_OPTIONS: Mapping[str, Mapping[str, str | bool]] = MappingProxyType(
    {
        "gpu": {
            "xla_disable_hlo_passes": "rematerialization,hlo-rematerialization",
            "xla_gpu_enable_triton_gemm": False,
            "xla_gpu_autotune_level": "0",
        }
    }
)


@dataclass(frozen=True)
class InFlight:
    """A launched step; `results` waits for it."""

    plan: Plan
    bucket: Bucket
    limits: Limits
    packed: jax.Array

    def results(self) -> Iterator[tuple[Work, Results]]:
        """Wait for the step and read the results of each pool that had something to do."""
        pools = np.asarray(self.packed).reshape(len(self.plan), -1)
        for work, packed in zip(self.plan, pools, strict=True):
            if work is not None:
                yield work, Results.read(packed, self.bucket, self.limits, len(work.sequences))


class Runner:
    """Owns the device side of one engine: launches steps and keeps the donated state.

    Programs need shapes only: they compile from construction on, while the weights load; `prepare` takes those in.
    `config` is the one given, with the context shortened if the memory plan had to.
    """

    def __init__(
        self,
        model: ModelPlan,
        config: EngineConfig,
        *,
        threads: int,
        mirror: Mirror,
    ) -> None:
        self.config = config
        self._mirror = mirror
        self._model = model
        self._devices = [device for device in model.devices if device.process_index == jax.process_index()]
        self._platform = self._devices[0].platform
        self._threads = threads
        self._memory_limit = memory_limit(self._devices)
        self.buckets = Buckets(
            config.max_num_seqs,
            config.max_num_batched_tokens,
            config.decode_steps,
            accelerator=self._platform != "cpu",
        )
        self._tables = [SlotTable(config.max_num_seqs) for _ in range(config.parallel.data_parallel_size)]
        self._leaves: tuple[jax.Array, ...] = ()
        self._start(estimate_working(model.model_config, self.buckets.largest, self._cache_dtype, self._parts))

    def _start(self, working: int) -> None:
        """Plan the memory, with so many bytes for the working memory of a step, and start compiling."""
        self.plan = plan_memory(
            self.config,
            self._model.model_config,
            self._memory_limit,
            weights=self._model.device_bytes,
            working=working,
            dtype=self._cache_dtype,
            parts=self._parts,
        )
        self.plan = replace(self.plan, num_pages=self._mirror.least(self.plan.num_pages))
        self.config = self.config.fitted(self._mirror.least(self.plan.max_model_len))
        self._limits = self.limits(self.plan)
        model = self._model
        self._abstract_state = state_shapes(model.model_config, self._limits, self._cache_dtype, model.mesh)
        warmup = self.config.warmup
        self._tracers, compiler = self._compiler()
        self.programs = Programs(
            compiler, threads=self._threads, background=warmup == "lazy", when_warm=self._tracers.rest
        )
        if warmup != "none":
            first = self.buckets.essential()
            self.programs.warm_up(first, then=[bucket for bucket in self.buckets.all() if bucket not in first])

    def _compiler(self) -> tuple[Tracers, StepCompiler]:
        """What traces and what compiles steps, for the sizes as they are planned now."""
        model, mode = self._model, ScoreMode.parse(self.config.logprobs_mode)
        recipe = Recipe.of(model, self._limits, mode, self._devices[0])
        # Tracing beside each other pays where warming up is the rule and cores are plenty.
        helpers = self._threads // 2 if self.config.warmup != "none" and self._platform != "cpu" else 0
        tracers = Tracers(Tracer(recipe, model), recipe, helpers)
        cache = jax.config.jax_compilation_cache_dir
        compiler = StepCompiler(
            tuple(model.parameters.values()),
            self._abstract_state,
            self._limits,
            model.mesh,
            tracers,
            recipe.digest,
            None if cache is None or not recipe.portable else ProgramStore(Path(cache) / "steps"),
            COMPILER_OPTIONS.get(self._platform, {}),
        )
        return tracers, compiler

    def prepare(self, leaves: tuple[jax.Array, ...]) -> None:
        """Take the weights, wait for the programs that must be there before the first request, allocate the state.

        The cache was planned before any program existed. If one needs more working memory than that, all is planned
        again with its figure. A lazy warm-up waits for and checks the few programs that can serve everything; with them
        the compiler is busy alone, and others follow beside the first requests.

        The state comes last: tuning matrix products inside the compiler takes device memory, too, and the state leaves
        no more than one step needs.
        """
        config = self.config
        while config.warmup != "none":
            buckets = self.buckets.all() if config.warmup == "full" else self.buckets.essential()
            needed = self.programs.wait(buckets, show_progress=config.use_tqdm_on_load)
            if needed <= self.plan.working or self._memory_limit is None:
                break
            logger.warning(
                "a step needs %.2f GiB of working memory, %.2f were planned; planning again",
                needed / 2**30, self.plan.working / 2**30,
            )  # fmt: skip
            self.programs.drop()
            self._tracers.close()
            self._start(int(needed * 1.02))
        logger.info("%s", self.plan.table())
        # The allocator fills the smallest gap that fits. Without one below the cache, a step's packed input or results
        # would land in the middle of the memory that the next step's temporaries need in one piece.
        devices = [] if self._memory_limit is None else self._devices
        hole = jax.block_until_ready([jnp.zeros(HOLE_BYTES, jnp.int8, device=device) for device in devices])
        self._state = _zeros(self._abstract_state)
        self._leaves = leaves
        del hole

    @property
    def _concrete_mesh(self) -> Mesh:
        assert isinstance(self._model.mesh, Mesh)  # there are devices
        return self._model.mesh

    @property
    def _parts(self) -> int:
        """Devices that share a copy of the model."""
        return self._model.mesh.shape["model"]

    @property
    def _cache_dtype(self) -> np.dtype:
        return np.dtype(self._model.dtype)

    def limits(self, plan: MemoryPlan) -> Limits:
        """The sizes no step changes, under a memory plan."""
        vocab = self._model.model_config.vocab_size
        most = self.config.max_logprobs
        return Limits(
            max_num_seqs=self.config.max_num_seqs,
            pages_per_seq=-(-self.config.max_model_len // plan.page_size),
            page_size=plan.page_size,
            num_pages=plan.num_pages,
            max_logprobs=vocab if most < 0 else min(most, vocab),
        )

    def launch(self, plan: Plan) -> InFlight:
        """Start a step and return at once; the copy of its results to the host is under way."""
        exact, edits = fitting(plan, self._tables, self.buckets)
        bucket = self.programs.choose(exact)
        limits = self._limits
        pools = zip(plan, self._tables, edits, strict=True)
        buffers = [pack(work or Work.nothing(), bucket, limits, table, own) for work, table, own in pools]
        buffer = buffers[0] if len(buffers) == 1 else np.concatenate(buffers)
        self._mirror.tell(write_bucket(bucket), buffer)
        packed = self._run(bucket, buffer)
        packed.copy_to_host_async()
        return InFlight(plan, bucket, limits, packed)

    def _run(self, bucket: Bucket, buffer: np.ndarray) -> jax.Array:
        """Launch a step on the devices of this process; returns its results."""
        inputs: Any = buffer
        if not self._mirror.alone:
            inputs = place(buffer, NamedSharding(self._concrete_mesh, PartitionSpec("data")))
        self._state, packed = self.programs.get(bucket)(self._leaves, self._state, inputs)
        return packed

    def follow(self) -> None:
        """Launch what the leader launches, until it closes; at most a few steps ahead of the devices.

        Raises:
            ChannelError: the leader is gone.
        """
        launched: collections.deque[jax.Array] = collections.deque()
        with contextlib.suppress(ChannelClosed):
            while True:
                bucket, buffer = self._mirror.hear()
                launched.append(self._run(read_bucket(bucket), buffer))
                if len(launched) > AHEAD:
                    launched.popleft().block_until_ready()

    def close(self) -> None:
        """Stop compiling and free the device state."""
        self._mirror.close()
        self.programs.close()
        self._tracers.close()
        if self._leaves:
            with contextlib.suppress(Exception):  # a step in flight: a process that ends beside it would be aborted
                jax.block_until_ready(self._state)
            for array in jax.tree.leaves(self._state):
                array.delete()


def fitting(plan: Plan, tables: Sequence[SlotTable], buckets: Buckets) -> tuple[Bucket, list[EditRows]]:
    """The smallest bucket that every pool's part of a step fits in, and the sampling edits of each pool."""
    levels, edits = [Level.GREEDY], [EditRows() for _ in plan]
    for pool, (work, table) in enumerate(zip(plan, tables, strict=True)):
        if work is not None:
            table.update(work.sequences)
            levels.append(table.level(work))
            if levels[-1] >= Level.SAMPLE:
                edits[pool] = step_edits(work)
    works = [work for work in plan if work is not None]
    tokens, rows = max(work.total_tokens for work in works), max(len(work.sequences) for work in works)
    return buckets.choose(tokens, rows, max(levels), max(map(len, edits)), works[0].steps), edits


def _zeros(state: State) -> State:
    """The empty state. Cache rows past a sequence's length must stay finite, so nothing is left uninitialised."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state), out_shardings=shardings)()
