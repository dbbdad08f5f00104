// A router's scores of one row, from its logits: ops/policies/scoring.py. Only rows that need them are read.
#pragma once

#include "step.h"

namespace sere {

// e^x for x <= 0 in float, to 2 ulp; below e^-87 it stays there. Cephes' polynomial, in a form that compilers vectorise.
inline float exp_of(float x) {
    x = x < -87.0f ? -87.0f : x;
    constexpr float MAGIC = 12582912.0f;  // adding it rounds to a whole number
    const float n = (x * 1.44269504f + MAGIC) - MAGIC;
    float r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return y * std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
}

// One row's logits, the keys that its router ranks by, and weights in proportion to its scores.
template <class Id>
struct RowScores {
    const Step<Id>& step;
    std::span<float> logits, scores, keys;
    float largest = 0;
    // A bias or groups: what a router ranks by does not order like its logits.
    bool needs_all;

    explicit RowScores(const Step<Id>& s)
        : step(s), logits(s.scratch.logits), scores(s.scratch.scores), keys(s.scratch.keys),
          needs_all(s.plan.bias != nullptr || s.plan.groups_kept < s.plan.num_groups) {}

    void read(int64_t row) {
        const int64_t size = step.num_experts, stride = step.call.logits_stride;
        if (step.call.bfloat16) {
            const uint16_t* from = static_cast<const uint16_t*>(step.call.logits) + row * stride;
            float* to = logits.data();
            for (int64_t e = 0; e < size; ++e) to[e] = std::bit_cast<float>(static_cast<uint32_t>(from[e]) << 16);
        } else {
            std::memcpy(logits.data(), static_cast<const float*>(step.call.logits) + row * stride, size * sizeof(float));
        }
        float lanes[LANES];
        for (int j = 0; j < LANES; ++j) lanes[j] = -INFINITE;
        const float* from = logits.data();
        for (size_t e = 0; e < logits.size(); e += LANES)
            for (int j = 0; j < LANES; ++j) lanes[j] = from[e + j] > lanes[j] ? from[e + j] : lanes[j];
        largest = lanes[0];
        for (int j = 1; j < LANES; ++j) largest = lanes[j] > largest ? lanes[j] : largest;
    }

    // The scores of all experts, as the router has them: softmax or sigmoid, without bias.
    void compute_scores() {
        const float* from = logits.data();
        float* to = scores.data();
        const size_t size = logits.size();
        if (step.plan.sigmoid) {
            for (size_t e = 0; e < size; ++e) {
                const float x = from[e], z = exp_of(x > 0 ? -x : x);
                to[e] = (x > 0 ? 1.0f : z) / (1.0f + z);
            }
            return;
        }
        const float top = largest;
        for (size_t e = 0; e < size; ++e) to[e] = exp_of(from[e] - top);
        double sum = 0;
        for (int64_t e = 0; e < step.num_experts; ++e) sum += to[e];
        const double scale = 1 / sum;
        for (size_t e = 0; e < size; ++e) to[e] = static_cast<float>(to[e] * scale);
    }

    // Reads a row and makes its keys: minus infinity where the router cannot choose.
    void load(int64_t row) {
        read(row);
        if (!needs_all) {
            const float* from = logits.data();
            float* to = keys.data();
            // A logit of minus infinity has a score of 0, which is finite.
            constexpr float LOWEST = std::numeric_limits<float>::lowest();
            for (size_t e = 0; e < logits.size(); ++e) to[e] = from[e] < LOWEST ? LOWEST : from[e];
        } else {
            compute_scores();
            for (int64_t e = 0; e < step.num_experts; ++e) keys[e] = scores[e];
            if (step.plan.bias != nullptr)
                for (int64_t e = 0; e < step.num_experts; ++e) keys[e] += step.plan.bias[e];
            if (step.plan.groups_kept < step.plan.num_groups) mask_groups();
        }
        for (size_t e = step.num_experts; e < keys.size(); ++e) keys[e] = -INFINITE;
    }

    void mask_groups() {
        const int64_t num_groups = step.plan.num_groups, size = step.num_experts / num_groups;
        std::span<double> best = step.scratch.sums;
        for (int64_t group = 0; group < num_groups; ++group) {
            float first = -INFINITE, second = -INFINITE;
            for (int64_t e = group * size; e < (group + 1) * size; ++e) {
                const float key = keys[e];
                if (key > first) second = first, first = key;
                else if (key > second) second = key;
            }
            best[group] = step.plan.group_top2 ? first + second : first;
        }
        for (int64_t group = 0; group < num_groups; ++group) {
            int64_t better = 0;
            for (int64_t other = 0; other < num_groups; ++other)
                better += best[other] > best[group] || (best[other] == best[group] && other < group);
            if (better >= step.plan.groups_kept)
                for (int64_t e = group * size; e < (group + 1) * size; ++e) keys[e] = -INFINITE;
        }
    }

    // In proportion to the score, in double: softmax's normaliser cancels out.
    double proportion(int64_t expert) const {
        const float logit = logits[expert];
        if (step.plan.sigmoid) return 1 / (1 + std::exp(-static_cast<double>(logit)));
        return logit == largest ? 1.0 : std::exp(static_cast<double>(logit - largest));
    }
};

}  // namespace sere
