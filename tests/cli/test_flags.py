"""The command line before an engine exists: flags, help, and what is said about mistakes."""

import dataclasses
import subprocess
import sys

import pytest

from jaxserve.cli import COMMANDS, find_command, main, parse
from jaxserve.cli.flags import (
    ENGINE,
    NOT_SAMPLING_FLAGS,
    SAMPLING,
    UsageError,
    dashes,
    engine_args,
    given,
    sampling_params,
)
from jaxserve.config import EngineArgs
from jaxserve.sampling_params import SamplingParams


def test_help_and_version_start_without_the_engine():
    code = (
        "import sys\nfrom jaxserve.cli import main\n"
        "for words in (['--version'], ['--help'], ['generate', '--help'], ['chat', '--help']):\n"
        "    try:\n        main(words)\n    except SystemExit as end:\n        assert end.code == 0\n"
        "heavy = {'jax', 'flax', 'transformers', 'torch'} & sys.modules.keys()\nassert not heavy, heavy\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert all(f"  {name}" in ended.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert text.startswith(f"usage: jaxserve {command} [OPTIONS]")
    assert "--debug" in text
    assert "==SUPPRESS==" not in text


def test_every_engine_option_has_a_flag():
    samples = {"int": "4", "count": "4", "length": "64", "float": "0.5", "dict": '{"a": 1}', "names": "a,b"}
    for item in dataclasses.fields(EngineArgs):
        flag = "--" + item.name.replace("_", "-")
        about = item.metadata
        word = about["choices"][-1] if about["choices"] else samples.get(about["kind"], "text")
        words = [flag] if about["kind"] == "bool" else [flag, word]
        args = parse(["bench", "offline", *words])
        assert list(given(args, ENGINE)) == [item.name]


def test_every_sampling_option_has_a_flag():
    samples = dict.fromkeys(("logit_bias", "structured_outputs", "repetition_detection"), '{"1": 2}')
    switches = [item.name for item in dataclasses.fields(SamplingParams) if isinstance(item.default, bool)]
    for item in dataclasses.fields(SamplingParams):
        if item.name in NOT_SAMPLING_FLAGS:
            continue
        flag = "--" + item.name.replace("_", "-")
        args = parse(["generate", flag, *([] if item.name in switches else [samples.get(item.name, "1")])])
        assert list(given(args, SAMPLING)) == [item.name]


def test_flags_become_checked_values():
    words = ["generate", "hello", "--max_num_seqs=4", "--stop", "a", "--stop", "b", "--no-detokenize", "world"]
    words += ["--max-tokens", "none", "--logit-bias", '{"7": -100}', "--stop-token-ids", "1,2", "--max-model-len", "1k"]
    args = parse(words)
    assert args.prompts == ["hello", "world"]
    values = given(args, SAMPLING)
    assert values.pop("detokenize") is False
    params = sampling_params(SamplingParams(temperature=0.5), values)
    assert (params.temperature, params.max_tokens, params.stop) == (0.5, None, ["a", "b"])
    assert (params.logit_bias, params.stop_token_ids) == ({7: -100.0}, [1, 2])
    options = engine_args(args, max_num_seqs=9, seed=3)
    assert (options.max_num_seqs, options.max_model_len, options.seed) == (4, 1000, 3)


def test_values_of_json_become_nested_parameters():
    base = SamplingParams(max_tokens=5)
    params = sampling_params(base, {"repetition_detection": {"max_pattern_size": 2, "min_count": 3}, "top_k": 4})
    assert params.repetition_detection is not None
    assert (params.repetition_detection.min_count, params.top_k, params.max_tokens) == (3, 4, 5)
    assert base == SamplingParams(max_tokens=5)


def test_words_after_two_dashes_are_prompts():
    assert dashes(["--a_b=c_d", "x_y", "a --b_c"]) == ["--a-b=c_d", "x_y", "a --b_c"]
    assert parse(["generate", "a", "--top-k", "3", "--", "--max_tokens", "-"]).prompts == ["a", "--max_tokens", "-"]


def test_commands_of_two_words():
    assert find_command(["bench", "offline", "--seed", "1"]) == ("bench offline", ["--seed", "1"])
    with pytest.raises(UsageError, match="bench offline"):
        find_command(["bench"])


MISTAKES = {
    "genrate hi": "Did you mean 'generate'?",
    "generate": "give a prompt",
    "generate hi --max-tokns 3": "Did you mean '--max-tokens'?",
    "generate hi --max-tokens 0": "max_tokens must be 1 or more",
    "generate hi --max-tokens x": "--max-tokens: 'x' is not a whole number",
    "generate hi --temperature nan": "temperature must be finite",
    "generate hi --top-p": "--top-p: expected one argument",
    "generate hi --stop-token-ids 1,b": "--stop-token-ids: '1,b' is not a list",
    "generate hi --logit-bias {": "--logit-bias: '{' is not JSON",
    "generate hi --structured-outputs {}": "structured_outputs",
    "generate hi --dtype int8": "invalid choice: 'int8'",
    "generate hi --max-model-len 5q": "'5q' is no whole number",
    "generate hi --gpu-memory-utilization 3": "gpu_memory_utilization must be at most 1",
    "generate hi --pipeline-parallel-size 2": "pipeline_parallel_size=2",
    "generate - -": "can be read once only",
    "generate hi --input-file x": "not both",
    "generate --chat --input-file x": "--chat is for prompts",
    "generate --input-file no/such/file": "No such file or directory",
    "chat hi": "unknown argument 'hi'",
    "convert one": "required: OUT",
    "bench offline --batch-sizes 1,0": "batch sizes must be 1 or more",
    "bench offline --random-range-ratio 1": "range_ratio must be 0 or more and less than 1",
    "bench offline --num-prompts 0": "num_prompts must be 1 or more",
    "bench offline --repeat 0": "--repeat must be 1 or more",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_and_code_2(line: str, capsys: pytest.CaptureFixture[str]):
    assert main(line.split()) == 2
    shown = capsys.readouterr()
    assert MISTAKES[line] in shown.err
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_a_missing_model_is_one_line_and_code_1(capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "hi", "--model", "no/such/folder/at/all"]) == 1
    shown = capsys.readouterr().err
    assert "no/such/folder/at/all" in shown
    assert "Traceback" not in shown


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "hi", "--debug", "--model", "no/such/folder/at/all"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_interruption_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxserve.cli.generate.read_items", interrupted)
    assert main(["generate", "hi"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
