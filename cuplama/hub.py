"""Where a model's files are: the bundled model, a local folder, or the local copy of a hub repository."""

from __future__ import annotations

import errno
import glob
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .arguments import shown, type_of
from .errors import ConfigError, ParameterError
from .files import read_json
from .folders import data_folder
from .gguf import is_gguf
from .gguf_choice import choose_file, file_of_folder, gguf_models, gguf_tags
from .models.checkpoint import INDEX
from .quant.readers import FILES

__all__ = [
    "BUNDLED",
    "HUB_FILES",
    "CachedModel",
    "DownloadProgress",
    "cached_models",
    "find_model",
    "pull",
    "weight_files",
]

BUNDLED = "stories-7m"  # the name of the model that comes with the package

_log = logging.getLogger("cuplama")
DownloadProgress = Callable[[int, int], None]  # (bytes that are here, bytes in all)
# The files of a repository that are fetched beside its weights. Other formats of the same weights (*.bin,
# original/*.pth, a consolidated.safetensors) would double the download.
HUB_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja", INDEX,
    "adapter_config.json",
    *FILES,
)  # fmt: skip
_FOLDER_FILES = (".json", ".safetensors", ".jinja")  # what a model folder has, for a hint
_COMMIT = re.compile(r"[0-9a-f]{40}")
# org/name, a revision, and which GGUF file
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?(?::([\w./-]+))?")
_FORM = "org/name[@revision][:FILE]"


@dataclass(frozen=True)
class CachedModel:
    """A repository in the hub's local cache.

    repository: "org/name", with ":FILE" for each of its GGUF files; folder: its newest files, or that one; size: bytes
    of all its revisions, or of the file; last_used: seconds since 1970.
    """

    repository: str
    folder: Path
    size: int
    last_used: float


def find_model(
    model: str | os.PathLike[str] | None, offline: bool = False, progress: DownloadProgress | None = None
) -> Path:
    """The folder of a model, or its GGUF file.

    model: a folder, a GGUF file, a hub id, or None for the bundled story model. A hub id is "org/name", or
    "org/name@revision" for a branch, tag or commit; of a repository of GGUF files "org/name:Q4_K_M" means the one whose
    name ends so. A folder that holds one GGUF file stands for the file. progress: as of ``pull``.

    The bundled model's name stands for it, too, where no folder has that name.

    A hub repository is downloaded, or brought up to date, unless ``offline`` (or HF_HUB_OFFLINE) forbids it.
    Raises ConfigError naming what does not exist or cannot be reached, and ParameterError for a wrong type.
    """
    if model is None:
        return data_folder("weights")
    if not isinstance(model, (str, os.PathLike)):
        wanted = "a folder, a GGUF file, a hub id, or None"
        raise ParameterError(f"model = {shown(model)} is {type_of(model)}; it must be {wanted}")
    try:
        path = Path(model or "?").expanduser()  # an empty name must not mean the current folder
        if path.is_dir():
            return file_of_folder(path) or path
        if is_gguf(path):
            return path
        exists = path.exists()
    except (OSError, RuntimeError) as e:  # no permission, a name too long, no such home folder
        raise ConfigError(f"cannot open {model!s:.80}: {getattr(e, 'strerror', None) or e}") from None
    if model == BUNDLED and not exists:
        return data_folder("weights")
    if exists:
        hint = f": {path.parent}" if path.suffix in _FOLDER_FILES else ", or a GGUF file"
        raise ConfigError(f"{path} is a file; give the folder that holds config.json and the weights{hint}")
    if path.is_symlink():
        raise ConfigError(f"{path} is a link to {os.readlink(path)}, which leads nowhere")
    parts = _HUB_ID.fullmatch(model) if isinstance(model, str) else None
    if parts is not None and parts[1].lower().endswith(".gguf"):
        raise ConfigError(f"{model!r:.200} does not exist")
    if parts is None:
        raise ConfigError(f"{str(model)!r:.200} does not exist, and is not a hub id of the form {_FORM}")
    return _copy(parts[1], parts[2], parts[3], offline, progress)


def pull(repository: str, *, revision: str | None = None, progress: DownloadProgress | None = None) -> Path:
    """Download a hub repository, or bring it up to date: the folder of its files, or its GGUF file.

    repository: "org/name", with ":FILE" as in ``find_model``; revision: a branch, tag or commit; progress: called with
    (bytes that are here, bytes in all), from the hub's threads; without it the hub's library shows bars of its own.
    Raises ConfigError naming what does not exist or cannot be reached.
    """
    parts = _HUB_ID.fullmatch(repository)
    if parts is None:
        raise ConfigError(f"{repository!r:.200} is not a hub id of the form {_FORM}")
    return _copy(parts[1], revision or parts[2], parts[3], False, progress)


def cached_models() -> list[CachedModel]:
    """The models in the hub's local cache, by name. Repositories of other kinds, and broken ones, are left out."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    found = []
    for r in repositories:
        if r.repo_type == "model" and r.revisions:
            newest = max(r.revisions, key=lambda v: ("main" in v.refs, v.last_modified))
            folder, names = newest.snapshot_path, _gguf_files(newest.snapshot_path)
            if any(folder.glob("*.safetensors")) or not gguf_models(names):
                found.append(CachedModel(r.repo_id, folder, r.size_on_disk, r.last_accessed))
                continue
            for tag, parts in gguf_tags(names).items():
                size = sum((folder / part).stat().st_size for part in parts if (folder / part).exists())
                found.append(CachedModel(f"{r.repo_id}:{tag}", folder / parts[0], size, r.last_accessed))
    return sorted(found, key=lambda m: m.repository.lower())


def weight_files(names: Iterable[str], index: Mapping[str, Any] | None) -> list[str]:
    """Which of a repository's files are its weights, as ``open_tensors`` will read them.

    names: of all its files; index: the content of model.safetensors.index.json, where there is one.
    """
    names = set(names)
    if "model.safetensors" in names:
        return ["model.safetensors"]
    if index is not None:
        places = index.get("weight_map")
        return sorted(n for n in names if n in places.values()) if isinstance(places, dict) else []
    if "adapter_model.safetensors" in names:
        return ["adapter_model.safetensors"]
    others = sorted(n for n in names if n.endswith(".safetensors") and "/" not in n)
    return others if len(others) == 1 else []


def _copy(
    repository: str, revision: str | None, file: str | None, offline: bool, progress: DownloadProgress | None
) -> Path:
    """The folder of a repository's files in the local cache, all of one commit, or the GGUF file among them.

    file: which of several GGUF files. Raises ConfigError.
    """
    from huggingface_hub import constants

    offline = offline or constants.HF_HUB_OFFLINE
    try:
        # The hub says here which commit a branch means today; the cache notes it for later use without the hub.
        folder = _snapshot(repository, revision, offline)
        if not offline and _COMMIT.fullmatch(folder.name):  # a snapshot's folder has the name of its commit
            _fetch_weights(repository, folder, file, progress)
        names = [] if file is None and any(folder.glob("*.safetensors")) else _gguf_files(folder)
        return folder / choose_file(names, file, repository)[0] if names or file else folder
    except Exception as e:  # each version of the hub's library has its own errors for a connection that is lost
        raise ConfigError(f"{repository}: {_reason(repository, revision, offline, e)}") from e


def _gguf_files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")]


def _snapshot(repository: str, revision: str | None, offline: bool) -> Path:
    """The folder of a repository's files beside its weights; without the hub what the cache has of them."""
    from huggingface_hub import errors, snapshot_download

    options: dict[str, Any] = {"allow_patterns": list(HUB_FILES), "tqdm_class": _bars(lambda _: None)}
    try:
        with _without_warning("No files matched"):  # a GGUF file is all there is
            return Path(snapshot_download(repository, revision=revision, local_files_only=offline, **options))
    except errors.LocalEntryNotFoundError as e:
        # Since version 1.22 the library refuses a copy that another program made of fewer files.
        folder = getattr(e, "snapshot_path", None)
        if folder is None:
            raise
        _log.warning("%s: the local copy lacks files that the hub has, and is used as it is", repository)
        return Path(folder)


@contextmanager
def _without_warning(begin: str) -> Iterator[None]:
    """Keep the hub's library from logging messages that begin so, from any thread."""

    def others(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(begin)

    logger = logging.getLogger("huggingface_hub._snapshot_download")
    logger.addFilter(others)
    try:
        yield
    finally:
        logger.removeFilter(others)


def _fetch_weights(repository: str, folder: Path, file: str | None, progress: DownloadProgress | None) -> None:
    """Complete a snapshot by the weights of the same commit. file: which of several GGUF files."""
    from huggingface_hub import list_repo_tree, snapshot_download
    from huggingface_hub.hf_api import RepoFile

    commit = folder.name
    try:
        tree = [f for f in list_repo_tree(repository, recursive=True, revision=commit) if isinstance(f, RepoFile)]
    except Exception:
        if any(folder.glob("*.safetensors")) or _gguf_files(
            folder
        ):  # the hub is out of reach: what the cache has will do
            return
        raise
    sizes = {file.path: file.size for file in tree}
    weights = [] if file else weight_files(sizes, read_json(folder / INDEX) if INDEX in sizes else None)
    if not weights and (file or gguf_models(sizes)):
        weights = list(choose_file(sizes, file, repository))
    if not weights:
        others = _listed([name for name in sizes if name.endswith((".safetensors", ".bin", ".pt", ".pth"))])
        if not folder.is_dir():  # nothing was fetched
            raise ConfigError(f"it has no config.json, so it is no model in Hugging Face layout{others}")
        _log.warning("%s has no safetensors that say how they belong%s", repository, others)
        return
    wanted = [n for n in sizes if n in weights or any(fnmatchcase(n, pattern) for pattern in HUB_FILES)]
    total, here = sum(sizes[n] for n in wanted), sum(sizes[n] for n in wanted if (folder / n).exists())

    def report(more: int) -> None:
        if progress is not None:
            progress(min(total, here + more), total)

    options: dict[str, Any] = {} if progress is None else {"tqdm_class": _bars(report)}
    report(0)
    snapshot_download(repository, revision=commit, allow_patterns=[glob.escape(n) for n in weights], **options)
    report(total)


def _listed(names: list[str]) -> str:
    return f": {', '.join(names[:3])}{', ...' if len(names) > 3 else ''} cannot be read" if names else ""


def _bars(report: Callable[[int], None]) -> type[Any]:
    """A class in place of the hub's progress bars that draws nothing and reports how many bytes have come.

    Older versions of the hub's library give it no bytes: then only the start and the end are reported. Newer ones count
    them twice, as they come and as they are written: the higher number counts.
    """
    from huggingface_hub.utils.tqdm import tqdm

    lock = threading.Lock()
    counts: dict[int, float] = {}

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            self.counts_bytes = options.get("unit") == "B"
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            with lock:
                self.n += n or 0
                if self.counts_bytes:
                    counts[id(self)] = self.n
                    report(int(max(counts.values())))

    return Bar


def _reason(repository: str, revision: str | None, offline: bool, error: Exception) -> str:
    """Why a repository could not be had, in words."""
    from huggingface_hub import constants, errors

    said = (str(error).splitlines() or [type(error).__name__])[0]
    login = "log in with `hf auth login`"
    if isinstance(error, ConfigError):
        return said
    if isinstance(error, errors.GatedRepoError):
        return f"access is restricted: ask for it at {constants.ENDPOINT}/{repository}, then {login}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub has no revision {revision!r} of it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such folder, and no such repository on the hub; if it is a private one, {login}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if offline:
            return "no such folder, and as a hub id: it is not in the local cache, and the hub is off limits (offline)"
        cause = error.__cause__
        if not isinstance(cause, errors.HfHubHTTPError):
            return "no such folder, and as a hub id: the hub cannot be reached"
        said = str(cause).splitlines()[0]
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
        return f"the local cache {constants.HF_HUB_CACHE} cannot be written: {error.strerror}"
    if isinstance(error, (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalEntryNotFoundError)):
        return f"no such folder, and the hub says: {said}"
    return f"no such folder, and the hub cannot be reached: {said}"
