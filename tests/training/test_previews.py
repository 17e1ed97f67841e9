"""Sample samples during training."""

import pytest
from accelerate import Accelerator

from ddpm_hf.config.training import TrainConfig
from ddpm_hf.diffusion.scheduling_ddpm_custom import DDPMSchedulerCustom
from ddpm_hf.distributed import Agreement
from ddpm_hf.training.network import build_ema, build_unet
from ddpm_hf.training.plan import Plan
from ddpm_hf.training.previews import sample_previews
from ddpm_hf.training.state import Run
from support.runs import TINY_OPTIONS


@pytest.mark.parametrize("classes", [None, 10])
def test_previews_show_the_ema_and_the_raw_weights(classes, tmp_path):
    """With an average of zeros, the network predicts 0; the raw weights predict something else."""
    config = TrainConfig(**{**TINY_OPTIONS, "output_dir": str(tmp_path), "max_train_steps": 1})
    unet = build_unet(config, classes)
    accelerator = Accelerator(cpu=True)
    plan, ema = Plan(config, 1797, 1), build_ema(config, unet)
    run = Run(config, plan, DDPMSchedulerCustom(), accelerator, Agreement(1), unet, None, ema)
    seen = []
    if classes:
        unet.class_embedding.register_forward_hook(lambda module, labels, output: seen.extend(labels[0].tolist()))
    for shadow in run.ema.shadow_params:
        shadow.zero_()
    checks = []
    samples = sample_previews(run, lambda: checks.append(1))
    assert samples.keys() == {"test_samples", "test_samples_raw"}
    assert len(checks) == 2 * config.ddpm_num_inference_steps
    again = sample_previews(run, lambda: None)
    assert samples["test_samples"].numpy().tobytes() == again["test_samples"].numpy().tobytes()
    assert samples["test_samples"].numpy().tobytes() != samples["test_samples_raw"].numpy().tobytes()
    for p in unet.parameters():
        p.data.zero_()
    assert (
        sample_previews(run, lambda: None)["test_samples_raw"].numpy().tobytes()
        == samples["test_samples"].numpy().tobytes()
    )
    if classes:
        assert set(seen) == {0, 1, 2, 3}
