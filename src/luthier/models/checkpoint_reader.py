"""The tensors of a published checkpoint, one at a time: safetensors or ``.bin``, one file or many.

Names and shapes come from headers; a tensor's values are read when they are asked for. Pickle files are read with
``weights_only=True`` and memory-mapped.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from luthier.errors import ModelError

if TYPE_CHECKING:
    from typing_extensions import Buffer

Shape = tuple[int, ...]
_BLOCK = 16_000_000  # values read from a pickle file at a time
_DAMAGE = (SafetensorError, OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError)
_KINDS = (("model.safetensors.index.json", "model.safetensors"), ("pytorch_model.bin.index.json", "pytorch_model.bin"))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in a file, row after row."""

    path: Path
    offset: int
    shape: Shape
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def read(self, first: int, count: int) -> Tensor:
        """Rows ``first`` to ``first + count`` in memory of their own. Raises EOFError where the file ends before."""
        size = count * self.row_bytes
        buffer = torch.empty(size, dtype=torch.uint8)
        with open(self.path, "rb", buffering=0) as f:
            f.seek(self.offset + first * self.row_bytes)
            view, done = memoryview(cast("Buffer", buffer.numpy())), 0
            while done < size:
                n = f.readinto(view[done:])
                if not n:
                    raise EOFError(f"{self.path}: ends too early")
                done += n
        shape = (count, *self.shape[1:]) if self.shape else ()
        return buffer.view(self.dtype).reshape(shape)


class _File(Protocol):
    def shapes(self) -> dict[str, Shape]: ...
    def read(self, name: str) -> Tensor: ...
    def rows(self, name: str, rows: Sequence[int]) -> Tensor: ...


@dataclass(slots=True)
class Shards:
    """``shapes``: every tensor of the checkpoint by its published name."""

    path: Path
    files: list[Path]
    shapes: dict[str, Shape] = field(default_factory=dict)
    _where: dict[str, Path] = field(default_factory=dict)
    _open: dict[Path, _File] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Shards:
        """Read every header. Raises ModelError for a missing, cut off or damaged file."""
        found = cls(path, weight_files(path))
        for file in found.files:
            try:
                shapes = found._file(file).shapes()
            except _DAMAGE as e:
                raise _damaged(file, e) from None
            found.shapes.update(shapes)
            found._where.update(dict.fromkeys(shapes, file))
        return found

    def read(self, name: str) -> Tensor:
        """The tensor in memory of its own, in its stored type, on the CPU."""
        file = self._where[name]
        try:
            return self._file(file).read(name)
        except _DAMAGE as e:
            raise _damaged(file, e) from None

    def rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Some rows of a tensor, without reading the others."""
        file = self._where[name]
        try:
            return self._file(file).rows(name, rows)
        except _DAMAGE as e:
            raise _damaged(file, e) from None

    def place(self, name: str) -> Place | None:
        """Where the tensor lies, in a file whose rows can be read alone; None in a pickle file."""
        file = self._file(self._where[name])
        return file.place(name) if isinstance(file, _Safetensors) else None

    def in_file_order(self) -> Iterator[str]:
        """Names, file by file, so that each file is opened once."""
        for file in self.files:
            yield from sorted(n for n, where in self._where.items() if where == file)
            self._open.pop(file, None)

    def _file(self, file: Path) -> _File:
        if file not in self._open:
            self._open[file] = _Bin(file) if file.suffix == ".bin" else _Safetensors(file)
        return self._open[file]


def read_json(path: Path) -> dict[str, object]:
    """A JSON file of a model directory, empty where it is absent. Raises ModelError where it cannot be read."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ModelError(f"{path}: cannot be read ({e})", "download the model again") from None
    return value if isinstance(value, dict) else {}


def weight_files(path: Path) -> list[Path]:
    """A model's weight files in name order, safetensors before ``.bin``. Raises ModelError where one is missing."""
    for index_name, single in _KINDS:
        if (path / index_name).is_file():
            names = sorted(set(_weight_map(path / index_name).values()))
            missing = [n for n in names if not (path / n).is_file()]
            if missing:
                raise ModelError(f"{path}: lacks {', '.join(missing)}", "download the model again")
            return [path / n for n in names]
        if (path / single).is_file():
            return [path / single]
    raise ModelError(
        f"{path}: holds no weights (model.safetensors or pytorch_model.bin)", "download the model's weight files too"
    )


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    names = found if isinstance(found, dict) else {}
    files = {k: v for k, v in names.items() if isinstance(v, str) and Path(v).name == v}
    if not files or files != found:
        raise ModelError(f"{index}: names no weight files", "download the model again")
    return files


def _damaged(file: Path, error: Exception) -> ModelError:
    return ModelError(f"{file}: is damaged ({' '.join(str(error).split())[:200]})", "download the model again")


class _Entry(TypedDict):
    """One tensor in a safetensors header."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


class _Safetensors:
    """Tensors by plain reads at their offsets: mapped pages of a 14 GB checkpoint would count as resident memory."""

    def __init__(self, file: Path) -> None:
        with safe_open(file, framework="pt"):
            pass  # the library checks that header and file agree
        self._path = file
        with open(file, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(size))
        header.pop("__metadata__", None)
        self._start = 8 + size
        self._header: dict[str, _Entry] = header

    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(entry["shape"]) for name, entry in self._header.items()}

    def read(self, name: str) -> Tensor:
        place = self.place(name)
        return place.read(0, place.rows)

    def rows(self, name: str, rows: Sequence[int]) -> Tensor:
        place = self.place(name)
        return torch.cat([place.read(i, 1) for i in rows])

    def place(self, name: str) -> Place:
        entry = self._header[name]
        return Place(self._path, self._start + entry["data_offsets"][0], tuple(entry["shape"]), _TYPES[entry["dtype"]])


_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def write_safetensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file written tensor by tensor: the library's own writer copies them all first. Raises OSError."""
    names = {dtype: name for name, dtype in _TYPES.items()}
    header, at = dict[str, _Entry](), 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            f.write(memoryview(cast("Buffer", tensor.contiguous().reshape(-1).view(torch.uint8).numpy())))


class _Bin:
    def __init__(self, file: Path) -> None:
        try:
            found: object = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as e:
            if "mmap" not in str(e):
                raise
            found = torch.load(file, map_location="cpu", weights_only=True)  # the format before torch 1.6
        if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
            raise ValueError("it holds something else than named tensors")
        self._tensors: dict[str, Tensor] = found

    def shapes(self) -> dict[str, Shape]:
        return {str(name): tuple(t.shape) for name, t in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        there = self._tensors[name]
        _advise(there, "MADV_SEQUENTIAL")
        copy = torch.empty(there.shape, dtype=there.dtype)
        step = max(1, _BLOCK * len(there) // max(1, there.numel())) if there.dim() else 0
        parts = zip(torch.split(there, step), torch.split(copy, step), strict=True) if step else [(there, copy)]
        for part, to in parts:  # block by block, or file and copy would both be resident whole
            to.copy_(part)
            _forget_pages(part)
        return copy

    def rows(self, name: str, rows: Sequence[int]) -> Tensor:
        _advise(self._tensors[name], "MADV_RANDOM")  # a few rows of a large file: nothing around them is wanted
        return torch.cat([self._tensors[name][i : i + 1] for i in rows])


def _forget_pages(tensor: Tensor) -> None:
    """Give a mapped tensor's pages back, or every page ever read would stay in resident memory."""
    _advise(tensor, "MADV_DONTNEED")  # on a private mapping of a file: the next read comes from the file again


def _advise(tensor: Tensor, advice: str) -> None:
    """Tell the system how the pages of a mapped tensor will be used. Linux only."""
    if sys.platform != "linux" or not tensor.is_contiguous():
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
    if end > start:
        ctypes.CDLL(None, use_errno=True).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(end - start), getattr(mmap, advice)
        )
