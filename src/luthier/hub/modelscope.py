"""ModelScope, through ``modelscope_hub``, the client that its command line and ``modelscope`` itself download with."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from luthier.errors import MissingPackageError, ModelError
from luthier.hub.catalogue import RemoteFile, Source, UnreachableError, corrupt


class ModelScope:
    """See ``catalogue.Hub``."""

    title = "ModelScope"
    patience = 0  # the client tries again by itself

    def __init__(self) -> None:
        try:
            import modelscope_hub
        except ImportError:
            raise MissingPackageError(
                "ModelScope needs the package modelscope-hub",
                "pip install 'luthier[modelscope]', or take the model --from huggingface",
            ) from None
        self._client: Any = modelscope_hub
        logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)  # what it reports is reported here, once

    def list(self, source: Source) -> tuple[str, list[RemoteFile]]:
        with self._api(source) as api:
            listed = api.list_repo_files(source.repository, "model", revision=source.revision)
        return source.revision or "master", [RemoteFile(f.path, f.size, f.sha256) for f in listed if f.type != "tree"]

    def fetch(self, source: Source, revision: str, file: RemoteFile, folder: Path) -> None:
        from modelscope_hub.errors import FileIntegrityError

        with self._api(source) as api, contextlib.redirect_stderr(io.StringIO()):  # its progress bar knows no switch
            try:
                api.download_file(
                    source.repository, "model", file.path, revision=revision, local_dir=folder, file_size=file.size
                )
            except FileIntegrityError:  # it has fetched the file more than once already
                raise corrupt(self.title, file) from None

    @contextmanager
    def _api(self, source: Source) -> Iterator[Any]:
        """The client with the user's endpoint and token, and its errors as ours; those of the disk pass.

        It would send an id of this installation with every request; in a directory of its own, it is a new id each
        time and nothing is left behind.
        """
        from modelscope_hub import errors

        user = self._client.HubConfig()
        name = f"{source.repository}: ModelScope"
        with tempfile.TemporaryDirectory(prefix="luthier-pull-") as own:
            config = self._client.HubConfig(
                endpoint=user.endpoint, token=user.token or "", config_dir=Path(own), cache_dir=Path(own)
            )
            api = self._client.HubApi(config)
            try:
                yield api
            except errors.NotExistError:
                raise _not_there(api, source) from None
            except (errors.AuthenticationError, errors.PermissionDeniedError) as e:
                raise ModelError(
                    f"{name} refuses access ({e.status_code})",
                    "make a token on its site and put it in the environment variable MODELSCOPE_API_TOKEN",
                ) from None
            except (errors.NetworkError, ValueError) as e:  # ValueError: an answer that is no JSON
                raise UnreachableError(
                    f"{name} cannot be reached at {user.endpoint} ({' '.join(str(e).split())[:120]})",
                    "check the network and run the same command again, or --from huggingface",
                ) from None
            except errors.APIError as e:
                raise UnreachableError(
                    f"{name} answers with an error ({e.status_code})", "run the same command again later"
                ) from None


def _not_there(api: Any, source: Source) -> ModelError:
    """The hub says the same of a repository, a revision and a file that it does not have; its revisions tell."""
    from modelscope_hub.errors import HubError

    try:
        known = [r["Revision"] for r in api.list_repo_revisions(source.repository, "model")]
    except HubError:
        known = []
    if source.revision is not None and known and source.revision not in known:
        return ModelError(
            f"{source.repository}: ModelScope knows no revision '{source.revision}' of it; known: {', '.join(known)}",
            f"--revision {known[0]}",
        )
    return ModelError(
        f"{source.repository}: ModelScope has no such repository, or it is private",
        "correct the name; for a private one, put a token in the environment variable MODELSCOPE_API_TOKEN",
    )
