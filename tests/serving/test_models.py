"""The models of ``luthier serve``: which directories can be served together, their names, and vLLM's command."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import luthier as library
from luthier import personas
from luthier._util.installation import install_command
from luthier.adapters.directory import load
from luthier.cli.common import size_in_bytes
from luthier.errors import ConfigError, MissingPackageError
from luthier.inference.sampling import Sampling
from luthier.serving import app, vllm
from luthier.serving.engine import Engine
from luthier.serving.head import SlicedHead, slice_head
from luthier.serving.models import open_models, resolve_models
from luthier.serving.requests import Request
from luthier.types import Message
from tests.conftest import Result, make_model
from tests.helpers.serving import generate, train

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def run(model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(model_dir("llama"), tmp_path_factory.mktemp("places") / "marlow", "You are Marlow.")


@pytest.fixture(scope="module")
def other(model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(model_dir("qwen2"), tmp_path_factory.mktemp("others") / "tea", "")


def names(*paths: Path, **named: Path) -> list[str]:
    return [p.name for p in resolve_models(paths, **named)]


def test_models_are_named_after_their_directories(run: Path, model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    base = model_dir("llama")
    assert names(run) == names(base, run) == names(run / "adapter") == ["marlow", "llama"]
    assert names(base) == ["llama"]
    stock = tmp_path / "stock"
    shutil.copytree(run / "adapter", stock)
    (stock / "luthier.json").unlink()  # as PEFT writes it, without a record of the base model
    assert names(model=base, adapter=stock) == ["stock", "llama"]
    assert names(run, model=base, adapter=stock) == ["marlow", "stock", "llama"]
    copy = tmp_path / "copy-of-llama"
    shutil.copytree(base, copy)
    assert names(copy, run) == ["marlow", "llama"]  # the same weights in another directory


def test_models_that_cannot_share_a_server_are_refused(
    run: Path, other: Path, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no directory was given"):
        resolve_models([])
    with pytest.raises(
        ConfigError, match=r"tea and marlow do not share a base model: .*llama and .*qwen2 are different models"
    ):
        resolve_models([run, other])
    with pytest.raises(ConfigError, match="do not share a base model"):
        resolve_models([model_dir("qwen2"), run])
    with pytest.raises(ConfigError, match="two models would have the name marlow"):
        resolve_models([run, run])
    settings: list[tuple[dict[str, Any], str]] = [
        ({"load_in_4bit": True}, "they were trained on differently quantised weights"),
        ({"rope_theta": 5e4}, "their rope_theta is None and 50000"),
    ]
    for change, message in settings:
        path = model_dir("llama")
        tuned = train(path, tmp_path / next(iter(change)), "", model={"path": str(path), **change})
        with pytest.raises(ConfigError, match=message):
            resolve_models([run, tuned])
        if "rope_theta" in change:
            with pytest.raises(ConfigError, match="vLLM would ignore its rope_theta 50000"):
                vllm.command(resolve_models([tuned]), "127.0.0.1", 1, "auto")
        else:
            assert "vLLM uses its unquantised weights" in vllm.notes(resolve_models([tuned]))[-1]


def test_vllm_chooses_tokens_as_luthier_serve_does(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """The base model's generation_config.json, which vLLM applies by default, does not decide."""
    base = tmp_path / "base"
    shutil.copytree(model_dir("llama"), base)
    published = {"do_sample": True, "temperature": 0.6, "top_k": 5, "max_new_tokens": 9, "repetition_penalty": 1.1}
    (base / "generation_config.json").write_text(json.dumps({**published, "eos_token_id": 2}))
    sampled = {"do_sample": True, "temperature": 0.9, "top_p": 0.8, "top_k": 0, "repetition_penalty": 1.3}
    one = train(base, tmp_path / "one", "", model={"path": str(base)})
    other = train(base, tmp_path / "other", "", model={"path": str(base)}, generation=sampled)
    longer = {**sampled, "max_new_tokens": 77, "no_repeat_ngram_size": 4}
    third = train(base, tmp_path / "third", "", model={"path": str(base)}, generation=longer)
    greedy = {"temperature": 0.0, "repetition_penalty": 1.0}
    cases: list[tuple[list[Path], dict[str, Any], str]] = [
        ([base], greedy, ""),
        ([one], greedy, "replies to requests without max_tokens may fill the context"),
        ([other], sampled, "vLLM also uses the generation settings of the training for base"),
        ([other, third], sampled, "vLLM has no setting for generation.no_repeat_ngram_size"),
        ([one, other], greedy, "vLLM has one sampling for all models: it replies greedily"),
    ]
    for paths, expected, note in cases:
        models = resolve_models(paths)
        options = vllm.chat_options(models)
        file = Path(options[options.index("--generation-config") + 1]) / "generation_config.json"
        written = json.loads(file.read_text())
        assert {k: v for k, v in written.items() if k in {*published, *sampled}} == expected, paths
        notes = vllm.notes(models)
        assert note in " ".join(notes) and (notes == []) == (not note)


def test_a_quantised_base_is_served_quantised(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    path = model_dir("llama")
    tuned = train(path, tmp_path / "small", "", model={"path": str(path), "load_in_4bit": True})
    model, routes, models = open_models(resolve_models([tuned]))
    ids = models[0].chat_format.prompt_ids(library.chat(tuned).messages() or _hello())
    expected = library.chat(tuned).generator.reply(_hello(), Sampling(max_new_tokens=9))
    request = Request(ids, models[0].chat_format.stop_ids, Sampling(max_new_tokens=9), "small")
    tokens = generate(Engine(model, routes), [request])[0]
    assert models[0].chat_format.tokenizer.decode(tokens).startswith(expected.text)


def _hello() -> list[Any]:
    return [Message("user", "Hello")]


def test_a_merged_model_and_an_adapter_directory_reply_like_the_run(run: Path, tmp_path: Path) -> None:
    library.merge(run, tmp_path / "merged")
    ids = library.chat(run).generator.chat_format.prompt_ids(_hello())
    replies = []
    for path in (run, run / "adapter", tmp_path / "merged"):
        model, routes, models = open_models(resolve_models([path]))
        request = Request(ids, models[0].chat_format.stop_ids, Sampling(max_new_tokens=12), models[0].adapter)
        replies += generate(Engine(model, routes), [request])
    assert replies[0] == replies[1] == replies[2]


def test_a_base_without_a_template_uses_the_template_of_the_training(
    model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model_dir("llama"), bare)
    for name in ("chat_template.jinja",):
        (bare / name).unlink(missing_ok=True)
    file = bare / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config.pop("chat_template", None)
    file.write_text(json.dumps(config))
    tuned = train(bare, tmp_path / "tuned", "", data={"train": [str(personas.TRAIN)], "template": "chatml"})
    models = open_models(resolve_models([tuned]))[2]
    assert [m.chat_format.template.name for m in models] == ["chatml", "chatml"]
    with pytest.raises(library.UserError, match="the model has no chat template"):
        open_models(resolve_models([bare]))
    argv = vllm.chat_options(resolve_models([tuned]))
    assert "<|im_start|>" in Path(argv[argv.index("--chat-template") + 1]).read_text(encoding="utf-8")
    stops = json.loads((Path(argv[argv.index("--generation-config") + 1]) / "generation_config.json").read_text())
    assert stops["eos_token_id"] == list(models[0].chat_format.stop_ids)


def test_the_vllm_command_names_base_and_adapters(luthier: Run, run: Path, model_dir: Callable[[str], Path]) -> None:
    done = luthier("serve", run, "--engine", "vllm", "--print", "--port", 9000, "--api-key", "a b")
    assert done.code == 0
    words = shlex.split(done.out)
    assert words[:4] == ["VLLM_API_KEY=a b", "vllm", "serve", str(model_dir("llama"))]
    rank = load(run / "adapter").lora.r
    assert words[words.index("--max-lora-rank") + 1] == str(rank)
    assert words[words.index("--lora-modules") + 1 :][0] == json.dumps({"name": "marlow", "path": str(run / "adapter")})
    assert words[words.index("--served-model-name") + 1] == "llama"
    assert words[words.index("--host") + 1 :][:3] == ["127.0.0.1", "--port", "9000"]
    assert "vLLM also adds the system prompt of the training for llama: 'You are Marlow.'" in done.err
    plain = shlex.split(luthier("serve", model_dir("llama"), "--engine", "vllm", "--print").out)
    assert plain[0] == "VLLM_API_KEY=KEY" and "--enable-lora" not in plain


def test_vllm_replaces_the_process_if_it_is_installed(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, luthier: Run
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = luthier("serve", run, "--engine", "vllm")
    assert done.code == 2 and "the program vllm is not installed" in done.err
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    called: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *args: called.append(args))
    messages: list[str] = []
    vllm.hand_over([run], "127.0.0.1", 8000, None, "auto", None, None, False, messages.append)
    path, argv, environment = called[0]
    assert path == str(program) and argv[:2] == ["vllm", "serve"]
    assert messages[-1] == f"API key: {environment['VLLM_API_KEY']}" and environment["VLLM_API_KEY"] not in argv


def test_a_layout_that_needs_the_models_own_code_is_refused_for_vllm(
    run: Path, model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Published:
        layer_rules = ()

    monkeypatch.setattr(vllm, "family_of", lambda _: Published)
    with pytest.raises(ConfigError, match="vLLM needs the model's own code for this layout"):
        vllm.command(resolve_models([run]), "127.0.0.1", 8000, "auto")


def test_sizes_are_read_with_their_units() -> None:
    sizes = {"2GB": 2e9, "500 MB": 5e8, "1.5gb": 1.5e9, "7kB": 7e3, "9B": 9}
    assert {text: size_in_bytes("--memory", text) for text in sizes} == sizes


def test_wrong_options_are_refused(luthier: Run, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for argv, message in (
        (("--dtype", "int3"), "--dtype int3: is not a dtype"),
        (("--engine", "magic"), "--engine magic: is not an engine"),
        (("--print",), "--print would be ignored: only vLLM is started with a command"),
        (("--memory", "2 apples"), "--memory 2 apples: is not a size"),
        (("--engine", "vllm", "--memory", "2GB"), "--memory would be ignored: it is a setting of other engines"),
        (("--engine", "vllm", "--no-fused"), "--no-fused would be ignored"),
    ):
        done = luthier("serve", run, *argv)
        assert done.code == 2 and message in done.err
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        port = occupied.getsockname()[1]
        done = luthier("serve", run, "--port", port)
    assert done.code == 2 and f"127.0.0.1:{port}: cannot listen on this address" in done.err
    monkeypatch.setattr(app, "_INSTALLED", False)
    with pytest.raises(MissingPackageError, match="serving needs FastAPI and uvicorn") as e:
        library.serve([run])
    assert e.value.fix == install_command("serve")


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 8, 100])
def test_a_sliced_head_computes_the_same_logits(rows: int) -> None:
    head = torch.nn.Linear(24, 4000)
    x = torch.randn(rows, 1, 24)
    torch.testing.assert_close(SlicedHead(head)(x), head(x), rtol=1e-5, atol=1e-6)
    model = make_model("llama")
    before = model(torch.tensor([[5, 6, 7]])).logits
    slice_head(model)
    assert isinstance(model.lm_head, SlicedHead)
    torch.testing.assert_close(model(torch.tensor([[5, 6, 7]])).logits, before, rtol=1e-5, atol=1e-6)
