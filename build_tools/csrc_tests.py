"""Compiles the CPU code, the emulated CUDA kernels and csrc/tests into one executable, and runs it.

    python -m build_tools.csrc_tests [--sanitize address,undefined | --sanitize thread]

Without a sanitizer the objects are those of the Python modules; with one they are compiled with the
same flags but for the optimization level. ThreadSanitizer gets no CUDA kernels, as it can't follow
the fibers that these run in.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from build_tools import cuda_emulator
from build_tools.extension import compile_library
from build_tools.ninja_file import NinjaFile
from build_tools.toolchain import (
    CSRC,
    ROOT,
    BuildError,
    HostCompiler,
    baseline_flags,
    find_host_compiler,
    include_flags,
    library_sources,
    split_environment_flags,
)

SANITIZER_FLAGS = ("-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")
_SANITIZERS = ("address", "undefined", "leak", "thread")


def build_directory(sanitizers: list[str]) -> Path:
    """Where the executable and its objects go, relative to the project's root."""
    return Path("build", "-".join(["csrc-tests", *sanitizers]))


def build_executable(sanitizers: list[str]) -> Path:
    """Compiles and links; returns the executable's absolute path.

    Raises:
        BuildError: there is nothing to build, or the compiler failed.
    """
    compiler = find_host_compiler()
    if compiler.is_msvc:
        raise BuildError("the C++ tests need GCC or Clang")
    with_cuda = "thread" not in sanitizers
    left_out = ("fuzz_",) if with_cuda else ("fuzz_", "cuda_")
    tests = [
        path.relative_to(ROOT)
        for path in sorted((CSRC / "tests").glob("*.cpp"))
        if not path.name.startswith(left_out)
    ]
    if not tests:
        raise BuildError(f"no tests in {CSRC / 'tests'}")
    executable = build_directory(sanitizers) / "csrc-tests"
    if not sanitizers:
        objects = compile_library(compiler) + cuda_emulator.compile_kernels(compiler)
        return _link(NinjaFile(executable.parent), compiler, tests, objects, executable, ("-O1",))
    sanitize = (f"-fsanitize={','.join(sanitizers)}", *SANITIZER_FLAGS)
    return link_with_library(compiler, tests, executable, sanitize, sanitize, with_cuda)


def link_with_library(
    compiler: HostCompiler,
    sources: list[Path],
    executable: Path,
    flags: tuple[str, ...],
    link_flags: tuple[str, ...],
    with_cuda: bool = False,
) -> Path:
    """Compiles the CPU code and `sources` into one executable; returns its absolute path.

    `with_cuda`: and the emulated CUDA kernels, for sources that include their headers.

    Raises:
        BuildError: the compiler failed.
    """
    ninja = NinjaFile(executable.parent)
    objects = [
        ninja.compile_cpp(compiler, source.path, source.flags)
        for source in library_sources(compiler, flags)
    ]
    if with_cuda:
        objects += cuda_emulator.add_kernels(ninja, compiler, flags)
    return _link(ninja, compiler, sources, objects, executable, flags, link_flags, with_cuda)


def _link(
    ninja: NinjaFile,
    compiler: HostCompiler,
    sources: list[Path],
    objects: list[Path],
    executable: Path,
    flags: tuple[str, ...],
    link_flags: tuple[str, ...] = (),
    with_cuda: bool = True,
) -> Path:
    all_flags = (*baseline_flags(compiler, flags), *include_flags(compiler))
    if with_cuda:
        all_flags = (*all_flags, *cuda_emulator.FLAGS)
    objects = [*objects, *(ninja.compile_cpp(compiler, path, all_flags) for path in sources)]
    command = [*compiler.command, *split_environment_flags("LDFLAGS"), "-pthread", *link_flags]
    command += [*(str(path) for path in objects), "-o", str(executable)]
    ninja.link(executable, objects, command)
    ninja.run([executable])
    return ROOT / executable


def run_executable(executable: Path, sanitizers: list[str], arguments: list[str]) -> int:
    """Runs the tests; returns their exit status."""
    command = [str(executable), *arguments]
    if "thread" in sanitizers and sys.platform == "linux" and shutil.which("setarch"):
        # ThreadSanitizer's fixed shadow memory collides with a highly randomised address space.
        command = ["setarch", platform.machine(), "-R", *command]
    environment = {"UBSAN_OPTIONS": "print_stacktrace=1", **os.environ}
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def _parse_sanitizers(text: str) -> list[str]:
    names = sorted({name for name in text.split(",") if name})
    unknown = [name for name in names if name not in _SANITIZERS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown)}: choose from {', '.join(_SANITIZERS)}"
        )
    if "thread" in names and len({"address", "leak"} & set(names)) > 0:
        raise argparse.ArgumentTypeError("thread cannot be combined with address or leak")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m build_tools.csrc_tests", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--sanitize", type=_parse_sanitizers, default=[], metavar="NAMES", help="comma-separated"
    )
    parser.add_argument("--build-only", action="store_true", help="print the executable's path")
    parser.add_argument("arguments", nargs="*", help="for the executable")
    options = parser.parse_args()
    try:
        executable = build_executable(options.sanitize)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.build_only:
        print(executable)
        return 0
    status = run_executable(executable, options.sanitize, options.arguments)
    return status if 0 <= status <= 255 else 1


if __name__ == "__main__":
    sys.exit(main())
