#include "dispatch.h"

#include <cstdlib>
#include <string>

#include "check.h"

namespace dfs_test {

DFS_TEST(dispatch_forces_each_isa) {
  for (const std::string& isa : dfs::supported_isas()) {
    dfs::set_isa(isa);
    CHECK(dfs::kernels().name == isa, dfs::kernels().name);
  }
  dfs::set_isa("");
}

#ifndef _WIN32
DFS_TEST(dispatch_obeys_the_environment) {
  const char* saved = std::getenv("DFS_CPU_ISA");
  const std::string before = saved == nullptr ? "" : saved;
  setenv("DFS_CPU_ISA", "scalar", 1);
  dfs::set_isa("");
  const std::string forced = dfs::kernels().name;
  setenv("DFS_CPU_ISA", "sse9", 1);
  const std::string message = rejection_of([] { dfs::set_isa(""); });
  setenv("DFS_CPU_ISA", before.c_str(), 1);
  dfs::set_isa("");
  CHECK(forced == "scalar", forced);
  CHECK(message.find("DFS_CPU_ISA") != std::string::npos, message);
  CHECK(message.find("sse9") != std::string::npos, message);
  CHECK(message.find("scalar") != std::string::npos, message);
}
#endif

DFS_TEST(dispatch_rejects_unknown_names) {
  const std::string before = dfs::kernels().name;
  const std::string message = rejection_of([] { dfs::set_isa("AVX2 "); });
  CHECK(message.find("AVX2 ") != std::string::npos, message);
  CHECK(dfs::kernels().name == before, "a rejected name changed the kernels");
}

}  // namespace dfs_test
