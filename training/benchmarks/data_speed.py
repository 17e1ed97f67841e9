"""Images per second that the data alone can feed, beside the transform of diffusers' `train_unconditional.py`.

python training/benchmarks/data_speed.py FOLDER-OF-IMAGES      (needs torchvision)
"""

import argparse
import json
import sys
from itertools import repeat
from pathlib import Path

from common.timing import time_in_turns
from datasets import load_dataset
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))  # of a Python that has torchvision, and not us

from ddpm_hf.config.training import TrainConfig
from ddpm_hf.data.dataset import load_images
from ddpm_hf.data.pixels import normalize, random_flip


def main() -> None:
    """Cached uint8 batches, scaled and flipped, beside the script's DataLoader; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--cache_dir")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--train_batch_size", type=int, default=16)
    options = parser.parse_args()
    batch = options.train_batch_size

    from torchvision import transforms

    steps = transforms.Compose(
        [
            transforms.Resize(options.resolution, interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.CenterCrop(options.resolution),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    files = load_dataset("imagefolder", data_dir=options.folder, cache_dir=options.cache_dir, split="train")
    files.set_transform(lambda rows: {"input": [steps(image.convert("RGB")) for image in rows["image"]]})
    loader = DataLoader(files, batch_size=batch, shuffle=True, drop_last=True)
    stock = (rows["input"] for epoch in repeat(loader) for rows in epoch)

    config = TrainConfig(
        train_data_dir=options.folder, cache_dir=options.cache_dir, resolution=options.resolution, center_crop=True
    )
    ours = load_images(config, show_progress=False).batches(0, batch, batch, seed=0)
    peers = {"stock": lambda: next(stock), "ours": lambda: random_flip(normalize(next(ours).pixels))}
    seconds = time_in_turns(peers, repeats=9, calls=16)
    print(json.dumps({name: batch / duration for name, duration in seconds.items()}))


if __name__ == "__main__":
    main()
