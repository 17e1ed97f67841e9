"""Edit, vary, invert and interpolate images: by going part of the way to noise, and back (Section 4 of the paper).

Images are float tensors (B, C, H, W) in [0, 1], as `output_type="pt"` gives them. `pipe` is any DDPM pipeline, ours,
stock or remote code, and is not changed. Whatever else `DDPMPipelineCustom.__call__` takes may follow: `generator`,
`eta`, `solver_order`, `class_labels`, `guidance_scale`, `output_type`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..diffusion.ddpm_process import check_integer, check_number
from ..diffusion.pipeline import DDPMPipelineCustom, DDPMPipelineCustomOutput, image_size
from ..diffusion.scheduling_ddpm_custom import draw_noise
from .operators import Inpaint
from .restore import Generators, own_pipeline, restore

MOST_ITERATIONS = 30  # of a step of `invert`, each a network call; 5 to 10 are the rule
DEPTH = 3  # of Anderson's method: how many earlier iterations it looks back to


def edit(
    pipe: DiffusionPipeline,
    image: Tensor,
    strength: float,
    *,
    num_inference_steps: int = 50,
    generator: Generators = None,
    **options: Any,
) -> DDPMPipelineCustomOutput:
    """Make a drawing or a changed photograph look like the training images (SDEdit, arXiv 2108.01073).

    The image is noised to the time `strength` · T, and sampled from there.

    Args:
        image: x_0, (B, C, H, W) in [0, 1]; larger than the network's images, it is denoised in tiles (see `tiles.py`).
        strength: in (0, 1]: from what is kept as it is to a new image.
        num_inference_steps: K, of the whole chain: `strength` · K network calls are made.

    Raises:
        ValueError: before the first network call.
    """
    check_number("strength", strength, "a number in (0, 1]: the part of the way to noise", lambda v: 0 < v <= 1)
    ours = own_pipeline(pipe)
    x_0 = _data(ours, "image", image, may_be_larger=True)
    T = len(ours.scheduler.process.betas)
    check_integer("num_inference_steps", num_inference_steps, 1, T)
    t = max(round(strength * T) - 1, 0)
    noise = draw_noise(x_0.shape, generator, x_0.device, x_0.dtype)
    x_t = ours.scheduler.process.q_sample(x_0, t, noise)
    grid = _descent(t, max(round(strength * num_inference_steps), 1))
    size = (x_0.shape[2], x_0.shape[3])
    if size != image_size(ours.unet):  # nothing is measured, which leaves sampling in tiles
        nothing = Inpaint(torch.zeros(size))
        return restore(
            pipe, torch.zeros_like(x_0), nothing, method="ddnm", size=size, latents=x_t, timesteps=grid,
            generator=generator, **{"eta": 1.0, **options},
        )  # fmt: skip
    return _call(ours, len(x_0), generator, latents=x_t, timesteps=grid, **options)


def variations(
    pipe: DiffusionPipeline,
    image: Tensor,
    timestep: int,
    num_images: int = 4,
    *,
    num_inference_steps: int = 50,
    generator: Generators = None,
    **options: Any,
) -> DDPMPipelineCustomOutput:
    """Images that share what is left of one image at t: draws from p_θ(x_0 | x_t) for one x_t (Fig. 7).

    Args:
        image: x_0, (1, C, H, W) in [0, 1].
        timestep: t in [0, T - 1]; the later, the less the images share.
        num_images: how many to draw.
        generator: one, or `num_images` of them; the first draws the noise of x_t.
    """
    ours = own_pipeline(pipe)
    x_0 = _data(ours, "image", image)
    if len(x_0) != 1:
        raise ValueError(f"`image` holds {len(x_0)} images, but must be one, of shape (1, C, H, W).")
    T = len(ours.scheduler.process.betas)
    check_integer("timestep", timestep, 0, T - 1)
    check_integer("num_images", num_images, 1)
    first = generator[0] if isinstance(generator, list) else generator
    x_t = ours.scheduler.process.q_sample(x_0, timestep, draw_noise(x_0.shape, first, x_0.device, x_0.dtype))
    grid = _descent(timestep, max(round((timestep + 1) / T * num_inference_steps), 1))
    latents = x_t.repeat(num_images, 1, 1, 1)
    return _call(ours, num_images, generator, latents=latents, timesteps=grid, **options)


def invert(
    pipe: DiffusionPipeline,
    images: Tensor,
    *,
    num_inference_steps: int = 50,
    class_labels: int | str | Sequence[int | str] | Tensor | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """x_T from which sampling with eta = 0 and `inversion_timesteps` gives the images back.

    Each step of DDIM (arXiv 2010.02502, Eq. 13), x_s = √ᾱ_s x̂_0(x_t) + √(1 - ᾱ_s) ε̂(x_t), is solved for x_t, where the
    usual inversion takes ε̂(x_s) for ε̂(x_t): a fixed point, by Anderson's method, until it changes by no more than
    rounding does, since sampling magnifies what is left over. Costs about 7 K network calls.

    Args:
        images: x_0, (B, C, H, W) in [0, 1].
        num_inference_steps: K.

    Returns:
        x_T, (B, C, H, W), float32 at least.
    """
    ours = own_pipeline(pipe)
    x = _data(ours, "images", images)
    labels = ours.prepare_class_labels(class_labels, len(x), guidance_scale)
    scheduler, network = ours.scheduler, ours.unet
    grid = inversion_timesteps(pipe, num_inference_steps)

    def eps(x_t: Tensor, t: int, place: Tensor) -> Tensor:
        """ε of the step that sampling takes: that of x̂_0 as it is clipped there."""
        output = ours._predict(network, x_t.to(network.dtype), place, labels, guidance_scale).to(x_t.dtype)
        x_0 = scheduler.predict_x_0(output[:, : x_t.shape[1]], x_t, t)
        return scheduler.process.predict_eps(x_0, x_t, t, "sample")

    def step_back(x_s: Tensor, t: int, place: Tensor, ratio: float, share: float, x_t: Tensor) -> Tensor:
        return ratio * x_s + share * eps(x_t, t, place)

    with torch.no_grad(), ours.progress_bar(total=len(grid)) as progress_bar:
        for s, t in zip([-1, *grid[:0:-1]], grid[::-1], strict=True):
            alpha_s, alpha_t = (float(scheduler.process.alpha_bar(time)) for time in (s, t))
            ratio = (alpha_t / alpha_s) ** 0.5
            share = (1 - alpha_t) ** 0.5 - ratio * (1 - alpha_s) ** 0.5
            x = _fixed_point(partial(step_back, x, t, torch.tensor(t, device=x.device), ratio, share), ratio * x)
            progress_bar.update()
    return x


def inversion_timesteps(pipe: DiffusionPipeline, num_inference_steps: int) -> list[int]:
    """The trajectory of `invert`, for sampling back: evenly from T - 1 to 0."""
    T = pipe.scheduler.config.num_train_timesteps
    check_integer("num_inference_steps", num_inference_steps, 1, T)
    return _descent(T - 1, num_inference_steps)


def interpolate(
    pipe: DiffusionPipeline,
    a: Tensor,
    b: Tensor,
    weights: Sequence[float] = (0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1),
    timestep: int | None = None,
    *,
    num_inference_steps: int = 50,
    generator: torch.Generator | None = None,
    **options: Any,
) -> DDPMPipelineCustomOutput:
    """Images between two images (Fig. 8 and 9).

    Both are noised to t with the same noise, mixed linearly, which leaves that noise as it is, and sampled from there,
    each with the same noise. With `timestep` None they are inverted to x_T and mixed on the sphere, and sampled with
    eta = 0: the ends are then the images themselves.

    Args:
        a, b: two images, (1, C, H, W) in [0, 1].
        weights: of b, each in [0, 1].
        timestep: t; the paper takes 500 of 1000. Later ones are coarser.
        generator: draws the noise; one, since all images share it.

    Returns:
        An image for each weight.
    """
    ours = own_pipeline(pipe)
    x_a, x_b = _data(ours, "a", a), _data(ours, "b", b)
    if len(x_a) != 1 or len(x_b) != 1:
        raise ValueError(f"`a` and `b` hold {len(x_a)} and {len(x_b)} images, but must be one each.")
    for weight in weights:
        check_number("weights", weight, "numbers in [0, 1], the share of b", lambda v: 0 <= v <= 1)
    n, T = len(weights), len(ours.scheduler.process.betas)
    if timestep is None:
        conditions = {key: options[key] for key in ("class_labels", "guidance_scale") if key in options}
        noises = invert(pipe, torch.cat([a, b]), num_inference_steps=num_inference_steps, **conditions)
        latents = slerp(noises[:1], noises[1:], weights)
        grid = inversion_timesteps(pipe, num_inference_steps)
        return _call(ours, n, latents=latents, timesteps=grid, **{**options, "eta": 0.0})
    check_integer("timestep", timestep, 0, T - 1)
    process = ours.scheduler.process
    noise = draw_noise(x_a.shape, generator, x_a.device, x_a.dtype)
    share = torch.tensor(weights, dtype=x_a.dtype, device=x_a.device).reshape(-1, 1, 1, 1)
    latents = torch.lerp(process.q_sample(x_a, timestep, noise), process.q_sample(x_b, timestep, noise), share)
    grid = _descent(timestep, max(round((timestep + 1) / T * num_inference_steps), 1))
    device = x_a.device if generator is None else generator.device
    seed = int(torch.randint(2**62, (), generator=generator, device=device))
    same = [torch.Generator().manual_seed(seed) for _ in weights]
    return _call(ours, n, same, latents=latents, timesteps=grid, **options)


def slerp(a: Tensor, b: Tensor, weights: Sequence[float]) -> Tensor:
    """Points on the arc from one noise to another, (len(weights), C, H, W), all about as long as noise is.

    Args:
        a, b: (1, C, H, W).
    """
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1)
    angle = torch.arccos(cosine)
    share = torch.tensor(weights, dtype=a.dtype, device=a.device).reshape(-1, 1, 1, 1)
    on_arc = (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)
    return torch.where(angle.sin().abs() < 1e-4, torch.lerp(a, b, share), on_arc)


def _call(pipe: DDPMPipelineCustom, *arguments: Any, **options: Any) -> DDPMPipelineCustomOutput:
    """Sample, into tensors unless told otherwise."""
    output: Any = pipe(*arguments, **{"output_type": "pt", **options})
    return output


def _data(pipe: DDPMPipelineCustom, name: str, images: Tensor, may_be_larger: bool = False) -> Tensor:
    """The images in [-1, 1], on the network's device, in float32 at least."""
    shape = (pipe.unet.config.in_channels, *image_size(pipe.unet))
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = f"a {images.dtype} tensor" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"`{name}` is {kind}, but must be a floating-point tensor (B, C, H, W) in [0, 1].")
    found = tuple(images.shape[1:])
    is_larger = images.ndim == 4 and found[0] == shape[0] and found[1] >= shape[1] and found[2] >= shape[2]
    if images.ndim != 4 or (found != shape and not (may_be_larger and is_larger)):
        or_larger = ", or larger ones" if may_be_larger else ""
        raise ValueError(
            f"`{name}` has shape {tuple(images.shape)}, but must be (B, C, H, W) with {shape} as C, H, W{or_larger}."
        )
    if not (images.min() >= -0.01 and images.max() <= 1.01):
        raise ValueError(
            f"`{name}` has values from {float(images.min()):.3g} to {float(images.max()):.3g}, but must lie in [0, 1]: "
            "divide 8-bit images by 255."
        )
    dtype = torch.promote_types(torch.promote_types(images.dtype, pipe.unet.dtype), torch.float32)
    return images.to(pipe._execution_device, dtype) * 2 - 1


def _descent(t: int, steps: int) -> list[int]:
    """Evenly from t to 0, at most `steps` timesteps, descending."""
    return sorted({int(v) for v in np.linspace(t, 0, min(steps, t + 1)).round()}, reverse=True)


def _fixed_point(function: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """X = f(x) by Anderson's method (1965), for each image on its own, until it is met to rounding."""
    tolerance = max(torch.finfo(start.dtype).eps, 1e-10)
    x = start
    points: list[Tensor] = []
    residuals: list[Tensor] = []
    for _ in range(MOST_ITERATIONS):
        value = function(x)
        residual = value - x
        is_open = residual.flatten(1).norm(dim=1) > tolerance * value.flatten(1).norm(dim=1)
        if not is_open.any():
            return x
        points, residuals = [*points[-DEPTH:], x], [*residuals[-DEPTH:], residual]
        better = value if len(points) == 1 else value - _extrapolation(points, residuals)
        x = torch.where(is_open.reshape(-1, *(1,) * (x.ndim - 1)), better, x)
    return x


def _extrapolation(points: list[Tensor], residuals: list[Tensor]) -> Tensor:
    """What leads from f(x) to the combination of all iterations whose residuals, if f were linear, would be least."""
    (change_of_x, change), last = (
        (
            torch.stack([b - a for a, b in itertools.pairwise(history)], -1).flatten(1, -2).double()
            for history in (points, residuals)
        ),
        residuals[-1].flatten(1).double(),
    )
    gram = change.mT @ change
    ridge = 1e-10 * gram.diagonal(dim1=1, dim2=2).mean(1) + 1e-30  # an image that is done has no changes
    gram = gram + ridge[:, None, None] * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    weights = torch.linalg.solve(gram, change.mT @ last[..., None])
    return ((change_of_x + change) @ weights).reshape(points[0].shape).to(points[0].dtype)
