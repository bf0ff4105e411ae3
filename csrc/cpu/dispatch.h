// Chooses the instruction set: the best that is compiled in and that this processor and its
// operating system support, unless DFS_CPU_ISA or set_isa names another.
#pragma once

#include <string>
#include <vector>

#include "kernel_table.h"

namespace dfs {

// Names of the usable instruction sets, slowest first.
std::vector<std::string> supported_isas();

// The kernels in use; decided at the first call. Throws std::invalid_argument for a DFS_CPU_ISA
// that is unknown or not usable here.
const KernelTable& kernels();

// Forces one instruction set; "" decides anew from the environment and the processor. Weights that
// were re-tiled before belong to the instruction set that was in use then.
void set_isa(const std::string& name);

}  // namespace dfs
