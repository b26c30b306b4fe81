import subprocess
import sys

import numpy as np
import pytest
from scheduler_model import EOS, Engine, expected, make_sequence, next_token

from jaxserve.engine.pages import Pages
from jaxserve.engine.scheduler import Scheduler
from jaxserve.types import Status


def plan(work):
    """A step as {name: (start, count)}."""
    names = [seq.request.request_id for seq in work.sequences]
    return dict(zip(names, zip(work.starts.tolist(), work.num_tokens.tolist(), strict=True), strict=True))


def prompt_ending_at(num_output, length=5, **options):
    """A sequence whose end-of-sequence token is exactly the `num_output`th generated one."""
    for salt in range(2, 100_000):
        seq = make_sequence([salt] * length, max_tokens=num_output + 4, **options)
        tokens, _, _ = expected(seq)
        if len(tokens) == length + num_output and tokens[-1] == EOS:
            return seq
    raise AssertionError("no such prompt")


def test_a_prompt_is_chunked_by_the_budget_and_mixes_with_decodes():
    engine = Engine(max_num_batched_tokens=8)
    engine.add(make_sequence(range(3), name="a", stops=False))
    engine.add(make_sequence(range(50, 64), name="b", stops=False))
    works = [engine.step() for _ in range(4)]
    assert [plan(work) for work in works] == [
        {"a": (0, 3), "b": (0, 5)},
        {"a": (3, 1), "b": (5, 7)},
        {"a": (4, 1), "b": (12, 2)},
        {"a": (5, 1), "b": (14, 1)},
    ]
    assert [work.samples.tolist() for work in works] == [[True, False], [True, False], [True, True], [True, True]]
    engine.drain()


def test_the_threshold_caps_a_long_prompt_so_that_others_join_its_step():
    engine = Engine(max_num_batched_tokens=16, long_prefill_token_threshold=6)
    engine.add(make_sequence(range(14), name="long"))
    engine.add(make_sequence(range(3), name="short", stops=False))
    assert plan(engine.step()) == {"long": (0, 6), "short": (0, 3)}
    assert plan(engine.step()) == {"long": (6, 6), "short": (3, 1)}
    engine.drain()


def test_without_chunked_prefill_a_prompt_runs_whole():
    engine = Engine(max_num_batched_tokens=20, max_model_len=20, enable_chunked_prefill=False)
    engine.add(make_sequence(range(12), name="a", stops=False))
    engine.add(make_sequence(range(30, 40), name="b", stops=False))
    assert plan(engine.step()) == {"a": (0, 12)}
    assert plan(engine.step()) == {"a": (12, 1), "b": (0, 10)}
    engine.drain()


def test_slots_limit_who_runs():
    engine = Engine(max_num_seqs=2)
    for name in "abc":
        engine.add(make_sequence([ord(name)], 3, name=name, stops=False))
    assert list(plan(engine.step())) == ["a", "b"]
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (2, 1)
    engine.drain()


def test_a_decode_runs_ahead_of_its_unknown_token():
    engine = Engine()
    seq = engine.add(make_sequence(range(3), 4, stops=False))
    engine.launch()
    assert (seq.num_tokens, seq.num_pending, seq.num_computed) == (3, 1, 3)
    engine.launch()
    assert (seq.num_tokens, seq.num_pending, seq.num_computed) == (3, 2, 4)
    engine.commit()
    assert (seq.num_tokens, seq.num_pending, seq.num_computed) == (4, 1, 4)
    assert seq.output_ids.tolist() == [next_token(seq, 3)]
    engine.drain()


def test_the_last_token_is_never_computed():
    engine = Engine()
    seq = engine.add(make_sequence(range(3), 2, stops=False))
    assert [engine.launch() is None for _ in range(4)] == [False, False, True, True]
    assert engine.scheduler.has_unfinished
    assert engine.commit() == engine.commit() == [seq]
    assert (seq.finish_reason, seq.num_output, seq.num_computed) == ("length", 2, 4)
    engine.check_end()


def test_the_step_in_flight_behind_an_end_is_dropped_and_its_pages_move_on():
    engine = Engine(num_pages=4, max_num_seqs=1)
    seq = engine.add(prompt_ending_at(2))
    other = engine.add(make_sequence(range(40, 53), 3, name="other"))
    for _ in range(3):
        engine.launch()
    engine.commit()
    assert engine.commit() == [seq]
    assert (seq.finish_reason, seq.stop_reason, seq.slot, seq.num_output) == ("stop", None, -1, 2)
    assert list(plan(engine.launch())) == ["other"]
    assert engine.commit() == []
    assert seq.num_output == 2
    assert other.status is Status.RUNNING
    engine.drain()


def test_stop_ids_are_reported_and_min_tokens_goes_first():
    scheduler = Scheduler(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64, pages=Pages(16, 4))
    stop = make_sequence([5], 8, name="stop")
    late = make_sequence([5], 8, name="late", min_tokens=3)
    short = make_sequence([5], 2, name="short", min_tokens=2)
    for seq in (stop, late, short):
        scheduler.add(seq)
    scheduler.commit(scheduler.schedule(), np.array([[1, 1, 9]]))
    assert (stop.finish_reason, stop.stop_reason) == ("stop", 1)
    assert not late.finished
    scheduler.commit(scheduler.schedule(), np.array([[0, 0]]))
    assert (short.finish_reason, short.stop_reason) == ("stop", None)  # an end counts before the length
    scheduler.commit(scheduler.schedule(), np.array([[0]]))
    assert (late.finish_reason, late.output_ids.tolist()) == ("stop", [1, 0, 0])


def test_fcfs_preempts_the_last_admitted_even_with_a_pending_token():
    engine = Engine(num_pages=5, page_size=4, max_num_batched_tokens=20, caching=False)
    first = engine.add(make_sequence(range(8), 9, name="first", stops=False))
    second = engine.add(make_sequence(range(30, 42), 4, name="second", stops=False))
    engine.launch()
    assert engine.pages.num_free == 0
    late = engine.add(make_sequence(range(90, 92), 2, name="late", stops=False))
    assert list(plan(engine.launch())) == ["first"]
    assert (second.status, second.num_pending, second.num_preemptions) == (Status.WAITING, 1, 1)
    assert list(plan(engine.launch())) == ["first"]  # the queue's head waits for its token, nobody overtakes it
    engine.commit()
    assert (second.num_pending, second.output_ids.tolist()) == (0, [next_token(second, 12)])
    assert late.num_computed == 0
    engine.drain()
    assert engine.scheduler.num_preemptions >= 1
    assert first.num_preemptions == 0


def test_the_last_one_stands_still_rather_than_give_up_its_pages():
    engine = Engine(num_pages=5, page_size=4, max_num_batched_tokens=64, caching=False)
    first = engine.add(make_sequence(range(9), 3, name="first", stops=False))
    second = engine.add(make_sequence(range(30, 38), 6, name="second", stops=False))
    assert list(plan(engine.launch())) == ["first", "second"]
    assert list(plan(engine.launch())) == ["first"]
    assert (second.status, second.length) == (Status.RUNNING, 9)
    engine.drain()
    assert (first.num_preemptions, second.num_preemptions) == (0, 0)


def test_a_preempted_sequence_can_end_by_its_pending_token():
    engine = Engine(num_pages=4, page_size=4, caching=False)
    engine.add(make_sequence(range(8), 9, name="first", stops=False))
    second = engine.add(prompt_ending_at(1, length=8, name="second"))
    engine.launch()
    engine.launch()
    assert second.status is Status.WAITING
    engine.commit()
    assert (second.finish_reason, engine.scheduler.num_waiting) == ("stop", 0)
    engine.drain()


def test_priority_runs_first_and_is_preempted_last():
    engine = Engine(num_pages=6, page_size=4, policy="priority", max_num_seqs=3)
    low = engine.add(make_sequence(range(8), 9, name="low", priority=5, arrival=1.0, stops=False))
    engine.step()
    high = engine.add(make_sequence(range(30, 38), 9, name="high", priority=-1, arrival=2.0, stops=False))
    assert list(plan(engine.step())) == ["low", "high"]
    engine.drain()
    assert low.num_preemptions >= 1
    assert high.num_preemptions == 0


def test_a_step_that_preempts_admits_nobody():
    engine = Engine(num_pages=6, page_size=4, policy="priority", caching=False, max_num_batched_tokens=64, ahead=0)
    engine.add(make_sequence(range(12), 3, name="first", stops=False))
    low = engine.add(make_sequence(range(30, 39), 3, name="low", priority=5, stops=False))
    engine.launch()
    engine.add(make_sequence(range(60, 65), 3, name="middle", priority=1, stops=False))
    engine.commit()
    assert list(plan(engine.launch())) == ["first"]
    assert (low.num_preemptions, engine.pages.num_free) == (1, 2)  # room for "middle", but not yet
    engine.commit()
    assert list(plan(engine.launch())) == ["first", "middle"]
    engine.drain()


def test_a_preempted_sequence_finds_its_own_pages_but_reports_its_first_admission():
    engine = Engine(num_pages=6, page_size=4, max_num_batched_tokens=64, ahead=0)
    engine.add(make_sequence(range(12), 2, name="first", stops=False))
    second = engine.add(make_sequence(range(30, 41), 2, name="second", stops=False))
    engine.step()
    assert list(plan(engine.step())) == ["first"]
    work = engine.step()
    assert plan(work)["second"] == (8, 4)
    assert (second.num_preemptions, second.num_cached) == (1, 0)
    assert (engine.pages.queried_tokens, engine.pages.hit_tokens) == (12 + 11, 0)
    engine.drain()


def test_priority_orders_the_queue_by_priority_then_arrival():
    engine = Engine(policy="priority", max_num_seqs=1)
    for name, priority, arrival in [("c", 1, 5.0), ("d", 1, 6.0), ("b", 0, 9.0), ("a", 0, 3.0)]:
        engine.add(make_sequence([9], 1, name=name, priority=priority, arrival=arrival, stops=False))
    engine.drain()
    assert [seq.request.request_id for seq in engine.ended] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("launches", [0, 1, 2, 3])
@pytest.mark.parametrize("commits", [0, 1, 2])
def test_abort_at_every_stage(launches, commits):
    engine = Engine(max_num_batched_tokens=6)
    seq = engine.add(make_sequence(range(10), 6, name="gone", stops=False))
    other = engine.add(make_sequence(range(50, 55), 6, name="other", stops=False))
    for _ in range(launches):
        engine.launch()
    for _ in range(min(commits, launches)):
        engine.commit()
    engine.end(seq)
    assert (seq.finish_reason, seq.slot, seq.pages, seq.num_pending) == ("abort", -1, [], 0)
    assert not engine.scheduler.finish(seq, "abort")
    known = seq.num_tokens
    engine.drain()
    assert (seq.num_tokens, other.finish_reason) == (known, "length")


def test_abort_while_preempted():
    engine = Engine(num_pages=4, page_size=4, caching=False)
    engine.add(make_sequence(range(8), 6, name="first", stops=False))
    second = engine.add(make_sequence(range(30, 38), 6, name="second", stops=False))
    engine.launch()
    engine.launch()
    assert second.status is Status.WAITING
    engine.end(second)
    engine.drain()
    assert second.num_output == 0


def test_a_stop_string_ends_it_from_outside():
    engine = Engine()
    seq = engine.add(make_sequence(range(5), 9, stops=False))
    while seq.num_output < 3:
        engine.step()
    engine.end(seq, "stop", "text")
    engine.drain()
    assert (seq.finish_reason, seq.stop_reason, seq.num_output) == ("stop", "text", 3)


def test_a_second_request_reuses_all_full_pages_but_the_last_token():
    engine = Engine()
    first = engine.add(make_sequence(range(8), 4, stops=False))
    engine.drain_without_reset()
    again = engine.add(make_sequence(range(8), 4, stops=False))
    assert plan(engine.step()) == {"r": (4, 4)}
    longer = engine.add(make_sequence(np.append(first.tokens[:12], 3), 4, stops=False))
    engine.step()
    assert (first.num_cached, again.num_cached, longer.num_cached) == (0, 4, 8)  # token 12 was never computed
    assert (engine.pages.queried_tokens, engine.pages.hit_tokens) == (8 + 8 + 13, 12)
    engine.drain()


def test_generated_pages_are_found_while_it_runs_and_after_its_end():
    engine = Engine()
    first = engine.add(make_sequence(range(4), 9, stops=False))
    while first.num_computed < 11:
        engine.step()
    while_running = engine.add(make_sequence(engine.truth(first, 9), 1))
    engine.drain_without_reset()
    assert (first.num_computed, while_running.num_cached) == (12, 8)
    after = engine.add(make_sequence([*engine.truth(first, 12), 3], 1))
    engine.drain()
    assert after.num_cached == 12


def test_siblings_share_a_prompt_within_one_step():
    engine = Engine(max_num_batched_tokens=32)
    for index in range(3):
        engine.add(make_sequence(range(9), 5, index=index, stops=False))
    work = engine.launch()
    assert work.num_tokens.tolist() == [9, 1, 1]
    assert engine.pages.num_used == 2 + 3
    engine.drain()


@pytest.mark.parametrize("keys", [{"salt": b"X"}, {"adapter": b"X"}])
def test_other_cache_keys_find_nothing(keys):
    engine = Engine()
    engine.add(make_sequence(range(8), 1, keys={"salt": b"Y"}))
    engine.add(make_sequence(range(8), 1, keys={"adapter": b"Y"}))
    engine.drain_without_reset()
    other = engine.add(make_sequence(range(8), 1, keys=keys))
    same = engine.add(make_sequence(range(8), 1, keys={"salt": b"Y"}))
    engine.drain()
    assert (other.num_cached, same.num_cached) == (0, 4)


@pytest.mark.parametrize("params", [{"prompt_logprobs": 0}, {"skip_reading_prefix_cache": True}])
def test_some_compute_the_whole_prompt_but_leave_it_to_others(params):
    engine = Engine()
    for _ in range(2):
        seq = engine.add(make_sequence(range(8), 1, **params))
        engine.drain_without_reset()
        assert seq.num_cached == 0
    assert engine.pages.queried_tokens == 0
    plain = engine.add(make_sequence(range(8), 1))
    engine.drain()
    assert plain.num_cached == 4


def test_reset_forgets_the_prefixes():
    engine = Engine()
    engine.add(make_sequence(range(8), 2, stops=False))
    engine.step()
    assert not engine.pages.reset()
    engine.drain()  # resets at its end
    again = engine.add(make_sequence(range(8), 2))
    engine.drain()
    assert again.num_cached == 0


def test_a_prompt_waits_until_all_of_it_fits():
    engine = Engine(num_pages=6, page_size=4)
    engine.add(make_sequence(range(12), 4, name="a", stops=False))
    engine.add(make_sequence(range(30, 46), 2, name="b", stops=False))
    engine.add(make_sequence([7], 2, name="c", stops=False))
    assert list(plan(engine.step())) == ["a"]
    assert list(plan(engine.step())) == ["a"]
    engine.drain()


def test_what_can_never_fit_ends_in_an_error_and_harms_nobody():
    engine = Engine(num_pages=3, page_size=4)
    never = engine.add(make_sequence(range(13), 2, name="never"))
    grows = engine.add(make_sequence(range(9), 9, name="grows", stops=False))
    fine = engine.add(make_sequence(range(5), 3, name="fine", stops=False))
    engine.drain()
    assert (never.finish_reason, never.num_output) == ("error", 0)
    assert (grows.finish_reason, grows.num_output) == ("error", 4)  # every token up to the pool's end was delivered
    assert fine.finish_reason == "length"


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "lifo"},
        {"max_num_seqs": 0},
        {"max_num_batched_tokens": 0},
        {"long_prefill_token_threshold": -1},
        {"enable_chunked_prefill": False},
    ],
)
def test_limits_that_cannot_work_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options)).split("_")[-1]):
        Engine(**options)


@pytest.mark.parametrize(("prompt", "max_tokens"), [([], 3), ([1, 2], 0), ([1] * 60, 5)])
def test_sequences_that_cannot_run_are_refused(prompt, max_tokens):
    seq = make_sequence(prompt, 8)
    seq.tokens = np.zeros(len(prompt) + max_tokens, np.int32)
    with pytest.raises(ValueError, match="max_model_len=64"):
        Engine().scheduler.add(seq)


def test_commit_wants_a_token_for_each_row():
    engine = Engine()
    engine.add(make_sequence([3], 2))
    with pytest.raises(ValueError, match=r"\(1, 2\), not \(steps, rows\) = \(1, 1\)"):
        engine.scheduler.commit(engine.launch(), np.zeros((1, 2), np.int32))


def test_many_aborts_leave_no_entries_behind():
    scheduler = Scheduler(max_num_seqs=1, max_num_batched_tokens=8, max_model_len=8, pages=Pages(4, 4))
    seqs = [make_sequence([2], 2) for _ in range(1000)]
    for seq in seqs:
        scheduler.add(seq)
    for seq in seqs[1:]:
        scheduler.finish(seq, "abort")
    scheduler.check_integrity()
    assert scheduler.num_waiting == 1
    assert len(scheduler.waiting._heap) < 100


def test_stats_hold_the_first_admission():
    engine = Engine()
    seq = engine.add(make_sequence(range(3), 2))
    assert seq.stats.scheduled_ts == 0
    engine.step()
    assert seq.stats.scheduled_ts > 0
    engine.drain()


def test_the_scheduler_needs_no_jax():
    code = "import sys, jaxserve.engine.scheduler; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
