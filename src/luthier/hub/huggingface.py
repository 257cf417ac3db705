"""Hugging Face, through ``huggingface_hub``: its session, tokens, endpoint and errors; the bytes are written here.

``hf_hub_download`` would throw away what has arrived when its process ends, so a file is streamed to a part of our
own, which the next process goes on with. That also leaves the Xet protocol out, which cannot go on in a file.
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
    """Whether the user has told the client to stay off the network."""
    return any(os.environ.get(name, "").upper() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


class HuggingFace:
    """See ``catalogue.Hub``."""

    title = "Hugging Face"
    patience = 3

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
        headers["Accept-Encoding"] = "identity"  # parts are counted in bytes of the file
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
                    if response.status_code != 206:  # all of it, asked for or not
                        f.truncate(0)
                    for block in response.iter_bytes():
                        f.write(block)
        part.replace(folder / file.path)


@contextmanager
def _explained(source: Source) -> Iterator[None]:
    """The client's errors as ours. Those of the disk pass."""
    from huggingface_hub import constants, errors

    name = f"{source.repository}: Hugging Face"
    try:
        yield
    except errors.GatedRepoError:
        raise ModelError(
            f"{name} gives it only to people who have agreed to its terms",
            "agree on the model's page, then: hf auth login",
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelError(
            f"{name} knows no revision '{source.revision}' of it", "leave --revision out, or take one from its page"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"{name} has no such repository, or it is private",
            "correct the name, or where it is private: hf auth login",
        ) from None
    except errors.HfHubHTTPError as e:
        status = e.response.status_code
        if status in (401, 403):
            raise ModelError(
                f"{name} refuses access ({status})", "hf auth login, with a token that may read it"
            ) from None
        raise UnreachableError(f"{name} answers with an error ({status})", "run the same command again later") from None
    except (errors.HTTPError, errors.OfflineModeIsEnabled, ValueError) as e:  # ValueError: an answer that is no JSON
        raise UnreachableError(
            f"{name} cannot be reached at {constants.ENDPOINT} ({' '.join(str(e).split())[:120] or type(e).__name__})",
            "check the network and run the same command again, or --from modelscope, or set HF_ENDPOINT to a mirror",
        ) from None
