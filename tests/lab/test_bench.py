"""``cuplama bench`` on NumPy and on a stand-in GPU: what is counted, how it is shown, and that it runs."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from cuplama.backends.cuda.backend import CudaBackend
from cuplama.backends.numpy import NumPyBackend
from cuplama.cli.main import cli
from cuplama.dtypes import DTYPES
from cuplama.errors import ConfigError, DeviceError, ParameterError
from cuplama.lab import bench, peaks, report
from cuplama.lab.cold_start import cold_start
from cuplama.lab.dummy import Source, dummy_model
from cuplama.lab.peaks import Peaks
from cuplama.lab.random_weights import random_weight
from cuplama.lab.timing import Spread
from cuplama.lab.trials import Runs, Trial, step_bytes
from cuplama.models.config import parse_config
from cuplama.models.presets import SHAPES, find_shape
from cuplama.ops.launch import Device
from tests.fakes import FakeGpu, HostCublas
from tests.lab.common import TINY, inside, needs_matplotlib
from tests.paths import DATA

PEAKS = Peaks(read=1e9, arithmetic=1e12, dtype="f32")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


# ---- shapes and weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SHAPES))
def test_known_shapes_are_those_of_the_published_configs(name: str, shared: Path) -> None:
    path = shared / "configs" / name / "config.json"
    published = json.loads((path if path.exists() else DATA / "configs" / f"{name}.json").read_text())
    ours, theirs = parse_config(SHAPES[name]), parse_config(published)
    for field in ("architecture", "vocab_size", "hidden_size", "intermediate_size", "layers", "num_heads",
                  "num_kv_heads", "head_dim", "eps", "context", "activation", "flags", "dtype"):  # fmt: skip
        # gpt-oss' config does not say its dtype, as weights of 4 bits do not need; random ones do.
        quantised = "quantization_config" in published
        said = "bfloat16" if field == "dtype" and quantised else getattr(theirs, field)
        assert getattr(ours, field) == said, field
    assert ours.head_is_tied == theirs.head_is_tied


def test_a_folder_wins_over_a_known_name_and_an_unknown_name_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "gpt2").mkdir()
    (folder / "gpt2" / "config.json").write_text(json.dumps(TINY))
    monkeypatch.chdir(folder)
    assert find_shape("gpt2")[1].hidden_size == 32
    assert find_shape("llama-3.2-1b")[1].hidden_size == 2048
    with pytest.raises(ConfigError, match=r"'llama-9'.*llama-3\.1-8b"):
        find_shape("llama-9")


def test_random_weights_are_all_there_in_pieces_and_repeat() -> None:
    weight = random_weight("w", (5000, 2000), DTYPES["bf16"], centre=1.0)
    pieces = list(weight.chunks(1 << 22))
    assert [at for at, _ in pieces] == list(np.cumsum([0] + [p.size for _, p in pieces[:-1]]))
    assert sum(p.size for _, p in pieces) == 10_000_000
    assert max(p.nbytes for _, p in pieces) <= 1 << 22
    values = weight.array().astype(np.float32)
    assert values.shape == (5000, 2000)
    assert values.mean() == pytest.approx(1, abs=1e-3)
    assert values.std() == pytest.approx(0.02, rel=0.05)
    assert len({row.tobytes() for row in values}) == 5000


def test_a_dummy_model_ties_its_head_and_runs(folder: Path) -> None:
    with dummy_model(str(folder), "numpy", "auto", 64, 64) as model:
        values = model.engine.runner.values
        assert values["lm_head"] is values["embed_tokens"]
        assert model.backend.dtype == np.float32
        assert abs(float(values["0.attn_norm"].mean()) - 1) < 0.05
        assert abs(float(values["0.qkv_proj"].mean())) < 0.05
        assert len(model.generate([1, 2, 3], max_tokens=5, ignore_eos=True).tokens) == 5


# ---- what is counted -------------------------------------------------------------------------------------------------


def test_spread() -> None:
    spread = Spread((1.0, 2.0, 3.0, 10.0))
    assert (spread.mean, spread.median) == (4.0, 2.5)
    assert spread.std == pytest.approx(np.std([1, 2, 3, 10], ddof=1))
    assert spread.half_range == pytest.approx((4.75 - 1.75) / 2)
    assert Spread((3.0,)).std == 0


def test_rows_follow_from_the_times(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([*[(9.0, 9.0)] * 3, (0.5, 2.0), (0.7, 4.0)])  # three to warm up
    monkeypatch.setattr(Runs, "generation", lambda self, trial: next(times))
    prompts = iter([9.0, 9.0, 9.0, 0.25, 0.75])
    monkeypatch.setattr(Runs, "prompt", lambda self, trial: next(prompts))
    with dummy_model(str(folder), "numpy", "auto", 64, 64) as model:
        row = bench.measure(model, Trial(0, 8, 10, 2), 2, PEAKS)
        traffic = np.mean([step_bytes(model, 11 + i, 2) for i in range(8)])
        prompt = bench.measure(model, Trial(16, 0), 2, PEAKS)
    assert row["tokens_per_second"] == pytest.approx((8 + 4) / 2)
    assert row["tokens_per_second_std"] == pytest.approx(np.std([8, 4], ddof=1))
    assert row["ms_per_token"] == pytest.approx(3000 / 8)
    assert row["gigabytes_per_second"] == pytest.approx(traffic * 8 / 3 / 1e9)
    assert row["percent_of_read_bandwidth"] == pytest.approx(100 * traffic * 8 / 3 / 1e9)
    assert row["first_token_ms"] == pytest.approx(600)
    assert row["teraflops"] is None
    assert prompt["ms_per_token"] == pytest.approx(500 / 16)
    assert prompt["percent_of_matrix_rate"] == pytest.approx(100 * prompt["teraflops"])
    assert prompt["gigabytes_per_second"] is None
    assert list(row) == list(prompt)


# ---- peaks -----------------------------------------------------------------------------------------------------------


def test_peaks_on_numpy() -> None:
    found = peaks.measure(NumPyBackend(), probe=8 << 20, side=64, repeats=2)
    assert found.dtype == "f32"
    assert found.read > 1e8
    assert found.arithmetic > 1e7
    assert found.percent_read(found.read / 4) == pytest.approx(25)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> CudaBackend:
    """A backend whose kernels the emulator runs, and whose every call takes a second."""

    def timed(backend: Any, body: Any, repeats: int) -> Spread:
        body()
        return Spread((1.0,) * repeats)

    monkeypatch.setattr(peaks, "seconds", timed)
    backend = CudaBackend("bf16", gpu=FakeGpu(emulate=True, cublas=HostCublas()))
    backend.gpu.limits = Device(sms=1)
    monkeypatch.setattr(backend.gpu, "free_memory", lambda: 1 << 34, raising=False)
    return backend


def test_peaks_on_a_gpu(gpu: CudaBackend) -> None:
    found = peaks.measure(gpu, probe=1 << 16, side=16, repeats=2)
    assert found == Peaks(read=65536.0, arithmetic=2.0 * 16**3, dtype="bf16")


def test_a_reading_kernel_that_is_wrong_gives_no_peak(gpu: CudaBackend) -> None:
    gpu.gpu.emulate = False  # type: ignore[attr-defined]
    with pytest.raises(DeviceError, match=r"peaks\.cu computes a wrong sum"):
        peaks.measure(gpu, probe=1 << 16, side=16, repeats=1)


# ---- how it is shown -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [(4321.4, 3, "4321"), (0.012345, 3, "0.0123"), (99.96, 3, "100"), (0, 3, "0"), (1e-7, 2, "0.00000010")],
)
def test_significant(value: float, digits: int, shown: str) -> None:
    assert report.significant(value, digits) == shown


def test_tables() -> None:
    columns = (report.Column("name", "name"), report.Column("speed", "speed", 3, "std"))
    rows: list[dict[str, Any]] = [
        {"name": "a", "speed": 12.345, "std": 0.5},
        {"name": "bb", "speed": None, "std": None},
    ]
    assert report.render(columns, rows, "md").splitlines() == [
        "| name |      speed |",
        "|------|-----------:|",
        "| a    | 12.3 ± 0.5 |",
        "| bb   |          - |",
    ]
    assert json.loads(report.render(columns, rows, "json", {"x": 1})) == {"x": 1, "rows": rows}
    read = list(csv.DictReader(io.StringIO(report.render(columns, rows, "csv"))))
    assert read == [{"name": "a", "speed": "12.345", "std": "0.5"}, {"name": "bb", "speed": "", "std": ""}]


def _invoke(*args: str) -> Any:
    return CliRunner().invoke(cli, ["bench", "--device", "numpy", "--no-cold-start", *args])


FIELDS = [
    "model", "dtype", "test", "prompt_tokens", "generated_tokens", "depth", "batch", "repeats", "tokens_per_second",
    "tokens_per_second_std", "ms_per_token", "first_token_ms", "first_token_ms_std", "gigabytes_per_second",
    "percent_of_read_bandwidth", "teraflops", "percent_of_matrix_rate",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "_HOST_PROBE", 1 << 20)


def test_command(folder: Path) -> None:
    args = ["-m", str(folder), "--dummy-weights", "-p", "8", "-n", "4", "-d", "0,70", "-b", "1,2", "-r", "2"]
    done = _invoke(*args, "-o", "json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [r["test"] for r in found["rows"]] == [
        "pp8", "pp8 b2", "pp8 @ d70", "pp8 @ d70 b2", "tg4", "tg4 b2", "tg4 @ d70", "tg4 @ d70 b2"
    ]  # fmt: skip
    for row in found["rows"]:
        assert list(row) == FIELDS
        assert row["tokens_per_second"] > 0
        assert row["repeats"] == 2
    assert found["environment"].keys() >= {"model", "device", "dtype", "cuplama", "numpy", "python", "date"}
    assert found["environment"]["weights"] == "random"
    assert found["peaks"].keys() == {"read_gigabytes_per_second", "matrix_teraflops", "matrix_dtype"}
    assert found["other_cores"] is None or found["other_cores"] >= 0
    assert "loading" in done.stderr
    assert "pp8 @ d70" in done.stderr


def test_a_busy_machine_is_named_below_the_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["-m", str(folder), "--dummy-weights", "-p", "0", "-n", "2", "-r", "1"]
    for cores, said in ((0.0, False), (1.5, True), (None, False)):
        monkeypatch.setattr("cuplama.lab.busy.Others.cores", lambda _, cores=cores: cores)
        assert ("\nthe machine was busy: other processes used 1.5 of " in _invoke(*args).stdout) == said


def test_markdown_and_csv(folder: Path) -> None:
    args = ["-m", str(folder), "--dummy-weights", "-p", "0", "-n", "2", "-r", "1"]
    lines = _invoke(*args).stdout.splitlines()
    assert lines[0].startswith("$ cuplama")
    assert lines[2].startswith(f"model {folder}")
    assert lines[3].startswith("measured peaks: read ")
    assert lines[5].startswith("| test ")
    assert lines[7].startswith("| tg2 ")
    assert list(next(csv.DictReader(io.StringIO(_invoke(*args, "-o", "csv").stdout)))) == FIELDS


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-p", "12,x"], "'12,x' is not a list"),
        (["-b", "0"], "'0' is not a list"),
        (["-p", "0", "-n", "0"], "nothing to measure"),
        (["-m", "llama-3.2-1b"], "add --dummy-weights"),
        (["--dummy-weights"], "needs -m"),
        (["-m", "nonsense", "--dummy-weights"], "known shapes"),
    ],
)
def test_refusals(args: list[str], message: str) -> None:
    done = _invoke(*args)
    assert done.exit_code != 0
    assert message in f"{done.output} {done.exception}"


@needs_matplotlib
def test_a_picture_is_drawn(folder: Path) -> None:
    args = ["-m", str(folder), "--dummy-weights", "-p", "8", "-n", "2", "-r", "1", "--plot", str(folder / "out.png")]
    done = _invoke(*args)
    assert done.exit_code == 0, done.output
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ParameterError, match="cannot write"):
        report.save_figure(report.new_figure(1, 1), folder / "absent" / "x.png")


@needs_matplotlib
@pytest.mark.parametrize(("prompts", "steps"), [(2, 2), (0, 3), (1, 0)])
def test_labels_of_bars_lie_inside_the_axes(
    prompts: int, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long names of tests, speeds that scatter, and numbers of many digits."""

    def row(test: str, prompt: int, generated: int, speed: float) -> dict[str, Any]:
        shares = {"percent_of_read_bandwidth": 83.0, "percent_of_matrix_rate": 41.0}
        counts = {"prompt_tokens": prompt, "generated_tokens": generated}
        return {"test": test, **counts, "tokens_per_second": speed, "tokens_per_second_std": speed / 5, **shares}

    rows = [row(f"pp{512 << i}", 512, 0, 1e6 / (i + 1)) for i in range(prompts)]
    rows += [row("tg128 @ d32768 x64", 0, 128, 10.0 ** (2 + i)) for i in range(steps)]
    facts = {"model": "m", "device": "a GPU", "dtype": "bf16", "date": "2026-11-20"}
    figures: list[Any] = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: figures.append(figure))
    bench.plot({"environment": facts, "rows": rows}, tmp_path / "x.png")
    figures[0].canvas.draw()
    assert len(figures[0].axes) == (prompts > 0) + (steps > 0)
    for ax in figures[0].axes:
        assert len(ax.texts) in (prompts, steps)
        inside(ax, ax.texts)


def test_a_picture_needs_matplotlib(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    done = _invoke("--plot", str(folder / "x.png"))
    assert isinstance(done.exception, ParameterError)
    assert "pip install 'cuplama[plot]'" in str(done.exception)


def test_cold_start(folder: Path) -> None:
    found = cold_start(Source(str(folder), dummy=True, device="numpy"))
    parts = [v for k, v in found.items() if k != "total_seconds"]
    names = ("total", "start", "import", "load", "compile", "first_token")
    assert list(found) == [f"{name}_seconds" for name in names]
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(found["total_seconds"])
    assert 0.05 < found["total_seconds"] < 30


def test_a_cold_start_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"cold start failed: .*config\.json does not exist"):
        cold_start(Source(str(tmp_path), device="numpy"))
