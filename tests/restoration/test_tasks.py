"""At what size a photograph is worked on."""

import pytest
import torch

from ddpm_hf.restoration.photos import Photo
from ddpm_hf.restoration.tasks import inpainting


def hole(*spans):
    found = torch.zeros(40, 60, dtype=torch.bool)
    for rows, columns in spans:
        found[rows, columns] = True
    return found


SCRATCH = hole((slice(2, 5), slice(0, 60)), (slice(10, 40), slice(20, 24)))  # up to 4 pixels, a quarter of 16
BLOT = hole((slice(10, 16), slice(20, 26)))


@pytest.mark.parametrize(
    ("drawn", "options", "size"),
    [
        (SCRATCH, {}, (40, 60)),
        (BLOT, {}, (16, 24)),
        (BLOT, {"tiles": True}, (40, 60)),
        (SCRATCH | BLOT, {}, (16, 24)),
        (SCRATCH, {"most_tiles": 3}, (16, 24)),
    ],
    ids=["thin", "thick", "thick, in tiles", "both", "thin, but too long"],
)
def test_thin_holes_are_painted_at_the_scale_of_the_photograph(drawn, options, size):
    photo = Photo(torch.full((3, 40, 60), 128, dtype=torch.uint8))
    assert inpainting(photo, drawn, (16, 16), **{"tiles": False, **options}).size == size
