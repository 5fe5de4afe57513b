// What kernels share. With nvcc this is CUDA; with a C++ compiler the same kernels run on the CPU (_host.h).
#pragma once

#include <algorithm>

#include "_plugin.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// `kernel` may hold commas if it stands in parentheses. Null, or what is wrong.
#define EDGETRIM_LAUNCH(kernel, grid, block, stream, ...)                          \
    (kernel<<<(grid), (block), 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__), edgetrim::launched())

namespace edgetrim {

inline char const* launched() {
    cudaError_t const error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline int multiprocessors() {
    int device = 0, count = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count > 0 ? count : 1;
}

}  // namespace edgetrim
#else
#include "_host.h"
#endif

namespace edgetrim {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarp = 32;

// Floats as integers of the same order. The two zeros are equal, as they are to ONNX's TopK.
__device__ inline uint32_t ordered(float value) {
    uint32_t const bits = __float_as_uint(value + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Sum of what the threads before give. All threads call it; `total` is the sum of all.
template <int Threads>
__device__ uint32_t sum_before(uint32_t value, uint32_t& total) {
    __shared__ uint32_t sums[Threads / kWarp];
    int const lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    uint32_t sum = value;
    for (int step = 1; step < kWarp; step *= 2) {
        uint32_t const left = __shfl_up_sync(kAll, sum, step);
        if (lane >= step) sum += left;
    }
    if (lane == kWarp - 1) sums[warp] = sum;
    __syncthreads();
    uint32_t before = 0;
    total = 0;
    for (int i = 0; i < Threads / kWarp; ++i) {
        if (i < warp) before += sums[i];
        total += sums[i];
    }
    __syncthreads();  // `sums` is free again
    return before + sum - value;
}

// The `keep` largest keys of a block, of equal ones those of lower index: rank's rule. Thread t has the keys of indices
// t * Items and following; where there is none its key is 0, and `keep` is no more than there are.
//
// Found bit by bit: the largest threshold that `keep` keys reach. That takes a count per bit and no sorting, and what is
// selected is in order of index by itself.
//
// Returns a bit for every one of this thread's keys; `place` is how many are selected in the threads before.
template <int Threads, int Items>
__device__ uint32_t select(uint32_t const (&key)[Items], uint32_t keep, uint32_t& place) {
    __shared__ uint32_t counts[32];  // one for each bit, so that a barrier per bit is enough
    if (threadIdx.x < 32) counts[threadIdx.x] = 0;
    __syncthreads();
    uint32_t threshold = 0;
    for (int bit = 31; bit >= 0; --bit) {
        uint32_t const higher = threshold | 1u << bit;
        uint32_t mine = 0;
        for (int i = 0; i < Items; ++i) mine += key[i] >= higher;
        mine = __reduce_add_sync(kAll, mine);
        if (threadIdx.x % kWarp == 0 && mine > 0) atomicAdd(&counts[bit], mine);
        __syncthreads();
        uint32_t const reached = counts[bit];
        if (reached >= keep) threshold = higher;
        if (reached == keep) break;
    }
    uint32_t above = 0, equal = 0;
    for (int i = 0; i < Items; ++i) {
        above += key[i] > threshold;
        equal += key[i] == threshold;
    }
    // at most 4096 keys: two sums fit into one number
    uint32_t total = 0;
    uint32_t const before = sum_before<Threads>(above | equal << 16, total);
    uint32_t const wanted = keep - (total & 0xffffu);  // of the equal ones
    uint32_t ties = before >> 16;
    place = (before & 0xffffu) + (ties < wanted ? ties : wanted);
    uint32_t selected = 0;
    for (int i = 0; i < Items; ++i) {
        bool const tie = key[i] == threshold;
        if (key[i] > threshold || (tie && ties < wanted)) selected |= 1u << i;
        ties += tie;
    }
    return selected;
}

// The widest piece, in bytes, that rows of `row` bytes at these addresses can be copied in.
inline int piece(int64_t row, void const* a, void const* b) {
    uint64_t const all = static_cast<uint64_t>(row) | reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b);
    for (int size = 16; size > 2; size /= 2) {
        if (all % size == 0) return size;
    }
    return 2;
}

inline unsigned blocks(int64_t wanted, int64_t most) {
    return static_cast<unsigned>(wanted < 1 || most < 1 ? 1 : wanted < most ? wanted : most);
}

}  // namespace edgetrim
