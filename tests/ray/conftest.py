"""A tiny model that any process on this machine can read, with answers that differ from prompt to prompt."""

import warnings

import pytest
from tiny_llama import write_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

with warnings.catch_warnings():  # of Ray's own modules, when they are imported
    warnings.simplefilter("ignore")
    import ray.data
    import ray.serve  # noqa: F401

LETTERS = [chr(code) for code in range(33, 127)] + ["\u0120"]  # the last is byte-level BPE's sign for a space
TEMPLATE = """{% for message in messages %}
{%- if message.role != "user" %}{{ raise_exception("who is " + message.role) }}{% endif %}<{{ message.content }}>
{%- endfor %}"""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with random weights and a tokenizer whose tokens are letters."""
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder, len(LETTERS))
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(LETTERS)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def engine_kwargs(compilation_cache: str) -> dict[str, object]:
    """A few programs, shared by all engines of the run."""
    sizes = {"max_model_len": 128, "max_num_seqs": 16, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 256}
    return {**sizes, "compilation_cache_dir": compilation_cache}
