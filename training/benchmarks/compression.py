r"""Lossless compression: our rate beside the bound of the same model, and beside PNG, WebP, JPEG XL and AVIF.

    pip install pillow-jxl-plugin imagecodecs          # JPEG XL, AVIF without loss; left out where not installed
    python training/benchmarks/compression.py ddpm-digits digits/*.png --steps 50 --output_file digits.json

1. Compress the images into one file, and decompress it again: every pixel must come back.
2. With --bound, measure the variational bound on the same images with `bits_per_dim`: other latents than those sent.
3. Compress them with other programs, at their slowest settings: each image as a file of its own, and all of them in
   one picture, one below the other, where nobody pays for a header per image.
4. Write a JSON file and a Markdown table, in bits per value of a pixel.
"""

import argparse
import io
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, features

from ddpm_hf import bits_per_dim, load_pipeline
from ddpm_hf.codec.arithmetic import repeatable_arithmetic
from ddpm_hf.codec.compress import Gathered, encode, gather
from ddpm_hf.codec.container import unpack
from ddpm_hf.codec.decompress import decode
from ddpm_hf.codec.measuring import with_calibration

ROWS = 16_000  # of a picture of all images: WebP has 16,383 at most


def peers() -> dict[str, object]:
    """What writes an image without loss, by its name."""
    found = {
        "PNG": lambda image: _saved(image, "PNG", optimize=True),
        "WebP": lambda image: _saved(image, "WEBP", lossless=True, quality=100, method=6),
    }
    if not features.check("webp"):
        del found["WebP"]
    try:
        import pillow_jxl  # noqa: F401

        found["JPEG XL"] = lambda image: _saved(image, "JXL", lossless=True, effort=9)
    except ImportError:
        print("JPEG XL is left out: pip install pillow-jxl-plugin")
    try:
        from imagecodecs import avif_decode, avif_encode

        def avif(image: Image.Image) -> int:
            array = np.asarray(image)
            content = avif_encode(array, level=100, speed=0)
            if not np.array_equal(avif_decode(content).reshape(array.shape), array):
                raise ValueError("AVIF lost something")
            return len(content)

        found["AVIF"] = avif
    except ImportError:
        print("AVIF is left out: pip install imagecodecs")
    return found


def _saved(image: Image.Image, name: str, **options: object) -> int:
    stream = io.BytesIO()
    image.save(stream, name, **options)
    return len(stream.getvalue())


def to_image(pixels: np.ndarray) -> Image.Image:
    """Images (N, C, H, W), one below the other."""
    rows = pixels.transpose(0, 2, 3, 1).reshape(-1, pixels.shape[3], pixels.shape[1])
    return Image.fromarray(rows[..., 0] if rows.shape[2] == 1 else np.ascontiguousarray(rows))


def measure_peers(pixels: np.ndarray) -> dict[str, dict[str, float]]:
    """Bits per value of every program, for a file each and for all in one picture."""
    together = ROWS // pixels.shape[2]
    result = {}
    for name, size_of in peers().items():
        try:
            alone = sum(size_of(to_image(image[None])) for image in pixels)
            in_one = sum(size_of(to_image(pixels[i : i + together])) for i in range(0, len(pixels), together))
        except (ValueError, RuntimeError) as error:
            print(f"{name} is left out: {error}")
            continue
        result[name] = {"a file each": 8 * alone / pixels.size, "in one picture": 8 * in_one / pixels.size}
        print(name, result[name], flush=True)
    return result


def measure_ours(pipe: object, gathered: Gathered, steps: int, batch_size: int, with_bound: bool) -> dict[str, float]:
    """Rates, bound and seconds of our file, once it has come back bit by bit."""
    pipe = with_calibration(pipe, gathered.pixels, None)
    result = encode(pipe, gathered, num_inference_steps=steps, batch_size=batch_size)
    report = result.report
    print("\n".join(report.lines()), flush=True)
    start = time.perf_counter()
    decoded = decode(pipe, result.data)
    seconds = time.perf_counter() - start
    if not all((out == pixels).all() for (_, out), pixels in zip(decoded, gathered.pixels, strict=True)):
        raise ValueError("an image did not come back")
    print(f"all {len(decoded)} images came back, in {seconds:.1f} s", flush=True)
    figures = {
        "steps": steps, "images": len(gathered.pixels), "file": report.total, "net rate": report.rate,
        "bound with the latents sent": report.bound, "header": (report.file_bits - report.payload_bits) / 8,
        "first images": report.opening, "bits of the first images": report.opening_bits,
        "seconds to compress": report.seconds, "of the network": report.network_seconds,
        "seconds to decompress": seconds,
    }  # fmt: skip
    if with_bound:
        chain = unpack(result.data).header["chain"]
        with repeatable_arithmetic(pipe.unet):
            bits = bits_per_dim(
                pipe, torch.from_numpy(gathered.pixels[report.opening :]), timesteps=chain["timesteps"],
                variance_type=chain["variance"], seed=1, show_progress=False,
            )  # fmt: skip
        figures |= {"bits_per_dim": bits.total, "its L_0": bits.L_0}
        print(f"bits_per_dim: {bits.total:.4f} (over images ± {bits.standard_error:.4f})", flush=True)
    return figures


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--steps", type=int, nargs="+", default=[50])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--bound", action="store_true")
    parser.add_argument("--output_file", default="compression.json")
    args = parser.parse_args()
    pipe = load_pipeline(args.model)
    gathered = gather(args.images[: args.num_images], pipe)
    results = {"others": measure_peers(gathered.pixels), "ours": []}
    for steps in args.steps:
        results["ours"].append(measure_ours(pipe, gathered, steps, args.batch_size, args.bound))
        Path(args.output_file).write_text(json.dumps(results, indent=1))
    print("| | bits/dim | net of the first bits | bound |\n|---|---|---|---|")
    for row in results["ours"]:
        numbers = (row["file"], row["net rate"], row.get("bits_per_dim", row["bound with the latents sent"]))
        print(f"| {row['steps']} steps | " + " | ".join(f"{number:.3f}" for number in numbers) + " |")
    for name, row in results["others"].items():
        print(f"| {name}, in one picture (a file each) | {row['in one picture']:.3f} ({row['a file each']:.3f}) | | |")


if __name__ == "__main__":
    main()
