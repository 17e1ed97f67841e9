"""The weights in a saved pipeline's folder, and which figures and pictures there were measured with them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from diffusers import UNet2DModel


def weights_digest(folder: Path) -> str:
    """A hash that tells one set of weights from another."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("unet/*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def values_digest(folder: Path) -> str:
    """The hash of the weights as they load, which does not depend on how they are stored."""
    return hash_weights(UNet2DModel.from_pretrained(folder, subfolder="unet"))


def hash_weights(network: torch.nn.Module) -> str:
    """SHA-256 over the names, types, shapes and values of a network's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
