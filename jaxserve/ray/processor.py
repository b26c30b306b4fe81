"""Batch inference over Ray Data: a dataset of prompts to a dataset of answers."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ray.data import ActorPoolStrategy, Dataset

from jaxserve.ray.config import EngineProcessorConfig
from jaxserve.ray.devices import actor_options, find_device
from jaxserve.ray.worker import ERROR, EngineWorker

Row = dict[str, Any]
RowFunction = Callable[[Row], Row]


class Processor:
    """What `build_processor` makes: call it with a dataset. Nothing runs until the resulting dataset is read."""

    def __init__(
        self,
        config: EngineProcessorConfig,
        preprocess: RowFunction | None,
        postprocess: RowFunction | None,
        preprocess_map_kwargs: Mapping[str, Any],
        postprocess_map_kwargs: Mapping[str, Any],
    ):
        self._config = config
        self._before, self._after = preprocess, postprocess
        self._before_options, self._after_options = preprocess_map_kwargs, postprocess_map_kwargs

    def __call__(self, dataset: Dataset) -> Dataset:
        """The dataset with the columns of `preprocess`, the answers' columns, and then as `postprocess` wants it."""
        if self._before is not None:
            dataset = dataset.map(partial(add_columns, self._before), **self._before_options)
        # Blocks of one batch each: large ones would keep other actors idle, and be done again as a whole.
        dataset = dataset.repartition(target_num_rows_per_block=self._config.batch_size)
        dataset = dataset.map_batches(EngineWorker, **self._pool_options())  # type: ignore[arg-type]
        if self._after is not None:
            dataset = dataset.map(partial(unless_failed, self._after), **self._after_options)
        return dataset

    def _pool_options(self) -> dict[str, Any]:
        config = self._config
        device = find_device(config.device)
        low, high = config.pool
        return {
            "batch_size": None,  # a block
            "batch_format": "pyarrow",
            "zero_copy_batch": True,
            "fn_constructor_kwargs": {"config": config, "device": device},
            "compute": ActorPoolStrategy(min_size=low, max_size=high),
            "max_concurrency": config.max_concurrent_batches,
            "max_restarts": config.max_restarts,
            "max_task_retries": config.max_task_retries,
            **actor_options(config, device),
        }


def build_processor(
    config: EngineProcessorConfig,
    preprocess: RowFunction | None = None,
    postprocess: RowFunction | None = None,
    *,
    preprocess_map_kwargs: Mapping[str, Any] | None = None,
    postprocess_map_kwargs: Mapping[str, Any] | None = None,
) -> Processor:
    """A function from a dataset of prompts to a dataset of answers, computed by a pool of engine actors.

    A row has its prompt in `messages`, `prompt` or `tokenized_prompt`, and may have `sampling_params`,
    `chat_template_kwargs` and `tokenization_kwargs`. The answer is in `generated_text`, `generated_tokens`,
    `finish_reason` and the other columns of `ANSWER` in `jaxserve.ray.worker`; other columns are carried along.

    Args:
        config: of the engines and the pool.
        preprocess: row to row; what it returns is added to the row, so that it need not repeat columns.
        postprocess: row to row; what it returns is the result. Rows with an error do not go through it: they keep all
            their columns, with the reason in `__inference_error__`, which is "" in the others.
        preprocess_map_kwargs, postprocess_map_kwargs: options of `Dataset.map` for these functions.
    """
    return Processor(config, preprocess, postprocess, preprocess_map_kwargs or {}, postprocess_map_kwargs or {})


def add_columns(function: RowFunction, row: Row) -> Row:
    """The row with what the function makes of it."""
    return {**row, **function(row)}


def unless_failed(function: RowFunction, row: Row) -> Row:
    """What the function makes of the row, but rows with an error as they are."""
    return row if row[ERROR] else {**function(row), ERROR: ""}
