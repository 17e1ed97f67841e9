"""The Hub as this package needs it: may we write there, what is worth another try, and how to say what went wrong."""

from __future__ import annotations

import inspect
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds before each further try
LONGEST_WAIT = 300.0  # seconds, of what the Hub may ask for
TRANSIENT = {408, 412, 425, 429}  # and 5xx. 412: somebody else has committed since we looked
HTTP_CLIENTS = {"httpx", "httpx2", "httpcore", "requests", "urllib3"}  # of the client's various releases
NEW_TOKEN = "make one with the role `write` at https://huggingface.co/settings/tokens and log in with `hf auth login`"

T = TypeVar("T")
Log = Callable[[str], None]


@dataclass(frozen=True)
class HubTarget:
    """Where to push.

    Args:
        repo_id: "name" or "owner/name".
        token: None takes that of `hf auth login` or HF_TOKEN. It is in no text that this package makes.
        private: the repository is to be private. It is made so, and one that is public is refused.
        revision: a branch, made where it does not exist, or "refs/pr/N"; None is `main`.
        tag: given to the commit that results.
        create_pr: open a pull request instead of committing to `main`.

    Raises:
        ValueError: for options that exclude each other, and names that the Hub refuses.
    """

    repo_id: str
    token: str | None = field(default=None, repr=False)
    private: bool = False
    revision: str | None = None
    tag: str | None = None
    create_pr: bool = False

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise ValueError(
                f"`repo_id` is {self.repo_id!r}, but the Hub takes no such name: use `name` or `owner/name`, of "
                "letters, digits, '-', '_' and '.', 96 characters at most, without '--' and '..'."
            ) from error
        if self.token is not None and not re.fullmatch(r"[!-~]+", self.token):
            raise ValueError("the token has blanks or characters that no token has: copy it again.")
        if self.create_pr and (self.revision or self.tag):
            raise ValueError(
                "a pull request is opened against `main` and can't be tagged: leave out revision and tag, or create_pr."
            )
        for name, ref in (("revision", self.revision), ("tag", self.tag)):
            if ref is not None and not re.fullmatch(r"(?!.*(\.\.|//))[\w][\w./-]*(?<![./])", ref):
                raise ValueError(f"`{name}` is {ref!r}, but git takes no such name: use letters, digits, '-' and '.'.")

    def api(self) -> HfApi:
        """The client."""
        return HfApi(token=self.token)


class PushError(OSError):
    """The Hub could not be reached, or refused: its repository is as it was, and so is what lies here."""


def check_push_access(target: HubTarget, *, log: Log = print, delays: tuple[float, ...] = DELAYS) -> str:
    """Make sure that a push will be accepted; makes the repository if it does not exist. Call it before long work.

    Returns:
        The full name of the repository, "owner/name".

    Raises:
        ValueError: for a missing, wrong or read-only token, a name of somebody else, or a public repository where a
            private one was asked for. Says what to do.
        PushError: where the Hub can't be reached.
    """
    api = target.api()

    def ask(call: Callable[[], T], what: str) -> T:
        return retry(call, what, log=log, delays=delays)

    with readable_errors(target):
        repo_id = _own_name(target, ask(api.whoami, "Looking up the token's account"))
        try:
            info = ask(lambda: api.model_info(repo_id), "Looking up the repository")
        except RepositoryNotFoundError:
            if target.create_pr:
                raise ValueError(f"there is no repository {repo_id!r} to open a pull request in.") from None
            ask(lambda: _create(api, repo_id, target.private), "Creating the repository")
        else:
            if target.private and not info.private and not target.create_pr:
                raise ValueError(
                    f"a private repository was asked for, but {repo_id!r} exists and is public: make it private in its "
                    "settings, choose another name, or leave out `private`."
                )
        if not target.create_pr:
            ask(lambda: _check_write(api, repo_id), "Checking the right to write")
    return repo_id


@contextmanager
def readable_errors(target: HubTarget) -> Iterator[None]:
    """Turn what the client raises into a `ValueError` (a mistake to mend) or a `PushError`, neither with the token."""
    try:
        yield
    except Exception as error:
        if type(error) is ValueError or isinstance(error, PushError):
            raise
        mistake = isinstance(error, LocalTokenNotFoundError) or _status(error) in (401, 403, 404)
        raise (ValueError if mistake else PushError)(explain(error, target)) from None


def retry(
    call: Callable[[], T],
    what: str,
    *,
    log: Log = print,
    delays: tuple[float, ...] = DELAYS,
    sleep: Callable[[float], object] = time.sleep,
) -> T:
    """The result of `call`, which is tried again after each of `waits` (seconds) where its failure may pass.

    Raises:
        Exception: that of the last try.
    """
    for wait in (*delays, None):
        try:
            return call()
        except Exception as error:
            if wait is None or not is_transient(error):
                raise
            wait = max(wait, _asked_wait(error))
            log(f"{what}: {reason(error)}. Trying again in {wait:g} s.")
            sleep(wait)
    raise AssertionError


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: a broken connection, 408, 429, 5xx, an answer that is no JSON."""
    if any(isinstance(e, OfflineModeIsEnabled) for e in _chain(error)):
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
    """Why a request failed, in a few words without addresses or headers."""
    status = _status(error)
    if status is not None:
        return f"the Hub answers {status}"
    root = [*_chain(error)][-1]
    return " ".join(f"{type(root).__name__}: {root}".split())[:200]


def explain(error: Exception, target: HubTarget) -> str:
    """What went wrong and what to do, without the token."""
    status = _status(error)
    if any(isinstance(e, OfflineModeIsEnabled) for e in _chain(error)):
        text = "HF_HUB_OFFLINE is set: unset it to push."
    elif isinstance(error, LocalTokenNotFoundError):
        text = f"there is no token to push with: {NEW_TOKEN}, or set HF_TOKEN."
    elif status == 401:
        text = f"the Hub does not know this token (401): {NEW_TOKEN}."
    elif status == 403:
        text = f"this token may not write to {target.repo_id!r} (403): {NEW_TOKEN}, or choose another name."
    elif status == 404:
        text = f"the Hub has no repository {target.repo_id!r} that this token can see (404)."
    elif status is not None and not is_transient(error):
        text = f"{' '.join(str(error).split())} ({status})"
    else:
        text = f"the Hub can't be reached now ({reason(error)})."
    return text.replace(target.token, "***") if target.token else text


def _own_name(target: HubTarget, account: dict[str, Any]) -> str:
    """The full name of the repository, if it is of this account's or one of its organisations."""
    user = account["name"]
    namespace, name = target.repo_id.split("/") if "/" in target.repo_id else (user, target.repo_id)
    token = (account.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise ValueError(f"the token of {user!r} can only read: {NEW_TOKEN}.")
    roles = {org["name"]: org.get("roleInOrg") for org in account.get("orgs") or []}
    writable = [user, *(org for org, role in roles.items() if role != "read")]
    if namespace not in writable and not target.create_pr:
        why = "can only read there" if namespace in roles else "is no member there"
        raise ValueError(
            f"`repo_id` is {target.repo_id!r}, but {user!r} {why}: use {user}/{name}"
            f"{''.join(f' or {org}/{name}' for org in writable[1:])}, or open a pull request with create_pr."
        )
    return f"{namespace}/{name}"


def _create(api: HfApi, repo_id: str, private: bool) -> None:
    try:
        api.create_repo(repo_id, private=private or None)  # None: what the organisation has as its default
    except HfHubHTTPError as error:
        if _status(error) != 409:  # made by an earlier try whose answer was lost
            raise


def _check_write(api: HfApi, repo_id: str) -> None:
    """`create_repo(exist_ok=True)` succeeds with any token where the repository exists: this asks for the right."""
    if "write" not in inspect.signature(api.auth_check).parameters:  # an older client
        return
    try:
        api.auth_check(repo_id, write=True)
    except HfHubHTTPError as error:
        if _status(error) not in (404, 405):
            raise
        api.model_info(repo_id)  # there after all: a Hub that can't be asked


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    responses = (getattr(e, "response", None) for e in _chain(error))
    return next((r.status_code for r in responses if r is not None), None)


def _asked_wait(error: BaseException) -> float:
    """Seconds that the Hub asks to wait."""
    for e in _chain(error):
        response = getattr(e, "response", None)
        value = response.headers.get("Retry-After", "") if response is not None else ""
        if value.isdigit():
            return min(float(value), LONGEST_WAIT)
    return 0.0
