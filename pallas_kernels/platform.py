"""What the kernels need to know about the device that a program is traced for."""

from typing import Any

import jax

HOPPER = ("H100", "H200", "H800", "H20", "GH200")  # in the names of devices of compute capability 9


def target_device() -> Any:
    """The device of the abstract mesh in use, which need not exist here; without one, jax's default device."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


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
