"""Convert a SentencePiece BPE model (``tokenizer.model``) to a ``tokenizers.Tokenizer`` that gives the same ids.

    text -> split at control tokens -> escape spaces -> split at user-defined symbols -> merge by score -> ids

The text between two control tokens is encoded as SentencePiece would encode it separately, including the dummy prefix.
Models that ``tokenizers`` cannot reproduce exactly are refused. Source of the rules: google/sentencepiece,
``bpe_model.cc`` (highest score first, then leftmost; user-defined symbols are never merged), ``normalizer.cc`` (white
space), ``sentencepiece_model.proto`` (types of pieces).
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
from tokenizers import AddedToken, Regex, decoders, normalizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE

from luthier.errors import ModelError
from luthier.models.tokenizer.merges import add_tokens, merges_of

_ANOTHER = "use a copy of the model that has a tokenizer.json"


class PieceType(IntEnum):
    """``ModelProto.SentencePiece.Type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Spacing:
    """The treatment of white space before the merges (``NormalizerSpec``); the defaults are SentencePiece's."""

    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True

    @property
    def space(self) -> str:
        """The character that represents a space in the pieces."""
        return "▁" if self.escape_whitespaces else " "

    def normalizer(self, symbols: Sequence[str]) -> normalizers.Normalizer:
        """Build the normalizer.

        symbols: the user-defined ones. ``tokenizers`` normalises each of them too, to search for the result in the
            text, so a text that is only a symbol must not get the prefix.
        """
        steps: list[normalizers.Normalizer] = []
        if self.remove_extra_whitespaces:
            trailing = "[ ▁]" if self.escape_whitespaces else " "
            steps += [normalizers.Replace(Regex(rf"\A +|{trailing}+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
        if self.add_dummy_prefix:
            steps.append(normalizers.Prepend(self.space))
        if self.escape_whitespaces:
            steps.append(normalizers.Replace(" ", self.space))
        if self.add_dummy_prefix and symbols:
            only_symbol = "|".join(re.escape(s) for s in symbols)
            steps.append(normalizers.Replace(Regex(rf"\A{self.space}(?=(?:{only_symbol})\z)"), ""))
        return normalizers.Sequence(steps)

    def decoder(self) -> decoders.Decoder:
        """Build the decoder that restores spaces and removes the dummy prefix."""
        steps: list[decoders.Decoder] = [decoders.ByteFallback(), decoders.Fuse()]
        if self.escape_whitespaces:
            steps.insert(0, decoders.Replace("▁", " "))
        if self.add_dummy_prefix:
            steps.append(decoders.Strip(" ", left=1))
        return decoders.Sequence(steps)


def read(path: Path) -> ModelProto:
    """Read the ``ModelProto`` of a BPE model. Raises ModelError if the file is absent, damaged or of another kind."""
    try:
        proto = pb.ModelProto.FromString(path.read_bytes())
    except OSError as e:
        raise ModelError(f"{path}: cannot be read ({e.strerror or e})", "download the model again") from None
    except DecodeError:
        proto = pb.ModelProto()
    if not proto.pieces or not proto.HasField("trainer_spec") or not proto.HasField("normalizer_spec"):
        raise ModelError(f"{path}: is not a complete SentencePiece model", "download the model again")
    kind = pb.TrainerSpec.ModelType.Name(proto.trainer_spec.model_type)
    if kind != "BPE":
        raise ModelError(f"{path}: is a SentencePiece {kind} model; only BPE models are supported", _ANOTHER)
    if proto.normalizer_spec.precompiled_charsmap or proto.trainer_spec.treat_whitespace_as_suffix:
        raise ModelError(
            f"{path}: normalises text ({proto.normalizer_spec.name}) in a way that cannot be reproduced exactly",
            _ANOTHER,
        )
    return proto


def from_proto(
    proto: ModelProto, declared: Mapping[int, AddedToken], source: object = "tokenizer.model"
) -> FastTokenizer:
    """Build the tokenizer of a ``ModelProto``; see ``from_pieces``."""
    spec = proto.normalizer_spec
    return from_pieces(
        [p.piece for p in proto.pieces],
        [p.score for p in proto.pieces],
        [p.type for p in proto.pieces],
        Spacing(spec.add_dummy_prefix, spec.remove_extra_whitespaces, spec.escape_whitespaces),
        declared,
        source,
    )


def from_pieces(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    spacing: Spacing,
    declared: Mapping[int, AddedToken] | None = None,
    source: object = "tokenizer.model",
) -> FastTokenizer:
    """Build the tokenizer of a SentencePiece BPE vocabulary.

    pieces, scores, types (``PieceType``): by id.
    declared: added tokens by id, from the checkpoint's configuration: new ones after the pieces, or names and
        stripping for existing pieces. Control pieces are always added as special tokens.
    source: the file that errors name. Raises ModelError if the ids cannot be reproduced exactly.
    """
    declared = declared or {}
    names = [declared[i].content if i in declared else piece for i, piece in enumerate(pieces)]
    by_type: dict[int, list[int]] = {piece_type: [] for piece_type in PieceType}
    for i, piece_type in enumerate(types):
        by_type[piece_type].append(i)
    if len(set(names)) < len(names) or len(by_type[PieceType.UNKNOWN]) != 1:
        raise ModelError(
            f"{source}: must have distinct pieces and exactly one for unknown text", "download the model again"
        )
    plain = sorted(
        (i for i in by_type[PieceType.NORMAL] if i not in declared), key=lambda i: (-scores[i], -len(names[i]), i)
    )
    merges = merges_of([names[i] for i in plain])
    # A symbol of one character needs no split: no merge contains it, so it is never joined.
    symbols = {i: names[i] for i in by_type[PieceType.USER_DEFINED] if i not in declared and len(names[i]) > 1}
    reason = (
        _part_without_piece([names[i] for i in plain], [names[i] for i in by_type[PieceType.USER_DEFINED]])
        or _unused_but_formed(
            [names[i] for i in by_type[PieceType.UNUSED] if i not in declared], {names[i] for i in plain}
        )
        or _equal_scores({names[i]: scores[i] for i in plain}, merges)
        or _removed_symbol(list(symbols.values()), spacing)
    )
    if reason:
        raise ModelError(f"{source}: cannot be reproduced exactly ({reason})", _ANOTHER)
    unknown = by_type[PieceType.UNKNOWN][0]
    vocab = {name: i for i, name in enumerate(names)}
    fallback = bool(by_type[PieceType.BYTE])
    model = BPE(vocab=vocab, merges=merges, unk_token=names[unknown], fuse_unk=True, byte_fallback=fallback)
    tokenizer = FastTokenizer(model)
    tokenizer.normalizer = spacing.normalizer(list(symbols.values()))
    tokenizer.decoder = spacing.decoder()
    special = {i: AddedToken(names[i], special=True, normalized=False) for i in (unknown, *by_type[PieceType.CONTROL])}
    split_at = {i: AddedToken(name, special=False, normalized=True) for i, name in symbols.items()}
    add_tokens(tokenizer, {**special, **split_at, **declared}, source)
    return tokenizer


def agrees(tokenizer: FastTokenizer, proto: ModelProto, markers: Sequence[str]) -> bool:
    """Return whether ``tokenizer`` gives SentencePiece's ids for text around each special token of ``markers``."""
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


# The functions below find vocabularies for which a fixed list of merges differs from SentencePiece. Only vocabularies
# assembled by hand are affected, not trained ones.


def _part_without_piece(plain: Sequence[str], symbols: Sequence[str]) -> str | None:
    """Find a character that only occurs inside pieces: SentencePiece can join it, a merge cannot."""
    missing = set("".join(plain)) - {*plain, *symbols}
    return f"{min(missing)!r} occurs in a piece but is not a piece itself" if missing else None


def _unused_but_formed(unused: Sequence[str], plain: Set[str]) -> str | None:
    """Find an unused piece that merges can form: SentencePiece forms it too, but splits it again at the end."""
    formed = [u for u in unused if any(u[:i] in plain and u[i:] in plain for i in range(1, len(u)))]
    return f"{formed[0]!r} is marked unused but merges can form it" if formed else None


def _equal_scores(scores: Mapping[str, float], merges: Sequence[tuple[str, str]]) -> str | None:
    """Find different results of equal score: SentencePiece forms the leftmost, not the first in the list."""
    shared = {score for score, count in Counter(scores.values()).items() if count > 1}
    equals: dict[float, dict[str, None]] = defaultdict(dict)  # in the order of the merges
    for left, right in merges if shared else ():
        if (score := scores[left + right]) in shared:
            equals[score][left + right] = None
    pairs = (_overlap(group) for group in equals.values() if len(group) > 1)
    return next((f"{a!r} and {b!r} have the same score" for a, b in filter(None, pairs)), None)


def _overlap(group: Iterable[str]) -> tuple[str, str] | None:
    """Find two pieces such that the end of one is the start of the other, so that the leftmost must win.

    Runs of one character (Llama's white space) are allowed: a run grows from its left, since the longest comes first.
    """
    by_start: dict[str, list[str]] = defaultdict(list)
    for piece in group:
        for i in range(1, len(piece)):
            by_start[piece[:i]].append(piece)
    for piece in group:
        for i in range(1, len(piece)):
            for other in by_start[piece[i:]]:
                if other != piece and len(set(piece + other)) > 1:
                    return piece, other
    return None


def _removed_symbol(symbols: Sequence[str], spacing: Spacing) -> str | None:
    """Find a user-defined symbol of white space that the normalizer would remove."""
    removed = [s for s in symbols if spacing.remove_extra_whitespaces and s.endswith(("▁", " "))]
    return f"the normalizer removes the symbol {removed[0]!r}" if removed else None
