"""The profiler script: a whole run without a GPU, and how it reads programs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"

TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}

PROGRAM = """
%fused (param_0: bf16[4,8]) -> bf16[4,8] {
}
ENTRY %main {
  %weights = bf16[64,8]{1,0} parameter(0)
  %cache = bf16[2,3,4]{2,1,0} parameter(1)
  ROOT %dot.1 = (f32[4,64]{1,0}, bf16[2,3,4]{2,1,0}) custom-call(%weights, %cache), metadata={op_name="jit(f)/layer_7/mlp/dot"}
}
"""  # noqa: E501


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return pytest.importorskip("profile_step")


@pytest.mark.parametrize("form", [[], ["--prefill"]], ids=["decode", "prefill"])
def test_runs_without_a_gpu(tmp_path: Path, form: list[str]):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    command = [sys.executable, str(SCRIPTS / "profile_step.py"), "--model", str(tmp_path), "--context", "70"]
    root = {"PYTHONPATH": str(SCRIPTS.parent), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*command, "--repeats", "2", *form], capture_output=True, text=True, env=root, check=True)
    assert "2 layers" in done.stdout
    assert "needs an NVIDIA GPU" in done.stdout


def test_reads_types_scopes_and_bytes_of_a_program(script):
    instructions = script.parse_instructions(PROGRAM)
    dot = instructions["dot.1"]
    assert (dot.opcode, dot.operands) == ("custom-call", ("weights", "cache"))
    assert script.short_scope(dot.scope) == "layer/mlp/dot"
    assert script.instruction_bytes("dot.1", instructions, (2, 3, 4)) == 64 * 8 * 2 + 4 * 64 * 4
    assert script.instruction_bytes("unknown", instructions, (2, 3, 4)) == 0
