"""Features of any vision model of transformers: which they are, and which models and images are refused."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from ddpm_hf.evaluation.metrics.features import Extractor, open_extractor
from support.features import images, linear_extractor

CPU = torch.device("cpu")
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 32, "width": 32}, "resample": 3,
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}  # fmt: skip


def saved(model, folder):
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return str(folder)


@pytest.fixture
def resnet(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return saved(ResNetForImageClassification(config), tmp_path / "resnet")


# --- what features are --------------------------------------------------------------------------------------------


def test_features_are_the_pooled_output_of_the_model_on_pixels_in_its_range(resnet):
    x = images(5, size=32)  # the size of the processor: nothing is resized
    found = open_extractor(resnet, device=CPU)(x, batch_size=2, show_progress=False)
    model = ResNetForImageClassification.from_pretrained(resnet).eval()
    with torch.no_grad():
        expected = model.resnet(x.float() / 127.5 - 1).pooler_output.flatten(1)
    torch.testing.assert_close(found.pooled, expected, rtol=1e-4, atol=1e-5)
    assert found.pooled.dtype == torch.float32
    assert not found.is_inception


def test_grayscale_is_repeated_and_images_three_pixels_wide_are_not_transposed(resnet):
    extractor = open_extractor(resnet, device=CPU)
    gray = images(4, channels=1)
    assert torch.equal(extractor(gray).pooled, extractor(gray.repeat(1, 3, 1, 1)).pooled)
    narrow = images(4, size=3)
    turned = narrow.transpose(1, 2).contiguous()
    assert not torch.allclose(extractor(narrow).pooled, extractor(turned).pooled)


def test_a_pooler_without_weights_is_not_used(tmp_path):
    folder = saved(ViTForImageClassification(ViTConfig(**SMALL, image_size=32, patch_size=8)), tmp_path)
    first, second = open_extractor(folder, device=CPU), open_extractor(folder, device=CPU)
    x = images(3, size=32)
    assert torch.equal(first(x).pooled, second(x).pooled)
    model = ViTForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = model.vit(x.float() / 127.5 - 1).last_hidden_state
    torch.testing.assert_close(first(x).pooled, hidden.mean(1), rtol=1e-4, atol=1e-5)
    assert "mean of the last hidden state" in first.identity


def test_clip_gives_its_image_embedding(tmp_path):
    config = CLIPConfig(
        text_config={**SMALL, "vocab_size": 10}, vision_config={**SMALL, "image_size": 32, "patch_size": 8},
        projection_dim=12,
    )  # fmt: skip
    folder = saved(CLIPModel(config), tmp_path)
    extractor = open_extractor(folder, device=CPU)
    assert extractor(images(2)).pooled.shape == (2, 12)
    assert "image embedding" in extractor.identity


def test_half_precision_weights_are_used_in_float32(resnet, tmp_path):
    model = ResNetForImageClassification.from_pretrained(resnet).half().eval()
    folder, x = saved(model, tmp_path / "half"), images(3, size=32)
    with torch.no_grad():
        expected = model.float().resnet(x.float() / 127.5 - 1).pooler_output.flatten(1)
    torch.testing.assert_close(open_extractor(folder, device=CPU)(x).pooled, expected, rtol=1e-4, atol=1e-5)


def test_identity_changes_with_weights_and_resizing_and_contains_no_path(resnet, tmp_path):
    first = open_extractor(resnet, device=CPU).identity
    assert open_extractor(resnet, device=CPU).identity == first
    assert str(tmp_path) not in first
    file = tmp_path / "resnet" / "preprocessor_config.json"
    file.write_text(json.dumps({**PROCESSOR, "resample": 2}))
    second = open_extractor(resnet, device=CPU).identity
    file = tmp_path / "resnet" / "model.safetensors"
    save_file({k: v + 1e-4 if v.ndim == 4 else v for k, v in load_file(file).items()}, file, {"format": "pt"})
    assert len({first, second, open_extractor(resnet, device=CPU).identity}) == 3


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (images(2, channels=4), "4 channels, but .* 1 .grayscale. or 3 .RGB."),
        (images(2).float(), "torch.float32 .* must be a uint8 tensor"),
        (images(2)[0], "must be a uint8 tensor of shape"),
        (images(2)[:0], "N at least 1"),
        (images(2).numpy(), "ndarray"),
    ],
)
def test_images_of_other_kinds_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        linear_extractor()(bad)


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="NaN or infinity.* damaged"):
        Extractor("broken", 2, lambda x: torch.full((len(x), 2), torch.nan))(images(3))


def test_extractors_that_cannot_be_loaded_are_refused(resnet, tmp_path):
    def refused(name, message, **options):
        with pytest.raises(ValueError, match=message):
            open_extractor(str(name), device=CPU, **options)

    refused(tmp_path / "nothing", "can't be loaded")
    refused(resnet, "another network", inception_weights=tmp_path / "w.pth")
    text = BertModel(BertConfig(**SMALL, vocab_size=10))
    text.save_pretrained(tmp_path / "text")
    refused(tmp_path / "text", "image processor")

    folder = tmp_path / "resnet"
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if "convolution" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "incomplete")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")  # a pickle
    refused(folder, "safetensors")


def test_code_of_a_model_is_never_run(tmp_path):
    trap = tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(trap)!r}).touch()\nclass C: pass\n"
    (tmp_path / "modeling.py").write_text(code)
    reference = {"AutoConfig": "modeling.C", "AutoModel": "modeling.C", "AutoImageProcessor": "modeling.C"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": reference}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, "auto_map": reference}))
    with pytest.raises(ValueError, match="without code of its own"):
        open_extractor(str(tmp_path), device=CPU)
    assert not trap.exists()


def test_without_the_extra_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match=r'pip install "ddpm-hf\[eval\]".*--feature_extractor'):
        open_extractor()
