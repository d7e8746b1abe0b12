"""A small hub on 127.0.0.1 that speaks the hub's protocol: what a client asked for, and what it may get.

As on the real one, files in LFS (safetensors, bin) are redirected to another host, which honours Range; all
others come from the hub itself.
"""

import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # hash -> path -> content
    refs: dict[str, str] = field(default_factory=dict)  # branch or tag -> hash
    gated: tuple[int, dict] = ()  # the answer (status, headers) to whoever asks for a file

    def commit(self, files: dict[str, bytes] | Path, branch: str = "main") -> str:
        """Add a commit of these files, or of those in a directory, and move the branch there."""
        if isinstance(files, Path):
            files = {str(p.relative_to(files)): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[commit] = files
        self.refs[branch] = commit
        return commit


class Hub:
    """The repositories, every request so far, and what else it may do to its guests."""

    def __init__(self, port: int):
        self.url, self.storage = f"http://127.0.0.1:{port}", f"http://localhost:{port}/storage"
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []  # method, path, headers in lower case
        self.break_at: int | None = None  # the byte at which large files break off
        self.token: str | None = None  # the only token that is not refused

    def repo(self, name: str) -> Repo:
        return self.repos.setdefault(name, Repo())

    def asked(self) -> set[str]:
        """The files of repositories that somebody asked for; forgets the requests."""
        paths = [path.partition("/resolve/")[2].partition("/")[2] for _, path, _ in self.requests]
        self.requests.clear()
        return {path for path in paths if path}

    def find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | tuple[int, str]:
        if name not in self.repos:
            return 404, "RepoNotFound"
        repo = self.repos[name]
        commit = repo.refs.get(revision, revision)
        return (commit, repo.commits[commit]) if commit in repo.commits else (404, "RevisionNotFound")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        if path.startswith("/storage/"):
            return self.storage(hub, path.rpartition("/")[2])
        if hub.token and self.headers["Authorization"] != f"Bearer {hub.token}":
            return self.answer(
                401, headers={"X-Error-Message": "Invalid credentials in Authorization header"}
            )
        if path.startswith("/api/models/"):
            name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            commit, files = hub.find(name, revision)
            if isinstance(commit, int):
                return self.answer(commit, headers={"X-Error-Code": files})
            siblings = [sibling(file, content) for file, content in files.items()]
            return self.answer(200, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode())
        name, _, rest = path[1:].partition("/resolve/")
        revision, _, file = rest.partition("/")
        commit, files = hub.find(name, revision)
        if isinstance(commit, int):
            return self.answer(commit, headers={"X-Error-Code": files})
        if hub.repos[name].gated:
            return self.answer(hub.repos[name].gated[0], headers=hub.repos[name].gated[1])
        if file not in files:
            return self.answer(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        entry = sibling(file, files[file])
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry["blobId"]}"'}
        if "lfs" not in entry:
            return self.answer(200, files[file], headers)
        sha256 = entry["lfs"]["sha256"]
        headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(entry["size"])}
        self.answer(302, headers=headers | {"Location": f"{hub.storage}/{sha256}"})

    do_HEAD = do_GET

    def storage(self, hub: Hub, sha256: str):
        content = next(
            content
            for repo in hub.repos.values()
            for files in repo.commits.values()
            for content in files.values()
            if hashlib.sha256(content).hexdigest() == sha256
        )
        first = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        headers = {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        last = len(content) if hub.break_at is None else hub.break_at
        self.answer(206 if first else 200, content[first:], headers, sent=max(0, last - first))

    def answer(self, status: int, body: bytes = b"", headers: dict | None = None, sent: int | None = None):
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


def sibling(file: str, content: bytes) -> dict:
    """A file as the hub lists it."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"rfilename": file, "size": len(content), "blobId": blob}
    if file.endswith((".safetensors", ".bin")):
        lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        entry["lfs"] = lfs
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
