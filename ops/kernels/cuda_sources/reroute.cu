// Similarity-based expert re-routing of one step of one MoE layer: one launch of one thread block.
//
// What it computes is written down in ops/reference.py (SERE, arXiv 2602.07616, section 3); cuda.py launches it.
// Everything that changes from step to step is read from device memory, so a CUDA graph that holds this launch replays
// correctly. Policies that choose by more than similarity are route.cu's.
//
// Legend: T rows (tokens), K slots per row (top_k), E experts. blockDim.x is a multiple of 32 and at least E.
// Bounds: 1 <= K <= 32, 1 <= E <= 1024; T is any. An id outside [0, E) is an unused slot and indexes nothing.

#include "numbers.cuh"
#include "step.cuh"

constexpr int MAX_THREADS = 1024;

extern "C" __global__ void __launch_bounds__(MAX_THREADS) sere_reroute(
    const float* __restrict__ topk_weights,       // [T, K], finite
    const TopkId* topk_ids,                       // [T, K]
    TopkId* new_ids,                              // [T, K]; may be topk_ids, then only changed slots are written
    const signed char* __restrict__ roles,        // [T]; null: every row is a decode row
    const long long* __restrict__ step,           // {decode rows, rows that are not padding, 1 if any row's role is DECODE};
                                                  // null: unknown, nothing is counted
    const uint4* __restrict__ neighbours,         // [E, num_neighbours / 8] of 8 ids each: the other experts whose similarity
                                                  // reaches the threshold, most similar first, then the expert's own id
    unsigned long long* __restrict__ counters,    // [14], added to; null: nothing is counted
    int num_tokens, int top_k, int num_experts, int primary_top_k,
    int num_neighbours                            // with the filling; a multiple of GROUP * IDS_PER_LOAD
) {
    __shared__ unsigned marks[MAX_EXPERTS];
    __shared__ unsigned primary[MAX_EXPERTS / WARP];
    __shared__ unsigned short replacements[MAX_EXPERTS];

    const int thread = threadIdx.x, num_threads = blockDim.x;
    const int lane = thread % WARP;
    const bool reroutes = primary_top_k < top_k && (step == nullptr || step[2] != 0);
    const bool counts = counters != nullptr && step != nullptr && step[0] > 0;
    const bool in_place = topk_ids == new_ids, idle = !reroutes && !counts && in_place;

    // A row's slots lie in `width` neighbouring lanes of one warp: a power of two, at least K.
    int width = 1;
    while (width < top_k) width *= 2;
    const int slot = thread % width, rows_per_pass = num_threads / width;
    const auto is_expert = [=](TopkId id) { return id >= 0 && id < num_experts; };

    // A long prompt costs nothing. A decode step's first loads do not wait for the answer to `idle`.
    if (num_tokens > rows_per_pass && idle) return;

    marks[thread] = 0;
    __syncthreads();

    // 1. The primary experts. Rank a slot by the number of slots of its row that come before it.
    for (int first = 0; first < num_tokens; first += rows_per_pass) {
        const int row = first + thread / width;
        const size_t index = static_cast<size_t>(row) * top_k + slot;
        const bool exists = row < num_tokens && slot < top_k;
        const int role = !exists ? PADDING : roles == nullptr ? DECODE : roles[row];
        const TopkId id = exists ? topk_ids[index] : -1;
        const float any_weight = exists ? topk_weights[index] : 0;
        const bool used = role != PADDING && is_expert(id);
        const float weight = used ? any_weight : -__int_as_float(0x7f800000);  // unused slots come last
        int rank = 0;
        for (int other = 0; other < top_k; ++other) {
            const float theirs = __shfl_sync(ALL_LANES, weight, other, width);
            rank += theirs > weight || (theirs == weight && other < slot);
        }
        if (used) atomicOr(&marks[id], role == PREFILL || rank < primary_top_k ? PRIMARY : SECONDARY);
    }
    __syncthreads();
    if (idle) return;

    // One thread per expert. Words past the experts' are written too, as zeros of threads without an expert.
    const unsigned mark = thread < num_experts ? marks[thread] : 0;
    const unsigned primary_word = __ballot_sync(ALL_LANES, mark & PRIMARY);
    if (lane == 0) primary[thread / WARP] = primary_word;
    const int active_before = __syncthreads_count(mark != 0);

    // 2. A replacement for each expert that decode rows selected and none voted for: its first primary neighbour.
    if (reroutes) {
        find_replacements(neighbours, num_neighbours, num_experts, marks, primary, replacements);
        __syncthreads();
    }

    // 3. Decode rows follow the replacements. A slot that voted has a primary expert, which is its own replacement.
    int num_rerouted = 0, num_critical = 0;
    if (reroutes || !in_place) {
        for (int first = 0; first < num_tokens; first += rows_per_pass) {
            const int row = first + thread / width;
            if (row >= num_tokens || slot >= top_k) continue;
            const size_t index = static_cast<size_t>(row) * top_k + slot;
            const int role = roles == nullptr ? DECODE : roles[row];
            const TopkId id = topk_ids[index];
            TopkId new_id = id;
            if (reroutes && role == DECODE && is_expert(id)) {
                const unsigned replacement = replacements[id];
                new_id = replacement & ~CRITICAL;
                num_rerouted += new_id != id;
                num_critical += (replacement & CRITICAL) != 0;
            }
            if (!in_place || new_id != id) new_ids[index] = new_id;
            if (counts && reroutes && role != PADDING && is_expert(new_id)) atomicOr(&marks[new_id], AFTERWARDS);
        }
    }

    if (!counts) return;
    int active_after = active_before;
    if (reroutes) {
        __syncthreads();
        active_after = __syncthreads_count(thread < num_experts && (marks[thread] & AFTERWARDS));
        num_rerouted = __reduce_add_sync(ALL_LANES, num_rerouted);
        num_critical = __reduce_add_sync(ALL_LANES, num_critical);
        if (lane == 0 && num_rerouted > 0) atomicAdd(&counters[REROUTED_SLOTS], num_rerouted);
        if (lane == 0 && num_critical > 0) atomicAdd(&counters[CRITICAL_SLOTS], num_critical);
    }
    if (thread == 0) count_experts(counters, step, top_k, active_before, active_after);
}
