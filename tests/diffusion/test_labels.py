"""Classes by name: what stands for which integer, and what is refused."""

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.diffusion.ddpm_labels import find_label, label_names, label_tensor
from ddpm_hf.sampling.generate import parse_labels

PETS = {"num_class_embeds": 4, "_label_names": ["cats", "dogs", "3"]}


@pytest.fixture
def pipe(make_unet):
    unet = make_unet(num_class_embeds=4)
    unet.register_to_config(_label_names=PETS["_label_names"])
    pipe = DDPMPipelineCustom(unet, DDPMSchedulerCustom(timestep_spacing="linspace"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, labels, count=2):
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    return pipe(count, generators, 3, "pt", class_labels=labels).images


def test_a_name_samples_its_class(pipe):
    assert torch.equal(images(pipe, ["dogs", 3]), images(pipe, [1, 3]))
    assert torch.equal(images(pipe, "dogs"), images(pipe, 1))
    assert torch.equal(images(pipe, ["3", "cats"]), images(pipe, [2, 0]))  # a text is a name, whatever it says
    assert not torch.equal(images(pipe, "dogs"), images(pipe, "cats"))


def test_the_fast_network_takes_names(pipe):
    pipe.use_fast_network(torch.bfloat16)
    assert torch.equal(images(pipe, "dogs"), images(pipe, 1))


def test_an_unknown_name_lists_those_there_are(pipe):
    with pytest.raises(ValueError, match=r"has 'cat', but the names of the labels are 'cats' \(0\), 'dogs' \(1\)"):
        images(pipe, "cat")
    with pytest.raises(ValueError, match="this model has no names for its labels: use numbers, 0 to 4"):
        find_label("cats", {"num_class_embeds": 5})
    many = {"num_class_embeds": 1000, "_label_names": [f"kind {i}" for i in range(1000)]}
    with pytest.raises(ValueError, match=r"'kind 19' \(19\), and 980 more in unet/config.json"):
        find_label("cats", many)


def test_stock_diffusers_ignores_the_names_and_keeps_them(pipe, tmp_path, caplog):
    pipe.save_pretrained(tmp_path / "ours")
    stock = DDPMPipeline.from_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "theirs")
    network = UNet2DModel.from_pretrained(tmp_path / "theirs", subfolder="unet")
    assert network.config._label_names == PETS["_label_names"]
    assert not caplog.records
    x, t, label = torch.randn(1, 3, 8, 8), torch.tensor(5), torch.tensor([1])
    with torch.no_grad():
        outputs = [unet(x, t, class_labels=label).sample for unet in (network, pipe.unet)]
    torch.testing.assert_close(*outputs)
    again = DDPMPipelineCustom.from_pretrained(tmp_path / "theirs")
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(images(again, "dogs"), images(pipe, 1))


@pytest.mark.parametrize(
    "names", ["cats", {"cats": 0}, ["a", "a"], ["a", 1], [["a"]], ["a", "b", "c", "d", "e"], 3, True], ids=str
)
def test_names_that_are_none_are_refused(names):
    with pytest.raises(ValueError, match="`_label_names` .* at most 4 different texts"):
        label_names({"num_class_embeds": 4, "_label_names": names})


@pytest.mark.parametrize(
    ("names", "texts", "labels"),
    [
        (None, ["0", "3"], [0, 3]),
        (["cats", "dogs", "3"], ["cats", "1", "3"], [0, 1, 2]),
        (["0", "1", "2"], ["2", "3"], [2, 3]),  # 3 is the null label
        (["1", "2", "10"], ["1", "10"], [0, 2]),
        (["cats", "dogs"], [1, "cats"], [1, 0]),  # from Python
        (["cats", "dogs"], ["-1"], [-1]),  # which `label_tensor` refuses
    ],
)
def test_a_command_line_takes_names_and_numbers(names, texts, labels):
    assert parse_labels(texts, {"num_class_embeds": 4, "_label_names": names}) == labels


@pytest.mark.parametrize("text", ["0", "3", "", "one", "²", "9" * 5000])
def test_where_names_are_other_numbers_only_names_are_taken(text):
    with pytest.raises(ValueError, match=r"names of the labels are '1' \(0\), '2' \(1\), '10' \(2\)"):
        parse_labels([text], {"num_class_embeds": 4, "_label_names": ["1", "2", "10"]})


@pytest.mark.parametrize("labels", [["cats", None], ["cats", 1.5], [["cats"]], {"cats": 0}, object(), ["cats", 2**70]])
def test_what_is_no_label_is_refused(labels):
    with pytest.raises(ValueError, match="`class_labels`"):
        label_tensor(labels, 2, PETS)
