"""Few steps: what follows from a network's measured error for the reverse process (Bao et al. 2022, arXiv 2201.06503).

One number per timestep, e_t = E‖x_0 - x̂_0‖²/d, gives the optimal reverse variance of any step
(`DDPMProcess.optimal_variance`), what that step costs in the variational bound, and so the best trajectory of K steps.
`calibration.py` of ddpm-hf measures them; this file stores them in a scheduler's configuration, and uses them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ddpm_process import DDPMProcess, check_integer

# The keys of a scheduler's configuration that change x̂_0, next to the betas.
X_0_KEYS = (
    "prediction_type", "clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio",
    "sample_max_value",
)  # fmt: skip
TABLES = ("x_0_error", "x_0_error_standard_error", "eps_second_moment", "eps_second_moment_standard_error")
DIGITS = 7  # significant ones, in a configuration: far below the standard error


@dataclass(frozen=True)
class Calibration:
    """What was measured on a network, at every timestep. The tables are float64 of shape (T,), on the CPU.

    Args:
        x_0_error: e_t = E‖x_0 - x̂_0‖²/d, in units of data in [-1, 1], of the x̂_0 that sampling uses (clipped where
            the scheduler clips).
        x_0_error_standard_error: over the images.
        eps_second_moment: Γ_t = E‖ε̂‖²/d of the unclipped noise prediction, from a prediction of any type.
        eps_second_moment_standard_error: over the images.
        num_images: how many images it was measured on.
        fingerprint: the process and the kind of x̂_0 that it was measured with, from `fingerprint`.
    """

    x_0_error: Tensor
    x_0_error_standard_error: Tensor
    eps_second_moment: Tensor
    eps_second_moment_standard_error: Tensor
    num_images: int
    fingerprint: dict[str, Any]

    def to_config(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        tables = {name: [float(f"{v:.{DIGITS}g}") for v in getattr(self, name).tolist()] for name in TABLES}
        return {**tables, "num_images": self.num_images, "fingerprint": dict(self.fingerprint)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], expected: Mapping[str, Any]) -> Calibration:
        """Read what `to_config` wrote.

        Args:
            expected: the `fingerprint` of the scheduler that is to use it.

        Raises:
            ValueError: for a calibration of another process or kind of x̂_0, or one that is damaged.
        """
        remedy = "calibrate this model again: `ddpm-hf calibrate MODEL`, or ddpm_hf.calibrate(pipe, images)"
        try:
            found = config["fingerprint"]
            tables = {name: torch.tensor(config[name], dtype=torch.float64) for name in TABLES}
            calibration = cls(**tables, num_images=config["num_images"], fingerprint=dict(found))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"`_calibration` of the scheduler is damaged ({error}): {remedy}.") from error
        for key, value in expected.items():
            if found.get(key) != value:
                raise ValueError(
                    f"`_calibration` of the scheduler was measured with {key} = {found.get(key)!r}, but the scheduler "
                    f"has {value!r}: {remedy}."
                )
        wrong = [
            n
            for n, v in tables.items()
            if v.shape != (expected["num_train_timesteps"],) or not ((v >= 0) & v.isfinite()).all()
        ]
        if wrong:
            raise ValueError(
                f"`_calibration` of the scheduler is damaged: {wrong[0]} must hold a finite number of at least 0 "
                f"for each of {expected['num_train_timesteps']} timesteps. To repair it, {remedy}."
            )
        return calibration


def fingerprint(process: DDPMProcess, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a calibration depends on, apart from the weights: the betas and how x̂_0 is made from a prediction."""
    betas = ",".join(f"{beta:.6e}" for beta in process.betas.tolist())
    return {
        "num_train_timesteps": len(process.betas),
        "betas": hashlib.sha256(betas.encode()).hexdigest()[:16],
        **{key: config[key] for key in X_0_KEYS},
    }


def step_costs(process: DDPMProcess, x_0_error: Tensor) -> Tensor:
    """What each step t → s costs in the variational bound, with the optimal variance (arXiv 2201.06503, Section 4).

    J(t, s) = E KL(q(x_s|x_t,x_0) ‖ p*(x_s|x_t))/d = ½ ln(σ*²/β̃), in nats per dimension.

    Args:
        x_0_error: e_t, shape (T,).

    Returns:
        float64 of shape (T, T): row t, column s; infinite unless s < t.
    """
    T = len(process.betas)
    t, s = torch.tril_indices(T, T, offset=-1)
    c_0, _, beta_tilde = process.posterior_coefficients(t, s)
    costs = torch.full((T, T), torch.inf, dtype=torch.float64)
    costs[t, s] = 0.5 * torch.log1p(c_0.square() * x_0_error.double()[t] / beta_tilde)
    return costs


def least_cost_timesteps(costs: Tensor, num_steps: int) -> list[int]:
    """The trajectory of K timesteps from T - 1 to 0 whose steps cost least together (arXiv 2201.06503, Section 4).

    A shortest path of K - 1 edges, found by dynamic programming in O(K T²). Both ends are fixed, as in the paper: T - 1
    is where x_T is noise, and the step from t = 0 to the data is every trajectory's last.

    Args:
        costs: shape (T, T), from `step_costs`.
        num_steps: K, 1 ≤ K ≤ T. One step starts, and ends, at T - 1.

    Returns:
        K timesteps, strictly descending.
    """
    T = len(costs)
    check_integer("num_inference_steps", num_steps, 1, T)
    if num_steps == 1:
        return [T - 1]
    # After k rounds, cost[t] is that of the best path of k edges from t down to 0, and came_from[k][t] its first stop.
    cost = torch.full((T,), torch.inf, dtype=costs.dtype)
    cost[0] = 0
    first_stops = []
    for _ in range(num_steps - 1):
        cost, first_stop = (costs + cost).min(dim=1)
        first_stops.append(first_stop)
    path = [T - 1]
    for first_stop in reversed(first_stops):
        path.append(int(first_stop[path[-1]]))
    return path
