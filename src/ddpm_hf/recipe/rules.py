"""The rules of a plan: each is a function of the images, the machine and the time, with its reason and its evidence.

"Measured" refers to training/benchmarks/README.md. A rule that has not been measured says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .images import Look

RESOLUTIONS = (16, 32, 64, 128, 256)
IMAGES_PER_PIXEL_OF_A_SIDE = 500
LARGEST_LOWEST_LEVEL = 32
WIDTHS = (8, 16, 24, 32, 48, 64, 96, 128)
SMALL_PARAMETERS, SMALL_IMAGES = 687_000, 12_000  # of a network that was measured at 16×16
LARGE_RESOLUTION, PHOTO_PARAMETERS, PHOTO_IMAGES = 32, 1_541_547, 24_000  # of one that was measured there
MANY_PARAMETERS = 100_000_000
FEW_IMAGES, FEWEST_IMAGES = 500, 100
SMALL_SET = 5000  # images, which a network may learn by heart: samples are compared with all of them
MANY_VALIDATIONS, PATIENCE = 8, 3
MIN_UPDATES = 100
MIN_CALLS_TO_MEASURE = 60_000
ORIENTED_SIGMAS = 2.5


def natural_resolution(look: Look) -> int:
    """The resolution that neither invents pixels nor throws many away: near the shorter side of most images.

    8×8 scans are trained on at 16×16, where the network can halve them twice. Images of up to half as much again as a
    resolution are made smaller, since a network of twice the resolution takes four times as long per image.
    """
    return next((r for r in RESOLUTIONS if look.side < 1.5 * r), RESOLUTIONS[-1])


def multipliers(resolution: int) -> tuple[int, ...]:
    """The widths of the network's levels, in multiples of the first: halved at least twice, and down to 8×8 or less.

    At 16×16, (1, 2, 4) was measured beside (1, 2) and (2, 4, 4). The rest extends it: high resolutions are narrow,
    because there a channel costs the most (not measured). Where a side can't be halved further, as with 25 of 100, the
    network has fewer levels.

    Raises:
        ValueError: where the lowest level would be larger than 32×32: its attention costs the square of its pixels.
    """
    wanted = max(2, math.ceil(math.log2(resolution / 8)))
    halvings = next(n for n in range(wanted, -1, -1) if resolution % 2**n == 0)
    if halvings == 0 or resolution >> halvings > LARGEST_LOWEST_LEVEL:
        step = 2**wanted
        near = sorted({max(step, resolution // step * step), math.ceil(resolution / step) * step})
        raise ValueError(
            f"`resolution` is {resolution}, which a network can't halve {wanted} times: pass --resolution "
            f"{' or '.join(map(str, near))}."
        )
    return {
        1: (1, 2),
        2: (1, 2, 4),
        3: (1, 2, 2, 4),
        4: (1, 1, 2, 2, 4),
    }.get(halvings, (1, 1, 2, 2) + (4,) * (halvings - 3))


def networks(resolution: int) -> list[dict[str, Any]]:
    """The networks for a resolution, from the smallest to the largest: arguments of `UNet2DModel`.

    Measured at 16×16: one layer per block is better than two in the same time. Attention at the lowest level alone
    costs little. From 64 channels on there are two layers, as in the paper (not measured here).
    """
    levels = multipliers(resolution)
    down = ["DownBlock2D"] * (len(levels) - 1) + ["AttnDownBlock2D"]
    return [
        {
            "block_out_channels": [width * m for m in levels],
            "layers_per_block": 1 if width < 64 else 2,
            "down_block_types": down,
            "up_block_types": ["AttnUpBlock2D"] + ["UpBlock2D"] * (len(levels) - 1),
            "norm_num_groups": 4 if width == 8 else 8,
        }
        for width in WIDTHS
    ]


def images_wanted(parameters: int, resolution: int) -> float:
    """How many images a network should see in training, repetitions included: with the square of its parameters.

    Measured at 16×16: in 40 s of a core, 687,000 parameters that see 12,000 digits are no worse than 173,000 that see
    20,000 (Fréchet distances 0.31 ± 0.03 and 0.37 ± 0.05, of one seed each; so on Fashion-MNIST). In five minutes of
    two cores they are better with 108,000 digits than larger networks with 64,000.

    Measured at 32×32, on photographs: in 240 s of a core, 687,000 parameters that see 19,000 images are as good as 1.54
    million that see 9,500 (Fréchet distances of 14.1 for both, ± 0.9, of one seed each, with the lesser error for the
    smaller network); in 600 s 1.54 million that see 24,000 have caught up with 687,000 that see 46,000 (6.3 and 6.5,
    ± 0.8).

    The square is not measured: it leads from there to the paper's 35.7 million, which would want 13 million images at
    32×32, where the paper has 100 million. Below 500 images per pixel of a side no network has learned much.
    """
    parameters_seen, images = (
        (SMALL_PARAMETERS, SMALL_IMAGES) if resolution < LARGE_RESOLUTION else (PHOTO_PARAMETERS, PHOTO_IMAGES)
    )
    of_network = images * (parameters / parameters_seen) ** 2
    return max(of_network, IMAGES_PER_PIXEL_OF_A_SIDE * resolution)


def batch_size(images_seen: float, count: int | None, resolution: int, device: str) -> int:
    """Images per update: √(images seen)/20 to the nearest power of two, from `least_batch` to 256, at most half of all.

    128 at a few million, as in the paper (not measured).
    """
    size = 2 ** round(math.log2(max(1.0, math.sqrt(images_seen) / 20)))
    size = min(256, max(least_batch(resolution, device), size))
    while count is not None and size > max(1, count // 2):
        size //= 2
    return max(1, size)


def least_batch(resolution: int, device: str) -> int:
    """Images per update in a short run: as few as keep the device busy, since a short run needs updates above all.

    Measured on a CPU at 32×32: in 240 s of a core, 8 images per update are better than 32 by 15 % in the error of x̂_0
    at middle noise, although the core trains on a fifth fewer of them, and 4 are no better; at 16×16 in 40 s, 16 are
    neither better nor worse than 32. Hence 8,192 pixels, and 8 images at least. On other devices 32: a GPU would be
    idle with fewer (not measured).

    Args:
        device: its type, as torch names it.
    """
    return max(8, 8192 // resolution**2) if device == "cpu" else 32


def learning_rate(parameters: int) -> float:
    """2e-3 up to 687,000 parameters, then with one over the root of their number.

    2e-3 was measured beside 3e-3 at that size, and in 40 s of one core beside 4e-3, which made no difference. The rule
    gives 2.8e-4 for the paper's 35.7 million, which has 2e-4.
    """
    rate = 2e-3 * math.sqrt(SMALL_PARAMETERS / max(SMALL_PARAMETERS, parameters))
    return float(f"{rate:.2g}")


def loss_weighting(given: Mapping[str, Any], resolution: int) -> dict[str, Any]:
    """From 32×32 on, the error of v counts less where there is little noise (SNR > 19): most of it nothing can predict.

    Measured at 32×32, in 240 s of a core: a Fréchet distance of 11.7 ± 0.8 instead of 14.1 ± 0.9, with less error of
    x̂_0 wherever SNR < 19. The price is more error where the noise is hardly seen, and more bits/dim. A cap of SNR + 1
    at 6 instead of 20 is no better (11.1 ± 0.8), and its images have some grain. At 16×16 in 40 s it changes no
    distance (0.31 and 0.33, ± 0.03), and only the price remains.

    Args:
        given: options of the user, which may be of other losses.
    """
    is_of_v = given.get("prediction_type", "v_prediction") == "v_prediction"
    if not is_of_v or {"loss_weighting", "snr_gamma"} & set(given) or resolution < LARGE_RESOLUTION:
        return {}
    return {"loss_weighting": "min_snr_v", "snr_gamma": 20.0}


def warmup(updates: float) -> int:
    """Updates of linear warm-up: a thirtieth of the run, 500 at most.

    The digits' 100 of 3,400; in 40 s of one core 30 of 355 were no better and no worse than 100 (measured). Adam needs
    some updates before it knows the size of the gradients.
    """
    return max(1, min(500, round(updates / 30)))


def held_out(count: int | None, calls_in_budget: float) -> int:
    """Images to measure on, which are not trained on: a tenth, 256 at most; none of fewer than 160, or in a short time.

    256 tell two checkpoints of one run apart, since noise and timesteps are the same for both. Of few images each one
    that is trained on counts more. One measurement costs 18 network calls per image: a hundredth of the time at most.

    Args:
        calls_in_budget: network calls for one image that the whole time is enough for.
    """
    if calls_in_budget < MIN_CALLS_TO_MEASURE:
        return 0
    images = min(256, (count or 0) // 10, int(calls_in_budget / (18 * 100)))
    return images if images >= 16 else 0


def validations(calls_in_budget: float, images: int, count: int | None) -> int:
    """How often to measure on so many held-out images: four times, or only at the end where that costs more.

    Eight times on a small set, if each costs a hundredth at most: there the end of a run need not be its best moment.

    Args:
        calls_in_budget: network calls for one image that the whole time is enough for; one image takes 18 of them.
        images: that are held out.
        count: of all images.
    """
    cost = 18 * images
    if is_small(count) and 0 < cost * 100 <= calls_in_budget:
        return MANY_VALIDATIONS
    return 0 if not cost else 4 if cost * 200 <= calls_in_budget else 1


def is_small(count: int | None) -> bool:
    """Whether a network may overfit these images, so that the best checkpoint is exported instead of the last."""
    return count is not None and count <= SMALL_SET


def patience(validations: int) -> int | None:
    """After how many validations without a gain the run ends: three of many, or never."""
    return PATIENCE if validations >= MANY_VALIDATIONS else None


def flips(look: Look) -> bool:
    """Whether images may be mirrored, which doubles a small set: only where left and right are alike.

    Half of the looked-at images are compared with the other half: mirror images of photographs are as near as the
    images themselves (48 to 50 % of CIFAR-10), those of digits are not (4 to 7 %).
    """
    if math.isnan(look.mirrored):
        return False
    return look.mirrored >= 0.5 - ORIENTED_SIGMAS * 0.5 / math.sqrt(look.looked_at / 2)


def ema_widths(parameters: int) -> list[float]:
    """The widths of the averages of the weights, of which held-out images choose one; fewer for large networks.

    Measured: the digits' decay of 0.995 has a width of 0.059 of their 3,400 updates. Half and twice that lie beside it.
    """
    return [0.03, 0.06, 0.12] if parameters < MANY_PARAMETERS else [0.06]


def preview(calls_in_budget: float) -> tuple[int, int, int]:
    """Images of a sample grid, sampling steps, and grids during training: at most a fiftieth of the time for each.

    Args:
        calls_in_budget: network calls for one image that the whole time is enough for.
    """
    affordable = calls_in_budget / 50
    images, steps = next(
        (pair for pair in ((64, 100), (36, 100), (36, 50), (16, 50), (16, 25)) if math.prod(pair) <= affordable),
        (16, 25),
    )
    return images, steps, 4 if calls_in_budget / (images * steps) >= 150 else 1


def expectation(images_seen: float, parameters: int, resolution: int) -> str:
    """How good the samples will be, in words, by the images seen per pixel of a side and the size of the network.

    The digits at five minutes have seen 13 times the least that is worth anything: nine of ten are recognised with
    confidence (measured). What is said of photographs is experience with networks of these sizes, not a measurement.
    """
    ratio = images_seen / (IMAGES_PER_PIXEL_OF_A_SIDE * resolution)
    if ratio < 1:
        return "rough shapes and colors, hardly more"
    if ratio < 6:
        return "recognisable for simple images, such as digits; photographs stay blurred or broken"
    if parameters < 5_000_000:
        return "simple images look right; photographs have the right colors and textures, but seldom a clear object"
    return "simple images look right; photographs are recognisable, with faults"


def warnings(look: Look, resolution: int) -> list[str]:
    """What a person should know of the images before hours are spent on them."""
    lines = []
    if look.are_equal:
        lines.append("All images that were looked at are the same: there is nothing to learn but that one.")
    if look.unreadable:
        share = f"{len(look.unreadable)} of {look.looked_at} images that were looked at"
        first = look.unreadable[0]
        lines.append(f"Can't be read: {share}, e.g. {Path(first.path).name if first.path else first.index}.")
    if look.count is not None and look.count < FEWEST_IMAGES:
        lines.append(
            f"Only {look.count} image{'s' if look.count > 1 else ''}: the model will repeat what it has seen instead "
            f"of making new ones. {FEW_IMAGES} are few, 5,000 are comfortable."
        )
    elif look.count is not None and look.count < FEW_IMAGES:
        lines.append(f"{look.count} images are few: look for copies among the samples (ddpm-hf evaluate counts them).")
    if look.near_duplicates > 0.02 and not look.are_equal:
        lines.append(f"{look.near_duplicates:.0%} of the images have near-duplicates: they will be drawn more often.")
    if look.side < resolution / 1.5:
        pixels = f"{look.side} pixel{'s' if look.side > 1 else ''}"
        lines.append(f"The images are small ({pixels}): enlarged to {resolution}, they gain no detail.")
    if look.transparent:
        lines.append(
            f"{look.transparent:.0%} of the images have transparent parts, so the model draws transparency, too. "
            f"--image_mode {look.mode.removesuffix('A')} trains without it, on white."
        )
    if look.folders and min(n for _, n in look.folders) >= 5:
        lines.append(
            f"{_counted('sub-folders', [name for name, _ in look.folders])} are not told apart. If they are classes, "
            "--label_column label trains a model that draws each of them on demand."
        )
    elif look.class_names:
        lines.append(
            f"{_counted('classes', look.class_names)} are not told apart: --label_column {look.class_column} trains a "
            "model that draws each of them on demand."
        )
    return lines


def _counted(what: str, names: Sequence[str]) -> str:
    return f"{len(names):,} {what} ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})"
