// csrc-tests [--seed N] [--percent N] [part of a test's name]
//
// --percent: the share of the usual random cases to draw, for slow machines and for long runs.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "dispatch.h"

namespace dfs_test {
namespace {

struct Entry {
  const char* name;
  void (*body)();
};

std::vector<Entry>& tests() {
  static std::vector<Entry> list;
  return list;
}

uint64_t run_seed = 20240817;
int run_percent = 100;

}  // namespace

Test::Test(const char* name, void (*body)()) { tests().push_back({name, body}); }

uint64_t seed() { return run_seed; }

int case_count(int full) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  full /= 6;
#endif
  return std::max(full * run_percent / 100, 1);
}

namespace {

int run_tests(const std::string& filter) {
  int failed = 0;
  int run = 0;
  for (const Entry& entry : tests()) {
    if (std::string(entry.name).find(filter) == std::string::npos) continue;
    ++run;
    const auto start = std::chrono::steady_clock::now();
    std::string problem;
    try {
      entry.body();
    } catch (const std::exception& error) {
      problem = error.what();
    }
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    std::printf("%s %s (%.2f s)\n", problem.empty() ? "ok  " : "FAIL", entry.name, elapsed.count());
    if (!problem.empty()) {
      std::printf("     %s\n", problem.c_str());
      ++failed;
    }
    std::fflush(stdout);
  }
  std::printf("%d tests, %d failed\n", run, failed);
  return failed == 0 && run > 0 ? 0 : 1;
}

}  // namespace
}  // namespace dfs_test

int main(int argc, char** argv) {
  std::string filter;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--seed") == 0 && i + 1 < argc) {
      dfs_test::run_seed = std::strtoull(argv[++i], nullptr, 10);
    } else if (std::strcmp(argv[i], "--percent") == 0 && i + 1 < argc) {
      dfs_test::run_percent = std::max(std::atoi(argv[++i]), 0);
    } else {
      filter = argv[i];
    }
  }
  std::printf("seed %llu, instruction sets:", static_cast<unsigned long long>(dfs_test::seed()));
  for (const std::string& isa : dfs::supported_isas()) std::printf(" %s", isa.c_str());
  std::printf("\n");
  return dfs_test::run_tests(filter);
}
