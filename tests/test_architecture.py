"""The picture of the README: which module may import which, and what every public thing documents."""

import ast
import re
from pathlib import Path

import pytest

import ddpm_hf

SOURCE = Path(ddpm_hf.__file__).parent

ARROWS = {
    "ddpm_process": set(),
    "ddpm_few_steps": {"ddpm_process"},
    "scheduling_ddpm_custom": {"ddpm_few_steps", "ddpm_process"},
    "ddpm_fast_network": set(),
    "pipeline": {"ddpm_fast_network", "ddpm_few_steps", "ddpm_process", "scheduling_ddpm_custom"},
    "probing": {"ddpm_process", "pipeline", "scheduling_ddpm_custom"},
    "calibration": {
        "checkpoint", "ddpm_few_steps", "ddpm_process", "pipeline", "probing", "run_folder", "scheduling_ddpm_custom",
    },
    "likelihood": {"ddpm_process", "pipeline", "probing", "scheduling_ddpm_custom"},
    "objectives": {"ddpm_process"},
    "feature_distance": set(),
    "inception": set(),
    "extractors": {"inception"},
    "reference_statistics": {"extractors", "feature_distance"},
    "metrics": {"extractors", "feature_distance", "reference_statistics"},
    "images": {"config"},
    "sources": {"config"},
    "decoding": {"images", "sources"},
    "image_cache": {"decoding", "images", "sources"},
    "data": {"config", "decoding", "image_cache", "images", "sources"},
    "options": set(),
    "config": {"options"},
    "command_config": {"options"},
    "batch_size": set(),
    "pictures": set(),
    "checkpoint": {"pipeline"},
    "run_folder": {"checkpoint", "config", "pipeline"},
    "loading": {"checkpoint", "pipeline"},
    "sampling": {"ddpm_process", "pipeline"},
    "sample_files": {"pictures", "run_folder", "sampling"},
    "sample_folder": {"pictures", "pipeline", "run_folder", "sample_files", "sampling"},
    "plan": {"config"},
    "patch_features": {"ddpm_process"},
    "held_out": {"config", "data", "decoding", "sources"},
    "validation": {
        "checkpoint", "data", "feature_distance", "held_out", "likelihood", "network", "patch_features", "pictures",
        "pipeline", "plan", "run_folder", "run_state", "scheduling_ddpm_custom", "training_log",
    },
    "network": {"config"},
    "interruption": set(),
    "execution": {"config", "ddpm_fast_network", "network"},
    "run_state": {"checkpoint", "config", "interruption", "network", "plan", "scheduling_ddpm_custom"},
    "training_log": {"config"},
    "previews": {"network", "pictures", "pipeline", "run_state", "scheduling_ddpm_custom"},
    "publishing": {
        "background_push", "calibration", "card", "config", "data", "hub", "network", "pipeline", "run_state",
        "scheduling_ddpm_custom", "sharing", "sources",
    },
    "preparation": {
        "checkpoint", "config", "execution", "held_out", "hub", "interruption", "network", "pictures", "plan",
        "publishing", "run_folder", "run_state", "scheduling_ddpm_custom", "sources", "training_log",
    },
    "training": {
        "checkpoint", "config", "data", "ddpm_process", "held_out", "interruption", "network", "objectives", "pictures",
        "pipeline", "preparation", "previews", "publishing", "run_folder", "run_state", "training_log", "validation",
    },
    "card_merge": set(),
    "stored_weights": {"pipeline", "sampling"},
    "card": {"calibration", "card_merge", "ddpm_process", "run_folder", "scheduling_ddpm_custom", "stored_weights"},
    "evaluation": {
        "card", "checkpoint", "command_config", "evaluation_phases", "extractors", "metrics", "metrics_file",
        "pictures", "pipeline", "real_images", "run_folder", "sampling", "scheduling_ddpm_custom",
        "stored_weights",
    },
    "evaluation_phases": {
        "command_config", "evaluation_plots", "extractors", "likelihood_figures", "metrics", "metrics_file", "nearest",
        "pipeline", "probing", "real_images", "reference_statistics", "sample_folder", "sampling",
    },
    "evaluation_plots": {"likelihood", "pictures"},
    "likelihood_figures": {"evaluation_plots", "likelihood", "pipeline", "probing", "run_folder"},
    "metrics_file": {"run_folder"},
    "nearest": {"probing"},
    "real_images": {"command_config", "config", "data", "images", "sources"},
    "hub": set(),
    "sharing": {"card", "card_merge", "hub", "loading", "pipeline", "stored_weights"},
    "background_push": {"card", "hub", "sharing"},
    "source_network": set(),
    "source_ho": {"source_network"},
    "source_improved": {"source_network"},
    "convert": {
        "card", "command_config", "loading", "pipeline", "run_folder", "scheduling_ddpm_custom", "source_ho",
        "source_improved", "source_network",
    },
    "commands": {
        "batch_size", "calibration", "card", "command_config", "convert", "data", "evaluation", "hub", "loading",
        "pipeline", "real_images", "run_folder", "sample_files", "sample_folder", "sampling", "sharing",
    },
    "cli": {"command_config", "commands", "options"},
    "__init__": {"card", "ddpm_process", "pipeline", "scheduling_ddpm_custom"},
}  # fmt: skip
COPIED = {"ddpm_process": {"numpy", "torch"}, "scheduling_ddpm_custom": {"numpy", "torch", "diffusers"}}
COPIED["ddpm_few_steps"] = {"torch"}
COPIED["ddpm_fast_network"] = {"torch", "diffusers"}
COPIED["pipeline"] = {*COPIED["scheduling_ddpm_custom"], "PIL", "huggingface_hub"}


def imports(module):
    """Names of our modules, and of the packages, that a module imports anywhere."""
    ours, packages = set(), set()
    for node in ast.walk(ast.parse((SOURCE / f"{module}.py").read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level <= 1
            (ours if node.level else packages).add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            packages.update(alias.name.split(".")[0] for alias in node.names)
    return ours, packages


def test_every_module_is_in_the_picture():
    assert {p.stem for p in SOURCE.glob("*.py")} == set(ARROWS)


@pytest.mark.parametrize("module", ARROWS)
def test_imports_follow_the_arrows(module):
    ours, packages = imports(module)
    assert ours <= ARROWS[module]
    assert not packages & {"training", "tests", "ddpm_hf"}


def test_imports_go_down_the_table_of_the_readme():
    text = (Path(__file__).parents[1] / "README.md").read_text("utf-8").split("## How it is built")[1]
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    row = {module: i for i, cell in enumerate(cells) for module in re.findall(r"`(\w+)`", cell)}
    assert set(ARROWS) - {"__init__"} <= set(row)
    upwards = [
        (module, other)
        for module in row
        if module in ARROWS
        for other in imports(module)[0]
        if row[other] < row[module]
    ]
    assert upwards == []


@pytest.mark.parametrize("module", COPIED)
def test_copied_files_need_only_what_a_diffusers_user_has(module):
    import sys

    _, packages = imports(module)
    assert packages - set(sys.stdlib_module_names) <= COPIED[module]


@pytest.mark.parametrize("module", ARROWS)
def test_public_things_have_docstrings(module):
    tree = ast.parse((SOURCE / f"{module}.py").read_text("utf-8"))
    assert ast.get_docstring(tree)
    public = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]
    methods = [m for c in public if isinstance(c, ast.ClassDef) for m in c.body if isinstance(m, ast.FunctionDef)]
    for node in public + [m for m in methods if not m.name.startswith("_")]:
        assert ast.get_docstring(node), f"{module}.{node.name}"
