"""Start a run, end it at a random moment, resume it, again and again; then let it finish. Run by test_resume.

Forked from one process that has imported everything, so that a start costs little and signals hit training itself.

    python many_kills.py OPTIONS.json CALM_FOLDER STORMY_FOLDER NUMBER_OF_SIGNALS SEED
"""

import json
import os
import random
import signal
import sys
import time

from ddpm_hf.config.training import TrainConfig
from ddpm_hf.training.interruption import Interrupted
from ddpm_hf.training.loop import train


def start(options, output_dir) -> int:
    """The run in a process of its own, whose number is returned."""
    child = os.fork()
    if child == 0:
        try:
            train(TrainConfig(**options, output_dir=output_dir, resume_from_checkpoint="latest"))
        except Interrupted as interrupted:
            os._exit(128 + interrupted.signum)
        os._exit(0)
    return child


def end(child) -> None:
    print("exit", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def main() -> None:
    options, calm, stormy = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
    signals, rng = int(sys.argv[4]), random.Random(int(sys.argv[5]))
    end(start(options, calm))
    for _ in range(signals):
        child = start(options, stormy)
        time.sleep(rng.uniform(0.2, 2.5))
        os.kill(child, rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        end(child)
    end(start(options, stormy))


if __name__ == "__main__":
    main()
