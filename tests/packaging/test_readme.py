from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


# What each example prints, in their order.
PRINTED = ("4, 16, 9, 9", "4, 16, 9, 9", "[4, 10]")


@pytest.mark.parametrize("number", range(len(PRINTED)))
def test_the_examples_run_as_pasted(number: int, tmp_path: Path) -> None:
    assert len(EXAMPLES) == len(PRINTED)
    result = subprocess.run(
        [sys.executable, "-c", EXAMPLES[number]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert PRINTED[number] in result.stdout


def test_every_environment_variable_is_in_the_table() -> None:
    sources = [
        path
        for folder in ("csrc", "dfs", "dfs_kernels", "build_tools")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".h", ".cu")
    ]
    pattern = re.compile(r"""(?:getenv\(|environ(?:\.get\(|\[))["'](DFS_\w+)["']""")
    used = {name for path in sources for name in pattern.findall(path.read_text())}
    table = set(re.findall(r"^\| `(DFS_\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert {"DFS_CPU_ISA", "DFS_DEBUG", "DFS_BUILD_CUDA"} <= table
    assert used <= table
