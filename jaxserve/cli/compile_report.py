"""What `jaxserve compile` prints, line by line as it finds out, and the same as one JSON object."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jaxserve.cli.compile_job import Setup, advise, choose
from jaxserve.engine.ahead import CompileFailure, ProgramReport, compile_all
from jaxserve.engine.blueprint import Blueprint, buckets_of
from jaxserve.engine.roofline import Estimate, Estimator
from jaxserve.engine.setup import use_compilation_cache
from jaxserve.engine.tracing import ProgramStore, Tracer
from jaxserve.version import __version__
from sharding.topology import generation_of

GIB, MIB = 1 << 30, 1 << 20
HEADROOM = 1.02  # over the working memory that a program needs, when the memory is planned again
NOTE = "estimates: upper bounds at the chip's published bandwidth and FLOP/s, not measurements"
HEADER = f"  {'program':<52} {'seconds':>7} {'code MiB':>8} {'working MiB':>11} {'total GiB':>9}"


@dataclass
class Findings:
    """What has been found out so far.

    Attributes:
        problems: why the model cannot be served so; empty if it can.
        remedies: what would help.
    """

    setup: Setup
    blueprint: Blueprint | None = None
    reports: list[ProgramReport] = field(default_factory=list)
    decodes: list[Estimate] = field(default_factory=list)
    prefills: list[Estimate] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    remedies: list[str] = field(default_factory=list)

    def plan(self, working: int | None = None) -> Iterator[str]:
        """Plan the memory and show it."""
        self.blueprint = None
        try:
            self.blueprint = self.setup.plan(working)
        except ValueError as error:
            self.problems.append(str(error))
        else:
            yield self.blueprint.plan.table()

    def compile(self, words: Sequence[str], out: Path | None, jobs: int) -> Iterator[str]:
        """Compile the chosen programs, and all again if one needs more working memory than was planned."""
        use_compilation_cache(out)
        store = None if out is None else ProgramStore.inside(out)
        while (blueprint := self.blueprint) is not None and not self.problems:
            buckets = choose(buckets_of(self.setup.config), words)
            yield f"compiling {len(buckets)} programs, {jobs} at a time"
            yield HEADER
            tracer = Tracer(blueprint.recipe, blueprint.model)
            self.reports.clear()
            try:
                for report in compile_all(blueprint.compiler(tracer, store), buckets, jobs):
                    self.reports.append(report)
                    yield describe_program(report)
            except CompileFailure as error:
                self.problems.append(str(error))
                return
            needed = max((report.working for report in self.reports), default=0)
            if needed <= blueprint.plan.working or self.setup.limit is None:
                return
            yield (
                f"a step needs {needed / GIB:.2f} GiB of working memory, {blueprint.plan.working / GIB:.2f} were "
                "planned; planning again, as the engine will"
            )
            yield from self.plan(int(needed * HEADROOM))

    def estimate(self, contexts: Sequence[int]) -> Iterator[str]:
        """Bounds of the rates, where the chip's are published."""
        chip = generation_of(self.setup.device.device_kind)
        if chip is None or self.blueprint is None:
            return
        estimator = Estimator(self.blueprint, chip, self.reports)
        self.decodes, self.prefills = estimator.decodes(contexts), estimator.prefills()
        copies = self.setup.config.parallel.data_parallel_size
        yield f"{NOTE} ({chip.bandwidth / 1e9:,.0f} GB/s, {chip.flops / 1e12:,.0f} TFLOP/s)"
        yield f"  {'step of each copy':<42} {'compiled: ms':>12} {'tokens/s':>10} {'roofline: ms':>12} {'tokens/s':>10}"
        for one in self.decodes:
            name = f"decode, {one.seqs} sequences of {one.context:,} tokens"
            yield describe_estimate(name, one, copies)
        for one in self.prefills:
            name = f"prefill, {one.tokens:,} tokens of {one.seqs} prompts"
            yield describe_estimate(name, one, copies)


def lines(found: Findings, words: Sequence[str], out: Path | None, jobs: int, contexts: Sequence[int],
          *, plan_only: bool) -> Iterator[str]:  # fmt: skip
    """The whole command, phase by phase."""
    setup = found.setup
    yield from describe_target(setup)
    yield from found.plan()
    if not plan_only:
        yield from found.compile(words, out, jobs)
    if not found.problems:
        yield from found.estimate(contexts)
        yield verdict(found, out if not plan_only else None)
        return
    yield "DOES NOT FIT"
    yield from (f"  {problem}" for problem in found.problems)
    found.remedies = list(advise(setup))
    yield "what would help:"
    yield from (f"  {remedy}" for remedy in found.remedies)


def describe_target(setup: Setup) -> Iterator[str]:
    """The devices, and the model on them."""
    config, model, target = setup.config, setup.model, setup.target
    if target is not None:
        chip, hosts = target.generation, f"{target.hosts} host{'s' if target.hosts > 1 else ''}"
        yield (
            f"target {target.name}: {target.chips} chips of TPU {chip.name}, topology {target.topology}, {hosts}; each "
            f"{chip.hbm_bytes / GIB:.2f} GiB for programs, {chip.bandwidth / 1e9:,.0f} GB/s, "
            f"{chip.flops / 1e12:,.0f} TFLOP/s"
        )
    else:
        yield f"target: {setup.count} of this machine's devices ({setup.device.device_kind})"
    sizes = config.parallel
    yield (
        f"model {setup.hf_config['architectures'][0]}, {config.dtype}, {model.total_bytes / GIB:.2f} GiB of weights in "
        f"{sizes.data_parallel_size} {'copies' if sizes.data_parallel_size > 1 else 'copy'}, each shared by "
        f"{sizes.tensor_parallel_size} device{'s' if sizes.tensor_parallel_size > 1 else ''}"
    )
    yield (
        f"engine: max_num_seqs {config.max_num_seqs}, max_num_batched_tokens {config.max_num_batched_tokens}, pages of "
        f"{config.block_size} tokens, gpu_memory_utilization {setup.options.gpu_memory_utilization}"
    )


def describe_program(report: ProgramReport) -> str:
    """A row of the table."""
    return (
        f"  {report.bucket!s:<52} {report.seconds:7.1f} {report.code / MIB:8.1f} {report.working / MIB:11.1f} "
        f"{report.total / GIB:9.3f}"
    )


def describe_estimate(name: str, one: Estimate, copies: int) -> str:
    """A row of the table; rates are those of all copies together."""

    def columns(seconds: float | None) -> str:
        if seconds is None:
            return f"{'-':>12} {'-':>10}"
        return f"{seconds * 1e3:12.2f} {copies * one.tokens / seconds:10,.0f}"

    return f"  {name:<42} {columns(one.compiled)} {columns(one.roofline)}"


def verdict(found: Findings, out: Path | None) -> str:
    """The last line."""
    assert found.blueprint is not None, "there are no problems"
    plan = found.blueprint.plan
    text = f"FITS: {plan.num_pages:,} pages, max_model_len {plan.max_model_len:,}"
    if out is None:
        return text
    return f"{text}; programs are in {out} (--compilation-cache-dir {out} --num-gpu-blocks-override {plan.num_pages})"


def facts(found: Findings) -> dict[str, Any]:
    """Everything as plain values."""
    setup, blueprint = found.setup, found.blueprint
    target = None
    if setup.target is not None:
        target = {"name": setup.target.name, "topology": setup.target.topology, "chips": setup.target.chips}
    plan = None if blueprint is None else asdict(blueprint.plan) | {"cache": blueprint.plan.cache}
    return {
        "fits": not found.problems,
        "target": target,
        "device_kind": setup.device.device_kind,
        "versions": {name: _version(name) for name in ("jax", "jaxlib", "libtpu")} | {"jaxserve": __version__},
        "architecture": setup.hf_config["architectures"][0],
        "parallel": asdict(setup.config.parallel),
        "plan": plan,
        "programs": [_program(report) for report in found.reports],
        "estimates": {
            "note": NOTE,
            "decodes": [asdict(one) for one in found.decodes],
            "prefills": [asdict(one) for one in found.prefills],
        },
        "problems": found.problems,
        "remedies": found.remedies,
    }


def _program(report: ProgramReport) -> dict[str, Any]:
    bucket = asdict(report.bucket) | {"level": report.bucket.level.name.lower()}
    return asdict(report) | {"bucket": bucket, "total": report.total}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
