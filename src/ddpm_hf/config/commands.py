"""The options of the commands of `ddpm-hf`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from .options import at_least, check_seed, check_types, option, positive

METRICS = ("bpd", "fid", "kid", "isc", "fd", "kd", "prc", "nearest")


@dataclass
class TrajectoryOptions:
    """The steps from noise to image."""

    num_inference_steps: int | None = option(None, "K, the steps per image. Default: the model's T.", ["--steps"])
    timestep_spacing: Literal["model", "linspace", "trailing", "leading", "optimal"] = option(
        "model", "How K steps are spread over T; `optimal` needs a calibrated model.", ["--spacing"]
    )
    variance_type: Literal["model", "fixed_small", "fixed_large", "optimal"] = option(
        "model", "The variance σ² of a step; `optimal` needs a calibrated model."
    )
    eta: float | None = option(None, "From 0 (DDIM) to 1 (ancestral DDPM, the default).")
    solver_order: Literal[1, 2] = option(
        1, "2 adds a second-order correction, from the change of x̂_0: much better in few steps."
    )

    def check_trajectory(self) -> None:
        """Raise a ValueError for values that no model takes."""
        at_least(1, self, "num_inference_steps")
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ValueError(f"`eta` is {self.eta}, but must lie in [0, 1]: 0 is DDIM, 1 is DDPM.")

    def configure(self, scheduler: Any) -> Any:
        """A scheduler like this one, with the spacing and the variance of these options."""
        chosen = {"timestep_spacing": self.timestep_spacing, "variance_type": self.variance_type}
        if self.timestep_spacing == "optimal":  # goes into the call: no configuration may hold it
            del chosen["timestep_spacing"]
        return scheduler.from_config(scheduler.config, **{k: v for k, v in chosen.items() if v != "model"})


@dataclass
class SamplingOptions(TrajectoryOptions):
    """How images are sampled."""

    class_label: list[str] | None = option(
        None, "For class-conditional models: names or numbers of classes, used in turn, as in --class_label cats 3."
    )
    guidance_scale: float = option(1.0, "Classifier-free guidance; 1 is off.")

    def check_sampling(self) -> None:
        """Raise a ValueError for values that no model takes."""
        self.check_trajectory()
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(f"`guidance_scale` is {self.guidance_scale}, but must be at least 0 (1 is no guidance).")

    def call_options(self) -> dict[str, Any]:
        """The arguments of the pipeline's call."""
        return {
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "eta": self.eta,
            "solver_order": self.solver_order,
            "timesteps": "optimal" if self.timestep_spacing == "optimal" else None,
        }


@dataclass
class ImageOptions:
    """The images that a model is measured on, loaded at its size and with its channels."""

    dataset_name: str | None = option(
        None,
        "A dataset of the Hub, a local dataset folder, or `digits`: the scans that scikit-learn ships.",
        ["--dataset"],
    )
    dataset_config_name: str | None = option(None, "The dataset's configuration, where it has several.")
    train_data_dir: str | None = option(None, "A folder of images, instead of a dataset.")
    cache_dir: str | None = option(None, "Folder for downloaded datasets and decoded images.")
    image_column: str | None = option(None, "The column of the images. Default: the one of type Image.")
    label_column: str | None = option(None, "For a class-conditional model: the column of the labels.")
    center_crop: bool = option(False, "Crop images at the centre instead of at random. As in training.")

    def check_images(self) -> None:
        """Raise a ValueError unless there is one source of images."""
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise ValueError(
                "pass one of --dataset_name NAME (a Hub dataset, or `digits`) and --train_data_dir FOLDER: the images "
                "that the model was trained on."
            )


@dataclass
class SampleConfig(SamplingOptions):
    """Options of `ddpm-hf sample`."""

    num_images: int = option(64, "How many images to make.")
    seed: int = option(0, "Image i depends on seed + i alone.")
    output_dir: str = option(
        "samples", "Folder for the images and their grid; existing images of the same settings are kept."
    )
    format: Literal["png", "npz"] = option("png", "Numbered PNGs, or one samples.npz with arr_0 (N, H, W, C).")
    batch_size: int | None = option(
        None,
        "Images per forward pass and process; changes images by rounding only. Default: 64 (GPU: 256), less if memory "
        "is short.",
    )
    device: str | None = option(None, "cpu, cuda, mps, …; default: the best one available.")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Precision of the network.")
    rng: Literal["torch", "philox"] = option(
        "torch", "Whose random numbers: PyTorch's, or Philox4x32-10, as the browser demo and other languages draw them."
    )
    fast: bool = option(
        False, "Half precision, compilation and onnxruntime if they pay on this machine; prints what was chosen."
    )
    revision: str | None = option(None, "Branch, tag or commit of a model on the Hub.")

    def __post_init__(self) -> None:
        check_types(self)
        at_least(1, self, "num_images", "batch_size")
        check_seed(self.seed, self.num_images)
        self.check_sampling()

    def call_options(self) -> dict[str, Any]:
        """The arguments of the pipeline's call, and the random numbers, where they are not PyTorch's."""
        return {**super().call_options(), **({"rng": self.rng} if self.rng != "torch" else {})}


@dataclass
class PushConfig:
    """Options of `ddpm-hf push`."""

    private: bool = option(False, "Make the repository private.")
    revision: str | None = option(None, "The branch to push to, created if needed. Default: main.")
    tag: str | None = option(None, "Tag the pushed commit.")
    create_pr: bool = option(False, "Open a pull request, which needs no write access to the repository.")
    share_training_images: bool = option(
        False,
        "Also upload what shows training images: real.png, samples_and_real.png, nearest*.png and report.html.",
    )
    with_onnx: bool = option(False, "Also upload what `ddpm-hf export` has written into the model's folder.")
    with_demo: bool = option(
        False, "Also push an app that samples from the model, to the Space REPO_ID-demo, and link to it from the card."
    )
    dry_run: bool = option(False, "List what would be uploaded, and stop.")
    license: str | None = option(None, "The license for the card, in the Hub's spelling: apache-2.0, mit, cc-by-4.0, …")
    hub_token: str | None = option(
        None, "Access token. Default: that of HF_TOKEN or `hf auth login`, which other users can't see in `ps`."
    )

    def __post_init__(self) -> None:
        check_types(self)
        if self.with_demo and (self.create_pr or self.revision):
            raise ValueError(
                "`with_demo` shows what is on `main`: leave out create_pr and revision, or push the demo later, by "
                "`ddpm-hf demo MODEL --push NAME`."
            )


@dataclass
class ConvertConfig:
    """Options of `ddpm-hf convert`. All but the first describe weight files, which lack this information."""

    revision: str | None = option(None, "Branch, tag or commit of a model on the Hub.")
    resolution: int | None = option(None, "Height and width of the images that the network was trained on.")
    num_heads: int | None = option(None, "Attention heads of an improved-diffusion network (4 in its scripts).")
    beta_schedule: Literal["linear", "squaredcos_cap_v2"] = option(
        "linear", "The β schedule of the training; squaredcos_cap_v2 is improved-diffusion's `cosine`."
    )
    prediction_type: Literal["epsilon", "sample"] = option(
        "epsilon", "What the network predicts; sample is improved-diffusion's `predict_xstart`."
    )
    variance_type: Literal["fixed_small", "fixed_large"] = option(
        "fixed_large", "The reverse variance, if the network does not learn it."
    )
    ddpm_num_steps: int = option(1000, "T, the number of diffusion steps in training.")

    def __post_init__(self) -> None:
        check_types(self)
        at_least(1, self, "resolution", "num_heads", "ddpm_num_steps")


@dataclass
class ExportConfig(TrajectoryOptions):
    """Options of `ddpm-hf export`."""

    format: Literal["onnx"] = option("onnx", "The format of the network.")
    output_dir: str | None = option(None, "Folder for the files. Default: `onnx` in the model's own folder.")
    dtype: Literal["float32", "float16"] = option(
        "float32", "Precision of the network's weights; what goes in and out is float32."
    )
    revision: str | None = option(None, "Branch, tag or commit of a model on the Hub.")

    def __post_init__(self) -> None:
        check_types(self)
        self.check_trajectory()


@dataclass
class DemoConfig:
    """Options of `ddpm-hf demo`."""

    static: bool = option(False, "Write a page that samples in the browser, instead of serving an app.")
    output_dir: str | None = option(
        None, "--static: folder for the page, new or empty. Default: the model's name and `-demo`."
    )
    dtype: Literal["float32", "float16"] = option("float32", "--static: precision of the weights in the page.")
    max_megabytes: float = option(
        100.0, "--static: the most that the weights in the page may have: every visitor loads them."
    )
    device: str | None = option(None, "Of the app: cpu, cuda, mps, …; default: the best one available.")
    push: str | None = option(None, "Push the app, or with --static the page, to this Space of the Hub: owner/name.")
    private: bool = option(False, "--push: make the Space private.")
    hub_token: str | None = option(
        None, "--push: access token. Default: that of HF_TOKEN or `hf auth login`, which other users can't see in `ps`."
    )
    revision: str | None = option(None, "Branch, tag or commit of a model on the Hub.")

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "max_megabytes")
        if self.push is not None and self.output_dir is not None:
            raise ValueError("`output_dir` and `push` were both given: a page is written to a folder, or pushed.")


@dataclass
class CalibrateConfig(ImageOptions):
    """Options of `ddpm-hf calibrate`."""

    num_images: int = option(256, "How many images to measure on, drawn at random; each costs T network calls.")
    seed: int = option(0, "Fixes the choice of images and their noise.")
    batch_size: int = option(64, "Images per forward pass.")
    output_dir: str | None = option(None, "Folder for the calibrated model. Default: the model's own.")
    device: str | None = option(None, "cpu, cuda, mps, …; default: the best one available.")
    revision: str | None = option(None, "Branch, tag or commit of a model on the Hub.")

    def __post_init__(self) -> None:
        check_types(self)
        at_least(1, self, "num_images", "batch_size")
        check_seed(self.seed, self.num_images)
        self.check_images()


@dataclass
class EvaluateConfig(ImageOptions, SamplingOptions):
    """Options of `ddpm-hf evaluate`."""

    test_split: str | None = option(None, "A split of the dataset that the model has not seen, e.g. `test`.")
    test_data_dir: str | None = option(None, "A folder of images that the model has not seen.")
    metrics: str | None = option(
        None,
        f"What to measure: any of {','.join(METRICS)}. Default: bpd,nearest; also fid,kid,isc,prc if the extra [eval] "
        "is installed; with --feature_extractor fd,kd,prc instead of these.",
    )
    num_images: int = option(1000, "How many samples to make. A published FID usually has 50,000.")
    num_likelihood_images: int = option(256, "How many images to measure bits/dim on at most, drawn at random.")
    likelihood_steps: int | None = option(None, "Steps of the chain whose bits/dim are measured. Default: all T.")
    calls_per_image: int | None = option(
        None, "Estimate bits/dim by this many network calls per image. Default: exact."
    )
    inception_weights: str | None = option(None, "The file of torch-fidelity's Inception weights. Default: its cache.")
    feature_extractor: str | None = option(
        None, "A vision model of `transformers` (folder or Hub) to extract features with, instead of Inception."
    )
    seed: int = option(0, "Sample i comes from seed + i. Also fixes the images and the noise of the likelihood.")
    batch_size: int = option(64, "Images per forward pass.")
    output_dir: str | None = option(None, "Folder for results and plots. Default: the model's own.")
    update_card: bool = option(True, "Write the results into the card in the model's folder.")
    device: str | None = option(None, "cpu, cuda, mps, …; default: the best one available.")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Precision of the network.")
    revision: str | None = option(None, "Branch, tag or commit of a model on the Hub.")

    def __post_init__(self) -> None:
        check_types(self)
        at_least(1, self, "num_images", "batch_size", "likelihood_steps")
        at_least(2, self, "num_likelihood_images", "calls_per_image")
        check_seed(self.seed, self.num_images)
        self.check_sampling()
        self.check_images()
        if self.test_split is not None and self.test_data_dir is not None:
            raise ValueError("`test_split` and `test_data_dir` both name unseen images: leave one out.")
        if self.test_split is not None and self.dataset_name is None:
            raise ValueError("`test_split` needs a dataset: with --train_data_dir, use --test_data_dir FOLDER.")
        unknown = [name for name in self.chosen_metrics or () if name not in METRICS]
        if unknown:
            raise ValueError(f"`metrics` has {unknown[0]!r}, but must be of {','.join(METRICS)}.")

    @property
    def chosen_metrics(self) -> list[str] | None:
        """The requested metrics; None leaves the choice to `default_metrics`."""
        return None if self.metrics is None else [name.strip() for name in self.metrics.split(",")]


@dataclass
class PaperConfig(ImageOptions):
    """Options of `ddpm-hf paper`. Real images are optional: without them, some figures are left out."""

    test_split: str | None = option(None, "A split of the dataset that the model has not seen, e.g. `test`.")
    test_data_dir: str | None = option(None, "A folder of images that the model has not seen.")
    figures: str | None = option(None, "Names of figures, as in samples,rate_distortion. Default: all but ablation.")
    num_images: int = option(100, "How many samples to make.")
    num_likelihood_images: int = option(50, "How many images to measure bits/dim on at most, drawn at random.")
    num_inference_steps: int | None = option(None, "K, the steps per sample. Default: the model's T.", ["--steps"])
    ablation_updates: int = option(300, "Updates of each of the six networks that the figure `ablation` trains.")
    feature_extractor: str | None = option(
        None,
        "Features for Fréchet distances: `inception`, or a vision model of `transformers` (folder or Hub). Default: "
        "patches of the real images, which need no network.",
    )
    seed: int = option(0, "Sample i comes from seed + i. Also fixes the choice of images and all noise.")
    batch_size: int = option(50, "Images per forward pass.")
    output_dir: str = option("paper", "Folder for the figures and their page, index.html.")
    device: str | None = option(None, "cpu, cuda, mps, …; default: the best one available.")
    revision: str | None = option(None, "Branch, tag or commit of a model on the Hub.")

    def __post_init__(self) -> None:
        check_types(self)
        at_least(1, self, "batch_size", "num_inference_steps", "ablation_updates")
        at_least(2, self, "num_images", "num_likelihood_images")
        check_seed(self.seed, self.num_images + 1000)
        if self.dataset_name is not None and self.train_data_dir is not None:
            raise ValueError("`dataset_name` and `train_data_dir` both name training images: leave one out.")
        has_test = self.test_split is not None or self.test_data_dir is not None
        if has_test and self.dataset_name is None and self.train_data_dir is None:
            raise ValueError("unseen images were named, but no training images: pass --dataset or --train_data_dir.")


@dataclass
class CacheConfig:
    """Options of `ddpm-hf cache`."""

    cache_dir: str | None = option(None, "Where the decoded images are cached. Default: the cache of `datasets`.")
    prune: bool = option(False, "Remove incomplete caches, which interrupted runs leave; with --older_than, others.")
    older_than: float | None = option(
        None, "With --prune: remove caches that were not used for N days, complete or not. 0: all."
    )

    def __post_init__(self) -> None:
        check_types(self)
        at_least(0, self, "older_than")
        if self.older_than is not None and not self.prune:
            raise ValueError(f"`older_than` is {self.older_than:g}, but nothing is removed without --prune: add it.")


@dataclass
class DoctorConfig(ImageOptions):
    """Options of `ddpm-hf doctor`."""

    fix: str | None = option(None, "Write a repaired copy into this new folder.")
    checkpoint: str | None = option(
        None,
        "A checkpoint of the run that made the model, to tell its last weights from their average (EMA). Default: "
        "those in the model's folder.",
    )
    num_images: int = option(64, "How many images to measure errors on.")
    num_samples: int = option(32, "How many samples to look at; 0: none.")
    seed: int = option(0, "Fixes the choice of images, their noise, and the samples.")
    batch_size: int = option(64, "Images per forward pass.")
    device: str | None = option(None, "cpu, cuda, mps, …; default: the best one available.")
    revision: str | None = option(None, "Branch, tag or commit of a model on the Hub.")

    def __post_init__(self) -> None:
        check_types(self)
        at_least(2, self, "num_images")
        at_least(1, self, "batch_size")
        at_least(0, self, "num_samples")
        check_seed(self.seed, self.num_samples)
        if self.has_images:
            self.check_images()

    @property
    def has_images(self) -> bool:
        """Whether there are images to measure errors on."""
        return self.dataset_name is not None or self.train_data_dir is not None


@dataclass
class EnvConfig:
    """Options of `ddpm-hf env`, which has none."""
