// Where the slots of a decode row go whose expert is not active. Each rule changes a row's new ids and base weights and returns
// the slots that moved, as bits.
#pragma once

#include "scores.h"

namespace sere {

// A decode row on its way: its new ids, and its weights before the weight rule.
template <class Id>
struct Row {
    int64_t index;
    std::span<Id> ids;
    double base[MAX_SLOTS];
};

// An expert for a slot that is not used any more: one that is active anyway, the row's first that stays.
template <class Id>
int64_t first_active(const Step<Id>& step, int64_t row) {
    const Scratch& scratch = step.scratch;
    int best = -1;
    for (uint64_t rest = scratch.used[row]; rest; rest &= rest - 1) {
        const int slot = std::countr_zero(rest);
        if (scratch.active[step.expert(row, slot)] && (best < 0 || step.weight(row, slot) > step.weight(row, best)))
            best = slot;
    }
    if (best >= 0) return step.expert(row, best);
    return scratch.active_list.empty() ? 0 : scratch.active_list[0];
}

// SERE's steps 2 and 3. An expert's replacement is looked up once a step.
template <class Id>
uint64_t move_to_similar(const Step<Id>& step, Row<Id>& row) {
    Scratch& scratch = step.scratch;
    uint64_t moved = 0;
    for (uint64_t rest = scratch.used[row.index]; rest; rest &= rest - 1) {
        const int slot = std::countr_zero(rest);
        const int64_t expert = step.expert(row.index, slot);
        if (scratch.active[expert]) continue;
        int32_t& found = scratch.replacement[expert];
        if (found < 0) {
            const int64_t width = step.plan.num_neighbours;
            const std::span<const int16_t> neighbours(step.plan.neighbours + expert * width, width);
            found = static_cast<int32_t>(expert);
            for (const int16_t neighbour : neighbours) {
                if (neighbour == expert) break;
                if (scratch.active[neighbour]) {
                    found = neighbour;
                    break;
                }
            }
        }
        if (found == expert) continue;
        row.ids[slot] = static_cast<Id>(found);
        moved |= uint64_t{1} << slot;
    }
    return moved;
}

// Slots whose expert is not active, or, with `unvoted`, all that their own row did not vote for.
template <class Id>
uint64_t drop(const Step<Id>& step, Row<Id>& row, bool unvoted) {
    const uint64_t used = step.scratch.used[row.index];
    uint64_t moved = 0;
    if (unvoted) {
        moved = used & ~step.scratch.voted[row.index];
    } else {
        for (uint64_t rest = used; rest; rest &= rest - 1) {
            const int slot = std::countr_zero(rest);
            if (!step.scratch.active[step.expert(row.index, slot)]) moved |= uint64_t{1} << slot;
        }
    }
    if (!moved) return 0;
    const Id empty = static_cast<Id>(first_active(step, row.index));
    for (uint64_t rest = moved; rest; rest &= rest - 1) {
        row.ids[std::countr_zero(rest)] = empty;
        row.base[std::countr_zero(rest)] = 0;
    }
    return moved;
}

// An expert, and what a row's router ranks it by; minus infinity: there is none.
struct Candidate {
    float key;
    int32_t expert;
};

// The largest key and the first expert that has it. Without branches on the data, which no processor could predict.
inline Candidate best_of(std::span<const float> keys) {
    using Keys = float __attribute__((vector_size(LANES * sizeof(float))));
    using Experts = int32_t __attribute__((vector_size(LANES * sizeof(int32_t))));
    Keys most = Keys{} - INFINITE;
    Experts experts, firsts = Experts{} + std::numeric_limits<int32_t>::max();
    for (int j = 0; j < LANES; ++j) experts[j] = j;
    for (size_t block = 0; block < keys.size(); block += LANES, experts += LANES) {
        Keys some;
        std::memcpy(&some, keys.data() + block, sizeof(some));
        firsts = some > most ? experts : firsts;
        most = some > most ? some : most;
    }
    float largest[LANES];
    std::memcpy(largest, &most, sizeof(largest));
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int j = 0; j < width; ++j) largest[j] = largest[j] > largest[j + width] ? largest[j] : largest[j + width];
    firsts = most == largest[0] ? firsts : std::numeric_limits<int32_t>::max();
    int32_t lowest[LANES];
    std::memcpy(lowest, &firsts, sizeof(lowest));
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int j = 0; j < width; ++j) lowest[j] = lowest[j] < lowest[j + width] ? lowest[j] : lowest[j + width];
    return {largest[0], lowest[0]};
}

// The slots of some whose experts are active and can be chosen.
template <class Id>
uint64_t reachable(const Step<Id>& step, const RowScores<Id>& scores, int64_t row, uint64_t slots) {
    uint64_t found = 0;
    for (uint64_t rest = slots; rest; rest &= rest - 1) {
        const int slot = std::countr_zero(rest);
        const int64_t expert = step.expert(row, slot);
        found |= static_cast<uint64_t>(scores.keys[expert] + step.scratch.gate[expert] > -INFINITE) << slot;
    }
    return found;
}

// The slot of some that ranks last by key, the highest expert id among equals.
template <class Id>
int last_of(const Step<Id>& step, const RowScores<Id>& scores, int64_t row, uint64_t slots) {
    int last = std::countr_zero(slots);
    for (uint64_t rest = slots & (slots - 1); rest; rest &= rest - 1) {
        const int slot = std::countr_zero(rest);
        const int64_t expert = step.expert(row, slot), other = step.expert(row, last);
        const float key = scores.keys[expert], lowest = scores.keys[other];
        if (key < lowest || (key == lowest && expert > other)) last = slot;
    }
    return last;
}

// The row's voted experts, then the best others of the active ones, as many as the row has slots (arXiv 2511.02237). Of its
// other own experts all that are active stay unless an outsider is better, which in a row as its router left it none is.
template <class Id>
uint64_t move_to_own(const Step<Id>& step, RowScores<Id>& scores, Row<Id>& row) {
    Scratch& scratch = step.scratch;
    const uint64_t used = scratch.used[row.index], voted = scratch.voted[row.index];
    if (used == voted) return 0;
    scores.load(row.index);
    uint64_t staying = reachable(step, scores, row.index, used & ~voted);
    const int num_free = std::popcount(used & ~voted) - std::popcount(staying);
    float* outside = scratch.outside.data();
    for (size_t e = 0; e < scores.keys.size(); ++e) outside[e] = scores.keys[e] + scratch.gate[e];
    for (uint64_t rest = used; rest; rest &= rest - 1)
        scratch.outside[step.expert(row.index, std::countr_zero(rest))] = -INFINITE;
    int32_t arriving[MAX_SLOTS];
    int size = 0;
    Candidate best = best_of(scratch.outside);
    const auto take = [&] {
        arriving[size++] = best.expert;
        scratch.outside[best.expert] = -INFINITE;
        best = best_of(scratch.outside);
    };
    while (size < num_free && best.key > -INFINITE) take();
    while (staying && best.key > -INFINITE) {
        const int slot = last_of(step, scores, row.index, staying);
        const int64_t expert = step.expert(row.index, slot);
        const float key = scores.keys[expert];
        if (best.key < key || (best.key == key && best.expert > expert)) break;
        take();
        staying &= ~(uint64_t{1} << slot);
    }
    const uint64_t moved = used & ~voted & ~staying;
    if (!moved) return 0;
    double selected = 0;
    for (uint64_t rest = used; rest; rest &= rest - 1)
        selected += scores.proportion(step.expert(row.index, std::countr_zero(rest)));
    const double scale = selected > 0 ? step.total(row.index) / selected : 0.0;
    int next = 0;
    for (uint64_t rest = moved; rest; rest &= rest - 1) {
        const int slot = std::countr_zero(rest);
        const int64_t expert = next < size ? arriving[next] : first_active(step, row.index);
        row.base[slot] = next++ < size ? scores.proportion(expert) * scale : 0.0;
        row.ids[slot] = static_cast<Id>(expert);
    }
    return moved;
}

}  // namespace sere
