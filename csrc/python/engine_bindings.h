// The engine for Python, in the module of the CPU kernels.
#pragma once

#include <pybind11/pybind11.h>

void bind_engine(pybind11::module_& module);
