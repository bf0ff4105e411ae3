#include "thread_team.h"

#include <algorithm>
#include <chrono>
#include <thread>

#include "thread_pool.h"

namespace dfs {
namespace {

constexpr int kEpochShift = 32;
constexpr int kPartsShift = 16;
constexpr uint64_t kCountMask = 0xffff;

uint64_t epoch_of(uint64_t ticket) { return ticket >> kEpochShift; }

// Who waits longer for others to finish their parts than this, several times what a part takes, is
// waiting for a thread that has lost its core to another program.
constexpr std::chrono::microseconds kPatience{50};
constexpr int kPausesPerLook = 64;

// Calls that go without a team after one in which a thread lost its core: more each time, since
// every try may cost as long as that other program keeps the core.
constexpr int kMostSkipped = 255;
std::atomic<int> calls_to_skip{0};
std::atomic<int> last_skipped{0};

bool may_form_team() {
  int left = calls_to_skip.load(std::memory_order_relaxed);
  while (left > 0) {
    if (calls_to_skip.compare_exchange_weak(left, left - 1, std::memory_order_relaxed)) {
      return false;
    }
  }
  return true;
}

void learn_from(bool lost_a_thread) {
  int skip = last_skipped.load(std::memory_order_relaxed);
  skip = lost_a_thread ? std::min(2 * skip + 1, kMostSkipped) : skip / 2;
  last_skipped.store(skip, std::memory_order_relaxed);
  if (lost_a_thread) calls_to_skip.store(skip, std::memory_order_relaxed);
}

}  // namespace

bool ThreadTeam::take_part(uint64_t epoch, int worker) {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  for (;;) {
    const uint64_t parts = ticket >> kPartsShift & kCountMask;
    const uint64_t part = ticket & kCountMask;
    if (epoch_of(ticket) != epoch || part >= parts) return false;
    if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel,
                                      std::memory_order_acquire)) {
      step_(context_, static_cast<int64_t>(part), worker);
      done_.fetch_add(1, std::memory_order_release);
      return true;
    }
  }
}

void ThreadTeam::lead(int64_t parts) {
  done_.store(0, std::memory_order_relaxed);
  const uint64_t epoch =
      (epoch_of(ticket_.load(std::memory_order_relaxed)) + 1) & ~uint64_t{0} >> kEpochShift;
  ticket_.store(epoch << kEpochShift | static_cast<uint64_t>(parts) << kPartsShift,
                std::memory_order_release);
  while (take_part(epoch, 0)) {
  }
  const auto finished = [&] { return done_.load(std::memory_order_acquire) == parts; };
  for (int i = 0; i < kPausesPerLook && !finished(); ++i) pause_thread();
  if (finished()) return;
  const auto start = std::chrono::steady_clock::now();
  while (!finished()) {
    if (std::chrono::steady_clock::now() - start > kPatience) {
      threads_ = 1;
      std::this_thread::yield();
    }
    pause_thread();
  }
}

void ThreadTeam::assist(int worker) {
  uint64_t seen = 0;
  for (;;) {
    uint64_t epoch = epoch_of(ticket_.load(std::memory_order_acquire));
    for (int i = 0; epoch == seen && !closed_.load(std::memory_order_acquire); ++i) {
      if (i % kPausesPerLook == kPausesPerLook - 1) std::this_thread::yield();
      pause_thread();
      epoch = epoch_of(ticket_.load(std::memory_order_acquire));
    }
    if (epoch == seen) return;
    while (take_part(epoch, worker)) {
    }
    seen = epoch;
  }
}

void with_team(int threads, const std::function<void(ThreadTeam&)>& body) {
  const int cores = static_cast<int>(std::thread::hardware_concurrency());
  const bool has_helpers = threads > 1 && threads <= cores && may_form_team();
  const int members = has_helpers ? threads : 1;
  ThreadTeam team(members);
  // The caller may be left with more than one of the tasks, and then has run the body already.
  parallel_for(members, min_thread_cost(), members, [&](int64_t, int worker) {
    if (worker > 0) return team.assist(worker);
    if (team.closed_.load(std::memory_order_relaxed)) return;
    try {
      body(team);
    } catch (...) {
      team.closed_.store(true, std::memory_order_release);
      throw;
    }
    team.closed_.store(true, std::memory_order_release);
  });
  if (has_helpers) learn_from(team.threads() == 1);
}

}  // namespace dfs
