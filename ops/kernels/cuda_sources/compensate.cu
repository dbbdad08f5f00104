// What is added to a layer's output for the experts that were taken away: ops/policies/compensation.py, in two launches.
//
// Only the means and surrogates of experts whose weight changed are read: most of the difference is zeros. Sums are taken in
// float, in an order that depends on nothing but the shapes and the difference, so results are the same each time.
//
// Legend: T rows (tokens), E experts, R rank, H hidden size, a multiple of 16 bytes' worth. D: the difference, what each
// expert's weight has lost in each row. Bounds: E <= 1024; 16-byte aligned rows.

#include "numbers.cuh"

namespace {

constexpr int MAX_EXPERTS = 1024, THREADS = 256, WARPS = THREADS / WARP;
constexpr int ROWS = 8, COLUMNS = 2 * WARP;  // of the output, for each thread block of the second launch

// Rounds to nearest, ties to even.
__device__ __forceinline__ void store(float* to, float value) { *to = value; }
__device__ __forceinline__ void store(Bfloat16* to, float value) {
    const unsigned bits = __float_as_uint(value);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    to->bits = static_cast<unsigned short>(is_nan ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
__device__ __forceinline__ void store(Float16* to, float value) {
    const unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    unsigned result;
    if (magnitude > 0x7f800000u) {
        result = 0x7e00u;  // NaN
    } else if (magnitude >= 0x47800000u) {
        result = 0x7c00u;  // 65536 and more: infinity
    } else if (magnitude < 0x38800000u) {
        // Below the least normal number: the spacing of floats near one half is that of these.
        result = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        result = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    }
    to->bits = static_cast<unsigned short>(result | sign);
}

// The product of two rows' parts of 16 bytes.
template <class T>
__device__ __forceinline__ float dot_of_vectors(const T* a, const T* b) {
    constexpr int SIZE = 16 / sizeof(T);
    struct alignas(16) Vector {
        T of[SIZE];
    };
    const Vector left = *reinterpret_cast<const Vector*>(a), right = *reinterpret_cast<const Vector*>(b);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < SIZE; ++i) sum += static_cast<float>(left.of[i]) * static_cast<float>(right.of[i]);
    return sum;
}

// Two neighbouring values.
struct Pair {
    float first, second;
};
template <class T>
__device__ __forceinline__ Pair load_pair(const T* from) {
    struct alignas(2 * sizeof(T)) Two {
        T first, second;
    };
    const Two found = *reinterpret_cast<const Two*>(from);
    return {found.first, found.second};
}

// The first launch: D (V x), for each expert and row where D is not zero. One thread block for each expert.
template <class T>
__device__ __forceinline__ void project(
    const T* __restrict__ hidden_states,      // [T, H]
    const T* __restrict__ inputs,             // V [E R, H]
    const float* __restrict__ difference,     // [>= T, E]
    float* __restrict__ projections,          // [T, E R], written where D is not zero
    int num_tokens, int num_experts, int rank, int hidden_size
) {
    __shared__ int rows[THREADS], num_rows;
    constexpr int SIZE = 16 / sizeof(T);
    const int expert = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (int begin = 0; begin < num_tokens; begin += THREADS) {
        const int candidate = begin + threadIdx.x;
        const bool changed = candidate < num_tokens && difference[static_cast<size_t>(candidate) * num_experts + expert] != 0;
        if (threadIdx.x == 0) num_rows = 0;
        if (!__syncthreads_count(changed)) continue;
        // In any order: each has its own place in the result.
        if (changed) rows[atomicAdd(&num_rows, 1)] = candidate;
        __syncthreads();
        for (int i = warp; i < num_rows; i += WARPS) {
            const size_t row = rows[i];
            const T* x = hidden_states + row * hidden_size;
            const float lost = difference[row * num_experts + expert];
            for (int k = 0; k < rank; ++k) {
                const size_t place = static_cast<size_t>(expert) * rank + k;
                float sum = 0;
#pragma unroll 4
                for (int h = lane * SIZE; h < hidden_size; h += WARP * SIZE) {
                    sum += dot_of_vectors(x + h, inputs + place * hidden_size + h);
                }
                for (int away = WARP / 2; away > 0; away /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, away);
                if (lane == 0) projections[row * num_experts * rank + place] = lost * sum;
            }
        }
        __syncthreads();
    }
}

// The second launch: output + share (D mu + projections U), for ROWS rows and COLUMNS columns. The block's warps take turns in
// the experts, and their sums are added up in the end.
template <class T>
__device__ __forceinline__ void compensate(
    const T* __restrict__ output,             // [T, H]
    const T* __restrict__ means,              // mu [E, H]
    const T* __restrict__ outputs,            // U [E R, H]; null if R is 0
    const float* __restrict__ difference,     // [>= T, E]
    const float* __restrict__ projections,    // [T, E R]
    T* __restrict__ result,                   // [T, H], written
    double share, int num_tokens, int num_experts, int rank, int hidden_size
) {
    __shared__ float lost[ROWS * MAX_EXPERTS];  // the rows' D; afterwards the warps' sums
    __shared__ unsigned short changed[MAX_EXPERTS];
    __shared__ int num_changed;
    static_assert(WARPS * ROWS * COLUMNS <= ROWS * MAX_EXPERTS, "the sums must fit");
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int first_row = blockIdx.y * ROWS, first_column = blockIdx.x * COLUMNS, column = first_column + 2 * lane;
    const int num_rows = min(ROWS, num_tokens - first_row);

    // The experts with any change, in ascending order: whole warps count those before theirs.
    for (int i = threadIdx.x; i < ROWS * num_experts; i += THREADS) {
        const int row = i / num_experts;
        lost[i] = row < num_rows ? difference[static_cast<size_t>(first_row + row) * num_experts + i % num_experts] : 0;
    }
    __syncthreads();
    if (warp == 0) {
        int count = 0;
        for (int begin = 0; begin < num_experts; begin += WARP) {
            const int expert = begin + lane;
            bool any = false;
            for (int row = 0; expert < num_experts && row < num_rows; ++row) any = any || lost[row * num_experts + expert] != 0;
            const unsigned found = __ballot_sync(ALL_LANES, any);
            if (any) changed[count + __popc(found & ((1u << lane) - 1))] = expert;
            count += __popc(found);
        }
        if (lane == 0) num_changed = count;
    }
    __syncthreads();

    Pair sums[ROWS] = {};
    for (int i = warp; i < num_changed && column < hidden_size; i += WARPS) {
        const int expert = changed[i];
        const Pair mean = load_pair(means + static_cast<size_t>(expert) * hidden_size + column);
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            const float factor = lost[row * num_experts + expert];
            if (factor == 0) continue;  // also where a mean is infinite
            sums[row].first += factor * mean.first;
            sums[row].second += factor * mean.second;
        }
        for (int k = 0; k < rank; ++k) {
            const size_t place = static_cast<size_t>(expert) * rank + k;
            const Pair direction = load_pair(outputs + place * hidden_size + column);
#pragma unroll
            for (int row = 0; row < ROWS; ++row) {
                if (lost[row * num_experts + expert] == 0) continue;  // its projection was not written
                const float factor = projections[static_cast<size_t>(first_row + row) * num_experts * rank + place];
                sums[row].first += factor * direction.first;
                sums[row].second += factor * direction.second;
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
        float* mine = lost + (warp * ROWS + row) * COLUMNS + 2 * lane;
        mine[0] = sums[row].first;
        mine[1] = sums[row].second;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < num_rows * COLUMNS; i += THREADS) {
        const int row = i / COLUMNS, at = first_column + i % COLUMNS;
        if (at >= hidden_size) continue;
        float added = 0;
        for (int other = 0; other < WARPS; ++other) added += lost[(other * ROWS + row) * COLUMNS + i % COLUMNS];
        const size_t index = static_cast<size_t>(first_row + row) * hidden_size + at;
        store(result + index, static_cast<float>(output[index]) + static_cast<float>(share) * added);
    }
}

}  // namespace

#define KERNELS(NAME, T)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS) sere_project_##NAME(                                                  \
        const T* hidden_states, const T* inputs, const float* difference, float* projections, int num_tokens, int num_experts,  \
        int rank, int hidden_size) {                                                                                            \
        project<T>(hidden_states, inputs, difference, projections, num_tokens, num_experts, rank, hidden_size);                 \
    }                                                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS) sere_compensate_##NAME(                                               \
        const T* output, const T* means, const T* outputs, const float* difference, const float* projections, T* result,        \
        double share, int num_tokens, int num_experts, int rank, int hidden_size) {                                             \
        compensate<T>(output, means, outputs, difference, projections, result, share, num_tokens, num_experts, rank,            \
                      hidden_size);                                                                                             \
    }

KERNELS(float32, float)
KERNELS(bfloat16, Bfloat16)
KERNELS(float16, Float16)
