// A pool of threads of our own: torch's OpenMP runtime must not be loaded a second time.
#pragma once

#include <cstdint>
#include <functional>

namespace dfs {

// Below this much work, in nanoseconds on one core, a second thread costs more than it saves:
// waking one takes 5 to 50 microseconds. Tests lower it to split small work too.
double min_thread_cost();
void set_min_thread_cost(double nanoseconds);

// Calls fn(task, worker) once for every task in [0, count) on up to `threads` threads, the caller's
// included, and returns when all are done; worker < max(threads, 1) tells concurrent calls apart.
// `cost` estimates one task in nanoseconds. The first exception is rethrown here, tasks not yet
// begun are then dropped. Runs on the caller alone when threads <= 1, when the work is small and
// when the pool is busy with another call or an outer one. Safe to use in a forked child.
void parallel_for(int64_t count, double cost, int threads,
                  const std::function<void(int64_t task, int worker)>& fn);

// What a loop does that waits for another thread without sleeping.
void pause_thread();

}  // namespace dfs
