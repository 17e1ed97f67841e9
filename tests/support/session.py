"""Commands of `ddpm-hf` in one process, one after the other, as a person types them: imports are paid for once.

    python session.py '[["train", …], ["sample", …]]'

Prints a JSON list of [status, stdout, stderr].
"""

import json
import sys

from ddpm_hf.cli import main
from support.runs import run_here

if __name__ == "__main__":
    done = [run_here(main, command) for command in json.loads(sys.argv[1])]
    print(json.dumps([[each.returncode, each.stdout, each.stderr] for each in done]))
