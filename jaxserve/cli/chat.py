"""`jaxserve chat`: a conversation in the terminal, with replies shown as they are generated."""

import argparse
import contextlib
import importlib
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Any

from jaxserve.cli import flags
from jaxserve.sampling_params import RequestOutputKind, SamplingParams
from jaxserve.types import TokensPrompt

if TYPE_CHECKING:
    from jaxserve.engine.engine import LLMEngine

DESCRIPTION = """Talk to a model. Replies appear as they are generated.

Ctrl-C stops a reply; /reset forgets the conversation, /exit or Ctrl-D leaves."""

HINT = "/reset forgets the conversation, /exit leaves, Ctrl-C stops a reply."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="system message at the start of the conversation")
    flags.add_sampling_flags(parser, skip=("n", "detokenize", "logprobs", "prompt_logprobs", "logprob_token_ids"))
    flags.add_engine_flags(parser, skip=("seed", "skip_tokenizer_init"))


def run(args: argparse.Namespace) -> int:
    """Talk until the user leaves."""
    given = {"max_tokens": None} | flags.given(args, flags.SAMPLING)
    flags.sampling_params(None, given)  # a bad value is said before the model loads
    quiet = {} if sys.stderr.isatty() else {"use_tqdm_on_load": False}
    engine_args = flags.engine_args(args, seed=given.get("seed") or 0, max_num_seqs=1, **quiet)
    from jaxserve.engine.engine import LLMEngine

    engine = LLMEngine.from_engine_args(engine_args)
    try:
        base = SamplingParams(**engine.config.default_sampling)
        params = replace(flags.sampling_params(base, given), output_kind=RequestOutputKind.DELTA)
        talk(Conversation(engine, params, args.system), interactive=sys.stdin.isatty())
    finally:
        engine.close()
    return 0


class Conversation:
    """The messages so far and the engine that answers them."""

    def __init__(self, engine: "LLMEngine", params: SamplingParams, system: str | None = None):
        self._engine = engine
        self._params = params
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._count = 0
        self.messages: list[dict[str, Any]] = list(self._system)

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = list(self._system)

    def reply(self, text: str, stopped: Callable[[], bool]) -> Iterator[str]:
        """Answer a message piece by piece; what was said until `stopped()` becomes part of the conversation.

        Raises:
            ValueError: the conversation no longer fits the context; it is left as it was.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        request_id = f"chat-{self._count}"
        self._count += 1
        self._engine.add_request(request_id, self._prompt(messages), self._params)
        pieces: list[str] = []
        try:
            for piece in self._pieces(request_id, stopped):
                pieces.append(piece)
                yield piece
        finally:
            self._engine.abort_request(request_id)
        self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]

    def _pieces(self, request_id: str, stopped: Callable[[], bool]) -> Iterator[str]:
        while not stopped():
            for output in self._engine.step():
                if output.request_id != request_id:  # a stopped reply's last step
                    continue
                if output.error is not None:
                    raise ValueError(output.error)
                yield "".join(completion.text for completion in output.outputs)
                if output.finished:
                    return

    def _prompt(self, messages: list[dict[str, Any]]) -> TokensPrompt:
        tokenizer = self._engine.tokenizer
        if tokenizer is None:
            raise ValueError("chat needs a tokenizer.")
        text = tokenizer.render_chat(messages)
        return TokensPrompt(prompt=text, prompt_token_ids=tokenizer.encode(text, add_special_tokens=False))


def talk(conversation: Conversation, interactive: bool) -> None:
    """Read messages and show replies until the end of the input."""
    if interactive:
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # line editing and history in input()
        print(HINT, file=sys.stderr)
    while True:
        try:
            text = input("> " if interactive else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print(f"\n{HINT}", file=sys.stderr)
            continue
        if text == "/exit":
            return
        if text == "/reset":
            conversation.reset()
        elif text.startswith("/"):
            print(HINT, file=sys.stderr)
        elif text:
            show_reply(conversation, text)


def show_reply(conversation: Conversation, text: str) -> None:
    """Print one reply while it comes; Ctrl-C ends it after the step that runs."""
    with interrupts() as stopped:
        try:
            for piece in conversation.reply(text, stopped):
                print(piece, end="", flush=True)
        except ValueError as error:
            print(f"error: {error} (/reset starts anew)", file=sys.stderr)
            return
        print(" [stopped]" if stopped() else "", flush=True)


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Within, Ctrl-C only makes the yielded function true: a step of the engine is never cut in the middle."""
    pressed: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        pressed.append(number)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, previous)
