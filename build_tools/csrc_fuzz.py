"""Compiles the fuzz target of csrc/tests under ASan and UBSan, and runs it.

    python -m build_tools.csrc_fuzz [--seconds N] [--seed S] [--corpus DIR] [INPUT...]

With a Clang that has libFuzzer, inputs evolve by coverage and new ones are added to the corpus.
Otherwise a small driver feeds random inputs and changed ones of the corpus. Either leaves the input
of a failure in build/csrc-fuzz and exits with a status other than 0; given as INPUT, it is run
again alone.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from build_tools.csrc_tests import SANITIZER_FLAGS, build_directory, link_with_library
from build_tools.toolchain import ROOT, BuildError, HostCompiler, find_host_compiler

_DIRECTORY = Path("build", "csrc-fuzz")
_SANITIZERS = ("address", "undefined")
_SANITIZE = ",".join(_SANITIZERS)
# What GCC defines under -fsanitize=address; the sources ask for it.
_CLANG_SAYS_SO = ("-U__SANITIZE_ADDRESS__", "-D__SANITIZE_ADDRESS__=1")


def find_libfuzzer() -> HostCompiler | None:
    """CXX, or clang++, if it links libFuzzer; Clang is often installed without it."""
    if os.environ.get("CXX"):
        compiler = find_host_compiler()
    else:
        compiler = HostCompiler(("clang++",))
    if compiler.is_msvc or shutil.which(compiler.command[0]) is None:
        return None
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "probe.cpp")
        source.write_text(
            "#include <cstddef>\n#include <cstdint>\n"
            'extern "C" int LLVMFuzzerTestOneInput(const uint8_t*, size_t) { return 0; }\n'
        )
        output = Path(directory, "probe")
        command = [*compiler.command, f"-fsanitize=fuzzer,{_SANITIZE}", str(source)]
        result = subprocess.run([*command, "-o", str(output)], capture_output=True)
    return compiler if result.returncode == 0 else None


def build_executable() -> Path:
    """Compiles and links; returns the executable's absolute path.

    Raises:
        BuildError: there is no GCC or Clang, or it failed.
    """
    tests = Path("csrc", "tests")
    sources = [tests / "check.cpp", tests / "fuzz_mixed_conv2d.cpp"]
    compiler = find_libfuzzer()
    if compiler is not None:
        flags = (f"-fsanitize=fuzzer-no-link,{_SANITIZE}", *SANITIZER_FLAGS, *_CLANG_SAYS_SO)
        link = (f"-fsanitize=fuzzer,{_SANITIZE}",)
        executable = _DIRECTORY / "libfuzzer" / "fuzz-mixed-conv2d"
        return link_with_library(compiler, sources, executable, flags, link)
    compiler = find_host_compiler()
    if compiler.is_msvc:
        raise BuildError("the fuzz target needs GCC or Clang")
    sources.append(tests / "fuzz_driver.cpp")
    sanitize = (f"-fsanitize={_SANITIZE}", *SANITIZER_FLAGS)
    # Beside the C++ tests under the same sanitizers, whose objects it shares.
    executable = build_directory(list(_SANITIZERS)) / "fuzz-mixed-conv2d"
    return link_with_library(compiler, sources, executable, sanitize, sanitize)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m build_tools.csrc_fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=int, default=60, help="how long to run (60)")
    parser.add_argument("--seed", type=int, default=0, help="0, the default: another every time")
    parser.add_argument("--corpus", type=Path, help="folder of inputs to start from")
    parser.add_argument("inputs", nargs="*", type=Path, metavar="INPUT", help="run these alone")
    options = parser.parse_args()
    if options.seconds < 1:
        parser.error(f"--seconds must be positive, got {options.seconds}")
    for path in options.inputs:
        if not path.is_file():
            parser.error(f"no such file: {path}")
    try:
        executable = build_executable()
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    (ROOT / _DIRECTORY).mkdir(parents=True, exist_ok=True)
    command = [str(executable), f"-artifact_prefix={_DIRECTORY}/"]
    if options.inputs:
        command += [str(path.resolve()) for path in options.inputs]
    else:
        command += [f"-max_total_time={options.seconds}", f"-seed={options.seed}"]
        if options.corpus is not None:
            options.corpus.mkdir(parents=True, exist_ok=True)
            command.append(str(options.corpus.resolve()))
    environment = {"UBSAN_OPTIONS": "print_stacktrace=1", **os.environ}
    status = subprocess.run(command, cwd=ROOT, env=environment).returncode
    return status if 0 <= status <= 255 else 1


if __name__ == "__main__":
    sys.exit(main())
