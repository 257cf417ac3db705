"""Download from Hugging Face, with the session, tokens, endpoint and errors of ``huggingface_hub``.

``hf_hub_download`` discards a partial file when its process ends. Files are therefore streamed to a partial file of our
own, which the next process resumes. This also bypasses the Xet protocol, which cannot resume a file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import luthier
from luthier.errors import ModelError
from luthier.hub.catalogue import PART, RemoteFile, Source, UnreachableError

_TIMEOUT = 20  # seconds without an answer or a byte
_TRUE = {"1", "ON", "YES", "TRUE"}


def offline() -> bool:
    """Whether the environment forbids the client to use the network."""
    return any(os.environ.get(name, "").upper() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


class HuggingFace:
    """Hugging Face as a ``catalogue.Hub``."""

    title = "Hugging Face"
    retries = 3

    def list(self, source: Source) -> tuple[str, list[RemoteFile]]:
        from huggingface_hub import HfApi

        api = HfApi(library_name="luthier", library_version=luthier.__version__)
        with _explained(source):
            info = api.model_info(source.repository, revision=source.revision, files_metadata=True, timeout=_TIMEOUT)
        return info.sha, [
            RemoteFile(f.rfilename, f.size, f.lfs.sha256 if f.lfs else None, f.blob_id) for f in info.siblings
        ]

    def fetch(self, source: Source, revision: str, file: RemoteFile, folder: Path) -> None:
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        headers = build_hf_headers(library_name="luthier", library_version=luthier.__version__)
        headers["Accept-Encoding"] = "identity"  # sizes and ranges are in bytes of the file itself
        url = hf_hub_url(source.repository, file.path, revision=revision)
        part = folder / (file.path + PART)
        if part.exists() and part.stat().st_size > file.size:
            part.unlink()
        with open(part, "ab") as f:
            if f.tell() < file.size:
                if f.tell():
                    headers["Range"] = f"bytes={f.tell()}-"
                with (
                    _explained(source),
                    get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT) as response,
                ):
                    hf_raise_for_status(response)
                    if response.status_code != 206:  # the whole file, even if a range was requested
                        f.truncate(0)
                    for block in response.iter_bytes():
                        f.write(block)
        part.replace(folder / file.path)


@contextmanager
def _explained(source: Source) -> Iterator[None]:
    """Translate the client's errors to ModelError. Errors of the disk are not changed."""
    from huggingface_hub import constants, errors

    name = f"{source.repository}: Hugging Face"
    try:
        yield
    except errors.GatedRepoError:
        raise ModelError(
            f"{name} requires accepting the terms of this model first",
            "accept them on the model's page, then: hf auth login",
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelError(
            f"{name} has no revision '{source.revision}' of this repository",
            "leave --revision out, or choose one that the model's page lists",
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"{name} has no such repository, or it is private",
            "correct the name, or if it is private: hf auth login",
        ) from None
    except errors.HfHubHTTPError as e:
        status = e.response.status_code
        if status in (401, 403):
            raise ModelError(
                f"{name} refuses access ({status})", "run hf auth login with a token that has read access"
            ) from None
        raise UnreachableError(f"{name} returned an error ({status})", "run the same command again later") from None
    except (errors.HTTPError, errors.OfflineModeIsEnabled, ValueError) as e:  # ValueError: the response is not JSON
        raise UnreachableError(
            f"{name} cannot be reached at {constants.ENDPOINT} ({' '.join(str(e).split())[:120] or type(e).__name__})",
            "check the network and run the same command again, or --from modelscope, or set HF_ENDPOINT to a mirror",
        ) from None
