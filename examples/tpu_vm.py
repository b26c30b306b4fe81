"""Serve a model from all chips of a TPU VM: `python examples/tpu_vm.py [MODEL]`.

On a slice of several hosts run it on each of them through the launcher, which joins them first:
`jaxserve launch --mesh mesh.yaml -- examples/tpu_vm.py MODEL`. Sizes then come from the mesh file.
"""

import sys

import jax

from jaxserve import LLM, SamplingParams
from jaxserve.distributed import engine_options

PROMPTS = [f"Write one sentence about the number {number}." for number in range(64)]


def main(model: str = "Qwen/Qwen3-8B") -> None:
    options = engine_options() or {"tensor_parallel_size": jax.device_count()}
    llm = LLM(model, **options)  # bfloat16, pages of 128 tokens; the memory plan is logged
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0.7, max_tokens=64))
    for output in outputs[:4]:
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
