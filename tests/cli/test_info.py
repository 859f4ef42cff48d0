"""``cuplama info`` and ``cuplama graph``: a model's facts and its nodes, with weights and without."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import cuplama
from cuplama.cli.model_info import facts
from tests.paths import GOLDEN
from tests.tiny import CHARS as CHARS_FOLDER
from tests.tiny import LLAMA as LLAMA_FOLDER

CHARS, LLAMA = str(CHARS_FOLDER), str(LLAMA_FOLDER)
NUMPY = ("--device", "numpy")
Run = Callable[..., tuple[int, str, str]]
Fails = Callable[..., str]


def test_info_and_graph(run: Run) -> None:
    status, out, err = run("info", "-m", LLAMA)
    assert (status, err) == (0, "")
    facts = json.loads(run("info", "-m", LLAMA, "--json")[1])
    assert {"architecture", "bytes_by_part", "stop_tokens"} <= facts.keys()
    for name in ("parameters", "layers", "heads", "context", "weight_bytes", "cache_bytes", "cache_bytes_per_token"):
        assert type(facts[name]) is int, name
    assert all(re.fullmatch("[a-z_]+", name) for name in (*facts, *facts["bytes_by_part"]))
    assert sum(facts["bytes_by_part"].values()) == facts["weight_bytes"]
    assert (facts["architecture"], facts["weights_found"]) == ("LlamaForCausalLM", True)
    shown = dict(re.split("  +", line, maxsplit=1) for line in out.splitlines())
    assert shown["parameters"] == f"{facts['parameters']:,}"
    assert shown["attention"] == f"{facts['heads']} heads, {facts['kv_heads']} KV heads of {facts['head_size']}"
    status, out, err = run("graph", "-m", LLAMA)
    assert (status, err) == (0, "")
    assert out.startswith("x = embedding(input_ids, embed_tokens)\n")
    assert out.count("= attention(") == json.loads((LLAMA_FOLDER / "config.json").read_text())["num_hidden_layers"]


def test_info_and_graph_without_weights(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a config.json alone the same numbers as with the weights beside it; and known shapes need no file."""
    shutil.copy(Path(LLAMA) / "config.json", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    full = json.loads(run("info", "-m", LLAMA, "--json")[1])
    alone = json.loads(run("info", "-m", str(tmp_path), "--json")[1])
    assert (alone["weights_found"], alone["head_tied"]) == (False, bool(config["tie_word_embeddings"]))
    assert alone["parameters"] == full["parameters"]
    status, out, err = run("info", "-m", str(tmp_path))
    assert (status, err) == (0, "")
    assert "none here; by the config" in out
    monkeypatch.chdir(tmp_path)  # a config.json in the current folder has no part in it
    known = json.loads(run("info", "-m", "llama-3.2-1b", "--json")[1])
    assert (known["folder"], known["parameters"], known["head_tied"]) == (None, 1_235_814_400, True)
    assert "the published shape of a known model" in run("info", "-m", "llama-3.2-1b")[1]
    status, out, err = run("graph", "-m", "llama-3.2-1b")
    assert (status, err, out.count("= attention(")) == (0, "", 16)


def test_info_shows_the_stop_tokens_that_the_model_uses(tmp_path: Path) -> None:
    """The union of config and generation_config, without ids that a larger vocabulary left behind."""
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "llama2", folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 100000]}', encoding="utf-8")
    with cuplama.load(folder, device="numpy") as model:
        assert 3 in model.stop_ids
        assert [t["id"] for t in facts(folder, model.config)["stop_tokens"]] == sorted(model.stop_ids)
        assert max(model.stop_ids) < model.config.vocab_size
