// Enough of CUDA C++ to compile and run a kernel on the CPU, its thread blocks one after another. Included before every
// kernel's source.
//
// Every CUDA thread is a fiber of its own (or, with -DREAL_THREADS, a thread of its own, for the thread sanitizer). Fibers run
// one at a time, in an order drawn anew from the seed each time around, and give way where CUDA threads would wait for each
// other: at barriers and warp intrinsics. All threads must arrive at the same kind of barrier; one that returned, or waits
// elsewhere, is reported as divergence. Shared memory is static, so the address sanitizer guards its bounds.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

namespace cuda_on_cpu {

constexpr int WARP = 32, MAX_THREADS = 1024;

struct Index {
    unsigned x, y;
};
struct alignas(16) Vector4 {
    unsigned x, y, z, w;
};

// Where a number of threads wait until all of them have come.
class Meeting {
public:
    void expect(int threads) { expected_ = threads, arrived_ = 0; }
    void wait(const char* kind);

    int expected_ = 0, arrived_ = 0;
    uint64_t generation_ = 0;
    const char* kind_ = nullptr;
};

struct Thread {
    Index index;
    uint64_t num_exchanges = 0;
};
Thread& self();
Index block_size();
extern Index block_index, grid_size;
Meeting& block_meeting();
Meeting& warp_meeting();

// Every lane of the warp gives a value and sees all 32. Two buffers in turn: nobody can be two exchanges ahead.
const uint64_t* exchange(uint64_t value, const char* kind);
int block_count(bool predicate);

// Every block of the grid has all of its threads run to their end before the next begins.
void launch(int num_threads, unsigned seed, const std::function<void()>& kernel);

template <class T>
T from_bits(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
template <class T>
uint64_t to_bits(T value) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}
template <class T>
struct Same {
    using type = T;
};

}  // namespace cuda_on_cpu

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define threadIdx (cuda_on_cpu::self().index)
#define blockDim (cuda_on_cpu::block_size())
#define blockIdx (cuda_on_cpu::block_index)
#define gridDim (cuda_on_cpu::grid_size)
using uint4 = cuda_on_cpu::Vector4;
using std::max;
using std::min;

inline void require_full_warp(unsigned mask) {
    if (mask != 0xffffffffu) std::abort();
}
inline void __syncthreads() { cuda_on_cpu::block_meeting().wait("__syncthreads"); }
inline int __syncthreads_count(int predicate) { return cuda_on_cpu::block_count(predicate != 0); }
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    require_full_warp(mask);
    const uint64_t* values = cuda_on_cpu::exchange(predicate != 0, "__ballot_sync");
    unsigned bits = 0;
    for (int lane = 0; lane < cuda_on_cpu::WARP; ++lane) bits |= static_cast<unsigned>(values[lane]) << lane;
    return bits;
}
inline int __any_sync(unsigned mask, int predicate) {
    require_full_warp(mask);
    const uint64_t* values = cuda_on_cpu::exchange(predicate != 0, "__any_sync");
    return std::any_of(values, values + cuda_on_cpu::WARP, [](uint64_t value) { return value != 0; });
}
inline int __reduce_add_sync(unsigned mask, int value) {
    require_full_warp(mask);
    const uint64_t* values = cuda_on_cpu::exchange(cuda_on_cpu::to_bits(value), "__reduce_add_sync");
    int sum = 0;
    for (int lane = 0; lane < cuda_on_cpu::WARP; ++lane) sum += cuda_on_cpu::from_bits<int>(values[lane]);
    return sum;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = cuda_on_cpu::WARP) {
    require_full_warp(mask);
    const uint64_t* values = cuda_on_cpu::exchange(cuda_on_cpu::to_bits(value), "__shfl_sync");
    const int lane = static_cast<int>(threadIdx.x) % cuda_on_cpu::WARP;
    return cuda_on_cpu::from_bits<T>(values[lane / width * width + source % width]);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int away) {
    require_full_warp(mask);
    const uint64_t* values = cuda_on_cpu::exchange(cuda_on_cpu::to_bits(value), "__shfl_xor_sync");
    return cuda_on_cpu::from_bits<T>(values[static_cast<int>(threadIdx.x) % cuda_on_cpu::WARP ^ away]);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
    require_full_warp(mask);
    const uint64_t* values = cuda_on_cpu::exchange(value, "__reduce_max_sync");
    return *std::max_element(values, values + cuda_on_cpu::WARP);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
    require_full_warp(mask);
    const uint64_t* values = cuda_on_cpu::exchange(value, "__reduce_min_sync");
    return *std::min_element(values, values + cuda_on_cpu::WARP);
}
inline void __syncwarp() { cuda_on_cpu::exchange(0, "__syncwarp"); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline float __int_as_float(int bits) { return cuda_on_cpu::from_bits<float>(cuda_on_cpu::to_bits(bits)); }
inline unsigned __float_as_uint(float value) { return cuda_on_cpu::to_bits(value); }
inline float __uint_as_float(unsigned bits) { return cuda_on_cpu::from_bits<float>(bits); }
inline long long __double_as_longlong(double value) { return cuda_on_cpu::to_bits(value); }
template <class T>
T atomicAdd(T* address, typename cuda_on_cpu::Same<T>::type value) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicOr(T* address, typename cuda_on_cpu::Same<T>::type value) {
    return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}
