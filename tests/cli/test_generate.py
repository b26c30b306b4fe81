"""`jaxserve generate` and `jaxserve convert` with a tiny model."""

import io
import json
import math
from pathlib import Path

import pytest

from jaxserve.cli import main
from jaxserve.cli.generate import Item, parse_line, record_of, summary, text_lines
from jaxserve.types import CompletionOutput, Logprob, RequestOutput

pytestmark = pytest.mark.usefixtures("quick_compilation")


def output(*texts: str, error: str | None = None) -> RequestOutput:
    completions = [CompletionOutput(i, text, [1, 2], finish_reason="length") for i, text in enumerate(texts)]
    return RequestOutput("0", "Once", [5, 6, 7], completions, finished=True, error=error)


BAD_LINES = {
    "{": "not JSON",
    "[1]": "must be a JSON object, got list",
    "{}": "exactly one of",
    '{"prompt": "a", "messages": []}': "exactly one of",
    '{"prompt": "a", "max_tokens": 3}': "unknown key 'max_tokens'",
    '{"prompt": "a", "sampling_params": 3}': '"sampling_params" must be a JSON object',
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_kept_with_its_number(line: str):
    item = parse_line(7, line)
    assert item.line == 7
    assert item.error is not None
    assert BAD_LINES[line] in item.error


def test_good_lines():
    item = parse_line(1, '{"id": "x", "prompt": "a", "sampling_params": {"top_k": 3}}')
    assert (item.label, item.prompt, item.sampling, item.error) == ("x", "a", {"top_k": 3}, None)
    assert parse_line(2, '{"prompt_token_ids": [1, 2]}').prompt == {"prompt_token_ids": [1, 2]}
    assert parse_line(3, '{"messages": [{"role": "user"}]}').messages == [{"role": "user"}]


def test_record_is_json_even_without_probability():
    result = output(" upon")
    result.outputs[0].logprobs = [{3: Logprob(-math.inf, 9, "x")}]
    result.outputs[0].cumulative_logprob = -1.5
    record = json.loads(json.dumps(record_of(Item(4), result), allow_nan=False))
    assert record["id"] == 4
    assert record["num_prompt_tokens"] == 3
    assert record["outputs"][0]["logprobs"] == [{"3": {"logprob": -9999.0, "rank": 9, "token": "x"}}]


def test_texts_stand_under_their_prompts_when_there_are_several():
    assert list(text_lines([Item(1, prompt="Once")], [output(" upon")])) == [" upon"]
    items = [Item(1, prompt="Once"), Item(2, prompt="Twice", error="too long")]
    assert list(text_lines(items[:1], [output("a", "b")])) == ["=== Once (1 of 2)", "a", "=== Once (2 of 2)", "b"]
    assert list(text_lines(items, [output(" a"), None])) == ["=== Once", "a"]


def test_summary():
    assert summary([output("a", "b"), None], 1, 2.0, 4.0) == (
        "2 prompts, 1 failed: 4 tokens in 4.0 s (1.0 tokens/s), ready in 2.0 s"
    )


def test_lines_in_lines_out(tmp_path: Path, small: list[str], capsys: pytest.CaptureFixture[str]):
    lines = [
        {"id": "first", "prompt": "The sky is", "sampling_params": {"max_tokens": 3, "logprobs": 1}},
        {"prompt_token_ids": [5, 6, -1]},
        {"messages": [{"role": "user", "content": "Hello"}]},
        {"prompt": "The sky is", "sampling_params": {"temperature": 5}},
        {"prompt": "The sky is", "sampling_params": {"stop": "x", "detokenize": False}},
        {"messages": [{"role": "user"}]},
        {"prompt": "long " * 300},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n\n".join(map(json.dumps, lines)) + "\n{broken\n")
    words = ["generate", "-i", str(source), "-o", str(target), "--max-tokens", "5", "--ignore-eos", *small]
    assert main(words) == 1
    records = [json.loads(line) for line in target.read_text().splitlines()]
    assert [record["id"] for record in records] == ["first", 3, 5, 7, 9, 11, 13, 14]
    good = {record["id"]: record["outputs"][0] for record in records if "outputs" in record}
    assert {key: len(completion["token_ids"]) for key, completion in good.items()} == {"first": 3, 5: 5}
    assert len(good["first"]["logprobs"]) == 3
    assert records[2]["prompt"].endswith("Hello<|im_end|>\n<|im_start|>assistant\n")
    errors = {record["line"]: record["error"] for record in records if "error" in record}
    for line, words_of_error in {3: "-1", 7: "temperature", 9: "stop", 11: "content", 13: "256", 14: "JSON"}.items():
        assert words_of_error in errors[line]
    assert "8 prompts, 6 failed: 8 tokens" in capsys.readouterr().err


def test_prompts_of_the_command_line_and_a_converted_model(
    tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    options = ["--temperature", "0", "--max-tokens", "6", "--ignore-eos"]
    monkeypatch.setattr("sys.stdin", io.StringIO("The sky is\n"))
    assert main(["generate", "-", *options, *small]) == 0
    text = capsys.readouterr().out
    assert text.strip()
    assert main(["convert", small[1], str(tmp_path / "ready"), "--dtype", "float32"]) == 0
    assert str(tmp_path / "ready") in capsys.readouterr().out
    assert main(["generate", "The sky is", *options, *small, "--model", str(tmp_path / "ready")]) == 0
    assert capsys.readouterr().out == text
    assert main(["generate", "--chat", "Hello", "The sky is", *options, *small]) == 0
    assert capsys.readouterr().out.startswith("=== Hello\n")
    assert main(["convert", small[1], str(tmp_path / "ready")]) == 1
    assert "already holds" in capsys.readouterr().err
