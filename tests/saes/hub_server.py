"""The hub's API as its client uses it, on this machine: repositories, commits, files. Nothing leaves the machine.

Weights go the way of large files (git-lfs, basic transfer), other files inside the commit, as on the hub. The client
must run with `HF_HUB_DISABLE_XET=1`: the store that it prefers for large files cannot be had here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_test"
COMMIT = "1" * 40


class Hub(ThreadingHTTPServer):
    """`repositories`: name → path → content. `requests`: method and path of each. `large`: SHA-256 → content."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.large: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def _answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refused(self, status: int, code: str) -> None:
        self._answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        self.server.requests.append(f"POST {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refused(401, "Unauthorized")
        if path == "/api/repos/create":
            about = json.loads(body)
            name = f"{about['organization']}/{about['name']}" if about.get("organization") else about["name"]
            self.server.repositories.setdefault(name, {})
            return self._answer({"url": f"{self.server.url}/{name}", "name": name})
        if path == "/api/validate-yaml":  # of a card
            return self._answer({"errors": [], "warnings": []})
        name = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = [
                {
                    **file,
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.server.url}/large/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
                if each["oid"] not in self.server.large
            ]
            return self._answer({"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.server.repositories[name][entry["value"]["path"]] = content
                elif entry["key"] == "lfsFile":
                    content = self.server.large[entry["value"]["oid"]]
                    assert len(content) == entry["value"]["size"]
                    self.server.repositories[name][entry["value"]["path"]] = content
            url = f"{self.server.url}/{name}/commit/{COMMIT}"
            return self._answer({"commitUrl": url, "commitOid": COMMIT, "hookOutput": "", "success": True})
        return self._refused(404, "EntryNotFound")

    def do_PUT(self) -> None:
        """A large file. Its address is the permission, as at the hub's store, so no token is sent."""
        content, oid = self._body(), self.path.rpartition("/")[2]
        self.server.requests.append(f"PUT {self.path}")
        if hashlib.sha256(content).hexdigest() != oid:
            return self._refused(400, "WrongHash")
        self.server.large[oid] = content
        self._answer(b"")

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = self.server.repositories.get(name)
        if files is None:
            return self._refused(404, "RepoNotFound")
        if parts[0] == "api" and "tree" in parts:
            tree = [
                {"type": "file", "path": path, "size": len(data), "oid": _hash(data)} for path, data in files.items()
            ]
            return self._answer(tree, X_Repo_Commit=COMMIT)
        if parts[0] == "api":
            siblings = [{"rfilename": path} for path in files]
            return self._answer({"id": name, "sha": COMMIT, "siblings": siblings, "private": True, "tags": []})
        content = files.get("/".join(parts[4:]))
        if content is None:
            return self._refused(404, "EntryNotFound")
        self._answer(content, ETag=f'"{_hash(content)}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


def _hash(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
