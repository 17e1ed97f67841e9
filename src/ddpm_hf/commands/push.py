"""`ddpm-hf push`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..config.commands import DemoConfig, PushConfig
from .demo import check_gradio, demo


def push(model: str, repo_id: str, config: PushConfig) -> str:
    """Push the model in a folder; returns the URL of the commit or pull request."""
    from ..sharing.card import CardFacts
    from ..sharing.hub import HubTarget, check_push_access
    from ..sharing.push import push_folder, resume_command, upload_plan

    target = HubTarget(
        repo_id,
        config.hub_token,
        config.private,
        config.revision,
        config.tag,
        create_pr=config.create_pr,
        share_training_images=config.share_training_images,
        with_onnx=config.with_onnx,
    )
    facts = CardFacts(license=config.license)
    if config.with_demo:
        check_gradio()
    if config.dry_run:
        print("\n".join([f"To {repo_id}, in one commit:", *upload_plan(Path(model), target, facts)]))
        return ""
    if config.with_demo:  # whether both may be written is found before either is
        space = check_push_access(replace(target, repo_id=f"{repo_id}-demo", repo_type="space", space_sdk="gradio"))
        facts = replace(facts, demo=space)
    try:
        url = push_folder(Path(model), target, facts)
    except OSError as error:
        raise OSError(f"{error}\nTry again with:\n  {resume_command(Path(model), target)}") from error
    print(f"Pushed: {url}")
    if config.with_demo:
        options = DemoConfig(push=space, private=config.private, hub_token=config.hub_token)
        demo(space.removesuffix("-demo"), options)
    return url
