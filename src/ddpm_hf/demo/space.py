"""A demo as a Space of the Hub: what it holds, and its push in one commit.

A Space with an app runs code of its own repository only: the files of this package that the app imports are copied into
it. The model is loaded from the Hub at the commit of the day, or lies in the Space. No code of a model is run.
"""

from __future__ import annotations

import ast
import shutil
import sys
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, SpaceCard, SpaceCardData

from ..sharing.hub import DEFAULT_RETRY, HubTarget, Retry, readable_errors
from ..sharing.push import export_model, files_of
from .static_page import HEADERS

PACKAGE = "ddpm_hf"
SOURCE = Path(__file__).parent.parent  # of the package
APP = "demo.app"
# What demos write into a Space: the rest of it is left as it is.
OURS = ("app.py", "requirements.txt", "index.html", "page.js", "worker.js", "sampler.js", "style.css")
OUR_FOLDERS = (f"{PACKAGE}/", "model/", "onnxruntime/")
SDK_KEYS = {"sdk", "sdk_version", "app_file", "python_version", "custom_headers"}  # others may be edited on the Hub


def stage_app(stage: Path, title: str, model: str, revision: str | None) -> None:
    """Write the files of a Space with the app into a folder.

    Args:
        model: a folder, which is exported into the Space, or the name of a model on the Hub.
        revision: of the model on the Hub, a commit.

    Raises:
        ValueError: for a damaged model.
    """
    modules, packages = _imports_of(APP)
    for module in modules:
        file = Path(*module.split(".")).with_suffix(".py")
        for name in (file, *(folder / "__init__.py" for folder in file.parents)):
            (stage / PACKAGE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(SOURCE / name, stage / PACKAGE / name)
    (stage / "requirements.txt").write_text("".join(f"{line}\n" for line in _pinned(packages)), "utf-8")
    if Path(model).is_dir():
        (stage / "model").mkdir()
        export_model(Path(model), stage / "model")
        place = "model"
    else:
        place = model
    (stage / "app.py").write_text(
        f'"""Written by `ddpm-hf demo --push`."""\n\nfrom {PACKAGE}.{APP} import launch_model\n\n'
        f"launch_model({place!r}, {revision!r}, {title!r})\n",
        "utf-8",
    )


def space_card(sdk: str, title: str, model: str, existing: str | None = None) -> str:
    """The README.md of a Space. What was edited on the Hub stays, but for the keys that say how it is run.

    Args:
        sdk: "gradio" or "static".
        model: a folder, or the name of a model on the Hub, which the Space then links to.
        existing: the README.md that is there.
    """
    how: dict[str, Any] = {"sdk": sdk, "app_file": "index.html", "custom_headers": HEADERS}
    if sdk == "gradio":
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        how = {"sdk": sdk, "sdk_version": version("gradio"), "app_file": "app.py", "python_version": python}
        how["suggested_hardware"] = "cpu-basic"
    about = {"title": title, "emoji": "🎲", "colorFrom": "indigo", "colorTo": "gray", "tags": ["ddpm-hf"]}
    if not Path(model).is_dir():
        about["models"] = [model]
    text = f"# {title}\n\nA diffusion model to try, made with `ddpm-hf demo`.\n"
    if existing is not None:
        card = SpaceCard(existing, ignore_metadata_errors=True)
        kept = {k: v for k, v in card.data.to_dict().items() if k not in SDK_KEYS}
        # The Hub writes a title, an emoji and colors of its own into a Space that it creates.
        about, text = {**about, **kept, **({"models": about["models"]} if "models" in about else {})}, card.text or text
    return f"---\n{SpaceCardData(**{**about, **how}).to_yaml()}\n---\n\n{text.lstrip()}"


def push_space(stage: Path, target: HubTarget, title: str, model: str, retry: Retry = DEFAULT_RETRY) -> str:
    """Push the files of a folder into an existing Space, in one commit; returns the Space's URL.

    Raises:
        ValueError, PushError: as a push of a model does.
    """
    api = target.api()
    with readable_errors(target):
        retry(lambda: _commit(api, stage, target, title, model), "Pushing")
    return f"{api.endpoint}/spaces/{target.repo_id}"


def _commit(api: HfApi, stage: Path, target: HubTarget, title: str, model: str) -> None:
    """One attempt: commit what differs from the Space. A second attempt makes no second commit."""
    head = api.space_info(target.repo_id)
    remote = {sibling.rfilename for sibling in head.siblings or []}
    existing = None
    if "README.md" in remote:
        readme = api.hf_hub_download(
            target.repo_id, "README.md", repo_type="space", revision=head.sha, local_dir=stage.parent / "remote"
        )
        existing = Path(readme).read_text("utf-8")
    (stage / "README.md").write_text(space_card(str(target.space_sdk), title, model, existing), "utf-8")
    staged = files_of(stage)
    stale = {name for name in remote - set(staged) if name in OURS or name.startswith(OUR_FOLDERS)}
    api.create_commit(
        target.repo_id,
        [CommitOperationAdd(name, str(file)) for name, file in staged.items()]
        + [CommitOperationDelete(name) for name in sorted(stale)],
        commit_message=f"Demo of {title}",
        repo_type="space",
        parent_commit=head.sha,
    )


def _imports_of(start: str) -> tuple[set[str], set[str]]:
    """The modules of this package that a module needs, itself included, and the packages that they import."""
    modules, packages, waiting = set(), set(), [start]
    while waiting:
        module = waiting.pop()
        if module in modules:
            continue
        modules.add(module)
        source = (SOURCE / Path(*module.split(".")).with_suffix(".py")).read_text("utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = module.split(".")[: -node.level]
                names = [node.module] if node.module else [alias.name for alias in node.names]
                waiting += [".".join([*base, str(name)]) for name in names if not str(name).startswith("__")]
            elif isinstance(node, ast.ImportFrom):
                packages.add(str(node.module).split(".")[0])
            elif isinstance(node, ast.Import):
                packages.update(alias.name.split(".")[0] for alias in node.names)
    return modules, packages - set(sys.stdlib_module_names)


def _pinned(packages: set[str]) -> list[str]:
    """Lines of requirements.txt: the versions that are installed here. Gradio's is the Space's own."""
    distributions = packages_distributions()
    names = {distributions[p][0] for p in packages if p != "gradio" and find_spec(p) and p in distributions}
    return sorted(f"{name}=={version(name).partition('+')[0]}" for name in names)
