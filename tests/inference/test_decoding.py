"""Pages of keys and values under a byte limit, prefixes that sequences share, and cancellation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from luthier.compiled import Unsuitable
from luthier.compiled.decoder import CompiledDecoder
from luthier.compiled.pages import OutOfPages, Pages, PrefixPages, Row
from luthier.errors import ModelError
from luthier.inference import decoding as module
from luthier.inference.decoding import (
    Cancelled,
    CompiledDecoding,
    OutOfMemory,
    Reading,
    decode,
    default_memory,
    not_compiled,
    verified_decoding,
)
from luthier.inference.sampling import Sampler, Sampling
from luthier.lora.layers import LoraLinear, detach
from luthier.serving.adapters import install
from luthier.serving.engine import Engine
from luthier.serving.requests import Request
from tests.conftest import make_model
from tests.helpers.serving import generate
from tests.laws.test_compiled import needs_compiler
from tests.serving.test_serve_engine import adapted, ask, prompt, reference

pytestmark = needs_compiler


def rows_of(pages: Pages, *lengths: int) -> list[Row]:
    rows = [Row() for _ in lengths]
    for row, length in zip(rows, lengths, strict=True):
        pages.reserve([(row, length)])
        row.length = length
    return rows


def test_pages_are_taken_as_a_row_grows_and_are_free_again() -> None:
    pages = Pages(page_bytes=64, size=32, limit=64 * 5)
    assert pages.count == pages.free == 5
    one, two = rows_of(pages, 33, 32)
    assert (len(one.pages), len(two.pages), pages.free) == (2, 1, 2)
    with pytest.raises(OutOfPages):
        pages.reserve([(one, 31), (two, 65)])  # none for the first, three for the second
    assert pages.free == 2
    assert pages.table([one, two]).tolist() == [one.pages, [*two.pages, -1]]
    pages.truncate(one, 32)
    assert (len(one.pages), one.length, pages.free) == (1, 32, 3)
    pages.release(one)
    pages.release(two)
    assert pages.free == 5


def test_a_fork_shares_whole_pages_and_copies_the_last() -> None:
    pages = Pages(page_bytes=64, size=32, limit=64 * 5)
    (row,) = rows_of(pages, 70)
    pages._page(row.pages[1])[:] = 7
    fork = pages.fork(row, 40)
    assert fork.pages[0] == row.pages[0] and fork.pages[1] != row.pages[1]
    assert (pages._page(fork.pages[1]) == 7).all() and pages.free == 1
    pages.release(row)
    assert pages.free == 3  # the shared page is still held
    pages.release(fork)
    assert pages.free == 5


def test_prefixes_stay_within_their_limit_and_give_way_to_rows() -> None:
    pages = Pages(page_bytes=64, size=32, limit=64 * 4)
    prefixes = PrefixPages(pages, 64 * 2)
    ids = list(range(100))
    prefixes.add("a", ids[:64], *rows_of(pages, 64))
    prefixes.add("a", ids[:40], *rows_of(pages, 40))  # is contained
    assert len(prefixes) == 1 and prefixes.bytes == 128
    assert prefixes.fork("b", ids).length == 0
    fork = prefixes.fork("a", [*ids[:50], 7])
    assert fork.length == 50 and pages.free == 1
    prefixes.add("a", ids[:96], *rows_of(pages, 32))  # the entry of 64 tokens is contained in it
    pages.release(fork)
    assert prefixes.bytes <= 128
    while prefixes.drop_oldest():
        pass
    assert pages.free == 4
    prefixes.add("a", ids, *rows_of(pages, 100))  # longer than the limit: its start is kept
    assert prefixes.bytes == 128 and pages.free == 2 and prefixes.fork("a", ids).length == 64


def test_a_fork_without_a_free_page_shares_whole_pages_only() -> None:
    pages = Pages(page_bytes=64, size=32, limit=64 * 2)
    prefixes = PrefixPages(pages, 64 * 2)
    prefixes.add("a", list(range(60)), *rows_of(pages, 60))
    assert prefixes.fork("a", [*range(50), 99]).length == 32


def within(pages: int, **options: Any) -> CompiledDecoding:
    """Open a tiny model whose keys and values must fit into this many pages."""
    model = make_model("llama")
    page_bytes = CompiledDecoding(model, memory=0).decoder.page_bytes
    return CompiledDecoding(model, memory=pages * page_bytes, **options)


def test_decoding_works_inside_and_outside_inference_mode() -> None:
    with torch.inference_mode():
        decoding = verified_decoding(make_model("llama"), memory=1 << 20)
    first = Reading(prompt(41))
    decoding.join(first)  # a page that is filled partly is copied
    with torch.inference_mode():
        decoding.join(Reading([*prompt(41), 9]))
    first.ids.append(9)
    assert decoding.step().shape == (2, 640)


def test_a_sequence_waits_until_its_longest_reply_fits() -> None:
    decoding = within(pages=4)
    first, second = Reading(prompt(40), most=64), Reading(prompt(41), most=96)
    assert decoding.capacity == 128 and decoding.admits(first)
    decoding.join(first)
    assert not decoding.admits(second) and decoding.admits(Reading(prompt(3), most=64))
    decoding.leave(first)
    assert decoding.admits(second)
    decoding.join(second)  # drops what is kept of the first one
    decoding.leave(second)


def test_replies_do_not_depend_on_the_memory_limit() -> None:
    expected = [reference(make_model("llama"), prompt(n), 30, do_sample=False) for n in (41, 17, 60, 29)]
    page = CompiledDecoding(make_model("llama"), memory=0).decoder.page_bytes
    engine = Engine(make_model("llama"), memory=4 * page)
    assert generate(engine, [ask(prompt(n)) for n in (41, 17, 60, 29)]) == expected
    assert engine.counts.steps > 2 * 29  # they did not fit together


def test_a_prompt_that_can_never_fit_is_refused_at_once() -> None:
    page = CompiledDecoding(make_model("llama"), memory=0).decoder.page_bytes
    engine, ends = Engine(make_model("llama"), memory=2 * page), list[Any]()
    generate(engine, [Request(prompt(64), [], Sampling(max_new_tokens=4), on_end=ends.append)])
    assert isinstance(ends[0], OutOfMemory) and "holds 64" in ends[0].message and "--memory" in ends[0].fix
    with pytest.raises(OutOfMemory, match="the memory for keys and values holds 64 tokens"):
        within(pages=2).join(Reading(prompt(65)))


def test_a_cancelled_prompt_stops_between_two_parts_and_frees_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 16)
    decoding, asked = within(pages=8), list[int]()

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) == 3

    with pytest.raises(Cancelled):
        decoding.join(Reading(prompt(100), cancelled=cancelled))
    assert len(asked) == 3 and decoding.rows == [] and decoding._pages.free == 8
    assert decoding.join(Reading(prompt(100))).shape == (1, 640)


def test_a_request_that_is_cancelled_while_its_prompt_is_read_does_not_disturb_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 16)
    engine, other, request = Engine(make_model("llama")), ask(prompt(17)), ask(prompt(60))
    request.on_end = pytest.fail
    logits, read = CompiledDecoding._logits, list[int]()

    def cancel_after_the_first_part(self: CompiledDecoding, new: Any) -> torch.Tensor:
        read.append(len(new[0].ids))
        request.cancel()
        return logits(self, new)

    monkeypatch.setattr(CompiledDecoding, "_logits", cancel_after_the_first_part)
    engine.submit(request)
    engine.step()
    assert read == [16] and engine.decoding.rows == []
    assert generate(engine, [other]) == [reference(make_model("llama"), prompt(17), 30, do_sample=False)]


def test_the_engine_verifies_the_compiled_layers_with_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    def engine() -> Engine:
        model = make_model("llama")
        layers = adapted(model, 1)
        detach(model, layers)
        return Engine(model, install(model, [("one", layers)], model.dtype))

    assert engine().why_not == ""
    update = CompiledDecoder._update

    def doubled(self: CompiledDecoder, layer: LoraLinear) -> Any:
        wrong = update(self, layer)
        self._tensors[-1].mul_(2)
        return wrong

    monkeypatch.setattr(CompiledDecoder, "_update", doubled)
    assert "their logits differ from those of transformers' layers" in engine().why_not


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_after_an_error(fault: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    decoding = within(pages=8, prefix_bytes=0)
    readings = [Reading(prompt(n), most=n + 20) for n in (5, 9)]
    samplers = [Sampler(Sampling(), torch.device("cpu")) for _ in readings]

    def stop(_: int) -> None:
        if sum(len(r.ids) for r in readings) > 20:
            raise fault

    with pytest.raises(fault):
        decode(decoding, readings, samplers, [], on_token=stop)
    assert decoding.rows == [] and decoding._pages.free == 8


def test_settings_that_make_one_reply_fail_do_not_affect_others() -> None:
    ends: list[Any] = []
    broken = Request(prompt(9), [], Sampling(max_new_tokens=8, temperature=1e-40), on_end=ends.append)
    other = ask(prompt(17))
    engine = Engine(make_model("llama"))
    engine.submit(broken)
    assert generate(engine, [other]) == [reference(make_model("llama"), prompt(17), 30, do_sample=False)]
    assert len(ends) == 1 and isinstance(ends[0], Exception)


def test_nan_in_the_output_is_an_error() -> None:
    model = make_model("llama")
    decoding = CompiledDecoding(model, memory=1 << 20)
    with torch.no_grad():
        decoding.decoder._tensors[-1][:] = float("nan")
    with pytest.raises(ModelError, match="the model's output contains NaN"):
        decode(decoding, [Reading(prompt(3))], [Sampler(Sampling(), torch.device("cpu"))], [])


def test_the_default_limit_holds_at_least_one_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    decoder = CompiledDecoding(model, memory=0).decoder
    monkeypatch.setattr(module, "available_memory", lambda: 1e12)
    assert default_memory(model.config, decoder.token_bytes) == 16 * 1024 * decoder.token_bytes
    monkeypatch.setattr(module, "available_memory", lambda: 0.0)
    assert default_memory(model.config, decoder.token_bytes) == 1024 * decoder.token_bytes


@pytest.mark.parametrize("change", ["width", "dtype", "head"])
def test_a_model_of_unexpected_sizes_is_refused(change: str) -> None:
    model = make_model("llama")
    block = model.model.layers[1]
    if change == "width":
        block.mlp.gate_proj = torch.nn.Linear(64, 80, bias=False)
    elif change == "dtype":
        block.self_attn.k_proj.weight.data = block.self_attn.k_proj.weight.data.bfloat16()
    else:
        model.lm_head = torch.nn.Linear(64, 640, bias=False, dtype=torch.float16)
    with pytest.raises(Unsuitable):
        CompiledDecoding(model)


def test_an_adapter_that_does_not_exist_is_refused_before_anything_is_read() -> None:
    decoding = verified_decoding(make_model("llama"), memory=1 << 20)
    with pytest.raises(KeyError):
        decoding.join(Reading(prompt(3), adapter="unknown"))
    assert decoding.rows == []


def test_the_note_names_the_reason() -> None:
    assert not_compiled(make_model("llama"), "why") == (
        "note: luthier's compiled layers are not used (why); replies are slower without them"
    )
