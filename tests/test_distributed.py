"""What the processes of a run tell each other, by real processes that gloo connects."""

import multiprocessing
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from ddpm_hf import distributed
from ddpm_hf.distributed import Agreement

fork = multiprocessing.get_context("fork")


def in_two_processes(tmp_path, function):
    """Run `function(rank, agreement)` in two processes; their exit codes."""

    def join(rank):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=rank, world_size=2)
        function(rank, Agreement(2))

    processes = [fork.Process(target=join, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("slow", [0, 1])
def test_before_training_a_slow_machine_is_waited_for_and_later_it_is_not(tmp_path, monkeypatch, slow):
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=1))

    def download(rank, agreement):
        with agreement.together(patiently=True):
            time.sleep(3 * (rank == slow))
        reason = "another process of this run has ended, or can't be reached"
        with pytest.raises(ConnectionError, match=reason), agreement.together():
            time.sleep(3 * (rank == slow))

    assert in_two_processes(tmp_path, download) == [0, 0]


def test_an_error_of_one_process_is_raised_in_both(tmp_path):
    def open_file(rank, kind):
        if rank:
            raise kind("no such thing")

    def fail(rank, agreement):
        for kind in (ValueError, OSError):
            message = "^no such thing$" if rank else "^process 1 failed: no such thing$"
            with pytest.raises(kind, match=message), agreement.together():
                open_file(rank, kind)

    assert in_two_processes(tmp_path, fail) == [0, 0]


def test_what_the_processes_disagree_on_is_named_with_their_ranks(tmp_path):
    def compare(rank, agreement):
        agreement.check_same({"the number of images": 3}, "")
        with pytest.raises(
            ValueError, match=r"differ in the labels: \['a'\] in rank 0 \(.*\); None in rank 1 \(.*\). Look."
        ):
            agreement.check_same({"the number of images": 3, "the labels": None if rank else ["a"]}, "Look.")

    assert in_two_processes(tmp_path, compare) == [0, 0]
