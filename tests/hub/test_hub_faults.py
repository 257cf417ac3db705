"""``pull`` if the network, the hub, the disk or an earlier attempt fails: a clear message, and no data is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from luthier import hub
from luthier.errors import ModelError, UserError
from luthier.hub import catalogue
from luthier.verbs.pull import pull
from tests.conftest import ROOT, Result
from tests.helpers.hub_server import REPO, WEIGHTS, HubServer, Repository, names, pulling, refused

both = pytest.mark.parametrize("place", hub.HUBS)


@both
def test_a_broken_connection_is_resumed(place: str, server: HubServer, tmp_path: Path) -> None:
    server.cut[WEIGHTS] = [100_000, 50_000]
    target = pull(REPO, tmp_path / "model", place)
    assert server.fetched(WEIGHTS) == ["", "bytes=100000-", "bytes=150000-"]
    assert (target / WEIGHTS).read_bytes() == server.repositories[REPO].files[WEIGHTS]


@both
def test_a_killed_pull_is_resumed(place: str, server: HubServer, tmp_path: Path) -> None:
    """In a separate process, so that the clients read their environment as they do for a user."""
    server.stall[WEIGHTS] = 120_000
    env = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": "hf_of_the_user",
        "MODELSCOPE_API_TOKEN": "ms-of-the-user",
        "PYTHONPATH": str(ROOT / "src"),
    }
    argv = [sys.executable, "-m", "luthier.cli.main", "pull", REPO, "--to", str(tmp_path / "model"), "--from", place]
    running = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    part = tmp_path / ".model.partial" / (WEIGHTS + catalogue.PART)
    wait_until(lambda: part.exists() and part.stat().st_size > 0)
    assert not (tmp_path / "model").exists()
    assert "is being pulled by another process" in refused(ModelError, pulling(place, tmp_path / "model"))
    running.kill()
    running.communicate()
    downloaded = part.stat().st_size
    server.go.set()
    before = [r.path for r in server.requests]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'model'}\n"), done.stderr
    assert "of it already downloaded" in done.stderr
    assert server.fetched(WEIGHTS) == ["", f"bytes={downloaded}-"]
    again = [r.path for r in server.requests[len(before) :]]
    assert not any("tokenizer.json" in path for path in again)
    assert (tmp_path / "model" / WEIGHTS).read_bytes() == server.repositories[REPO].files[WEIGHTS]
    assert names(tmp_path) - {"hf"} == {"model"}
    assert not any("torch/" in r.agent or "agent-harnesses" in r.path for r in server.requests)  # no telemetry
    token = {"modelscope": "Bearer ms-of-the-user", "huggingface": "Bearer hf_of_the_user"}[place]
    assert {r.token for r in server.requests if "internalAcceleration" not in r.path} == {token}


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.02)


@both
def test_a_corrupted_file_is_downloaded_once_more(place: str, server: HubServer, tmp_path: Path) -> None:
    for name in (WEIGHTS, "config.json"):
        server.corrupt[name] = 1
    target = pull(REPO, tmp_path / "model", place)
    assert server.fetched(WEIGHTS) == ["", ""] == server.fetched("config.json")
    assert (target / WEIGHTS).read_bytes() == server.repositories[REPO].files[WEIGHTS]


@both
@pytest.mark.parametrize("fault", ["bytes", "size", "linked digest"])
def test_a_file_that_never_matches_the_listing_is_named(
    place: str, fault: str, server: HubServer, tmp_path: Path
) -> None:
    remote = server.repositories[REPO]
    server.linked = fault == "linked digest"
    if fault == "size":
        remote.listed_sizes[WEIGHTS] = len(remote.files[WEIGHTS]) + 9
    else:
        server.corrupt[WEIGHTS] = 99
    message = refused(ModelError, pulling(place, tmp_path / "model"))
    assert message.startswith(f"{WEIGHTS}: the file from ") and "does not match its listed size" in message
    assert names(tmp_path) == {".model.partial"}
    assert WEIGHTS not in names(tmp_path / ".model.partial")
    assert "config.json" in names(tmp_path / ".model.partial")
    remote.listed_sizes.clear()
    server.corrupt.clear()
    server.requests.clear()
    pull(REPO, tmp_path / "model", place)
    assert server.fetched("tokenizer.json") == []  # files that matched are kept


@both
def test_leftovers_of_an_earlier_attempt_are_resumed_or_deleted(place: str, server: HubServer, tmp_path: Path) -> None:
    """Partial files that are too long or of another file, changed files, unknown files: none gets into the model."""
    partial = tmp_path / ".model.partial"
    partial.mkdir()
    (partial / "of-another-model.bin").write_bytes(b"x")
    (partial / "folder").mkdir()
    files = server.repositories[REPO].files
    (partial / "config.json").write_bytes(b"{}")
    (partial / ("tokenizer.json" + catalogue.PART)).write_bytes(b"x" * (len(files["tokenizer.json"]) + 1))
    (partial / (WEIGHTS + catalogue.PART)).write_bytes(b"\0" * 1000)
    target = pull(REPO, tmp_path / "model", place)
    assert all((target / n).read_bytes() == files[n] for n in names(target) - {hub.MANIFEST})
    assert server.fetched(WEIGHTS) == ["bytes=1000-", ""]


@both
def test_a_refusal_of_a_hub_is_reported_with_its_reason(place: str, server: HubServer, tmp_path: Path) -> None:
    title = {"modelscope": "ModelScope", "huggingface": "Hugging Face"}[place]
    to, remote = tmp_path / "model", server.repositories[REPO]
    message = refused(ModelError, pulling(place, to, "someone/else"))
    assert message == f"someone/else: {title} has no such repository, or it is private"
    message = refused(ModelError, pulling(place, to, revision="v9"))
    assert message.startswith(f"{REPO}: {title} has no revision 'v9' of this repository")
    for status in (401, 403):
        remote.file_status = status
        message = refused(ModelError, pulling(place, to))
        assert message.startswith(f"{REPO}: {title} refuses access ({status})")
    remote.file_status = 200
    remote.status = 403
    assert f"{title} refuses access (403)" in refused(ModelError, pulling(place, to))
    remote.code = "GatedRepo"
    if place == "huggingface":
        message = refused(ModelError, pulling(place, to))
        assert message.endswith("requires accepting the terms of this model first")
    remote.status, remote.code = 418, ""
    assert f"{title} returned an error (418)" in refused(ModelError, pulling(place, to))
    remote.status = 200
    server.repositories[REPO] = Repository({"model.gguf": b"x"})
    assert "config.json or the weights (safetensors or .bin) are missing" in refused(ModelError, pulling(place, to))
    assert names(tmp_path) <= {".model.partial"}


def test_a_hub_that_cannot_be_reached_is_named(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http:" + "//127.0.0.1:9")
    message = refused(ModelError, pulling("huggingface", tmp_path / "model"))
    assert "Hugging Face cannot be reached at http:" in message
    assert names(tmp_path) == set()


def test_a_download_that_breaks_off_keeps_its_partial_file(server: HubServer, tmp_path: Path) -> None:
    server.cut[WEIGHTS] = [100_000, 0, 0, 0, 0, 0]
    messages: list[str] = []
    message = refused(ModelError, pulling("huggingface", tmp_path / "model", log=messages.append))
    assert message.startswith(f"{WEIGHTS}: {REPO}") and message.endswith("; the downloaded part is kept")
    assert f"{WEIGHTS}: the connection was lost, resuming" in messages
    assert (tmp_path / ".model.partial" / (WEIGHTS + catalogue.PART)).stat().st_size == 100_000


@both
def test_offline_mode_makes_no_request(
    place: str, server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, luthier: Callable[..., Result]
) -> None:
    target = pull(REPO, tmp_path / "model", place)
    server.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert pull(REPO, target, place) == target  # a complete model needs no network
    for argv in ([], ["--from", "huggingface"]):
        done = luthier("pull", REPO, "--to", tmp_path / "other", *argv)
        assert done.code == 2 and "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids downloading it" in done.err
        assert "fix: unset HF_HUB_OFFLINE" in done.err
    assert server.requests == []


@both
def test_a_full_disk_and_a_file_size_limit_are_reported(place: str, server: HubServer, tmp_path: Path) -> None:
    remote = server.repositories[REPO]
    remote.listed_sizes[WEIGHTS] = 10**17
    message = refused(UserError, pulling(place, tmp_path / "model"))
    assert "needs 100000000.0 GB, and the disk mounted at" in message
    assert server.fetched("config.json") == []
    remote.listed_sizes.clear()
    if place == "huggingface":  # the other client retries for half a minute first
        resource = pytest.importorskip("resource", reason="this system has no limits of resources")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
        try:
            message = refused(UserError, pulling(place, tmp_path / "model"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert message == (
            f"{WEIGHTS}: the file would exceed the file size limit (File too large); the downloaded part is kept"
        )
    pull(REPO, tmp_path / "model", place)
    assert names(tmp_path) == {"model"}
