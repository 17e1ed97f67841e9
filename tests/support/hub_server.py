"""A small Hub on 127.0.0.1: enough of its HTTP API for the real client to create, push, load and open pull requests.

Everything is kept in memory. Faults can be injected, and every request is recorded.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import constants, hf_api

from ddpm_hf.sharing.hub import Retry
from support.card_rules import card_errors

ROLES = ("read", "write", "admin")
TOKEN = "hf_ThisIsTheSecretOfTheTests"
NO_DELAYS = Retry(delays=(0.0, 0.0, 0.0))


@dataclass
class Repo:
    private: bool = False
    commits: dict = field(default_factory=dict)  # id → {path: bytes}
    titles: dict = field(default_factory=dict)  # id → title of the commit
    branches: dict = field(default_factory=dict)  # name, or refs/pr/N → id
    tags: dict = field(default_factory=dict)
    pulls: list = field(default_factory=list)

    def commit(self, branch, title, files, parent=None):
        oid = hashlib.sha1(f"{parent}{len(self.commits)}{title}".encode()).hexdigest()
        self.commits[oid], self.titles[oid], self.branches[branch] = files, title, oid
        return oid

    def find(self, revision):
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return oid if oid in self.commits else None

    def files(self, revision="main"):
        return self.commits[self.find(revision)]


@dataclass
class Fault:
    """What happens to the next `times` matching requests: a status, "drop" (no work done), or "lose" (no answer)."""

    request: str
    what: int | str
    times: int = 1
    headers: dict = field(default_factory=dict)


class Hub:
    """The state of the server; `tokens` gives the user, role and organizations of each."""

    def __init__(self):
        self.repos = {}
        self.created = {}  # name → type and, of a Space, its SDK
        self.blobs = {}
        self.tokens = {}
        self.faults = []
        self.requests = []  # "METHOD /path"
        self.received = []  # bodies and addresses, never the authorization header
        self.url = ""
        self.before_commit = None  # called once, just before the next commit

    def add_token(self, token, user="me", role="write", orgs=()):
        self.tokens[token] = {"user": user, "role": role, "orgs": dict(orgs)}
        return token

    def add_repo(self, name, files=None, private=False):
        self.repos[name] = Repo(private)
        self.repos[name].commit("main", "initial commit", {".gitattributes": b"", **(files or {})})
        return self.repos[name]

    def add_folder(self, name, folder):
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
        return self.add_repo(name, files)

    def fail(self, request, what, times=1, **headers):
        self.faults.append(Fault(request, what, times, headers))

    def count(self, request):
        return sum(bool(re.search(request, r)) for r in self.requests)


class _Answer(Exception):
    def __init__(self, status, value=None, **headers):
        self.status, self.value, self.headers = status, value, headers


def _not_found(code="RepoNotFound"):
    return _Answer(404, {"error": "not found"}, **{"X-Error-Code": code, "X-Error-Message": "not found"})


def _refused(status, message):
    return _Answer(status, {"error": message}, **{"X-Error-Message": message})


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _handle(self):
        address = urlsplit(self.path)
        self.route, self.query = unquote(address.path).strip("/"), parse_qs(address.query)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        request = f"{self.command} /{self.route}"
        self.hub.requests.append(request)
        self.hub.received.append(self.path.encode() + b"\n" + self.body)
        fault = next((f for f in self.hub.faults if f.times and re.search(f.request, request)), None)
        if fault:
            fault.times -= 1
        if fault and fault.what == "drop":
            self._drop()
            return
        try:
            if fault and isinstance(fault.what, int):
                raise _Answer(fault.what, {"error": "injected"}, **fault.headers)
            self._dispatch()
        except _Answer as answer:
            if fault and fault.what == "lose":
                self._drop()
            else:
                self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _drop(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, answer):
        body = answer.value if isinstance(answer.value, bytes) else json.dumps(answer.value or {}).encode()
        self.send_response(answer.status)
        headers = {"Content-Length": str(len(body)), "Content-Type": "application/json", **answer.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # --- who is asking ---------------------------------------------------------------------------------------------

    def _account(self):
        header = self.headers.get("Authorization", "")
        if not header:
            return None
        account = self.hub.tokens.get(header.removeprefix("Bearer "))
        if account is None:
            raise _refused(401, "Invalid credentials in Authorization header")
        return account

    def _may_write(self, namespace):
        account = self._account()
        if account is None or account["role"] == "read":
            return False
        return namespace == account["user"] or account["orgs"].get(namespace) in ("write", "admin", "contributor")

    def _repo(self, name, write=False):
        account = self._account()
        repo = self.hub.repos.get(name)
        namespace = name.split("/")[0]
        member = account and namespace in (account["user"], *account["orgs"])
        if repo is None or (repo.private and not member):
            raise _not_found()
        if write and not self._may_write(namespace):
            raise _refused(403, "You don't have write access to this repository")
        return repo

    # --- the addresses ---------------------------------------------------------------------------------------------

    def _dispatch(self):
        routes = [
            (r"GET api/whoami-v2", self._whoami),
            (r"POST api/repos/create", self._create),
            (r"POST api/validate-yaml", self._validate),
            (r"GET api/(?:models|spaces)/([^/]+/[^/]+)/auth-check(/write)?", self._auth_check),
            (r"GET api/(?:models|spaces)/([^/]+/[^/]+)/discussions", self._discussions),
            (r"GET api/(?:models|spaces)/([^/]+/[^/]+)/refs", self._refs),
            (r"GET api/(?:models|spaces)/([^/]+/[^/]+)/tree/(.+)", self._tree),
            (r"GET api/(?:models|spaces)/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            (r"POST api/(?:models|spaces)/([^/]+/[^/]+)/branch/(.+)", self._branch),
            (r"POST api/(?:models|spaces)/([^/]+/[^/]+)/tag/(.+)", self._tag),
            (r"POST api/(?:models|spaces)/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            (r"POST api/(?:models|spaces)/([^/]+/[^/]+)/commit/(.+)", self._commit),
            (r"POST (?:spaces/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._lfs_batch),
            (r"PUT lfs/(\w+)", self._lfs_put),
            (r"(?:GET|HEAD) (?:spaces/)?([^/]+/[^/]+)/resolve/(refs/pr/\d+|[^/]+)/(.+)", self._resolve),
        ]
        for pattern, answer in routes:
            match = re.fullmatch(pattern, f"{self.command} {self.route}")
            if match:
                answer(*match.groups())
        raise _not_found()

    def _whoami(self):
        account = self._account()
        if account is None:
            raise _refused(401, "Unauthorized")
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in account["orgs"].items()]
        token = {"displayName": "test", "role": account["role"]}
        raise _Answer(200, {"type": "user", "name": account["user"], "orgs": orgs, "auth": {"accessToken": token}})

    def _create(self):
        asked = json.loads(self.body)
        account = self._account()
        if account is None:
            raise _refused(401, "Unauthorized")
        namespace = asked.get("organization") or account["user"]
        if not self._may_write(namespace):
            raise _refused(403, f'You don\'t have the rights to create a model under the namespace "{namespace}".')
        name = f"{namespace}/{asked['name']}"
        if name in self.hub.repos:
            raise _Answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        self.hub.created[name] = (asked.get("type", "model"), asked.get("sdk"))
        self.hub.add_repo(name, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        raise _Answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def _validate(self):
        errors = card_errors(json.loads(self.body)["content"])
        raise _Answer(400 if errors else 200, {"errors": [{"message": e} for e in errors], "warnings": []})

    def _auth_check(self, name, write):
        self._repo(name, write=bool(write))
        raise _Answer(200)

    def _info(self, name, revision):
        repo = self._repo(name)
        oid = repo.find(revision or "main")
        if oid is None:
            raise _not_found("RevisionNotFound")
        siblings = [{"rfilename": path} for path in sorted(repo.commits[oid])]
        raise _Answer(
            200, {"id": name, "modelId": name, "sha": oid, "private": repo.private, "siblings": siblings, "tags": []}
        )

    def _refs(self, name):
        repo = self._repo(name)

        def listed(refs, prefix):
            return [{"name": n, "ref": f"{prefix}{n}", "targetCommit": oid} for n, oid in refs.items()]

        branches = {n: oid for n, oid in repo.branches.items() if not n.startswith("refs/")}
        raise _Answer(
            200,
            {"branches": listed(branches, "refs/heads/"), "tags": listed(repo.tags, "refs/tags/"), "converts": []},
        )

    def _tree(self, name, rest):
        repo = self._repo(name)
        revision = next((r for r in (rest, rest.split("/")[0]) if repo.find(r)), None)
        if revision is None:
            raise _not_found("RevisionNotFound")
        files = repo.files(revision)
        raise _Answer(200, [{"type": "file", "path": p, "size": len(b), "oid": _git(b)} for p, b in files.items()])

    def _discussions(self, name):
        pulls = [
            {
                "title": p["title"], "num": i + 1, "author": {"name": p["author"]}, "status": "open",
                "createdAt": "2026-01-01T00:00:00.000Z", "repo": {"name": name, "type": "model"}, "isPullRequest": True,
            }
            for i, p in enumerate(self._repo(name).pulls)
            if p["author"] in self.query.get("author", [p["author"]])
        ]  # fmt: skip
        raise _Answer(200, {"discussions": pulls, "count": len(pulls), "start": 0})

    def _branch(self, name, branch):
        repo = self._repo(name, write=True)
        if branch in repo.branches:
            raise _refused(409, "Reference already exists")
        repo.branches[branch] = repo.find(json.loads(self.body or b"{}").get("startingPoint") or "main")
        raise _Answer(200)

    def _tag(self, name, revision):
        repo = self._repo(name, write=True)
        tag = json.loads(self.body)["tag"]
        if tag in repo.tags:
            raise _refused(409, "Tag reference exists already")
        repo.tags[tag] = repo.find(revision)
        raise _Answer(200)

    def _preupload(self, name, revision):
        opens_pull = "create_pr" in self.query or revision.startswith("refs/pr/")
        repo = self._repo(name, write=not opens_pull)
        oid = repo.find(revision)
        if oid is None:
            raise _not_found("RevisionNotFound")
        files = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith((".safetensors", ".png", ".bin", ".pt")) else "regular"
            there = repo.commits[oid].get(file["path"])
            known = None if there is None else hashlib.sha256(there).hexdigest() if mode == "lfs" else _git(there)
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": known})
        raise _Answer(200, {"files": files})

    def _lfs_batch(self, name):
        if self._account() is None or self._account()["role"] == "read":
            raise _refused(403, "You don't have write access")
        objects = []
        for file in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{file['oid']}", "header": {}}}
            objects.append({**file, **({} if file["oid"] in self.hub.blobs else {"actions": upload})})
        raise _Answer(200, {"objects": objects, "transfer": "basic"}, **{"X-Repo": name})

    def _lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _refused(400, "wrong content")
        self.hub.blobs[oid] = self.body
        raise _Answer(200)

    def _commit(self, name, revision):
        opens_pull = "create_pr" in self.query
        repo = self._repo(name, write=not opens_pull and not revision.startswith("refs/pr/"))
        if self._account() is None or self._account()["role"] == "read":
            raise _refused(403, "You don't have write access")
        if self.hub.before_commit:
            meddle, self.hub.before_commit = self.hub.before_commit, None
            meddle()
        if revision not in repo.branches:
            raise _not_found("RevisionNotFound")
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        head = repo.branches[revision]
        if header.get("parentCommit") not in (None, head):
            raise _refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[head])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        if opens_pull:
            repo.pulls.append({"title": header["summary"], "author": self._account()["user"]})
            revision = f"refs/pr/{len(repo.pulls)}"
        oid = repo.commit(revision, header["summary"], files, head)
        pull = {"pullRequestUrl": f"{self.hub.url}/{name}/discussions/{len(repo.pulls)}"} if opens_pull else {}
        raise _Answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, **pull})

    def _resolve(self, name, revision, path):
        repo = self._repo(name)
        oid = repo.find(revision)
        if oid is None:
            raise _not_found("RevisionNotFound")
        if path not in repo.commits[oid]:
            raise _not_found("EntryNotFound")
        content = repo.commits[oid][path]
        raise _Answer(200, content, **{"ETag": f'"{_git(content)}"', "X-Repo-Commit": oid})


def _git(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextlib.contextmanager
def serve_hub(root=None):
    """Serve a Hub, with the models of the folder `root` (root/owner/name) if it is given; yields the `Hub`."""
    hub = Hub()
    for folder in Path(root).glob("*/*") if root else ():
        hub.add_folder(f"{folder.parent.name}/{folder.name}", folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)  # seconds until it sees its end
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def point_client_at(hub, monkeypatch, folder):
    """Make the Hub's client of this process talk to `hub`, with its cache in `folder` and without the user's token."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


def environment(hub, tmp_path, token=TOKEN):
    """The environment of a process whose user is logged in at `hub`."""
    kept = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    return {
        **kept, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": token,
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
