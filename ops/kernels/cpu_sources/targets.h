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

// The best `most` active experts by key that are not marked, best first, the lowest id first among equals; returns how many.
template <class Id>
int best_active(const Step<Id>& step, const RowScores<Id>& scores, int most, int32_t* experts) {
    const Scratch& scratch = step.scratch;
    float found[MAX_SLOTS];
    int size = 0;
    float worst = -INFINITE;
    const float *keys = scores.keys.data(), *gate = scratch.gate.data();
    for (size_t block = 0; block < scores.keys.size(); block += LANES) {
        // Most blocks have nothing that is good enough.
        int any = 0;
        for (int j = 0; j < LANES; ++j) any |= keys[block + j] + gate[block + j] > worst;
        if (!any) continue;
        for (size_t e = block; e < block + LANES; ++e) {
            const float key = keys[e] + gate[e];
            if (!(key > worst) || scratch.mark[e]) continue;
            int place = size < most ? size++ : most - 1;
            for (; place > 0 && key > found[place - 1]; --place)
                found[place] = found[place - 1], experts[place] = experts[place - 1];
            found[place] = key, experts[place] = static_cast<int32_t>(e);
            if (size == most) worst = found[most - 1];
        }
    }
    return size;
}

// The row's voted experts, then the best others of the active ones, as many as the row has slots (arXiv 2511.02237).
template <class Id>
uint64_t move_to_own(const Step<Id>& step, RowScores<Id>& scores, Row<Id>& row) {
    constexpr uint8_t CHOSEN = 1, SELECTED = 2;
    Scratch& scratch = step.scratch;
    const uint64_t used = scratch.used[row.index], voted = scratch.voted[row.index];
    const int most = std::popcount(used) - std::popcount(voted);
    if (most <= 0) return 0;
    scores.load(row.index);
    for (uint64_t rest = voted; rest; rest &= rest - 1)
        scratch.mark[step.expert(row.index, std::countr_zero(rest))] = CHOSEN;
    int32_t chosen[MAX_SLOTS];
    const int size = best_active(step, scores, most, chosen);
    for (int i = 0; i < size; ++i) scratch.mark[chosen[i]] |= CHOSEN;
    uint64_t moved = 0;
    for (uint64_t rest = used; rest; rest &= rest - 1) {
        const int slot = std::countr_zero(rest);
        uint8_t& mark = scratch.mark[step.expert(row.index, slot)];
        if (!(mark & CHOSEN)) moved |= uint64_t{1} << slot;
        mark |= SELECTED;
    }
    if (moved) {
        double selected = 0;
        for (uint64_t rest = used; rest; rest &= rest - 1)
            selected += scores.proportion(step.expert(row.index, std::countr_zero(rest)));
        const double scale = selected > 0 ? step.total(row.index) / selected : 0.0;
        int next = 0;
        int64_t empty = -1;
        for (uint64_t rest = moved; rest; rest &= rest - 1) {
            const int slot = std::countr_zero(rest);
            while (next < size && scratch.mark[chosen[next]] & SELECTED) ++next;
            if (next < size) {
                row.base[slot] = scores.proportion(chosen[next]) * scale;
                row.ids[slot] = static_cast<Id>(chosen[next++]);
            } else {
                if (empty < 0) empty = first_active(step, row.index);
                row.base[slot] = 0;
                row.ids[slot] = static_cast<Id>(empty);
            }
        }
    }
    for (int i = 0; i < size; ++i) scratch.mark[chosen[i]] = 0;
    for (uint64_t rest = used; rest; rest &= rest - 1) scratch.mark[step.expert(row.index, std::countr_zero(rest))] = 0;
    return moved;
}

}  // namespace sere
