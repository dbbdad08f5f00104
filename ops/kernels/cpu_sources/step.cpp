// A whole step of one layer on the CPU: votes, targets, weights, the difference, counters. Called from ops/kernels/cpu.py.

#include "targets.h"
#include "votes.h"

namespace sere {

// The places of ops/kernels/counting.py.
enum Counter {
    STEPS, REROUTING_STEPS, DECODE_ROWS, DECODE_SLOTS, REROUTED_SLOTS, CRITICAL_SLOTS, BEFORE, AFTER, MIXED_STEPS, MIXED_BEFORE,
    MIXED_AFTER, PURE_STEPS, PURE_BEFORE, PURE_AFTER
};

// Reads which slots are used; false if an id is not below the number of experts. Padding rows may hold anything.
template <class Id>
bool read_slots(Step<Id>& step) {
    uint64_t* all = step.scratch.used.data();
    int64_t highest = -1;
    for (int64_t row = 0; row < step.num_tokens; ++row) {
        all[row] = 0;
        const int8_t role = step.roles[row];
        if (role == PADDING) continue;
        step.num_real += 1;
        step.num_decode += role == DECODE;
        uint64_t used = 0;
        for (int slot = 0; slot < step.top_k; ++slot) {
            const int64_t expert = step.expert(row, slot);
            used |= static_cast<uint64_t>(expert >= 0) << slot;
            highest = expert > highest ? expert : highest;
        }
        all[row] = used;
    }
    return highest < step.num_experts;
}

// Distinct experts among the used slots of rows that are not padding.
template <class Id>
int64_t count_experts(const Step<Id>& step, std::span<const Id> ids) {
    std::vector<uint8_t>& seen = step.scratch.before;
    std::fill(seen.begin(), seen.end(), 0);
    for (int64_t row = 0; row < step.num_tokens; ++row)
        for (uint64_t rest = step.scratch.used[row]; rest; rest &= rest - 1)
            if (const int64_t expert = ids[row * step.top_k + std::countr_zero(rest)]; expert >= 0) seen[expert] = 1;
    int64_t number = 0;
    for (int64_t e = 0; e < step.num_experts; ++e) number += seen[e];
    return number;
}

template <class Id>
void count(const Step<Id>& step, int64_t num_changed, int64_t num_critical, bool changed) {
    const int64_t num_decode = step.call.step[0];
    int64_t* counters = step.call.counters;
    const int64_t mixed = step.num_real > num_decode, pure = step.num_decode > 0 && !mixed;
    const int64_t before = count_experts<Id>(step, step.ids);
    const int64_t after = changed ? count_experts<Id>(step, {static_cast<Id*>(step.call.new_ids), step.ids.size()}) : before;
    counters[STEPS] += 1;
    counters[REROUTING_STEPS] += step.num_decode > 0;
    counters[DECODE_ROWS] += num_decode;
    counters[DECODE_SLOTS] += num_decode * step.top_k;
    counters[REROUTED_SLOTS] += num_changed;
    counters[CRITICAL_SLOTS] += num_critical;
    counters[BEFORE] += before;
    counters[AFTER] += after;
    counters[MIXED_STEPS] += mixed;
    counters[MIXED_BEFORE] += mixed * before;
    counters[MIXED_AFTER] += mixed * after;
    counters[PURE_STEPS] += pure;
    counters[PURE_BEFORE] += pure * before;
    counters[PURE_AFTER] += pure * after;
}

// The new slots' weights from their base weights.
template <class Id>
void weigh(const Step<Id>& step, Row<Id>& row, uint64_t moved) {
    const uint64_t used = step.scratch.used[row.index];
    if (step.plan.weights == FOLD) {
        for (uint64_t rest = moved; rest; rest &= rest - 1) {
            const int slot = std::countr_zero(rest);
            const float fold = step.plan.folds[step.expert(row.index, slot) * step.num_experts + row.ids[slot]];
            row.base[slot] = static_cast<double>(fold) * step.weight(row.index, slot);
        }
    } else if (step.plan.weights == RENORMALIZE || step.plan.weights == HALF) {
        double sum = 0;
        for (uint64_t rest = used; rest; rest &= rest - 1) sum += row.base[std::countr_zero(rest)];
        const double ratio = sum > 0 ? step.total(row.index) / sum : 0.0;
        const double scale = step.plan.weights == HALF ? std::sqrt(ratio) : ratio;
        for (uint64_t rest = used; rest; rest &= rest - 1) row.base[std::countr_zero(rest)] *= scale;
    }
}

// What each expert's weight has lost.
template <class Id>
void write_difference(const Step<Id>& step, std::span<const Id> ids, std::span<const float> weights) {
    for (int64_t row = 0; row < step.num_tokens; ++row) {
        const std::span<float> lost(step.call.difference + row * step.call.difference_stride, step.num_experts);
        std::memset(lost.data(), 0, lost.size_bytes());
        if (step.roles[row] != DECODE || ids.empty()) continue;
        for (uint64_t rest = step.scratch.used[row]; rest; rest &= rest - 1) {
            const int slot = std::countr_zero(rest);
            lost[step.expert(row, slot)] += step.weight(row, slot);
            lost[ids[row * step.top_k + slot]] -= weights[row * step.top_k + slot];
        }
    }
}

template <class Id>
int64_t run(const Call& call) {
    const bool counts = call.counters != nullptr && call.step != nullptr && call.step[0] > 0;
    if (!counts && call.new_ids == nullptr && call.difference == nullptr) return UNCHANGED;
    static thread_local Scratch scratch;
    Step<Id> step(call, scratch);
    const int64_t num_experts = step.num_experts, filled = filled_up(num_experts);
    scratch.used.resize(step.num_tokens);
    scratch.before.resize(num_experts);
    if (!read_slots(step)) return BAD_ID;
    int64_t num_changed = 0, num_critical = 0;
    bool changed = false;
    std::span<Id> new_ids;
    std::span<float> new_weights;
    if (call.new_ids != nullptr && step.num_decode > 0) {
        scratch.voted.resize(step.num_tokens);
        scratch.shares.resize(step.num_tokens);
        scratch.active.resize(num_experts);
        scratch.mark.assign(filled, 0);
        scratch.points.resize(num_experts);
        scratch.next.resize(step.num_tokens);
        scratch.sums.resize(filled);
        scratch.logits.assign(filled, -INFINITE);
        scratch.scores.resize(filled);
        scratch.keys.resize(filled);
        cast_votes(step);
        if (step.plan.targets == SIMILAR) scratch.replacement.assign(num_experts, -1);
        if (step.plan.targets == OWN) {
            scratch.outside.resize(filled);
            scratch.gate.assign(filled, -INFINITE);
            for (const int32_t expert : scratch.active_list) scratch.gate[expert] = 0;
        }
        new_ids = {static_cast<Id*>(call.new_ids), step.ids.size()};
        std::memcpy(new_ids.data(), step.ids.data(), step.ids.size_bytes());
        if (call.new_weights != nullptr) {
            new_weights = {call.new_weights, step.weights.size()};
            std::memcpy(new_weights.data(), step.weights.data(), step.weights.size_bytes());
        }
        RowScores<Id> scores(step);
        Row<Id> row;
        for (row.index = 0; row.index < step.num_tokens; ++row.index) {
            const uint64_t used = scratch.used[row.index];
            if (step.roles[row.index] != DECODE || !used) continue;
            const int64_t start = row.index * step.top_k;
            row.ids = new_ids.subspan(start, step.top_k);
            for (int slot = 0; slot < step.top_k; ++slot) row.base[slot] = step.weight(row.index, slot);
            uint64_t moved;
            if (step.plan.targets == SIMILAR) moved = move_to_similar(step, row);
            else if (step.plan.targets == OWN) moved = move_to_own(step, scores, row);
            else moved = drop(step, row, step.plan.targets == DROP_UNVOTED);
            if (moved && !new_weights.empty()) {
                weigh(step, row, moved);
                for (uint64_t rest = used; rest; rest &= rest - 1) {
                    const int slot = std::countr_zero(rest);
                    new_weights[start + slot] = static_cast<float>(row.base[slot]);
                }
            }
            changed |= moved != 0;
            for (uint64_t rest = used; rest; rest &= rest - 1) {
                const int slot = std::countr_zero(rest);
                const int64_t expert = step.expert(row.index, slot);
                const bool same = row.ids[slot] == expert;
                num_changed += !same;
                num_critical += same && !scratch.active[expert];
            }
        }
    }
    if (call.difference != nullptr)
        write_difference<Id>(step, changed ? new_ids : std::span<Id>(), new_weights.empty() ? step.weights : new_weights);
    if (counts) count(step, num_changed, num_critical, changed);
    return changed ? CHANGED : UNCHANGED;
}

}  // namespace sere

extern "C" int64_t sere_step(const sere::Call* call) {
    return call->wide_ids ? sere::run<int64_t>(*call) : sere::run<int32_t>(*call);
}

// So that a library whose structures differ from what Python fills is found before it is used.
extern "C" int64_t sere_sizes() { return sizeof(sere::Plan) * 4096 + sizeof(sere::Call); }
