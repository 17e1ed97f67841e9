"""Two processes that share the weights of a network (FSDP2 on a CPU): state → checkpoint → state. By two_processes."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_hf.config.training import TrainConfig
from ddpm_hf.diffusion.pipeline import DDPMPipelineCustom
from ddpm_hf.diffusion.scheduling_ddpm_custom import DDPMSchedulerCustom
from ddpm_hf.distributed import Agreement
from ddpm_hf.storage.checkpoint import save_checkpoint
from ddpm_hf.training.network import build_ema, build_unet
from ddpm_hf.training.plan import Plan
from ddpm_hf.training.state import Run, capture, restore
from ddpm_hf.training.step import skip_unless_finite, update_ema
from support.runs import TINY_OPTIONS

accelerator = Accelerator(cpu=True)
output_dir = Path(sys.argv[1]) / "sharded"
config = TrainConfig(**{**TINY_OPTIONS, "max_train_steps": 10, "output_dir": str(output_dir)})


class OnShards(TorchDispatchMode):
    """Within this context, an operation on tensors that know of other processes, hundreds of times slower, fails."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert DTensor not in types, func
        return func(*args, **(kwargs or {}))


def make(seed: int) -> Run:
    torch.manual_seed(seed)
    unet = build_unet(config)
    fully_shard(unet, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = accelerator.prepare(torch.optim.AdamW(unet.parameters(), lr=1e-2, fused=True))
    plan, ema = Plan(config, 1797, 2), build_ema(config, unet)
    return Run(config, plan, DDPMSchedulerCustom(), accelerator, Agreement(2), unet, optimizer, ema)


def update(run: Run, seed: int, scale: float = 1.0) -> bool:
    torch.manual_seed(seed)
    loss = run.unet(torch.randn(4, 1, 16, 16), torch.tensor([1, 2, 3, 4])).sample.square().mean()
    (scale * loss).backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(run.unet.parameters(), 1.0)
    is_finite = skip_unless_finite(run.optimizer, grad_norm, accelerator)
    run.optimizer.step()
    run.optimizer.zero_grad()
    with OnShards():
        update_ema(run)
    run.step += 1
    return bool(is_finite)


def parts(run: Run) -> list[torch.Tensor]:
    return [p.clone() for p in [*(p.to_local() for p in run.unet.parameters()), *run.ema.shadow_params]]


run, other = make(0), make(1)
assert all(update(run, seed) for seed in range(3))
state, unet = capture(run)
if unet is not None:
    save_checkpoint(output_dir, DDPMPipelineCustom(unet, run.scheduler), state)
accelerator.wait_for_everyone()
restore(other, output_dir / "checkpoint-3")
for seed in (5, 6):
    assert update(run, seed)
    assert update(other, seed)
assert all(torch.equal(a, b) for a, b in zip(parts(run), parts(other), strict=True))
weights = [p.to_local().clone() for p in run.unet.parameters()]
assert not update(run, 7, scale=float("inf"))
assert all(torch.equal(a, p.to_local()) for a, p in zip(weights, run.unet.parameters(), strict=True))
print("sharded and restored", flush=True)
