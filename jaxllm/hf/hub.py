"""Where a checkpoint is: a directory, or a repository of the Hugging Face Hub by way of its cache."""

from __future__ import annotations

import fnmatch
import os
import re
from pathlib import Path

from jaxllm.errors import CheckpointError
from jaxllm.hf import files

REPOSITORY = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)
WEIGHTS = ("*.safetensors",)
SETTINGS = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
EXCLUDED = ("*/*", "consolidated*")
"""Folders hold other formats, and consolidated files the same weights once more."""
INSTALL = "pip install -e '.[hub]'"
"""In a clone, which is where this package is installed from."""


def find(path_or_repo: str | os.PathLike, weights: bool = True) -> Path:
  """The directory of a checkpoint: the path itself, or that of the cache for "owner/name" or "owner/name@revision".

  Only safetensors (weights=False: not even those), JSON and tokenizer files are fetched.  Raises CheckpointError for what is
  neither, and for a repository that the Hub does not show, that cannot be fetched or has no safetensors; each says what to do.
  """
  if not isinstance(path_or_repo, (str, os.PathLike)):
    raise CheckpointError(
      f"path_or_repo: found {path_or_repo!r}, expected a directory, or the owner/name of a repository"
    )
  path = Path(path_or_repo).expanduser()
  if path.is_dir():
    return path
  repository = REPOSITORY.fullmatch(str(path_or_repo))
  if path.exists():
    raise CheckpointError(f"{path}: a file, expected a directory; give the one it is in: {path.parent}")
  if repository is None:
    raise CheckpointError(
      f"{path}: no such directory, and not the owner/name of a repository of the Hugging Face Hub"
    )
  return _fetch(repository["name"], repository["revision"], (*WEIGHTS, *SETTINGS) if weights else SETTINGS)


def _fetch(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
  try:
    import huggingface_hub
    from huggingface_hub import constants, errors
  except ImportError:
    raise CheckpointError(
      f"{name}: no such directory; to fetch the repository of that name from the Hugging Face Hub install the extra `hub` "
      f"({INSTALL})"
    ) from None
  revised = f"{name}@{revision}" if revision else name
  download = f"hf download {name}" + (f" --revision {revision}" if revision else "")
  try:
    found = huggingface_hub.snapshot_download(
      name, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(EXCLUDED)
    )
  except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
    raise CheckpointError(
      f"{name}: not in the cache {constants.HF_HUB_CACHE}, and the Hugging Face Hub cannot be reached; "
      f"where there is a network run `{download}` and bring that cache along, or give the directory of a copy"
    ) from None
  except (errors.HfHubHTTPError, errors.HFValidationError) as e:  # not found and gated among them
    reason = str(e).strip().partition("\n")[0][:200]
    raise CheckpointError(
      f"{name}: the Hugging Face Hub does not give it ({type(e).__name__}: {reason}); check the name, and run `hf auth login` "
      "where the repository is private or asks for consent"
    ) from None
  missing = files.missing_weights(Path(found)) if WEIGHTS[0] in patterns else []
  if not missing:
    return Path(found)
  try:  # what is cached comes without a word where the Hub cannot be reached
    there = huggingface_hub.list_repo_files(name, revision=revision)
  except Exception:  # whatever it and the packages below it raise
    raise CheckpointError(
      f"{revised}: its weights ({files.listed(missing)}) are not in the cache {constants.HF_HUB_CACHE}, and the Hugging Face "
      f"Hub cannot be reached; where there is a network run `{download}` and bring that cache along, or give the directory of "
      "a copy"
    ) from None
  pickles = [
    file for file in there if any(fnmatch.fnmatch(file, kind) for kind in files.PICKLES) and "/" not in file
  ]
  if files.SINGLE in there or files.INDEX in there:
    reason = f"{revised}: {files.listed(missing)} was not fetched; run `{download}`"
  elif pickles:
    reason = files.pickles_only(name, pickles)
  else:
    reason = f"{revised}: the repository has no {files.SINGLE} or {files.INDEX}; give one that has a model of transformers"
  raise CheckpointError(reason)
