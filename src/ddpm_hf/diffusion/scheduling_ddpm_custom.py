"""`DDPMSchedulerCustom`: the DDPM process behind diffusers' scheduler contract.

One file, as every scheduler of diffusers is: the checks of the configuration, the trajectory and the step belong
together. The configuration is that of `diffusers.DDPMScheduler`, key by key, so configurations swap both ways. The
mathematics is in `ddpm_process.py`; here it is evaluated once per trajectory, into a table with one row of coefficients
per timestep, so that a step is a look-up and a few multiplications.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .ddpm_few_steps import Calibration, fingerprint, least_cost_timesteps, step_costs
from .ddpm_process import (
    LEARNED_VARIANCE_TYPES,
    PREDICTION_TYPES,
    VARIANCE_TYPES,
    BetaSchedule,
    DDPMProcess,
    PredictionType,
    VarianceType,
    as_timesteps,
    check_choice,
    check_integer,
    check_number,
    check_timesteps,
    make_betas,
    rescale_zero_terminal_snr,
    split_model_output,
    to_device,
)

TimestepSpacing = Literal["linspace", "leading", "trailing"]
TIMESTEP_SPACINGS: tuple[str, ...] = get_args(TimestepSpacing)

ZERO_SNR_ERROR = (
    "`prediction_type` is 'epsilon', but the betas end at zero SNR (`rescale_betas_zero_snr`), where x_0 can't be "
    "computed from ε: Eq. 15 divides by sqrt(ᾱ_T) = 0. Train with prediction_type='v_prediction' (or 'sample'), or set "
    "rescale_betas_zero_snr=False."
)


@dataclass
class DDPMSchedulerCustomOutput(BaseOutput):
    """What `step` returns: x_s of shape (B, C, *), and the x̂_0 (after clipping) that it was computed from."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None

    def __post_init__(self) -> None:  # diffusers' own looks the fields up, which takes a tenth of a step
        self["prev_sample"] = self.prev_sample
        if self.pred_original_sample is not None:
            self["pred_original_sample"] = self.pred_original_sample


class StepCoefficients(NamedTuple):
    """One row of the trajectory's table: tensors of shape (), or (B, 1, …) for per-image timesteps.

    x̂_0 = x_0_from_x_t · x_t + x_0_from_output · output      (Eq. 15)
    x_s = mean_from_x_0 · x̂_0 + mean_from_x_t · x_t + σ ε      (Eq. 7)
    A second-order step puts x̂_0 + extrapolation · (x̂_0 - previous x̂_0) in place of x̂_0 there.
    σ is `std` for the fixed and optimal variances; for the learned ones noise_scale · exp(log_variance / 2), where the
    learned range interpolates between `log_variance_low` and `log_variance_high`.

    Tensors of shape () lie on the device of the images: numbers would cost twice as much to multiply with.
    """

    x_0_from_x_t: Tensor
    x_0_from_output: Tensor
    mean_from_x_0: Tensor
    mean_from_x_t: Tensor
    std: Tensor  # σ of the variances that no network predicts; 0 at the last step
    noise_scale: Tensor  # eta, or 1 for the optimal variance; 0 at the last step, which adds no noise
    log_variance_low: Tensor  # log β̃
    log_variance_high: Tensor  # log β
    extrapolation: Tensor  # 0 at the first and the last step


class DDPMSchedulerCustom(SchedulerMixin, ConfigMixin):
    """Ancestral sampling of DDPM (arXiv 2006.11239, Algorithm 2) on any trajectory of timesteps.

    The arguments are those of `diffusers.DDPMScheduler`, with their meaning and defaults.

    Args:
        num_train_timesteps: T ≥ 1.
        beta_start: β_1 of the schedules `linear`, `scaled_linear` and `sigmoid`, in (0, 1).
        beta_end: β_T of the same, at least `beta_start`.
        beta_schedule: `linear` (the paper's), `scaled_linear`, `squaredcos_cap_v2`, `sigmoid` or `laplace`.
        trained_betas: β_1 … β_T themselves; they override the four arguments above, T included.
        variance_type: σ² of the reverse step: `fixed_small` (β̃), `fixed_large` (β), their `_log` twins, `learned`
            (the network's log σ²), `learned_range` (arXiv 2102.09672, Eq. 15), or `optimal` (arXiv 2201.06503), which
            needs a calibration, and which stock diffusers reads as `fixed_small`.
        clip_sample: clamp x̂_0 to ±`clip_sample_range`, before the mean is computed from it.
        prediction_type: what the network predicts: `epsilon`, `sample` or `v_prediction`.
        thresholding: dynamic thresholding of x̂_0 (arXiv 2205.11487, Section 2.3) at the quantile
            `dynamic_thresholding_ratio`, at most `sample_max_value`; goes before `clip_sample`.
        timestep_spacing: how `set_timesteps` spreads K steps over T: `leading` (from 0 upwards: starts below T - 1),
            `trailing` (from T - 1 downwards) or `linspace` (both ends).
        steps_offset: added to the timesteps of `leading`.
        rescale_betas_zero_snr: rescale to ᾱ_T = 0 (arXiv 2305.08891). Sampling then needs a `prediction_type` other
            than `epsilon`.

    Raises:
        ValueError: at construction, for a bad value: names the key, the value and what is allowed.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: BetaSchedule = "linear",
        trained_betas: np.ndarray | Sequence[float] | None = None,
        variance_type: VarianceType = "fixed_small",
        clip_sample: bool = True,
        prediction_type: PredictionType = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: TimestepSpacing = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        _keep_number_of_timesteps(self.config)
        if variance_type is None:  # DPM-Solver writes null for "not learned"
            variance_type = "fixed_small"
            self.register_to_config(variance_type=variance_type)
        check_choice("variance_type", variance_type, VARIANCE_TYPES)
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        check_choice("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS)
        check_integer("steps_offset", steps_offset, 0)
        check_number("clip_sample_range", clip_sample_range, "a positive number, e.g. 1.0", lambda v: v > 0)
        check_number("sample_max_value", sample_max_value, "a positive number, e.g. 1.0", lambda v: v > 0)
        check_number(
            "dynamic_thresholding_ratio", dynamic_thresholding_ratio, "a quantile in (0, 1]", lambda v: 0 < v <= 1
        )

        if trained_betas is None:
            betas = make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
        else:
            betas = torch.as_tensor(np.asarray(trained_betas), dtype=torch.float64)
            self.register_to_config(trained_betas=betas.tolist())
        self.process = DDPMProcess(betas)
        if rescale_betas_zero_snr:
            self.process = DDPMProcess(rescale_zero_terminal_snr(betas))
        if self.process.num_train_timesteps != num_train_timesteps:
            self.register_to_config(num_train_timesteps=self.process.num_train_timesteps)
        if trained_betas is None and beta_schedule in ("linear", "scaled_linear", "sigmoid"):
            _warn_of_unsuitable_betas(self.process)

        # Names of the stock scheduler, for code that reads them; float64.
        self.betas = self.process.betas
        self.alphas = self.process.alphas
        self.alphas_cumprod = self.process.alphas_cumprod
        self.variance_type = variance_type
        self.init_noise_sigma = 1.0

        self._calibration: Calibration | None = None
        self._step_costs: Tensor | None = None
        self.num_inference_steps: int | None = None
        self.custom_timesteps = False
        self._set_trajectory(np.arange(self.process.num_train_timesteps)[::-1].copy(), device=None)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """What `from_config` makes of a configuration: see diffusers."""
        _keep_number_of_timesteps(config_dict)
        return super().extract_init_dict(config_dict, **kwargs)

    def __len__(self) -> int:
        """T."""
        return self.process.num_train_timesteps

    # --- the calibration --------------------------------------------------------------------------------------------

    @property
    def calibration(self) -> Calibration:
        """What `ddpm_hf.calibrate` measured, from `_calibration` of the configuration.

        Raises:
            ValueError: where there is none, or where it was measured with another process or kind of x̂_0.
        """
        if self._calibration is None:
            stored = self.config.get("_calibration")
            if stored is None:
                raise ValueError(
                    "the optimal variance and the optimal timesteps need a calibration, but the scheduler has none: "
                    "run `ddpm-hf calibrate MODEL`, or ddpm_hf.calibrate(pipe, images)."
                )
            self._calibration = Calibration.from_config(stored, expected=fingerprint(self.process, self.config))
        return self._calibration

    def set_calibration(self, calibration: Calibration) -> None:
        """Store a calibration in the configuration, as `_calibration`, which stock diffusers keeps when it saves."""
        self.register_to_config(_calibration=calibration.to_config())
        self._calibration = self._step_costs = None
        self._tables.clear()
        self._rows.clear()

    def optimal_timesteps(self, num_inference_steps: int) -> list[int]:
        """The K timesteps, from T - 1 to 0, of least variational cost (arXiv 2201.06503, Section 4)."""
        if self._step_costs is None:
            self._step_costs = step_costs(self.process, self.calibration.x_0_error)
        return least_cost_timesteps(self._step_costs, num_inference_steps)

    # --- the trajectory ---------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | Tensor | np.ndarray | None = None,
        spacing: TimestepSpacing | Literal["optimal"] | None = None,
    ) -> None:
        """Choose the trajectory that sampling follows.

        Args:
            num_inference_steps: K, 1 ≤ K ≤ T, spread by the spacing. Exactly K timesteps result.
            device: where `self.timesteps` is put; the CPU lets `step` read a timestep without waiting for a GPU.
            timesteps: the trajectory itself instead, strictly descending, each in [0, T - 1].
            spacing: overrides `timestep_spacing` of the configuration for this trajectory. `optimal` is the trajectory
                of least variational cost: see `optimal_timesteps`.

        Raises:
            ValueError: for any other value, where the terminal SNR is zero but the network predicts ε, and for
                `optimal` without a matching calibration.
        """
        T = len(self)
        if (num_inference_steps is None) == (timesteps is None):
            found = "neither was" if timesteps is None else "both were"
            raise ValueError(f"pass one of `num_inference_steps` and `timesteps`; {found} given.")
        if self.process.has_zero_terminal_snr and self.config.prediction_type == "epsilon":
            raise ValueError(ZERO_SNR_ERROR)
        if timesteps is not None:
            if spacing is not None:
                raise ValueError("`spacing` has no meaning with custom `timesteps`: leave one of them out.")
            grid = check_custom_timesteps(timesteps, T)
        else:
            K: Any = num_inference_steps
            check_integer("num_inference_steps", K, 1, T)
            spacing = spacing or self.config.timestep_spacing
            check_choice("timestep_spacing", spacing, (*TIMESTEP_SPACINGS, "optimal"))
            if spacing == "optimal":
                grid = np.array(self.optimal_timesteps(int(K)))
            else:
                grid = _spaced_timesteps(spacing, int(K), T, self.config.steps_offset)
            self._warn_of_a_start_in_the_image(spacing, grid)
        if self.variance_type == "optimal":
            _ = self.calibration  # raises now rather than at the first step
        self._set_trajectory(grid, device)
        self.custom_timesteps, self.num_inference_steps = timesteps is not None, len(grid)

    def _warn_of_a_start_in_the_image(self, spacing: str, grid: np.ndarray) -> None:
        alpha_bar = float(self.alphas_cumprod[grid[0]])
        if alpha_bar > 0.01 and grid[0] < len(self) - 1:
            warnings.warn(
                f"timestep spacing {spacing!r} with {len(grid)} steps starts from pure noise at t = {grid[0]}, where a "
                f"noisy image holds {alpha_bar:.1%} of signal. The timestep_spacing 'trailing' or 'linspace' starts at "
                "T - 1.",
                stacklevel=3,
            )

    def _set_trajectory(self, grid: np.ndarray, device: str | torch.device | None) -> None:
        """Follow `grid` (descending). The step after any time t goes to the largest time of the grid below t, or to
        the clean data (-1).
        """
        self.timesteps = torch.from_numpy(grid).to(device)
        ascending = np.concatenate([[-1], grid[::-1]])
        below = np.searchsorted(ascending, np.arange(len(self)), side="left") - 1
        self._previous = torch.from_numpy(ascending[below])
        above = np.searchsorted(ascending, np.arange(len(self)), side="right")
        self._before = torch.from_numpy(np.append(ascending, -1)[above])  # -1 where the trajectory starts
        self._last_timestep = int(grid[-1])
        self._tables: dict[tuple[float, torch.device, torch.dtype], Tensor] = {}
        self._rows: dict[tuple[int, float, torch.device, torch.dtype], StepCoefficients] = {}

    def previous_timestep(self, timestep: int | Tensor) -> Tensor:
        """s, the time after `timestep` on the trajectory; -1, the clean data, after the last one. Of its shape."""
        t = as_timesteps(timestep)
        check_timesteps(t, len(self))
        return self._previous.to(t.device)[t]

    # --- the reverse step -------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The network's input is x_t itself."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        ddim_eta: float = 1.0,
        variance_noise: Tensor | None = None,
        previous_x_0: Tensor | None = None,
    ) -> DDPMSchedulerCustomOutput | tuple[Tensor, Tensor]:
        """x_s ~ p_θ(x_s | x_t), one step of Algorithm 2 along the trajectory.

        With `previous_x_0` the step is of second order: x̂_0 changes on the way from t to s, and the mean is computed at
        x̂_0 extrapolated to the middle of it, in log-SNR, but by no more than it changed in the step before. Apart from
        that limit it is DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2) for eta = 0, and its SDE for eta = 1.

        Args:
            model_output: (B, C, *), or (B, 2C, *) for the learned variances. Any floating dtype.
            timestep: t, an int or an integer tensor of shape () or (B,). Values on a GPU are not inspected.
            sample: x_t, (B, C, *). Any floating dtype; arithmetic is float32 at least.
            generator: one for the batch or a list with one per image.
            ddim_eta: 1 is ancestral sampling, 0 is DDIM; between them σ² is eta² times the variance (arXiv 2010.02502,
                Eq. 16). The `optimal` variance is that of each eta, and not 0 for eta = 0. Not called `eta`, since
                diffusers' pipelines pass an eta of 0 to every scheduler that takes one.
            variance_noise: ε of the shape of x_t, to be used instead of drawing it.
            previous_x_0: the `pred_original_sample` of the step before on the trajectory, of the shape of x_t.

        Returns:
            x_s and x̂_0, in the dtype of x_t. The last step of the trajectory adds no noise.
        """
        eta = ddim_eta
        check_eta(eta)
        for name, given in (("variance_noise", variance_noise), ("previous_x_0", previous_x_0)):
            if given is not None and given.shape != sample.shape:
                raise ValueError(
                    f"`{name}` has shape {tuple(given.shape)}, but must have that of the sample, {tuple(sample.shape)}."
                )
        output, raw_variance = split_model_output(model_output, sample, self.variance_type)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        c, is_last = self._coefficients(timestep, sample, eta, dtype)

        # a x + b y is written (a * x).addcmul_(b, y): two passes over the images instead of three.
        # 1. Predict x_0 (Eq. 15), and keep it in the range of images before anything is computed from it.
        x_t = sample.to(dtype)
        x_0 = self.limit_x_0((c.x_0_from_x_t * x_t).addcmul_(c.x_0_from_output, output.to(dtype)))

        # 2. The mean of x_s (Eq. 7, at x̂_0).
        x_0_on_the_way = x_0 if previous_x_0 is None else x_0 + c.extrapolation * (x_0 - previous_x_0.to(dtype))
        x_s = (c.mean_from_x_t * x_t).addcmul_(c.mean_from_x_0, x_0_on_the_way)

        # 3. Noise; none at the last step, and none for DDIM unless its variance is the optimal one.
        if not is_last and (eta > 0 or self.variance_type == "optimal"):
            if variance_noise is None:
                noise = draw_noise(sample.shape, generator, sample.device, dtype)
            else:
                noise = variance_noise.to(dtype)
            x_s.addcmul_(self._std(c, raw_variance, dtype), noise)

        if sample.dtype != dtype:
            x_s, x_0 = x_s.to(sample.dtype), x_0.to(sample.dtype)
        return DDPMSchedulerCustomOutput(prev_sample=x_s, pred_original_sample=x_0) if return_dict else (x_s, x_0)

    def _std(self, c: StepCoefficients, raw_variance: Tensor | None, dtype: torch.dtype) -> Tensor:
        """σ of the step."""
        if raw_variance is None:
            return c.std
        raw = raw_variance.to(dtype)
        if self.variance_type == "learned":
            return c.noise_scale * torch.exp(0.5 * raw)
        log_variance = c.log_variance_low + (raw + 1) / 2 * (c.log_variance_high - c.log_variance_low)
        return c.noise_scale * torch.exp(0.5 * log_variance)

    def predict_x_0(self, model_output: Tensor, sample: Tensor, timestep: int | Tensor) -> Tensor:
        """x̂_0 of a prediction (without variance channels) at x_t, clipped as in `step`. Of the shape of x_t."""
        process, prediction_type = self.process, self.config.prediction_type
        return self.limit_x_0(process.predict_x0(model_output, sample, timestep, prediction_type))

    def limit_x_0(self, x_0: Tensor) -> Tensor:
        """x̂_0, (B, C, *), kept in the range of images as the configuration says."""
        if self.config.thresholding:
            return self._threshold_sample(x_0)
        if self.config.clip_sample:
            return x_0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return x_0

    def _threshold_sample(self, sample: Tensor) -> Tensor:
        """Dynamic thresholding (arXiv 2205.11487, Section 2.3): clamp each image to its own quantile, then rescale."""
        magnitudes = sample.abs().flatten(1).to(torch.promote_types(sample.dtype, torch.float32))
        if magnitudes.numel() == 0:
            return sample
        limit = torch.quantile(magnitudes, self.config.dynamic_thresholding_ratio, dim=1)
        limit = limit.clamp(min=1, max=self.config.sample_max_value).to(sample.dtype)
        limit = limit.reshape(-1, *(1,) * (sample.ndim - 1))
        return sample.clamp(-limit, limit) / limit

    # --- coefficients -----------------------------------------------------------------------------------------------

    def _coefficients(
        self, timestep: int | Tensor, sample: Tensor, eta: float, dtype: torch.dtype
    ) -> tuple[StepCoefficients, bool]:
        """The row of the trajectory's table for each timestep, and whether all of them are known to be the last."""
        if isinstance(timestep, Tensor) and (timestep.is_floating_point() or timestep.dtype == torch.bool):
            raise TypeError(f"timesteps have dtype {timestep.dtype}, but must be integers.")
        on_cpu = not isinstance(timestep, Tensor) or (timestep.ndim == 0 and timestep.device.type == "cpu")
        if on_cpu and not torch.compiler.is_compiling():
            index = operator.index(timestep)
            key = (index, eta, sample.device, dtype)
            if key not in self._rows:
                self._rows[key] = self._row(*key)
            return self._rows[key], index <= self._last_timestep

        if self.process.has_zero_terminal_snr and self.config.prediction_type == "epsilon":
            raise ValueError(ZERO_SNR_ERROR)
        t = as_timesteps(timestep)
        check_timesteps(t, len(self))
        if t.ndim > 1 or (t.ndim == 1 and len(t) not in (1, len(sample))):
            raise ValueError(
                f"timesteps have shape {tuple(t.shape)}, but {len(sample)} images need one timestep for all, or "
                f"{len(sample)}."
            )
        # Not table[t], which reads a single t from the device.
        rows = self._table(eta, sample.device, dtype).index_select(0, t.to(sample.device).reshape(-1))
        columns = rows.reshape(*t.shape, rows.shape[-1]).unbind(-1)
        return StepCoefficients(*(c.reshape(-1, *(1,) * (sample.ndim - 1)) if c.ndim else c for c in columns)), False

    def _row(self, index: int, eta: float, device: torch.device, dtype: torch.dtype) -> StepCoefficients:
        check_integer("timestep", index, 0, len(self) - 1)
        is_pure_noise = self.process.has_zero_terminal_snr and index == len(self) - 1
        if is_pure_noise and self.config.prediction_type == "epsilon":
            raise ValueError(ZERO_SNR_ERROR)
        return StepCoefficients(*self._table(eta, device, dtype)[index].unbind())

    def _table(self, eta: float, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Coefficients of the step from every t of 0 … T-1 to its successor on the trajectory, (T, 9)."""
        key = (eta, device, dtype)
        if key in self._tables:
            return self._tables[key]
        with torch.inference_mode(False):  # a cached table is used outside of it, too
            table = to_device(self.coefficient_table(eta).to(dtype), device)
        if not torch.compiler.is_compiling():  # the next call of a graph may overwrite its outputs
            self._tables[key] = table
        return table

    def coefficient_table(self, eta: float) -> Tensor:
        """The step from every t along the trajectory: float64 (T, 9), a column per name of `StepCoefficients`."""
        t, s = torch.arange(len(self)), self._previous
        x_0_from_x_t, x_0_from_output = self.process.x_0_coefficients(t, self.config.prediction_type)
        mean_from_x_0, mean_from_x_t, _ = self.process.posterior_coefficients(t, s, eta)
        is_not_last = (s >= 0).double()
        low = self.process.p_log_variance(t, s, "fixed_small")
        high = self.process.p_log_variance(t, s, "fixed_large")
        if self.variance_type == "optimal":
            noise_scale = is_not_last
            std = noise_scale * self._optimal_variance(t, s, eta).sqrt()
        else:
            noise_scale = eta * is_not_last
            fixed = high if self.variance_type in ("fixed_large", "fixed_large_log") else low
            std = noise_scale * torch.exp(0.5 * fixed)
        columns = (
            x_0_from_x_t, x_0_from_output, mean_from_x_0, mean_from_x_t, std, noise_scale, low, high,
            self._extrapolation(t),
        )  # fmt: skip
        return torch.stack(columns, dim=1)

    def _extrapolation(self, t: Tensor) -> Tensor:
        """(λ_s - λ_t) / 2 (λ_t - λ_r), where r → t is the step before t → s and λ is half the log-SNR; at most 1.

        Without that limit, a step of many times the length of the one before, as the last ones of few are, would
        extrapolate x̂_0 by many times what it ever changed.
        """
        s, r = self._previous, self._before
        has_both = (s >= 0) & (r >= 0)
        log_snr = self.process.log_snr(torch.arange(len(self)))
        ratio = 0.5 * (log_snr[s] - log_snr[t]) / (log_snr[t] - log_snr[r])
        return torch.where(has_both, ratio.clamp(max=1), 0.0)

    def _optimal_variance(self, t: Tensor, s: Tensor, eta: float = 1.0) -> Tensor:
        """σ*²; where images are clipped, the last noise that is drawn is at most the 1 - ᾱ_s of the forward process.

        One prediction is left to remove it, by a network that never saw more at that s. The paper clips the same σ,
        by hand, to 1 or 2 of 255 levels (arXiv 2201.06503, Appendix); here, on the linear schedule, it comes to 1.3.
        """
        variance = self.process.optimal_variance(self.calibration.x_0_error[t], t, s, eta)
        if not (self.config.clip_sample or self.config.thresholding):
            return variance
        is_last_noise = s == self.timesteps[-1].cpu()
        return torch.where(is_last_noise, torch.minimum(variance, 1 - self.process.alpha_bar(s)), variance)

    def _get_variance(
        self,
        t: int | Tensor,
        predicted_variance: Tensor | None = None,
        variance_type: VarianceType | None = None,
    ) -> Tensor:
        """σ² of the step from t along the trajectory, under diffusers' name. 0 for β̃ at the last step, e_t for σ*²."""
        variance_type = variance_type or self.variance_type
        s = self.previous_timestep(t)
        if variance_type in LEARNED_VARIANCE_TYPES:
            return self.process.p_log_variance(t, s, variance_type, predicted_variance).exp()
        if variance_type in ("fixed_large", "fixed_large_log"):
            return self.process.beta(t, s)
        if variance_type == "optimal":
            return self._optimal_variance(as_timesteps(t).cpu(), s.cpu())
        return self.process.posterior_coefficients(t, s)[2]

    # --- the forward process, under diffusers' names ----------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0) (Eq. 4) for ε = `noise`: see `DDPMProcess.q_sample`."""
        return self.process.q_sample(original_samples, timesteps, noise)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """V (arXiv 2202.00512, Appendix D) of x_0 = `sample`: see `DDPMProcess.velocity`."""
        return self.process.velocity(sample, noise, timesteps)


def _keep_number_of_timesteps(config: Mapping[str, Any]) -> None:
    """Let `from_config` hand T on where it was passed by position: diffusers takes it for a default, and drops it."""
    assumed_defaults = config.get("_use_default_values", [])
    if "num_train_timesteps" in assumed_defaults and config["num_train_timesteps"] != 1000:
        assumed_defaults.remove("num_train_timesteps")


def check_eta(eta: float) -> None:
    """Raise a ValueError unless eta lies in [0, 1]."""
    check_number("eta", eta, "a number in [0, 1]: 0 is DDIM, 1 is DDPM", lambda v: 0 <= v <= 1)


def draw_noise(
    shape: Sequence[int],
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """ε ~ N(0, I). What generators on the CPU draw follows the work queued on a GPU, which is not waited for.

    A generator with a method `draw_normal(shape)`, as ddpm-hf's Philox has, draws by that.
    """
    first = generator[0] if isinstance(generator, list) else generator
    if hasattr(first, "draw_normal"):
        generators: Any = generator
        is_list = isinstance(generator, list)
        noise = [g.draw_normal((1, *shape[1:])) for g in generators] if is_list else [generators.draw_normal(shape)]
        return to_device(torch.cat(noise), device).to(dtype)
    if device.type == "cuda" and first is not None and first.device.type == "cpu":
        return to_device(randn_tensor(shape, generator, torch.device("cpu"), dtype), device)
    if first is generator and (first is None or first.device == device):  # what `randn_tensor` does, in half the time
        return torch.randn(shape, generator=first, device=device, dtype=dtype)
    return randn_tensor(shape, generator, device, dtype)


def _spaced_timesteps(spacing: str, K: int, T: int, steps_offset: int) -> np.ndarray:
    """K descending timesteps of [0, T - 1] (arXiv 2305.08891, Table 2), int64.

    Exactly K of them for every K, where a floating-point `arange` would now and then give one more.
    """
    if spacing == "linspace":
        grid = np.linspace(T - 1, 0, K).round().astype(np.int64)
    elif spacing == "trailing":
        grid = np.round(T - np.arange(K) * (T / K)).astype(np.int64) - 1
    else:
        grid = np.arange(K, dtype=np.int64)[::-1] * (T // K) + steps_offset
        if grid[0] > T - 1:
            raise ValueError(
                f"`steps_offset` is {steps_offset}, which puts the first of {K} timesteps at {grid[0]}, beyond T - 1 = "
                f"{T - 1}: use steps_offset=0, fewer steps, or timestep_spacing='trailing'."
            )
    return grid


def check_custom_timesteps(timesteps: Sequence[int] | Tensor | np.ndarray, T: int) -> np.ndarray:
    """The timesteps as int64; raises a ValueError unless they descend strictly in [0, T - 1]."""
    try:
        grid = np.asarray(timesteps.cpu() if isinstance(timesteps, Tensor) else timesteps)
    except ValueError:  # nested lists of different lengths
        grid = np.empty(0)
    if grid.ndim != 1 or grid.size == 0 or not np.issubdtype(grid.dtype, np.integer):
        raise ValueError(f"`timesteps` is {timesteps!r}, but must be a non-empty list of integers.")
    grid = grid.astype(np.int64)
    if grid.min() < 0 or grid.max() > T - 1:
        wrong = grid[(grid < 0) | (grid > T - 1)][0]
        raise ValueError(f"`timesteps` has {wrong}, but every timestep must lie between 0 and T - 1 = {T - 1}.")
    if (np.diff(grid) >= 0).any():
        i = int(np.argmax(np.diff(grid) >= 0))
        raise ValueError(
            f"`timesteps` goes from {grid[i]} to {grid[i + 1]}, but must descend strictly, without duplicates: "
            "pass sorted(set(timesteps), reverse=True)."
        )
    return grid


def _warn_of_unsuitable_betas(process: DDPMProcess) -> None:
    """Warn where the betas of a schedule made for T = 1000 meet another T."""
    T = process.num_train_timesteps
    alpha_bar_T = float(process.alphas_cumprod[-1])
    remedy = (
        f"Betas of T = 1000 suit T = {T} when they are multiplied by 1000/{T}."
        if T > 20
        else "The schedule 'squaredcos_cap_v2' suits every T."
    )
    if alpha_bar_T > 5e-3 and not process.has_zero_terminal_snr:
        warnings.warn(
            f"these betas never reach noise: ᾱ_T = {alpha_bar_T:.3g} after T = {T} steps, so x_T still shows the image "
            f"but sampling starts from pure noise. {remedy}",
            stacklevel=4,
        )
    destroyed = int((process.alphas_cumprod < 1e-5).sum())
    if destroyed > 0.1 * T:
        warnings.warn(
            f"these betas destroy the image too soon: ᾱ_T = {alpha_bar_T:.3g}, and from t = {T - destroyed} of T = {T} "
            f"on ᾱ_t < 1e-5, so {destroyed} steps see only noise. {remedy}",
            stacklevel=4,
        )
