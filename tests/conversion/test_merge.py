"""Folding an adapter into its model: the numbers, what is written, that it can be stopped, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import cuplama
from cuplama.conversion.folder import OutputFolder
from cuplama.conversion.merge import MERGE_RECORD, merge
from cuplama.conversion.run import Options, quantise
from cuplama.dtypes import DTYPES
from cuplama.errors import CheckpointError, ConfigError, CuplamaError, ParameterError
from cuplama.models.checkpoint import open_tensors
from tests.adapters import write_adapter
from tests.conversion.made import stopped_at, write_model
from tests.paths import GOLDEN


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"), model, ["q_proj", "v_proj", "down_proj"])


def _files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_sums_are_rounded_once_and_the_rest_is_copied(model: Path, adapter: Path, tmp_path: Path) -> None:
    assert merge(model, adapter, tmp_path / "out")
    assert sorted(_files(tmp_path / "out")) == ["config.json", MERGE_RECORD, "model.safetensors", "tokenizer.json"]
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((model / "config.json").read_text())
    before, after = ({n: t.data for n, t in open_tensors(f).items()} for f in (model, tmp_path / "out"))
    assert before.keys() == after.keys()
    added = load_file(adapter / "adapter_model.safetensors")
    changed = 0
    for name, array in after.items():
        begin = f"base_model.model.{name.removesuffix('.weight')}"
        wanted = np.asarray(before[name])
        if f"{begin}.lora_A.weight" in added:
            changed += 1
            term = added[f"{begin}.lora_B.weight"] @ added[f"{begin}.lora_A.weight"]
            wanted = (wanted.astype(np.float32) + term * np.float32(2)).astype(DTYPES["bf16"])
            assert not np.array_equal(wanted, np.asarray(before[name]))
        assert np.array_equal(np.asarray(array), wanted)
    assert changed == 9


def test_logits_are_those_of_the_adapted_model(model: Path, adapter: Path, tmp_path: Path) -> None:
    """Within what rounding the sums to bfloat16 costs: as much as rounding the model's own weights did."""
    merge(model, adapter, tmp_path / "out")
    prompt = "whether 'tis nobler in the mind"
    with cuplama.load(model, device="numpy", adapter=adapter) as m:
        wanted = m.logits(prompt)
    with cuplama.load(model, device="numpy") as m:
        plain = m.logits(prompt)
    with cuplama.load(tmp_path / "out", device="numpy") as m:
        off = np.abs(m.logits(prompt) - wanted).max()
    assert 0 < off < 0.03 * np.abs(plain - wanted).max()


def test_rows_that_lie_head_by_head(tmp_path: Path) -> None:
    """InternLM 2's matrix of queries, keys and values: B has its rows in the same order, and so has the merged one."""
    base = GOLDEN / "internlm2"
    adapter = write_adapter(tmp_path / "adapter", base, ["wqkv"])
    merge(base, adapter, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    added = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.1.attention.wqkv"
    a, b = (added[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
    term = np.float32(2) * (b @ a)
    np.testing.assert_allclose(after[f"{name}.weight"], before[f"{name}.weight"] + term, rtol=0, atol=1e-6)
    with cuplama.load(base, device="numpy", adapter=adapter) as adapted, cuplama.load(base, device="numpy") as plain:
        wanted, other = adapted.logits([5, 6, 7, 8]), plain.logits([5, 6, 7, 8])
    with cuplama.load(tmp_path / "out", device="numpy") as merged:
        found = merged.logits([5, 6, 7, 8])
    assert np.abs(found - wanted).max() < 1e-4 < 0.1 < np.abs(other - wanted).max()


@pytest.mark.parametrize("name", ["qwen3-moe", "granitemoe"])
def test_experts_stay_as_they_are(name: str, tmp_path: Path) -> None:
    """A tensor each, or one of all of them, beside an adapter of attention."""
    base = GOLDEN / name
    merge(base, write_adapter(tmp_path / "adapter", base, ["q_proj"]), tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    other = {tensor for tensor, array in before.items() if not np.array_equal(array, after[tensor])}
    assert other == {tensor for tensor in before if "q_proj" in tensor}


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_run_that_was_stopped_goes_on(
    model: Path, adapter: Path, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert merge(model, adapter, tmp_path / "whole", 60_000)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "write", stopped_at(stop))
        with pytest.raises(KeyboardInterrupt):
            merge(model, adapter, out, 60_000)
    with pytest.raises(CuplamaError, match="the model is not finished; run the same cuplama merge again"):
        cuplama.load(out, device="numpy")
    steps: list[tuple[int, int]] = []
    assert merge(model, adapter, out, 60_000, lambda done, total: steps.append((done, total)))
    assert _files(out) == _files(tmp_path / "whole")
    assert len([name for name in _files(out) if name.endswith(".safetensors")]) > 1
    assert (steps[0], steps[-1]) == ((0, 4), (4, 4))
    assert not merge(model, adapter, out, 60_000)
    other = write_adapter(tmp_path / "other", model, ["q_proj"])
    with pytest.raises(CheckpointError, match=r"that was made with adapter = \"\w+\", not \"\w+\""):
        merge(model, other, out, 60_000)


def test_what_is_refused(model: Path, adapter: Path, tmp_path: Path) -> None:
    quantise(model, tmp_path / "int8", Options("int8"))
    with pytest.raises(ConfigError, match="is quantised already; merge the adapter into the model that it was made of"):
        merge(tmp_path / "int8", adapter, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"config.json is a file; only folders"):
        merge(model / "config.json", adapter, tmp_path / "out")
    with pytest.raises(ParameterError, match="shard_bytes = 0"):
        merge(model, adapter, tmp_path / "out", 0)
    tied = write_model(tmp_path / "tied", tie_word_embeddings=True)
    head = write_adapter(tmp_path / "head", tied, ["lm_head"])
    with pytest.raises(ConfigError, match="changes lm_head, which is one matrix with the embedding"):
        merge(tied, head, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert merge(model, write_adapter(tmp_path / "untied", model, ["lm_head"]), tmp_path / "out")


@pytest.mark.filterwarnings("error")
def test_sums_that_no_number_of_the_dtype_is_are_refused(tmp_path: Path) -> None:
    half = write_model(tmp_path / "half", torch_dtype="float16")
    folder = write_adapter(tmp_path / "adapter", half, ["o_proj"])
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({n: 3000 * t for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor model.layers.0.self_attn.o_proj.weight with the adapter holds"):
        merge(half, folder, tmp_path / "out")


def test_a_bare_export_keeps_its_names(tmp_path: Path) -> None:
    """GPT-2 as transformers once saved it, and its matrices stay transposed."""
    base = GOLDEN / "gpt2"
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((base / "config.json").read_text())
    tensors = load_file(base / "model.safetensors")
    save_file({n.removeprefix("transformer."): t for n, t in tensors.items()}, bare / "model.safetensors")
    adapter = write_adapter(tmp_path / "adapter", base, ["c_fc"])
    assert merge(bare, adapter, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["h.0.mlp.c_fc.weight"].shape == tensors["transformer.h.0.mlp.c_fc.weight"].shape
    with cuplama.load(base, device="numpy", adapter=adapter) as m, cuplama.load(tmp_path / "out", device="numpy") as n:
        np.testing.assert_allclose(m.logits([1, 2, 3]), n.logits([1, 2, 3]), atol=1e-4, rtol=0)


def test_another_base_is_named(model: Path, adapter: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """The last part of the name counts: a model may lie anywhere."""

    def said(base: str) -> list[str]:
        folder = write_adapter(tmp_path / "named", model, base_model_name_or_path=base)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "cuplama"):
            cuplama.load(model, device="numpy", adapter=folder).close()
        return [r.getMessage() for r in caplog.records]

    assert said(f"org/{model.name.upper()}/") == []
    assert said("") == []
    assert said("org/other") == [f"the adapter was made for org/other, and is applied to {model}"]
