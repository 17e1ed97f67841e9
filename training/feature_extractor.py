"""A small feature extractor for `ddpm-hf evaluate --feature_extractor`, where Inception's weights are out of reach.

    python training/feature_extractor.py --dataset digits --output_dir digits-resnet
    python training/feature_extractor.py --dataset FOLDER-OF-PARQUET --output_dir fashion-resnet

A ResNet of transformers learns the classes of a labelled dataset; distances are measured in its 64 pooled features. The
folder holds safetensors and an image processor, as any vision model of the Hub does. The figures compare models of the
same data that were measured with the same extractor, and nothing else.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import trange
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from ddpm_hf.config.training import TrainConfig
from ddpm_hf.data.dataset import load_images

SIDE = 32  # of the network's input, whatever the size of the images


def build(label_names: list[str]) -> ResNetForImageClassification:
    """Three stages of one basic block each, 64 features; 167,000 parameters."""
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 64],
        depths=[1, 1, 1],
        layer_type="basic",
        id2label=dict(enumerate(label_names)),
        label2id={name: i for i, name in enumerate(label_names)},
    )
    return ResNetForImageClassification(config)


def fit(network: nn.Module, x: Tensor, y: Tensor, updates: int) -> None:
    """Adam with a learning rate that falls to zero; images are shifted by up to two pixels."""
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, updates)
    network.train()
    for _ in trange(updates, desc="Training", unit="update"):
        batch = torch.randint(len(x), (64,))
        shift = torch.randint(-2, 3, (2,)).tolist()
        logits = network(torch.roll(x[batch], shift, (2, 3))).logits
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, y[batch]).backward()
        optimizer.step()
        schedule.step()
    network.eval()


def main() -> None:
    """Train on four fifths of the images, test on the others, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", help="as for `ddpm-hf evaluate`")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--resolution", type=int, default=16, help="of the model that will be measured")
    parser.add_argument("--num_images", type=int, default=20_000, help="at most so many")
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--output_dir", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)

    config = TrainConfig(
        dataset_name=options.dataset, label_column=options.label_column, resolution=options.resolution, channels=3
    )
    images = load_images(config)
    batch = next(images.batches(0, min(options.num_images, len(images)), 1, 0))
    processor = ViTImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    x = torch.cat([processor(images=list(p), return_tensors="pt")["pixel_values"] for p in batch.pixels.split(1000)])
    held_out = len(x) // 5
    network = build(images.label_names)
    fit(network, x[held_out:], batch.labels[held_out:], options.updates)
    with torch.no_grad():
        answers = torch.cat([network(part).logits.argmax(1) for part in x[:held_out].split(500)])
    print(f"{(answers == batch.labels[:held_out]).float().mean():.1%} of {held_out} held-out images are read right.")
    network.save_pretrained(options.output_dir)
    processor.save_pretrained(options.output_dir)
    print(f"Use it with: --feature_extractor {options.output_dir}")


if __name__ == "__main__":
    main()
