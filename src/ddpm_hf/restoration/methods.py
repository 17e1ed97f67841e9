"""One reverse step t → s that heeds a measurement y = A x_0 + σ_y n, for each method of the literature.

All are functions of (state, step, problem) and return x_s and the x̂_0 that it was made from. Those of `PROJECTING`
correct x̂_0; `mmps`, `dps` and `pigdm` differentiate through the network, for the cost of about two more calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .linear_maps import LinearMap, SpectralMap


@dataclass(frozen=True)
class Problem:
    """What was measured, in units of images in [-1, 1].

    Args:
        forward: A, a `LinearMap`; for `dps` any differentiable function.
        y: the measurement.
        noise_std: σ_y; 0 means that y is exact.
    """

    forward: LinearMap | Callable[[Tensor], Tensor]
    y: Tensor
    noise_std: float

    @property
    def linear(self) -> LinearMap:
        """A, of which all methods but `dps` need the adjoint."""
        if not isinstance(self.forward, LinearMap):
            raise TypeError("the operator is not linear: use method='dps'.")
        return self.forward


@dataclass(frozen=True)
class Step:
    """The reverse step t → s: q_σ(x_s | x_t, x_0) = N(c_0 x_0 + c_t x_t, variance) (Eq. 7; DDIM for eta < 1).

    Args:
        x_0_error: e_t = E‖x_0 - x̂_0‖²/d, measured; None where the model is not calibrated.
        extrapolation: of second-order steps: see `DDPMSchedulerCustom.step`; 0 for those of first order.
        is_renewed: whether c_t is 0, and x_s all new noise around √ᾱ_s x_0.
    """

    t: int
    s: int
    c_0: float
    c_t: float
    variance: float  # eta² β̃, or 1 - ᾱ_s where the noise is renewed
    alpha_bar_t: float
    alpha_bar_s: float
    x_0_error: float | None
    extrapolation: float
    is_renewed: bool = False

    @property
    def is_last(self) -> bool:
        """Whether the step ends at the clean image."""
        return self.s < 0


# x̂_0 of x_t, kept in the range of images, and σ² of the step: (B, C, H, W) where the network learned it.
Denoiser = Callable[[Tensor, Step], tuple[Tensor, Tensor | float]]


@dataclass
class State:
    """Where a trajectory is, and what it draws from."""

    x_t: Tensor
    denoise: Denoiser
    draw: Callable[[tuple[int, ...]], Tensor]  # N(0, I), of a shape, from the generators of the images
    previous_x_0: Tensor | None = None

    def noise(self) -> Tensor:
        """ε ~ N(0, I) of the shape of x_t."""
        return self.draw(tuple(self.x_t.shape))

    def on_the_way(self, x_0: Tensor, step: Step) -> Tensor:
        """x̂_0 where the step's mean is computed: for second order, extrapolated to the middle of the step."""
        if self.previous_x_0 is None or step.extrapolation == 0:
            return x_0
        return x_0 + step.extrapolation * (x_0 - self.previous_x_0)


Method = Callable[[State, Step, Problem], tuple[Tensor, Tensor]]


def posterior(state: State, step: Step, problem: Problem) -> tuple[Tensor, Tensor]:
    """x_0 from a Gaussian approximation of p(x_0 | x_t, y), then x_s from q(x_s | x_t, x_0).

    With p(x_0 | x_t) ≈ N(x̂_0, r² I), p(x_0 | x_t, y) = N(m, S) with K = Aᵀ (A Aᵀ + σ_y²/r²)⁻¹, m = x̂_0 + K (y - A x̂_0)
    and S = r² (I - K A). The approximation is that of ΠGDM (arXiv 2305.04391 calls it so); drawing x_0, rather than
    following a gradient, is that of DAPS (arXiv 2407.01521); r² is measured: e_t of a calibration, or what a learned
    variance says. For data N(μ, c I) both are exact, and so is every x_s, at any number of steps.

    Where nothing was measured, r² = 1 - ᾱ_t weighs y against x̂_0, and nothing is added for the doubt about x_0; for an
    exact y that is DDNM.
    """
    x_0, variance = state.denoise(state.x_t, step)
    if isinstance(variance, Tensor):  # learned: what exceeds β̃ is doubt about x_0
        excess = (variance - step.variance).flatten(1).mean(1) / step.c_0**2
        r2: Tensor | float | None = excess.clamp(1e-8, 1 - step.alpha_bar_t).reshape(-1, 1, 1, 1)
    else:
        r2 = step.x_0_error
    A, sigma = problem.linear, problem.noise_std
    ridge = 0.0 if sigma == 0 else sigma**2 / (1 - step.alpha_bar_t if r2 is None else r2)
    mean = x_0 + A.adjoint(A.solve(problem.y - A(x_0), ridge))
    if step.is_last:
        return mean, mean
    x_s = step.c_0 * state.on_the_way(mean, step) + step.c_t * state.x_t + step.variance**0.5 * state.noise()
    if r2 is not None:
        # A draw from N(0, S): perturb x_0 and y, and let the same formula take back what y knows.
        r = r2**0.5
        doubt = r * state.noise()
        measured = A(doubt)
        if sigma > 0:
            measured = measured + sigma * state.draw(tuple(measured.shape))
        x_s = x_s + step.c_0 * (doubt - A.adjoint(A.solve(measured, ridge)))
    return x_s, mean


def ddnm(state: State, step: Step, problem: Problem) -> tuple[Tensor, Tensor]:
    """DDNM and, for a noisy measurement, DDNM+ (arXiv 2212.00490, Eq. 17-19).

    x̂_0 keeps its null-space part; the rest is A⁺ y. With noise, a component of singular value s is corrected by as
    much as the step's own noise can hide, λ c_0 σ_y/s ≤ σ_t, and gets that much less of it.
    """
    x_0, variance = state.denoise(state.x_t, step)
    A, sigma = problem.linear, problem.noise_std
    residual = problem.y - A(x_0)
    if sigma == 0:
        mean = x_0 + A.pinv(residual)
        if step.is_last:
            return mean, mean
        x_s = step.c_0 * state.on_the_way(mean, step) + step.c_t * state.x_t + _std(variance) * state.noise()
        return x_s, mean
    if not isinstance(A, SpectralMap):
        raise ValueError(
            "`method` 'ddnm' with noise needs the singular values of the operator, which are not known for this one: "
            "use method='posterior', 'diffpir' or 'pigdm'."
        )
    # At the last step there is no noise to hide in: trust y by a step's length of the forward process instead.
    std = torch.as_tensor((1 - step.alpha_bar_t) if step.is_last else variance, dtype=state.x_t.dtype)
    std = std.to(state.x_t.device).sqrt().mean()

    def trust(eigenvalues: Tensor) -> Tensor:
        return (std * eigenvalues.sqrt() / (step.c_0 * sigma)).clamp(max=1)

    def correction(eigenvalues: Tensor) -> Tensor:  # λ A⁺ = Aᵀ (λ / s²)
        return torch.where(eigenvalues > 0, trust(eigenvalues) / eigenvalues.where(eigenvalues > 0, 1), 0)

    def thinner(eigenvalues: Tensor) -> Tensor:  # the noise that y brings along counts as the step's own
        safe = eigenvalues.where(eigenvalues > 0, 1)
        carried = (step.c_0 * trust(eigenvalues) * sigma) ** 2 / safe
        left = (std**2 - carried).clamp(min=0).sqrt()
        return torch.where(eigenvalues > 0, (left - std) / safe, 0)

    mean = x_0 + A.adjoint(A.spectral(residual, correction))
    if step.is_last:
        return mean, mean
    noise = state.noise()
    noise = std * noise + A.adjoint(A.spectral(A(noise), thinner))
    return step.c_0 * state.on_the_way(mean, step) + step.c_t * state.x_t + noise, mean


DIFFPIR_LAMBDA = 8.0  # λ of the paper, which takes 3 to 15
DIFFPIR_ZETA = 0.3  # ζ of the paper: the share of new noise


def diffpir(state: State, step: Step, problem: Problem) -> tuple[Tensor, Tensor]:
    """DiffPIR (arXiv 2305.08995, Algorithm 1): x̂_0 by a proximal step, then noise, of which a share ζ is new.

    argmin ‖y - A x‖² + ρ ‖x - x̂_0‖² with ρ = λ σ_y² max(ᾱ_t/(1 - ᾱ_t), 1). The paper has no maximum; but pixels in
    [-1, 1] vary by at most 1, and without it the inverse of a blur magnifies noise without limit where ᾱ_t is near 0.
    """
    x_0, _ = state.denoise(state.x_t, step)
    A = problem.linear
    rho = DIFFPIR_LAMBDA * problem.noise_std**2 * max(step.alpha_bar_t / (1 - step.alpha_bar_t), 1.0)
    mean = x_0 + A.adjoint(A.solve(problem.y - A(x_0), rho))
    if step.is_last:
        return mean, mean
    eps = (state.x_t - step.alpha_bar_t**0.5 * mean) / (1 - step.alpha_bar_t) ** 0.5
    noise = (1 - DIFFPIR_ZETA) ** 0.5 * eps + DIFFPIR_ZETA**0.5 * state.noise()
    return step.alpha_bar_s**0.5 * state.on_the_way(mean, step) + (1 - step.alpha_bar_s) ** 0.5 * noise, mean


def repaint(state: State, step: Step, problem: Problem) -> tuple[Tensor, Tensor]:
    """RePaint (arXiv 2201.09865, Eq. 8): known pixels are those of y, noised to s; the others come from the model.

    Its resampling, by steps back q(x_t | x_s), is in the order of steps: see `resampling_order`.
    """
    x_0, variance = state.denoise(state.x_t, step)
    A = problem.linear
    if step.is_last:
        mean = x_0 + A.pinv(problem.y - A(x_0))
        return mean, mean
    unknown = step.c_0 * x_0 + step.c_t * state.x_t + _std(variance) * state.noise()
    known = step.alpha_bar_s**0.5 * problem.y + (1 - step.alpha_bar_s) ** 0.5 * state.noise()
    return unknown + A.adjoint(known - A(unknown)), x_0


DPS_SCALE = 1.0  # ζ' of the paper, which takes 0.3 to 1


def dps(state: State, step: Step, problem: Problem) -> tuple[Tensor, Tensor]:
    """DPS (arXiv 2209.14687, Algorithm 1, with the gradient of the norm as in its code): x_s - ζ' ∇ ‖y - A x̂_0(x_t)‖.

    The only method for operators that are not linear.
    """
    with torch.enable_grad():
        x_t = state.x_t.detach().requires_grad_()
        x_0, variance = state.denoise(x_t, step)
        distance = (problem.y - problem.forward(x_0)).flatten(1).norm(dim=1)
        (gradient,) = torch.autograd.grad(distance.sum(), x_t)
    x_0 = x_0.detach()
    if step.is_last:
        return x_0 - DPS_SCALE * gradient, x_0
    if isinstance(variance, Tensor):
        variance = variance.detach()
    x_s = step.c_0 * x_0 + step.c_t * state.x_t + _std(variance) * state.noise()
    return x_s - DPS_SCALE * gradient, x_0


def pigdm(state: State, step: Step, problem: Problem) -> tuple[Tensor, Tensor]:
    """ΠGDM (Song et al., ICLR 2023, Algorithm 1): r² (∂x̂_0/∂x_t)ᵀ Aᵀ (r² A Aᵀ + σ_y²)⁻¹ (y - A x̂_0) is added.

    With r² = 1 - ᾱ_t, as there; scaled by √ᾱ_t.
    """
    A, r2 = problem.linear, 1 - step.alpha_bar_t
    with torch.enable_grad():
        x_t = state.x_t.detach().requires_grad_()
        x_0, variance = state.denoise(x_t, step)
        ridge = problem.noise_std**2 / r2
        with torch.no_grad():
            pull = A.adjoint(A.solve(problem.y - A(x_0), ridge))
        (guidance,) = torch.autograd.grad((pull * x_0).sum(), x_t)
    x_0 = x_0.detach()
    guidance = step.alpha_bar_t**0.5 * guidance
    if step.is_last:
        mean = x_0 + A.adjoint(A.solve(problem.y - A(x_0), ridge))
        return mean, mean
    if isinstance(variance, Tensor):
        variance = variance.detach()
    return step.c_0 * x_0 + step.c_t * state.x_t + _std(variance) * state.noise() + guidance, x_0


MMPS_ITERATIONS = 3  # of conjugate gradients: each differentiates once through the network's last call


def mmps(state: State, step: Step, problem: Problem) -> tuple[Tensor, Tensor]:
    """Moment matching posterior sampling (arXiv 2405.13712, Algorithm 3): x̂_0 with the measurement, E[x_0 | x_t, y].

    p(x_0 | x_t) ≈ N(x̂_0, V) with its true covariance, V = (1 - ᾱ_t)/√ᾱ_t ∂x̂_0/∂x_t (Tweedie's formula of second
    order), which knows how pixels hang together. Then m = x̂_0 + V Aᵀ (A V Aᵀ + σ_y²)⁻¹ (y - A x̂_0), by conjugate
    gradients, and x_s from q(x_s | x_t, x_0 = m). For Gaussian data m is exact. With eta = 0 this is the ODE of the
    posterior, whose second-order steps draw from it; with noise, x_s lacks the doubt about x_0, the more the more of
    the noise is new, and results gather around the posterior's mean.
    """
    A, sigma = problem.linear, problem.noise_std
    with torch.enable_grad():
        x_t = state.x_t.detach().requires_grad_()
        x_0, variance = state.denoise(x_t, step)
    scale = (1 - step.alpha_bar_t) / step.alpha_bar_t**0.5

    def covariance(v: Tensor) -> Tensor:
        return scale * torch.autograd.grad(x_0, x_t, v, retain_graph=True)[0]

    mean = x_0.detach()
    residual = problem.y - A(mean)
    direction, energy = residual, _dot(residual, residual)
    best, least = mean, energy  # a network's V is not quite symmetric, nor positive: conjugate gradients may diverge
    for _ in range(MMPS_ITERATIONS):
        image = covariance(A.adjoint(direction))
        change = A(image) + sigma**2 * direction
        curvature = _dot(direction, change)
        is_sound = (curvature > 1e-12) & (energy > 1e-12)
        length = torch.where(is_sound, energy / curvature.where(is_sound, 1), 0)
        mean = mean + _for_each(length, image) * image
        residual = residual - _for_each(length, change) * change
        renewed = _dot(residual, residual)
        share = torch.where(is_sound, renewed / energy.where(is_sound, 1), 0)
        direction = residual + _for_each(share, direction) * direction
        energy = renewed
        best, least = torch.where(_for_each(energy < least, mean), mean, best), torch.minimum(energy, least)
    mean = best
    if step.is_last:
        if sigma == 0:
            mean = mean + A.pinv(problem.y - A(mean))
        return mean, mean
    if isinstance(variance, Tensor):
        variance = variance.detach()
    return step.c_0 * state.on_the_way(mean, step) + step.c_t * state.x_t + _std(variance) * state.noise(), mean


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The scalar product of each image, (B,)."""
    return (a * b).flatten(1).sum(1)


def _for_each(numbers: Tensor, like: Tensor) -> Tensor:
    """One number for each image, (B,), as a factor of a tensor (B, …)."""
    return numbers.reshape(-1, *(1,) * (like.ndim - 1))


METHODS: dict[str, Method] = {
    "mmps": mmps, "posterior": posterior, "ddnm": ddnm, "diffpir": diffpir, "repaint": repaint, "dps": dps,
    "pigdm": pigdm,
}  # fmt: skip
RENEWING = ("mmps", "ddnm")  # those that by default draw all noise anew at every step
PROJECTING = ("mmps", "posterior", "ddnm", "diffpir")  # those whose x̂_0 explains y, so that second order makes sense


def _std(variance: Tensor | float) -> Any:
    return variance**0.5


def resampling_order(timesteps: list[int], jump_length: int, num_resamples: int) -> list[tuple[int, int]]:
    """The steps of RePaint (arXiv 2201.09865, Appendix B): pairs (t, s), with s > t for a step back.

    After every `jump_length` steps down, the same number of steps back up at once, `num_resamples` - 1 times.
    """
    ends = [*timesteps, -1]
    order: list[tuple[int, int]] = []
    for start in range(0, len(timesteps), jump_length):
        part = ends[start : start + jump_length + 1]
        down = list(itertools.pairwise(part))
        for repeat in range(num_resamples):
            order += down
            if part[-1] < 0:  # the clean image is not noised again
                break
            if repeat < num_resamples - 1:
                order.append((part[-1], part[0]))
    return order
