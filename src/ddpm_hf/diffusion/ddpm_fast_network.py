"""A network's twin for sampling: in another precision, and compiled.

The network itself stays as it is, and so does what is saved of it. The trajectory stays float32: only the network's own
arithmetic changes. `sampling/fast.py` of ddpm-hf, which is not copied, chooses what is faster on a machine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from diffusers import UNet2DModel
from torch import Tensor


class FastNetwork:
    """The twin of a network, called as the network is, for inference alone and by one thread alone.

    Args:
        unet: the network. It is copied; `is_twin_of` detects later changes.
        dtype: of the twin's weights and activations. Below float32, a CPU gets images channels last.

    Raises:
        ValueError: where the network is offloaded or cast layer by layer.
    """

    def __init__(self, unet: UNet2DModel, dtype: torch.dtype) -> None:
        if hasattr(unet, "_hf_hook") or hasattr(unet, "_diffusers_hook"):
            raise ValueError(
                "fast sampling needs the network in one place and precision: leave out the offloading, or this call."
            )
        self.dtype, self._state = dtype, network_state(unet)
        self._network = copy.deepcopy(unet).eval().requires_grad_(False)
        # On a GPU, group normalization would undo the other order; compiled, it can be chosen.
        is_channels_last = dtype != torch.float32 and unet.device.type == "cpu"
        self._memory_format = torch.channels_last if is_channels_last else torch.contiguous_format
        # Not the `to` of diffusers, which warns of layers to be kept in float32 where there are none.
        torch.nn.Module.to(self._network, dtype).to(memory_format=self._memory_format)
        self._compiled: Callable[..., tuple[Tensor]] | None = None
        self._compiled_batch_size: int | None = None

    @torch.no_grad()  # inference mode would make tensors of another kind, for which it would be compiled again
    def __call__(
        self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, return_dict: bool = False
    ) -> tuple[Tensor]:
        """The prediction (B, C, H, W), in the dtype of the network, for x of any floating dtype and its timestep."""
        x = x.to(self.dtype)
        if self._compiled is None or len(x) != self._compiled_batch_size:
            return self._network(x, t, class_labels=class_labels, return_dict=False)
        torch.compiler.cudagraph_mark_step_begin()  # the output of the last call may be overwritten
        return self._compiled(x, t, class_labels=class_labels, return_dict=False)

    def compile(self, batch_size: int) -> None:
        """Compile for calls with B images, at the first of them; calls with other numbers stay uncompiled.

        On a GPU the calls become a CUDA graph.
        """
        self._network.to(memory_format=torch.channels_last)  # compiled, it pays in float32 too
        mode = "reduce-overhead" if self._network.device.type == "cuda" else None  # CUDA graphs, with static buffers
        self._compiled = torch.compile(self._network, fullgraph=True, dynamic=False, mode=mode)
        self._compiled_batch_size = batch_size

    def undo_compile(self) -> None:
        """Stay uncompiled for calls with any number of images."""
        self._compiled = self._compiled_batch_size = None
        self._network.to(memory_format=self._memory_format)

    def is_twin_of(self, unet: UNet2DModel) -> bool:
        """Whether the network still has the weights, on the same device, that this one was copied from."""
        return self._state == network_state(unet)


def network_state(unet: UNet2DModel) -> tuple[object, ...]:
    """What changes when weights are moved, converted, replaced or written to.

    The norms cost one wait for the device per trajectory. Tensors do count the writes to them, but not those through
    `.data`, which is how `EMAModel` writes.
    """
    norms = torch.stack([p.detach().float().norm() for p in unet.parameters()]).tolist()
    return tuple((p.data_ptr(), p.dtype, norm) for p, norm in zip(unet.parameters(), norms, strict=True))
