"""A server that speaks the Hugging Face hub's protocol, for the tests of everything that fetches.

GET  /api/models/ORG/NAME/revision/REV?blobs=true   the commit and the files, LFS ones with size and SHA-256
HEAD /ORG/NAME/resolve/COMMIT/FILE                  X-Repo-Commit, ETag; for a file in LFS 302 to the CDN, with
                                                    X-Linked-Etag and X-Linked-Size
GET  the same; the CDN, another host as the hub's is, answers Range requests
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Hub:
    """What the server serves, how it fails, and what it was asked."""

    files: dict[str, bytes]
    repositories: tuple[str, ...] = ("org/tiny",)
    """Names under which the same files stand."""
    lfs: tuple[str, ...] = (".safetensors", ".bin", ".pth", ".model")
    revisions: tuple[str, ...] = ("main", "v1.0", "refs/pr/1")
    token: str | None = None
    """What a request has to bring."""
    refusal: tuple[int, str] = (401, "GatedRepo")
    """What others are told: status and X-Error-Code."""
    gated_files: bool = False
    """Only files are refused, as those of gated repositories are."""
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """For a file: the connection breaks after so many bytes, once for each entry; every time after the last, if 0."""
    wrong: dict[str, list[bytes]] = field(default_factory=dict)
    """For a file: what is sent instead, once for each entry."""
    hang_after: dict[str, int] = field(default_factory=dict)
    """For a file: so many bytes are sent, and then nothing for long."""
    sizes: dict[str, int] = field(default_factory=dict)
    """For a file: the size that the hub says, if another than the true one."""
    page: bytes | None = None
    """What stands where a repository's files are told."""
    status: int = 0
    """Every request to the interface is answered so."""
    asked: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)
    """Method, path, Range, Authorization."""
    sent: dict[str, int] = field(default_factory=dict)
    """Bytes of each file's contents that were sent."""
    closing: Event = field(default_factory=Event)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def is_lfs(self, name: str) -> bool:
        return name.endswith(self.lfs)

    def requests(self, name: str) -> list[tuple[str, str | None]]:
        """Method and Range of each request for a file's contents."""
        return [(method, span) for method, path, span, _ in self.asked if path.endswith(f"/{name}")]


def info(hub: Hub, name: str) -> dict[str, Any]:
    """The hub's answer on a repository."""
    siblings = []
    for file, content in hub.files.items():
        sibling = {"rfilename": file, "size": hub.sizes.get(file, len(content)), "blobId": git_hash(content)}
        if hub.is_lfs(file):
            sibling["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        siblings.append(sibling)
    return {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "private": False}


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob " + str(len(content)).encode() + b"\0" + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request; `hub` is on the server."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_HEAD(self) -> None:
        self.route()

    def do_GET(self) -> None:
        self.route()

    def route(self) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        hub.asked.append((self.command, path, self.headers.get("Range"), self.headers.get("Authorization")))
        if path.startswith("/cdn/"):
            return self.contents(path.removeprefix("/cdn/"))
        api = path.startswith("/api/models/")
        name = "/".join(path.removeprefix("/api/models/").strip("/").split("/")[:2])
        if hub.status:
            return self.answer(hub.status)
        if name not in hub.repositories:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        refused = hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}"
        if refused and not (api and hub.gated_files):
            return self.answer(hub.refusal[0], {"X-Error-Code": hub.refusal[1]})
        if api:
            return self.look_up(name, path.partition("/revision/")[2])
        return self.resolve(*path.split("/resolve/")[1].split("/", 1))

    def look_up(self, name: str, revision: str) -> None:
        hub = self.server.hub
        if revision not in (*hub.revisions, COMMIT):
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        body = hub.page or json.dumps(info(hub, name)).encode()
        return self.answer(200, {"Content-Type": "application/json"}, body)

    def resolve(self, commit: str, file: str) -> None:
        hub = self.server.hub
        content = hub.files.get(file)
        if content is None or commit != COMMIT:
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        if not hub.is_lfs(file):
            return self.contents(file, {"X-Repo-Commit": COMMIT, "ETag": f'"{git_hash(content)}"'})
        headers = {
            "X-Repo-Commit": COMMIT,
            "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"http://localhost:{hub.port}/cdn/{file}",
        }
        return self.answer(302, headers)

    def contents(self, file: str, headers: dict[str, str] | None = None) -> None:
        """A file's bytes, or those asked for, or what is planted."""
        hub = self.server.hub
        content, span = hub.files[file], self.headers.get("Range")
        if self.command == "GET" and hub.wrong.get(file):
            content = hub.wrong[file].pop(0)
        start = int(span.removeprefix("bytes=").partition("-")[0]) if span else 0
        headers = (headers or {}) | {"Accept-Ranges": "bytes"}
        if span:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.answer(206 if span else 200, headers, content[start:], file)

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"", file: str = "") -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.send_body(body, file)

    def send_body(self, body: bytes, file: str) -> None:
        hub = self.server.hub
        cuts, hang = hub.cuts.get(file), hub.hang_after.get(file)
        cut = None
        if cuts:
            cut = cuts[0] if cuts[0] == 0 else cuts.pop(0)
        part = body[: cut if cut is not None else hang]
        self.wfile.write(part)
        self.wfile.flush()
        hub.sent[file] = hub.sent.get(file, 0) + len(part)
        if cut is not None:
            self.close_connection = True
        elif hang is not None:
            hub.closing.wait(60)

    def log_message(self, *_: object) -> None: ...


class Server(ThreadingHTTPServer):
    """With the `Hub` that it serves."""

    daemon_threads = True

    def __init__(self, hub: Hub):
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub
        hub.port = self.server_port

    def handle_error(self, *_: object) -> None:
        """A client that was killed."""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve while the block runs."""
    with Server(hub) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.closing.set()
            server.shutdown()


def files_of(folder: Path) -> dict[str, bytes]:
    """A directory's files, as a repository has them."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
