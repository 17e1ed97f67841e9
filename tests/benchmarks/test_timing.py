"""What the benchmarks measure with."""

import sys

import pytest
import torch

from support.runs import ROOT

sys.path.insert(0, str(ROOT / "training" / "benchmarks"))
from common import networks, timing


def test_peers_take_turns_and_the_first_round_counts_for_nothing(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(timing, "_now", lambda: clock[0])

    def peer(name, seconds):
        def call():
            clock[0] += 100 if len(order) < 2 else seconds
            order.append(name)

        return call

    assert timing.time_in_turns({"a": peer("a", 1.0), "b": peer("b", 3.0)}, repeats=3) == {"a": 1.0, "b": 3.0}
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]


def test_flops_of_a_matrix_product():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert timing.flops(lambda: a @ b) == 2 * 3 * 5 * 7


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_that_of_another_process():
    ballast = torch.ones(2**28)  # 1 GiB here must not be counted there
    grown = timing.peak_memory(torch.ones, 10**8) - timing.peak_memory(torch.ones, 1)
    assert grown == pytest.approx(4e8 / 2**20, rel=0.1)
    assert ballast.nbytes > 4e8


def test_networks_have_the_sizes_they_are_named_for():
    millions = {name: round(networks.build(name).num_parameters() / 1e6, 1) for name in networks.NETWORKS}
    assert millions == {"tiny": 0.7, "small": 2.7, "paper": 35.7}
