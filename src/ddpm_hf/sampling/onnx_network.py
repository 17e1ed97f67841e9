"""A network in ONNX: written to a file, and run by onnxruntime in place of PyTorch."""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from ..diffusion.ddpm_fast_network import network_state
from ..diffusion.pipeline import image_size

OPSET = 20
PACKAGES = ("onnx", "onnxruntime", "onnxscript")  # of the extra [onnx]
MAX_PROTOBUF = 2_000_000_000  # bytes of a file; larger weights lie beside it


def missing_packages() -> list[str]:
    """The packages of the extra [onnx] that are not installed."""
    return [name for name in PACKAGES if find_spec(name) is None]


def write_onnx(unet: UNet2DModel, file: Path, dtype: torch.dtype = torch.float32, *, quickly: bool = False) -> None:
    """Write a network: `prediction` (B, C or 2C, H, W) from `x` (B, C, H, W), `t` (B,) and, where it has classes,
    `class_labels` (B,); int64 or float32, for any B ≥ 1.

    Args:
        unet: it stays as it is.
        dtype: of the weights and the arithmetic; `x` and `prediction` are float32 whatever it is.
        quickly: by the exporter of PyTorch that traces, in a twentieth of the time. It is deprecated, but a job that
            samples for a minute can't wait for the other. The file is as fast.

    Raises:
        ValueError: where the network can't be exported.
    """
    network = _Exported(unet, dtype)
    device = unet.device
    x = torch.zeros(2, unet.config.in_channels, *image_size(unet), device=device)
    inputs = {"x": x, "t": torch.tensor([1, 0], device=device)}
    if unet.config.num_class_embeds:
        inputs["class_labels"] = torch.zeros(2, dtype=torch.long, device=device)
    options: dict[str, Any] = {"input_names": list(inputs), "output_names": ["prediction"], "opset_version": OPSET}
    if quickly:
        options |= {"dynamo": False, "dynamic_axes": {name: {0: "B"} for name in (*inputs, "prediction")}}
    else:
        dynamic = torch.export.Dim.DYNAMIC
        options |= {"dynamo": True, "dynamic_shapes": {name: {0: dynamic} for name in inputs}, "verbose": False}
        options["external_data"] = unet.num_parameters() * dtype.itemsize > MAX_PROTOBUF
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it says that there is no torchvision
            torch.onnx.export(network, tuple(inputs.values()), str(file), **options)
    except Exception as error:  # whatever exporters raise
        reason = next(iter(str(error).strip().splitlines()), "without a message")
        raise ValueError(f"the network can't be exported to ONNX ({type(error).__name__}: {reason}).") from error
    if not quickly:
        _remove_traces(file)


def _remove_traces(file: Path) -> None:
    """Remove what the exporter notes of every node: lines of source code, with paths of this machine."""
    import onnx

    model = onnx.load(file, load_external_data=False)
    for thing in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        del thing.metadata_props[:]
    for node in model.graph.node:
        node.doc_string = ""
    onnx.save(model, file)


def optimize_onnx(file: Path) -> bool:
    """Replace a file by what onnxruntime makes of it when it loads it, on any machine; False if it is too large.

    Only what WebGPU computes, too, is fused.
    """
    import onnxruntime

    if file.stat().st_size > MAX_PROTOBUF // 2 or any(file.parent.glob(f"{file.name}.*")):
        return False
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(file.with_suffix(".optimized"))
    onnxruntime.InferenceSession(
        str(file), options, providers=["CPUExecutionProvider"],
        disabled_optimizers=["MatMulScaleFusion", "MatmulTransposeFusion"],
    )  # fmt: skip
    file.with_suffix(".optimized").replace(file)
    return True


def open_session(file: Path) -> Any:
    """An onnxruntime session on the CPU, with as many threads as PyTorch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


class OnnxNetwork:
    """A network's twin that onnxruntime computes on the CPU, in float32, called as the network is, for inference alone.

    Args:
        unet: the network, on the CPU.

    Raises:
        ValueError: where it can't be exported.
    """

    dtype = torch.float32

    def __init__(self, unet: UNet2DModel) -> None:
        self._state = network_state(unet)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            write_onnx(unet, file, quickly=True)
            self._session = open_session(file)

    def __call__(
        self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, return_dict: bool = False
    ) -> tuple[Tensor]:
        """The prediction (B, C, H, W), float32, for x and its timestep."""
        inputs = {"x": x.float().contiguous().numpy(), "t": t.expand(len(x)).contiguous().numpy()}
        if class_labels is not None:
            inputs["class_labels"] = class_labels.contiguous().numpy()
        return (torch.from_numpy(self._session.run(None, inputs)[0]),)

    def is_twin_of(self, unet: UNet2DModel) -> bool:
        """Whether the network still has the weights, on the same device, that this one was made from."""
        return self._state == network_state(unet)


class _Exported(nn.Module):
    def __init__(self, unet: UNet2DModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        # Not the `to` of diffusers, which warns of layers to be kept in float32 where there are none.
        self.network = nn.Module.to(copy.deepcopy(unet).eval().requires_grad_(False), dtype)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self.network(x.to(self.dtype), t, class_labels=class_labels, return_dict=False)[0].float()
