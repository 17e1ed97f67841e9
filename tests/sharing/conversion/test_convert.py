"""Models of other people are converted with equal outputs, or refused with the reason."""

import json
import pickle
import warnings

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file, save_file

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.cli import main
from ddpm_hf.config.commands import ConvertConfig
from ddpm_hf.sharing.conversion.convert import convert_model
from ddpm_hf.sharing.conversion.improved_diffusion import improved_diffusion_network
from support import foreign_weights


def heads(style):
    return None if style == "ho" else 1 if "one head" in style else 2


@pytest.mark.parametrize("style", foreign_weights.STYLES)
def test_a_weight_file_gives_the_outputs_of_its_own_code(tmp_path, style):
    torch.save(foreign_weights.STYLES[style](), tmp_path / "ema.pt")
    config = ConvertConfig(resolution=8, num_heads=heads(style), beta_schedule="squaredcos_cap_v2")
    convert_model(str(tmp_path / "ema.pt"), tmp_path / "new", config)
    pipe = DDPMPipelineCustom.from_pretrained(tmp_path / "new")
    x, t, label = foreign_weights.probe()
    labels = torch.tensor([label]) if "classes" in style else None
    with torch.no_grad():
        output = pipe.unet.double()(x, t, class_labels=labels).sample
    assert foreign_weights.figures(output) == pytest.approx(foreign_weights.FIGURES[style], abs=1e-6)
    assert pipe.scheduler.config.variance_type == ("learned_range" if "learned" in style else "fixed_large")
    assert pipe.scheduler.config.beta_schedule == "squaredcos_cap_v2"


def test_of_a_training_state_the_ema_weights_are_converted(tmp_path):
    raw, ema = foreign_weights.ho(), foreign_weights.ho()
    ema["conv_out.bias"] += 1
    states = [{f"module.{k}": v for k, v in raw.items()}, {"state": {}, "param_groups": []}, 10, 500, ema]
    torch.save(states, tmp_path / "ckpt.pth")
    convert_model(str(tmp_path / "ckpt.pth"), tmp_path / "new", ConvertConfig(resolution=8))
    weights = load_file(tmp_path / "new/unet/diffusion_pytorch_model.safetensors")
    assert torch.equal(weights["conv_out.bias"], ema["conv_out.bias"])


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("code of a pickle was run",)


def without(weights, name):
    return {k: v for k, v in weights.items() if k != name}


def two_levels_of_attention():
    weights = foreign_weights.improved()
    extra = {k.replace("3.1.", "1.1."): v for k, v in weights.items() if k.startswith("input_blocks.3.1.")}
    return weights | {
        k: v[: 96 if "qkv" in k else 32, ..., :32, :1] if v.ndim > 1 else v[:32] for k, v in extra.items()
    }


REFUSALS = {
    "unknown architecture": (lambda: {"layers.0.weight": torch.ones(2)}, {}, "unknown architecture.*'layers.0.weight'"),
    "missing tensor": (lambda: without(foreign_weights.ho(), "norm_out.bias"), {}, "lacks norm_out.bias"),
    "more tensors": (lambda: foreign_weights.ho() | {"logvar": torch.ones(2)}, {}, "no place for \\(logvar"),
    "no convolution to halve images": (
        lambda: without(foreign_weights.ho(), "down.0.downsample.conv.weight"), {}, "halves images without a conv",
    ),
    "no convolution between levels": (
        lambda: without(foreign_weights.improved(), "input_blocks.2.0.op.weight"), {"num_heads": 2}, "resblock_updown",
    ),
    "heads of several sizes": (two_levels_of_attention, {"num_heads": 2}, "channels per head.*same everywhere"),
    "heads unknown": (foreign_weights.improved, {}, "--num_heads"),
    "heads that do not divide": (foreign_weights.improved, {"num_heads": 3}, "`num_heads` is 3"),
    "rescaled timesteps": (
        foreign_weights.improved, {"num_heads": 2, "ddpm_num_steps": 4000}, "`ddpm_num_steps` is 4000",
    ),
    "resolution unknown": (foreign_weights.ho, {"resolution": None}, "--resolution"),
    "no tensors": (lambda: [1, 2], {}, "no dictionary of tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_converted_exactly_is_refused(tmp_path, case):
    make, options, message = REFUSALS[case]
    torch.save(make(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=message):
        convert_model(str(tmp_path / "model.pt"), tmp_path / "new", ConvertConfig(**{"resolution": 8, **options}))
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_the_code_of_a_pickle_is_never_run(tmp_path):
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"weight": Bomb()}))
    torch.save({"weight": Bomb()}, tmp_path / "model.ckpt")
    for name in ("model.pt", "model.ckpt"):
        with pytest.raises(ValueError, match="can't be read as plain weights"):
            convert_model(str(tmp_path / name), tmp_path / "new", ConvertConfig(resolution=8))


def test_outputs_that_differ_are_not_converted(tmp_path, monkeypatch):
    """A wrong ε of the normalization, the smallest of mistakes."""
    torch.save(foreign_weights.improved(), tmp_path / "model.pt")

    def wrong_epsilon(weights, num_heads):
        network = improved_diffusion_network(weights, num_heads)
        network.config["norm_eps"] = 1e-6
        return network

    monkeypatch.setattr("ddpm_hf.sharing.conversion.convert.improved_diffusion_network", wrong_epsilon)
    with pytest.raises(ValueError, match="outputs differ"):
        convert_model(str(tmp_path / "model.pt"), tmp_path / "new", ConvertConfig(resolution=8, num_heads=2))
    assert not (tmp_path / "new").exists()


# --- models of diffusers -------------------------------------------------------------------------------------------


def make_old(folder):
    """Like the oldest repositories on the Hub: pickled weights, obsolete configuration keys."""
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    scheduler = folder / "scheduler/scheduler_config.json"
    old = {"timestep_values": None, "tensor_format": "pt", "variance_type": "fixed_large"}
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), **old}))
    unet = folder / "unet/config.json"
    unet.write_text(json.dumps({**json.loads(unet.read_text()), "mid_block_scale_factor": 1, "_name_or_path": "/x/y"}))


@pytest.mark.filterwarnings("error::UserWarning", "ignore:timestep spacing")
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("classes", [None, 4])
def test_a_stock_repository_becomes_ours(make_unet, tmp_path, old, classes):
    unet = make_unet(num_class_embeds=classes)
    DDPMPipeline(unet, DDPMScheduler(variance_type="fixed_large")).save_pretrained(tmp_path / "stock")
    (tmp_path / "stock/README.md").write_text("---\nlicense: apache-2.0\ndatasets: cifar10\n---\n# Theirs\n")
    if old:
        make_old(tmp_path / "stock")
    main(["convert", str(tmp_path / "stock"), str(tmp_path / "new")])
    new = tmp_path / "new"
    assert (new / "pipeline.py").is_file()
    assert not list(new.rglob("*.bin"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for loader in (DDPMPipelineCustom, DDPMPipeline):
            pipe = loader.from_pretrained(new)
            assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), pipe.unet.parameters(), strict=True))
            assert pipe.scheduler.config.variance_type == "fixed_large"
    card = (new / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "- cifar10" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision_is_kept(make_unet, tmp_path, dtype):
    DDPMPipeline(make_unet().to(dtype), DDPMScheduler()).save_pretrained(tmp_path / "half")
    convert_model(str(tmp_path / "half"), tmp_path / "new", ConvertConfig())
    here, there = (load_file(tmp_path / name / "unet/diffusion_pytorch_model.safetensors") for name in ("half", "new"))
    assert all(there[k].dtype == dtype and torch.equal(here[k], there[k]) for k in here)


def test_checkpoints_of_the_stock_script_are_converted_with_their_ema_weights(make_unet, tmp_path):
    run = tmp_path / "run"
    DDPMPipeline(make_unet(), DDPMScheduler()).save_pretrained(run)
    for name, bias in (("unet", 1.0), ("unet_ema", 2.0)):
        unet = make_unet()
        unet.conv_out.bias.data.fill_(bias)
        unet.save_pretrained(run / "checkpoint-5" / name)
    convert_model(str(run / "checkpoint-5"), tmp_path / "new", ConvertConfig())
    assert DDPMPipeline.from_pretrained(tmp_path / "new").unet.conv_out.bias.tolist() == [2.0] * 3


def test_a_bad_pickle_in_a_repository_is_not_run(make_unet, tmp_path):
    DDPMPipeline(make_unet(), DDPMScheduler()).save_pretrained(tmp_path / "stock")
    weights = tmp_path / "stock/unet/diffusion_pytorch_model.safetensors"
    save = {**load_file(weights), "bomb": Bomb()}
    weights.unlink()
    torch.save(save, weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match="damaged"):
        convert_model(str(tmp_path / "stock"), tmp_path / "new", ConvertConfig())
    assert not (tmp_path / "new").exists()


def test_bad_arguments_are_named(make_unet, tmp_path):
    DDPMPipeline(make_unet(), DDPMScheduler()).save_pretrained(tmp_path / "stock")
    source = str(tmp_path / "stock")
    with pytest.raises(ValueError, match="destination.*exists"):
        convert_model(source, tmp_path / "stock", ConvertConfig())
    with pytest.raises(ValueError, match="`num_heads` is only for weight files"):
        convert_model(source, tmp_path / "new", ConvertConfig(num_heads=4))
    with pytest.raises(ValueError, match="no model"):
        convert_model(str(tmp_path / "nothing"), tmp_path / "new", ConvertConfig())
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(ValueError, match="can't be read"):
        convert_model(str(tmp_path / "x.safetensors"), tmp_path / "new", ConvertConfig())
    assert not (tmp_path / "new").exists()
