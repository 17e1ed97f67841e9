"""Start a run, end it at a random moment, resume it, again and again; then let it finish. Run by test_resume.

Forked from one process that has imported everything, so that a start costs little and signals hit training itself.

    python many_kills.py OPTIONS.json NUMBER_OF_SIGNALS SEED
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


def run(options) -> int:
    try:
        train(TrainConfig(**options, resume_from_checkpoint="latest"))
    except Interrupted as interrupted:
        return 128 + interrupted.signum
    return 0


def main() -> None:
    options, signals, seed = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(seed)
    for i in range(signals + 1):
        child = os.fork()
        if child == 0:
            os._exit(run(options))
        if i < signals:
            time.sleep(rng.uniform(0.2, 2.5))
            os.kill(child, rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print("exit", status, flush=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
