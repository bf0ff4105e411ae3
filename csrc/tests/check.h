// The little that the tests need of a test framework.
#pragma once

#include <cstdint>
#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace dfs_test {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Registers a test at start-up.
struct Test {
  Test(const char* name, void (*body)());
};

// The seed of this run, for tests that draw random cases.
uint64_t seed();

// How many cases a test should draw that takes `full` in an ordinary run: fewer under sanitizers,
// and the share that the command line asks for.
int case_count(int full);

template <typename... Parts>
[[noreturn]] void fail(const char* file, int line, const Parts&... parts) {
  std::ostringstream text;
  text.precision(9);
  text << file << ":" << line << ": ";
  (text << ... << parts);
  throw Failure(text.str());
}

// The message of the std::invalid_argument that `call` throws.
std::string rejection_of(const std::function<void()>& call);

// Runs `call` once per instruction set of this machine.
void for_each_isa(const std::function<void()>& call);

}  // namespace dfs_test

#define DFS_TEST(name)                                    \
  static void name();                                     \
  static const ::dfs_test::Test name##_test{#name, name}; \
  static void name()

#define CHECK(condition, ...)                                                          \
  do {                                                                                 \
    if (!(condition)) {                                                                \
      ::dfs_test::fail(__FILE__, __LINE__, "not true: " #condition "; ", __VA_ARGS__); \
    }                                                                                  \
  } while (false)
