"""Pushing a model to the Hub: a complete export first, then one atomic commit.

huggingface_hub does the transfers. Added here is what it lacks: retries of the requests that it does not retry, no
second commit or pull request where only an answer was lost, and a card that keeps what was edited on the Hub.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from ..diffusion.ddpm_repository import EVALUATION_FILES, REAL_IMAGES, SHARED_FILES
from ..evaluation.results import evaluation_files
from ..storage.files import full_disk_explained, read_json
from ..storage.loading import load_pipeline, stored_dtype
from ..storage.weights import hash_weight_files, hash_weights, size_of
from .card import CardFacts, combine_facts, known_facts, write_card
from .card_merge import merge_cards, parse_card
from .hub import DEFAULT_RETRY, HubTarget, Log, PushError, Retry, check_push_access, explain, readable_errors

ONNX_FILES = ("onnx/model.onnx", "onnx/sampler.json")
EXTRAS = ("README.md", "samples.png", "loss.png", *EVALUATION_FILES)
STAGE = ".ddpm-hf-push-"


def push_folder(
    folder: Path,
    target: HubTarget,
    facts: CardFacts | None = None,
    *,
    message: str = "Upload DDPM",
    retry: Retry = DEFAULT_RETRY,
) -> str:
    """Push the model of a folder: a pipeline, a training folder, or a checkpoint of ours or of diffusers' script.

    The model is loaded and exported again, so that the upload is complete, in safetensors, with its code and card, and
    without training state, logs or local paths.

    Returns:
        The URL of the commit or of the pull request.

    Raises:
        ValueError: for a damaged model, a bad token or name. Nothing is uploaded then.
        PushError: where the Hub can't be reached or refuses.
    """
    with _export(folder, target, facts) as stage:
        with readable_errors(target):  # before a repository is created for a card that the Hub rejects
            retry(ModelCard.load(stage / "README.md").validate, "Checking the card")
        target = replace(target, repo_id=check_push_access(target, retry))
        return push_export(stage, target, facts, message, retry)


def try_push(folder: Path, target: HubTarget, facts: CardFacts | None = None, *, log: Log = print) -> bool:
    """`push_folder` for the end of a training run: a failure is logged, with the command to try again."""
    try:
        url = push_folder(folder, target, facts, retry=Retry(log))
    except Exception as error:
        log(failure_text(error, folder, target))
        return False
    log(f"Pushed to {url}")
    return True


def resume_command(folder: Path, target: HubTarget) -> str:
    """The command that pushes a folder, without the token."""
    flags = ("private", "create_pr", "share_training_images", "with_onnx")
    options = [f"--{name}" for name in flags if getattr(target, name)]
    for name in ("revision", "tag"):
        options += [f"--{name}", getattr(target, name)] if getattr(target, name) else []
    return shlex.join(["ddpm-hf", "push", str(folder), target.repo_id, *options])


def upload_plan(folder: Path, target: HubTarget, facts: CardFacts | None = None) -> list[str]:
    """What `push_folder` would upload, a line per file with its size. Nothing is sent.

    Raises:
        ValueError: for a damaged model.
    """
    with _export(folder, target, facts) as stage:
        return [f"{file.stat().st_size:>12,}  {name}" for name, file in files_of(stage).items()]


@contextmanager
def _export(folder: Path, target: HubTarget, facts: CardFacts | None) -> Iterator[Path]:
    """A temporary folder with what is to be pushed."""
    with tempfile.TemporaryDirectory(prefix=STAGE) as name:
        stage = Path(name)
        export_model(folder, stage, target.share_training_images)
        if target.with_onnx:
            _copy_onnx(folder, stage)
        write_card(stage, facts)
        yield stage


def export_model(folder: Path, destination: Path, with_real_images: bool = False) -> None:
    """Write the model of `folder` as a new pipeline, with its card and pictures, in the precision of its weights.

    The files of an evaluation are included if it measured these weights; pictures that show training images only
    on request.

    Raises:
        ValueError: where there is no model, it is damaged, or a file of it is not what its name says.
    """
    if not folder.is_dir():
        raise ValueError(f"`model` is {str(folder)!r}, but there is no such folder.")
    _check_files(folder)
    pipeline = load_pipeline(str(folder), dtype=stored_dtype(folder))
    hidden = () if with_real_images else REAL_IMAGES
    for name in dict.fromkeys((*EXTRAS, *REAL_IMAGES)):
        if name not in hidden and (folder / name).is_file():
            shutil.copyfile(folder / name, destination / name)
    with full_disk_explained(destination, size_of(pipeline.unet.parameters())):
        pipeline.save_pretrained(destination)
    for name in set(EVALUATION_FILES).difference(evaluation_files(destination)):
        (destination / name).unlink(missing_ok=True)


def _copy_onnx(folder: Path, stage: Path) -> None:
    """Add the network in ONNX and its sampler to an export.

    Raises:
        ValueError: where there are none, or they were exported from other weights.
    """
    remedy = "run `ddpm-hf export` first, or leave out --with_onnx"
    if not all((folder / name).is_file() for name in ONNX_FILES):
        raise ValueError(f"`with_onnx` is set, but {str(folder / 'onnx')!r} has no export: {remedy}.")
    try:
        weights = read_json(folder / ONNX_FILES[1])["model"]["weights"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{str(folder / ONNX_FILES[1])!r} is damaged ({error}): {remedy}.") from error
    if weights != hash_weights(load_pipeline(str(stage)).unet):
        raise ValueError(f"the export in {str(folder / 'onnx')!r} is of other weights: {remedy}.")
    (stage / "onnx").mkdir()
    for name in ONNX_FILES:
        shutil.copyfile(folder / name, stage / name)


def _check_files(folder: Path) -> None:
    """Refuse a folder whose files lie elsewhere, or are not what their names say.

    Of links, only those within the folder and into the Hub's own cache are followed: that is how snapshots of the Hub
    look. Otherwise a cloned repository could publish any file of this machine.

    Raises:
        ValueError: names the file and the remedy.
    """
    roots = (folder.resolve(), Path(constants.HF_HUB_CACHE).resolve())
    for file in folder.rglob("*"):
        name = file.relative_to(folder).as_posix()
        if not (is_shared(name) or name in (*REAL_IMAGES, *ONNX_FILES) or name in ("unet", "scheduler", "onnx")):
            continue
        if not any(file.resolve().is_relative_to(root) for root in roots):
            raise ValueError(f"{str(file)!r} is a link to a file outside the model's folder: replace it by a copy.")
        try:
            if file.suffix == ".png":
                with Image.open(file, formats=["PNG"]) as image:
                    image.verify()
            elif file.suffix == ".json":
                read_json(file)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            kind = "PNG picture" if file.suffix == ".png" else "JSON file"
            raise ValueError(f"{str(file)!r} is not a valid {kind} ({error}): repair or remove it.") from error


def push_export(stage: Path, target: HubTarget, facts: CardFacts | None, message: str, retry: Retry) -> str:
    """Push a complete export into an existing repository. The card in `stage` is rewritten."""
    facts = combine_facts(facts or CardFacts(), CardFacts(repo_id=target.repo_id))
    api = target.api()
    with readable_errors(target):
        if target.revision and not target.revision.startswith("refs/"):
            revision = target.revision
            retry(lambda: api.create_branch(target.repo_id, branch=revision, exist_ok=True), "Creating the branch")
        if target.tag:
            retry(lambda: _check_tag(api, target), "Looking up the tags")
        url = retry(lambda: _commit(api, stage, target, facts, message), "Pushing")
        if target.tag:
            retry(lambda: _tag(api, target, url.rsplit("/", 1)[-1]), "Tagging")
    return url


def _commit(api: HfApi, stage: Path, target: HubTarget, facts: CardFacts, message: str) -> str:
    """One attempt: commit what differs from the repository. A second attempt makes no second commit."""
    repo_id, revision = target.repo_id, target.revision
    pull = None
    if target.create_pr:
        message = f"{message}, weights {hash_weight_files(stage)}"
        pull = _open_pull(api, repo_id, message)
        revision = f"refs/pr/{pull}" if pull else None
    head = api.model_info(repo_id, revision=revision)
    remote = {sibling.rfilename for sibling in head.siblings or []}
    other_weights = _update_card(api, stage, target, facts, head.sha if "README.md" in remote else None)

    allowed = (*(REAL_IMAGES if target.share_training_images else ()), *(ONNX_FILES if target.with_onnx else ()))
    files = {name: file for name, file in files_of(stage).items() if is_shared(name) or name in allowed}
    replaced = ("unet/diffusion_pytorch_model*", *((*EVALUATION_FILES, *ONNX_FILES) if other_weights else ()))
    stale = {n for n in remote - set(files) if any(fnmatch(n, pattern) for pattern in replaced)}  # of another model
    commit = api.create_commit(
        repo_id,
        [CommitOperationAdd(name, str(file)) for name, file in files.items()]
        + [CommitOperationDelete(name) for name in sorted(stale)],
        commit_message=message,
        revision=revision,
        create_pr=target.create_pr and pull is None,
        parent_commit=head.sha,
    )
    if pull is not None:
        return f"{api.endpoint}/{repo_id}/discussions/{pull}"
    return commit.pr_url or str(commit.commit_url)


def _update_card(api: HfApi, stage: Path, target: HubTarget, facts: CardFacts, head: str | None) -> bool:
    """Add to the card of the export what the Hub's card knows of the same weights, and what was edited there.

    Returns:
        Whether the card on the Hub describes other weights.
    """
    if head is None:
        write_card(stage, facts)
        return False
    with tempfile.TemporaryDirectory() as folder:
        file = api.hf_hub_download(target.repo_id, "README.md", revision=head, local_dir=folder)
        content = Path(file).read_bytes()
    try:
        remote = content.decode("utf-8-sig")
        card = parse_card(remote)
        edited = card.is_edited()
    except ValueError as error:
        raise ValueError(f"the card of {target.repo_id!r} on the Hub can't be read: {error}") from error
    local = stage / "README.md"
    weights = hash_weight_files(stage)
    here = known_facts(local.read_text("utf-8-sig"), weights) if local.is_file() else CardFacts()
    write_card(stage, combine_facts(combine_facts(known_facts(remote, weights), here), facts))
    if edited:
        local.write_text(merge_cards(remote, local.read_text("utf-8")), "utf-8")
    return card.record.get("weights", weights) != weights


def _open_pull(api: HfApi, repo_id: str, title: str) -> int | None:
    """The number of our open pull request of this title, if an earlier attempt has opened it."""
    try:
        pulls = api.get_repo_discussions(
            repo_id, author=api.whoami()["name"], discussion_type="pull_request", discussion_status="open"
        )
        return next((pull.num for pull in pulls if pull.title == title), None)
    except HfHubHTTPError as error:
        if error.response.status_code == 404:
            return None
        raise


def _check_tag(api: HfApi, target: HubTarget) -> None:
    """Refuse a tag that another commit has, before anything is uploaded."""
    head = api.model_info(target.repo_id, revision=target.revision).sha
    if _tagged_commit(api, target) not in (None, head):
        raise ValueError(f"`tag` is {target.tag!r}, but {target.repo_id!r} already has that tag: choose another one.")


def _tag(api: HfApi, target: HubTarget, commit: str) -> None:
    api.create_tag(target.repo_id, tag=str(target.tag), revision=commit, exist_ok=True)
    if _tagged_commit(api, target) != commit:
        raise ValueError(
            f"the model was pushed, but `tag` {target.tag!r} belongs to another commit: choose another one."
        )


def _tagged_commit(api: HfApi, target: HubTarget) -> str | None:
    return next((t.target_commit for t in api.list_repo_refs(target.repo_id).tags if t.name == target.tag), None)


def files_of(folder: Path) -> dict[str, Path]:
    """The files of a folder by their relative names."""
    return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}


def is_shared(name: str) -> bool:
    """Whether a file of this name, relative to a saved pipeline, goes to the Hub."""
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in SHARED_FILES)


def failure_text(error: Exception, folder: Path, target: HubTarget) -> str:
    """Why a push failed, and the command to try again."""
    text = str(error) if isinstance(error, (ValueError, PushError)) else explain(error, target)
    return f"Not pushed: {text}\nThe model is safe in {folder}. Push it with:\n  {resume_command(folder, target)}"
