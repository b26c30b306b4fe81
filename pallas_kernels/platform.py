"""What the kernels need to know about the device that a program is traced for."""

from types import MappingProxyType

import jax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import target_device

HOPPER = ("H100", "H200", "H800", "H20", "GH200")  # in the names of devices of compute capability 9
TPUS = MappingProxyType({  # what jax calls the devices of a generation
    "TPU v4": pltpu.ChipVersion.TPU_V4, "TPU v5 lite": pltpu.ChipVersion.TPU_V5E, "TPU v5": pltpu.ChipVersion.TPU_V5P,
    "TPU v5p": pltpu.ChipVersion.TPU_V5P, "TPU v6 lite": pltpu.ChipVersion.TPU_V6E, "TPU7x": pltpu.ChipVersion.TPU_7X,
})  # fmt: skip


def require_hopper() -> int:
    """Number of SMs of the GPU that the program is for.

    Raises:
        NotImplementedError: it is not for an NVIDIA GPU of compute capability 9 (Hopper).
    """
    device = target_device()
    if device.platform != "gpu":
        raise NotImplementedError(f"needs an NVIDIA GPU, the platform is {device.platform!r}")
    if isinstance(device, jax.sharding.AbstractDevice):
        hopper, cores = any(name in device.device_kind for name in HOPPER), device.num_cores
    else:
        hopper, cores = str(device.compute_capability).split(".", maxsplit=1)[0] == "9", device.core_count
    if not hopper or cores is None:
        raise NotImplementedError(f"needs compute capability 9.x (Hopper), not {device.device_kind}")
    return cores


def require_tpu() -> pltpu.TpuInfo:
    """What is known of the TPU that the program is for; sizes and rates are those of one of its `num_cores` cores.

    Raises:
        NotImplementedError: it is not for a TPU, or for an unknown generation.
    """
    device = target_device()
    if device.platform != "tpu":
        raise NotImplementedError(f"needs a TPU, the platform is {device.platform!r}")
    version = TPUS.get(device.device_kind)
    if version is None:
        raise NotImplementedError(f"{device.device_kind!r} is not one of {', '.join(TPUS)}")
    return pltpu.get_tpu_info_for_chip(version, device.num_cores or 1)
