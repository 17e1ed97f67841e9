"""`DDPMPipelineCustom`: sampling with a trained `UNet2DModel` (Algorithm 2 of arXiv 2006.11239).

One file, since that is what diffusers loads as the code of a pipeline: it and the files that it imports from are copied
into every saved repository (see `ddpm_repository.py`).
"""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

# All of these names are needed here: diffusers copies only the files that pipeline.py itself imports from.
from .ddpm_fast_network import FastNetwork
from .ddpm_few_steps import Calibration  # noqa: F401
from .ddpm_labels import label_tensor
from .ddpm_process import LEARNED_VARIANCE_TYPES, check_choice, check_integer, check_number, to_device
from .ddpm_repository import complete_repository, update_card, upload_repository
from .scheduling_ddpm_custom import DDPMSchedulerCustom, check_custom_timesteps, check_eta, draw_noise

# How many steps the CPU may be ahead of a GPU: enough to keep it busy; the noise of each waits in pinned memory.
STEPS_AHEAD = 8
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class DDPMPipelineCustomOutput(BaseOutput):
    """What the pipeline returns.

    Args:
        images: a list of B PIL images, an array (B, H, W, C) or a tensor (B, C, H, W) in [0, 1]; a tensor
            (B, C, H, W) that is not clamped and has its data in [-1, 1] for `output_type="latent"`.
        trajectory: x_t after each recorded step, (S, B, C, H, W), float32 on the CPU, its data in [-1, 1].
        trajectory_x_0: the x̂_0 of the same steps; None if the scheduler does not return it.
        trajectory_timesteps: the S timesteps t that these steps started from.
    """

    images: list[PIL.Image.Image] | np.ndarray | Tensor
    trajectory: Tensor | None = None
    trajectory_x_0: Tensor | None = None
    trajectory_timesteps: list[int] | None = None


class DDPMPipelineCustom(DiffusionPipeline):
    """Generates images with a DDPM.

    Args:
        unet: a `UNet2DModel`, unconditional or with `num_class_embeds` classes.
        scheduler: a stock `DDPMScheduler` is replaced by our `DDPMSchedulerCustom` of the same configuration; any
            other scheduler (DDIM, DPM-Solver++, …) is used as it is.

    Raises:
        ValueError: where the network's channels and the scheduler's `variance_type` contradict each other.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents", "pred_original_sample"]

    def __init__(self, unet: UNet2DModel, scheduler: DDPMSchedulerCustom) -> None:
        super().__init__()
        self._fast_network: FastNetwork | None = None
        self._interrupt = False
        if type(scheduler) is DDPMScheduler:
            scheduler = DDPMSchedulerCustom.from_config(scheduler.config)
        self.register_modules(unet=unet, scheduler=scheduler)
        if unet is None or scheduler is None:  # diffusers loads parts of a pipeline this way
            return
        if not isinstance(getattr(unet, "_orig_mod", unet), UNet2DModel):
            raise TypeError(f"`unet` is a {type(unet).__name__}, but must be a UNet2DModel.")
        if not isinstance(scheduler, SchedulerMixin):
            raise TypeError(
                f"`scheduler` is a {type(scheduler).__name__}, but must be a scheduler of diffusers or ours."
            )
        if unet.config.get("class_embed_type") is not None:
            raise ValueError(
                f"the network has class_embed_type={unet.config.class_embed_type!r}, but a conditional DDPM needs "
                "labels: configure it with num_class_embeds instead."
            )
        channels, outputs = unet.config.in_channels, unet.config.out_channels
        variance_type = scheduler.config.get("variance_type")
        if outputs not in (channels, 2 * channels):
            raise ValueError(
                f"the network has {channels} input channels and {outputs} output channels, but a DDPM needs "
                f"out_channels={channels}, or {2 * channels} where it learns the variance."
            )
        # The optimal variance goes with any network: a variance that it learned is left aside.
        if (
            isinstance(scheduler, DDPMSchedulerCustom)
            and variance_type != "optimal"
            and (outputs != channels) != (variance_type in LEARNED_VARIANCE_TYPES)
        ):
            raise ValueError(
                f"the network has {channels} input channels and {outputs} output channels, which does not fit "
                f"`variance_type` {variance_type!r}: the learned ones need {2 * channels} output channels, "
                f"the fixed variances need {channels}."
            )

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        latents: Tensor | None = None,
        timesteps: Sequence[int] | Tensor | str | None = None,
        eta: float | None = None,
        solver_order: int = 1,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        guidance_scale: float = 1.0,
        callback_on_step_end: Callable[[DDPMPipelineCustom, int, Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        trajectory_every: int | None = None,
    ) -> DDPMPipelineCustomOutput | tuple[Any, ...]:
        """Sample images (Algorithm 2).

        The first five arguments are those of `diffusers.DDPMPipeline`, in its order.

        Args:
            batch_size: B, the number of images.
            generator: one for the whole batch (then an image depends on B), or a list of B, one per image: then image i
                depends on generator i alone, whatever B is.
            num_inference_steps: K, 1 ≤ K ≤ T; by default T. The trajectory is spread by the scheduler's
                `timestep_spacing`.
            output_type: "pil", "np" (B, H, W, C), "pt" (B, C, H, W), or "latent": x_0 as it is, (B, C, H, W).
            latents: x_t of the first timestep, (B, C, H, W), to start from; by default x_T ~ N(0, I).
            timesteps: the trajectory itself, strictly descending, instead of `num_inference_steps`; or the name of a
                spacing for them: "optimal", "linspace", "trailing" or "leading".
            eta: in [0, 1], from DDIM (0) to ancestral DDPM (1); by default the scheduler's own: 1 for ours, 0 for DDIM.
            solver_order: 2 corrects every step by the change of x̂_0 since the step before, at no further network calls:
                see `DDPMSchedulerCustom.step`. In few steps it is worth more than any variance.
            class_labels: for a class-conditional network: one label for all, or B of them, each a name that the model
                keeps (`unet.config._label_names`) or a number in [0, num_class_embeds - 1]. In a network trained for
                guidance, the last number is the null label.
            guidance_scale: w ≥ 0 of classifier-free guidance: out = null + w (conditional - null). 1 is no guidance.
            callback_on_step_end: called as f(pipeline, i, t, tensors) after each step; the dictionary that it returns
                may replace "latents" (x_t).
            callback_on_step_end_tensor_inputs: what the dictionary holds: "latents" and "pred_original_sample" (x̂_0).
            trajectory_every: keep x_t and x̂_0 after every n-th step and after the last one.

        Returns:
            `DDPMPipelineCustomOutput`, or its values as a tuple (without those that are None) for `return_dict=False`.

        Raises:
            ValueError: before anything is computed, for any bad argument.
        """
        # 1. Check every argument
        self._check_inputs(
            batch_size, generator, output_type, guidance_scale, eta, solver_order,
            callback_on_step_end, callback_on_step_end_tensor_inputs, trajectory_every,
        )  # fmt: skip
        labels = self.prepare_class_labels(class_labels, batch_size, guidance_scale)
        network = self._current_network()
        self._interrupt = False

        # 2. Choose the trajectory: that of this call alone, since other threads may sample with this pipeline, too
        scheduler = self.scheduler_on_trajectory(num_inference_steps, timesteps)
        step_kwargs = self._step_kwargs(generator, eta)

        # 3. x_T ~ N(0, I), in float32 whatever the network's precision
        device = self._execution_device
        shape = (batch_size, self.unet.config.in_channels, *image_size(self.unet))
        if latents is None:
            x_t = draw_noise(shape, generator, device, torch.float32) * scheduler.init_noise_sigma
        elif latents.shape == shape:
            x_t = latents.to(device, torch.promote_types(latents.dtype, torch.float32))
        else:
            raise ValueError(f"`latents` have shape {tuple(latents.shape)}, but must have {shape}.")

        # 4. Denoise step by step
        recorded: list[tuple[Tensor, Tensor | None, int]] = []
        queued: deque[torch.cuda.Event] = deque()  # ends of steps that a GPU has still to compute
        pred_x_0 = None
        # The scheduler reads timesteps, the network computes with them: each where it does not wait for the other.
        network_timesteps, network_dtype = to_device(scheduler.timesteps, device), network.dtype
        with self.progress_bar(total=len(network_timesteps)) as progress_bar:
            for i, t in enumerate(scheduler.timesteps):
                if self.interrupt:
                    break
                x = scheduler.scale_model_input(x_t, t).to(network_dtype)
                model_output = self._predict(network, x, network_timesteps[i], labels, guidance_scale)
                if solver_order == 2:
                    step_kwargs["previous_x_0"] = pred_x_0
                output = scheduler.step(model_output, t, x_t, **step_kwargs)
                x_t, pred_x_0 = output.prev_sample, output.get("pred_original_sample")

                if callback_on_step_end is not None:
                    tensors = {"latents": x_t, "pred_original_sample": pred_x_0}
                    chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    x_t = (callback_on_step_end(self, i, t, chosen) or {}).get("latents", x_t)
                is_last = i == len(network_timesteps) - 1
                if trajectory_every is not None and (is_last or (i + 1) % trajectory_every == 0):
                    recorded.append((x_t.float().cpu(), None if pred_x_0 is None else pred_x_0.float().cpu(), int(t)))
                if device.type == "cuda":
                    queued.append(torch.cuda.current_stream(device).record_event())
                    if len(queued) > STEPS_AHEAD:
                        queued.popleft().synchronize()
                progress_bar.update()

        # 5. [-1, 1] → images
        images = self._postprocess(x_t, output_type)
        self.maybe_free_model_hooks()
        result = DDPMPipelineCustomOutput(images, *_stack(recorded))
        return result if return_dict else result.to_tuple()

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `_interrupt`, which ends a call after that step, as in diffusers' pipelines."""
        return self._interrupt

    # --- the network ------------------------------------------------------------------------------------------------

    def enable_fast_sampling(
        self,
        num_images: int = 1,
        num_inference_steps: int | None = None,
        batch_size: int | None = None,
        guidance_scale: float = 1.0,
    ) -> str:
        """Sample with a twin of the network that is as fast as this machine allows, for a job of this size.

        Half precision where it pays, on a trajectory that stays float32: bfloat16 moves most pixels by less than one of
        255 levels, and a few by many. Compilation where the job is long enough to earn it back; it changes images by
        rounding alone. On a CPU, onnxruntime in place of PyTorch where the extra [onnx] is installed and it is measured
        to be faster; that, too, changes images by rounding alone. What is saved stays the network itself. Attention
        processors and hooks that are set later have no effect; a compiled network must be used by the thread that made
        it. The package ddpm-hf makes the choice: a pipeline of remote code that runs without it has `use_fast_network`.

        Args:
            num_images: N, of the whole job, in batches of one size.
            num_inference_steps: K; by default T.
            batch_size: B; by default N. A compiled network is fast for this size alone.
            guidance_scale: as in the calls to come.

        Returns:
            What was chosen and why, in a line.

        Raises:
            ValueError: for a bad argument, or where the network is offloaded or cast layer by layer.
            ImportError: where ddpm-hf is not installed.
        """
        try:
            fast = import_module("ddpm_hf.sampling.fast")  # looked up as in `update_card`
        except ImportError as error:
            raise ImportError(
                "`enable_fast_sampling` needs the package ddpm-hf, which makes the choice for this machine: "
                "pip install ddpm-hf, or choose yourself, as in pipe.use_fast_network(torch.bfloat16)."
            ) from error
        self.disable_fast_sampling()  # the twin of before makes room
        steps = self.scheduler.config.num_train_timesteps if num_inference_steps is None else num_inference_steps
        self._fast_network, description = fast.fast_network(self.unet, num_images, steps, batch_size, guidance_scale)
        return description

    def use_fast_network(self, dtype: torch.dtype, compiled_batch_size: int | None = None) -> None:
        """Sample with a twin of the network of your choice: see `enable_fast_sampling`, which chooses one.

        Args:
            dtype: what the twin computes in, e.g. `torch.bfloat16`.
            compiled_batch_size: compile it for network calls with B images (2 B with guidance), in the first of them.
        """
        self._fast_network = FastNetwork(self.unet, dtype)
        if compiled_batch_size is not None:
            self._fast_network.compile(compiled_batch_size)

    def disable_fast_sampling(self) -> None:
        """Sample with the network itself again."""
        self._fast_network = None

    @property
    def sampling_dtype(self) -> torch.dtype:
        """The precision that the network computes in when this pipeline samples."""
        return (self._fast_network or self.unet).dtype

    def _current_network(self) -> UNet2DModel | FastNetwork:
        if self._fast_network is None:
            return self.unet
        if not self._fast_network.is_twin_of(self.unet):
            raise ValueError(
                "the network was moved or its weights changed after `enable_fast_sampling`: call it again, or "
                "`disable_fast_sampling`."
            )
        return self._fast_network

    def _predict(
        self, network: UNet2DModel | FastNetwork, x: Tensor, t: Tensor, labels: Tensor | None, guidance_scale: float
    ) -> Tensor:
        """The network's prediction at its input x, in its dtype, with guidance if requested, in float32."""
        channels = x.shape[1]
        guided = labels is not None and guidance_scale != 1
        if labels is not None and guided:
            x = torch.cat([x, x])
            labels = torch.cat([labels, torch.full_like(labels, self.unet.config.num_class_embeds - 1)])
        output = network(x, t, class_labels=labels, return_dict=False)[0].float()
        prediction, *variance = output.split(channels, dim=1)
        if guided:
            # Guidance extrapolates the prediction alone; the variance stays the conditional one.
            conditional, null = prediction.chunk(2)
            prediction = null + guidance_scale * (conditional - null)
            variance = [v.chunk(2)[0] for v in variance]
        takes_variance = isinstance(self.scheduler, (DDPMSchedulerCustom, DDPMScheduler))
        if not takes_variance or self.scheduler.config.variance_type not in LEARNED_VARIANCE_TYPES:
            return prediction
        return torch.cat([prediction, *variance], dim=1)

    # --- arguments --------------------------------------------------------------------------------------------------

    def _check_inputs(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
        guidance_scale: float,
        eta: float | None,
        solver_order: int,
        callback_on_step_end: object,
        callback_on_step_end_tensor_inputs: Sequence[str],
        trajectory_every: int | None,
    ) -> None:
        check_integer("batch_size", batch_size, 1)
        generators = [] if generator is None else generator if isinstance(generator, list) else [generator]
        if not all(isinstance(g, torch.Generator) for g in generators):
            raise ValueError(f"`generator` is {generator!r}, but must be a torch.Generator or a list of them.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` is a list of {len(generator)}, but `batch_size` is {batch_size}: pass one generator per "
                "image, or a single one for the batch."
            )
        check_choice("output_type", output_type, OUTPUT_TYPES)
        channels = self.unet.config.in_channels
        if output_type == "pil" and channels > 4:
            raise ValueError(
                f"`output_type` is 'pil', but PIL can't hold images of {channels} channels: use 'np' or 'pt'."
            )
        check_number("guidance_scale", guidance_scale, "a number of at least 0 (1 is no guidance)", lambda w: w >= 0)
        if eta is not None:
            check_eta(eta)
        check_integer("solver_order", solver_order, 1, 2)
        if solver_order == 2 and not isinstance(self.scheduler, DDPMSchedulerCustom):
            raise ValueError(
                f"`solver_order` is 2, but {type(self.scheduler).__name__} has no such choice per call: leave it out, "
                "or use DDPMSchedulerCustom."
            )
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"`callback_on_step_end` is {callback_on_step_end!r}, but must be a function.")
        names = callback_on_step_end_tensor_inputs
        if not isinstance(names, (list, tuple)) or any(name not in self._callback_tensor_inputs for name in names):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` is {names!r}, but must be a list of some of "
                f"{self._callback_tensor_inputs}."
            )
        if trajectory_every is not None:
            check_integer("trajectory_every", trajectory_every, 1)

    def prepare_class_labels(
        self, class_labels: int | str | Sequence[int | str] | Tensor | None, batch_size: int, guidance_scale: float
    ) -> Tensor | None:
        """The labels as a tensor (B,) on the network's device; None for an unconditional network."""
        if self.unet.config.num_class_embeds is None:
            if class_labels is not None:
                raise ValueError("`class_labels` were given, but the network is unconditional: leave them out.")
            if guidance_scale != 1:
                raise ValueError(
                    f"`guidance_scale` is {guidance_scale}, but the network is unconditional: guidance needs a network "
                    "trained with class labels and label dropout. Use guidance_scale=1."
                )
            return None
        labels = label_tensor(class_labels, batch_size, self.unet.config)
        return to_device(labels, self._execution_device)

    def scheduler_on_trajectory(
        self, num_inference_steps: int | None = None, timesteps: Sequence[int] | Tensor | str | None = None
    ) -> Any:
        """A copy of the scheduler, on the trajectory of a call with these arguments. Changes nothing.

        Raises:
            ValueError: as the call would.
        """
        scheduler = copy.copy(self.scheduler)  # shares what is fixed; `set_timesteps` makes the rest anew
        scheduler.set_timesteps(**self._timesteps_kwargs(num_inference_steps, timesteps))
        return scheduler

    def _timesteps_kwargs(
        self, num_inference_steps: int | None, timesteps: Sequence[int] | Tensor | str | None
    ) -> dict[str, Any]:
        """Arguments of `set_timesteps`. No device: reading a timestep on the CPU never waits for a GPU."""
        T = self.scheduler.config.num_train_timesteps
        if timesteps is None or isinstance(timesteps, str):
            steps = T if num_inference_steps is None else num_inference_steps
            check_integer("num_inference_steps", steps, 1, T)
            if timesteps is None:
                return {"num_inference_steps": steps}
            if isinstance(self.scheduler, DDPMSchedulerCustom):
                return {"num_inference_steps": steps, "spacing": timesteps}
            raise ValueError(
                f"`timesteps` is {timesteps!r}, but {type(self.scheduler).__name__} takes no spacing by name: pass "
                "the timesteps themselves, or use DDPMSchedulerCustom."
            )
        if num_inference_steps is not None:
            raise ValueError("pass one of `num_inference_steps` and `timesteps`; both were given.")
        if "timesteps" not in inspect.signature(self.scheduler.set_timesteps).parameters:
            raise ValueError(f"`timesteps` were given, but {type(self.scheduler).__name__} takes no custom timesteps.")
        return {"timesteps": check_custom_timesteps(timesteps, T).tolist()}

    def _step_kwargs(
        self, generator: torch.Generator | list[torch.Generator] | None, eta: float | None
    ) -> dict[str, Any]:
        """What this scheduler's `step` accepts of the generator and eta."""
        accepted = inspect.signature(self.scheduler.step).parameters
        eta_name = "ddim_eta" if "ddim_eta" in accepted else "eta"
        if eta is not None and eta_name not in accepted:
            raise ValueError(f"`eta` is {eta}, but {type(self.scheduler).__name__} has no eta: leave it out.")
        wanted = {"generator": generator} if eta is None else {"generator": generator, eta_name: eta}
        return {name: value for name, value in wanted.items() if name in accepted}

    # --- images -----------------------------------------------------------------------------------------------------

    def _postprocess(self, x_0: Tensor, output_type: str) -> list[PIL.Image.Image] | np.ndarray | Tensor:
        if not x_0.isfinite().all():
            warnings.warn(
                f"the images hold NaN or infinity: the network, in {self.sampling_dtype}, overflows or is damaged. "
                "Use bfloat16 instead of float16, or float32.",
                stacklevel=3,
            )
        if output_type == "latent":
            return x_0
        images = (x_0.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        return self.numpy_to_pil(arrays) if output_type == "pil" else arrays

    # --- saving -----------------------------------------------------------------------------------------------------

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Make the folder a repository: see `ddpm_repository.py`.

        `save_pretrained` ends here, after the components are written, and uploads what it finds.
        """
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        complete_repository(Path(save_directory), isinstance(self.scheduler, DDPMSchedulerCustom))
        self._update_card(Path(save_directory))

    def _update_card(self, folder: Path, **facts: str) -> None:
        if self.unet is not None and self.scheduler is not None:
            update_card(folder, **facts)

    def _upload_folder(self, working_dir: str | os.PathLike, repo_id: str, **options: Any) -> Any:
        """What `push_to_hub` ends in: diffusers would upload all that lies in the folder, a training state included.

        By now, diffusers has put the card of the Hub into the folder, or one that says nothing.
        """
        self._update_card(Path(working_dir), repo_id=repo_id)
        options["path_in_repo"] = options.pop("subfolder", None)
        options["commit_message"] = options.get("commit_message") or f"Upload {type(self).__name__}"
        return upload_repository(Path(working_dir), repo_id, **options)


def image_size(unet: UNet2DModel) -> tuple[int, int]:
    """(H, W) of the images of a network.

    Raises:
        ValueError: if the network's configuration lacks a size, or has one that the network can't halve often enough.
    """
    size = unet.config.sample_size
    if size is None:
        raise ValueError("the network's configuration has no `sample_size`: set unet.config.sample_size.")
    sizes = (size, size) if isinstance(size, int) else tuple(size)
    if len(sizes) != 2 or not all(isinstance(side, int) and side > 0 for side in sizes):
        raise ValueError(f"`sample_size` of the network is {size!r}, but must be one or two positive integers.")
    height, width = sizes
    halvings = len(unet.config.block_out_channels) - 1
    if height % 2**halvings or width % 2**halvings:
        raise ValueError(
            f"`sample_size` of the network is {size}, but the network halves images {halvings} times: it needs a "
            f"multiple of {2**halvings}."
        )
    return height, width


def _stack(recorded: Sequence[tuple[Tensor, Tensor | None, int]]) -> tuple[Any, ...]:
    """The trajectory, its x̂_0 and its timesteps, of the steps that were recorded; nothing of none."""
    if not recorded:
        return ()
    x_t, x_0, timesteps = zip(*recorded, strict=True)
    return torch.stack(x_t), None if x_0[0] is None else torch.stack(x_0), list(timesteps)
