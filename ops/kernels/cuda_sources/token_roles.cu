// The roles of a step's rows, from the first row of each sequence: one launch of one thread block per step.
//
// What it computes is ops/engine/roles.py, `TokenRoles.fill`, which also launches it, through cuda.py. blockDim.x is a
// multiple of 32.

namespace {

constexpr signed char PADDING = 0, PREFILL = 1, DECODE = 2;  // ops/reference.py
constexpr int MAX_THREADS = 1024;

}  // namespace

extern "C" __global__ void __launch_bounds__(MAX_THREADS) sere_token_roles(
    const int* __restrict__ query_start_loc,  // [num_sequences + 1], ascending from 0 to the number of rows that are not padding
    signed char* __restrict__ roles,          // [capacity]
    long long* __restrict__ step,             // [3]: decode rows, rows that are not padding, 1 if any role is DECODE
    int num_sequences, int capacity,
    int decode_length,                        // most rows of a sequence that is decoding
    int min_tokens, int max_tokens            // fewer decode rows, or more rows: the step is left alone
) {
    __shared__ int num_decode_rows;
    // Never past the buffer, whatever the caller says.
    const int num_rows = min(query_start_loc[num_sequences], capacity);
    if (threadIdx.x == 0) num_decode_rows = 0;
    __syncthreads();

    int mine = 0;
    for (int sequence = threadIdx.x; sequence < num_sequences; sequence += blockDim.x) {
        const int length = query_start_loc[sequence + 1] - query_start_loc[sequence];
        if (length <= decode_length) mine += length;
    }
    if (mine > 0) atomicAdd(&num_decode_rows, mine);
    for (int row = threadIdx.x; row < capacity; row += blockDim.x) roles[row] = row < num_rows ? PREFILL : PADDING;
    __syncthreads();

    const bool reroutes = num_decode_rows >= max(min_tokens, 1) && num_rows <= max_tokens;
    if (reroutes) {
        // Sequences share no row, so each row has one writer.
        for (int sequence = threadIdx.x; sequence < num_sequences; sequence += blockDim.x) {
            const int begin = query_start_loc[sequence], end = min(query_start_loc[sequence + 1], capacity);
            if (end - begin > decode_length) continue;
            for (int row = begin; row < end; ++row) roles[row] = DECODE;
        }
    }
    if (threadIdx.x == 0) {
        step[0] = num_decode_rows;
        step[1] = num_rows;
        step[2] = reroutes;
    }
}
