"""Devices of Ray actors: what is asked of Ray, and how jax is told in the actor's process."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
import ray

from jaxserve.ray.config import EngineActorConfig
from sharding import launch

logger = logging.getLogger(__name__)

RESOURCES = {"gpu": "GPU", "tpu": "TPU"}  # Ray's names
# Given no names, jax falls back to the CPU without an error, and an actor would hold a GPU that it never uses.
PLATFORMS = {"gpu": "cuda,cpu", "tpu": "tpu,cpu", "cpu": "cpu"}


def find_device(wanted: str) -> str:
    """ "gpu", "tpu" or "cpu": the one that is wanted, or with "auto" the first that the cluster has now.

    Joins or starts a cluster as `ray.init()` does, if this process is not in one yet.
    """
    if not ray.is_initialized():
        ray.init()
    if wanted != "auto":
        return wanted
    return choose_device(ray.cluster_resources())


def choose_device(resources: Mapping[str, float]) -> str:
    """The device that a cluster's resources speak for."""
    found = next((device for device, name in RESOURCES.items() if resources.get(name, 0) > 0), "cpu")
    logger.info("engines run on %s, of which the cluster has %s", found, resources.get(RESOURCES.get(found, "CPU"), 0))
    return found


def actor_options(config: EngineActorConfig, device: str) -> dict[str, Any]:
    """Options of a Ray actor with devices of its own.

    Ray shows each actor its own devices alone (CUDA_VISIBLE_DEVICES, TPU_VISIBLE_CHIPS).
    """
    options: dict[str, Any] = {"num_cpus": 1 if config.num_cpus is None else config.num_cpus}
    if device == "gpu":
        options["num_gpus"] = config.num_devices
    elif device == "tpu":
        options["resources"] = {"TPU": config.num_devices}
    if config.accelerator_type is not None:
        options["accelerator_type"] = config.accelerator_type
    if config.runtime_env is not None:
        options["runtime_env"] = dict(config.runtime_env)
    return options


def claim_devices(config: EngineActorConfig, device: str) -> None:
    """Make jax use the actor's devices and no others; before jax starts in this process."""
    jax.config.update("jax_platforms", PLATFORMS[device])
    if device != "cpu":
        return
    jax.config.update("jax_num_cpu_devices", config.num_devices)
    if config.num_cpus:
        launch.set_environment({"NPROC": str(math.ceil(config.num_cpus))})  # threads of XLA's CPU client
