"""Match a checkpoint's tensors to a model before anything is loaded; use and verify parts of a loaded model."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from luthier import __version__
from luthier._util import files
from luthier.devices.device import cpu_name
from luthier.errors import ModelError, UserError, listed
from luthier.kernels import native
from luthier.models.checkpoint_reader import Shape, Shards
from luthier.models.directory import family_of, generation_config
from luthier.models.families import Rule
from luthier.models.protocols import CausalLM, ModuleTree
from luthier.models.quantization import QuantLinear

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped
# tables stored in older checkpoints that every native class computes itself
_BUFFERS = re.compile(r"(.*\.)?(inv_freq|rotary_emb\.\w+_cached|masked_bias|rotary_pos_emb\.\w+)")

_EXPERT = re.compile(r"unexpected: .*\.experts\.\d")


@dataclass(slots=True)
class Fit:
    """The result of matching a checkpoint to a model.

    rules:    published name -> its conversion rule.
    problems: one line per tensor that does not match.
    ignored:  published buffers that the model computes itself.
    missing:  native names that are absent because they are tied to others.
    """

    rules: dict[str, Rule] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def summary(self, limit: int = 20) -> str:
        """Join the first ``limit`` problems and count the others."""
        return listed(self.problems, limit, "; ")


def match(shapes: Mapping[str, Shape], rules: Sequence[Rule], model: CausalLM) -> Fit:
    """Compare the tensor shapes of a checkpoint with a model on the meta device.

    rules: the rules of the family; empty if published and native names are the same.
    """
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    known = {r.source: r for r in rules or (Rule(name, (name,)) for name in expected)}
    fit, wrong = Fit(), dict[str, str]()
    for name, shape in shapes.items():
        rule = known.get(name)
        if rule is None:
            ignored = _BUFFERS.fullmatch(name) or _ignored_by_transformers(model, name)
            (fit.ignored if ignored else fit.problems).append(name if ignored else f"unexpected: {name}")
            continue
        fit.rules[name] = rule
        expected_shape = _published_shape(rule, expected)
        if expected_shape != shape:
            wrong[name] = f"mismatched: {name} is {list(shape)}, expected {list(expected_shape)}"
    present = {part for rule in fit.rules.values() for part in rule.parts}
    missing = [name for name in expected if name not in present]
    pairs = {**tied, **{source: target for target, source in tied.items()}}
    fit.missing = [name for name in missing if pairs.get(name) in present]
    untied = [name for name in missing if name not in fit.missing]
    source = {part: rule.source for rule in known.values() for part in rule.parts}
    absent = dict.fromkeys(source.get(name, name) for name in untied)
    fit.problems = [
        *(f"missing: {name}" for name in collapse(absent)),
        *(f"unexpected: {name}" for name in collapse(p.removeprefix("unexpected: ") for p in fit.problems)),
        *wrong.values(),
    ]
    return fit


def collapse(names: Iterable[str]) -> list[str]:
    """Join names that differ only in the layer: ``model.layers.0-31.mlp.up_proj.weight`` for 32 names."""
    groups: dict[str, list[int | None]] = {}
    for name in names:
        layer = re.search(r"\.(\d+)\.", name)
        key = name[: layer.start(1)] + "{}" + name[layer.end(1) :] if layer else name
        groups.setdefault(key, []).append(int(layer.group(1)) if layer else None)
    return [key.replace("{}", _ranges([n for n in layers if n is not None])) for key, layers in groups.items()]


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def _published_shape(rule: Rule, expected: Mapping[str, Shape]) -> Shape:
    parts = [expected[name] for name in rule.parts]
    return (sum(p[0] for p in parts), *parts[0][1:]) if len(parts) > 1 else parts[0]


def _ignored_by_transformers(model: CausalLM, name: str) -> bool:
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(p, name) for p in patterns)


def empty_model(config: PretrainedConfig) -> CausalLM:
    """Build the model on the meta device: names and shapes, no memory. Raises ModelError."""
    with torch.device("meta"):
        return _build(config)


def base_parameters(config: PretrainedConfig) -> int:
    """Count the parameters of the model without adapters; tied ones count once."""
    return sum(p.numel() for p in empty_model(config).parameters())


def _build(config: PretrainedConfig, dtype: torch.dtype | None = None) -> CausalLM:
    try:
        with no_init_weights():  # they would be replaced
            model: CausalLM = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.tie_weights(recompute_mapping=False)
    except Exception as e:  # sizes that do not fit each other, unknown activations, ...
        raise ModelError(
            f"config.json does not describe a valid model ({' '.join(str(e).split())[:200]})",
            "download the model again",
        ) from None
    return model


@contextmanager
def first_layers(model: CausalLM) -> Iterator[int]:
    """Keep only the first decoder layers within the block, up to the first one of the last kind; yields their number.

    What holds for one layer of each kind (attention over all tokens or over a window, with experts or without) holds
    for the model, and a large model takes seconds instead of a minute.
    """
    decoder, config = model.get_decoder(), model.config.get_text_config()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        yield int(config.num_hidden_layers)
        return
    names = getattr(config, "layer_types", None) or [None] * len(layers)
    kinds = [(name, _kind(layer)) for name, layer in zip(names, layers, strict=False)]
    depth = 1 + max((kinds.index(kind) for kind in kinds), default=0)
    decoder.layers = layers[:depth]
    try:
        yield depth
    finally:
        decoder.layers = layers


def _kind(layer: nn.Module) -> tuple[object, ...]:
    """Return what distinguishes kinds of layers: their modules, sizes and options, but not their number."""
    options = [
        (name, key, value)
        for name, module in layer.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, bool | int | str | None) and not key.startswith(("_", "training", "layer_i", "dropout_g"))
    ]
    return str(layer), *options


def finish(model: CausalLM, path: Path, fit: Fit, device: torch.device | str) -> CausalLM:
    """Tie weights, read generation_config.json, move the model to ``device`` and put it in evaluation mode."""
    model.tie_weights(missing_keys=set(fit.missing), recompute_mapping=False)
    if (path / "generation_config.json").is_file():
        model.generation_config = generation_config(path)
    return with_contiguous_head(model.to(device).eval())


def with_contiguous_head(model: CausalLM) -> CausalLM:
    """Let the head copy an input whose rows are apart, such as the last tokens of several prompts.

    In bfloat16 torch would copy the whole weight once per row: for 8 rows of a 7B model, 6.6 GB and half a minute.
    """
    if head := model.get_output_embeddings():
        head.register_forward_pre_hook(_contiguous)
    return model


def _contiguous(_head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in inputs)


def native_names(path: Path, config: PretrainedConfig) -> list[str]:
    """List the native names of the checkpoint's tensors in file order, reading only headers. Raises ModelError."""
    shards = Shards.open(path)
    fit = match(shards.shapes, family_of(path).rules(config), empty_model(config))
    refuse_unfit(shards, fit)
    return [part for name in shards.in_file_order() if name in fit.rules for part in fit.rules[name].parts]


def published_tensors(
    path: Path, config: PretrainedConfig
) -> Iterator[tuple[str, Rule | None, Shaped[Tensor, " ..."]]]:
    """Iterate over (published name, conversion rule, tensor as stored); the rule is None for tensors that are ignored.

    Raises ModelError as ``load_weights`` does, before the first tensor is read.
    """
    shards = Shards.open(path)
    fit = match(shards.shapes, family_of(path).rules(config), empty_model(config))
    refuse_unfit(shards, fit)
    for name in shards.in_file_order():
        yield name, fit.rules.get(name), shards.read(name)


def native_tensors(
    shards: Shards, fit: Fit, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Shaped[Tensor, " ..."]]]:
    """Iterate over every native tensor in ``dtype``, or as stored. Raises ModelError if the checkpoint does not fit."""
    refuse_unfit(shards, fit)
    names = (n for n in shards.in_file_order() if n in fit.rules)
    for parts in shards.read_ahead(names, lambda name: fit.rules[name].read(shards, dtype)):
        yield from parts


def refuse_unfit(shards: Shards, fit: Fit) -> None:
    """Raise ModelError if a checkpoint does not fit the model."""
    if any(_EXPERT.match(p) for p in fit.problems) and any(p.startswith("missing: ") for p in fit.problems):
        raise ModelError(
            f"{shards.path}: stores each expert on its own; transformers joins them while it loads the model, and "
            "luthier can neither quantise, merge nor export such a model",
            "train with --set model.load_in_4bit=false --set model.load_in_8bit=false, and use the adapter with peft",
        )
    if fit.problems:
        raise ModelError(
            f"{shards.path}: the weights do not fit the model ({fit.summary()})", "download the model again"
        )


def empty_with_buffers(config: PretrainedConfig, dtype: torch.dtype) -> CausalLM:
    """Build the model with parameters on the meta device and computed buffers in memory, like ``from_pretrained``."""
    with init_empty_weights(include_buffers=False):
        return _build(config, dtype)


def put(model: CausalLM, name: str, tensor: Shaped[Tensor, " ..."]) -> None:
    """Set the value of a parameter or buffer."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    else:
        module._buffers[leaf] = tensor


PIECE = 1 << 23  # elements of a weight that are converted together


def widened(
    x: Float[Tensor, "*batch in"], weight: Callable[[], Float[Tensor, "out in"]]
) -> Float[Tensor, "*batch out"]:
    """Return x [..., in] times the frozen weight [out, in], in the dtype of ``x``; the weight is converted in pieces.

    weight: called in the forward and again in the backward pass, so that a dequantised one need not be kept.
    """
    out: Tensor = _Widened.apply(x, weight)  # type: ignore[no-untyped-call]
    return out


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "*batch in"], weight: Callable[[], Float[Tensor, "out in"]]
    ) -> Float[Tensor, "*batch out"]:
        ctx.weight = weight
        return torch.cat([x @ block.to(x.dtype).T for block in _pieces(weight())], dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "*batch out"]) -> tuple[Float[Tensor, "*batch in"], None]:
        pieces = _pieces(ctx.weight())
        parts = zip(torch.split(grad, [len(w) for w in pieces], dim=-1), pieces, strict=True)
        grad_input: Tensor = sum(g @ w.to(g.dtype) for g, w in parts)  # type: ignore[assignment]
        return grad_input, None


def _pieces(weight: Float[Tensor, "out in"]) -> tuple[Float[Tensor, "rows in"], ...]:
    return torch.split(weight.detach(), rows_of(weight))


def rows_of(weight: Float[Tensor, "out in"]) -> int:
    """Number of rows of a weight that are converted together."""
    return max(1, PIECE // weight.shape[1])


def is_linear(module: object) -> TypeGuard[nn.Linear | QuantLinear]:
    """Whether a module computes a linear layer and nothing else; a subclass (Llama 4's router) may compute more."""
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain or isinstance(module, QuantLinear)


@contextmanager
def in_fp32(model: CausalLM) -> Iterator[None]:
    """Let the model compute in fp32 within the block, from its weights as they are; they are widened one at a time."""
    embedding: nn.Module = model.get_input_embeddings()  # of a quantised model, it is a class of its own
    with ExitStack() as stack:
        stack.enter_context(linears_in_fp32(model))
        for _, module in model.named_modules():
            if module is embedding or isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_hook(lambda _module, _input, out: out.float()).remove)
            elif not is_linear(module):
                stack.enter_context(_widened_while_called(module))
        yield


@contextmanager
def _widened_while_called(module: nn.Module) -> Iterator[None]:
    """Convert a module's own parameters, such as those of a norm or of experts, to fp32 for each of its calls."""
    own = [(p, p.data) for p in module.parameters(recurse=False) if p.is_floating_point()]

    def widen(*_: object) -> None:
        for p, values in own:
            p.data = values.float()

    def narrow(*_: object) -> None:
        for p, values in own:
            p.data = values

    hooks = (
        (module.register_forward_pre_hook(widen), module.register_forward_hook(narrow, always_call=True)) if own else ()
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        narrow()


@contextmanager
def linears_in_fp32(module: ModuleTree) -> Iterator[None]:
    """Let the module's frozen linear layers compute in fp32 within the block; weights are converted piecewise."""
    linears = [m for _, m in module.named_modules() if is_linear(m)]
    for linear in linears:
        vars(linear)["forward"] = partial(_linear, linear)
    try:
        yield
    finally:
        for linear in linears:
            del vars(linear)["forward"]


def _linear(linear: nn.Linear | QuantLinear, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
    """Compute a frozen linear layer in the dtype of ``x``."""
    out = widened(x, linear.dequantised if isinstance(linear, QuantLinear) else lambda: linear.weight)
    return out if linear.bias is None else out + linear.bias.to(x.dtype)


REMEMBER = True
_SAMPLES = 32  # tensors, and values of each


def verify_once(name: str, model: CausalLM, facts: Sequence[object], verify: Callable[[], None]) -> None:
    """Call ``verify``, which raises if it fails, unless it has passed before for this model, machine and versions.

    facts: what it depends on besides the model's frozen weights and configuration, as JSON or with a ``repr``.
    """
    if not REMEMBER:
        verify()
        return
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = [__version__, *(version(p) for p in ("torch", "transformers")), cpu_name(), native.identity(), gpu]
    parts = [name, machine, str(model.device), model.config.to_dict(), model.config._attn_implementation, list(facts)]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode())
    tensors = {k: tensor for k, tensor in model.state_dict().items() if not k.endswith(("lora_A", "lora_B"))}
    for i, (key, tensor) in enumerate(tensors.items()):
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if i % max(1, len(tensors) // _SAMPLES) == 0:
            digest.update(tensor.flatten()[:_SAMPLES].cpu().view(torch.uint8).numpy().tobytes())
    file = files.cache_root() / "verified" / f"{digest.hexdigest()[:20]}.json"
    if files.exists(file):
        return
    verify()
    with suppress(UserError):  # verified again next time
        files.write_json(file, {"verified": name})
