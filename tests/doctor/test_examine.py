"""`ddpm-hf doctor` finds what is wrong with a model, repairs what can be repaired, and leaves good models alone."""

import json
import shutil

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, load_pipeline
from ddpm_hf.cli import main
from ddpm_hf.config.commands import DoctorConfig
from ddpm_hf.doctor.classes import examine_classes
from ddpm_hf.doctor.examine import examine
from ddpm_hf.doctor.readings import Errors, Reading
from ddpm_hf.doctor.repair import write_repaired
from ddpm_hf.doctor.training import declared_schedule
from ddpm_hf.evaluation.calibration import calibrate, save_calibrated
from support.models import tiny_unet
from support.small_training import COSINE, tinted_digits, train_small

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(good_model, tmp_path):
    return shutil.copytree(good_model, tmp_path / "model")


def look(model, images=None, **options):
    """What the doctor finds, with a few images and, unless told otherwise, without samples."""
    options = {"num_images": 32, "num_samples": 0, **options}
    if images is not None:
        options["train_data_dir"] = str(images)
    return examine(str(model), DoctorConfig(**options))


def names(diagnosis):
    return [finding.name for finding in diagnosis.faults]


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_weights(model, change):
    weights = {name: tensor.clone() for name, tensor in load_file(model / WEIGHTS).items()}
    save_file(change(weights) or weights, model / WEIGHTS)


# --- good models -----------------------------------------------------------------------------------------------------


def test_a_good_model_has_no_fault_and_no_note(model, image_folder):
    diagnosis = look(model, image_folder, num_images=64, num_samples=32)
    assert diagnosis.findings == []
    rows = [row.split() for row in diagnosis.table.splitlines()[2:]]
    for _, _, floor, _, _, measured, trivial in ([float(v) for v in row] for row in rows):
        assert floor < measured < trivial  # as declared: v


def test_a_good_calibration_is_no_finding(model, image_folder):
    pipe = load_pipeline(str(model))
    pixels = torch.from_numpy(tinted_digits()).permute(0, 3, 1, 2)
    calibrate(pipe, pixels, num_images=16, show_progress=False)
    save_calibrated(pipe, model)
    assert look(model, image_folder).findings == []


@pytest.mark.parametrize(
    ("schedule", "prediction_type"),
    [("linear", "epsilon"), ("squaredcos_cap_v2", "v_prediction"), ("scaled_linear", "sample")],
)
def test_stock_models_have_no_fault(schedule, prediction_type, image_folder, tmp_path):
    """They are not trained: with images, that is a note."""
    unet = UNet2DModel(8, 3, 3, block_out_channels=(32, 64), down_block_types=("DownBlock2D",) * 2,
                       up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler(beta_schedule=schedule, prediction_type=prediction_type)).save_pretrained(tmp_path)
    assert look(tmp_path).faults == []
    with_images = look(tmp_path, image_folder, num_images=8, num_samples=4)
    assert with_images.faults == []
    assert "not trained on these images" in [finding.name for finding in with_images.findings]


def test_tiny_models_have_no_fault(tmp_path):
    for i, options in enumerate([{}, {"num_class_embeds": 5}, {"out_channels": 6}]):
        variance = "learned_range" if "out_channels" in options else "fixed_small"
        pipe = DDPMPipelineCustom(tiny_unet(**options), DDPMSchedulerCustom(variance_type=variance))
        pipe.save_pretrained(tmp_path / str(i))
        assert look(tmp_path / str(i), num_samples=2).faults == []


# --- faults of the scheduler, and of what belongs to it --------------------------------------------------------------

SCHEDULERS = {
    "ε instead of v": ({"prediction_type": "epsilon"}, "prediction type"),
    "x_0 instead of v": ({"prediction_type": "sample"}, "prediction type"),
    "linear instead of cosine": ({"beta_schedule": "linear"}, "schedule"),
    "stable diffusion's schedule": (
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, "schedule",
    ),
    "sigmoid instead of cosine": ({"beta_schedule": "sigmoid"}, "schedule"),
    "half of T": ({"num_train_timesteps": 500}, "timesteps"),
    "four times T": ({"num_train_timesteps": 4000}, "timesteps"),
    "other betas": ({"trained_betas": [1e-4 + 0.02 * i / 1000 for i in range(1000)]}, "schedule"),
    "clipping within the range": ({"clip_sample_range": 0.5}, "clipping"),
    "zero SNR with ε": ({"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, "zero terminal SNR"),
    "a learned variance": ({"variance_type": "learned_range"}, "variance"),
    "an offset beyond T": ({"timestep_spacing": "leading", "steps_offset": 100}, "spacing"),
}  # fmt: skip


@pytest.mark.parametrize("fault", SCHEDULERS)
def test_a_wrong_scheduler_is_found_and_repaired(fault, model, image_folder, tmp_path):
    changes, name = SCHEDULERS[fault]
    edit(model / "scheduler" / "scheduler_config.json", **changes)
    diagnosis = look(model, image_folder)
    assert name in names(diagnosis)
    for finding in diagnosis.faults:
        assert any(character.isdigit() for character in finding.evidence)

    write_repaired(diagnosis.pipeline, diagnosis.findings, tmp_path / "repaired")
    after = look(tmp_path / "repaired", image_folder)
    if "zero" in name:  # hid that the network predicts v
        write_repaired(after.pipeline, after.findings, tmp_path / "again")
        after = look(tmp_path / "again", image_folder)
    assert after.faults == []


def test_both_faults_of_a_scheduler_are_found_at_once(model, image_folder):
    edit(model / "scheduler" / "scheduler_config.json", prediction_type="epsilon", beta_schedule="linear")
    assert {"prediction type", "schedule"} <= set(names(look(model, image_folder)))


def test_spacing_that_starts_in_the_image_is_found_without_images(model):
    file = model / "scheduler" / "scheduler_config.json"
    edit(file, timestep_spacing="leading")  # at T = 1000 it does so in few steps only
    (note,) = look(model).findings
    assert (note.name, note.severity) == ("spacing", "note")
    edit(file, num_train_timesteps=1500)  # the 1000 steps that pipelines take by default start at 999
    assert "t = 999 of 1499" in look(model).faults[0].evidence


def test_a_schedule_that_never_reaches_noise_is_found_without_images(model):
    edit(model / "scheduler" / "scheduler_config.json", num_train_timesteps=100, beta_schedule="linear")
    assert names(look(model)) == ["terminal SNR"]


def test_stale_calibrations_are_found(model, image_folder):
    """Of another process; and of other weights, whose errors were larger."""
    pipe = load_pipeline(str(model))
    pixels = torch.from_numpy(tinted_digits()).permute(0, 3, 1, 2)
    calibrate(pipe, pixels, num_images=16, show_progress=False)
    save_calibrated(pipe, model)
    file = model / "scheduler" / "scheduler_config.json"
    stored = json.loads(file.read_text())["_calibration"]
    edit(file, _calibration={**stored, "x_0_error": [2 * error for error in stored["x_0_error"]]})
    assert names(look(model, image_folder)) == ["stale calibration"]
    edit(file, _calibration=stored, clip_sample_range=2.0)
    assert names(look(model)) == ["stale calibration"]


# --- faults of the weights -------------------------------------------------------------------------------------------


def reverse_channels(weights):
    weights["conv_in.weight"] = weights["conv_in.weight"].flip(1).contiguous()
    for name in ("conv_out.weight", "conv_out.bias"):
        weights[name] = weights[name].flip(0).contiguous()


def invert(weights):
    for name in ("conv_in.weight", "conv_out.weight", "conv_out.bias"):
        weights[name] = -weights[name]


def make_nan(weights):
    weights["conv_in.bias"][0] = float("nan")


def flip_a_bit(weights):
    weights["mid_block.resnets.0.conv1.weight"].view(-1).view(torch.int32)[7] ^= 1 << 30


def empty_a_norm(weights):
    weights["mid_block.resnets.0.norm1.weight"].zero_()


def empty_the_last_layer(weights):
    for name in ("conv_out.weight", "conv_out.bias"):
        weights[name].zero_()


def round_to(dtype):
    return lambda weights: {name: weight.to(dtype).float() for name, weight in weights.items()}


def swap_a_layer(weights):
    name = next(n for n, w in weights.items() if n.startswith("up_blocks.1") and w.ndim == 4 and len(w) == w.shape[1])
    weights[name] = weights[name].transpose(0, 1).contiguous()


def weaken_the_first_layer(weights):
    weights["conv_in.weight"] *= 0.5


def exchange_two_layers(weights):
    a, b = (f"up_blocks.{i}.resnets.0.time_emb_proj.weight" for i in (0, 1))
    a = next(n for n, w in weights.items() if w.shape == weights[b].shape and n != b and n.endswith("proj.weight"))
    weights[a], weights[b] = weights[b], weights[a]


def reverse_channels_of_the_input(weights):
    weights["conv_in.weight"] = weights["conv_in.weight"].flip(1).contiguous()


def rotate_channels(weights):
    order = [1, 2, 0]
    weights["conv_in.weight"] = weights["conv_in.weight"][:, order].contiguous()
    for name in ("conv_out.weight", "conv_out.bias"):
        weights[name] = weights[name][order].contiguous()


def empty_a_layer(weights):
    weights["mid_block.resnets.0.conv2.weight"].zero_()


WEIGHT_FAULTS = {
    reverse_channels: "channel order",
    rotate_channels: "channel order",
    invert: "inverted",
    make_nan: "not finite",
    flip_a_bit: "outlier",
    empty_a_norm: "zero layer",
    empty_the_last_layer: "zero output",
    empty_a_layer: "zero layer",
    swap_a_layer: "layer",
    exchange_two_layers: "layer",
    reverse_channels_of_the_input: "layer",
    weaken_the_first_layer: "layer",
}


@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
def test_wrong_weights_are_found_and_repaired_where_that_is_possible(fault, model, image_folder, tmp_path):
    name, good = WEIGHT_FAULTS[fault], load_file(model / WEIGHTS)
    change_weights(model, fault)
    diagnosis = look(model, image_folder)
    assert names(diagnosis) == [name]
    if diagnosis.faults[0].repair and name not in ("not finite", "outlier"):  # what was there is lost
        write_repaired(diagnosis.pipeline, diagnosis.findings, tmp_path / "repaired")
        repaired = load_file(tmp_path / "repaired" / WEIGHTS)
        assert all(bool((repaired[name] == weight).all()) for name, weight in good.items())


@pytest.mark.parametrize("fault", [make_nan, flip_a_bit])
def test_lost_weights_become_0_in_a_repaired_copy(fault, model, tmp_path):
    good = load_file(model / WEIGHTS)
    change_weights(model, fault)
    diagnosis = look(model)
    write_repaired(diagnosis.pipeline, diagnosis.findings, tmp_path / "repaired")
    assert look(tmp_path / "repaired").faults == []
    repaired = load_file(tmp_path / "repaired" / WEIGHTS)
    different = [repaired[name][repaired[name] != weight] for name, weight in good.items()]
    assert torch.cat(different).tolist() == [0.0]


class ClassMeans(torch.nn.Module):
    """Predicts the mean of each class, as the best network does where noise hides all else."""

    def __init__(self, means):
        super().__init__()
        self.class_embedding = torch.nn.Embedding.from_pretrained(means.flatten(1))

    def forward(self, x, t, class_labels, return_dict):
        return (self.class_embedding(class_labels).view_as(x),)


@pytest.mark.parametrize("numbers", [[0, 1, 2], [1, 0, 2], [2, 0, 1]])
def test_renumbered_classes_are_found_and_put_in_order(numbers):
    noise = torch.Generator().manual_seed(0)
    means, labels = torch.randn(3, 1, 4, 4, generator=noise) / 2, torch.arange(3).repeat(8)
    x_0 = means[labels] + 0.1 * torch.randn(24, 1, 4, 4, generator=noise)
    reading = Reading(declared_schedule(DDPMSchedulerCustom(**COSINE)), "sample")
    found = list(examine_classes(Errors(ClassMeans(means[numbers]), x_0, labels), reading))
    assert [finding.name for finding in found] == ([] if numbers == [0, 1, 2] else ["class labels"])
    for finding in found:
        repaired = finding.repair.weights({"class_embedding.weight": means[numbers].flatten(1)})
        assert torch.equal(repaired["class_embedding.weight"], means.flatten(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_were_rounded_are_found_without_images(dtype, model):
    change_weights(model, round_to(dtype))
    assert names(look(model)) == ["rounded weights"]
    change_weights(model, lambda weights: {name: weight.to(dtype) for name, weight in weights.items()})
    (note,) = look(model).findings  # openly stored in half precision
    assert (note.name, note.severity) == ("half precision on disk", "note")


def test_a_network_of_pixels_in_0_1_is_found(image_folder, tmp_path):
    _, unet = train_small(shift=0.5, scale=0.5, updates=400)
    DDPMPipelineCustom(unet, DDPMSchedulerCustom(**COSINE)).save_pretrained(tmp_path)
    diagnosis = look(tmp_path, image_folder)
    assert names(diagnosis) == ["pixel range"]
    assert "[0, 1]" in diagnosis.faults[0].what


@pytest.mark.parametrize("layout", ["ours", "train_unconditional.py"])
def test_raw_weights_instead_of_their_average_are_found_and_replaced(layout, trained, model, tmp_path):
    raw, average = trained
    raw.save_pretrained(model / "unet")
    checkpoint = model / "checkpoint-700"
    if layout == "ours":
        shutil.copytree(model, checkpoint)
        average.save_pretrained(checkpoint / "unet")
        (checkpoint / "training_state").mkdir()
        save_file(raw.state_dict(), checkpoint / "training_state" / "weights.safetensors")
    else:
        raw.save_pretrained(checkpoint / "unet")
        average.save_pretrained(checkpoint / "unet_ema")
    diagnosis = look(model)
    assert names(diagnosis) == ["raw weights"]
    write_repaired(diagnosis.pipeline, diagnosis.findings, tmp_path / "repaired")
    repaired = load_file(tmp_path / "repaired" / WEIGHTS)
    assert all(bool((repaired[name] == weight).all()) for name, weight in average.state_dict().items())
    assert look(tmp_path / "repaired", checkpoint=str(checkpoint)).faults == []


def test_an_average_that_never_moved_is_found_and_replaced(trained, model, tmp_path):
    raw, _ = trained
    unmoved = UNet2DModel.from_config(raw.config)
    checkpoint = model / "checkpoint-700"
    raw.save_pretrained(checkpoint / "unet")
    unmoved.save_pretrained(checkpoint / "unet_ema")
    unmoved.save_pretrained(model / "unet")
    diagnosis = look(model)
    assert names(diagnosis) == ["old average"]
    assert "0% of the way" in diagnosis.faults[0].evidence
    write_repaired(diagnosis.pipeline, diagnosis.findings, tmp_path / "repaired")
    repaired = load_file(tmp_path / "repaired" / WEIGHTS)
    assert all(bool((repaired[name] == weight).all()) for name, weight in raw.state_dict().items())


def test_weights_of_several_precisions_are_counted(model):
    change_weights(model, lambda weights: {**weights, "conv_out.bias": weights["conv_out.bias"].half()})
    diagnosis = look(model)
    assert names(diagnosis) == ["mixed precision on disk"]
    assert "1 float16 tensors" in diagnosis.faults[0].evidence


@pytest.mark.parametrize(
    "change",
    [
        {"flip_sin_to_cos": False},
        {"act_fn": "relu"},
        pytest.param({"norm_num_groups": 4}, marks=pytest.mark.slow),
    ],
)
def test_settings_of_the_network_that_change_no_shape_are_found_and_repaired(change, model, image_folder, tmp_path):
    edit(model / "unet" / "config.json", **change)
    diagnosis = look(model, image_folder)
    assert "network configuration" in names(diagnosis)
    write_repaired(diagnosis.pipeline, diagnosis.findings, tmp_path / "repaired")
    assert look(tmp_path / "repaired", image_folder).faults == []


# --- faults of the files ---------------------------------------------------------------------------------------------


def truncate(model):
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:-1000])


def remove_the_scheduler(model):
    shutil.rmtree(model / "scheduler")


def damage_the_configuration(model):
    (model / "unet" / "config.json").write_text("{")


def keep_a_pickle_only(model):
    torch.save(load_file(model / WEIGHTS), model / "unet" / "diffusion_pytorch_model.bin")
    (model / WEIGHTS).unlink()


def remove_the_weights(model):
    (model / WEIGHTS).unlink()


def configure_another_network(model):
    edit(model / "unet" / "config.json", block_out_channels=[32, 48])


def lose_a_tensor(model):
    change_weights(model, lambda weights: {name: w for name, w in weights.items() if name != "conv_out.bias"})


def lose_a_shard(model):
    (model / WEIGHTS).rename(model / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "diffusion_pytorch_model-00002-of-00002.safetensors"}}
    (model / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def change_after_hashing(model):
    (model / "manifest.json").write_text(json.dumps({WEIGHTS: "0" * 64}))


def name_another_pipeline(model):
    edit(model / "model_index.json", _class_name="StableDiffusionPipeline")


FILES = {
    "wrong class": name_another_pipeline,
    "truncated": truncate,
    "missing file": remove_the_scheduler,
    "damaged file": damage_the_configuration,
    "pickle": keep_a_pickle_only,
    "missing weights": remove_the_weights,
    "weights of another network": configure_another_network,
    "shards": lose_a_shard,
    "hashes": change_after_hashing,
}


@pytest.mark.parametrize("name", FILES)
def test_a_fault_of_the_files_is_found(name, model):
    FILES[name](model)
    assert names(look(model))[0] == name


@pytest.mark.parametrize("fault", ["the index is missing", "wrong class"])
def test_a_wrong_index_is_written_anew(fault, model, tmp_path):
    good = load_file(model / WEIGHTS)
    if fault == "wrong class":
        edit(model / "model_index.json", unet=["diffusers", "UNet2DConditionModel"])
    else:
        (model / "model_index.json").unlink()
    diagnosis = look(model)
    write_repaired(diagnosis.pipeline, diagnosis.findings, tmp_path / "repaired")
    assert look(tmp_path / "repaired").findings == []
    repaired = load_pipeline(str(tmp_path / "repaired")).unet.state_dict()
    assert all(bool((repaired[name] == weight).all()) for name, weight in good.items())


def test_a_pickle_beside_safetensors_is_noted(model):
    torch.save({}, model / "unet" / "diffusion_pytorch_model.bin")
    (note,) = look(model).findings
    assert (note.name, note.severity) == ("unused pickle", "note")


def test_a_lost_tensor_is_named(model):
    lose_a_tensor(model)
    (fault,) = look(model).faults
    assert "conv_out.bias" in fault.evidence
    assert "1 of " in fault.evidence


def test_a_truncated_file_is_measured(model):
    size = (model / WEIGHTS).stat().st_size
    truncate(model)
    assert look(model).faults[0].evidence == f"{size - 1000:,} of {size:,} bytes"


# --- samples, and the command ----------------------------------------------------------------------------------------


def test_samples_that_lack_contrast_are_found(model, image_folder):
    """A network whose output shrinks: faults that no reading explains are seen in its samples."""

    def weaken(weights):
        for name in ("conv_out.weight", "conv_out.bias"):
            weights[name] *= 0.55

    change_weights(model, weaken)
    found = look(model, image_folder, num_samples=32).findings
    assert "samples" in [finding.name for finding in found]


def test_the_command_names_evidence_and_remedy_and_writes_a_repaired_copy(model, image_folder, tmp_path, capsys):
    edit(model / "scheduler" / "scheduler_config.json", prediction_type="epsilon")
    options = ["--dataset", str(image_folder), "--num_images", "32", "--num_samples", "0"]
    with pytest.raises(SystemExit, match="1"):
        main(["doctor", str(model), *options, "--fix", str(tmp_path / "repaired")])
    text = capsys.readouterr().out
    assert "FAULT (prediction type): The network predicts v_prediction, but the scheduler says epsilon." in text
    assert f"--fix {model.name}-repaired" in text
    assert "1 fault." in text
    assert "repairs prediction type" in text
    main(["doctor", str(tmp_path / "repaired"), *options])
    assert "0 faults." in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"`fix` is .*exists"):
        main(["doctor", str(model), "--fix", str(tmp_path / "repaired")])


def test_bad_options_are_refused(model, image_folder):
    with pytest.raises(ValueError, match="no model 'no/such/model'|no model"):
        examine("no such model", DoctorConfig())
    with pytest.raises(ValueError, match="`num_images` is 1000, but .* has 256"):
        look(model, image_folder, num_images=1000)
