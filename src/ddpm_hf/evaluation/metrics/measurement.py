"""A measured number, and how far it can be trusted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """A number, and what one must know to compare it with another.

    Args:
        metric: bpd, fid, kid, isc, precision, recall, nearest; fd and kd in the features of other networks than
            Inception.
        value: higher is better for isc, precision and recall; lower for the others.
        num_images: N, how many images or samples it was measured on.
        num_reference: M, how many real images they were compared with; None for bpd and isc.
        standard_error: of the value (bpd, nearest).
        low, high: a 95 % confidence interval for the mean over other draws of N samples; for fid, fd, kid and kd also
            over draws of M real images. None where no sound interval is known.
        std: over subsets (kid) or splits (isc), as published; not an error of the value.
        bias: estimated finite-sample bias: how far the value lies above that of infinitely many samples (fid, fd).
        warnings: caveats that belong beside the number.
        details: further numbers, by name.
    """

    metric: str
    value: float
    num_images: int
    num_reference: int | None = None
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None
    std: float | None = None
    bias: float | None = None
    warnings: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.metric} {self.numbers()}"

    def numbers(self) -> str:
        """The value with its error and bias, in words."""
        spread = self.std if self.standard_error is None else self.standard_error
        error = "" if spread is None else f" ± {spread:.2g}"
        interval = "" if self.low is None else f", 95 %: {self.low:.4g} to {self.high:.4g}"
        bias = "" if self.bias is None else f", of which about {self.bias:.2g} is finite-sample bias"
        return f"{self.value:.4g}{error} (N = {self.num_images:,}{interval}{bias})"
