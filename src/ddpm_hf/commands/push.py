"""`ddpm-hf push`."""

from __future__ import annotations

from pathlib import Path

from ..config.commands import PushConfig


def push(model: str, repo_id: str, config: PushConfig) -> str:
    """Push the model in a folder; returns the URL of the commit or pull request."""
    from ..sharing.card import CardFacts
    from ..sharing.hub import HubTarget
    from ..sharing.push import push_folder, resume_command, upload_plan

    target = HubTarget(
        repo_id,
        config.hub_token,
        config.private,
        config.revision,
        config.tag,
        create_pr=config.create_pr,
        share_training_images=config.share_training_images,
    )
    facts = CardFacts(license=config.license)
    if config.dry_run:
        print("\n".join([f"To {repo_id}, in one commit:", *upload_plan(Path(model), target, facts)]))
        return ""
    try:
        url = push_folder(Path(model), target, facts)
    except OSError as error:
        raise OSError(f"{error}\nTry again with:\n  {resume_command(Path(model), target)}") from error
    print(f"Pushed: {url}")
    return url
