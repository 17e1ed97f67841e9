"""Runs of two processes, one after the other, which torchrun starts together. For tests/training.

    two_processes.py FOLDER OPTIONS.json

- `whole`: with these options.
- `stopped`, with a preview that takes long, until one of the processes gets a signal; copied to `alone`; and resumed.
- `accumulated`: three updates of four parts each, which counts how often gradients are shared.
- `sharded`: sharded_run.py.
"""

import json
import shutil
import sys
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ddpm_hf.training.__main__ import main
from support.runs import TINY

folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
AcceleratorState.destroy_process_group = lambda state: None  # the next run needs it


def train(name: str, *more: str) -> int:
    AcceleratorState._reset_state()
    try:
        main([*TINY, *options, "--output_dir", str(folder / name), *more])
    except SystemExit as end:
        return end.code
    return 0


assert train("whole") == 0
print("whole is done", flush=True)

assert train("stopped", "--save_images_steps", "30", "--ddpm_num_inference_steps", "1000") == 143
if dist.get_rank() == 0:
    shutil.copytree(folder / "stopped", folder / "alone")
dist.barrier()
assert train("stopped", "--resume_from_checkpoint", "latest") == 0

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
calm = ["--max_train_steps", "3", "--gradient_accumulation_steps", "4", "--calibration_images", "0"]
assert train("accumulated", *calm, "--eval_steps", "100") == 0
print(f"shared {shared} times", flush=True)

Accelerator.prepare = prepare
AcceleratorState._reset_state()
import support.sharded_run  # noqa: E402, F401

dist.destroy_process_group()  # else its threads may abort a process that has done its work
