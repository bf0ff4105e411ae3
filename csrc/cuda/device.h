// What kernels need of the GPU, and nothing else of CUDA: with DFS_CUDA_EMULATED the same names run
// in the emulator, so that the very same kernel sources are tested where there is no GPU.
#pragma once

#include <cstdint>
#include <cstring>

#include "launch.h"

#if defined(DFS_CUDA_EMULATED)
#include "emulator/device.h"
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

// A kernel takes one struct: void kernel(DFS_PARAMS(Params) p).
#define DFS_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define DFS_PARAMS(type) const __grid_constant__ type
#define DFS_DEVICE __device__ __forceinline__
#define DFS_HOST_DEVICE __host__ __device__ __forceinline__
#define DFS_UNROLL _Pragma("unroll")
#define DFS_NO_UNROLL _Pragma("unroll 1")

namespace dfs::cuda {

DFS_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
DFS_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
DFS_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
DFS_DEVICE void sync_block() { __syncthreads(); }

DFS_DEVICE uint8_t* shared_memory() {
  extern __shared__ __align__(16) uint8_t memory[];
  return memory;
}

// The same pointer, known to lead to global memory: one that comes out of a struct could lead
// anywhere, and loading from anywhere takes longer.
template <typename T>
DFS_DEVICE T* to_global(T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

// A place in shared memory that was computed from what is stored there. The emulator checks it.
template <typename T>
DFS_DEVICE const T* in_shared(const void* pointer) {
  return static_cast<const T*>(pointer);
}

// Copies 4, 8 or 16 bytes, both sides aligned to as many, past the registers.
template <int kBytes>
DFS_DEVICE void copy_async(void* shared, const void* global) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(to), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;\n" ::"r"(to), "l"(global), "n"(kBytes)
                 : "memory");
  }
}

// Copies 16 bytes in the same way if they exist, and stores zeros otherwise.
DFS_DEVICE void copy_or_clear_async(void* shared, const void* global, bool exists) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(global),
               "r"(exists ? 16 : 0)
               : "memory");
}

// Until this thread's copies have arrived; others see them after a sync_block().
DFS_DEVICE void wait_for_copies() {
  asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;\n" ::: "memory");
}

// c += a * b for a tile of 16 x 8 outputs and 32 products each, a unsigned, b signed. Exact, modulo
// 2^32. With g = lane / 4 and t = lane % 4 a lane holds:
//   a[0], a[2]: row g, columns 4t.. and 16 + 4t..;   a[1], a[3]: the same of row g + 8
//   b0, b1:     column g, rows 4t.. and 16 + 4t..
//   c[0], c[1]: row g, columns 2t and 2t + 1;        c[2], c[3]: the same of row g + 8
DFS_DEVICE void multiply_tile(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same for 256 products of bits each: c += the number of bits set in both. A lane holds:
//   a[0], a[2]: row g, columns 32t.. and 128 + 32t..;   a[1], a[3]: the same of row g + 8
//   b0, b1:     column g, rows 32t.. and 128 + 32t..
//   c: as above
DFS_DEVICE void count_tile(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Its first half: 128 products, of a[0], a[1] and b0.
DFS_DEVICE void count_half_tile(int32_t (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};\n"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}

// As multiply_tile() for 16 x 8 outputs and 8 products each, of floats that are rounded to TF32.
// The order of the sums is the hardware's, the same each time. A lane holds:
//   a[0], a[2]: row g, columns t and t + 4;   a[1], a[3]: the same of row g + 8
//   b0, b1:     column g, rows t and t + 4
//   c: as above
DFS_DEVICE void multiply_tile(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <typename T>
DFS_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

DFS_DEVICE void atomic_add(int32_t* target, int32_t value) { atomicAdd(target, value); }

// Operations that are rounded once, whatever flags they are compiled with.
DFS_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
DFS_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
DFS_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
DFS_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DFS_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
DFS_DEVICE float smaller(float a, float b) { return fminf(a, b); }
DFS_DEVICE float to_float(int32_t x) { return __int2float_rn(x); }
DFS_DEVICE double multiply(double a, double b) { return __dmul_rn(a, b); }
DFS_DEVICE double add(double a, double b) { return __dadd_rn(a, b); }
DFS_DEVICE float to_float(double x) { return __double2float_rn(x); }
DFS_DEVICE float bits_to_float(uint32_t x) { return __uint_as_float(x); }
DFS_DEVICE uint32_t float_to_bits(float x) { return __float_as_uint(x); }

inline void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that the next check does not find it again
  throw std::runtime_error(what + " failed: " + cudaGetErrorName(status) + ": " +
                           cudaGetErrorString(status));
}

template <typename Params>
void launch(const char* name, void (*kernel)(Params), const LaunchShape& shape,
            const Params& params, Stream stream) {
  if (shape.blocks == 0) return;
  const std::string what = std::string("CUDA kernel ") + name;
  if (shape.blocks > 0x7fffffff) throw std::runtime_error(what + ": too many blocks");
  // Always the same limit: a lower one would hold for launches that a graph has recorded, too.
  if (shape.shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSharedBytes),
          what + ": setting its shared memory");
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  check(cudaLaunchKernel(
            reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(shape.blocks)),
            dim3(static_cast<unsigned>(shape.threads)), arguments,
            static_cast<size_t>(shape.shared_bytes), static_cast<cudaStream_t>(stream)),
        what);
}

}  // namespace dfs::cuda

#endif

namespace dfs::cuda {

// Loaded and stored at once.
struct alignas(8) Words2 {
  uint32_t word[2];
};
struct alignas(16) Words4 {
  uint32_t word[4];
};

DFS_HOST_DEVICE bool is_aligned(const void* pointer, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<unsigned>(bytes) == 0;
}

}  // namespace dfs::cuda
