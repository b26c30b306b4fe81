"""A file of prompts to a file of results: `python examples/batch_jsonl.py INPUT.jsonl OUTPUT.jsonl [MODEL]`.

A line of the input is `{"prompt": ..., "max_tokens": ...}`. A prompt that cannot be used gets an error in its line of
the output; the others complete.
"""

import json
import sys
from pathlib import Path

from jaxserve import LLM, SamplingParams


def main(source: str, target: str, model: str | None = None) -> None:
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
    params = [SamplingParams(temperature=0, max_tokens=row.get("max_tokens", 16)) for row in rows]
    llm = LLM(model, max_model_len=256, max_num_seqs=4)
    outputs = llm.generate([row["prompt"] for row in rows], params, on_error="return")
    with Path(target).open("w") as file:
        for row, output in zip(rows, outputs, strict=True):
            result = {"error": output.error} if output.error else {"text": output.outputs[0].text}
            print(json.dumps(row | result), file=file)


if __name__ == "__main__":
    main(*sys.argv[1:4])
