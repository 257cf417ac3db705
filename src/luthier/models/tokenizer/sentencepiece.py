"""A SentencePiece BPE model (``tokenizer.model``) as a ``tokenizers.Tokenizer`` that gives the same ids.

    text -> control tokens cut out -> spaces escaped -> user-defined symbols cut out -> merges by score -> ids

Each stretch between control tokens is encoded as SentencePiece would encode it alone, dummy prefix included. What
``tokenizers`` cannot do in the same way is refused. Source of the rules: google/sentencepiece, ``bpe_model.cc`` (the
highest score first, then the leftmost; user-defined symbols never joined), ``normalizer.cc`` (white space),
``sentencepiece_model.proto`` (types of pieces).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as pb
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from luthier.errors import ModelError
from luthier.models.tokenizer.merges import add_tokens, merges_of

_ANOTHER = "use a copy of the model that has a tokenizer.json"


class Kind(IntEnum):
    """``ModelProto.SentencePiece.Type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Spacing:
    """What becomes of white space before the merges (``NormalizerSpec``); the defaults are SentencePiece's."""

    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True

    @property
    def space(self) -> str:
        return "▁" if self.escape_whitespaces else " "

    def normalizer(self, symbols: Sequence[str]) -> normalizers.Normalizer:
        """symbols: the user-defined ones. ``tokenizers`` passes each through here too, to look for the result in the
        text; alone, they must not get the prefix."""
        steps: list[normalizers.Normalizer] = []
        if self.remove_extra_whitespaces:
            last = "[ ▁]" if self.escape_whitespaces else " "
            steps += [normalizers.Replace(Regex(rf"\A +|{last}+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
        if self.add_dummy_prefix:
            steps.append(normalizers.Prepend(self.space))
        if self.escape_whitespaces:
            steps.append(normalizers.Replace(" ", self.space))
        if self.add_dummy_prefix and symbols:
            alone = "|".join(re.escape(s) for s in symbols)
            steps.append(normalizers.Replace(Regex(rf"\A{self.space}(?=(?:{alone})\z)"), ""))
        return normalizers.Sequence(steps)

    def decoder(self) -> decoders.Decoder:
        steps: list[decoders.Decoder] = [decoders.ByteFallback(), decoders.Fuse()]
        if self.escape_whitespaces:
            steps.insert(0, decoders.Replace("▁", " "))
        if self.add_dummy_prefix:
            steps.append(decoders.Strip(" ", left=1))
        return decoders.Sequence(steps)


def read(path: Path) -> ModelProto:
    """The ``ModelProto`` of a BPE model. Raises ModelError where the file is absent, damaged or of another kind."""
    try:
        proto = pb.ModelProto.FromString(path.read_bytes())
    except OSError as e:
        raise ModelError(f"{path}: cannot be read ({e.strerror or e})", "download the model again") from None
    except DecodeError:
        proto = pb.ModelProto()
    if not proto.pieces or not proto.HasField("trainer_spec") or not proto.HasField("normalizer_spec"):
        raise ModelError(f"{path}: is not a whole SentencePiece model", "download the model again")
    kind = pb.TrainerSpec.ModelType.Name(proto.trainer_spec.model_type)
    if kind != "BPE":
        raise ModelError(f"{path}: is a SentencePiece {kind} model; only BPE ones can be read", _ANOTHER)
    if proto.normalizer_spec.precompiled_charsmap or proto.trainer_spec.treat_whitespace_as_suffix:
        raise ModelError(
            f"{path}: rewrites text before it splits it ({proto.normalizer_spec.name}), which cannot be done exactly",
            _ANOTHER,
        )
    return proto


def from_proto(proto: ModelProto, declared: Mapping[int, AddedToken], where: object = "tokenizer.model") -> Tokenizer:
    """See ``from_pieces``."""
    spec = proto.normalizer_spec
    return from_pieces(
        [p.piece for p in proto.pieces],
        [p.score for p in proto.pieces],
        [p.type for p in proto.pieces],
        Spacing(spec.add_dummy_prefix, spec.remove_extra_whitespaces, spec.escape_whitespaces),
        declared,
        where,
    )


def from_pieces(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    spacing: Spacing,
    declared: Mapping[int, AddedToken] | None = None,
    where: object = "tokenizer.model",
) -> Tokenizer:
    """The tokenizer of a SentencePiece BPE vocabulary; ``pieces``, ``scores`` and ``types`` (``Kind``) are by id.

    declared: added tokens by id, from the checkpoint's configuration: new ones after the pieces, or names and
        stripping for pieces that are there. Control pieces are added as special tokens in any case.
    where: what an error names. Raises ModelError where the same ids cannot be had.
    """
    declared = declared or {}
    names = [declared[i].content if i in declared else piece for i, piece in enumerate(pieces)]
    of: dict[int, list[int]] = {kind: [] for kind in Kind}
    for i, kind in enumerate(types):
        of[kind].append(i)
    if len(set(names)) < len(names) or len(of[Kind.UNKNOWN]) != 1:
        raise ModelError(f"{where}: holds a piece twice, or not one for unknown text", "download the model again")
    plain = sorted((i for i in of[Kind.NORMAL] if i not in declared), key=lambda i: (-scores[i], -len(names[i]), i))
    merges = merges_of([names[i] for i in plain])
    # A symbol of one character needs no cutting out: no merge holds it, so it is never joined.
    symbols = {i: names[i] for i in of[Kind.USER_DEFINED] if i not in declared and len(names[i]) > 1}
    reason = (
        _unknown_part([names[i] for i in plain], [names[i] for i in of[Kind.USER_DEFINED]])
        or _formed([names[i] for i in of[Kind.UNUSED] if i not in declared], {names[i] for i in plain})
        or _tied({names[i]: scores[i] for i in plain}, merges)
        or _removed(list(symbols.values()), spacing)
    )
    if reason:
        raise ModelError(f"{where}: cannot be reproduced exactly ({reason})", _ANOTHER)
    unknown = of[Kind.UNKNOWN][0]
    vocab = {name: i for i, name in enumerate(names)}
    fallback = bool(of[Kind.BYTE])
    model = BPE(vocab=vocab, merges=merges, unk_token=names[unknown], fuse_unk=True, byte_fallback=fallback)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = spacing.normalizer(list(symbols.values()))
    tokenizer.decoder = spacing.decoder()
    special = {i: AddedToken(names[i], special=True, normalized=False) for i in (unknown, *of[Kind.CONTROL])}
    cut_out = {i: AddedToken(name, special=False, normalized=True) for i, name in symbols.items()}
    add_tokens(tokenizer, {**special, **cut_out, **declared}, where)
    return tokenizer


def agrees(tokenizer: Tokenizer, proto: ModelProto, markers: Sequence[str]) -> bool:
    """Whether ``tokenizer`` gives SentencePiece's own ids for the text around each special token of ``markers``."""
    reference = SentencePieceProcessor(model_proto=proto.SerializeToString())
    ids = {p.piece: i for i, p in enumerate(proto.pieces)}
    for marker in markers:
        marker_id = tokenizer.token_to_id(marker)
        if ids.get(marker, marker_id) != marker_id:
            return False
        for before, after in (("", "\n"), ("a", "\na"), ("", "a  b"), ("好。", " 好\n\n")):
            expected = [*reference.encode(before), marker_id, *reference.encode(after)]
            if tokenizer.encode(before + marker + after, add_special_tokens=False).ids != expected:
                return False
    return True


# What follows says where fixed merges would not do what SentencePiece does. No trained vocabulary is like that, only
# one that was put together.


def _unknown_part(plain: Sequence[str], symbols: Sequence[str]) -> str | None:
    """SentencePiece can join a character that is no piece; a merge cannot."""
    lost = set("".join(plain)) - {*plain, *symbols}
    return f"{min(lost)!r} is part of a piece and no piece" if lost else None


def _formed(unused: Sequence[str], plain: Set[str]) -> str | None:
    """SentencePiece joins the parts of an unused piece, and takes them apart again at the end."""
    found = [u for u in unused if any(u[:cut] in plain and u[cut:] in plain for cut in range(1, len(u)))]
    return f"{found[0]!r} is unused and can be formed" if found else None


def _tied(scores: Mapping[str, float], merges: Sequence[tuple[str, str]]) -> str | None:
    """Of different products with one score the leftmost is formed, not the one that stands first."""
    shared = {score for score, times in Counter(scores.values()).items() if times > 1}
    equals: dict[float, dict[str, None]] = defaultdict(dict)  # in the order of the merges
    for left, right in merges if shared else ():
        if (score := scores[left + right]) in shared:
            equals[score][left + right] = None
    pairs = (_overlap(group) for group in equals.values() if len(group) > 1)
    return next((f"{a!r} and {b!r} have the same score" for a, b in filter(None, pairs)), None)


def _overlap(group: Iterable[str]) -> tuple[str, str] | None:
    """Two pieces of which one ends as the other begins (the leftmost must win), unless both are runs of one character
    (Llama's white space): a run grows from its left, as the longest product stands first."""
    begins: dict[str, list[str]] = defaultdict(list)
    for piece in group:
        for cut in range(1, len(piece)):
            begins[piece[:cut]].append(piece)
    for piece in group:
        for cut in range(1, len(piece)):
            for other in begins[piece[cut:]]:
                if other != piece and len(set(piece + other)) > 1:
                    return piece, other
    return None


def _removed(symbols: Sequence[str], spacing: Spacing) -> str | None:
    """White space that is a symbol and also removed."""
    found = [s for s in symbols if spacing.remove_extra_whitespaces and s.endswith(("▁", " "))]
    return f"{found[0]!r} is white space that is removed" if found else None
