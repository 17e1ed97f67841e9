"""Images ↔ the bytes of a progressive file, at a rate or a PSNR of choice: `compress_progressive` and its way back."""

from __future__ import annotations

import binascii
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import __version__
from ..data.pixels import normalize, to_uint8
from ..diffusion.ddpm_labels import label_tensor
from ..diffusion.ddpm_process import check_integer, check_number
from ..diffusion.pipeline import DDPMPipelineCustom
from ..progress import progress
from ..sampling.generate import eval_mode
from ..storage.weights import hash_weights
from .arithmetic import predict
from .channel import SharedRandomness
from .compress import STEPS, Gathered, Images, gather
from .container import pack_header, read_header
from .formats import psnr_of
from .header import image_shape, read_field
from .measuring import with_calibration
from .packets import from_packets, packets_length, to_packets
from .pictures import Picture, assemble, count_tiles, describe_pictures, read_pictures
from .progressive import ERROR_STEPS, Bits, Chain, Step, best_chain, bits_to_send, follow, plan_steps

HASH_DIGITS = 16  # of the weights, in a header that is to be short
Shown = Callable[[int, Tensor], None]


class Point(NamedTuple):
    """The receiver's picture x̂_0 at timestep t.

    Attributes:
        t: the timestep.
        bits: sent so far.
        squared_error: of the pixels, on the scale of 0 to 255, averaged over all images.
    """

    t: int
    bits: int
    squared_error: float

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio of the average squared error, in dB."""
        return psnr_of(self.squared_error)


@dataclass
class Sent:
    """What a compression came to.

    Args:
        points: before the first step, and after each that was sent.
        num_inference_steps: K of the chain.
        pixels: H·W of all images, in which rates are counted.
        file_bytes: of the whole file.
        header_bytes: of those, the header's.
        checksum_bytes: of those, the packets' checksums.
        seconds: in all.
        network_seconds: of those, the network's.
    """

    points: list[Point] = field(default_factory=list)
    num_inference_steps: int = 0
    pixels: int = 0
    file_bytes: int = 0
    header_bytes: int = 0
    checksum_bytes: int = 0
    seconds: float = 0.0
    network_seconds: float = 0.0

    def lines(self) -> list[str]:
        """For people."""
        last = self.points[-1]
        around = self.header_bytes + self.checksum_bytes
        return [
            f"{self.file_bytes:,} bytes: {8 * self.file_bytes / self.pixels:.4f} bits/pixel, {last.psnr:.2f} dB",
            f"  of which header {self.header_bytes:,} and checksums {self.checksum_bytes:,} bytes "
            f"({8 * around / self.pixels:.4f} bits/pixel)",
            f"  {len(self.points) - 1} steps with {last.bits:,} bits ({last.bits / self.pixels:.4f} bits/pixel)",
            f"  {self.seconds:.1f} s, of which the network took {self.network_seconds / max(self.seconds, 1e-9):.0%}",
        ]


class Received(NamedTuple):
    """What came out of a file.

    Attributes:
        images: pixels, uint8 (C, H, W), and what the files said.
        steps: how many were received.
        steps_sent: how many the whole file has.
        problem: where and how the file ends before that; None for a whole one.
    """

    images: list[tuple[Picture, NDArray[np.uint8]]]
    steps: int
    steps_sent: int
    problem: str | None

    @property
    def description(self) -> str:
        """What a file with a problem shows."""
        return (
            f"the file {self.problem}: these are the images of its first {self.steps} of {self.steps_sent} steps, less "
            "sharp than the whole file's."
        )


def compress_progressive(
    pipeline: DDPMPipelineCustom,
    images: Images,
    *,
    bits_per_pixel: float | None = None,
    target_psnr: float | None = None,
    num_inference_steps: int | None = None,
    class_label: int | str | None = None,
    tile: bool = False,
    batch_size: int = 64,
    model_name: str | None = None,
) -> bytes:
    """Compress images with loss, into a file of which any prefix decodes (arXiv 2006.11239, Algorithms 3 and 4).

    The values of all images are coded together: the more of them, the nearer the rate is to the model's bound.

    Args:
        pipeline: the model. Without a calibration, it is measured on some of the images.
        images: files, images of Pillow, or uint8 (N, C, H, W). Of the model's size and mode.
        bits_per_pixel: of the whole file, at most: 8 · bytes / (images · H · W).
        target_psnr: in dB, of the squared error averaged over all images: the shortest file that reaches it. One of the
            two.
        num_inference_steps: K, the network calls per image; by default 50, or T if that is less.
        class_label: of all images, for a class-conditional model.
        tile: cut images of other sizes into tiles of the model's.
        batch_size: images per network call.
        model_name: by which `ddpm-hf decompress` will look for the model.

    Returns:
        The content of a file, for `decompress`, which may be cut anywhere behind its header.

    Raises:
        ValueError: for images that the model can't hold, a bad argument, and a rate or PSNR that can't be reached.
    """
    return encode_progressive(
        pipeline, gather(images, pipeline, tile), bits_per_pixel=bits_per_pixel, target_psnr=target_psnr,
        num_inference_steps=num_inference_steps, class_label=class_label, batch_size=batch_size, model_name=model_name,
    )[0]  # fmt: skip


def encode_progressive(
    pipeline: DDPMPipelineCustom,
    gathered: Gathered,
    *,
    bits_per_pixel: float | None = None,
    target_psnr: float | None = None,
    num_inference_steps: int | None = None,
    class_label: int | str | None = None,
    batch_size: int = 64,
    seed: int = 0,
    model_name: str | None = None,
    revision: str | None = None,
    shown: Shown | None = None,
    show_progress: bool = False,
) -> tuple[bytes, Sent]:
    """As `compress_progressive`, with what it came to.

    Args:
        gathered: the images.
        seed: of the shared randomness.
        revision: of the model.
        shown: gets the number of steps done and x̂_0, (N, C, H, W) in [-1, 1], before each step.
    """
    if (bits_per_pixel is None) == (target_psnr is None):
        raise ValueError("pass one of `bits_per_pixel` and `target_psnr`.")
    for name, value in (("bits_per_pixel", bits_per_pixel), ("target_psnr", target_psnr)):
        if value is not None:
            check_number(name, value, "a positive number", lambda v: v > 0)
    check_integer("batch_size", batch_size, 1)
    check_integer("seed", seed, 0, 2**64 - 1)
    label = None
    if pipeline.unet.config.num_class_embeds is not None or class_label is not None:
        label = int(label_tensor(class_label, 1, pipeline.unet.config)[0])
    T = pipeline.scheduler.config.num_train_timesteps
    scheduler = with_calibration(pipeline, gathered.pixels, label, show_progress).scheduler
    chain = best_chain(scheduler, min(STEPS, T) if num_inference_steps is None else num_inference_steps)
    steps = plan_steps(scheduler.process, chain)

    x_0 = normalize(torch.from_numpy(gathered.pixels))
    count = x_0.numel()
    sent = Sent(num_inference_steps=len(steps) + 1, pixels=len(x_0) * math.prod(x_0.shape[2:]))
    header = _describe(pipeline, gathered, chain, steps, count, label, seed, model_name, revision)
    limit = math.inf if bits_per_pixel is None else bits_per_pixel * sent.pixels / 8
    smallest = len(pack_header({**header, "sent": len(steps)}))
    if smallest > limit:
        raise ValueError(
            f"`bits_per_pixel` is {bits_per_pixel}, {int(limit)} bytes for these images, but the header alone has "
            f"{smallest}: allow {8 * smallest / sent.pixels:.3g} at least, or put more images into a file."
        )

    network = _Network(pipeline, label, batch_size)
    chosen: list[Bits] = []
    shared = SharedRandomness(seed)
    choose = bits_to_send(steps, x_0, shared)
    at = 0

    def watch(x_0_hat: Tensor) -> bool:
        """Note the receiver's picture; returns whether it suffices."""
        error = (to_uint8(x_0_hat).double() - to_uint8(x_0).double()).square().mean()
        t = steps[len(chosen)].t if len(chosen) < len(steps) else steps[-1].s
        sent.points.append(Point(t, at, float(error)))
        if shown is not None:
            shown(len(chosen), x_0_hat)
        return target_psnr is not None and sent.points[-1].psnr >= target_psnr

    def bits_of(k: int, x_0_hat: Tensor) -> Bits | None:
        nonlocal at
        needed = smallest + packets_length(-(-(at + steps[k].num_bits(count)) // 8))
        if watch(x_0_hat) or needed > limit:
            return None
        bits = choose(k, x_0_hat)
        chosen.append(bits)
        at += len(bits)
        bar.update(1)
        return bits

    start = time.perf_counter()
    bar = progress(total=len(steps), desc="Compressing", unit="step", is_shown=show_progress)
    with bar, eval_mode(pipeline.unet), torch.no_grad():
        last = follow(network, steps, x_0.shape, shared, bits_of)
        if len(chosen) == len(steps):
            watch(last)
    if target_psnr is not None and sent.points[-1].psnr < target_psnr:
        raise ValueError(
            f"`target_psnr` is {target_psnr} dB, but this model reaches {sent.points[-1].psnr:.2f} dB, with "
            f"{at / sent.pixels:.3f} bits per pixel: lower it, take more steps, or compress without loss."
        )
    head = pack_header({**header, "sent": len(chosen)})
    content = np.packbits(np.concatenate([*chosen, np.zeros(0, np.uint8)])).tobytes()
    data = head + to_packets(content, binascii.crc_hqx(head, 0))
    sent.file_bytes, sent.header_bytes = len(data), len(head)
    sent.checksum_bytes = len(data) - len(head) - len(content)
    sent.seconds, sent.network_seconds = time.perf_counter() - start, network.seconds
    return data, sent


def decode_progressive(
    pipeline: DDPMPipelineCustom,
    data: bytes,
    *,
    finish: bool = False,
    batch_size: int = 64,
    show_progress: bool = False,
) -> Received:
    """The images of a file, or of the part of it that is intact.

    Args:
        pipeline: the model that it was made with. Its arithmetic may round differently.
        data: the content of the file, or of a prefix of it that has the header.
        finish: sample what was not sent (Algorithm 2), instead of showing what is expected of it (Algorithm 4).
        batch_size: images per network call.

    Raises:
        ValueError: for a damaged header, and another model.
    """
    header, place = read_header(data)
    read_field(header, "codec", lambda v: v == "progressive")
    shape = image_shape(pipeline)
    _check_model(header, pipeline, shape)
    pictures = _read_pictures(header, shape[0])
    counts = [count_tiles(picture.size, shape[1:]) for picture in pictures]
    steps = plan_steps(pipeline.scheduler.process, _read_chain(header, pipeline))
    count = sum(counts) * math.prod(shape)
    if header.get("plan") != _hash_plan(steps, count):
        raise ValueError(
            "the steps of the file's chain are not those of this model's scheduler: its schedule of betas or its "
            "calibration was changed since. Pass the model as it was when the file was made."
        )
    steps_sent = read_field(header, "sent", lambda v: type(v) is int and 0 <= v <= len(steps))
    seed = read_field(header, "seed", lambda v: type(v) is int and 0 <= v < 2**64)
    label = read_field(header["model"], "label", lambda v: v is None or (type(v) is int and 0 <= v < 2**31))

    ends = np.cumsum([0, *(step.num_bits(count) for step in steps[:steps_sent])])
    received = from_packets(data[place:], binascii.crc_hqx(data[:place], 0), -(-int(ends[-1]) // 8), place)
    bits = np.unpackbits(np.frombuffer(received.content, np.uint8))
    known = steps_sent if received.problem is None else int((ends[1:] <= len(bits)).sum())

    def bits_of(k: int, x_0_hat: Tensor) -> Bits | None:
        bar.update(1)
        if k < known:
            return bits[ends[k] : ends[k + 1]]
        return np.zeros(0, np.uint8) if finish else None

    total = len(steps) if finish else known
    bar = progress(total=total, desc="Decompressing", unit="step", is_shown=show_progress)
    with bar, eval_mode(pipeline.unet), torch.no_grad():
        network = _Network(pipeline, label, batch_size)
        tiles = to_uint8(follow(network, steps, (sum(counts), *shape), SharedRandomness(seed), bits_of)).numpy()
    places = np.cumsum([0, *counts])
    images = [
        (picture, assemble(tiles[first:end], picture.size))
        for picture, first, end in zip(pictures, places[:-1], places[1:], strict=True)
    ]
    return Received(images, known, steps_sent, received.problem)


class _Network:
    """x̂_0 from x_t, in batches; counts the time."""

    def __init__(self, pipeline: DDPMPipelineCustom, label: int | None, batch_size: int) -> None:
        self._pipeline, self._label, self._batch_size = pipeline, label, batch_size
        self.seconds = 0.0

    def __call__(self, x_t: Tensor, t: int) -> Tensor:
        start, scheduler = time.perf_counter(), self._pipeline.scheduler
        outputs = [predict(self._pipeline.unet, x, t, self._label) for x in x_t.split(self._batch_size)]
        self.seconds += time.perf_counter() - start
        output = torch.cat(outputs)[:, : x_t.shape[1]]
        return scheduler.limit_x_0(scheduler.process.predict_x0(output, x_t, t, scheduler.config.prediction_type))


def _describe(
    pipeline: DDPMPipelineCustom, gathered: Gathered, chain: Chain, steps: Sequence[Step], count: int,
    label: int | None, seed: int, name: str | None, revision: str | None,
) -> dict[str, Any]:  # fmt: skip
    is_measured = pipeline.scheduler.config.get("_calibration") is None
    return {
        "by": f"ddpm-hf {__version__}",
        "codec": "progressive",
        "shape": list(image_shape(pipeline)),
        "model": {
            "name": name,
            "revision": revision,
            "weights": hash_weights(pipeline.unet)[:HASH_DIGITS],
            "label": label,
        },
        "steps": list(chain) if is_measured else len(chain.timesteps),
        "arithmetic": {},  # it may differ
        "plan": _hash_plan(steps, count),
        "seed": seed,
        "images": describe_pictures(gathered.pictures),
    }


def _read_chain(header: dict[str, Any], pipeline: DDPMPipelineCustom) -> Chain:
    """The chain of a file: that of the model's calibration, or one that the file has."""
    T = pipeline.scheduler.config.num_train_timesteps
    stored = header.get("steps")
    if type(stored) is int and 1 <= stored <= T:
        return best_chain(pipeline.scheduler, stored)
    timesteps, errors = read_field(
        header, "steps", lambda v: isinstance(v, list) and len(v) == 2 and all(map(_are_integers, v))
    )
    is_chain = timesteps[0] < T and timesteps[-1] >= 0 and all(t > s for t, s in itertools.pairwise(timesteps))
    if not is_chain or len(errors) != len(timesteps) or max(map(abs, errors)) > 100 * ERROR_STEPS:
        raise ValueError("the file's header has timesteps that are none of this model: no ddpm-hf wrote it.")
    return Chain(timesteps, errors)


def _are_integers(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(type(v) is int for v in values)


def _hash_plan(steps: Sequence[Step], count: int) -> str:
    """Eight hexadecimal digits of the steps and their bits, with six digits of each coefficient."""
    rows = [f"{s.t},{s.s},{s.num_bits(count)},{s.mean_from_x_0:.5e},{s.mean_from_x_t:.5e},{s.std:.5e}" for s in steps]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:8]


def _check_model(header: dict[str, Any], pipeline: DDPMPipelineCustom, shape: tuple[int, int, int]) -> None:
    stored = read_field(header, "model", lambda v: isinstance(v, dict))
    weights = hash_weights(pipeline.unet)[:HASH_DIGITS]
    if stored.get("weights") != weights:
        raise ValueError(
            f"the file was made with the model {stored.get('name')!r} of weights {stored.get('weights')}…, but this "
            f"one has {weights}…: pass that model, in that state."
        )
    if header.get("shape") != list(shape):
        raise ValueError(f"the file has images of {header.get('shape')} (C, H, W), but the model makes {list(shape)}.")


def _read_pictures(header: dict[str, Any], channels: int) -> list[Picture]:
    try:
        return read_pictures(header.get("images"), channels)
    except ValueError as error:
        raise ValueError(f"the file's header can't be read: {error}.") from error
