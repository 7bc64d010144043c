"""The endpoints of a model hub that `huggingface_hub` needs to publish and to download a small repository."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import yaml


@dataclass
class Hub:
    """What was published: files by repository, and the commit of each; `private` has the repositories that are."""

    endpoint: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    tokens: set[str | None] = field(default_factory=set)


@contextmanager
def running() -> Iterator[Hub]:
    """A hub on this machine."""
    hub = Hub()

    class Handler(_Handler):
        of = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    of: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = urlsplit(self.path).path.strip("/").split("/")
        self.of.tokens.add(self.headers["Authorization"])
        if parts == ["api", "repos", "create"]:
            given = json.loads(body)
            name = f"{given['organization']}/{given['name']}"
            self.of.files.setdefault(name, {})
            if given.get("visibility") == "private" or given.get("private"):
                self.of.private.add(name)
            self.answer({"url": f"{self.of.endpoint}/{name}", "name": name, "id": name})
        elif parts == ["api", "validate-yaml"]:
            _, front, _ = json.loads(body)["content"].split("---\n", 2)
            found = yaml.safe_load(front)
            errors = [] if isinstance(found, dict) else [{"message": "not a mapping"}]
            self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)
        elif parts[4] == "preupload":
            files = [one["path"] for one in json.loads(body)["files"]]
            self.answer({"files": [{"path": one, "uploadMode": "regular", "shouldIgnore": False} for one in files]})
        elif parts[4] == "commit":
            self.commit("/".join(parts[2:4]), body)

    def commit(self, name: str, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.of.files[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        oid = self.of.commits[name] = hashlib.sha1(body).hexdigest()
        self.answer({"commitUrl": f"{self.of.endpoint}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        is_api = parts[0] == "api"
        name = "/".join(parts[2:4] if is_api else parts[:2])
        files = self.of.files.get(name)
        if files is None:
            self.answer({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})
        elif is_api and parts[4] == "tree":
            self.answer(
                [{"type": "file", "path": one, "size": len(data), "oid": _oid(data)} for one, data in files.items()]
            )
        elif is_api:
            siblings = [{"rfilename": one} for one in files]
            self.answer({"id": name, "sha": self.of.commits[name], "siblings": siblings, "private": False, "tags": []})
        else:
            data = files["/".join(parts[4:])]
            self.answer(data, ETag=f'"{_oid(data)}"', **{"X-Repo-Commit": self.of.commits[name]})

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for header, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
