"""The options of `ddpm-hf compress` and `decompress`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .options import at_least, check_types, option


@dataclass
class CompressConfig:
    """Options of `ddpm-hf compress`."""

    output_file: str = option("images.ddpm", "The file to write; an existing one is replaced.", ["-o"])
    bits_per_pixel: float | None = option(
        None, "Compress with loss, into at most so many bits per pixel of an image: 8 * bytes / (images * H * W)."
    )
    target_psnr: float | None = option(
        None, "Compress with loss, into the shortest file that reaches this PSNR in dB, over all images."
    )
    report: str | None = option(
        None,
        "Of a file with loss: write a page in HTML with its pictures at every rate, and its rates beside the bound "
        "and JPEG, WebP and AVIF. Takes as long as the compression again.",
    )
    num_inference_steps: int | None = option(
        None, "K, the network calls per image: more of them, fewer bits. Default: 50.", ["--steps"]
    )
    timestep_spacing: Literal["model", "linspace", "trailing", "leading", "optimal"] | None = option(
        None,
        "How K steps are spread over T. Default: `optimal`, by the model's calibration, or by a measurement.",
        ["--spacing"],
    )
    variance_type: Literal["fixed_small", "fixed_large", "learned", "learned_range", "optimal"] | None = option(
        None, "The variance of a step. Default: a learned one, or `optimal`."
    )
    tile: bool = option(False, "Cut images of other sizes into tiles of the model's.")
    batch_size: int = option(64, "Images per network call, at most. Decoding needs the memory of as many.")
    class_label: str | None = option(None, "For class-conditional models: name or number of the class of all images.")
    device: str | None = option(None, "cpu, cuda, mps, …; default: the best one available. Decode on the same kind.")
    revision: str | None = option(None, "Branch, tag or commit of a model on the Hub.")

    def __post_init__(self) -> None:
        check_types(self)
        at_least(1, self, "num_inference_steps", "batch_size")
        if self.bits_per_pixel is not None and self.target_psnr is not None:
            raise ValueError("pass one of --bits_per_pixel and --target_psnr: each decides how long the file is.")
        if self.report is not None and not self.is_lossy:
            raise ValueError(
                "--report is for files with loss: pass --bits_per_pixel or --target_psnr, too, or leave it out."
            )
        lossless_only = [n for n in ("timestep_spacing", "variance_type") if getattr(self, n) is not None]
        if self.is_lossy and lossless_only:
            raise ValueError(
                f"--{lossless_only[0]} is for lossless files: with --bits_per_pixel or --target_psnr, timesteps and "
                "variance are the optimal ones. Leave it out."
            )

    @property
    def is_lossy(self) -> bool:
        """Whether a rate or a PSNR was chosen."""
        return self.bits_per_pixel is not None or self.target_psnr is not None


@dataclass
class DecompressConfig:
    """Options of `ddpm-hf decompress`."""

    output_dir: str = option(
        "decompressed", "Folder for the images; existing ones of their names are replaced.", ["-o"]
    )
    sample_rest: bool = option(
        False,
        "Of a file with loss: sample what was not sent, for images that are sharp but less true, instead of showing "
        "what is expected of it.",
    )
    device: str | None = option(None, "cpu, cuda, mps, …; default: the kind that the file was made on.")
    revision: str | None = option(None, "Branch, tag or commit of a model on the Hub. Default: the file's.")

    def __post_init__(self) -> None:
        check_types(self)
