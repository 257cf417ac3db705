"""Teach a chat model a persona: the whole of luthier in one readable loop, from the rows to the adapter.

    python examples/sft_loop.py MODEL_DIR ROWS.jsonl ADAPTER_DIR [KEY=VALUE ...]

The steps and their results are those of ``luthier train``, without its checkpoints, evaluation and compiled layers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from luthier.adapters import directory as adapters
from luthier.batching.collate import to_device
from luthier.batching.plan import Packing, Plan
from luthier.config import build
from luthier.data.loader import Loader
from luthier.devices.device import pick_device, pick_dtype
from luthier.inference.generation import Generator, Sampling
from luthier.lora.layers import attach, resolve
from luthier.models.chat_format import chat_format_of
from luthier.models.directory import fingerprint
from luthier.models.loader import load_weights
from luthier.templates import digest
from luthier.training.forward import loss_sum, segment_attention
from luthier.training.optimizer import learning_rate
from luthier.types import Message


def main(model_dir: Path, rows: Path, adapter_dir: Path, settings: Sequence[str] = ()) -> list[float]:
    """Train an adapter, save it, and print one reply. Returns the loss of every step."""
    config = build({"model": {"path": model_dir}, "data": {"train": [rows]}}, settings=settings)

    # Rows become conversations, and conversations become token ids with a loss mask, in the model's own chat format.
    chat_format = chat_format_of(config)
    loader = Loader(config.data.train, config.data.format, config.data.system)
    encoded = chat_format.encoder(config.data).stream(loader, loader.report)
    conversations, examples = zip(*encoded, strict=True)
    print(f"{len(examples)} of {loader.report.read} rows, {sum(e.supervised for e in examples)} supervised tokens")

    # The base model is frozen; every linear layer of its decoder gets two small trainable matrices.
    device = pick_device()
    model = load_weights(config.model.path, pick_dtype(config.model.dtype, device), device)
    targets = resolve(model, config.lora.target_modules, chat_format.modules())
    layers = attach(model, config.lora, targets, config.train.seed)
    parameters = [p for layer in layers.values() for p in (layer.lora_A, layer.lora_B)]

    # A step is several micro-batches: its loss is the sum over all of them, divided by the step's supervised tokens.
    plan = Plan.of(len(examples), config.train)
    optimizer = torch.optim.AdamW(parameters, weight_decay=config.train.weight_decay)
    losses = []
    model.train()
    with segment_attention(model):  # the rows of a micro-batch lie one after another and do not see each other
        for step, micro_batches in plan.batches(examples, 0, Packing.of(config.train)):
            supervised, total = sum(batch.supervised for batch in micro_batches), 0.0
            for batch in micro_batches:
                loss = loss_sum(model, to_device(batch, device)) / supervised
                torch.autograd.backward(loss)
                total += float(loss.detach())
            torch.nn.utils.clip_grad_norm_(parameters, config.train.max_grad_norm or float("inf"))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, plan.steps, config.train)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
            print(f"step {step + 1}/{plan.steps}: loss {total:.4f}")
    model.eval()

    # The adapter is saved with all that is needed to use it as it was trained: template, stop tokens, base model.
    facts = adapters.Facts(
        system=config.data.system or None,
        template=dict(chat_format.template.describe()),
        template_sha256=digest(chat_format.template),
        stop_ids=chat_format.stop_ids,
        base=fingerprint(config.model.path, chat_format.config),
        tokenizer_sha256=chat_format.tokenizer.digest(),
        data_sha256=loader.fingerprint(),
    )
    adapters.save(adapter_dir, layers, config.lora, targets, facts, config.model.path)

    prompt: list[Message] = [m for m in conversations[0].messages if m.role != "assistant"][:2]
    print(Generator(model, chat_format).reply(prompt, Sampling(max_new_tokens=40)).text)
    return losses


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
