"""The time of a run: a function of the times that it is given. No clock is read here."""

import pytest

from ddpm_hf.config.training import TrainConfig
from ddpm_hf.storage.checkpoint import SOUND_PROGRESS
from ddpm_hf.training.deadline import Clock, TimedPlan, make_clock

CONFIG = {"dataset_name": "digits", "resolution": 16, "channels": 1}


def simulate(clock, seconds_of_update, finishing=5.0, start=10.0):
    """Updates until the last one, whose lengths are a function of the time; (fractions, the time of the end)."""
    plan = TimedPlan(TrainConfig(**CONFIG, time_budget="100s", lr_warmup_steps=0), 1000, 1)
    elapsed, fractions, rates, step = start, [], [], 0
    while step == 0 or step < plan.max_steps:
        took = seconds_of_update(elapsed)
        clock.advance(elapsed, took, finishing)
        plan = plan.at(clock, step)
        fractions.append(clock.fraction)
        rates.append(plan.learning_rate(step))
        elapsed, step = elapsed + took, step + 1
    return fractions, rates, elapsed + finishing


@pytest.mark.parametrize(
    "seconds_of_update",
    [
        lambda t: 0.1,
        lambda t: 0.1 if t < 50 else 0.4,  # another process comes
        lambda t: 0.4 if t < 50 else 0.1,  # and one goes
        lambda t: 0.1 if t < 90 else 1.0,
    ],
    ids=["quiet", "slower", "faster", "late"],
)
def test_the_rate_is_decayed_to_its_end_and_the_budget_holds_whatever_the_load(seconds_of_update):
    fractions, rates, end = simulate(Clock(100.0, 0.0), seconds_of_update)
    assert fractions[0] == 0
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1 > fractions[-2] > 0.97
    assert rates[0] == 1e-4
    assert rates[-1] < 1e-12
    assert rates == sorted(rates, reverse=True)
    assert end == pytest.approx(100, abs=1.01)  # the last update is not cut short


def test_the_time_that_follows_the_training_may_change_and_the_fraction_stays_continuous():
    clock = Clock(100.0, 0.0)
    for elapsed in range(10, 50):
        clock.advance(float(elapsed), 1.0, 5.0)
    before = clock.fraction
    clock.advance(50.0, 1.0, 25.0)  # a preview was slower than thought
    assert before < clock.fraction < before + 0.05
    for elapsed in range(51, 75):
        clock.advance(float(elapsed), 1.0, 25.0)
    assert clock.fraction == 1


def progress(fraction, budget=100.0, elapsed=60.0, text="100s", **clock):
    clock = {"budget": budget, "elapsed": elapsed, "fraction": fraction, "first_update": 0, **clock}
    return {"step": 300, "seconds": 55.0, "clock": clock, "config": {"time_budget": text}}


@pytest.mark.parametrize(
    ("now", "before", "left", "fraction", "first_update"),
    [
        ("100s", progress(0.5), 40, 0.5, 0),  # interrupted
        ("200s", progress(0.5), 140, 0.5, 0),  # interrupted, and it may last longer
        ("100s", progress(1.0, elapsed=98.0), 2, 1.0, 0),  # interrupted after its last update
        ("+50s", progress(1.0, elapsed=98.0), 50, 0.0, 300),  # finished: a warm restart
        ("+50s", progress(0.5), 50, 0.5, 0),  # not finished: more time to decay in
        ("+50s", progress(0.7, budget=150.0, elapsed=120.0, text="+50s", first_update=200), 30, 0.7, 200),
        ("+50s", progress(1.0, budget=150.0, elapsed=149.0, text="+50s", first_update=200), 50, 0.0, 300),
        ("200s", progress(1.0, elapsed=98.0), 102, 0.0, 300),
        ("+50s", {**progress(1.0), "clock": None}, 50, 0.0, 300),  # of a run without a budget
    ],
)  # fmt: skip
def test_a_resumed_run_has_the_time_that_is_left_and_a_finished_one_begins_its_decay_anew(
    now, before, left, fraction, first_update
):
    clock = make_clock(TrainConfig(**CONFIG, time_budget=now), 1000.0, 1, before)
    assert clock.budget - (1000.0 - clock.started) == pytest.approx(left)
    assert (clock.fraction, clock.first_update) == (fraction, first_update)
    plan = TimedPlan(TrainConfig(**CONFIG, time_budget=now, lr_warmup_steps=10), 1000, 1, 300).starting(clock)
    assert (plan.max_steps == 300) == (fraction == 1)
    if first_update == 300:
        assert [plan.learning_rate(step) for step in (300, 305, 310, 350)] == [0.0, 5e-5, 1e-4, 1e-4]


def test_a_checkpoint_comes_at_a_rhythm_of_time_and_previews_are_none_of_the_last_update():
    config = TrainConfig(**CONFIG, time_budget="2h", save_images_steps=0)
    due = [TimedPlan(config, 1000, 1, before=f, fraction=f + 0.01, updates=1000).checkpoint_due(7) for f in
           (0.0, 0.075, 0.09, 0.16, 0.5)]  # fmt: skip
    assert due == [False, True, False, True, False]  # every twelfth of two hours: 0.0833, 0.1667, …
    assert TimedPlan(config, 1000, 1, fraction=1.0, updates=8).checkpoint_due(8)


@pytest.mark.parametrize(
    "wrong",
    [3, {}, {"budget": 1}, {**progress(1.0)["clock"], "fraction": 1.5}, {**progress(1.0)["clock"], "elapsed": -1}],
)
def test_a_damaged_time_in_a_checkpoint_is_found(wrong):
    assert SOUND_PROGRESS["clock"](progress(0.5)["clock"])
    assert not SOUND_PROGRESS["clock"](wrong)
