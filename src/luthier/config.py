"""A run's configuration: YAML and ``--set a.b=c`` -> one frozen, strict object.

Names are the field's own (``per_device_train_batch_size``, ``lora_alpha``), so a reader of the tutorials can map
them one to one. Every mistake is reported at once, an unknown key with its nearest name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from luthier.errors import ConfigError, nearest
from luthier.types import SystemRole, TooLong, TrainOn


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) else value


def _names(value: Any) -> Any:
    """``a,b`` as a list too, since a module's name holds no comma."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and kind is not bool and bool not in get_args(kind):
            raise ValueError("must not be true or false")
        return value


class ModelConfig(Section):
    path: Path = Field(description="directory of the base model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="type of the frozen weights; auto: bfloat16 where the device computes in it natively"
    )
    rope_theta: float | None = Field(
        None, gt=0, description="rotary base in place of the published one (see GLM-4's -hf checkpoint)"
    )
    attn_implementation: Literal["auto", "padded", "looped", "varlen", "reference"] = Field(
        "auto", description="how segments attend; varlen needs flash-attn, reference is the plain definition"
    )
    load_in_4bit: bool = Field(False, description="store the frozen linear layers in 4 bits (QLoRA)")
    load_in_8bit: bool = Field(False, description="store the frozen linear layers in 8 bits")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit code")
    bnb_4bit_use_double_quant: bool = Field(True, description="quantise the 4-bit code's scales too")
    bnb_4bit_compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="type that quantised layers compute in; auto: model.dtype's"
    )
    quantised_cache: bool = Field(True, description="keep the quantised base on disk for the next start")

    @property
    def quantised(self) -> bool:
        return self.load_in_4bit or self.load_in_8bit

    @model_validator(mode="after")
    def _nothing_ignored(self) -> ModelConfig:
        if self.load_in_4bit and self.load_in_8bit:
            raise ConfigError("model: load_in_4bit and load_in_8bit exclude each other", "leave one of the two out")
        idle = [k for k in sorted(self.model_fields_set) if k.startswith("bnb_4bit_") and not self.load_in_4bit]
        if idle and any(getattr(self, k) != type(self).model_fields[k].default for k in idle):
            raise ConfigError(
                f"model: {', '.join(idle)} would be ignored without model.load_in_4bit",
                f"--set model.load_in_4bit=true, or leave {' and '.join(idle)} out",
            )
        return self


class DataConfig(Section):
    train: Annotated[tuple[Path, ...], BeforeValidator(_one_or_many)] = Field(
        min_length=1, description="data files; patterns such as rows/*.jsonl too"
    )
    eval: Annotated[tuple[Path, ...], BeforeValidator(_one_or_many)] = Field(
        (), description="files of held-out rows, evaluated before and after"
    )
    eval_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of the distinct prompts to hold out in place of data.eval"
    )
    format: Literal["auto", "alpaca", "messages", "sharegpt", "prompt_completion"] = Field(
        "auto", description="auto: told from each row's keys"
    )
    rename: dict[str, str] = Field(default_factory=dict, description="keys of rows to read under another name")
    dedupe: bool = Field(False, description="drop rows that are word for word an earlier one")
    control_tokens: Literal["refuse", "drop", "escape"] = Field(
        "refuse", description="what happens to rows whose text holds one of the model's control tokens"
    )
    template: str = Field(
        "auto",
        description="auto: the model's own chat template, natively where we know it; jinja: its own, run as it is; or "
        "a native format by name, such as chatml (an unknown name lists them)",
    )
    system: str = Field("", description="system prompt for rows that have none; empty: the template's own default")
    system_role: SystemRole = Field(
        "template",
        description="template: the model's own place for a system prompt, refused where it has none; merge: before the "
        "first user message",
    )
    max_length: int = Field(1024, ge=8, description="longest row in tokens")
    too_long: TooLong = Field("truncate", description="what happens to longer rows; truncate keeps the stop token")
    train_on: TrainOn = Field("all_replies", description="which replies of a conversation are trained")
    cache: bool = Field(True, description="keep the encoded rows on disk for the next start")


class LoraConfig(Section):
    r: int = Field(8, ge=1, description="rank")
    lora_alpha: float = Field(32.0, gt=0, description="the update is scaled by lora_alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: Annotated[tuple[str, ...] | None, BeforeValidator(_names)] = Field(
        None, min_length=1, description="names of linear layers; null: every linear layer of the decoder blocks"
    )
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r) instead")


class TrainConfig(Section):
    num_train_epochs: float = Field(3.0, gt=0, description="passes over the data")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; takes the place of num_train_epochs")
    per_device_train_batch_size: int = Field(4, ge=1, description="rows a micro-batch")
    gradient_accumulation_steps: int = Field(4, ge=1, description="micro-batches a step")
    micro_batch_tokens: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        "auto",
        description="tokens computed together: a step's rows are regrouped to fill it, which changes no result; "
        "0: per_device_train_batch_size rows as they come; auto: 2048",
    )
    shared_prefix: bool = Field(
        True, description="compute beginnings that rows of a micro-batch have in common (the system prompt) once"
    )
    fused: Literal["auto"] | bool = Field(
        "auto",
        description="train with luthier's own compiled layers: the same mathematics, faster; auto: where the model, "
        "the device and a C++ compiler allow",
    )
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field("cosine", description="after the warm-up")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="share of the steps that warm up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to this norm; 0: never")
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_32bit"] = Field(
        "adamw_torch", description="optimizer; adamw_8bit keeps its state in 8 bits, paged ones need CUDA"
    )
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto", description="recompute activations: less memory, about 1/3 slower; auto: where memory is short"
    )
    seed: int = Field(42, ge=0, lt=2**32, description="order of rows, adapter's start, dropout")
    save_steps: int = Field(50, ge=1, description="a checkpoint every so many steps")
    save_total_limit: int = Field(2, ge=1, description="checkpoints kept; older ones are deleted")
    eval_time_ratio: float = Field(
        0.1, ge=0, le=10, description="most time that evaluation at the end may take, as a share of training's"
    )
    logging_steps: int = Field(1, ge=1, description="a line of metrics.jsonl every so many steps")


class GenerationSettings(Section):
    """How ``luthier chat`` draws the replies of a run. Evaluation always takes the likeliest token."""

    max_new_tokens: int = Field(512, ge=1, description="longest reply in tokens, the prompt not counted")
    do_sample: bool = Field(False, description="draw tokens at random; false: always the likeliest one")
    temperature: float = Field(1.0, gt=0, description="below 1 likely tokens become likelier; needs do_sample")
    top_p: float = Field(
        1.0, gt=0, le=1, description="draw from the likeliest tokens that make up this share; needs do_sample"
    )
    top_k: int = Field(0, ge=0, description="draw from the k likeliest tokens, 0: from all; needs do_sample")
    repetition_penalty: float = Field(
        1.0, gt=0, description="above 1 tokens of prompt and reply become less likely again; 1: off"
    )
    no_repeat_ngram_size: int = Field(
        0, ge=0, description="no sequence of so many tokens of prompt and reply is written again; 0: off"
    )


class RunConfig(Section):
    """Everything a run depends on."""

    model: ModelConfig
    data: DataConfig
    lora: LoraConfig = Field(default_factory=LoraConfig)  # type: ignore[arg-type]
    train: TrainConfig = Field(default_factory=TrainConfig)  # type: ignore[arg-type]
    generation: GenerationSettings = Field(default_factory=GenerationSettings)  # type: ignore[arg-type]
    output_dir: Path | None = Field(None, description="the run's directory")

    def dump(self) -> dict[str, Any]:
        """Plain values, as ``run.yaml`` holds them."""
        return self.model_dump(mode="json")


def all_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Every dotted key, in order."""
    found: list[str] = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found += all_keys(kind, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def describe(key: str) -> str:
    """One line on a dotted key."""
    model: type[BaseModel] = RunConfig
    *sections, leaf = key.split(".")
    for section in sections:
        kind = model.model_fields[section].annotation
        assert isinstance(kind, type) and issubclass(kind, BaseModel)
        model = kind
    return model.model_fields[leaf].description or ""


def parse_overrides(pairs: Iterable[str]) -> dict[str, Any]:
    """``["train.seed=1"]`` -> ``{"train.seed": 1}``; values are read as YAML."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair}: has no '='", f"write --set {pair}=VALUE")
        plain = key.strip() in _TEXTS  # a prompt is what was typed, "#" and ":" included
        values[key.strip()] = text if plain else parse_yaml(text, f"--set {key}")
    return values


def build(values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Nested values and dotted overrides -> a validated configuration. Raises ConfigError with every mistake."""
    given = overrides or {}
    if given.get("train.max_steps") is not None and "train.num_train_epochs" in given:
        raise ConfigError(
            "train.num_train_epochs would be ignored: train.max_steps takes its place", "give one of the two"
        )
    merged = _copy(values)
    if given.get("generation.do_sample") is False and isinstance(merged.get("generation"), dict):
        for key in _DRAWN:  # what a file says of sampling goes with its sampling
            merged["generation"].pop(key, None)
    for dotted, value in (overrides or {}).items():
        *sections, leaf = dotted.split(".")
        node = merged
        for section in sections:
            child = node.setdefault(section, {})
            if not isinstance(child, dict):
                raise ConfigError(f"{dotted}: {section} is not a section", f"the keys are: {', '.join(all_keys())}")
            node = child
        node[leaf] = value
    try:
        made = RunConfig.model_validate(merged)
    except ValidationError as e:
        problems = [_problem(error) for error in e.errors()]
        raise ConfigError(
            "; ".join(text for text, _ in problems), "; ".join(dict.fromkeys(fix for _, fix in problems))
        ) from None
    _sampling_is_used(made.generation)
    return made


def load(path: Path | str, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a ``run.yaml``."""
    return build(read(Path(path)), overrides)


def read(path: Path) -> dict[str, Any]:
    """The values of a YAML file, not yet checked."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read ({e})", "give the path of a YAML file") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no keys", "write model.path and data.train at least")
    return values


_TEXTS = ("data.system",)
_DRAWN = ("temperature", "top_p", "top_k")  # mean something where tokens are drawn
# what other tools call them
_OTHER_NAMES = {
    "lr": "train.learning_rate",
    "epochs": "train.num_train_epochs",
    "steps": "train.max_steps",
    "batch_size": "train.per_device_train_batch_size",
    "micro_batch_size": "train.per_device_train_batch_size",
    "gradient_accumulation": "train.gradient_accumulation_steps",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "rank": "lora.r",
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    "torch_dtype": "model.dtype",
    "max_tokens": "generation.max_new_tokens",
    "repeat_penalty": "generation.repetition_penalty",
}


def _sampling_is_used(chosen: GenerationSettings) -> None:
    fields = GenerationSettings.model_fields
    unused = [k for k in _DRAWN if getattr(chosen, k) != fields[k].default]
    if not chosen.do_sample and unused:
        raise ConfigError(
            f"generation.{', '.join(unused)} would be ignored: generation.do_sample is false",
            f"set generation.do_sample=true, or leave {' and '.join(unused)} out",
        )
    if chosen.do_sample and chosen.top_k == 1:
        raise ConfigError(
            "generation.do_sample would be ignored: top_k=1 leaves only the likeliest token to draw",
            "set generation.do_sample=false, which takes the likeliest token, or a larger generation.top_k",
        )


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in values.items()}


def _problem(error: Any) -> tuple[str, str]:
    where = ".".join(str(part) for part in error["loc"])
    known = all_keys()
    if error["type"] == "extra_forbidden":
        leaf = {**{k.rpartition(".")[2]: k for k in known}, **_OTHER_NAMES}
        name = where.rpartition(".")[2]
        guess = leaf.get(name) or leaf.get(nearest(name, leaf, cutoff=0.7) or "")
        hint = f"; did you mean {guess}?" if guess else ""
        return f"{where}: unknown key{hint}", f"write {guess}" if guess else f"the keys are: {', '.join(known)}"
    if error["type"] == "missing":
        flag = {"model": "--model DIR", "model.path": "--model DIR", "data": "--data FILE", "data.train": "--data FILE"}
        return f"{where}: is missing", f"give {flag.get(where, f'--set {where}=VALUE')}"
    got = error.get("input")
    problem = error["msg"].removeprefix("Value error, ")
    example = _example(where, got) if where in known else ""
    return f"{where}: {problem[0].lower()}{problem[1:]}, got {got!r}", f"correct {where}{example}"


def _example(key: str, got: Any) -> str:
    """A value that would do: of a choice the nearest one, else the default."""
    *sections, leaf = key.split(".")
    kind: Any = RunConfig
    for section in sections:
        kind = kind.model_fields[section].annotation
    field = kind.model_fields[leaf]
    choices = [c for c in get_args(field.annotation) if isinstance(c, str)]
    value = nearest(str(got), choices) or field.default
    if field.is_required() or value in (None, "", ()):
        return ""
    return f", as --set {key}={value if isinstance(value, str) else json.dumps(value)}"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-4`` as text; everyone who types it means a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader with one more number form
    except (yaml.YAMLError, ValueError) as e:
        raise ConfigError(f"{where}: is not YAML ({' '.join(str(e).split())})", "correct the text") from None
