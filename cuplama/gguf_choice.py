"""Which GGUF file of a folder or a repository is meant. Files of one model belong together; of several one is named."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from .errors import ConfigError
from .gguf import gguf_parts

__all__ = ["choose_file", "file_of_folder", "gguf_models", "gguf_tags"]

# Files beside a model that are none: projectors of images, and what a quantiser measured.
_BESIDE = re.compile(r"(?:mmproj|mtp)|.*imatrix", re.IGNORECASE)
_PREFERRED = "Q4_K_M"  # of a repository, where nobody says which: what llama.cpp takes as well
_PART = re.compile(r"-\d{5}-of-\d{5}$")


def gguf_models(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The models among file names (with "/" for folders): the first file of each -> all its files, by name."""
    found: dict[str, tuple[str, ...]] = {}
    for name in sorted(names):
        if name.lower().endswith(".gguf") and not _BESIDE.match(PurePosixPath(name).name):
            parts = tuple(part.as_posix() for part in gguf_parts(Path(name)))
            found.setdefault(parts[0], parts)
    return found


def choose_file(names: Iterable[str], tag: str | None, repository: str) -> tuple[str, ...]:
    """The files of the one model of a repository that is meant, the first one first.

    tag: what its file is called, or the end of that name ("Q4_K_M"); upper and lower case are the same. Without it the
    only one, or that of the usual quantisation. Raises ConfigError listing what there is.
    """
    models = gguf_models(names)
    if not models:
        raise ConfigError(f"it has no GGUF file, so {tag!r:.80} names none of them")
    wanted = [first for first in models if _means(tag or _PREFERRED, first)]
    if tag is None and len(models) == 1:
        wanted = list(models)
    if not wanted:
        asks = f"none of its GGUF files is {tag}" if tag else f"it has {len(models)} GGUF files"
        raise ConfigError(f"{asks}; name one of {_listed(models)}, as in {repository}:{_short(next(iter(models)))}")
    return models[min(wanted, key=len)]


def gguf_tags(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """A tag for each model among file names, with which ``choose_file`` finds it -> its files."""
    models, found = gguf_models(names), {}
    for first, parts in models.items():
        alone = [other for other in models if _means(_short(first), other)] == [first]
        found[_short(first) if alone else first] = parts
    return found


def file_of_folder(folder: Path) -> Path | None:
    """The GGUF file of a folder that holds one model as GGUF and nothing else to run, or None.

    Raises ConfigError listing them where there are several.
    """
    names = [p.name for p in folder.iterdir() if p.suffix.lower() == ".gguf"]
    if not names or any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json")):
        return None
    models = gguf_models(names)
    if len(models) > 1:
        raise ConfigError(f"{folder} holds {len(models)} models; name one of the files: {_listed(models)}")
    return folder / next(iter(models)) if models else None


def _means(tag: str, first: str) -> bool:
    """Whether a tag names a model by its first file."""
    stem = _PART.sub("", first.removesuffix(PurePosixPath(first).suffix))
    names = (first, stem, PurePosixPath(first).name)
    if tag.lower() in (name.lower() for name in names):
        return True
    return re.search(rf"(?:^|[-._/]){re.escape(tag)}$", stem, re.IGNORECASE) is not None


def _short(first: str) -> str:
    """A tag for a model: how its weights are stored, as its name ends, or the name."""
    stem = _PART.sub("", PurePosixPath(first).stem)
    kind = re.search(r"(?:UD-)?(?:I?Q\d\w*|F16|BF16|F32|FP16)$", stem, re.IGNORECASE)
    return kind[0] if kind else PurePosixPath(first).name


def _listed(models: Iterable[str]) -> str:
    names = list(models)
    return f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
