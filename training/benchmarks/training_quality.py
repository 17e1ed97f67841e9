"""Quality after the same time, beside diffusers' own `train_unconditional.py`: same images, same network, same machine.

    python training/benchmarks/training_quality.py --data digits --minutes 5 --stock_script train_unconditional.py

(The script lies in diffusers' repository under examples/unconditional_image_generation; `--stock_python` names a Python
that has torchvision, which it needs, if this one lacks it.)

1. Write the images as RGB files, 16×16, and the network's configuration, both of which the script needs.
2. Two short runs of each peer measure how many updates fit into the minutes.
3. Train at the same time, one peer on each of two cores: the script with its own defaults, ours with our recipe.
   With --same_command, a second round trains ours with the script's own command line.
4. Sample all in the same number of steps from the same seeds, the script's model with stock diffusers, and score with a
   classifier of the real images that none of them has seen.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from common.scoring import fit_classifier, labelled_digits, labelled_fashion, score
from diffusers import DDPMPipeline
from PIL import Image
from torch import Tensor

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.data.pixels import normalize

OURS = str(Path(__file__).parents[1] / "train.py")
NETWORK = {
    "_class_name": "UNet2DModel", "sample_size": 16, "in_channels": 3, "out_channels": 3,
    "block_out_channels": [16, 32, 64], "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
}  # fmt: skip
OUR_RECIPE = [
    "--prediction_type", "v_prediction", "--ddpm_beta_schedule", "squaredcos_cap_v2", "--train_batch_size", "32",
    "--learning_rate", "2e-3", "--lr_warmup_steps", "100", "--adam_beta1", "0.9", "--adam_beta2", "0.99",
    "--adam_weight_decay", "1e-4", "--ema_max_decay", "0.995",
]  # fmt: skip
QUIET = ["--ddpm_num_inference_steps", "2", "--eval_batch_size", "1", "--checkpointing_steps", "1000000"]


def write_images(pixels: Tensor, folder: Path) -> None:
    """One RGB file for each image of (N, 1, H, W)."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image[0].numpy()).convert("RGB").save(folder / f"{i:05d}.png")


class Peer:
    """A training command on a core of its own."""

    def __init__(
        self, name: str, python: str, script: str, flags: list[str], core: int, batch: int, work: Path
    ) -> None:
        self.name, self.core, self.batch, self.output_dir = name, core, batch, work / name
        common = [
            "--model_config_name_or_path",
            str(work / "network"),
            "--resolution",
            "16",
            "--center_crop",
            "--use_ema",
        ]
        self.command = [python, script, *common, *QUIET, *flags]

    def start(self, images: Path, epochs: int, output_dir: Path | None = None) -> subprocess.Popen:
        """Start training for this many epochs."""
        folder = output_dir or self.output_dir
        flags = ["--train_data_dir", str(images), "--num_epochs", str(epochs), "--output_dir", str(folder)]
        rhythm = [f for name in ("images", "model") for f in (f"--save_{name}_epochs", str(10 * epochs))]
        log = (folder.parent / f"{folder.name}.log").open("w")
        return subprocess.Popen(
            [*self.command, *flags, *rhythm, "--overwrite_output_dir"],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            preexec_fn=lambda: os.sched_setaffinity(0, {self.core}),
            stdout=log,
            stderr=log,
        )


def race(peers: list[Peer], images: Path, epochs: list[int], suffix: str = "") -> list[float]:
    """Train all peers at the same time; returns the seconds that each took."""
    started = time.monotonic()
    running = {
        i: peer.start(images, n, peer.output_dir.with_name(peer.name + suffix) if suffix else None)
        for i, (peer, n) in enumerate(zip(peers, epochs, strict=True))
    }
    seconds = [0.0] * len(peers)
    while running:
        time.sleep(0.1)
        for i in [i for i, process in running.items() if process.poll() is not None]:
            if running.pop(i).returncode:
                raise SystemExit(f"{peers[i].name} failed: see {peers[i].output_dir}{suffix}.log")
            seconds[i] = time.monotonic() - started
    return seconds


def sample(pipe: DDPMPipeline, number: int, steps: int) -> Tensor:
    """Grayscale images in [-1, 1] from seeds 0, 1, …; (N, 1, 16, 16)."""
    pipe.set_progress_bar_config(disable=True)
    batches = []
    for start in range(0, number, 128):
        seeds = [torch.Generator().manual_seed(i) for i in range(start, min(start + 128, number))]
        images = pipe(len(seeds), seeds, num_inference_steps=steps, output_type="np").images
        batches.append(torch.from_numpy(images).permute(0, 3, 1, 2).float().mean(1, keepdim=True))
    return torch.cat(batches) * 2 - 1


def main() -> None:
    """Train, sample and score; prints a table and writes `training_quality.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stock_script", required=True)
    parser.add_argument("--stock_python", default=sys.executable, help="a Python that has diffusers and torchvision")
    parser.add_argument("--data", choices=["digits", "fashion_mnist"], default="digits")
    parser.add_argument("--idx_folder", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--num_train_images", type=int, default=10_000, help="of Fashion-MNIST")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--num_images", type=int, default=1024)
    parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[50])
    parser.add_argument("--same_command", action="store_true", help="a second round: ours with the script's command")
    parser.add_argument("--output_dir", type=Path, default=Path("bench-training-quality"))
    options = parser.parse_args()

    work = options.output_dir.absolute()
    pixels, labels = labelled_digits() if options.data == "digits" else labelled_fashion(options.idx_folder)
    train_set = pixels[: options.num_train_images]
    write_images(train_set, work / "images")
    write_images(train_set[: 40 * 32], work / "few")
    (work / "network").mkdir(exist_ok=True)
    (work / "network" / "config.json").write_text(json.dumps(NETWORK))
    stock = Peer("stock", options.stock_python, options.stock_script, [], 0, 16, work)
    ours = Peer("ours", sys.executable, OURS, OUR_RECIPE, 1, 32, work)
    drop_in = Peer("ours-same-command", sys.executable, OURS, [], 1, 16, work)

    results = {}
    for peers in ([stock, ours], [drop_in]) if options.same_command else ([stock, ours],):
        few = min(len(train_set), 40 * 32)
        one, three = (race(peers, work / "few", [n] * len(peers), f"-trial-{n}") for n in (1, 3))
        per_image = [(b - a) / (2 * few) for a, b in zip(one, three, strict=True)]
        overhead = [a - few * p for a, p in zip(one, per_image, strict=True)]
        epochs = [
            max(1, round((60 * options.minutes - o) / (len(train_set) * p)))
            for o, p in zip(overhead, per_image, strict=True)
        ]
        for peer, n, seconds in zip(peers, epochs, race(peers, work / "images", epochs), strict=True):
            results[peer.name] = {"seconds": round(seconds), "images_seen": n * len(train_set)}
            print(f"{peer.name}: {n} epochs in {seconds:.0f} s", flush=True)

    real = normalize(pixels)
    classifier, accuracy = fit_classifier(real, labels)
    print(f"classifier: {accuracy:.1%} of held-out images")
    for name, result in results.items():
        loader = DDPMPipeline if name == "stock" else DDPMPipelineCustom
        for steps in options.num_inference_steps:
            samples = sample(loader.from_pretrained(work / name), options.num_images, steps)
            result[f"K = {steps}"] = score(classifier, samples, real)
        print(name, json.dumps(result), flush=True)
    (work / "training_quality.json").write_text(json.dumps(results, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
