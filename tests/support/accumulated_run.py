"""Run by torchrun in two processes: how often a real run of three updates, of four parts each, shares gradients."""

import sys

from accelerate import Accelerator
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ddpm_hf.config.training import TrainConfig
from ddpm_hf.training.loop import train
from support.runs import TINY_OPTIONS

shared = 0
prepare = Accelerator.prepare


def count_and_share(group, bucket):
    global shared
    shared += bucket.is_last()
    future = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def prepare_and_count(accelerator, *objects):
    unet, optimizer = prepare(accelerator, *objects)
    assert isinstance(unet, DistributedDataParallel)
    unet.register_comm_hook(None, count_and_share)
    return unet, optimizer


Accelerator.prepare = prepare_and_count
calm = {"max_train_steps": 3, "gradient_accumulation_steps": 4, "save_images_steps": 0, "calibration_images": 0}
train(TrainConfig(**{**TINY_OPTIONS, **calm, "output_dir": sys.argv[1]}))
print(f"shared {shared} times")
