"""Images → features, by the Inception network of publications or by any vision model of transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel

from ...data.pixels import check_pixels
from ...progress import progress
from .inception import NUM_CLASSES, NUM_FEATURES, WEIGHTS, WEIGHTS_SHA256, open_inception

INCEPTION = "inception"
SHORT = 16  # digits of a hash that people read
CHANNELS = (1, 3)  # of images that networks look at: grayscale and RGB


class Features(NamedTuple):
    """The features of N images: float32 on the CPU."""

    pooled: Tensor  # (N, D)
    logits: Tensor  # (N, 1008), Inception's, without their bias; (N, 0) from other networks

    @property
    def is_inception(self) -> bool:
        """Whether they are by Inception, which names its distances."""
        return self.logits.shape[1] > 0


@dataclass(frozen=True)
class Extractor:
    """A network that turns images into features.

    Args:
        identity: all that the features of an image depend on: network, hash of its weights, how it resizes.
        num_features: D.
        network: uint8 (B, 3, H, W) on the CPU → (B, D + num_logits), on any device.
        num_logits: how many logits follow the features; 0 for other networks than Inception.
        warnings: caveats that belong beside every number measured with it.
    """

    identity: str
    num_features: int
    network: Callable[[Tensor], Tensor]
    num_logits: int = 0
    warnings: tuple[str, ...] = ()

    @torch.no_grad()
    def __call__(self, images: Tensor, batch_size: int = 64, show_progress: bool = True) -> Features:
        """The features of images, uint8 of shape (N, 1 or 3, H, W); grayscale is repeated in all three channels.

        Every process passes all the images and gets all the features; the batches are distributed among them. The
        batches are the same for any number of processes, and so is every feature.

        Raises:
            ValueError: for images of another kind, before anything is computed; for features that are not finite.
        """
        check_images(images)
        state = PartialState()
        table = torch.zeros(len(images), self.num_features + self.num_logits)
        batches = list(zip(images.split(batch_size), table.split(batch_size), strict=True))
        is_shown = show_progress and state.is_main_process
        own = batches[state.process_index :: state.num_processes]
        for pixels, rows in progress(own, desc="Extracting features", unit="batch", is_shown=is_shown):
            rows.copy_(self.network(pixels.cpu().expand(-1, 3, -1, -1)))
        if state.num_processes > 1:
            table = reduce(table.to(state.device), "sum").cpu()  # of one row and zeros, which is exact
        if not table.isfinite().all():
            raise ValueError(f"features hold NaN or infinity: the weights of {self.identity} are damaged.")
        return Features(*table.split([self.num_features, self.num_logits], dim=1))


def check_images(images: Tensor) -> None:
    """Raise a ValueError unless images are uint8 of shape (N, C, H, W), not empty, with one channel or three."""
    check_pixels(images)
    if images.shape[1] not in CHANNELS:
        raise ValueError(
            f"`images` have {images.shape[1]} channels, but feature extractors take 1 (grayscale) or 3 (RGB): "
            "composite them over a background, or measure the colour channels only."
        )


def open_extractor(
    name: str | None = None, *, inception_weights: Path | None = None, device: torch.device | None = None
) -> Extractor:
    """Load a feature extractor, and try it on an image.

    Args:
        name: "inception", or None for the same: the network that FID, KID and IS are defined by. Anything else is a
            model of transformers with an image processor, a name on the Hub or a folder: its pooled output, or the mean
            of its last hidden state if it has none; the image embedding of models of images and text (CLIP and kin).
        inception_weights: torch-fidelity's file of weights, for machines that can't download it.
        device: of the network; by default that of this process.

    Raises:
        ValueError: for a missing package, model or file; states what was looked for, and where to get it.
    """
    device = PartialState().device if device is None else device
    if name is not None and name != INCEPTION:
        if inception_weights is not None:
            raise ValueError(
                f"`inception_weights` is {str(inception_weights)!r}, but `feature_extractor` is {name!r}, another "
                "network: leave one of them out."
            )
        return _open_transformers(name, device)
    network, title, digest = open_inception(inception_weights, device)
    identity = f"{title}, weights {digest[:SHORT]}, resized to 299 as by TensorFlow 1"
    foreign = f"Inception's weights are not the published ones, {WEIGHTS}: not comparable to published values"
    warnings = () if digest == WEIGHTS_SHA256 else (foreign,)
    return Extractor(identity, NUM_FEATURES, network, NUM_CLASSES, warnings)


def _open_transformers(name: str, device: torch.device) -> Extractor:
    # Resized by Pillow if the processor supports it, so that features do not depend on what else is installed.
    try:
        processor = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
        model, report = AutoModel.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"`feature_extractor` is {name!r}, which can't be loaded ({reason}): it must be 'inception', or a model of "
            "transformers with safetensors weights and an image processor, without code of its own; on the Hub or in a "
            "folder."
        ) from error
    untrained = sorted(report["missing_keys"])  # which from_pretrained has initialized randomly
    has_pooler = not any("pooler" in key for key in untrained)
    if any("pooler" not in key for key in untrained):
        raise ValueError(f"`feature_extractor` is {name!r}, whose weights have no {untrained[0]}: they are incomplete.")
    model.eval().to(device)

    def outputs(images: Tensor) -> tuple[Tensor, str]:
        inputs = processor(images=list(images), return_tensors="pt")
        return _pool(model, inputs["pixel_values"].to(device), has_pooler)

    with torch.no_grad():
        features, taken = outputs(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    if features.ndim != 2:
        shape = tuple(features.shape)
        raise ValueError(
            f"`feature_extractor` is {name!r}, whose {taken} of shape {shape} is not one vector per image."
        )
    identity = (
        f"{Path(name).name if Path(name).is_dir() else name}, {taken} of {type(model).__name__}, weights "
        f"{_hash_of_weights(model)}, resized by {type(processor).__name__} {_hash_of_settings(processor)}"
    )
    return Extractor(identity, features.shape[1], lambda images: outputs(images)[0])


def _pool(model: Any, pixels: Tensor, has_pooler: bool) -> tuple[Tensor, str]:
    """One vector per image, and a description of it."""
    if hasattr(model, "get_image_features"):
        embedding = model.get_image_features(pixel_values=pixels)
        return embedding if isinstance(embedding, Tensor) else embedding.pooler_output, "image embedding"
    output = model(pixel_values=pixels)
    if has_pooler and getattr(output, "pooler_output", None) is not None:
        return output.pooler_output.flatten(1), "pooled output"
    hidden = output.last_hidden_state  # (B, positions, D) of transformers, (B, D, H, W) of convolutional networks
    return hidden.mean(1) if hidden.ndim == 3 else hidden.mean((2, 3)), "mean of the last hidden state"


def _hash_of_weights(model: nn.Module) -> str:
    # Not `hash_weights` of storage: this hash names the extractor in results and caches of version 0.1.0, too.
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()[:SHORT]


def _hash_of_settings(processor: Any) -> str:
    settings = json.dumps(processor.to_dict(), sort_keys=True, default=str)
    return hashlib.sha256(settings.encode()).hexdigest()[:SHORT]
