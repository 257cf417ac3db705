"""``pull`` from ModelScope and Hugging Face: their real clients against a server on loopback."""

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
from luthier.errors import ConfigError, MissingPackageError, ModelError
from luthier.hub import catalogue, download
from luthier.hub.catalogue import RemoteFile, Source
from luthier.verbs.pull import pull
from tests.conftest import Result
from tests.helpers.hub_server import COMMIT, REPO, WEIGHTS, HubServer, names, pulling, refused

both = pytest.mark.parametrize("place", hub.HUBS)


# --- what comes -----------------------------------------------------------------------------------------------------


@both
def test_a_model_comes_whole_and_loads(
    place: str, server: HubServer, tmp_path: Path, model_dir: Callable[[str], Path]
) -> None:
    content, said = server.repositories[REPO].files, list[str]()
    target = pull(REPO, tmp_path / "model", place, say=said.append)
    assert names(target) == {*names(model_dir("llama")), hub.MANIFEST}
    assert all((target / n).read_bytes() == content[n] for n in names(target) - {hub.MANIFEST})
    assert names(tmp_path) == {"model"}  # no part, no lock, no client's cache
    model, told = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    assert model(**told("hello", return_tensors="pt")).logits.isfinite().all() and model.dtype == torch.float32
    manifest = json.loads((target / hub.MANIFEST).read_text())
    assert (manifest["name"], manifest["source"]) == (REPO, f"{place}:{REPO}")
    assert manifest["commit"] == (COMMIT if place == "huggingface" else "master")
    whole = sum(len(content[n]) for n in manifest["files"])
    title = {"modelscope": "ModelScope", "huggingface": "Hugging Face"}[place]
    assert said[0] == f"{REPO} from {title}: {len(manifest['files'])} files, {download.human(whole)}"
    assert said[-1] == f"{target}: ready"


@both
def test_again_it_is_only_verified(place: str, server: HubServer, tmp_path: Path) -> None:
    target = pull(REPO, tmp_path / "model", place)
    stamps = {p: p.stat().st_mtime_ns for p in target.iterdir()}
    server.requests.clear()
    said: list[str] = []
    pull(REPO, tmp_path / "model", place, say=said.append)
    assert said == [f"{target}: there already, and whole"]
    assert server.requests == []
    assert {p: p.stat().st_mtime_ns for p in target.iterdir()} == stamps


@both
def test_of_a_damaged_directory_only_the_damage_comes_again(place: str, server: HubServer, tmp_path: Path) -> None:
    target = pull(REPO, tmp_path / "model", place)
    whole = (target / "config.json").read_bytes()
    (target / "config.json").write_bytes(whole[:-2] + b" }")
    server.requests.clear()
    said: list[str] = []
    pull(REPO, target, place, say=said.append)
    assert said[0] == f"{target}: is damaged, fetching what is wrong again"
    assert (target / "config.json").read_bytes() == whole
    assert server.fetched("config.json") == [""]
    assert server.fetched(WEIGHTS) == []
    assert names(tmp_path) == {"model"}


def test_weights_are_safetensors_where_there_are_any_and_shards_where_there_is_an_index() -> None:
    def chosen(*listed: str) -> list[str]:
        files = [RemoteFile(n, 1) for n in ("config.json", "tokenizer.model", *listed)]
        return [f.path for f in catalogue.needed(Source("huggingface", REPO), files)][2:]

    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    bins = ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]
    assert chosen(*bins, *shards, "consolidated.safetensors") == shards
    assert chosen(*bins, "pytorch_model.pth", "flax_model.msgpack", "modeling.py") == bins
    assert chosen("pytorch_model.bin", "tf_model.h5") == ["pytorch_model.bin"]
    assert chosen(WEIGHTS, *bins) == [WEIGHTS]
    for missing in ((), ("model.gguf",), ("x/model.safetensors",)):
        assert "is not a model that can be read" in refused(ModelError, lambda n=missing: chosen(*n))


def test_names_lead_to_repositories(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(name: str, hub_: str | None = None, revision: str | None = None) -> list[str]:
        kept, found = catalogue.sources(name, hub_, revision, ("smollm2-135m",))
        return [kept, *(f"{s}@{s.revision}" if s.revision else str(s) for s in found)]

    yi = ["yi-6b-chat", "modelscope:01ai/Yi-6B-Chat", "huggingface:01-ai/Yi-6B-Chat"]
    assert look("yi-6b-chat") == look("Yi-6B-Chat") == look("01ai/Yi-6B-Chat") == yi
    assert look("01-ai/Yi-6B-Chat") == [yi[0], yi[2], yi[1]]  # that is its name on Hugging Face
    assert look("01ai/Yi-6B-Chat", "huggingface") == [yi[0], yi[2]]
    assert look("yi-6b-chat", None, "v1") == [yi[0], yi[1] + "@v1"]  # a revision means one place
    assert look("baichuan2-7b-chat")[1] == "modelscope:baichuan-inc/Baichuan2-7B-Chat@v1.0.4"
    assert look("a/b") == ["a/b", "modelscope:a/b"]  # the same id elsewhere may be someone else's
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    assert look("yi-6b-chat") == [yi[0], yi[2]]
    assert look("a/b", None, "v1") == ["a/b", "huggingface:a/b@v1"]
    for name in ("yi6b", "../up", "a/b/c", "/abs/olute"):
        assert f"model '{name}' is unknown; known: smollm2-135m" in refused(ModelError, lambda n=name: look(n))
    assert "hub 'modelscop' is unknown" in refused(ConfigError, lambda: look("a/b", "modelscop"))
    assert "ModelScope needs the package" in refused(MissingPackageError, pulling("modelscope", Path("x"), "a/b"))


def test_a_family_comes_from_the_other_hub_where_one_cannot_be_reached(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repositories["microsoft/Phi-3-mini-4k-instruct"] = server.repositories[REPO]
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http:" + "//127.0.0.1:9")
    said: list[str] = []
    target = library.pull("phi-3-mini-4k-instruct", tmp_path / "model", say=said.append)
    assert "ModelScope cannot be reached at" in said[0] and said[0].endswith("; trying Hugging Face")
    assert json.loads((target / hub.MANIFEST).read_text())["source"].startswith("huggingface:microsoft/")
    assert "cannot be reached at" in refused(ModelError, lambda: pull("a/b", tmp_path / "other"))
    assert names(tmp_path) == {"model"}


# --- what is there already ------------------------------------------------------------------------------------------


def test_another_model_or_other_files_are_never_replaced(server: HubServer, tmp_path: Path) -> None:
    server.repositories["b/c"] = server.repositories[REPO]
    target = pull(REPO, tmp_path / "model", "huggingface", revision="main")
    assert pull(REPO, target, revision="main") == pull(REPO, target, revision=COMMIT) == target
    held = f"{target}: holds {REPO} from huggingface:{REPO} at revision main, not what was asked for"
    assert refused(ModelError, pulling("huggingface", target, "b/c")) == held
    assert refused(ModelError, pulling("modelscope", target)) == held
    assert refused(ModelError, pulling("huggingface", target, revision="v2")) == held
    assert refused(ModelError, lambda: pull("smollm2-135m", target)) == held
    (target / "notes.txt").write_text("mine")
    assert pull(REPO, target) == target
    (target / "config.json").write_text("{}")
    assert "is, or holds, something else" in refused(ModelError, pulling("huggingface", target))
    (tmp_path / "file").write_text("mine")
    assert "is, or holds, something else" in refused(ModelError, pulling("huggingface", tmp_path / "file"))
    (tmp_path / "empty").mkdir()
    assert pull(REPO, tmp_path / "empty", "huggingface") == tmp_path / "empty"


def test_one_pull_at_a_time(server: HubServer, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".model.lock"):
        assert "is being pulled by another" in refused(ModelError, pulling("huggingface", tmp_path / "model"))


def test_the_embedded_model_comes_from_no_hub() -> None:
    for kwargs in ({"hub": "modelscope"}, {"revision": "main"}):
        message = refused(ConfigError, lambda k=kwargs: pull("smollm2-135m", **k))
        assert "so a hub or a revision would be ignored" in message


@both
def test_progress_reaches_the_whole(place: str, server: HubServer, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    pull(REPO, tmp_path / "model", place, progress=lambda *at: seen.append(at))
    whole = sum(
        len(server.repositories[REPO].files[n])
        for n in json.loads((tmp_path / "model" / hub.MANIFEST).read_text())["files"]
    )
    assert seen[0] == (0, whole) and seen[-1] == (whole, whole)


def test_the_command(
    server: HubServer, tmp_path: Path, luthier: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = luthier("pull", REPO, "--from", "modelscope", "--revision", "master")
    target = tmp_path / "luthier" / "models" / "someone--tiny-chat@master"
    assert (done.code, done.out) == (0, f"{target}\n")
    assert f"{WEIGHTS}: whole, " in done.err

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("luthier.verbs.pull.pull", stop)
    done = luthier("pull", REPO)
    assert done.code == 130
    assert "to go on: run the same command again" in done.err
