"""Compare replies with references: length ratio, BLEU and chrF (sacrebleu), ROUGE-L (rouge-score).

Texts are split into words by each metric's own tokeniser, with two exceptions that depend on the script of the
reference: Chinese is split into words by jieba, and other scripts without spaces are split into characters. The
scores of data in one language therefore equal those of the library with that tokeniser; in mixed data each row is split
according to its own script.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from luthier._util.installation import install_command

_PACKAGES = {"sacrebleu": "sacrebleu", "rouge_score": "rouge-score", "jieba": "jieba"}
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
_SPACELESS = re.compile(r"[\u0e00-\u0eff\u0f00-\u109f\u1780-\u17ff\u3040-\u30ff]")  # Thai to Burmese, Khmer, kana
_WORD = re.compile(r"[^\W_]+")

Words = Callable[[str], list[str]]


@dataclass(frozen=True, slots=True)
class TextMetrics:
    """Scores of replies compared with references.

    None: there are no replies, or (all but length_ratio) the packages are not installed.

    length_ratio: characters of all replies divided by characters of all references.
    bleu, chrf:   corpus scores, 0 to 100.
    rouge_l:      mean F1 over the rows, 0 to 1.
    """

    length_ratio: float | None = None
    bleu: float | None = None
    chrf: float | None = None
    rouge_l: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)


def measure(replies: Sequence[str], references: Sequence[str]) -> TextMetrics:
    """Compare each reply with the reference at the same index. Surrounding white space is ignored."""
    if not replies:
        return TextMetrics()
    pairs = [(reply.strip(), ref.strip()) for reply, ref in zip(replies, references, strict=True)]
    ratio = sum(len(reply) for reply, _ in pairs) / max(1, sum(len(ref) for _, ref in pairs))
    if missing():
        return TextMetrics(ratio)
    return TextMetrics(ratio, _bleu(pairs), _chrf(pairs), _rouge_l(pairs))


def missing() -> list[str]:
    """Return the packages of the extra ``eval`` that are not installed."""
    return [name for module, name in _PACKAGES.items() if importlib.util.find_spec(module) is None]


def note() -> str | None:
    """Return a message that names missing packages and how to install them, or None."""
    packages = missing()
    return f"BLEU, chrF and ROUGE-L need {', '.join(packages)}: {install_command('eval')}" if packages else None


def script(text: str) -> str:
    """Classify a text as "chinese", "spaceless" (other scripts without spaces between words) or "spaced".

    Chinese means more Han characters than words of other scripts, so that a Latin name in a sentence changes nothing.
    """
    if _SPACELESS.search(text):
        return "spaceless"
    han = len(_HAN.findall(text))
    return "chinese" if han > len(_WORD.findall(_HAN.sub(" ", text))) else "spaced"


def _bleu(pairs: Sequence[tuple[str, str]]) -> float:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    standard = Tokenizer13a()
    split: dict[str, Words] = {
        "chinese": _jieba,
        "spaceless": _characters,
        "spaced": lambda text: standard(text).split(),
    }
    words = [[" ".join(split[script(ref)](text)) for text in (reply, ref)] for reply, ref in pairs]
    bleu = BLEU(tokenize="none", force=True)  # the texts are already tokenised
    return float(bleu.corpus_score([w[0] for w in words], [[w[1] for w in words]]).score)


def _chrf(pairs: Sequence[tuple[str, str]]) -> float:
    from sacrebleu.metrics.chrf import CHRF

    return float(CHRF().corpus_score([reply for reply, _ in pairs], [[ref for _, ref in pairs]]).score)


def _rouge_l(pairs: Sequence[tuple[str, str]]) -> float:
    """Mean ROUGE-L F1.

    ASCII text is split like rouge-score's own tokeniser does. That keeps only a to z and digits, so letters of other
    scripts are added here.
    """
    from rouge_score.rouge_scorer import RougeScorer

    split: dict[str, Words] = {"chinese": _jieba, "spaceless": _characters, "spaced": _letters}
    scorers = {kind: RougeScorer(["rougeL"], tokenizer=_Tokens(words)) for kind, words in split.items()}
    return fmean(float(scorers[script(ref)].score(ref, reply)["rougeL"].fmeasure) for reply, ref in pairs)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A tokeniser in the form that rouge-score expects: lower case, without punctuation."""

    words: Words

    def tokenize(self, text: str) -> list[str]:
        return [w for w in self.words(text.lower()) if _WORD.search(w)]


def _letters(text: str) -> list[str]:
    return _WORD.findall(text)


def _characters(text: str) -> list[str]:
    return [c for c in text if not c.isspace()]


def _jieba(text: str) -> list[str]:
    return [w for w in _segmenter()(text) if w.strip()]


@functools.cache
def _segmenter() -> Words:
    """Return jieba's word segmentation, built from its own dictionary and not from the cache shared by all users."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jieba imports a deprecated part of setuptools
        import jieba
    tokenizer = jieba.Tokenizer()
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True  # its own initialize() would also read and write the shared cache
    segment: Words = tokenizer.lcut
    return segment
