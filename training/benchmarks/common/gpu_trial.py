"""What the parts of prove_gpu.py share: sizes, networks, pipelines and runs on the GPU, or tiny ones on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products, for whoever asks for them

import torch
from accelerate.state import AcceleratorState
from common.networks import NETWORKS
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file
from torch import Tensor

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.config.training import TrainConfig
from ddpm_hf.training.loop import train

ROOT = Path(__file__).parents[3]
# A run as a process, deterministic: sys.argv[1] is its options as JSON.
DETERMINISTIC_RUN = """\
import json, sys, torch
torch.use_deterministic_algorithms(True, warn_only=True)
from ddpm_hf.config.training import TrainConfig
from ddpm_hf.training.loop import train
train(TrainConfig(**json.loads(sys.argv[1])))
"""


class Trial:
    """The device and the sizes of a part, and a folder for what it writes."""

    def __init__(self, dry_run: bool) -> None:
        self.dry_run = dry_run
        self.device = torch.device("cpu" if dry_run else "cuda")
        tiny = {**NETWORKS["tiny"], "block_out_channels": [8, 16, 16], "norm_num_groups": 4, "attention_head_dim": 4}
        self.network_options = {**(tiny if dry_run else NETWORKS["paper"]), "in_channels": 3, "out_channels": 3}
        self.batch, self.steps = (2, 4) if dry_run else (64, 50)
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.folder = Path(self._folder.name)
        if dry_run:
            torch.set_num_threads(1)

    def close(self) -> None:
        """Remove what was written."""
        self._folder.cleanup()

    @property
    def image(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        size = self.network_options["sample_size"]
        return 3, size, size

    def sync(self) -> None:
        """Wait for the GPU."""
        if not self.dry_run:
            torch.cuda.synchronize()

    def forbid_waits(self, forbidden: bool) -> None:
        """From here on, what waits for the GPU raises, or does not."""
        if not self.dry_run:
            torch.cuda.set_sync_debug_mode("error" if forbidden else "default")

    # --- sampling ---

    def network(self) -> UNet2DModel:
        """Random weights, the same each time, on the CPU."""
        torch.manual_seed(0)
        return UNet2DModel(**self.network_options).eval()

    def pipeline(
        self, kind: type[DDPMPipeline] = DDPMPipelineCustom, dtype: torch.dtype = torch.float32
    ) -> DDPMPipeline:
        """On the device."""
        pipe = kind(self.network().to(self.device, dtype), DDPMScheduler())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def fast_pipeline(self, batch: int, compiled: bool) -> DDPMPipelineCustom:
        """With the twin that `enable_fast_sampling` would make for a long job, or a short one."""
        pipe = self.pipeline()
        dtype = torch.bfloat16 if self.dry_run or torch.cuda.is_bf16_supported() else torch.float16
        pipe.use_fast_network(dtype)
        if compiled:
            pipe._fast_network.compile(batch)
        return pipe

    def generators(self, count: int, device: str = "cpu") -> list[torch.Generator]:
        """One per image."""
        return [torch.Generator(device).manual_seed(i) for i in range(count)]

    # --- training ---

    def options(self, name: str, **changes: Any) -> dict[str, Any]:
        """Those of a short run of nothing but updates, into a folder of that name."""
        size = self.network_options["sample_size"]
        own = ("in_channels", "out_channels", "sample_size")
        return {
            "dataset_name": "digits", "resolution": size, "channels": 3, "output_dir": str(self.folder / name),
            "unet": {k: v for k, v in self.network_options.items() if k not in own}, "train_batch_size": self.batch,
            "max_train_steps": 20, "use_ema": True, "random_flip": True, "report_to": ["none"], "eval_batch_size": 2,
            "ddpm_num_inference_steps": 2, "save_images_steps": 0, "calibration_images": 0, "lr_warmup_steps": 5,
            "checkpointing_steps": 10_000, "cache_dir": str(self.folder / "cache"), "overwrite_output_dir": True,
            **changes,
        }  # fmt: skip

    def train(self, name: str, **changes: Any) -> dict[str, Tensor]:
        """A run in this process; what its last checkpoint holds."""
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.compiler.reset()
        options = self.options(name, **changes)
        train(TrainConfig(**options))
        return self.state(name, options["max_train_steps"])

    def start(self, options: dict[str, Any], launcher: tuple[str, ...] = (), **environment: str) -> subprocess.Popen:
        """A deterministic run in a process of its own, which writes into `log`."""
        script = self.folder / "run.py"
        script.write_text(DETERMINISTIC_RUN)
        paths = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
        extra = {"ACCELERATE_USE_CPU": "true"} if self.dry_run else {}
        return subprocess.Popen(
            [*(launcher or (sys.executable,)), str(script), json.dumps(options)],
            stdout=(self.folder / "log").open("a"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": paths, **extra, **environment},
        )

    def finish(self, process: subprocess.Popen) -> None:
        """Wait for a run, which must succeed."""
        if process.wait():
            raise RuntimeError(f"a run ended with {process.returncode}: {(self.folder / 'log').read_text()[-800:]}")

    def state(self, name: str, step: int) -> dict[str, Tensor]:
        """The tensors of a checkpoint: weights, optimizer and what is exported."""
        folder = self.folder / name / f"checkpoint-{step}"
        files = ("training_state/weights", "training_state/optimizer", "unet/diffusion_pytorch_model")
        return {f"{f}/{k}": v for f in files for k, v in load_file(folder / f"{f}.safetensors").items()}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖, in float64."""
    a, b = actual.cpu().double(), expected.cpu().double()
    return float((a - b).norm() / b.norm())


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[int, float]:
    """How many tensors differ in any bit, and the largest difference of two numbers."""
    different = [name for name in one if not torch.equal(one[name], other[name])]
    return len(different), max((float((one[n] - other[n]).abs().max()) for n in different), default=0.0)
