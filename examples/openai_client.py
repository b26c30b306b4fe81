"""The official OpenAI client (pip install openai) against a server started with `jaxserve serve`.

python examples/openai_client.py [http://127.0.0.1:8000/v1 [API_KEY]]
"""

import sys

from openai import OpenAI

url, key = (*sys.argv[1:], *["http://127.0.0.1:8000/v1", "none"][len(sys.argv) - 1 :])
client = OpenAI(base_url=url, api_key=key)
model = client.models.list().data[0].id

question = [{"role": "user", "content": "What is the capital of France?"}]
answer = client.chat.completions.create(model=model, messages=question, max_tokens=40, temperature=0)
print(answer.choices[0].message.content, f"({answer.usage.completion_tokens} tokens)")

request = [{"role": "user", "content": "Write one sentence about a small robot."}]
for chunk in client.chat.completions.create(model=model, messages=request, max_tokens=60, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

# Fields that the client does not know travel in extra_body.
extra = {"top_k": 20, "min_p": 0.05, "x_effective_params": True}
text = client.completions.create(model=model, prompt="Once upon a time", max_tokens=30, seed=1, extra_body=extra)
print(text.choices[0].text)
print(text.model_extra["x_effective_params"])
