"""Recipes have the tutorials' settings, explain the corrected mistakes, and set the sampling that chat uses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers.generation import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

import luthier as library
from luthier import config as configs
from luthier import personas, recipes
from luthier.cli.common import RecipeOption
from luthier.errors import ConfigError
from luthier.inference.sampling import Sampling
from luthier.types import Message
from tests.conftest import ROOT, Result

Run = Callable[..., Result]
TUTORIALS = {
    "yi-6b-chat": "yi-6b-chat-lora.md",
    "phi-3-mini-4k-instruct": "phi-3-mini-4k-instruct-lora.md",
    "baichuan2-7b-chat": "baichuan2-7b-chat-lora.md",
    "glm-4-9b-chat": "glm-4-9b-chat-lora.md",
    "deepseek-7b-chat-qlora": "deepseek-7b-chat-qlora-4bit.md",
}
NAMES = list(TUTORIALS)
PERSONAS = {
    "yi-6b-chat": "现在你要扮演皇帝身边的女人--甄嬛.",
    "baichuan2-7b-chat": "现在你要扮演皇帝身边的女人--甄嬛.",
    "glm-4-9b-chat": "假设你是皇帝身边的女人--甄嬛。",
}
# the mistakes of each page, quoted from it; the recipe's comments must mention them
MISTAKES = {
    "yi-6b-chat": [
        "q_attn",
        "instrution",
        "torch.half",
        "trust_remote_code=True",
        "max_length=512",
        "enable_input_require_grads",
    ],
    "phi-3-mini-4k-instruct": [
        "gate_proj",
        "tokenizer.eos_toke",
        "add_generation_prompt=False",
        "tokenizer.encode('<|endoftext|>')[0]",
        "<|end|>",
        "You are a helpful assistant",
    ],
    "baichuan2-7b-chat": [
        "W_pack",
        "instrution",
        "torch.half",
        "max_length=512",
        "output/Baichuan3",
        "max_new_tokens=100",
    ],
    "glm-4-9b-chat": ["query_key_value", "attention_maskask", "./GLM4_lora", "top_k"],
    "deepseek-7b-chat-qlora": [
        "attention_maskask",
        "<｜end of sentence｜>",
        "load_in_4bit",
        "instrution",
    ],
}


def config_of(name: str, **overrides: Any) -> configs.RunConfig:
    return recipes.recipe(name, "m", "d.json", "r", overrides)


def test_every_recipe_is_a_complete_configuration() -> None:
    assert recipes.names() == sorted(NAMES)
    for name in NAMES:
        config = config_of(name)
        assert config.lora.target_modules is None  # every linear layer of the blocks
        assert config.data.system == PERSONAS.get(name, "")
        assert config.data.template == "auto"
        assert "path" not in recipes.read(name)["model"]
        assert library.recipe(name, model="m", data="d.json", output_dir="r") == config
    assert config_of("yi-6b-chat", **{"train.max_steps": 2}).train.max_steps == 2


@pytest.mark.parametrize("name", NAMES)
def test_the_settings_are_the_tutorials(name: str, tutorials: Path) -> None:
    page = (tutorials / TUTORIALS[name]).read_text(encoding="utf-8")
    config = config_of(name)

    def value_of(pattern: str) -> float:
        values = re.findall(pattern + r"\s*=\s*([0-9.]+(?:e-?[0-9]+)?)", page)
        assert values, pattern
        return float(values[-1])

    for key in (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "num_train_epochs",
        "learning_rate",
        "logging_steps",
        "save_steps",
    ):
        assert getattr(config.train, key) == value_of(key), key
    assert config.data.max_length == value_of("MAX_LENGTH")
    assert config.lora.r == float(re.findall(r"r=(\d+), ?# Lora", page)[0])
    assert config.lora.lora_alpha == value_of("lora_alpha")
    assert config.lora.lora_dropout == value_of("lora_dropout")
    assert config.train.gradient_checkpointing == bool(re.search(r"gradient_checkpointing=True", page))


@pytest.mark.parametrize("name", NAMES)
def test_the_sampling_is_the_tutorials(name: str, tutorials: Path) -> None:
    page = (tutorials / TUTORIALS[name]).read_text(encoding="utf-8")
    sampling = config_of(name).generation
    call = page[page.rindex('"max_length"' if name.startswith("glm") else ".generate(") :]
    options = dict(re.findall(r"(?:\b|\")(\w+)(?:=|\": )([0-9.]+|True)\b", call))
    if name in ("yi-6b-chat", "baichuan2-7b-chat"):
        assert sampling.do_sample
        for key in ("temperature", "top_p", "top_k", "repetition_penalty", "no_repeat_ngram_size"):
            assert getattr(sampling, key) == float(options[key]), key
        assert sampling.max_new_tokens == int(re.findall(r"max_length = (\d+)", page)[-1])
    elif name == "glm-4-9b-chat":
        options.pop("skip_special_tokens")  # an option of the decoding that follows
        assert options == {"max_length": str(sampling.max_new_tokens), "do_sample": "True", "top_k": "1"}
        assert not sampling.do_sample  # gives the same replies
    else:
        assert sampling.max_new_tokens == int(options["max_new_tokens"])
        assert "do_sample" not in options


def test_sampling_that_the_tutorial_omits_is_the_published_models() -> None:
    """From generation_config.json of deepseek-llm-7b-chat, with the default top_k; Phi-3's does not sample."""
    sampling = config_of("deepseek-7b-chat-qlora").generation
    assert (sampling.do_sample, sampling.temperature, sampling.top_p, sampling.top_k) == (True, 0.7, 0.95, 50)
    assert not config_of("phi-3-mini-4k-instruct").generation.do_sample


@pytest.mark.parametrize("name", NAMES)
def test_the_comments_mention_the_mistakes(name: str, tutorials: Path) -> None:
    page = (tutorials / TUTORIALS[name]).read_text(encoding="utf-8")
    comments = " ".join(line.partition("#")[2].strip() for line in recipes.text(name).splitlines())
    for mistake in MISTAKES[name]:
        assert mistake in page or mistake.replace("=", " = ") in page, f"{mistake} is not in the page"
        assert mistake in comments, mistake


def test_the_qlora_recipe_loads_four_bits() -> None:
    settings = recipes.read("deepseek-7b-chat-qlora")
    assert settings["model"]["load_in_4bit"] and settings["model"]["bnb_4bit_quant_type"] == "nf4"
    assert settings["train"]["optim"] == "paged_adamw_32bit"


def test_recipes_are_in_the_package_the_help_and_the_readmes() -> None:
    import tomllib

    facts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "recipes/*.yaml" in facts["tool"]["setuptools"]["package-data"]["luthier"]
    text = RecipeOption.__metadata__[0].help  # type: ignore[attr-defined]
    readmes = [(ROOT / r).read_text(encoding="utf-8") for r in ("README.md", "README.zh-CN.md")]
    for name in recipes.names():
        assert name in text
        assert all(f"`{name}`" in readme for readme in readmes)


@pytest.fixture
def model(model_dir: Callable[[str], Path]) -> Path:
    return model_dir("llama")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_and_is_recorded(
    name: str, luthier: Run, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    arch = {"phi-3-mini-4k-instruct": "phi3", "glm-4-9b-chat": "glm"}.get(name, "llama")
    run = tmp_path / "run"
    argv = ["--recipe", name, "--model", model_dir(arch), "--data", personas.TEAHOUSE]
    assert luthier("check", *argv).code == 0
    done = luthier("train", *argv, "--output-dir", run, "--set", "train.max_steps=2", "--set", "train.seed=7")
    assert done.code == 0, done.err
    recorded = yaml.safe_load((run / "run.yaml").read_text(encoding="utf-8"))
    expected = config_of(name, **{"train.max_steps": 2, "train.seed": 7}).dump()
    for section in ("lora", "train", "generation"):
        assert recorded[section] == expected[section]
    assert recorded["data"]["system"] == PERSONAS.get(name, "")
    summary = json.loads((run / "summary.json").read_text())
    assert len(summary["losses"]) == 2
    leaves = {"phi3": {"qkv_proj", "gate_up_proj"}, "glm": {"q_proj", "gate_up_proj"}}.get(
        arch, {"q_proj", "gate_proj"}
    )
    assert leaves | {"o_proj", "down_proj"} <= set(summary["target_modules"])


def test_init_writes_a_recipe_that_trains_without_changes(luthier: Run, model: Path, tmp_path: Path) -> None:
    for name in NAMES:
        file = tmp_path / f"{name}.yaml"
        argv = ["--model", model, "--data", personas.TEAHOUSE, "--output-dir", tmp_path / name, "--to", file]
        assert luthier("init", "--recipe", name, *argv).code == 0
        assert configs.load(file) == recipes.recipe(name, model, personas.TEAHOUSE, tmp_path / name)
        text = file.read_text(encoding="utf-8")
        assert all(line in text.splitlines() for line in recipes.text(name).splitlines())  # including comments
    assert luthier("train", tmp_path / f"{NAMES[0]}.yaml", "--set", "train.max_steps=1").code == 0
    assert (tmp_path / NAMES[0] / "adapter" / "luthier.json").is_file()
    assert "already exists" in luthier("init", "--recipe", name, *argv).err
    library.init(tmp_path / "bare.yaml", recipe=name)
    assert configs.load(tmp_path / "bare.yaml").model.path == Path("MODEL_DIR")


def test_mistakes_in_the_command_are_refused(luthier: Run, model: Path, tmp_path: Path) -> None:
    argv = ["--model", model, "--data", personas.TEAHOUSE]
    for verb in ("check", "train", "init"):
        done = luthier(verb, "--recipe", "yi-6b", *argv)
        assert done.code == 2
        assert "recipe 'yi-6b' is unknown; did you mean yi-6b-chat?" in done.err
        assert "fix: use --recipe yi-6b-chat" in done.err
    assert "the recipes are: baichuan2-7b-chat, deepseek" in luthier("check", "--recipe", "zzz", *argv).err
    file = tmp_path / "run.yaml"
    assert luthier("init", *argv, "--to", file).code == 0
    done = luthier("train", file, "--recipe", "yi-6b-chat")
    assert done.code == 2
    assert "run.yaml and --recipe yi-6b-chat both give the settings" in done.err
    fix = re.search(r"(init --recipe yi-6b-chat --to) FILE", done.err)
    assert fix
    assert luthier(*fix.group(1).split(), tmp_path / "mine.yaml", *argv).code == 0
    assert luthier("check", "--recipe", "yi-6b-chat").err.count("give --model DIR; give --data FILE") == 1


MINIMAL = {"model": {"path": "m"}, "data": {"train": "d.json"}}


@pytest.mark.parametrize(
    ("values", "overrides", "message", "fix"),
    [
        ({}, {"generation.top_p": 0.8}, "generation.top_p would be ignored", "set generation.do_sample=true"),
        ({"temperature": 0.5, "top_k": 3}, {}, "temperature, top_k would be ignored", "leave temperature and top_k"),
        ({"do_sample": True, "top_k": 1}, {}, "top_k=1 leaves only the likeliest token", "generation.do_sample=false"),
        ({"do_sample": True, "temperature": 0}, {}, "generation.temperature: input should be greater", "correct"),
        ({"max_tokens": 3}, {}, "did you mean generation.max_new_tokens?", "write generation.max_new_tokens"),
    ],
)
def test_sampling_that_would_be_ignored_is_an_error(
    values: dict[str, Any], overrides: dict[str, Any], message: str, fix: str
) -> None:
    with pytest.raises(ConfigError) as e:
        configs.build({**MINIMAL, "generation": values}, overrides)
    assert message in e.value.message
    assert fix in e.value.fix


def test_a_recipes_sampling_can_be_switched_off() -> None:
    greedy = config_of("yi-6b-chat", **{"generation.do_sample": False}).generation
    assert (greedy.do_sample, greedy.temperature, greedy.top_p, greedy.top_k) == (False, 1.0, 1.0, 0)
    assert greedy.repetition_penalty == 1.3
    with pytest.raises(ConfigError, match="would be ignored"):
        config_of("yi-6b-chat", **{"generation.do_sample": False, "generation.top_p": 0.9})


def test_options_override_the_sampling_of_a_run() -> None:
    run = Sampling.of(config_of("yi-6b-chat").generation, seed=3)
    assert run == Sampling(512, 0.1, 0.8, 40, 3, repetition_penalty=1.3, no_repeat_ngram_size=5)
    assert run.changed(top_p=None, top_k=7).top_k == 7
    plain = run.changed(temperature=0.0)
    assert (plain.temperature, plain.top_p, plain.top_k, plain.repetition_penalty) == (0.0, 1.0, 0, 1.3)
    assert Sampling.of(config_of("glm-4-9b-chat").generation) == Sampling(2500)
    for options, message in (
        (
            {"temperature": 0.0, "top_p": 0.5},
            "top_p would be ignored: temperature 0 always picks",
        ),
        ({"top_k": 1}, "the temperature would be ignored: top_k 1 allows only the most likely token"),
    ):
        with pytest.raises(ConfigError, match=message) as e:
            run.changed(**options)
        assert "--temperature" in e.value.fix


def test_chat_uses_the_sampling_of_the_run(luthier: Run, model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ["train.max_steps=1", "generation.max_new_tokens=9", "generation.temperature=5", "generation.top_p=1"]
    argv = ["--recipe", "yi-6b-chat", "--model", model, "--data", personas.TEAHOUSE, "--output-dir", run]
    assert luthier("train", *argv, *(x for s in settings for x in ("--set", s))).code == 0

    def ask(*options: object) -> dict[str, Any]:
        return dict(json.loads(luthier("chat", run, "--prompt", "你好", "--json", *options).out))

    hot = [ask("--seed", seed)["reply"] for seed in (1, 1, 2, 3)]
    assert hot[0] == hot[1]
    assert len(set(hot)) > 1  # sampled
    assert len({ask("--temperature", 0, "--seed", seed)["reply"] for seed in (1, 2, 3)}) == 1
    assert ask("--temperature", 0, "--max-new-tokens", 4)["reply_tokens"] <= 4
    assert ask()["reply_tokens"] <= 9
    refused = luthier("chat", run, "--prompt", "a", "--temperature", 0, "--top-p", 0.5)
    assert refused.code == 2
    assert "top_p would be ignored" in refused.err
    talk = library.chat(run)
    assert talk.sampling == Sampling.of(talk.config.generation)  # type: ignore[union-attr]
    assert talk.send("你好").text == ask()["reply"]
    assert library.chat(model).sampling == Sampling()
    compared = library.eval(run, [personas.HELD_OUT])
    talk.reset()
    greedy = talk.send(compared.prompts[0], Sampling(200)).text
    assert compared.tuned.replies[0].text == greedy  # evaluation does not sample


@pytest.mark.parametrize(("penalty", "ngram"), [(4.0, 0), (1.0, 2), (1.3, 3)])
def test_penalties_equal_those_of_transformers(penalty: float, ngram: int, model: Path) -> None:
    """Compared token by token with transformers' logits processors, for single replies and for a batch."""
    generator = library.chat(model).generator
    prompts = [[Message("user", "a" * n)] for n in (2, 9)]
    sampling = Sampling(24, repetition_penalty=penalty, no_repeat_ngram_size=ngram)
    replies = [generator.reply(p, sampling) for p in prompts]
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = torch.tensor([generator.chat_format.prompt_ids(prompt)])
        start = ids.shape[1]
        for _ in range(24):
            with torch.no_grad():
                scores = generator.model(ids).logits[:, -1].float()
            if penalty != 1:
                scores = RepetitionPenaltyLogitsProcessor(penalty)(ids, scores)
            if ngram:
                scores = NoRepeatNGramLogitsProcessor(ngram)(ids, scores)
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
            if int(ids[0, -1]) in generator.stop_ids:
                break
        text_ids = [t for t in ids[0, start:].tolist() if t not in generator.stop_ids]
        assert reply.text == generator.tokenizer.decode(text_ids)
    assert [r.text for r in generator.replies(prompts, sampling)] == [r.text for r in replies]
    assert replies[1].text != generator.reply(prompts[1], Sampling(24)).text
