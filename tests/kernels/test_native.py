"""The boundary between Python and the compiled kernels: one declaration per function, every argument checked."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.kernels import native
from luthier.kernels.native import ELEMENTS, decoding, parameters
from luthier.kernels.native.signatures import CONDITIONS, SIGNATURES

_HERE = Path(native.__file__).parent
_C_TYPES = {
    "l": "int64_t", "i": "int", "u": "uint32_t", "f": "float",
    "T": "T*", "f32": "float*", "i64": "int64_t*", "u8": "uint8_t*", "i8": "int8_t*",
}  # fmt: skip


def _exported() -> dict[str, list[tuple[str, str]]]:
    """Every exported C++ function: its parameters as (type, name), macros replaced by their text."""
    functions = {}
    for source in sorted(_HERE.glob("*.cpp")):
        text = source.read_text().replace("\\\n", " ")
        macros = dict(re.findall(r"^#define ([A-Z]+) (.*)$", text, re.MULTILINE))
        for name, listed in re.findall(r'extern "C" void (\w+)_##S\(([^)]*)\)', text):
            expanded = re.sub(r"\b[A-Z]{2,}\b", lambda macro, macros=macros: macros[macro[0]], listed)
            functions[name] = [_parameter(p) for p in expanded.split(",")]
    return functions


def _parameter(text: str) -> tuple[str, str]:
    kind, pointer, name = re.fullmatch(r"\s*(?:const\s+)?(\w+)\s*(\*?)\s*(\w+)\s*", text).groups()  # type: ignore[union-attr]
    return kind + pointer, name


def test_python_and_cpp_declare_the_same_functions_with_the_same_parameters() -> None:
    declared = {name: [(_C_TYPES[p.kind], p.name) for p in parameters(text)] for name, text in SIGNATURES.items()}
    assert declared == _exported()


def _fields(name: str) -> list[tuple[str, str]]:
    """The fields of a C++ structure as (name, type): "l", "f", "p" for a pointer, else the type's name."""
    text = (_HERE / "decode.cpp").read_text() + (_HERE / "products.h").read_text()
    body = re.search(rf"struct {name} {{\n(.*?)\n}};", text, re.DOTALL)[1]  # type: ignore[index]
    fields = []
    for line in re.sub(r"//.*", "", body).split(";"):
        match = re.fullmatch(r"(?:const )?(\w+\*?)\s+(.*)", line.strip(), re.DOTALL)
        if match is None or "(" in line:
            continue
        for declared in match[2].split(","):
            pointer, field = "*" in declared or "*" in match[1], declared.strip(" *")
            kind = "p" if pointer else {"int64_t": "l", "float": "f"}.get(match[1], match[1])
            fields.append((field.split("[")[0], kind))
    return fields


@pytest.mark.parametrize("name", ["Matrix", "Group", "Update", "DecoderLayer", "Model", "Step"])
def test_python_and_cpp_declare_the_same_structures(name: str) -> None:
    structure = getattr(decoding, f"{name.removeprefix('Decoder')}Struct")
    kinds = {ctypes.c_int64: "l", ctypes.c_float: "f", ctypes.c_void_p: "p"}
    nested = {decoding.MatrixStruct: "Matrix", decoding.GroupStruct: "Group"}
    declared = []
    for field, kind in structure._fields_:
        element = getattr(kind, "_type_", kind) if issubclass(kind, ctypes.Array) else kind
        declared.append((field, kinds.get(element) or nested.get(element) or "p"))
    assert declared == _fields(name)


def test_python_and_cpp_have_the_same_constants() -> None:
    text = (_HERE / "decode.cpp").read_text()
    assert f"constexpr int64_t PAGE = {decoding.PAGE};" in text
    assert f"Group groups[{decoding.GROUPS}];" in text and f"Matrix matrices[{decoding.MATRICES}];" in text
    kinds = "enum Kind : int64_t { FLOAT, BFLOAT, FOUR, EIGHT };"
    assert kinds in (_HERE / "products.h").read_text()
    assert [decoding.FLOAT, decoding.BFLOAT, decoding.FOUR, decoding.EIGHT] == [0, 1, 2, 3]


@pytest.fixture
def kernels() -> native.Kernels:
    if why := native.why_unavailable(torch.float32):
        pytest.skip(why)
    return native.kernels(torch.float32)


def _dropout(kernels: native.Kernels, x: Tensor, out: Tensor) -> None:
    kernels.dropout(4, 6, x, out, 1, 0, 1.0)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (torch.ones(4, 6, dtype=torch.bfloat16), r"dropout: x is \[4, 6\] of torch.bfloat16"),
        (torch.ones(4, 6, dtype=torch.float64), "torch.float64"),
        (torch.ones(4, 6, device="meta"), "on meta"),
        (torch.ones(6, 4).t(), r"strides \(1, 4\); expected \[4, 6\] of torch.float32 on cpu, contiguous"),
        (torch.ones(4, 5), r"is \[4, 5\]"),
        (torch.ones(3, 6), r"is \[3, 6\]"),
        (torch.ones(24), r"is \[24\]"),
        (None, "is None"),
    ],
)
def test_a_tensor_that_does_not_match_is_refused_before_anything_is_computed(
    kernels: native.Kernels, wrong: Tensor | None, expected: str
) -> None:
    out = torch.full((4, 6), 7.0)
    with pytest.raises(ValueError, match=expected):
        _dropout(kernels, wrong, out)  # type: ignore[arg-type]
    assert out.eq(7).all()


def test_a_matching_tensor_is_accepted(kernels: native.Kernels) -> None:
    out = torch.full((4, 6), 7.0)
    _dropout(kernels, torch.ones(4, 6), out)
    assert out.eq(1).all()


@pytest.mark.parametrize(
    ("out", "stride"),
    [
        (torch.zeros(4, 12)[:, :6], 6),  # the declared row stride is not the tensor's
        (torch.zeros(4, 12)[:, ::2], 12),  # elements of a row are not adjacent
        (torch.zeros(4, 4), 4),  # rows are shorter than k
    ],
)
def test_rows_with_another_stride_than_declared_are_refused(kernels: native.Kernels, out: Tensor, stride: int) -> None:
    with pytest.raises(ValueError, match=f"eight_bits: out is .* rows {stride} apart"):
        kernels.eight_bits(4, 6, torch.ones(4, 6, dtype=torch.int8), torch.ones(4), out, stride)
    assert out.eq(0).all()


_NUMBERS = {"n": 2, "k": 64, "m": 3, "rank": 2, "count": 2, "heads": 4, "kv": 2, "dim": 16, "rotary": 8, "width": 64}
_INDEX = {
    "offsets": [0, 3, 5], "query_offsets": [0, 1, 2], "parents": [-1, 0], "query_rows": [0, 4], "targets": [0, 63],
    "places": [0, 1],
}  # fmt: skip
_NUMBERS |= {"vocabulary": 64, "shared": 3, "window": 0, "interleaved": 0, "back": 0, "key": 1, "threshold": 9}


def _matching(name: str, **chosen: native.Argument) -> dict[str, native.Argument]:
    """Arguments that a function accepts: small sizes, rows 256 elements apart. chosen: replaces numbers and tensors."""
    expected = parameters(SIGNATURES[name])
    strides = {p.row_stride for p in expected} | {"ld", "ldo"}
    arguments: dict[str, native.Argument] = {
        p.name: 256 if p.name in strides else 0.5 if p.kind == "f" else _NUMBERS[p.name]
        for p in expected
        if not p.is_tensor
    }
    arguments |= {p.name: torch.tensor(_INDEX[p.name]) for p in expected if p.kind == "i64"} | chosen
    for parameter in (p for p in expected if p.is_tensor and p.name not in arguments):
        shape = [size.of(arguments) for size in parameter.sizes]
        element = torch.float32 if parameter.kind == "T" else ELEMENTS[parameter.kind]
        stride = arguments[parameter.row_stride] if parameter.row_stride else shape[-1]
        assert isinstance(stride, int)
        arguments[parameter.name] = torch.full([*shape[:-1], stride], 3, dtype=element)[..., : shape[-1]]
    return {p.name: arguments[p.name] for p in expected}


@pytest.mark.parametrize("name", SIGNATURES)
def test_every_tensor_of_every_function_is_checked(name: str) -> None:
    """The type, the device, the number of elements and the distance between them, one wrong at a time."""
    arguments = _matching(name)
    for parameter in (p for p in parameters(SIGNATURES[name]) if p.is_tensor):
        right = arguments[parameter.name]
        assert isinstance(right, Tensor)
        shape = right.shape
        wrong = [
            right.to(torch.complex64),
            right.to("meta"),
            right[..., :-1] if parameter.row_stride else right[..., :-1].contiguous(),
            right[:-1],
            right[..., None],
            torch.ones(*shape[:-1], 2 * shape[-1], dtype=right.dtype)[..., ::2],
        ]
        assert parameter.mismatch(right, torch.float32, arguments) is None, parameter.name
        for tensor in wrong:
            assert parameter.mismatch(tensor, torch.float32, arguments), (parameter.name, tensor.shape, tensor.stride())
        assert (parameter.mismatch(None, torch.float32, arguments) is None) is (parameter.optional == "?")
        without = {**arguments, "rank": 0}
        assert (parameter.mismatch(None, torch.float32, without) is None) is bool(parameter.optional)


# an argument that breaks each condition
_BROKEN: dict[str, dict[str, native.Argument]] = {
    "k%16": {"k": 24},
    "k%64": {"k": 96},
    "ldo>=k+rank": {"ldo": 65},
    "ld>=k+rank": {"ld": 65},
    "ld>=k": {"ld": 63},
    "width>=heads*dim": {"width": 48},
    "dim>=rotary": {"rotary": 24},
    "offsets>=0": {"offsets": torch.tensor([-1, 3, 5])},
    "ascending(offsets)": {"offsets": torch.tensor([0, 9, 5])},
    "earlier(parents)": {"parents": torch.tensor([-1, 1])},
    "placed(query_rows)": {"query_rows": torch.tensor([4, 0])},
    "heads>=1": {"heads": 0},
    "kv>=1": {"kv": 0},
    "dim>=1": {"dim": 0},
    "last(offsets)>=shared": {"shared": 6},
    "shared>=0": {"shared": -1},
    "window>=0": {"window": -1},
    "heads%kv": {"heads": 3},
    "dim%16": {"dim": 24},
    "targets>=0": {"targets": torch.tensor([0, -1])},
    "targets<vocabulary": {"targets": torch.tensor([0, 64])},
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_that_match_are_accepted(name: str, kernels: native.Kernels) -> None:
    getattr(kernels, name)(*_matching(name).values())


@pytest.mark.parametrize(("name", "condition"), [(n, c) for n, text in CONDITIONS.items() for c in text.split()])
def test_a_call_that_would_access_memory_outside_a_tensor_is_refused(
    name: str, condition: str, kernels: native.Kernels
) -> None:
    """All tensors have the extents that the signature asks for; only the condition is broken. A call before passes."""
    getattr(kernels, name)(*_matching(name).values())
    with pytest.raises(ValueError, match=rf"{name}: {re.escape(condition)} is not fulfilled"):
        getattr(kernels, name)(*_matching(name, **_BROKEN[condition]).values())


@pytest.mark.parametrize(
    ("rows", "query_offsets"),
    [
        ([-1, 4], [0, 1, 2]),
        ([0, 5], [0, 1, 2]),
        ([0, 4], [0, 2, 2]),  # row 4 is not in the first segment
        ([3, 3], [0, 0, 2]),
        (None, [0, 1, 2]),  # all five rows would be queries
    ],
)
def test_queries_outside_their_segment_are_refused(
    rows: list[int] | None, query_offsets: list[int], kernels: native.Kernels
) -> None:
    chosen = {"query_offsets": torch.tensor(query_offsets), "query_rows": None if rows is None else torch.tensor(rows)}
    with pytest.raises(ValueError, match=r"placed\(query_rows\) is not fulfilled"):
        kernels.attend_forward(*_matching("attend_forward", **chosen).values())


def test_a_tensor_changed_in_place_is_checked_again(kernels: native.Kernels) -> None:
    arguments = _matching("cross_entropy", logits=torch.zeros(2, 256)[:, :64])
    kernels.cross_entropy(*arguments.values())
    targets = arguments["targets"]
    assert isinstance(targets, Tensor)
    targets[1] = 64
    with pytest.raises(ValueError, match="targets<vocabulary is not fulfilled"):
        kernels.cross_entropy(*arguments.values())


def test_a_call_with_another_dropout_key_is_not_checked_again(
    kernels: native.Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []
    monkeypatch.setattr(native.Parameter, "mismatch", lambda self, *_: checked.append(self.name))
    for name in ("dropout", "norm_forward"):
        arguments = _matching(name, n=1, k=112)  # sizes that no other test uses
        for key in (5, 6):
            checked.clear()
            getattr(kernels, name)(*{**arguments, "key": key}.values())
            assert bool(checked) is (key == 5)


@pytest.mark.parametrize("wrong", [torch.tensor(6), [6], None, "6"])
def test_a_number_that_is_none_is_refused(wrong: Any, kernels: native.Kernels) -> None:
    with pytest.raises(ValueError, match="dropout: k is .*, expected a number"):
        kernels.dropout(4, wrong, torch.ones(4, 6), torch.ones(4, 6), 1, 0, 1.0)


def test_a_negative_size_is_refused(kernels: native.Kernels) -> None:
    with pytest.raises(ValueError, match=r"dropout: x would need the shape \[4, -6\]"):
        kernels.dropout(4, -6, torch.ones(4, 6), torch.ones(4, 6), 1, 0, 1.0)


@pytest.mark.parametrize("name", SIGNATURES)
def test_an_accepted_call_does_not_let_another_one_pass(name: str, kernels: native.Kernels) -> None:
    arguments = _matching(name)
    getattr(kernels, name)(*arguments.values())
    for parameter in (p for p in parameters(SIGNATURES[name]) if p.is_tensor):
        right = arguments[parameter.name]
        assert isinstance(right, Tensor)
        for wrong in (right.to(torch.float16), right.to("meta"), right[:-1], right[None].expand(2, *right.shape)):
            with pytest.raises(ValueError, match=f"{name}: {parameter.name} "):
                getattr(kernels, name)(*{**arguments, parameter.name: wrong}.values())


@pytest.mark.parametrize("missing", ["a", "factor", "saved"])
def test_lora_tensors_may_be_missing_only_at_rank_0(missing: str, kernels: native.Kernels) -> None:
    with pytest.raises(ValueError, match=f"norm_forward: {missing} is None"):
        kernels.norm_forward(*_matching("norm_forward", **{missing: None}).values())
    kernels.norm_forward(*_matching("norm_forward", rank=0, a=None, factor=None, saved=None).values())


def test_a_missing_argument_is_refused(kernels: native.Kernels) -> None:
    with pytest.raises(ValueError, match="shorter"):
        kernels.dropout(4, 6, torch.ones(4, 6), torch.ones(4, 6), 1, 0)
