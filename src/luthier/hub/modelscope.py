"""Download from ModelScope with ``modelscope_hub``, the client that the ``modelscope`` package itself uses."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from luthier._util.installation import install_command
from luthier.errors import MissingPackageError, ModelError
from luthier.hub.catalogue import RemoteFile, Source, UnreachableError, corrupt

if TYPE_CHECKING:
    from modelscope_hub import HubApi


class ModelScope:
    """ModelScope as a ``catalogue.Hub``."""

    title = "ModelScope"
    retries = 0  # the client retries by itself

    def __init__(self) -> None:
        try:
            import modelscope_hub
        except ImportError:
            raise MissingPackageError(
                "ModelScope needs the package modelscope-hub",
                f"{install_command('modelscope')}, or use --from huggingface",
            ) from None
        self._client = modelscope_hub
        logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)  # its errors are reported here, once

    def list(self, source: Source) -> tuple[str, list[RemoteFile]]:
        with self._api(source) as api:
            listed = api.list_repo_files(source.repository, "model", revision=source.revision)
        # the client's listing has no commit, so the revision stays the name of a branch or tag
        return source.revision or "master", [RemoteFile(f.path, f.size, f.sha256) for f in listed if f.type != "tree"]

    def fetch(self, source: Source, revision: str, file: RemoteFile, folder: Path) -> None:
        from modelscope_hub.errors import FileIntegrityError

        with self._api(source) as api, contextlib.redirect_stderr(io.StringIO()):  # its progress bar cannot be disabled
            try:
                api.download_file(
                    source.repository, "model", file.path, revision=revision, local_dir=folder, file_size=file.size
                )
            except FileIntegrityError:  # the client has already downloaded the file more than once
                raise corrupt(self.title, file) from None

    @contextmanager
    def _api(self, source: Source) -> Iterator[HubApi]:
        """Yield the client with the user's endpoint and token, and translate its errors to ModelError.

        Errors of the disk are not changed. The client sends an installation id with every request; a temporary
        configuration directory makes it a new id each time and leaves no files behind.
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
                raise _not_found(api, source) from None
            except (errors.AuthenticationError, errors.PermissionDeniedError) as e:
                raise ModelError(
                    f"{name} refuses access ({e.status_code})",
                    "create a token on the ModelScope site and set the environment variable MODELSCOPE_API_TOKEN to it",
                ) from None
            except (errors.NetworkError, ValueError) as e:  # ValueError: the response is not JSON
                raise UnreachableError(
                    f"{name} cannot be reached at {user.endpoint} ({' '.join(str(e).split())[:120]})",
                    "check the network and run the same command again, or --from huggingface",
                ) from None
            except errors.APIError as e:
                raise UnreachableError(
                    f"{name} returned an error ({e.status_code})", "run the same command again later"
                ) from None


def _not_found(api: HubApi, source: Source) -> ModelError:
    """Return the error for a missing repository or revision.

    The hub returns the same error for a missing repository, revision or file; its list of revisions shows which it is.
    """
    from modelscope_hub.errors import HubError

    try:
        revisions = [r["Revision"] for r in api.list_repo_revisions(source.repository, "model")]
    except HubError:
        revisions = []
    if source.revision is not None and revisions and source.revision not in revisions:
        return ModelError(
            f"{source.repository}: ModelScope has no revision '{source.revision}' of this repository; it has: "
            f"{', '.join(revisions)}",
            f"--revision {revisions[0]}",
        )
    return ModelError(
        f"{source.repository}: ModelScope has no such repository, or it is private",
        "correct the name; if it is private, set the environment variable MODELSCOPE_API_TOKEN to a token",
    )
