"""The host compiler, and which flags each C++ file of csrc/ is compiled with."""

import importlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"

# FMA stays available as an intrinsic; -ffp-contract=off keeps the compiler from using it unasked.
_AVX2 = ("-mavx2", "-mfma")
_AVX512_VNNI = (
    *_AVX2,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mavx512vnni",
)
_AVX512_VBMI = (*_AVX512_VNNI, "-mavx512vbmi", "-mavx512vbmi2")

# What csrc/cpu/isa_<name>.cpp adds to the baseline flags.
ISA_FLAGS: Mapping[str, tuple[str, ...]] = {
    "scalar": (),
    "avx2": _AVX2,
    "avx512_vnni": _AVX512_VNNI,
    "avx512_vbmi": _AVX512_VBMI,
}
_MSVC_ISA_FLAGS: Mapping[str, tuple[str, ...]] = {
    "scalar": (),
    "avx2": ("/arch:AVX2",),
    "avx512_vnni": ("/arch:AVX512",),
    "avx512_vbmi": ("/arch:AVX512",),
}

_X86_64_V2 = ("-march=x86-64-v2",)
# The same instruction sets for compilers older than the name (GCC 10, Clang 11).
_X86_64_V2_SPELT_OUT = ("-march=x86-64", "-msse3", "-mssse3", "-msse4.2", "-mpopcnt", "-mcx16")

_RELEASE = ("-O3",)


class BuildError(Exception):
    """The build cannot go on, for a reason that the message explains."""


@dataclass(frozen=True)
class HostCompiler:
    """A C++ compiler as a command line, with the environment it has to run in."""

    command: tuple[str, ...]
    is_msvc: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    def run_environment(self) -> dict[str, str]:
        return {**os.environ, **self.environment}

    def accepts(self, flags: Sequence[str]) -> bool:
        """Whether an empty program compiles with `flags`."""
        with tempfile.TemporaryDirectory() as directory:
            source = Path(directory, "probe.cpp")
            source.write_text("int main() { return 0; }\n")
            output = Path(directory, "probe.o")
            strict = ("/WX",) if self.is_msvc else ("-Werror",)
            to_output = (f"/Fo{output}",) if self.is_msvc else ("-o", str(output))
            compile_only = "/c" if self.is_msvc else "-c"
            result = subprocess.run(
                [*self.command, *flags, *strict, compile_only, str(source), *to_output],
                env=self.run_environment(),
                capture_output=True,
            )
        return result.returncode == 0


def find_host_compiler() -> HostCompiler:
    """The compiler named by CXX, or the platform's usual one.

    Raises:
        BuildError: no compiler was found.
    """
    override = os.environ.get("CXX")
    if override:
        command = tuple(shlex.split(override, posix=sys.platform != "win32"))
        if not command or shutil.which(command[0]) is None:
            raise BuildError(f"CXX={override!r} does not name a compiler that can be run")
        return HostCompiler(command, is_msvc=Path(command[0]).stem.lower() == "cl")
    if sys.platform == "win32":
        return _find_msvc()
    names = ("clang++", "c++", "g++") if sys.platform == "darwin" else ("g++", "c++", "clang++")
    for name in names:
        if shutil.which(name):
            return HostCompiler((name,))
    raise BuildError(
        f"no C++ compiler found: tried {', '.join(names)}. Install one (Debian and Ubuntu: "
        "apt install g++; macOS: xcode-select --install) or name one in CXX"
    )


def _find_msvc() -> HostCompiler:
    if shutil.which("cl"):
        return HostCompiler(("cl",), is_msvc=True)
    try:
        # The copy that setuptools carries; Python 3.12 and later have no other.
        module = importlib.import_module("setuptools._distutils.compilers.C.msvc")
        found = module._get_vc_env("x86_amd64" if is_x86_64() else "arm64")
        environment = {key.upper(): value for key, value in found.items()}
    except Exception as error:
        raise BuildError(
            "cl.exe not found: install the Visual Studio Build Tools (C++ workload) or run from a "
            "developer command prompt"
        ) from error
    command = shutil.which("cl", path=environment.get("PATH")) or "cl"
    return HostCompiler((command,), is_msvc=True, environment=environment)


def is_x86_64() -> bool:
    """Whether this Python, and so the modules built for it, is 64-bit x86."""
    return platform.machine().lower() in ("x86_64", "amd64") and sys.maxsize > 2**32


def split_environment_flags(name: str) -> tuple[str, ...]:
    """The flags in an environment variable such as CXXFLAGS."""
    return tuple(shlex.split(os.environ.get(name, "")))


def baseline_flags(
    compiler: HostCompiler, optimization: Sequence[str] = _RELEASE
) -> tuple[str, ...]:
    """Flags of every C++ file: nothing beyond x86-64-v2, floating point exactly as written."""
    if compiler.is_msvc:
        return ("/nologo", "/std:c++17", "/O2", "/fp:precise", "/EHsc", "/W3", "/bigobj")
    flags = [
        # First, so that a packager's choices cannot undo those that correctness rests on.
        *split_environment_flags("CPPFLAGS"),
        *split_environment_flags("CXXFLAGS"),
        "-std=c++17",
        *optimization,
        "-fPIC",
        "-fvisibility=hidden",
        "-fvisibility-inlines-hidden",
        "-ffp-contract=off",
        "-fno-fast-math",
        "-fno-lto",
        "-pthread",
        "-Wall",
        "-Wextra",
    ]
    if is_x86_64():
        flags += _X86_64_V2 if compiler.accepts(_X86_64_V2) else _X86_64_V2_SPELT_OUT
    if sys.platform == "darwin":
        flags += ["-arch", platform.machine(), "-stdlib=libc++"]
    return tuple(flags)


def _isa_of(source: Path) -> str | None:
    return source.stem[len("isa_") :] if source.stem.startswith("isa_") else None


@dataclass(frozen=True)
class SourceFile:
    """One C++ file, relative to the project's root, with its own flags."""

    path: Path
    flags: tuple[str, ...]

    @property
    def isa(self) -> str | None:
        """The instruction set that the file is written for; None for baseline code."""
        return _isa_of(self.path)


def include_flags(compiler: HostCompiler) -> tuple[str, ...]:
    """Where csrc/ finds its own headers."""
    option = "/I" if compiler.is_msvc else "-I"
    return tuple(f"{option}{Path('csrc', name)}" for name in ("include", "cpu", "engine"))


def system_include_flags(compiler: HostCompiler, *directories: str) -> tuple[str, ...]:
    """Where other projects' headers are; their warnings are not ours to fix."""
    if compiler.is_msvc:
        return tuple(f"/I{directory}" for directory in directories)
    return tuple(flag for directory in directories for flag in ("-isystem", directory))


def library_sources(
    compiler: HostCompiler, optimization: Sequence[str] = _RELEASE
) -> list[SourceFile]:
    """The CPU code that needs neither Python nor CUDA, each file with all of its flags.

    Raises:
        BuildError: there is no scalar code, or an isa_*.cpp file that no flags are known for.
    """
    baseline = (*baseline_flags(compiler, optimization), *include_flags(compiler))
    table = _MSVC_ISA_FLAGS if compiler.is_msvc else ISA_FLAGS
    paths = [
        path.relative_to(ROOT)
        for folder in ("cpu", "engine")
        for path in sorted((CSRC / folder).glob("*.cpp"))
    ]

    isas = []
    for path in paths:
        isa = _isa_of(path)
        if isa is None:
            continue
        if isa not in table:
            raise BuildError(f"{path}: no flags are known for {isa!r}, only for {', '.join(table)}")
        if isa != "scalar" and not is_x86_64():
            continue
        if not compiler.accepts((*baseline, *table[isa])):
            print(f"note: the compiler refuses {' '.join(table[isa])}: building without {isa}")
            continue
        isas.append(isa)
    if "scalar" not in isas:
        raise BuildError(f"no scalar kernels in {CSRC / 'cpu'}")

    define = "/D" if compiler.is_msvc else "-D"
    linked = tuple(f"{define}DFS_HAVE_ISA_{isa.upper()}=1" for isa in isas)
    sources = []
    for path in paths:
        isa = _isa_of(path)
        if isa is None:
            sources.append(SourceFile(path, (*baseline, *linked)))
        elif isa in isas:
            flags = (*baseline, *linked, *table[isa], f"{define}DFS_ISA={isa}")
            sources.append(SourceFile(path, flags))
    return sources
