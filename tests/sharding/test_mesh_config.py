"""Mesh config files: what they mean, and what is said about mistakes."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.config import Axes, Coordinator, MeshConfig, MeshConfigError, Timeouts, load, parse

EXAMPLES = Path(__file__).parents[2] / "examples" / "mesh"

FULL = """
platform: cpu
axes: {data: 2, model: 4}
hosts: 2
processes_per_host: 2
devices_per_process: 2
coordinator: {address: node-a, port: 1234}
timeouts: {start: 60, heartbeat: 10, shutdown: 5, stop: 3}
engine: {dtype: bfloat16, max-model-len: 8192, hf_overrides: {a: [1, 2]}}
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mesh.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_full_file(tmp_path: Path):
    config = load(written(tmp_path, FULL))
    assert config.axes == Axes(2, 4)
    assert (config.platform, config.hosts, config.processes, config.devices_per_process) == ("cpu", 2, 4, 2)
    assert config.coordinator == Coordinator("node-a", 1234)
    assert config.timeouts == Timeouts(60, 10, 5, 3)
    assert config.engine == {"dtype": "bfloat16", "max_model_len": 8192, "hf_overrides": {"a": [1, 2]}}
    assert config.engine_axes == config.axes


def test_only_axes_are_needed():
    config = parse({"axes": {"model": 4}})
    assert config == MeshConfig(Axes(1, 4), devices_per_process=4)
    assert parse({"axes": {"data": 4, "model": 2}, "processes_per_host": 2}).devices_per_process == 4


def test_an_engine_in_each_process():
    config = parse({"axes": {"data": 4, "model": 2}, "processes_per_host": 4, "independent": True})
    assert config.engine_axes == Axes(1, 2)
    assert config.devices_per_process == 2


def test_facts_depend_on_content_alone():
    one, two = parse({"axes": {"model": 4}}, "a.yaml"), parse({"axes": {"data": 1, "model": 4}}, "b.yaml")
    assert one.facts() == two.facts()
    assert one.facts()["axes.model"] == "4"
    other = parse({"axes": {"model": 4}, "engine": {"seed": 1}, "timeouts": {"stop": 11}}).facts()
    assert dict(other.items() - one.facts().items()) == {"engine.seed": "1", "timeouts.stop": "11"}


BAD = [
    ("axis: {model: 4}", r"unknown key axis \(value \{'model': 4\}\); did you mean axes\?"),
    ("axes: {modle: 4}", r"unknown key axes.modle \(value 4\); did you mean axes.model\?"),
    ("axes: {model: 4}\ntimeouts: {begin: 3}", "unknown key timeouts.begin .*known are start, heartbeat"),
    ("platform: gpu", "has no axes; write for example"),
    ("axes: 4", "axes must be keys and values, got 4"),
    ("axes: {model: 0}", "axes.model must be a whole number from 1 to 65536, got 0"),
    ("axes: {model: '4'}", "axes.model must be a whole number .*got '4'"),
    ("axes: {model: true}", "axes.model must be a whole number .*got True"),
    ("axes: {model: 4.0}", "axes.model must be a whole number .*got 4.0"),
    ("axes: {model: 4}\nplatform: cuda", "platform must be one of cpu, gpu, tpu, got 'cuda'"),
    ("axes: {model: 4}\nindependent: 1", "independent must be true or false, got 1"),
    ("axes: {model: 4}\nprocesses_per_host: 3", "axes data=1 x model=4 need 4 devices, but .* are 3; change"),
    ("axes: {model: 4}\ndevices_per_process: 8", "need 4 devices, but .*devices_per_process=8 are 8"),
    ("axes: {data: 1, model: 4}\nprocesses_per_host: 2\nindependent: true", "axes.data=1 is not a multiple of 2"),
    ("axes: {model: 4}\nplatform: tpu\nprocesses_per_host: 4", "on TPU one process drives all chips"),
    ("axes: {model: 4}\nhosts: 2\ncoordinator: {address: localhost}", "cannot be reached from the other"),
    ("axes: {model: 4}\ncoordinator: {address: 'a:80'}", "address must be a host name .*without port, got 'a:80'"),
    ("axes: {model: 4}\ncoordinator: {address: 7}", "address must be a host name .*got 7"),
    ("axes: {model: 4}\ncoordinator: {port: 70000}", "coordinator.port must be a whole number from 1 to 65535"),
    ("axes: {model: 4}\ntimeouts: {start: 5, heartbeat: 10}", "timeouts.start=5 is shorter than"),
    ("axes: {model: 4}\nengine: {tensor_parallel_size: 4}", "is what axes.model says; leave it out"),
    ("axes: {model: 4}\nengine: {seed: 2020-01-01}", "engine.seed must be text, a number"),
    ("axes: {model: 4}\nengine: [1]", r"engine must be keys and values, got \[1\]"),
    ("axes: {model: 4}\naxes: {model: 8}", "the key 'axes' is given twice"),
    ("- 1\n- 2", "must hold keys and values"),
    ("", "must hold keys and values .*got None"),
    ("axes: {model: 4", "is not YAML"),
    ("axes: !!python/object/apply:os.system ['true']", "is not YAML: could not determine a constructor"),
]


@pytest.mark.parametrize(("text", "words"), BAD, ids=[text[:30] for text, _ in BAD])
def test_mistakes_are_named(tmp_path: Path, text: str, words: str):
    path = written(tmp_path, text)
    with pytest.raises(MeshConfigError, match=words) as error:
        load(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(MeshConfigError, match=r"nothing\.yaml cannot be read"):
        load(tmp_path / "nothing.yaml")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["axes", "model", "data", "hosts", "engine"]), inner)
    ),
    max_leaves=8,
)


@given(json_values)
def test_any_content_gives_a_config_or_one_kind_of_error(values: object):
    try:
        config = parse(values)
    except MeshConfigError:
        return
    assert config.axes.size == config.processes * config.devices_per_process


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_right(path: Path):
    assert load(path).axes.size >= 1
