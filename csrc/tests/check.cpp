#include "check.h"

#include "dispatch.h"

namespace dfs_test {

std::string rejection_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  fail(__FILE__, __LINE__, "nothing was rejected");
}

void for_each_isa(const std::function<void()>& call) {
  for (const std::string& isa : dfs::supported_isas()) {
    dfs::set_isa(isa);
    try {
      call();
    } catch (const Failure& failure) {
      dfs::set_isa("");
      throw Failure(isa + ": " + failure.what());
    }
  }
  dfs::set_isa("");
}

}  // namespace dfs_test
