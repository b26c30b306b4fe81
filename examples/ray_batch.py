"""Batch inference over Ray Data: `python examples/ray_batch.py [MODEL]`, alone or as a job of a Ray cluster.

A lost engine is started again and its rows are done again; a row that cannot be answered says so in a column.
"""

import sys

import ray.data

from jaxserve.ray import EngineProcessorConfig, build_processor

COUNTRIES = ("Chile", "Egypt", "France", "Ghana", "Italy", "Japan", "Kenya", "Peru", "Spain")


def main(model: str | None = None) -> None:
    config = EngineProcessorConfig(
        model_source=model,
        engine_kwargs={"max_model_len": 256, "max_num_seqs": 8},
        sampling_params={"temperature": 0, "max_tokens": 12},
        concurrency=1,  # engines, each with devices of its own
        batch_size=4,
    )
    processor = build_processor(
        config,
        preprocess=lambda row: {"messages": [{"role": "user", "content": f"What is the capital of {row['country']}?"}]},
        postprocess=lambda row: {"country": row["country"], "answer": row["generated_text"]},
    )
    answers = processor(ray.data.from_items([{"country": country} for country in COUNTRIES]))
    for row in answers.iter_rows():  # or answers.write_parquet(...)
        print(row["country"], "->", row["__inference_error__"] or repr(row["answer"]))


if __name__ == "__main__":
    main(*sys.argv[1:2])
