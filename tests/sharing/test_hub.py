"""Write access is checked before long work, and the Hub is asked again where a failure may pass."""

import pytest
from huggingface_hub import constants

from ddpm_hf.sharing.hub import HubTarget, PushError, Retry, check_push_access
from support.hub_server import NO_DELAYS, TOKEN

REFUSALS = {
    "wrong token": ({}, {"token": "hf_wrong"}, "the Hub rejects this token.*hf auth login"),
    "read-only token": ({}, {"token": "hf_reader"}, "token of 'me' is read-only.*role `write`"),
    "no token": ({}, {"token": None}, "no token.*hf auth login.*HF_TOKEN"),
    "somebody else's name": (
        {"repo_id": "stranger/new"},
        {},
        "'me' is not a member of 'stranger': use me/new or lab/new",
    ),
    "somebody else's repository": ({"repo_id": "stranger/theirs"}, {}, "'me' is not a member of 'stranger'"),
    "an organization that I can only read": ({"repo_id": "library/new"}, {}, "'me' has only read access to 'library'"),
    "public, but `private` is set": (
        {"repo_id": "me/public", "private": True},
        {},
        "'me/public' exists and is public",
    ),
    "nothing to open a pull request in": ({"repo_id": "me/none", "create_pr": True}, {}, "no repository 'me/none'"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_token_problems_are_detected_before_training_starts(hub, case):
    target, token, message = REFUSALS[case]
    hub.add_token("hf_reader", role="read")
    for name in ("stranger/theirs", "me/public"):  # they exist, so create_repo(exist_ok=True) would succeed
        hub.add_repo(name)
    before = set(hub.repos)
    with pytest.raises(ValueError, match=message):
        check_push_access(HubTarget(**{"repo_id": "me/new", "token": TOKEN, **target, **token}), NO_DELAYS)
    assert set(hub.repos) == before
    assert all(len(r.commits) == 1 for r in hub.repos.values())


def test_the_check_returns_the_full_name_and_creates_the_repository(hub):
    assert check_push_access(HubTarget("new", TOKEN, private=True)) == "me/new"
    assert hub.repos["me/new"].private
    assert check_push_access(HubTarget("me/new", TOKEN, private=True)) == "me/new"


def test_a_token_without_write_access_to_this_repository_is_detected(hub):
    """A fine-grained token: its role shows nothing, only the Hub knows."""
    hub.add_repo("me/model")
    hub.fail("GET .*/auth-check/write", 403)
    with pytest.raises(ValueError, match="may not write to 'me/model'"):
        check_push_access(HubTarget("me/model", TOKEN), NO_DELAYS)


def test_an_offline_client_says_so(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="HF_HUB_OFFLINE is set"):
        check_push_access(HubTarget("me/model", TOKEN))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repo_id": "a/b/c"}, "repo_id.*'a/b/c'"),
        ({"repo_id": "me/a--b"}, "repo_id.*'me/a--b'.*without '--'"),
        ({"repo_id": "me/" + "a" * 97}, "repo_id.*96 characters"),
        ({"token": TOKEN + "\n"}, "token contains spaces"),
        ({"revision": "a..b"}, "revision.*'a..b'"),
        ({"tag": "has blank"}, "tag.*'has blank'"),
        ({"create_pr": True, "revision": "x"}, "leave out revision and tag"),
    ],
)
def test_bad_targets_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        HubTarget(**{"repo_id": "me/model", **options})
    assert TOKEN not in str(caught.value)


def test_retry_after_is_respected(hub):
    delays = []
    hub.fail("whoami", 429, 1, **{"Retry-After": "17"})
    Retry(delays=(1.0,), sleep=delays.append)(HubTarget("me/model", TOKEN).api().whoami, "x")
    assert delays == [17.0]
