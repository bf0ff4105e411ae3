#include "emulator.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

namespace dfs::cuda::emulator {
namespace {

constexpr int kLanes = 32;
constexpr size_t kGuardBytes = 256;
constexpr uint8_t kPoison = 0xcd;

enum class Wait { kNothing, kBlock, kMultiply, kMultiplyFloats, kCount, kShuffle };

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Thread {
  Fiber fiber;
  Wait wait = Wait::kNothing;
  bool done = false;
  int barriers = 0;
  std::vector<Copy> copies;
  // What it brings to an operation of its warp, and takes from it.
  int32_t (*sums)[4] = nullptr;
  float (*float_sums)[4] = nullptr;
  uint32_t a[4] = {};
  uint32_t b[2] = {};
  uint64_t value = 0;
  int mask = 0;
};

struct Block {
  const char* name = "";
  int index = 0;
  int threads = 0;
  int shared_bytes = 0;
  std::unique_ptr<uint8_t[]> memory;
  std::vector<std::unique_ptr<Thread>> pool;
  int current = 0;

  uint8_t* shared() { return memory.get() + kGuardBytes; }
  Thread& running() { return *pool[static_cast<size_t>(current)]; }

  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(std::string("emulated kernel ") + name + ", block " +
                             std::to_string(index) + ": " + what);
  }
};

thread_local Block* block = nullptr;
thread_local std::vector<std::string> launches;
thread_local int skipped_barrier = -1;
thread_local int most_barriers = 0;

void wait_for(Wait what) {
  Thread& self = block->running();
  self.wait = what;
  self.fiber.pause();
}

void bring_factors(const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Thread& self = block->running();
  std::memcpy(self.a, a, sizeof(self.a));
  self.b[0] = b0;
  self.b[1] = b1;
}

int signed_byte(uint32_t word, int i) { return static_cast<int8_t>(word >> (8 * i)); }
int unsigned_byte(uint32_t word, int i) { return static_cast<uint8_t>(word >> (8 * i)); }

// PTX ISA, "Matrix fragments for mma.m16n8k32", 8-bit types.
void multiply_warp(Thread* const* lanes) {
  int a[16][32];
  int b[32][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane / 4;
    const int first = 4 * (lane % 4);
    for (int i = 0; i < 4; ++i) {
      a[group][first + i] = unsigned_byte(lanes[lane]->a[0], i);
      a[group + 8][first + i] = unsigned_byte(lanes[lane]->a[1], i);
      a[group][first + 16 + i] = unsigned_byte(lanes[lane]->a[2], i);
      a[group + 8][first + 16 + i] = unsigned_byte(lanes[lane]->a[3], i);
      b[first + i][group] = signed_byte(lanes[lane]->b[0], i);
      b[first + 16 + i][group] = signed_byte(lanes[lane]->b[1], i);
    }
  }
  int c[16][8] = {};
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 32; ++k) {
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int sum = c[lane / 4 + (i / 2) * 8][2 * (lane % 4) + i % 2];
      int32_t& target = (*lanes[lane]->sums)[i];
      target = static_cast<int32_t>(static_cast<uint32_t>(target) + static_cast<uint32_t>(sum));
    }
  }
}

float float_of(uint32_t word) {
  constexpr uint32_t kBeyondTf32 = (1u << 13) - 1;
  if ((word & kBeyondTf32) != 0) block->fail("a factor is not rounded to TF32");
  float value = 0.0f;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

// The same for mma.m16n8k8, TF32.
void multiply_floats(Thread* const* lanes) {
  float a[16][8];
  float b[8][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane / 4;
    const int first = lane % 4;
    for (int i = 0; i < 4; ++i) {
      a[group + i % 2 * 8][first + i / 2 * 4] = float_of(lanes[lane]->a[i]);
    }
    for (int i = 0; i < 2; ++i) b[first + 4 * i][group] = float_of(lanes[lane]->b[i]);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8;
      const int column = 2 * (lane % 4) + i % 2;
      float& sum = (*lanes[lane]->float_sums)[i];
      for (int k = 0; k < 8; ++k) sum += a[row][k] * b[k][column];
    }
  }
}

int bits_set(uint32_t word) {
  int count = 0;
  for (; word != 0; word &= word - 1) ++count;
  return count;
}

// The same for mma.m16n8k256, 1-bit types and .and.popc: word w of a row holds columns 32w.., its
// lowest bit the first of them.
void count_warp(Thread* const* lanes) {
  uint32_t a[16][8];
  uint32_t b[8][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane / 4;
    const int word = lane % 4;
    for (int i = 0; i < 4; ++i) a[group + i % 2 * 8][word + i / 2 * 4] = lanes[lane]->a[i];
    for (int i = 0; i < 2; ++i) b[word + i * 4][group] = lanes[lane]->b[i];
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8;
      const int column = 2 * (lane % 4) + i % 2;
      int32_t& sum = (*lanes[lane]->sums)[i];
      for (int word = 0; word < 8; ++word) sum += bits_set(a[row][word] & b[word][column]);
    }
  }
}

void shuffle_warp(Thread* const* lanes) {
  uint64_t values[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int mask = lanes[lane]->mask;
    if (mask < 0 || mask >= kLanes || mask != lanes[0]->mask) {
      block->fail("the lanes of a warp shuffle with different masks");
    }
    values[lane] = lanes[lane ^ mask]->value;
  }
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane]->value = values[lane];
}

// Carries out what all lanes of a warp wait for together. Returns whether there was anything.
bool step_warp(int warp) {
  Thread* lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    lanes[lane] = block->pool[static_cast<size_t>(warp * kLanes + lane)].get();
  }
  const Wait wait = lanes[0]->wait;
  if (lanes[0]->done || wait == Wait::kNothing || wait == Wait::kBlock) return false;
  for (Thread* lane : lanes) {
    if (lane->done || lane->wait != wait) return false;
  }
  if (wait == Wait::kMultiply) {
    multiply_warp(lanes);
  } else if (wait == Wait::kMultiplyFloats) {
    multiply_floats(lanes);
  } else if (wait == Wait::kCount) {
    count_warp(lanes);
  } else {
    shuffle_warp(lanes);
  }
  for (Thread* lane : lanes) lane->wait = Wait::kNothing;
  return true;
}

bool step_barrier() {
  bool any = false;
  for (int i = 0; i < block->threads; ++i) {
    const Thread& thread = *block->pool[static_cast<size_t>(i)];
    if (thread.done) continue;
    if (thread.wait != Wait::kBlock) return false;
    any = true;
  }
  for (int i = 0; i < block->threads; ++i) {
    block->pool[static_cast<size_t>(i)]->wait = Wait::kNothing;
  }
  return any;
}

// Lets every thread of a warp that can go on do so, in turn from the first or from the last, and
// then carries out what they wait for. Returns whether anything happened.
bool step_threads(int warp, bool backwards) {
  bool any = false;
  for (int i = 0; i < kLanes; ++i) {
    block->current = warp * kLanes + (backwards ? kLanes - 1 - i : i);
    Thread& thread = block->running();
    if (thread.done || thread.wait != Wait::kNothing) continue;
    thread.fiber.resume();
    thread.done = thread.fiber.is_done();
    if (thread.done && !thread.copies.empty()) block->fail("a thread ends with copies under way");
    any = true;
  }
  return step_warp(warp) || any;
}

void check_guards() {
  const size_t end = kGuardBytes + static_cast<size_t>(block->shared_bytes);
  for (size_t i = 0; i < kGuardBytes; ++i) {
    if (block->memory[i] != kPoison || block->memory[end + i] != kPoison) {
      block->fail("it wrote outside of its shared memory");
    }
  }
}

void run_block(const std::function<void()>& kernel) {
  std::memset(block->memory.get(), kPoison,
              2 * kGuardBytes + static_cast<size_t>(block->shared_bytes));
  for (int i = 0; i < block->threads; ++i) {
    Thread& thread = *block->pool[static_cast<size_t>(i)];
    thread.wait = Wait::kNothing;
    thread.done = false;
    thread.barriers = 0;
    thread.copies.clear();
    thread.fiber.start(kernel);
  }
  // A warp runs as far as it can before the next one starts: one that should have waited for others
  // is far ahead of them then, or far behind where the order is the other way.
  const int warps = block->threads / kLanes;
  for (bool backwards = block->index % 2 != 0;; backwards = !backwards) {
    bool progress = false;
    for (int i = 0; i < warps; ++i) {
      while (step_threads(backwards ? warps - 1 - i : i, backwards)) progress = true;
    }
    progress |= step_barrier();
    if (progress) continue;
    for (int i = 0; i < block->threads; ++i) {
      if (!block->pool[static_cast<size_t>(i)]->done) {
        block->fail("thread " + std::to_string(i) + " waits for others that will not come");
      }
    }
    break;
  }
  check_guards();
}

}  // namespace

void run(const char* name, const LaunchShape& shape, const std::function<void()>& kernel) {
  // Kept between launches: making stacks takes longer than small kernels do.
  thread_local Block kept;
  if (shape.threads < kLanes || shape.threads % kLanes != 0 || shape.threads > 1024) {
    throw std::runtime_error(std::string("emulated kernel ") + name + ": blocks of " +
                             std::to_string(shape.threads) + " threads");
  }
  if (shape.shared_bytes < 0 || shape.shared_bytes > kMaxSharedBytes) {
    throw std::runtime_error(std::string("emulated kernel ") + name + ": " +
                             std::to_string(shape.shared_bytes) + " bytes of shared memory");
  }
  launches.emplace_back(name);
  most_barriers = 0;
  block = &kept;
  block->name = name;
  block->threads = shape.threads;
  block->shared_bytes = shape.shared_bytes;
  block->memory.reset(new uint8_t[2 * kGuardBytes + static_cast<size_t>(shape.shared_bytes)]);
  while (static_cast<int>(block->pool.size()) < shape.threads) {
    block->pool.push_back(std::make_unique<Thread>());
  }
  for (int64_t i = 0; i < shape.blocks; ++i) {
    block->index = static_cast<int>(i);
    run_block(kernel);
  }
}

void skip_barrier(int index) { skipped_barrier = index; }
int barriers_met() { return most_barriers; }

std::vector<std::string> take_launches() { return std::exchange(launches, {}); }

int thread_index() { return block->current; }
int block_index() { return block->index; }
int block_threads() { return block->threads; }
uint8_t* shared_memory() { return block->shared(); }

void sync_block() {
  const int index = block->running().barriers++;
  most_barriers = std::max(most_barriers, index + 1);
  if (index != skipped_barrier) wait_for(Wait::kBlock);
}

void check_shared(const void* pointer, size_t bytes) {
  const auto* from = static_cast<const uint8_t*>(pointer);
  const uint8_t* begin = block->shared();
  if (from < begin || from + bytes > begin + block->shared_bytes) {
    block->fail("it reads outside of its shared memory");
  }
}

void copy_async(void* shared, const void* global, int bytes) {
  const auto* to = static_cast<uint8_t*>(shared);
  const bool inside = to >= block->shared() && to + bytes <= block->shared() + block->shared_bytes;
  if (!inside) block->fail("a copy leads outside of shared memory");
  const auto misaligned = [bytes](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % static_cast<unsigned>(bytes) != 0;
  };
  if (misaligned(shared) || misaligned(global)) block->fail("a copy is not aligned");
  block->running().copies.push_back({shared, global, bytes});
}

void wait_for_copies() {
  std::vector<Copy>& copies = block->running().copies;
  for (const Copy& copy : copies) std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  copies.clear();
}

void multiply_tile(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  block->running().sums = &c;
  bring_factors(a, b0, b1);
  wait_for(Wait::kMultiply);
}

void multiply_tile(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  block->running().float_sums = &c;
  bring_factors(a, b0, b1);
  wait_for(Wait::kMultiplyFloats);
}

void count_tile(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  block->running().sums = &c;
  bring_factors(a, b0, b1);
  wait_for(Wait::kCount);
}

// mma.m16n8k128 has the fragments of the first half.
void count_half_tile(int32_t (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  count_tile(c, {a[0], a[1], 0, 0}, b, 0);
}

uint64_t shuffle_xor(uint64_t value, int mask) {
  Thread& self = block->running();
  self.value = value;
  self.mask = mask;
  wait_for(Wait::kShuffle);
  return self.value;
}

}  // namespace dfs::cuda::emulator
