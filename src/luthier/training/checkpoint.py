"""Checkpoints: everything that the rest of a run depends on, whole or absent.

    checkpoints/step-00000040/state.safetensors   A, B and the optimizer's moments of every adapter
    checkpoints/step-00000040/state.json          progress, identity, machine, the tensors' SHA-256, and its own

Order of rows and dropout follow from (seed, step), so no generator's state is needed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from luthier import __version__
from luthier._util import files
from luthier.devices.device import cpu_name
from luthier.kernels import native
from luthier.lora.layers import LoraLinear
from luthier.models.checkpoint_reader import write_safetensors
from luthier.training.metrics import Progress
from luthier.training.optimizer import Optimizer
from luthier.types import Say

TENSORS, STATE = "state.safetensors", "state.json"
_PARTS = ("lora_A", "lora_B")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One that was read and found whole."""

    path: Path
    progress: Progress
    identity: dict[str, str]
    machine: dict[str, object]
    scaler: dict[str, object]
    tensors: dict[str, Tensor]


def machine() -> dict[str, object]:
    """What must be the same for the bits to be the same."""
    return {
        "luthier": __version__,
        **{name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
        "cpu": cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "kernels": native.identity(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def write(
    folder: Path,
    layers: Mapping[str, LoraLinear],
    optimizer: Optimizer,
    progress: Progress,
    identity: Mapping[str, str],
    limit: int,
) -> Path:
    """Write the checkpoint of ``progress.step``, then delete all but the newest ``limit``."""
    target = folder / f"step-{progress.step:08d}"
    with files.new_dir(target) as temp:
        write_safetensors(temp / TENSORS, _tensors(layers, optimizer))
        state = {
            "progress": asdict(progress),
            "identity": dict(identity),
            "machine": machine(),
            "scaler": optimizer.scaler_state(),
            "sha256": files.sha256(temp / TENSORS),
        }
        files.write_json(temp / STATE, {**state, "seal": _seal(state)})
    for old in steps(folder)[:-limit]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def steps(folder: Path) -> list[Path]:
    """Checkpoint directories, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir()) if folder.is_dir() else []


def latest(folder: Path, say: Say = lambda _: None) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged ones are named and passed over. Half-written ones are deleted.

    None where there is no whole one: the run starts at its first step, which is said if there were damaged ones.
    """
    if folder.is_dir():
        for leftover in folder.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)
    for path in reversed(steps(folder)):
        try:
            return read(path)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
            say(f"{path}: is damaged ({e}), so it is passed over")
    if steps(folder):
        say(f"{folder}: no checkpoint is whole, so the run starts again at its first step")
    return None


def read(path: Path) -> Checkpoint:
    """Raises ValueError and the like where anything is not as it was written."""
    state = dict(json.loads((path / STATE).read_text(encoding="utf-8")))
    if state.pop("seal") != _seal(state):
        raise ValueError(f"{STATE} is not as it was written")
    if files.sha256(path / TENSORS) != state["sha256"]:
        raise ValueError("its SHA-256 is not the recorded one")
    return Checkpoint(
        path=path,
        progress=Progress(**state["progress"]),
        identity=state["identity"],
        machine=state["machine"],
        scaler=state["scaler"],
        tensors=load_file(path / TENSORS),
    )


def _seal(state: Mapping[str, object]) -> str:
    """SHA-256 of everything else in ``state.json``, whose numbers survive JSON to the last bit."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def restore(found: Checkpoint, layers: Mapping[str, LoraLinear], optimizer: Optimizer) -> None:
    """Put adapter and optimizer back as they were after ``found.progress.step`` steps."""
    restore_adapter(found, layers)
    with torch.no_grad():
        for name, layer in layers.items():
            for part in _PARTS:
                parameter = getattr(layer, part)
                prefix = f"{name}.{part}."
                moments = {n.removeprefix(prefix): t for n, t in found.tensors.items() if n.startswith(prefix)}
                optimizer.restore(
                    parameter, found.progress.step, {n: t.to(parameter.device) for n, t in moments.items()}
                )
    optimizer.restore_scaler(found.scaler)


def restore_adapter(found: Checkpoint, layers: Mapping[str, LoraLinear]) -> None:
    """Put the adapter alone back."""
    with torch.no_grad():
        for name, layer in layers.items():
            for part in _PARTS:
                getattr(layer, part).copy_(found.tensors[f"{name}.{part}"])


def _tensors(layers: Mapping[str, LoraLinear], optimizer: Optimizer) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for part in _PARTS:
            parameter = getattr(layer, part)
            found[f"{name}.{part}"] = parameter.detach().cpu().contiguous()
            for moment, value in optimizer.moments(parameter).items():
                found[f"{name}.{part}.{moment}"] = value.cpu().contiguous()
    return found
