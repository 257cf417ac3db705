"""Write a checkpoint with random weights in the published layout of a 7B model, to measure memory and time.

    python benchmarks/stress.py --family deepseek-7b --output-dir DIR

Names, shapes, dtypes and file formats are the published ones; the tokenizer is small (one token per character), the
chat template that of the family. Existing shards are kept, so that the same command resumes an interrupted one.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from torch import Tensor

from luthier._util import files
from luthier.models.directory import family_of, read_config
from luthier.models.native_model import empty_model
from luthier.templates import NATIVE

SHARD = 5_000_000_000  # maximum bytes per file
_LLAMA: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
_YI_JINJA = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """A family at its published size. special: published ids by token; bin: weights are stored as pickle files."""

    config: dict[str, Any]
    special: dict[str, int]
    eos: str
    bin: bool = False
    template: str | None = None


def _sizes(
    hidden: int, inner: int, layers: int, heads: int, key_heads: int, vocab: int, **other: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
        **other,
    }


SHAPES: dict[str, Shape] = {
    "deepseek-7b": Shape(
        {
            **_LLAMA,
            **_sizes(4096, 11008, 30, 32, 32, 102400, rms_norm_eps=1e-6, bos_token_id=100000, eos_token_id=100001),
        },
        {"<｜begin▁of▁sentence｜>": 100000, "<｜end▁of▁sentence｜>": 100001},
        "<｜end▁of▁sentence｜>",
        bin=True,
        template=NATIVE["deepseek"][0].jinja(),
    ),
    "yi-6b": Shape(
        {**_LLAMA, **_sizes(4096, 11008, 32, 32, 4, 64000, rms_norm_eps=1e-5, rope_theta=5e6, eos_token_id=2)},
        {"<unk>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2, "<|im_start|>": 6, "<|im_end|>": 7},
        "<|im_end|>",
        template=_YI_JINJA,
    ),
    "baichuan2-7b": Shape(
        {
            "model_type": "baichuan",
            "architectures": ["BaichuanForCausalLM"],
            **_sizes(
                4096, 11008, 32, 32, 32, 125696, rms_norm_eps=1e-6, z_loss_weight=0, eos_token_id=2, pad_token_id=0
            ),
        },
        {"<unk>": 0, "<s>": 1, "</s>": 2, "<reserved_106>": 195, "<reserved_107>": 196},
        "</s>",
        bin=True,
    ),
    "glm-4-9b": Shape(
        {
            "model_type": "chatglm",
            "architectures": ["ChatGLMModel"],
            "hidden_size": 4096,
            "ffn_hidden_size": 13696,
            "num_layers": 40,
            "num_attention_heads": 32,
            "kv_channels": 128,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "padded_vocab_size": 151552,
            "layernorm_epsilon": 1.5625e-07,
            "rope_ratio": 500,
            "original_rope": True,
            "add_qkv_bias": True,
            "add_bias_linear": False,
            "rmsnorm": True,
            "post_layer_norm": True,
            "apply_residual_connection_post_layernorm": False,
            "seq_length": 131072,
            "tie_word_embeddings": False,
            "eos_token_id": [151329, 151336, 151338],
            "pad_token_id": 151329,
            "torch_dtype": "bfloat16",
        },
        {
            "<|endoftext|>": 151329,
            "[MASK]": 151330,
            "[gMASK]": 151331,
            "[sMASK]": 151332,
            "<sop>": 151333,
            "<eop>": 151334,
            "<|system|>": 151335,
            "<|user|>": 151336,
            "<|assistant|>": 151337,
            "<|observation|>": 151338,
        },
        "<|endoftext|>",
    ),
}


def write(family: str, to: Path, layers: int | None = None, seed: int = 0) -> None:
    """Write the checkpoint, shard by shard. layers: fewer than published, for a quick test."""
    shape = SHAPES[family]
    config = dict(shape.config)
    if layers:
        config["num_layers" if "num_layers" in config else "num_hidden_layers"] = layers
    files.write_json(to / "config.json", config)
    _write_tokenizer(shape, to)
    _write_weights(to, shape.bin, seed)


# --- weights --------------------------------------------------------------------------------------------------------


def _shapes(to: Path) -> dict[str, tuple[int, ...]]:
    """Return the published names and shapes, from the family's conversion rules."""
    config = read_config(to)
    native = {n: tuple(t.shape) for n, t in empty_model(config).state_dict().items()}
    rules = family_of(to).rules(config)
    if not rules:
        return native
    return {
        r.source: (sum(native[p][0] for p in r.parts), *native[r.parts[0]][1:])
        if len(r.parts) > 1
        else native[r.parts[0]]
        for r in rules
    }


def _write_weights(to: Path, pickled: bool, seed: int) -> None:
    shapes, shards = _shapes(to), [dict[str, tuple[int, ...]]()]
    size = 0
    for name, shape in shapes.items():
        nbytes = 2 * int(torch.Size(shape).numel())
        if size + nbytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += nbytes
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    where: dict[str, str] = {}
    for i, part in enumerate(shards):
        file = to / f"{stem}-{i + 1:05}-of-{len(shards):05}.{suffix}"
        where |= dict.fromkeys(part, file.name)
        if file.is_file():
            print(f"{file.name}: already exists", flush=True)
            continue
        tensors = {name: _random(name, shape, seed) for name, shape in part.items()}
        temp = file.with_name(f".{file.name}.new")
        if pickled:
            torch.save(tensors, temp)
        else:
            save_file(tensors, temp, metadata={"format": "pt"})
        temp.replace(file)
        print(f"{file.name}: {file.stat().st_size / 1e9:.2f} GB", flush=True)
    files.write_json(to / f"{stem}.{suffix}.index.json", {"metadata": {}, "weight_map": where})


def _random(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Make a bfloat16 tensor: ones for norms, else normal with deviation 0.02; the values depend on name and seed."""
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + sum(name.encode()) * 7919 + len(name))
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


# --- tokenizer ------------------------------------------------------------------------------------------------------


def _vocabulary(special: dict[str, int]) -> dict[str, int]:
    """Map tokens to ids: special tokens, 256 bytes, then one token per ASCII and common Chinese character."""
    names = [f"<0x{b:02X}>" for b in range(256)]
    names += [chr(c) for c in (*range(32, 127), *range(0x3000, 0x3020), *range(0x4E00, 0x9FA6), *range(0xFF00, 0xFF60))]
    used = set(special.values())
    free = (i for i in range(10**6) if i not in used)
    return {**special, "\n": next(free), **{name: next(free) for name in names}}


def _write_tokenizer(shape: Shape, to: Path) -> None:
    vocabulary = _vocabulary(shape.special)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": shape.eos}
    if shape.template:
        settings["chat_template"] = shape.template
    files.write_json(to / "tokenizer_config.json", settings)
    if shape.config["model_type"] == "baichuan":
        files.write_bytes(to / "tokenizer.model", _sentencepiece(vocabulary, shape.special))
        return
    filled = dict(vocabulary)
    used = set(vocabulary.values())
    filled |= {f"<filler_{i}>": i for i in range(max(used)) if i not in used}
    tokenizer = Tokenizer(BPE(vocab=filled, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in shape.special])
    tokenizer.save(str(to / "tokenizer.json"))


def _sentencepiece(vocabulary: dict[str, int], special: dict[str, int]) -> bytes:
    model = proto.ModelProto()
    model.trainer_spec.model_type = 2  # BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    names = {i: name for name, i in vocabulary.items()}
    for i in range(max(names) + 1):
        name = names.get(i, f"<filler_{i}>").replace(" ", "▁")
        piece = model.pieces.add(piece=name, score=-float(i))
        if name == "<unk>":
            piece.type = 2
        elif name in ("<s>", "</s>"):
            piece.type = 3
        elif name in special or name.startswith("<filler_"):
            piece.type = 4
        elif name.startswith("<0x"):
            piece.type = 6
    data: bytes = model.SerializeToString()
    return data


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/stress.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--family", required=True, choices=list(SHAPES))
    parser.add_argument("--output-dir", required=True, type=Path)
    parser.add_argument("--layers", type=int, help="fewer layers than published, for a quick test")
    a = parser.parse_args(sys.argv[1:])
    write(a.family, a.output_dir, a.layers)
    print(json.dumps({"family": a.family, "path": str(a.output_dir)}))


if __name__ == "__main__":
    main()
