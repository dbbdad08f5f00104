// What a router ranks a row's experts by, and what they score: ops/policies/scoring.py, for one warp and one row.
//
// Included by route.cu after numbers.cuh and step.cuh. EXPERTS_PER_LANE (1 to 32) times 32 is the most experts a layer can have: a lane holds
// that many values in registers.

#ifndef EXPERTS_PER_LANE
#define EXPERTS_PER_LANE 32
#endif

namespace {

#define INFINITY_32 __int_as_float(0x7f800000)

enum LogitsType { FLOAT32, BFLOAT16, FLOAT16 };

// Unsigned integers that order as floats do: what the warp's reductions take. No NaN; 0 and -0 are given as 0.
__device__ __forceinline__ unsigned ordered(float value) {
    const unsigned bits = __float_as_uint(value);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(unsigned order) {
    return __uint_as_float(order >> 31 ? order & 0x7fffffffu : ~order);
}

struct Router {
    const void* logits;  // [T, E] of `type`
    const float* bias;   // [E]; null: none
    LogitsType type;
    int num_experts;
    int sigmoid;    // 1, else softmax
    int by_scores;  // 1: ranks by scores, plus bias; else by logits, which is the same for a softmax without bias
    int num_groups, groups_kept;
    int best_two;  // 1: groups are ranked by the sum of their best two, else by their best

    __device__ __forceinline__ float logit(int row, int expert) const {
        const unsigned index = static_cast<unsigned>(row) * num_experts + expert;
        if (type == FLOAT32) return static_cast<const float*>(logits)[index];
        if (type == BFLOAT16) return static_cast<const Bfloat16*>(logits)[index];
        return static_cast<const Float16*>(logits)[index];
    }

    // A score up to a factor, which for a softmax is that of `largest`, any logit of the row that keeps exp in range.
    __device__ __forceinline__ float relative_score(float logit, float largest) const {
        return sigmoid ? 1 / (1 + expf(-logit)) : expf(logit - largest);
    }
};

// A row's largest logit and the sum of exp(logit - largest). `width` lanes of the warp work on a row, each as number `slot`.
struct Softmax {
    float largest = 0, sum = 1;
};
__device__ __forceinline__ Softmax softmax_of(const Router& router, int row, bool exists, int slot, int width) {
    Softmax found;
    float largest = -INFINITY_32, sum = 0;
#pragma unroll 1
    for (int e = slot; exists && e < router.num_experts; e += width) largest = fmaxf(largest, router.logit(row, e));
    for (int away = width / 2; away > 0; away /= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, away));
#pragma unroll 1
    for (int e = slot; exists && e < router.num_experts; e += width) sum += expf(router.logit(row, e) - largest);
    for (int away = width / 2; away > 0; away /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, away);
    found.largest = largest;
    found.sum = sum;
    return found;
}

__device__ __forceinline__ float score(const Router& router, float logit, const Softmax& softmax) {
    const float value = router.relative_score(logit, softmax.largest);
    return router.sigmoid ? value : value / softmax.sum;
}

// What the router ranks an expert by, but for its groups; + 0 so that -0 is 0.
__device__ __forceinline__ float rank_key(const Router& router, float logit, int expert, const Softmax& softmax) {
    if (!router.by_scores) return logit + 0.0f;
    const float value = score(router, logit, softmax);
    return (router.bias == nullptr ? value : value + router.bias[expert]) + 0.0f;
}

// A warp's keys for one row, lane l's i-th that of expert 32 i + l. Experts that cannot be chosen have minus infinity.
struct Keys {
    float of[EXPERTS_PER_LANE];

    __device__ __forceinline__ void load(const Router& router, int row, int lane) {
        Softmax softmax;
        if (router.by_scores && !router.sigmoid) softmax = softmax_of(router, row, true, lane, WARP);
#pragma unroll
        for (int i = 0; i < EXPERTS_PER_LANE; ++i) {
            const int expert = i * WARP + lane;
            of[i] = expert < router.num_experts ? router.logit(row, expert) : -INFINITY_32;
        }
        // Once all loads are on their way. Past the last expert keys do not matter: they are in no mask and no group.
#pragma unroll
        for (int i = 0; i < EXPERTS_PER_LANE; ++i) {
            const float key = rank_key(router, of[i], min(i * WARP + lane, router.num_experts - 1), softmax);
            of[i] = fabsf(key) < INFINITY_32 ? key : -INFINITY_32;
        }
        if (router.groups_kept < router.num_groups) keep_groups(router, lane);
    }

    // Leave only the experts of the row's best groups; of equal ones the lowest.
    __device__ __forceinline__ void keep_groups(const Router& router, int lane) {
        const int size = router.num_experts / router.num_groups;
        float mine = -INFINITY_32;  // the score of group `lane`
#pragma unroll 1
        for (int group = 0; group < router.num_groups; ++group) {
            float best = -INFINITY_32, second = -INFINITY_32;
#pragma unroll
            for (int i = 0; i < EXPERTS_PER_LANE; ++i) {
                const int place = i * WARP + lane - group * size;
                if (place < 0 || place >= size) continue;
                second = fmaxf(second, fminf(best, of[i]));
                best = fmaxf(best, of[i]);
            }
            const unsigned top = __reduce_max_sync(ALL_LANES, ordered(best));
            float value = from_ordered(top);
            if (router.best_two) {
                const int owner = __ffs(__ballot_sync(ALL_LANES, ordered(best) == top)) - 1;
                value += from_ordered(__reduce_max_sync(ALL_LANES, ordered(lane == owner ? second : best)));
            }
            if (lane == group) mine = value;
        }
        int rank = 0;
#pragma unroll 1
        for (int other = 0; other < router.num_groups; ++other) {
            const float theirs = __shfl_sync(ALL_LANES, mine, other);
            rank += theirs > mine || (theirs == mine && other < lane);
        }
        const unsigned kept = __ballot_sync(ALL_LANES, lane < router.num_groups && rank < router.groups_kept);
#pragma unroll
        for (int i = 0; i < EXPERTS_PER_LANE; ++i) {
            const int expert = i * WARP + lane;
            if (expert >= router.num_experts || !(kept >> expert / size & 1u)) of[i] = -INFINITY_32;
        }
    }

    // Leave only experts that are in `allowed` and not in `taken`.
    __device__ __forceinline__ void keep(const unsigned* allowed, const unsigned* taken, int lane) {
#pragma unroll
        for (int i = 0; i < EXPERTS_PER_LANE; ++i) {
            if (!((allowed[i] & ~taken[i]) >> lane & 1u)) of[i] = -INFINITY_32;
        }
    }

    // Take the expert with the largest key, of equal ones the lowest; -1 if none is left.
    __device__ __forceinline__ int take(int lane) {
        float best = -INFINITY_32;
        int place = 0;
#pragma unroll
        for (int i = 0; i < EXPERTS_PER_LANE; ++i) {
            if (of[i] > best) best = of[i], place = i;
        }
        const unsigned top = __reduce_max_sync(ALL_LANES, ordered(best));
        if (top == ordered(-INFINITY_32)) return -1;
        const unsigned mine = ordered(best) == top ? place * WARP + lane : MAX_EXPERTS;
        const int expert = static_cast<int>(__reduce_min_sync(ALL_LANES, mine));
#pragma unroll
        for (int i = 0; i < EXPERTS_PER_LANE; ++i) {
            if (i * WARP + lane == expert) of[i] = -INFINITY_32;
        }
        return expert;
    }
};

}  // namespace
