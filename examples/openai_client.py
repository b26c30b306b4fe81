"""The official OpenAI client against a server started with `jaxserve serve` (pip install openai).

python examples/openai_client.py [--base-url http://127.0.0.1:8000/v1] [--api-key KEY]
"""

import argparse

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none", help="as given to the server")
    args = parser.parse_args()
    client = OpenAI(base_url=args.base_url, api_key=args.api_key)
    model = client.models.list().data[0].id

    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=40, temperature=0)
    print(answer.choices[0].message.content)
    print(answer.usage)

    messages[0]["content"] = "Write one sentence about a small robot."
    stream = client.chat.completions.create(
        model=model, messages=messages, max_tokens=60, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()

    # Fields that the client does not know travel in extra_body.
    extra = {"top_k": 20, "min_p": 0.05, "x_effective_params": True}
    text = client.completions.create(model=model, prompt="Once upon a time", max_tokens=30, seed=1, extra_body=extra)
    print(text.choices[0].text)
    print((text.model_extra or {})["x_effective_params"])


if __name__ == "__main__":
    main()
