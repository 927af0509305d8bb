"""A hub on this machine, which the real client asks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest
from huggingface_hub import constants

MODEL_COMMIT, ROWS_COMMIT = "a" * 40, "b" * 40


class Hub:
    """The part of the hub's interface that is used. `files` are those of the model; `taken` were downloaded."""

    def __init__(self, files: dict[str, bytes], model: str = "org/tiny") -> None:
        self.files, self.model = files, model
        self.claims: dict[str, str] = {}
        """name -> sha256 that is stated in the place of the true one."""
        self.taken: list[str] = []

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) for a path."""
        if "/resolve/" in path:
            assert MODEL_COMMIT in path, "of one commit"
            name = path.split(f"/resolve/{MODEL_COMMIT}/")[1]
            content = self.files[name]
            return 200, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": MODEL_COMMIT}, content
        if path.startswith(f"/api/models/{self.model}"):
            if "/tree/" in path:
                entries: Any = [{"type": "file", "path": name, **self._entry(name, "oid")} for name in self.files]
            else:
                siblings = [{"rfilename": name, **self._entry(name, "blobId")} for name in self.files]
                entries = {"id": self.model, "modelId": self.model, "sha": MODEL_COMMIT, "siblings": siblings}
            return 200, {"Content-Type": "application/json"}, json.dumps(entries).encode()
        if path.startswith("/api/datasets/org/rows"):
            record = {"id": "org/rows", "sha": ROWS_COMMIT, "siblings": []}
            return 200, {"Content-Type": "application/json"}, json.dumps(record).encode()
        if "gated" in path:
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to it is restricted."}, b""
        return 404, {"X-Error-Code": "RepoNotFound"} if "/api/" in path else {}, b""

    def _entry(self, name: str, oid: str) -> dict[str, Any]:
        content = self.files[name]
        entry: dict[str, Any] = {"size": len(content), oid: hashlib.sha1(content).hexdigest()}
        if name.endswith(".safetensors"):
            sha = self.claims.get(name, hashlib.sha256(content).hexdigest())
            entry["lfs"] = {"sha256": sha, "oid": sha, "size": len(content), "pointerSize": 130}
        return entry


@contextlib.contextmanager
def serving(served: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Inside, this process is online, and its hub is this one."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            status, headers, body = served.answer(path)
            if self.command == "GET" and "/resolve/" in path:
                served.taken.append(path.split("/")[-1])
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield served
    server.shutdown()
    server.server_close()
