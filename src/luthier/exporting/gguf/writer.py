"""Write and read GGUF files for ``--to gguf`` and ``--to gguf-lora``, one tensor at a time.

The file of a model has all that llama.cpp needs: tokenizer, chat template with the run's system prompt, stop tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    GGMLQuantizationType,
    GGUFEndian,
    GGUFReader,
    GGUFType,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
    quants,
)
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig

from luthier._util import files
from luthier.adapters.locate import TunedModel
from luthier.adapters.original_names import Update
from luthier.errors import ConfigError, ModelError
from luthier.exporting.chat_files import template_text
from luthier.exporting.gguf import vocabulary
from luthier.exporting.gguf.architectures import (
    architecture,
    reordered,
    restored,
    rope_factors,
    tensor_name,
    write_hyperparameters,
)
from luthier.exporting.merge import merged_tensors
from luthier.lora.layers import scaling
from luthier.models.chat_format import ChatFormat
from luthier.models.directory import head_size
from luthier.models.native_model import empty_model, native_names, published_tensors

if TYPE_CHECKING:
    from luthier.models.streamed import Read

_F16, _F32 = GGMLQuantizationType.F16, GGMLQuantizationType.F32
_Q8_0 = GGMLQuantizationType.Q8_0


@dataclass(frozen=True, slots=True)
class FileType:
    """How tensors are stored. ends: the embedding and the head; vectors are always fp32."""

    matrices: GGMLQuantizationType
    ends: GGMLQuantizationType
    number: LlamaFileType


FILE_TYPES = {
    "f16": FileType(_F16, _F16, LlamaFileType.MOSTLY_F16),
    "q8_0": FileType(_Q8_0, _Q8_0, LlamaFileType.MOSTLY_Q8_0),
    # the embedding and the head lose most from quantisation, so they get 8 bits
    "q4_0": FileType(GGMLQuantizationType.Q4_0, _Q8_0, LlamaFileType.MOSTLY_Q4_0),
}


def file_type_of(name: str) -> FileType:
    """Return a file type by name. Raises ConfigError if the gguf library cannot write it."""
    if name not in FILE_TYPES:
        raise ConfigError(
            f"--quantization {name}: is not a type that can be written; the types are {', '.join(FILE_TYPES)}",
            "write --quantization q8_0, or leave it out for f16 and convert the file with llama.cpp's llama-quantize",
        )
    return FILE_TYPES[name]


def write_model(
    tuned: TunedModel, chat_format: ChatFormat, pending: Mapping[str, Update], file: Path, quantization: str, name: str
) -> None:
    """Write the merged model to one file; without ``pending`` updates, the base model. Raises UserError."""
    config = chat_format.config
    order = native_names(tuned.base, config)
    tensors = merged_tensors(tuned, chat_format, pending, rounded=False)
    template = template_text(chat_format, tuned.system)
    _write_model(config, chat_format, template, order, tensors, file, quantization, name)


def write_base(base: Path, chat_format: ChatFormat, file: Path, quantization: str, name: str) -> None:
    """Write a base model to one file without a chat template, for prompts that are sent as token ids."""
    config = chat_format.config
    tensors = (
        part
        for _, rule, tensor in published_tensors(base, config)
        if rule
        for part in rule.split(tensor, torch.float32)
    )
    _write_model(config, chat_format, None, native_names(base, config), tensors, file, quantization, name)


def write_vocabulary(
    chat_format: ChatFormat, system: str | None, file: Path, name: str, with_template: bool = True
) -> None:
    """Write the tokenizer and the template to a small file, so that both can be verified before weights are written.

    Its model is the smallest one of the architecture, and its weights are zeros. Raises UserError.
    """
    config, size = copy.deepcopy(chat_format.config), head_size(chat_format.config)
    counts = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config.update({**dict.fromkeys(counts, 1), "hidden_size": size, "head_dim": size, "intermediate_size": 32})
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    shapes = {n: tuple(t.shape) for n, t in empty_model(config).state_dict().items()}
    zeros = ((native, torch.zeros(shape)) for native, shape in shapes.items())
    template = template_text(chat_format, system) if with_template else None
    _write_model(config, chat_format, template, list(shapes), zeros, file, "f16", name)


def _write_model(
    config: PretrainedConfig,
    chat_format: ChatFormat,
    template: str | None,
    order: Sequence[str],
    values: Iterable[tuple[str, Tensor]],
    file: Path,
    quantization: str,
    name: str,
) -> None:
    """Write a model to one file. order: the native names of its tensors. values: the tensors in this order."""
    file_type = file_type_of(quantization)
    shapes = {n: tuple(t.shape) for n, t in empty_model(config).state_dict().items()}
    tied = bool(getattr(config, "tie_word_embeddings", False))
    order = [n for n in order if not (tied and n == "lm_head.weight")]
    tokens = vocabulary.read(chat_format.tokenizer, config.vocab_size)
    writer = _writer(file, config, GGUFType.MODEL, _model_name(name, tokens.strips))
    writer.add_file_type(file_type.number)
    writer.add_quantization_version(2)
    write_hyperparameters(writer, config)
    vocabulary.write(writer, tokens, chat_format.stop_ids, chat_format.tokenizer.hf, template)
    factors = rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    sizes = 0
    for native in order:
        stored = _stored(native, shapes[native], file_type)
        size = _size(shapes[native], stored)
        writer.add_tensor_info(tensor_name(native), shapes[native], np.dtype(np.float32), size, raw_dtype=stored)
        sizes += size
    files.require_space(file, sizes)

    def tensors() -> Iterator[NDArray[np.generic]]:
        if factors is not None:
            yield factors
        for native, tensor in values:
            if native in order:
                rows = reordered(config, native)(tensor.float()).contiguous().numpy()
                yield _encoded(native, rows, _stored(native, rows.shape, file_type))

    _write(writer, tensors())


def write_lora(config: PretrainedConfig, pending: Mapping[str, Update], file: Path, name: str) -> None:
    """Write only the adapter to a file.

    llama.cpp scales each update by alpha / rank with one alpha for all modules, so B is rescaled if it differs.
    """
    architecture(config)
    configs = [u.config for u in pending.values()]
    lora = max(configs, key=configs.count)
    writer = _writer(file, config, GGUFType.ADAPTER, name)
    writer.add_key_value("adapter.type", "lora", GGUFValueType.STRING)
    writer.add_key_value("adapter.lora.alpha", float(lora.lora_alpha), GGUFValueType.FLOAT32)
    tensors: list[NDArray[np.float32]] = []
    for module, update in pending.items():
        rank = update.a.shape[0]
        b = update.b.float() * (scaling(update.config) * rank / lora.lora_alpha)
        pairs = (("lora_a", update.a.float()), ("lora_b", reordered(config, f"{module}.weight")(b)))
        for part, tensor in pairs:
            values = tensor.contiguous().numpy()
            writer.add_tensor_info(f"{tensor_name(module)}.weight.{part}", values.shape, values.dtype, values.nbytes)
            tensors.append(values)
    _write(writer, tensors)


def reader(file: Path, config: PretrainedConfig) -> Read:
    """Return a function that reads the tensor of a native name in fp32, rows in transformers' order."""
    entries = {t.name: t for t in GGUFReader(file).tensors}

    def read(native: str) -> Tensor:
        name = tensor_name(native)
        entry = entries[name if name in entries else "token_embd.weight"]
        values = quants.dequantize(entry.data, entry.tensor_type).reshape(list(reversed(entry.shape.tolist())))
        return restored(config, native)(torch.from_numpy(np.array(values, dtype=np.float32)))

    return read


def _writer(file: Path, config: PretrainedConfig, kind: str, name: str) -> GGUFWriter:
    """Start a file of an architecture."""
    writer = GGUFWriter(None, architecture(config).name, endianess=GGUFEndian.LITTLE)
    writer.path = file
    writer.add_type(kind)
    writer.add_name(name)
    return writer


def _write(writer: GGUFWriter, tensors: Iterable[NDArray[np.generic]]) -> None:
    """Write the header, and the values of the tensors in the order in which they were announced."""
    with closing(writer):
        writer.write_header_to_file(path=writer.path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in tensors:
            writer.write_tensor_data(values.view(_Values))


class _Values(np.ndarray[tuple[int, ...], np.dtype[np.generic]]):
    """Values that report why they cannot be written: numpy's own error of a short write has no number."""

    def tofile(self, fid: IO[bytes], *_: object, **__: object) -> None:  # type: ignore[override]
        fid.write(self.data)


def _model_name(name: str, strips: bool) -> str:
    """Adjust the name: llama.cpp strips white space after control tokens if and only if the name contains Phi-3."""
    plain = name.lower().replace("phi-3", "phi 3").replace("phi3", "phi 3")
    return f"{name} (Phi-3)" if strips else plain if plain != name.lower() else name


def _stored(native: str, shape: tuple[int, ...], file_type: FileType) -> GGMLQuantizationType:
    """Return the type that a tensor is stored in; rows that do not divide into blocks of 32 stay in f16."""
    if len(shape) < 2:
        return _F32
    stored = file_type.ends if native in ("model.embed_tokens.weight", "lm_head.weight") else file_type.matrices
    return stored if stored == _F16 or shape[-1] % 32 == 0 else _F16


def _size(shape: tuple[int, ...], stored: GGMLQuantizationType) -> int:
    """Return the size of a stored tensor in bytes."""
    block, size = GGML_QUANT_SIZES[stored]
    return math.prod(shape) // int(block) * int(size)


def _encoded(native: str, values: NDArray[np.float32], stored: GGMLQuantizationType) -> NDArray[np.generic]:
    """Convert values to the stored type. Raises ModelError if they exceed the range of f16."""
    if stored == _F16 and np.abs(values).max() > np.finfo(np.float16).max:
        raise ModelError(
            f"{native}: has values outside the range of f16", "use --to hf, which stock transformers loads"
        )
    encoded: NDArray[np.generic] = quants.quantize(values, stored)
    return encoded
