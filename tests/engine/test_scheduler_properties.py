"""Random lives of the scheduler. 10,000 of them: `pytest -n0 -m slow tests/engine/test_scheduler_properties.py`."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduler_model import Engine, make_sequence

MAX_MODEL_LEN = 32
PROMPT_FAMILIES = 3  # prompts of one family are prefixes of each other


@st.composite
def engines(draw):
    chunked = draw(st.booleans())
    return Engine(
        num_pages=draw(st.integers(2, 20)),
        page_size=draw(st.integers(1, 5)),
        caching=draw(st.booleans()),
        ahead=draw(st.sampled_from([1, 1, 1, 0, 2])),
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        max_num_seqs=draw(st.integers(1, 5)),
        max_model_len=MAX_MODEL_LEN,
        enable_chunked_prefill=chunked,
        max_num_batched_tokens=draw(st.integers(1, 24)) if chunked else MAX_MODEL_LEN,
        long_prefill_token_threshold=draw(st.integers(0, 6)) if chunked else 0,
    )


ADD = st.fixed_dictionaries(
    {
        "family": st.integers(0, PROMPT_FAMILIES - 1),
        "length": st.integers(1, 20),
        "max_tokens": st.integers(1, 12),
        "index": st.integers(0, 1),
        "priority": st.integers(-1, 1),
        "stops": st.booleans(),
        "min_tokens": st.integers(0, 3),
        "keys": st.sampled_from([{}, {}, {"salt": b"x"}, {"adapter": b"x"}]),
        "prompt_logprobs": st.sampled_from([None, None, None, 0]),
    }
)
# Steps come as the engine makes them ("step") or apart, so that up to three are in flight.
EVENTS = st.one_of(
    ADD,
    st.sampled_from(["step", "step", "launch", "commit", "reset"]),
    st.tuples(st.sampled_from(["abort", "stop"]), st.integers(0, 30)),
)


def add(engine: Engine, family, length, max_tokens, min_tokens, **options) -> None:
    number = len(engine.sequences)
    prompt = [family, *range(2, length + 1)]
    options |= {"min_tokens": min(min_tokens, max_tokens), "name": f"r{number}", "arrival": float(number // 2)}
    engine.add(make_sequence(prompt, max_tokens, **options))


def happen(engine: Engine, event) -> None:
    match event:
        case dict():
            add(engine, **event)
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


def live(engine: Engine, events) -> None:
    for event in events:
        happen(engine, event)
    engine.drain()


LIVES = given(engines(), st.lists(EVENTS, max_size=40))
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


@settings(max_examples=300, deadline=None, suppress_health_check=QUIET)
@LIVES
def test_any_life_ends_well(engine, events):
    live(engine, events)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, suppress_health_check=QUIET)
@LIVES
def test_ten_thousand_lives_end_well(engine, events):
    live(engine, events)


@settings(max_examples=100, deadline=None, suppress_health_check=QUIET)
@given(engines(), st.lists(ADD, min_size=3, max_size=12))
def test_a_crowd_under_pressure_is_served_whole(engine, requests):
    for request in requests:
        add(engine, **request)
    engine.drain()
    page_size, num_pages = engine.pages.page_size, engine.pages.num_pages
    for seq in engine.sequences:
        if -(-(len(seq.tokens) - 1) // page_size) <= num_pages:
            assert seq.finish_reason in {"stop", "length"}
