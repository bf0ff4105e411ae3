#include "thread_pool.h"

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"

#ifndef _WIN32
#include <sys/wait.h>
#include <unistd.h>
#endif
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace dfs_test {
namespace {

constexpr double kCostly = 1e9;

// Every task runs once, on a worker with a number of its own.
void check_run(int64_t count, int threads, double cost = kCostly) {
  std::vector<std::atomic<int>> runs(static_cast<size_t>(count));
  std::vector<std::atomic<int>> busy(static_cast<size_t>(threads < 1 ? 1 : threads));
  dfs::parallel_for(count, cost, threads, [&](int64_t task, int worker) {
    CHECK(busy[static_cast<size_t>(worker)].fetch_add(1) == 0, "worker ", worker, " is shared");
    runs[static_cast<size_t>(task)].fetch_add(1);
    busy[static_cast<size_t>(worker)].fetch_sub(1);
  });
  for (int64_t i = 0; i < count; ++i) {
    const int times = runs[static_cast<size_t>(i)].load();
    CHECK(times == 1, "task ", i, " of ", count, " ran ", times, " times");
  }
}

}  // namespace

DFS_TEST(pool_runs_every_task_once) {
  for (int round = 0; round < 20; ++round) {
    for (const int threads : {1, 2, 3, 5, 2, 0, -1, 8, 1}) {
      for (const int64_t count : {0, 1, 2, 7, 100}) {
        check_run(count, threads);
        check_run(count, threads, 100.0);
      }
    }
  }
}

DFS_TEST(pool_uses_its_threads) {
  std::atomic<int> arrived{0};
  dfs::parallel_for(3, kCostly, 3, [&](int64_t, int) {
    arrived.fetch_add(1);
    // Only if all three run at the same time do they get past this.
    const auto start = std::chrono::steady_clock::now();
    while (arrived.load() < 3) {
      CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(60), "nobody came");
      std::this_thread::yield();
    }
  });
}

DFS_TEST(pool_runs_small_work_inline) {
  const std::thread::id caller = std::this_thread::get_id();
  dfs::parallel_for(100, 1.0, 4, [&](int64_t, int worker) {
    CHECK(std::this_thread::get_id() == caller && worker == 0, "on another thread");
  });
}

DFS_TEST(pool_propagates_exceptions) {
  for (const int threads : {1, 2, 3}) {
    bool caught = false;
    try {
      dfs::parallel_for(1000, kCostly, threads, [](int64_t task, int) {
        if (task == 13) throw std::runtime_error("task 13");
      });
    } catch (const std::runtime_error& error) {
      caught = std::string(error.what()) == "task 13";
    }
    CHECK(caught, "with ", threads, " threads");
    check_run(50, threads);
  }
}

DFS_TEST(pool_nests) {
  std::atomic<int> runs{0};
  dfs::parallel_for(6, kCostly, 3, [&](int64_t, int) {
    dfs::parallel_for(5, kCostly, 3, [&](int64_t, int worker) {
      CHECK(worker == 0, "an inner run got helpers");
      runs.fetch_add(1);
    });
  });
  CHECK(runs.load() == 30, runs.load());
}

DFS_TEST(pool_serves_several_callers) {
  std::vector<std::thread> callers;
  std::atomic<int> failures{0};
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([i, &failures] {
      try {
        for (int round = 0; round < 200; ++round) check_run(17, 1 + (i + round) % 4);
      } catch (const std::exception&) {
        failures.fetch_add(1);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(failures.load() == 0, failures.load(), " callers failed");
}

#if defined(__SSE__)
DFS_TEST(pool_ignores_the_callers_float_flags) {
  constexpr unsigned kFlushToZero = 0x8040;
  const unsigned saved = _mm_getcsr();
  for (const int threads : {1, 3}) {
    _mm_setcsr(saved | kFlushToZero);
    std::atomic<int> flushed{0};
    dfs::parallel_for(50, kCostly, threads, [&](int64_t, int) {
      volatile float tiny = 0x1p-140f;
      if (tiny * 1.0f == 0.0f) flushed.fetch_add(1);
    });
    const unsigned after = _mm_getcsr();
    _mm_setcsr(saved);
    CHECK(flushed.load() == 0, flushed.load(), " tasks flushed denormals");
    CHECK((after & kFlushToZero) == kFlushToZero, "the caller's flags were not restored");
  }
}
#endif

// ThreadSanitizer cannot follow threads that start in the child of a fork.
#if !defined(_WIN32) && !defined(__SANITIZE_THREAD__)
namespace {

// Forks, runs the pool in the child and waits for it.
void check_fork() {
  const pid_t child = fork();
  CHECK(child >= 0, "fork failed");
  if (child == 0) {
    alarm(60);
    int status = 1;
    try {
      check_run(40, 3);
      check_run(40, 2);
      status = 0;
    } catch (const std::exception&) {
    }
    _exit(status);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child, "waitpid failed");
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child ended with status ", status);
}

}  // namespace

DFS_TEST(pool_survives_a_fork) {
  check_run(10, 3);
  for (int i = 0; i < 5; ++i) check_fork();
  check_run(10, 3);
}

DFS_TEST(pool_survives_a_fork_while_it_runs) {
  std::atomic<bool> stop{false};
  std::thread runner([&] {
    while (!stop.load()) {
      dfs::parallel_for(64, kCostly, 3, [](int64_t, int) {
        std::this_thread::sleep_for(std::chrono::microseconds(50));
      });
    }
  });
  std::string problem;
  try {
    for (int i = 0; i < 20; ++i) check_fork();
  } catch (const std::exception& error) {
    problem = error.what();
  }
  stop.store(true);
  runner.join();
  CHECK(problem.empty(), problem);
}
#endif

}  // namespace dfs_test
