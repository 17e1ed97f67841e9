r"""Restoration of held-out images: our methods, diffusers' RePaint, deepinv's, and plain ones, with one network.

    pip install deepinv opencv-python-headless
    python training/benchmarks/restoration.py --output_dir bench-restoration
    python training/benchmarks/restoration.py --model ddpm-cifar --dataset cifar-held-out.parquet \
        --feature_extractor cifar-resnet --output_dir bench-restoration-cifar

1. Without --model, train on 1,500 of scikit-learn's digits, unless the output folder has a model from an earlier run.
2. Measure the first held-out images with every operator, and restore them with every method. Methods of packages that
   are not installed are left out.
3. PSNR, SSIM, ‖A x̂ - y‖∞ on 8-bit output, network calls, seconds, and with --feature_extractor the distance to the
   original in its features.
4. Invert the model's own samples, and, of digits, interpolate between two of one class.
5. Write `restoration.json`, `restoration.png` and two Markdown tables: the figures, and by how much PSNR is lower than
   the first method's, with standard errors. A row that is in the JSON is not measured again.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from common.restoring import Problem, deepinv_ddrm, deepinv_diffpir, diffusers_repaint
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor

from ddpm_hf import Blur, DDPMPipelineCustom, Downsample, Grayscale, Inpaint, interpolate, invert, restore
from ddpm_hf.config.parsing import parse_train_config
from ddpm_hf.config.training import TrainConfig
from ddpm_hf.data.dataset import load_images
from ddpm_hf.evaluation.metrics.features import open_extractor
from ddpm_hf.restoration.edit import inversion_timesteps
from ddpm_hf.restoration.photos import resize
from ddpm_hf.training.loop import train

TRAINED_ON = 1500
NOISE = 0.05


def problems(size: int, channels: int) -> dict[str, Problem]:
    """What is measured, by the name of its column."""
    box, half = torch.ones(size, size), torch.ones(size, size)
    box[size // 4 : -size // 4 - 1, size // 4 : -size // 4] = 0
    half[:, size // 2 :] = 0
    random = (torch.rand(size, size, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    return {
        "box": Problem(Inpaint(box), 0), "half": Problem(Inpaint(half), 0), "random 50 %": Problem(Inpaint(random), 0),
        "×2": Problem(Downsample(2), 0), "×4": Problem(Downsample(4), 0),
        **({"color": Problem(Grayscale(), 0)} if channels == 3 else {}),
        "random, noise": Problem(Inpaint(random), NOISE), "×2, noise": Problem(Downsample(2), NOISE),
        "blur": Problem(Blur.gaussian(1.0), 0), "blur, noise": Problem(Blur.gaussian(1.0), NOISE),
    }  # fmt: skip


def ours(pipe: DDPMPipelineCustom, y: Tensor, problem: Problem, **options: object) -> Tensor | None:
    """A method of this package."""
    seeds = [torch.Generator().manual_seed(i) for i in range(len(y))]
    return restore(pipe, y, problem.operator, problem.noise_std, generator=seeds, **options).images


def plain(pipe: DDPMPipelineCustom, y: Tensor, problem: Problem) -> Tensor:
    """No network: Telea's inpainting, bicubic enlargement, the inverse of a blur (with noise, a Wiener filter)."""
    size, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels
    if isinstance(problem.operator, Inpaint):
        import cv2

        hole = (problem.operator.mask[0, 0] == 0).to(torch.uint8).numpy()
        pixels = (255 * y.clamp(0, 1)).byte().permute(0, 2, 3, 1).numpy()
        painted = [cv2.inpaint(image.squeeze(-1) if channels == 1 else image, hole, 3, cv2.INPAINT_TELEA)
                   for image in pixels]  # fmt: skip
        return torch.from_numpy(np.stack(painted)).reshape(len(y), size, size, channels).permute(0, 3, 1, 2) / 255
    if isinstance(problem.operator, Grayscale):
        return y.expand(-1, 3, -1, -1)
    if isinstance(problem.operator, Downsample):
        return torch.stack([resize(image, (size, size)) for image in y]).clamp(0, 1)
    linear = problem.operator.bind((channels, size, size))
    return linear.adjoint(linear.solve(y, 12 * problem.noise_std**2)).clamp(0, 1)


METHODS: dict[str, Callable[..., Tensor | None]] = {
    "mmps, K = 25": partial(ours, method="mmps", num_inference_steps=25),
    "mmps, K = 10": partial(ours, method="mmps", num_inference_steps=10),
    "mmps, K = 100": partial(ours, method="mmps", num_inference_steps=100),
    "mmps, eta = 1, K = 25": partial(ours, method="mmps", num_inference_steps=25, eta=1.0),
    "ddnm, K = 25": partial(ours, method="ddnm", num_inference_steps=25),
    "ddnm, K = 100": partial(ours, method="ddnm", num_inference_steps=100),
    "diffpir, K = 100": partial(ours, method="diffpir", num_inference_steps=100),
    "pigdm, K = 100": partial(ours, method="pigdm", num_inference_steps=100),
    "dps, K = 100": partial(ours, method="dps", num_inference_steps=100),
    "dps, K = 1000": partial(ours, method="dps", num_inference_steps=1000),
    "diffusers RePaint, K = 25 × 10": partial(diffusers_repaint, steps=25),
    "diffusers RePaint, K = 250 × 10": partial(diffusers_repaint, steps=250),
    "deepinv DDRM, K = 25": partial(deepinv_ddrm, steps=25),
    "deepinv DDRM, K = 100": partial(deepinv_ddrm, steps=100),
    "deepinv DiffPIR, K = 25": partial(deepinv_diffpir, steps=25),
    "deepinv DiffPIR, K = 100": partial(deepinv_diffpir, steps=100),
    "Telea, bicubic, Wiener": plain,
}
PICTURED = (
    "mmps, K = 25", "ddnm, K = 25", "dps, K = 100", "diffusers RePaint, K = 25 × 10", "deepinv DDRM, K = 25",
    "deepinv DiffPIR, K = 25", "Telea, bicubic, Wiener",
)  # fmt: skip


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, of each image in [0, 1]."""
    return -10 * torch.log10((a - b).square().flatten(1).mean(1).clamp(min=1e-12))


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity (Wang et al. 2004) with its Gaussian window of standard deviation 1.5."""
    line = torch.exp(-0.5 * (torch.arange(-5, 6) / 1.5) ** 2)
    window = (torch.outer(line, line) / line.sum() ** 2)[None, None]

    def mean(x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, window)

    a, b = (x.flatten(0, 1)[:, None] for x in (a, b))  # each channel on its own
    variance_a, variance_b = mean(a * a) - mean(a) ** 2, mean(b * b) - mean(b) ** 2
    covariance = mean(a * b) - mean(a) * mean(b)
    luminance = (2 * mean(a) * mean(b) + 0.01**2) / (mean(a) ** 2 + mean(b) ** 2 + 0.01**2)
    return float((luminance * (2 * covariance + 0.03**2) / (variance_a + variance_b + 0.03**2)).mean())


def split_digits() -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
    """Training images, their indices, held-out ones (uint8 (N, 1, 16, 16)), and the labels of all."""
    pixels = load_images(parse_train_config([]), show_progress=False).pixels
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return pixels, order[:TRAINED_ON], order[TRAINED_ON:], load_digits().target


def trained_model(output_dir: Path, pixels: Tensor, chosen: Tensor) -> DDPMPipelineCustom:
    """The default job's network, trained on these digits alone."""
    folder, images = output_dir / "model", output_dir / "train"
    if not (folder / "model_index.json").exists():
        images.mkdir(exist_ok=True)
        for i in chosen.tolist():
            Image.fromarray(pixels[i, 0].numpy()).save(images / f"{i:04d}.png")
        options = ["--config", "digits", "--train_data_dir", str(images), "--output_dir", str(folder)]
        train(parse_train_config(options))
    pipe = DDPMPipelineCustom.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure(
    pipe: DDPMPipelineCustom, x: Tensor, name: str, problem: Problem, features: Callable[[Tensor], Tensor] | None
) -> tuple[dict[str, object], Tensor] | None:
    """All numbers of one method on one problem, and its images."""
    noise = torch.randn(problem.operator(x).shape, generator=torch.Generator().manual_seed(1))
    y = problem.operator(x) + problem.noise_std * noise
    if isinstance(problem.operator, Inpaint):
        y = problem.operator(y)
    calls: list[int] = []
    handle = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    started = time.monotonic()
    try:
        with torch.no_grad():
            images = METHODS[name](pipe, y, problem)
    finally:
        handle.remove()
    if images is None:
        return None
    eight_bit = (images * 255).round() / 255
    left_over = float((problem.operator(eight_bit) - y).abs().max() * 255)
    each = psnr(eight_bit, x)
    numbers: dict[str, object] = {
        "psnr": round(float(each.mean()), 2), "ssim": round(ssim(eight_bit, x), 4),
        "left_over": round(left_over, 2), "calls": len(calls), "seconds": round(time.monotonic() - started, 1),
        "psnr_of_each": [round(value, 2) for value in each.tolist()],
    }  # fmt: skip
    if features is not None:
        numbers["features"] = round(float((features(eight_bit) - features(x)).norm(dim=1).mean()), 3)
    return numbers, images


def check_inversion(pipe: DDPMPipelineCustom, number: int) -> dict[str, float]:
    """PSNR of a round trip of the model's own samples by 50 steps."""
    timesteps = inversion_timesteps(pipe, 50)
    seeds = [torch.Generator().manual_seed(i) for i in range(number)]
    options = {"timesteps": timesteps, "eta": 0.0, "output_type": "pt"}
    samples = pipe(number, seeds, **options).images
    calls: list[int] = []
    handle = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    noise = invert(pipe, samples, num_inference_steps=50)
    handle.remove()
    found = psnr(pipe(number, latents=noise, **options).images, samples)
    return {"worst_psnr": round(float(found.min()), 1), "mean_psnr": round(float(found.mean()), 1), "calls": len(calls)}


def check_interpolation(
    pipe: DDPMPipelineCustom, pixels: Tensor, kept: Tensor, held: Tensor, labels: np.ndarray
) -> dict:
    """How many interpolations of two held-out digits of one class keep it, as a support vector machine reads them."""
    flat = pixels.flatten(1).numpy() / 255
    reader = SVC(gamma="scale", C=10).fit(flat[kept], labels[kept])
    weights, consistent = [0.25, 0.5, 0.75], 0
    for digit in range(10):
        a, b = [i for i in held.tolist() if labels[i] == digit and reader.predict(flat[[i]])[0] == digit][:2]
        ends = [pixels[i][None].float() / 255 for i in (a, b)]
        between = interpolate(pipe, *ends, weights=weights).images
        consistent += bool((reader.predict(between.flatten(1).numpy()) == digit).all())
    return {"accuracy_on_held_out": round(reader.score(flat[held], labels[held]), 3), "consistent_of_10": consistent}


def picture(rows: list[tuple[str, list[Tensor]]], titles: list[str], file: Path) -> None:
    """A row for each method, a column for each problem."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.3 * len(titles) + 2, 0.75 * len(rows) + 0.4), dpi=100, layout="constrained")
    for axes_row, (name, images) in zip(figure.subplots(len(rows), len(titles)), rows, strict=True):
        for axes, image, title in zip(axes_row, images, titles, strict=True):
            axes.set(xticks=[], yticks=[])
            axes.set_frame_on(False)
            if image is not None:
                pair = torch.cat(list(image[:2]), 2).clamp(0, 1).permute(1, 2, 0)
                axes.imshow(pair, cmap="gray", vmin=0, vmax=1)
            if axes_row is not None and name == rows[0][0]:
                axes.set_title(title, fontsize=8)
        axes_row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(file)


def markdown(results: dict, columns: list[str]) -> str:
    """Two tables: PSNR, SSIM and the distance in features; and by how much the first method's PSNR is higher."""
    head = " | ".join(columns) + " | calls |\n" + "|---" * (len(columns) + 2) + "|"
    scores, differences = [f"| | {head}"], [f"| | {head}"]
    methods = results["methods"]
    for name, row in methods.items():
        calls = max((values["calls"] for values in row.values()), default=0)
        cells, gaps = [], []
        for title in columns:
            found, best = row.get(title), methods[next(iter(methods))].get(title)
            distance = f" {found['features']:.2f}" if found and "features" in found else ""
            cells.append(f"{found['psnr']:.1f} .{round(1000 * found['ssim']):03d}{distance}" if found else "")
            gap = np.subtract(best["psnr_of_each"], found["psnr_of_each"]) if found and best else None
            gaps.append("" if gap is None else f"{gap.mean():+.1f} ± {gap.std(ddof=1) / len(gap) ** 0.5:.1f}")
        scores.append(f"| {name} | " + " | ".join(cells) + f" | {calls} |")
        differences.append(f"| {name} | " + " | ".join(gaps) + f" | {calls} |")
    return "\n".join(scores) + "\n\n" + "\n".join(differences)


def main() -> None:
    """Train if need be, measure what is not measured yet, and write the tables and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a saved model; by default one is trained on digits")
    parser.add_argument("--dataset", help="with --model: images that it was not trained on, a folder or a file")
    parser.add_argument("--feature_extractor", help="made by training/feature_extractor.py")
    parser.add_argument("--num_images", type=int, default=16)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--tasks", nargs="+", help="by default all")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    if options.model is None:
        pixels, kept, held, labels = split_digits()
        pipe = trained_model(options.output_dir, pixels, kept)
        x = pixels[held[: options.num_images]].float() / 255
    else:
        pipe = DDPMPipelineCustom.from_pretrained(options.model)
        pipe.set_progress_bar_config(disable=True)
        wanted = {"resolution": pipe.unet.config.sample_size, "channels": pipe.unet.config.in_channels}
        images = load_images(TrainConfig(dataset_name=options.dataset, center_crop=True, **wanted), show_progress=False)
        x = images.pixels[: options.num_images].float() / 255
    features = None
    if options.feature_extractor:
        extractor = open_extractor(options.feature_extractor, device=torch.device("cpu"))

        def features(images: Tensor) -> Tensor:
            eight_bit = (images * 255).round().clamp(0, 255).to(torch.uint8)
            return extractor(eight_bit, show_progress=False).pooled

    file = options.output_dir / "restoration.json"
    results = json.loads(file.read_text("utf-8")) if file.exists() else {"methods": {}}
    results["num_images"] = len(x)

    tasks = {
        title: problem
        for title, problem in problems(x.shape[-1], x.shape[1]).items()
        if options.tasks is None or title in options.tasks
    }
    for name in options.methods:
        if ("deepinv" in name and not find_spec("deepinv")) or (METHODS[name] is plain and not find_spec("cv2")):
            print(f"{name}: not installed")
            continue
        row = results["methods"].setdefault(name, {})
        for title, problem in tasks.items():
            store = options.output_dir / f"{name}, {title}.pt"
            if title in row and store.exists():
                continue
            measured = measure(pipe, x, name, problem, features)
            if measured is not None:
                row[title], images = measured
                torch.save(images[:2], store)
                print(f"{name:32s} {title:14s} {row[title]}", flush=True)
                file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
    results["inversion"] = results.get("inversion") or check_inversion(pipe, options.num_images)
    if options.model is None:
        results["interpolation"] = results.get("interpolation") or check_interpolation(pipe, pixels, kept, held, labels)
    file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")

    def images_of(name: str, title: str) -> Tensor | None:
        store = options.output_dir / f"{name}, {title}.pt"
        return torch.load(store) if store.exists() else None

    rows = [("the originals", [x[:2]] * len(tasks))]
    rows += [(name, [images_of(name, title) for title in tasks]) for name in PICTURED if results["methods"].get(name)]
    picture(rows, list(tasks), options.output_dir / "restoration.png")
    print(markdown(results, list(tasks)), results["inversion"], results.get("interpolation", ""), sep="\n")


if __name__ == "__main__":
    main()
