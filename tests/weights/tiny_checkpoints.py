"""Tiny checkpoints in every format, made by hand."""

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD, INNER, VOCAB = 2, 64, 4, 2, 16, 96, 40
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
BLOCK = {
    "input_layernorm.weight": (WIDTH,),
    "post_attention_layernorm.weight": (WIDTH,),
    "self_attn.q_proj.weight": (HEADS * HEAD, WIDTH),
    "self_attn.k_proj.weight": (KV_HEADS * HEAD, WIDTH),
    "self_attn.v_proj.weight": (KV_HEADS * HEAD, WIDTH),
    "self_attn.o_proj.weight": (WIDTH, HEADS * HEAD),
    "mlp.gate_proj.weight": (INNER, WIDTH),
    "mlp.up_proj.weight": (INNER, WIDTH),
    "mlp.down_proj.weight": (WIDTH, INNER),
}
GGUF_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def make_tensors() -> dict[str, np.ndarray]:
    """Random weights of a two-layer Llama by Hugging Face names, float32."""
    rng = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (VOCAB, WIDTH),
    }
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in BLOCK.items()}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_folder(path: Path, tensors: dict[str, np.ndarray], shards: int = 1, config: dict | None = None) -> Path:
    """A Hugging Face folder, its tensors dealt out over the shards."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or CONFIG))
    (path / "tokenizer.json").write_text('{"stands": "for a tokenizer"}')
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    where = {}
    for k in range(shards):
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[k::shards])
        where |= dict.fromkeys(part, file)
        save_file(part, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return path


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to a head's rows, one row at a time: 0, H/2, 1, H/2 + 1, ..."""
    width = len(rows) // heads
    order = [
        h * width + pair + half * width // 2 for h in range(heads) for pair in range(width // 2) for half in (0, 1)
    ]
    return rows[order]


def gguf_name(name: str) -> str:
    """The name that llama.cpp gives a tensor of these tests."""
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, kind = name.rpartition(".")
    if stem in outer:
        return f"{outer[stem]}.{kind}"
    _, _, layer, module = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[module]}.{kind}"


def write_gguf(path: Path, tensors: dict[str, np.ndarray], types: dict[str, str] | None = None) -> Path:
    """The tensors as llama.cpp would store them; `types` gives names (or "*") a GGML type other than F32."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(3)
    writer.add_bos_token_id(1)
    types = types or {}
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}
    for name, given in tensors.items():
        projection = name.split(".")[-2]
        value = interleave(given, heads[projection]) if projection in heads else given
        kind = gguf.GGMLQuantizationType[types.get(name, types.get("*", "F32") if value.ndim > 1 else "F32")]
        data = gguf.quants.quantize(np.ascontiguousarray(value), kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
