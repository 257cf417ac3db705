"""Teach a chat model a persona: the whole of luthier in one readable loop, from the rows to the adapter.

    python examples/sft_loop.py MODEL_DIR ROWS.jsonl ADAPTER_DIR [KEY=VALUE ...]

The steps and their results are those of ``luthier train`` without compiled layers (``train.fused=false``). Left out are
checkpoints, the evaluation, the check of memory, and the checks that loss and gradients are finite; settings of these
have no effect.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from luthier.adapters import directory as adapters
from luthier.batching.collate import to_device
from luthier.batching.plan import Packing, Plan
from luthier.config import build
from luthier.devices.device import pick_device
from luthier.encoding.rows import encode_rows
from luthier.inference.generation import Generator
from luthier.inference.sampling import Sampling
from luthier.lora.layers import attach, frozen_dtype, resolve, share_dropout_state
from luthier.models.chat_format import chat_format_of
from luthier.models.directory import fingerprint
from luthier.models.loader import open_base, training_dtype
from luthier.templates import digest
from luthier.training.forward import checkpointing, loss_sum, segment_attention, verify_segments
from luthier.training.optimizer import Optimizer, learning_rate


def main(model_dir: Path, data: Path, adapter_dir: Path, settings: Sequence[str] = ()) -> list[float]:
    """Train an adapter, save it, and print one reply. Returns the loss of every step."""
    config = build({"model": {"path": model_dir}, "data": {"train": [data]}}, settings=settings)

    # Rows become conversations, and conversations become token ids with a loss mask, in the model's own chat format.
    chat_format = chat_format_of(config)
    rows = encode_rows(config.data, config.train.seed, chat_format.encoder(config.data))
    if rows.report.error:
        raise rows.report.error
    print(f"{len(rows.train)} of {rows.report.data_report.read} rows are trained, {len(rows.held_out)} held out")

    # The base model is frozen; every linear layer of its decoder gets two small trainable matrices.
    device, attention = pick_device(), config.model.attn_implementation
    model = open_base(config.model, training_dtype(config.model, device), device, chat_format.config)
    verify_segments(model, rows.train, attention)
    targets = resolve(model, config.lora.target_modules, chat_format.modules())
    layers = attach(model, config.lora, targets, config.train.seed)

    # A step is several micro-batches: its loss is the sum over all of them, divided by the step's supervised tokens.
    plan = Plan.of(len(rows.train), config.train)
    parameters = [p for layer in layers.values() for p in (layer.lora_A, layer.lora_B)]
    optimizer = Optimizer(parameters, config.train, fp16=frozen_dtype(model) is torch.float16)
    dropout = share_dropout_state(layers)  # masks are computed from the seed and these counters, nothing is stored
    dropout.seed = config.train.seed
    losses = []
    model.train()
    # the rows of a micro-batch lie one after another and do not see each other
    with segment_attention(model, attention), checkpointing(model, config.train.gradient_checkpointing is True):
        for step, micro_batches in plan.batches(rows.train, 0, Packing.of(config.train)):
            supervised, total = sum(batch.supervised for batch in micro_batches), 0.0
            for micro, batch in enumerate(micro_batches):
                dropout.step, dropout.micro = step, micro
                loss = loss_sum(model, to_device(batch, device)) / supervised
                optimizer.backward(loss)
                total += float(loss.detach())
            optimizer.unscale()
            optimizer.update(learning_rate(step, plan.steps, config.train))
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
        data_sha256=rows.report.fingerprint,
        rope_theta=config.model.rope_theta,
    )
    adapters.save(adapter_dir, layers, config.lora, targets, facts, config.model.path)

    prompt = list(itertools.takewhile(lambda m: m.role != "assistant", rows.report.samples[0].messages))
    print(Generator(model, chat_format).reply(prompt, Sampling(max_new_tokens=40)).text)
    return losses


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
