"""Exported steps: what names them, where they are kept, and that any process makes the same."""

import contextlib
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.batch import Bucket, Level, Limits, packed_size
from jaxserve.engine.helpers import Compilation, Helper, Tracers
from jaxserve.engine.step import ScoreMode
from jaxserve.engine.tracing import ProgramStore, Recipe, Tracer, load_program, state_shapes
from jaxserve.weights import load_weights, plan_model

pytestmark = pytest.mark.usefixtures("quick_compilation")
H100 = ("NVIDIA H100 80GB HBM3", 132, "gpu")
CPU = ("cpu", None, "cpu")
GREEDY, DRAW = Bucket(4, 4), Bucket(4, 4, Level.DRAW)


def recipe(folder: Path, device=CPU, **changes) -> Recipe:
    config = json.loads((folder / "config.json").read_text()) | changes
    mode = ScoreMode.parse("raw_logprobs")
    return Recipe(config, 128, "bfloat16" if device is H100 else "float32", Limits(8, 2, 64, 16, 5), mode, device)


def run(blob: bytes, recipe: Recipe, bucket: Bucket) -> np.ndarray:
    """The results of the exported step on dummy weights and an all but empty batch."""
    model = plan_model(
        ".", hf_config=recipe.hf_config, dtype=recipe.dtype, load_format="dummy", max_model_len=recipe.max_model_len
    )
    shapes = state_shapes(model.model_config, recipe.limits, model.dtype, model.mesh)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    buffer = jnp.ones(packed_size(bucket, recipe.limits), jnp.int32)
    return np.asarray(jax.jit(load_program(blob, state))(load_weights(model), state, buffer)[1])


def test_a_recipe_survives_being_written_down(tiny_model: Path):
    first = recipe(tiny_model)
    again = Recipe.loads(first.dumps())
    assert again == first
    assert again.digest(GREEDY) == first.digest(GREEDY)


def test_whatever_changes_a_program_changes_its_name(tiny_model: Path):
    first = recipe(tiny_model)
    others = [
        recipe(tiny_model, H100),
        recipe(tiny_model, rms_norm_eps=1e-6),
        replace(first, dtype="bfloat16"),
        replace(first, max_model_len=64),
        replace(first, mesh=(1, 2)),
        replace(first, mesh=(1, 2), mailboxes=True),
        replace(first, limits=replace(first.limits, num_pages=17)),
        replace(first, mode=ScoreMode.parse("processed_logprobs")),
    ]
    names = {one.digest(GREEDY) for one in (first, *others)} | {first.digest(DRAW)}
    with jax.default_matmul_precision("highest"):
        names.add(first.digest(GREEDY))
    assert len(names) == len(others) + 3


def test_a_config_that_json_cannot_hold_is_not_portable(tiny_model: Path):
    assert recipe(tiny_model).portable
    assert not recipe(tiny_model, odd=object()).portable


@contextlib.contextmanager
def ready_helper(plan: Recipe) -> Iterator[Helper]:
    helper = Helper(plan)
    try:
        helper.wait_ready()
        yield helper
    finally:
        helper.close()


def test_a_helper_makes_the_same_program(tiny_model: Path):
    plan = recipe(tiny_model)
    with ready_helper(plan) as helper:
        theirs, ours = helper(DRAW), Tracer(plan)(DRAW)
    assert theirs.partition(b"\n")[0] == ours.partition(b"\n")[0]
    np.testing.assert_array_equal(run(theirs, plan, DRAW), run(ours, plan, DRAW))


def test_a_helper_traces_with_the_settings_of_this_process(tiny_model: Path):
    plan = recipe(tiny_model, H100)

    def exact_products(blob: bytes) -> int:
        return jax.export.deserialize(bytearray(blob.partition(b"\n")[2])).mlir_module().count("HIGHEST")

    with jax.default_matmul_precision("highest"), ready_helper(plan) as helper:
        theirs, ours = helper(GREEDY), Tracer(plan)(GREEDY)
    assert exact_products(theirs) == exact_products(ours) > exact_products(Tracer(plan)(GREEDY))


def test_a_helper_that_dies_is_replaced_by_this_process(tiny_model: Path):
    plan, asked = recipe(tiny_model), []
    tracers = Tracers(lambda bucket: bytes(asked.append(bucket) or b"ours"), plan, helpers=0)
    helper = Helper(plan)
    tracers._helping.add(helper)
    tracers._idle.put(helper)
    helper._process.kill()
    assert tracers(GREEDY) == b"ours"
    assert tracers(DRAW) == b"ours"
    assert asked == [GREEDY, DRAW]
    tracers.close()


def test_a_helper_does_not_outlive_the_engine(tiny_model: Path):
    """Not even while it imports what it needs, which takes seconds."""
    helper = Helper(recipe(tiny_model))
    assert helper._process.stdin is not None
    helper._process.stdin.close()  # as the end of this process would
    assert helper._process.wait(1) == 0
    helper.close()


def test_helpers_take_over_and_one_of_them_stays(tiny_model: Path):
    plan = recipe(tiny_model)
    tracers = Tracers(lambda bucket: b"ours", plan, helpers=2)
    while len(tracers._helping) < 2:
        tracers(GREEDY)  # by whoever is there
    assert tracers(GREEDY) != b"ours"
    tracers.rest()
    assert len(tracers._helping) == 1
    assert tracers(GREEDY) != b"ours"
    tracers.close()
    assert tracers(GREEDY) == b"ours"


FOUND_HERE = """
import json, sys
import jax
from jaxserve.batch import Bucket
from jaxserve.engine.helpers import Compilation, Helper
from jaxserve.engine.step_compiler import StepCompiler
from jaxserve.engine.tracing import Recipe
from sharding.mesh import make_mesh
jax.config.update("jax_compilation_cache_dir", sys.argv[2])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
plan, device, events = Recipe.loads(sys.argv[1]), jax.devices()[0], []
helper = Helper(plan, Compilation(sys.argv[2], 0.0, device.id, {"xla_embed_ir_in_executable": False}))
helper.wait_ready()
blob = helper(Bucket(4, 4))
helper.close()
jax.monitoring.register_event_listener(lambda event, **facts: events.append(event.rpartition("/")[2]))
options = {"xla_embed_ir_in_executable": False}
StepCompiler.of(plan, plan.plan(make_mesh(devices=[device])), lambda bucket: blob, None, options)(Bucket(4, 4))
print(json.dumps([blob.partition(b"\\n")[0].decode(), events]))
"""


def test_what_a_helper_compiles_is_found_here(tiny_model: Path, tmp_path: Path):
    """It compiles for its own view of the device, and leaves the program where the engine looks before it compiles."""
    cache = tmp_path / "compiled"
    command = [sys.executable, "-c", FOUND_HERE, recipe(tiny_model).dumps(), str(cache)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    notes, events = json.loads(done.stdout.splitlines()[-1])
    assert any(note.startswith("paged_attention") for note in json.loads(notes))
    assert events.count("cache_hits") == 1
    assert "cache_misses" not in events
    assert len(list(cache.glob("*-cache"))) == 1


def test_helpers_give_the_device_back_when_most_is_done(tiny_model: Path, tmp_path: Path):
    plan = recipe(tiny_model)
    compilation = Compilation(str(tmp_path), 0.0, jax.devices()[0].id, {})
    tracers = Tracers(lambda bucket: b"ours", plan, 1, compilation)
    assert not tracers._helping  # nobody has asked for anything
    while not tracers._helping:
        tracers(GREEDY)
    (compiling,) = tracers._helping
    assert tracers(GREEDY) != b"ours"
    tracers.rest()
    assert compiling._process.returncode == 0
    while not tracers._helping:  # one that only traces takes its place, when something turns up
        tracers(GREEDY)
    assert tracers(GREEDY) != b"ours"
    tracers.close()


def test_helpers_that_cannot_have_the_device_trace(tiny_model: Path, tmp_path: Path):
    nowhere = Compilation(str(tmp_path), 0.0, 1234, {})
    tracers = Tracers(lambda bucket: b"ours", recipe(tiny_model), 1, nowhere)
    while not tracers._helping:
        tracers(GREEDY)
    assert tracers(GREEDY) != b"ours"
    assert not list(tmp_path.glob("*-cache"))
    tracers.close()


@pytest.mark.parametrize("device", [H100, CPU])
def test_the_first_program_of_a_process_traces_its_layers_once(tiny_model: Path, device):
    """Nothing that tracing imports may change the keys of jax's caches."""
    code = (
        "import sys\n"
        "from jaxserve.batch import Bucket\n"
        "from jaxserve.engine.tracing import Recipe, Tracer\n"
        "from jaxserve.models import decoder\n"
        "plain, calls = decoder.PreNormBlock.__call__, []\n"
        "decoder.PreNormBlock.__call__ = lambda self, *given: calls.append(1) or plain(self, *given)\n"
        "Tracer(Recipe.loads(sys.argv[1]))(Bucket(4, 4))\n"
        "assert len(calls) == 1, calls\n"
    )
    plan = recipe(tiny_model, device, hidden_size=256, head_dim=64, num_hidden_layers=4)
    subprocess.run([sys.executable, "-c", code, plan.dumps()], check=True, timeout=60)


@pytest.mark.slow
def test_a_gpu_program_is_made_without_a_gpu(tiny_model: Path):
    """Head width 64 and one key head per two: all kernels of a Hopper GPU serve."""
    plan = recipe(tiny_model, H100, hidden_size=256, head_dim=64)
    for bucket in (DRAW, Bucket(64, 4, Level.SAMPLE, 1024)):
        for mesh in ((1, 1), (2, 2)):
            notes = json.loads(Tracer(replace(plan, mesh=mesh))(bucket).partition(b"\n")[0])
            assert {"paged_attention: mosaic_gpu", "rope_kv_write: mosaic_gpu"} <= set(notes)


@pytest.mark.parametrize(("mailboxes", "chosen"), [(True, "all_reduce: mosaic_gpu"), (False, "all_reduce: xla")])
def test_gpus_with_mailboxes_add_up_in_a_kernel(tiny_model: Path, mailboxes: bool, chosen: str):
    plan = replace(recipe(tiny_model, H100, hidden_size=256, head_dim=64), mesh=(1, 2), mailboxes=mailboxes)
    notes, _, program = Tracer(plan)(Bucket(4, 4)).partition(b"\n")
    found = [note for note in json.loads(notes) if note.startswith("all_reduce")]
    assert found
    assert all(note.startswith(chosen) for note in found)
    exported = jax.export.deserialize(bytearray(program))
    assert exported.mlir_module().count("one_shot_all_reduce_mosaic_gpu") > 0 or not mailboxes
    mesh = plan.abstract_mesh
    model = plan.plan().model_config
    shapes = jax.tree.leaves(state_shapes(model, plan.limits, np.dtype("bfloat16"), mesh, mailboxes=mailboxes))
    assert len(exported.out_avals) == len(shapes) + 1


def test_an_older_gpu_gets_plain_programs(tiny_model: Path):
    plan = replace(recipe(tiny_model, H100), device=("NVIDIA A100-SXM4-80GB", 108, "gpu"))
    notes = json.loads(Tracer(plan)(GREEDY).partition(b"\n")[0])
    assert any(note.startswith("paged_attention: xla (mosaic_gpu: needs compute capability 9.x") for note in notes)


def test_the_store_gives_back_what_is_whole(tmp_path: Path):
    store = ProgramStore(tmp_path / "new" / "steps")
    assert store.get("a") is None
    store.put("a", b"program" * 100)
    assert store.get("a") == b"program" * 100
    (path,) = (tmp_path / "new" / "steps").iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    assert store.get("a") is None
    path.write_bytes(zlib.compress(b"other"))
    assert store.get("a") == b"other"


@pytest.mark.parametrize("age", [29, 31])
def test_the_store_forgets_what_nobody_wants(tmp_path: Path, age: int):
    ProgramStore(tmp_path).put("a", b"program")
    (path,) = tmp_path.iterdir()
    old = path.stat().st_mtime - age * 86_400

    os.utime(path, (old, old))
    assert (ProgramStore(tmp_path).get("a") is None) == (age > 30)


@pytest.mark.parametrize("age", [1800, 5400])
def test_the_store_tidies_up_after_killed_processes(tmp_path: Path, age: int):
    half = tmp_path / "unfinished-abc"
    half.write_bytes(b"half")
    old = half.stat().st_mtime - age
    os.utime(half, (old, old))
    ProgramStore(tmp_path)
    assert half.exists() == (age < 3600)


def test_a_program_from_the_store_brings_the_library_of_its_kernels(tiny_model: Path, tmp_path: Path):
    """A process that traces nothing imports no kernel, but XLA must know what their code links to."""
    blob = Tracer(recipe(tiny_model, H100))(GREEDY)
    (tmp_path / "blob").write_bytes(blob)
    code = (
        "import sys, jax\n"
        "from pathlib import Path\n"
        "from jaxserve.engine.tracing import load_program\n"
        "before = 'jax.experimental.mosaic.gpu.core' in sys.modules\n"
        "load_program(Path(sys.argv[1]).read_bytes(), None)\n"
        "assert (before, 'jax.experimental.mosaic.gpu.core' in sys.modules) == (False, True)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "blob")], check=True, timeout=60)


@pytest.mark.gpu
def test_a_second_start_runs_what_the_first_has_compiled(tiny_model: Path, tmp_path: Path):
    """The same tokens, from programs and compiled code on disk, in a process that has never imported a kernel."""
    code = (
        "import sys\n"
        "from jaxserve import LLM, SamplingParams\n"
        "llm = LLM(sys.argv[1], load_format='dummy', skip_tokenizer_init=True, max_model_len=512, seed=0,\n"
        "          num_gpu_blocks_override=64, max_num_seqs=4, compilation_cache_dir=sys.argv[2])\n"
        "params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)\n"
        "prompts = [{'prompt_token_ids': list(range(5, 40))}, {'prompt_token_ids': [7, 8, 9]}]\n"
        "print([o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)])\n"
        "print(sorted(name for name in sys.modules if name.startswith('pallas_kernels') and 'hopper' in name))\n"
    )
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((tiny_model / "config.json").read_text()) | {"head_dim": 64, "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "cache")]
    first, second = (
        subprocess.run(command, check=True, timeout=200, capture_output=True, text=True).stdout.splitlines()
        for _ in range(2)
    )
    assert first[0] == second[0]
    assert second[1] == "[]"
