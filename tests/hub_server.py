"""A read-only Hub on 127.0.0.1: enough of its HTTP API for the real client to download from a folder."""

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    root: Path  # root / owner / name holds the files of a model

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        if path.startswith("api/models/"):
            self._api(path.removeprefix("api/models/").split("/"))
        elif "/resolve/" in path:
            repo, rest = path.split("/resolve/")
            self._file(self.root / repo / rest.split("/", 1)[1])
        else:
            self._missing("RepoNotFound")

    def _api(self, parts):
        repo = "/".join(parts[:2])
        files = [p for p in sorted((self.root / repo).rglob("*")) if p.is_file()]
        if not files:
            self._missing("RepoNotFound")
            return
        names = [p.relative_to(self.root / repo).as_posix() for p in files]
        if "tree" in parts:
            entries = zip(names, files, strict=True)
            self._json([{"type": "file", "path": n, "size": p.stat().st_size, "oid": _etag(p)} for n, p in entries])
        else:
            siblings = [{"rfilename": n} for n in names]
            self._json({"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "siblings": siblings, "tags": []})

    def _file(self, file):
        if not file.is_file():
            self._missing("EntryNotFound")
            return
        self._send(200, file.read_bytes(), {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": COMMIT})

    def _json(self, value):
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, code):
        self._send(404, b"{}", {"X-Error-Code": code, "X-Error-Message": "not found"})

    def _send(self, status, body, headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _etag(file):
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextlib.contextmanager
def serve_hub(root):
    """Serve the models of `root`; yields the endpoint's address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"root": Path(root)}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
