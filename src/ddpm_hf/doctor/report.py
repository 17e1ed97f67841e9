"""A diagnosis as text."""

from __future__ import annotations

from .examine import Diagnosis
from .finding import Finding


def describe(model: str, diagnosis: Diagnosis, fix_command: str) -> str:
    """All findings, faults first, each with evidence, consequence and remedy."""
    faults = diagnosis.faults
    notes = [finding for finding in diagnosis.findings if finding.severity == "note"]
    parts = [_describe(finding, fix_command) for finding in (*faults, *notes)]
    counts = " and ".join(
        f"{len(found)} {name}{'' if len(found) == 1 else 's'}"
        for name, found in (("fault", faults), ("note", notes))
        if found or name == "fault"
    )
    return "\n\n".join([*parts, *([diagnosis.table] if diagnosis.table else []), f"{model}: {counts}."])


def _describe(finding: Finding, fix_command: str) -> str:
    remedy = finding.remedy.replace("{fix}", fix_command)
    return (
        f"{finding.severity.upper()} ({finding.name}): {finding.what}\n"
        f"  evidence     {finding.evidence}\n"
        f"  consequence  {finding.consequence}\n"
        f"  remedy       {remedy}"
    )
