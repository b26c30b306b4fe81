"""The embedded SmolLM2, run in plain numpy from the tensors as the reader gives them.

The expected tokens are transformers' greedy continuation (float32). Wrong row order of queries or keys, a swapped
name or a wrong config number changes them.
"""

import numpy as np

from jaxserve.checkpoints import open_checkpoint, read_generation_config, read_hf_config
from jaxserve.weights import load_model

PROMPT = [504, 3575, 282, 4649, 314]  # "The capital of France is"
CONTINUATION = [7042, 30, 198, 198, 504, 2988, 314]


def norm(x, scale, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def rotate(x, theta):
    """Rotary embedding of `[T, heads, H]`, pairs half a head apart."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def attention(x, read, config):
    heads, groups, width = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    q, k, v = ((x @ read(f"self_attn.{n}_proj").T).reshape(len(x), -1, width) for n in "qkv")
    q, k = rotate(q, config["rope_theta"]), rotate(k, config["rope_theta"])
    k, v = (np.repeat(y, heads // groups, axis=1) for y in (k, v))
    scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(width)
    scores += np.triu(np.full(scores.shape[1:], -np.inf), 1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("nts,snh->tnh", weights, v).reshape(len(x), -1) @ read("self_attn.o_proj").T


def greedy_tokens(checkpoint, config, ids):
    """The most likely token after every position."""
    eps, embedding = config["rms_norm_eps"], checkpoint.read("model.embed_tokens.weight")
    x = embedding[np.asarray(ids)]
    for i in range(config["num_hidden_layers"]):

        def read(name, i=i):
            return checkpoint.read(f"model.layers.{i}.{name}.weight")

        x = x + attention(norm(x, read("input_layernorm"), eps), read, config)
        h = norm(x, read("post_attention_layernorm"), eps)
        gate = h @ read("mlp.gate_proj").T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ read("mlp.up_proj").T)) @ read("mlp.down_proj").T
    return (norm(x, checkpoint.read("model.norm.weight"), eps) @ embedding.T).argmax(-1).tolist()


def test_greedy_tokens(smollm2_path):
    config = read_hf_config(smollm2_path)
    found = greedy_tokens(open_checkpoint(smollm2_path), config, PROMPT + CONTINUATION[:-1])
    assert found[len(PROMPT) - 1 :] == CONTINUATION


def test_load(smollm2_path):
    loaded = load_model(smollm2_path, show_progress=False)
    assert loaded.dtype == np.float32
    assert loaded.total_bytes == 134_515_008 * loaded.dtype.itemsize
    assert read_generation_config(smollm2_path) == {"eos_token_id": [2], "bos_token_id": 1}
