"""When things happen: all counts are in optimizer updates."""

import math

import pytest
import torch
from diffusers.optimization import get_scheduler

from ddpm_hf.config.training import TrainConfig
from ddpm_hf.training.plan import Plan, settle_checkpoint_limit


def plan(num_images=100, num_processes=1, **options):
    return Plan(TrainConfig(dataset_name="digits", **options), num_images, num_processes)


@pytest.mark.parametrize(
    "name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
)
def test_the_learning_rate_follows_diffusers_per_update_whatever_the_processes_and_accumulation(name):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    reference = get_scheduler(name, optimizer, num_warmup_steps=10, num_training_steps=110)
    options = {"learning_rate": 1e-3, "lr_scheduler": name, "lr_warmup_steps": 10, "max_train_steps": 110}
    plans = [
        plan(train_batch_size=4, **options),
        plan(train_batch_size=1, gradient_accumulation_steps=2, num_processes=2, **options),
    ]
    for step in range(110):
        expected = reference.get_last_lr()[0]
        assert [p.learning_rate(step) for p in plans] == [pytest.approx(expected)] * 2
        optimizer.step()
        reference.step()
    rates = [plans[0].learning_rate(step) for step in range(110)]
    assert max(rates) == pytest.approx(1e-3)  # the peak is reached


def test_epochs_are_counted_in_images():
    p = plan(num_images=100, num_processes=2, train_batch_size=4, gradient_accumulation_steps=3, num_epochs=10)
    assert p.global_batch == 24
    assert p.max_steps == math.ceil(10 * 100 / 24)
    assert plan(max_train_steps=7).max_steps == 7


def test_pipelines_and_previews_come_at_the_ends_of_epochs():
    p = plan(num_images=96, train_batch_size=24, num_epochs=25, save_model_epochs=10, save_images_epochs=10)
    ends = [done / 4 for done in range(1, p.max_steps + 1) if p.export_due(done)]
    assert ends == [1, 11, 21, 25]
    assert [done / 4 for done in range(1, p.max_steps + 1) if p.preview_due(done)] == [1, 11, 21]
    # Where no update ends with an epoch, they come with the update that the epoch ends in: each once.
    p = plan(num_images=100, train_batch_size=24, num_epochs=25, save_model_epochs=1)
    assert sum(p.export_due(done) for done in range(1, p.max_steps + 1)) == 25


def test_the_remaining_epochs_are_counted_in_images_whatever_the_batch_was():
    """25 updates of 4 images of 10 epochs of 100 are done; the rest has 8 per update."""
    p = Plan(TrainConfig(dataset_name="digits", num_epochs=10, train_batch_size=8), 100, 1, 25, 100)
    assert p.max_steps == 25 + math.ceil(900 / 8)
    p = Plan(
        TrainConfig(dataset_name="digits", num_epochs=10, train_batch_size=8, save_model_epochs=1), 100, 1, 25, 100
    )
    assert [n for n in range(26, 52) if p.export_due(n)] == [25 + 13, 25 + 25]  # 104 and 200 images later


def test_previews_in_steps_come_early_then_regularly_or_never():
    p = plan(max_train_steps=100, save_images_steps=30)
    assert [done for done in range(1, 101) if p.preview_due(done)] == [3, 30, 60, 90]
    assert not any(plan(max_train_steps=100, save_images_steps=0).preview_due(done) for done in range(1, 101))


def test_checkpoints_come_regularly_and_at_the_end():
    p = plan(max_train_steps=25, checkpointing_steps=10)
    assert [done for done in range(1, 26) if p.checkpoint_due(done)] == [10, 20, 25]


@pytest.mark.parametrize(
    ("limit", "existing", "options", "at_a_time"),
    [
        (0, 0, {}, 5),  # after 10, 13 (an epoch), 20, 25 (another) and 30 updates
        (0, 3, {}, 8),
        (2, 0, {}, 3),  # the newest is written before the oldest is deleted
        (2, 2, {}, 3),
        (2, 7, {}, 8),
        (9, 0, {}, 5),
        (2, 0, {"eval_steps": 7}, 4),  # the best one is spared
        (0, 0, {"eval_steps": 7}, 9),
    ],
)
def test_the_room_for_checkpoints_is_for_those_that_are_there_at_a_time(limit, existing, options, at_a_time):
    p = plan(
        max_train_steps=30, checkpointing_steps=10, save_model_epochs=1, train_batch_size=8,
        checkpoints_total_limit=limit, **options,
    )  # fmt: skip
    assert p.checkpoints_at_a_time(existing) == at_a_time
    assert p.disk_needed(existing, 1000) == ((at_a_time - existing) * 16 + 4) * 1000
    if (limit, existing, options) == (0, 0, {}):
        assert p.describe_checkpoints(0, 2**16, 2**30) == (
            "Checkpoints: up to 5 of 1.0 MiB at a time, 5.0 MiB together; 1.0 GiB are free. "
            "Kept: all (--checkpoints_total_limit)."
        )


def test_a_resumed_run_keeps_as_many_checkpoints_as_before_unless_told_otherwise():
    new, given = (TrainConfig(dataset_name="digits", checkpoints_total_limit=limit) for limit in (None, 5))
    for before, kept in ((None, 0), (0, 0), (3, 3)):  # None is from when all were kept by default
        progress = {"config": {"checkpoints_total_limit": before}}
        assert settle_checkpoint_limit(new, progress).checkpoints_total_limit == kept
        assert settle_checkpoint_limit(given, progress).checkpoints_total_limit == 5
    assert settle_checkpoint_limit(new, {}).checkpoints_total_limit == 2
    assert settle_checkpoint_limit(given, {}).checkpoints_total_limit == 5


def test_impossible_plans_are_refused():
    with pytest.raises(ValueError, match=r"train_batch_size.*101.*only 100 images"):
        plan(train_batch_size=101)
    with pytest.raises(ValueError, match=r"120 images per update.*only 100"):
        plan(train_batch_size=30, gradient_accumulation_steps=2, num_processes=2)
    with pytest.raises(ValueError, match="--max_train_steps"):
        plan(num_images=None)


def test_validation_comes_regularly_and_at_the_end_and_reports_its_cost():
    p = plan(num_images=1000, max_train_steps=25, eval_steps=10, eval_images=32, train_batch_size=24)
    assert [done for done in range(1, 26) if p.validation_due(done)] == [10, 20, 25]
    # 18 network calls for each of 32 images, where ten updates take 3 × 24 × 10.
    assert p.describe_validation() == (
        "every 10 updates on 32 images held out of the training set, for 80.0% more network calls"
    )
    assert not any(plan(max_train_steps=25).validation_due(done) for done in range(1, 26))
    assert plan().describe_validation() == "none (--eval_steps)"


def test_a_calibration_takes_a_twentieth_of_the_training_that_was_done():
    """3 network calls per image of an update, T per image of the calibration."""
    p = plan(num_images=1000, max_train_steps=100_000, train_batch_size=10, ddpm_num_steps=100)
    assert p.calibration_images(4000) == 3 * 4000 * 10 // (20 * 100)
    assert p.calibration_images(100) == 0  # too few to learn anything from
