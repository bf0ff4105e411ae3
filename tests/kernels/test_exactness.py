"""The exactness campaign, at a size for every day; a long one is a command of its own."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from dfs_kernels.backends import cpu as backend
from dfs_kernels.call import ConvCall
from dfs_kernels.packing import PackedActivation

_cpu = pytest.importorskip("dfs_kernels._cpu")

from tests.kernels import exactness  # noqa: E402 - only where the module was built

# Not the default seed of the command, so that a recorded run checks other cases than this.
SEED, CASES = 20200100705, 1000


def test_every_isa_is_exact_on_drawn_cases() -> None:
    isas = _cpu.supported_isas()
    tally = exactness.Tally()
    seen: Counter[tuple[int, int, bool, bool]] = Counter()
    with exactness.all_work_split():
        for number in range(CASES):
            case = exactness.numbered_case(SEED, number)
            try:
                exactness.check_case(case, isas, tally)
            except exactness.MismatchError as error:
                pytest.fail(f"--seed {SEED} --first {number} --cases 1: {error}; {case}")
            left, right, top, bottom = case.padding
            symmetric = (left, top) == (right, bottom)
            if case.stride in ((1, 1), (2, 2)):
                for width in set(case.bits):
                    seen[width, case.stride[0], case.groups > 1, symmetric] += 1
    assert tally.cases == dict.fromkeys(isas, CASES)
    assert len(seen) == 5 * 2 * 2 * 2
    assert min(seen.values()) >= 20, seen


def test_the_command_writes_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "record.json"
    assert exactness.main(["--cases", "3", "--seed", "1", "--out", str(path)]) == 0
    record = json.loads(path.read_text())
    assert (record["seed"], record["cases"], record["failures"]) == (1, 3, 0)
    assert record["cases_per_isa"] == dict.fromkeys(_cpu.supported_isas(), 3)
    assert set(record["cells"]) == set(_cpu.supported_isas())
    assert capsys.readouterr().out.startswith("exact: seed 1, cases passed: scalar 3")


def test_a_wrong_bit_is_found_and_can_be_reproduced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    compute = backend.mixed_conv2d

    def compute_wrongly(call: ConvCall, out: object) -> None:
        compute(call, out)
        if isinstance(out, PackedActivation) and int(out.bits[-1]) != 0:
            out.data[-1, 0] ^= 1

    monkeypatch.setattr(backend, "mixed_conv2d", compute_wrongly)
    path = tmp_path / "record.json"
    assert exactness.main(["--seed", "1", "--cases", "50", "--out", str(path)]) == 1
    assert not path.exists()
    message = capsys.readouterr().err
    assert "ConvCase(" in message
    first = message.split("--first ")[1].split()[0]
    assert exactness.main(["--seed", "1", "--cases", "1", "--first", first]) == 1
    assert int(first) == 0 or exactness.main(["--seed", "1", "--cases", first]) == 0
