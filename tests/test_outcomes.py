"""Five things that a user must be able to rely on. Each goes all the way: commands, in processes of their own."""

import itertools
import json
import os
import pickle
import shutil
import signal
import sys
import time

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from support.hub_server import TOKEN, environment, serve_hub
from support.runs import SUPPORT, TINY, run, start, train_command

pytestmark = pytest.mark.slow
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
DIGITS = ["--dataset", "digits"]
MODEL_FILES = {
    ".gitattributes", "README.md", "model_index.json", "pipeline.py", "scheduling_ddpm_custom.py", "ddpm_process.py",
    "ddpm_few_steps.py", "ddpm_fast_network.py", "ddpm_labels.py", "ddpm_repository.py",
    "scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    "samples.png", "loss.png",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("outcomes") / "digits"
    done = run(train_command(folder), env=OFFLINE)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def hub():
    with serve_hub() as server:
        server.add_token(TOKEN, "me")
        yield server


def session(*commands, env=OFFLINE, ends=0):
    """Commands in one process; their outputs."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    done = run([sys.executable, str(SUPPORT / "session.py"), words], env=env)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    for status, _, stderr in results:
        assert "Traceback" not in stderr
        assert ends is None or status == ends, stderr
    return results


def test_my_words_in_a_card_survive(finished, hub, tmp_path):
    """Training on, measuring, pushing, and what others have written on the Hub meanwhile."""
    folder, card = tmp_path / "digits", tmp_path / "digits" / "README.md"
    shutil.copytree(finished, folder)
    text = card.read_text("utf-8").replace("# DDPM\n", "# Rainy digits\n").replace("---\n", "---\nlicense: mit\n", 1)
    card.write_text(f"{text}\n## My words\n\nTrained on a rainy evening.\n", "utf-8")
    words = ("# Rainy digits", "license: mit", "Trained on a rainy evening.")
    push = ["push", folder, "me/digits"]
    session(
        ["train", *TINY, "--output_dir", folder, "--max_train_steps", "16", "--resume_from_checkpoint", "latest"],
        ["evaluate", folder, *DIGITS, "--metrics", "bpd", "--num_likelihood_images", "4", "--likelihood_steps", "2"],
        push,
        env=environment(hub, tmp_path),
    )
    repo = hub.repos["me/digits"]
    for place in (card.read_text("utf-8"), repo.files()["README.md"].decode()):
        assert [word for word in words if word not in place] == []
        assert "| Optimizer updates | 16 |" in place
        assert "bits/dim" in place
    on_the_hub = repo.files()["README.md"].decode().replace("Trained on a rainy evening.", "It stopped raining.")
    repo.commit("main", "edited on the Hub", {**repo.files(), "README.md": on_the_hub.encode()})
    session(push, env=environment(hub, tmp_path))
    assert "It stopped raining." in repo.files()["README.md"].decode()


def test_nothing_of_mine_is_published_unasked(finished, hub, tmp_path):
    """Without a push nothing is sent at all; with one, the model and its card, whatever lies in the folder."""
    folder, env = tmp_path / "digits", environment(hub, tmp_path)
    shutil.copytree(finished, folder)
    secret = tmp_path / "secret"
    secret.write_text("my other secret")
    for name in (".env", "notes.txt", "logs/diary.md", "unet/mine.safetensors"):
        (folder / name).write_text("my secret")
    (folder / "unet" / "link.txt").symlink_to(secret)
    quiet = ["--num_images", "2", "--steps", "2", "--output_dir", tmp_path / "samples"]
    resume = ["train", *TINY, "--output_dir", folder, "--resume_from_checkpoint", "latest"]
    session(["sample", folder, *quiet], resume, ["push", folder, "me/digits", "--dry_run"], env=env)
    assert hub.repos == {}
    assert hub.count("POST|PUT") == 0
    session(["push", folder, "me/digits"], env=env)
    files = hub.repos["me/digits"].files()
    assert set(files) == MODEL_FILES
    real = (folder / "real.png").read_bytes()
    for content in files.values():
        for private in (b"secret", TOKEN.encode(), str(tmp_path).encode(), real):
            assert private not in content


def test_a_seed_is_an_image(finished, hub, tmp_path):
    """Whatever the batch, the number of images, the file format, the place of the model or the day."""
    hub.add_folder("me/digits", finished)
    options = ["--steps", "5", "--seed", "7"]

    def sample(model, out, *more):
        return ["sample", model, *options, *more, "--output_dir", tmp_path / out]

    session(
        sample(finished, "six", "--num_images", "6", "--batch_size", "2"),
        sample(finished, "first", "--num_images", "4", "--batch_size", "2"),
        sample(finished, "first", "--num_images", "6", "--batch_size", "2"),
        sample("me/digits", "hub", "--num_images", "6", "--batch_size", "2"),
        sample(finished, "alone", "--num_images", "6", "--batch_size", "1"),
        sample(finished, "later", "--seed", "9", "--num_images", "4", "--batch_size", "2"),
        sample(finished, "packed", "--num_images", "6", "--batch_size", "2", "--format", "npz"),
        env=environment(hub, tmp_path),
    )
    six = [(tmp_path / "six" / f"{i:05d}.png").read_bytes() for i in range(6)]
    assert len(set(six)) == 6
    for place, images in (("first", six), ("hub", six), ("later", six[2:])):
        assert [(tmp_path / place / f"{i:05d}.png").read_bytes() for i in range(len(images))] == images, place
    pixels = np.stack([np.asarray(Image.open(tmp_path / "six" / f"{i:05d}.png")) for i in range(6)])
    np.testing.assert_array_equal(np.load(tmp_path / "packed" / "samples.npz")["arr_0"][..., 0], pixels)
    alone = np.stack([np.asarray(Image.open(tmp_path / "alone" / f"{i:05d}.png")) for i in range(6)])
    assert np.abs(alone.astype(int) - pixels).max() <= 1  # another batch size rounds otherwise


def test_a_run_killed_anywhere_ends_as_if_not(finished, tmp_path):
    """By SIGKILL as soon as it logs, and after two checkpoints. `test_resume` has many moments more."""
    folder = tmp_path / "digits"
    command = train_command(folder, "--resume_from_checkpoint", "latest")
    for moment in (folder / "logs" / "train.jsonl", folder / "checkpoint-4", folder / "checkpoint-8"):
        process = start(command, env=OFFLINE)
        while not moment.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = run(command, env=OFFLINE)
    assert done.returncode == 0, done.stderr
    for name in ("unet/diffusion_pytorch_model.safetensors", "samples.png", "logs/train.jsonl"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name
    weights = [load_file(f / "checkpoint-12/training_state/optimizer.safetensors") for f in (folder, finished)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[1])
    assert {p.name for p in folder.iterdir()} == {p.name for p in finished.iterdir()}


class Bomb:
    """A pickle that runs code."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_model_from_a_stranger_can_do_no_harm(finished, hub, tmp_path):
    """Code where code stands, a class of its own, a pickle, a link to my secret, a card without end; every command."""
    ran, secret = tmp_path / "ran", tmp_path / "secret"
    secret.write_text("my secret")
    trap = f"open({str(ran)!r}, 'w')\n"
    models = {name: tmp_path / "strangers" / name for name in ("code", "index", "pickle", "link", "card")}
    for model in models.values():
        shutil.copytree(finished, model)
    for name in ("pipeline.py", "ddpm_process.py", "evil.py", "unet/evil.py", "diffusers.py", "torch.py"):
        (models["code"] / name).write_text(trap)
    index = models["index"] / "model_index.json"
    (models["index"] / "evil.py").write_text(f"{trap}class Evil: pass\n")
    index.write_text(json.dumps({**json.loads(index.read_text("utf-8")), "unet": ["evil", "Evil"]}), "utf-8")
    (models["pickle"] / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    bomb = pickle.dumps(Bomb(f"touch {ran}"))
    for file in (models["pickle"] / "unet" / "diffusion_pytorch_model.bin", tmp_path / "strangers" / "weights.pt"):
        file.write_bytes(bomb)
    for name in ("samples.png", "metrics.json"):
        (models["link"] / name).unlink(missing_ok=True)
        (models["link"] / name).symlink_to(secret)
    aliases = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghi"))
    (models["card"] / "README.md").write_text(f"---\na: &a [x, x, x]\n{aliases}---\n# Bomb\n")
    huge = tmp_path / "strangers" / "huge"
    shutil.copytree(models["index"], huge)
    config = json.loads((huge / "unet" / "config.json").read_text("utf-8"))
    (huge / "unet" / "config.json").write_text(json.dumps({**config, "layers_per_block": 10**9}), "utf-8")
    for name in ("index", "pickle", "huge"):
        hub.add_folder(f"stranger/{name}", tmp_path / "strangers" / name)
    before = {p: p.read_bytes() for p in finished.parent.rglob("*") if p.is_file()}
    few = ["--num_likelihood_images", "2", "--likelihood_steps", "2"]
    out = tmp_path / "out"

    def commands(name):
        model = models[name]
        return (
            ["sample", model, "--num_images", "2", "--steps", "2", "--output_dir", out / f"sampled-{name}"],
            ["evaluate", model, *DIGITS, "--metrics", "bpd", *few],
            ["convert", model, out / f"converted-{name}"],
            ["push", model, f"me/{name}"],
        )

    env = environment(hub, tmp_path)
    results = session(
        *(command for name in models for command in commands(name)),
        ["convert", tmp_path / "strangers" / "weights.pt", out / "converted", "--resolution", "16"],
        *(["sample", f"stranger/{name}", "--output_dir", out / f"hub-{name}"] for name in ("index", "pickle", "huge")),
        env=env, ends=None,
    )  # fmt: skip
    statuses = [status for status, _, _ in results]
    assert set(statuses) <= {0, 1}
    assert all(stderr.splitlines()[-1].startswith("error: ") for status, _, stderr in results if status)
    assert statuses[:4] == [0, 0, 0, 0]  # of the model whose code is never run
    assert statuses[4:12] == [1] * 8  # no class of its own, and no pickle
    assert statuses[-4:] == [1] * 4
    assert "layers_per_block = 1000000000, but must have" in results[-1][2]
    assert not ran.exists()
    assert "me/code" in hub.repos  # with our code, not with the stranger's
    assert not any(found in body for body in hub.received for found in (b"my secret", trap.encode()))
    assert secret.read_text() == "my secret"
    assert {p: p.read_bytes() for p in before} == before
    assert {p.name for p in tmp_path.iterdir()} <= {"secret", "strangers", "out", "home"}
