"""The kernel inventory: every instance that something launches is in it, and what the compiler says is judged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cuplama.backends.cuda.nvrtc import compile_program
from cuplama.backends.cuda.toolkit import ARCHS, shared_limit
from cuplama.engine.graphs import padded_rows, padded_sequences
from cuplama.folders import source_folder
from cuplama.lab import inventory
from cuplama.lab.check import planned
from cuplama.lab.inventory import compile_kernels, judge
from cuplama.lab.workloads import Workload, decode_workloads, prompt_workloads
from cuplama.models.presets import SHAPES, find_shape
from cuplama.ops import OPS
from cuplama.ops.abstract import abstract
from cuplama.ops.launch import Device
from cuplama.ops.prototypes import prototypes
from tests.backends.cuda.conftest import nvrtc, sources
from tests.lab.common import needed_once

__all__ = ["nvrtc", "sources"]


def _needed(arch: int) -> dict[str, dict[str, inventory.Need]]:
    """What is needed on a GPU of that architecture."""
    return needed_once(Device(arch=arch, shared=shared_limit(arch)))


def _workloads(model: str, arch: int) -> Iterator[Workload]:
    """What the engine runs of a known model: steps of several batch sizes, sampling included, and prompts.

    Products of many rows are planned as without a library.
    """
    config = find_shape(model)[1].every_kind()
    if config.num_layers == 1:  # the last layer is run otherwise than those before it
        config = replace(config, layers=config.layers * 2)
    dtype = "f16" if config.stored == "bf16" and arch < 80 else config.stored
    for batch in (1, 2, 3, 5, 7, 8, 9, 13, 40):
        yield from decode_workloads(config, dtype, padded_sequences(batch), 300)
    for tokens in (1, 130, 1000, 4096):
        yield from prompt_workloads(config, dtype, padded_rows(tokens))


@pytest.mark.parametrize("arch", [75, 90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 120))])
def test_every_instance_that_a_known_model_launches_is_there(arch: int) -> None:
    device = Device(arch=arch, shared=shared_limit(arch))
    found = _needed(arch)
    launched = {
        (launch.file, launch.expression)
        for model in SHAPES
        for workload in _workloads(model, arch)
        for launch in planned(workload, workload.ins, device, abstract)[0]
    }
    assert len(launched) > 100
    assert launched - {(file, e) for file, instances in found.items() for e in instances} == set()


def test_what_goes_with_a_product_of_the_library_is_there() -> None:
    """Qwen2.5 has a bias on its first product: in the model's dtype, where rows of it are filled before the product."""
    bias = _needed(90)["bias.cu"]
    assert {"fill_rows<bf16, bf16>", "fill_rows<bf16, f32>", "cast_bias<bf16, f32>"} <= bias.keys()
    products = {"linear", "linear_add", "rms_norm_linear", "silu_mul_linear_add", "gelu_tanh_mul_linear_add"}
    assert bias["cast_bias<bf16, f32>"].ops == products


def test_what_a_case_launches_may_be_left_out() -> None:
    ours, short = OPS["add"], replace(OPS["add"], compiled=lambda case: case["n"] > 10**9)
    assert inventory.needed(Device(), outside=[ours]).keys() == {"residual.cu"}
    assert inventory.needed(Device(), outside=[short]) == {}
    assert {case["D"] for case in OPS["self_attention"].cases} > {8, 16, 40, 64}
    heads = {e.split(", ")[1] for e in _needed(90)["attention_backward_fma.cu"]}
    assert heads == {"64", "96", "128", "256"}


def test_what_measures_the_machine_belongs_to_no_op() -> None:
    assert _needed(90)["peaks.cu"]["read_sum"] == inventory.Need()
    assert "peaks.cu" not in inventory.needed(Device(), ["add"])
    assert inventory.needed(Device(), ["add"]).keys() == {"residual.cu"}


def test_every_kernel_that_is_declared_is_compiled() -> None:
    """The cases and the shapes of real models reach every kernel of every file, on some generation of GPUs."""
    found = [_needed(arch) for arch in (80, 90)]
    for path in source_folder().glob("*.cu"):
        names = {e.split("<")[0] for instances in found for e in instances.get(path.name, {})}
        assert names == set(prototypes(path.name)), path.name


def test_bf16_is_not_compiled_below_sm_80() -> None:
    for arch, wanted in ((75, {"f16", "f32"}), (80, {"bf16", "f16", "f32"})):
        dtypes = {d for found in _needed(arch).values() for n in found.values() for d in n.dtypes}
        assert dtypes == wanted


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("arch", [75, 120])
def test_small_files_compile_cleanly_from_the_oldest_to_the_newest_arch(arch: int) -> None:
    results = compile_kernels([arch], ["norm", "residual", "bias", "embedding", "kv_cache"], workers=2)
    assert [r.problem for r in results if r.problem] == []
    assert {r.kernel for r in results} >= {"rms_norm", "layer_norm", "qk_norm", "add", "fill_rows", "kv_append"}
    assert all(r.resources is not None and 0 < r.resources.registers <= 255 for r in results)


@pytest.mark.skipif("CUPLAMA_COMPILE_ALL" not in os.environ, reason="minutes long; set CUPLAMA_COMPILE_ALL=1")
@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("arch", ARCHS)
def test_all_kernels_compile_cleanly(arch: int) -> None:
    results = compile_kernels([arch])
    assert [f"{r.expression}: {r.problem}" for r in results if r.problem] == []


@pytest.mark.usefixtures("sources")
def test_a_spill_is_a_problem_unless_a_reason_is_given() -> None:
    program = compile_program("test.cu", ["greedy<64>"], 90)
    (result,) = judge(program, {})
    assert result.problem is not None
    assert result.problem.startswith("spills ")
    assert result.resources is not None
    spilled = result.resources.spills
    (result,) = judge(program, {"greedy@90": (spilled, "because")})
    assert (result.problem, result.admitted) == (None, "because")
    for less in ({"greedy@90": (spilled - 1, "because")}, {"greedy@80": (spilled, "because")}):
        (result,) = judge(program, less)
        assert result.problem is not None


def test_a_warning_is_a_problem(sources: Path) -> None:
    path = sources / "test.cu"
    path.write_text(path.read_text().replace("float a[N];", "float a[N]; int unused;"))
    program = compile_program("test.cu", ["greedy<2>"], 90)
    problems = [r.problem for r in judge(program) if r.problem]
    assert len(problems) == 1
    assert "unused" in str(problems[0])


@pytest.mark.usefixtures("nvrtc")
def test_no_name_is_not_every_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "compile_program", lambda *_: pytest.fail("compiles"))
    assert compile_kernels([90], []) == []
