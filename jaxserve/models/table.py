"""How parameters are made from checkpoint tensors: a table of rules per family, and the rules families share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from jaxserve.models.config import ModelConfig


@dataclass(frozen=True)
class Rule:
    """How one parameter is made from checkpoint tensors; with `{i}` in its names, one per layer.

    Attributes:
        target: dotted path of the parameter in the module's state, such as `layers.{i}.attention.qkv.kernel`.
        sources: Hugging Face tensor names; linear weights are `[out, in]`.
        build: makes an array of the parameter's shape from the sources' arrays, of any float dtype, in their order.
    """

    target: str
    sources: tuple[str, ...]
    build: Callable[[list[np.ndarray]], np.ndarray]


def expand(rules: tuple[Rule, ...], num_layers: int) -> list[Rule]:
    """The rules with every `{i}` filled in, layer by layer after those that belong to no layer."""
    whole = [rule for rule in rules if "{i}" not in rule.target]
    layered = [rule for rule in rules if "{i}" in rule.target]
    return whole + [
        replace(
            rule,
            target=rule.target.replace("{i}", str(i)),
            sources=tuple(source.replace("{i}", str(i)) for source in rule.sources),
        )
        for i in range(num_layers)
        for rule in layered
    ]


def as_is(sources: list[np.ndarray]) -> np.ndarray:
    """The one source, unchanged."""
    (source,) = sources
    return source


def padded(rows: int, sources: list[np.ndarray]) -> np.ndarray:
    """The one source, with so many rows of zeros behind its own."""
    (source,) = sources
    return np.concatenate([source, np.zeros((rows, *source.shape[1:]), source.dtype)])


def reshaped(shape: tuple[int, ...], sources: list[np.ndarray]) -> np.ndarray:
    """A linear weight `[out, in]` with its axes split into `shape`."""
    (source,) = sources
    return source.reshape(shape)


def fused_qkv(config: ModelConfig, sources: list[np.ndarray]) -> np.ndarray:
    """q, k and v, weights `[heads * H, D]` or biases `[heads * H]`, side by side per KV head: `[K, G + 2, H, ...]`.

    Each key and value head stands in `config.kv_copies` places.
    """
    q, *others = (source.reshape(-1, config.head_dim, *source.shape[1:]) for source in sources)
    parts = [other[:, None].repeat(config.kv_copies, axis=0) for other in others]
    return np.concatenate([q.reshape(config.num_kv_heads, -1, *q.shape[1:]), *parts], axis=1)


def fused_gate_up(sources: list[np.ndarray]) -> np.ndarray:
    """gate and up, weights `[F, D]` or biases `[F]`, as one array `[F, 2, ...]`."""
    return np.stack(sources, axis=1)


def attention_rules(config: ModelConfig) -> tuple[Rule, ...]:
    """Separate q, k, v and output projections, with the biases and head norms the config asks for."""
    source, target = "model.layers.{i}.self_attn.", "layers.{i}.attention."
    heads = tuple(source + name for name in ("q_proj.", "k_proj.", "v_proj."))
    weights = tuple(name + "weight" for name in heads)
    rules = [Rule(target + "qkv.kernel", weights, partial(fused_qkv, config)), output_rule(config)]
    if config.qkv_bias:
        rules.append(Rule(target + "qkv.bias", tuple(name + "bias" for name in heads), partial(fused_qkv, config)))
    if config.output_bias:
        rules.append(Rule(target + "out.bias", (source + "o_proj.bias",), as_is))
    if config.qk_norm:
        rules += [Rule(target + f"{n}.scale", (source + f"{n}.weight",), as_is) for n in ("q_norm", "k_norm")]
    return tuple(rules)


def output_rule(config: ModelConfig) -> Rule:
    """The weight of the attention's output projection."""
    shape = (config.hidden_size, config.num_heads, config.head_dim)
    return Rule(
        "layers.{i}.attention.out.kernel", ("model.layers.{i}.self_attn.o_proj.weight",), partial(reshaped, shape)
    )


def mlp_rules(config: ModelConfig) -> tuple[Rule, ...]:
    """Separate gate, up and down projections, with biases where the config asks for them."""
    source, target = "model.layers.{i}.mlp.", "layers.{i}.mlp."
    rules = [
        Rule(target + "gate_up.kernel", (source + "gate_proj.weight", source + "up_proj.weight"), fused_gate_up),
        down_rule(),
    ]
    if config.mlp_bias:
        rules += [
            Rule(target + "gate_up.bias", (source + "gate_proj.bias", source + "up_proj.bias"), fused_gate_up),
            Rule(target + "down.bias", (source + "down_proj.bias",), as_is),
        ]
    return tuple(rules)


def down_rule() -> Rule:
    """The weight of the MLP's down projection."""
    return Rule("layers.{i}.mlp.down.kernel", ("model.layers.{i}.mlp.down_proj.weight",), as_is)


def norm_rules(names: Mapping[str, str]) -> tuple[Rule, ...]:
    """The norms of a block: our name to the checkpoint's."""
    return tuple(
        Rule("layers.{i}." + ours + ".scale", ("model.layers.{i}." + theirs + ".weight",), as_is)
        for ours, theirs in names.items()
    )


def outer_rules(config: ModelConfig) -> tuple[Rule, ...]:
    """Embedding, final norm and, unless it is tied to the embedding, the output projection."""
    vocabulary = partial(padded, config.vocab_padding) if config.vocab_padding else as_is
    rules = [
        Rule("embedding.table", ("model.embed_tokens.weight",), vocabulary),
        Rule("norm.scale", ("model.norm.weight",), as_is),
    ]
    if not config.tie_word_embeddings:
        rules.append(Rule("lm_head.kernel", ("lm_head.weight",), vocabulary))
    return tuple(rules)
