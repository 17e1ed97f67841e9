"""Talking to the Hub: write access checked beforehand, failures that may pass retried, errors that name a remedy."""

from __future__ import annotations

import inspect
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds before each further attempt
LONGEST_DELAY = 300.0  # seconds: the most that a Retry-After is followed
TRANSIENT = {408, 412, 425, 429}  # and 5xx. 412: somebody else committed after we looked
HTTP_CLIENTS = {"httpx", "httpx2", "httpcore", "requests", "urllib3"}  # whichever a release of huggingface_hub uses
NEW_TOKEN = "create one with the role `write` at https://huggingface.co/settings/tokens and log in with `hf auth login`"

T = TypeVar("T")
Log = Callable[[str], None]


@dataclass(frozen=True)
class HubTarget:
    """Where to push.

    Args:
        repo_id: "name" or "owner/name".
        token: None uses that of `hf auth login` or HF_TOKEN. It appears in no text that this package writes.
        private: create the repository as private; an existing public one is refused.
        revision: a branch, created if missing, or "refs/pr/N"; None is `main`.
        tag: given to the resulting commit.
        create_pr: open a pull request instead of committing to `main`.
        share_training_images: upload the pictures that show training images, too.
        with_onnx: upload the network in ONNX and its sampler, too.
        repo_type: "model", or "space" for a demo.
        space_sdk: what runs a Space: "gradio" or "static".

    Raises:
        ValueError: for options that exclude each other, and names that the Hub does not allow.
    """

    repo_id: str
    token: str | None = field(default=None, repr=False)
    private: bool = False
    revision: str | None = None
    tag: str | None = None
    create_pr: bool = False
    share_training_images: bool = False
    with_onnx: bool = False
    repo_type: str = "model"
    space_sdk: str | None = None

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise ValueError(
                f"`repo_id` is {self.repo_id!r}, which is not a valid name on the Hub: use `name` or `owner/name` with "
                "letters, digits, '-', '_' and '.', at most 96 characters, without '--' or '..'."
            ) from error
        if self.token is not None and not re.fullmatch(r"[!-~]+", self.token):
            raise ValueError("the token contains spaces or characters that no token has: copy it again.")
        if self.create_pr and (self.revision or self.tag):
            raise ValueError(
                "a pull request is opened against `main` and can't be tagged: leave out revision and tag, or create_pr."
            )
        for name, ref in (("revision", self.revision), ("tag", self.tag)):
            if ref is not None and not re.fullmatch(r"(?!.*(\.\.|//))[\w][\w./-]*(?<![./])", ref):
                raise ValueError(
                    f"`{name}` is {ref!r}, which is not a valid git name: use letters, digits, '-' and '.'."
                )

    def api(self) -> HfApi:
        """The client."""
        return HfApi(token=self.token)


class PushError(OSError):
    """The Hub could not be reached, or refused: its repository is unchanged, and so are the local files."""


@dataclass(frozen=True)
class Retry:
    """Calls the Hub until it answers: `retry(call, "Pushing")` returns what `call` does.

    Only failures that may pass (`is_transient`) are retried, after at least as long as the Hub's Retry-After says.

    Args:
        log: takes a line of text before each further attempt.
        delays: seconds before each further attempt.
        sleep: waits for a number of seconds.
    """

    log: Log = print
    delays: tuple[float, ...] = DELAYS
    sleep: Callable[[float], None] = time.sleep

    def __call__(self, call: Callable[[], T], what: str) -> T:
        """The result of `call`, which `what` names for the log. Raises the exception of the last attempt."""

        def delay(state: RetryCallState) -> float:
            return max((*self.delays, 0.0)[state.attempt_number - 1], _retry_after(_failure(state)))

        def report(state: RetryCallState) -> None:
            self.log(f"{what}: {reason(_failure(state))}. Trying again in {state.upcoming_sleep:g} s.")

        return Retrying(
            retry=retry_if_exception(is_transient),
            stop=stop_after_attempt(len(self.delays) + 1),
            wait=delay,
            before_sleep=report,
            sleep=self.sleep,
            reraise=True,
        )(call)


DEFAULT_RETRY = Retry()


def check_push_access(target: HubTarget, retry: Retry = DEFAULT_RETRY) -> str:
    """Make sure that a push will be accepted, and create the repository if it does not exist. Call it before long work.

    Returns:
        The full name of the repository, "owner/name".

    Raises:
        ValueError: for a missing, wrong or read-only token, a name of somebody else, or a public repository where
            `private` is set. Each names a remedy.
        PushError: where the Hub can't be reached.
    """
    api = target.api()
    with readable_errors(target):
        repo_id = _own_name(target, retry(api.whoami, "Looking up the token's account"))
        try:
            info: Any = retry(lambda: api.repo_info(repo_id, repo_type=target.repo_type), "Looking up the repository")
        except RepositoryNotFoundError:
            if target.create_pr:
                raise ValueError(
                    f"`create_pr` is set, but there is no repository {repo_id!r} to open a pull request in."
                ) from None
            retry(lambda: _create(api, repo_id, target), "Creating the repository")
        else:
            if target.private and not info.private and not target.create_pr:
                raise ValueError(
                    f"`private` is set, but {repo_id!r} exists and is public: make it private in its settings, choose "
                    "another name, or leave out `private`."
                )
        if not target.create_pr:
            retry(lambda: _check_write(api, repo_id, target.repo_type), "Checking write access")
    return repo_id


@contextmanager
def readable_errors(target: HubTarget) -> Iterator[None]:
    """Turn what the client raises into a `ValueError` (to be fixed) or a `PushError`, neither with the token."""
    try:
        yield
    except Exception as error:
        if type(error) is ValueError or isinstance(error, PushError):
            raise
        mistake = isinstance(error, LocalTokenNotFoundError) or _status(error) in (401, 403, 404)
        raise (ValueError if mistake else PushError)(explain(error, target)) from None


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: a broken connection, 408, 429, 5xx, an answer that is not JSON."""
    if _is_offline(error):
        return False
    status = _status(error)
    if status is not None:
        return status in TRANSIENT or status >= 500
    return any(
        isinstance(e, (ConnectionError, TimeoutError, json.JSONDecodeError))
        or type(e).__module__.split(".")[0] in HTTP_CLIENTS
        for e in _chain(error)
    )


def reason(error: BaseException) -> str:
    """Why a request failed, in a few words, without addresses or headers."""
    status = _status(error)
    if status is not None:
        return f"the Hub answered {status}"
    root = [*_chain(error)][-1]
    return " ".join(f"{type(root).__name__}: {root}".split())[:200]


def explain(error: Exception, target: HubTarget) -> str:
    """What went wrong and what to do about it, without the token."""
    status = _status(error)
    if _is_offline(error):
        text = "HF_HUB_OFFLINE is set: unset it to push."
    elif isinstance(error, LocalTokenNotFoundError):
        text = f"there is no token to push with: {NEW_TOKEN}, or set HF_TOKEN."
    elif status == 401:
        text = f"the Hub rejects this token (401): {NEW_TOKEN}."
    elif status == 403:
        text = f"this token may not write to {target.repo_id!r} (403): {NEW_TOKEN}, or choose another name."
    elif status == 404:
        text = f"the Hub has no repository {target.repo_id!r} that this token can see (404)."
    elif status is not None and not is_transient(error):
        text = f"{' '.join(str(error).split())} ({status})"
    else:
        text = f"the Hub can't be reached ({reason(error)})."
    return text.replace(target.token, "***") if target.token else text


def _own_name(target: HubTarget, account: dict[str, Any]) -> str:
    """The full name of the repository, if it belongs to this account or to one of its organisations."""
    user = account["name"]
    namespace, name = target.repo_id.split("/") if "/" in target.repo_id else (user, target.repo_id)
    token = (account.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise ValueError(f"the token of {user!r} is read-only: {NEW_TOKEN}.")
    roles = {org["name"]: org.get("roleInOrg") for org in account.get("orgs") or []}
    writable = [user, *(org for org, role in roles.items() if role != "read")]
    if namespace not in writable and not target.create_pr:
        why = "has only read access to" if namespace in roles else "is not a member of"
        pull = ", or open a pull request with create_pr" if target.repo_type == "model" else ""
        raise ValueError(
            f"`repo_id` is {target.repo_id!r}, but {user!r} {why} {namespace!r}: use {user}/{name}"
            f"{''.join(f' or {org}/{name}' for org in writable[1:])}{pull}."
        )
    return f"{namespace}/{name}"


def _create(api: HfApi, repo_id: str, target: HubTarget) -> None:
    private = target.private or None  # None: the default of the organisation
    try:
        api.create_repo(repo_id, private=private, repo_type=target.repo_type, space_sdk=target.space_sdk)
    except HfHubHTTPError as error:
        if _status(error) != 409:  # created by an earlier attempt whose answer was lost
            raise


def _check_write(api: HfApi, repo_id: str, repo_type: str) -> None:
    """Ask for write access: `create_repo(exist_ok=True)` succeeds with any token where the repository exists."""
    if "write" not in inspect.signature(api.auth_check).parameters:  # an older client
        return
    try:
        api.auth_check(repo_id, repo_type=repo_type, write=True)
    except HfHubHTTPError as error:
        if _status(error) not in (404, 405):
            raise
        api.repo_info(repo_id, repo_type=repo_type)  # the repository exists: this Hub does not offer the check


def _failure(state: RetryCallState) -> BaseException:
    """What the latest attempt raised; tenacity's callbacks are called only after one that failed."""
    return cast(BaseException, state.outcome and state.outcome.exception())


def _is_offline(error: BaseException) -> bool:
    return any(isinstance(e, OfflineModeIsEnabled) for e in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    responses = (getattr(e, "response", None) for e in _chain(error))
    return next((r.status_code for r in responses if r is not None), None)


def _retry_after(error: BaseException) -> float:
    """The seconds of the Hub's Retry-After header, 0 without one."""
    for e in _chain(error):
        response = getattr(e, "response", None)
        value = response.headers.get("Retry-After", "") if response is not None else ""
        if value.isdigit():
            return min(float(value), LONGEST_DELAY)
    return 0.0
