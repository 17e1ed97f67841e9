"""`ddpm-hf doctor`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from ..config.commands import DoctorConfig
from .model import choose_device


def doctor(model: str, config: DoctorConfig) -> None:
    """Print what is wrong with a model, and write a repaired copy with --fix. Faults end with status 1."""
    from ..doctor.examine import examine
    from ..doctor.repair import check_output, write_repaired
    from ..doctor.report import describe

    if config.fix is not None:
        check_output(Path(config.fix))
    diagnosis = examine(model, config, choose_device(config.device))
    print(describe(model, diagnosis, _command(model, config)))
    if config.fix is not None and diagnosis.pipeline is not None and diagnosis.findings:
        repaired = write_repaired(diagnosis.pipeline, diagnosis.findings, Path(config.fix))
        print(f"The copy in {config.fix}/ repairs {', '.join(finding.name for finding in repaired) or 'nothing'}.")
        remaining = [finding.name for finding in diagnosis.faults if finding not in repaired]
        if remaining:
            print(f"No copy can repair: {', '.join(remaining)}.")
    if diagnosis.faults:
        sys.exit(1)


def _command(model: str, config: DoctorConfig) -> str:
    """The command that writes a repaired copy."""
    words = ["ddpm-hf", "doctor", model]
    for name in ("dataset_name", "train_data_dir", "label_column", "checkpoint", "revision"):
        value = getattr(config, name)
        if value is not None:
            words += [f"--{name}", value]
    words += ["--center_crop"] if config.center_crop else []
    return shlex.join([*words, "--fix", f"{Path(model).absolute().name}-repaired"])
