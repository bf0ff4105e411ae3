// Lets the pool use several threads for work that is too small to be worth it.
#pragma once

#include "thread_pool.h"

namespace dfs_test {

class SplitSmallWork {
 public:
  SplitSmallWork() : saved_(dfs::min_thread_cost()) { dfs::set_min_thread_cost(1.0); }
  ~SplitSmallWork() { dfs::set_min_thread_cost(saved_); }

 private:
  double saved_;
};

}  // namespace dfs_test
