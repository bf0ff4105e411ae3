// Runs kernels on a CPU, to check what they compute where there is no GPU: blocks one after
// another, the threads of a block as fibers that meet at barriers and at the operations of a warp.
//
// It is strict where a GPU is silent. Shared memory starts poisoned and has guard bands,
// asynchronous copies arrive only when they are waited for, warps run ahead of each other as far as
// barriers let them, first ones or last ones first, and a barrier that some thread can't reach is
// an error. It says nothing about speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "launch.h"

namespace dfs::cuda::emulator {

// Throws std::runtime_error, naming the kernel, for what would hang or corrupt memory on a GPU.
void run(const char* name, const LaunchShape& shape, const std::function<void()>& kernel);

// The kernels that this thread has run since it asked last.
std::vector<std::string> take_launches();

// To see whether kernels need their barriers: threads run past theirs of this number, 0 for the
// first that each of them meets, until another is named; -1 for none.
void skip_barrier(int index);

// How many barriers a thread of the last kernel met, at most.
int barriers_met();

// Of the thread that is running, within run().
int thread_index();
int block_index();
int block_threads();
uint8_t* shared_memory();
void sync_block();
void check_shared(const void* pointer, size_t bytes);
void copy_async(void* shared, const void* global, int bytes);
void wait_for_copies();
void multiply_tile(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
// Of floats whose low bits, beyond those of TF32, are zero.
void multiply_tile(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void count_tile(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void count_half_tile(int32_t (&c)[4], const uint32_t (&a)[2], uint32_t b);
uint64_t shuffle_xor(uint64_t value, int mask);

}  // namespace dfs::cuda::emulator
