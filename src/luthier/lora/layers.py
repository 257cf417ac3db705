"""Define ``LoraLinear`` and choose the linear layers that it replaces."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.config import LoraConfig
from luthier.errors import ConfigError
from luthier.kernels.dropout import DropoutState, dropout
from luthier.models.directory import check_names, same_role
from luthier.models.families import Modules
from luthier.models.native_model import is_linear
from luthier.models.protocols import ModuleTree
from luthier.models.quantization import QuantLinear

if TYPE_CHECKING:
    from jaxtyping import Float

# layers that read the same input share its dropout mask
_INPUTS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
_ROUTER = re.compile(r"(.*\.)?(\w*router\w*|gate|shared_expert_gate)(\..*)?")  # a module that weighs experts
_LAYER = re.compile(r".*?\.\d+\.")  # the start of a module's name, up to the number of its layer
_NOTABLE = 0.05  # share of the model's parameters


class LoraLinear(nn.Module):
    """A frozen linear layer plus ``scaling * B(A(dropout(x)))``; A and B are fp32, computed in the input's dtype.

    x [..., in] -> [..., out]; A [r, in], B [out, r]. Named as in PEFT (``lora_A``, ``lora_B``).
    Source: Hu et al. 2021, arXiv 2106.09685; rank-stabilised scaling: Kalajdzievski 2023, arXiv 2312.03732.
    """

    def __init__(self, base: nn.Linear | QuantLinear, config: LoraConfig) -> None:
        super().__init__()
        self.base = base
        self.scaling = scaling(config)
        self.dropout = config.lora_dropout
        self.dropout_state, self.dropout_group = DropoutState(), 0  # see ``share_dropout_state``
        self.enabled = True
        device = base.device if isinstance(base, QuantLinear) else base.weight.device
        self.lora_A = nn.Parameter(torch.empty(config.r, base.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.r, dtype=torch.float32, device=device))

    def reset(self, generator: torch.Generator) -> None:
        """Initialise A uniformly in +-1/sqrt(in) (PEFT's default) and B with zeros, so that the model is unchanged."""
        bound = 1 / math.sqrt(self.base.in_features)
        initial = torch.empty(self.lora_A.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.lora_A.copy_(initial)
            self.lora_B.zero_()

    @torch.no_grad()
    def set_update(self, a: Float[Tensor, "rank in"], b: Float[Tensor, "out rank"]) -> None:
        """Set the values of A and B. Over a base whose weights are read when they are needed, they are on the CPU."""
        for name, value in (("lora_A", a), ("lora_B", b)):
            parameter: nn.Parameter = getattr(self, name)
            if parameter.is_meta:
                setattr(self, name, nn.Parameter(value.detach().to("cpu", torch.float32, copy=True)))
            else:
                parameter.copy_(value)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if not self.enabled:
            base_out: Tensor = self.base(x)
            return base_out
        dropped = self.dropout and self.training
        u = dropout(x, self.dropout, self.dropout_state.key(self.dropout_group)) if dropped else x
        inner = F.linear(u, self.lora_A.to(x.dtype)) * self.scaling
        out: Tensor = self.base(x) + F.linear(inner, self.lora_B.to(x.dtype))
        return out


def scaling(config: LoraConfig) -> float:
    """Return the factor of the update: alpha / rank, or alpha / sqrt(rank) if rank-stabilised."""
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


@dataclass(frozen=True, slots=True)
class Targets:
    """The layers that get an adapter.

    modules: full module names.
    leaves:  PEFT target names that select the same modules.
    notes:   messages for the user.
    """

    modules: tuple[str, ...]
    leaves: tuple[str, ...]
    notes: tuple[str, ...] = ()


def resolve(model: ModuleTree, requested: Sequence[str] | None, published: Modules | None = None) -> Targets:
    """Choose the linear layers that get an adapter; works on the meta device, before weights are read.

    requested: names that match as in PEFT: a full module name, or the end of one after a dot. None: every linear layer
        of the decoder except the head and the routers of experts.
    published: the checkpoint's own module names (``Family.modules``), replaced by their native modules.
    A note reports weights that are not in linear layers, such as those of experts, if they are many.
    Raises ConfigError listing every name that matches nothing.
    """
    head_of: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = head_of()
    decoder_of: Any = getattr(model, "get_decoder", lambda: None)
    inside = {id(m) for m in (decoder_of() or model).modules()}  # excludes a vision tower, for example
    linear = [n for n, m in model.named_modules() if is_linear(m) and m is not head and id(m) in inside]
    default = [n for n in linear if not _ROUTER.fullmatch(n)]
    name = str(getattr(getattr(model, "config", None), "model_type", "this model"))
    if not default:
        raise ConfigError(f"{name} models have no linear layer for an adapter", "use another model")
    frozen = _frozen_weights(model, inside)
    if requested is None:
        return Targets(tuple(default), _leaves(default), _notes(model, frozen, _leaves(default)))
    requested, notes = _to_native_names(requested, linear, published or {})
    unknown = [r for r in requested if not any(_matches(n, r) for n in linear)]
    reasons = {r: f.reason for r in unknown for f in frozen[::-1] if f.includes(r)}  # the first that includes it
    check_names(unknown, _leaves(linear), f"a {name} model", ConfigError, reasons)
    chosen = tuple(n for n in linear if any(_matches(n, r) for r in requested))
    leaves = tuple(dict.fromkeys(requested))
    return Targets(chosen, leaves, (*notes, *_notes(model, frozen, leaves)))


def _leaves(modules: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(n.rpartition(".")[2] for n in modules))


@dataclass(frozen=True, slots=True)
class _Frozen:
    """Weights of a module that no adapter can change, because it is not a linear layer.

    module: its name within the decoder layer. kind: its class. parameters: their names. size: elements in all layers.
    """

    module: str
    kind: str
    parameters: tuple[str, ...]
    size: int

    @property
    def is_router(self) -> bool:
        return _ROUTER.fullmatch(self.module) is not None

    @property
    def is_expert(self) -> bool:
        return not self.is_router and "expert" in f"{self.module} {self.kind}".lower()

    @property
    def reason(self) -> str:
        """Why a name that means these weights is refused."""
        if self.is_router or self.is_expert:
            return f"it belongs to the {'router' if self.is_router else 'experts'} ({self.module}, {self.kind})"
        return f"it belongs to {self.module}, which is not a linear layer but {self.kind}"

    def includes(self, requested: str) -> bool:
        """Whether a requested name means these weights, or those of one expert (``experts.0.w1``)."""
        names = [self.module, *(f"{self.module}.{p}" for p in self.parameters)]
        leaf = requested.rpartition(".")[2]
        return any(_matches(n, requested) or _matches(requested, n) for n in names) or (
            self.is_expert and any(same_role(leaf, p) for p in self.parameters)
        )


def _frozen_weights(model: ModuleTree, inside: Collection[int]) -> list[_Frozen]:
    """Collect the matrices in the decoder's layers that are not in linear layers. inside: the decoder's modules."""
    sizes: dict[tuple[str, str], dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        module, layer = model.get_submodule(path), _LAYER.match(path)
        if parameter.ndim > 1 and layer and id(module) in inside and not is_linear(module):
            own = sizes.setdefault((path[layer.end() :], type(module).__name__), {})
            own[leaf] = own.get(leaf, 0) + parameter.numel()
    return [_Frozen(module, kind, tuple(own), sum(own.values())) for (module, kind), own in sizes.items()]


def _notes(model: ModuleTree, frozen: Sequence[_Frozen], leaves: Sequence[str]) -> tuple[str, ...]:
    """Report weights that stay frozen although they do much of the work. leaves: what is trained."""
    total = sum(p.numel() for p in model.parameters())
    largest = [f for f in frozen if f.size > total / 100]
    share = sum(f.size for f in largest) / total
    if share < _NOTABLE:
        return ()
    names = f"{', '.join(f.module for f in largest)}, {share:.0%} of the parameters"
    what = "the experts" if all(f.is_expert for f in largest) else "weights outside linear layers"
    return (f"{what} ({names}) stay frozen: LoRA trains linear layers only, here {', '.join(leaves)}",)


def _to_native_names(
    requested: Sequence[str], linear: Sequence[str], published: Modules
) -> tuple[list[str], tuple[str, ...]]:
    """Replace published module names by native ones; returns the names and a note per replacement."""
    names: list[str] = []
    notes: list[str] = []
    for name in requested:
        native = [part for old, parts in published.items() if _matches(old, name) for part, _ in parts]
        if not native or any(_matches(n, name) for n in linear):
            names.append(name)
            continue
        matching = native if "." in name else [part.rpartition(".")[2] for part in native]
        replacements = list(dict.fromkeys(matching))
        names += replacements
        notes.append(f"{name} means {', '.join(replacements)} here")
    return names, tuple(notes)


def attach(
    model: ModuleTree,
    config: LoraConfig,
    targets: Targets,
    seed: int,
    configs: Mapping[str, LoraConfig] | None = None,
) -> dict[str, LoraLinear]:
    """Freeze the model and replace every target by a ``LoraLinear``, in place; returns them by module name.

    Each is in the mode, training or evaluation, of the layer that it replaces: dropout applies in training only.

    seed:    initialises A.
    configs: settings of modules with their own rank or alpha.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, LoraLinear] = {}
    groups: dict[str, int] = {}
    for name in targets.modules:
        parent, _, leaf = name.rpartition(".")
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear | QuantLinear)
        layer = LoraLinear(base, (configs or {}).get(name, config)).train(base.training)
        if not layer.lora_A.is_meta:
            layer.reset(generator)
        layer.dropout_group = groups.setdefault(f"{parent}.{_INPUTS.get(leaf, leaf)}", len(groups))
        setattr(model.get_submodule(parent), leaf, layer)
        layers[name] = layer
    return layers


def detach(model: ModuleTree, layers: dict[str, LoraLinear]) -> None:
    """Restore the linear layers of the base model."""
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.base)


def share_dropout_state(layers: Mapping[str, LoraLinear]) -> DropoutState:
    """Give all layers one new dropout state, which the caller advances every step; returns it."""
    state = DropoutState()
    for layer in layers.values():
        layer.dropout_state = state
    return state


@contextmanager
def disable_adapter(layers: Mapping[str, LoraLinear]) -> Iterator[None]:
    """Disable the adapter within the block, so that the model computes as its base."""
    before = [layer.enabled for layer in layers.values()]
    for layer in layers.values():
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers.values(), before, strict=True):
            layer.enabled = enabled


def frozen_dtype(model: ModuleTree) -> torch.dtype:
    """Return the dtype that the base computes in; adapters are always fp32."""
    return next(
        (
            p.dtype
            for n, p in model.named_parameters()
            if p.is_floating_point() and not n.endswith(("lora_A", "lora_B"))
        ),
        torch.float32,
    )


def trainable_parameters(layers: dict[str, LoraLinear]) -> int:
    """Count the trainable parameters of the adapter."""
    return sum(p.numel() for layer in layers.values() for p in layer.parameters() if p.requires_grad)


def _matches(module: str, requested: str) -> bool:
    return module == requested or module.endswith("." + requested)
