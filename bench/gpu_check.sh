#!/usr/bin/env bash
# Builds, tests and benchmarks everything that needs an NVIDIA GPU; --help says more.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m bench.gpu.check "$@"
