"""A server that speaks the Hugging Face hub's protocol of uploads, over git-lfs (HF_HUB_DISABLE_XET).

GET  /api/whoami-v2                          the token's owner and role
POST /api/repos/create                       409 if it is there
POST /api/validate-yaml                      of README.md
POST /api/models/ORG/NAME/preupload/main     which files go to LFS
POST /ORG/NAME.git/info/lfs/objects/batch    where LFS files are put, those that are not there yet
PUT  /lfs/OID, POST /lfs/verify              on another host, as the hub's
POST /api/models/ORG/NAME/commit/main        lines of JSON: header, file, lfsFile
GET  /api/models/ORG/NAME                    its files
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

COMMIT = "c0ffee" + "0" * 34
TOKEN = "hf_mine"


@dataclass
class UploadHub:
    """What the server holds, how it refuses, and what it was asked."""

    role: str = "write"
    """Of the token."""
    owner: str = "me"
    """The name that the token may write below."""
    broken_puts: int = 0
    """So many LFS files are cut off in the middle."""
    busy_commits: int = 0
    """So many commits are answered with 503."""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """LFS files by SHA-256."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def puts(self) -> list[str]:
        """The SHA-256 of each LFS file that was sent, whole or not."""
        return [path.removeprefix("/lfs/") for method, path in self.asked if method == "PUT"]


class Handler(BaseHTTPRequestHandler):
    """One request; `hub` is on the server."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self) -> None:
        self.route()

    def do_POST(self) -> None:
        self.route()

    def do_PUT(self) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        hub.asked.append(("PUT", path))
        if hub.broken_puts:
            hub.broken_puts -= 1
            self.rfile.read(100)
            self.close_connection = True
            return self.connection.close()
        content = self.body()
        if hashlib.sha256(content).hexdigest() != path.removeprefix("/lfs/"):
            return self.answer(400)
        hub.objects[path.removeprefix("/lfs/")] = content
        return self.answer(200)

    def route(self) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        hub.asked.append((self.command, path))
        body = self.body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401)
        if path == "/api/whoami-v2":
            return self.answer(200, {"name": hub.owner, "auth": {"accessToken": {"role": hub.role}}})
        if path == "/api/validate-yaml":
            front = json.loads(body)["content"].startswith("---\n")
            return self.answer(200 if front else 400, {"errors": [] if front else [{"message": "no metadata"}]})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/lfs/verify":
            return self.answer(200 if json.loads(body)["oid"] in hub.objects else 404)
        name = "/".join(path.removeprefix("/api/models").split(".git/")[0].split("/")[1:3])
        if name not in hub.repositories:
            return self.answer(404)
        if path.endswith("/objects/batch"):
            return self.batch(json.loads(body))
        if "/preupload/" in path:
            return self.preupload(json.loads(body))
        if "/commit/" in path:
            return self.commit(name, [json.loads(line) for line in body.splitlines()])
        siblings = [{"rfilename": file} for file in hub.repositories[name]]
        return self.answer(200, {"id": name, "sha": COMMIT, "siblings": siblings})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def create(self, asked: dict[str, Any]) -> None:
        hub, name = self.server.hub, f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != hub.owner:
            return self.answer(403)
        answer = {"url": f"{hub.url}/{name}", "name": name}
        if name in hub.repositories:
            return self.answer(409, answer)
        hub.repositories[name], hub.private[name] = {}, asked.get("visibility") == "private"
        return self.answer(200, answer)

    def preupload(self, asked: dict[str, Any]) -> None:
        lfs = (".safetensors", ".pth", ".pt", ".model", "streaming_params")
        files = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(lfs) else "regular",
             "shouldIgnore": False}
            for file in asked["files"]
        ]  # fmt: skip
        return self.answer(200, {"files": files})

    def batch(self, asked: dict[str, Any]) -> None:
        hub = self.server.hub
        objects = []
        for one in asked["objects"]:
            href = f"http://localhost:{hub.port}/lfs"
            actions = {"upload": {"href": f"{href}/{one['oid']}"}, "verify": {"href": f"{hub.url}/lfs/verify"}}
            objects.append(one | ({} if one["oid"] in hub.objects else {"actions": actions}))
        return self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        hub = self.server.hub
        if hub.busy_commits:
            hub.busy_commits -= 1
            return self.answer(503)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile" and value["oid"] not in hub.objects:
                return self.answer(400)
            content = hub.objects[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
            hub.repositories[name][value["path"]] = content
        url = f"{hub.url}/{name}/commit/{COMMIT}"
        return self.answer(200, {"commitUrl": url, "commitOid": COMMIT})

    def answer(self, status: int, body: dict[str, Any] | None = None) -> None:
        content = json.dumps(body or {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


class Server(ThreadingHTTPServer):
    """With the `UploadHub` that it serves."""

    daemon_threads = True

    def __init__(self, hub: UploadHub):
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub
        hub.port = self.server_port

    def handle_error(self, *_: object) -> None:
        """A connection that was cut."""


@contextmanager
def serving(hub: UploadHub) -> Iterator[UploadHub]:
    """Serve while the block runs."""
    with Server(hub) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()
