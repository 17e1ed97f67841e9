"""The weights of a network, and of a saved one: hashes that identify them, and their size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import UNet2DModel


def hash_weights(network: torch.nn.Module) -> str:
    """SHA-256 over the names, types, shapes and values of a network's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_loaded_weights(folder: Path) -> str:
    """`hash_weights` of a saved pipeline's network, which does not depend on how its files divide the weights."""
    return hash_weights(UNet2DModel.from_pretrained(folder, subfolder="unet"))


def hash_weight_files(folder: Path) -> str:
    """A hash of a saved pipeline's weight files as they are, without loading them."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("unet/*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def size_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that these tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
