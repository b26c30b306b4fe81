"""Folders read without transformers: the same tokenizer as `AutoTokenizer` makes of them, whatever their files say."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)

from jaxserve.text import Tokenizer, load_tokenizer
from jaxserve.text.hf_classes import REGISTERED, Unusual
from jaxserve.text.hf_folder import read_folder

MARKS = ["<s>", "</s>", "<unk>", "<tool>", "<new>", "<cls>", "\n", "  ", "the ", "lower", "12", "é", "▁"]
TEXT = st.lists(st.sampled_from(MARKS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=8)
BOS_EOS = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])


def unigram(scheme: str) -> tokenizers.Tokenizer:
    names = ["<unk>", "<s>", "</s>", "▁", "▁the", "▁lo", "w", "er", "l", "o", "e", "1", "2", "é"]
    backend = tokenizers.Tokenizer(models.Unigram([(name, -float(i)) for i, name in enumerate(names)], unk_id=0))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    backend.post_processor = BOS_EOS
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def wordpiece() -> tokenizers.Tokenizer:
    names = ["<unk>", "<s>", "</s>", "the", "lo", "##w", "##er", "1", "##2", "e", ".", ","]
    backend = tokenizers.Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=True)
    backend.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.add_tokens([AddedToken("<tool>", lstrip=True, normalized=True)])
    return backend


def byte_level(make) -> tokenizers.Tokenizer:
    backend = make.byte_level_backend()
    backend.add_special_tokens(["<|endoftext|>", AddedToken("<tool>", rstrip=True)])
    return backend


def qualified(text: str, **flags) -> dict:
    return {"__type": "AddedToken", "content": text, "lstrip": False, "rstrip": False, "normalized": False,
            "single_word": False, **flags}  # fmt: skip


PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
LLAMA = {"tokenizer_class": "LlamaTokenizerFast", "clean_up_tokenization_spaces": True}
TOOL = {
    "content": "<tool>",
    "lstrip": True,
    "rstrip": False,
    "normalized": True,
    "single_word": False,
    "special": False,
}
SLOW = {str(i): {**TOOL, "content": text, "special": i < 3, "normalized": False, "lstrip": False}
        for i, text in ((0, "<unk>"), (1, "<s>"), (2, "</s>"), (259, "<tool>"))}  # fmt: skip

# The name, the kind of tokenizer.json, tokenizer_config.json, config.json and further files.
FOLDERS: list[tuple[str, str, dict, dict | None, dict]] = [
    ("no model", "byte_level", PLAIN, None, {}),
    ("no settings", "byte_level", {}, None, {}),
    ("llama 3", "byte_level", {**PLAIN, "add_bos_token": True}, {"model_type": "llama"}, {}),
    ("file without class", "byte_level", {"eos_token": "</s>"}, {"model_type": "llama"}, {}),
    ("smollm", "byte_level", {"tokenizer_class": "GPT2Tokenizer"}, {"model_type": "llama"}, {}),
    ("smollm prefix", "byte_level", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True, "bos_token": "<s>"},
     {"model_type": "llama"}, {}),
    ("qwen 3", "byte_level", {"tokenizer_class": "Qwen2Tokenizer", "pad_token": None}, {"model_type": "qwen3"}, {}),
    ("qwen 2 wrong class", "byte_level", {**LLAMA, "bos_token": None}, {"model_type": "qwen2"}, {}),
    ("qwen 3 other class", "byte_level", PLAIN, {"model_type": "qwen3"}, {}),
    ("qwen 3 no class", "byte_level", {"eos_token": "</s>"}, {"model_type": "qwen3"}, {}),
    ("llama 2", "spm", {**LLAMA, "legacy": False, "add_bos_token": True}, {"model_type": "llama"}, {}),
    ("llama 2 legacy", "spm", {**LLAMA, "legacy": True, "add_eos_token": True}, {"model_type": "llama"}, {}),
    ("llama 2 no prefix", "spm", {**LLAMA, "add_prefix_space": False}, {"model_type": "llama"}, {}),
    ("llama 2 null", "spm", {**LLAMA, "add_prefix_space": None, "legacy": None}, {"model_type": "llama"}, {}),
    ("llama class in config.json", "spm", {}, {"model_type": "llama", "tokenizer_class": "LlamaTokenizer"}, {}),
    ("llama 2 slow tokens", "spm", {**LLAMA, "added_tokens_decoder": SLOW}, {"model_type": "llama"}, {}),
    ("llama 2 fewer tokens", "spm", {**LLAMA, "added_tokens_decoder": {"1": SLOW["1"]}}, {"model_type": "llama"}, {}),
    ("mistral", "spm", LLAMA, {"model_type": "mistral"}, {}),
    ("mistral no class", "spm", {}, {"model_type": "mistral"}, {}),
    ("phi 3", "spm", {**LLAMA, "added_tokens_decoder": {**SLOW, "2": {**SLOW["2"], "rstrip": True}}},
     {"model_type": "phi3"}, {}),
    ("gemma 2", "spm", {"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>", "eos_token": "</s>"},
     {"model_type": "gemma2"}, {}),
    ("gemma 3", "spm", {"tokenizer_class": "GemmaTokenizerFast", "bos_token": qualified("<s>"), "eos_token": "</s>",
                        "image_token": "<img>", "extra_special_tokens": {"eoi_token": "<eoi>"}},
     {"model_type": "gemma3"}, {}),
    ("unigram first", "unigram first", PLAIN, None, {}),
    ("unigram always", "unigram always", {**PLAIN, "unk_token": "<unk>"}, None, {}),
    ("wordpiece", "wordpiece", {**PLAIN, "cls_token": "<s>", "clean_up_tokenization_spaces": True}, None, {}),
    ("flags differ", "wordpiece", {**PLAIN, "added_tokens_decoder": {"1": {**SLOW["1"], "lstrip": True}}}, None, {}),
    ("new tokens", "byte_level", {**PLAIN, "pad_token": "<pad>", "mask_token": qualified("<mask>", lstrip=True),
                                  "additional_special_tokens": ["<new>", "<s>"], "image_token": "<img>"}, None, {}),
    ("named extra tokens", "byte_level", {**PLAIN, "extra_special_tokens": {"tool_token": "<call>"}}, None, {}),
    ("special tokens are text", "byte_level", {**PLAIN, "split_special_tokens": True}, None, {}),
    ("older files", "wordpiece", {"tokenizer_class": "PreTrainedTokenizerFast"}, None,
     {"special_tokens_map.json": {"bos_token": TOOL, "eos_token": "</s>", "pad_token": "</s>", "sep_token": "<new>"},
      "added_tokens.json": {"<tool>": 12}}),
    ("older files of a llama", "spm", LLAMA, {"model_type": "llama"},
     {"special_tokens_map.json": {"unk_token": "<unk>", "bos_token": {**TOOL, "content": "<s>"}}}),
]  # fmt: skip


def write_folder(folder: Path, content: str, config: dict, model: dict | None, more: dict) -> Path:
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    files = {"tokenizer_config.json": config or None, "config.json": model, **more}
    for name, value in files.items():
        if value is not None:
            (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def contents(make, spm) -> dict[str, str]:
    """tokenizer.json of every kind."""
    made = {"byte_level": byte_level(make), "spm": spm.backend, "wordpiece": wordpiece(),
            "unigram first": unigram("first"), "unigram always": unigram("always")}  # fmt: skip
    return {name: backend.to_str() for name, backend in made.items()}


@pytest.fixture(scope="module")
def pairs(contents, tmp_path_factory) -> dict[str, tuple[Tokenizer, object]]:
    """Of every folder our tokenizer and transformers'."""
    result = {}
    for name, kind, config, model, more in FOLDERS:
        folder = write_folder(tmp_path_factory.mktemp("folder"), contents[kind], config, model, more)
        read_folder(folder)  # transformers is not needed
        result[name] = (load_tokenizer(folder), AutoTokenizer.from_pretrained(folder))
    return result


NAMES = [row[0] for row in FOLDERS]


@pytest.mark.parametrize("name", NAMES)
def test_the_tokenizer_is_that_of_transformers(pairs, name):
    ours, theirs = pairs[name]
    mine, other = (json.loads(one.to_str()) for one in (ours.backend, theirs.backend_tokenizer))
    if mine["post_processor"] is None:  # theirs is one that adds nothing
        assert other["post_processor"]["special_tokens"] == {}
        mine["post_processor"] = other["post_processor"]
    assert {**mine, "padding": None, "truncation": None} == {**other, "padding": None, "truncation": None}
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.bos_id == theirs.bos_token_id
    assert ours.eos_ids == frozenset(i for i in (theirs.eos_token_id,) if i is not None)
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    assert ours.chat_template == theirs.chat_template


@settings(deadline=None, max_examples=15)
@given(parts=TEXT, data=st.data())
def test_texts_and_ids(pairs, parts, data):
    for name, (ours, theirs) in pairs.items():
        text = "".join(parts)
        for add in (True, False):
            assert ours.encode(text, add_special_tokens=add) == theirs.encode(text, add_special_tokens=add), name
        ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=6))
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special_tokens=skip) == expected, name


def test_the_table_of_classes_is_that_of_transformers():
    assert {name: TOKENIZER_MAPPING_NAMES.get(name) for name in REGISTERED} == REGISTERED
    wrong = MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    assert [name for name in wrong if TOKENIZER_MAPPING_NAMES[name] != "TokenizersBackend"] == ["qwen2"]


def test_smollm2_as_its_publisher_saved_it(smollm, golden_cases, tmp_path):
    smollm.backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.bos_id, ours.eos_ids) == (smollm.bos_id, smollm.eos_ids)
    for case in golden_cases:
        assert ours.encode(case["prompt"]) == theirs.encode(case["prompt"])


@pytest.mark.parametrize("place", ["config", "list", "file", "files"])
def test_chat_templates_in_all_their_places(contents, tmp_path, place):
    config: dict = {**PLAIN, "chat_template": "C{{ messages[0].content }}{{ tools is none }}"}
    if place == "list":
        config["chat_template"] = [
            {"name": "default", "template": "D{{ bos_token }}"},
            {"name": "rag", "template": "R"},
        ]
    write_folder(tmp_path, contents["byte_level"], config, None, {})
    if place in ("file", "files"):
        (tmp_path / "chat_template.jinja").write_text("F\u00e9{{ messages | tojson }}", encoding="utf-8")
    if place == "files":
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("T{{ tools }}")
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.chat_template == theirs.chat_template
    messages = [{"role": "user", "content": "<h\u00e9>"}]
    assert ours.render_chat(messages) == theirs.apply_chat_template(messages, tokenize=False)
    tools = [{"type": "function", "function": {"name": "x", "description": "", "parameters": {}}}]
    assert ours.render_chat(messages, tools=tools) == theirs.apply_chat_template(messages, tools=tools, tokenize=False)
    assert ours.hf.apply_chat_template(messages, tokenize=False) == ours.render_chat(messages)


def test_bytes_under_a_class_of_characters(contents, tmp_path):
    """Folders of byte-level models name LlamaTokenizer, too: `AutoTokenizer` knows them by their hub ids alone."""
    config = {**LLAMA, "bos_token": "<s>", "eos_token": "</s>", "unk_token": None}
    ours = load_tokenizer(write_folder(tmp_path, contents["byte_level"], config, {"model_type": "llama"}, {}))
    text = "the lowest 12 h\u00e9llo"
    assert ours.decode(ours.encode(text)) == text
    assert ours.hf.encode(text) == ours.encode(text)
    assert AutoTokenizer.from_pretrained(tmp_path).encode(text) != ours.encode(text)


@pytest.mark.parametrize(
    ("config", "model", "reason"),
    [
        ({"auto_map": {"AutoTokenizer": [None, "own.Tokenizer"]}}, None, "code of its own"),
        ({"fix_mistral_regex": True}, None, "sets fix_mistral_regex"),
        ({"tokenizer_class": "CohereTokenizer"}, {"model_type": "llama"}, "its class 'CohereTokenizer'"),
        ({"tokenizer_class": "LlamaTokenizer"}, {"model_type": "idefics"}, "its model is a 'idefics'"),
        ({}, {"model_type": "gpt2"}, "its model is a 'gpt2'"),
        ({"bos_token": {"content": "<s>"}}, None, "special token"),
    ],
)
def test_what_is_left_to_transformers(contents, tmp_path, config, model, reason):
    with pytest.raises(Unusual, match=reason):
        read_folder(write_folder(tmp_path, contents["byte_level"], config, model, {}))


def test_transformers_reads_the_rest_and_says_so(contents, tmp_path, caplog):
    config = {"tokenizer_class": "CohereTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    write_folder(tmp_path, contents["byte_level"], config, {"model_type": "llama"}, {})
    with caplog.at_level(logging.INFO, "jaxserve.text.tokenizer"):
        ours = load_tokenizer(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"transformers reads the tokenizer of {tmp_path}, which takes some seconds: "
        "its model is a 'llama' and its class 'CohereTokenizer'"
    ]
    assert ours.encode("the low") == AutoTokenizer.from_pretrained(tmp_path).encode("the low")
    (tmp_path / "tokenizer.json").rename(tmp_path / "vocab.json")
    with pytest.raises(Unusual, match=r"no tokenizer\.json"):
        read_folder(tmp_path)


MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 384,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
PROGRAM = """
import sys
from jaxserve import LLM, SamplingParams
llm = LLM(sys.argv[1], load_format="dummy", max_model_len=64, max_num_seqs=1, num_gpu_blocks_override=8, warmup="none",
          compilation_cache_dir=sys.argv[2])
params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True, stop=["never"])
assert llm.generate("the low", params, use_tqdm=False)[0].outputs[0].token_ids
assert llm.chat([{"role": "user", "content": "x"}], params, use_tqdm=False)[0].outputs[0].token_ids
loaded = {"transformers", "torch", "huggingface_hub"} & sys.modules.keys()
assert not loaded, loaded
assert llm.get_tokenizer().eos_token_id == 1
"""


def test_an_engine_runs_without_transformers(contents, tmp_path, compilation_cache):
    config = {**PLAIN, "chat_template": "{{ messages[0].content }}"}
    folder = write_folder(tmp_path, contents["byte_level"], config, MODEL, {})
    command = [sys.executable, "-c", PROGRAM, str(folder), compilation_cache]
    quick = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    run = subprocess.run(command, env=quick, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
