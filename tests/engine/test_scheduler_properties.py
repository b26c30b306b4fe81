"""Random lives of the scheduler. 10,000 of them: `pytest -n0 -m slow tests/engine/test_scheduler_properties.py`."""

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from scheduler_model import Engine, make_sequence

from jaxserve.engine.pace import StreamRules

MAX_MODEL_LEN = 32
PROMPT_FAMILIES = 3  # prompts of one family are prefixes of each other


@st.composite
def engines(draw):
    chunked = draw(st.sampled_from([True, True, False]))
    page_size = draw(st.integers(1, 5))
    return Engine(
        num_pages=-(-draw(st.integers(20, 70)) // page_size),  # tight: a sequence may need 31 tokens
        page_size=page_size,
        caching=draw(st.booleans()),
        ahead=draw(st.sampled_from([1, 1, 1, 0, 2])),
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        max_num_seqs=draw(st.sampled_from([4, 6, 3, 2, 1])),
        max_model_len=MAX_MODEL_LEN,
        enable_chunked_prefill=chunked,
        max_num_batched_tokens=draw(st.integers(1, 24)) if chunked else MAX_MODEL_LEN,
        long_prefill_token_threshold=draw(st.integers(0, 6)) if chunked else 0,
        decode_steps=draw(st.sampled_from([1, 1, 2, 3, 8])),
        rules=StreamRules(draw(st.integers(1, 8)), draw(st.sampled_from([None, 8]))),
    )


ADD = st.fixed_dictionaries(
    {
        "family": st.integers(0, PROMPT_FAMILIES - 1),
        "length": st.sampled_from([9, 13, 16, 20, 8, 3, 2, 1]),
        "max_tokens": st.sampled_from([12, 9, 5, 2, 1]),
        "index": st.integers(0, 1),
        "priority": st.integers(-1, 1),
        "stops": st.booleans(),
        "needs_host": st.sampled_from([False, False, False, True]),
        "streams": st.sampled_from([False, False, True]),
        "min_tokens": st.integers(0, 3),
        "keys": st.sampled_from([{}, {}, {}, {"salt": b"x"}, {"adapter": b"x"}]),
        "prompt_logprobs": st.sampled_from([None, None, None, None, 0]),
    }
)
# Steps come as the engine makes them ("step") or apart, so that up to three are in flight.
EVENTS = st.one_of(
    ADD,
    ADD,
    st.sampled_from(["step", "launch", "commit", "step", "reset"]),
    st.sampled_from(["step", "step", "step"]),
    st.tuples(st.sampled_from(["abort", "stop"]), st.integers(0, 30)),
)


def add(engine: Engine, family, length, max_tokens, min_tokens, needs_host, streams, **options) -> None:
    number = len(engine.sequences)
    prompt = [family, *range(2, length + 1)]
    options |= {"min_tokens": min(min_tokens, max_tokens), "name": f"r{number}", "arrival": float(number // 2)}
    seq = make_sequence(prompt, max_tokens, **options)
    seq.needs_host, seq.streams = needs_host, streams
    engine.add(seq)


def happen(engine: Engine, what) -> None:
    match what:
        case dict():
            add(engine, **what)
        case "step":
            engine.step()
        case "launch" if len(engine.in_flight) < 3:
            engine.launch()
        case "commit":
            engine.commit()
        case "reset":
            assert engine.pages.reset() == (engine.scheduler.num_running == 0)
        case ("abort", which) if engine.sequences:
            engine.end(engine.sequences[which % len(engine.sequences)])
        case ("stop", which) if engine.sequences:
            seq = engine.sequences[which % len(engine.sequences)]
            if seq.num_output:  # a stop string needs text
                engine.end(seq, "stop", "text")


def live(engine: Engine, requests, events) -> None:
    for request in requests:
        add(engine, **request)
    for each in events:
        happen(engine, each)
    engine.drain()
    note(engine)


def note(engine: Engine) -> None:
    """Count what happened, for `--hypothesis-show-statistics`."""
    event(f"preempted: {engine.scheduler.num_preemptions > 0}")
    event(f"several decodes at once: {engine.several > 0}")
    event(f"found in the cache: {engine.pages.hit_tokens > 0}")
    event(f"sequences: {len(engine.sequences) // 5 * 5} and more")
    for reason in sorted({str(seq.finish_reason) for seq in engine.sequences}):
        event(f"finished by {reason}")


LIVES = given(engines(), st.lists(ADD, min_size=2, max_size=6), st.lists(EVENTS, min_size=5, max_size=50))
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


@settings(max_examples=300, deadline=None, suppress_health_check=QUIET)
@LIVES
def test_any_life_ends_well(engine, requests, events):
    live(engine, requests, events)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, suppress_health_check=QUIET)
@LIVES
def test_ten_thousand_lives_end_well(engine, requests, events):
    live(engine, requests, events)


@settings(max_examples=100, deadline=None, suppress_health_check=QUIET)
@given(engines(), st.lists(ADD, min_size=3, max_size=14))
def test_a_crowd_under_pressure_is_served_whole(engine, requests):
    for request in requests:
        add(engine, **request)
    engine.drain()
    note(engine)
    page_size, num_pages = engine.pages.page_size, engine.pages.num_pages
    for seq in engine.sequences:
        if -(-(len(seq.tokens) - 1) // page_size) <= num_pages:
            assert seq.finish_reason in {"stop", "length"}
