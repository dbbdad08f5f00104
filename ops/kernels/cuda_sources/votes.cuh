// Who is active: the vote rules of ops/reference_step.py. Included by route.cu after step.cuh and router.cuh.
//
// A row's slots lie in `width` neighbouring lanes of one warp, a power of two, at least K. Sums over a row are taken in 64 bits
// in the order of its slots, sums over rows in whole numbers, so that no result depends on the order of threads.

namespace {

constexpr double UNITS = 4294967296.0;  // reference_step.py, and the next
constexpr int LYNX_BINS = 4;

enum VoteRule { ALL, TOP, MASS, SHARE, BENEFIT, BUDGET };
enum Score { PROBABILITY, WEIGHT, NORM, LYNX };

struct Step {
    const float* weights;      // [T, K]
    const TopkId* ids;         // [T, K]
    const signed char* roles;  // [T]
    int num_tokens, top_k, num_experts;
};

struct Votes {
    VoteRule rule;
    double dial;              // top: S; mass, share: the rule's own; benefit: least points; budget: experts
    const double* steps;      // [num_steps, 2], top: least decode rows and S, ascending; null: dial
    int num_steps;
    int by_selection;         // 1: top: slots are ranked by what the router ranks by, else by weight
    Score score;              // budget
    int first;                // 1: budget: each row's first comes before all others
    double winner;            // budget: so does an expert with more than this share of a row's weights
    const float* norms;       // [E]; benefit, and budget by norms
    const signed char* protects;  // [E], 1: always voted for; null: none
};

// What a step's votes are counted with, in shared memory.
struct Ballot {
    int num_whole;     // top: slots of each row
    double cut_share;  // top: rows whose next slot has more than this share vote once more; above 1: none
    int cut_row;       // and those with as much, up to this row
    unsigned elected[MAX_EXPERTS / WARP];  // benefit, budget: a mask of experts
};

struct Slot {
    unsigned index;  // fits: routing.py sees to it, here and in logits and differences
    int role, expert;  // expert: -1 if the slot is not used
    float weight, largest;  // largest: of the row
    int rank, place;  // rank: by weight; place: by what votes are given by
    double total, before;  // the row's weights, and of those the ones that rank before this slot
};

__device__ __forceinline__ Slot load_slot(
    const Step& step, const Votes& votes, const Router& router, int row, int slot, int width
) {
    Slot found;
    const bool exists = row < step.num_tokens && slot < step.top_k;
    found.index = static_cast<unsigned>(row) * step.top_k + slot;
    found.role = row < step.num_tokens ? step.roles[row] : PADDING;
    const TopkId id = exists ? step.ids[found.index] : -1;
    found.expert = id >= 0 && id < step.num_experts ? static_cast<int>(id) : -1;
    found.weight = exists ? step.weights[found.index] : 0;
    const float weight = found.expert >= 0 ? found.weight : -INFINITY_32;  // unused slots come last
    found.rank = 0;
    found.total = found.before = 0;
    found.largest = -INFINITY_32;
#pragma unroll 1
    for (int other = 0; other < step.top_k; ++other) {
        const float theirs = __shfl_sync(ALL_LANES, weight, other, width);
        const bool first = theirs > weight || (theirs == weight && other < slot);
        const double value = theirs > -INFINITY_32 ? theirs : 0;
        found.rank += first;
        found.total += value;
        if (votes.rule == MASS && first) found.before += value;
        found.largest = fmaxf(found.largest, theirs);
    }
    found.place = found.rank;
    if (votes.by_selection) {
        Softmax softmax;
        if (router.by_scores && !router.sigmoid) softmax = softmax_of(router, row, row < step.num_tokens, slot, width);
        const float logit = found.expert >= 0 ? router.logit(row, found.expert) : 0;
        const float key = found.expert >= 0 ? rank_key(router, logit, found.expert, softmax) : -INFINITY_32;
        found.place = 0;
#pragma unroll 1
        for (int other = 0; other < step.top_k; ++other) {
            const float theirs = __shfl_sync(ALL_LANES, key, other, width);
            found.place += theirs > key || (theirs == key && other < slot);
        }
    }
    return found;
}

// Whether a slot votes for its expert.
__device__ __forceinline__ bool votes_for(const Slot& slot, int row, const Votes& votes, const Ballot& ballot) {
    if (slot.expert < 0 || slot.role == PADDING) return false;
    if (slot.role == PREFILL || votes.rule == ALL) return true;
    if (votes.protects != nullptr && votes.protects[slot.expert]) return true;
    if (votes.rule == MASS) return slot.rank == 0 || slot.before < votes.dial * slot.total;
    if (votes.rule == SHARE) return slot.weight >= votes.dial * slot.largest;
    if (votes.rule != TOP) return contains(ballot.elected, slot.expert);
    if (slot.place != ballot.num_whole) return slot.place < ballot.num_whole;
    const double share = slot.total > 0 ? slot.weight / slot.total : -1;
    return share > ballot.cut_share || (share == ballot.cut_share && row <= ballot.cut_row);
}

// Counts the decode rows. All threads of the block.
__device__ __forceinline__ int count_decode_rows(const Step& step) {
    int count = 0;
    for (int first = 0; first < step.num_tokens; first += blockDim.x) {
        const int row = first + threadIdx.x;
        count += __syncthreads_count(row < step.num_tokens && step.roles[row] == DECODE);
    }
    return count;
}

// The share of each row's weights that its slot after `num_whole` has, for the rows from `chunk` on, one for each thread of
// the block: -1 where there is none, -2 for rows that are not decode rows. Returns how many are. All threads of the block.
__device__ __forceinline__ int next_shares(
    const Step& step, const Votes& votes, const Router& router, int width, int num_whole, int chunk, double* shares
) {
    const int thread = threadIdx.x, num_threads = blockDim.x, rows_per_pass = num_threads / width;
    const bool decodes = chunk + thread < step.num_tokens && step.roles[chunk + thread] == DECODE;
    shares[thread] = decodes ? -1 : -2;
    const int num_decoding = __syncthreads_count(decodes);
    for (int first = 0; first < num_threads && chunk + first < step.num_tokens && num_decoding > 0; first += rows_per_pass) {
        const int row = chunk + first + thread / width;
        const Slot slot = load_slot(step, votes, router, row, thread % width, width);
        if (slot.role == DECODE && slot.expert >= 0 && slot.place == num_whole && slot.total > 0) {
            shares[first + thread / width] = slot.weight / slot.total;
        }
    }
    __syncthreads();
    return num_decoding;
}

// Rule top: how many slots vote, and which rows vote once more. All threads of the block; `shares` has room for one each.
__device__ __forceinline__ void cut(
    const Step& step, const Votes& votes, const Router& router, int width, int num_decode_rows, double* shares, Ballot* ballot
) {
    double top_k = votes.dial;
    for (int i = 0; i < votes.num_steps; ++i) {
        if (i == 0 || num_decode_rows >= votes.steps[2 * i]) top_k = votes.steps[2 * i + 1];
    }
    const int num_whole = static_cast<int>(floor(top_k)), thread = threadIdx.x, num_threads = blockDim.x;
    // Rounded half to even, as Python does.
    const int num_more = static_cast<int>(rint((top_k - num_whole) * num_decode_rows));
    if (thread == 0) ballot->num_whole = num_whole, ballot->cut_share = 2;
    __syncthreads();
    const int num_chunks = num_more > 0 ? (step.num_tokens + num_threads - 1) / num_threads : 0;
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
        double mine = 0;
        int place = 0;
        // The chunk's own rows, then those of the others: how many come before this thread's?
#pragma unroll 1
        for (int turn = 0; turn < num_chunks; ++turn) {
            const int other = (chunk + turn) % num_chunks * num_threads;
            const int num_decoding = next_shares(step, votes, router, width, num_whole, other, shares);
            if (turn == 0 && num_decoding == 0) break;
            if (turn == 0) mine = shares[thread];
            const int end = num_decoding > 0 ? min(num_threads, step.num_tokens - other) : 0;
#pragma unroll 4
            for (int i = 0; i < end; ++i) {
                place += shares[i] > mine || (shares[i] == mine && other + i < chunk * num_threads + thread);
            }
            __syncthreads();
            // The last row that votes once more.
            const bool is_last = turn == num_chunks - 1 && mine > -2 && place == num_more - 1;
            if (is_last) ballot->cut_share = mine, ballot->cut_row = chunk * num_threads + thread;
        }
    }
    __syncthreads();
}

// What a slot adds to its expert's points, in units.
__device__ __forceinline__ long long points_of(const Slot& slot, const Votes& votes, int num_decode_rows) {
    const double weight = slot.weight;
    if (votes.rule == BENEFIT) {
        const double value = (slot.total > 0 ? weight / slot.total : 0) * votes.norms[slot.expert];
        return llrint(value * value * value * UNITS);
    }
    if (votes.score == LYNX) {
        // The first bin holds the row's largest weights, each further one weights half as large: an exponent's difference.
        long long points = 1;
        if (!(weight > 0)) return points;
        const int halvings = static_cast<int>(__double_as_longlong(weight / slot.largest) >> 52) - 1023;
        for (int bin = 0; bin < LYNX_BINS - 1 + halvings; ++bin) points *= num_decode_rows;
        return points;
    }
    return llrint((votes.score == NORM ? weight * votes.norms[slot.expert] : weight) * UNITS);
}

// Rules benefit and budget: the experts that decode rows elect together, a mask. All threads of the block; `points` has room
// for one value for each expert.
__device__ __forceinline__ void elect(
    const Step& step, const Votes& votes, const Router& router, int width, int num_decode_rows, unsigned long long* points,
    Ballot* ballot
) {
    __shared__ unsigned candidates[MAX_EXPERTS / WARP];  // selected by a decode row
    __shared__ unsigned before[MAX_EXPERTS / WARP];      // elected before all others
    const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP, num_threads = blockDim.x;
    for (int expert = thread; expert < step.num_experts; expert += num_threads) points[expert] = 0;
    if (thread < MAX_EXPERTS / WARP) candidates[thread] = before[thread] = ballot->elected[thread] = 0;
    __syncthreads();
    const bool by_probability = votes.rule == BUDGET && votes.score == PROBABILITY;
    for (int first = 0; first < step.num_tokens; first += num_threads / width) {
        const int row = first + thread / width;
        const Slot slot = load_slot(step, votes, router, row, thread % width, width);
        if (slot.role != DECODE || slot.expert < 0) continue;
        const unsigned bit = 1u << slot.expert % WARP;
        atomicOr(&candidates[slot.expert / WARP], bit);
        const bool wins = votes.rule == BUDGET && slot.weight > votes.winner * slot.total;
        if (slot.rank == 0 && (votes.first || wins)) atomicOr(&before[slot.expert / WARP], bit);
        if (!by_probability) atomicAdd(&points[slot.expert], points_of(slot, votes, num_decode_rows));
    }
    for (int row = warp; by_probability && row < step.num_tokens; row += num_threads / WARP) {
        if (step.roles[row] != DECODE) continue;
        Softmax softmax;
        if (!router.sigmoid) softmax = softmax_of(router, row, true, lane, WARP);
#pragma unroll 1
        for (int expert = lane; expert < step.num_experts; expert += WARP) {
            const double value = score(router, router.logit(row, expert), softmax);
            atomicAdd(&points[expert], llrint(value * UNITS));
        }
    }
    __syncthreads();
    int num_before = 0;
#pragma unroll 1
    for (int word = 0; word < MAX_EXPERTS / WARP; ++word) num_before += __popc(before[word]);
    const int num_elected = max(static_cast<int>(votes.dial), num_before);
    for (int expert = thread; expert < step.num_experts; expert += num_threads) {
        if (!contains(candidates, expert)) continue;
        const bool is_before = contains(before, expert);
        bool is_elected = is_before || points[expert] >= votes.dial;
        if (votes.rule == BUDGET) {
            int place = 0;
            for (int other = 0; other < step.num_experts; ++other) {
                if (!contains(candidates, other)) continue;
                const bool theirs_is_before = contains(before, other);
                const bool more = points[other] > points[expert] || (points[other] == points[expert] && other < expert);
                place += theirs_is_before == is_before ? more : theirs_is_before;
            }
            is_elected = place < num_elected;
        }
        if (is_elected) atomicOr(&ballot->elected[expert / WARP], 1u << expert % WARP);
    }
    __syncthreads();
}

}  // namespace
