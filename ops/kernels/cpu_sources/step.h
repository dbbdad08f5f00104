// What one step of one layer is made of, and what is said in both languages: ops/kernels/cpu_plan.py mirrors `Plan` and `Call`.
//
// The rules are those of ops/reference.py and ops/reference_step.py. T rows (tokens), K slots a row, E experts.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <vector>

namespace sere {

constexpr int PADDING = 0, PREFILL = 1, DECODE = 2;
constexpr double UNITS = 4294967296.0;  // sums over rows are taken in whole numbers of 1 / UNITS
constexpr int LYNX_BINS = 4;
constexpr int MAX_SLOTS = 64;  // a row's slots are the bits of one word
constexpr int MAX_STEPS = 8;
constexpr int LANES = 16;  // rows over experts are filled up to a multiple of it
constexpr float INFINITE = std::numeric_limits<float>::infinity();

enum Votes : int64_t { ALL, TOP, MASS, SHARE, BENEFIT, BUDGET };
enum Score : int64_t { PROBABILITY, WEIGHT, NORM, LYNX };
enum Targets : int64_t { SIMILAR, OWN, DROP, DROP_UNVOTED };
enum Weights : int64_t { KEEP, RENORMALIZE, HALF, FOLD };
enum Outcome : int64_t { UNCHANGED, CHANGED, BAD_ID };

// A policy's rules and a layer's tables. Every field has 8 bytes.
struct Plan {
    int64_t num_experts;
    int64_t votes, protect, by_selection;
    double mass, share;
    int64_t benefit;  // in units
    int64_t budget, score, first;
    double winner;
    int64_t num_steps, least_rows[MAX_STEPS];
    double top_k[MAX_STEPS];
    int64_t targets, weights, num_neighbours;
    int64_t sigmoid, num_groups, groups_kept, group_top2;
    const int16_t* neighbours;  // [E, num_neighbours], most similar first, filled up with the row's own expert
    const float* folds;         // [E, E]
    const float* norms;         // [E]
    const float* bias;          // [E]
    const uint8_t* protects;    // [E]
};

// The arguments of one call. Every field has 8 bytes.
struct Call {
    const Plan* plan;
    int64_t num_tokens, top_k, wide_ids, bfloat16, logits_stride, difference_stride;
    const float* weights;   // [T, K]
    const void* ids;        // int32, or int64 if wide_ids, [T, K]
    const void* logits;     // float, or bfloat16, [T, E], rows logits_stride apart; read only where a rule needs scores
    const int8_t* roles;    // [T]
    const int64_t* step;    // [3], or null
    int64_t* counters;      // [14], or null
    float* difference;      // [T, E], rows difference_stride apart, or null
    float* new_weights;     // [T, K], or null where weights never change
    void* new_ids;          // [T, K], or null: nothing is re-routed, only counted
};

// What a step needs for a moment: one per thread, grows to the largest step and stays.
struct Scratch {
    std::vector<uint64_t> used, voted;        // [T]: slots as bits
    std::vector<uint8_t> active, mark;        // [E]
    std::vector<int32_t> active_list;         // ascending
    std::vector<int32_t> replacement;         // [E]: -1 where it was not looked up yet
    std::vector<int32_t> next;                // [T]: the slot that votes if its row votes once more, or -1
    std::vector<int64_t> points;              // [E]
    std::vector<uint8_t> before;              // [E]
    std::vector<double> sums;                 // [E filled up]
    std::vector<float> gate;                  // [E filled up]: 0 for active experts, else minus infinity
    std::vector<float> logits, scores, keys;  // [E filled up], of one row
    std::vector<float> outside;               // [E filled up], of one row
    std::vector<double> shares;               // [T]
    std::vector<int32_t> rows;                // [T]
};

// A step, with spans so that a build with assertions finds every access outside of its tensor.
template <class Id>
struct Step {
    const Call& call;
    const Plan& plan;
    Scratch& scratch;
    int64_t num_tokens, top_k, num_experts;
    std::span<const float> weights;
    std::span<const Id> ids;
    std::span<const int8_t> roles;
    int64_t num_decode = 0, num_real = 0;

    Step(const Call& c, Scratch& s)
        : call(c), plan(*c.plan), scratch(s), num_tokens(c.num_tokens), top_k(c.top_k), num_experts(c.plan->num_experts),
          weights(c.weights, num_tokens * top_k), ids(static_cast<const Id*>(c.ids), num_tokens * top_k),
          roles(c.roles, num_tokens) {}

    float weight(int64_t row, int slot) const { return weights[row * top_k + slot]; }
    int64_t expert(int64_t row, int slot) const { return ids[row * top_k + slot]; }

    double total(int64_t row) const {
        double sum = 0;
        for (uint64_t slots = scratch.used[row]; slots; slots &= slots - 1) sum += weight(row, std::countr_zero(slots));
        return sum;
    }
};

inline int64_t filled_up(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

// The first `most` of some slots by descending key, the lowest slot first among equals; returns how many.
template <class Key>
int rank(uint64_t slots, int most, Key key_of, int* order) {
    float keys[MAX_SLOTS];
    int size = 0;
    for (; slots; slots &= slots - 1) {
        const int slot = std::countr_zero(slots);
        const float key = key_of(slot);
        if (size == most && !(key > keys[size - 1])) continue;
        int place = size < most ? size++ : size - 1;
        for (; place > 0 && key > keys[place - 1]; --place) keys[place] = keys[place - 1], order[place] = order[place - 1];
        keys[place] = key, order[place] = slot;
    }
    return size;
}

}  // namespace sere
