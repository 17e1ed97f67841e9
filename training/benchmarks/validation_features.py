"""Which features separate a bad model's images from real ones: those of validation, random convolutions, and pixels.

    python training/benchmarks/validation_features.py [--dataset_name FILE.parquet --label_column label --resolution 32]

Fréchet distances of 256 images to 256 held-out ones, over that of 256 real images: 1 is as good as real.
"""

import argparse
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d

from ddpm_hf.config.training import TrainConfig
from ddpm_hf.data.dataset import load_images
from ddpm_hf.evaluation.metrics.distances import frechet_distance, moments
from ddpm_hf.evaluation.metrics.patch_features import PatchFeatures

N = 256
Features = Callable[[Tensor], Tensor]


def random_convolutions(real: Tensor) -> Features:
    """Three random convolutions of 64 channels at most, averaged over the image."""
    generator = torch.Generator().manual_seed(0)
    channels = [real.shape[1], 32, 64, 64]
    kernels = [torch.randn(o, i, 3, 3, generator=generator) * (2 / (9 * i)) ** 0.5 for i, o in pairwise(channels)]

    def features(images: Tensor) -> Tensor:
        x = images / 127.5 - 1
        for i, kernel in enumerate(kernels):
            x = conv2d(avg_pool2d(x, 2) if i else x, kernel, padding=1).relu()
        return x.mean((2, 3))

    return features


def pixels(real: Tensor) -> Features:
    """The first 64 principal components of the pixels."""
    flat = real.flatten(1).float()
    axes = torch.linalg.svd(flat - flat.mean(0), full_matrices=False).Vh[:64]
    return lambda images: images.flatten(1).float() @ axes.T


def damages(real: Tensor, others: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What bad models do to images, from `real` ones; or to the mix of `others`."""
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    top, size = real.shape[2] // 2, real.shape[2]
    classes = int(labels.max()) + 1
    return {
        "other real images": others[-N:],
        "noise, 8 of 255": real + 8 * noise,
        "noise, 16": real + 16 * noise,
        "noise, 32": real + 32 * noise,
        "blur, 3×3 mean": avg_pool2d(real.float(), 3, 1, 1),
        "halves of two images": torch.cat([real[:, :, :top], real.roll(1, 0)[:, :, top:size]], dim=2),
        "half of the classes": others[labels < classes / 2][:N],
        "two classes": others[labels < 2][:N],
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="digits")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--resolution", type=int, default=16)
    parser.add_argument("--channels", type=int, default=1)
    images = load_images(TrainConfig(**vars(parser.parse_args()), center_crop=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:5000]
    shuffled, labels = images.pixels[order], images.labels[order]
    held_out, real, others = shuffled[:N], shuffled[N : 2 * N], shuffled[2 * N :]
    kinds = {"patches": PatchFeatures, "random convolutions": random_convolutions, "pixels": pixels}
    print(f"| {images.name.rsplit('/', 1)[-1]} | " + " | ".join(kinds) + " |\n|---|" + "---|" * len(kinds))
    extract = {name: kind(held_out) for name, kind in kinds.items()}
    reference = {name: moments(features(held_out)) for name, features in extract.items()}
    for damage, pictures in damages(real, others, labels[2 * N :]).items():
        pictures = pictures.round().clamp(0, 255).to(torch.uint8)
        row = []
        for name, features in extract.items():
            distance, floor = (frechet_distance(moments(features(x)), reference[name]) for x in (pictures, real))
            row.append(f"{distance / floor:.2f}")
        print(f"| {damage} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
