"""The mathematics of DDPM: Ho, Jain, Abbeel (2020), "Denoising Diffusion Probabilistic Models", arXiv 2006.11239.

One file, to be read beside the paper and copied into saved models. Pure torch, no network and no sampling loop: each
public function is one equation, named as in the paper (`q_*` for the fixed forward
kernels, `p_*` for the learned reverse ones).

**Index convention.** `t` runs over 0 … T-1 and means "after t + 1 steps of noise", so `t` here is the paper's t + 1.
The clean data is `t = -1`, where ᾱ = 1. Any earlier time of a pair is called `s`, with -1 ≤ s < t.

**Precision.** Tables are float64 and gathered before they are cast. Arithmetic on images never runs below float32, and
the result comes back in the dtype of the first image argument.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]
PredictionType = Literal["epsilon", "sample", "v_prediction"]
VarianceType = Literal[
    "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range", "optimal"
]
Timestep = int | Tensor  # an int, or an integer tensor of shape () or (B,)

BETA_SCHEDULES: tuple[str, ...] = get_args(BetaSchedule)
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)
VARIANCE_TYPES: tuple[str, ...] = get_args(VarianceType)
LEARNED_VARIANCE_TYPES = ("learned", "learned_range")
MAX_TIMESTEPS = 100_000  # a configuration from elsewhere must not fill the memory


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise a ValueError that names the option, the value found and the values allowed."""
    if value not in allowed:
        raise ValueError(f"`{name}` is {value!r}, but must be one of {', '.join(map(repr, allowed))}.")


def check_integer(name: str, value: Any, lowest: int, highest: int | None = None) -> None:
    """Raise a ValueError that names the option and the value unless it is an integer from lowest to highest."""
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_integer or value < lowest or (highest is not None and value > highest):
        allowed = f"of at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise ValueError(f"`{name}` is {value!r}, but must be an integer {allowed}.")


def check_number(name: str, value: Any, allowed: str, is_allowed: Callable[[float], bool]) -> None:
    """Raise a ValueError that names the option, the value and what is allowed unless it is such a number."""
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not is_allowed(value):
        raise ValueError(f"`{name}` is {value!r}, but must be {allowed}.")


# ---------------------------------------------------------------------------------------------------------------------
# β schedules
# ---------------------------------------------------------------------------------------------------------------------


def make_betas(
    schedule: BetaSchedule = "linear",
    num_train_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
) -> Tensor:
    """β_1 … β_T of a named schedule, float64 of shape (T,), each in (0, 1).

    - `linear`: the paper's Section 4, from `beta_start` to `beta_end`.
    - `scaled_linear`: linear in sqrt(β) (latent diffusion, arXiv 2112.10752).
    - `squaredcos_cap_v2`: ᾱ(u) = cos²((u + 0.008) / 1.008 · π/2), β capped at 0.999 (arXiv 2102.09672, Eq. 17).
    - `sigmoid`: a logistic curve between `beta_start` and `beta_end` (GeoDiff, arXiv 2203.02923).
    - `laplace`: log-SNR follows a Laplace distribution (arXiv 2407.03297), as parametrised in diffusers.

    Raises:
        ValueError: for an unknown schedule, T < 1, or betas outside (0, 1).
    """
    check_choice("beta_schedule", schedule, BETA_SCHEDULES)
    check_integer("num_train_timesteps", num_train_timesteps, 1, MAX_TIMESTEPS)
    if schedule in ("squaredcos_cap_v2", "laplace"):
        alpha_bar = _cosine_alpha_bar if schedule == "squaredcos_cap_v2" else _laplace_alpha_bar
        times = [i / num_train_timesteps for i in range(num_train_timesteps + 1)]
        pairs = itertools.pairwise(times)
        return torch.tensor([min(1 - alpha_bar(v) / alpha_bar(u), 0.999) for u, v in pairs], dtype=torch.float64)

    for name, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
        check_number(
            name,
            beta,
            "a number strictly between 0 and 1, the variance of the noise that one forward step adds (the paper uses "
            "beta_start=0.0001 and beta_end=0.02)",
            lambda b: 0 < b < 1,
        )
    if beta_start > beta_end:
        raise ValueError(
            f"`beta_start` is {beta_start} and `beta_end` is {beta_end}, but beta_start must not exceed beta_end: "
            "swap them."
        )
    if schedule == "linear":
        return torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64) ** 2
    logits = torch.linspace(-6, 6, num_train_timesteps, dtype=torch.float64)
    return torch.sigmoid(logits) * (beta_end - beta_start) + beta_start


def _cosine_alpha_bar(u: float) -> float:
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace_alpha_bar(u: float) -> float:
    log_snr = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6)
    snr = math.exp(log_snr)
    return math.sqrt(snr / (1 + snr))


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(ᾱ_t) so that ᾱ_T = 0 and ᾱ_1 is kept (arXiv 2305.08891, Algorithm 1).

    Args:
        betas: shape (T,) with T ≥ 2, each in (0, 1).

    Returns:
        float64 of shape (T,); the last β is exactly 1.

    Raises:
        ValueError: for T < 2, where the first step is the last one.
    """
    if len(betas) < 2:
        raise ValueError(
            f"`rescale_betas_zero_snr` needs at least 2 timesteps, not {len(betas)}: raise num_train_timesteps."
        )
    sqrt_alpha_bar = torch.cumprod(1 - betas.double(), dim=0).sqrt()
    first, last = sqrt_alpha_bar[0].clone(), sqrt_alpha_bar[-1].clone()
    alpha_bar = ((sqrt_alpha_bar - last) * first / (first - last)) ** 2
    rescaled = 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    rescaled[0] = betas[0]
    return rescaled


# ---------------------------------------------------------------------------------------------------------------------
# The process
# ---------------------------------------------------------------------------------------------------------------------


class Gaussian(NamedTuple):
    """A diagonal Gaussian. `mean` has the shape of the images; the others broadcast against it."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor  # finite even where the variance is 0: see `DDPMProcess.q_posterior`


class PMeanVariance(NamedTuple):
    """p_θ(x_s | x_t) and the x̂_0 that it was computed from."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_x_0: Tensor


class DDPMProcess:
    """The forward process of given betas and everything that follows from it in closed form.

    Wherever `t` (or `s`) is an argument it is an int or an integer tensor of shape () or (B,), one time per image.
    Images have shape (B, *) and any floating dtype. Values of `t` that lie on a GPU are not inspected, so nothing here
    waits for one.

    Args:
        betas: β_1 … β_T, shape (T,), each in (0, 1). The last one may be exactly 1 (zero terminal SNR).

    Raises:
        ValueError: for betas that are no such sequence.
    """

    def __init__(self, betas: Tensor | np.ndarray | Sequence[float]) -> None:
        self.betas = torch.as_tensor(np.asarray(betas), dtype=torch.float64).clone()
        if self.betas.ndim != 1 or len(self.betas) < 1:
            raise ValueError(
                f"betas have shape {tuple(self.betas.shape)}, but must be a sequence of at least one number."
            )
        wrong = ~((self.betas > 0) & (self.betas < 1))
        wrong[-1] &= self.betas[-1] != 1
        if wrong.any():
            i = int(wrong.nonzero()[0])
            raise ValueError(
                f"betas[{i}] is {float(self.betas[i])}, but every beta must lie strictly between 0 and 1 (the last one "
                "may be 1, for zero terminal SNR)."
            )
        self.alphas = 1 - self.betas
        # Where ᾱ_T = 0, x_T is pure noise, and x_0 does not follow from ε.
        self.has_zero_terminal_snr = bool(self.betas[-1] == 1)
        # log ᾱ keeps 1 - ᾱ_t and 1 - ᾱ_t/ᾱ_s accurate to the last digit, by expm1, where subtraction would cancel.
        log_alpha_bar = torch.cumsum(torch.log1p(-self.betas), dim=0)
        self.alphas_cumprod = log_alpha_bar.exp()
        # Row t + 1 holds log ᾱ_t, sqrt(ᾱ_t) and sqrt(1 - ᾱ_t), so that t = -1 (clean data, ᾱ = 1) is an ordinary row.
        log_alpha_bar = torch.cat([log_alpha_bar.new_zeros(1), log_alpha_bar])
        table = torch.stack([log_alpha_bar, (log_alpha_bar / 2).exp(), (-torch.expm1(log_alpha_bar)).sqrt()], dim=1)
        self._tables = {(table.device, table.dtype): table}
        # log β̃ of the chain's second step, which stands in for log 0 at its last step (as in the paper's own code).
        self._log_variance_at_data = float(self._beta_tilde(1, 0).log() if len(self.betas) > 1 else self.betas[0].log())

    def on_trajectory(self, timesteps: Tensor) -> DDPMProcess:
        """The process for a reverse chain that visits only some timesteps, descending.

        The same at every t, but for log σ² of `fixed_small` at the chain's last step, where β̃ is 0: it is log β̃ of the
        step before, of that chain.
        """
        chain = copy.copy(self)
        ends = timesteps.tolist()[-2:]
        log_variance = chain._beta_tilde(*ends).log() if len(ends) == 2 else chain.beta(ends[0], -1).log()
        chain._log_variance_at_data = float(log_variance)
        return chain

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return len(self.betas)

    # --- coefficients: float64, of the shape of t, on the device of t -----------------------------------------------

    def _row(self, t: Timestep, first: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        """Log ᾱ_t, sqrt(ᾱ_t) and sqrt(1 - ᾱ_t) for first ≤ t < T, of the shape of t and a last axis of 3."""
        t = as_timesteps(t)
        if t.device.type == "mps":  # Metal has no float64
            t = t.cpu()
        check_timesteps(t, len(self.betas), first)
        key = (t.device, dtype)
        if key not in self._tables:
            with torch.inference_mode(False):  # a cached table is used outside of it, too
                self._tables[key] = self._tables[torch.device("cpu"), torch.float64].to(*key)
        # Not table[t + 1], which reads a single t from the device.
        return self._tables[key].index_select(0, (t + 1).reshape(-1)).reshape(*t.shape, 3)

    def _log_alpha_bar(self, t: Timestep, first: int = 0) -> Tensor:
        return self._row(t, first)[..., 0]

    def _signal_noise(self, t: Timestep, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """sqrt(ᾱ_t) and sqrt(1 - ᾱ_t), in the dtype of the arithmetic that follows, from tables cast once."""
        _, signal, noise = self._row(t, dtype=dtype).unbind(-1)
        return signal, noise

    def _pair(self, t: Timestep, s: Timestep | None) -> tuple[Tensor, Tensor]:
        """Log ᾱ_t and log ᾱ_s, for s < t (s = t - 1 where it is not given)."""
        t = as_timesteps(t)
        s = t - 1 if s is None else as_timesteps(s).to(t.device)
        if _is_readable(t) and (s >= t).any():
            raise ValueError(f"s = {s.tolist()} must be earlier than t = {t.tolist()} for every image.")
        return self._log_alpha_bar(t), self._log_alpha_bar(s, first=-1)

    def alpha_bar(self, t: Timestep) -> Tensor:
        """ᾱ_t = Π (1 - β) (notation above Eq. 4); 1 at t = -1. float64 of the shape of t."""
        return self._log_alpha_bar(t, first=-1).exp()

    def one_minus_alpha_bar(self, t: Timestep) -> Tensor:
        """1 - ᾱ_t, the variance of q(x_t|x_0) (Eq. 4), without cancellation. float64 of the shape of t."""
        return -torch.expm1(self._log_alpha_bar(t))

    def snr(self, t: Timestep) -> Tensor:
        """Signal-to-noise ratio ᾱ_t / (1 - ᾱ_t). float64 of the shape of t."""
        return self.alpha_bar(t) / self.one_minus_alpha_bar(t)

    def log_snr(self, t: Timestep) -> Tensor:
        """log(ᾱ_t / (1 - ᾱ_t)), in nats. float64 of the shape of t."""
        return self._log_alpha_bar(t) - self.one_minus_alpha_bar(t).log()

    def beta(self, t: Timestep, s: Timestep | None = None) -> Tensor:
        """β_{t|s} = 1 - ᾱ_t/ᾱ_s, the noise added between s and t; β_t where s = t - 1. float64 of the shape of t."""
        log_t, log_s = self._pair(t, s)
        return -torch.expm1(log_t - log_s)

    def _beta_tilde(self, t: Timestep, s: Timestep | None = None) -> Tensor:
        """β̃_{t|s} = (1 - ᾱ_s)/(1 - ᾱ_t) β_{t|s} (Eq. 7)."""
        log_t, log_s = self._pair(t, s)
        return torch.expm1(log_s) / torch.expm1(log_t) * -torch.expm1(log_t - log_s)

    def posterior_coefficients(
        self, t: Timestep, s: Timestep | None = None, eta: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """c_0, c_t and σ² of q_σ(x_s | x_t, x_0) = N(c_0 x_0 + c_t x_t, σ² I) (Eq. 7 for any pair s < t).

        `eta` = 1 is the posterior of the forward process, Eq. 6-7. In general σ² = eta² β̃ and the mean points the
        remaining variance along ε, which leaves q(x_s|x_0) unchanged (DDIM, arXiv 2010.02502, Eq. 7 and 16).

        Returns:
            Three float64 tensors of the shape of t.
        """
        log_t, log_s = self._pair(t, s)
        variance = eta**2 * self._beta_tilde(t, s)
        if eta == 1:
            scale = torch.exp((log_t - log_s) / 2) * torch.expm1(log_s) / torch.expm1(log_t)
            return torch.exp(log_s / 2) * torch.expm1(log_t - log_s) / torch.expm1(log_t), scale, variance
        scale = torch.sqrt((-torch.expm1(log_s) - variance) / -torch.expm1(log_t))
        return torch.exp(log_s / 2) - scale * torch.exp(log_t / 2), scale, variance

    def optimal_variance(
        self, x_0_error: Tensor | float, t: Timestep, s: Timestep | None = None, eta: float = 1.0
    ) -> Tensor:
        """σ*² = eta² β̃ + c_0² e_t, which maximises the likelihood of p(x_s | x_t) = N(·, σ² I) (arXiv 2201.06503).

        That is Theorem 1 there, in terms of x̂_0, so that it holds for a network's own mean, clipped or not: x_s is
        uncertain by the posterior's variance, and by what x̂_0 leaves unknown of x_0. For the best ε̂,
        e_t = (1 - ᾱ_t)/ᾱ_t (1 - Γ_t). It is not 0 for `eta` = 0 (DDIM).

        Args:
            x_0_error: e_t = E‖x_0 - x̂_0‖²/d, float64 of the shape of t.

        Returns:
            float64 of the shape of t. At s = -1 it is e_t.
        """
        c_0, _, variance = self.posterior_coefficients(t, s, eta)
        return variance + c_0.square() * x_0_error

    def x_0_coefficients(self, t: Timestep, prediction_type: PredictionType = "epsilon") -> tuple[Tensor, Tensor]:
        """a, b of x̂_0 = a x_t + b · output (Eq. 15 for `epsilon`; arXiv 2202.00512, Appendix D, for `v_prediction`)."""
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        a, b = self._signal_noise(t)
        if prediction_type == "sample":
            return torch.zeros_like(a), torch.ones_like(a)
        if prediction_type == "v_prediction":
            return a, -b
        return 1 / a, -b / a

    # --- the forward process q --------------------------------------------------------------------------------------

    def q_mean_variance(self, x_0: Tensor, t: Timestep) -> Gaussian:
        """q(x_t | x_0) = N(sqrt(ᾱ_t) x_0, (1 - ᾱ_t) I) (Eq. 4)."""
        variance = self.one_minus_alpha_bar(t)
        return Gaussian(
            _like(x_0, self.alpha_bar(t).sqrt(), x_0), _broadcast(variance, x_0), _broadcast(variance.log(), x_0)
        )

    def q_sample(self, x_0: Tensor, t: Timestep, noise: Tensor) -> Tensor:
        """A draw from q(x_t | x_0): sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε (Eq. 4), for ε = `noise` of the shape of x_0."""
        a, b = self._signal_noise(t, _compute_dtype(x_0))
        return _like(x_0, a, x_0, b, noise)

    def q_step_mean_variance(self, x_prev: Tensor, t: Timestep, s: Timestep | None = None) -> Gaussian:
        """q(x_t | x_s) = N(sqrt(1 - β_{t|s}) x_s, β_{t|s} I); Eq. 2 where s = t - 1."""
        log_t, log_s = self._pair(t, s)
        variance = -torch.expm1(log_t - log_s)
        mean = _like(x_prev, torch.exp((log_t - log_s) / 2), x_prev)
        return Gaussian(mean, _broadcast(variance, x_prev), _broadcast(variance.log(), x_prev))

    def q_step(self, x_prev: Tensor, t: Timestep, noise: Tensor, s: Timestep | None = None) -> Tensor:
        """A draw from q(x_t | x_s): sqrt(1 - β_{t|s}) x_s + sqrt(β_{t|s}) ε; Eq. 2 where s = t - 1."""
        log_t, log_s = self._pair(t, s)
        return _like(x_prev, torch.exp((log_t - log_s) / 2), x_prev, (-torch.expm1(log_t - log_s)).sqrt(), noise)

    def q_posterior(self, x_0: Tensor, x_t: Tensor, t: Timestep, s: Timestep | None = None) -> Gaussian:
        """q(x_s | x_t, x_0) (Eq. 6-7, for any pair s < t).

        At s = -1 it is a point mass: the variance is 0. Its `log_variance`, which a likelihood needs finite, is then
        log β̃ of the chain's second step, as in the paper's code.
        """
        c_0, c_t, variance = self.posterior_coefficients(t, s)
        return Gaussian(
            _like(x_0, c_0, x_0, c_t, x_t),
            _broadcast(variance, x_0),
            _broadcast(self._clipped_log(variance), x_0),
        )

    def _clipped_log(self, variance: Tensor) -> Tensor:
        return torch.where(variance > 0, variance, math.exp(self._log_variance_at_data)).log()

    # --- what a network predicts ------------------------------------------------------------------------------------

    def velocity(self, x_0: Tensor, noise: Tensor, t: Timestep) -> Tensor:
        """V = sqrt(ᾱ_t) ε - sqrt(1 - ᾱ_t) x_0 (arXiv 2202.00512, Appendix D)."""
        a, b = self._signal_noise(t, _compute_dtype(x_0))
        return _like(x_0, -b, x_0, a, noise)

    def predict_x0(
        self, output: Tensor, x_t: Tensor, t: Timestep, prediction_type: PredictionType = "epsilon"
    ) -> Tensor:
        """x̂_0 from a prediction of any type (Eq. 15 for `epsilon`). Not finite for `epsilon` where ᾱ_t = 0."""
        a, b = self.x_0_coefficients(t, prediction_type)
        return _like(x_t, a, x_t, b, output)

    def predict_eps(
        self, output: Tensor, x_t: Tensor, t: Timestep, prediction_type: PredictionType = "epsilon"
    ) -> Tensor:
        """ε̂ from a prediction of any type: the inverse of Eq. 15 for `sample`."""
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        if prediction_type == "epsilon":
            return output.to(x_t.dtype)
        a, b = self._signal_noise(t)
        if prediction_type == "sample":
            return _like(x_t, 1 / b, x_t, -a / b, output)
        return _like(x_t, b, x_t, a, output)

    # --- the reverse process p --------------------------------------------------------------------------------------

    def p_log_variance(
        self,
        t: Timestep,
        s: Timestep | None = None,
        variance_type: VarianceType = "fixed_small",
        raw_variance: Tensor | None = None,
        x_0_error: Tensor | float | None = None,
    ) -> Tensor:
        """Log σ² of p_θ(x_s | x_t), in nats; always finite (see `q_posterior` for s = -1).

        - `fixed_small`, `fixed_small_log`: log β̃_{t|s}; `fixed_large`, `fixed_large_log`: log β_{t|s} (Section 3.2).
          The suffix `_log` is diffusers' and changes nothing: σ² is σ².
        - `learned`: the network's own log σ². `learned_range`: log σ² = w log β_{t|s} + (1 - w) log β̃_{t|s} with
          w = (raw + 1)/2 (arXiv 2102.09672, Eq. 15).
        - `optimal`: that of `optimal_variance`.

        Args:
            raw_variance: the network's second half of the channels, for the learned types only.
            x_0_error: e_t, float64 of the shape of t, for `optimal` only.

        Returns:
            float64 of the shape of t for the fixed types, of the shape of `raw_variance` (float32 at least) else.
        """
        check_choice("variance_type", variance_type, VARIANCE_TYPES)
        if variance_type in ("fixed_large", "fixed_large_log"):
            return self.beta(t, s).log()
        if variance_type in ("fixed_small", "fixed_small_log"):
            return self._clipped_log(self._beta_tilde(t, s))
        if variance_type == "optimal":
            if x_0_error is None:
                raise ValueError("`variance_type` is 'optimal', which needs the error of x̂_0: pass `x_0_error`.")
            return self._clipped_log(self.optimal_variance(x_0_error, t, s))
        if raw_variance is None:
            raise ValueError(
                f"`variance_type` is {variance_type!r}, but the network predicts no variance: it needs twice as many "
                "output channels as input channels."
            )
        raw = raw_variance.to(_compute_dtype(raw_variance))
        if variance_type == "learned":
            return raw
        low = _broadcast(self._clipped_log(self._beta_tilde(t, s)), raw)
        high = _broadcast(self.beta(t, s).log(), raw)
        return low + (raw + 1) / 2 * (high - low)

    def p_mean_variance(
        self,
        model_output: Tensor,
        x_t: Tensor,
        t: Timestep,
        s: Timestep | None = None,
        *,
        prediction_type: PredictionType = "epsilon",
        variance_type: VarianceType = "fixed_small",
        x_0_error: Tensor | float | None = None,
        clip: Callable[[Tensor], Tensor] | None = None,
    ) -> PMeanVariance:
        """p_θ(x_s | x_t) = N(μ_θ, σ² I): the posterior of Eq. 7 at x̂_0 (Eq. 11 where s = t - 1 and output is ε).

        Args:
            model_output: (B, C, *) or, for the learned variances, (B, 2C, *) with the variance in the second half.
            x_0_error: e_t of each image's t, for the variance `optimal`.
            clip: applied to x̂_0 before the mean is computed from it, e.g. `lambda x: x.clamp(-1, 1)`.

        Returns:
            mean and pred_x_0 of the shape and dtype of x_t; variance and log_variance that broadcast against it.
            Of `fixed_small` at s = -1 the variance is 0 and the log_variance finite (see `q_posterior`).
        """
        output, raw_variance = split_model_output(model_output, x_t, variance_type)
        # The whole chain x̂_0 → clip → mean runs in the arithmetic dtype and is cast once, at the end.
        x = x_t.to(_compute_dtype(x_t))
        pred_x_0 = self.predict_x0(output, x, t, prediction_type)
        if clip is not None:
            pred_x_0 = clip(pred_x_0)
        c_0, c_t, posterior_variance = self.posterior_coefficients(t, s)
        log_variance = self.p_log_variance(t, s, variance_type, raw_variance, x_0_error)
        is_posterior = variance_type in ("fixed_small", "fixed_small_log")
        variance = posterior_variance if is_posterior else log_variance.exp()
        if raw_variance is None:
            variance, log_variance = _broadcast(variance, x), _broadcast(log_variance, x)
        mean = _like(x, c_0, pred_x_0, c_t, x)
        return PMeanVariance(mean.to(x_t.dtype), variance, log_variance, pred_x_0.to(x_t.dtype))

    # --- the bound (Eq. 5), in bits/dim: nats / ln 2, averaged over everything but the batch ------------------------

    def L_T(self, x_0: Tensor, t: int | None = None) -> Tensor:
        """KL(q(x_T|x_0) ‖ N(0, I)) (Eq. 5), bits/dim of shape (B,), float32 at least.

        Args:
            t: where the reverse chain starts; by default T - 1.
        """
        alpha_bar = float(self.alpha_bar(len(self.betas) - 1 if t is None else t))
        second_moment = x_0.to(_exact_dtype(x_0)).square().flatten(1).mean(1)
        # Only a float64 constant can hold the difference of the nearly equal terms -ᾱ and log(1 - ᾱ).
        nats = 0.5 * (-alpha_bar - math.log1p(-alpha_bar) + alpha_bar * second_moment)
        return (nats / math.log(2)).to(_compute_dtype(x_0))

    def L_t_minus_1(
        self, x_0: Tensor, x_t: Tensor, t: Timestep, p: Gaussian | PMeanVariance, s: Timestep | None = None
    ) -> Tensor:
        """KL(q(x_s|x_t,x_0) ‖ p_θ(x_s|x_t)) (Eq. 5) for s ≥ 0, bits/dim of shape (B,), float32 at least.

        Args:
            p: the reverse step, from `p_mean_variance` at the same x_t, t and s. Let x_t be float32 at least: a mean
                that is rounded to half precision is a different mean, and the KL says so.
        """
        dtype = _exact_dtype(x_0)
        q = self.q_posterior(x_0.to(dtype), x_t.to(dtype), t, s)
        nats = normal_kl(q.mean, q.log_variance, p.mean.to(dtype), p.log_variance.to(dtype))
        return (nats.flatten(1).mean(1) / math.log(2)).to(_compute_dtype(x_0))

    def L_0(self, x_0: Tensor, p: Gaussian | PMeanVariance, num_levels: int = 256) -> Tensor:
        """-log p_θ(x_0 | x_1) of the discretised decoder (Eq. 13), bits/dim of shape (B,), float32 at least.

        Args:
            x_0: images on the grid of `num_levels` equally spaced values from -1 to 1.
            p: the last reverse step, from `p_mean_variance` at t = 0. For `fixed_large` its σ² is β_1, as in the
                paper's text; the paper's code uses β̃_2 there, which is what `fixed_small` gives.
        """
        check_integer("num_levels", num_levels, 2)
        nats = -discretized_gaussian_log_likelihood(x_0, p.mean, p.log_variance, num_levels)
        return (nats.flatten(1).mean(1) / math.log(2)).to(_compute_dtype(x_0))


# ---------------------------------------------------------------------------------------------------------------------
# Gaussians
# ---------------------------------------------------------------------------------------------------------------------


def normal_kl(mean_1: Tensor, log_variance_1: Tensor, mean_2: Tensor, log_variance_2: Tensor) -> Tensor:
    """KL(N(mean_1, e^log_variance_1) ‖ N(mean_2, e^log_variance_2)) per element, in nats; arguments broadcast."""
    difference = log_variance_1 - log_variance_2
    return 0.5 * (torch.expm1(difference) - difference + (mean_1 - mean_2).square() * torch.exp(-log_variance_2))


def discretized_gaussian_log_likelihood(
    x_0: Tensor, mean: Tensor, log_variance: Tensor, num_levels: int = 256
) -> Tensor:
    """Log of the Gaussian's mass in the bin of each pixel (Eq. 13), in nats, of the shape of x_0.

    The bins have width 2/(num_levels - 1) and are centred on the grid from -1 to 1; the outermost two reach to
    infinity. The mass is exact, also far out in the tails, where a difference of two CDFs would be 0.
    Arithmetic is float64 (float32 where the device has none).
    """
    dtype = _exact_dtype(x_0)
    x, half_bin = x_0.to(dtype), 1 / (num_levels - 1)
    inverse_std = torch.exp(-0.5 * log_variance.to(dtype))
    centred = x - mean.to(dtype)
    upper = torch.where(x > 1 - half_bin, math.inf, (centred + half_bin) * inverse_std)
    lower = torch.where(x < -1 + half_bin, -math.inf, (centred - half_bin) * inverse_std)
    # Φ(u) - Φ(l) = Φ(-l) - Φ(-u): take the tail in which both are small, so that the logarithms keep their digits.
    flip = lower > 0
    lower, upper = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return log_upper + torch.log(-torch.expm1(log_lower - log_upper))


# ---------------------------------------------------------------------------------------------------------------------
# Shapes and dtypes
# ---------------------------------------------------------------------------------------------------------------------


def split_model_output(model_output: Tensor, x_t: Tensor, variance_type: str) -> tuple[Tensor, Tensor | None]:
    """The prediction (B, C, *) and, for the learned variances, the raw variance (B, C, *) of a network's output.

    Raises:
        ValueError: where the output's shape does not fit x_t and the variance type.
    """
    learned = variance_type in LEARNED_VARIANCE_TYPES
    if not learned and model_output.shape == x_t.shape:
        return model_output, None
    channels = x_t.shape[1]
    expected = (x_t.shape[0], channels * (2 if learned else 1), *x_t.shape[2:])
    if tuple(model_output.shape) != expected:
        raise ValueError(
            f"the model output has shape {tuple(model_output.shape)}, but `variance_type` {variance_type!r} and x_t of "
            f"shape {tuple(x_t.shape)} need {expected}."
        )
    prediction, raw_variance = model_output.split(channels, dim=1)
    return prediction, raw_variance


def as_timesteps(t: Timestep) -> Tensor:
    """Timesteps as int64: narrower integers would overflow in arithmetic, and uint8 would index as a mask."""
    if not isinstance(t, Tensor):
        t = torch.tensor(t)
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        raise TypeError(f"timesteps have dtype {t.dtype}, but must be integers.")
    return t.long()


def check_timesteps(t: Tensor, num_train_timesteps: int, first: int = 0) -> None:
    """Raise a ValueError unless first ≤ t < T; values on a GPU are not inspected."""
    if t.numel() == 0 or not _is_readable(t):
        return
    lowest, highest = map(int, t.aminmax())
    if lowest < first or highest >= num_train_timesteps:
        wrong = lowest if lowest < first else highest
        raise ValueError(
            f"timestep {wrong} is out of range: it must lie between {first} and {num_train_timesteps - 1}."
        )


def _is_readable(t: Tensor) -> bool:
    """Whether the values of t can be looked at without waiting for a GPU or breaking a graph."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of arithmetic on x: its own, but never below float32."""
    if not x.is_floating_point():
        raise TypeError(f"images have dtype {x.dtype}, but must be floating point, scaled to [-1, 1].")
    return torch.promote_types(x.dtype, torch.float32)


def _exact_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the likelihood terms: float64, or float32 on Metal, which has no float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. The CPU waits for the copy, unless it goes to CUDA, through pinned memory.

    Elsewhere, a copy that nobody waits for may read what the CPU has overwritten, or be read before it is there.
    """
    if device.type == "cuda" and x.device.type == "cpu" and not torch.compiler.is_compiling():
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def _broadcast(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient of shape () or (B,), as one that multiplies x of shape (B, *)."""
    if coefficient.ndim > 1 or (coefficient.ndim == 1 and coefficient.shape[0] not in (1, x.shape[0])):
        raise ValueError(
            f"timesteps have shape {tuple(coefficient.shape)}, but images of shape {tuple(x.shape)} need one timestep "
            f"for all, or {x.shape[0]}."
        )
    # Cast before the move: float64 never reaches a device that has none.
    coefficient = to_device(coefficient.to(dtype=_compute_dtype(x)), x.device)
    return coefficient.reshape(-1, *(1,) * (x.ndim - 1)) if coefficient.ndim else coefficient


def _like(result_like: Tensor, a: Tensor, x: Tensor, b: Tensor | None = None, y: Tensor | None = None) -> Tensor:
    """A x + b y in at least float32, returned in the dtype of `result_like`."""
    dtype = _compute_dtype(result_like)
    result = _broadcast(a, result_like) * x.to(dtype=dtype)
    if b is not None and y is not None:
        if y.shape != x.shape:
            raise ValueError(f"shapes differ: {tuple(x.shape)} and {tuple(y.shape)} must be equal.")
        result = torch.addcmul(result, _broadcast(b, result_like), y.to(dtype=dtype))
    return result.to(dtype=result_like.dtype)
