"""Run in a process of its own: load models in a given way, report on each, and save some of them again.

Reads a list of tasks {"way", "model", "code", "save", "labels"} as JSON from stdin; writes a list of results to stdout.
"""

import json
import logging
import sys
import warnings

import torch
from diffusers import DDPMPipeline, DiffusionPipeline
from huggingface_hub import snapshot_download

if sys.argv[1] != "package":
    sys.modules["ddpm_hf"] = None  # not installed
torch.set_num_threads(1)
logged = logging.Handler()
logged.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("diffusers").addHandler(logged)
messages = []


def load(way, model, code):
    if way == "package":
        from ddpm_hf import DDPMPipelineCustom

        return DDPMPipelineCustom.from_pretrained(model)
    if way == "remote offline":  # by id, diffusers asks the Hub for the code's version
        model, code = snapshot_download(model), snapshot_download(code)
    if way.startswith("remote"):
        return DiffusionPipeline.from_pretrained(model, custom_pipeline=code, trust_remote_code=True)
    return (DDPMPipeline if way == "stock" else DiffusionPipeline).from_pretrained(model)


def sample(pipe, way, labels):
    """One image by 4 steps from seed 0, as nested lists."""
    generator = torch.Generator().manual_seed(0)
    pipe.set_progress_bar_config(disable=True)
    if not way.startswith("stock"):
        options = {"class_labels": ["fish"]} if labels else {}
        return pipe(1, [generator], 4, "np", **options).images[0].tolist()
    if not labels:
        return pipe(1, generator, num_inference_steps=4, output_type="np").images[0].tolist()
    pipe.scheduler.set_timesteps(4)
    x = torch.randn(1, 3, 8, 8, generator=generator)
    for t in pipe.scheduler.timesteps:
        with torch.no_grad():
            prediction = pipe.unet(x, t, class_labels=torch.tensor([3])).sample
        x = pipe.scheduler.step(prediction, t, x, generator=generator).prev_sample
    return (x / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).tolist()


results = []
for task in json.load(sys.stdin):
    messages.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe = load(task["way"], task["model"], task.get("code"))
        image = sample(pipe, task["way"], task["labels"])
    results.append(
        {
            "task": task,
            "classes": [type(pipe).__name__, type(pipe.scheduler).__name__],
            "image": image,
            "label_names": pipe.unet.config.get("_label_names"),
            "calibration": pipe.scheduler.config.get("_calibration"),
            "messages": messages
            + [str(w.message) for w in caught if issubclass(w.category, (UserWarning, FutureWarning))],
        }
    )
    if task.get("save"):
        pipe.save_pretrained(task["save"])
    if task.get("download"):
        snapshot_download(task["model"])
json.dump(results, sys.stdout)
