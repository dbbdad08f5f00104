// Who is active: each vote rule fills `voted`, slots as bits by row.
#pragma once

#include <algorithm>

#include "scores.h"

namespace sere {

// S by the number of decode rows.
inline double slots_that_vote(const Plan& plan, int64_t num_rows) {
    int64_t place = 0;
    for (int64_t i = 1; i < plan.num_steps; ++i)
        if (num_rows >= plan.least_rows[i]) place = i;
    return plan.top_k[place];
}

// Each row's best S slots; of a fraction, the rows whose next slot has the largest share vote once more.
template <class Id>
void vote_top(Step<Id>& step) {
    Scratch& scratch = step.scratch;
    const double top_k = slots_that_vote(step.plan, step.num_decode);
    const int whole = static_cast<int>(std::floor(top_k));
    const int64_t num_more = std::llrint((top_k - whole) * static_cast<double>(step.num_decode));
    const bool fraction = num_more > 0;
    RowScores<Id> scores(step);
    scratch.rows.clear();
    int order[MAX_SLOTS];
    for (int64_t row = 0; row < step.num_tokens; ++row) {
        if (step.roles[row] != DECODE) continue;
        const int most = std::min(whole + fraction, MAX_SLOTS);
        int size;
        if (step.plan.by_selection) {
            scores.load(row);
            size = rank(scratch.used[row], most, [&](int slot) { return scores.keys[step.expert(row, slot)]; }, order);
        } else {
            const std::span<const float> weights = step.weights.subspan(row * step.top_k, step.top_k);
            size = rank(scratch.used[row], most, [&](int slot) { return weights[slot]; }, order);
        }
        uint64_t slots = 0;
        for (int place = 0; place < std::min(size, whole); ++place) slots |= uint64_t{1} << order[place];
        scratch.voted[row] = slots;
        if (fraction) {
            const double total = step.total(row);
            const bool has_next = size > whole && total > 0;
            scratch.shares[row] = has_next ? step.weight(row, order[whole]) / total : -1.0;
            scratch.rows.push_back(static_cast<int32_t>(row));
            // The next slot, until it is known which rows' vote.
            scratch.next[row] = size > whole ? order[whole] : -1;
        }
    }
    if (!fraction) return;
    const auto more = scratch.rows.begin() + std::min<int64_t>(num_more, static_cast<int64_t>(scratch.rows.size()));
    std::nth_element(scratch.rows.begin(), more, scratch.rows.end(), [&](int32_t a, int32_t b) {
        return scratch.shares[a] != scratch.shares[b] ? scratch.shares[a] > scratch.shares[b] : a < b;
    });
    for (auto row = scratch.rows.begin(); row != more; ++row)
        if (scratch.next[*row] >= 0) scratch.voted[*row] |= uint64_t{1} << scratch.next[*row];
}

// The shortest prefix of the ranking that holds a share of the row's weights.
template <class Id>
uint64_t vote_mass(const Step<Id>& step, int64_t row) {
    int order[MAX_SLOTS];
    const int size = rank(step.scratch.used[row], MAX_SLOTS, [&](int slot) { return step.weight(row, slot); }, order);
    const double enough = step.plan.mass * step.total(row);
    uint64_t slots = 0;
    double sum = 0;
    for (int place = 0; place < size; ++place) {
        slots |= uint64_t{1} << order[place];
        sum += step.weight(row, order[place]);
        if (sum >= enough) break;
    }
    return slots;
}

// Slots with a share of the row's largest weight.
template <class Id>
uint64_t vote_share(const Step<Id>& step, int64_t row) {
    const uint64_t used = step.scratch.used[row];
    float largest = -INFINITE;
    for (uint64_t rest = used; rest; rest &= rest - 1) largest = std::max(largest, step.weight(row, std::countr_zero(rest)));
    uint64_t slots = 0;
    for (uint64_t rest = used; rest; rest &= rest - 1) {
        const int slot = std::countr_zero(rest);
        if (step.weight(row, slot) >= step.plan.share * largest) slots |= uint64_t{1} << slot;
    }
    return slots;
}

// Each expert's summed scores over decode rows.
template <class Id>
void sum_scores(Step<Id>& step) {
    std::vector<double>& sums = step.scratch.sums;
    std::fill(sums.begin(), sums.end(), 0.0);
    RowScores<Id> scores(step);
    constexpr double MAGIC = 6755399441055744.0;  // adding it rounds to a whole number
    for (int64_t row = 0; row < step.num_tokens; ++row) {
        if (step.roles[row] != DECODE) continue;
        scores.read(row);
        scores.compute_scores();
        const float* from = scores.scores.data();
        double* to = sums.data();
        for (size_t e = 0; e < sums.size(); ++e) to[e] += (from[e] * UNITS + MAGIC) - MAGIC;
    }
    for (int64_t e = 0; e < step.num_experts; ++e)
        if (step.scratch.points[e] >= 0) step.scratch.points[e] = static_cast<int64_t>(sums[e]);
}

// One slot's value for rules `benefit` and `budget`, in units.
template <class Id>
int64_t value_of(const Step<Id>& step, double weight, double first, double total, int64_t expert) {
    const Plan& plan = step.plan;
    if (plan.votes == BENEFIT) {
        const double value = (total > 0 ? weight / total : 0.0) * plan.norms[expert];
        return std::llrint(value * value * value * UNITS);
    }
    switch (plan.score) {
        case PROBABILITY:
            return 0;
        case WEIGHT:
            return std::llrint(weight * UNITS);
        case NORM:
            return std::llrint(weight * plan.norms[expert] * UNITS);
    }
    // LYNX: the first bin holds the row's largest weights, each further one weights half as large.
    int exponent = 1 - LYNX_BINS;
    if (weight > 0) std::frexp(weight / first, &exponent);
    int64_t value = 1;
    for (int bin = LYNX_BINS - 2 + exponent; bin > 0; --bin) value *= step.num_decode;
    return value;
}

// The experts that decode rows elect together: `mark` is 1 for them.
template <class Id>
void elect(Step<Id>& step) {
    Scratch& scratch = step.scratch;
    const Plan& plan = step.plan;
    std::fill(scratch.points.begin(), scratch.points.end(), -1);
    std::fill(scratch.before.begin(), scratch.before.end(), 0);
    int64_t num_before = 0;
    for (int64_t row = 0; row < step.num_tokens; ++row) {
        const uint64_t used = scratch.used[row];
        if (step.roles[row] != DECODE || !used) continue;
        int best;
        rank(used, 1, [&](int slot) { return step.weight(row, slot); }, &best);
        const double first = step.weight(row, best), total = step.total(row);
        if (plan.first || plan.votes == BENEFIT || first > plan.winner * total) scratch.before[step.expert(row, best)] = 1;
        for (uint64_t rest = used; rest; rest &= rest - 1) {
            const int slot = std::countr_zero(rest);
            const int64_t expert = step.expert(row, slot);
            const int64_t points = scratch.points[expert] < 0 ? 0 : scratch.points[expert];
            scratch.points[expert] = points + value_of(step, step.weight(row, slot), first, total, expert);
        }
    }
    if (plan.votes == BENEFIT) {
        for (int64_t e = 0; e < step.num_experts; ++e)
            scratch.mark[e] = scratch.before[e] || (scratch.points[e] >= 0 && scratch.points[e] >= plan.benefit);
        return;
    }
    if (plan.score == PROBABILITY) sum_scores(step);
    std::vector<int32_t>& order = scratch.active_list;
    order.clear();
    for (int64_t e = 0; e < step.num_experts; ++e) {
        scratch.mark[e] = 0;
        num_before += scratch.before[e];
        if (scratch.points[e] >= 0) order.push_back(static_cast<int32_t>(e));
    }
    const int64_t size = std::min<int64_t>(std::max(plan.budget, num_before), static_cast<int64_t>(order.size()));
    std::nth_element(order.begin(), order.begin() + size, order.end(), [&](int32_t a, int32_t b) {
        if (scratch.before[a] != scratch.before[b]) return scratch.before[a] > scratch.before[b];
        return scratch.points[a] != scratch.points[b] ? scratch.points[a] > scratch.points[b] : a < b;
    });
    for (int64_t i = 0; i < size; ++i) scratch.mark[order[i]] = 1;
}

// Applies the vote rule, lets prefill rows vote with all they have, and lists who is active.
template <class Id>
void cast_votes(Step<Id>& step) {
    Scratch& scratch = step.scratch;
    const Plan& plan = step.plan;
    const bool elects = plan.votes == BENEFIT || plan.votes == BUDGET;
    if (plan.votes == TOP) vote_top(step);
    if (elects) elect(step);
    std::fill(scratch.active.begin(), scratch.active.end(), 0);
    for (int64_t row = 0; row < step.num_tokens; ++row) {
        const uint64_t used = scratch.used[row];
        uint64_t slots = step.roles[row] == PADDING ? 0 : used;
        if (step.roles[row] == DECODE && plan.votes != ALL) {
            if (plan.votes == TOP) slots = scratch.voted[row];
            else if (plan.votes == MASS) slots = vote_mass(step, row);
            else if (plan.votes == SHARE) slots = vote_share(step, row);
            for (uint64_t rest = elects || plan.protect ? used : 0; rest; rest &= rest - 1) {
                const int slot = std::countr_zero(rest);
                const int64_t expert = step.expert(row, slot);
                const uint64_t bit = uint64_t{1} << slot;
                if (elects && !scratch.mark[expert]) slots &= ~bit;
                if (plan.protect && plan.protects[expert]) slots |= bit;
            }
        }
        scratch.voted[row] = slots;
        for (uint64_t rest = slots; rest; rest &= rest - 1) scratch.active[step.expert(row, std::countr_zero(rest))] = 1;
    }
    if (elects) std::fill(scratch.mark.begin(), scratch.mark.end(), 0);
    scratch.active_list.clear();
    for (int64_t e = 0; e < step.num_experts; ++e)
        if (scratch.active[e]) scratch.active_list.push_back(static_cast<int32_t>(e));
}

}  // namespace sere
