"""Compare an exported model with the reference: base model and adapter as trained, in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from luthier.adapters import directory as adapters
from luthier.adapters.locate import TunedModel
from luthier.evaluation.agreement import chats
from luthier.lora.layers import LoraLinear, disable_adapter
from luthier.models.chat_format import ChatFormat
from luthier.models.directory import read_config
from luthier.models.protocols import CausalLM
from luthier.models.streamed import reader, streamed

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, slots=True)
class Closeness:
    """How far another model's logits are from the tuned model's on ``prompts`` fixed prompts, in fp32.

    largest, mean: absolute differences. size: standard deviation of the tuned model's logits.
    adapter:       mean absolute change of the logits by the adapter.
    left:          share of that change that remains after the merged weights are rounded.
    carried:       share of the remaining change that the other model shows (1: all of it); None if noise hides it.
    """

    prompts: int
    tokens: int
    largest: float
    mean: float
    size: float
    adapter: float
    left: float
    carried: float | None

    def summary(self) -> str:
        """Describe the comparison in one line."""
        return (
            f"logits of merged model and base+adapter on {self.prompts} prompts ({self.tokens} tokens, fp32): "
            f"maximum difference {self.largest:.2g}, mean {self.mean:.2g} (the adapter itself changes them by "
            f"{self.adapter:.2g} on average{self._lost_to_rounding()})"
        )

    def _lost_to_rounding(self) -> str:
        """Describe how much of a change smaller than the rounding is left."""
        return f", of which rounding leaves {self.left:.0%}" if self.left < 0.9 else ""


def tuned_model(tuned: TunedModel, chat_format: ChatFormat) -> tuple[CausalLM, dict[str, LoraLinear]]:
    """Open base model and adapter in fp32; return the model and the adapter's layers by module name.

    The base model has its original weights, even if training used quantised ones. Raises UserError.
    """
    model = streamed(chat_format.config, reader(tuned.base, chat_format.config))
    return model, adapters.apply(model, tuned.adapter, chat_format.modules())


@torch.no_grad()
def logits(model: CausalLM, rows: Sequence[Sequence[int]]) -> Float[Tensor, "tokens vocab"]:
    """Compute the logits at the ends of rows of token ids: [tokens, vocabulary], row after row.

    The first position is ``_LAST_TOKENS`` before the end of the shortest row. Padding is on the right, where causal
    attention does not see it.
    """
    longest, start = max(map(len, rows)), max(0, min(map(len, rows)) - _LAST_TOKENS)
    ids = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows])
    positions = torch.arange(start, longest)
    output = model(ids, use_cache=False, logits_to_keep=positions).logits
    output = output[:, start:] if output.shape[1] == longest else output  # the model ignores that option
    return torch.cat([values[: len(row) - start] for values, row in zip(output, rows, strict=True)])


@contextmanager
def summed(layers: Mapping[str, LoraLinear], dtype: torch.dtype) -> Iterator[None]:
    """Add each update to its base weight when that is loaded, and round the sum to ``dtype``, within the block."""

    def add(layer: LoraLinear) -> Callable[[nn.Module, object], None]:
        def hook(base: nn.Module, _: object) -> None:
            weight = base._parameters["weight"]
            assert weight is not None
            merged = weight + layer.scaling * (layer.lora_B @ layer.lora_A)
            base._parameters["weight"] = nn.Parameter(merged.to(dtype).float(), requires_grad=False)

        return hook

    with ExitStack() as stack:
        for layer in layers.values():
            stack.callback(layer.base.register_forward_pre_hook(add(layer)).remove)
        stack.enter_context(disable_adapter(layers))
        yield


def compare_merged(tuned: TunedModel, chat_format: ChatFormat, merged: Path, dtype: torch.dtype) -> Closeness:
    """Compare the merged model, read from disk, with base and adapter.

    dtype: in which the merged weights are stored. Raises ModelError if the merged model cannot be read.
    """
    rows = [chat_format.prompt_ids(chat) for chat in chats(tuned.system)[:_FOR_LOGITS]]
    model, layers = tuned_model(tuned, chat_format)
    expected = logits(model, rows)
    with disable_adapter(layers):
        base = logits(model, rows)
    with summed(layers, dtype):
        rounded = logits(model, rows)
    config = read_config(merged)
    return closeness(base, expected, rounded, logits(streamed(config, reader(merged, config)), rows), len(rows))


def closeness(
    base: Float[Tensor, "tokens vocab"],
    tuned: Float[Tensor, "tokens vocab"],
    rounded: Float[Tensor, "tokens vocab"],
    other: Float[Tensor, "tokens vocab"],
    prompts: int,
) -> Closeness:
    """Compute how close the logits of ``other`` are to those of ``tuned``; all are [tokens, vocabulary].

    rounded: logits of the tuned model with its merged weights rounded as in the other model.
    """
    change, error = tuned - base, other - tuned
    effect = float(change.square().mean())
    return Closeness(
        prompts=prompts,
        tokens=len(tuned),
        largest=float(error.abs().max()),
        mean=float(error.abs().mean()),
        size=float(tuned.std()),
        adapter=float(change.abs().mean()),
        left=float((change * (rounded - base)).mean()) / effect if effect else 1.0,
        carried=_share(rounded - base, other - base),
    )


def _share(change: Float[Tensor, "tokens vocab"], observed: Float[Tensor, "tokens vocab"]) -> float | None:
    """Return the share of ``change`` that ``observed`` contains; None if it is lost in noise."""
    effect, noise = float(change.square().mean()), float((observed - change).square().mean())
    return float((change * observed).mean()) / effect if effect > noise / 16 else None


_FOR_LOGITS, _LAST_TOKENS = 4, 64  # logits are large: few prompts, and not all tokens of a long system prompt
