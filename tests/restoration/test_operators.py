"""Operators: adjoint, pseudo-inverse and resolvent against dense matrices, in float64; and Pillow's own resampling."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf.restoration.linear_maps import SpectralMap
from ddpm_hf.restoration.operators import (
    Blur,
    Compose,
    DeepInverse,
    Downsample,
    Grayscale,
    Inpaint,
    as_operator,
    resampling_matrix,
)

SHAPE = (3, 8, 8)
MASK = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) > 0.5


class Physics:
    """What a linear physics of deepinv offers."""

    def A(self, x):
        return x[..., ::2] - x[..., 1::2]

    def A_adjoint(self, y):
        return torch.stack([y, -y], dim=-1).flatten(-2)


OPERATORS = {
    "inpaint": Inpaint(MASK),
    "box": Downsample(2, "box"),
    "bicubic": Downsample(2),
    "grayscale": Grayscale(),
    "blur": Blur.gaussian(0.8),
    "motion blur": Blur(torch.tensor([[0.1, 0.2, 0.7]])),
    "separable twice": Compose(Grayscale(), Downsample(4, "box")),
    "blur, then smaller": Compose(Blur.gaussian(0.7), Downsample(2)),
    "holes, then smaller": Compose(Inpaint(MASK), Downsample(2, "box")),
    "deepinv": DeepInverse(Physics()),
}


def dense(linear):
    """The matrix of a linear map."""
    size = int(np.prod(SHAPE))
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *SHAPE)
    return linear(basis).reshape(size, -1).T


@pytest.fixture(params=OPERATORS)
def linear(request):
    return OPERATORS[request.param].bind(SHAPE, dtype=torch.float64)


def test_adjoint_and_forward_are_one_matrix_transposed(linear):
    x, y = torch.randn(2, *SHAPE, dtype=torch.float64), torch.randn(2, *linear.measurement_shape, dtype=torch.float64)
    torch.testing.assert_close((linear(x) * y).sum(), (x * linear.adjoint(y)).sum(), rtol=1e-12, atol=1e-12)


def test_pseudo_inverse_is_that_of_the_dense_matrix(linear):
    y = linear(torch.randn(2, *SHAPE, dtype=torch.float64))
    expected = torch.linalg.pinv(dense(linear), rtol=1e-8) @ y.flatten(1).T
    torch.testing.assert_close(linear.pinv(y).flatten(1).T, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(linear(linear.pinv(y)), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ridge", [0.03, torch.tensor([0.03, 2.0], dtype=torch.float64).reshape(2, 1, 1, 1)])
def test_equations_with_a_ridge_are_solved(linear, ridge):
    y, matrix = torch.randn(2, *linear.measurement_shape, dtype=torch.float64), dense(linear)
    for i, r in enumerate([0.03, 0.03] if isinstance(ridge, float) else ridge.flatten().tolist()):
        system = matrix @ matrix.T + r * torch.eye(len(matrix), dtype=torch.float64)
        expected = torch.linalg.solve(system, y[i].flatten())
        torch.testing.assert_close(linear.solve(y, ridge)[i].flatten(), expected, rtol=1e-9, atol=1e-9)


def test_functions_of_the_eigenvalues(linear):
    if not isinstance(linear, SpectralMap):
        pytest.skip("its eigenvalues are not known")
    y, matrix = torch.randn(1, *linear.measurement_shape, dtype=torch.float64), dense(linear)
    expected = matrix @ matrix.T @ (matrix @ (matrix.T @ y.flatten()))
    torch.testing.assert_close(linear.spectral(y, torch.square).flatten(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "filter"), [("bicubic", Image.Resampling.BICUBIC), ("box", Image.Resampling.BOX)])
def test_downsampling_is_that_of_pillow(name, filter):
    image = torch.rand(1, 1, 24, 36, generator=torch.Generator().manual_seed(1))
    small = Image.fromarray(image[0, 0].numpy()).resize((9, 6), filter)  # mode F: without rounding
    torch.testing.assert_close(Downsample(4, name)(image)[0, 0], torch.from_numpy(np.array(small)), atol=1e-6, rtol=0)


def test_grayscale_is_that_of_pillow():
    image = torch.randint(0, 256, (1, 3, 5, 7), dtype=torch.uint8)
    luma = Image.fromarray(image[0].permute(1, 2, 0).numpy()).convert("L")
    difference = Grayscale()(image.float())[0, 0] - torch.from_numpy(np.asarray(luma).copy()).float()
    assert difference.abs().max() <= 0.51


def test_constants_stay_constants():
    for operator in (Downsample(2), Downsample(2, "box"), Grayscale(), Blur.gaussian(1.0)):
        assert (operator(torch.full((1, *SHAPE), 0.3, dtype=torch.float64)) - 0.3).abs().max() < 1e-12
    assert (resampling_matrix(20, 5, "bicubic").sum(1) - 1).abs().max() < 1e-12


def test_a_mask_per_image():
    masks = torch.stack([MASK, ~MASK])[:, None]
    x = torch.randn(2, *SHAPE)
    torch.testing.assert_close(Inpaint(masks)(x), torch.cat([Inpaint(MASK)(x[:1]), Inpaint(~MASK)(x[1:])]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Inpaint(torch.full((8, 8), 0.5)), "`mask` has the value 0.5, but must be 1 .* and 0 .* threshold it"),
        (lambda: Inpaint(torch.ones(8)), r"`mask` has shape \(8,\)"),
        (lambda: Inpaint(torch.ones(4, 4)).bind(SHAPE), r"`mask` has shape \(1, 4, 4\).*the images have \(3, 8, 8\)"),
        (lambda: Downsample(3).bind(SHAPE), "`factor` is 3, but must divide the height and width of the images, 8×8"),
        (lambda: Downsample(1), "`factor` is 1, but must be an integer of at least 2"),
        (lambda: Downsample(2, "nearest"), "`filter` is 'nearest', but must be 'bicubic' or 'box'"),
        (lambda: Grayscale().bind((1, 8, 8)), "RGB images only, but these have 1 channel"),
        (lambda: Blur(torch.zeros(3, 3)), "sum 0, but must be a matrix of finite numbers with a positive sum"),
        (
            lambda: Blur(torch.ones(9, 9)).bind(SHAPE),
            r"`kernel` has shape \(9, 9\), but must not be larger than",
        ),
        (lambda: Blur.gaussian(0), "`std` is 0, but must be positive"),
        (lambda: Compose(), "needs at least one"),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_no_operator_is_named():
    with pytest.raises(TypeError, match="`operator` is a str, but must be an operator such as Inpaint"):
        as_operator("blur")
