"""Beam search on top of the engine: one-token requests with log-probabilities, extended beam by beam.

Every step asks the engine for the `2 * beam_width` best next tokens of each live beam (enough even if `beam_width` of
them end a beam). The prefix cache makes the repeated prompts cheap.
"""

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from jaxserve.engine.engine import LLMEngine
from jaxserve.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from jaxserve.types import PositionLogprobs, PromptType, RequestOutput


@dataclass
class BeamSearchSequence:
    """One hypothesis; `tokens` and `text` include the prompt, `logprobs` has one entry a generated token."""

    tokens: list[int]
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class BeamSearchOutput:
    """The best hypotheses of one prompt, best first."""

    sequences: list[BeamSearchSequence]


class _Search:
    """The beams of one prompt."""

    def __init__(self, prompt_ids: list[int], params: BeamSearchParams, eos_ids: frozenset[int], max_len: int):
        self._params = params
        self._eos_ids = frozenset() if params.ignore_eos else eos_ids
        self._num_prompt = len(prompt_ids)
        self._limit = min(max_len, len(prompt_ids) + params.max_tokens)
        self.live = [BeamSearchSequence(prompt_ids)]
        self._done: list[BeamSearchSequence] = []

    def extend(self, outputs: Sequence[RequestOutput]) -> None:
        """Grow every live beam by its best next tokens and keep the best of all."""
        grown = []
        for beam, output in zip(self.live, outputs, strict=True):
            if output.error is not None or not output.outputs[0].logprobs:
                raise ValueError(output.error or "a beam ended without log-probabilities")
            scores = output.outputs[0].logprobs[0]
            for token, entry in heapq.nlargest(2 * self._params.beam_width, scores.items(), key=lambda x: x[1].logprob):
                total = beam.cum_logprob + entry.logprob
                child = BeamSearchSequence([*beam.tokens, token], [*beam.logprobs, scores], total)
                if token in self._eos_ids:
                    child.finish_reason, child.stop_reason = "stop", token
                    self._done.append(child)
                else:
                    grown.append(child)
        self.live = heapq.nlargest(self._params.beam_width, grown, key=lambda beam: beam.cum_logprob)
        if self.live and len(self.live[0].tokens) >= self._limit:
            for beam in self.live:
                beam.finish_reason = "length"
            self._done += self.live
            self.live = []

    def _score(self, beam: BeamSearchSequence) -> float:
        """Log-probability over generated length ** length_penalty."""
        length = len(beam.tokens) - self._num_prompt
        return beam.cum_logprob / (max(length, 1) ** self._params.length_penalty)

    def best(self) -> list[BeamSearchSequence]:
        """The hypotheses to return."""
        return heapq.nlargest(self._params.beam_width, self._done + self.live, key=self._score)


def beam_search(
    engine: LLMEngine,
    prompts: Sequence[PromptType],
    params: BeamSearchParams,
    *,
    use_tqdm: bool = False,
    concurrency_limit: int | None = None,
) -> list[BeamSearchOutput]:
    """Search for every prompt, at most `concurrency_limit` prompts at a time.

    Raises:
        TypeError, ValueError: a bad prompt, structured outputs, or `max_logprobs` below twice the beam width.
    """
    allowed, wanted = engine.config.max_logprobs, 2 * params.beam_width
    if 0 <= allowed < wanted:
        raise ValueError(
            f"beam_width={params.beam_width} needs max_logprobs of at least {wanted}, but the engine has {allowed}; "
            "build it with a larger max_logprobs."
        )
    if params.structured_outputs is not None:
        raise ValueError("beam search with structured_outputs is not supported yet.")
    one_token = SamplingParams(
        max_tokens=1, logprobs=wanted, temperature=params.temperature, detokenize=False, ignore_eos=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip
    requests = [engine.make_request("", prompt, one_token) for prompt in prompts]
    eos_ids, max_len = engine.config.eos_token_ids, engine.config.max_model_len
    searches = [_Search(request.prompt_token_ids.tolist(), params, eos_ids, max_len) for request in requests]
    limit = concurrency_limit or len(searches)
    ids = itertools.count()
    bar = tqdm(total=len(searches), desc="Beam search", disable=not use_tqdm, unit="prompt")
    for first in range(0, len(searches), max(limit, 1)):
        group = searches[first : first + limit]
        while any(search.live for search in group):
            _advance(engine, group, one_token, ids)
        bar.update(len(group))
    bar.close()
    return [BeamSearchOutput([_finish(engine, beam, params) for beam in search.best()]) for search in searches]


def _advance(engine: LLMEngine, searches: Sequence[_Search], params: SamplingParams, ids: itertools.count) -> None:
    """One token for every live beam of every search."""
    names = [[f"beam-{next(ids)}" for _ in search.live] for search in searches]
    for search, own in zip(searches, names, strict=True):
        for beam, name in zip(search.live, own, strict=True):
            engine.add_request(name, {"prompt_token_ids": beam.tokens}, params)
    outputs: dict[str, RequestOutput] = {}
    while len(outputs) < sum(map(len, names)):
        outputs |= {output.request_id: output for output in engine.step()}
    for search, own in zip(searches, names, strict=True):
        search.extend([outputs[name] for name in own])


def _finish(engine: LLMEngine, beam: BeamSearchSequence, params: BeamSearchParams) -> BeamSearchSequence:
    if engine.tokenizer is not None:
        drop = beam.finish_reason == "stop" and not params.include_stop_str_in_output
        beam.text = engine.tokenizer.decode(beam.tokens[:-1] if drop else beam.tokens)
    return beam
