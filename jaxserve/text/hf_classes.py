"""The tokenizer classes of transformers that lay their own rules over a folder's tokenizer.json.

Since version 5, transformers takes only vocabulary, merges and affixes from tokenizer.json for these classes and sets
how text is normalised, split and decoded itself (`transformers/models/*/tokenization_*.py`, 5.17). Every other class
that is read here uses the file as it is.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

Settings = Mapping[str, Any]  # tokenizer_config.json

FILE_AS_IT_IS = "TokenizersBackend"
_GENERIC = (FILE_AS_IT_IS, "PreTrainedTokenizer", "PythonBackend")
# The class that transformers has for a model, whatever the folder says where it is FILE_AS_IT_IS; None: it has none.
REGISTERED = {
    "llama": None,
    "mistral": FILE_AS_IT_IS,
    "phi3": FILE_AS_IT_IS,
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
}
_FORCED = ("qwen2",)  # whose folders often name a wrong class
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


class Unusual(Exception):
    """A folder that only transformers can read; the message says why."""


@dataclass(frozen=True)
class Recipe:
    """What one class puts around a byte-pair vocabulary.

    Attributes:
        tokens: its special tokens by name, where the folder names no others.
        options: of `models.BPE`, given those tokens.
        dress: sets normaliser, pre-tokenizer and decoder.
        adds_special: it makes plain special tokens of all that have a name, dropping how the file qualifies them.
        byte_level: its vocabulary is one of bytes written as characters.
    """

    tokens: Mapping[str, str | None]
    options: Callable[[Mapping[str, Any]], dict[str, Any]]
    dress: Callable[[Tokenizer, Settings], None]
    adds_special: bool = False
    byte_level: bool = False


def choose_class(settings: Settings, model: Mapping[str, Any]) -> str:
    """The name of the class that reads the folder, `FILE_AS_IT_IS` or a key of `RECIPES`.

    Args:
        settings: tokenizer_config.json.
        model: config.json; empty where there is none.

    Raises:
        Unusual: another class.
    """
    model_type = model.get("model_type")
    registered = REGISTERED.get(model_type) if model_type else None
    named = settings.get("tokenizer_class") or model.get("tokenizer_class")
    name = (named or registered or FILE_AS_IT_IS).removesuffix("Fast")
    if registered and (registered == FILE_AS_IT_IS or model_type in _FORCED):
        name = registered
    known = not model_type or model_type in REGISTERED
    if name in _GENERIC and (known or named):
        return FILE_AS_IT_IS
    if name in RECIPES and known:
        return name
    raise Unusual(f"its model is a {model_type!r} and its class {named!r}")


def build(name: str, content: Mapping[str, Any], settings: Settings, special_tokens: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a class of `RECIPES`, as yet without added tokens.

    Args:
        content: tokenizer.json.
        settings: tokenizer_config.json.
        special_tokens: texts, or tokens that show as such, by name ("unk_token").

    Raises:
        Unusual: it is no byte-pair vocabulary.
    """
    recipe, model = RECIPES[name], content["model"]
    if model.get("type") != "BPE":
        raise Unusual(f"its class is {name} and its vocabulary of type {model.get('type')!r}")
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    backend = Tokenizer(models.BPE(vocab=model["vocab"], merges=merges, **recipe.options(special_tokens)))
    recipe.dress(backend, settings)
    if (affixes := _post_processor(content)) is not None:
        backend.post_processor = affixes
    return backend


def is_byte_level(content: Mapping[str, Any]) -> bool:
    """Whether tokenizer.json describes a vocabulary of bytes written as characters."""
    decoder = content.get("decoder") or {}
    return "ByteLevel" in {step.get("type") for step in (decoder, *decoder.get("decoders", ()))}


def _post_processor(content: Mapping[str, Any]) -> Any:
    without_vocabulary = {**content, "model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}
    # It has no reader of its own.
    return Tokenizer.from_str(json.dumps(without_vocabulary)).post_processor


def _dress_llama(backend: Tokenizer, settings: Settings) -> None:
    prefix = settings.get("add_prefix_space")
    prefix = True if prefix is None else prefix
    scheme = ("always" if settings.get("legacy", False) else "first") if prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if prefix else steps)


def _dress_gemma(backend: Tokenizer, settings: Settings) -> None:
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def _dress_qwen2(backend: Tokenizer, settings: Settings) -> None:
    prefix = bool(settings.get("add_prefix_space"))
    backend.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(_QWEN2), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    backend.decoder = decoders.ByteLevel()


def _dress_gpt2(backend: Tokenizer, settings: Settings) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.get("add_prefix_space", False))
    backend.decoder = decoders.ByteLevel()


def _byte_level_options(special_tokens: Mapping[str, Any]) -> dict[str, Any]:
    return {"continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False}


_END = "<|endoftext|>"
RECIPES = {
    "LlamaTokenizer": Recipe(
        tokens={"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        options=lambda tokens: {"fuse_unk": True, "byte_fallback": True},
        dress=_dress_llama,
    ),
    "GemmaTokenizer": Recipe(
        tokens={"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
                "mask_token": "<mask>"},
        options=lambda tokens: {"fuse_unk": True, "byte_fallback": True, "unk_token": str(tokens.get("unk_token"))},
        dress=_dress_gemma,
    ),
    "Qwen2Tokenizer": Recipe(
        tokens={"unk_token": _END, "bos_token": None, "eos_token": _END, "pad_token": _END},
        options=_byte_level_options,
        dress=_dress_qwen2,
        adds_special=True,
        byte_level=True,
    ),
    "GPT2Tokenizer": Recipe(
        tokens={"unk_token": _END, "bos_token": _END, "eos_token": _END, "pad_token": None},
        options=_byte_level_options,
        dress=_dress_gpt2,
        byte_level=True,
    ),
}  # fmt: skip
