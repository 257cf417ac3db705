"""Write a GGUF file with random 4-bit weights in the shape of a model, to measure llama.cpp at that shape.

    python benchmarks/shape_gguf.py --model DIR --output FILE

The types are those of llama.cpp's own Q4_0: Q4_0 for the linear layers and the embedding, Q6_K for the head. The file
has no vocabulary, so it reads and returns token ids only.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from luthier.exporting.gguf.architectures import architecture, write_hyperparameters
from luthier.models.directory import read_config

_Q4_0, _Q6_K = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q6_K
_SCALE_AT = {_Q4_0: 0, _Q6_K: 208}  # of the fp16 scale within a block
_SCALE = 0.002


def random_blocks(rows: int, columns: int, kind: GGMLQuantizationType, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return random values of a quantised tensor [rows, columns], with small scales: [rows, bytes]."""
    size, length = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows * columns // size, length), dtype=np.uint8)
    scale = np.frombuffer(np.float16(_SCALE).tobytes(), np.uint8)
    blocks[:, _SCALE_AT[kind] : _SCALE_AT[kind] + 2] = scale
    return blocks.reshape(rows, -1)


def write(model: Path, output: Path) -> None:
    config: Any = read_config(model)
    rng = np.random.default_rng(0)
    hidden, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    q, kv = head * config.num_attention_heads, head * config.num_key_value_heads
    writer = GGUFWriter(output, architecture(config).name, use_temp_file=True)
    write_hyperparameters(writer, config)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("none")

    def matrix(name: str, rows: int, columns: int, kind: GGMLQuantizationType = _Q4_0) -> None:
        writer.add_tensor(f"{name}.weight", random_blocks(rows, columns, kind, rng), raw_dtype=kind)

    matrix("token_embd", vocabulary, hidden)
    matrix("output", vocabulary, hidden, _Q6_K)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for i in range(config.num_hidden_layers):
        layer = f"blk.{i}."
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{layer}{norm}.weight", np.ones(hidden, np.float32))
        for name, rows in (("attn_q", q), ("attn_k", kv), ("attn_v", kv)):
            matrix(layer + name, rows, hidden)
            if getattr(config, "attention_bias", False):
                writer.add_tensor(f"{layer}{name}.bias", np.zeros(rows, np.float32))
        matrix(f"{layer}attn_output", hidden, q)
        if config.model_type == "glm":  # gate's rows first
            matrix(f"{layer}ffn_up", 2 * inner, hidden)
        else:
            matrix(f"{layer}ffn_gate", inner, hidden)
            matrix(f"{layer}ffn_up", inner, hidden)
        matrix(f"{layer}ffn_down", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/shape_gguf.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="directory of a Llama or GLM model")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    write(options.model, options.output)


if __name__ == "__main__":
    main()
