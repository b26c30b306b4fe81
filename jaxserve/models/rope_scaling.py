"""Rotary embeddings from Hugging Face rope settings: one function per scaling variant."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxserve.layers.rope import Rope
from jaxserve.models.config import Attributes


@dataclass(frozen=True)
class Context:
    """What the variants depend on besides their settings: `dim` rotated features and lengths in tokens."""

    dim: int
    max_position_embeddings: int
    max_model_len: int


Settings = Attributes  # rope settings are read the same way: what no variant reads is an error
Frequencies = tuple[np.ndarray, float]  # inverse frequencies, float32 [dim / 2], and the factor of cos and sin


def _plain(theta: float, dim: int) -> np.ndarray:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.float32(1.0) / np.float32(theta) ** exponents


def _default(theta: float, settings: Settings, context: Context) -> Frequencies:
    return _plain(theta, context.dim), 1.0


def _linear(theta: float, settings: Settings, context: Context) -> Frequencies:
    """Position interpolation (Chen et al., 2023)."""
    return _plain(theta, context.dim) / np.float32(settings.get("factor")), 1.0


def _dynamic(theta: float, settings: Settings, context: Context) -> Frequencies:
    """Dynamic NTK scaling: unscaled up to the trained length; past it the frequencies change with every token.

    Cached keys would then have to be rotated anew, so longer contexts are refused.
    """
    settings.get("factor")
    settings.get("original_max_position_embeddings", None)
    if context.max_model_len > context.max_position_embeddings:
        raise ValueError(
            f"rope_type 'dynamic' cannot serve max_model_len={context.max_model_len}: past the trained length of "
            f"{context.max_position_embeddings} tokens its frequencies change with the sequence's length; "
            f"set max_model_len <= {context.max_position_embeddings}"
        )
    return _plain(theta, context.dim), 1.0


def _llama3(theta: float, settings: Settings, context: Context) -> Frequencies:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    factor, low, high = (settings.get(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    original = settings.get("original_max_position_embeddings", context.max_position_embeddings)
    plain = _plain(theta, context.dim)
    turns = original * plain / np.float32(2 * math.pi)  # full rotations over the original context
    keep = np.clip((turns - low) / np.float32(high - low), 0, 1)
    return ((1 - keep) * plain / factor + keep * plain).astype(np.float32), 1.0


def _yarn(theta: float, settings: Settings, context: Context) -> Frequencies:
    """YaRN (Peng et al., 2023): a linear ramp between interpolated and kept frequencies, and hotter attention."""
    original = settings.get("original_max_position_embeddings", context.max_position_embeddings)
    factor = float(settings.get("factor", context.max_position_embeddings / original))
    fast, slow = float(settings.get("beta_fast", 32)), float(settings.get("beta_slow", 1))

    def feature(rotations: float) -> float:
        return context.dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = feature(fast), feature(slow)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, context.dim - 1)
    ramp = (np.arange(context.dim // 2, dtype=np.float32) - low) / max(high - low, 0.001)
    keep = 1 - np.clip(ramp, 0, 1)
    plain = _plain(theta, context.dim)
    mscale, mscale_all = settings.get("mscale", 0), settings.get("mscale_all_dim", 0)
    temperature = _yarn_scale(factor, 1.0)
    if mscale and mscale_all:
        temperature = _yarn_scale(factor, float(mscale)) / _yarn_scale(factor, float(mscale_all))
    return (
        (plain / np.float32(factor) * (1 - keep) + plain * keep).astype(np.float32),
        settings.get("attention_factor", temperature),
    )


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(theta: float, settings: Settings, context: Context) -> Frequencies:
    """LongRoPE (Ding et al., 2024): one divisor per frequency, from the long table or the short one.

    The long table serves when `max_model_len` exceeds the original length. Choosing by each sequence's own length
    instead would invalidate cached keys when a sequence grows past it.
    """
    original = settings.get("original_max_position_embeddings", context.max_position_embeddings)
    factor = settings.get("factor", context.max_position_embeddings / original)
    tables = {name: settings.get(name) for name in ("short_factor", "long_factor")}
    name = "long_factor" if context.max_model_len > original else "short_factor"
    divisors = np.asarray(tables[name], np.float32)
    if divisors.shape != (context.dim // 2,):
        raise ValueError(
            f"rope {name} has {divisors.size} values; {context.dim} rotated features need {context.dim // 2}"
        )
    stretch = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return _plain(theta, context.dim) / divisors, settings.get("attention_factor", stretch)


VARIANTS: Mapping[str, Callable[[float, Settings, Context], Frequencies]] = MappingProxyType(
    {
        "default": _default,
        "linear": _linear,
        "dynamic": _dynamic,
        "llama3": _llama3,
        "yarn": _yarn,
        "longrope": _longrope,
    }
)


def build_rope(
    parameters: Mapping[str, Any],
    *,
    head_dim: int,
    max_position_embeddings: int,
    max_model_len: int | None = None,
    theta: float = 10000.0,
    partial_rotary_factor: float = 1.0,
) -> Rope:
    """The rotary embedding of one settings dictionary (`rope_parameters`, or the older `rope_scaling`).

    `theta` and `partial_rotary_factor` hold where the dictionary has none of its own. `max_model_len` is the longest
    sequence that will be served, `max_position_embeddings` where it is None.

    Raises:
        ValueError: for an unknown variant, an unknown or missing setting, or lengths the variant cannot serve.
    """
    settings = Attributes(parameters)
    rope_type = settings.get("rope_type", settings.get("type", "default"))
    theta = settings.get("rope_theta", theta)
    dim = int(head_dim * settings.get("partial_rotary_factor", partial_rotary_factor))
    if rope_type not in VARIANTS:
        raise ValueError(f"rope_type {rope_type!r} is not supported; supported are {sorted(VARIANTS)}")
    context = Context(dim, max_position_embeddings, max_model_len or max_position_embeddings)
    inv_freq, scale = VARIANTS[rope_type](float(theta), settings, context)
    settings.finish()
    return Rope(tuple(inv_freq.tolist()), float(scale))


def read_rope(
    attributes: Attributes, fields: Mapping[str, Any], max_model_len: int | None, theta: float = 10000.0
) -> Rope:
    """The rotary embedding of a family with one kind for all layers, in either spelling of its settings.

    The spellings are `rope_parameters`, or `rope_theta`, `partial_rotary_factor` and `rope_scaling`; `fields` are
    those of `decoder_fields` and `theta` is the family's default.
    """
    newer, older = attributes.get("rope_parameters", {}), attributes.get("rope_scaling", {})
    return build_rope(
        older or newer,
        head_dim=fields["head_dim"],
        max_position_embeddings=fields["max_position_embeddings"],
        max_model_len=max_model_len,
        theta=float(attributes.get("rope_theta", theta)),
        partial_rotary_factor=float(attributes.get("partial_rotary_factor", 1.0)),
    )
