"""A Hub on this machine, and saved models."""

import pytest

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from support.hub_server import TOKEN, point_client_at, serve_hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serve_hub() as server:
        server.add_token(TOKEN, "me", orgs={"lab": "write", "library": "read"})
        point_client_at(server, monkeypatch, tmp_path)
        yield server


@pytest.fixture
def make_model(make_unet, tmp_path):
    def make(name="model", bias=0.0, scheduler=None, **options):
        unet = make_unet(**options)
        unet.conv_out.bias.data.fill_(bias)
        DDPMPipelineCustom(unet, scheduler or DDPMSchedulerCustom()).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make
