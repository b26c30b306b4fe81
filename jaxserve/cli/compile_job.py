"""What `jaxserve compile` works on: a model laid out on devices that need not exist, and what would fit instead."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, Mesh

from jaxserve import models
from jaxserve.batch import Bucket, Level
from jaxserve.checkpoints.base import read_json
from jaxserve.cli.dry_run import read_config
from jaxserve.cli.flags import UsageError
from jaxserve.config import EngineArgs, EngineConfig, merge_overrides, resolve
from jaxserve.engine.blueprint import Blueprint, draft, settled
from jaxserve.engine.mailboxes import reserved_bytes
from jaxserve.engine.memory import memory_limit, total_memory
from jaxserve.engine.programs import Buckets
from jaxserve.engine.tracing import device_facts
from jaxserve.models import ModelConfig
from jaxserve.weights import ModelPlan, plan_model
from sharding.mesh import abstract_mesh, make_mesh
from sharding.topology import Slice

MOST_PARTS = 64  # devices that share a copy of the model, in proposals


@dataclass(frozen=True)
class Setup:
    """A model on its devices, before its memory is planned.

    Attributes:
        target: the TPU slice, None for the devices of this machine.
        device: one of the devices, or what stands for them.
        limit: bytes of each device that the engine may use; None on CPU.
        mailbox_bytes: of each device besides, for sums (`jaxserve.engine.mailboxes`).
    """

    options: EngineArgs
    hf_config: Mapping[str, Any]
    target: Slice | None
    device: Any
    config: EngineConfig
    model: ModelPlan
    limit: int | None
    mailbox_bytes: int = 0

    @property
    def count(self) -> int:
        """Devices of the mesh."""
        return self.config.parallel.world_size_across_dp

    def plan(self, working: int | None = None) -> Blueprint:
        """With the memory planned, for so many bytes of working memory (None: an estimate).

        Raises:
            ValueError: it does not suffice.
        """
        memory = draft(self.model, self.config, self.limit, working)
        config = self.config.fitted(memory.max_model_len)
        return Blueprint(self.model, config, memory, self.device, bool(self.mailbox_bytes))

    def fits(self, model: ModelPlan | None = None, **changes: Any) -> bool:
        """Whether the memory would suffice with these options changed."""
        try:
            draft(model or self.model, replace(self.config, **changes), self.limit)
        except ValueError:
            return False
        return True


def prepare(options: EngineArgs, target: Slice | None, *, plan_only: bool, given: Collection[str] = ()) -> Setup:
    """Read the model's config, find the devices (or what stands for them) and lay the model out on them.

    Args:
        options: of the engine.
        target: the TPU slice; None for the devices of this machine.
        plan_only: whether nothing will be compiled.
        given: options that must stay as they are even if they have their default.

    Raises:
        ValueError: a model, target, mesh or option that cannot be; the message says what can.
    """
    hf_config = merge_overrides(read_model_config(options), options.hf_overrides)
    if target is None:
        devices: list[Any] = list(jax.devices())
    else:
        options = spread(options, target, models.resolve(hf_config).config(hf_config), given)
        devices = [target.abstract_device] if plan_only else target.devices()
    device = devices[0]
    memory = total_memory(device, options.gpu_memory_utilization)
    config = resolve(
        options, hf_config, {}, device.platform, device_memory=memory, device_kind=device.device_kind
    )  # fmt: skip
    sizes = config.parallel.data_parallel_size, config.parallel.tensor_parallel_size
    if isinstance(device, AbstractDevice):
        mesh: Mesh | AbstractMesh = abstract_mesh(*sizes, device)
    else:
        config.parallel.check_devices(len(devices))
        mesh = make_mesh(*sizes, devices)
    model = lay_out(config, hf_config, mesh)
    config = settled(config, options, model)
    reserved = reserved_bytes(mesh) if isinstance(mesh, Mesh) else 0
    limit = memory_limit([device], options.gpu_memory_utilization, reserved)
    return Setup(options, hf_config, target, device, config, model, limit, reserved)


def read_model_config(options: EngineArgs) -> Mapping[str, Any]:
    """The config.json that the model names; a folder needs no weights.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(options.model or "").expanduser()
    if options.model and path.is_dir() and (path / "config.json").is_file():
        path /= "config.json"
    return read_json(path) if path.suffix == ".json" else read_config(options)


def spread(options: EngineArgs, target: Slice, model: ModelConfig, given: Collection[str]) -> EngineArgs:
    """The options with sizes of the mesh that use every chip of a slice.

    Where none is given, as many devices share a copy as the model can be dealt out to. Where one is, the other follows.

    Raises:
        TopologyError: sizes that do not make up the slice.
    """
    parts, copies = options.tensor_parallel_size, options.data_parallel_size
    free_parts = parts == 1 and "tensor_parallel_size" not in given
    free_copies = copies == 1 and "data_parallel_size" not in given
    if free_parts and free_copies:
        parts = max(n for n in possible_parts(model, target.chips) if target.chips % n == 0)
    if free_copies and target.chips % parts == 0:
        copies = target.chips // parts
    elif free_parts and target.chips % copies == 0:
        parts = target.chips // copies
    target.check_mesh(copies, parts)
    return replace_options(options, tensor_parallel_size=parts, data_parallel_size=copies)


def replace_options(options: EngineArgs, **changes: Any) -> EngineArgs:
    """A checked copy with some options changed."""
    return EngineArgs(**(vars(options) | changes))


def possible_parts(model: ModelConfig, most: int) -> Iterator[int]:
    """The numbers of devices that can share a copy of a model."""
    for parts in range(1, most + 1):
        try:
            model.split(parts)
        except ValueError:
            continue
        yield parts


def lay_out(config: EngineConfig, hf_config: Mapping[str, Any], mesh: Mesh | AbstractMesh) -> ModelPlan:
    """The model on a mesh, as the engine plans it; no weights are looked for."""
    return plan_model(
        ".",
        hf_config=hf_config,
        dtype=config.dtype,
        load_format="dummy",
        mesh=mesh,
        max_model_len=config.max_model_len,
    )


def advise(setup: Setup) -> Iterator[str]:
    """What would fit instead, each a line."""
    config, here = setup.config, f"fits on {'these' if setup.count > 1 else 'this'} {setup.count} device(s)"
    length = config.max_model_len // 2
    while length >= config.block_size and not setup.fits(max_model_len=length, fit_max_model_len=False):
        length //= 2
    if length >= config.block_size:
        yield f"--max-model-len {length} {here}"
    tokens, seqs = config.max_num_batched_tokens // 2, config.max_num_seqs
    while tokens >= 256 and not setup.fits(max_num_batched_tokens=tokens, max_num_seqs=min(seqs, tokens // 4)):
        tokens //= 2
    if tokens >= 256:
        yield f"--max-num-batched-tokens {tokens} --max-num-seqs {min(seqs, tokens // 4)} {here}"
    own = config.parallel.tensor_parallel_size
    more = (parts for parts in possible_parts(base_config(setup), MOST_PARTS) if parts > own)
    enough = next((parts for parts in more if fits_with_parts(setup, parts)), None)
    if enough is not None:
        yield f"--tensor-parallel-size {enough} would fit{_smallest_slice(setup.target, enough)}"
    else:
        yield f"no tensor_parallel_size up to {MOST_PARTS} would fit on devices of this kind with these options"


def _smallest_slice(target: Slice | None, parts: int) -> str:
    """What to rent for so many devices."""
    if target is None:
        return " on devices of this kind"
    slices = map(Slice.parse, target.generation.slices)
    return next((f", such as on {one.name}" for one in slices if one.chips % parts == 0), "")


def base_config(setup: Setup) -> ModelConfig:
    """The model, as it is on a device alone."""
    return models.resolve(setup.hf_config).config(setup.hf_config, setup.config.max_model_len)


def fits_with_parts(setup: Setup, parts: int) -> bool:
    """Whether so many devices of this kind could share a copy of the model."""
    mesh = abstract_mesh(1, parts, AbstractDevice(*device_facts(setup.device)))
    return setup.fits(lay_out(setup.config, setup.hf_config, mesh))


def choose(buckets: Buckets, words: Sequence[str]) -> list[Bucket]:
    """The step shapes that these words name together; a number is that of the sequences of a plain decode.

    Raises:
        UsageError: decodes of that many sequences have no program of their own.
    """
    essential, everything = buckets.essential(), buckets.all()
    plain = {one.seqs: one for one in everything if one.decode_only and one.level is Level.GREEDY and one.steps == 1}
    if missing := [word for word in words if word.isdigit() and int(word) not in plain]:
        raise UsageError(f"there is no program for {missing[0]} decodes; there are {', '.join(map(str, plain))}")
    chosen = [plain[int(word)] for word in words if word.isdigit()]
    kinds = {
        "all": lambda bucket: True,
        "essential": lambda bucket: bucket in essential,
        "largest": lambda bucket: bucket == buckets.largest,
        "decode": lambda bucket: bucket.decode_only,
        "prefill": lambda bucket: not bucket.decode_only,
        "greedy": lambda bucket: bucket in plain.values(),
    }
    wanted = [kinds[word] for word in words if not word.isdigit()]
    return [bucket for bucket in everything if bucket in chosen or any(one(bucket) for one in wanted)]
