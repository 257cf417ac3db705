"""What luthier uses of transformers' models and tokenizers, as types: transformers itself comes without them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, Self

import torch
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped


class ModuleTree(Protocol):
    """The part of ``nn.Module`` that needs no knowledge of what a model computes."""

    training: bool

    def eval(self) -> Self: ...
    def train(self, mode: bool = True) -> Self: ...
    def requires_grad_(self, requires_grad: bool = True) -> Self: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...
    def get_submodule(self, target: str) -> nn.Module: ...
    def state_dict(self) -> Mapping[str, Shaped[Tensor, " ..."]]: ...


class Norm(Protocol):
    """RMS norm of the last dimension."""

    weight: nn.Parameter
    variance_epsilon: float

    def __call__(self, hidden_states: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]: ...


class Decoder(Protocol):
    """The stack of decoder layers of a causal language model."""

    layers: nn.ModuleList
    norm: Norm
    embed_tokens: nn.Module

    def modules(self) -> Iterator[nn.Module]: ...
    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...
    def rotary_emb(
        self, x: Float[Tensor, "1 tokens hidden"], position_ids: Int[Tensor, "1 tokens"]
    ) -> tuple[Float[Tensor, "1 tokens rotary"], Float[Tensor, "1 tokens rotary"]]:
        """cos and sin of the positions: [1, T, rotary] each, in the dtype of ``x``."""
        ...


class Logits(Protocol):
    """The output of a forward pass. logits: [batch, T, vocabulary]."""

    logits: Float[Tensor, "rows tokens vocab"]


class CausalLM(ModuleTree, Protocol):
    """A causal language model of transformers."""

    config: PretrainedConfig
    generation_config: GenerationConfig

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def __call__(self, input_ids: Int[Tensor, "rows tokens"], **options: object) -> Logits: ...
    def get_decoder(self) -> Decoder: ...
    def get_input_embeddings(self) -> nn.Embedding: ...
    def set_input_embeddings(self, value: nn.Module) -> None: ...
    def get_output_embeddings(self) -> nn.Linear: ...
    def set_output_embeddings(self, new_embeddings: nn.Module) -> None: ...
    def disable_input_require_grads(self) -> None: ...
    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> object: ...
    def set_attn_implementation(self, attn_implementation: str) -> None: ...
    def generate(self, inputs: Int[Tensor, "rows tokens"], **options: object) -> Int[Tensor, "rows _tokens"]: ...
    def to(self, *target: torch.device | torch.dtype | str) -> Self: ...


class HfTokenizer(Protocol):
    """A fast tokenizer of transformers."""

    eos_token_id: int | None
    bos_token_id: int | None
    unk_token_id: int | None
    pad_token_id: int | None
    chat_template: str | dict[str, str] | None

    @property
    def backend_tokenizer(self) -> FastTokenizer: ...
    def apply_chat_template(self, conversation: Sequence[Mapping[str, object]], **options: object) -> object: ...
    def save_pretrained(self, save_directory: object) -> object: ...
