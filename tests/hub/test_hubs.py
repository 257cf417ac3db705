"""``pull`` from ModelScope and Hugging Face: the real clients with a local server."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

import luthier as library
from luthier import hub
from luthier._util import files
from luthier._util.installation import install_command
from luthier.errors import ConfigError, MissingPackageError, ModelError
from luthier.hub import catalogue
from luthier.hub.catalogue import RemoteFile, Source
from luthier.verbs.pull import pull
from tests.conftest import Result
from tests.helpers.hub_server import COMMIT, REPO, WEIGHTS, HubServer, names, pulling, refused

both = pytest.mark.parametrize("place", hub.HUBS)


# --- downloads ------------------------------------------------------------------------------------------------------


@both
def test_a_pulled_model_is_complete_and_loads(
    place: str, server: HubServer, tmp_path: Path, model_dir: Callable[[str], Path]
) -> None:
    content, messages = server.repositories[REPO].files, list[str]()
    target = pull(REPO, tmp_path / "model", place, log=messages.append)
    assert names(target) == {*names(model_dir("llama")), hub.MANIFEST}
    assert all((target / n).read_bytes() == content[n] for n in names(target) - {hub.MANIFEST})
    assert names(tmp_path) == {"model"}  # no partial file, no lock, no cache of the client
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    assert model(**tokenizer("hello", return_tensors="pt")).logits.isfinite().all() and model.dtype == torch.float32
    manifest = json.loads((target / hub.MANIFEST).read_text())
    assert (manifest["name"], manifest["source"]) == (REPO, f"{place}:{REPO}")
    assert manifest["revision"] is None
    assert manifest["resolved_revision"] == (COMMIT if place == "huggingface" else "master")
    assert manifest["commit"] == (COMMIT if place == "huggingface" else None)
    total = sum(len(content[n]) for n in manifest["files"])
    title = {"modelscope": "ModelScope", "huggingface": "Hugging Face"}[place]
    assert messages[0] == f"{REPO} from {title}: {len(manifest['files'])} files, {files.human(total)}"
    assert messages[-1] == f"{target}: ready"


@both
def test_pulling_a_complete_model_again_only_verifies_it(place: str, server: HubServer, tmp_path: Path) -> None:
    target = pull(REPO, tmp_path / "model", place)
    stamps = {p: p.stat().st_mtime_ns for p in target.iterdir()}
    server.requests.clear()
    messages: list[str] = []
    pull(REPO, tmp_path / "model", place, log=messages.append)
    assert messages == [f"{target}: already complete, nothing to download"]
    assert server.requests == []
    assert {p: p.stat().st_mtime_ns for p in target.iterdir()} == stamps


def test_a_manifest_of_an_earlier_version_is_accepted(server: HubServer, tmp_path: Path) -> None:
    """It recorded ModelScope's default branch as the commit, and no resolved revision."""
    target = pull(REPO, tmp_path / "model", "modelscope")
    file = target / hub.MANIFEST
    manifest = json.loads(file.read_text())
    del manifest["resolved_revision"]
    file.write_text(json.dumps({**manifest, "commit": "master"}))
    server.requests.clear()
    assert pull(REPO, target, "modelscope", "master") == target
    assert server.requests == []
    assert "not the requested model" in refused(ModelError, pulling("modelscope", target, revision="main"))


@both
def test_only_the_damaged_files_of_a_directory_are_downloaded_again(
    place: str, server: HubServer, tmp_path: Path
) -> None:
    target = pull(REPO, tmp_path / "model", place)
    original = (target / "config.json").read_bytes()
    (target / "config.json").write_bytes(original[:-2] + b" }")
    server.requests.clear()
    messages: list[str] = []
    pull(REPO, target, place, log=messages.append)
    assert messages[0] == f"{target}: is damaged, downloading the damaged files again"
    assert (target / "config.json").read_bytes() == original
    assert server.fetched("config.json") == [""]
    assert server.fetched(WEIGHTS) == []
    assert names(tmp_path) == {"model"}


def test_safetensors_are_preferred_to_pickles_and_shards_need_an_index() -> None:
    def chosen(*listed: str) -> list[str]:
        files = [RemoteFile(n, 1) for n in ("config.json", "tokenizer.model", *listed)]
        return [f.path for f in catalogue.model_files(Source("huggingface", REPO), files)][2:]

    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    bins = ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]
    assert chosen(*bins, *shards, "consolidated.safetensors") == shards
    assert chosen(*bins, "pytorch_model.pth", "flax_model.msgpack", "modeling.py") == bins
    assert chosen("pytorch_model.bin", "tf_model.h5") == ["pytorch_model.bin"]
    assert chosen(WEIGHTS, *bins) == [WEIGHTS]
    for missing in ((), ("model.gguf",), ("x/model.safetensors",)):
        assert "contains no readable model" in refused(ModelError, lambda n=missing: chosen(*n))


def test_names_are_resolved_to_repositories(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(name: str, hub_: str | None = None, revision: str | None = None) -> list[str]:
        stored_as, sources = catalogue.sources(name, hub_, revision, ("smollm2-135m",))
        return [stored_as, *(f"{s}@{s.revision}" if s.revision else str(s) for s in sources)]

    yi = ["yi-6b-chat", "modelscope:01ai/Yi-6B-Chat", "huggingface:01-ai/Yi-6B-Chat"]
    assert resolve("yi-6b-chat") == resolve("Yi-6B-Chat") == resolve("01ai/Yi-6B-Chat") == yi
    assert resolve("01-ai/Yi-6B-Chat") == [yi[0], yi[2], yi[1]]  # the name on Hugging Face
    assert resolve("01ai/Yi-6B-Chat", "huggingface") == [yi[0], yi[2]]
    assert resolve("yi-6b-chat", None, "v1") == [yi[0], yi[1] + "@v1"]  # a revision belongs to one repository
    assert resolve("baichuan2-7b-chat")[1] == "modelscope:baichuan-inc/Baichuan2-7B-Chat@v1.0.4"
    assert resolve("a/b") == ["a/b", "modelscope:a/b"]  # the same id elsewhere may be someone else's
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    assert resolve("yi-6b-chat") == [yi[0], yi[2]]
    assert resolve("a/b", None, "v1") == ["a/b", "huggingface:a/b@v1"]
    for name in ("yi6b", "../up", "a/b/c", "/abs/olute"):
        assert f"model '{name}' is unknown; known: smollm2-135m" in refused(ModelError, lambda n=name: resolve(n))
    assert "hub 'modelscop' is unknown" in refused(ConfigError, lambda: resolve("a/b", "modelscop"))
    with pytest.raises(MissingPackageError, match="ModelScope needs the package modelscope-hub") as e:
        pulling("modelscope", Path("x"), "a/b")()
    assert e.value.fix == f"{install_command('modelscope')}, or use --from huggingface"


def test_a_family_falls_back_to_the_other_hub_if_the_first_cannot_be_reached(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repositories["microsoft/Phi-3-mini-4k-instruct"] = server.repositories[REPO]
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http:" + "//127.0.0.1:9")
    messages: list[str] = []
    target = library.pull("phi-3-mini-4k-instruct", tmp_path / "model", log=messages.append)
    assert "ModelScope cannot be reached at" in messages[0] and messages[0].endswith("; trying Hugging Face")
    assert json.loads((target / hub.MANIFEST).read_text())["source"].startswith("huggingface:microsoft/")
    assert "cannot be reached at" in refused(ModelError, lambda: pull("a/b", tmp_path / "other"))
    assert names(tmp_path) == {"model"}


# --- existing directories -------------------------------------------------------------------------------------------


def test_another_model_or_other_files_are_never_replaced(server: HubServer, tmp_path: Path) -> None:
    server.repositories["b/c"] = server.repositories[REPO]
    target = pull(REPO, tmp_path / "model", "huggingface", revision="main")
    assert pull(REPO, target, revision="main") == pull(REPO, target, revision=COMMIT) == target
    message = f"{target}: contains {REPO} from huggingface:{REPO} at revision main, not the requested model"
    assert refused(ModelError, pulling("huggingface", target, "b/c")) == message
    assert refused(ModelError, pulling("modelscope", target)) == message
    assert refused(ModelError, pulling("huggingface", target, revision="v2")) == message
    assert refused(ModelError, lambda: pull("smollm2-135m", target)) == message
    (target / "notes.txt").write_text("mine")
    assert pull(REPO, target) == target
    (target / "config.json").write_text("{}")
    assert "already exists with other content, which is never overwritten" in refused(
        ModelError, pulling("huggingface", target)
    )
    (tmp_path / "file").write_text("mine")
    assert "already exists with other content, which is never overwritten" in refused(
        ModelError, pulling("huggingface", tmp_path / "file")
    )
    (tmp_path / "empty").mkdir()
    assert pull(REPO, tmp_path / "empty", "huggingface") == tmp_path / "empty"


def test_two_processes_cannot_pull_to_the_same_directory(server: HubServer, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".model.lock"):
        assert "is being pulled by another" in refused(ModelError, pulling("huggingface", tmp_path / "model"))


def test_the_embedded_model_refuses_a_hub_and_a_revision() -> None:
    for kwargs in ({"hub": "modelscope"}, {"revision": "main"}):
        message = refused(ConfigError, lambda k=kwargs: pull("smollm2-135m", **k))
        assert "so a hub or a revision would be ignored" in message


@both
def test_progress_starts_at_zero_and_reaches_the_total(place: str, server: HubServer, tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []
    pull(REPO, tmp_path / "model", place, on_progress=lambda *report: reports.append(report))
    total = sum(
        len(server.repositories[REPO].files[n])
        for n in json.loads((tmp_path / "model" / hub.MANIFEST).read_text())["files"]
    )
    assert reports[0] == (0, total) and reports[-1] == (total, total)


def test_the_command_prints_the_directory_and_can_be_interrupted(
    server: HubServer, tmp_path: Path, luthier: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = luthier("pull", REPO, "--from", "modelscope", "--revision", "master")
    target = tmp_path / "luthier" / "models" / "someone--tiny-chat@master"
    assert (done.code, done.out) == (0, f"{target}\n")
    assert f"{WEIGHTS}: complete, " in done.err

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("luthier.verbs.pull.pull", stop)
    done = luthier("pull", REPO)
    assert done.code == 130
    assert "to resume: run the same command again" in done.err
