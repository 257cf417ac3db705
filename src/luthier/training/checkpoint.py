"""Write and read checkpoints: everything that the rest of a run depends on, complete or absent.

    checkpoints/step-00000040/state.safetensors   A, B and the optimizer's moments of every adapter layer
    checkpoints/step-00000040/state.json          progress, identity, machine, SHA-256 of the tensors and of itself

The order of rows and the dropout masks follow from (seed, step), so no random generator state is needed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

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
from luthier.types import Log

if TYPE_CHECKING:
    from jaxtyping import Shaped

TENSORS, STATE = "state.safetensors", "state.json"
_PARTS = ("lora_A", "lora_B")
_STEP = re.compile("step-[0-9]+")  # not a user's copy, such as step-00000040-best


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was read and verified."""

    path: Path
    progress: Progress
    identity: dict[str, str]
    machine: dict[str, object]
    scaler: dict[str, object]
    tensors: dict[str, Shaped[Tensor, " ..."]]


def machine() -> dict[str, object]:
    """Return what a bit-identical continuation depends on: versions, CPU, threads, kernels, GPU."""
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
    tensors = _tensors(layers, optimizer)
    with files.new_dir(target, sum(t.nbytes for t in tensors.values())) as temp:
        write_safetensors(temp / TENSORS, tensors)
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
    """List checkpoint directories, oldest first."""
    return sorted(p for p in folder.glob("step-*") if _STEP.fullmatch(p.name) and p.is_dir()) if folder.is_dir() else []


def latest(folder: Path, log: Log = lambda _: None) -> Checkpoint | None:
    """Read the newest undamaged checkpoint; report and skip damaged ones.

    None if there is no undamaged checkpoint: the run then starts at its first step, with a message if any was damaged.
    """
    for path in reversed(steps(folder)):
        try:
            return read(path)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
            log(f"{path}: is damaged ({e}), so it is skipped")
    if steps(folder):
        log(f"{folder}: no usable checkpoint, so the run starts again at its first step")
    return None


def delete_half_written(folder: Path) -> None:
    """Delete what a killed training left; only for the process that holds the lock, since others may be writing."""
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def read(path: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises OSError, ValueError, KeyError, TypeError or SafetensorError if it differs from what was written.
    """
    state = dict(json.loads((path / STATE).read_text(encoding="utf-8")))
    if state.pop("seal") != _seal(state):
        raise ValueError(f"{STATE} has changed since it was written")
    if files.sha256(path / TENSORS) != state["sha256"]:
        raise ValueError(f"the SHA-256 of {TENSORS} differs from the recorded one")
    return Checkpoint(
        path=path,
        progress=Progress(**state["progress"]),
        identity=state["identity"],
        machine=state["machine"],
        scaler=state["scaler"],
        tensors=load_file(path / TENSORS),
    )


def _seal(state: Mapping[str, object]) -> str:
    """SHA-256 of everything else in ``state.json``; JSON preserves its numbers exactly."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def restore(checkpoint: Checkpoint, layers: Mapping[str, LoraLinear], optimizer: Optimizer) -> None:
    """Restore adapter and optimizer to their state after ``checkpoint.progress.step`` steps."""
    restore_adapter(checkpoint, layers)
    with torch.no_grad():
        for name, layer in layers.items():
            for part in _PARTS:
                parameter = getattr(layer, part)
                prefix = f"{name}.{part}."
                saved = {n.removeprefix(prefix): t for n, t in checkpoint.tensors.items() if n.startswith(prefix)}
                moments = {n: t.to(parameter.device) for n, t in saved.items()}
                optimizer.restore(parameter, checkpoint.progress.step, moments)
    optimizer.restore_scaler(checkpoint.scaler)


def restore_adapter(checkpoint: Checkpoint, layers: Mapping[str, LoraLinear]) -> None:
    """Restore the adapter only."""
    for name, layer in layers.items():
        layer.set_update(*(checkpoint.tensors[f"{name}.{part}"] for part in _PARTS))


def _tensors(layers: Mapping[str, LoraLinear], optimizer: Optimizer) -> dict[str, Shaped[Tensor, " ..."]]:
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for part in _PARTS:
            parameter = getattr(layer, part)
            tensors[f"{name}.{part}"] = parameter.detach().cpu().contiguous()
            for moment, value in optimizer.moments(parameter).items():
                tensors[f"{name}.{part}.{moment}"] = value.cpu().contiguous()
    return tensors
