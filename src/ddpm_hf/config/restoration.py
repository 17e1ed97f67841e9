"""The options of `ddpm-hf restore`, `edit` and `interpolate`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .options import at_least, check_seed, check_types, option


@dataclass
class PhotoOptions:
    """How photographs are worked on, whatever is done to them."""

    tiles: bool = option(
        False,
        "Work at the photo's own scale, in overlapping tiles, instead of resizing it until its shorter side is the "
        "network's. Thin holes, such as scratches, are painted so always.",
    )
    num_inference_steps: int = option(50, "K, the steps per image.", ["--steps"])
    num_samples: int = option(1, "Results per photo. Of several, PHOTO-std.png shows where they differ.", ["--samples"])
    seed: int = option(0, "Result k of every photo depends on seed + k alone.")
    batch_size: int | None = option(None, "Images, or tiles, per network call. Default: 64, less if memory is short.")
    class_label: str | None = option(None, "For class-conditional models: name or number of the class of all photos.")
    guidance_scale: float = option(1.0, "Classifier-free guidance; 1 is off.")
    device: str | None = option(None, "cpu, cuda, mps, …; default: the best one available.")
    revision: str | None = option(None, "Branch, tag or commit of a model on the Hub.")

    def check_photos(self) -> None:
        """Raise a ValueError for values that make no sense."""
        check_types(self)
        at_least(1, self, "num_inference_steps", "num_samples", "batch_size")
        check_seed(self.seed, self.num_samples)
        _check_guidance(self.guidance_scale)


@dataclass
class RestorationOptions:
    """What is wrong with the photographs."""

    mask: str | None = option(
        None,
        "Paint over a part of every photo: an image of its size, white there and black elsewhere; or a folder with "
        "such an image of the name of each photo.",
    )
    upscale: int | None = option(None, "Enlarge by this whole factor.")
    colorize: bool = option(False, "Give colors to gray photos.")
    deblur: str | None = option(
        None, "Sharpen: the standard deviation of a Gaussian blur in pixels, or an image of its kernel."
    )
    noise_std: float | None = option(
        None, "Standard deviation of the photo's noise, where black is 0 and white 1. Default: 0; for --deblur 0.005."
    )
    method: Literal["mmps", "posterior", "ddnm", "diffpir", "repaint", "dps", "pigdm"] = option(
        "mmps", "How the model heeds the photo: the most accurate (`mmps`), the fastest (`ddnm`), …"
    )
    eta: float | None = option(
        None,
        "Noise of each step, from none (0) to DDPM's (1). Default: 1; for `mmps` and `ddnm`, all of it is drawn anew, "
        "which is more accurate, but smoother and less varied.",
    )
    output_dir: str = option("restored", "Folder for the results, PHOTO.png; existing ones of the same settings stay.")

    @property
    def wanted(self) -> str:
        """The one of mask, upscale, colorize and deblur that was given."""
        given = [name for name in ("mask", "upscale", "colorize", "deblur") if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            found = " and ".join(f"--{name}" for name in given) or "none of them"
            raise ValueError(
                f"pass one of --mask FILE, --upscale N, --colorize and --deblur KERNEL; this command has {found}."
            )
        return given[0]


@dataclass
class RestoreConfig(PhotoOptions, RestorationOptions):
    """Options of `ddpm-hf restore`."""

    def __post_init__(self) -> None:
        self.check_photos()
        wanted = self.wanted
        at_least(2, self, "upscale")
        if self.noise_std is not None and not 0 <= self.noise_std < math.inf:
            raise ValueError(f"`noise_std` is {self.noise_std}, but must be at least 0, where white is 1.")
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ValueError(f"`eta` is {self.eta}, but must lie in [0, 1]: 0 is DDIM, 1 is DDPM.")
        if self.tiles and wanted in ("upscale", "deblur"):
            raise ValueError(f"--tiles is not needed: --{wanted} works at the photo's own scale always.")
        if self.method == "repaint" and wanted != "mask":
            raise ValueError(f"`method` is 'repaint', but serves --mask only, not --{wanted}: use another method.")


@dataclass
class EditingOptions:
    """How much of the photographs is changed."""

    strength: float = option(0.5, "In (0, 1]: the part of the way to noise, from which the model starts.")
    output_dir: str = option("edited", "Folder for the results, PHOTO.png; existing ones of the same settings stay.")


@dataclass
class EditConfig(PhotoOptions, EditingOptions):
    """Options of `ddpm-hf edit`."""

    def __post_init__(self) -> None:
        self.check_photos()
        if not 0 < self.strength <= 1:
            raise ValueError(f"`strength` is {self.strength}, but must lie in (0, 1]: 1 is a new image.")


@dataclass
class InterpolateConfig:
    """Options of `ddpm-hf interpolate`."""

    num_images: int = option(9, "Images in the strip, the two photos among them.", ["--steps"])
    timestep: int | None = option(
        None,
        "Mix the photos at this timestep t, with equal noise: the later, the less of them is kept. Default: both are "
        "inverted to noise, which is mixed.",
    )
    num_inference_steps: int = option(50, "K, the steps per image.")
    seed: int = option(0, "Of the noise, with --timestep.")
    output_dir: str = option("interpolated", "Folder for A-B.png and A-B.gif; existing ones of the same settings stay.")
    class_label: str | None = option(None, "For class-conditional models: name or number of the class.")
    guidance_scale: float = option(1.0, "Classifier-free guidance; 1 is off.")
    device: str | None = option(None, "cpu, cuda, mps, …; default: the best one available.")
    revision: str | None = option(None, "Branch, tag or commit of a model on the Hub.")

    def __post_init__(self) -> None:
        check_types(self)
        at_least(2, self, "num_images")
        at_least(1, self, "num_inference_steps")
        at_least(0, self, "timestep")
        check_seed(self.seed)
        _check_guidance(self.guidance_scale)


def _check_guidance(scale: float) -> None:
    if not 0 <= scale < math.inf:
        raise ValueError(f"`guidance_scale` is {scale}, but must be at least 0 (1 is no guidance).")
