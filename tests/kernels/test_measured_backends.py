"""Which backend runs where nobody asks for one, on a GPU with a table of what measured faster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu.backend_table import write
from dfs_kernels import (
    PackedConvWeight,
    backend_info,
    backends,
    gated_block,
    mixed_conv2d,
    use_backend,
)
from dfs_kernels.backends import cuda, cuda_bits, measured, triton
from dfs_kernels.backends.measured import BackendTable, ConvProblem
from dfs_kernels.geometry import ConvGeometry
from tests.kernels.op_calls import calls_of
from tests.kernels.test_gated_block import BlockCase, make_arguments

NAME = "NVIDIA Test 9000"
DEVICE = torch.device("cuda", 0)
SOURCE = {"commit": "0123abc", "command": "bench/gpu_check.sh tune bench"}
CONV = ConvGeometry(6, 6, 3, 3, pad_left=1, pad_right=1, pad_top=1, pad_bottom=1)
KEY = "6x5x4>6x5x4/3x3"
SECONDS = {
    KEY: {1: {"cuda": 3e-6, "triton": 5e-6}, 64: {"cuda": 9e-6, "triton": 4e-6}},
    "other": {8: {"cuda": 1e-6, "triton": 2e-6}},
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A GPU on which both backends run, with a folder for tables."""

    def takes(module: ModuleType) -> None:
        monkeypatch.setattr(module, "unavailable_reason", lambda: None)
        monkeypatch.setattr(module, "supports", lambda kind, options: kind == "cuda")

    takes(cuda)
    takes(triton)
    monkeypatch.setattr(measured, "TABLES", tmp_path)
    monkeypatch.setattr(measured, "_cuda_name", lambda index: NAME)
    measured.forget()
    yield tmp_path
    measured.forget()


def plant(folder: Path, **changes: Any) -> None:
    content = {**BackendTable(NAME, SOURCE, SECONDS).to_json(), **changes}
    (folder / "test-9000.json").write_text(json.dumps(content))


def chosen(batch: int = 1, geometry: ConvGeometry = CONV, options: Any = (2, 4, 8)) -> str:
    problem = ConvProblem(geometry, 5, 4, batch)
    return backends.select_name("mixed_conv2d", None, DEVICE, options, problem)


def test_without_a_table_triton_runs(gpu: Path) -> None:
    assert chosen() == "triton"


def test_the_faster_one_runs_in_each_batch_bucket(gpu: Path) -> None:
    plant(gpu)
    assert [chosen(batch) for batch in (0, 1, 2, 64, 65, 4000)] == ["cuda"] * 2 + ["triton"] * 4


def test_a_candidate_runs_where_the_table_names_it_only(
    gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_bits, "unavailable_reason", lambda: None)
    monkeypatch.setattr(cuda_bits, "supports", lambda kind, options: kind == "cuda")
    assert chosen() == "triton"
    plant(gpu, seconds={KEY: {"1": {"cuda": 3e-6, "triton": 5e-6, "cuda-bits": 2e-6}}})
    measured.forget()
    assert chosen() == "cuda-bits"
    assert "cuda at 0, triton at 0, cuda-bits at 1, triton at all" in measured.describe(
        DEVICE, ("triton", "cuda")
    )


def test_what_was_not_measured_runs_on_triton(gpu: Path) -> None:
    plant(gpu)
    assert chosen(geometry=ConvGeometry(6, 6, 3, 3)) == "triton"
    assert chosen(options=(32,)) == "triton"
    assert backends.select_name("rnn_gate", None, DEVICE, (8,)) == "triton"
    # On a CPU there is nothing to choose.
    problem = ConvProblem(CONV, 5, 4, 1)
    assert backends.select_name(
        "mixed_conv2d", None, torch.device("cpu"), (2, 8), problem
    ) == backends.select_name("mixed_conv2d", None, torch.device("cpu"), (2, 8))


def test_who_asks_for_a_backend_gets_it(gpu: Path) -> None:
    plant(gpu)
    problem = ConvProblem(CONV, 5, 4, 1)
    assert backends.select_name("mixed_conv2d", "triton", DEVICE, (8,), problem) == "triton"
    with use_backend("triton"):
        assert chosen() == "triton"


def test_the_faster_one_that_is_not_built_is_told(
    gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(gpu)
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: "it is not built")
    monkeypatch.setattr(backends, "_announced", set())
    with pytest.warns(RuntimeWarning, match="'cuda' backend is not used .it is not built"):
        assert chosen() == "triton"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "not a table of version 1"),
        ({"source": {"commit": "0123abc"}}, "the commit and the command"),
        ({"seconds": {KEY: {"1": {"cuda": 1.0}}}}, f"{KEY} at batch 1 must have seconds of"),
        ({"seconds": {KEY: {"1": {"cuda": 1.0, "triton": -1.0}}}}, f"{KEY} at batch 1 must have"),
        ({"seconds": 3}, "is not used"),
    ],
)
def test_a_table_that_is_none_is_left_out_with_a_warning(
    changes: dict[str, Any], message: str, gpu: Path
) -> None:
    plant(gpu, **changes)
    with pytest.warns(RuntimeWarning, match=message):
        assert chosen() == "triton"


def test_a_file_gives_back_what_was_written(gpu: Path) -> None:
    table = BackendTable(NAME, SOURCE, SECONDS)
    path = write(table, measured.table_path(NAME))
    assert path == gpu / "test-9000.json"
    assert BackendTable.from_json(json.loads(path.read_text())) == table


def test_shipped_tables_can_be_read() -> None:
    for path in sorted((Path(measured.__file__).parent / "tables").glob("*.json")):
        table = BackendTable.from_json(json.loads(path.read_text()))
        assert measured.table_path(table.device).name == path.name


@pytest.mark.parametrize(
    ("geometry", "key"),
    [
        (CONV, KEY),
        (ConvGeometry(6, 12, 1, 1, stride_h=2, stride_w=2), "6x5x4>12x3x2/1x1"),
        (ConvGeometry(6, 6, 3, 2, dilation_h=2, groups=3), "6x5x4>6x1x3/3x2/d2x1/g3"),
    ],
)
def test_a_convolutions_name(geometry: ConvGeometry, key: str) -> None:
    assert ConvProblem(geometry, 5, 4, 7).key == key


def test_it_is_told_what_chooses_and_why(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(cuda, "info", dict)
    monkeypatch.setattr(triton, "info", dict)
    without = "triton throughout: there is no table of what is faster on NVIDIA Test 9000"
    assert backend_info()["choice"] == {"cuda:0": without}
    plant(gpu)
    measured.forget()
    assert backend_info()["choice"]["cuda:0"] == (
        "by test-9000.json: of 3 convolutions and batches cuda at 2, triton at 1, triton at all "
        "others; measured at commit 0123abc by 'bench/gpu_check.sh tune bench'"
    )
    with use_backend("reference"):
        assert backend_info()["choice"]["cuda:0"] == "reference throughout: it was asked for"
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: "it is not built")
    ending = "; cuda can't run here, triton takes its place"
    assert backend_info()["choice"]["cuda:0"].endswith(ending)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert backend_info()["choice"] == {"cuda": "no GPU"}


# From the public functions, on CPU tensors in place of a GPU's


@pytest.fixture
def stand_in(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CPU tensors choose between the two emulated backends as a GPU's would."""
    monkeypatch.undo()
    if not (triton.supports("cpu", (8,)) and cuda.supports("cpu", (8,))):
        pytest.skip("one of the backends does not take CPU tensors")
    monkeypatch.setattr(measured, "TABLES", gpu)
    monkeypatch.setattr(measured, "device_name", lambda device: NAME)
    monkeypatch.setattr(backends, "_DEFAULTS", {"cpu": ("triton", "cuda", "reference")})
    measured.forget()
    plant(gpu)
    return gpu


def packed_weight() -> PackedConvWeight:
    steps = {b: torch.full((6,), 4.0 / 2**b) for b in (2, 4, 8)}
    return PackedConvWeight.from_float(torch.randn(6, 6, 3, 3), steps, (2, 4, 8))


@pytest.mark.parametrize(("batch", "backend"), [(1, "cuda"), (2, "triton")])
def test_a_convolution_of_packed_weights_takes_the_table(
    batch: int, backend: str, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = packed_weight()

    def run(weight: Any = weight, **more: Any) -> Any:
        return mixed_conv2d(
            torch.randn(batch, 6, 5, 4), weight, 8, {2: 1.0, 4: 0.2, 8: 0.02}, padding=1, **more
        )

    ((_, _, kwargs),) = [c for c in calls_of(run, monkeypatch) if "mixed" in str(c[0])]
    assert kwargs["backend"] == backend
    floats = torch.randn(6, 6, 3, 3)
    steps = {b: torch.ones(6) for b in (2, 4, 8)}
    calls = calls_of(lambda: run(floats, weight_scale=steps), monkeypatch)
    ((_, _, kwargs),) = [c for c in calls if "mixed" in str(c[0])]
    assert kwargs["backend"] == "triton"


def test_a_block_takes_what_its_costliest_convolution_does(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bits, backend in (((8,), "cuda"), ((8, 2), "triton")):
        arguments = make_arguments(BlockCase("basic", bits=bits))
        calls = calls_of(lambda a=arguments: gated_block(**a), monkeypatch)
        ((_, _, kwargs),) = [c for c in calls if "gated" in str(c[0])]
        assert kwargs["backend"] == backend


@pytest.mark.usefixtures("compiler")
def test_compiled_code_chooses_too(stand_in: Path) -> None:
    weight, scale = packed_weight(), torch.tensor([1.0, 0.2, 0.02])
    cuda._cuda.take_launches()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: Tensor, bits: Tensor) -> Any:
        return mixed_conv2d(x, weight, bits, scale, padding=1)

    for batch, count in ((1, 1), (3, 0), (5, 0), (1, 1)):
        x, bits = torch.randn(batch, 6, 5, 4), torch.full((batch,), 4, dtype=torch.int32)
        got = run(x, bits)
        assert cuda._cuda.take_launches().count("conv_mma") == count
        assert torch.equal(
            got, mixed_conv2d(x, weight, bits, scale, padding=1, backend="reference")
        )
