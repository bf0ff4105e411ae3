"""Launch configurations: which one a kernel takes, and what tuning leaves on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dfs_kernels import (
    PackedActivation,
    available_backends,
    mixed_conv2d_,
    quantize_pack,
    warmup,
)
from dfs_kernels.triton import tuning
from dfs_kernels.triton.configs import ConvConfig, PixelConfig, conv_configs
from dfs_kernels.triton.tuning import Problem, Table
from tests.kernels.cases import ConvCase, build

needs_triton = pytest.mark.skipif(
    "triton" not in available_backends(), reason="Triton is not installed for this platform"
)

CONV = Problem("mixed_conv2d_kernel", ("16x8x8", "16x3x3"), 64)
PIXELS = Problem("quantize_pack_kernel", (16, 64), 1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "cache"
    monkeypatch.setenv("DFS_CACHE_DIR", str(folder))
    tuning.forget()
    yield folder
    tuning.forget()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every candidate runs once; the last one measured for a kernel is the fastest."""
    calls: list[int] = []

    def measure(call: Callable[[], object]) -> float:
        call()
        calls.append(1)
        return -float(len(calls))

    monkeypatch.setattr(tuning, "measure", measure)
    return calls


def test_the_nearest_measured_batch_is_taken() -> None:
    table = Table()
    default = ConvConfig()
    assert table.find(CONV, default) is None
    small, large = ConvConfig(32, 16), ConvConfig(128, 32, buckets=True)
    table.add(Problem(CONV.kernel, CONV.sizes, 1), small)
    table.add(Problem(CONV.kernel, CONV.sizes, 1000), large)
    for batch, expected in ((1, small), (2, small), (30, small), (64, large), (5000, large)):
        assert table.find(Problem(CONV.kernel, CONV.sizes, batch), default) == expected
    assert table.find(Problem(CONV.kernel, ("other",), 1), default) is None
    assert table.holds(Problem(CONV.kernel, CONV.sizes, 600))  # up to 1024 is one class
    assert not table.holds(Problem(CONV.kernel, CONV.sizes, 512))


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "gpu.json"
    table, other = Table(), Table()
    table.add(CONV, ConvConfig(32, 16, 32, 8, 2, True))
    table.save(path, "a GPU")
    # Another process knows nothing of the first one's entries, and loses none of them.
    other.add(PIXELS, PixelConfig(16, 8, 2))
    other.save(path, "a GPU")
    read = Table()
    read.merge(path)
    assert read.find(CONV, ConvConfig()) == ConvConfig(32, 16, 32, 8, 2, True)
    assert read.find(PIXELS, PixelConfig()) == PixelConfig(16, 8, 2)
    assert [p.name for p in path.parent.iterdir()] == ["gpu.json"]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"version": 0, "configurations": {}}',
        '{"version": 1}',
        '{"version": 1, "configurations": {"mixed_conv2d_kernel/1": {"0": {"block_m": 16}}}}',
        '{"version": 1, "configurations": {"rnn_gate_kernel/1": {"0": '
        '{"block_p": "16", "block_c": 8, "num_warps": 4}}}}',
    ],
)
def test_a_damaged_cache_is_left_out_with_a_warning(text: str, own_cache: Path) -> None:
    path = tuning.cache_path("interpreter")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.warns(RuntimeWarning, match=f"{path.name} is not used"):
        assert tuning._table("interpreter").find(CONV, ConvConfig()) is None


def test_the_users_measurements_go_before_the_packages_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    shipped, mine = Table(), Table()
    for table, config in ((shipped, ConvConfig(16)), (mine, ConvConfig(32))):
        table.add(CONV, config)
    shipped.add(Problem("float_conv2d_kernel", (1,), 1), ConvConfig(64))
    shipped.save(tmp_path / "h100-80gb-hbm3.json", "NVIDIA H100 80GB HBM3")
    mine.save(tuning.cache_path("NVIDIA H100 80GB HBM3"), "NVIDIA H100 80GB HBM3")
    found = tuning._table("NVIDIA H100 80GB HBM3")
    assert found.find(CONV, ConvConfig()) == ConvConfig(32)
    assert found.find(Problem("float_conv2d_kernel", (1,), 1), ConvConfig()) == ConvConfig(64)
    assert tuning._table("NVIDIA L4").find(CONV, ConvConfig()) is None


def test_shipped_tables_can_be_read() -> None:
    for path in sorted(tuning.TABLES.glob("*.json")):
        Table().merge(path)


def test_the_default_comes_first_and_buckets_only_where_there_is_a_choice() -> None:
    many = conv_configs(1024, 16, 144, 3)
    assert many[0] == ConvConfig(128, 16, 64, 4, 3, False)
    assert len(set(many)) == len(many)
    assert any(config.buckets for config in many)
    assert not any(config.buckets for config in conv_configs(1024, 16, 144, 1))


@needs_triton
def test_nothing_is_measured_unless_asked(measured: list[int], own_cache: Path) -> None:
    x = torch.randn(1, 4, 3, 3)
    quantize_pack(x, 8, 0.1, backend="triton")
    warmup(run=lambda: quantize_pack(x, 8, 0.1, backend="triton"))
    assert measured == []
    assert not own_cache.exists()


@needs_triton
def test_tuning_measures_once_and_changes_no_result(
    measured: list[int], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build(ConvCase(bits=(8, 2, 0, 4), options=(2, 4, 8), centred=(True, False, False)))
    assert isinstance(built.input, Tensor)
    assert built.input_quantizer is not None
    stream = quantize_pack(
        torch.rand(4, 2, *built.case.output_shape[2:]), 8, 0.02, backend="reference"
    )
    results: list[PackedActivation] = []

    def run() -> None:
        mine = stream.clone()
        assert built.input_quantizer is not None
        mixed_conv2d_(
            built.input,
            built.packed_weight,
            built.bits,
            built.input_quantizer.scale,
            built.input_quantizer.zero_point,
            residual=mine,
            padding=1,
            activation="relu",
            backend="triton",
        )
        results.append(mine)

    run()
    warmup(run=run, autotune=True)
    once = len(measured)
    assert once > 4
    warmup(run=run, autotune=True)
    run()
    assert len(measured) == once
    for result in results[1:]:
        assert torch.equal(result.data, results[0].data)

    # Another process finds what this one measured: the last candidates, of all kernels.
    (path,) = own_cache.iterdir()
    content = json.loads(path.read_text())
    kernels = {key.partition("/")[0] for key in content["configurations"]}
    assert kernels == {"mixed_conv2d_kernel", "quantize_pack_kernel"}
    tuning.forget()
    warmup(run=run, autotune=True)
    assert len(measured) == once


@needs_triton
def test_tuning_needs_calls_and_a_device() -> None:
    with pytest.raises(ValueError, match="run must be given with autotune"):
        warmup(autotune=True)
    with pytest.raises(ValueError, match="they don't run on meta"):
        warmup("meta", run=lambda: None, autotune=True)


@needs_triton
def test_a_configuration_that_does_not_fit_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {16: float("inf"), 32: 2.0, 64: 1.0}
    seen: list[ConvConfig] = []

    def run(config: ConvConfig) -> None:
        seen.append(config)

    def measure(call: Callable[[], object]) -> float:
        call()
        return times[seen[-1].block_m]

    monkeypatch.setattr(tuning, "measure", measure)
    configs = [ConvConfig(16), ConvConfig(32), ConvConfig(64)]
    with tuning.tuning():
        assert tuning.choose(CONV, torch.device("cpu"), configs, run) == ConvConfig(64)
        with pytest.raises(RuntimeError, match="no configuration of mixed_conv2d_kernel"):
            tuning.choose(Problem(CONV.kernel, ("huge",), 1), torch.device("cpu"), configs[:1], run)
    assert tuning.choose(CONV, torch.device("cpu"), configs, run) == ConvConfig(16)


def test_a_gpus_name_becomes_a_file_name() -> None:
    assert tuning.slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert tuning.slug("NVIDIA GeForce RTX 4090") == "geforce-rtx-4090"
    assert tuning.slug("../") == "gpu"
