// Logits of a few tokens -> the sorted list of pairs, for top-k policies. One thread: a decoding step has no more work.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace moeforge {

// As moeforge_kernels.cpu.library.Route lays it out. Null where a tensor is absent.
struct Route {
    int64_t T, E, k, sigmoid, select_first, renormalise;
    double factor;
    const float* logits;  // [T, E]
    const float* bias;    // [E] added for the choice, not for the weight
    const uint8_t* real;  // [T]
    int64_t *token, *expert;  // [T k]
    float* weight;            // [T k]
    int32_t* offsets;         // [E]
    int64_t* by_token;        // [T k]
};

struct Router {
    const Route& c;
    std::vector<float> score, preference, weight;
    std::vector<int64_t> choice;  // [T k], E where a slot is empty

    explicit Router(const Route& call) : c(call), score(c.E), preference(c.E), weight(c.T * c.k), choice(c.T * c.k) {}

    void scores(const float* x, const int64_t* of, int64_t n, float* to) const {
        if (c.sigmoid) {
            for (int64_t i = 0; i < n; ++i) to[i] = 1 / (1 + std::exp(-x[of ? of[i] : i]));
            return;
        }
        float most = -std::numeric_limits<float>::infinity(), sum = 0;
        for (int64_t i = 0; i < n; ++i) most = std::max(most, x[of ? of[i] : i]);
        for (int64_t i = 0; i < n; ++i) sum += to[i] = std::exp(x[of ? of[i] : i] - most);
        for (int64_t i = 0; i < n; ++i) to[i] /= sum;
    }

    void choose(int64_t t) {
        const float* x = c.logits + t * c.E;
        if (!c.select_first) scores(x, nullptr, c.E, score.data());
        for (int64_t e = 0; e < c.E; ++e) {
            float p = (c.select_first ? x[e] : score[e]) + (c.bias ? c.bias[e] : 0);
            preference[e] = std::isnan(p) ? std::numeric_limits<float>::infinity() : p;  // chosen, so that it is seen
        }
        int64_t* chosen = &choice[t * c.k];
        float* w = &weight[t * c.k];
        std::vector<char> taken(c.E, 0);
        for (int64_t slot = 0; slot < c.k; ++slot) {
            int64_t best = -1;
            for (int64_t e = 0; e < c.E; ++e)
                if (!taken[e] && (best < 0 || preference[e] > preference[best])) best = e;
            chosen[slot] = best;
            taken[best] = 1;
        }
        if (c.select_first) scores(x, chosen, c.k, w);
        else
            for (int64_t slot = 0; slot < c.k; ++slot) w[slot] = score[chosen[slot]];
        float sum = 0;
        for (int64_t slot = 0; slot < c.k; ++slot) sum += w[slot];
        for (int64_t slot = 0; slot < c.k; ++slot) w[slot] = (c.renormalise ? w[slot] / std::max(sum, std::numeric_limits<float>::min()) : w[slot]) * float(c.factor);
        if (c.real && !c.real[t])
            for (int64_t slot = 0; slot < c.k; ++slot) chosen[slot] = c.E, w[slot] = 0;
    }

    void run() {
        for (int64_t t = 0; t < c.T; ++t) choose(t);
        std::vector<int64_t> place(c.E + 2, 0);
        for (int64_t e : choice) ++place[e + 1];
        for (int64_t e = 0; e <= c.E; ++e) place[e + 1] += place[e];
        for (int64_t e = 0; e < c.E; ++e) c.offsets[e] = int32_t(place[e + 1]);
        for (int64_t i = 0; i < c.T * c.k; ++i) {
            const int64_t at = place[choice[i]]++;
            c.token[at] = i / c.k, c.expert[at] = choice[i], c.weight[at] = weight[i], c.by_token[i] = at;
        }
    }
};

}  // namespace moeforge
