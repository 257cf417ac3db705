"""Write tiny random checkpoints in the published layouts of the five families: files, keys, tensor names, shapes.

``PUBLISHED["glm4"](path)`` writes one and returns its path. Sizes are small and ids are of a tiny vocabulary; all else
is as published (``tests/fixtures/published`` has the full configurations). Python files in a checkpoint raise if run.
Weights are random, large enough that attention is not uniform.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers import tokenizer_files
from tests.helpers import vocabularies as v
from tests.helpers.tokenizer_files import write_json

CONFIGS = Path(__file__).parents[1] / "fixtures" / "published"
LAYERS, HIDDEN, INNER, HEADS, GROUPS, HEAD = 2, 64, 96, 4, 2, 16
REMOTE_CODE = 'raise RuntimeError("remote code ran")\n'
Weights = Literal["bin", "bin-shards", "safetensors"]
Shapes = dict[str, tuple[int, ...]]

_SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "vocab_size": v.SIZE,
}


def yi(path: Path, seed: int = 0, *, dummy_prefix: bool = False, tokenizer_json: bool = False) -> Path:
    """Yi-6B-Chat: Llama with 2 key heads of 4. ``tokenizer_json``: also a converted file, as added to the repository
    later, that adds "▁" before every piece of text between markers."""
    generation = {
        "bos_token_id": 6,
        "eos_token_id": 7,
        "pad_token_id": 0,
        "do_sample": True,
        "max_length": 4096,
        "temperature": 0.6,
        "top_p": 0.8,
        "transformers_version": "4.35.0",
    }
    _settings(path, {**_full("yi-6b-chat"), **_SIZES, "num_key_value_heads": GROUPS}, generation)
    tokenizer_files.yi(path, dummy_prefix, tokenizer_json)
    return _save(path, _random(_llama(GROUPS), seed), "safetensors", shards=3)


def phi3(path: Path, seed: int = 0, *, form: Literal["current", "april"] = "current") -> Path:
    """Phi-3-mini-4k-instruct. ``april``: as released in April 2024, with ``<s>`` from template and tokenizer, no system
    role, and two stop ids of the later three."""
    eos = v.PHI3_BASE
    end, assistant = (eos + v.PHI3_ADDED.index(t) for t in ("<|end|>", "<|assistant|>"))
    generation = {
        "_from_model_config": True,
        "bos_token_id": 1,
        "eos_token_id": [eos, assistant, end] if form == "current" else [eos, end],
        "pad_token_id": eos,
        "transformers_version": "4.39.3",
    }
    ids = {"num_key_value_heads": HEADS, "eos_token_id": eos, "pad_token_id": eos}
    _settings(path, {**_full("phi-3-mini-4k-instruct"), **_SIZES, **ids}, generation)
    tokenizer_files.phi3(path, current=form == "current")
    layer: Shapes = {
        "self_attn.qkv_proj.weight": (3 * HIDDEN, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "mlp.gate_up_proj.weight": (2 * INNER, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INNER),
    }
    return _save(path, _random(_decoder(layer), seed), "safetensors", shards=2)


def baichuan2(path: Path, weights: Weights = "bin", seed: int = 0) -> Path:
    """Baichuan2-7B-Chat: one ``.bin``, or two shards as on ModelScope; the head's rows have unequal norms."""
    generation = {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "user_token_id": 195,
        "assistant_token_id": 196,
        "max_new_tokens": 2048,
        "temperature": 0.3,
        "top_k": 5,
        "top_p": 0.85,
        "repetition_penalty": 1.05,
        "do_sample": True,
        "transformers_version": "4.29.2",
    }
    code = ("generation_utils", "quantizer", "tokenization_baichuan")
    _settings(path, {**_full("baichuan2-7b-chat"), **_SIZES}, generation, code)
    tokenizer_files.baichuan2(path)
    layer: Shapes = {
        "self_attn.W_pack.weight": (3 * HIDDEN, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        **_mlp(),
    }
    tensors = _random(_decoder(layer), seed)
    shuffled = torch.randperm(v.SIZE, generator=torch.Generator().manual_seed(seed))
    lengths = torch.linspace(0.5, 4, v.SIZE)[shuffled, None]
    tensors["lm_head.weight"] = (tensors["lm_head.weight"] * lengths).bfloat16()
    return _save(path, tensors, weights, shards=2)


def glm4(path: Path, seed: int = 0) -> Path:
    """GLM-4-9B-Chat in its original layout (``model_type`` chatglm), with tiktoken's rank file."""
    config = {
        **_full("glm-4-9b-chat"),
        "hidden_size": HIDDEN,
        "ffn_hidden_size": INNER,
        "kv_channels": HEAD,
        "multi_query_group_num": GROUPS,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_layers": LAYERS,
        "padded_vocab_size": v.SIZE,
        **_glm4_ids(),
    }
    _settings(path, config, _glm4_generation(), ("tokenization_chatglm",))
    tokenizer_files.glm4(path)
    rows = (HEADS + 2 * GROUPS) * HEAD
    layer: Shapes = {
        "input_layernorm.weight": (HIDDEN,),
        "mlp.dense_4h_to_h.weight": (HIDDEN, INNER),
        "mlp.dense_h_to_4h.weight": (2 * INNER, HIDDEN),
        "post_attention_layernorm.weight": (HIDDEN,),
        "self_attention.dense.weight": (HIDDEN, HEADS * HEAD),
        "self_attention.query_key_value.bias": (rows,),
        "self_attention.query_key_value.weight": (rows, HIDDEN),
    }
    shapes: Shapes = {
        "transformer.embedding.word_embeddings.weight": (v.SIZE, HIDDEN),
        "transformer.encoder.final_layernorm.weight": (HIDDEN,),
        **{f"transformer.encoder.layers.{n}.{name}": s for n in range(LAYERS) for name, s in layer.items()},
        "transformer.output_layer.weight": (v.SIZE, HIDDEN),
    }
    tensors = _random(shapes, seed)
    # computed before the original code multiplies the base by rope_ratio, so a loader that reads it gets wrong angles
    tensors["transformer.rotary_pos_emb.inv_freq"] = _inv_freq(10000.0, HEAD // 2).bfloat16()
    return _save(path, tensors, "safetensors", shards=3)


def glm4_hf(path: Path, seed: int = 0) -> Path:
    """GLM-4-9B-Chat as its publisher converted it (``model_type`` glm): tokenizer.json, and a rope_theta of 10000."""
    ids = {"head_dim": HEAD, "num_key_value_heads": GROUPS, **_glm4_ids()}
    _settings(path, {**_full("glm-4-9b-chat-hf"), **_SIZES, **ids}, _glm4_generation())
    tokenizer_files.glm4_hf(path)
    heads = {"q": HEADS * HEAD, "k": GROUPS * HEAD, "v": GROUPS * HEAD}
    layer: Shapes = {
        **{f"self_attn.{name}_proj.weight": (rows, HIDDEN) for name, rows in heads.items()},
        **{f"self_attn.{name}_proj.bias": (rows,) for name, rows in heads.items()},
        "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
        "mlp.gate_up_proj.weight": (2 * INNER, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INNER),
    }
    return _save(path, _random(_decoder(layer), seed), "safetensors", shards=2)


def deepseek(path: Path, weights: Weights = "bin-shards", seed: int = 0, *, inv_freq: bool = False) -> Path:
    """DeepSeek-LLM-7B-Chat: Llama in two ``.bin`` shards. ``inv_freq``: with the rotary buffers that many Llama
    checkpoints of that time contained."""
    bos, eos = v.DEEPSEEK_RANKS, v.DEEPSEEK_RANKS + 1
    generation = {
        "_from_model_config": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.95,
        "transformers_version": "4.34.1",
    }
    ids = {"num_key_value_heads": HEADS, "bos_token_id": bos, "eos_token_id": eos}
    _settings(path, {**_full("deepseek-llm-7b-chat"), **_SIZES, **ids}, generation)
    tokenizer_files.deepseek(path)
    tensors = _random(_llama(HEADS), seed)
    for n in range(LAYERS if inv_freq else 0):
        tensors[f"model.layers.{n}.self_attn.rotary_emb.inv_freq"] = _inv_freq(10000.0, HEAD)
    return _save(path, tensors, weights, shards=2)


PUBLISHED: dict[str, Callable[..., Path]] = {
    "yi": yi,
    "phi3": phi3,
    "baichuan2": baichuan2,
    "glm4": glm4,
    "glm4-hf": glm4_hf,
    "deepseek": deepseek,
}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read every tensor of a checkpoint as stored, by its published name."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    for file in sorted(path.glob("*.bin")):
        tensors |= torch.load(file, weights_only=True)
    return tensors


def read_config(path: Path) -> dict[str, Any]:
    """Read config.json without changes."""
    config: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return config


def _full(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return config


def _glm4_ids() -> dict[str, Any]:
    """Stop ids of <|endoftext|>, <|user|>, <|observation|>, as 151329, 151336, 151338."""
    first = v.GLM4_RANKS
    return {"eos_token_id": [first, first + 7, first + 9], "pad_token_id": first}


def _glm4_generation() -> dict[str, Any]:
    settings = {"do_sample": True, "temperature": 0.8, "max_length": 128000, "top_p": 0.8}
    return {**_glm4_ids(), **settings, "transformers_version": "4.44.0"}


def _mlp() -> Shapes:
    return {"mlp.gate_proj.weight": (INNER, HIDDEN), "mlp.up_proj.weight": (INNER, HIDDEN)} | {
        "mlp.down_proj.weight": (HIDDEN, INNER)
    }


def _llama(key_heads: int) -> Shapes:
    layer: Shapes = {
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.k_proj.weight": (key_heads * HEAD, HIDDEN),
        "self_attn.v_proj.weight": (key_heads * HEAD, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        **_mlp(),
    }
    return _decoder(layer)


def _decoder(layer: Shapes) -> Shapes:
    """Return the tensor names and shapes of a model named like Llama's, given those of one layer."""
    layer = {**layer, "input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
    return {
        "model.embed_tokens.weight": (v.SIZE, HIDDEN),
        **{f"model.layers.{n}.{name}": shape for n in range(LAYERS) for name, shape in layer.items()},
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (v.SIZE, HIDDEN),
    }


def _random(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """Make random bfloat16 tensors: norms around 1, attention weights larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator) * (0.2 if "attention." in name or "self_attn." in name else 0.1)
        tensors[name] = (value + 1 if name.endswith("norm.weight") else value).bfloat16()
    return tensors


def _inv_freq(base: float, rotated: int) -> Tensor:
    return base ** -(torch.arange(0, rotated, 2) / rotated)


def _save(path: Path, tensors: dict[str, Tensor], weights: Weights, shards: int) -> Path:
    """Write one ``.bin``, or ``shards`` files and their index."""
    stem, suffix = ("model", "safetensors") if weights == "safetensors" else ("pytorch_model", "bin")
    names, count = list(tensors), 1 if weights == "bin" else shards
    size = -(-len(names) // count)
    where: dict[str, str] = {}
    for i in range(count):
        part = {name: tensors[name] for name in names[i * size : (i + 1) * size]}
        file = f"{stem}-{i + 1:05}-of-{count:05}.{suffix}" if count > 1 else f"{stem}.{suffix}"
        where |= dict.fromkeys(part, file)
        if suffix == "safetensors":
            save_file(part, path / file, metadata={"format": "pt"})
        else:
            torch.save(part, path / file)
    if count > 1:
        total = sum(t.nbytes for t in tensors.values())
        write_json(path / f"{stem}.{suffix}.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    return path


def _settings(path: Path, config: dict[str, Any], generation: dict[str, Any], code: Sequence[str] = ()) -> None:
    """Write config.json, generation_config.json and the repository's Python files, each of which raises."""
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", config)
    write_json(path / "generation_config.json", generation)
    for module in {name.partition(".")[0] for name in config.get("auto_map", {}).values()} | set(code):
        (path / f"{module}.py").write_text(REMOTE_CODE, encoding="utf-8")
