"""Builds the native modules; everything else about the package is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, setup

# A PEP 517 front end does not put the project's own directory on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from build_tools.extension import Build, BuildExtension

setup(
    ext_modules=[
        Extension("dfs_kernels._cpu", sources=[]),
        Extension("dfs_kernels._cuda", sources=[]),
    ],
    cmdclass={"build": Build, "build_ext": BuildExtension},
)
