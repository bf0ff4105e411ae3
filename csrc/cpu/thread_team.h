// Threads that stay together for a series of short parallel steps, each of a few microseconds:
// far less than the pool takes to wake a helper.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace dfs {

class ThreadTeam {
 public:
  // As many as run() may use at a time, the caller included; 1 where there is nobody to help, and
  // from the moment on that one of them has lost its core to another program.
  int threads() const { return threads_; }

  // Calls fn(part, worker) once for every part in [0, parts) and returns when all are done;
  // worker < threads() tells concurrent calls apart. At most 65535 parts. fn must not throw.
  // Whoever is not yet there, or is kept from running, is not waited for: parts are taken one by
  // one.
  template <typename Fn>
  void run(int64_t parts, const Fn& fn) {
    step_ = [](const void* context, int64_t part, int worker) {
      (*static_cast<const Fn*>(context))(part, worker);
    };
    context_ = &fn;
    if (threads_ > 1) {
      lead(parts);
      context_ = nullptr;
      return;
    }
    for (int64_t part = 0; part < parts; ++part) fn(part, 0);
  }

 private:
  friend void with_team(int threads, const std::function<void(ThreadTeam&)>& body);

  explicit ThreadTeam(int threads) : threads_(threads) {}

  void lead(int64_t parts);
  void assist(int worker);
  bool take_part(uint64_t epoch, int worker);

  // Written by the leader while no part is left to take.
  void (*step_)(const void*, int64_t, int) = nullptr;
  const void* context_ = nullptr;

  // The number of the step, how many parts it has, and the next one to take, in one word: nobody
  // can take a part of a step that is over.
  std::atomic<uint64_t> ticket_{0};
  std::atomic<int64_t> done_{0};
  std::atomic<bool> closed_{false};
  int threads_;  // the leader's
};

// Runs body(team) on the caller, with helpers from the pool at hand until it returns. Alone where
// the pool is busy, where threads outnumber the cores (helpers spin while they wait for a step),
// and for a while after a helper lost its core to another program.
void with_team(int threads, const std::function<void(ThreadTeam&)>& body);

}  // namespace dfs
