"""Writes a ninja file in which every source has its own flags, and runs it."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from build_tools.toolchain import ROOT, BuildError, HostCompiler


class StepFailedError(BuildError):
    """A compiler or linker failed; what it said has been printed."""


_HEADER = """\
ninja_required_version = 1.5
builddir = {directory}

rule gcc
  command = $cmd
  depfile = $out.d
  deps = gcc
  description = compile $in

rule msvc
  command = $cmd
  deps = msvc
  description = compile $in

rule link
  command = $cmd
  description = link $out
"""


def max_jobs() -> int:
    """How many compilers may run at a time: MAX_JOBS, or the processors this process may use.

    Raises:
        BuildError: MAX_JOBS is not a positive integer.
    """
    text = os.environ.get("MAX_JOBS", "").strip()
    if not text:
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1
    if not text.isdecimal() or int(text) < 1:
        raise BuildError(f"MAX_JOBS must be a positive integer, got {text!r}")
    return int(text)


def _escape(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _join(command: Sequence[str]) -> str:
    line = subprocess.list2cmdline(command) if sys.platform == "win32" else shlex.join(command)
    return line.replace("$", "$$")


def _find_ninja() -> str:
    try:
        import ninja

        candidate = shutil.which("ninja", path=ninja.BIN_DIR) if ninja.BIN_DIR else None
    except (ImportError, AttributeError):
        candidate = None
    found = candidate or shutil.which("ninja")
    if found is None:
        raise BuildError("ninja not found: pip install ninja")
    return found


@dataclass
class NinjaFile:
    """The steps of one build. Paths are relative to the project's root, where ninja runs.

    Files of other names in the same directory share what they make.
    """

    directory: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    name: str = "build.ninja"
    _edges: list[str] = field(default_factory=list)
    _outputs: set[Path] = field(default_factory=set)

    def _add(
        self,
        rule: str,
        output: Path,
        inputs: Sequence[Path],
        command: Sequence[str],
        implicit: Sequence[Path] = (),
    ) -> Path:
        if output in self._outputs:
            return output
        self._outputs.add(output)
        names = " ".join(_escape(str(path)) for path in inputs)
        after = "".join(f" {_escape(str(path))}" for path in implicit)
        separator = " |" if implicit else ""
        self._edges.append(
            f"build {_escape(str(output))}: {rule} {names}{separator}{after}\n"
            f"  cmd = {_join(command)}\n"
        )
        return output

    def _object_path(self, source: Path, extension: str) -> Path:
        return (self.directory / "obj" / source).with_name(source.name + extension)

    def compile_cpp(self, compiler: HostCompiler, source: Path, flags: Sequence[str]) -> Path:
        """Adds a C++ file; returns its object file."""
        output = self._object_path(source, ".obj" if compiler.is_msvc else ".o")
        if compiler.is_msvc:
            command = (*compiler.command, *flags, "/showIncludes", "/c", str(source))
            return self._add("msvc", output, [source], (*command, f"/Fo{output}"))
        dependencies = ("-MD", "-MF", f"{output}.d")
        command = (*compiler.command, *flags, *dependencies, "-c", str(source), "-o", str(output))
        return self._add("gcc", output, [source], command)

    def compile_cuda(self, nvcc: str, source: Path, flags: Sequence[str]) -> Path:
        """Adds a CUDA file; returns its object file."""
        output = self._object_path(source, ".obj" if sys.platform == "win32" else ".o")
        dependencies = ("-MD", "-MF", f"{output}.d")
        command = (nvcc, *flags, *dependencies, "-c", str(source), "-o", str(output))
        return self._add("gcc", output, [source], command)

    def link(
        self,
        output: Path,
        objects: Sequence[Path],
        command: Sequence[str],
        implicit: Sequence[Path] = (),
    ) -> Path:
        """Adds a link step; `command` must hold the objects and the output itself."""
        return self._add("link", output, objects, command, implicit)

    def run(self, targets: Sequence[Path]) -> None:
        """Brings the targets up to date; ninja prints the failing command and its output.

        Raises:
            StepFailedError: a step failed.
            BuildError: ninja could not be started.
        """
        path = ROOT / self.directory / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = (
            _HEADER.format(directory=_escape(str(self.directory))) + "\n" + "\n".join(self._edges)
        )
        if not path.is_file() or path.read_text() != text:
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(text)
            temporary.replace(path)
        command = [_find_ninja(), "-f", str(path.relative_to(ROOT)), "-j", str(max_jobs())]
        sys.stdout.flush()
        result = subprocess.run(
            [*command, *(str(target) for target in targets)],
            cwd=ROOT,
            env={**os.environ, **self.environment},
        )
        if result.returncode != 0:
            raise StepFailedError(
                f"compiling the native code failed (ninja exit status {result.returncode}); the "
                "compiler's messages are above"
            )
