"""Detect a file's text encoding and read its lines.

Detected in this order: UTF-8, UTF-16 and UTF-32 with a byte order mark; UTF-16 without one, by its zero bytes; UTF-8;
GB18030 (a superset of GBK and GB2312) if more pieces of text decode as that than as UTF-8 or as neither. Bytes that
cannot be decoded become lone surrogates, so that only their own row is lost.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from luthier.errors import DataError, nearest

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BLOCK = 1 << 20
_UNREADABLE = "luthier-unreadable"


def _unreadable(error: UnicodeError) -> tuple[str, int]:
    """Replace undecodable bytes by one lone surrogate, in every encoding."""
    assert isinstance(error, UnicodeDecodeError)
    return "\udc80", error.end


codecs.register_error(_UNREADABLE, _unreadable)


def check_file(path: Path) -> None:
    """Raise DataError unless ``path`` is a readable file that is neither empty nor compressed."""
    if (path / "config.json").is_file():
        raise DataError(f"{path}: is a model directory, not a data file", f"give it with --model {path}")
    if path.is_dir():
        raise DataError(f"{path}: is a directory", f"name its files, e.g. {path}/*.jsonl")
    if not path.is_file():
        folder = path.parent
        names = [p.name for p in folder.iterdir() if nearest(path.stem, [p.stem], 0.51)] if folder.is_dir() else []
        guess = nearest(path.name, names)  # of similar stems: the endings of all data files are similar
        fix = f"did you mean {folder / guess}?" if guess else "choose a JSON, JSONL, CSV, TSV or Parquet file"
        raise DataError(f"{path}: does not exist", fix)
    head = read_head(path, 6)
    if not head:
        raise DataError(f"{path}: is empty", "choose a file with instruction rows")
    compressed = {
        b"\x1f\x8b": "gzip",
        b"PK\x03\x04": "zip",
        b"BZh": "bzip2",
        b"\xfd7zXZ": "xz",
        b"\x28\xb5\x2f\xfd": "zstd",
    }
    for magic, name in compressed.items():
        if head.startswith(magic):
            raise DataError(f"{path}: is compressed ({name})", "decompress it and name the file inside")


def read_head(path: Path, size: int) -> bytes:
    """Return the first bytes of a file. Raises DataError if it cannot be read."""
    try:
        with open(path, "rb") as f:
            return f.read(size)
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror})", "check the file's permissions") from None


def encoding_of(path: Path) -> str:
    """Return the Python name of a file's encoding, in at most two passes and constant memory."""
    head = read_head(path, 4096)
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    if head[1::2].count(0) > len(head) // 4:
        return "utf-16-le"
    if head[0::2].count(0) > len(head) // 4:
        return "utf-16-be"
    return "utf-8" if _is_utf8(path) else _utf8_or_gb18030(path)


def open_text(path: Path, encoding: str) -> IO[str]:
    """Open a file as text with unchanged line ends; undecodable bytes become lone surrogates."""
    return open(path, encoding=encoding, errors=_UNREADABLE, newline="")


def lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    """Yield line numbers, counted from 1, and lines without their ends.

    Only ``\\n`` and ``\\r\\n`` end a line; in a file that begins with a line that only ``\\r`` ends, ``\\r`` does too.
    """
    with open_text(path, encoding) as f:
        rest, number, end = "", 0, "\n"
        while block := f.read(_BLOCK):
            if not number and "\n" not in block and "\r" in block.strip():
                end = "\r"
            parts = (rest + block).split(end)
            rest = parts.pop()
            for part in parts:
                number += 1
                yield number, part.removesuffix("\r")
        if rest:
            yield number + 1, rest.removesuffix("\r")


def _is_utf8(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with open(path, "rb") as f:
            while block := f.read(_BLOCK):
                decoder.decode(block)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _utf8_or_gb18030(path: Path) -> str:
    """Decide between UTF-8 and GB18030 by majority of the non-ASCII pieces between line ends and quotes."""
    votes = {"utf-8": 0, "gb18030": 0, "neither": 0}
    with open(path, "rb") as f:
        for line in f:
            for piece in line.split(b'"'):
                if not piece.isascii():
                    votes[_vote(piece)] += 1
    return "gb18030" if votes["gb18030"] > max(votes["utf-8"], votes["neither"]) else "utf-8"


def _vote(piece: bytes) -> str:
    """Return the probable encoding of a piece of text: "utf-8", "gb18030" or "neither".

    Valid UTF-8 is hardly ever meant as GB18030. Latin-1 and Big5 decode as GB18030 too, but to rare characters.
    """
    for name in ("utf-8", "gb18030"):
        try:
            piece.decode(name)
        except UnicodeDecodeError:
            continue
        if name == "utf-8":
            return name
        common = piece.decode("gb2312", "replace")
        rare = common.count("\ufffd")
        written = len(common) - len(common.encode("ascii", "ignore"))
        return name if written >= 2 * rare else "neither"
    return "neither"
