"""Tokenizers from folders and GGUF files against goldens, a brute-force SentencePiece and transformers."""

import itertools
import json
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.text import Tokenizer, load_tokenizer
from jaxserve.text.decoding import byte_level_alphabet

UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
ALL = ["smollm", "spm", "byte_level", "words", "metaspace"]


def test_smollm2_encodes_the_golden_prompts(smollm, golden_cases):
    assert len(golden_cases) == 24
    for case in golden_cases:
        if case["chat"]:
            text = smollm.render_chat([{"role": "user", "content": case["prompt"]}])
            ids = smollm.encode(text, add_special_tokens=False)
        else:
            ids = smollm.encode(case["prompt"])
        assert ids == case["prompt_token_ids"]
        assert smollm.decode(case["token_ids"]) == case["text"]


def test_smollm2_facts(smollm):
    assert (smollm.vocab_size, smollm.bos_id, smollm.eos_ids) == (49152, 1, frozenset({2}))
    assert smollm.special_tokens["eos_token"] == "<|im_end|>"
    assert smollm.special_ids == frozenset(range(17))
    assert smollm.max_chars_per_token == max(len(smollm.backend.id_to_token(i)) for i in range(49152))


@pytest.mark.parametrize("name", ["smollm", "byte_level"])
@settings(deadline=None, max_examples=100)
@given(text=UNICODE)
def test_byte_level_round_trip(name, request, text):
    tokenizer: Tokenizer = request.getfixturevalue(name)
    known = {byte for byte, char in enumerate(byte_level_alphabet()) if tokenizer.backend.token_to_id(char) is not None}
    # SmolLM2 was trained without 21 of the bytes and drops them.
    assert len(known) == (256 if name == "byte_level" else 235)
    text = "".join(char for char in text if known.issuperset(char.encode()))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(text) <= len(ids) * tokenizer.max_chars_per_token


def test_hf_view_agrees_and_is_apart(smollm):
    text = "Hello wörld 123  <|im_end|>\n\n你好"
    assert smollm.hf(text)["input_ids"] == smollm.encode(text)
    assert smollm.hf.eos_token_id == 2
    assert smollm.hf(text, truncation=True, max_length=2)["input_ids"] == smollm.encode(text)[:2]
    assert len(smollm.encode(text)) > 2  # the limit above stays in the copy


def test_saved_gguf_tokenizer_loads_as_a_folder(smollm, golden_cases, tmp_path):
    smollm.hf.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    again = load_tokenizer(tmp_path)
    for case in golden_cases:
        assert again.encode(case["prompt"]) == smollm.encode(case["prompt"])
    assert again.chat_template == smollm.chat_template
    assert again.eos_ids == smollm.eos_ids
    assert again.bos_id == smollm.bos_id


def test_folder_agrees_with_transformers(byte_level):
    text = "lowest wörld </s> 你好"
    assert byte_level.encode(text) == byte_level.hf(text)["input_ids"]
    assert byte_level.decode(byte_level.encode(text)) == byte_level.hf.decode(
        byte_level.encode(text), skip_special_tokens=True
    )
    assert byte_level.eos_ids == frozenset({1})
    assert byte_level.bos_id == 0
    assert byte_level.render_chat([{"role": "u", "content": "x"}]) == "<u>x</s>"


def test_limits_saved_in_the_folder_are_lifted(make, tmp_path):
    backend = make.byte_level_backend()
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    tokenizer = load_tokenizer(make.save_folder(tmp_path, backend))
    assert tokenizer.decode(tokenizer.encode("the quick brown fox")) == "the quick brown fox"


@pytest.mark.parametrize("name", ALL)
def test_batch_equals_single_and_threads(name, request):
    tokenizer: Tokenizer = request.getfixturevalue(name)
    texts = ["a b c", "", "the lower 你好", "a" * 300, "b c </s> a"] * 8
    expected = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts) == expected
    results: dict[int, bool] = {}

    def work(index: int) -> None:
        results[index] = all(tokenizer.encode(t) == e for t, e in zip(texts * 3, expected * 3, strict=True))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(4), True)


@pytest.mark.parametrize("name", ALL)
def test_vocab_size_and_token_text(name, request):
    tokenizer: Tokenizer = request.getfixturevalue(name)
    size = tokenizer.vocab_size
    assert tokenizer.backend.id_to_token(size - 1) is not None
    assert tokenizer.backend.id_to_token(size) is None
    assert all(isinstance(tokenizer.token_text(i), str) for i in range(min(size, 400)))


def test_token_text_of_one_token(smollm, spm):
    assert smollm.token_text(2) == "<|im_end|>"
    assert smollm.token_text(smollm.encode(" Paris")[0]) == " Paris"
    assert smollm.token_text(smollm.encode("\u2603")[0]) == "\ufffd"  # the first bytes of a snowman
    assert spm.token_text(spm.backend.token_to_id("▁the")) == " the"
    assert spm.token_text(3 + ord("\n")) == "\n"
    assert spm.token_text(3 + 0xE2) == "\ufffd"
    assert spm.token_text(10**6) == ""


def test_encode_refuses_what_is_no_text(byte_level):
    with pytest.raises(TypeError, match="text 1 must be a string, not int"):
        byte_level.encode_batch(["a", 3])
    with pytest.raises(ValueError, match=r"half of a surrogate pair \(U\+D800\) at character 2"):
        byte_level.encode("ab\ud800")


# SentencePiece-style GGUF


def brute_force_spm(values: dict, text: str) -> list[int]:
    """SentencePiece BPE by its definition: join the pair whose whole has the best score, the leftmost first."""
    ids = {token: i for i, token in enumerate(values["tokens"]) if values["token_type"][i] == 1}
    parts = list(("▁" + text).replace(" ", "▁"))
    while True:
        pairs = [(values["scores"][ids[a + b]], -i) for i, (a, b) in enumerate(itertools.pairwise(parts))
                 if a + b in ids]  # fmt: skip
        if not pairs:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    result = []
    for part in parts:
        result += [ids[part]] if part in ids else [3 + byte for byte in part.encode()]
    return result


@settings(deadline=None, max_examples=150)
@given(st.text(st.sampled_from(list("the lowr,sté你\n")), min_size=1, max_size=25))
def test_sentencepiece_equals_brute_force(make, spm, text):
    ids = spm.encode(text)
    assert ids == [1, *brute_force_spm(make.spm_values(), text)]
    assert spm.decode(ids) == text
    assert spm.encode(text, add_special_tokens=False) == ids[1:]


def test_sentencepiece_special_and_user_defined_tokens(spm):
    tool = spm.backend.token_to_id("<tool>")
    the = spm.backend.token_to_id("▁the")
    assert spm.encode("the<tool>the</s>") == [1, the, tool, the, 2]
    assert spm.decode([the, tool, the, 2]) == "the<tool> the"
    assert spm.decode([the, tool, the, 2], skip_special_tokens=False) == "the<tool> the</s>"
    assert spm.render_chat([{"role": "user", "content": "x"}]) == "<user>x</s>"


def test_without_space_prefix_nothing_is_added_or_stripped(make, tmp_path):
    path = make.write_gguf(
        tmp_path / "g.gguf", make.spm_values(add_space_prefix=False, add_bos_token=False, add_eos_token=True)
    )
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(" low")
    assert ids == [tokenizer.backend.token_to_id("▁low"), 2]
    assert tokenizer.decode(ids) == " low"
    assert tokenizer.decode(tokenizer.encode("low")) == "low"


def test_end_of_turn_ends_too(make, tmp_path):
    tokenizer = load_tokenizer(make.write_gguf(tmp_path / "g.gguf", make.spm_values(eot_token_id=259)))
    assert tokenizer.eos_ids == frozenset({2, 259})


# Byte-level pre-tokenizers: what each is known to do with digits, case and apostrophes


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("smollm", "I'm 123  x", ["I", "'m", "Ġ", "1", "2", "3", "Ġ", "Ġx"]),
        ("gpt-2", "I'm 123  x", ["I", "'m", "Ġ123", "Ġ", "Ġx"]),
        ("gpt-2", "I'M", ["I", "'", "M"]),
        ("llama-bpe", "I'M 12345\n\n x", ["I", "'M", "Ġ", "123", "45", "ĊĊ", "Ġx"]),
        ("qwen2", "I'M 123.\n", ["I", "'M", "Ġ", "1", "2", "3", ".Ċ"]),
        ("dbrx", "don't 1234", ["don", "'t", "Ġ", "123", "4"]),
        ("tekken", "HelloWorld's 12", ["Hello", "World", "'s", "Ġ", "1", "2"]),
        ("gpt-4o", "HelloWorld's 1234", ["Hello", "World's", "Ġ", "123", "4"]),
        ("default", "a==b 1234", ["a", "==", "b", "Ġ", "123", "4"]),
        ("deepseek-v3", "ab 1234你好!", ["ab", "Ġ", "123", "4", "ä½łå¥½", "!"]),
        ("falcon", "`x` 1234", ["`", "x", "`", "Ġ", "123", "4"]),
    ],
)
def test_pre_tokenizers(make, tmp_path, pre, text, expected):
    values = {"model": "gpt2", "pre": pre, "tokens": ["a", "b", "ab"], "token_type": [1, 1, 1], "merges": ["a b"]}
    tokenizer = load_tokenizer(make.write_gguf(tmp_path / "p.gguf", values))
    assert [word for word, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)] == expected


def test_qwen2_composes_accents(make, tmp_path):
    values = {"model": "gpt2", "pre": "qwen2", "tokens": ["Ã", "©", "e"], "token_type": [1, 1, 1], "merges": []}
    assert load_tokenizer(make.write_gguf(tmp_path / "q.gguf", values)).encode("e\u0301e") == [0, 1, 2]


def test_llama3_takes_whole_words_and_adds_bos(make, tmp_path):
    tokens = ["<s>", "a", "b", "c", "ab", "abc"]
    values = {"model": "gpt2", "pre": "llama-bpe", "tokens": tokens, "token_type": [3, 1, 1, 1, 1, 1],
              "merges": ["a b"], "bos_token_id": 0}  # fmt: skip
    assert load_tokenizer(make.write_gguf(tmp_path / "a.gguf", values)).encode("abc") == [0, 5]
    values["pre"] = "gpt-2"
    assert load_tokenizer(make.write_gguf(tmp_path / "b.gguf", values)).encode("abc") == [4, 3]


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model 'bert' is not supported"),
        ({"model": "gpt2", "pre": "martian"}, "tokenizer.ggml.pre 'martian' is not supported"),
        ({"tokens": None}, "no tokenizer.ggml.tokens"),
        ({"scores": None}, "0 tokenizer.ggml.scores for"),
        ({"token_type": [1, 2]}, "2 token types for"),
        ({"eos_token_id": 99999}, "eos_token_id is 99999, the vocabulary ends at"),
        ({"model": "gpt2", "pre": "gpt-2", "merges": ["x nope"]}, "do not fit together"),
        ({"model": "gpt2", "pre": "gpt-2", "merges": ["alone"]}, "merge 0 'alone' is not two tokens"),
    ],
)
def test_bad_gguf_metadata_names_file_and_value(make, tmp_path, changes, message):
    path = make.write_gguf(tmp_path / "bad.gguf", make.spm_values(**changes))
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(path)
    assert str(path) in str(error.value)


def test_gguf_cut_short(tmp_path, smollm_path):
    path = tmp_path / "half.gguf"
    with smollm_path.open("rb") as file:
        path.write_bytes(file.read(200_000))
    with pytest.raises(ValueError, match=r"half\.gguf"):
        load_tokenizer(path)
    with pytest.raises(ValueError, match="there is no file"):
        load_tokenizer(tmp_path / "none.gguf")


def test_folder_without_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no tokenizer.*tokenizer=.*skip_tokenizer_init=True") as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)
    (tmp_path / "tokenizer.json").write_text("{ not json")
    with pytest.raises(ValueError, match="cannot load the tokenizer of"):
        load_tokenizer(tmp_path)


def test_unknown_mode_and_template(byte_level_folder: Path):
    with pytest.raises(ValueError, match="tokenizer_mode 'slow' is not supported"):
        load_tokenizer(byte_level_folder, tokenizer_mode="slow")
    with pytest.raises(ValueError, match="neither a file nor a Jinja template"):
        load_tokenizer(byte_level_folder, chat_template="no/such/file.jinja")
    tokenizer = load_tokenizer(byte_level_folder, chat_template="{{ messages[0].content }}!")
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "hi!"
    assert tokenizer.hf.chat_template == "{{ messages[0].content }}!"
