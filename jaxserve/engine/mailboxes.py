"""Memory that GPUs of one process give one another, so that a sum over them is one kernel."""

import ctypes
import logging
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from pallas_kernels.all_reduce.mailbox import MAX_RANKS, mailbox_bytes, make_table
from sharding.mesh import AXES

logger = logging.getLogger(__name__)

CUDA = "libcuda.so.1"


def reserved_bytes(mesh: Mesh) -> int:
    """Of each device, for its mailbox; 0 where the devices of a copy of the model cannot write to one another.

    That takes GPUs of this process with access to each other's memory, over NVLink or PCIe.
    """
    ranks = mesh.shape["model"]
    devices = list(mesh.devices.flat)
    ours = all(device.process_index == jax.process_index() for device in devices)
    if not 1 < ranks <= MAX_RANKS or devices[0].platform != "gpu" or not ours:
        return 0
    for row in mesh.devices:
        for one, other in permutations(row, 2):
            if not _reaches(one.local_hardware_id, other.local_hardware_id):
                logger.info("GPU %d cannot write to GPU %d; sums go through NCCL", one.id, other.id)
                return 0
    return mailbox_bytes(ranks)


def open_mailboxes(mesh: Mesh) -> tuple[Int[Array, "words"], Array]:
    """Tables of all devices, one after the other, and the mailboxes, which must live as long as sums are made."""
    sharding = NamedSharding(mesh, P(AXES))
    size = mailbox_bytes(mesh.shape["model"]) // np.dtype(np.int32).itemsize
    boxes = jax.jit(lambda: jnp.zeros(mesh.size * size, jnp.int32), out_shardings=sharding)()
    places = {shard.device: shard.data.unsafe_buffer_pointer() for shard in boxes.addressable_shards}
    tables = [make_table(rank, [places[device] for device in row]) for row in mesh.devices for rank in range(len(row))]
    return jax.device_put(np.concatenate(tables), sharding), boxes


def _reaches(one: int, other: int) -> bool:
    """Whether the GPU of the first number may read and write the memory of the other, by the CUDA driver."""
    answer = ctypes.c_int(0)
    try:
        status = ctypes.CDLL(CUDA).cuDeviceCanAccessPeer(ctypes.byref(answer), one, other)
    except OSError:
        return False
    return status == 0 and bool(answer.value)
