"""How close replies are to references: length ratio, BLEU and chrF by sacrebleu, ROUGE-L by rouge-score.

Words are what each measure's own tokeniser makes of a text, with two exceptions, told from the reference's script:
Chinese is cut into words by jieba, and other scripts that write no spaces into characters. Figures of one language
alone are so those of the library itself; in mixed data every row is cut in its own way.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

_PACKAGES = {"sacrebleu": "sacrebleu", "rouge_score": "rouge-score", "jieba": "jieba"}
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
_SPACELESS = re.compile(r"[\u0e00-\u0eff\u0f00-\u109f\u1780-\u17ff\u3040-\u30ff]")  # Thai to Burmese, Khmer, kana
_WORD = re.compile(r"[^\W_]+")

Words = Callable[[str], list[str]]


@dataclass(frozen=True, slots=True)
class TextMetrics:
    """Replies against references. None: nothing to measure, or (all but the first) the packages are not installed.

    length_ratio: characters of all replies over those of all references.
    bleu, chrf:   of the corpus, 0 to 100. rouge_l: mean F1 over the rows, 0 to 1.
    """

    length_ratio: float | None = None
    bleu: float | None = None
    chrf: float | None = None
    rouge_l: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)


def measure(replies: Sequence[str], references: Sequence[str]) -> TextMetrics:
    """Every reply against the reference at its place; white space around either does not count."""
    if not replies:
        return TextMetrics()
    pairs = [(reply.strip(), ref.strip()) for reply, ref in zip(replies, references, strict=True)]
    ratio = sum(len(reply) for reply, _ in pairs) / max(1, sum(len(ref) for _, ref in pairs))
    if missing():
        return TextMetrics(ratio)
    return TextMetrics(ratio, _bleu(pairs), _chrf(pairs), _rouge_l(pairs))


def missing() -> list[str]:
    """Packages of the extra ``eval`` that are not installed."""
    return [name for module, name in _PACKAGES.items() if importlib.util.find_spec(module) is None]


def note() -> str | None:
    """What to install, where something is missing."""
    lack = missing()
    return f"BLEU, chrF and ROUGE-L need {', '.join(lack)}: pip install 'luthier[eval]'" if lack else None


def script(text: str) -> str:
    """ "chinese", "spaceless" (other scripts without spaces between words) or "spaced".

    Chinese: more Han characters than words of other scripts, so that a model's name in a sentence changes nothing.
    """
    if _SPACELESS.search(text):
        return "spaceless"
    han = len(_HAN.findall(text))
    return "chinese" if han > len(_WORD.findall(_HAN.sub(" ", text))) else "spaced"


def _bleu(pairs: Sequence[tuple[str, str]]) -> float:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    standard = Tokenizer13a()
    cut: dict[str, Words] = {"chinese": _jieba, "spaceless": _characters, "spaced": lambda text: standard(text).split()}
    words = [[" ".join(cut[script(ref)](text)) for text in (reply, ref)] for reply, ref in pairs]
    bleu = BLEU(tokenize="none", force=True)  # they are words already
    return float(bleu.corpus_score([w[0] for w in words], [[w[1] for w in words]]).score)


def _chrf(pairs: Sequence[tuple[str, str]]) -> float:
    from sacrebleu.metrics.chrf import CHRF

    return float(CHRF().corpus_score([reply for reply, _ in pairs], [[ref for _, ref in pairs]]).score)


def _rouge_l(pairs: Sequence[tuple[str, str]]) -> float:
    """On ASCII text rouge-score's own words; beyond it letters of any script too, where its own keeps a to z alone."""
    from rouge_score.rouge_scorer import RougeScorer

    cut: dict[str, Words] = {"chinese": _jieba, "spaceless": _characters, "spaced": _letters}
    scorers = {kind: RougeScorer(["rougeL"], tokenizer=_Tokens(words)) for kind, words in cut.items()}
    return fmean(float(scorers[script(ref)].score(ref, reply)["rougeL"].fmeasure) for reply, ref in pairs)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A tokeniser as rouge-score takes one: lower case, punctuation left out."""

    words: Words

    def tokenize(self, text: str) -> list[str]:
        return [w for w in self.words(text.lower()) if _WORD.search(w)]


def _letters(text: str) -> list[str]:
    return _WORD.findall(text)


def _characters(text: str) -> list[str]:
    return [c for c in text if not c.isspace()]


def _jieba(text: str) -> list[str]:
    return [w for w in _segmenter().lcut(text) if w.strip()]


@functools.cache
def _segmenter() -> Any:
    """jieba with its own dictionary, never with the cache it would share with others in the system's folder."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # what it imports from setuptools warns of its own end
        import jieba

        jieba.setLogLevel(logging.WARNING)
        made = jieba.Tokenizer()
        made.tmp_dir = folder
        made.initialize()
    return made
