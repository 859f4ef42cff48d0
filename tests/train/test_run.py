"""Whole trainings of tiny models on NumPy, from files to folders."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuplama
from cuplama.errors import CheckpointError, ConfigError, CuplamaError, DeviceError, ParameterError, PromptError
from cuplama.models.checkpoint import open_tensors
from cuplama.train.checkpoint import Run, TrainingFolder
from cuplama.train.log import read_log
from cuplama.train.loop import Outcome, Report
from cuplama.train.run import Hooks, Job, run_training
from cuplama.train.settings import TrainingSettings
from tests.paths import GOLDEN
from tests.train.made import write_config, write_tokenizer

QUANTISED = GOLDEN.parent / "quantised"
TEXT = "the cat sat on the mat.\n" * 40
Make = Callable[..., Job]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuplama.train.run.draw_losses", lambda folder: None)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A job of a new model; settings and fields of the job by name."""
    (tmp_path / "text.txt").write_text(TEXT)
    config, tokenizer = write_config(tmp_path / "config.json"), write_tokenizer(tmp_path / "t", eos="</s>")

    def job(out: str = "out", **given: Any) -> Job:
        fields = {k: given.pop(k) for k in Job.__dataclass_fields__.keys() & given.keys()}
        settings = {"steps": 6, "batch_size": 2, "context": 16, "lr": 1e-2, "seed": 3, "device": "numpy", **given}
        values = {"config": config, "tokenizer": tokenizer, "data": [tmp_path / "text.txt"], **fields}
        return Job(settings=TrainingSettings(**settings), out=tmp_path / out, **values)

    return job


def run(job: Job, stop_after: int = 0, notes: list[str] | None = None) -> Outcome:
    steps: list[Report] = []
    hooks = Hooks(
        report=steps.append,
        note=(notes if notes is not None else []).append,
        stop=lambda: 0 < stop_after <= len(steps) + 1,
    )
    return run_training(job, hooks)


def tensors(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.array(t.data) for name, t in open_tensors(folder).items()}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_log(folder / "log.jsonl")]


def same_bits(a: Path, b: Path) -> bool:
    x, y = tensors(a), tensors(b)
    state = [(f / "training" / "state.safetensors").read_bytes() for f in (a, b)]
    return x.keys() == y.keys() and all(np.array_equal(x[n], y[n]) for n in x) and state[0] == state[1]


def test_a_new_model_learns_and_is_loaded(make: Make) -> None:
    job = make(steps=30, evaluation=make().data, eval_every=10)
    assert run(job) == Outcome(30, False)
    found = rows(job.out)
    assert [row["step"] for row in found] == list(range(1, 31))
    assert found[0]["loss"] == pytest.approx(np.log(48), rel=0.05)
    assert found[-1]["loss"] < 0.8 * found[0]["loss"]
    assert [row["step"] for row in found if "eval_loss" in row] == [10, 20, 30]
    assert all(row["positions"] == 32 for row in found)
    config = json.loads((job.out / "config.json").read_text())
    assert {k: config[k] for k in ("torch_dtype", "tie_word_embeddings", "bos_token_id", "eos_token_id")} == {
        "torch_dtype": "float32", "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 35,
    }  # fmt: skip
    assert "lm_head.weight" not in tensors(job.out)
    with cuplama.load(job.out, device="numpy") as model:
        ids = model.encode(TEXT[:40])
        logits = model.logits(ids)
        nats = -np.log(np.exp(logits[:-1]).T / np.exp(logits[:-1]).sum(-1)).T[np.arange(len(ids) - 1), ids[1:]]
        assert nats.mean() == pytest.approx(found[-1]["eval_loss"], rel=0.2)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(make: Make) -> None:
    for out in ("a", "b"):
        run(make(out))
    run(make("c", seed=4))
    folder = make().out.parent
    assert same_bits(folder / "a", folder / "b")
    assert rows(folder / "a") == rows(folder / "b")
    assert not same_bits(folder / "a", folder / "c")


@pytest.mark.parametrize("stop_after", [1, 4])
@pytest.mark.parametrize("more", [{}, {"accumulate": 2, "dropout": 0.1, "warmup": 2}])
def test_resuming_is_bit_identical_to_never_stopping(make: Make, stop_after: int, more: dict[str, Any]) -> None:
    run(whole := make("whole", **more, save_every=2))
    part = make("part", **more)
    assert run(part, stop_after) == Outcome(stop_after, True)
    assert run(replace(part, resume=True)) == Outcome(6, False)
    assert rows(whole.out) == rows(part.out)
    assert same_bits(whole.out, part.out) == (whole.settings == part.settings)
    assert all(np.array_equal(x, tensors(part.out)[n]) for n, x in tensors(whole.out).items())


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run(whole := make("whole", save_every=2))
    part = make("part", save_every=2)

    class Killed(BaseException):
        """Nothing that any code catches."""

    def killed(report: Report) -> None:
        if report.step == 5:
            raise Killed

    with pytest.raises(Killed):
        run_training(part, Hooks(report=killed))
    assert len(rows(part.out)) == 5
    (part.out / "model.safetensors").unlink()  # the state alone is enough
    run(replace(part, resume=True))
    assert rows(whole.out) == rows(part.out)
    assert same_bits(whole.out, part.out)


def test_resume_where_nothing_was_saved_yet_and_where_all_is_done(make: Make) -> None:
    notes: list[str] = []
    job = replace(make(), resume=True)
    run(job, notes=notes)
    assert notes.pop().endswith("has no checkpoint yet; the training begins with step 1")
    before = (job.out / "model.safetensors").stat().st_mtime_ns
    assert run(job, notes=notes) == Outcome(6, False)
    assert notes.pop().endswith("has all 6 steps; there is nothing to do")
    assert (job.out / "model.safetensors").stat().st_mtime_ns == before
    longer = replace(job, settings=replace(job.settings, steps=8))
    assert run(longer, notes=notes) == Outcome(8, False)
    assert notes.pop().startswith("the run had 6 steps and now has 8")


def test_other_settings_data_or_models_do_not_go_on(make: Make, tmp_path: Path) -> None:
    run(job := make())
    with pytest.raises(CheckpointError, match="has a checkpoint; --resume goes on from it"):
        run(job)
    again = replace(job, resume=True)
    with pytest.raises(CheckpointError, match=r"lr = 0\.01, not 0\.02"):
        run(replace(again, settings=replace(job.settings, lr=0.02, steps=9)))
    write_config(tmp_path / "config.json", rope_theta=5000.0)
    with pytest.raises(CheckpointError, match="was trained from another model"):
        run(replace(again, settings=replace(job.settings, steps=9)))
    (tmp_path / "text.txt").write_text(TEXT + "!")
    with pytest.raises(CheckpointError, match=r"text\.txt is not what the training began with"):
        run(again)


def test_a_trained_model_goes_on_and_keeps_its_files(make: Make, tmp_path: Path) -> None:
    run(first := make("first"))
    (first.out / "chat_template.jinja").write_text("{{ messages[0].content }}")
    job = make("second", model=first.out, config=None, tokenizer=None, dtype="bfloat16")
    run(job)
    assert json.loads((job.out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (job.out / "chat_template.jinja").exists()
    assert (job.out / "tokenizer_config.json").read_text() == (first.out / "tokenizer_config.json").read_text()
    assert not (job.out / "README.md").exists()
    old, new = tensors(first.out), tensors(job.out)
    assert old.keys() == new.keys()
    assert all(x.dtype.name == "bfloat16" for x in new.values())
    assert 0 < np.abs(old["model.norm.weight"] - new["model.norm.weight"].astype(np.float32)).max() < 0.5
    shutil.rmtree(first.out / "training")
    with pytest.raises(CheckpointError, match="nothing was trained there"):  # it would be overwritten
        run(replace(job, out=first.out))


def test_chats_are_learned_by_their_answers(make: Make, tmp_path: Path) -> None:
    template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    tokenizer = write_tokenizer(tmp_path / "chat", eos="</s>", template=template)
    messages = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "def"}]
    (tmp_path / "chats.jsonl").write_text(
        json.dumps({"messages": messages}) + "\n" + json.dumps({"messages": messages})
    )
    job = make(tokenizer=tokenizer, data=[tmp_path / "chats.jsonl"], context=9)
    run(job)
    assert (job.out / "tokenizer_config.json").read_text() == (tokenizer.parent / "tokenizer_config.json").read_text()
    assert {row["positions"] for row in rows(job.out)} <= set(range(2, 15))


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(make: Make) -> None:
    run(good := make("good", lr=1e-2), stop_after=2)
    job = make("bad", lr=1e30, grad_clip=0, schedule="constant")
    with pytest.raises(DeviceError, match=r"step \d: .* is (nan|inf); nothing was saved"), np.errstate(all="ignore"):
        run(job)
    assert not (job.out / "model.safetensors").exists()
    assert (good.out / "model.safetensors").exists()


def test_weights_that_are_not_finite_are_not_saved(make: Make) -> None:
    """The loss of the step before them was."""
    job = make(steps=1, lr=3e38, schedule="constant")
    with (
        np.errstate(all="ignore"),
        pytest.raises(CheckpointError, match=r"step 1 has left weights .* nothing is saved"),
    ):
        run(job)
    assert not (job.out / "model.safetensors").exists()
    run(job := make("other"), stop_after=2)
    state = job.out / "training" / "state.safetensors"
    before = state.read_bytes()
    with TrainingFolder(job.out, resume=True) as folder:
        folder._step = 2
        arrays = {"master": np.array([1, np.nan], np.float32)}
        with pytest.raises(CheckpointError, match=r"not finite; the checkpoint of step 2 stays"):
            folder.save(3, arrays, Run(job.settings, "d", "m", 16), lambda staging: None)
    assert state.read_bytes() == before


def test_a_full_disk_keeps_the_last_checkpoint(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run(job := make(), stop_after=2)
    before = (job.out / "model.safetensors").read_bytes()
    calls, sync = [], os.fsync

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device; the checkpoint of step 2 is whole"):
        run(replace(job, resume=True))
    monkeypatch.undo()
    assert (job.out / "model.safetensors").read_bytes() == before
    monkeypatch.setattr("cuplama.train.run.draw_losses", lambda folder: None)
    assert run(replace(job, resume=True)) == Outcome(6, False)


def test_what_is_refused_before_anything_is_made(make: Make, tmp_path: Path) -> None:
    def said(error: type[CuplamaError], **given: Any) -> str:
        job = make("nowhere", **given)
        with pytest.raises(error) as caught:
            run(job)
        assert not job.out.exists()
        return str(caught.value)

    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt is empty" in said(PromptError, data=[tmp_path / "empty.txt"])
    assert "nothing.txt does not exist" in said(PromptError, evaluation=[tmp_path / "nothing.txt"])
    small = write_config(tmp_path / "small.json", vocab_size=20)
    assert "vocab_size = 20 is less than the 37 tokens" in said(ConfigError, config=small)
    quantised = write_config(tmp_path / "q.json", quantization_config={"quant_method": "awq"})
    assert "the weights of a new model are not quantised" in said(ConfigError, config=quantised)
    assert "is a folder; a new model is made from a file" in said(ConfigError, config=tmp_path)
    assert said(ParameterError, lora=2).startswith("lora trains adapters of a model that was trained before")
    trained = {"config": None, "tokenizer": None, "model": GOLDEN / "llama3-gqa"}
    assert "tokenizer.json does not exist" in said(CuplamaError, **trained)
    assert "batch_size = 200000000 rows of 16 tokens are more than" in said(ParameterError, batch_size=200_000_000)
    learned = write_config(tmp_path / "gpt2.json", **json.loads((GOLDEN / "gpt2-char" / "config.json").read_text()))
    assert "context = 81 is more than the 80 positions" in said(ParameterError, config=learned, context=81)


def test_ids_of_a_config_that_are_letters_are_left_out(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = write_config(tmp_path / "ids.json", bos_token_id=1, eos_token_id=2)
    run(job := make(config=config))
    assert [m.partition("ids.json: ")[2] for m in caplog.messages[:2]] == [
        "bos_token_id = 1 is ' ', no special token, and is left out",
        "eos_token_id = 2 is 'a', no special token, and is left out",
    ]
    written = [json.loads((job.out / f"{name}.json").read_text()) for name in ("config", "generation_config")]
    assert [(w["bos_token_id"], w["eos_token_id"]) for w in written] == [(None, 35)] * 2


def test_too_little_data_is_refused_with_both_numbers(make: Make, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("a" * 17)
    run(make("enough", data=[tmp_path / "few.txt"]))
    (tmp_path / "few.txt").write_text("a" * 16)
    with pytest.raises(PromptError, match="the data has 16 tokens, and a row of 16 needs 17"):
        run(make("short", data=[tmp_path / "few.txt"]))


def test_adapters_are_trained_saved_and_resumed(make: Make) -> None:
    run(base := make("base"))
    before = tensors(base.out)
    given = {"config": None, "tokenizer": None, "model": base.out, "model_name": "org/base", "lora": 2}
    whole, part = make("whole", **given), make("part", **given)
    run(whole)
    run(part, stop_after=3)
    run(replace(part, resume=True))
    names = {p.name for p in whole.out.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "data", "training", "log.jsonl"}
    said = json.loads((whole.out / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["base_model_name_or_path"]) == (2, 4, "org/base")
    files = [(f.out / "adapter_model.safetensors").read_bytes() for f in (whole, part)]
    assert files[0] == files[1]
    assert all(np.array_equal(array, tensors(base.out)[name]) for name, array in before.items())
    with cuplama.load(base.out, device="numpy") as plain:
        first = plain.logits([1, 2, 3])
    with cuplama.load(base.out, device="numpy", adapter=whole.out) as adapted:
        assert np.abs(adapted.logits([1, 2, 3]) - first).max() > 1e-4
    with pytest.raises(ParameterError, match=r"lora_targets: 'x_proj' is no linear layer"):
        run(make("other", **given, lora_targets=["x_proj"]))


def test_a_quantised_model_trains_adapters_alone(make: Make, tmp_path: Path) -> None:
    shutil.copytree(QUANTISED / "gptq", model := tmp_path / "gptq")
    write_tokenizer(model, eos="</s>")
    given = {"config": None, "tokenizer": None, "model": model}
    with pytest.raises(ParameterError, match=r"gptq is quantised \(.*\): only adapters of it can be trained"):
        run(make("full", **given))
    run(job := make("out", **given, lora=1))
    assert rows(job.out)[-1]["loss"] < rows(job.out)[0]["loss"]


def test_teachers_need_the_same_vocabulary(make: Make) -> None:
    run(teacher := make("teacher"))
    run(job := make("student", teachers=[teacher.out]))
    assert rows(job.out)[0]["loss"] > 0
    with pytest.raises(ParameterError, match="has a vocabulary of 65 tokens, the model one of 48"):
        run(make("other", teachers=[GOLDEN / "gpt2-char"]))
    path = teacher.out / "tokenizer.json"
    path.write_text(path.read_text().replace("<sep>", "<cut>"))
    with pytest.raises(ParameterError, match="has '<cut>' for token 36, the model '<sep>'; both"):
        run(make("third", teachers=[teacher.out]))
