"""Token ids beyond the embedding table: refused before weights are read if a row, a prompt or the template uses one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from luthier.errors import DataError, TemplateError
from luthier.inference.generation import Generator
from luthier.models.chat_format import load_chat_format
from luthier.types import Message
from luthier.verbs.chat import chat
from tests.conftest import TOKENIZER, Result, make_model
from tests.helpers.families import FORMS

Run = Callable[..., Result]
ROWS = 640  # of the embedding table of the tests' models


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a model whose tokenizer has a word and Phi-3's markers beyond the embedding table."""
    path = tmp_path / "model"
    make_model("llama").save_pretrained(path)
    shutil.copytree(TOKENIZER, path, dirs_exist_ok=True)
    hf: Any = AutoTokenizer.from_pretrained(path)
    texts = [f"unused{i}" for i in range(max(0, ROWS - len(hf)))]  # fill the table
    hf.add_tokens([AddedToken(t, special=False, normalized=False) for t in [*texts, "lighthouse"]])
    markers = [AddedToken(t, special=True, normalized=False) for t in FORMS["phi3"].markers]
    hf.add_tokens(markers, special_tokens=True)
    assert hf.convert_tokens_to_ids("lighthouse") >= ROWS
    hf.save_pretrained(path)
    return path


def write(path: Path, *replies: str) -> Path:
    turns = [[{"role": "user", "content": "Who?"}, {"role": "assistant", "content": r}] for r in replies]
    path.write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    return path


def test_unused_tokens_beyond_the_table_change_nothing(luthier: Run, model: Path, tmp_path: Path) -> None:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, ROWS + 3]}))
    data = write(tmp_path / "rows.jsonl", "The keeper.", "Nobody.")
    assert luthier("check", "--model", model, "--data", data).code == 0
    arguments = ("--output-dir", tmp_path / "run", "--set", "train.max_steps=2")
    trained = luthier("train", "--model", model, "--data", data, *arguments)
    assert trained.code == 0, trained.err
    assert max(load_chat_format(model).stop_ids) < ROWS


@pytest.mark.parametrize("option", ["data", "data.eval"])
def test_a_row_with_such_a_token_is_refused_before_weights_are_read(
    option: str, luthier: Run, model: Path, tmp_path: Path
) -> None:
    shutil.move(model / "model.safetensors", tmp_path / "weights")
    good, bad = write(tmp_path / "good.jsonl", "The keeper.", "Nobody."), write(tmp_path / "bad.jsonl", "A lighthouse.")
    rows = ("--data", bad) if option == "data" else ("--data", good, "--set", f"data.eval={bad}")
    ids = load_chat_format(model).tokenizer.token_id("lighthouse")
    for verb, more in (("check", ()), ("train", ("--output-dir", tmp_path / "run"))):
        result = luthier(verb, "--model", model, *rows, *more)
        assert result.code == 2
        expected = f"contains lighthouse, token {ids} of the tokenizer; the model's embedding table has {ROWS} rows"
        assert expected in result.out + result.err
        assert "leave the token out, or use the checkpoint that the tokenizer belongs to" in result.err


def test_a_row_that_is_cut_before_such_a_token_is_trained(luthier: Run, model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", "The keeper of the lamp and of the stairs " * 4 + "lighthouse")
    settings = ("--set", "data.max_length=32")
    result = luthier("check", "--model", model, "--data", data, *settings)
    assert result.code == 0, result.err


def test_a_prompt_with_such_a_token_is_refused(model: Path) -> None:
    conversation = chat(model)
    with pytest.raises(DataError, match=f"the prompt contains lighthouse, token .* table has {ROWS} rows"):
        conversation.send("Where is the lighthouse?")
    assert conversation.history == []
    generator: Generator = conversation.generator
    with pytest.raises(DataError, match="the prompt contains lighthouse"):
        generator.chat_format.prompt_ids([Message("user", "lighthouse")])


def test_a_template_with_such_a_token_is_refused(luthier: Run, model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", "The keeper.", "Nobody.")
    result = luthier("check", "--model", model, "--data", data, "--set", "data.template=phi3")
    assert result.code == 2
    assert "template phi3 contains <|" in result.err and f"the model's embedding table has {ROWS} rows" in result.err
    assert "choose another template" in result.err and result.out.count("refused") == 0
    with pytest.raises(TemplateError, match="embedding table"):
        load_chat_format(model, "phi3")


def test_the_model_s_own_template_is_checked_too(model: Path) -> None:
    turns = "{% for m in messages %}[{{ m.role }}]{{ m.content }}lighthouse{% endfor %}"
    (model / "chat_template.jinja").write_text(turns + "{% if add_generation_prompt %}[assistant]{% endif %}")
    with pytest.raises(TemplateError, match="template jinja contains lighthouse, token"):
        load_chat_format(model)
