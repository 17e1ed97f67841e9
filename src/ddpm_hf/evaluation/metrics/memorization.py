"""Nearest training images of samples, and whether samples lie nearer to them than new images do."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from accelerate import PartialState
from torch import Tensor

from ...distributed import sum_over_processes
from ...progress import progress

CHUNK = 2048  # rows of both sides at a time: 50,000 against 50,000 need no more memory than 2048 against 2048
NEAR = 0.05  # the share of held-out images that lie nearer to the training set than the threshold
ROUNDING = 1e-12  # of a squared distance, relative to the squared norms: features of equal images differ by less


class Neighbours(NamedTuple):
    """The k nearest points of N queries, nearest first.

    Attributes:
        distances: Euclidean, float64 of shape (N, k).
        indices: which points they are, int64 of shape (N, k).
    """

    distances: Tensor
    indices: Tensor


class Memorization(NamedTuple):
    """How many samples lie nearer to the training set than new images do.

    Attributes:
        share: of the samples that are nearer to a training image than 95 % of the held-out images: 0.05 for a model
            that draws new images from the data's distribution, 1 for one that reproduces its training images.
        standard_error: of the share, for these numbers of samples and of held-out images.
        threshold: the 5 % quantile of the distances of held-out images; 0 if as many are copies of training images.
        expected: the share for a model that draws new images: 0.05, but at a threshold of 0 the share of copies among
            the held-out images.
    """

    share: float
    standard_error: float
    threshold: float
    expected: float = NEAR


def nearest_neighbours(
    queries: Tensor,
    points: Tensor,
    k: int = 3,
    *,
    exclude: Tensor | None = None,
    title: str = "Neighbours",
    show_progress: bool = True,
) -> Neighbours:
    """The k nearest of M points for every query, by Euclidean distance, exactly.

    Squared distances are ‖q‖² + ‖r‖² - 2 q·r in float64, which for 8-bit images are integers without any rounding.
    Under `accelerate launch` the queries are distributed by index, and every process gets all results.

    Args:
        queries: (N, …), of any type and shape of a point: uint8 images and features alike.
        points: (M, …).
        k: neighbours of each.
        exclude: (N,), the index of a point that is not counted as a neighbour of each query: the query itself.

    Raises:
        ValueError: for points of different shapes, and for fewer than k of them.
    """
    available = len(points) - (exclude is not None)
    if queries.shape[1:] != points.shape[1:]:
        raise ValueError(f"points of shape {tuple(queries.shape[1:])} have no distance to {tuple(points.shape[1:])}.")
    if available < k:
        raise ValueError(
            f"{k} nearest neighbours were requested, but there are only {available} points to choose from."
        )
    state = PartialState()
    mine = torch.arange(len(queries))[state.process_index :: state.num_processes]
    table = torch.zeros(2, len(queries), k, dtype=torch.float64)
    blocks = mine.split(CHUNK) if len(mine) else ()
    for rows in progress(blocks, desc=title, unit="block", is_shown=show_progress and state.is_main_process):
        table[:, rows] = torch.stack(_block(queries[rows], points, k, None if exclude is None else exclude[rows]))
    squares, indices = sum_over_processes(table)
    return Neighbours(squares.sqrt(), indices.long())


def _block(queries: Tensor, points: Tensor, k: int, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
    """Squared distances and indices of the k nearest points, (B, k) each."""
    q = queries.flatten(1).double()
    squares = indices = torch.empty(len(q), 0, dtype=torch.float64)
    for start in range(0, len(points), CHUNK):
        p = points[start : start + CHUNK].flatten(1).double()
        numbers = torch.arange(start, start + len(p))
        norms = q.square().sum(1, keepdim=True) + p.square().sum(1)
        d = norms - 2 * q @ p.T
        d[d < ROUNDING * norms] = 0
        if exclude is not None:
            d[exclude[:, None] == numbers] = math.inf
        squares = torch.cat([squares, d], dim=1)
        indices = torch.cat([indices, numbers.double().expand(len(q), -1)], dim=1)
        squares, order = squares.topk(min(k, squares.shape[1]), largest=False)
        indices = indices.gather(1, order)
    return squares, indices


def memorization(samples: Tensor, held_out: Tensor) -> Memorization:
    """Compare the distances of samples to their nearest training images with those of new images.

    In the spirit of the test for data copying of Meehan et al. (2020, arXiv 2004.05675). Smooth and dark samples are
    near to everything, so that a share above 5 % is a reason to look at the pairs, not a proof.

    The variance of a share k/n is p(1 - p)/n with Laplace's p = (k + 1)/(n + 2), which is not 0 for k = 0 or k = n.

    Args:
        samples: (N,), the distance of each sample.
        held_out: (M,), that of each held-out image; without held-out images, of training images to all the others.
    """
    threshold, expected = float(held_out.double().quantile(NEAR)), NEAR
    near = samples.double() < threshold
    if threshold == 0:  # nothing is nearer than a copy
        near, expected = samples == 0, float((held_out == 0).double().mean())
    n = len(samples)
    p = (float(near.sum()) + 1) / (n + 2)
    variance = p * (1 - p) / n + expected * (1 - expected) / len(held_out)
    return Memorization(float(near.double().mean()), math.sqrt(variance), threshold, expected)
