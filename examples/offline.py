"""Continue a few prompts with the built-in model: `python examples/offline.py [MODEL]`."""

import sys

from jaxserve import LLM, SamplingParams

PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "The three primary colours are",
]


def main(model: str | None = None) -> None:
    llm = LLM(model, max_model_len=256, max_num_seqs=4)
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24))
    for output in outputs:
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
