"""The setuptools commands that build dfs_kernels._cpu and dfs_kernels._cuda with ninja."""

import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

from build_tools.cuda import CudaToolchain, find_cuda
from build_tools.ninja_file import NinjaFile, StepFailedError
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
    system_include_flags,
)

_CPU = "dfs_kernels._cpu"
_CUDA = "dfs_kernels._cuda"
# Of the CPU module, in csrc/python.
CPU_MODULE_SOURCES = ("cpu_module.cpp", "engine_bindings.cpp")


def build_directory() -> Path:
    """Where the modules and their objects go, relative to the project's root."""
    return Path("build", "native", f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}")


def module_flags(compiler: HostCompiler) -> tuple[str, ...]:
    """Flags of the files that hold Python bindings."""
    try:
        import pybind11
    except ImportError as error:
        raise BuildError("pybind11 not found: pip install pybind11") from error
    directories = [
        pybind11.get_include(),
        *dict.fromkeys(sysconfig.get_path(name) for name in ("include", "platinclude")),
    ]
    return (
        *baseline_flags(compiler),
        *include_flags(compiler),
        *system_include_flags(compiler, *directories),
    )


def _python_library_directory() -> str:
    return str(Path(sys.base_prefix, "libs"))


def link_module(
    ninja: NinjaFile,
    compiler: HostCompiler,
    output: Path,
    objects: Sequence[Path],
    flags: Sequence[str] = (),
) -> Path:
    """Adds a Python module made of `objects`; returns `output`. `flags` are for GCC and Clang."""
    names = [str(path) for path in objects]
    if compiler.is_msvc:
        command = [*compiler.command, "/nologo", "/LD", *names, "/link", f"/OUT:{output}"]
        command.append(f"/LIBPATH:{_python_library_directory()}")
    else:
        command = [*compiler.command, *split_environment_flags("LDFLAGS"), "-pthread", *flags]
        if sys.platform == "darwin":
            command += ["-bundle", "-undefined", "dynamic_lookup", "-arch", platform.machine()]
        else:
            command += ["-shared", "-Wl,--as-needed"]
        command += [*names, "-o", str(output)]
    return ninja.link(output, objects, command)


def compile_library(compiler: HostCompiler) -> list[Path]:
    """Brings the CPU module's objects that need no Python up to date; returns their paths.

    Raises:
        BuildError: the compiler failed.
    """
    ninja = NinjaFile(build_directory(), compiler.environment, "library.ninja")
    objects = _add_library(ninja, compiler)
    ninja.run(objects)
    return objects


def _add_library(ninja: NinjaFile, compiler: HostCompiler) -> list[Path]:
    return [
        ninja.compile_cpp(compiler, source.path, source.flags)
        for source in library_sources(compiler)
    ]


def _add_cpu_module(ninja: NinjaFile, compiler: HostCompiler, output: Path) -> None:
    objects = _add_library(ninja, compiler)
    for name in CPU_MODULE_SOURCES:
        module = Path("csrc", "python", name)
        if not (ROOT / module).is_file():
            raise BuildError(f"{module} is missing")
        objects.append(ninja.compile_cpp(compiler, module, module_flags(compiler)))
    link_module(ninja, compiler, output, objects)


def _add_cuda_module(
    ninja: NinjaFile, compiler: HostCompiler, cuda: CudaToolchain, output: Path
) -> None:
    flags = (*cuda.compile_flags, "-Icsrc/include", "-Icsrc/cuda")
    objects = [
        ninja.compile_cuda(cuda.nvcc, path.relative_to(ROOT), flags)
        for path in sorted((CSRC / "cuda").glob("*.cu"))
    ]
    flags_of_module = list(module_flags(compiler))
    define = "/D" if compiler.is_msvc else "-D"
    flags_of_module.append("-Icsrc/cuda")
    flags_of_module.append(f'{define}DFS_CUDA_ARCHITECTURES="{",".join(cuda.architectures)}"')
    module = Path("csrc", "python", "cuda_module.cpp")
    objects.append(ninja.compile_cpp(compiler, module, flags_of_module))

    command = [cuda.nvcc, *cuda.host_flags, "-shared", "-cudart", "static"]
    if sys.platform == "win32":
        command.append(f"-L{_python_library_directory()}")
    command += [*(str(path) for path in objects), "-o", str(output)]
    ninja.link(output, objects, command)


def _replace_atomically(source: Path, destination: Path) -> None:
    """Copies beside and renames, since a running process may have the old module mapped."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    try:
        shutil.copy2(source, temporary)
        temporary.replace(destination)
    finally:
        temporary.unlink(missing_ok=True)


class Build(build):
    """Starts from an empty tree, or files that were renamed or removed would be packaged still."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildExtension(build_ext):
    """Compiles csrc/ with one ninja file and puts the modules where setuptools wants them."""

    def run(self) -> None:
        try:
            built = self._compile()
        except BuildError as error:
            raise CompileError(str(error)) from None
        for extension in list(self.extensions):
            destination = Path(self.get_ext_fullpath(extension.name))
            if extension.name in built:
                _replace_atomically(built[extension.name], destination)
            else:
                # A module left from an earlier build would be imported as if it had been built now.
                destination.unlink(missing_ok=True)
                self.extensions.remove(extension)

    def _compile(self) -> dict[str, Path]:
        compiler = find_host_compiler()
        directory = build_directory()
        cuda = find_cuda(compiler, ROOT / directory / "cuda_probe.json")
        ninja = NinjaFile(directory, compiler.environment)

        outputs = {_CPU: directory / Path(self.get_ext_filename(_CPU)).name}
        _add_cpu_module(ninja, compiler, outputs[_CPU])
        if cuda is not None:
            outputs[_CUDA] = directory / Path(self.get_ext_filename(_CUDA)).name
            _add_cuda_module(ninja, compiler, cuda, outputs[_CUDA])
        try:
            ninja.run(list(outputs.values()))
        except StepFailedError as error:
            if cuda is None:
                raise
            hint = "if a CUDA file failed, DFS_BUILD_CUDA=0 builds without CUDA"
            raise BuildError(f"{error}; {hint}") from None
        return {name: ROOT / path for name, path in outputs.items()}
