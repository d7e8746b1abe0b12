"""A small hub on 127.0.0.1 that speaks the hub's protocol: what a client asked for, and what it may get.

As on the real one, files in LFS (safetensors, bin) are redirected to another host, which honours Range; all
others come from the hub itself.
"""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

PATH = re.compile("(/api/models)?/([^/]+/[^/]+)/(?:revision|resolve)/([^/]+)/?(.*)")


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # hash -> path -> content
    refs: dict[str, str] = field(default_factory=dict)  # branch or tag -> hash
    gated: tuple[int, str] | None = None  # (status, error code) for whoever asks for a file

    def commit(self, files: dict[str, bytes]) -> str:
        """Add a commit of these files and move the branch main there; returns its hash."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[commit], self.refs["main"] = files, commit
        return commit

    @property
    def main(self) -> dict[str, bytes]:
        return self.commits[self.refs["main"]]


class Hub:
    """The repositories, every request so far, and what else it may do to its guests."""

    def __init__(self, port: int):
        self.url, self.storage = f"http://127.0.0.1:{port}", f"http://localhost:{port}/storage"
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}  # what the other host has, by its sha256
        self.requests: list[tuple[str, str, dict[str, str]]] = []  # method, path, headers in lower case
        self.break_at: int | None = None  # the byte at which large files break off
        self.token: str | None = None  # the only token that is not refused
        self.status: int | None = None  # its answer to everything

    def repo(self, name: str) -> Repo:
        return self.repos.setdefault(name, Repo())

    def asked(self) -> set[str]:
        """The files of repositories that somebody asked for; forgets the requests."""
        paths = [path.partition("/resolve/")[2].partition("/")[2] for _, path, _ in self.requests]
        self.requests.clear()
        return {path for path in paths if path}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        if path.startswith("/storage/"):
            return self.storage(hub, path.rpartition("/")[2])
        if hub.status:
            return self.answer(hub.status)
        if hub.token and self.headers["Authorization"] != f"Bearer {hub.token}":
            return self.answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        listing, name, revision, file = PATH.fullmatch(path).groups()
        repo = hub.repos.get(name)
        if repo is None:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        contents = repo.commits[commit]
        entries = {path: describe(path, content) for path, content in contents.items()}
        if listing:
            model = {"id": name, "sha": commit, "siblings": list(entries.values())}
            return self.answer(200, body=json.dumps(model).encode())
        if repo.gated:
            return self.answer(repo.gated[0], {"X-Error-Code": repo.gated[1]})
        headers = {"X-Repo-Commit": commit}
        if file not in entries:
            return self.answer(404, headers | {"X-Error-Code": "EntryNotFound"})
        headers["ETag"] = f'"{entries[file]["blobId"]}"'
        if "lfs" not in entries[file]:
            return self.answer(200, headers, contents[file])
        sha256, size = entries[file]["lfs"]["sha256"], entries[file]["size"]
        hub.stored[sha256] = contents[file]
        headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(size)}
        self.answer(302, headers | {"Location": f"{hub.storage}/{sha256}"})

    do_HEAD = do_GET

    def storage(self, hub: Hub, sha256: str):
        content = hub.stored[sha256]
        first = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        headers = {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        last = len(content) if hub.break_at is None else hub.break_at
        self.answer(206 if first else 200, headers, content[first:], sent=max(0, last - first))

    def answer(self, status: int, headers: dict | None = None, body: bytes = b"", sent: int | None = None):
        """Answer; the connection breaks off after `sent` bytes of a longer body."""
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
        self.close_connection |= sent is not None and sent < len(body)

    def log_message(self, *args):
        pass


def read_files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def describe(file: str, content: bytes) -> dict:
    """A file as the hub lists it."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"rfilename": file, "size": len(content), "blobId": blob}
    if file.endswith((".safetensors", ".bin")):
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
    return entry


@contextmanager
def running():
    """A hub that answers until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.hub = Hub(server.server_port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
