"""Everything on the device: weights, state and programs. Plans go in, results come out later."""

import collections
import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.batch import Bucket, EditRows, Level, Limits, SlotTable, State, pack
from jaxserve.config import EngineConfig
from jaxserve.engine.balancer import Plan
from jaxserve.engine.blueprint import Blueprint, buckets_of, draft
from jaxserve.engine.edits import step_edits
from jaxserve.engine.helpers import Compilation, Tracers
from jaxserve.engine.mailboxes import open_mailboxes, reserved_bytes
from jaxserve.engine.memory import HOLE_BYTES, memory_limit, total_memory
from jaxserve.engine.mirror import Mirror
from jaxserve.engine.programs import Buckets, Programs
from jaxserve.engine.results import Results
from jaxserve.engine.step_compiler import StepCompiler
from jaxserve.engine.tracing import ProgramStore, Tracer, read_bucket, write_bucket
from jaxserve.types import Work
from jaxserve.weights import ModelPlan
from sharding.channel import ChannelClosed
from sharding.place import place

logger = logging.getLogger(__name__)

HELPER_BYTES = 1 << 30  # of device memory left free for each process that helps compile, which takes about 0.6 of it
AHEAD = 2  # steps that a follower launches before it waits for the oldest


@dataclass(frozen=True)
class InFlight:
    """A launched step; `results` waits for it.

    `bucket` is that of the step as a whole, `packed` the results of one program, or of one for each decode.
    """

    plan: Plan
    bucket: Bucket
    limits: Limits
    packed: list[jax.Array]

    def results(self) -> Iterator[tuple[Work, Results]]:
        """Wait for the step and read the results of each pool that had something to do."""
        pools = [np.asarray(packed).reshape(len(self.plan), -1) for packed in self.packed]
        for work, *packed in zip(self.plan, *pools, strict=True):
            if work is not None:
                # Tokens come first; nobody wants the scores of one of several decodes.
                words = packed[0] if len(packed) == 1 else np.concatenate([one[: self.bucket.seqs] for one in packed])
                yield work, Results.read(words, self.bucket, self.limits, len(work.sequences))


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
        utilization: float,
    ) -> None:
        """`utilization` is the share of the device memory that the engine may use."""
        self.config = config
        self._mirror = mirror
        self._model = model
        self._devices = [device for device in model.devices if device.process_index == jax.process_index()]
        self._platform = self._devices[0].platform
        self._threads = threads
        self._utilization = utilization
        self._mailbox_bytes = reserved_bytes(self._concrete_mesh)
        self._memory_limit = memory_limit(self._devices, utilization, self._mailbox_bytes)
        self.buckets = buckets_of(config)
        self._tables = [SlotTable(config.max_num_seqs) for _ in range(config.parallel.data_parallel_size)]
        self._leaves: tuple[jax.Array, ...] = ()
        self._start()

    def _start(self, working: int | None = None) -> None:
        """Plan the memory, with so many bytes for the working memory of a step, and start compiling."""
        plan = draft(self._model, self.config, self._memory_limit, working)
        self.plan = replace(plan, num_pages=self._mirror.least(plan.num_pages))
        self.config = self.config.fitted(self._mirror.least(self.plan.max_model_len))
        blueprint = Blueprint(self._model, self.config, self.plan, self._devices[0], bool(self._mailbox_bytes))
        warmup = self.config.warmup
        self._tracers, compiler = self._compiler(blueprint)
        self._limits, self._abstract_state = compiler.limits, compiler.state
        threads = max(self._threads, self._tracers.helpers)  # one waits for each
        self.programs = Programs(compiler, threads=threads, background=warmup == "lazy", when_warm=self._tracers.rest)
        if warmup != "none":
            first = self.buckets.essential()
            self.programs.warm_up(first, then=[bucket for bucket in self.buckets.all() if bucket not in first])

    def _compiler(self, blueprint: Blueprint) -> tuple[Tracers, StepCompiler]:
        """What traces and what compiles steps, for the sizes as they are planned now."""
        cache = jax.config.jax_compilation_cache_dir
        helpers, compilation = 0, None
        # Tracing beside each other pays where warming up is the rule and cores are plenty.
        if self.config.warmup != "none" and self._platform != "cpu":
            helpers = self._threads // 2
            if cache is not None and self._room_for_helpers:
                helpers = min(2 * self._threads, self._room_for_helpers)
                seconds = jax.config.jax_persistent_cache_min_compile_time_secs
                compilation = Compilation(cache, seconds, self._devices[0].id, blueprint.compiler_options)
        tracers = Tracers(Tracer(blueprint.recipe, self._model), blueprint.recipe, helpers, compilation)
        return tracers, blueprint.compiler(tracers, None if cache is None else ProgramStore.inside(Path(cache)))

    @property
    def _room_for_helpers(self) -> int:
        """How many more processes may use the device beside this one; several GPUs would cost each memory on all."""
        device = self._devices[0]
        if self._platform != "gpu" or jax.device_count() > 1:
            return 0
        total = total_memory(device, self._utilization) or 0
        return int(total * (1 - self._utilization) / HELPER_BYTES)

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
        self._state, self._mailboxes = _zeros(self._abstract_state), None
        if self._mailbox_bytes:
            tables, self._mailboxes = open_mailboxes(self._concrete_mesh)
            self._state = replace(self._state, sums=replace(self._state.sums, mailboxes=tables))
        self._leaves = leaves
        del hole

    @property
    def _concrete_mesh(self) -> Mesh:
        assert isinstance(self._model.mesh, Mesh)  # there are devices
        return self._model.mesh

    def launch(self, plan: Plan) -> InFlight:
        """Start a step and return at once; the copy of its results to the host is under way."""
        exact, edits = fitting(plan, self._tables, self.buckets)
        bucket = self.programs.choose(exact)
        packed = [self._launch(part, bucket, edits) for part in programs_of(plan, bucket)]
        return InFlight(plan, replace(bucket, steps=bucket.steps * len(packed)), self._limits, packed)

    def _launch(self, plan: Plan, bucket: Bucket, edits: list[EditRows]) -> jax.Array:
        """Start one program; returns its results, which are on their way to the host."""
        pools = zip(plan, self._tables, edits, strict=True)
        buffers = [pack(work or Work.nothing(), bucket, self._limits, table, own) for work, table, own in pools]
        buffer = buffers[0] if len(buffers) == 1 else np.concatenate(buffers)
        self._mirror.tell(write_bucket(bucket), buffer)
        packed = self._run(bucket, buffer)
        packed.copy_to_host_async()
        return packed

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
            for array in jax.tree.leaves((self._state, self._mailboxes)):
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


def programs_of(plan: Plan, bucket: Bucket) -> list[Plan]:
    """What each program of a step does: all of it, or one of several decodes where no program runs so many in a row."""
    steps = next(work.steps for work in plan if work is not None)
    if bucket.steps == steps:
        return [plan]
    return [[None if work is None else work.decode(number) for work in plan] for number in range(steps)]


def _zeros(state: State) -> State:
    """The empty state. Cache rows past a sequence's length must stay finite, so nothing is left uninitialised."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state), out_shardings=shardings)()
