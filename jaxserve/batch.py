"""The device nouns of a step and the one place where host plans become device arrays.

A step's host data travels as one int32 buffer (float fields by their bits): `pack` fills it with numpy,
`unpack` cuts it apart inside the jitted step. Both read the same `layout`, so they cannot disagree.

The pytrees are exempt from annotation checkers: jax also fills them with abstract shapes and placeholders.
"""

import math
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxserve.kv_cache import Chunks, KVCache
from jaxserve.sums import PLAIN, Sums
from jaxserve.types import Sequence, Work


class Level(IntEnum):
    """How much a step does after the model; a higher level can serve every lower one."""

    GREEDY = 0  # argmax only
    DRAW = 1  # temperature, min-p, top-k and top-p alone
    SAMPLE = 2  # every sampling parameter, log-probabilities of the sampled position
    PROMPT_LOGPROBS = 3  # also log-probabilities of every prompt position


@dataclass(frozen=True, order=True)
class Bucket:
    """The static shape of a step: `T` tokens of `S` sequences, `E` sampling edits; or `steps` decodes in a row."""

    tokens: int
    seqs: int
    level: Level = Level.GREEDY
    edits: int = 0
    steps: int = 1

    @property
    def decode_only(self) -> bool:
        """Whether every row is known to hold one token (which attention may rely on)."""
        return self.tokens == self.seqs

    def covers(self, other: "Bucket") -> bool:
        """Whether a step that fits `other` can run in this bucket."""
        sizes = zip(self.cost(), other.cost(), strict=True)
        kind = (self.steps, self.decode_only) == (other.steps, other.decode_only)
        return kind and all(mine >= theirs for mine, theirs in sizes)

    def cost(self) -> tuple[int, int, int, int]:
        """The sizes, most expensive first."""
        return self.tokens, self.seqs, self.level, self.edits

    def __str__(self) -> str:
        sizes = f"{self.tokens} tokens x {self.seqs} sequences, {self.level.name.lower()}, {self.edits} edits"
        return sizes if self.steps == 1 else f"{sizes}, {self.steps} steps"


@dataclass(frozen=True)
class Limits:
    """The sizes that no step changes."""

    max_num_seqs: int
    pages_per_seq: int
    page_size: int
    num_pages: int
    max_logprobs: int  # entries returned per position, at most V


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What lives on the device between steps; donated to every step.

    `tokens` holds the id of the token at every cache position: history for the penalties, paged like the keys and
    values so that prefix hits and preemption need no further bookkeeping. `last_token` is the token sampled last in
    each slot: the next step's input, which never has to visit the host.
    """

    cache: KVCache
    tokens: Int[Array, "pages p"]
    last_token: Int[Array, "slots"]
    sums: Sums = PLAIN


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingRows:
    """Per-sequence sampling parameters; neutral values switch a stage off."""

    temperature: Float[Array, "S"]
    top_p: Float[Array, "S"]
    min_p: Float[Array, "S"]
    presence_penalty: Float[Array, "S"]
    frequency_penalty: Float[Array, "S"]
    repetition_penalty: Float[Array, "S"]
    top_k: Int[Array, "S"]
    seed_high: UInt32[Array, "S"]
    seed_low: UInt32[Array, "S"]
    prompt_lens: Int[Array, "S"]
    allow_only: Bool[Array, "S"]  # only the tokens named by the row's edits may be sampled
    logprobs: Bool[Array, "S"]


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Edits:
    """Sparse changes of the logits: `logits[row, token] += value` where the row's last token is `prev` (or `prev < 0`).

    They carry logit_bias, min_tokens, bad_words (of any length: the host checks all but the last word token, which only
    the device knows) and, for rows with `allow_only`, the allowed ids. Unused entries have `row == S`.
    """

    rows: Int[Array, "E"]
    prev: Int[Array, "E"]
    tokens: Int[Array, "E"]
    values: Float[Array, "E"]


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """A step's inputs. `token_ids` is -1 where the token is the one the step before sampled (`State.last_token`).

    `sampling` is None at level GREEDY, `edits` below SAMPLE. `targets[t]` is the prompt token after token `t`, whose
    log-probability is wanted, or -1; None below level PROMPT_LOGPROBS. `capacity` is the number of tokens a row has
    pages for, None of mixed steps: of several decodes in a row one may end before the others, and must not write any
    further.
    """

    token_ids: Int[Array, "T"]
    row_ids: Int[Array, "T"]
    slots: Int[Array, "S"]  # max_num_seqs for padding rows
    chunks: Chunks
    sampling: SamplingRows | None
    edits: Edits | None
    targets: Int[Array, "T"] | None
    capacity: Int[Array, "S"] | None


FLOAT_COLUMNS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
INT_COLUMNS = ("top_k", "seed_high", "seed_low", "prompt_lens", "allow_only", "logprobs")
COLUMNS = FLOAT_COLUMNS + INT_COLUMNS
ALIGNMENT = 64  # words: XLA hands slices to kernels in place, and these need operands at multiples of 256 bytes


def layout(bucket: Bucket, limits: Limits) -> dict[str, tuple[slice, tuple[int, ...]]]:
    """Field name -> (place in the packed int32 buffer, shape)."""
    t, s, e = bucket.tokens, bucket.seqs, bucket.edits
    fields = {
        "token_ids": (t,),
        "row_ids": (t,),
        "slots": (s,),
        "cu_q_lens": (s + 1,),
        "kv_lens": (s,),
        "page_table": (s, limits.pages_per_seq),
    }
    if bucket.decode_only:
        fields |= {"capacity": (s,)}
    if bucket.level >= Level.DRAW:
        fields |= {"sampling": (len(COLUMNS), s)}
    if bucket.level >= Level.SAMPLE:
        fields |= {"edit_rows": (e,), "edit_prev": (e,), "edit_tokens": (e,), "edit_values": (e,)}
    if bucket.level >= Level.PROMPT_LOGPROBS:
        fields |= {"targets": (t,)}
    places, start = {}, 0
    for name, shape in fields.items():
        size = math.prod(shape)
        places[name] = (slice(start, start + size), shape)
        start += -(-size // ALIGNMENT) * ALIGNMENT
    return places


def packed_size(bucket: Bucket, limits: Limits) -> int:
    """Length of the packed buffer in int32 words."""
    return max(place.stop for place, _ in layout(bucket, limits).values())


class SlotTable:
    """Host rows of sampling constants, one per slot, rewritten when a slot changes hands."""

    def __init__(self, max_num_seqs: int):
        self._values = np.zeros((len(COLUMNS), max_num_seqs), np.int32)
        self._levels = np.zeros(max_num_seqs, np.int32)
        self._last_prompt = np.zeros(max_num_seqs, np.int32)  # last position whose prompt log-probability is wanted
        self._owners: list[Sequence | None] = [None] * max_num_seqs

    def update(self, sequences: Rows[Sequence]) -> None:
        """Write the rows of slots that have a new owner."""
        owners = self._owners
        for sequence in sequences:
            slot = sequence.slot
            if owners[slot] is not sequence:
                owners[slot] = sequence
                self._values[:, slot] = sampling_constants(sequence)
                self._levels[slot] = sampling_level(sequence)
                self._last_prompt[slot] = 0 if sequence.params.prompt_logprobs is None else sequence.num_prompt - 1

    def level(self, work: Work) -> Level:
        """The lowest level that serves every row of a step."""
        if np.any(work.starts < self._last_prompt[work.slots]):
            return Level.PROMPT_LOGPROBS
        return Level(int(self._levels[work.slots].max()))

    def rows(self, slots: np.ndarray) -> np.ndarray:
        """The constants of these slots, int32 `[COLUMNS, len(slots)]`."""
        return self._values[:, slots]


def sampling_level(sequence: Sequence) -> Level:
    """The lowest level that serves a sequence's own token (its prompt may ask for more)."""
    params = sequence.params
    penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty - 1)
    constrained = sequence.request.edits is not None or sequence.free_from > sequence.num_prompt
    if params.logprobs is not None or any(penalties) or constrained:
        return Level.SAMPLE
    return Level.GREEDY if params.greedy else Level.DRAW


def sampling_constants(sequence: Sequence) -> np.ndarray:
    """One sequence's sampling parameters as int32 `[COLUMNS]`, floats by their bits."""
    params = sequence.params
    floats = (
        0.0 if params.greedy else params.temperature,
        params.top_p,
        params.min_p,
        params.presence_penalty,
        params.frequency_penalty,
        params.repetition_penalty,
    )
    seed = sequence.seed & (2**64 - 1)
    ints = (
        max(params.top_k, 0),
        seed >> 32,
        seed & (2**32 - 1),
        sequence.num_prompt,
        params.allowed_token_ids is not None,
        params.logprobs is not None,
    )
    return np.concatenate([np.array(floats, np.float32).view(np.int32), np.array(ints, np.int64).astype(np.int32)])


EditRows = list[tuple[int, int, int, float]]  # (row, prev, token, value)


def pack(work: Work, bucket: Bucket, limits: Limits, table: SlotTable, edits: EditRows) -> np.ndarray:
    """One step's host data as a fresh int32 buffer (fresh, because the device may still read the one before)."""
    places = layout(bucket, limits)
    buffer = np.zeros(max(place.stop for place, _ in places.values()), np.int32)
    view = {name: buffer[place].reshape(shape) for name, (place, shape) in places.items()}
    rows, total = len(work.sequences), work.total_tokens

    view["slots"][:] = limits.max_num_seqs
    view["slots"][:rows] = work.slots
    view["cu_q_lens"][:] = total
    view["cu_q_lens"][0] = 0
    np.cumsum(work.num_tokens, out=view["cu_q_lens"][1 : rows + 1])
    view["kv_lens"][:rows] = work.starts + work.num_tokens
    view["row_ids"][:total] = np.repeat(np.arange(rows, dtype=np.int32), work.num_tokens)
    if rows:
        np.take(work.page_table, work.slots, axis=0, out=view["page_table"][:rows])
    if bucket.decode_only:
        view["capacity"][:rows] = [len(sequence.pages) * limits.page_size for sequence in work.sequences]
    _fill_tokens(work, view["token_ids"], view["cu_q_lens"], view.get("targets"))
    if bucket.level >= Level.DRAW:
        view["sampling"][:, :rows] = table.rows(work.slots)
    if bucket.level >= Level.SAMPLE:
        _fill_edits(edits, bucket.seqs, view)
    return buffer


def _fill_tokens(work: Work, ids: np.ndarray, cu_q_lens: np.ndarray, targets: np.ndarray | None) -> None:
    """Token ids the host knows; -1 marks the one token of a row that only the device knows yet."""
    known = np.fromiter((sequence.num_tokens for sequence in work.sequences), np.int32, len(work.sequences))
    ids[: work.total_tokens] = -1
    for row in np.flatnonzero(known > work.starts):
        sequence, start = work.sequences[row], int(work.starts[row])
        stop = min(start + int(work.num_tokens[row]), sequence.num_tokens)
        first = cu_q_lens[row]
        ids[first : first + stop - start] = sequence.tokens[start:stop]
    if targets is None:
        return
    targets[:] = -1
    for row, sequence in enumerate(work.sequences):
        if sequence.params.prompt_logprobs is None:
            continue
        start = int(work.starts[row])
        following = sequence.tokens[start + 1 : min(start + int(work.num_tokens[row]) + 1, sequence.num_prompt)]
        targets[cu_q_lens[row] : cu_q_lens[row] + len(following)] = following


def _fill_edits(edits: EditRows, padding_row: int, view: dict[str, np.ndarray]) -> None:
    view["edit_rows"][:] = padding_row
    if not edits:
        return
    rows, prev, tokens, values = zip(*edits, strict=True)
    count = len(edits)
    view["edit_rows"][:count], view["edit_prev"][:count], view["edit_tokens"][:count] = rows, prev, tokens
    view["edit_values"][:count] = np.array(values, np.float32).view(np.int32)


def unpack(buffer: Int[Array, "words"], bucket: Bucket, limits: Limits) -> Batch:
    """Cut the packed buffer apart and derive each token's position and place in the cache; runs inside the step."""
    places = layout(bucket, limits)

    def get(name: str) -> Array:
        place, shape = places[name]
        return buffer[place].reshape(shape)

    row_ids, page_table, kv_lens, cu_q_lens = get("row_ids"), get("page_table"), get("kv_lens"), get("cu_q_lens")
    capacity = get("capacity") if bucket.decode_only else None
    chunks = _place(row_ids, page_table, kv_lens, cu_q_lens, limits, capacity)
    return Batch(
        token_ids=get("token_ids"),
        row_ids=row_ids,
        slots=get("slots"),
        chunks=chunks,
        sampling=_unpack_sampling(get("sampling")) if bucket.level >= Level.DRAW else None,
        edits=_unpack_edits(get) if bucket.level >= Level.SAMPLE else None,
        targets=get("targets") if bucket.level >= Level.PROMPT_LOGPROBS else None,
        capacity=capacity,
    )


def _place(
    row_ids: Int[Array, "T"],
    page_table: Int[Array, "S P"],
    kv_lens: Int[Array, "S"],
    cu_q_lens: Int[Array, "S+1"],
    limits: Limits,
    capacity: Int[Array, "S"] | None,
) -> Chunks:
    """Each token's position and place in the cache; no place past the row's capacity."""
    token = jnp.arange(row_ids.shape[0], dtype=jnp.int32)
    valid = token < cu_q_lens[-1]
    positions = jnp.where(valid, kv_lens[row_ids] - cu_q_lens[row_ids + 1] + token, 0)
    if capacity is not None:
        valid &= positions < capacity[row_ids]
    return Chunks(
        positions=positions,
        pages=jnp.where(valid, page_table[row_ids, positions // limits.page_size], limits.num_pages),
        offsets=positions % limits.page_size,
        page_table=page_table,
        cu_q_lens=cu_q_lens,
        kv_lens=kv_lens,
    )


def advance(batch: Batch, limits: Limits) -> Batch:
    """The decode step after a decode step: every row one position on, its input the token just sampled."""
    chunks = batch.chunks
    kv_lens = chunks.kv_lens + (chunks.kv_lens > 0)
    following = _place(batch.row_ids, chunks.page_table, kv_lens, chunks.cu_q_lens, limits, batch.capacity)
    return replace(batch, token_ids=jnp.full_like(batch.token_ids, -1), chunks=following)


def _unpack_sampling(columns: Int[Array, "C S"]) -> SamplingRows:
    values: dict[str, Array] = dict(zip(COLUMNS, columns, strict=True))
    floats = {name: lax.bitcast_convert_type(values[name], jnp.float32) for name in FLOAT_COLUMNS}
    seeds = {name: lax.bitcast_convert_type(values[name], jnp.uint32) for name in ("seed_high", "seed_low")}
    flags = {name: values[name] != 0 for name in ("allow_only", "logprobs")}
    return SamplingRows(**(values | floats | seeds | flags))


def _unpack_edits(get: Callable[[str], Array]) -> Edits:
    return Edits(
        rows=get("edit_rows"),
        prev=get("edit_prev"),
        tokens=get("edit_tokens"),
        values=lax.bitcast_convert_type(get("edit_values"), jnp.float32),
    )
