"""Checkpoints are pushed while training continues, which no push delays or ends."""

import shutil
import threading

import pytest
from safetensors.torch import load_file

from ddpm_hf.sharing.background_push import BackgroundPusher
from ddpm_hf.sharing.hub import HubTarget, Retry
from ddpm_hf.sharing.push import resume_command, try_push
from support.hub_server import TOKEN


def test_training_continues_while_checkpoints_are_pushed_and_the_latest_wins(hub, make_model, tmp_path):
    hub.add_repo("me/model")
    hold, entered = threading.Event(), threading.Event()
    (tmp_path / "run/.ddpm-hf-push-of-a-killed-run").mkdir(parents=True)
    hub.before_commit = lambda: (entered.set(), hold.wait(30))
    with BackgroundPusher(HubTarget("me/model", TOKEN), Retry(pytest.fail, (0.0,))) as pusher:
        for step in (1, 2, 3):
            checkpoint = make_model(f"run/checkpoint-{step}", bias=float(step))
            pusher.submit(checkpoint)  # returns while the first push is still under way
            if step == 1:
                assert entered.wait(30)
            shutil.rmtree(checkpoint)  # a limit on checkpoints removes it
        hold.set()
    repo = hub.repos["me/model"]
    assert [repo.titles[c] for c in repo.commits] == [
        "initial commit", "Upload DDPM, checkpoint-1", "Upload DDPM, checkpoint-3",
    ]  # fmt: skip
    (tmp_path / "up").write_bytes(repo.files()["unet/diffusion_pytorch_model.safetensors"])
    assert load_file(tmp_path / "up")["conv_out.bias"].tolist() == [3.0] * 3
    assert list((tmp_path / "run").iterdir()) == []  # no copies are left


def test_a_failed_push_does_not_end_training_and_names_the_command_to_try_again(hub, make_model, tmp_path):
    hub.add_repo("me/model")
    hub.fail(r"/commit/", 503, times=99)
    logged = []
    target = HubTarget("me/model", TOKEN, private=True, revision="try out".replace(" ", "-"))
    with BackgroundPusher(target, Retry(logged.append, (0.0,))) as pusher:
        pusher.submit(make_model("run/checkpoint-1"))
    command = f"ddpm-hf push {tmp_path / 'run'} me/model --private --revision try-out"
    assert command in logged[-1]
    assert resume_command(tmp_path / "run", target) == command
    assert not try_push(make_model(), HubTarget("stranger/x", TOKEN), log=logged.append)
    assert "ddpm-hf push" in logged[-1]
    assert TOKEN not in "".join(logged)


def test_an_interrupted_run_does_not_wait_for_an_unreachable_hub(hub, make_model):
    hub.add_repo("me/model")
    hub.fail(r"/commit/", 503, times=99)
    tried = threading.Event()
    with (  # noqa: PT012
        pytest.raises(KeyboardInterrupt),
        BackgroundPusher(HubTarget("me/model", TOKEN), Retry(lambda text: tried.set(), (3600.0,))) as pusher,
    ):
        pusher.submit(make_model("run/checkpoint-1"))
        assert tried.wait(30)
        raise KeyboardInterrupt
