"""Bounds of step times on chips whose rates are published: estimates for planning, not measurements."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from jaxserve.engine.ahead import ProgramReport
from jaxserve.engine.blueprint import Blueprint
from jaxserve.models import ModelConfig
from jaxserve.weights import ModelPlan
from sharding.topology import Generation

EMBEDDING, HEAD = "embedding.", "lm_head."  # how the names of those parameters begin
BATCHES = 1, 16, 64, 256


@dataclass(frozen=True)
class Load:
    """Floating point operations, and bytes through the memory."""

    operations: int | float
    traffic: int | float

    def __add__(self, other: "Load") -> "Load":
        return Load(self.operations + other.operations, self.traffic + other.traffic)

    def seconds(self, chip: Generation) -> float:
        """The least time for both, one beside the other, at the chip's published rates."""
        return max(self.operations / chip.flops, self.traffic / chip.bandwidth)


@dataclass(frozen=True)
class Estimate:
    """The least that a step can last.

    Attributes:
        tokens, seqs: of the step, on each copy of the model.
        context: tokens of each sequence at its end.
        compiled: seconds with the bytes, operations and exchanges of the compiled program; None if there is none.
        roofline: seconds with weights, keys and values read once and nothing else.
    """

    tokens: int
    seqs: int
    context: int
    compiled: float | None
    roofline: float


def attention_load(model: ModelConfig, parts: int, item: int, tokens: int, seqs: int, context: int) -> Load:
    """Of `tokens` rows spread over `seqs` sequences, which end at `context` tokens; `parts` devices share the heads.

    Every sequence's keys and values, of `item` bytes a number, are read once, which is the least that a step can do.
    """
    rows = tokens / seqs
    heads, kv_heads, width = model.num_heads / parts, model.num_kv_heads / parts, model.head_dim
    operations = traffic = 0.0
    for kind in model.layer_types:
        window = model.window_of(kind) or context
        mean = min(window, context - rows / 2)  # positions that a row attends to
        traffic += 2 * seqs * min(context, window + rows) * kv_heads * width * item
        operations += 4 * tokens * mean * heads * width
    return Load(operations, traffic)


def exchange_seconds(exchanges: Iterable[tuple[str, int]], parts: int, chip: Generation) -> float:
    """Duration of exchanges among `parts` devices in a ring at the full bandwidth of their links."""
    moved = sum((2.0 if kind == "all-reduce" else 1.0) * size for kind, size in exchanges)
    return moved * (parts - 1) / parts / chip.ici_bandwidth


class Estimator:
    """Bounds of the step times of one engine on one kind of chip."""

    def __init__(self, blueprint: Blueprint, chip: Generation, reports: Iterable[ProgramReport]):
        model = blueprint.model
        self._blueprint, self._chip = blueprint, chip
        self._parts = model.mesh.shape["model"]
        self._item = np.dtype(model.dtype).itemsize
        self._weights, self._body, self._head = _read_weights(model)
        single = [one for one in reports if one.bucket.steps == 1]
        single.sort(key=lambda one: one.bucket.level, reverse=True)  # the plainest of a size counts
        self._decodes = {one.bucket.seqs: one for one in single if one.bucket.decode_only}
        self._prefills = {one.bucket.tokens: one for one in single if not one.bucket.decode_only}

    def _estimate(self, tokens: int, seqs: int, context: int, report: ProgramReport | None) -> Estimate:
        model = self._blueprint.model.model_config
        attention = attention_load(model, self._parts, self._item, tokens, seqs, context)
        weights = Load(2.0 * (tokens * self._body + seqs * self._head), self._weights)
        roofline = (weights + attention).seconds(self._chip)
        compiled = None
        if report is not None:
            busy = (Load(report.operations, report.traffic) + attention).seconds(self._chip)
            compiled = busy + exchange_seconds(report.exchanges, self._parts, self._chip)
        return Estimate(tokens, seqs, context, compiled, roofline)

    def decodes(self, contexts: Iterable[int]) -> list[Estimate]:
        """Steps of one token per sequence, for all batch sizes that were compiled and a few others that fit."""
        blueprint = self._blueprint
        sizes = {min(size, blueprint.config.max_num_seqs) for size in BATCHES} | self._decodes.keys()
        longest = blueprint.config.max_model_len
        room = blueprint.plan.cache_tokens
        return [
            self._estimate(size, size, context, self._decodes.get(size))
            for size in sorted(sizes)
            for context in sorted({min(context, longest) for context in contexts})
            if size * context <= room
        ]

    def prefills(self) -> list[Estimate]:
        """Steps full of prompts: one as long as the step, or several of the greatest length."""
        config = self._blueprint.config
        found = []
        for tokens in sorted(self._prefills.keys() | {config.max_num_batched_tokens}):
            context = min(tokens, config.max_model_len)
            found.append(self._estimate(tokens, -(-tokens // context), context, self._prefills.get(tokens)))
        return found


def _read_weights(model: ModelPlan) -> tuple[int, int, int]:
    """Of each device: bytes of weights that a step reads, and how many numbers multiply each token and each logit row.

    An embedding table that is not also the output layer is not read, but for single rows.
    """
    heads = (EMBEDDING,) if model.model_config.tie_word_embeddings else (HEAD,)
    traffic = body = head = 0
    for name, leaf in model.parameters.items():
        size = math.prod(leaf.sharding.shard_shape(leaf.shape))
        if name.startswith(heads):
            head += size
        elif name.startswith(EMBEDDING):
            continue
        elif len(leaf.shape) > 1:
            body += size
        traffic += size * leaf.dtype.itemsize
    return traffic, body, head
