"""Build a run's configuration from YAML, options and ``--set KEY=VALUE``: one frozen object, strictly checked.

Keys have the names that the field uses (``per_device_train_batch_size``, ``lora_alpha``), so that a reader of the
tutorials can map them one to one. All mistakes are reported together, an unknown key with its nearest name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from luthier._util.files import user_path
from luthier._util.validation import Mistake, mistakes, parse_yaml, read_yaml
from luthier.errors import ConfigError, UserError
from luthier.types import SystemRole, Thinking, TooLong, TrainOn


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str | Path) else value


def _names(value: object) -> object:
    """Split ``a,b`` into a list: a module's name contains no comma."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


def _user_path(value: object) -> object:
    try:
        return user_path(value) if isinstance(value, str | Path) else value
    except UserError as e:  # reported together with all other mistakes
        raise ValueError(e.message) from None


UserPath = Annotated[Path, BeforeValidator(_user_path)]


class Section(BaseModel):
    """A group of settings: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: object, info: ValidationInfo) -> object:
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and kind is not bool and bool not in get_args(kind):
            raise ValueError("must not be true or false")
        return value


class ModelConfig(Section):
    path: UserPath = Field(description="directory of the base model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of the frozen weights; auto: bfloat16 if the device computes in it natively"
    )
    rope_theta: float | None = Field(
        None, gt=0, description="rotary base that replaces the published one (see GLM-4's -hf checkpoint)"
    )
    attn_implementation: Literal["auto", "padded", "looped", "varlen", "reference"] = Field(
        "auto", description="attention kernel; varlen needs flash-attn, reference is the slow reference implementation"
    )
    load_in_4bit: bool = Field(False, description="store the frozen linear layers in 4 bits (QLoRA)")
    load_in_8bit: bool = Field(False, description="store the frozen linear layers in 8 bits")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit code")
    bnb_4bit_use_double_quant: bool = Field(True, description="quantise the 4-bit code's scales too")
    bnb_4bit_compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype that quantised layers compute in; auto: that of model.dtype"
    )
    quantised_cache: bool = Field(True, description="cache the quantised base on disk for the next start")

    @property
    def quantised(self) -> bool:
        return self.load_in_4bit or self.load_in_8bit


class DataConfig(Section):
    train: Annotated[tuple[UserPath, ...], BeforeValidator(_one_or_many)] = Field(
        min_length=1, description="data files or patterns such as rows/*.jsonl"
    )
    eval: Annotated[tuple[UserPath, ...], BeforeValidator(_one_or_many)] = Field(
        (), description="files of held-out rows; base and tuned model are evaluated on them after training"
    )
    eval_fraction: float = Field(
        0.0, ge=0, lt=1, description="fraction of the distinct prompts to hold out, instead of data.eval"
    )
    format: Literal["auto", "alpaca", "messages", "sharegpt", "prompt_completion"] = Field(
        "auto", description="auto: detected from each row's keys"
    )
    rename: dict[str, str] = Field(
        default_factory=dict, description="keys of rows to read under another name, as {old: new}"
    )
    dedupe: bool = Field(False, description="drop rows that are identical to an earlier one")
    control_tokens: Literal["refuse", "drop", "escape"] = Field(
        "refuse", description="what happens to rows whose text contains one of the model's control tokens"
    )
    template: str = Field(
        "auto",
        description="auto: the model's own chat template, by luthier's native renderer if there is one; jinja: always "
        "the model's own Jinja template; or a native format by name, such as chatml (an unknown name lists them)",
    )
    system: str = Field("", description="system prompt for rows without one; empty: the template's default")
    system_role: SystemRole = Field(
        "template",
        description="template: where the model's template puts a system prompt, refused if it supports none; merge: "
        "before the first user message",
    )
    max_length: int = Field(1024, ge=8, description="maximum length of a row in tokens")
    too_long: TooLong = Field("truncate", description="what happens to longer rows; truncate keeps the stop token")
    train_on: TrainOn = Field(
        "all_replies",
        description="which replies of a conversation are targets of the loss; each_reply: all, each in an example of "
        "its own with the turns before it as chat sends them, which all_replies does only where a template needs it",
    )
    thinking: Thinking = Field(
        "keep",
        description="thoughts of replies; drop: they are not trained, and the template decides what stands in their "
        "place; empty: every reply begins with an empty one",
    )
    max_unrendered: float = Field(
        0.1,
        ge=0,
        le=1,
        description="the run ends if more than this fraction of the rows is dropped because the chat template cannot "
        "write them",
    )
    cache: bool = Field(True, description="cache the encoded rows on disk for the next start")


class LoraConfig(Section):
    r: int = Field(8, ge=1, description="rank")
    lora_alpha: float = Field(32.0, gt=0, description="the adapter's output is scaled by lora_alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: Annotated[tuple[str, ...] | None, BeforeValidator(_names)] = Field(
        None, min_length=1, description="names of linear layers; null: every linear layer of the decoder layers"
    )
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r) instead of lora_alpha / r")


class TrainConfig(Section):
    num_train_epochs: float = Field(3.0, gt=0, description="passes over the data")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; replaces num_train_epochs")
    per_device_train_batch_size: int = Field(4, ge=1, description="rows per micro-batch")
    gradient_accumulation_steps: int = Field(4, ge=1, description="micro-batches per optimizer step")
    micro_batch_tokens: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        "auto",
        description="tokens per micro-batch: the rows of a step are regrouped to fill it, which without dropout "
        "does not change the result; 0: per_device_train_batch_size rows in their order; auto: 2048",
    )
    shared_prefix: bool = Field(
        True, description="compute a prefix that rows of a micro-batch share (the system prompt) once"
    )
    fused: Literal["auto"] | bool = Field(
        "auto",
        description="train with luthier's compiled layers: the same mathematics, faster; auto: if the model, the "
        "device and a C++ compiler support it",
    )
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="schedule after the warm-up"
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="fraction of the steps that warm up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to this norm; 0: no clipping")
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_32bit"] = Field(
        "adamw_torch", description="optimizer; adamw_8bit stores its state in 8 bits, paged ones need CUDA"
    )
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto",
        description="recompute activations: less memory, about 1/3 slower; auto: only if memory would not be enough",
    )
    seed: int = Field(42, ge=0, lt=2**32, description="seed of the row order, the adapter's initial values and dropout")
    save_steps: int = Field(50, ge=1, description="save a checkpoint every N steps")
    save_total_limit: int = Field(2, ge=1, description="number of checkpoints to keep; older ones are deleted")
    eval_rows: int = Field(
        256, ge=0, description="held-out rows whose loss is computed at the end, spread evenly over all; 0: all of them"
    )
    eval_time_ratio: float = Field(
        0.1,
        ge=0,
        le=10,
        description="longest time for sample replies at the end, as a fraction of the training time; 0: no evaluation",
    )
    logging_steps: int = Field(1, ge=1, description="write a line of metrics.jsonl every N steps")


class GenerationSettings(Section):
    """How ``luthier chat`` and ``serve`` choose the tokens of a reply. Evaluation is always greedy."""

    max_new_tokens: int = Field(512, ge=1, description="maximum length of a reply in tokens, without the prompt")
    do_sample: bool = Field(False, description="sample tokens; false: greedy, always the likeliest one")
    temperature: float = Field(
        1.0, gt=0, description="softmax temperature: below 1 likely tokens become likelier; needs do_sample"
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample from the likeliest tokens with this total probability; needs do_sample"
    )
    top_k: int = Field(0, ge=0, description="sample from the k likeliest tokens, 0: from all; needs do_sample")
    repetition_penalty: float = Field(
        1.0, gt=0, description="above 1: tokens that already occurred in prompt or reply become less likely; 1: off"
    )
    no_repeat_ngram_size: int = Field(
        0, ge=0, description="no N-gram of prompt and reply is repeated, N being this number; 0: off"
    )


class RunConfig(Section):
    """Everything a run depends on."""

    model: ModelConfig
    data: DataConfig
    lora: LoraConfig = Field(default_factory=LoraConfig)  # type: ignore[arg-type]
    train: TrainConfig = Field(default_factory=TrainConfig)  # type: ignore[arg-type]
    generation: GenerationSettings = Field(default_factory=GenerationSettings)  # type: ignore[arg-type]
    output_dir: UserPath | None = Field(None, description="the run's directory")

    def dump(self) -> dict[str, dict[str, object]]:
        """Return plain values, as in ``run.yaml``."""
        return self.model_dump(mode="json")


def all_keys() -> list[str]:
    """List every dotted key, in order."""
    return list(_fields())


def _fields(model: type[BaseModel] = RunConfig, prefix: str = "") -> dict[str, FieldInfo]:
    """Return every field by its dotted key."""
    fields: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            fields |= _fields(kind, f"{prefix}{name}.")
        else:
            fields[prefix + name] = field
    return fields


def describe(key: str) -> str:
    """Return the description of a dotted key, in one line."""
    return _fields()[key].description or ""


def build(
    values: Mapping[str, object],
    overrides: Mapping[str, object] | None = None,
    *,
    settings: Iterable[str] = (),
    rename: Iterable[str] = (),
    required: Iterable[str] = (),
) -> RunConfig:
    """Build a configuration from nested values, overrides by dotted key, and the texts after --set and --rename.

    required: optional top-level keys without which the caller cannot work, such as ``output_dir``.
    Raises ConfigError with every mistake: of syntax, of single keys and of combinations.
    """
    typed, wrong = _typed(settings, rename)
    chosen = {**(overrides or {}), **typed}
    combined = _copy(values)
    sampling = combined.get("generation")
    if chosen.get("generation.do_sample") is False and isinstance(sampling, dict):
        for key in _NEED_SAMPLING:  # a file's sampling settings are dropped together with its sampling
            sampling.pop(key, None)
    wrong += _override(combined, chosen)
    wrong += [(f"{key}: is missing", f"give {_OPTIONS[key]}") for key in required if combined.get(key) is None]
    try:
        config = RunConfig.model_validate(combined)
    except ValidationError as e:
        wrong += mistakes(e.errors(), _fields(), _OTHER_NAMES, _OPTIONS)
        _remove_faults(combined, e.errors())
        config = RunConfig.model_validate(combined)  # the rest may still be a combination that is refused
    wrong += _combinations(config, chosen)
    if wrong:
        raise ConfigError("\n".join(text for text, _ in wrong), "; ".join(dict.fromkeys(fix for _, fix in wrong)))
    return config


def _typed(settings: Iterable[str], rename: Iterable[str]) -> tuple[dict[str, object], list[Mistake]]:
    """Parse ``train.seed=1`` of --set as YAML, and ``a=b`` of --rename; return values by dotted key, and mistakes."""
    values: dict[str, object] = {}
    wrong: list[Mistake] = []
    for pair in settings:
        key, equals, text = pair.partition("=")
        if not equals:
            wrong.append((f"--set {pair}: has no '='", f"write --set {pair}=VALUE"))
            continue
        try:  # a prompt is taken literally, "#" and ":" included
            values[key.strip()] = text if key.strip() in _TEXTS else parse_yaml(text, f"--set {key}")
        except ConfigError as e:
            wrong.append((e.message, e.fix))
    for pair in rename:
        old, equals, new = pair.partition("=")
        if not (old and equals and new):
            wrong.append((f"--rename {pair}: is not OLD=NEW", "write --rename OLD=NEW"))
            continue
        names = values.setdefault("data.rename", {})
        if isinstance(names, dict):  # else it is refused as a value
            values["data.rename"] = {**names, old: new}
    return values, wrong


def _override(combined: dict[str, object], overrides: Mapping[str, object]) -> Iterator[Mistake]:
    """Set every dotted key in the nested values; the mistakes are keys below something that is not a section."""
    for dotted, value in overrides.items():
        *sections, leaf = dotted.split(".")
        node = combined
        for section in sections:
            child = node.setdefault(section, {})
            if not isinstance(child, dict):
                yield f"{dotted}: {section} is not a section", f"the keys are: {', '.join(all_keys())}"
                break
            node = child
        else:
            node[leaf] = value


def _combinations(config: RunConfig, overrides: Mapping[str, object]) -> Iterator[Mistake]:
    """Find settings that are valid by themselves and exclude each other, or would be ignored."""
    model, sampling, attention = config.model, config.generation, config.model.attn_implementation
    if config.data.eval and config.data.eval_fraction:
        yield "data.eval_fraction would be ignored: data.eval names the held-out rows", "leave one of the two out"
    if config.train.fused is True and attention != "auto":
        yield (
            f"model.attn_implementation={attention} and train.fused=true exclude each other: the compiled layers have "
            "an attention of their own",
            "leave one of the two out",
        )
    if overrides.get("train.max_steps") is not None and "train.num_train_epochs" in overrides:
        yield "train.num_train_epochs would be ignored: train.max_steps replaces it", "give one of the two"
    if model.load_in_4bit and model.load_in_8bit:
        yield "model: load_in_4bit and load_in_8bit exclude each other", "leave one of the two out"
    idle = [k for k in _changed(model) if k.startswith("bnb_4bit_")]
    if idle and not model.load_in_4bit:
        yield (
            f"model: {', '.join(idle)} would be ignored without model.load_in_4bit",
            f"--set model.load_in_4bit=true, or leave {' and '.join(idle)} out",
        )
    unused = [k for k in _changed(sampling) if k in _NEED_SAMPLING]
    if unused and not sampling.do_sample:
        yield (
            f"generation.{', '.join(unused)} would be ignored: generation.do_sample is false",
            f"set generation.do_sample=true, or leave {' and '.join(unused)} out",
        )
    if sampling.do_sample and sampling.top_k == 1:
        yield (
            "generation.do_sample would be ignored: top_k=1 leaves only the likeliest token to draw",
            "set generation.do_sample=false, which takes the likeliest token, or a larger generation.top_k",
        )


def _changed(section: Section) -> list[str]:
    """List the keys whose value is not the default."""
    fields = type(section).model_fields
    return [k for k in fields if getattr(section, k) != fields[k].default]


def _remove_faults(combined: dict[str, object], errors: Iterable[ErrorDetails]) -> None:
    """Remove every value that was refused, and put a stand-in for what is required."""
    for error in errors:
        top, *inner = error["loc"]
        for name in [n for n in combined if str(n) == str(top)]:  # YAML allows keys that are not text
            if isinstance(section := combined[name], dict) and inner:
                section.pop(inner[0], None)
            else:
                del combined[name]
    for name, leaf in (("model", "path"), ("data", "train")):
        required = combined.setdefault(name, {})
        if isinstance(required, dict):  # it may be a finished section
            required.setdefault(leaf, "stand-in")


def load(path: Path | str, overrides: Mapping[str, object] | None = None) -> RunConfig:
    """Read a ``run.yaml``. Raises UserError."""
    return build(read_yaml(path), overrides)


_TEXTS = ("data.system",)
_NEED_SAMPLING = ("temperature", "top_p", "top_k")
# the option that gives a required key
_OPTIONS = {
    "model": "--model DIR", "model.path": "--model DIR", "data": "--data FILE", "data.train": "--data FILE",
    "output_dir": "--output-dir RUN",
}  # fmt: skip
# names that other tools use
_OTHER_NAMES = {
    "rank": "lora.r", "steps": "train.max_steps", "alpha": "lora.lora_alpha", "lr": "train.learning_rate",
    "torch_dtype": "model.dtype", "dropout": "lora.lora_dropout", "cutoff_len": "data.max_length",
    "epochs": "train.num_train_epochs", "max_seq_length": "data.max_length",
    "max_tokens": "generation.max_new_tokens", "batch_size": "train.per_device_train_batch_size",
    "repeat_penalty": "generation.repetition_penalty", "micro_batch_size": "train.per_device_train_batch_size",
    "gradient_accumulation": "train.gradient_accumulation_steps",
}  # fmt: skip


def _copy(values: Mapping[str, object]) -> dict[str, object]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in values.items()}
