"""Sample in lockstep and save what this process got, and how often it called the network: for test_folder.

python lockstep.py NUM_IMAGES FOLDER
"""

import sys

import torch

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.commands.model import processes
from ddpm_hf.sampling.generate import sample_in_lockstep
from support.models import tiny_unet

state = processes()
pipe = DDPMPipelineCustom(tiny_unet(num_class_embeds=4).train(), DDPMSchedulerCustom(timestep_spacing="linspace"))
calls = []
pipe.unet.register_forward_hook(lambda *_: calls.append(1))
options = {"class_labels": [0, 2], "num_inference_steps": 3}
pixels = sample_in_lockstep(pipe, int(sys.argv[1]), 7, 2, **options)
assert pipe.unet.training
torch.save((pixels, len(calls)), f"{sys.argv[2]}/{state.process_index}.pt")
