"""Wall clock to the quality of stock's 1000 steps: stock as it comes, against few second-order steps, made fast.

    python training/benchmarks/time_to_quality.py --model ddpm-digits --output_dir bench-quality

`--fashion_mnist FOLDER-OF-IDX-FILES` where the model was trained on that. Both sample the same number of images from
the same seeds, batch by batch in turns. What `enable_fast_sampling` takes is part of our time. The Fréchet distance is
in the features of a small CNN that reads the classes of the real images.
"""

import argparse
import time
from pathlib import Path

import torch
from common.scoring import fit_classifier, labelled_digits, labelled_fashion, score
from common.timing import best_device, markdown_table, write_results
from diffusers import DDPMPipeline, DDPMScheduler
from torch import Tensor
from tqdm import tqdm

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.data.pixels import normalize


def sample(pipe: DDPMPipeline, seeds: range, steps: int, **call_options: object) -> tuple[Tensor, float]:
    """Images (B, C, H, W) in [-1, 1], one per seed, and the seconds that they took."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    started = time.perf_counter()
    images = pipe(len(seeds), generators, num_inference_steps=steps, output_type="np", **call_options).images
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1, time.perf_counter() - started


def main() -> None:
    """Sample, score, print a table and write `time_to_quality.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--fashion_mnist", type=Path, metavar="FOLDER")
    parser.add_argument("--num_images", type=int, default=250)
    parser.add_argument("--batch_size", type=int, default=125)
    parser.add_argument("--stock_steps", type=int, default=1000)
    parser.add_argument("--our_steps", type=int, nargs="+", default=[10, 25])
    parser.add_argument("--output_dir", type=Path, default=Path("bench-quality"))
    options = parser.parse_args()

    pixels, labels = labelled_fashion(options.fashion_mnist) if options.fashion_mnist else labelled_digits()
    real = normalize(pixels)
    classifier, accuracy = fit_classifier(real, labels)

    stock = DDPMPipeline.from_pretrained(options.model).to(best_device())
    stock.scheduler = DDPMScheduler.from_config(stock.scheduler.config)
    runs = {"stock": (stock, options.stock_steps, {})}
    for steps in options.our_steps:
        ours = DDPMPipelineCustom.from_pretrained(options.model).to(best_device())  # a job of its own, set up for K
        runs[f"ours, K = {steps}"] = (ours, steps, {"timesteps": "linspace", "eta": 0.0, "solver_order": 2})
    images, seconds = {name: [] for name in runs}, dict.fromkeys(runs, 0.0)
    for pipe, *_ in runs.values():
        pipe.set_progress_bar_config(disable=True)
        sample(pipe, range(options.batch_size), 1)  # what a first call allocates
    for name, (pipe, steps, _) in runs.items():
        if pipe is not stock:
            started = time.perf_counter()
            print(f"{name}:", pipe.enable_fast_sampling(options.num_images, steps, options.batch_size))
            seconds[name] += time.perf_counter() - started

    batches = [
        range(i, min(i + options.batch_size, options.num_images))
        for i in range(0, options.num_images, options.batch_size)
    ]
    for batch in tqdm(batches, desc="Batches of every run"):
        for name, (pipe, steps, call_options) in runs.items():
            made, taken = sample(pipe, batch, steps, **call_options)
            images[name].append(made)
            seconds[name] += taken

    rows = [
        {
            "": name,
            "seconds": seconds[name],
            "times as fast": seconds["stock"] / seconds[name],
            "Fréchet distance": score(classifier, torch.cat(images[name]), real)["frechet"],
        }
        for name in runs
    ]
    between_real = score(classifier, real[: options.num_images], real[options.num_images :])["frechet"]
    print(f"\n{markdown_table(rows)}\n\n{options.num_images} real images against the others: {between_real}")
    write_results(
        options.output_dir / "time_to_quality.json",
        {
            "model": options.model.name,
            "num_images": options.num_images,
            "classifier_accuracy": accuracy,
            "real_against_real": between_real,
            "runs": rows,
        },
    )


if __name__ == "__main__":
    main()
