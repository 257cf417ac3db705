"""Compile the C++ kernels once per machine, cache them on disk and call them through ctypes.

    rows.cpp       RMS norm, SwiGLU and rotary positions, forward and backward, with LoRA's low-rank products
    attention.cpp  attention over the segments of a flat stream
    loss.cpp       cross-entropy with its gradient; dropout
    weights.cpp    dequantisation of 4-bit and 8-bit weights
    decode.cpp     a whole model's forward pass for new tokens (declared in ``decoding``)

If there is no C++ compiler, ``load`` raises Unavailable with the reason and callers use torch's own operations.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from luthier._util import files
from luthier.devices.device import cpu_instructions
from luthier.kernels.native.signatures import CONDITIONS, SIGNATURES

_SOURCES = ("rows.cpp", "attention.cpp", "loss.cpp", "weights.cpp", "decode.cpp")
_FLAGS = ("-std=gnu++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}

NUMBERS = {"l": ctypes.c_int64, "i": ctypes.c_int, "u": ctypes.c_uint32, "f": ctypes.c_float}
ELEMENTS = {"f32": torch.float32, "i64": torch.int64, "u8": torch.uint8, "i8": torch.int8}
_PARAMETER = re.compile(r"(\w+)(?::(\w+)(?:\[([^\]]*)\])?(?:/(\w+))?)?(\?\w*)?")
_CONDITION = re.compile(r"(.+?)(>=|<|%)(.+)|(ascending|earlier|placed)\((\w+)\)")
Argument = Tensor | int | float | None


@dataclass(frozen=True, slots=True)
class Size:
    """A size in a signature: a sum of products of numbers and names, optionally divided, or a tensor's last element."""

    terms: tuple[tuple[int, tuple[str, ...]], ...]
    divisor: int = 1
    last: str = ""

    @classmethod
    def parse(cls, text: str) -> Size:
        if text.startswith("last("):
            return cls((), last=text[5:-1])
        text, _, divisor = text.partition("//")
        terms = []
        for term in text.split("+"):
            factors = term.split("*")
            numbers = [int(f) for f in factors if f.isdigit()]
            terms.append((math.prod(numbers), tuple(f for f in factors if not f.isdigit())))
        return cls(tuple(terms), int(divisor or 1))

    def of(self, arguments: Mapping[str, Argument]) -> int:
        if self.last:
            tensor = arguments[self.last]
            assert isinstance(tensor, Tensor)
            return int(tensor[-1])
        total = 0
        for number, names in self.terms:
            product = number
            for name in names:
                value = arguments[name]
                assert isinstance(value, int)
                product *= value
            total += product
        return total // self.divisor


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a function. kind: "l", "i", "u" or "f" for a number, else a tensor's element type.

    optional: "" if a tensor is required, "?" if it may be None, "?" and a number's name if only while that is 0.
    """

    name: str
    kind: str
    sizes: tuple[Size, ...] = ()
    row_stride: str = ""
    optional: str = ""

    @property
    def is_tensor(self) -> bool:
        return self.kind not in NUMBERS

    def mismatch(self, tensor: Argument, dtype: torch.dtype, arguments: Mapping[str, Argument]) -> str | None:
        """Return why a tensor cannot be passed, None if it can. dtype: element type of the functions."""
        if tensor is None and self.optional and not arguments.get(self.optional[1:]):
            return None
        expected = [size.of(arguments) for size in self.sizes]
        if min(expected, default=0) < 0:
            return f"would need the shape {expected}"
        element = dtype if self.kind == "T" else ELEMENTS[self.kind]
        if not isinstance(tensor, Tensor):
            return f"is {tensor!r}, expected a tensor {expected} of {element}"
        shape = list(tensor.shape)
        if self.row_stride:
            fits = len(shape) == 2 and shape[0] == expected[0] and shape[1] >= expected[1]
            rows, columns = tensor.stride() if fits else (0, 0)
            fits = fits and (columns == 1 or shape[1] < 2) and (rows == arguments[self.row_stride] or shape[0] < 2)
        else:
            fits = shape == expected and tensor.is_contiguous()
        if fits and tensor.dtype is element and tensor.device.type == "cpu":
            return None
        layout = f"rows {arguments[self.row_stride]} apart" if self.row_stride else "contiguous"
        return (
            f"is {shape} of {tensor.dtype} on {tensor.device}, strides {tensor.stride()}; expected {expected} of "
            f"{element} on cpu, {layout}"
        )


def parameters(signature: str) -> tuple[Parameter, ...]:
    """Parse a value of ``SIGNATURES``."""
    parsed = []
    for text in signature.split():
        match = _PARAMETER.fullmatch(text)
        assert match, text
        name, kind, sizes, row_stride, optional = match.groups()
        split = tuple(Size.parse(size) for size in sizes.split(",")) if sizes else ()
        parsed.append(Parameter(name, kind or "l", split, row_stride or "", optional or ""))
    return tuple(parsed)


@dataclass(frozen=True, slots=True)
class Condition:
    """What the arguments of a function must fulfil besides their types and extents. tensor: the index tensor, or ""."""

    text: str
    relation: str
    left: Size
    right: Size
    tensor: str = ""

    @classmethod
    def parse(cls, text: str, index_tensors: Sequence[str]) -> Condition:
        match = _CONDITION.fullmatch(text)
        assert match, text
        left, relation, right, of_tensor, tensor = match.groups()
        if of_tensor:
            return cls(text, of_tensor, Size(()), Size(()), tensor)
        if left in index_tensors:
            return cls(text, relation, Size(()), Size.parse(right), left)
        assert relation != "<", text
        return cls(text, relation, Size.parse(left), Size.parse(right))

    def fulfilled(self, arguments: Mapping[str, Argument]) -> bool:
        """Whether the arguments, whose types and extents match, fulfil the condition."""
        if not self.tensor:
            left, right = self.left.of(arguments), self.right.of(arguments)
            return left % right == 0 if self.relation == "%" else left >= right
        tensor = arguments[self.tensor]
        if self.relation == "placed":
            return _placed(tensor, arguments["offsets"], arguments["query_offsets"])
        if not isinstance(tensor, Tensor) or not tensor.numel():
            return True
        if self.relation == "ascending":
            return bool((tensor[1:] >= tensor[:-1]).all())
        if self.relation == "earlier":
            return bool((tensor < torch.arange(len(tensor))).all())
        right = self.right.of(arguments)
        return bool((tensor < right if self.relation == "<" else tensor >= right).all())


def _placed(rows: Argument, offsets: Argument, query_offsets: Argument) -> bool:
    """Whether the queries of each segment are rows of that segment, in order; without rows: whether they are all."""
    assert isinstance(offsets, Tensor) and isinstance(query_offsets, Tensor)
    if not isinstance(rows, Tensor):
        return torch.equal(offsets, query_offsets)
    return bool((rows[1:] > rows[:-1]).all()) and torch.equal(torch.searchsorted(rows, offsets), query_offsets)


def conditions(name: str) -> tuple[Condition, ...]:
    """Parse a value of ``CONDITIONS``; a function without an entry has none."""
    index_tensors = [p.name for p in parameters(SIGNATURES[name]) if p.kind == "i64"]
    return tuple(Condition.parse(text, index_tensors) for text in CONDITIONS.get(name, "").split())


_profiled: Callable[[], bool] = torch.autograd._profiler_enabled  # type: ignore[attr-defined]


_REMEMBERED = 256  # accepted calls per function
_FEW = 64  # index tensors with more elements differ from call to call, so such calls are not remembered


def _number(argument: Argument) -> object:
    return argument if isinstance(argument, int) else type(argument)


def _layout(argument: Argument) -> object:
    if not isinstance(argument, Tensor):
        return type(argument)
    return argument.shape, argument.stride(), argument.dtype, argument.device


def _values(argument: Argument) -> object:
    if not isinstance(argument, Tensor) or argument.device.type != "cpu":
        return _layout(argument)
    return _layout(argument), tuple(argument.flatten().tolist())


def _long(argument: Argument) -> bool:
    return isinstance(argument, Tensor) and argument.numel() > _FEW


class Unavailable(Exception):
    """The compiled kernels are not available on this machine; the message is the reason."""


class Kernels:
    """The compiled functions for one element type: ``kernels.norm_forward(...)``, arguments as in ``SIGNATURES``.

    Every call checks every tensor's type, device, extents and strides, and ``CONDITIONS``: the C++ side sees only
    addresses. Raises ValueError, before anything is computed, for an argument that does not match. Layers of one shape
    call with equal layouts, sizes and index tensors, so a call that was accepted is remembered and compared.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        for name, signature in SIGNATURES.items():
            function = getattr(library, f"{name}_{_SUFFIX[dtype]}")
            expected = parameters(signature)
            function.restype = None
            function.argtypes = [NUMBERS.get(p.kind, ctypes.c_void_p) for p in expected]
            setattr(self, name, self._call(name, function, expected, dtype))

    @staticmethod
    def _call(
        name: str, function: Callable[..., None], expected: Sequence[Parameter], dtype: torch.dtype
    ) -> Callable[..., None]:
        names = [p.name for p in expected]
        tensors = [p for p in expected if p.is_tensor]
        required = conditions(name)
        sizes = [*(size for p in tensors for size in p.sizes), *(s for c in required for s in (c.left, c.right))]
        valued = {c.tensor for c in required} | {size.last for size in sizes}  # their elements are checked too
        # a check depends on sizes and flags, not on the values of dropout's keys and of factors
        by_kind: dict[str, Callable[[Argument], object]] = {"l": _number, "i": _number, "u": type, "f": type}
        sees = [_values if p.name in valued else by_kind.get(p.kind, _layout) for p in expected]
        indices = [i for i, p in enumerate(expected) if p.name in valued]
        accepted: set[tuple[object, ...]] = set()

        def check(arguments: Sequence[Argument]) -> None:
            by_name = dict(zip(names, arguments, strict=True))
            for number in (p.name for p in expected if not p.is_tensor):
                if not isinstance(by_name[number], int | float):
                    raise ValueError(f"{name}: {number} is {by_name[number]!r}, expected a number")
            for parameter in tensors:
                if why := parameter.mismatch(by_name[parameter.name], dtype, by_name):
                    raise ValueError(f"{name}: {parameter.name} {why}")
            for condition in required:
                if not condition.fulfilled(by_name):
                    raise ValueError(f"{name}: {condition.text} is not fulfilled")

        def call(*arguments: Argument) -> None:
            if len(arguments) != len(names) or any(_long(arguments[i]) for i in indices):
                check(arguments)
            elif (key := tuple([see(argument) for see, argument in zip(sees, arguments, strict=True)])) not in accepted:
                check(arguments)
                if len(accepted) >= _REMEMBERED:
                    accepted.clear()
                accepted.add(key)
            recorded = torch.profiler.record_function(f"luthier::{name}") if _profiled() else nullcontext()
            with recorded:
                function(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))

        return call

    def __getattr__(self, name: str) -> Callable[..., None]:
        raise AttributeError(name)  # every function is set by the constructor


def kernels(dtype: torch.dtype) -> Kernels:
    """Return the compiled functions for fp32 or bf16. Raises Unavailable."""
    why = why_unavailable(dtype)
    if why:
        raise Unavailable(why)
    return _kernels(dtype)


@lru_cache(2)
def _kernels(dtype: torch.dtype) -> Kernels:
    return Kernels(load(), dtype)


def why_unavailable(dtype: torch.dtype) -> str | None:
    """Return why the kernels are not available, None if no reason is known before compiling them."""
    try:
        if dtype not in _SUFFIX:
            raise Unavailable(f"they support fp32 and bf16, not {str(dtype).removeprefix('torch.')}")
        _tools()
    except Unavailable as e:
        return str(e)
    return None


def _tools() -> tuple[str, Path]:
    """Find the compiler and torch's thread runtime. Raises Unavailable."""
    if platform.system() != "Linux":
        raise Unavailable(f"they are compiled on Linux only, and this is {platform.system()}")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
    if not compiler or not shutil.which(compiler):
        raise Unavailable("no C++ compiler is installed: apt install g++")
    runtime = next((Path(torch.__file__).parent / "lib").glob("libgomp*"), None)
    if runtime is None:
        raise Unavailable("this build of torch uses a thread runtime other than libgomp")
    return compiler, runtime


def identity() -> str | None:
    """Hash everything that the exact results of the compiled functions depend on; None if they are not available."""
    try:
        return _key(_tools()[0])
    except Unavailable:
        return None


def needs_compilation() -> bool:
    """Whether the kernels are available but not yet compiled on this machine."""
    try:
        return not files.exists(_library_path(_tools()[0]))
    except Unavailable:
        return False


@lru_cache(1)
def load() -> ctypes.CDLL:
    """Load the kernels; the first call on a machine compiles them (about 10 s). Raises Unavailable."""
    compiler, runtime = _tools()
    ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)  # so that torch and the kernels share one thread pool
    path = _library_path(compiler)
    if files.exists(path):
        return _opened(path)
    try:
        where = None if files.unwritable(path.parent) else path.parent  # else they are compiled in every process
        with tempfile.TemporaryDirectory(dir=where) as scratch:
            built = _build(compiler, Path(scratch))
            return _opened(built.replace(path) if where else built)
    except OSError as e:
        raise Unavailable(f"they cannot be compiled ({e})") from None


def _opened(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as e:
        raise Unavailable(f"{path} cannot be loaded ({e})") from None


def _library_path(compiler: str) -> Path:
    return files.cache_root() / "kernels" / f"luthier-{_key(compiler)}.so"


def _key(compiler: str) -> str:
    """Hash what the compiled file depends on: sources, flags, compiler, processor, torch."""
    here = Path(__file__).parent
    digest = hashlib.sha256("\n".join([*_flags(), torch.__version__, platform.machine(), cpu_instructions()]).encode())
    for name in ("common.h", "products.h", *_SOURCES):
        digest.update((here / name).read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    digest.update(version)
    return digest.hexdigest()[:16]


def _flags() -> tuple[str, ...]:
    wide = "avx512f" in cpu_instructions()
    return (*_FLAGS, "-mprefer-vector-width=512") if wide else _FLAGS


def _build(compiler: str, scratch: Path) -> Path:
    """Compile the sources in a directory and return the library. Raises Unavailable."""
    here = Path(__file__).parent
    objects = [str(scratch / f"{name}.o") for name in _SOURCES]
    running = [
        subprocess.Popen(
            [compiler, *_flags(), "-c", str(here / source), "-o", out], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for source, out in zip(_SOURCES, objects, strict=True)
    ]
    messages = [p.communicate()[0] for p in running]
    if not any(p.returncode for p in running):
        # without -fopenmp, so that its symbols resolve to the thread runtime that torch ships
        library = scratch / "all.so"
        link = subprocess.run([compiler, "-shared", "-o", str(library), *objects], capture_output=True, check=False)
        if link.returncode == 0:
            return library
        messages = [link.stderr]
    text = b" ".join(messages).decode(errors="replace").split("\n")[0]
    raise Unavailable(f"{compiler} failed to compile them ({text[:200]})")
