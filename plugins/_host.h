// CUDA for a machine without it: the kernels of this folder, compiled by a C++ compiler and run thread by thread.
//
// Every CUDA thread is a fiber (ucontext); blocks run one after another. A fiber runs until it meets a barrier or an
// operation of its warp, so in which order the others run up to there is a free choice: `edgetrim_order` takes it, and a
// result that depends on it shows a barrier that is missing. Only what the kernels use is here. For tests, not for speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(threads)
#define __restrict__
#define __shared__ static

using __half = _Float16;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) uint2 {
    unsigned x, y;
};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

namespace edgetrim::host {

constexpr unsigned kLanes = 32;
constexpr size_t kStack = 64 * 1024;

enum class Waits { kNothing, kWarp, kBlock, kDone };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Waits waits = Waits::kNothing;
    unsigned turn = 0;  // which of two slots the next operation of the warp uses
    uint64_t given[2] = {0, 0};
};

struct Machine {
    std::vector<Fiber> fibers;
    ucontext_t scheduler;
    unsigned current = 0;
    std::function<void()> body;
    unsigned order = 0;
    bool stuck = false;
};

inline Machine machine;
inline dim3 thread_index, block_index, block_dim, grid_dim;

inline void yield(Waits waits) {
    Fiber& fiber = machine.fibers[machine.current];
    fiber.waits = waits;
    swapcontext(&fiber.context, &machine.scheduler);
}

inline void enter() {
    machine.body();
    yield(Waits::kDone);
}

// Lets go of fibers that all wait for one another.
inline void release(size_t from, size_t to, Waits what) {
    bool any = false;
    for (size_t i = from; i < to; ++i) {
        Waits const waits = machine.fibers[i].waits;
        if (waits != what && waits != Waits::kDone) return;
        any = any || waits == what;
    }
    for (size_t i = from; any && i < to; ++i) {
        if (machine.fibers[i].waits == what) machine.fibers[i].waits = Waits::kNothing;
    }
}

inline void run_block(unsigned threads) {
    machine.fibers = std::vector<Fiber>(threads);
    for (Fiber& fiber : machine.fibers) {
        fiber.stack.reset(new char[kStack]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
    }
    std::vector<unsigned> turns(threads);
    std::iota(turns.begin(), turns.end(), 0u);
    if (machine.order == 1) std::reverse(turns.begin(), turns.end());
    std::mt19937 random(machine.order);
    for (bool ran = true; ran;) {
        ran = false;
        if (machine.order > 1) std::shuffle(turns.begin(), turns.end(), random);
        for (unsigned i : turns) {
            if (machine.fibers[i].waits != Waits::kNothing) continue;
            machine.current = i;
            thread_index = dim3(i, 0, 0);
            swapcontext(&machine.scheduler, &machine.fibers[i].context);
            ran = true;
        }
        for (size_t from = 0; from < threads; from += kLanes) {
            release(from, std::min<size_t>(from + kLanes, threads), Waits::kWarp);
        }
        release(0, threads, Waits::kBlock);
    }
    for (Fiber const& fiber : machine.fibers) machine.stuck = machine.stuck || fiber.waits != Waits::kDone;
}

inline char const* launch(dim3 grid, dim3 block, std::function<void()> body) {
    machine.body = std::move(body);
    machine.stuck = false;
    grid_dim = grid;
    block_dim = block;
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                block_index = dim3(x, y, z);
                run_block(block.x);
            }
        }
    }
    return machine.stuck ? "threads wait for one another at different places" : nullptr;
}

// Every lane gives a value; the one of lane `source` comes back.
template <typename T>
T exchange(T value, unsigned source) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    Fiber& fiber = machine.fibers[machine.current];
    unsigned const me = machine.current, turn = fiber.turn;
    fiber.turn ^= 1;
    __builtin_memcpy(&fiber.given[turn], &value, sizeof(T));
    yield(Waits::kWarp);
    T found;
    __builtin_memcpy(&found, &machine.fibers[me / kLanes * kLanes + source].given[turn], sizeof(T));
    return found;
}

}  // namespace edgetrim::host

#define threadIdx edgetrim::host::thread_index
#define blockIdx edgetrim::host::block_index
#define blockDim edgetrim::host::block_dim
#define gridDim edgetrim::host::grid_dim

inline void __syncthreads() { edgetrim::host::yield(edgetrim::host::Waits::kBlock); }

template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned step) {
    unsigned const lane = edgetrim::host::machine.current % edgetrim::host::kLanes;
    return edgetrim::host::exchange(value, lane < step ? lane : lane - step);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, unsigned mask) {
    return edgetrim::host::exchange(value, edgetrim::host::machine.current % edgetrim::host::kLanes ^ mask);
}

inline unsigned __reduce_add_sync(unsigned all, unsigned value) {
    for (unsigned step = 16; step > 0; step /= 2) value += __shfl_xor_sync(all, value, step);
    return value;
}

inline unsigned atomicAdd(unsigned* at, unsigned value) {
    unsigned const old = *at;
    *at += value;
    return old;
}

inline unsigned long long atomicMax(unsigned long long* at, unsigned long long value) {
    unsigned long long const old = *at;
    *at = std::max(old, value);
    return old;
}

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    __builtin_memcpy(&bits, &value, sizeof(bits));
    return bits;
}

#define EDGETRIM_LAUNCH(kernel, grid, block, stream, ...) \
    (static_cast<void>(stream), edgetrim::host::launch(grid, block, [&] { kernel(__VA_ARGS__); }))

namespace edgetrim {

inline int multiprocessors() { return 3; }

}  // namespace edgetrim

extern "C" inline __attribute__((used)) void edgetrim_order(unsigned order) { edgetrim::host::machine.order = order; }
