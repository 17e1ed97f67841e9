"""FSDP2 on CPUs through Accelerate: `accelerate launch --config_file fsdp.yaml fsdp_on_cpu.py SCRIPT OPTIONS …`.

Accelerate lets every kind of process be FSDP but those on CPUs, which gloo serves as well: its list of kinds lacks
MULTI_CPU. This adds it, in this process alone.
"""

import inspect
import runpy
import sys
import textwrap

from accelerate import state


def allow_fsdp_on_cpu():
    source = textwrap.dedent(inspect.getsource(state.AcceleratorState.__init__))
    kinds = "elif self.distributed_type in [\n"
    assert source.count(kinds) == 1
    exec(source.replace(kinds, f"{kinds}DistributedType.MULTI_CPU,\n"), vars(state))
    state.AcceleratorState.__init__ = vars(state).pop("__init__")


if __name__ == "__main__":
    allow_fsdp_on_cpu()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
