"""From arguments to a ready engine: files, configuration, tokenizer, weights and programs."""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax

from jaxserve.checkpoints import find_model, read_generation_config, read_hf_config
from jaxserve.config import EngineArgs, EngineConfig, load_generation_config, merge_overrides, resolve
from jaxserve.engine.blueprint import settled
from jaxserve.engine.memory import total_memory
from jaxserve.engine.mirror import Mirror
from jaxserve.engine.runner import Runner
from jaxserve.text import Tokenizer, load_tokenizer
from jaxserve.weights import load_weights, plan_model
from sharding.mesh import make_mesh

logger = logging.getLogger(__name__)

OWN_FACTS = ("model", "compilation_cache_dir", "log_stats", "use_tqdm_on_load", "served_model_names")  # may differ


@dataclass(frozen=True)
class Parts:
    """What an engine is made of, besides its host-side bookkeeping."""

    config: EngineConfig
    tokenizer: Tokenizer | None
    runner: Runner


def build_parts(args: EngineArgs, when_following: Callable[[], object] | None = None) -> Parts:
    """Load everything an engine needs; the tokenizer and the weights load while the programs compile.

    Where several processes share the engine, this returns in the leader alone: the others call `when_following`, follow
    it and then end.

    Raises:
        SystemExit: this process was a follower, and the leader has closed the engine.
        ValueError: an argument, the model's files or the memory do not fit.
    """
    show_messages()
    path = _find_model(args)
    hf_config = merge_overrides(read_hf_config(path), args.hf_overrides)
    set_memory_fraction(args.gpu_memory_utilization)
    devices = jax.devices()
    device = jax.local_devices()[0]
    config = resolve(
        args,
        hf_config,
        _generation_config(args, path),
        jax.default_backend(),
        device_memory=total_memory(device, args.gpu_memory_utilization),
        device_kind=device.device_kind,
    )
    parallel = config.parallel
    parallel.check_devices(len(devices))
    use_compilation_cache(config.compilation_cache_dir)
    with ThreadPoolExecutor(1, thread_name_prefix="tokenizer") as pool:
        tokenizer = pool.submit(_load_tokenizer, args, path)
        model = plan_model(
            path,
            hf_config=hf_config,
            dtype=config.dtype,
            load_format=config.load_format,
            mesh=make_mesh(parallel.data_parallel_size, parallel.tensor_parallel_size, devices),
            max_model_len=config.max_model_len,
        )
        config = settled(config, args, model)
        # XLA uses several cores for a program, and the engine is at work beside.
        mirror = Mirror.open(facts(config, hf_config))
        threads = max(1, (os.cpu_count() or 1) // 4)
        runner = Runner(model, config, threads=threads, mirror=mirror, utilization=args.gpu_memory_utilization)
        try:
            start = time.perf_counter()
            leaves = load_weights(model, seed=config.seed, show_progress=config.use_tqdm_on_load)
            logger.info("%.2f GiB of weights in %.1f s", model.total_bytes / 2**30, time.perf_counter() - start)
            runner.prepare(leaves)
            if mirror.follower is not None:
                if when_following is not None:
                    when_following()
                runner.follow()
                raise SystemExit(0)
            return Parts(runner.config, tokenizer.result(), runner)
        except BaseException as error:
            if isinstance(error, Exception):
                mirror.fail(f"{type(error).__name__}: {error}")
            runner.close()
            raise


def facts(config: EngineConfig, hf_config: Mapping[str, Any]) -> dict[str, str]:
    """What must be the same in all processes that share an engine, by name."""
    own = {item.name: str(getattr(config, item.name)) for item in fields(config) if item.name not in OWN_FACTS}
    return own | {"config.json": json.dumps(hf_config, sort_keys=True, default=str)}


def _generation_config(args: EngineArgs, path: Path) -> Mapping[str, Any]:
    """The model's own, or with a folder given that one's values over it; end-of-sequence ids count in either case."""
    own = read_generation_config(path)
    if args.generation_config in ("auto", "vllm"):
        return own
    return own | dict(load_generation_config(args.generation_config, path))


def load_tokenizer_of(args: EngineArgs) -> Tokenizer | None:
    """The tokenizer that an engine with these arguments has; raises `ValueError` as loading the engine does."""
    return _load_tokenizer(args, _find_model(args))


def _find_model(args: EngineArgs) -> Path:
    return find_model(args.model, revision=args.revision, token=args.hf_token, download_dir=args.download_dir)


def _load_tokenizer(args: EngineArgs, path: Path) -> Tokenizer | None:
    if args.skip_tokenizer_init:
        return None
    return load_tokenizer(
        args.tokenizer or path,
        tokenizer_mode=args.tokenizer_mode,
        revision=args.tokenizer_revision or args.revision,
        token=args.hf_token,
        chat_template=args.chat_template,
    )


class Once(logging.Filter):
    """Lets each message through once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message is new."""
        message = record.getMessage()
        return message not in self._seen and not self._seen.add(message)


def show_messages() -> None:
    """Show messages (memory plan, which kernel serves each op, compilations) on stderr, unless logging is set up.

    Kernels are chosen whenever a program is traced; each choice is shown once in either case.
    """
    choices = logging.getLogger("pallas_kernels.dispatch")
    if not any(isinstance(one, Once) for one in choices.filters):
        choices.addFilter(Once())
    for name in ("jaxserve", "pallas_kernels"):
        ours = logging.getLogger(name)
        if not ours.hasHandlers():
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
            ours.addHandler(handler)
            ours.setLevel(logging.INFO)


def set_memory_fraction(fraction: float) -> None:
    """Let the accelerator's allocator take this share; without effect once jax is in use, or if the program chose."""
    if jax.config.jax_pjrt_client_create_options is None:
        jax.config.update("jax_pjrt_client_create_options", {"memory_fraction": fraction})


def use_compilation_cache(folder: Path | None) -> None:
    """Keep compiled programs in `folder`, unless the program has chosen another place."""
    if folder is None or jax.config.jax_compilation_cache_dir is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
