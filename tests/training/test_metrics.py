"""Scores equal those of their libraries on the same texts; batched replies equal those generated one at a time."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import jieba
import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer

import luthier as library
from luthier import personas
from luthier._util.installation import install_command
from luthier.encoding.rows import read_held_out
from luthier.encoding.store import ExampleStore
from luthier.errors import ConfigError
from luthier.evaluation import text_metrics
from luthier.evaluation.scoring import score, with_fitting_prompts
from luthier.evaluation.text_metrics import TextMetrics, measure, script
from luthier.inference.generation import Generator
from luthier.inference.sampling import Sampling
from luthier.kernels import native
from luthier.types import Conversation, Message, RowRef
from tests.conftest import ARCHITECTURES, Result
from tests.conftest import teahouse as config
from tests.laws.test_compiled import COMPILED

Run = Callable[..., Result]
ENGLISH = (
    ["The lamp is lit at dusk, sir.", "I do not know.", "Gannet Rock here; the wind is north-west at 20."],
    ["The lamp is lit at dusk.", "I am Marlow, the keeper.", "Gannet Rock here. The wind is north-west, at 20 knots."],
)
CHINESE = (
    ["我是陆掌柜，在水乡开茶馆。", "今天的龙井很新鲜，您要不要尝一尝？", "不知道"],
    ["我是陆掌柜，镇上开茶馆的。", "今天新到的龙井，您尝一尝？", "客官慢走，下次再来喝茶。"],
)


def words(text: str) -> list[str]:
    return [w for w in jieba.lcut(text) if w.strip()]


class ChineseWords:
    def tokenize(self, text: str) -> list[str]:
        return [w for w in words(text.lower()) if any(c.isalnum() for c in w)]


def test_english_scores_equal_the_libraries_own() -> None:
    replies, references = ENGLISH
    scores = measure(replies, references)
    assert scores.bleu == pytest.approx(sacrebleu.corpus_bleu(replies, [references]).score, abs=1e-9)
    assert scores.chrf == pytest.approx(sacrebleu.corpus_chrf(replies, [references]).score, abs=1e-9)
    rouge = RougeScorer(["rougeL"])
    expected = fmean(rouge.score(ref, reply)["rougeL"].fmeasure for reply, ref in zip(*ENGLISH, strict=True))
    assert scores.rouge_l == pytest.approx(expected, abs=1e-12)
    assert scores.length_ratio == pytest.approx(len("".join(replies)) / len("".join(references)))
    assert 5 < (scores.bleu or 0) < 95
    assert 0.2 < (scores.rouge_l or 0) < 0.95


def test_chinese_scores_are_computed_on_jiebas_words() -> None:
    replies, references = CHINESE
    scores = measure(replies, references)
    cut = [" ".join(words(x)) for x in replies], [[" ".join(words(x)) for x in references]]
    assert scores.bleu == pytest.approx(sacrebleu.corpus_bleu(*cut, tokenize="none", force=True).score, abs=1e-9)
    assert scores.chrf == pytest.approx(sacrebleu.corpus_chrf(replies, [references]).score, abs=1e-9)
    rouge = RougeScorer(["rougeL"], tokenizer=ChineseWords())
    expected = fmean(rouge.score(ref, reply)["rougeL"].fmeasure for reply, ref in zip(*CHINESE, strict=True))
    assert scores.rouge_l == pytest.approx(expected, abs=1e-12)
    assert (scores.rouge_l or 0) > 0.3
    assert RougeScorer(["rougeL"]).score(references[0], replies[0])["rougeL"].fmeasure == 0  # without segmentation


def test_rows_of_two_languages_are_each_segmented_in_their_own_way() -> None:
    replies, references = ENGLISH[0] + CHINESE[0], ENGLISH[1] + CHINESE[1]
    both = measure(replies, references)
    parts = [measure(*ENGLISH), measure(*CHINESE)]
    assert both.rouge_l == pytest.approx(fmean(p.rouge_l or 0 for p in parts))  # equally many rows of each
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    cut = [
        [Tokenizer13a()(x) for x in side[:3]] + [" ".join(words(x)) for x in side[3:]] for side in (replies, references)
    ]
    expected = sacrebleu.corpus_bleu(cut[0], [cut[1]], tokenize="none", force=True).score
    assert both.bleu == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("The keeper of the light", "spaced"),
        ("说“好”的人", "chinese"),
        ("用 LoRA 微调 transformers 模型", "chinese"),
        ("The word 你好 means hello", "spaced"),
        ("これは本です", "spaceless"),
        ("สวัสดีครับ", "spaceless"),
        ("Привет, мир", "spaced"),
        ("𠮷", "chinese"),
        ("42", "spaced"),
    ],
)
def test_the_script_of_the_reference_decides_how_it_is_segmented(text: str, kind: str) -> None:
    assert script(text) == kind


@pytest.mark.parametrize(
    "text", ["Привет, мир! Как дела?", "Der Bär läuft über die Brücke.", "これは本です。", "你好，世界。"]
)
def test_identical_texts_get_the_full_score_in_any_script(text: str) -> None:
    scores = measure([f" {text}\n"], [text])
    assert scores.length_ratio == scores.rouge_l == 1
    assert scores.chrf == pytest.approx(100)
    other = measure(["@ @"], [text])
    assert other.rouge_l == other.bleu == 0


def test_no_replies_and_empty_replies() -> None:
    assert measure([], []) == TextMetrics(None, None, None, None)
    assert measure(["", ""], ["a b c d", "你好"]) == TextMetrics(0, 0, 0, 0)


def test_the_dictionary_is_read_from_no_shared_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "jieba.cache").write_bytes(b"planted")
    text_metrics._segmenter.cache_clear()
    assert text_metrics._segmenter()("我在茶馆喝茶") == ["我", "在", "茶馆", "喝茶"]
    assert [p.name for p in tmp_path.iterdir()] == ["jieba.cache"]
    assert (tmp_path / "jieba.cache").read_bytes() == b"planted"


# ---- the command


@pytest.fixture(scope="module")
def model(model_dir: Callable[[str], Path]) -> Path:
    return model_dir("llama")


def test_eval_reports_the_scores_of_its_samples(teahouse_run: Path, luthier: Run) -> None:
    done = luthier("eval", teahouse_run, "--json", "--samples", 5, "--max-new-tokens", 40)
    assert done.code == 0 and all("truncated" in line for line in done.err.splitlines()), done.err
    report = json.loads(done.out)
    samples = report["samples"]
    assert len(samples) == report["base"]["replies"] == report["tuned"]["replies"] == 5
    references = [s["reference"] for s in samples]
    for side in ("base", "tuned"):
        expected = measure([s[side] for s in samples], references).as_dict()
        assert expected.keys() == {"length_ratio", "bleu", "chrf", "rouge_l"}
        assert {k: report[side][k] for k in expected} == expected
        assert None not in expected.values()
    assert report["tuned"]["chrf"] > report["base"]["chrf"]
    table = luthier("eval", teahouse_run, "--samples", 5, "--max-new-tokens", 40).out
    assert "5 answered" in table
    for name, key, form in (("BLEU", "bleu", ".2f"), ("chrF", "chrf", ".2f"), ("ROUGE-L", "rouge_l", ".4f")):
        line = next(x for x in table.splitlines() if name in x)
        for side in ("base", "tuned"):
            assert format(report[side][key], form) in line


def test_without_samples_the_losses_are_still_reported(teahouse_run: Path, luthier: Run) -> None:
    report = json.loads(luthier("eval", teahouse_run, "--json", "--samples", 0).out)
    assert report["samples"] == []
    assert report["tuned"]["stop_rate"] is report["tuned"]["bleu"] is None
    assert report["tuned"]["loss"] < report["base"]["loss"]
    table = luthier("eval", teahouse_run, "--samples", 0).out
    assert "perplexity" in table
    assert "BLEU" not in table
    assert "end by themselves" not in table


def test_a_finished_run_has_scores_and_its_report_shows_them(teahouse_run: Path) -> None:
    stored = json.loads((teahouse_run / "evaluation.json").read_text(encoding="utf-8"))
    page = (teahouse_run / "report.html").read_text(encoding="utf-8")
    for side in ("base", "tuned"):
        count = stored[side]["replies"]
        assert count > 0
        replies = [s[side] for s in stored["samples"]][:count]
        expected = measure(replies, [s["reference"] for s in stored["samples"]][:count]).as_dict()
        assert {k: stored[side][k] for k in expected} == pytest.approx(expected)
    for key, name, form in (("bleu", "BLEU", ".1f"), ("chrf", "chrF", ".1f"), ("rouge_l", "ROUGE-L", ".3f")):
        shown = [format(stored[side][key], form) for side in ("base", "tuned")]
        assert f"<b>{shown[0]} &rarr; {shown[1]}</b>{name}, base to tuned" in page


@pytest.mark.parametrize("package", ["sacrebleu", "rouge_score", "jieba"])
def test_a_missing_package_is_reported_and_the_other_scores_remain(
    package: str, teahouse_run: Path, luthier: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    done = luthier("eval", teahouse_run, "--json", "--samples", 2, "--max-new-tokens", 8)
    tuned = json.loads(done.out)["tuned"]
    assert tuned["bleu"] is tuned["chrf"] is tuned["rouge_l"] is None
    assert tuned["perplexity"] > 1
    assert tuned["length_ratio"] > 0
    assert 0 <= tuned["stop_rate"] <= 1
    assert f"need {package.replace('_', '-')}: {install_command('eval')}" in done.err
    assert "BLEU" not in luthier("eval", teahouse_run, "--samples", 2, "--max-new-tokens", 8).out


def test_a_finished_run_names_the_package_to_install(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    messages: list[str] = []
    library.train(config(model, tmp_path / "run", {"eval_fraction": 0.1}, max_steps=2), log=messages.append)
    assert any(f"need sacrebleu: {install_command('eval')}" in s for s in messages)
    assert "BLEU" not in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_base_model_is_refused_before_it_is_loaded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.evaluation.dtype.open_base", None)
    with pytest.raises(ConfigError, match="there is no adapter to compare with its base"):
        library.eval(model, [personas.HELD_OUT])


def test_a_prompt_longer_than_the_context_is_skipped(model: Path, tmp_path: Path) -> None:
    """Training truncates it; the evaluation at the end of the run must not fail."""
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": r, "content": "word " * 80} for r in ("user", "assistant")] * 20
    long = {"messages": [*turns, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    short = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}
    rows.write_text("\n".join(map(json.dumps, [long, short])))
    settings, examples = config(model, tmp_path, {"train": rows}).data, ExampleStore()
    report = read_held_out([rows], settings, library.chat(model).generator.chat_format.encoder(settings), examples)
    assert len(report.conversations) == len(examples) == 2
    generator = library.chat(model).generator
    assert with_fitting_prompts(generator, report.conversations, 24) == list(report.conversations[1:])
    scores = score(generator, examples, report.conversations, max_new_tokens=4)
    assert scores.complete
    assert len(scores.replies) == 1
    assert scores.text == measure([scores.replies[0].text], ["hi"])
    library.train(config(model, tmp_path / "run", {"train": rows, "eval": rows}, max_steps=1))
    stored = json.loads((tmp_path / "run" / "evaluation.json").read_text(encoding="utf-8"))
    assert [s["reference"] for s in stored["samples"]] in (["hi"], [])
    library.train(config(model, tmp_path / "other", {"train": rows}, max_steps=1))
    assert (tmp_path / "other" / "summary.json").is_file()


# ---- batched generation


class Recorded(Generator):
    """A generator that records the token ids of every reply and the size of every batch of transformers' generate."""

    def __init__(self, generator: Generator, compiled: bool = False) -> None:
        super().__init__(generator.model, generator.chat_format, compiled)
        self.ids: list[list[int]] = []
        self.batches: list[int] = []

    def _by_transformers(self, prompts: list[list[int]], s: Sampling, streamer: Any) -> Any:
        self.batches.append(len(prompts))
        return super()._by_transformers(prompts, s, streamer)

    def _reply(self, ids: list[int], prompt_tokens: int, seconds: float) -> Any:
        end = next((i for i, t in enumerate(ids) if t in self.stop_ids), len(ids) - 1)
        self.ids.append(ids[: end + 1])
        return super()._reply(ids, prompt_tokens, seconds)


def prompts_of(lengths: Sequence[int]) -> list[list[Message]]:
    return [[Message("user", "".join(chr(97 + (i * 7 + j) % 26) for j in range(n)))] for i, n in enumerate(lengths)]


def by_ids(generator: Recorded, prompts: Sequence[Sequence[Message]], sampling: Sampling) -> list[list[int]]:
    """Decode greedily without a cache, one forward pass per token, as the definition; return the ids per reply."""
    replies = []
    for prompt in prompts:
        ids = generator.chat_format.prompt_ids(prompt)
        start = len(ids)
        room = min(sampling.max_new_tokens, generator.model.config.max_position_embeddings - start)
        while len(ids) - start < room:
            with torch.no_grad():
                logits = generator.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(int(logits.argmax()))
            if ids[-1] in generator.stop_ids:
                break
        replies.append(ids[start:])
    return replies


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_batched_replies_equal_single_ones_token_for_token(
    arch: str, model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.inference.generation._BATCH_TOKENS", 220)
    prompts = prompts_of([3, 40, 1, 17, 17, 90, 2])
    sampling = Sampling(max_new_tokens=16)
    together = Recorded(library.chat(model_dir(arch)).generator)
    replies = together.replies(prompts, sampling)
    assert len(together.batches) > 2
    assert max(together.batches) > 1
    alone = Recorded(together)
    single = [alone.reply(p, sampling) for p in prompts]
    assert [replace(r, seconds=0.0) for r in replies] == [replace(r, seconds=0.0) for r in single]
    assert sorted(together.ids) == sorted(alone.ids)
    assert alone.ids == by_ids(alone, prompts, sampling)
    compiled = Recorded(together, compiled=True)
    assert [replace(r, seconds=0.0) for r in compiled.replies(prompts, sampling)] == [
        replace(r, seconds=0.0) for r in single
    ]
    assert sorted(compiled.ids) == sorted(alone.ids)
    assert bool(compiled.batches) == (arch not in COMPILED or native.why_unavailable(torch.float32) is not None)


def test_a_long_prompt_does_not_shorten_its_neighbours(model: Path) -> None:
    """The context is 1024 tokens: a prompt that leaves room for a few does not reduce the limit of the others."""
    generator = library.chat(model).generator
    size = next(n for n in range(900, 4000) if not generator.fits(prompts_of([n])[0]))
    prompts = prompts_of([5, size - 9, 9, size - 5])
    replies = generator.replies(prompts, Sampling(max_new_tokens=40))
    single = [generator.reply(p, Sampling(max_new_tokens=40)) for p in prompts]
    assert [(r.text, r.reply_tokens) for r in replies] == [(r.text, r.reply_tokens) for r in single]
    assert max(r.reply_tokens for r in replies[::2]) > max(r.reply_tokens for r in replies[1::2])


def test_a_batch_does_not_exceed_its_token_limit(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Recorded(library.chat(model).generator)
    lengths = [30, 10, 20, 500, 10]
    batches = list(generator._batches(lengths, Sampling(max_new_tokens=100)))
    assert batches == [[3, 0, 2, 1, 4]]
    monkeypatch.setattr("luthier.inference.generation._BATCH_TOKENS", 270)
    batches = list(generator._batches(lengths, Sampling(max_new_tokens=100)))
    assert batches == [[3], [0, 2], [1, 4]]  # 600 tokens exceed the limit, so a batch of one; 2 x 130; 2 x 110
    penalty = list(generator._batches(lengths, Sampling(max_new_tokens=100, repetition_penalty=1.2)))
    assert penalty == [[3], [0], [2], [1], [4]]
    assert generator.replies([], Sampling()) == []


def test_the_time_of_a_batch_is_divided_among_its_replies(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.inference.generation._BATCH_TOKENS", 1)
    generator = library.chat(model).generator
    replies = generator.replies(prompts_of([5] * 6), Sampling(max_new_tokens=400, max_seconds=0.0))
    assert [r.reply_tokens for r in replies] == [1] * 6


def test_replies_are_in_the_order_of_the_rows(model: Path) -> None:
    generator = library.chat(model).generator
    prompts = prompts_of([50, 2, 20])
    expected = [len(generator.chat_format.prompt_ids(p)) for p in prompts]
    assert [r.prompt_tokens for r in generator.replies(prompts, Sampling(max_new_tokens=2))] == expected
    rows = [Conversation((*p, Message("assistant", "x")), RowRef("a", i)) for i, p in enumerate(prompts, 1)]
    assert with_fitting_prompts(generator, rows, 2) == rows[:2]
