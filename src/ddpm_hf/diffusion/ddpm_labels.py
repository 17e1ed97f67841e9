"""Class labels: the integers that a network takes, and the names that its configuration keeps for them.

The names of the labels 0 … n - 1 lie under `_label_names`, a key that diffusers ignores and keeps. A network that was
trained for guidance has one label more, without a name: the null label, which is the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

LABEL_NAMES = "_label_names"
SHOWN = 20  # names in a message


def label_names(config: Mapping[str, Any]) -> list[str]:
    """The names of the labels 0 … n - 1 by a network's configuration; none where it has no names.

    Raises:
        ValueError: for names that are not different texts, or more of them than the network has labels.
    """
    names, count = config.get(LABEL_NAMES), config.get("num_class_embeds") or 0
    if names is None:
        return []
    sound = isinstance(names, (list, tuple)) and len(names) <= count and all(isinstance(name, str) for name in names)
    if not sound or len(set(names)) < len(names):
        raise ValueError(
            f"the network's configuration has `{LABEL_NAMES}` {names!r:.100}, but needs a list of at most {count} "
            "different texts: correct it in unet/config.json, or remove it."
        )
    return list(names)


def find_label(name: str, config: Mapping[str, Any]) -> int:
    """The label of this name. Raises a ValueError that lists the names there are."""
    names = label_names(config)
    if name in names:
        return names.index(name)
    if not names:
        last = config["num_class_embeds"] - 1
        raise ValueError(
            f"`class_labels` has {name!r:.80}, but this model has no names for its labels: use numbers, 0 to {last}."
        )
    listed = ", ".join(f"{name!r:.80} ({i})" for i, name in enumerate(names[:SHOWN]))
    others = f", and {len(names) - SHOWN} more in unet/config.json" if len(names) > SHOWN else ""
    raise ValueError(f"`class_labels` has {name!r:.80}, but the names of the labels are {listed}{others}.")


def label_tensor(
    class_labels: int | str | Sequence[int | str] | Tensor | None, batch_size: int, config: Mapping[str, Any]
) -> Tensor:
    """One label, or B of them, each a number or a name, as int64 of shape (B,).

    Args:
        config: the configuration of a class-conditional network.

    Raises:
        ValueError: unless they are labels of this network.
    """
    count = config["num_class_embeds"]
    if class_labels is None:
        raise ValueError(
            f"`class_labels` are missing: the network is conditional on {count} labels (0 to {count - 1}). Pass one "
            "label, or one per image."
        )
    numbers: Any = class_labels
    if isinstance(class_labels, str):
        numbers = find_label(class_labels, config)
    elif isinstance(class_labels, (list, tuple)):
        numbers = [find_label(label, config) if isinstance(label, str) else label for label in class_labels]
    try:
        labels = torch.as_tensor(numbers)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`class_labels` is {class_labels!r}, but must be an integer, a name, or a list of them."
        ) from error
    if labels.numel() and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise ValueError(f"`class_labels` have dtype {labels.dtype}, but must be integers.")
    if labels.ndim == 0:
        labels = labels.repeat(batch_size)
    if labels.shape != (batch_size,):
        raise ValueError(
            f"`class_labels` have shape {tuple(labels.shape)}, but `batch_size` is {batch_size}: pass one label, or "
            f"{batch_size} of them."
        )
    if int(labels.min()) < 0 or int(labels.max()) >= count:
        wrong = int(labels[(labels < 0) | (labels >= count)][0])
        raise ValueError(f"`class_labels` has {wrong}, but every label must lie between 0 and {count - 1}.")
    return labels.long()
