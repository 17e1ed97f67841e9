"""The Inception network that FID, KID and IS are defined by: TensorFlow's of 2015, translated by torch-fidelity."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import torch
from accelerate import PartialState
from huggingface_hub.constants import HF_HUB_OFFLINE
from torch import Tensor

NUM_FEATURES = 2048
NUM_CLASSES = 1008
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"
INSTALL = 'pip install "ddpm-hf[eval]"'


def open_inception(weights: Path | None, device: torch.device) -> tuple[Callable[[Tensor], Tensor], str, str]:
    """Load the network.

    Args:
        weights: a file of weights in place of the one that is downloaded.

    Returns:
        The network, uint8 (B, 3, H, W) on any device → (B, 2048 + 1008), features and logits without their bias; its
        name; and the SHA-256 of the file of weights.

    Raises:
        ValueError: for a missing package or file; states where to get it.
    """
    try:
        import torch_fidelity
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision for another torch
        raise ValueError(
            f"Inception needs the packages torch-fidelity and torchvision ({error}): {INSTALL}, or measure with a "
            "model of transformers, for example --feature_extractor facebook/dinov2-base."
        ) from error
    file = downloaded_weights() if weights is None else Path(weights)
    try:
        # torch-fidelity unpickles anything: it gets tensors that were loaded safely, pickled again.
        stream = BytesIO()
        torch.save(torch.load(file, map_location="cpu", weights_only=True), stream)
        stream.seek(0)
        network = torch_fidelity.FeatureExtractorInceptionV3(
            "inception-v3-compat", [str(NUM_FEATURES), "logits_unbiased"], feature_extractor_weights_path=stream
        ).to(device)
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
    except Exception as error:  # of damaged files, nearly any
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ValueError(
            f"`inception_weights` is {str(file)!r}, which can't be used ({reason}): it must be torch-fidelity's "
            f"{WEIGHTS}, from {URL}."
        ) from error
    name = f"Inception V3 of torch-fidelity {torch_fidelity.__version__}"
    return lambda images: torch.cat(network(images.to(device)), 1), name, digest


def downloaded_weights() -> Path:
    """The file of weights, downloaded to the place where torch-fidelity looks for it, too.

    Raises:
        ValueError: if it can't be downloaded; states how else to get it.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    state = PartialState()
    with state.local_main_process_first():
        if file.is_file():
            return file
        try:
            if HF_HUB_OFFLINE:
                raise OSError("HF_HUB_OFFLINE is set")
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(file), WEIGHTS_SHA256, progress=state.is_local_main_process)
        except (OSError, RuntimeError) as error:  # RuntimeError: the download has another hash
            raise ValueError(
                f"the weights of Inception can't be downloaded ({error}): get {URL} on a machine that can, and pass "
                f"the file with --inception_weights, or put it at {file}."
            ) from error
    return file
