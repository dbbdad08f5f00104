// Similarity-based expert re-routing of one step of one MoE layer: one launch of one thread block.
//
// What it computes is written down in ops/reference.py (SERE, arXiv 2602.07616, section 3); cuda.py launches it.
// Everything that changes from step to step is read from device memory, so a CUDA graph that holds this launch replays
// correctly. Compiled once with -DTOPK_INT64, for ids of 64 bits, and once without.
//
// Legend: T rows (tokens), K slots per row (top_k), E experts. blockDim.x is a multiple of 32 and at least E.
// Bounds: 1 <= K <= 32, 1 <= E <= 1024; T is any. An id outside [0, E) is an unused slot and indexes nothing.

#ifdef TOPK_INT64
using TopkId = long long;
#else
using TopkId = int;
#endif

namespace {

constexpr int PADDING = 0, PREFILL = 1, DECODE = 2;  // ops/reference.py
constexpr int MAX_EXPERTS = 1024, MAX_THREADS = 1024, WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// So many lanes search one expert's neighbours together, each testing the 8 ids of one 16-byte load at a time.
constexpr int GROUP = 8, IDS_PER_LOAD = 8;

// What is known of an expert in this step.
constexpr unsigned PRIMARY = 1, SECONDARY = 2, AFTERWARDS = 4;

// A replacement is an expert id, with this bit if the expert stays although no row voted for it.
constexpr unsigned short CRITICAL = 0x8000;

// counting.py, COUNTERS
enum Counter {
    STEPS, REROUTING_STEPS, DECODE_ROWS, DECODE_SLOTS, REROUTED_SLOTS, CRITICAL_SLOTS, ACTIVE_BEFORE, ACTIVE_AFTER,
    MIXED_STEPS, MIXED_ACTIVE_BEFORE, MIXED_ACTIVE_AFTER
};

// The first of 8 expert ids, two to a word, that is primary; -1 if none is. 32 words hold the mask of 1024 experts, one to
// a bank of shared memory, so no two lanes ever wait for each other here.
__device__ __forceinline__ int first_primary(uint4 ids, const unsigned* primary) {
    const unsigned words[4] = {ids.x, ids.y, ids.z, ids.w};
    int first = -1;
#pragma unroll
    for (int i = IDS_PER_LOAD - 1; i >= 0; --i) {
        const unsigned id = words[i / 2] >> (i % 2 * 16) & 0xffffu;
        if (primary[id / WARP] >> id % WARP & 1u) first = static_cast<int>(id);
    }
    return first;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(MAX_THREADS) sere_reroute(
    const float* __restrict__ topk_weights,       // [T, K], finite
    const TopkId* topk_ids,                       // [T, K]
    TopkId* new_ids,                              // [T, K]; may be topk_ids, then only changed slots are written
    const signed char* __restrict__ roles,        // [T]; null: every row is a decode row
    const long long* __restrict__ step,           // {decode rows, rows that are not padding, 1 if any row's role is DECODE};
                                                  // null: unknown, nothing is counted
    const uint4* __restrict__ neighbours,         // [E, num_neighbours / 8] of 8 ids each: the other experts whose similarity
                                                  // reaches the threshold, most similar first, then the expert's own id
    unsigned long long* __restrict__ counters,    // [11], added to; null: nothing is counted
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
        for (int first = 0; first < num_experts; first += num_threads / GROUP) {
            const int expert = first + thread / GROUP;
            const bool searches = expert < num_experts && marks[expert] == SECONDARY;
            const uint4* row = neighbours + static_cast<size_t>(expert) * (num_neighbours / IDS_PER_LOAD);
            int end = searches ? num_neighbours : 0;
            int replacement = searches ? expert | CRITICAL : expert;
            for (int begin = 0; __any_sync(ALL_LANES, begin < end); begin += GROUP * IDS_PER_LOAD) {
                int found = -1;
                bool filling = false;  // the expert's own id, which is not primary here and so is never found
                if (begin < end) {
                    const uint4 ids = row[begin / IDS_PER_LOAD + thread % GROUP];
                    found = first_primary(ids, primary);
                    filling = static_cast<int>(ids.w >> 16) == expert;
                }
                const int group = lane / GROUP * GROUP;
                const unsigned finders = __ballot_sync(ALL_LANES, found >= 0) >> group & ((1u << GROUP) - 1);
                const unsigned fillers = __ballot_sync(ALL_LANES, filling) >> group & ((1u << GROUP) - 1);
                const int best = __shfl_sync(ALL_LANES, found, finders != 0 ? __ffs(finders) - 1 : 0, GROUP);
                if (finders != 0) replacement = best;
                if (finders != 0 || fillers != 0) end = 0;
            }
            if (expert < num_experts && thread % GROUP == 0) replacements[expert] = replacement;
        }
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
    if (thread == 0) {
        const bool mixed = step[1] > step[0];
        atomicAdd(&counters[STEPS], 1);
        atomicAdd(&counters[REROUTING_STEPS], step[2] != 0);
        atomicAdd(&counters[DECODE_ROWS], step[0]);
        atomicAdd(&counters[DECODE_SLOTS], step[0] * top_k);
        atomicAdd(&counters[ACTIVE_BEFORE], active_before);
        atomicAdd(&counters[ACTIVE_AFTER], active_after);
        atomicAdd(&counters[MIXED_STEPS], mixed);
        atomicAdd(&counters[MIXED_ACTIVE_BEFORE], mixed ? active_before : 0);
        atomicAdd(&counters[MIXED_ACTIVE_AFTER], mixed ? active_after : 0);
    }
}
