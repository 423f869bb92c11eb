// Drawing one token from a row of logits: temperature, top-k, top-p, min-p, and the noise that a key and an id give.
//
// engine/sampler.py says the same in PyTorch, and is what this is compared with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "attention.h"

struct Draw {
    double top_p;
    float temperature;  // 0 takes the likeliest
    float min_p;
    int32_t top_k;      // 0 keeps all
    int64_t key;
};

// Splitmix64's finaliser over a number of its own for each key and id; the upper bits are uniform. Above 0 and below 1.
static inline float noise_bits(int64_t key, int64_t id) {
    uint64_t x = uint64_t(key) + uint64_t(id) * 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    x ^= x >> 31;
    return std::min((float(x >> 40) + 0.5f) * 0x1p-24f, 1.0f - 0x1p-24f);
}

class Sampler {
   public:
    int64_t draw(const float* logits, int64_t count, const Draw& options) {
        float most = -INFINITY;
        int64_t likeliest = 0;
        for (int64_t i = 0; i < count; i++)
            if (logits[i] > most) most = logits[i], likeliest = i;
        if (options.temperature <= 0.0f || !std::isfinite(most)) return likeliest;
        weigh(logits, count, most, std::max(options.temperature, 1e-6f));
        if (options.top_k > 0 || options.top_p < 1.0) cut(count, options);
        const float floor = options.min_p;  // the largest weight is 1
        // The likeliest goes first: most others then lose without a logarithm, as -log(u) is at least 1 - u.
        int64_t best = likeliest;
        float ratio = weights_[best] / -std::log(noise_bits(options.key, best));
        for (int64_t i = 0; i < count; i++) {
            const float w = weights_[i];
            if (w <= 0.0f || w < floor) continue;
            const float u = noise_bits(options.key, i);
            if (w < ratio * (1.0f - u) * 0.999f) continue;
            const float other = w / -std::log(u);
            if (other > ratio || (other == ratio && i < best)) ratio = other, best = i;
        }
        return best;
    }

   private:
    static constexpr int SHIFT = 19;  // a bucket for each sixteenth of a power of two

    void weigh(const float* logits, int64_t count, float most, float temperature) {
        weights_.resize(sixteens(count));
        const Floats shift = all(most), divisor = all(temperature);
        int64_t i = 0;
        for (; i + LANES <= count; i += LANES) {
            const Floats x = (load(logits + i) - shift) / divisor;
            store(&weights_[i], unless_below(x, -87.0f, exponential(x)));  // there nothing is left in a float
        }
        for (; i < count; i++) weights_[i] = std::exp((logits[i] - most) / temperature);
    }

    // Keep the k largest weights, and of those the fewest that together reach the share p. Buckets of like weights are
    // counted first, so that only the one in which a limit falls has to be sorted.
    void cut(int64_t count, const Draw& options) {
        double target = INFINITY;
        if (options.top_k > 0 && options.top_k < count) limit(count, options.top_k, target);
        if (options.top_p < 1.0) {
            double total = 0.0;
            for (int64_t i = 0; i < count; i++) total += weights_[i];
            limit(count, count, total * options.top_p);
        }
    }

    // Drop whatever comes behind the first `most` weights, or behind the one with which the sum reaches `target`.
    void limit(int64_t count, int64_t most, double target) {
        sums_.assign(0x3f800000 / (1 << SHIFT) + 2, 0.0);
        counts_.assign(sums_.size(), 0);
        for (int64_t i = 0; i < count; i++) {
            if (!(weights_[i] > 0.0f)) continue;
            const int64_t b = bucket(weights_[i]);
            sums_[b] += weights_[i];
            counts_[b]++;
        }
        int64_t b = int64_t(sums_.size()) - 1, kept = 0;
        double sum = 0.0;
        for (; b >= 0; b--) {
            if (kept + counts_[b] >= most || sum + sums_[b] >= target) break;
            kept += counts_[b];
            sum += sums_[b];
        }
        if (b < 0) return;
        same_.clear();
        for (int64_t i = 0; i < count; i++) {
            if (!(weights_[i] > 0.0f)) continue;
            const int64_t other = bucket(weights_[i]);
            if (other == b) same_.push_back(i);
            if (other < b) weights_[i] = 0.0f;
        }
        std::stable_sort(same_.begin(), same_.end(), [&](int64_t x, int64_t y) { return weights_[x] > weights_[y]; });
        for (int64_t id : same_) {
            const bool keep = kept < most && (sum < target || kept == 0);
            sum += weights_[id];
            kept++;
            if (!keep) weights_[id] = 0.0f;
        }
    }

    static int64_t bucket(float weight) {
        uint32_t bits;
        std::memcpy(&bits, &weight, 4);
        return bits >> SHIFT;
    }

    std::vector<float> weights_;
    std::vector<double> sums_;
    std::vector<int64_t> counts_, same_;
};
