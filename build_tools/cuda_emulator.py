"""Builds the CUDA kernels for a CPU, where they run in an emulator: for tests only.

    python -m build_tools.cuda_emulator

With DFS_CUDA_EMULATE=1 the "cuda" backend uses the module that this makes.
"""

import contextlib
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from build_tools.extension import link_module, module_flags
from build_tools.ninja_file import NinjaFile
from build_tools.toolchain import (
    CSRC,
    ROOT,
    BuildError,
    HostCompiler,
    baseline_flags,
    find_host_compiler,
)

DIRECTORY = Path("build", "cuda-emulator")
_OPTIMIZATION = ("-O2",)
FLAGS = ("-Icsrc/include", "-Icsrc/cuda", "-DDFS_CUDA_EMULATED")


def add_kernels(
    ninja: NinjaFile, compiler: HostCompiler, optimization: Sequence[str] = _OPTIMIZATION
) -> list[Path]:
    """Adds the kernels and the emulator; returns their object files."""
    flags = (*baseline_flags(compiler, optimization), *FLAGS)
    kernels = [path for path in sorted((CSRC / "cuda").glob("*.cu")) if path.name != "probe.cu"]
    objects = [
        ninja.compile_cpp(compiler, path.relative_to(ROOT), (*flags, "-x", "c++"))
        for path in kernels
    ]
    objects += [
        ninja.compile_cpp(compiler, path.relative_to(ROOT), flags)
        for path in sorted((CSRC / "cuda" / "emulator").glob("*.cpp"))
    ]
    return objects


def compile_kernels(compiler: HostCompiler) -> list[Path]:
    """Brings the module's objects that need no Python up to date; returns their paths.

    Raises:
        BuildError: the compiler failed.
    """
    ninja = NinjaFile(DIRECTORY, name="kernels.ninja")
    objects = add_kernels(ninja, compiler)
    with _alone():
        ninja.run(objects)
    return objects


def module_path() -> Path:
    """Where the module goes."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return ROOT / DIRECTORY / f"_cuda_emulated{suffix}"


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Test processes that start together want the same module."""
    import fcntl  # not on Windows, where no compiler gets here

    path = ROOT / DIRECTORY / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build_module() -> Path:
    """Brings the module up to date; returns its path.

    Raises:
        BuildError: there is no compiler for it, or it failed.
    """
    compiler = find_host_compiler()
    if compiler.is_msvc:
        raise BuildError("the emulated CUDA kernels need GCC or Clang")
    ninja = NinjaFile(DIRECTORY)
    objects = add_kernels(ninja, compiler)
    flags = (*module_flags(compiler), *FLAGS)
    objects.append(ninja.compile_cpp(compiler, Path("csrc/python/cuda_module.cpp"), flags))
    output = module_path().relative_to(ROOT)
    link_module(ninja, compiler, output, objects)
    with _alone():
        ninja.run([output])
    return ROOT / output


def main() -> int:
    try:
        print(build_module())
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
