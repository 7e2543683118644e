"""The Hugging Face hub as far as we need it: which files a repository has, and bringing some of them into the cache.

Everything goes through `huggingface_hub`, so its cache, token, mirrors and offline mode apply. It does not know which
files a model needs.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from moesaic.errors import ModelNotFoundError

__all__ = ["Hub"]

# huggingface_hub changed its HTTP client twice; its own error derives from the base of the client's errors, whichever
# that is, so this covers refused connections and timeouts too.
_HTTP_ERRORS = HfHubHTTPError.__bases__
_FAILURES = (EntryNotFoundError, HFValidationError, OfflineModeIsEnabled, OSError, *_HTTP_ERRORS)


@dataclass(frozen=True, slots=True)
class Hub:
    """Access to one hub.

    Attributes:
        offline: use only what the cache holds; also on when huggingface_hub is told so (`HF_HUB_OFFLINE`).
        endpoint: another hub than the public one.
        cache_dir: another cache than the user's.
    """

    offline: bool = False
    endpoint: str | None = None
    cache_dir: Path | None = None

    @property
    def is_offline(self) -> bool:
        """Whether the network may not be used."""
        return self.offline or constants.is_offline_mode()

    def files(self, repo: str) -> list[str]:
        """Names of the files in a repository (offline: of those in the cache), sorted.

        Raises:
            ModelNotFoundError: there is no such repository, it is gated, or it cannot be reached.
        """
        try:
            if not self.is_offline:
                return sorted(HfApi(endpoint=self.endpoint).list_repo_files(repo))
            folder = Path(self._snapshot(repo, []))
        except _FAILURES as error:
            raise self._not_found(repo, error) from error
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    def fetch(self, repo: str, names: Sequence[str]) -> Path:
        """Bring files into the cache and return the folder that holds them under their names.

        Raises:
            ModelNotFoundError: a file cannot be had.
        """
        assert names
        try:
            folder = Path(self._snapshot(repo, names))
        except _FAILURES as error:
            raise self._not_found(repo, error) from error
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise ModelNotFoundError(
                f"{repo}: {', '.join(missing)} is not in the cache; run once without --offline to download it."
            )
        return folder

    def _snapshot(self, repo: str, names: Sequence[str]) -> str:
        return str(
            snapshot_download(
                repo,
                endpoint=self.endpoint,
                cache_dir=self.cache_dir,
                local_files_only=self.is_offline,
                allow_patterns=[glob.escape(name) for name in names],
            )
        )

    def _not_found(self, repo: str, error: Exception) -> ModelNotFoundError:
        if isinstance(error, GatedRepoError):
            return ModelNotFoundError(f"{repo}: is gated; accept its terms on the hub and log in with 'hf auth login'.")
        if isinstance(error, RepositoryNotFoundError | HFValidationError):
            return ModelNotFoundError(f"{repo}: there is no such folder here and no such repository on the hub.")
        if self.is_offline:
            return ModelNotFoundError(f"{repo}: is not in the cache; run once without --offline to download it.")
        return ModelNotFoundError(f"{repo}: cannot be had from the hub: {type(error).__name__}: {error}")
