"""TPU slices by name."""

import importlib.util

import pytest

from sharding.topology import GENERATIONS, Slice, TopologyError, generation_of


@pytest.mark.parametrize(
    ("name", "topology", "chips", "hosts"),
    [
        ("v5e-1", "1x1", 1, 1),
        ("v5e-8", "2x4", 8, 1),
        ("v5litepod-16", "4x4", 16, 4),
        ("V6E-4", "2x2", 4, 1),
        ("v6e:2x4", "2x4", 8, 1),
        ("v5p-8", "2x2x1", 4, 1),  # the number counts TensorCores
        ("v5p-16", "2x2x2", 8, 2),
        ("v4-64", "2x4x4", 32, 8),
    ],
)
def test_names(name: str, topology: str, chips: int, hosts: int):
    found = Slice.parse(name)
    assert (found.topology, found.chips, found.hosts) == (topology, chips, hosts)
    assert Slice.parse(found.name) == found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v7-8", "generations are v4, v5e, v5p, v6e"),
        ("h100", "write GENERATION-SIZE such as v5e-8"),
        ("v5e-7", "of v5e there are v5e-1, v5e-4, v5e-8, .* counts chips"),
        ("v5p-9", "of v5p there are v5p-8, .* counts TensorCores"),
        ("v5e:3x3", "there is no slice 'v5e:3x3'"),
    ],
)
def test_slices_that_there_are_not(name: str, message: str):
    with pytest.raises(TopologyError, match=message):
        Slice.parse(name)


def test_a_mesh_must_use_every_chip():
    Slice.parse("v5e-8").check_mesh(2, 4)
    with pytest.raises(
        TopologyError, match=r"v5e-8 has 8 chips, but data=1 x model=4 are 4 devices; .* among 1, 2, 4, 8"
    ):
        Slice.parse("v5e-8").check_mesh(1, 4)


def test_without_the_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TopologyError, match=r"pip install 'jaxserve\[tpu\]'"):
        Slice.parse("v5e-8").devices()


def test_devices_have_their_generation():
    for one in GENERATIONS.values():
        device = Slice.parse(one.slices[0]).abstract_device
        assert generation_of(device.device_kind) is one
        assert (device.platform, device.num_cores) == ("tpu", one.cores)
    assert generation_of("NVIDIA H100 80GB HBM3") is None


def test_variables_name_the_slice_and_let_several_processes_compile():
    variables = Slice.parse("v5e-8").variables
    assert variables["TPU_ACCELERATOR_TYPE"] == "v5litepod-8"
    assert variables["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
