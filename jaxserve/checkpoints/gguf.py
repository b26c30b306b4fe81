"""GGUF files seen as Hugging Face checkpoints: tensor names, row order and norm conventions translated back."""

import re
from pathlib import Path

import numpy as np

from jaxserve.checkpoints.base import CheckpointError
from jaxserve.checkpoints.gguf_file import GGUFFile

COMMON = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
GEMMA = COMMON | {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
PHI3 = COMMON | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
NAMES = {"llama": COMMON, "qwen2": COMMON, "qwen3": COMMON, "gemma2": GEMMA, "gemma3": GEMMA, "phi3": PHI3}
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # read by gguf_config
BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


class GGUFCheckpoint:
    """The tensors of one GGUF file by Hugging Face names.

    Raises:
        CheckpointError: damaged file, an architecture that is not supported, or one part of a split file.
    """

    def __init__(self, path: str | Path) -> None:
        self.gguf = GGUFFile(path)
        self.architecture = read_architecture(self.gguf)
        self._names = {
            hugging_face_name(name, self.architecture): name for name in self.gguf.tensors if name not in ROPE_TENSORS
        }

    def names(self) -> set[str]:
        return set(self._names)

    def file(self, name: str) -> Path:
        return self.gguf.path

    def shape(self, name: str) -> tuple[int, ...]:
        return self.gguf.tensors[self._names[name]].shape

    def nbytes(self, name: str) -> int:
        return self.gguf.tensors[self._names[name]].nbytes

    def read(self, name: str) -> np.ndarray:
        value = self.gguf.read(self._names[name])
        if self.architecture == "llama" and ".self_attn.q_proj." in name:
            return unpermute(value, self._heads("head_count"))
        if self.architecture == "llama" and ".self_attn.k_proj." in name:
            return unpermute(value, self._heads("head_count_kv"))
        if self.architecture.startswith("gemma") and name.endswith("norm.weight"):
            return value - value.dtype.type(1)  # llama.cpp stores the whole factor, transformers what is added to one
        return value

    def _heads(self, key: str) -> int:
        metadata = self.gguf.metadata
        heads = metadata.get(f"llama.attention.{key}", metadata.get("llama.attention.head_count"))
        if not isinstance(heads, int) or heads < 1:
            raise CheckpointError(
                f"{self.gguf.path}: llama.attention.{key} is {heads!r}, which must be a number of heads"
            )
        return heads


def read_architecture(gguf: GGUFFile) -> str:
    """`general.architecture`, checked to be a supported one in a file of its own."""
    architecture = gguf.metadata.get("general.architecture")
    if architecture not in NAMES:
        raise CheckpointError(
            f"{gguf.path} holds the architecture {architecture!r}; GGUF files are supported for {', '.join(NAMES)}"
        )
    if gguf.metadata.get("split.count", 1) > 1:
        raise CheckpointError(
            f"{gguf.path} is one part of a split file; join the parts with `llama-gguf-split --merge`"
        )
    return architecture


def hugging_face_name(name: str, architecture: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; an unknown name is kept."""
    stem, _, kind = name.rpartition(".")
    table = NAMES[architecture]
    if block := BLOCK.fullmatch(stem):
        module = table.get(block[2])
        return f"model.layers.{block[1]}.{module}.{kind}" if module else name
    return f"{table[stem]}.{kind}" if stem in table else name


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of rotary pairs in query/key projections of the `llama` architecture.

    llama.cpp stores each head's rows as `0, H/2, 1, H/2 + 1, ...`, so that a rotary pair is adjacent; Hugging Face
    stores `0, 1, ..., H - 1` with pairs half a head apart. `rows` is `[heads * H, ...]` (a bias has one axis).

    Raises:
        CheckpointError: the rows do not divide into `heads` of an even width.
    """
    if len(rows) % (2 * heads):
        raise CheckpointError(f"a query/key projection of {len(rows)} rows cannot be split into {heads} heads")
    paired = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return np.swapaxes(paired, 1, 2).reshape(rows.shape)
