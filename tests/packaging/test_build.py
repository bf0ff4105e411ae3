"""The package as pip builds it, from a copy of the tree."""

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from build_tools.cuda import find_cuda
from build_tools.extension import build_directory
from build_tools.toolchain import ROOT, find_host_compiler

COPIED = (
    "build_tools",
    "csrc",
    "dfs",
    "dfs_kernels",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "pyproject.toml",
    "setup.py",
)


def build_environment(**changes: str | None) -> dict[str, str]:
    """The environment, with some variables set and those given as None removed."""
    environment = dict(os.environ)
    for name, value in changes.items():
        if value is None:
            environment.pop(name, None)
        else:
            environment[name] = value
    return environment


def path_without_nvcc() -> str:
    directories = os.environ.get("PATH", "").split(os.pathsep)
    return os.pathsep.join(d for d in directories if not shutil.which("nvcc", path=d))


def without_nvcc(**changes: str | None) -> dict[str, str]:
    return build_environment(PATH=path_without_nvcc(), CUDA_HOME=None, CUDA_PATH=None, **changes)


def copy_tree(destination: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, destination / name, ignore=ignore)
        else:
            destination.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, destination / name)
    return destination


def run(command: list[str], cwd: Path, environment: dict[str, str]) -> str:
    result = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def build_inplace(tree: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = copy_tree(tmp_path_factory.mktemp("build") / "tree")
    # With the objects of this tree, as far as there are any: the commands that make them are the
    # same, so ninja takes those that are up to date. What it has not seen is compiled.
    objects = build_directory()
    if (ROOT / objects).is_dir():
        shutil.copytree(ROOT / objects, copy / objects, ignore=shutil.ignore_patterns("*.so"))
    return copy


@pytest.fixture(scope="module")
def cpu_wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    # Files that a build must not pick up: a module removed since the last wheel, a stray binary.
    stale = next(iter(tree.glob("build/lib*")), tree / "build" / "lib") / "dfs" / "removed.py"
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.write_text("")
    (tree / "dfs_kernels" / "_cuda.so").write_text("stray")

    output = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation"]
    environment = build_environment(DFS_BUILD_CUDA="0", PIP_DISABLE_PIP_VERSION_CHECK="1")
    run([*command, "--wheel-dir", str(output)], tree, environment)
    (wheel,) = output.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        yield opened


@pytest.mark.slow
def test_wheel_holds_both_packages_and_the_cpu_module_only(cpu_wheel: zipfile.ZipFile) -> None:
    names = cpu_wheel.namelist()
    top_level = {name.split("/")[0] for name in names}
    (metadata,) = (name for name in top_level if name.endswith(".dist-info"))
    assert top_level == {"dfs", "dfs_kernels", metadata}
    for package in ("dfs", "dfs_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            assert str(path.relative_to(ROOT)) in names
    native = [name for name in names if name.endswith((".so", ".pyd"))]
    assert len(native) == 1
    assert re.match(r"dfs_kernels/_cpu\..*\.(so|pyd)$", native[0])


@pytest.mark.slow
def test_wheel_holds_package_data(cpu_wheel: zipfile.ZipFile) -> None:
    names = cpu_wheel.namelist()
    for package in ("dfs", "dfs_kernels"):
        for pattern in ("*.toml", "*.json", "*.safetensors", "py.typed"):
            for path in (ROOT / package).rglob(pattern):
                assert str(path.relative_to(ROOT)) in names
    assert "dfs_kernels/py.typed" in names


@pytest.mark.slow
def test_wheel_holds_no_sources_tests_or_leftovers(cpu_wheel: zipfile.ZipFile) -> None:
    forbidden = re.compile(r"(^|/)(tests?|csrc|build_tools|bench)/|\.(cpp|cu|h|o)$|/removed\.py$")
    assert [name for name in cpu_wheel.namelist() if forbidden.search(name)] == []


@pytest.mark.slow
def test_wheel_metadata(cpu_wheel: zipfile.ZipFile) -> None:
    names = cpu_wheel.namelist()
    (path,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(cpu_wheel.read(path))
    assert metadata["Name"] == "dynamic-fractional-skipping"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    requirements = metadata.get_all("Requires-Dist") or []
    (triton,) = (r for r in requirements if r.startswith("triton"))
    assert 'platform_system == "Linux"' in triton
    (license_path,) = (name for name in names if name.endswith("/LICENSE"))
    assert cpu_wheel.read(license_path) == (ROOT / "LICENSE").read_bytes()
    (entry_points,) = (name for name in names if name.endswith("/entry_points.txt"))
    assert "dfs = dfs.launch:main" in cpu_wheel.read(entry_points).decode()


@pytest.mark.slow
def test_cpu_module_of_the_wheel_loads_without_torch(
    cpu_wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    (native,) = (name for name in cpu_wheel.namelist() if name.endswith((".so", ".pyd")))
    (tmp_path / Path(native).name).write_bytes(cpu_wheel.read(native))
    program = "import sys; import _cpu; assert 'torch' not in sys.modules; print(_cpu.__file__)"
    printed = run([sys.executable, "-c", program], tmp_path, build_environment(PYTHONPATH=None))
    assert printed.strip() == str(tmp_path / Path(native).name)


@pytest.mark.slow
def test_incremental_build_follows_headers_and_replaces_the_module(
    cpu_wheel: zipfile.ZipFile, tree: Path
) -> None:
    environment = build_environment(DFS_BUILD_CUDA="0")
    assert build_inplace(tree, environment).returncode == 0
    assert "no work to do" in build_inplace(tree, environment).stdout
    (module,) = (tree / "dfs_kernels").glob("_cpu.*")
    working = module.read_bytes()

    # One that little depends on.
    header = tree / "csrc" / "engine" / "pixels.h"
    original = header.read_text()
    try:
        header.write_text("#error refused by the test\n" + original)
        broken = build_inplace(tree, environment)
    finally:
        header.write_text(original)
    assert broken.returncode != 0
    assert "refused by the test" in broken.stdout
    assert "compiling the native code failed" in broken.stdout
    assert module.read_bytes() == working

    inode = module.stat().st_ino
    repaired = build_inplace(tree, environment)
    assert repaired.returncode == 0, repaired.stdout
    assert "compile csrc/engine/pixels.cpp" in repaired.stdout
    assert module.stat().st_ino != inode


def test_cuda_demanded_without_nvcc_is_refused(tree: Path) -> None:
    result = build_inplace(tree, without_nvcc(DFS_BUILD_CUDA="1"))
    assert result.returncode != 0
    assert "DFS_BUILD_CUDA=1, but nvcc was found neither in CUDA_HOME" in result.stdout


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("DFS_BUILD_CUDA", "yes", "DFS_BUILD_CUDA must be 0, 1 or unset, got 'yes'"),
        ("MAX_JOBS", "0", "MAX_JOBS must be a positive integer, got '0'"),
        ("MAX_JOBS", "many", "MAX_JOBS must be a positive integer, got 'many'"),
        ("CXX", "no-such-compiler", "CXX='no-such-compiler' does not name a compiler"),
    ],
)
def test_bad_build_variable_is_refused_by_name(
    tree: Path, variable: str, value: str, message: str
) -> None:
    environment = build_environment(**{"DFS_BUILD_CUDA": "0", variable: value})
    result = build_inplace(tree, environment)
    assert result.returncode != 0
    assert message in result.stdout


def fake_nvcc(home: Path, script: str) -> Path:
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return home


BROKEN_NVCC = 'case "$*" in --version) echo broken;; *) echo unsupported host; exit 1;; esac'


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_broken_nvcc_is_refused_where_cuda_is_demanded(tree: Path, tmp_path: Path) -> None:
    home = fake_nvcc(tmp_path / "cuda", BROKEN_NVCC)
    result = build_inplace(tree, build_environment(DFS_BUILD_CUDA="1", CUDA_HOME=str(home)))
    assert result.returncode != 0
    assert "nvcc cannot compile a trivial file" in result.stdout
    assert "unsupported host" in result.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_broken_nvcc_is_warned_about_and_left_out_otherwise(
    cpu_wheel: zipfile.ZipFile, tree: Path, tmp_path: Path
) -> None:
    home = fake_nvcc(tmp_path / "cuda", BROKEN_NVCC)
    result = build_inplace(tree, build_environment(DFS_BUILD_CUDA=None, CUDA_HOME=str(home)))
    assert result.returncode == 0, result.stdout
    assert "WARNING: nvcc cannot compile a trivial file" in result.stdout
    assert list((tree / "dfs_kernels").glob("_cuda.cpython*")) == []


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc not found")
def test_refused_architecture_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusing = f'case "$*" in *sm_90a*) exit 1;; esac; exec {shutil.which("nvcc")} "$@"'
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path / "cuda", refusing)))
    monkeypatch.setenv("DFS_BUILD_CUDA", "1")
    found = find_cuda(find_host_compiler(), tmp_path / "probe.json")
    assert found is not None
    assert "building without sm_90a" in capsys.readouterr().out
    assert found.architectures == ("sm_80", "sm_86", "sm_89", "compute_90")
    assert "sm_90a" not in " ".join(found.compile_flags)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc not found")
def test_cuda_module_is_harmless_without_a_driver(
    cpu_wheel: zipfile.ZipFile, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = build_inplace(tree, build_environment(DFS_BUILD_CUDA="1"))
    assert result.returncode == 0, result.stdout
    monkeypatch.setenv("DFS_BUILD_CUDA", "1")
    toolchain = find_cuda(find_host_compiler(), tree / build_directory() / "cuda_probe.json")
    assert toolchain is not None
    program = (
        f"import _cuda; assert _cuda.architectures() == {toolchain.architectures!r}\n"
        "p = _cuda.probe(); assert p['runtime_version'] > 0, p\n"
        "assert p['device_count'] == len(p['devices']) == 0 and p['error'], p"
    )
    # Hides the devices of a machine that has some; one without a driver ignores it.
    environment = build_environment(CUDA_VISIBLE_DEVICES="")
    run([sys.executable, "-c", program], tree / "dfs_kernels", environment)
    assert build_inplace(tree, build_environment(DFS_BUILD_CUDA="0")).returncode == 0
    assert list((tree / "dfs_kernels").glob("_cuda.cpython*")) == []
