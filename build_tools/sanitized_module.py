"""Builds the CPU module under AddressSanitizer and UBSan: for tests only.

Python has to be started with the sanitizer's runtime preloaded.
"""

import sysconfig
from pathlib import Path

from build_tools.csrc_tests import SANITIZER_FLAGS, build_directory
from build_tools.extension import CPU_MODULE_SOURCES, link_module, module_flags
from build_tools.ninja_file import NinjaFile
from build_tools.toolchain import ROOT, BuildError, find_host_compiler, library_sources

_SANITIZERS = ("address", "undefined")


def build_module() -> Path:
    """Brings the module up to date; returns its path.

    Raises:
        BuildError: there is no compiler for it, or it failed.
    """
    compiler = find_host_compiler()
    if compiler.is_msvc:
        raise BuildError("sanitizers need GCC or Clang")
    sanitize = (f"-fsanitize={','.join(_SANITIZERS)}", *SANITIZER_FLAGS)
    # Beside the C++ tests under the same sanitizers, whose objects it shares.
    directory = build_directory(list(_SANITIZERS))
    ninja = NinjaFile(directory)
    objects = [
        ninja.compile_cpp(compiler, source.path, source.flags)
        for source in library_sources(compiler, sanitize)
    ]
    flags = (*module_flags(compiler), *sanitize)
    objects += [
        ninja.compile_cpp(compiler, Path("csrc", "python", name), flags)
        for name in CPU_MODULE_SOURCES
    ]
    output = directory / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    link_module(ninja, compiler, output, objects, sanitize)
    ninja.run([output])
    return ROOT / output
