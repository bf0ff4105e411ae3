#include "fiber.h"

#include <ucontext.h>

#include <exception>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace dfs::cuda::emulator {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif

#if defined(__x86_64__)
// swapcontext() asks the kernel for the signal mask each time, which takes longer than all the
// rest.
extern "C" void dfs_emulator_switch(void** from, void* to);
asm(R"(
.text
.globl dfs_emulator_switch
.hidden dfs_emulator_switch
.type dfs_emulator_switch, @function
dfs_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dfs_emulator_switch, .-dfs_emulator_switch
)");

struct Context {
  void* stack_pointer = nullptr;

  void prepare(uint8_t* stack, void (*entry)()) {
    // As if it had called dfs_emulator_switch: six registers below the address to return to, which
    // finds the stack as a function does, 8 bytes off a multiple of 16.
    auto* top = reinterpret_cast<void**>(stack + kStackBytes);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer = top;
  }
  void switch_to(Context& other) { dfs_emulator_switch(&stack_pointer, other.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;

  void prepare(uint8_t* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void switch_to(Context& other) { swapcontext(&context, &other.context); }
};
#endif

}  // namespace

struct Fiber::State {
  std::unique_ptr<uint8_t[]> stack{new uint8_t[kStackBytes]};
  Context own;
  Context caller;
  std::function<void()> body;
  std::exception_ptr error;
  bool done = true;
  const void* caller_stack = nullptr;  // what AddressSanitizer has to know of
  size_t caller_stack_bytes = 0;
  void* fake_stack = nullptr;

  [[noreturn]] static void enter();
  void leave(bool for_good);
};

namespace {
thread_local Fiber::State* entering = nullptr;
}

void Fiber::State::enter() {
  State* state = entering;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &state->caller_stack, &state->caller_stack_bytes);
#endif
  try {
    state->body();
  } catch (...) {
    state->error = std::current_exception();
  }
  state->done = true;
  for (;;) state->leave(true);
}

void Fiber::State::leave(bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack, caller_stack,
                                 caller_stack_bytes);
#else
  (void)for_good;
#endif
  own.switch_to(caller);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, &caller_stack, &caller_stack_bytes);
#endif
}

Fiber::Fiber() : state_(new State) {}
Fiber::~Fiber() = default;

void Fiber::start(std::function<void()> body) {
  state_->body = std::move(body);
  state_->error = nullptr;
  state_->done = false;
  state_->fake_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  // The function before never left its frames.
  ASAN_UNPOISON_MEMORY_REGION(state_->stack.get(), kStackBytes);
#endif
  state_->own.prepare(state_->stack.get(), &State::enter);
}

void Fiber::resume() {
  State* state = state_.get();
  entering = state;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, state->stack.get(), kStackBytes);
#endif
  state->caller.switch_to(state->own);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  if (state->error) std::rethrow_exception(std::exchange(state->error, nullptr));
}

void Fiber::pause() { state_->leave(false); }

bool Fiber::is_done() const { return state_->done; }

}  // namespace dfs::cuda::emulator
