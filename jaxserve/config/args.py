"""`EngineArgs`: what a caller may say about an engine, under the names vLLM users know."""

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any, Self, no_type_check

from jaxserve.checks import ParameterError, require, suggest
from jaxserve.config.options import about, check_option
from jaxserve.config.vllm_names import NO_EFFECT, UNSUPPORTED, check_foreign

DTYPES = {"half": "float16", "float": "float32", "float16": "float16", "bfloat16": "bfloat16", "float32": "float32"}
LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
SMALLEST_BLOCK, LARGEST_BLOCK = 4, 512


@no_type_check  # for annotation checkers: every option is checked when it is set up, with a message of its own
@dataclass(init=False)
class EngineArgs:
    """Options of an engine; see each field's metadata for its help. Mutable, and checked again by `resolve`.

    vLLM's other option names are understood too: those that mean nothing under XLA give one warning line, those whose
    feature does not exist yet raise.

    Raises:
        TypeError: an unknown name (with the closest known one) or a value of the wrong type.
        ParameterError: (a `ValueError`) a value out of bounds.
        UnsupportedError: (also a `NotImplementedError`) a vLLM option whose feature does not exist yet.
    """

    model: str | None = field(
        default=None,
        metadata=about(
            "folder, GGUF file or hub id of the model; the embedded SmolLM2-135M-Instruct when left out",
            "model",
            "path",
        ),
    )
    tokenizer: str | None = field(
        default=None,
        metadata=about("folder, file or hub id of the tokenizer; the model's own by default", "model", "path"),
    )
    tokenizer_mode: str = field(
        default="auto", metadata=about("which tokenizer implementation to use", "model", "str", choices=("auto", "hf"))
    )
    skip_tokenizer_init: bool = field(
        default=False, metadata=about("load no tokenizer; prompts must be token ids", "model", "bool")
    )
    chat_template: str | None = field(
        default=None, metadata=about("chat template instead of the model's: a file or Jinja text", "model", "path")
    )
    revision: str | None = field(
        default=None, metadata=about("branch, tag or commit of the model on the hub", "model", "str")
    )
    tokenizer_revision: str | None = field(
        default=None, metadata=about("branch, tag or commit of the tokenizer on the hub", "model", "str")
    )
    hf_token: str | bool | None = field(
        default=None, metadata=about("access token for the hub; True reads the one stored on disk", "model", "token")
    )
    hf_overrides: dict[str, Any] = field(
        default_factory=dict, metadata=about("JSON object merged into the model's config.json", "model", "dict")
    )
    download_dir: str | None = field(
        default=None, metadata=about("folder for downloads; the hub's own cache by default", "model", "path")
    )
    load_format: str = field(
        default="auto",
        metadata=about(
            "format of the weights; dummy makes random ones",
            "model",
            "str",
            choices=("auto", "safetensors", "gguf", "orbax", "dummy"),
        ),
    )
    use_tqdm_on_load: bool = field(
        default=True, metadata=about("show a progress bar while weights load", "model", "bool")
    )
    dtype: str = field(
        default="auto",
        metadata=about(
            "type of weights and activations; auto is float32 on CPU, else the checkpoint's 16-bit type or bfloat16",
            "model",
            "str",
            choices=("auto", *DTYPES),
        ),
    )
    seed: int = field(
        default=0,
        metadata=about(
            "seed of random weights and of requests without a seed", "model", "int", low=INT64_MIN, high=INT64_MAX
        ),
    )
    max_model_len: int | str | None = field(
        default=None,
        metadata=about(
            "longest prompt plus output in tokens (32k is 32,000); -1 or auto: what the model and the memory allow",
            "model",
            "length",
            low=1,
        ),
    )
    served_model_name: str | list[str] | None = field(
        default=None, metadata=about("names of the model in metrics and in the API", "model", "names")
    )
    generation_config: str = field(
        default="auto",
        metadata=about(
            "where default sampling values come from: auto (the model), vllm (nowhere), or a folder", "sampling", "path"
        ),
    )
    override_generation_config: dict[str, Any] = field(
        default_factory=dict,
        metadata=about('JSON object over the generation config, such as {"temperature": 0.5}', "sampling", "dict"),
    )
    max_logprobs: int = field(
        default=20, metadata=about("largest logprobs a request may ask for; -1 is no limit", "sampling", "int", low=-1)
    )
    logprobs_mode: str = field(
        default="raw_logprobs",
        metadata=about(
            "what log-probabilities show: the model's own or the processed ones, as log-probabilities or logits",
            "sampling",
            "str",
            choices=LOGPROBS_MODES,
        ),
    )
    tensor_parallel_size: int = field(
        default=1, metadata=about("devices that share each copy of the model", "parallel", "int", low=1)
    )
    data_parallel_size: int = field(
        default=1,
        metadata=about(
            "copies of the model, on devices of their own; requests go to one of them", "parallel", "int", low=1
        ),
    )
    block_size: int | None = field(
        default=None,
        metadata=about(
            "tokens per cache page, a power of two; 64, on TPU 128, on CPU 32",
            "cache",
            "int",
            low=SMALLEST_BLOCK,
            high=LARGEST_BLOCK,
        ),
    )
    gpu_memory_utilization: float = field(
        default=0.92, metadata=about("share of the device memory the engine may use", "cache", "float", low=0, high=1)
    )
    kv_cache_memory_bytes: int | None = field(
        default=None, metadata=about("bytes of the cache instead (2G is 2 * 2**30)", "cache", "count", low=1)
    )
    num_gpu_blocks_override: int | None = field(
        default=None, metadata=about("pages of the cache instead", "cache", "int", low=1)
    )
    kv_cache_dtype: str = field(
        default="auto",
        metadata=about("type of the cache: auto or the model's dtype", "cache", "str", choices=("auto", *DTYPES)),
    )
    enable_prefix_caching: bool = field(
        default=True, metadata=about("reuse the cache of prompts that begin alike", "cache", "bool")
    )
    max_num_seqs: int | None = field(
        default=None, metadata=about("most sequences in one step", "scheduler", "count", low=1)
    )
    max_num_batched_tokens: int | None = field(
        default=None, metadata=about("most tokens in one step", "scheduler", "count", low=1)
    )
    enable_chunked_prefill: bool = field(
        default=True, metadata=about("compute a long prompt over several steps", "scheduler", "bool")
    )
    long_prefill_token_threshold: int = field(
        default=0,
        metadata=about("most prompt tokens of one request in a step; 0 is no limit", "scheduler", "count", low=0),
    )
    scheduling_policy: str = field(
        default="fcfs",
        metadata=about(
            "which request goes first: the oldest, or the lowest priority value",
            "scheduler",
            "str",
            choices=("fcfs", "priority"),
        ),
    )
    decode_steps: int | None = field(
        default=None,
        metadata=about(
            "decodes launched at once while nobody waits for a place, streams bear it and no token needs the host (as "
            "log-probabilities do); 8, on CPU and with more than 6 GiB of weights 1",
            "scheduler",
            "int",
            low=1,
            high=64,
        ),
    )
    warmup: str | None = field(
        default=None,
        metadata=about(
            "compile programs ahead: full (all before the first request), lazy (before it a few that serve everything, "
            "the others beside it) or none; lazy, on CPU none",
            "engine",
            "str",
            choices=("none", "lazy", "full"),
        ),
    )
    compilation_cache_dir: str | None = field(
        default=None,
        metadata=about('folder of compiled programs; ~/.cache/jaxserve by default, "" keeps none', "engine", "path"),
    )
    kernels: dict[str, Any] = field(
        default_factory=dict,
        metadata=about(
            'JSON object with the implementation of an op, such as {"paged_attention": "xla"}; the best that can serve '
            "by default",
            "engine",
            "dict",
        ),
    )
    disable_log_stats: bool = field(default=False, metadata=about("collect no statistics", "engine", "bool"))

    def __init__(self, model: str | os.PathLike | None = None, **options: Any) -> None:
        known = {item.name: item for item in dataclasses.fields(self)}
        foreign = {name: options.pop(name) for name in options.keys() - known.keys()}
        unknown = sorted(foreign.keys() - FOREIGN_NAMES)
        if unknown:
            names = [*known, *FOREIGN_NAMES]
            raise TypeError(f"EngineArgs has no option {unknown[0]!r}.{suggest(unknown[0], names)}")
        given = {"model": model, **options}
        for name, item in known.items():
            setattr(self, name, given[name] if name in given else default_of(item))
        self._check()
        check_foreign(foreign)

    def _check(self) -> None:
        """Check everything that needs no model, and give each value its plain type."""
        for item in dataclasses.fields(self):
            value = check_option(item.name, getattr(self, item.name), item.metadata, default_of(item))
            setattr(self, item.name, value)
        for name in ("model", "tokenizer", "download_dir", "generation_config"):
            require(getattr(self, name) != "", name, "", "not be empty; leave it out for the default")
        utilization = self.gpu_memory_utilization
        require(utilization > 0, "gpu_memory_utilization", utilization, "be greater than 0 and at most 1")
        size = self.block_size
        require(size is None or size.bit_count() == 1, "block_size", size, "be a power of two")
        if self.skip_tokenizer_init:
            for name in ("tokenizer", "chat_template"):
                rule = "be left out with skip_tokenizer_init=True"
                require(getattr(self, name) is None, name, getattr(self, name), rule)
        tokens, sequences = self.max_num_batched_tokens, self.max_num_seqs
        if tokens is not None and sequences is not None and tokens < sequences:
            raise ParameterError(
                f"max_num_batched_tokens={tokens} is less than max_num_seqs={sequences}: a step needs one token "
                "or more per sequence. Raise max_num_batched_tokens or lower max_num_seqs.",
                parameter="max_num_batched_tokens",
                value=tokens,
            )

    def validated(self) -> Self:
        """A checked copy, since fields may have been changed after construction.

        Raises:
            TypeError, ParameterError: as on construction.
        """
        return type(self)(**{item.name: getattr(self, item.name) for item in dataclasses.fields(self)})


FOREIGN_NAMES = frozenset(NO_EFFECT).union(*UNSUPPORTED.values())


def default_of(item: dataclasses.Field) -> Any:
    """A field's default value, new each time for dicts."""
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
