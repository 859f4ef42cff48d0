"""Which GGUF file of a folder or a repository is meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from cuplama.errors import ConfigError
from cuplama.gguf_choice import choose_file, file_of_folder, gguf_models, gguf_tags

PARTS = ("Q8_0/Big-Q8_0-00001-of-00002.gguf", "Q8_0/Big-Q8_0-00002-of-00002.gguf")
NAMES = [
    "README.md",
    "Big-Q4_K_M.gguf",
    "Big-UD-Q4_K_M.gguf",
    "big-iq2_xs.gguf",
    "mmproj-F16.gguf",
    "imatrix_unsloth.gguf",
    *PARTS,
]


def test_files_of_one_model_belong_together() -> None:
    assert gguf_models(NAMES) == {
        "Big-Q4_K_M.gguf": ("Big-Q4_K_M.gguf",),
        "Big-UD-Q4_K_M.gguf": ("Big-UD-Q4_K_M.gguf",),
        PARTS[0]: PARTS,
        "big-iq2_xs.gguf": ("big-iq2_xs.gguf",),
    }
    assert gguf_models([PARTS[1]]) == {PARTS[0]: PARTS}  # whichever of them is there


@pytest.mark.parametrize(
    ("tag", "wanted"),
    [
        (None, "Big-Q4_K_M.gguf"),
        ("Q4_K_M", "Big-Q4_K_M.gguf"),
        ("q4_k_m", "Big-Q4_K_M.gguf"),
        ("UD-Q4_K_M", "Big-UD-Q4_K_M.gguf"),
        ("Big-UD-Q4_K_M.gguf", "Big-UD-Q4_K_M.gguf"),
        ("IQ2_XS", "big-iq2_xs.gguf"),
        ("Q8_0", PARTS[0]),
        (PARTS[0], PARTS[0]),
    ],
)
def test_the_file_that_a_tag_means(tag: str | None, wanted: str) -> None:
    assert choose_file(NAMES, tag, "org/big")[0] == wanted


def test_the_only_file_needs_no_tag() -> None:
    assert choose_file(["a-Q5_K_S.gguf", "README.md"], None, "org/a") == ("a-Q5_K_S.gguf",)
    assert choose_file(PARTS, None, "org/a") == PARTS


def test_a_tag_that_means_none() -> None:
    for tag in ("Q4", "4_K_M", "Q8_0-00001"):
        words = rf"none of its GGUF files is {tag}; name one of Big-Q4_K_M\.gguf, .*, as in org/big:Q4_K_M"
        with pytest.raises(ConfigError, match=words):
            choose_file(NAMES, tag, "org/big")
    with pytest.raises(
        ConfigError, match=r"it has 2 GGUF files; name one of a-Q2_K\.gguf, a-Q8_0\.gguf, as in org/a:Q2_K"
    ):
        choose_file(["a-Q8_0.gguf", "a-Q2_K.gguf"], None, "org/a")
    with pytest.raises(ConfigError, match="it has no GGUF file, so 'Q8_0' names none of them"):
        choose_file(["README.md"], "Q8_0", "org/a")


def test_tags_find_their_files() -> None:
    tags = gguf_tags(NAMES)
    assert len(tags) == len(gguf_models(NAMES))
    assert {"UD-Q4_K_M", "Q8_0", "iq2_xs"} < set(tags)
    for tag, parts in tags.items():
        assert choose_file(NAMES, tag, "org/big") == parts


def test_endings_in_upper_case(tmp_path: Path) -> None:
    (tmp_path / "A-Q8_0.GGUF").touch()
    assert file_of_folder(tmp_path) == tmp_path / "A-Q8_0.GGUF"
    assert choose_file(["A-Q8_0.GGUF", "A-Q4_0.GGUF"], "Q4_0", "org/a") == ("A-Q4_0.GGUF",)
    assert list(gguf_tags(["A-Q8_0.GGUF"])) == ["Q8_0"]


def test_a_folder_that_holds_one(tmp_path: Path) -> None:
    assert file_of_folder(tmp_path) is None
    for name in ("mmproj.gguf", "m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "config.json"):
        (tmp_path / name).touch()
    assert file_of_folder(tmp_path) == tmp_path / "m-00001-of-00002.gguf"
    (tmp_path / "other.gguf").touch()
    with pytest.raises(
        ConfigError, match=r"holds 2 models; name one of the files: m-00001-of-00002\.gguf, other\.gguf"
    ):
        file_of_folder(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert file_of_folder(tmp_path) is None  # then the folder is the model
