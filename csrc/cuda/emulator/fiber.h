// Threads of control that hand over to each other by themselves.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

namespace dfs::cuda::emulator {

// Runs a function on a stack of its own, piece by piece.
class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Begins anew; what an earlier function left unfinished is dropped.
  void start(std::function<void()> body);

  // Runs it until it calls pause() or returns; rethrows what it throws.
  void resume();

  // Called by the fiber: back to who resumed it.
  void pause();

  bool is_done() const;

  struct State;

 private:
  std::unique_ptr<State> state_;
};

}  // namespace dfs::cuda::emulator
