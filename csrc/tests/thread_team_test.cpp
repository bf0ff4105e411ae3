#include "thread_team.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"
#include "thread_pool.h"

namespace dfs_test {
namespace {

// Steps that each read what the whole of the step before wrote.
void check_steps(dfs::ThreadTeam& team, int64_t parts, int steps) {
  std::vector<int64_t> values(static_cast<size_t>(parts), 0);
  std::vector<int64_t> next(values);
  for (int step = 0; step < steps; ++step) {
    team.run(parts, [&](int64_t part, int) {
      int64_t sum = 0;
      for (const int64_t value : values) sum += value;
      next[static_cast<size_t>(part)] = sum % 1000 + part + 1;
    });
    int64_t sum = 0;
    for (const int64_t value : values) sum += value;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t got = next[static_cast<size_t>(part)];
      CHECK(got == sum % 1000 + part + 1, "step ", step, ", part ", part, ": ", got);
    }
    std::swap(values, next);
  }
}

}  // namespace

DFS_TEST(team_does_every_part_of_every_step_once) {
  for (const int threads : {1, 2, 3, 64}) {
    dfs::with_team(threads, [&](dfs::ThreadTeam& team) {
      CHECK(team.threads() >= 1 && team.threads() <= threads, "threads ", team.threads());
      for (const int64_t parts : {1, 2, 3, 17}) check_steps(team, parts, 300);
    });
  }
}

DFS_TEST(team_tells_concurrent_calls_apart) {
  dfs::with_team(2, [](dfs::ThreadTeam& team) {
    const int members = team.threads();
    std::vector<std::atomic<int>> inside(static_cast<size_t>(members));
    std::atomic<int> calls{0};
    for (int step = 0; step < 2000; ++step) {
      team.run(8, [&](int64_t, int worker) {
        CHECK(worker >= 0 && worker < members, "worker ", worker);
        CHECK(inside[static_cast<size_t>(worker)].fetch_add(1) == 0, "two calls as one worker");
        calls.fetch_add(1);
        inside[static_cast<size_t>(worker)].fetch_sub(1);
      });
    }
    CHECK(calls.load() == 16000, "calls ", calls.load());
  });
}

DFS_TEST(team_runs_its_body_once_where_the_pool_is_busy) {
  std::atomic<int> bodies{0};
  dfs::parallel_for(2, 1e9, 2, [&](int64_t, int) {
    dfs::with_team(2, [&](dfs::ThreadTeam& team) {
      bodies.fetch_add(1);
      check_steps(team, 3, 50);
    });
  });
  CHECK(bodies.load() == 2, "bodies ", bodies.load());
}

DFS_TEST(team_lets_its_helpers_go_when_the_body_throws) {
  for (int i = 0; i < 20; ++i) {
    bool caught = false;
    try {
      dfs::with_team(2, [](dfs::ThreadTeam& team) {
        check_steps(team, 2, 5);
        throw std::runtime_error("body");
      });
    } catch (const std::runtime_error&) {
      caught = true;
    }
    CHECK(caught, "the exception is lost");
  }
  dfs::with_team(2, [](dfs::ThreadTeam& team) { check_steps(team, 2, 5); });
}

// The member that holds up the others stands for one that has lost its core.
DFS_TEST(team_goes_on_alone_after_waiting_for_a_helper) {
  // Whether a helper comes in time is up to the machine: try until one was seen.
  for (int attempt = 0; attempt < 1000; ++attempt) {
    bool helped = false;
    bool alone_afterwards = true;
    dfs::with_team(2, [&](dfs::ThreadTeam& team) {
      if (team.threads() < 2) return;
      std::atomic<bool> slow{false};
      team.run(2, [&](int64_t part, int worker) {
        if (worker > 0) slow.store(true);
        const auto wait = std::chrono::milliseconds(worker > 0 ? 5 : part == 0 ? 1 : 0);
        std::this_thread::sleep_for(wait);
      });
      helped = slow.load();
      if (!helped) return;
      team.run(16, [&](int64_t, int worker) {
        if (worker > 0) alone_afterwards = false;
      });
      alone_afterwards = alone_afterwards && team.threads() == 1;
    });
    if (!helped) continue;
    CHECK(alone_afterwards, "it still counts on the helper");
    return;
  }
  CHECK(std::thread::hardware_concurrency() < 2, "no helper ever came");
}

}  // namespace dfs_test
