"""A tiny model that any process on this machine can read, with answers that differ from prompt to prompt."""

import json
import warnings

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

with warnings.catch_warnings():  # of Ray's own modules, when they are imported
    warnings.simplefilter("ignore")
    import ray.data
    import ray.serve  # noqa: F401

LETTERS = [chr(code) for code in range(33, 127)] + ["\u0120"]  # the last is byte-level BPE's sign for a space
WIDTH, INNER, HEAD, VOCAB = 32, 48, 16, len(LETTERS)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": HEAD,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
SHAPES = {
    "embed_tokens": (VOCAB, WIDTH),
    "norm": (WIDTH,),
    "layers.0.input_layernorm": (WIDTH,),
    "layers.0.post_attention_layernorm": (WIDTH,),
    "layers.0.self_attn.q_proj": (2 * HEAD, WIDTH),
    "layers.0.self_attn.k_proj": (HEAD, WIDTH),
    "layers.0.self_attn.v_proj": (HEAD, WIDTH),
    "layers.0.self_attn.o_proj": (WIDTH, 2 * HEAD),
    "layers.0.mlp.gate_proj": (INNER, WIDTH),
    "layers.0.mlp.up_proj": (INNER, WIDTH),
    "layers.0.mlp.down_proj": (WIDTH, INNER),
}
TEMPLATE = """{% for message in messages %}
{%- if message.role != "user" %}{{ raise_exception("who is " + message.role) }}{% endif %}<{{ message.content }}>
{%- endfor %}"""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with random weights and a tokenizer whose tokens are letters."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    tensors = {f"model.{name}.weight": rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(LETTERS)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def engine_kwargs(compilation_cache: str) -> dict[str, object]:
    """A few programs, shared by all engines of the run."""
    sizes = {"max_model_len": 128, "max_num_seqs": 16, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 256}
    return {**sizes, "compilation_cache_dir": compilation_cache}
