"""``cuplama info`` and ``cuplama graph``: a model's facts and its nodes, with weights and without."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import cuplama
from cuplama.backends.cuda.unpacking import largest_slice
from cuplama.cli.model_info import facts
from cuplama.dtypes import DTYPES
from cuplama.hub import find_model
from cuplama.lab.shapes import LETTERS
from cuplama.models.checkpoint import load_weights
from cuplama.models.config import load_config
from cuplama.models.rounding import linear_weights, round_weights
from tests.gguf_models import write_chars
from tests.paths import DATA, GOLDEN
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
    sizes = ("weight_bytes", "cache_bytes", "cache_bytes_per_token", "gpu_bytes", "numpy_bytes")
    for name in ("parameters", "layers", "heads", "context", *sizes):
        assert type(facts[name]) is int, name
    assert all(re.fullmatch("[a-z_]+", name) for name in (*facts, *facts["bytes_by_part"]))
    assert sum(facts["bytes_by_part"].values()) == facts["weight_bytes"]
    assert (facts["architecture"], facts["weights_found"]) == ("LlamaForCausalLM", True)
    shown = dict(re.split("  +", line, maxsplit=1) for line in out.splitlines())
    assert shown["parameters"] == f"{facts['parameters']:,}"
    assert shown["attention"] == f"{facts['heads']} heads, {facts['kv_heads']} KV heads of {facts['head_size']}"
    status, out, err = run("graph", "-m", LLAMA)
    assert (status, err) == (0, "")
    vocab, d = facts["vocabulary"], facts["hidden_size"]
    assert out.startswith(f"x[n,{d}]:f32 = embedding(input_ids[n]:i32, embed_tokens[{vocab},{d}]:f32)\n")
    assert out.splitlines()[-1].startswith(f"logits[r,{vocab}]:f32 = linear(norm.out, lm_head[{vocab},{d}]:f32)")
    assert out.count("page_table[b,M]:i32") == 1  # a shape stands where the value is first named
    assert out.count("page_table") == facts["layers"]
    fused = run("graph", "-m", LLAMA, "--fused")[1]
    assert re.search(r"^0\.qkv_proj\.out\[n,\d+\]:f32 = rms_norm_linear\(x, .*\n    0\.attn_norm\.out\[n,", fused, re.M)
    assert fused.splitlines()[-1] == "    logits = linear(norm.out, lm_head) U=f32"
    assert out.count("= attention(") == json.loads((LLAMA_FOLDER / "config.json").read_text())["num_hidden_layers"]


def test_info_and_graph_of_a_model_with_experts(run: Run) -> None:
    folder = str(GOLDEN / "glm4-moe")
    facts = json.loads(run("info", "-m", folder, "--json")[1])
    assert facts["experts"] == {
        "count": 12, "per_token": 3, "size": 20, "shared_size": 40, "layers": 1, "mlp_layers": 1
    }  # fmt: skip
    assert facts["parameters"] - facts["active_parameters"] == (12 - 3) * 3 * 20 * 32
    assert facts["bytes_by_part"]["experts"] == 4 * 12 * 3 * 20 * 32
    shown = dict(re.split("  +", line, maxsplit=1) for line in run("info", "-m", folder)[1].splitlines())
    assert shown["parameters"].endswith(f", of which a token uses {facts['active_parameters']:,}")
    assert shown["feed-forward size"] == (
        "3 of 12 experts of 20 and one of 40 for each token in 1 of 2 layers; 40 in 1 of 2 layers"
    )
    out = run("graph", "-m", folder)[1]
    assert "1.experts.pairs[3*n]:i32, 1.experts.offsets[13]:i32 = sort_pairs(1.experts.chosen) E=12" in out
    assert "1.router.correction[12]:f32" in out


@pytest.mark.parametrize(
    ("case", "attention", "positions"),
    [
        ("gemma3", "4 heads, 2 KV heads of 16", "RoPE (default, theta 50) in 2 of 3 layers, RoPE (linear, theta 1,000)"
         " in 1 of 3 layers, sliding window of 8 in 2 of 3 layers"),
        ("cohere2", "4 heads, 1 KV head of 8", "RoPE (default, theta 50,000) in 3 of 4 layers, none in 1 of 4 layers,"
         " sliding window of 8 in 3 of 4 layers"),
        ("gemma4-shared", "4 heads, 2 KV heads of 16 in 3 of 5 layers, 2 KV heads of 24 in 2 of 5 layers, those of"
         " other layers in 2 of 5 layers", "RoPE (default, theta 50) in 3 of 5 layers, RoPE (proportional, theta 1,000)"
         " in 2 of 5 layers, sliding window of 8 in 3 of 5 layers"),
        ("phi", "3 heads, 3 KV heads of 16", "RoPE (default, theta 10,000) on 6 of 16 dims"),
        ("mistral-window", "2 heads, 1 KV head of 16", "RoPE (default, theta 10,000), sliding window of 8"),
        ("gpt2", "4 heads, 4 KV heads of 8", "learned"),
    ],
)  # fmt: skip
def test_positions_say_which_layers_have_what(run: Run, case: str, attention: str, positions: str) -> None:
    status, out, _ = run("info", "-m", str(GOLDEN / case))
    shown = dict(re.split("  +", line, maxsplit=1) for line in out.splitlines())
    assert (status, shown["attention"], shown["positions"]) == (0, attention, positions)


def test_the_graph_of_a_training_step_has_a_gradient_for_every_weight(run: Run) -> None:
    status, out, err = run("graph", "-m", LLAMA, "--training")
    assert (status, err) == (0, "")
    weights = set(re.findall(r"[ (]((?:\d+\.)?\w+)\[[\d,]+\]:f32", out)) - {"total"}
    layers = json.loads((LLAMA_FOLDER / "config.json").read_text())["num_hidden_layers"]
    assert {f"{layers - 1}.down_proj", "embed_tokens", "norm"} <= weights
    for name in ("embed_tokens", "lm_head", "norm", "0.attn_norm", f"{layers - 1}.gate_up_proj"):
        assert re.search(rf"^(\S+, )?grad\.{re.escape(name)}[\[ ,]", out, re.M), name
    assert "slice_rows(norm.out) first=0 r=n\n" in out
    assert "1009" not in out  # what stands for n
    assert run("graph", "-m", LLAMA, "--training", "--fused")[0] == 2


def test_the_letters_of_graph_are_explained(run: Run) -> None:
    help_ = run("graph", "--help")[1]
    assert re.findall(r"^  ([a-zA-Z])  \w", help_, re.M) == list(LETTERS)


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


def test_info_shows_what_texts_meet(run: Run, fails: Fails, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Tokenizer, template and sampling defaults; a folder without them says so."""
    shutil.copytree(CHARS, tmp_path, dirs_exist_ok=True)
    found = json.loads(run("info", "-m", CHARS, "--json")[1])
    assert found["tokenizer"] == {"kind": "WordLevel", "size": 65, "bos": None, "eos": None}
    assert (found["chat_template"], found["template_variables"], found["sampling_defaults"]) == (False, [], {})
    shown = dict(re.split("  +", line, maxsplit=1) for line in run("info", "-m", CHARS)[1].splitlines())
    assert shown["tokenizer"] == "WordLevel of 65 tokens, BOS none, EOS none"
    assert (shown["chat template"], shown["sampling defaults"]) == ("none", "greedy")
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{% if thinking %}...{% endif %}")
    settings = {"do_sample": True, "temperature": 0.6, "top_k": 20, "eos_token_id": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    found = json.loads(run("info", "-m", str(tmp_path), "--json")[1])
    assert found["template_variables"] == ["thinking"]
    assert (found["chat_template"], found["sampling_defaults"]) == (True, {"temperature": 0.6, "top_k": 20})
    shown = dict(re.split("  +", line, maxsplit=1) for line in run("info", "-m", str(tmp_path))[1].splitlines())
    assert (shown["chat template"], shown["sampling defaults"]) == (
        "yes; it also reads thinking",
        "temperature 0.6, top_k 20",
    )
    assert shown["stop tokens"].startswith("3 ")
    assert "tokenizer " not in run("info", "-m", "llama-3.2-1b")[1]  # a shape has none
    (tmp_path / "generation_config.json").write_text('{"num_beams": 4, "stop_strings": ["A:", "B:"]}')
    assert "greedy, stop 'A:', 'B:'\n" in run("info", "-m", str(tmp_path))[1]
    assert json.loads(run("info", "-m", str(tmp_path), "--json")[1])["sampling_defaults"] == {"stop": ["A:", "B:"]}
    assert "num_beams = 4 is not supported and is left out" in caplog.text  # as loading says it
    (tmp_path / "generation_config.json").write_text('{"top_p": 2}')
    assert "top_p = 2 is out of range" in fails("info", "-m", str(tmp_path))


def test_info_says_what_memory_a_model_needs(run: Run) -> None:
    """As the engine plans it: weights and cache, and on a GPU its workspace as well."""
    known = json.loads(run("info", "-m", "llama-3.2-1b", "--json")[1])
    assert known["numpy_bytes"] == 2 * (known["weight_bytes"] + known["cache_bytes"])  # float32 of bfloat16
    extra = known["gpu_bytes"] - known["weight_bytes"] - known["cache_bytes"]
    assert 160 << 20 < extra < 1 << 30


def test_the_numbers_of_quantised_weights_need_room_on_a_gpu(run: Run) -> None:
    """That of the largest matrix, which is unpacked for a product over many rows."""
    plain, int8 = (json.loads(run("info", "--json", *more)[1])["gpu_bytes"] for more in ((), ("--quantize", "int8")))
    config = load_config(find_model(None))
    weights = load_weights(find_model(None), config)
    rounded = round_weights(weights, config, "int8")
    names, bf16 = linear_weights(config), DTYPES["bf16"]
    less = sum(weights[n].device_bytes(bf16) - rounded[n].device_bytes(bf16) for n in names)
    assert int8 - plain + less == largest_slice({n: weights[n].shape for n in names}, 2) > 10**6


def test_info_shows_the_stop_tokens_that_the_model_uses(tmp_path: Path) -> None:
    """The union of config and generation_config, without ids that a larger vocabulary left behind."""
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "llama2", folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 100000]}', encoding="utf-8")
    with cuplama.load(folder, device="numpy") as model:
        assert 3 in model.stop_ids
        assert [t["id"] for t in facts(folder, model.config)["stop_tokens"]] == sorted(model.stop_ids)
        assert max(model.stop_ids) < model.config.vocab_size


def test_info_of_a_gguf_file(run: Run) -> None:
    """Formats by the names that people know, and what the file says of everything else."""
    path = DATA / "gguf" / "llama-k.gguf"
    found = json.loads(run("info", "-m", str(path), "--json")[1])
    assert (found["folder"], found["weights_found"], found["head_tied"]) == (str(path), True, False)
    assert (found["architecture"], found["layers"], found["rotations"][0]["type"]) == ("LlamaForCausalLM", 1, "default")
    formats = found["weight_formats"]
    assert formats["Q4_K + Q5_K"] == {"elements": 2 * 256 * 256, "bits": 5.0}  # of gate and up
    assert formats["Q6_K"]["bits"] == 6.5625
    assert sum(f["elements"] for f in formats.values()) == found["parameters"]
    assert found["tokenizer"] is None
    status, out, err = run("info", "-m", str(path))
    assert (status, err) == (0, "")
    assert "Q6_K: " in out


def test_info_of_the_tokenizer_in_a_gguf_file(run: Run, tmp_path: Path) -> None:
    path = write_chars(tmp_path / "m.gguf", tokenizer__ggml__eos_token_id=3, tokenizer__chat_template="{{ messages }}")
    found = json.loads(run("info", "-m", str(tmp_path), "--json")[1])
    assert found["folder"] == str(path)
    assert found["tokenizer"] == {"kind": "BPE", "size": 65, "bos": None, "eos": {"id": 3, "text": "$"}}
    assert found["chat_template"] is True
    assert found["stop_tokens"] == [{"id": 3, "text": "$"}]
