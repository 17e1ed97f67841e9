"""`restore(pipe, measurement, operator)`: an image that explains a measurement, without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..diffusion.ddpm_few_steps import Calibration
from ..diffusion.ddpm_process import (
    LEARNED_VARIANCE_TYPES,
    check_choice,
    check_integer,
    check_number,
)
from ..diffusion.pipeline import OUTPUT_TYPES, DDPMPipelineCustom, DDPMPipelineCustomOutput, image_size
from ..diffusion.scheduling_ddpm_custom import DDPMSchedulerCustom, check_eta, draw_noise
from ..progress import progress
from .linear_maps import LinearMap, MaskMap
from .methods import METHODS, PROJECTING, RENEWING, Problem, State, Step, resampling_order
from .operators import DeepInverse, Inpaint, as_operator
from .tiles import predict_in_tiles, tiled

Generators = torch.Generator | list[torch.Generator] | None
MEETING_ROUNDS = 1000  # of projections, of which few are needed
NEGLIGIBLE = 1e-4  # of the range of images, and far below one of 255 levels


@torch.no_grad()
def restore(
    pipe: DiffusionPipeline,
    measurement: Tensor,
    operator: Any,
    noise_std: float = 0.0,
    *,
    num_inference_steps: int = 50,
    method: str = "mmps",
    eta: float | None = None,
    solver_order: int = 1,
    timesteps: Sequence[int] | Tensor | str | None = None,
    generator: Generators = None,
    class_labels: int | str | Sequence[int | str] | Tensor | None = None,
    guidance_scale: float = 1.0,
    jump_length: int = 10,
    num_resamples: int = 10,
    size: tuple[int, int] | None = None,
    latents: Tensor | None = None,
    output_type: str = "pt",
) -> DDPMPipelineCustomOutput:
    """Draw images that explain a measurement, y = A x_0 + σ_y n, from a DDPM of any origin.

    Args:
        pipe: a pipeline with a `UNet2DModel` and a scheduler: ours, stock, or remote code. It is not changed.
        measurement: y, floating point in [0, 1], (B, *) as `operator` makes it of images (B, C, H, W) in [0, 1].
        operator: `Inpaint`, `Downsample`, `Grayscale`, `Blur`, `Compose`, or a linear physics of `deepinv`; for `dps`
            also any differentiable function of images in [0, 1].
        noise_std: σ_y, in units of [0, 1]. With 0, the result meets the measurement to 1/255 on 8-bit output.
        num_inference_steps: K; one network call each, but for `repaint`, whose steps are repeated.
        method: see `methods.py`. "mmps" (the most accurate in few steps), "posterior" (of a calibrated model; exact for
            data of independent Gaussian pixels), "ddnm", "diffpir", "repaint" (inpainting only), "dps" (also for
            operators that are not linear) or "pigdm". "mmps", "dps" and "pigdm" differentiate through the network.
        eta: as in sampling, from DDIM (0) to ancestral (1). With None, "mmps" and "ddnm" draw all of the noise anew at
            every step, which comes nearer to the true image in few steps, but draws less varied and smoother ones;
            other methods take 1.
        solver_order: 2 extrapolates x̂_0 along the trajectory, for "mmps", "posterior", "ddnm" and "diffpir"; eta is
            1 then, unless given.
        timesteps: the trajectory itself, or the name of its spacing; by default "linspace".
        generator: one for the batch, or one per image: then an image depends on its own alone.
        class_labels, guidance_scale: as in sampling.
        jump_length, num_resamples: of "repaint".
        size: (H, W) of the images, by default the network's. Larger ones are denoised in overlapping tiles whose
            predictions are averaged at every step: see `tiles.py`.
        latents: x_t of the first timestep, (B, C, H, W), to start from; by default x_T ~ N(0, I).
        output_type: "pt" (B, C, H, W), "np" (B, H, W, C), "pil", or "latent", all in [0, 1] but the last.

    Returns:
        The images.

    Raises:
        ValueError, TypeError: before the first network call, for arguments that can't go together.
    """
    ours = own_pipeline(pipe)
    scheduler, unet = ours.scheduler, ours.unet
    check_choice("method", method, tuple(METHODS))
    check_choice("output_type", output_type, OUTPUT_TYPES)
    check_number("noise_std", noise_std, "a number of at least 0, in units of images in [0, 1]", lambda v: v >= 0)
    if eta is not None:
        check_eta(eta)
    check_integer("solver_order", solver_order, 1, 2)
    if solver_order == 2 and method not in PROJECTING:
        raise ValueError(f"`solver_order` is 2, but goes with the methods {', '.join(PROJECTING)} only.")
    device, dtype = ours._execution_device, torch.promote_types(unet.dtype, torch.float32)
    shape = (unet.config.in_channels, *_checked_size(size, image_size(unet)))
    problem = _problem(measurement, operator, noise_std, method, shape, device, dtype)
    batch_size = len(problem.y)
    labels = ours.prepare_class_labels(class_labels, batch_size, guidance_scale)
    _check_generators(generator, batch_size)
    if timesteps is None:
        timesteps = "linspace"
    steps_wanted = num_inference_steps if isinstance(timesteps, str) else None
    grid = ours.scheduler_on_trajectory(steps_wanted, timesteps).timesteps.tolist()

    def draw(wanted: tuple[int, ...]) -> Tensor:
        return draw_noise(wanted, generator, device, dtype)

    local_problem, hole = _around_hole(problem, image_size(unet))
    denoise = _denoiser(ours, labels, guidance_scale, {t: torch.tensor(t, device=device) for t in grid}, hole)
    state = State(_start(latents, (batch_size, *shape), draw), denoise, draw)
    is_repaint = method == "repaint"
    order = resampling_order(grid, jump_length if is_repaint else 1, num_resamples if is_repaint else 1)
    if eta is None and (method not in RENEWING or solver_order == 2):
        eta = 1.0
    steps = _steps(scheduler, order, eta, grid if solver_order == 2 else [])
    with ours.progress_bar(total=sum(t > s for t, s in order)) as progress_bar:
        for (t, s), step in zip(order, steps, strict=True):
            if step is None:  # a step back
                state.x_t = scheduler.process.q_step(state.x_t, s, state.noise(), t)
                continue
            state.x_t, state.previous_x_0 = METHODS[method](state, step, local_problem)
            progress_bar.update()
    x_0 = state.x_t
    if noise_std == 0 and isinstance(problem.forward, LinearMap):
        x_0 = meet(x_0, problem, scheduler.config.clip_sample or scheduler.config.thresholding)
    return DDPMPipelineCustomOutput(ours._postprocess(x_0, output_type))


def own_pipeline(pipe: DiffusionPipeline) -> DDPMPipelineCustom:
    """Our pipeline around the network of any DDPM, with a scheduler of its own.

    Raises:
        TypeError: for a pipeline without a `UNet2DModel` and a scheduler.
    """
    if not hasattr(pipe, "unet") or not hasattr(pipe, "scheduler"):
        raise TypeError(f"`pipe` is a {type(pipe).__name__}, but must be a pipeline with a `unet` and a `scheduler`.")
    ours = DDPMPipelineCustom(pipe.unet, DDPMSchedulerCustom.from_config(pipe.scheduler.config))
    options = {"desc": "Steps", "unit": "step", **getattr(pipe, "_progress_bar_config", {})}
    is_shown = not options.pop("disable", False)
    ours.progress_bar = partial(progress, is_shown=is_shown, **options)  # in a log, lines
    return ours


def meet(x_0: Tensor, problem: Problem, clip: bool) -> Tensor:
    """The images, moved so that they explain an exact measurement and, with `clip`, lie in [-1, 1].

    Alternating projections on the two convex sets, of which the true image is a common point.
    """
    A = problem.linear
    if clip:
        x_0 = x_0.clamp(-1, 1)
    for _ in range(MEETING_ROUNDS if clip else 1):
        residual = problem.y - A(x_0)
        if residual.numel() and float(residual.abs().max()) < NEGLIGIBLE:
            break
        x_0 = x_0 + A.pinv(residual)
        if clip:
            x_0 = x_0.clamp(-1, 1)
    return x_0


def _problem(
    measurement: Tensor, operator: Any, noise_std: float, method: str, shape: tuple[int, ...], device: torch.device,
    dtype: torch.dtype,
) -> Problem:  # fmt: skip
    """The measurement and the operator, checked, on the device, in units of images in [-1, 1]."""
    if not isinstance(measurement, Tensor) or not measurement.is_floating_point() or measurement.ndim < 2:
        found = f"a {measurement.dtype} tensor" if isinstance(measurement, Tensor) else type(measurement).__name__
        raise ValueError(f"`measurement` is {found}, but must be a floating-point tensor (B, …) with values in [0, 1].")
    if not measurement.isfinite().all():
        raise ValueError("`measurement` holds NaN or infinity.")
    slack = 6 * noise_std + 0.02  # bicubic kernels overshoot a little, noise by more
    low, high = float(measurement.min()), float(measurement.max())
    y = measurement.to(device, dtype)
    if method == "dps" and callable(operator) and not hasattr(operator, "bind") and not hasattr(operator, "A_adjoint"):
        function: Callable[[Tensor], Tensor] = operator
        return Problem(lambda x: 2 * function((x + 1) / 2) - 1, 2 * y - 1, 2 * noise_std)
    described = as_operator(operator)
    if method == "repaint" and not isinstance(described, Inpaint):
        raise ValueError(
            f"`method` is 'repaint', but serves `Inpaint` only, not {type(described).__name__}: use "
            "'posterior' or 'ddnm'."
        )
    linear = described.bind(shape, device, dtype)
    if tuple(y.shape[1:]) != linear.measurement_shape:
        raise ValueError(
            f"`measurement` has shape {tuple(y.shape[1:])} without the batch, but the operator makes "
            f"{linear.measurement_shape} of the model's images {tuple(shape)} (C, H, W)."
        )
    mask = getattr(linear, "mask", None)
    if mask is not None:
        if len(mask) not in (1, len(y)):
            raise ValueError(f"`mask` is for {len(mask)} images, but there are {len(y)} measurements.")
        y = mask * y
    if not isinstance(described, DeepInverse) and (low < -slack - 0.5 or high > 1.5 + slack):
        raise ValueError(
            f"`measurement` has values from {low:.3g} to {high:.3g}, but must hold images in [0, 1]: divide 8-bit "
            "images by 255."
        )
    ones = torch.ones(1, *shape, device=device, dtype=dtype)
    return Problem(linear, 2 * y - linear(ones), 2 * noise_std)


def _checked_size(size: tuple[int, int] | None, smallest: tuple[int, int]) -> tuple[int, int]:
    if size is None:
        return smallest
    height, width = size
    check_integer("size", height, smallest[0])
    check_integer("size", width, smallest[1])
    return height, width


def _start(latents: Tensor | None, shape: tuple[int, ...], draw: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
    if latents is None:
        return draw(shape)
    if tuple(latents.shape) != shape:
        raise ValueError(f"`latents` have shape {tuple(latents.shape)}, but must have {shape}.")
    return latents


def _check_generators(generator: Generators, batch_size: int) -> None:
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(
            f"`generator` is a list of {len(generator)}, but there are {batch_size} measurements: pass one per image."
        )


def _around_hole(problem: Problem, tile: tuple[int, int]) -> tuple[Problem, Tensor | None]:
    """What was measured in the tiles that see a hole, and the hole, bool (H, W).

    The hole is None, and the problem what it was, if the network has to see the whole image anyway.
    """
    A = problem.forward
    if not isinstance(A, MaskMap) or problem.noise_std > 0 or A.image_shape[1:] == tile:
        return problem, None
    hole = (A.mask == 0).flatten(0, 1).any(0).cpu()
    if not hole.any():
        return problem, None
    mask = A.mask * tiled((hole.shape[0], hole.shape[1]), tile, hole).to(A.mask)
    return Problem(MaskMap(mask, A.image_shape), mask * problem.y, 0.0), hole


def _denoiser(
    pipe: DDPMPipelineCustom,
    labels: Tensor | None,
    guidance_scale: float,
    places: dict[int, Tensor],
    hole: Tensor | None,
) -> Callable[[Tensor, Step], tuple[Tensor, Tensor | float]]:
    """x̂_0 and σ² of a step, by one call of the network."""
    network, scheduler = pipe.unet, pipe.scheduler
    process, variance_type = scheduler.process, scheduler.config.variance_type

    def denoise(x_t: Tensor, step: Step) -> tuple[Tensor, Tensor | float]:
        def predict(x: Tensor, labels: Tensor | None) -> Tensor:
            return pipe._predict(network, x.to(network.dtype), places[step.t], labels, guidance_scale).to(x.dtype)

        output = predict_in_tiles(predict, x_t, labels, image_size(network), hole)
        channels = x_t.shape[1]
        x_0 = scheduler.predict_x_0(output[:, :channels], x_t, step.t)
        if step.is_renewed:
            return x_0, step.variance
        if variance_type in LEARNED_VARIANCE_TYPES:
            return x_0, process.p_log_variance(step.t, step.s, variance_type, output[:, channels:]).exp()
        if variance_type in ("fixed_large", "fixed_large_log") and not step.is_last:
            return x_0, float(process.beta(step.t, step.s))
        return x_0, step.variance

    return denoise


def _steps(
    scheduler: DDPMSchedulerCustom, order: list[tuple[int, int]], eta: float | None, second_order: list[int]
) -> list[Step | None]:
    """The coefficients of every step, as numbers: nothing waits for the device. None for a step back."""
    process, calibration = scheduler.process, _calibration(scheduler)
    before = dict(zip(second_order[1:], second_order[:-1], strict=True))
    made: dict[tuple[int, int], Step | None] = {}
    for t, s in dict.fromkeys(order):
        if s > t:
            made[t, s] = None
            continue
        alpha_bar_t, alpha_bar_s = (float(process.alpha_bar(time)) for time in (t, s))
        if eta is None:  # q(x_s | x_0): the largest variance that leaves x_s its distribution
            c_0, c_t, variance = alpha_bar_s**0.5, 0.0, 1 - alpha_bar_s
        else:
            c_0, c_t, variance = (float(c) for c in process.posterior_coefficients(t, s, eta))
        error = None if calibration is None else float(calibration.x_0_error[t])
        extrapolation = 0.0
        if s >= 0 and t in before:
            now, then, start = (float(process.log_snr(v)) for v in (s, t, before[t]))
            extrapolation = min(0.5 * (now - then) / (then - start), 1.0)
        made[t, s] = Step(t, s, c_0, c_t, variance, alpha_bar_t, alpha_bar_s, error, extrapolation, eta is None)
    return [made[pair] for pair in order]


def _calibration(scheduler: DDPMSchedulerCustom) -> Calibration | None:
    try:
        return scheduler.calibration
    except ValueError:  # none, or one of another process
        return None
