"""The configuration is strict, reports all mistakes together, and has the keys of a golden file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from luthier import config as configs
from luthier._util.validation import read_yaml
from luthier.adapters.run_dir import differences
from luthier.errors import ConfigError

ALL_KEYS = configs.all_keys()
HERE = Path(__file__).parents[1]
MINIMAL: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "d.json"}}


def test_the_keys_are_the_golden_ones() -> None:
    assert (HERE / "golden" / "keys.txt").read_text().split() == ALL_KEYS


def test_every_key_is_read_somewhere() -> None:
    source = HERE.parent / "src" / "luthier"
    text = "\n".join(p.read_text(encoding="utf-8") for p in source.rglob("*.py") if p.name != "config.py")
    unread = [k for k in ALL_KEYS if not re.search(rf"\.{k.rpartition('.')[2]}\b", text)]
    assert unread == []


def test_every_key_is_described() -> None:
    assert all(configs.describe(k) for k in ALL_KEYS)


def test_overrides_are_parsed_as_people_write_them() -> None:
    pairs = ["train.learning_rate=1e-4", "train.seed=7", "lora.target_modules=[q_proj, v_proj]", "data.system=你好: x"]
    parsed = configs.build(MINIMAL, settings=pairs)
    assert parsed.train.learning_rate == 1e-4
    assert parsed.train.seed == 7
    assert parsed.lora.target_modules == ("q_proj", "v_proj")
    assert parsed.data.system == "你好: x"
    assert configs.build(MINIMAL, settings=["lora.target_modules=q_proj"]).lora.target_modules == ("q_proj",)
    several = configs.build(MINIMAL, settings=["lora.target_modules=q_proj, k_proj"])
    assert several.lora.target_modules == ("q_proj", "k_proj")
    assert configs.build(MINIMAL, {"train.max_steps": None}).train.max_steps is None


@pytest.mark.parametrize(
    ("overrides", "message", "fix"),
    [
        ({"train.learning_rte": 1}, "did you mean train.learning_rate?", "write train.learning_rate"),
        ({"learning_rate": 1}, "did you mean train.learning_rate?", "write train.learning_rate"),
        ({"train.learning_rate": -1}, "train.learning_rate: input should be greater than 0", "correct train"),
        ({"train.learning_rate": "fast"}, "got 'fast'", "correct train.learning_rate"),
        (
            {"lora.r": 0, "train.seed": -1},
            "train.seed: input should be",
            "correct lora.r, as --set lora.r=8; correct train.seed, as --set train.seed=42",
        ),
        ({"train.seed.x": 1}, "seed", "keys are"),
        (
            {"train.max_steps": 3, "train.num_train_epochs": 1},
            "train.num_train_epochs would be ignored",
            "one of the two",
        ),
        ({"train.seed": True}, "must not be true or false", "correct train.seed"),
        ({"lora.target_modules": []}, "at least 1 item", "correct lora.target_modules"),
        ({"data.too_long": "cut"}, "'truncate', 'drop' or 'error'", "--set data.too_long=truncate"),
        ({"data.format": "alpca"}, "got 'alpca'", "--set data.format=alpaca"),
        ({"model.load_in_4bit": True, "model.load_in_8bit": True}, "exclude each other", "leave one of the two out"),
        ({"train.learning_rate": float("nan")}, "finite", "correct"),
    ],
)
def test_every_mistake_is_reported_with_a_fix(overrides: dict[str, Any], message: str, fix: str) -> None:
    values = {**MINIMAL, "train": {"seed": 1}}
    with pytest.raises(ConfigError) as e:
        configs.build(values, overrides)
    assert message in e.value.message
    assert fix in e.value.fix


@pytest.mark.parametrize("key", ALL_KEYS)
@pytest.mark.parametrize("value", [[[1]], {"x": {"y": 1}}, object(), -1.5, True, None])
def test_a_value_of_any_type_is_accepted_or_reported_in_one_line(key: str, value: object) -> None:
    try:
        configs.build({**MINIMAL, "train": {"seed": 1}}, {key: value})
    except ConfigError as e:
        assert e.message.startswith((key, key.partition(".")[0])) and "\n" not in e.message and e.fix  # noqa: PT017


def test_missing_sections_name_the_option_to_add() -> None:
    with pytest.raises(ConfigError) as e:
        configs.build({})
    assert e.value.fix == "give --model DIR; give --data FILE"


# one mistake of each kind: a setting as typed, and the line that reports it
MISTAKES = {
    "train.seed": "--set train.seed: has no '='",
    "lora.target_modules=[q_proj": "--set lora.target_modules: is not YAML",
    "train.learning_rte=1": "train.learning_rte: unknown key; did you mean train.learning_rate?",
    "train.save_steps.x=1": "train.save_steps.x: save_steps is not a section",
    "lora.r=0": "lora.r: input should be greater than or equal to 1, got 0",
    "train.weight_decay=true": "train.weight_decay: must not be true or false",
    "data.too_long=cut": "data.too_long: input should be 'truncate', 'drop' or 'error', got 'cut'",
    "train.max_steps=3": "train.num_train_epochs would be ignored: train.max_steps replaces it",
    "model.load_in_4bit=true": "model: load_in_4bit and load_in_8bit exclude each other",
    "generation.top_p=0.9": "generation.top_p would be ignored: generation.do_sample is false",
    "train.gradient_checkpointing=x": "train.gradient_checkpointing: input should be 'auto' or a valid boolean",
    "data.rename=x": "data.rename: input should be a valid dictionary, got 'x'",
    "data.eval=held.jsonl": "data.eval_fraction would be ignored: data.eval names the held-out rows",
    "model.attn_implementation=looped": "model.attn_implementation=looped and train.fused=true exclude each other",
}
# settings without which the one of this name is none
WITH = {
    "train.max_steps": ["train.num_train_epochs=2"],
    "model.load_in_4bit": ["model.load_in_8bit=true"],
    "data.eval": ["data.eval_fraction=0.5"],
    "model.attn_implementation": ["train.fused=true"],
}


def test_all_mistakes_are_reported_together() -> None:
    """Syntax of --set and --rename, unknown keys, missing keys, values, combinations and sampling, in one message."""
    settings = [*MISTAKES, *(setting for several in WITH.values() for setting in several)]
    expected = [
        *MISTAKES.values(),
        "--rename title: is not OLD=NEW",
        "data.train: is missing",
        "output_dir: is missing",
    ]
    with pytest.raises(ConfigError) as e:
        configs.build(
            {"model": {"path": "m"}, "train": {"save_steps": 5}},
            settings=settings,
            rename=["title"],
            required=["output_dir"],
        )
    lines = e.value.message.splitlines()
    assert [text for text in expected if not any(line.startswith(text) for line in lines)] == []
    assert len(lines) == len(expected)
    for fix in (
        "write --set train.seed=VALUE",
        "write --rename OLD=NEW",
        "write train.learning_rate",
        "give --data FILE",
    ):
        assert fix in e.value.fix.split("; ")


@pytest.mark.parametrize("setting", MISTAKES)
def test_each_mistake_is_reported_by_itself(setting: str) -> None:
    settings = [setting, *WITH.get(setting.partition("=")[0], [])]
    with pytest.raises(ConfigError) as e:
        configs.build({**MINIMAL, "train": {"save_steps": 5}}, settings=settings)
    assert e.value.message.startswith(MISTAKES[setting]) and "\n" not in e.value.message


@pytest.mark.parametrize("values", [{"model": 3}, {"model": [1], "data": "x"}, {"train": None}, {"nonsense": {"a": 1}}])
def test_sections_of_another_type_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as e:
        configs.build({**MINIMAL, **values}, settings=["generation.top_k=3", "train.seed=-1"])
    assert all(any(line.startswith(name) for line in e.value.message.splitlines()) for name in values)
    assert "generation.top_k would be ignored" in e.value.message


@pytest.mark.parametrize(
    "values", [{1: 2}, {"train": {1: 2}}, {1: {"a": 1}}, {"model": configs.ModelConfig(path=Path("m"))}]
)
def test_unusual_keys_and_finished_sections_are_reported_too(values: dict[Any, Any]) -> None:
    with pytest.raises(ConfigError, match=r"lora\.r: input should be"):
        configs.build({**MINIMAL, **values}, settings=["lora.r=0"])


def test_a_required_key_with_a_wrong_value_is_one_mistake() -> None:
    with pytest.raises(ConfigError) as e:
        configs.build(MINIMAL, settings=["output_dir=3"], required=["output_dir"])
    assert e.value.message.startswith("output_dir: input") and "\n" not in e.value.message


def test_renamed_keys_are_added_to_those_of_the_settings() -> None:
    parsed = configs.build(MINIMAL, settings=["data.rename={q: instruction}"], rename=["a=output"])
    assert parsed.data.rename == {"q": "instruction", "a": "output"}


def test_dump_and_load_are_inverse(tmp_path: Path) -> None:
    import yaml

    parsed = configs.build(MINIMAL, {"train.learning_rate": 3e-5, "output_dir": "runs/x"})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(parsed.dump()), encoding="utf-8")
    assert configs.load(tmp_path / "run.yaml") == parsed
    assert differences(parsed.dump(), configs.build(MINIMAL, {"train.learning_rate": 1e-4}).dump()) == [
        "train.learning_rate: 3e-05 -> 0.0001",
        "output_dir: runs/x -> None",
    ]


def test_a_file_that_is_not_a_configuration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    with pytest.raises(ConfigError, match="cannot be read"):
        configs.load(path)
    path.write_text("a: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        configs.load(path)
    path.write_text("- 1")
    with pytest.raises(ConfigError, match="contains no keys"):
        configs.load(path)


def test_a_configuration_is_frozen() -> None:
    parsed = configs.build(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        parsed.train.seed = 3  # type: ignore[misc]


DUPLICATES = {
    "a key": ("train:\n  seed: 1\n  max_steps: 2\n  seed: 3\n", ["line 4: key 'seed' occurs twice, first in line 2"]),
    "a section": (
        "train:\n  seed: 1\nlora:\n  r: 2\ntrain:\n  max_steps: 3\n",
        ["line 5: key 'train' occurs twice, first in line 1"],
    ),
    "a quoted key in braces": (
        'data: {system: a, "system": b, rename: {q: output, q: input}}\n',
        ["line 1: key 'q' occurs twice, first in line 1", "line 1: key 'system' occurs twice, first in line 1"],
    ),
    "a key in a list": ("- [{a: 1, a: 1}]\n", ["line 1: key 'a' occurs twice, first in line 1"]),
    "a key beside a merged mapping": (
        "lora: &x\n  r: 1\ntrain:\n  <<: *x\n  r: 2\n  r: 3\n",
        ["line 6: key 'r' occurs twice, first in line 5"],
    ),
}


@pytest.mark.parametrize("name", DUPLICATES)
def test_a_key_that_occurs_twice_is_refused(name: str, tmp_path: Path) -> None:
    text, lines = DUPLICATES[name]
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as e:
        configs.load(path)
    assert e.value.message.splitlines() == [f"{path}, {line}" for line in lines]
    assert e.value.fix == "delete one of the two, or join them if they are sections"


def test_a_key_that_replaces_a_merged_one_is_no_duplicate(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("a: &a {r: 1, x: &b {<<: {s: 1}, s: 2}}\nb: {<<: *a, r: 2, x: *b}\nc: {<<: [*a, *b], r: 3}\n")
    assert read_yaml(path)["b"] == {"r": 2, "x": {"s": 2}}


def test_a_key_that_occurs_twice_in_a_setting_is_refused_and_the_last_of_two_settings_counts() -> None:
    with pytest.raises(ConfigError, match="--set data.rename, line 1: key 'q' occurs twice, first in line 1"):
        configs.build(MINIMAL, settings=["data.rename={q: output, q: input}"])
    assert configs.build(MINIMAL, settings=["train.seed=1", "train.seed=2"]).train.seed == 2
    assert configs.build(MINIMAL, rename=["q=output", "q=input"]).data.rename == {"q": "input"}
