#include "thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "float_environment.h"

#if defined(__SSE2__) || defined(_M_X64)
#include <immintrin.h>
#endif
#ifndef _WIN32
#include <pthread.h>
#include <signal.h>
#endif
#ifdef __linux__
#include <sched.h>
#endif

namespace dfs {
namespace {

using TaskFn = std::function<void(int64_t, int)>;

// A helper that spins starts within 2 us, one that sleeps after 30 to 60 (measured on a Zen 4).
std::atomic<double> thread_cost{10e3};

constexpr std::chrono::microseconds kSpinTime{50};

// A thread takes at least this much work at a time from the shared counter.
constexpr double kMinGrabCost = 2e3;

void run_inline(int64_t count, const TaskFn& fn) {
  const DefaultFloatEnvironment environment;
  for (int64_t task = 0; task < count; ++task) fn(task, 0);
}

// Keeps signals on the caller's threads, where an interpreter expects them.
class BlockSignals {
 public:
  BlockSignals(const BlockSignals&) = delete;
  BlockSignals& operator=(const BlockSignals&) = delete;
#ifndef _WIN32
  BlockSignals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &saved_);
  }
  ~BlockSignals() { pthread_sigmask(SIG_SETMASK, &saved_, nullptr); }

 private:
  sigset_t saved_;
#else
  BlockSignals() = default;
#endif
};

int current_cpu() {
#ifdef __linux__
  return sched_getcpu();
#else
  return -1;
#endif
}

// A thread that is woken on the very processor that its caller keeps busy can be left there for
// many milliseconds while another one idles (seen on a virtual machine): a moment's ban moves it.
void leave_cpu(int cpu) {
#ifdef __linux__
  if (cpu < 0 || cpu >= CPU_SETSIZE || current_cpu() != cpu) return;
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0 || CPU_COUNT(&allowed) < 2) return;
  cpu_set_t others = allowed;
  CPU_CLR(cpu, &others);
  if (sched_setaffinity(0, sizeof(others), &others) == 0) {
    sched_setaffinity(0, sizeof(allowed), &allowed);
  }
#else
  (void)cpu;
#endif
}

class ThreadPool {
 public:
  // False if the pool is busy or shut down: nothing was run then.
  bool try_run(int64_t count, int64_t grain, int threads, int participants, const TaskFn& fn) {
    std::unique_lock<std::mutex> running(run_mutex_, std::try_to_lock);
    if (!running.owns_lock() || shut_down_) return false;
    resize(threads - 1);
    may_spin_.store(threads <= static_cast<int>(std::thread::hardware_concurrency()),
                    std::memory_order_relaxed);
    participants = std::min<int>(participants, static_cast<int>(helpers_.size()) + 1);

    next_.store(0, std::memory_order_relaxed);
    count_ = count;
    grain_ = grain;
    fn_ = &fn;
    error_ = nullptr;
    caller_cpu_ = current_cpu();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      helpers_wanted_ = participants - 1;
      open_ = true;
      published_.store(++generation_, std::memory_order_release);
    }
    wake_.notify_all();
    work(0);
    std::exception_ptr error;
    {
      // Helpers that have not woken up yet are no longer waited for.
      std::unique_lock<std::mutex> lock(mutex_);
      open_ = false;
      if (helpers_busy_ > 0) {
        lock.unlock();
        spin_while([this] { return helpers_busy_.load(std::memory_order_acquire) > 0; });
        lock.lock();
      }
      done_.wait(lock, [this] { return helpers_busy_ == 0; });
      std::swap(error, error_);
    }
    running.unlock();
    if (error) std::rethrow_exception(error);
    return true;
  }

  void shut_down() {
    const std::lock_guard<std::mutex> running(run_mutex_);
    shut_down_ = true;
    resize(0);
  }

 private:
  void resize(int helpers) {
    const int current = static_cast<int>(helpers_.size());
    if (helpers < current) {
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        helpers_kept_ = helpers;
      }
      wake_.notify_all();
      for (int i = helpers; i < current; ++i) helpers_[i].join();
      helpers_.resize(helpers);
    } else if (helpers > current) {
      helpers_.reserve(helpers);
      uint64_t generation;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        helpers_kept_ = helpers;
        generation = generation_;
      }
      const BlockSignals block;
      try {
        for (int i = current; i < helpers; ++i) {
          helpers_.emplace_back([this, i, generation] { help(i, generation); });
        }
      } catch (const std::system_error&) {
        // Out of threads: go on with those that started.
      }
    }
  }

  void help(int index, uint64_t seen) {
    for (;;) {
      spin_while([&] { return published_.load(std::memory_order_acquire) == seen; });
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return index >= helpers_kept_ || generation_ != seen; });
      if (index >= helpers_kept_) return;
      seen = generation_;
      if (!open_ || index >= helpers_wanted_) continue;
      ++helpers_busy_;
      lock.unlock();
      leave_cpu(caller_cpu_);
      work(index + 1);
      lock.lock();
      if (--helpers_busy_ == 0) done_.notify_one();
    }
  }

  // Waits for a moment without sleeping: waking up takes longer than a small convolution, and the
  // next one often follows at once. Not where threads outnumber the cores.
  template <typename Condition>
  void spin_while(Condition condition) const {
    if (!may_spin_.load(std::memory_order_relaxed)) return;
    const auto end = std::chrono::steady_clock::now() + kSpinTime;
    while (std::chrono::steady_clock::now() < end) {
      for (int i = 0; i < 16; ++i) {
        if (!condition()) return;
        pause_thread();
      }
    }
  }

  void work(int worker) {
    const DefaultFloatEnvironment environment;
    try {
      for (;;) {
        const int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
        if (begin >= count_) return;
        const int64_t end = std::min(begin + grain_, count_);
        for (int64_t task = begin; task < end; ++task) (*fn_)(task, worker);
      }
    } catch (...) {
      next_.store(count_, std::memory_order_relaxed);
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  std::mutex run_mutex_;  // held for the whole of a run
  std::vector<std::thread> helpers_;
  bool shut_down_ = false;

  // The current run; published to the helpers by mutex_.
  std::atomic<int64_t> next_{0};
  int64_t count_ = 0;
  int64_t grain_ = 1;
  const TaskFn* fn_ = nullptr;
  int caller_cpu_ = -1;

  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  uint64_t generation_ = 0;
  std::atomic<uint64_t> published_{0};  // generation_, for who spins
  bool open_ = false;                   // helpers may join the current run
  int helpers_kept_ = 0;
  int helpers_wanted_ = 0;
  std::atomic<int> helpers_busy_{0};
  std::atomic<bool> may_spin_{false};
  std::exception_ptr error_;
};

// A child of fork inherits the pool's memory but not its threads, with locks in any state: it
// leaves that pool alone and starts over. Nothing here takes a lock, since the parent may have held
// it at the fork.
std::atomic<ThreadPool*> current_pool{nullptr};
std::atomic<ThreadPool*> abandoned_pool{nullptr};  // keeps it reachable for leak checkers

void abandon_pool_after_fork() { abandoned_pool.store(current_pool.exchange(nullptr)); }

struct PoolLifetime {
  PoolLifetime() {
#ifndef _WIN32
    pthread_atfork(nullptr, nullptr, abandon_pool_after_fork);
#endif
  }
  // The pool itself is never freed: a daemon thread may still be about to use it.
  ~PoolLifetime() {
    if (ThreadPool* pool = current_pool.load()) pool->shut_down();
  }
};

PoolLifetime pool_lifetime;

ThreadPool& pool() {
  ThreadPool* existing = current_pool.load(std::memory_order_acquire);
  if (existing != nullptr) return *existing;
  ThreadPool* created = new ThreadPool;
  if (current_pool.compare_exchange_strong(existing, created)) return *created;
  delete created;
  return *existing;
}

}  // namespace

void pause_thread() {
#if defined(__SSE2__) || defined(_M_X64)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

double min_thread_cost() { return thread_cost.load(std::memory_order_relaxed); }

void set_min_thread_cost(double nanoseconds) {
  thread_cost.store(nanoseconds, std::memory_order_relaxed);
}

void parallel_for(int64_t count, double cost, int threads, const TaskFn& fn) {
  if (count <= 0) return;
  const double total = cost * static_cast<double>(count);
  const double worthwhile = std::min(
      {static_cast<double>(threads), static_cast<double>(count), total / min_thread_cost()});
  const int participants = static_cast<int>(worthwhile);
  const double grab = std::max(kMinGrabCost / std::max(cost, 1.0), 1.0);
  const int64_t even_share = count / std::max(4 * participants, 1);
  const int64_t grain =
      std::max<int64_t>(std::min<int64_t>(static_cast<int64_t>(grab), even_share), 1);
  if (participants <= 1 || !pool().try_run(count, grain, threads, participants, fn)) {
    run_inline(count, fn);
  }
}

}  // namespace dfs
