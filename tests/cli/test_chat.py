"""`jaxserve chat` with a tiny model: streaming, stopping, forgetting."""

import io
import os
import signal
from collections.abc import Iterator

import pytest

from jaxserve.cli import main, parse
from jaxserve.cli.chat import Conversation, interrupts, show_reply
from jaxserve.cli.flags import engine_args
from jaxserve.engine.engine import LLMEngine
from jaxserve.sampling_params import RequestOutputKind, SamplingParams

DELTA = RequestOutputKind.DELTA


@pytest.fixture
def engine(small: list[str]) -> Iterator[LLMEngine]:
    made = LLMEngine.from_engine_args(engine_args(parse(["chat", *small]), max_num_seqs=1))
    yield made
    made.close()


def test_replies_come_in_pieces_and_can_be_stopped(engine: LLMEngine, capsys: pytest.CaptureFixture[str]):
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, output_kind=DELTA)
    conversation = Conversation(engine, params, system="Be brief.")
    pieces = list(conversation.reply("Hello", lambda: False))
    assert len(pieces) > 6
    assert conversation.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "".join(pieces)},
    ]
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]

    part: list[str] = []
    for piece in conversation.reply("Hello", lambda: len(part) == 3):
        part.append(piece)
    assert part == pieces[:3]
    assert engine.get_num_unfinished_requests() == 0
    assert conversation.messages[-1] == {"role": "assistant", "content": "".join(part)}

    before = list(conversation.messages)
    show_reply(conversation, "much too long " * 200)
    assert "/reset" in capsys.readouterr().err
    assert conversation.messages == before
    conversation.reset()
    assert list(conversation.reply("Hello", lambda: False)) == pieces


def test_interrupt_is_noted_not_raised():
    before = signal.getsignal(signal.SIGINT)
    with interrupts() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped()
    assert signal.getsignal(signal.SIGINT) is before


def test_the_command_reads_until_exit(
    small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    typed = "Hello\n\n/help\n/reset\nHello\n/exit\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    assert main(["chat", "--temperature", "0", "--max-tokens", "4", "--ignore-eos", *small]) == 0
    shown = capsys.readouterr()
    replies = shown.out.splitlines()
    assert len(replies) % 2 == 0
    assert replies[: len(replies) // 2] == replies[len(replies) // 2 :]  # the second was asked after /reset
    assert shown.out.strip()
    assert shown.err.count("/reset forgets") == 1
