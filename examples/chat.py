"""A conversation of two turns, where the second builds on the first: `python examples/chat.py [MODEL]`."""

import sys

from jaxserve import LLM, SamplingParams

QUESTIONS = ["What is the largest planet of the solar system?", "How many moons does it have?"]


def main(model: str | None = None) -> None:
    llm = LLM(model, max_model_len=256, max_num_seqs=4)
    params = SamplingParams(temperature=0.6, top_p=0.95, seed=7, max_tokens=32)
    messages = [{"role": "system", "content": "Answer in one short sentence."}]
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        output = llm.chat(messages, params, use_tqdm=False)[0]
        answer = output.outputs[0].text
        messages.append({"role": "assistant", "content": answer})
        print(f"user: {question}\nassistant: {answer}")
        print(f"  ({output.num_cached_tokens} of {len(output.prompt_token_ids)} prompt tokens came from the cache)")


if __name__ == "__main__":
    main(*sys.argv[1:2])
