"""One function per verb. Assembly only: what each does is in the modules it calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier import config as configs
from luthier import estimating, evaluation, files, hub, merging, recipes
from luthier import personas as demos
from luthier.chatting import Chat, open_chat
from luthier.config import RunConfig
from luthier.diagnosis import examine
from luthier.errors import ConfigError
from luthier.estimating import Estimate, Wanted
from luthier.evaluate import NEW_TOKENS, REPLIES, Scores, score
from luthier.evaluation import Comparison
from luthier.exporting import formats
from luthier.exporting.formats import Exported
from luthier.generate import Reply
from luthier.located import locate_adapter
from luthier.lora import resolve
from luthier.memory import Rows
from luthier.merging import Merged
from luthier.models.directory import family_of, read_config
from luthier.models.load import empty_model, load_weights, pick_device, pick_dtype
from luthier.models.tokenizer import has_tokenizer, load_tokenizer
from luthier.preflight import Inspection, inspect
from luthier.serving import server
from luthier.training.metrics import StepRecord
from luthier.training.run_dir import RunDir
from luthier.tuning import Stopped, absolute, train, wanted

__all__ = [
    "Chat",
    "DemoResult",
    "Estimate",
    "Exported",
    "Merged",
    "Stopped",
    "chat",
    "check",
    "demo",
    "doctor",
    "estimate",
    "eval",
    "export",
    "init",
    "load_model",
    "merge",
    "pull",
    "serve",
    "train",
]

Say = Callable[[str], None]
pull = hub.pull
chat = open_chat
doctor = examine
serve = server.serve


def check(config: RunConfig, show: int = 0) -> Inspection:
    """Prove data, template, stop tokens and target modules; reads no weights.

    Never raises for a user's mistake: it is in ``.error`` of what is returned, beside the complete counts.
    """
    return inspect(config, keep=False, show=show)


def init(
    to: Path | str,
    model: Path | str | None = None,
    data: Sequence[Path | str] = (),
    output_dir: Path | str | None = None,
    recipe: str | None = None,
) -> Path:
    """Write a commented ``run.yaml``, a recipe's where one is named; an existing file is never overwritten."""
    to = Path(to)
    if to.exists():
        raise ConfigError(f"{to}: is there already", "choose another name with --to, or delete it")
    own = str(model or "MODEL_DIR"), [str(p) for p in data] or ["ROWS.jsonl"], str(output_dir or "run")
    text = recipes.filled(recipe, *own) if recipe is not None else configs.template(*own)
    files.write_text(to, text)
    return to


def load_model(path: Path | str, dtype: str = "float32") -> tuple[Any, Any]:
    """(model, tokenizer) as training uses them: a native transformers model from any published layout.

    dtype: "auto" or a torch type's name. The tokenizer is None where the directory holds none. Raises ModelError.
    """
    path = Path(path)
    config = read_config(path)
    device = pick_device()
    tokenizer = load_tokenizer(path).hf if has_tokenizer(path) else None
    return load_weights(path, pick_dtype(dtype, device), device, config), tokenizer


def estimate(config: RunConfig, with_rows: bool = True, length: int | None = None) -> Estimate:
    """Memory and time of a run at every precision; no weight is read.

    with_rows: count the tokens of ``data.train``; else every row has ``length`` of them (None: ``data.max_length``).
    """
    if with_rows and length is not None:
        raise ConfigError("--length would be ignored: the rows of --data have lengths of their own", "leave it out")
    if with_rows:
        found = inspect(config, keep=False)
        if found.error:
            raise found.error
        return estimating.look(wanted(config, found))
    settings = config.model
    native = read_config(settings.path, settings.rope_theta)
    targets = resolve(empty_model(native), config.lora.target_modules, family_of(settings.path).modules(native))
    rows = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps
    return estimating.look(Wanted(config, native, targets, Rows.of_length(length or config.data.max_length, rows)))


def merge(
    path: Path | str | None = None,
    output_dir: Path | str = "merged",
    model: Path | str | None = None,
    adapter: Path | str | None = None,
    say: Say = lambda _: None,
    layout: str = "native",
) -> Merged:
    """The verb ``merge``: the tuned model as plain safetensors that stock transformers loads, proven by its logits.

    layout: ``original`` for the tensor names and files in which the base was published.
    """
    return merging.merge(locate_adapter(path, model, adapter), Path(output_dir), say, layout)


def export(
    path: Path | str | None = None,
    to: str = "peft",
    output_dir: Path | str = "exported",
    layout: str | None = None,
    model: Path | str | None = None,
    adapter: Path | str | None = None,
    quantization: str | None = None,
    say: Say = lambda _: None,
) -> Exported:
    """The verb ``export``: another tool's format, proven before it is called done.

    to: peft, hf, gguf, gguf-lora or ollama. layout: module names of peft and hf, native or original.
    quantization: of gguf and ollama: f16, q8_0 or q4_0.
    """
    return formats.export(locate_adapter(path, model, adapter), to, Path(output_dir), layout, quantization, say)


def eval(  # noqa: A001 - the verb's name
    path: Path | str | None = None,
    data: Sequence[Path] = (),
    dtype: str = "auto",
    model: Path | str | None = None,
    adapter: Path | str | None = None,
    checkpoint: int | None = None,
    samples: int = REPLIES,
    max_new_tokens: int = NEW_TOKENS,
) -> Comparison:
    """The verb ``eval``: base and tuned model on held-out rows (the run's own where ``data`` is empty).

    samples: how many of the rows' prompts both answer, with ``max_new_tokens`` tokens at most.
    """
    opened = open_chat(path, None, dtype, model, adapter, checkpoint, with_adapter=True)
    return evaluation.evaluate(opened, Path(path) if path else None, data, samples, max_new_tokens)


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Both models on every held-out prompt, in fp32 on the CPU, and the run's summary."""

    base: Scores
    tuned: Scores
    prompts: list[str]
    summary: dict[str, Any]

    @property
    def base_loss(self) -> float:
        """Held-out loss in nats a token."""
        return self.base.held_out.loss

    @property
    def tuned_loss(self) -> float:
        return self.tuned.held_out.loss

    @property
    def loss_fall(self) -> float:
        """Share of the base's held-out loss that training took away."""
        return 1 - self.tuned_loss / self.base_loss

    @property
    def stop_rate(self) -> float:
        return self.tuned.stop_rate or 0.0

    @property
    def base_replies(self) -> tuple[Reply, ...]:
        return self.base.replies

    @property
    def tuned_replies(self) -> tuple[Reply, ...]:
        return self.tuned.replies


def demo(
    output_dir: Path | str,
    on_step: Callable[[StepRecord], None] = lambda _: None,
    say: Say = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> DemoResult:
    """Pull the embedded model, teach it the shipped persona, and compare both on prompts it has never seen."""
    base = pull("smollm2-135m", say=say)
    config = demos.config(base, Path(output_dir))
    RunDir(Path(output_dir)).claim(absolute(config))
    found = inspect(config)
    if found.error:
        raise found.error
    say(f"asking the base model {len(found.chats)} held-out questions")
    before = score(chat(base).generator, found.held_out, found.chats)
    summary = train(config, on_step, say, stop)
    say("asking the tuned model the same questions")
    after = score(chat(output_dir).generator, found.held_out, found.chats)
    return DemoResult(before, after, [c.messages[-2].content for c in found.chats], summary)
