"""The processes of `ddpm-hf train`: what Accelerate's launcher is told."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from .options import at_least, check_types, option


@dataclass
class LaunchOptions:
    """How many processes train, and where. Without any of them, as `accelerate launch` does without options."""

    _argument_group_name: ClassVar[str] = "processes, which Accelerate's launcher starts"

    num_processes: int | None = option(
        None,
        "Processes, on all machines together. Default: from `accelerate config`, else one per GPU.",
    )
    num_machines: int | None = option(None, "Machines. Run the same command on each, with its own --machine_rank.")
    machine_rank: int | None = option(None, "The rank of this machine, from 0.")
    main_process_ip: str | None = option(None, "The IP address of machine 0.")
    main_process_port: int | None = option(None, "A free port of machine 0. Default on a single machine: any.")
    accelerate_config: str | None = option(
        None,
        "A file written by `accelerate config`, e.g. for FSDP. Default: the one in its cache, if any.",
    )

    def __post_init__(self) -> None:
        check_types(self)
        at_least(1, self, "num_processes", "num_machines")
        at_least(0, self, "machine_rank", "main_process_port")
        machines = self.num_machines or 1
        if machines > 1:
            needed = ("machine_rank", "main_process_ip", "main_process_port", "num_processes")
            missing = [f"--{name}" for name in needed if getattr(self, name) is None]
            if missing:
                raise ValueError(f"`num_machines` is {machines}, which needs {', '.join(missing)} too.")
        if (self.num_processes or machines) % machines:
            raise ValueError(
                f"`num_processes` is {self.num_processes}, but must be a multiple of `num_machines`, {machines}."
            )
        if (self.machine_rank or 0) >= machines:
            raise ValueError(
                f"`machine_rank` is {self.machine_rank}, but must be less than `num_machines`, {machines}."
            )
        if self.accelerate_config is not None and not Path(self.accelerate_config).is_file():
            raise ValueError(
                f"`accelerate_config` is {self.accelerate_config!r}, but no such file exists: write it with "
                f"`accelerate config --config_file {self.accelerate_config}`."
            )

    def given(self) -> list[str]:
        """The flags that were given."""
        return [f"--{f.name}" for f in fields(self) if getattr(self, f.name) is not None]
