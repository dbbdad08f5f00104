// What the kernels of a step have in common: roles, what is known of an expert, the search for a replacement, the counters.
//
// Included once by each of them, after numbers.cuh (compile.py puts both in the includes' place). Compiled once with -DTOPK_INT64, for ids of 64
// bits, and once without.

#ifdef TOPK_INT64
using TopkId = long long;
#else
using TopkId = int;
#endif

namespace {

constexpr int PADDING = 0, PREFILL = 1, DECODE = 2;  // ops/reference.py
constexpr int MAX_EXPERTS = 1024;

// So many lanes search one expert's neighbours together, each testing the 8 ids of one 16-byte load at a time.
constexpr int GROUP = 8, IDS_PER_LOAD = 8;

// What is known of an expert in this step: some row voted for it, a row selected it without a vote, a row has it afterwards.
constexpr unsigned PRIMARY = 1, SECONDARY = 2, AFTERWARDS = 4;

// A replacement is an expert id, with this bit if the expert stays although no row voted for it.
constexpr unsigned short CRITICAL = 0x8000;

// counting.py, COUNTERS
enum Counter {
    STEPS, REROUTING_STEPS, DECODE_ROWS, DECODE_SLOTS, REROUTED_SLOTS, CRITICAL_SLOTS, ACTIVE_BEFORE, ACTIVE_AFTER,
    MIXED_STEPS, MIXED_ACTIVE_BEFORE, MIXED_ACTIVE_AFTER, PURE_STEPS, PURE_ACTIVE_BEFORE, PURE_ACTIVE_AFTER
};

// Whether an expert is in a mask of experts.
__device__ __forceinline__ bool contains(const unsigned* mask, int expert) { return mask[expert / WARP] >> expert % WARP & 1u; }

// The first of 8 expert ids, two to a word, that is primary; -1 if none is. 32 words hold the mask of 1024 experts, one to
// a bank of shared memory, so no two lanes ever wait for each other here.
__device__ __forceinline__ int first_primary(uint4 ids, const unsigned* primary) {
    const unsigned words[4] = {ids.x, ids.y, ids.z, ids.w};
    int first = -1;
#pragma unroll
    for (int i = IDS_PER_LOAD - 1; i >= 0; --i) {
        const unsigned id = words[i / 2] >> (i % 2 * 16) & 0xffffu;
        if (contains(primary, id)) first = static_cast<int>(id);
    }
    return first;
}

// A replacement for each expert that decode rows selected and none voted for: its first primary neighbour. All others are
// their own replacement. `neighbours` as in reroute.cu. All threads of the block; the caller waits afterwards.
__device__ __forceinline__ void find_replacements(
    const uint4* __restrict__ neighbours, int num_neighbours, int num_experts, const unsigned* marks, const unsigned* primary,
    unsigned short* replacements
) {
    const int thread = threadIdx.x, lane = thread % WARP;
    for (int first = 0; first < num_experts; first += blockDim.x / GROUP) {
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
}

// Adds a step to the counters, but for the slots re-routed and critical. One thread. `step` as in reroute.cu.
__device__ __forceinline__ void count_experts(
    unsigned long long* counters, const long long* step, int top_k, int active_before, int active_after
) {
    const bool reroutes = step[2] != 0, mixed = step[1] > step[0], pure = reroutes && !mixed;
    atomicAdd(&counters[STEPS], 1);
    atomicAdd(&counters[REROUTING_STEPS], reroutes);
    atomicAdd(&counters[DECODE_ROWS], step[0]);
    atomicAdd(&counters[DECODE_SLOTS], step[0] * top_k);
    atomicAdd(&counters[ACTIVE_BEFORE], active_before);
    atomicAdd(&counters[ACTIVE_AFTER], active_after);
    atomicAdd(&counters[MIXED_STEPS], mixed);
    atomicAdd(&counters[MIXED_ACTIVE_BEFORE], mixed ? active_before : 0);
    atomicAdd(&counters[MIXED_ACTIVE_AFTER], mixed ? active_after : 0);
    atomicAdd(&counters[PURE_STEPS], pure);
    atomicAdd(&counters[PURE_ACTIVE_BEFORE], pure ? active_before : 0);
    atomicAdd(&counters[PURE_ACTIVE_AFTER], pure ? active_after : 0);
}

}  // namespace
