from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dfs.cost import BitOps, PaperCost, make_cost
from dfs.latency import LatencyTable, TimedPart, part_names, time_in_turns
from dfs.models import DynamicResNet, PlainResNet
from dfs.nn.folded import Stream
from tests.framework.helpers import small_bottlenecks


def _one_hot(model: DynamicResNet, bits: list[list[int]]) -> torch.Tensor:
    chosen = torch.tensor(bits)[..., None] == torch.tensor(model.choices)
    assert chosen.any(-1).all()
    return chosen.float()


def test_paper_cost_by_hand() -> None:
    model = DynamicResNet(8, choices=(0, 2, 4, 8, 32))
    mask = _one_hot(model, [[0, 0], [8, 8], [32, 0], [4, 2]])
    expected = [0, 0.0625, 0.5, ((4 / 32) ** 2 + (2 / 32) ** 2) / 2]
    assert PaperCost(model)(mask).tolist() == pytest.approx(expected)


def test_macs_are_those_that_the_layers_do() -> None:
    plain, dynamic = PlainResNet(14, 10, 3), DynamicResNet(14, 10, 3)
    counted: dict[str, int] = {}

    def count(name: str) -> object:
        def hook(module: nn.Module, args: object, output: torch.Tensor) -> None:
            assert isinstance(module, nn.Conv2d)
            counted[name] = module.weight[0].numel() * output[0].numel()

        return hook

    for name, module in plain.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count(name))  # type: ignore[arg-type]
    plain(torch.randn(1, 3, 18, 14))
    macs = dynamic.macs(18, 14)
    assert macs.total == sum(counted.values())
    for i, gated in enumerate(macs.gated):
        assert gated == counted[f"blocks.{i + 1}.conv1"] + counted[f"blocks.{i + 1}.conv2"]


def test_bitops_of_uniform_widths() -> None:
    model = DynamicResNet(14, choices=(0, 8, 32))
    macs = model.macs(16, 16)
    cost = BitOps(model, (16, 16))
    for i, width in enumerate(model.choices):
        mask = torch.zeros(1, model.gated_blocks, 3)
        mask[..., i] = 1
        work = macs.ungated * 64 + macs.gates * 1024 + sum(macs.gated) * width**2
        assert float(cost(mask)) == pytest.approx(work / (1024 * macs.total), rel=1e-6)
        assert float(cost.of_choices()[i]) == pytest.approx(float(cost(mask)), rel=1e-6)


def test_cost_is_differentiable_and_dearer_choices_have_larger_gradients() -> None:
    model = DynamicResNet(8)
    mask = torch.full((2, 2, 4), 0.25, requires_grad=True)
    for cost in (PaperCost(model), BitOps(model, (8, 8))):
        (gradient,) = torch.autograd.grad(cost(mask).sum(), mask)
        assert (gradient.diff(dim=-1) > 0).all()


def test_unknown_cost_is_refused() -> None:
    with pytest.raises(ValueError, match="cost must be"):
        make_cost("joules", DynamicResNet(8), (8, 8))
    with pytest.raises(ValueError, match="needs latency_table"):
        make_cost("latency", DynamicResNet(8), (8, 8))


def test_bitops_of_the_papers_shortcuts_follow_the_block() -> None:
    model = DynamicResNet(
        8, choices=(0, 8, 32), stream="float32", skipping="paper", ungated_bits=32
    )
    macs = model.macs(8, 8)
    cost = BitOps(model, (8, 8))
    mask = _one_hot(model, [[0, 8]])
    # Two down-sampling blocks: the first skipped, its shortcut at 32 bits.
    gated = macs.gated[1] / 16 + macs.shortcuts[0] + macs.shortcuts[1] / 16
    work = macs.ungated - sum(macs.shortcuts) + macs.gates + gated
    assert min(macs.shortcuts) > 0
    assert float(cost(mask)) == pytest.approx(work / macs.total, rel=1e-6)
    assert cost.full == macs.total


def _made_up_table(model: DynamicResNet, size: tuple[int, int]) -> LatencyTable:
    """1 ms for the stem, 0.5 for the classifier, 0.25 a gate, bits/8 + 2 ms for a block."""
    entries: dict[tuple[str, int], float] = {}
    for name in part_names(model, size):
        if name.startswith("RNNGate"):
            entries[name, 0] = 0.25
            continue
        for bits in (0, 2, 4, 8, 32):
            fixed = {"s": 1.0, "c": 0.5}.get(name[0])
            entries[name, bits] = bits / 8 + 2 if fixed is None else fixed * max(1, bits / 8)
    return LatencyTable(entries, "uint8", 4, 1, {"processor": "made up"})


def test_latency_by_hand() -> None:
    model = DynamicResNet(8, choices=(0, 4, 8))
    cost = make_cost("latency", model, (8, 8), _made_up_table(model, (8, 8)))
    # Stem 1, first block at 8 bits 3, classifier 0.5, two gates 0.5.
    full = 4 + 3 * 6 + 2
    assert cost.full == full
    assert cost.fixed == pytest.approx(5 / full)
    mask = _one_hot(model, [[0, 0], [8, 4]])
    assert cost(mask).tolist() == pytest.approx([(5 + 4) / full, (5 + 3 + 2.5) / full])
    assert cost.of_choices().tolist() == pytest.approx([9 / full, 10 / full, 11 / full])
    assert (cost.name, cost.unit) == ("latency", "ms")


def test_gates_that_do_not_look_take_no_time() -> None:
    table = _made_up_table(DynamicResNet(8, choices=(0, 4, 8)), (8, 8))
    blind = DynamicResNet(8, choices=(0, 4, 8), gate="constant")
    assert make_cost("latency", blind, (8, 8), table).fixed == pytest.approx((5 - 0.5) / 24)
    assert not any("Gate" in part for part in part_names(blind, (8, 8)))


def test_every_cost_teaches_the_gate_through_its_mask() -> None:
    model = DynamicResNet(8, choices=(0, 4, 8)).train()
    table = _made_up_table(model, (8, 8))
    for name in ("paper", "bitops", "latency"):
        cost = make_cost(name, model, (8, 8), table)
        assert cost.name == name
        assert cost.table.shape == (model.gated_blocks, 3)
        model.zero_grad()
        cost(model.run(torch.randn(16, 3, 8, 8)).mask).mean().backward()
        gradient = model.gate.get_parameter("proj.bias").grad
        assert gradient is not None
        # Dearer choices are pushed down.
        assert float(gradient[2]) > 0 > float(gradient[0])


def test_what_a_table_lacks_is_named() -> None:
    model = DynamicResNet(8, choices=(0, 4, 8))
    table = _made_up_table(model, (8, 8))
    with pytest.raises(ValueError, match=r"no entry for 'stem 3x16x16.*it was not measured"):
        make_cost("latency", model, (16, 16), table)
    block = next(name for name, _ in table.entries if name.startswith("block 16x8x8: 3x3 16>32"))
    del table.entries[block, 4]
    with pytest.raises(ValueError, match=r"'block 16x8x8.* at 4 bits; .*\[0, 2, 8, 32\]"):
        make_cost("latency", model, (8, 8), table)
    other = DynamicResNet(8, stream="float32")
    with pytest.raises(ValueError, match="stream 'uint8'"):
        make_cost("latency", other, (8, 8), table)


def test_tables_survive_saving_and_wrong_ones_are_refused(tmp_path: Path) -> None:
    table = _made_up_table(DynamicResNet(8), (8, 8))
    path = tmp_path / "table.json"
    table.save(path)
    assert LatencyTable.load(path) == table
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]
    content = json.loads(path.read_text())
    for change, message in (
        ({"version": 2}, "version is 2"),
        ({"milliseconds_per_image": {"stem": {"8": "fast"}}}, "'stem' must take a time"),
        ({"milliseconds_per_image": {"stem": {"8": -1}}}, "'stem' must take a time"),
        ({"milliseconds_per_image": 3}, "table.json"),
        ({"batch": "many"}, "batch must be"),
        ({"stream": None}, "stream must be"),
    ):
        path.write_text(json.dumps({**content, **change}))
        with pytest.raises(ValueError, match=message):
            LatencyTable.load(path)
    del content["threads"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="'threads' is missing"):
        LatencyTable.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="latency table"):
        LatencyTable.load(path)


@pytest.mark.parametrize("stream", ["uint8", "float32"])
def test_a_measured_table_prices_the_network_that_it_measured(stream: str) -> None:
    model = DynamicResNet(small_bottlenecks(), choices=(0, 2, 8), stream=stream).eval()
    threads = torch.get_num_threads()
    told: list[str] = []
    table = LatencyTable.measure(
        model, (24, 24), batch=2, threads=1, rounds=2, progress=told.append
    )
    assert torch.get_num_threads() == threads
    assert told == part_names(model, (24, 24))
    assert (table.batch, table.threads, table.stream) == (2, 1, stream)
    assert table.machine["torch"] == torch.__version__
    assert all(value > 0 for value in table.entries.values())
    cost = make_cost("latency", model, (24, 24), table)
    assert 0 < cost.fixed < float(cost.of_choices().max())
    # Other choices of the kernels' widths are priced by the same table.
    other = DynamicResNet(small_bottlenecks(), choices=(2, 4, 32), stream=stream)
    assert make_cost("latency", other, (24, 24), table).table.shape == (2, 3)


def test_widths_take_turns_on_fresh_copies_and_the_median_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = 0.0
    monkeypatch.setattr("dfs.latency.time.perf_counter", lambda: clock)
    source, order = torch.zeros(3), list[int]()

    def work(bits: int, x: Stream) -> None:
        nonlocal clock
        assert isinstance(x, Tensor)
        assert not x.any()
        x.fill_(1)
        order.append(bits)
        # The first round warms up, and one of the others is disturbed.
        clock += {1: 99, 3: 50}.get(order.count(bits), bits)

    part = TimedPart(source, {b: partial(work, b) for b in (2, 8)})
    assert time_in_turns(part, rounds=3) == {2: 2, 8: 8}
    assert order == [2, 8] * 4


def test_only_deployable_networks_are_measured() -> None:
    with pytest.raises(ValueError, match=r"choices \(10,\)"):
        LatencyTable.measure(DynamicResNet(8, choices=(0, 8, 10)).eval(), (8, 8))
    with pytest.raises(ValueError, match="evaluation mode"):
        LatencyTable.measure(DynamicResNet(8), (8, 8))
    with pytest.raises(ValueError, match="batch must be positive"):
        LatencyTable.measure(DynamicResNet(8).eval(), (8, 8), batch=0)
