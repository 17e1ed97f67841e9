"""Run by torchrun in two processes: how often three updates of a real run share gradients, by micro-steps per update."""

import json
import os
import tempfile

os.environ.update(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")

import torch
from accelerate import Accelerator
from runs import TINY_OPTIONS
from torch import distributed as dist

from ddpm_hf.config import TrainConfig
from ddpm_hf.training import train

UPDATES = 3
shared = 0
prepare = Accelerator.prepare


def count_and_share(group, bucket):
    global shared
    shared += bucket.is_last()
    future = dist.all_reduce(bucket.buffer() / 2, async_op=True).get_future()
    return future.then(lambda f: f.value()[0])


def prepare_and_watch(accelerator, *objects):
    prepared = prepare(accelerator, *objects)
    if isinstance(prepared[0], torch.nn.parallel.DistributedDataParallel):
        prepared[0].register_comm_hook(None, count_and_share)
    return prepared


Accelerator.prepare = prepare_and_watch
counts = {}
folders = [tempfile.mkdtemp() for _ in range(2)]
for micro_steps in (1, 4):
    shared, folder = 0, folders.pop()
    place = [folder]
    if dist.is_initialized():
        dist.broadcast_object_list(place)
    else:
        place = [os.path.join(tempfile.gettempdir(), f"accumulated-{os.environ['MASTER_PORT']}")]
    train(
        TrainConfig(
            **{
                **TINY_OPTIONS, "output_dir": place[0], "max_train_steps": UPDATES, "save_images_steps": 0,
                "gradient_accumulation_steps": micro_steps, "calibration_images": 0, "overwrite_output_dir": True,
            }
        )
    )  # fmt: skip
    counts[micro_steps] = shared
print(json.dumps(counts))
