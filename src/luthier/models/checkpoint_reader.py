"""Read the tensors of a published checkpoint one at a time: safetensors or ``.bin``, one file or several.

Names and shapes come from the headers; values are read on request. Pickle files are memory-mapped and read with
``weights_only=True``.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import pickle
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from io import RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from luthier.errors import ModelError

if TYPE_CHECKING:
    from jaxtyping import Shaped
    from typing_extensions import Buffer

Shape = tuple[int, ...]
T = TypeVar("T")
_READERS, _AHEAD_BYTES = 2, 64_000_000
_BLOCK = 16_000_000  # values read from a pickle file per copy
_CONVERTED = 1 << 20  # bytes read and converted at once: they stay in the processor's cache
_READ_ERRORS = (SafetensorError, OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError)
_WEIGHTS = (  # single file, index
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


@dataclass(frozen=True, slots=True)
class Place:
    """The position of a tensor in a file; its rows are stored one after another."""

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

    def read(self, first: int, count: int) -> Shaped[Tensor, " ..."]:
        """Copy ``count`` rows from row ``first`` on into new memory. Raises EOFError if the file ends before them."""
        buffer = torch.empty(count * self.row_bytes, dtype=torch.uint8)
        with open(self.path, "rb", buffering=0) as f:
            f.seek(self.offset + first * self.row_bytes)
            _fill(buffer, f)
        shape = (count, *self.shape[1:]) if self.shape else ()
        return buffer.view(self.dtype).reshape(shape)

    def read_as(self, dtype: torch.dtype) -> Shaped[Tensor, " ..."]:
        """Read the whole tensor and convert it, without memory for all of its stored values. Raises EOFError."""
        if dtype is self.dtype:
            return self.read(0, self.rows)
        converted = torch.empty(self.shape, dtype=dtype)
        buffer = torch.empty(_CONVERTED, dtype=torch.uint8)
        with open(self.path, "rb", buffering=0) as f:
            f.seek(self.offset)
            for part in torch.split(converted.view(-1), _CONVERTED // self.dtype.itemsize):
                stored = buffer[: len(part) * self.dtype.itemsize]
                _fill(stored, f)
                part.copy_(stored.view(self.dtype))
        return converted


def _fill(buffer: Shaped[Tensor, " bytes"], file: RawIOBase) -> None:
    """Read as many bytes as the buffer has. Raises EOFError if the file ends before."""
    view, filled = memoryview(cast("Buffer", buffer.numpy())), 0
    while filled < len(view):
        n = file.readinto(view[filled:])
        if not n:
            raise EOFError(f"{getattr(file, 'name', 'file')}: unexpected end of file")
        filled += n


class _File(Protocol):
    def shapes(self) -> dict[str, Shape]: ...
    def read(self, name: str, dtype: torch.dtype | None = None) -> Shaped[Tensor, " ..."]: ...
    def rows(self, name: str, rows: Sequence[int]) -> Shaped[Tensor, "rows ..."]: ...


@dataclass(slots=True)
class Shards:
    """The open weight files of a checkpoint.

    shapes: the shape of every tensor, by published name.
    """

    path: Path
    files: list[Path]
    shapes: dict[str, Shape] = field(default_factory=dict)
    _file_of: dict[str, Path] = field(default_factory=dict)
    _opened: dict[Path, _File] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Shards:
        """Read the header of every file. Raises ModelError if a file is missing, truncated or damaged."""
        shards = cls(path, weight_files(path))
        for file in shards.files:
            try:
                shapes = shards._file(file).shapes()
            except _READ_ERRORS as e:
                raise _damaged(file, e) from None
            shards.shapes.update(shapes)
            shards._file_of.update(dict.fromkeys(shapes, file))
        return shards

    def read(self, name: str, dtype: torch.dtype | None = None) -> Shaped[Tensor, " ..."]:
        """Copy a tensor into new CPU memory, converted to ``dtype``. Raises ModelError if the file is damaged.

        dtype: None keeps the stored one.
        """
        file = self._file_of[name]
        try:
            return self._file(file).read(name, dtype)
        except _READ_ERRORS as e:
            raise _damaged(file, e) from None

    def rows(self, name: str, rows: Sequence[int]) -> Shaped[Tensor, "rows ..."]:
        """Read only the given rows of a tensor. Raises ModelError if the file is damaged."""
        file = self._file_of[name]
        try:
            return self._file(file).rows(name, rows)
        except _READ_ERRORS as e:
            raise _damaged(file, e) from None

    def place(self, name: str) -> Place | None:
        """Return the position of a tensor in its safetensors file, or None if the file is a pickle."""
        file = self._file(self._file_of[name])
        return file.place(name) if isinstance(file, _Safetensors) else None

    def mapped(self, name: str) -> Shaped[Tensor, " ..."]:
        """Map a tensor into memory: pages are read when they are used, and changes stay private.

        Only for files that do not change, such as those of a cache. Raises ModelError if the file is damaged.
        """
        file = self._file_of[name]
        try:
            opened = self._file(file)
            return opened.mapped(name) if isinstance(opened, _Safetensors) else opened.read(name)
        except _READ_ERRORS as e:
            raise _damaged(file, e) from None

    def read_ahead(self, names: Iterable[str], read: Callable[[str], T]) -> Iterator[T]:
        """Call ``read`` for tensors in order, on threads that are ahead: new pages of memory take most of the time.

        Raises ModelError if a file is damaged.
        """
        pending: deque[tuple[int, Future[T]]] = deque()  # size in bytes at most
        with ThreadPoolExecutor(_READERS) as pool:
            for name in names:
                pending.append((4 * math.prod(self.shapes[name]), pool.submit(read, name)))
                while len(pending) > _READERS or sum(size for size, _ in pending) > _AHEAD_BYTES:
                    yield pending.popleft()[1].result()
            while pending:
                yield pending.popleft()[1].result()

    def in_file_order(self) -> Iterator[str]:
        """Iterate over the tensor names file by file, so that each file is opened only once."""
        for file in self.files:
            yield from sorted(name for name, holder in self._file_of.items() if holder == file)
            self._opened.pop(file, None)

    def _file(self, file: Path) -> _File:
        opened = self._opened.get(file)  # once: another thread may have closed it between two looks
        if opened is None:
            opened = self._opened[file] = _Pickle(file) if file.suffix == ".bin" else _Safetensors(file)
        return opened


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object from a model directory; {} if the file is absent. Raises ModelError if it cannot be read."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ModelError(f"{path}: cannot be read ({e})", "download the model again") from None
    return value if isinstance(value, dict) else {}


def weight_files(path: Path) -> list[Path]:
    """List a model's weight files in transformers' order of preference. Raises ModelError if one is missing.

    That is safetensors before ``.bin``, and one file before an index, which may be left from an earlier download.
    """
    for single, index_name in _WEIGHTS:
        if (path / single).is_file():
            return [path / single]
        if (path / index_name).is_file():
            names = sorted(set(_weight_map(path / index_name).values()))
            missing = [n for n in names if not (path / n).is_file()]
            if missing:
                raise ModelError(f"{path}: missing weight files: {', '.join(missing)}", "download the model again")
            return [path / n for n in names]
    raise ModelError(
        f"{path}: contains no weights (model.safetensors or pytorch_model.bin)", "download the model's weight files too"
    )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    names = weight_map if isinstance(weight_map, dict) else {}
    files = {k: v for k, v in names.items() if isinstance(v, str) and Path(v).name == v}
    if not files or files != weight_map:
        raise ModelError(f"{index}: has no valid weight_map", "download the model again")
    return files


def _damaged(file: Path, error: Exception) -> ModelError:
    return ModelError(f"{file}: is damaged ({' '.join(str(error).split())[:200]})", "download the model again")


class _Entry(TypedDict):
    """One tensor in a safetensors header."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


class _Safetensors:
    """Read tensors with plain reads at their offsets, or map those of a file that does not change.

    Memory-mapped pages of a 14 GB checkpoint would count as resident memory.
    """

    def __init__(self, file: Path) -> None:
        with safe_open(file, framework="pt"):
            pass  # the library checks that the header matches the file
        self._path = file
        with open(file, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(size))
        header.pop("__metadata__", None)
        self._start = 8 + size
        self._header: dict[str, _Entry] = header
        self._map: Shaped[Tensor, " bytes"] | None = None

    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(entry["shape"]) for name, entry in self._header.items()}

    def read(self, name: str, dtype: torch.dtype | None = None) -> Shaped[Tensor, " ..."]:
        place = self.place(name)
        return place.read_as(dtype or place.dtype)

    def mapped(self, name: str) -> Shaped[Tensor, " ..."]:
        place = self.place(name)
        size = place.rows * place.row_bytes
        if place.offset % place.dtype.itemsize or not size:
            return self.read(name)
        if self._map is None:
            try:
                with open(self._path, "rb") as f:
                    mapping = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
            except OSError:  # a file system without it, or no more memory may be promised
                return self.read(name)
            self._map = torch.frombuffer(mapping, dtype=torch.uint8)
        return self._map[place.offset : place.offset + size].view(place.dtype).reshape(place.shape)

    def rows(self, name: str, rows: Sequence[int]) -> Shaped[Tensor, "rows ..."]:
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


def write_safetensors(file: Path, tensors: Mapping[str, Shaped[Tensor, " ..."]]) -> None:
    """Write a safetensors file tensor by tensor; the library's own writer copies all of them first. Raises OSError."""
    names = {dtype: name for name, dtype in _TYPES.items()}
    header, offset = dict[str, _Entry](), 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            f.write(memoryview(cast("Buffer", tensor.contiguous().reshape(-1).view(torch.uint8).numpy())))


class _Pickle:
    """Read tensors from a memory-mapped ``.bin`` file; one in the format before torch 1.6 is read as a whole."""

    def __init__(self, file: Path) -> None:
        self._mapped = True
        try:
            content: object = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as e:
            if "mmap" not in str(e):
                raise
            content = torch.load(file, map_location="cpu", weights_only=True)
            self._mapped = False
        if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
            raise ValueError("it contains something other than named tensors")
        self._tensors: dict[str, Tensor] = content

    def shapes(self) -> dict[str, Shape]:
        return {str(name): tuple(t.shape) for name, t in self._tensors.items()}

    def read(self, name: str, dtype: torch.dtype | None = None) -> Shaped[Tensor, " ..."]:
        stored = self._tensors[name]
        if not self._mapped:
            return stored.to(dtype or stored.dtype, copy=True)
        _advise(stored, "MADV_SEQUENTIAL")
        copy = torch.empty(stored.shape, dtype=dtype or stored.dtype)
        rows = max(1, _BLOCK * len(stored) // max(1, stored.numel())) if stored.dim() else 0
        parts = zip(torch.split(stored, rows), torch.split(copy, rows), strict=True) if rows else [(stored, copy)]
        for part, target in parts:  # block by block: otherwise all of the file and the copy would be resident at once
            target.copy_(part)
            _forget_pages(part)
        return copy

    def rows(self, name: str, rows: Sequence[int]) -> Shaped[Tensor, "rows ..."]:
        if self._mapped:
            _advise(self._tensors[name], "MADV_RANDOM")  # a few rows of a large file: do not read ahead
        return torch.cat([self._tensors[name][i : i + 1] for i in rows])


def _forget_pages(tensor: Shaped[Tensor, " ..."]) -> None:
    """Release the pages of a tensor in a mapped file; otherwise every page read so far would stay resident."""
    # the next read loads a page from the file again; memory that belongs to no file would be zero from then on
    _advise(tensor, "MADV_DONTNEED")


def _advise(tensor: Shaped[Tensor, " ..."], advice: str) -> None:
    """Advise the kernel how the pages of a mapped tensor will be used. Linux only."""
    if sys.platform != "linux" or not tensor.is_contiguous():
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
    if end > start:
        ctypes.CDLL(None, use_errno=True).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(end - start), getattr(mmap, advice)
        )
