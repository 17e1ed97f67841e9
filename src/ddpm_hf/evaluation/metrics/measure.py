"""Sample quality: FID, KID, Inception Score, precision and recall, and their like in the features of other networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from .distances import frechet_estimate, kernel_distance, precision_recall
from .features import INCEPTION, Extractor, Features
from .measurement import Measurement
from .reference_statistics import Reference, evenly_spaced

INCEPTION_METRICS = ("fid", "kid", "isc", "prc")
OTHER_METRICS = ("fd", "kd", "prc")
SMALLEST_SET = {"fid": 4, "fd": 4, "kid": 4, "kd": 3, "isc": 10, "prc": 4}
USUAL = 10_000  # images from which on bias is small, and values of different authors compare
NEIGHBOURS = 3
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
ISC_SPLITS = 10
SEED = 2020  # torch-fidelity's default: it draws subsets and splits
MAX_PAIRED = 10_000  # images of either set in sums over all pairs
NORMAL_95, T9_95 = 1.96, 2.262  # two-sided quantiles: of the normal distribution, and of Student's with ten splits


def check_metrics(
    names: Sequence[str], feature_extractor: str | None, num_images: int, num_reference: int | None = None
) -> None:
    """Refuse what can't be measured, before the first sample is made.

    Args:
        names: `fid`, `kid`, `isc` and `prc` with Inception; `fd`, `kd` and `prc` with another extractor.
        feature_extractor: as `open_extractor` takes it.
        num_images: N.
        num_reference: M, if it is known already.

    Raises:
        ValueError: for a metric that this extractor does not have, and for too few images.
    """
    is_inception = feature_extractor in (None, INCEPTION)
    known = INCEPTION_METRICS if is_inception else OTHER_METRICS
    for name in names:
        if name not in known:
            network = "Inception" if is_inception else repr(feature_extractor)
            raise ValueError(
                f"`metrics` has {name!r}, but the metrics in the features of {network} are {', '.join(known)}."
            )
        counts = {"num_images": num_images} if name == "isc" else {"num_images": num_images, "reference": num_reference}
        for option, count in counts.items():
            if count is not None and count < SMALLEST_SET[name]:
                raise ValueError(
                    f"`{option}` has {count} images, but {name} needs at least {SMALLEST_SET[name]}, and thousands to "
                    f"be meaningful: use more of them, or leave {name} out of the metrics."
                )


def measure(names: Sequence[str], features: Features, reference: Reference, extractor: Extractor) -> list[Measurement]:
    """Measure samples by their features; not a collective call, so that the main process alone may do it.

    Args:
        names: see `check_metrics`.
        features: of the samples, by `extractor`.
        reference: of the real images, by the same.

    Returns:
        One measurement per name, in their order, but two for `prc`: precision and recall.

    Raises:
        ValueError: for statistics of another extractor, and as `check_metrics`.
    """
    if reference.key["extractor"] != extractor.identity:
        raise ValueError(
            f"the reference statistics are by {reference.key['extractor']}, but the features of the samples by "
            f"{extractor.identity}: compute both with one extractor."
        )
    network = INCEPTION if features.is_inception else extractor.identity
    check_metrics(names, network, len(features.pooled), len(reference.features))
    found = [m for name in names for m in METHODS[name](features, reference)]
    return [replace(m, warnings=m.warnings + extractor.warnings) for m in found]


def _frechet(features: Features, reference: Reference) -> list[Measurement]:
    x, n, m = features.pooled, len(features.pooled), reference.moments.num_images
    value, error, bias = frechet_estimate(x, reference.features, reference.moments)
    margin = NORMAL_95 * error
    warnings = [
        f"{count} {images} are too few for a covariance of {x.shape[1]} features"
        for count, images in ((n, "samples"), (m, "real images"))
        if count <= x.shape[1]
    ]
    if n < USUAL:
        warnings.append(f"N = {n} raises it: compare only values of equal N")
    name = "fid" if features.is_inception else "fd"
    return [
        Measurement(
            name, value, n, m, low=max(0.0, value - margin), high=value + margin, bias=bias, warnings=tuple(warnings)
        )
    ]


def _kernel(features: Features, reference: Reference) -> list[Measurement]:
    """Over all pairs, and unbiased at every N."""
    x, y = evenly_spaced(features.pooled, MAX_PAIRED), evenly_spaced(reference.features, MAX_PAIRED)
    value, error = kernel_distance(x, y)
    margin = NORMAL_95 * error
    return [Measurement("kd", value, len(x), len(y), low=value - margin, high=value + margin)]


def _kernel_inception(features: Features, reference: Reference) -> list[Measurement]:
    """The mean over random subsets, as published. The interval is that over all pairs, widened by the subsets' draw."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    n, m = len(features.pooled), len(reference.features)
    size = KID_SUBSET_SIZE if min(n, m) >= KID_SUBSET_SIZE else min(n, m) // 2
    result = kid_features_to_metric(
        features.pooled, reference.features, kid_subsets=KID_SUBSETS, kid_subset_size=size, rng_seed=SEED, verbose=False
    )
    value, std = result[KEY_METRIC_KID_MEAN], result[KEY_METRIC_KID_STD]
    _, error = kernel_distance(
        evenly_spaced(features.pooled, MAX_PAIRED), evenly_spaced(reference.features, MAX_PAIRED)
    )
    margin = NORMAL_95 * math.hypot(error, std / math.sqrt(KID_SUBSETS))
    warnings = () if size == KID_SUBSET_SIZE else (f"± is over subsets of {size} images, not the usual 1000",)
    return [Measurement("kid", value, n, m, low=value - margin, high=value + margin, std=std, warnings=warnings)]


def _inception_score(features: Features, reference: Reference) -> list[Measurement]:
    """The mean over ten splits of exp E KL(p(y|x) ‖ p(y)) (Salimans et al. 2016, arXiv 1606.03498, Section 4)."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    result = isc_features_to_metric(features.logits, ISC_SPLITS, rng_seed=SEED)
    value, std = result[KEY_METRIC_ISC_MEAN], result[KEY_METRIC_ISC_STD]
    margin = T9_95 * std / math.sqrt(ISC_SPLITS - 1)  # the splits have no image in common
    n = len(features.logits)
    warnings = () if n >= USUAL else (f"N = {n} lowers it: compare only values of equal N",)
    return [Measurement("isc", value, n, low=value - margin, high=value + margin, std=std, warnings=warnings)]


def _precision_recall(features: Features, reference: Reference) -> list[Measurement]:
    n, m = len(features.pooled), len(reference.features)
    precision, recall = precision_recall(features.pooled, reference.features, NEIGHBOURS)
    warnings = () if min(n, m) >= USUAL else (f"depends on N and M: compare only values of N = {n}, M = {m}",)
    # An interval for precision alone: samples fall independently into fixed regions around real images, but it is
    # samples that recall's regions are made of.
    low, high = _wilson(precision, n)
    return [
        Measurement("precision", precision, n, m, low=low, high=high, warnings=warnings),
        Measurement("recall", recall, n, m, warnings=warnings),
    ]


def _wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's interval (1927) of a probability, from the share among n independent trials."""
    z = NORMAL_95**2 / n
    centre, margin = share + z / 2, math.sqrt(z * share * (1 - share) + z**2 / 4)
    return max(0.0, (centre - margin) / (1 + z)), min(1.0, (centre + margin) / (1 + z))


METHODS: dict[str, Callable[[Features, Reference], list[Measurement]]] = {
    "fid": _frechet,
    "fd": _frechet,
    "kid": _kernel_inception,
    "kd": _kernel,
    "isc": _inception_score,
    "prc": _precision_recall,
}
