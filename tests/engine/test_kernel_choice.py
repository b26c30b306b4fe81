"""The engine option `kernels`: which implementation serves an op."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.batch import Bucket, Limits
from jaxserve.engine.step import ScoreMode
from jaxserve.engine.tracing import Recipe, Tracer
from pallas_kernels.dispatch import Op, preferring

pytestmark = pytest.mark.usefixtures("quick_compilation")
H100 = ("NVIDIA H100 80GB HBM3", 132, "gpu")


def test_a_choice_holds_inside_and_counts_less_than_a_call():
    def first(x: int) -> int:
        return x

    def second(x: int) -> int:
        raise NotImplementedError("cannot")

    op = Op("op", {"a": first, "b": second, "c": first})
    with preferring({"op": "c"}):
        assert op.choice(None, 1) == "c"
        assert op.choice("a", 1) == "a"
    assert op.choice(None, 1) == "a"
    with preferring({"op": "b"}), pytest.raises(NotImplementedError, match="b: cannot"):
        op(None, 1)


def test_a_recipe_carries_it(tiny_model: Path):
    config = json.loads((tiny_model / "config.json").read_text())
    mode = ScoreMode.parse("raw_logprobs")
    plain = Recipe(config, 128, "bfloat16", Limits(8, 2, 64, 16, 5), mode, H100)
    chosen = replace(plain, kernels=(("paged_attention", "xla"), ("rope_kv_write", "xla")))
    assert Recipe.loads(chosen.dumps()) == chosen
    assert chosen.digest(Bucket(4, 4)) != plain.digest(Bucket(4, 4))
    notes = json.loads(Tracer(chosen)(Bucket(4, 4)).partition(b"\n")[0])
    assert {note for note in notes if note.startswith("paged_attention")} == {"paged_attention: xla"}


def test_names_are_checked(tiny_model: Path):
    with pytest.raises(ValueError, match=r"kernels must name ops among paged_attention, .*'attention'"):
        LLM(tiny_model, kernels={"attention": "xla"})
    with pytest.raises(ValueError, match=r"kernels\['paged_attention'\] must be one of mosaic_gpu, mosaic_tpu, xla"):
        LLM(tiny_model, kernels={"paged_attention": "triton"})


def test_an_engine_runs_with_it(tiny_model: Path):
    llm = LLM(tiny_model, load_format="dummy", skip_tokenizer_init=True, kernels={"paged_attention": "xla"})
    (output,) = llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 3
