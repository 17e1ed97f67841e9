"""A Hub on this machine."""

import pytest

from support.hub_server import TOKEN, point_client_at, serve_hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serve_hub() as server:
        server.add_token(TOKEN, "me")
        point_client_at(server, monkeypatch, tmp_path)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
