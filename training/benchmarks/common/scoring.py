"""Scores of small images: a CNN that reads their classes, and the Fréchet distance in its features."""

import gzip
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import interpolate


def labelled_digits(resolution: int = 16) -> tuple[Tensor, Tensor]:
    """scikit-learn's scans: uint8 (1797, 1, H, W), and their classes."""
    digits = load_digits()
    scans = torch.from_numpy(digits.images)[:, None] / 16
    scaled = interpolate(scans, size=(resolution, resolution), mode="bicubic", antialias=True)
    return (scaled * 255).round().clamp(0, 255).to(torch.uint8), torch.from_numpy(digits.target)


def labelled_fashion(folder: Path, resolution: int = 16) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST's training set from a folder of its idx files: uint8 (60000, 1, H, W), and the classes."""
    arrays = []
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        with gzip.open(folder / f"train-{kind}-ubyte.gz") as stream:
            arrays.append(np.frombuffer(stream.read(), np.uint8, offset=header))
    images = torch.from_numpy(arrays[0].reshape(-1, 1, 28, 28).copy()) / 255
    scaled = torch.cat(
        [interpolate(i, size=(resolution, resolution), mode="bicubic", antialias=True) for i in images.split(5000)]
    )
    return (scaled * 255).round().clamp(0, 255).to(torch.uint8), torch.from_numpy(arrays[1].astype(np.int64))


class Classifier(nn.Module):
    """A small CNN for 16×16 images of one channel; its 64 features before the last layer are those of the distance."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(512, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the ten classes."""
        return self.head(self.features(x))


def fit_classifier(x: Tensor, y: Tensor) -> tuple[Classifier, float]:
    """Fit on four fifths of at most 30,000 images in [-1, 1]; returns the accuracy on the other fifth, too."""
    torch.manual_seed(1234)
    order = torch.randperm(len(x))[:30_000]
    held_out, seen = order[: len(order) // 5], order[len(order) // 5 :]
    net = Classifier()
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-2)
    for _ in range(max(4, 60_000 // len(seen))):
        for batch in seen[torch.randperm(len(seen))].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        return net.eval(), float((net(x[held_out]).argmax(1) == y[held_out]).float().mean())


@torch.no_grad()
def score(net: Classifier, x: Tensor, real: Tensor) -> dict[str, object]:
    """Fréchet distance to real images, confidence and class counts of images in [-1, 1]."""
    a, b = (torch.cat([net.features(i) for i in images.split(2000)]).double().numpy() for images in (x, real))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # tr sqrt(A B) is the sum of the roots of the eigenvalues, which are never negative for two covariances.
    trace_of_root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0)).sum()
    frechet = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * trace_of_root
    p = net(x).softmax(1)
    counts = torch.bincount(p.argmax(1), minlength=10)
    return {
        "frechet": round(float(frechet), 3),
        "sure_above_0.9": round(float((p.max(1).values > 0.9).float().mean()), 4),
        "counts": counts.tolist(),
    }
