"""Which training images the samples are nearest to, and whether they are nearer to them than new images are."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm

from ...distributed import sum_over_processes

CHUNK = 2048  # rows of both sides at a time: 50,000 against 50,000 need no more memory than 2048 against 2048
NEAR = 0.05  # of the held-out images lie nearer to the training set than what is called near here
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
        share: of the samples, nearer to a training image than 95 % of the held-out images are: 0.05 for a model that
            draws new images from the data's distribution, 1 for one that hands out its training images.
        standard_error: of the share, for the numbers of samples and of held-out images.
        threshold: the distance that 5 % of the held-out images lie below; 0 where as many are in the training set.
        expected: the share of a model that draws new images: 0.05, but at a threshold of 0 that of the held-out images
            that are copies themselves.
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
    own: Tensor | None = None,
    title: str = "Neighbours",
    show_progress: bool = True,
) -> Neighbours:
    """The k nearest of M points for every query, by Euclidean distance, exactly.

    Squared distances are ‖q‖² + ‖r‖² - 2 q·r in float64, which for 8-bit images are integers without any rounding.
    Under `accelerate launch` the queries are shared out by index, and every process ends with all of them.

    Args:
        queries: (N, …), of any type and shape of a point: uint8 images and features alike.
        points: (M, …).
        k: neighbours of each.
        own: (N,), the index of the point that each query is itself, and that does not count.

    Raises:
        ValueError: for points of different shapes, and for fewer than k of them.
    """
    available = len(points) - (own is not None)
    if queries.shape[1:] != points.shape[1:]:
        raise ValueError(f"points of shape {tuple(queries.shape[1:])} have no distance to {tuple(points.shape[1:])}.")
    if available < k:
        raise ValueError(
            f"{k} nearest neighbours were asked for, but there are only {available} points to choose from."
        )
    state = PartialState()
    mine = torch.arange(len(queries))[state.process_index :: state.num_processes]
    table = torch.zeros(2, len(queries), k, dtype=torch.float64)
    blocks = mine.split(CHUNK) if len(mine) else ()
    for rows in tqdm(blocks, desc=title, unit="block", disable=not (show_progress and state.is_main_process)):
        table[:, rows] = torch.stack(_block(queries[rows], points, k, None if own is None else own[rows]))
    squares, indices = sum_over_processes(table)
    return Neighbours(squares.sqrt(), indices.long())


def _block(queries: Tensor, points: Tensor, k: int, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """Squared distances and indices of the k nearest points, (B, k) each."""
    q = queries.flatten(1).double()
    squares = indices = torch.empty(len(q), 0, dtype=torch.float64)
    for start in range(0, len(points), CHUNK):
        p = points[start : start + CHUNK].flatten(1).double()
        numbers = torch.arange(start, start + len(p))
        norms = q.square().sum(1, keepdim=True) + p.square().sum(1)
        d = norms - 2 * q @ p.T
        d[d < ROUNDING * norms] = 0
        if own is not None:
            d[own[:, None] == numbers] = math.inf
        squares = torch.cat([squares, d], dim=1)
        indices = torch.cat([indices, numbers.double().expand(len(q), -1)], dim=1)
        squares, order = squares.topk(min(k, squares.shape[1]), largest=False)
        indices = indices.gather(1, order)
    return squares, indices


def memorization(samples: Tensor, held_out: Tensor) -> Memorization:
    """Compare distances to the nearest training image: those of samples with those of images that are new to it.

    In the spirit of the test for data copying of Meehan et al. (2020, arXiv 2004.05675). Smooth and dark samples are
    near to everything, so that a share above 5 % is a reason to look at the pairs, not a proof.

    The variance of a share k/n is p(1 - p)/n with Laplace's p = (k + 1)/(n + 2), which is not 0 where k is 0 or n.

    Args:
        samples: (N,), of each sample.
        held_out: (M,), of each held-out image; where there are none, of training images to all the others.
    """
    threshold, expected = float(held_out.double().quantile(NEAR)), NEAR
    near = samples.double() < threshold
    if threshold == 0:  # nothing is nearer than a copy
        near, expected = samples == 0, float((held_out == 0).double().mean())
    n = len(samples)
    p = (float(near.sum()) + 1) / (n + 2)
    variance = p * (1 - p) / n + expected * (1 - expected) / len(held_out)
    return Memorization(float(near.double().mean()), math.sqrt(variance), threshold, expected)
