"""Programs compiled ahead of time, here or for devices elsewhere, and what the compiler says of each."""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import jax

from jaxserve.batch import Bucket
from jaxserve.engine.hlo import Program

ATTENTION = "paged_attention"  # in the scopes of what depends on the length of the context


@dataclass(frozen=True)
class ProgramReport:
    """What the compiler says of one program; bytes are those of one device.

    Attributes:
        seconds: that tracing and compiling took.
        arguments, outputs, aliased, working, code: bytes; outputs that are `aliased` lie in arguments.
        compiler_seconds: the compiler's `optimal_seconds` of what it knows, None if it has no idea.
        traffic: bytes through the large memory, without attention.
        operations: floating point operations, without attention.
        exchanges: bytes that devices exchange, by kind, as (kind, bytes) of each exchange.
    """

    bucket: Bucket
    seconds: float
    arguments: int
    outputs: int
    aliased: int
    working: int
    code: int
    compiler_seconds: float | None
    traffic: int
    operations: int
    exchanges: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        """Bytes that the device must have while it runs, without its code."""
        return self.arguments + self.working + self.outputs - self.aliased


class CompileFailure(RuntimeError):
    """A program could not be compiled; the message is the compiler's."""


def compile_all(
    compiler: Callable[[Bucket], jax.stages.Compiled], buckets: Iterable[Bucket], jobs: int
) -> Iterator[ProgramReport]:
    """Compile programs, so many at a time, and report each when it is there.

    Raises:
        CompileFailure: of the first that fails, such as one that does not fit into the memory of its device.
    """

    def one(bucket: Bucket) -> ProgramReport:
        start = time.perf_counter()
        try:
            compiled = compiler(bucket)
        except jax.errors.JaxRuntimeError as error:
            raise CompileFailure(f"{bucket}: {error}") from error
        return read_report(bucket, compiled, time.perf_counter() - start)

    with ThreadPoolExecutor(jobs, thread_name_prefix="compile") as pool:
        futures = [pool.submit(one, bucket) for bucket in buckets]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def read_report(bucket: Bucket, compiled: jax.stages.Compiled, seconds: float) -> ProgramReport:
    """The figures of a compiled program."""
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    assert memory is not None, "XLA reports it on every platform"
    program = Program.parse(compiled.as_text() or "")
    traffic = program.traffic(without=ATTENTION)
    attention = sum(flops for scope, flops, _ in program.traffic().kernels if ATTENTION in scope)
    return ProgramReport(
        bucket,
        seconds,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        working=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        compiler_seconds=_known_seconds(costs.get("optimal_seconds")),
        traffic=traffic.hbm_bytes,
        operations=max(0, int(costs.get("flops", 0)) - attention),
        exchanges=tuple(traffic.collectives),
    )


def _known_seconds(seconds: float | None) -> float | None:
    """XLA adds -1 for each instruction of unknown duration; all others together last less than a second."""
    return None if not seconds else seconds % 1.0
