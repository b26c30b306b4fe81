"""`jaxserve generate`: continue prompts, or answer conversations from a JSONL file."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxserve.checks import ParameterError
from jaxserve.cli import flags
from jaxserve.types import PositionLogprobs, PromptType, RequestOutput, TokensPrompt

if TYPE_CHECKING:
    from jaxserve.llm import LLM

DESCRIPTION = """Continue prompts and print the text.

With --input-file every line is a JSON object with one of "prompt" (text), "prompt_token_ids" (a list) or "messages"
(a conversation, for the model's chat template), and optionally "id" and "sampling_params" (an object over the flags).
Results are JSON lines in the order of the input; a line that cannot be used gives {"id", "line", "error"}, the others
complete, and the exit code is 1."""

PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")
LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot write


@dataclass
class Item:
    """One prompt to run, or what is wrong with its line."""

    line: int
    id: Any = None
    prompt: PromptType | None = None
    messages: list[Any] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def label(self) -> Any:
        return self.line if self.id is None else self.id

    @property
    def title(self) -> Any:
        return self.messages[-1]["content"] if self.messages else self.prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="text to continue; - reads one prompt from standard input"
    )
    parser.add_argument("--chat", action="store_true", help="take each PROMPT as a user's message to a chat model")
    files = parser.add_argument_group("files")
    files.add_argument("-i", "--input-file", metavar="JSONL", help="prompts, one a line; - is standard input")
    files.add_argument("-o", "--output-file", metavar="JSONL", help="write results there instead of printing them")
    flags.add_sampling_flags(parser)
    flags.add_engine_flags(parser, skip=("seed",))


def run(args: argparse.Namespace) -> int:
    """Generate; the exit code is 1 when a prompt failed."""
    given = flags.given(args, flags.SAMPLING)
    flags.sampling_params(None, given)  # a bad value is said before the model loads
    quiet = {} if sys.stderr.isatty() else {"use_tqdm_on_load": False}
    engine_args = flags.engine_args(args, seed=given.get("seed") or 0, **quiet)
    items = read_items(args)
    with contextlib.ExitStack() as stack:
        target = sys.stdout
        if args.output_file is not None:
            target = stack.enter_context(open(args.output_file, "w", encoding="utf-8"))
        start = time.perf_counter()
        from jaxserve.llm import LLM

        llm = LLM.from_engine_args(engine_args)
        stack.callback(llm.close)
        ready = time.perf_counter()
        results = generate(llm, items, given)
        done = time.perf_counter()
        as_json = args.input_file is not None or args.output_file is not None
        for line in (record_lines if as_json else text_lines)(items, results):
            print(line, file=target)
        target.flush()
    failures = [item for item in items if item.error is not None]
    for item in () if as_json else failures:
        print(f"error: prompt {item.line}: {item.error}", file=sys.stderr)
    print(summary(results, len(failures), ready - start, done - ready), file=sys.stderr)
    return 1 if failures else 0


def read_items(args: argparse.Namespace) -> list[Item]:
    """The prompts of the command line, of standard input or of a file.

    Raises:
        UsageError: none is given, or they come from two places.
    """
    if args.input_file is not None:
        if args.prompts:
            raise flags.UsageError("give prompts as arguments or in --input-file, not both.")
        if args.chat:
            raise flags.UsageError('--chat is for prompts given as arguments; write "messages" in the lines of a file.')
        if args.input_file == "-":
            return [parse_line(*entry) for entry in nonempty(sys.stdin)]
        try:
            with open(args.input_file, encoding="utf-8") as file:
                return [parse_line(*entry) for entry in nonempty(file)]
        except (OSError, UnicodeDecodeError) as error:
            raise flags.UsageError(f"--input-file cannot be read: {error}") from error
    if not args.prompts:
        raise flags.UsageError("give a prompt, - for standard input, or --input-file. See jaxserve generate --help.")
    if args.prompts.count("-") > 1:
        raise flags.UsageError("standard input (-) can be read once only.")
    texts = [sys.stdin.read().rstrip("\n") if text == "-" else text for text in args.prompts]
    if args.chat:
        return [Item(line, messages=[{"role": "user", "content": text}]) for line, text in enumerate(texts, start=1)]
    return [Item(line, prompt=text) for line, text in enumerate(texts, start=1)]


def nonempty(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    return ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def parse_line(number: int, line: str) -> Item:
    """One JSON line; what is wrong with it is kept in the item."""
    item = Item(number)
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ParameterError(f"a line must be a JSON object, got {type(record).__name__}.")
        item.id = record.pop("id", None)
        sampling = record.pop("sampling_params", None)
        if not isinstance(sampling, dict | None):
            raise ParameterError('"sampling_params" must be a JSON object.')
        item.sampling = sampling or {}
        keys = [key for key in PROMPT_KEYS if key in record]
        if len(keys) != 1:
            raise ParameterError('a line needs exactly one of "prompt", "prompt_token_ids" and "messages".')
        value = record.pop(keys[0])
        if record:
            raise ParameterError(
                f"unknown key {next(iter(record))!r}; known are id, sampling_params and {PROMPT_KEYS}."
            )
        if keys == ["messages"]:
            item.messages = value
        else:
            item.prompt = value if keys == ["prompt"] else TokensPrompt(prompt_token_ids=value)
    except json.JSONDecodeError as error:
        item.error = f"not JSON: {error.msg} at column {error.colno}."
    except ParameterError as error:
        item.error = str(error)
    return item


def generate(llm: "LLM", items: list[Item], given: dict[str, Any]) -> list[RequestOutput | None]:
    """Run every usable item in one batch; the others get their `error` and no output."""
    prompts, params, rows = [], [], []
    base = llm.get_default_sampling_params()
    for row, item in enumerate(items):
        if item.error is not None:
            continue
        try:
            own = flags.sampling_params(base, given | item.sampling)
            prompts.append(item.prompt if item.messages is None else render(llm, item.messages))
        except (TypeError, ValueError) as error:
            item.error = str(error)
        else:
            params.append(own)
            rows.append(row)
    results: list[RequestOutput | None] = [None] * len(items)
    outputs = llm.generate(prompts, params, use_tqdm=sys.stderr.isatty(), on_error="return") if prompts else []
    for row, output in zip(rows, outputs, strict=True):
        items[row].error = output.error
        results[row] = output
    return results


def render(llm: "LLM", messages: list[Any]) -> TokensPrompt:
    """A conversation as the tokens of the chat template."""
    tokenizer = llm.llm_engine.tokenizer
    if tokenizer is None:
        raise ParameterError("messages need the tokenizer's chat template; leave out --skip-tokenizer-init.")
    text = tokenizer.render_chat(messages)
    return TokensPrompt(prompt=text, prompt_token_ids=tokenizer.encode(text, add_special_tokens=False))


def record_lines(items: list[Item], results: list[RequestOutput | None]) -> Iterator[str]:
    """One JSON line an item."""
    for item, output in zip(items, results, strict=True):
        record = {"id": item.label, "line": item.line, "error": item.error}
        if item.error is None and output is not None:
            record = record_of(item, output)
        yield json.dumps(record, ensure_ascii=False)


def record_of(item: Item, output: RequestOutput) -> dict[str, Any]:
    """The JSON form of a result."""
    completions = []
    for completion in output.outputs:
        entry = {
            "index": completion.index,
            "text": completion.text,
            "token_ids": completion.token_ids,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if completion.logprobs is not None:
            entry["cumulative_logprob"] = completion.cumulative_logprob
            entry["logprobs"] = [logprobs_of(position) for position in completion.logprobs]
        completions.append(entry)
    record = {
        "id": item.label,
        "prompt": output.prompt,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_cached_tokens": output.num_cached_tokens,
        "outputs": completions,
    }
    if output.prompt_logprobs is not None:
        record["prompt_logprobs"] = [None if p is None else logprobs_of(p) for p in output.prompt_logprobs]
    return record


def logprobs_of(position: PositionLogprobs) -> dict[str, Any]:
    return {
        str(token): {"logprob": max(entry.logprob, LOWEST_LOGPROB), "rank": entry.rank, "token": entry.decoded_token}
        for token, entry in position.items()
    }


def text_lines(items: list[Item], results: list[RequestOutput | None]) -> Iterator[str]:
    """The texts; each under its prompt when there are several."""
    for item, output in zip(items, results, strict=True):
        if item.error is not None or output is None:
            continue
        total = len(output.outputs)
        for completion in output.outputs:
            if len(items) == total == 1:
                yield completion.text
            else:
                yield f"=== {item.title}" + (f" ({completion.index + 1} of {total})" if total > 1 else "")
                yield completion.text.removeprefix(" ")


def summary(results: list[RequestOutput | None], failures: int, ready: float, seconds: float) -> str:
    """How much was generated and how fast."""
    tokens = sum(len(completion.token_ids) for output in results if output for completion in output.outputs)
    failed = f", {failures} failed" if failures else ""
    speed = f"{tokens / seconds:.1f} tokens/s" if tokens else "nothing generated"
    return f"{len(results)} prompts{failed}: {tokens} tokens in {seconds:.1f} s ({speed}), ready in {ready:.1f} s"
