// Any policy on one step of one MoE layer: votes, targets, weights, counters, and what each expert's weight has lost. One
// launch of one thread block.
//
// What it computes is written down in ops/reference.py; routing.py launches it. Everything that changes from step to step is
// read from device memory, so a CUDA graph that holds this launch replays correctly.
//
// Legend: T rows (tokens), K slots per row (top_k), E experts. blockDim.x is a multiple of 32, at most MAX_THREADS.
// Bounds: 1 <= K <= 32, 1 <= E <= 32 EXPERTS_PER_LANE, at most 32 groups; T is any. An id outside [0, E) is an unused slot and
// indexes nothing. Weights are finite and not negative.

#include "numbers.cuh"
#include "step.cuh"
#include "router.cuh"
#include "votes.cuh"

// Registers for a lane's keys: the more experts, the fewer threads.
#if EXPERTS_PER_LANE > 8
constexpr int MAX_THREADS = 512;
#else
constexpr int MAX_THREADS = 1024;
#endif

namespace {

enum TargetRule { NEIGHBOUR, OWN, DROP, DROP_UNVOTED };
enum WeightRule { KEEP, RENORMALIZE, HALF, FOLD };

// Where a slot goes.
struct Move {
    int expert;      // before weights: the slot's expert, another, or -1
    bool moved;      // has another expert than before, or none
    bool emptied;    // has none: weight 0
    double base;     // its weight before the weight rule
};

// The n-th set bit's lane below which lie as many of `lanes` as this lane's number among them.
__device__ __forceinline__ int number_among(unsigned lanes, int lane) { return __popc(lanes & ((1u << lane) - 1)); }

// Target `own`: the row's voted experts, then the best others of the active ones, as many as it has slots. One warp, whose
// lane is the slot. `taken` is the warp's mask of experts.
__device__ __forceinline__ void move_to_own(
    const Slot& slot, bool voted, int row, const Router& router, const unsigned* active, unsigned* taken, Move* move
) {
    const int lane = threadIdx.x % WARP;
    const bool used = slot.expert >= 0;
    taken[lane] = 0;
    __syncwarp();
    if (voted) atomicOr(&taken[slot.expert / WARP], 1u << slot.expert % WARP);
    __syncwarp();
    bool stays = used && contains(taken, slot.expert);
    int places = __popc(__ballot_sync(ALL_LANES, used)) - __popc(__ballot_sync(ALL_LANES, voted));
    // Where nothing is free, the logits are not read.
    if (places <= 0) {
        move->moved = used && !stays;
        move->emptied = move->moved;
        __syncwarp();
        return;
    }
    Keys keys;
    keys.load(router, row, lane);
    keys.keep(active, taken, lane);
    int num_arriving = 0, arriving = -1;  // lane n has the n-th
    for (; places > 0; --places) {
        const int expert = keys.take(lane);
        if (expert < 0) break;
        const bool here = used && slot.expert == expert;
        stays = stays || here;
        if (__any_sync(ALL_LANES, here)) continue;
        if (lane == num_arriving) arriving = expert;
        ++num_arriving;
    }
    move->moved = used && !stays;
    const int number = number_among(__ballot_sync(ALL_LANES, move->moved), lane);
    const int expert = __shfl_sync(ALL_LANES, arriving, number);
    const bool filled = move->moved && number < num_arriving;
    move->emptied = move->moved && !filled;
    if (filled) move->expert = expert;
    if (!__any_sync(ALL_LANES, filled)) return;

    // p W / P, with p up to a factor that cancels.
    const float logit = used ? router.logit(row, slot.expert) : -INFINITY_32;
    float largest = logit;
    for (int away = WARP / 2; away > 0; away /= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, away));
    double selected = used ? router.relative_score(logit, largest) : 0;
    for (int away = WARP / 2; away > 0; away /= 2) selected += __shfl_xor_sync(ALL_LANES, selected, away);
    if (filled) {
        const double score = router.relative_score(router.logit(row, expert), largest);
        move->base = selected > 0 ? score * (slot.total / selected) : 0;
    }
}

// The expert of slots that have none: the row's first that is active, else the lowest active one.
__device__ __forceinline__ int any_active(const Slot& slot, bool is_active, const unsigned* active, int width) {
    const int lane = threadIdx.x % WARP;
    int first = is_active ? slot.rank : WARP;
    for (int away = width / 2; away > 0; away /= 2) first = min(first, __shfl_xor_sync(ALL_LANES, first, away));
    const unsigned here = __ballot_sync(ALL_LANES, is_active && slot.rank == first);
    const unsigned row = here >> lane / width * width & (width == WARP ? ALL_LANES : (1u << width) - 1);
    const int expert = __shfl_sync(ALL_LANES, slot.expert, row != 0 ? __ffs(row) - 1 : 0, width);
    const unsigned words = __ballot_sync(ALL_LANES, active[lane] != 0);
    const int word = words != 0 ? __ffs(words) - 1 : 0;
    return row != 0 ? expert : word * WARP + __ffs(active[word]) - 1;
}

// The new weights' rule, over a row. Rows in which nothing moved keep their weights to the last bit.
__device__ __forceinline__ float weigh(
    const Slot& slot, const Move& move, WeightRule rule, const float* folds, int num_experts, int width
) {
    const int lane = threadIdx.x % WARP;
    double base = move.base;
    if (rule == FOLD && move.moved) {
        base = folds[slot.expert * num_experts + move.expert] * static_cast<double>(slot.weight);
    }
    if (rule == RENORMALIZE || rule == HALF) {
        double total = slot.expert >= 0 ? base : 0;
        for (int away = width / 2; away > 0; away /= 2) total += __shfl_xor_sync(ALL_LANES, total, away);
        const double ratio = total > 0 ? slot.total / total : 0;
        base *= rule == HALF ? sqrt(ratio) : ratio;
    }
    const unsigned moved = __ballot_sync(ALL_LANES, move.moved) >> lane / width * width;
    const bool row_moved = (moved & (width == WARP ? ALL_LANES : (1u << width) - 1)) != 0;
    return row_moved && slot.expert >= 0 ? static_cast<float>(base) : slot.weight;
}

// What each expert's weight has lost in a row, into the row's zeros. A row's experts are added up in the order of its slots.
__device__ __forceinline__ void write_difference(
    const Slot& slot, int new_expert, float new_weight, int top_k, int number, int width, float* difference
) {
    float lost_by_old = 0, lost_by_new = 0;
    bool owns_old = slot.expert >= 0 && slot.role == DECODE, owns_new = owns_old;
    __syncwarp();  // the zeros
#pragma unroll 1
    for (int other = 0; other < top_k; ++other) {
        const int old_id = __shfl_sync(ALL_LANES, slot.expert, other, width);
        const int new_id = __shfl_sync(ALL_LANES, new_expert, other, width);
        const float weight = __shfl_sync(ALL_LANES, slot.weight, other, width);
        const float now = __shfl_sync(ALL_LANES, new_weight, other, width);
        lost_by_old += (old_id == slot.expert ? weight : 0) - (new_id == slot.expert ? now : 0);
        lost_by_new += (old_id == new_expert ? weight : 0) - (new_id == new_expert ? now : 0);
        owns_old = owns_old && !(old_id == slot.expert && other < number);
        owns_new = owns_new && old_id != new_expert && !(new_id == new_expert && other < number);
    }
    if (owns_old) difference[slot.expert] = lost_by_old;
    if (owns_new) difference[new_expert] = lost_by_new;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(MAX_THREADS, 1) sere_route(
    float* topk_weights,                        // [T, K], changed in place
    TopkId* topk_ids,                           // [T, K], changed in place
    const signed char* __restrict__ roles,      // [T]
    const long long* __restrict__ step_info,    // as in reroute.cu; null: unknown, nothing is counted
    unsigned long long* __restrict__ counters,  // [14], added to; null: nothing is counted
    float* difference,                          // [T, E], written; null: not wanted
    const uint4* __restrict__ neighbours,       // as in reroute.cu; targets NEIGHBOUR only
    const float* __restrict__ folds,            // [E, E]; weights FOLD only
    const void* __restrict__ logits,            // [T, E], and the next two: as in Router
    const float* __restrict__ bias,
    const double* __restrict__ vote_steps,      // and the next two: as in Votes
    const float* __restrict__ norms,
    const signed char* __restrict__ protects,
    int num_tokens, int top_k, int num_experts, int num_neighbours,
    int writes_zeros,                           // difference: 0 if it already is all zeros
    int vote_rule, int by_selection, int num_vote_steps, int score, int first, double dial, double winner,
    int target_rule, int weight_rule,
    int logits_type, int sigmoid, int by_scores, int num_groups, int groups_kept, int best_two
) {
    __shared__ unsigned marks[MAX_EXPERTS];
    __shared__ unsigned primary[MAX_EXPERTS / WARP];
    __shared__ Ballot ballot;
    __shared__ unsigned taken[MAX_THREADS / WARP][WARP];
    __shared__ unsigned short replacements[MAX_EXPERTS];
    __shared__ double shares[MAX_THREADS];
    __shared__ unsigned long long points[MAX_EXPERTS];
    __shared__ int num_active[2], num_rerouted, num_critical;  // active: before, after

    const int thread = threadIdx.x, num_threads = blockDim.x, lane = thread % WARP, warp = thread / WARP;
    const bool reroutes = step_info == nullptr || step_info[2] != 0;
    const bool counts = counters != nullptr && step_info != nullptr && step_info[0] > 0;
    const bool zeroes = difference != nullptr && writes_zeros != 0;
    if (!reroutes && !counts && !zeroes) return;

    const Step step{topk_weights, topk_ids, roles, num_tokens, top_k, num_experts};
    const Votes votes{static_cast<VoteRule>(vote_rule), dial, vote_steps, num_vote_steps, by_selection,
                      static_cast<Score>(score), first, winner, norms, protects};
    const Router router{logits, bias, static_cast<LogitsType>(logits_type), num_experts, sigmoid, by_scores,
                        num_groups, groups_kept, best_two};
    int width = 1;
    while (width < top_k) width *= 2;

    for (int expert = thread; expert < MAX_EXPERTS; expert += num_threads) marks[expert] = 0;
    if (thread < MAX_EXPERTS / WARP) primary[thread] = 0;
    if (thread == 0) {
        num_active[0] = num_active[1] = num_rerouted = num_critical = 0;
        ballot.num_whole = static_cast<int>(dial);
        ballot.cut_share = 2;
    }
    __syncthreads();

    // 1. Votes.
    if (reroutes) {
        const bool elects = votes.rule == BENEFIT || votes.rule == BUDGET;
        if (elects || (votes.rule == TOP && (num_vote_steps > 0 || dial != floor(dial)))) {
            const int num_decode_rows = count_decode_rows(step);
            if (elects) {
                elect(step, votes, router, width, num_decode_rows, points, &ballot);
            } else {
                cut(step, votes, router, width, num_decode_rows, shares, &ballot);
            }
        }
    }
    for (int begin = 0; begin < num_tokens; begin += num_threads / width) {
        const int row = begin + thread / width;
        const Slot slot = load_slot(step, votes, router, row, lane % width, width);
        if (slot.expert < 0 || slot.role == PADDING) continue;
        const unsigned mark = slot.role == PREFILL ? PRIMARY | AFTERWARDS
                              : votes_for(slot, row, votes, ballot) ? PRIMARY : SECONDARY;
        atomicOr(&marks[slot.expert], mark);
    }
    __syncthreads();

    // 2. The active experts, and where targets are neighbours a replacement for each other one.
    for (int begin = 0; begin < num_experts; begin += num_threads) {
        const int expert = begin + thread;
        const unsigned mark = expert < num_experts ? marks[expert] : 0;
        const unsigned word = __ballot_sync(ALL_LANES, mark & PRIMARY), selected = __ballot_sync(ALL_LANES, mark != 0);
        if (lane == 0 && expert < num_experts) {
            primary[expert / WARP] = word;
            atomicAdd(&num_active[0], __popc(selected));
        }
    }
    __syncthreads();
    if (reroutes && target_rule == NEIGHBOUR) {
        find_replacements(neighbours, num_neighbours, num_experts, marks, primary, replacements);
        __syncthreads();
    }

    // 3. Decode rows: targets, weights, difference. Under `own` a warp has one row, else as many as their slots have room.
    if (target_rule == OWN) width = WARP;
    const int rows_per_warp = WARP / width, number = lane % width;
    for (int group = warp; (reroutes || zeroes) && group * rows_per_warp < num_tokens; group += num_threads / WARP) {
        const int row = group * rows_per_warp + lane / width;
        const unsigned row_begin = static_cast<unsigned>(row) * num_experts;
#pragma unroll 1
        for (int expert = number; zeroes && row < num_tokens && expert < num_experts; expert += width) {
            difference[row_begin + expert] = 0;
        }
        if (!__any_sync(ALL_LANES, row < num_tokens && roles[row] == DECODE)) continue;

        const Slot slot = load_slot(step, votes, router, row, number, width);
        const bool used = slot.expert >= 0, changeable = used && slot.role == DECODE;
        const bool voted = votes_for(slot, row, votes, ballot), is_active = used && contains(primary, slot.expert);
        Move move{slot.expert, false, false, slot.weight};
        if (target_rule == OWN) {
            move_to_own(slot, voted, row, router, primary, taken[warp], &move);
        } else if (target_rule == NEIGHBOUR) {
            if (changeable) move.expert = replacements[slot.expert] & ~CRITICAL;
            move.moved = move.expert != slot.expert;
        } else {
            move.moved = move.emptied = changeable && !(target_rule == DROP ? is_active : voted);
        }
        if (__any_sync(ALL_LANES, move.emptied)) {
            const int expert = any_active(slot, is_active, primary, width);
            if (move.emptied) move.expert = expert, move.base = 0;
        }
        const float weight = weigh(slot, move, static_cast<WeightRule>(weight_rule), folds, num_experts, width);
        if (difference != nullptr) write_difference(slot, move.expert, weight, top_k, number, width, difference + row_begin);
        if (!changeable) continue;
        if (move.expert != slot.expert) topk_ids[slot.index] = move.expert;
        if (weight != slot.weight) topk_weights[slot.index] = weight;
        if (!counts) continue;
        atomicOr(&marks[move.expert], AFTERWARDS);
        if (move.expert != slot.expert) atomicAdd(&num_rerouted, 1);
        if (move.expert == slot.expert && !is_active) atomicAdd(&num_critical, 1);
    }

    // 4. Counters.
    if (!counts) return;
    if (reroutes) {
        __syncthreads();
        for (int begin = 0; begin < num_experts; begin += num_threads) {
            const bool after = begin + thread < num_experts && (marks[begin + thread] & AFTERWARDS);
            const unsigned word = __ballot_sync(ALL_LANES, after);
            if (lane == 0) atomicAdd(&num_active[1], __popc(word));
        }
        __syncthreads();
        if (thread == 0) atomicAdd(&counters[REROUTED_SLOTS], num_rerouted);
        if (thread == 0) atomicAdd(&counters[CRITICAL_SLOTS], num_critical);
    }
    if (thread == 0) count_experts(counters, step_info, top_k, num_active[0], num_active[reroutes ? 1 : 0]);
}
