"""What a model's own config files say about context length, dtype, end of sequence and default sampling."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxserve.checks import ParameterError, check_int, require
from jaxserve.config.args import DTYPES
from jaxserve.sampling_params import SamplingParams

Config = Mapping[str, Any]

LENGTH_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")
# Rope kinds whose max_position_embeddings is the scaled length already, and families that state it so for any kind.
ALREADY_SCALED_ROPE = ("default", "llama3", "longrope", "su", "mrope", "proportional")
ALREADY_SCALED_FAMILIES = ("gemma3", "gemma3_text")
# Activations of these families leave float16's range.
NEEDS_BFLOAT16 = ("gemma2", "gemma3", "gemma3_text")
# generation_config.json name -> SamplingParams name.
SAMPLING_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def merge_overrides(hf_config: Config, overrides: Config) -> dict[str, Any]:
    """The config with the overrides written over it, nested objects key by key; neither argument changes."""
    merged = dict(hf_config)
    for key, value in overrides.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            merged[key] = merge_overrides(old, value)
        else:
            merged[key] = value
    return merged


def text_config(hf_config: Config) -> Config:
    """The language model's part of a config; the whole of it for a text model."""
    nested = hf_config.get("text_config")
    return nested if isinstance(nested, Mapping) else hf_config


def model_limit(hf_config: Config) -> int:
    """The longest context in tokens that the config allows, rope scaling included.

    Raises:
        ParameterError: when it states none.
    """
    config = text_config(hf_config)
    lengths = [config[key] for key in LENGTH_KEYS if config.get(key) is not None]
    if not lengths:
        raise ParameterError(
            f"The model's config.json names no context length (none of {', '.join(LENGTH_KEYS)}); "
            'set hf_overrides={"max_position_embeddings": ...}.',
            parameter="max_model_len",
        )
    length = min(check_int("the model's context length", value) for value in lengths)
    if config.get("model_type") in ALREADY_SCALED_FAMILIES:
        return length
    return max([length, *(_scaled(rope, length) for rope in _rope_settings(config))])


def model_vocab_size(hf_config: Config) -> int:
    """Rows of the model's embedding table.

    Raises:
        ParameterError: when the config does not state it.
    """
    size = text_config(hf_config).get("vocab_size")
    require(size is not None, "vocab_size", size, "be in the model's config.json")
    return check_int("vocab_size of the model's config.json", size)


def _rope_settings(config: Config) -> list[Config]:
    """Rope settings in the older (`rope_scaling`) or the newer form (`rope_parameters`, perhaps per layer type)."""
    found = []
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if isinstance(value, Mapping):
            nested = [item for item in value.values() if isinstance(item, Mapping)]
            found += nested or [value]
    return found


def _scaled(rope: Config, length: int) -> int:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ALREADY_SCALED_ROPE:
        return length
    original = rope.get("original_max_position_embeddings") if kind == "yarn" else None
    return int((original or length) * (rope.get("factor") or 1.0))


def choose_dtype(requested: str, hf_config: Config, platform: str) -> str:
    """ "float32", "bfloat16" or "float16" for a model on a platform.

    `auto` is float32 on CPU, where 16-bit products are slow; elsewhere the checkpoint's type, with bfloat16 for
    float32 checkpoints and wherever float16 does not work.

    Raises:
        ParameterError: float16 where it does not work.
    """
    family = str(text_config(hf_config).get("model_type"))
    no_float16 = platform == "tpu" or family in NEEDS_BFLOAT16
    if requested == "auto":
        stored = text_config(hf_config).get("dtype") or text_config(hf_config).get("torch_dtype")
        stored = stored or hf_config.get("dtype") or hf_config.get("torch_dtype")
        if platform == "cpu":
            return "float32"
        return "float16" if str(stored).removeprefix("torch.") == "float16" and not no_float16 else "bfloat16"
    dtype = DTYPES[requested]
    where = "on a TPU" if platform == "tpu" else f"for {family} models, whose activations exceed its range"
    require(dtype != "float16" or not no_float16, "dtype", requested, f"not be float16 {where}; use bfloat16")
    return dtype


def eos_token_ids(hf_config: Config, generation_config: Config) -> frozenset[int]:
    """The end-of-sequence ids that either config file names."""
    found: set[int] = set()
    for config in (hf_config, text_config(hf_config), generation_config):
        ids = config.get("eos_token_id")
        ids = [] if ids is None else ids if isinstance(ids, list | tuple) else [ids]
        found.update(check_int("eos_token_id", token) for token in ids)
    return frozenset(found)


def load_generation_config(generation_config: str, model_path: Path) -> dict[str, Any]:
    """The generation_config.json of a folder; for "auto" and "vllm" the model's, empty where it has none.

    Raises:
        ParameterError: a folder was named but holds no such file, or the file is not a JSON object.
    """
    own = generation_config in ("auto", "vllm")
    path = (model_path if own else Path(generation_config).expanduser()) / "generation_config.json"
    if not path.is_file():
        rule = f"be auto, vllm or a folder with a generation_config.json ({path} does not exist)"
        require(own, "generation_config", generation_config, rule)
        return {}
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ParameterError(f"{path} is not readable JSON ({error}).", parameter="generation_config") from error
    if not isinstance(loaded, dict):
        raise ParameterError(f"{path} must hold a JSON object.", parameter="generation_config", value=loaded)
    return loaded


def default_sampling_params(generation_config: Config, overrides: Config) -> dict[str, Any]:
    """`SamplingParams` fields that a generation config and the overrides over it set to something other than default.

    Raises:
        ParameterError: a value out of bounds, or an override that is no sampling value.
    """
    unknown = sorted(overrides.keys() - SAMPLING_NAMES.keys())
    rule = f"have only the keys {', '.join(SAMPLING_NAMES)}"
    require(not unknown, "override_generation_config", unknown, rule)
    given = {**generation_config, **overrides}
    values = {ours: given[theirs] for theirs, ours in SAMPLING_NAMES.items() if given.get(theirs) is not None}
    try:
        params = SamplingParams(**values)
    except (ValueError, TypeError) as error:
        raise ParameterError(
            f"The generation config is not usable: {error} Correct it with override_generation_config, or use "
            'generation_config="vllm" to leave it out.',
            parameter="generation_config",
            value=values,
        ) from error
    neutral = SamplingParams()
    return {name: getattr(params, name) for name in values if getattr(params, name) != getattr(neutral, name)}
