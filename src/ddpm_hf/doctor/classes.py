"""Class labels: whether the network knows each class by the number that images have it under."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .finding import Finding, Repair, Weights
from .readings import Errors, Reading, excess

LEVELS = (-0.5, -2.0)  # log-SNRs at which the class is no longer seen, and still decides
EXCESS, SIGMAS = 1.02, 4.0  # of the error with the labels as they are over that with others
MAX_CLASSES = 100


def examine_classes(errors: Errors, reading: Reading) -> Iterator[Finding]:
    """Labels in another order than in training: every class is best predicted under the number of another one."""
    embedding = dict(errors.network.named_parameters()).get("class_embedding.weight")
    labels = errors.classes
    if labels is None or embedding is None or len(embedding) > MAX_CLASSES:
        return
    by_class = torch.stack([
        errors.again(classes=torch.full_like(labels, k)).of(reading, LEVELS) for k in range(len(embedding))
    ])  # fmt: skip
    known = labels.cpu()
    best = {int(c): int(by_class[:, :, known == c].mean(2).log().mean(1).argmin()) for c in known.unique()}
    moved = {c: k for c, k in best.items() if c != k}
    if not moved or sorted(moved) != sorted(moved.values()):  # else no exchange explains it
        return
    rows = torch.tensor([best[int(c)] for c in known])
    factor, error = excess(errors.of(reading, LEVELS), by_class[rows, :, torch.arange(len(rows))].T)
    if factor > EXCESS and factor > 1 + SIGMAS * error:
        yield Finding(
            "class labels", "The network knows classes by other numbers: "
            + ", ".join(f"{c} is its {k}" for c, k in sorted(moved.items())) + ".",
            f"with these numbers the error on {len(known)} images falls to {1 / factor:.2f} of what it is",
            "Whoever asks for one class gets another, and guidance leads away from the class.",
            repair=Repair(weights=partial(_renumbered, moved)),
        )  # fmt: skip


def _renumbered(moved: dict[int, int], weights: Weights) -> Weights:
    embedding: Tensor = weights["class_embedding.weight"].clone()
    for c, k in moved.items():
        embedding[c] = weights["class_embedding.weight"][k]
    return {**weights, "class_embedding.weight": embedding}
