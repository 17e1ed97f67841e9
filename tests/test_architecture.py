"""The map of the package: which folder imports which, which file within a folder, and what public things document."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest

import ddpm_hf

SOURCE = Path(ddpm_hf.__file__).parent

# From the bottom up: a folder imports only folders that stand above it in this table.
FOLDERS = {
    "distributed": set(),
    "progress": set(),
    "console": set(),
    "page": set(),
    "config": set(),
    "diffusion": set(),
    "storage": {"diffusion"},
    "data": {"config", "progress", "storage"},
    "sampling": {"data", "diffusion", "distributed", "progress", "storage"},
    "evaluation.metrics": {"data", "diffusion", "distributed", "progress"},
    "evaluation": {
        "config", "data", "diffusion", "distributed", "evaluation.metrics", "progress", "sampling", "storage",
    },
    "codec": {"data", "diffusion", "evaluation", "page", "progress", "sampling", "storage"},
    "restoration": {"config", "data", "diffusion", "progress", "sampling", "storage"},
    "sharing": {"diffusion", "evaluation", "progress", "storage"},
    "sharing.conversion": {"config", "diffusion", "sharing", "storage"},
    "export": {"diffusion", "sampling", "storage"},
    "doctor": {"config", "data", "diffusion", "evaluation", "progress", "sampling", "storage"},
    "demo": {"data", "diffusion", "export", "restoration", "sharing", "storage"},
    "training": {
        "config", "console", "data", "diffusion", "distributed", "evaluation", "evaluation.metrics", "page", "progress",
        "sampling", "sharing", "storage",
    },
    "paper": {
        "config", "data", "diffusion", "evaluation", "evaluation.metrics", "page", "progress", "restoration",
        "sampling", "storage", "training",
    },
    "recipe": {"config", "console", "data", "diffusion", "distributed", "storage", "training"},
    "commands": {
        "codec", "config", "data", "demo", "diffusion", "doctor", "evaluation", "export", "paper", "recipe",
        "restoration", "sampling", "sharing", "sharing.conversion", "storage", "training",
    },
    "cli": {"commands", "config", "console"},
}  # fmt: skip

# Within a folder. A file that is not named here imports none of its neighbours.
FILES = {
    "codec.compress": {
        "arithmetic", "container", "header", "lossless", "measuring", "opening", "pictures", "report", "stack",
    },
    "codec.decompress": {
        "arithmetic", "compress", "container", "header", "lossless", "opening", "pictures", "stack", "lossy",
    },
    "codec.lossy": {
        "arithmetic", "channel", "compress", "container", "formats", "header", "measuring", "packets", "pictures",
        "progressive",
    },
    "codec.lossy_report": {"formats", "lossy", "measuring"},
    "codec.progressive": {"channel"},
    "codec.header": {"arithmetic", "levels", "lossless"},
    "codec.lossless": {"arithmetic", "levels", "stack"},
    "codec.report": {"levels", "lossless", "stack"},
    "codec.stack": {"levels"},
    "commands.calibrate": {"model"},
    "commands.codec": {"model"},
    "commands.doctor": {"model"},
    "commands.evaluate": {"model"},
    "commands.restore": {"model"},
    "commands.paper": {"model"},
    "commands.sample": {"model"},
    "commands.demo": {"model"},
    "commands.push": {"demo"},
    "demo.app": {"live"},
    "demo.space": {"static_page"},
    "demo.static_page": {"onnxruntime_web"},
    "export.export": {"sampler_table"},
    "restoration.operators": {"linear_maps"},
    "restoration.methods": {"linear_maps"},
    "restoration.restore": {"linear_maps", "methods", "operators", "tiles"},
    "restoration.edit": {"operators", "restore"},
    "restoration.folder": {"edit", "operators", "photos", "restore", "tasks", "tiles"},
    "restoration.strip": {"edit", "photos"},
    "restoration.tasks": {"operators", "photos", "tiles"},
    "config.codec": {"options"},
    "config.commands": {"options"},
    "config.launch": {"options"},
    "config.parsing": {"launch", "training"},
    "config.restoration": {"options"},
    "config.training": {"options"},
    "data.cache_folder": {"cache"},
    "data.cache": {"decoding", "sources", "transform"},
    "data.dataset": {"cache", "decoding", "sources", "transform"},
    "data.decoding": {"sources", "transform"},
    "diffusion.ddpm_few_steps": {"ddpm_process"},
    "diffusion.pipeline": {
        "ddpm_fast_network", "ddpm_few_steps", "ddpm_labels", "ddpm_process", "ddpm_repository",
        "scheduling_ddpm_custom",
    },
    "diffusion.scheduling_ddpm_custom": {"ddpm_few_steps", "ddpm_process"},
    "doctor.behaviour": {"finding", "readings", "scheduler", "training"},
    "doctor.examine": {"behaviour", "files", "finding", "readings", "scheduler", "training", "weights"},
    "doctor.files": {"finding"},
    "doctor.repair": {"finding"},
    "doctor.report": {"examine", "finding"},
    "doctor.scheduler": {"finding"},
    "doctor.layers": {"finding", "readings"},
    "doctor.classes": {"finding", "readings"},
    "doctor.training": {"classes", "finding", "layers", "readings", "scheduler"},
    "doctor.weights": {"finding"},
    "evaluation.calibration": {"predictions"},
    "evaluation.evaluate": {"phases", "real_images", "results"},
    "evaluation.likelihood": {"predictions"},
    "evaluation.likelihood_report": {"likelihood", "plots", "predictions"},
    "evaluation.metrics.features": {"inception"},
    "evaluation.metrics.measure": {"distances", "features", "measurement", "reference_statistics"},
    "evaluation.metrics.reference_statistics": {"distances", "features"},
    "evaluation.phases": {"likelihood_report", "plots", "predictions", "real_images", "results"},
    "evaluation.plots": {"likelihood"},
    "paper.ablation": {"figure", "job"},
    "paper.figure": {"job"},
    "paper.flow": {"canvas", "figure", "job"},
    "paper.embedding": {"canvas", "figure", "job"},
    "paper.forward": {"canvas", "figure", "job"},
    "paper.interpolation": {"canvas", "figure", "job"},
    "paper.network": {"canvas", "figure", "job"},
    "paper.neighbours": {"figure", "job"},
    "paper.posterior": {"canvas", "figure", "job"},
    "paper.progressive": {"canvas", "figure", "job"},
    "paper.quality": {"canvas", "figure", "job"},
    "paper.rate_distortion": {"figure", "job"},
    "paper.samples": {"canvas", "figure", "job"},
    "paper.schedule": {"canvas", "figure", "job"},
    "paper.scores": {"figure", "job"},
    "paper.shared": {"canvas", "figure", "job"},
    "paper.report": {
        "ablation", "embedding", "flow", "forward", "interpolation", "network", "neighbours", "posterior", "figure",
        "job", "progressive", "quality", "rate_distortion", "samples", "schedule", "scores", "shared", "page",
    },
    "recipe.command": {"images", "machine", "plan", "rules"},
    "recipe.plan": {"images", "rules"},
    "recipe.rules": {"images"},
    "sampling.fast": {"onnx_network"},
    "sampling.files": {"generate"},
    "sampling.generate": {"philox"},
    "sampling.folder": {"files", "generate"},
    "sharing.background_push": {"card", "hub", "push"},
    "sharing.card": {"card_merge"},
    "sharing.conversion.convert": {"improved_diffusion", "original_network", "pytorch_diffusion"},
    "sharing.conversion.improved_diffusion": {"original_network"},
    "sharing.conversion.pytorch_diffusion": {"original_network"},
    "sharing.push": {"card", "card_merge", "hub"},
    "storage.checkpoint": {"files", "weights"},
    "storage.loading": {"checkpoint", "files"},
    "training.batch_size": {"losses", "network"},
    "training.averages": {"network"},
    "training.choosing": {"averages", "losses", "network", "state", "validation_set"},
    "training.deadline": {"averages", "plan"},
    "training.environment": {"performance"},
    "training.loop": {
        "averages", "batch_size", "choosing", "copies", "deadline", "interruption", "log", "network", "output_folder",
        "plan", "plots", "previews", "publishing", "report", "saving", "setup", "state", "step", "validation",
        "validation_set",
    },
    "training.performance": {"network"},
    "training.previews": {"network", "state"},
    "training.publishing": {"network", "state"},
    "training.report": {
        "copies", "interruption", "log", "losses", "output_folder", "report_page", "report_pictures", "report_words",
        "state", "trouble",
    },
    "training.report_pictures": {"copies"},
    "training.report_words": {"output_folder", "state"},
    "training.saving": {"log", "output_folder", "state"},
    "training.report_page": {"charts", "trouble"},
    "training.setup": {
        "batch_size", "deadline", "log", "network", "output_folder", "performance", "plan", "publishing", "state",
        "validation_set",
    },
    "training.state": {"averages", "deadline", "network", "plan"},
    "training.step": {"averages", "log", "losses", "network", "state"},
    "training.validation": {"copies", "log", "network", "output_folder", "plan", "plots", "state", "validation_set"},
}  # fmt: skip
COPIED = {
    "ddpm_process": {"numpy", "torch"},
    "ddpm_few_steps": {"torch"},
    "ddpm_fast_network": {"torch", "diffusers"},
    "ddpm_labels": {"torch"},
    "scheduling_ddpm_custom": {"numpy", "torch", "diffusers"},
    "ddpm_repository": {"huggingface_hub"},
    "pipeline": {"numpy", "torch", "diffusers", "PIL"},
}
MODULES = sorted(
    ".".join(file.relative_to(SOURCE).with_suffix("").parts)
    for file in SOURCE.rglob("*.py")
    if file.name not in ("__init__.py", "__main__.py")
)


def parse(module):
    return ast.parse((SOURCE / f"{module.replace('.', '/')}.py").read_text("utf-8"))


def folder_of(module):
    """The folder of a module; the few files at the top stand for themselves."""
    return module.rpartition(".")[0] or module


def imports(module):
    """The modules of ours, and the packages, that a module imports anywhere."""
    ours, packages = set(), set()
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = module.split(".")[: -node.level]
            names = [node.module] if node.module else [a.name for a in node.names if a.name != "__version__"]
            ours.update(".".join([*base, name]) for name in names)
        elif isinstance(node, ast.ImportFrom):
            packages.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            packages.update(alias.name.split(".")[0] for alias in node.names)
    return ours, packages


def test_every_folder_is_in_the_picture_and_arrows_go_one_way():
    assert {folder_of(module) for module in MODULES} == set(FOLDERS)
    for i, (folder, below) in enumerate(FOLDERS.items()):
        assert below <= set(list(FOLDERS)[:i]), folder


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_arrows(module):
    ours, packages = imports(module)
    folder = folder_of(module)
    assert {folder_of(other) for other in ours} - {folder} <= FOLDERS[folder]
    assert {other.rpartition(".")[2] for other in ours if folder_of(other) == folder} <= FILES.get(module, set())
    assert not packages & {"training", "tests", "ddpm_hf"}


def test_files_within_a_folder_do_not_import_each_other_in_a_circle():
    from graphlib import TopologicalSorter

    arrows = {m: {f"{folder_of(m)}.{other}" for other in others} for m, others in FILES.items()}
    assert set(arrows) <= set(MODULES)
    assert set(TopologicalSorter(arrows).static_order()) <= set(MODULES)


@pytest.mark.parametrize("module", COPIED)
def test_copied_files_need_only_what_a_diffusers_user_has(module):
    _, packages = imports(f"diffusion.{module}")
    assert packages - set(sys.stdlib_module_names) <= COPIED[module]


@pytest.mark.parametrize("module", MODULES)
def test_progress_is_shown_by_one_module_alone(module):
    """Else bars fill logs, and ignore TQDM_DISABLE."""
    assert module == "progress" or "tqdm" not in imports(module)[1]


def test_the_folder_of_the_pipeline_is_no_pipeline_of_diffusers():
    """Else diffusers looks for `DDPMPipelineCustom` in itself when it loads a saved pipeline."""
    assert not hasattr(diffusers.pipelines, "diffusion")


@pytest.mark.parametrize("module", MODULES)
def test_public_things_have_docstrings(module):
    tree = parse(module)
    assert ast.get_docstring(tree)
    public = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]
    methods = [m for c in public if isinstance(c, ast.ClassDef) for m in c.body if isinstance(m, ast.FunctionDef)]
    for node in public + [m for m in methods if not m.name.startswith("_")]:
        assert ast.get_docstring(node), f"{module}.{node.name}"


def test_the_reading_order_of_training_names_every_file_and_goes_downwards():
    table = [line for line in (SOURCE / "training" / "README.md").read_text("utf-8").splitlines() if line[:1] == "|"]
    names = re.findall(r"`(\w+)\.py`", "\n".join(table))
    assert {f"training.{name}" for name in names if name != "__main__"} == {
        m for m in MODULES if folder_of(m) == "training"
    }
    for i, name in enumerate(names):
        assert FILES.get(f"training.{name}", set()) <= set(names[i + 1 :]), name


def test_long_files_say_why():
    """Above 500 lines, the first paragraph of a file gives the reason."""
    for module in MODULES:
        text = (SOURCE / f"{module.replace('.', '/')}.py").read_text("utf-8")
        if text.count("\n") > 500:
            assert "one file" in ast.get_docstring(ast.parse(text)).lower(), module


def test_public_names_are_found_and_importing_the_package_imports_no_torch():
    for name in ddpm_hf.__all__:
        assert getattr(ddpm_hf, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = ddpm_hf.nonsense
    heavy = "import sys, ddpm_hf; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
