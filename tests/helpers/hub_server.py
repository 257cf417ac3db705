"""Serve ModelScope's and Hugging Face's APIs on loopback, with faults on demand.

Implements the paths, headers and JSON by which ``modelscope_hub`` and ``huggingface_hub`` list and fetch a repository.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants

from luthier.errors import UserError
from luthier.hub import download
from luthier.verbs.pull import pull

REPO = "someone/tiny-chat"
WEIGHTS = "model.safetensors"
COMMIT = "c0ffee" + "0" * 34


@dataclass
class Repository:
    """A repository. files: content by path; those named like weights are stored as large files (LFS)."""

    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main", "master")
    listed_sizes: dict[str, int] = field(default_factory=dict)  # if the hub lists a size other than the one it sends
    status: int = 200  # of the listing
    code: str = ""  # X-Error-Code of the listing
    file_status: int = 200


@dataclass(frozen=True)
class Request:
    path: str
    range: str
    agent: str
    token: str


class HubServer(ThreadingHTTPServer):
    """The server. repositories: by id. cut: file -> number of bytes after which the connection ends, once per entry.
    corrupt: file -> number of downloads with a wrong last byte. stall: file -> number of bytes after which the server
    waits until ``go`` is set."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.cut: dict[str, list[int]] = {}
        self.corrupt: dict[str, int] = {}
        self.stall: dict[str, int] = {}
        self.linked = False  # ModelScope's download sends the digest too
        self.go = threading.Event()
        self.url = f"http:{'//'}127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors: clients close connections on purpose in these tests."""

    def fetched(self, name: str) -> list[str]:
        """List the ranges that were requested of a file, ``""`` for all of it."""
        endings = (f"/resolve/{COMMIT}/{name}", f"FilePath={name}")
        return [r.range for r in self.requests if unquote(r.path).endswith(endings)]


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        token = self.headers.get("Authorization", "")
        self.server.requests.append(
            Request(self.path, self.headers.get("Range", ""), self.headers.get("User-Agent", ""), token)
        )
        url = urlsplit(self.path)
        parts = unquote(url.path).strip("/").split("/")
        query = {k: v[0] for k, v in parse_qs(url.query).items()}
        if parts[:3] == ["api", "v1", "models"]:
            self._modelscope("/".join(parts[3:5]), "/".join(parts[5:]), query)
        elif parts[:2] == ["api", "models"]:
            self._huggingface(self._repository("/".join(parts[2:4])), [*parts[5:], "main"][0])
        elif len(parts) > 4 and parts[2] == "resolve":
            repository, name = self._repository("/".join(parts[:2])), "/".join(parts[4:])
            if repository is None or parts[3] != COMMIT or name not in repository.files:
                self._json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            elif large(name):  # redirects to the storage of large files, as the real hub does
                self._send(302, b"", {"Location": f"/kept/{'/'.join(parts[:2])}/{name}"})
            else:
                self._file(repository, name)
        elif parts[0] == "kept":
            self._file(self.server.repositories["/".join(parts[1:3])], parts[3])
        else:
            self._json(404, {})

    def _repository(self, name: str) -> Repository | None:
        return self.server.repositories.get(name)

    # --- Hugging Face ---

    def _huggingface(self, repository: Repository | None, revision: str) -> None:
        if repository is None:
            self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif repository.status != 200:
            self._json(repository.status, {"error": "no"}, {"X-Error-Code": repository.code} if repository.code else {})
        elif revision not in repository.revisions:
            self._json(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            siblings = []
            for name, data in repository.files.items():
                size = repository.listed_sizes.get(name, len(data))
                blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                entry: dict[str, Any] = {"rfilename": name, "size": size, "blobId": blob}
                if large(name):
                    entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 134}
                siblings.append(entry)
            self._json(200, {"id": "a/b", "modelId": "a/b", "sha": COMMIT, "siblings": siblings})

    # --- ModelScope ---

    def _modelscope(self, name: str, verb: str, query: dict[str, str]) -> None:
        repository = self._repository(name)
        if repository is None:
            self._json(404, {"Code": 10010205001, "Message": "record not found", "Success": False})
        elif verb == "revisions":
            known = [{"Revision": r} for r in repository.revisions]
            self._data({"RevisionMap": {"Branches": known[-1:], "Tags": known[:-1]}})
        elif repository.status != 200:
            self._json(repository.status, {"Code": repository.status, "Message": "no", "Success": False})
        elif query.get("Revision") not in repository.revisions:
            self._json(404, {"Code": 10010205001, "Message": "git ref not found", "Success": False})
        elif verb == "repo/files":
            entries = [
                {
                    "Path": path,
                    "Name": path.rpartition("/")[2],
                    "Type": "blob",
                    "Size": repository.listed_sizes.get(path, len(data)),
                    "Sha256": hashlib.sha256(data).hexdigest(),
                    "Revision": COMMIT,
                }
                for path, data in repository.files.items()
            ]
            self._data({"Files": [{"Path": "figures", "Name": "figures", "Type": "tree", "Size": 0}, *entries]})
        elif verb == "repo":
            self._file(repository, query["FilePath"])
        else:
            self._json(404, {})

    def _data(self, data: Any) -> None:
        self._json(200, {"Code": 200, "Data": data, "Message": "success", "Success": True})

    # --- both ---

    def _file(self, repository: Repository, name: str) -> None:
        if repository.file_status != 200:
            self._json(repository.file_status, {"Message": "no"})
            return
        data = repository.files[name]
        headers = {"X-Linked-ETag": hashlib.sha256(data).hexdigest()} if self.server.linked else {}
        if self.server.corrupt.get(name, 0) > 0:
            self.server.corrupt[name] -= 1
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        whole = len(data)
        if start >= whole:
            self._send(416, b"", {"Content-Range": f"bytes */{whole}"})
            return
        if start:
            headers["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
        cuts = self.server.cut.get(name, [])
        self._send(206 if start else 200, data[start:], headers, cuts.pop(0) if cuts else None, name)

    def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None, name: str = "") -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if name in self.server.stall and not self.server.go.is_set():
            at = self.server.stall[name]
            self.wfile.write(body[:at])
            self.wfile.flush()
            self.server.go.wait(30)
            body = body[at:]
        self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True


def large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pth", ".gguf"))


def repository(model: Path) -> Repository:
    """Make a repository of a model, with other files that must not be downloaded."""
    files = {p.name: p.read_bytes() for p in model.iterdir()}
    assert len(files[WEIGHTS]) > 200_000
    files |= dict.fromkeys(("modeling_x.py", "README.md", "pytorch_model.bin", "model.gguf", "a.msgpack"), b"no")
    return Repository(files | dict.fromkeys(("figures/one.png", "onnx/model.safetensors", ".gitattributes"), b"no"))


@contextmanager
def serving(content: Repository, monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[HubServer]:
    """Run the server and let both hub clients of this process use it, without waits between retries.

    Checks that ModelScope's client writes nothing to ``home``, such as an id of the installation."""
    with HubServer() as made:
        threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        made.repositories[REPO] = content
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", made.url)
        monkeypatch.setenv("MODELSCOPE_HOME", str(home))
        monkeypatch.delenv("HF_HUB_OFFLINE")
        template = made.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_INTEGRITY_RETRY_BACKOFF", 0)
        monkeypatch.setattr("modelscope_hub._legacy_api.REPO_TREE_PAGE_MAX_ATTEMPTS", 1)
        monkeypatch.setattr(download.time, "sleep", lambda _: None)
        yield made
        made.go.set()
        made.shutdown()
        assert list(home.iterdir()) == []


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def refused(kind: type[UserError], call: Callable[[], Any]) -> str:
    with pytest.raises(kind) as e:
        call()
    assert e.value.fix
    return e.value.message


def pulling(place: str, to: Path, name: str = REPO, **kwargs: Any) -> Callable[[], Path]:
    return lambda: pull(name, to, place, **kwargs)
