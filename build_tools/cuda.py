"""Finds nvcc, and which GPU architectures it can compile for."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from build_tools.toolchain import BuildError, HostCompiler, baseline_flags

# 90a code runs on compute capability 9.0 only, so what is newer is served by the PTX.
_ARCHITECTURES = {
    "sm_80": "arch=compute_80,code=sm_80",
    "sm_86": "arch=compute_86,code=sm_86",
    "sm_89": "arch=compute_89,code=sm_89",
    "sm_90a": "arch=compute_90a,code=sm_90a",
    "compute_90": "arch=compute_90,code=compute_90",
}

# Includes the headers in which an nvcc and a host compiler that do not fit together clash.
_PROBE_SOURCE = """\
#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>
#include <cuda_runtime.h>
__global__ void probe(float* out) { out[threadIdx.x] = 1.0f; }
void launch(float* out) { probe<<<1, 32>>>(out); }
"""


@dataclass(frozen=True)
class CudaToolchain:
    """A working nvcc, the architectures it takes, and the flags for every CUDA file."""

    nvcc: str
    architectures: tuple[str, ...]
    host_flags: tuple[str, ...]

    @property
    def compile_flags(self) -> tuple[str, ...]:
        gencode = (("-gencode", _ARCHITECTURES[name]) for name in self.architectures)
        return (
            *self.host_flags,
            "-O3",
            "-std=c++17",
            "--fmad=false",
            "-lineinfo",
            *(flag for pair in gencode for flag in pair),
        )


def find_cuda(compiler: HostCompiler, cache: Path) -> CudaToolchain | None:
    """The CUDA tools to build with; None means a package for CPUs only.

    DFS_BUILD_CUDA=0 never looks; 1 insists; unset takes what there is.

    Raises:
        BuildError: DFS_BUILD_CUDA is 1 and there is no working nvcc, or is another value.
    """
    choice = os.environ.get("DFS_BUILD_CUDA", "").strip()
    if choice not in ("", "0", "1"):
        raise BuildError(f"DFS_BUILD_CUDA must be 0, 1 or unset, got {choice!r}")
    if choice == "0":
        return None
    nvcc = _find_nvcc()
    if nvcc is None:
        if choice == "1":
            raise BuildError(
                "DFS_BUILD_CUDA=1, but nvcc was found neither in CUDA_HOME or CUDA_PATH nor on "
                "PATH. Install the CUDA toolkit, or unset DFS_BUILD_CUDA for a CPU-only package"
            )
        print("note: nvcc not found: building without CUDA")
        return None
    try:
        return _probe(nvcc, compiler, cache)
    except BuildError as error:
        if choice == "1":
            raise
        print(f"WARNING: {error}\nWARNING: building without CUDA", file=sys.stderr, flush=True)
        return None


def _find_nvcc() -> str | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home:
            found = shutil.which("nvcc", path=str(Path(home, "bin")))
            if found:
                return found
    return shutil.which("nvcc")


def _host_flags(compiler: HostCompiler) -> tuple[str, ...]:
    if compiler.is_msvc:
        return ("-Xcompiler", "/O2,/EHsc,/fp:precise")
    kept = ("-fPIC", "-fvisibility", "-ffp-contract", "-fno-lto", "-march", "-ms", "-mpopcnt")
    passed = [flag for flag in baseline_flags(compiler) if flag.startswith(kept)]
    flags = ["-Xcompiler", ",".join([*passed, "-Wall"])]
    # Without CXX, nvcc's own choice is the one its maker tested.
    if os.environ.get("CXX") and not os.environ.get("NVCC_CCBIN"):
        flags += ["-ccbin", compiler.command[0]]
    return tuple(flags)


def _default_host_compiler() -> str:
    found = shutil.which("cl" if sys.platform == "win32" else "gcc")
    if found is None or sys.platform == "win32":
        return found or ""
    version = subprocess.run([found, "--version"], capture_output=True, text=True)
    return f"{found} {version.stdout.partition(chr(10))[0]}"


def _compile_probe(nvcc: str, flags: Sequence[str]) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "probe.cu")
        source.write_text(_PROBE_SOURCE)
        command = [nvcc, *flags, "-c", str(source), "-o", str(Path(directory, "probe.o"))]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _probe(nvcc: str, compiler: HostCompiler, cache: Path) -> CudaToolchain:
    host_flags = _host_flags(compiler)
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    if version.returncode != 0:
        raise BuildError(f"{nvcc} --version failed:\n{version.stdout}{version.stderr}".rstrip())
    settings = ("NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
    key = [
        nvcc,
        version.stdout,
        _default_host_compiler(),
        *host_flags,
        *(os.environ.get(name, "") for name in settings),
    ]

    try:
        cached = json.loads(cache.read_text())
        if cached["key"] == key:
            return CudaToolchain(nvcc, tuple(cached["architectures"]), host_flags)
    except (OSError, ValueError, KeyError, TypeError):
        pass

    accepted = []
    for name, code in _ARCHITECTURES.items():
        result = _compile_probe(nvcc, (*host_flags, "-std=c++17", "-gencode", code))
        if result.returncode == 0:
            accepted.append(name)
            continue
        whole = _compile_probe(nvcc, (*host_flags, "-std=c++17")) if not accepted else None
        if whole is not None and whole.returncode != 0:
            command = shlex.join([nvcc, *host_flags, "-std=c++17"])
            raise BuildError(f"nvcc cannot compile a trivial file ({command}):\n{whole.stdout}")
        print(f"note: {nvcc} refuses {code}: building without {name}")
    if not accepted:
        raise BuildError(f"{nvcc} compiles for none of {', '.join(_ARCHITECTURES)}")

    cache.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"key": key, "architectures": accepted}))
    temporary.replace(cache)
    return CudaToolchain(nvcc, tuple(accepted), host_flags)
