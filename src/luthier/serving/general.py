"""Decode a batch with the model's own forward pass, for models that the compiled layers do not support.

Positions and masks are explicit, and the cache is our own: rows of different length, each at its own position.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import Cache

from luthier.errors import ModelError
from luthier.inference.decoding import PREFIX_BYTES, Cancelled, Decoding, Reading
from luthier.lora.layers import frozen_dtype
from luthier.models.directory import attention_windows, rotary_limit
from luthier.models.native_model import first_layers
from luthier.models.protocols import CausalLM
from luthier.serving.adapters import Routes
from luthier.serving.cache import BatchCache, Prefixes, dynamic_cache, layers_in
from luthier.serving.head import slice_head
from luthier.serving.rotary import rotate_by_row
from luthier.training.forward import relative_distance, rounding_bound

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from luthier.serving.cache import Layers

CHUNK = 512  # prompt tokens per forward pass; a prompt can be cancelled between two


class GeneralDecoding:
    """Decoding with the model's own forward pass.

    routes: of the model's ``BankLinear`` layers. memory: limit in bytes for the keys and values of the running rows,
    which form a rectangle as long as the longest row; None: unlimited. prefix_bytes: limit for those of earlier rows.
    """

    def __init__(
        self, model: CausalLM, routes: Routes, memory: int | None = None, prefix_bytes: int = PREFIX_BYTES
    ) -> None:
        self.model = model
        self.routes = routes
        self.cache = BatchCache()
        self._rows: list[Reading] = []
        self._memory = memory
        self._token_bytes = 0  # of the keys and values of one token; known from the first prompt on
        self._prefixes = Prefixes(prefix_bytes)
        self._windows = attention_windows(model.config)
        self._rotary = rotate_by_row(model)
        slice_head(model)

    @property
    def rows(self) -> Sequence[Reading]:
        return list(self._rows)

    @property
    def capacity(self) -> int | None:
        return None

    def admits(self, new: Reading) -> bool:
        longest = max(row.most for row in (*self._rows, new))
        wanted = longest * (len(self._rows) + 1) * self._token_bytes
        return not self._rows or self._memory is None or wanted <= self._memory

    def join(self, new: Reading) -> Float[Tensor, "1 vocab"]:
        logits, layers, new.reused = self.prefill(new, new.ids)
        self._token_bytes = sum(t.numel() // t.shape[2] * t.element_size() for pair in layers for t in pair)
        self._prefixes.keep(self._owner(new.adapter, len(new.ids)), new.ids, layers)
        self._add(new, layers)
        return logits

    def step(self) -> Float[Tensor, "rows vocab"]:
        device = self.model.device
        for row in [r for r in self._rows if self._rotary and len(r.ids) == self._rotary.limit + 1]:
            # the whole row is rotated by other factors from this length on, as in transformers' ``generate``
            self._remove(row)
            self._add(row, self.prefill(replace(row, cancelled=lambda: False), row.ids[:-1], len(row.ids))[1])
        positions = self.cache.begin(device)
        self.routes.set([r.adapter for r in self._rows], device)
        ids = torch.tensor([[r.ids[-1]] for r in self._rows], device=device)
        logits = self.forward(ids, positions, int(positions.max()) + 1, self.cache)
        self.cache.end()
        return logits

    def leave(self, row: Reading) -> None:
        at = self._rows.index(row)
        ids = row.ids[: self.cache.lengths[at]]
        self._prefixes.keep(self._owner(row.adapter, len(ids)), ids, self.cache.layers_of(at))
        self._remove(row)

    def _add(self, row: Reading, layers: Layers) -> None:
        self.cache.add(layers)
        self._rows.append(row)

    def _remove(self, row: Reading) -> None:
        at = self._rows.index(row)
        self.cache.remove(at)
        self._rows[at] = self._rows[-1]
        self._rows.pop()

    def _owner(self, adapter: str | None, length: int) -> Hashable:
        """Return what the keys and values of a row of ``length`` tokens depend on besides its tokens."""
        return adapter, self._rotary is not None and length > self._rotary.limit

    def prefill(
        self, row: Reading, ids: Sequence[int], length: int | None = None
    ) -> tuple[Float[Tensor, "1 vocab"], Layers, int]:
        """Return a prompt's last logits [1, vocabulary], its keys and values, and how many tokens were cached.

        length: of the row that the prompt is the start of, if more tokens follow that are already known. Raises
        Cancelled.
        """
        device, length = self.model.device, length or len(ids)
        prefix = self._prefixes.longest(self._owner(row.adapter, length), ids)
        start = reused = prefix[0][0].shape[2] if prefix else 0
        cache = dynamic_cache(prefix)
        self.routes.set([row.adapter], device)
        logits = torch.empty(0)
        while start < len(ids):
            if row.cancelled():
                raise Cancelled
            part = ids[start : start + CHUNK]
            end = start + len(part)
            positions = torch.arange(start, end, device=device)[None]
            row_lengths = torch.tensor([[length]], device=device)
            logits = self.forward(torch.tensor([part], device=device), positions, end, cache, row_lengths)
            start = end
        return logits, layers_in(cache), reused

    def forward(
        self,
        ids: Int[Tensor, "rows tokens"],
        positions: Int[Tensor, "rows tokens"],
        length: int,
        cache: Cache,
        row_lengths: Int[Tensor, "rows 1"] | None = None,
    ) -> Float[Tensor, "rows vocab"]:
        """Run the model on ids and positions [rows, tokens]; returns the last tokens' logits [rows, vocabulary].

        length: number of keys, cached ones included. row_lengths: default: up to the one token of each row.
        """
        lengths = positions + 1 if row_lengths is None else row_lengths
        with self._rotary.rows_of(lengths) if self._rotary else nullcontext():
            out = self.model(
                input_ids=ids,
                attention_mask=self._mask(positions, length),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return out.logits[:, -1].float()

    def _mask(
        self, positions: Int[Tensor, "rows tokens"], length: int
    ) -> Float[Tensor, "rows 1 tokens keys"] | dict[str, Float[Tensor, "rows 1 tokens keys"]]:
        """Return the mask [rows, 1, tokens, length]: 0 for visible keys, -inf elsewhere.

        If the model's layers differ, one mask per type of layer.
        """
        age = positions[:, None, :, None] - torch.arange(length, device=positions.device)

        def within(window: int | None) -> Tensor:
            visible = age >= 0 if window is None else (age >= 0) & (age < window)
            mask = torch.zeros(visible.shape, dtype=frozen_dtype(self.model), device=visible.device)
            return mask.masked_fill_(~visible, float("-inf"))

        if isinstance(self._windows, dict):
            return {kind: within(window) for kind, window in self._windows.items()}
        return within(self._windows)


def verify_batching(decoding: Decoding, adapter: str | None = None, tokens: int = 24) -> None:
    """Verify that decoding token by token in a batch gives the same logits as one forward pass. Raises ModelError.

    It does not for models that carry state from token to token (convolutions, recurrences).
    """
    if not isinstance(decoding, GeneralDecoding):
        return
    model, cache = decoding.model, decoding.cache
    vocabulary = model.config.get_text_config().vocab_size
    tokens = min(tokens, rotary_limit(model.config) or tokens)
    ids = [(7 + 13 * i) % vocabulary for i in range(tokens)]
    half = tokens // 2
    try:
        with torch.inference_mode(), first_layers(model) as depth:
            row = Reading([], adapter)
            whole, _, _ = decoding.prefill(row, ids)
            cache.add(decoding.prefill(row, ids[:half])[1])
            cache.add(decoding.prefill(row, ids[: half - 3])[1])
            for at in range(half, tokens):
                positions = cache.begin(model.device)
                decoding.routes.set([adapter, adapter], model.device)
                pair = torch.tensor([[ids[at]], [ids[at - 3]]], device=model.device)
                stepped = decoding.forward(pair, positions, at + 1, cache)
                cache.end()
            prompt = torch.tensor([ids], device=model.device)
            expected = model(input_ids=prompt, use_cache=False).logits[0, -1:]
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as e:
        raise _cannot(model, f"decoding a batch fails ({' '.join(str(e).split())[:120]})") from None
    finally:
        decoding.cache = BatchCache()
    distance = max(relative_distance(logits, expected.float()) for logits in (whole, stepped[:1]))
    if distance > rounding_bound(frozen_dtype(model), depth):
        raise _cannot(model, "decoding token by token gives other results than one forward pass")


def _cannot(model: CausalLM, why: str) -> ModelError:
    return ModelError(f"models of type {model.config.model_type} cannot be served: {why}", "use luthier chat instead")
