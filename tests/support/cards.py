"""Model cards: facts for them, and what they hold."""

import re

import yaml
from huggingface_hub import EvalResult

from ddpm_hf.sharing.card import CardFacts

FID = EvalResult("unconditional-image-generation", "cifar10", "CIFAR-10", "fid", 3.17, metric_name="FID (50k)")

FACTS = CardFacts(
    repo_id="me/digits",
    license="mit",
    dataset="`digits`, 1,797 images",
    dataset_ids=["mnist"],
    options={"learning_rate": 2e-3, "use_ema": True, "snr_gamma": None},
    updates=3400,
    images_seen=108_800,
    seconds=3725.4,
    hardware="2 × CPU | core",
    results=[FID],
)


def card_of(folder):
    return (folder / "README.md").read_text("utf-8")


def metadata(card):
    return yaml.safe_load(card.split("---")[1])


def code_blocks(card):
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)
