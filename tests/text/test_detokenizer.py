"""Streaming text against decoding everything at once, and stop strings against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.sampling_params import SamplingParams
from jaxserve.text import Detokenizer, Tokenizer
from jaxserve.text.decoding import WindowStream

PARTS = [*"ab the lowé你好😀🇩🇪\n,", "<|im_end|>", "</s>", "<tool>"]
TEXT = st.lists(st.sampled_from(PARTS), max_size=30).map("".join)
PROPERTY = settings(deadline=None, max_examples=60)


def stream(tokenizer: Tokenizer, prompt: list[int], chunks: list[list[int]], params: SamplingParams):
    """The shown texts after each chunk, the final one and the detokenizer; `new_text` must give their pieces."""
    detokenizer, other = (Detokenizer(tokenizer, prompt, params) for _ in range(2))
    shown, given = [], ""
    for chunk in chunks:
        detokenizer.update(chunk)
        shown.append(detokenizer.text(finished=False))
        assert other.update(chunk) == detokenizer.stop_reason
        given += other.new_text(finished=False)
        assert given == shown[-1]
    final = detokenizer.text(finished=True)
    assert given + other.new_text(finished=True) == final
    assert other.new_text(finished=True) == ""
    return shown, final, detokenizer


def split(data, ids: list[int]) -> list[list[int]]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


@pytest.mark.parametrize("name", ["smollm", "spm", "byte_level", "words", "metaspace"])
@PROPERTY
@given(data=st.data())
def test_deltas_join_to_the_full_decode(name, request, data):
    tokenizer = request.getfixturevalue(name)
    prompt, ids = tokenizer.encode(data.draw(TEXT)), tokenizer.encode(data.draw(TEXT), add_special_tokens=False)
    skip = data.draw(st.booleans())
    stops = data.draw(st.lists(st.sampled_from(["zzz", "zzzzzz"]), max_size=2))  # never match, but hold text back
    shown, final, detokenizer = stream(
        tokenizer, prompt, split(data, ids), SamplingParams(skip_special_tokens=skip, stop=stops)
    )
    both, alone = (tokenizer.decode(part, skip_special_tokens=skip) for part in (prompt + ids, prompt))
    assert both == alone + final
    assert detokenizer.num_tokens == len(ids)
    for before, after in zip(shown, [*shown[1:], final], strict=True):
        assert after.startswith(before)


@pytest.mark.parametrize("name", ["smollm", "byte_level"])
@PROPERTY
@given(data=st.data())
def test_any_ids_decode_alike(name, request, data):
    """Byte-level tokens in any order, broken characters and ids without a token included."""
    tokenizer = request.getfixturevalue(name)
    token = st.integers(0, 300) | st.integers(0, tokenizer.vocab_size + 3)
    ids = data.draw(st.lists(token, max_size=30))
    skip = data.draw(st.booleans())
    _, final, _ = stream(tokenizer, [], split(data, ids), SamplingParams(skip_special_tokens=skip))
    assert final == tokenizer.decode(ids, skip_special_tokens=skip)


@PROPERTY
@given(
    st.text(max_size=12), st.text(st.characters(min_codepoint=0x80, exclude_categories=["Cs"]), max_size=8), st.data()
)
def test_byte_fallback_characters(spm, prompt, text, data):
    ids = [3 + byte for byte in text.encode()]
    _, final, _ = stream(spm, spm.encode(prompt.encode(errors="ignore").decode()), split(data, ids), SamplingParams())
    assert final == text


@pytest.mark.parametrize("skip", [True, False])
def test_space_at_the_start(spm, skip):
    the = spm.backend.token_to_id("▁the")
    params = SamplingParams(skip_special_tokens=skip)
    assert stream(spm, [], [[the, the]], params)[1] == "the the"
    assert stream(spm, [1, the], [[the]], params)[1] == " the"
    # Behind a lone beginning-of-sequence token the text starts here, when that token is not text itself.
    assert stream(spm, [1], [[the]], params)[1] == ("the" if skip else " the")
    space = spm.backend.token_to_id("▁")
    assert stream(spm, [1, space], [[the]], params)[1] == " the"
    assert stream(spm, [], [[space], [space], [the]], params)[1] == "  the"


def test_broken_bytes(spm, smollm):
    a = spm.backend.token_to_id("a")
    shown, final, _ = stream(spm, [a], [[3 + 0xE4], [3 + 0xBD], [a], [3 + 0xE4, 3 + 0xBD]], SamplingParams())
    assert (shown, final) == (["", "", "��a", "��a"], "��a��")
    assert final == spm.decode([3 + 0xE4, 3 + 0xBD, a, 3 + 0xE4, 3 + 0xBD])
    # A character begun by the prompt is finished by, and belongs to, the generated text.
    assert stream(spm, [a, 3 + 0xE4], [[3 + 0xBD, 3 + 0xA0, a]], SamplingParams())[1] == "你a"
    ids = smollm.encode("\u2603")
    assert len(ids) > 1
    assert stream(smollm, smollm.encode("x") + ids[:1], [ids[1:]], SamplingParams())[1] == "\u2603"
    detokenizer = Detokenizer(smollm, [], SamplingParams())
    detokenizer.update(ids[:-1])
    assert [detokenizer.text(False), detokenizer.text(True), detokenizer.text(False)] == ["", "\ufffd", ""]


def test_numpy_prompts_and_ids(smollm, spm):
    for tokenizer in (smollm, spm):
        prompt, ids = (np.array(tokenizer.encode(text), np.int32) for text in ("the", " lower the"))
        detokenizer = Detokenizer(tokenizer, prompt, SamplingParams())
        detokenizer.update(ids)
        both = [*prompt.tolist(), *ids.tolist()]
        assert detokenizer.text(True) == tokenizer.decode(both)[len(tokenizer.decode(prompt)) :]


def brute_force(texts: list[str], stops: list[str], min_tokens: int, include: bool) -> tuple[str, str | None, int]:
    """`texts[k]` is the text of the first k tokens. The first token that completes a stop string ends the text."""
    for k in range(1, len(texts)):
        found = [
            (start, order)
            for order, stop in enumerate(stops)
            for start in range(len(texts[k]))
            if texts[k].startswith(stop, start) and start + len(stop) > len(texts[k - 1])
        ]
        if found and k >= min_tokens:
            start, order = min(found)
            return texts[k][: start + len(stops[order]) if include else start], stops[order], k
    return texts[-1], None, len(texts) - 1


@pytest.mark.parametrize("name", ["smollm", "byte_level"])
@PROPERTY
@given(data=st.data())
def test_stop_strings_equal_brute_force(name, request, data):
    tokenizer = request.getfixturevalue(name)
    text = data.draw(st.text(st.sampled_from("ab你😀"), min_size=1, max_size=25))
    stops = data.draw(st.lists(st.text(st.sampled_from("ab你😀"), min_size=1, max_size=4), min_size=1, max_size=3))
    include, min_tokens = data.draw(st.booleans()), data.draw(st.integers(0, 6))
    params = SamplingParams(stop=stops, include_stop_str_in_output=include, min_tokens=min_tokens)
    ids = tokenizer.encode(text)
    texts = [tokenizer.decode(ids[:k]).rstrip("\ufffd") for k in range(len(ids) + 1)]
    expected = brute_force(texts, stops, min_tokens, include)
    shown, final, detokenizer = stream(tokenizer, tokenizer.encode("ab"), split(data, ids), params)
    assert (final, detokenizer.stop_reason, detokenizer.num_tokens) == expected
    for before, after in zip(shown, [*shown[1:], final], strict=True):
        assert after.startswith(before)


def test_holds_back_what_may_be_a_stop_string(smollm):
    detokenizer = Detokenizer(smollm, [], SamplingParams(stop=["END", "\n"]))
    detokenizer.update(smollm.encode("abcEN"))
    assert detokenizer.text(False) == "abc"
    assert detokenizer.text(True) == "abcEN"
    assert detokenizer.update(smollm.encode("D more")) == "END"
    assert detokenizer.text(False) == detokenizer.text(True) == "abc"
    taken = detokenizer.num_tokens
    assert detokenizer.update(smollm.encode("x")) == "END"
    assert detokenizer.num_tokens == taken


def test_the_prompt_is_not_searched(smollm):
    detokenizer = Detokenizer(smollm, smollm.encode("one two"), SamplingParams(stop=["two three", "two"]))
    assert detokenizer.update(smollm.encode(" three")) is None
    assert detokenizer.update(smollm.encode(" two")) == "two"
    assert detokenizer.text(True) == " three "


def test_a_stop_token_gives_no_text(smollm):
    ids = smollm.encode("one two")
    for include, expected in ((False, "one"), (True, "one two")):
        detokenizer = Detokenizer(smollm, [], SamplingParams(include_stop_str_in_output=include))
        assert detokenizer.update(ids, stop_token=True) is None
        assert (detokenizer.text(True), detokenizer.num_tokens) == (expected, 2)
    # A stop string in an earlier token of the same call comes first.
    detokenizer = Detokenizer(smollm, [], SamplingParams(stop="one"))
    assert detokenizer.update(ids, stop_token=True) == "one"
    assert (detokenizer.text(True), detokenizer.num_tokens) == ("", 1)


def test_spaces_between_special_tokens(words):
    a, tool, end = (words.backend.token_to_id(text) for text in ("a", "<tool>", "</s>"))
    ids = [a, tool, end, tool, a]
    shown = {}
    for spaces in (True, False):
        params = SamplingParams(skip_special_tokens=False, spaces_between_special_tokens=spaces)
        shown[spaces] = stream(words, [], [ids[:2], ids[2:]], params)[1]
    assert shown == {True: "a <tool> </s> <tool> a", False: "a <tool></s><tool> a"}


def test_window_stream_gives_up_waiting(words):
    """A token whose text is U+FFFD itself must not hold the text back for ever."""
    broken = words.backend.token_to_id("�")
    shown, final, _ = stream(words, [], [[broken]] * 20, SamplingParams())
    assert final == words.decode([broken] * 20)
    assert len(shown[-1]) > 20


@PROPERTY
@given(data=st.data())
def test_window_stream_equals_the_table(smollm, data):
    """The general method on a decoder that also has a table: both give the same text."""
    prompt, ids = smollm.encode(data.draw(TEXT)), smollm.encode(data.draw(TEXT))
    window = WindowStream(
        smollm.backend, smollm.special_ids, prompt, added_tokens={}, spaces_between_special_tokens=True
    )
    text = "".join(window.feed(token_id) for token_id in ids) + window.tail()
    assert text == stream(smollm, prompt, [ids], SamplingParams())[1]
