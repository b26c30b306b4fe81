"""The actor of a Ray Data pool: one engine, rows in, rows with answers out."""

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from jaxserve.engine.async_engine import AsyncLLMEngine
from jaxserve.engine.errors import EngineDeadError
from jaxserve.ray.config import EngineProcessorConfig
from jaxserve.ray.devices import claim_devices
from jaxserve.sampling_params import (
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)
from jaxserve.types import PositionLogprobs, PromptType, Request, RequestOutput

logger = logging.getLogger(__name__)

Row = dict[str, Any]

ERROR = "__inference_error__"
PROMPTS = ("tokenized_prompt", "messages", "prompt")  # columns; the first that a row has counts
TOKENS = pa.list_(pa.int32())
LOGPROBS = pa.list_(pa.list_(pa.struct(
    {"token_id": pa.int32(), "logprob": pa.float64(), "rank": pa.int32(), "decoded_token": pa.string()}
)))  # fmt: skip
ANSWER = pa.schema({
    "prompt": pa.string(),
    "prompt_token_ids": TOKENS,
    "num_input_tokens": pa.int64(),
    "generated_text": pa.string(),
    "generated_tokens": TOKENS,
    "num_generated_tokens": pa.int64(),
    "finish_reason": pa.string(),
    "logprobs": LOGPROBS,
    "prompt_logprobs": LOGPROBS,
    "time_taken_llm": pa.float64(),
    ERROR: pa.string(),
})  # fmt: skip


class EngineWorker:
    """Answers batches of rows; several may be under way, since the engine takes new requests at every step."""

    def __init__(self, config: EngineProcessorConfig, device: str):
        claim_devices(config, device)
        self._config = config
        self._engine = AsyncLLMEngine.from_engine_args(config.engine_args())
        self._ids = itertools.count()

    async def __call__(self, table: pa.Table) -> pa.Table:
        """The rows with the columns of `ANSWER`, which replace columns of these names.

        It returns the whole batch or nothing, so that a batch that is done again gives each row once.

        Raises:
            ValueError: no column holds prompts, or, unless `should_continue_on_error`, a row cannot be answered.
        """
        if not set(PROMPTS) & set(table.column_names):
            raise ValueError(
                f"rows need a column {', '.join(map(repr, PROMPTS[:-1]))} or {PROMPTS[-1]!r}, but have only "
                f"{', '.join(map(repr, table.column_names))}; give a preprocess function that makes one"
            )
        try:
            answers = await asyncio.gather(*(self._answer(row) for row in table.to_pylist()))
        except EngineDeadError:
            # Ray runs the batch again only if the process is gone, not if an exception comes out of it.
            logger.exception("the engine is dead; its actor ends and is started again")
            os._exit(1)
        failed = next((answer[ERROR] for answer in answers if answer[ERROR]), None)
        if failed is not None and not self._config.should_continue_on_error:
            raise ValueError(f"a row cannot be answered: {failed}; should_continue_on_error=True keeps the others")
        return with_answers(table, answers)

    def close(self) -> None:
        """Free the device memory; the object is of no use afterwards."""
        self._engine.shutdown()

    async def _answer(self, row: Row) -> Row:
        begin = time.perf_counter()
        try:
            output = await self._run(await self._make_request(row))
        except (TypeError, ValueError) as error:
            prompt = row.get("prompt")
            shown = prompt if isinstance(prompt, str) else None
            output = RequestOutput.failed("", shown, f"{type(error).__name__}: {error}")
        return to_row(output) | {"time_taken_llm": time.perf_counter() - begin}

    async def _make_request(self, row: Row) -> Request:
        params = row_params(self._config.sampling_params, row, self._engine.config.default_sampling)
        params.output_kind = RequestOutputKind.FINAL_ONLY
        prompt: PromptType
        column = next((name for name in PROMPTS if row.get(name) is not None), None)
        tokenization = without_nulls(row.get("tokenization_kwargs")) or None
        if column is None:
            raise ValueError(f"the row has no value in {' or '.join(PROMPTS)}")
        if column == "messages":
            prompt = {"prompt": await asyncio.to_thread(self._render, row)}
            tokenization = {"add_special_tokens": False}
        else:
            prompt = row[column]
        return await self._engine.make_request(str(next(self._ids)), prompt, params, tokenization_kwargs=tokenization)

    def _render(self, row: Row) -> str:
        tokenizer = self._engine.tokenizer
        if tokenizer is None:
            raise ValueError("messages need the tokenizer's chat template; leave out skip_tokenizer_init")
        own = without_nulls(row.get("chat_template_kwargs")) or {}
        options = {"chat_template": self._engine.config.chat_template, **self._config.chat_template_kwargs, **own}
        return tokenizer.render_chat(without_nulls(row["messages"]), **options)

    async def _run(self, request: Request) -> RequestOutput:
        return [output async for output in self._engine.run(request)][-1]


def row_params(shared: Mapping[str, Any], row: Row, defaults: Mapping[str, Any]) -> SamplingParams:
    """A row's sampling parameters: its own over the shared ones; the model's defaults if there are neither.

    Raises:
        TypeError, ValueError: an unknown name or a bad value.
    """
    own = without_nulls(row.get("sampling_params"))
    if own is not None and not isinstance(own, dict):
        raise TypeError(f"sampling_params must be a dict, got {own!r}")
    given = {**shared, **(own or {})} or dict(defaults)
    for name, kind in (("structured_outputs", StructuredOutputsParams),
                       ("repetition_detection", RepetitionDetectionParams)):  # fmt: skip
        if isinstance(given.get(name), dict):
            given[name] = kind(**given[name])
    params = SamplingParams.from_optional(**given)
    if params.n > 1:
        raise ValueError(f"n must be 1 in Ray Data, got {params.n}; repeat the row instead, its prompt is cached")
    return params


def without_nulls(value: Any) -> Any:
    """The value with None left out of its dicts.

    Arrow gives every dict of a column the keys of all of them: {"seed": 1} beside {"top_k": 2} comes back as
    {"seed": 1, "top_k": None}.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def to_row(output: RequestOutput) -> Row:
    """The columns of `ANSWER` but the time."""
    completion = output.outputs[0]
    return {
        "prompt": output.prompt,
        "prompt_token_ids": list(map(int, output.prompt_token_ids)),
        "num_input_tokens": len(output.prompt_token_ids),
        "generated_text": completion.text,
        "generated_tokens": list(map(int, completion.token_ids)),
        "num_generated_tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "logprobs": plain_logprobs(completion.logprobs),
        "prompt_logprobs": plain_logprobs(output.prompt_logprobs),
        ERROR: output.error or "",
    }


def plain_logprobs(positions: list[PositionLogprobs | None] | list[PositionLogprobs] | None) -> list[Any] | None:
    """Log-probabilities as lists of dicts, which every file format can hold."""
    if positions is None:
        return None
    return [
        None if position is None else [{"token_id": int(token), **value._asdict()} for token, value in position.items()]
        for position in positions
    ]


def with_answers(table: pa.Table, answers: list[Row]) -> pa.Table:
    """The table with the answers' columns behind its own."""
    found = pa.Table.from_pylist(answers, schema=ANSWER)
    table = table.drop_columns([name for name in ANSWER.names if name in table.column_names])
    for name in ANSWER.names:
        table = table.append_column(ANSWER.field(name), found.column(name))
    return table
