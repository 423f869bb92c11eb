// Attention over the cache: single tokens one by one, chunks of prompts in blocks of queries and keys.
//
// The cache is [slot][kv head][position][width], keys already rotated. A token sees the positions up to its own, so
// what lies behind them is never read.
#pragma once

#include <vector>

#include "linear.h"

struct Cache {
    int32_t kind;  // FLOAT32, BFLOAT16 or FLOAT16
    int64_t heads, positions, width;
    char* keys;    // of one layer
    char* values;

    int64_t size() const { return kind == FLOAT32 ? 4 : 2; }
    int64_t offset(int64_t slot, int64_t head, int64_t position) const {
        return ((slot * heads + head) * positions + position) * width * size();
    }
};

static inline __m256 load_eight(int32_t kind, const char* p) {
    if (kind == FLOAT32) return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return kind == BFLOAT16 ? widen_bfloat16(v) : _mm256_cvtph_ps(v);
}

static inline float load_one(int32_t kind, const char* p) {
    if (kind == FLOAT32) {
        float v;
        std::memcpy(&v, p, 4);
        return v;
    }
    uint16_t v;
    std::memcpy(&v, p, 2);
    if (kind == FLOAT16) return _cvtsh_ss(v);
    const uint32_t wide = uint32_t(v) << 16;
    float result;
    std::memcpy(&result, &wide, 4);
    return result;
}

static inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // not a number
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline void store(int32_t kind, char* to, const float* from, int64_t count) {
    if (kind == FLOAT32) {
        std::memcpy(to, from, count * 4);
        return;
    }
    uint16_t* out = reinterpret_cast<uint16_t*>(to);
    for (int64_t i = 0; i < count; i++) out[i] = kind == BFLOAT16 ? to_bfloat16(from[i]) : _cvtss_sh(from[i], 0);
}

// e^x for x <= 0 and a little above: Cephes' polynomial, good to the last bits of a float.
static inline __m256 exponential(__m256 x) {
    // In this order of operands what is no number stays none.
    x = _mm256_max_ps(_mm256_set1_ps(-87.3f), _mm256_min_ps(_mm256_set1_ps(88.0f), x));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    x = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    x = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), x);
    __m256 y = _mm256_set1_ps(1.9875691500e-4f);
    y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(1.3981999507e-3f));
    y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(8.3334519073e-3f));
    y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(4.1665795894e-2f));
    y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(1.6666665459e-1f));
    y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(5.0000001201e-1f));
    y = _mm256_fmadd_ps(y, _mm256_mul_ps(x, x), _mm256_add_ps(x, _mm256_set1_ps(1.0f)));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(y, _mm256_castsi256_ps(power));
}

// p[i] = e^(p[i] - largest) and their sum; `count` is rounded up to 8, and what lies behind it must be -infinity.
static inline float exponentials(float* p, int64_t count, float largest) {
    const __m256 shift = _mm256_set1_ps(largest), none = _mm256_set1_ps(-INFINITY);
    __m256 sum = _mm256_setzero_ps();
    for (int64_t i = 0; i < count; i += 8) {
        const __m256 x = _mm256_loadu_ps(p + i);
        const __m256 e = _mm256_andnot_ps(_mm256_cmp_ps(x, none, _CMP_EQ_OQ), exponential(_mm256_sub_ps(x, shift)));
        _mm256_storeu_ps(p + i, e);
        sum = _mm256_add_ps(sum, e);
    }
    return sum_of(sum);
}

constexpr int64_t QUERIES = 16;  // tokens of a chunk that are looked at together
constexpr int64_t KEYS = 32;     // positions of the cache that they meet at once
constexpr int64_t MOST_HEADS = 64;  // query heads that share a key/value head

// What one thread needs besides its stack.
struct Scratch {
    std::vector<float> scores, keys, values, out, largest, sums;

    void fit(int64_t positions, int64_t group, int64_t width) {
        scores.resize(std::max(group * (positions + 8), QUERIES * group * KEYS));
        keys.resize(width * KEYS);
        values.resize(KEYS * width);
        out.resize(QUERIES * group * width);
        largest.resize(QUERIES * group);
        sums.resize(QUERIES * group);
    }
};

template <int32_t KIND>
static void attend_single_of(const Cache& cache, int64_t slot, int64_t head, int64_t position, int64_t group,
                             const float* queries, float* out, Scratch& scratch) {
    const int64_t width = cache.width, count = position + 1, padded = (count + 7) / 8 * 8;
    const int64_t size = KIND == FLOAT32 ? 4 : 2;
    const char* keys = cache.keys + cache.offset(slot, head, 0);
    const char* values = cache.values + cache.offset(slot, head, 0);
    const float scale = 1.0f / std::sqrt(float(width));
    float* scores = scratch.scores.data();
    for (int64_t t = 0; t < count; t++) {
        const char* key = keys + t * width * size;
        for (int64_t g = 0; g < group; g++) {
            const float* q = queries + g * width;
            __m256 sum0 = _mm256_setzero_ps(), sum1 = _mm256_setzero_ps();
            int64_t h = 0;
            for (; h + 16 <= width; h += 16) {
                sum0 = _mm256_fmadd_ps(load_eight(KIND, key + h * size), _mm256_loadu_ps(q + h), sum0);
                sum1 = _mm256_fmadd_ps(load_eight(KIND, key + (h + 8) * size), _mm256_loadu_ps(q + h + 8), sum1);
            }
            for (; h + 8 <= width; h += 8)
                sum0 = _mm256_fmadd_ps(load_eight(KIND, key + h * size), _mm256_loadu_ps(q + h), sum0);
            float sum = sum_of(_mm256_add_ps(sum0, sum1));
            for (; h < width; h++) sum += load_one(KIND, key + h * size) * q[h];
            scores[g * padded + t] = sum * scale;
        }
    }
    for (int64_t g = 0; g < group; g++) {
        float* p = scores + g * padded;
        for (int64_t t = count; t < padded; t++) p[t] = -INFINITY;
        float largest = p[0];
        for (int64_t t = 1; t < count; t++) largest = std::max(largest, p[t]);
        const float inverse = 1.0f / exponentials(p, padded, largest);
        for (int64_t t = 0; t < count; t++) p[t] *= inverse;
    }
    std::memset(out, 0, group * width * sizeof(float));
    int64_t h = 0;
    for (; h + 8 <= width; h += 8)
        for (int64_t g = 0; g < group; g++) {
            const float* p = scores + g * padded;
            const char* value = values + h * size;
            __m256 sum0 = _mm256_setzero_ps(), sum1 = _mm256_setzero_ps();
            int64_t t = 0;
            for (; t + 2 <= count; t += 2, value += 2 * width * size) {
                sum0 = _mm256_fmadd_ps(load_eight(KIND, value), _mm256_broadcast_ss(p + t), sum0);
                sum1 = _mm256_fmadd_ps(load_eight(KIND, value + width * size), _mm256_broadcast_ss(p + t + 1), sum1);
            }
            if (t < count) sum0 = _mm256_fmadd_ps(load_eight(KIND, value), _mm256_broadcast_ss(p + t), sum0);
            _mm256_storeu_ps(out + g * width + h, _mm256_add_ps(sum0, sum1));
        }
    for (; h < width; h++)
        for (int64_t g = 0; g < group; g++)
            for (int64_t t = 0; t < count; t++)
                out[g * width + h] += scores[g * padded + t] * load_one(KIND, values + (t * width + h) * size);
}

// One token over its whole sequence, for the query heads that share a key/value head.
static void attend_single(const Cache& cache, int64_t slot, int64_t head, int64_t position, int64_t group,
                          const float* queries, float* out, Scratch& scratch) {
    switch (cache.kind) {
        case FLOAT32: return attend_single_of<FLOAT32>(cache, slot, head, position, group, queries, out, scratch);
        case BFLOAT16: return attend_single_of<BFLOAT16>(cache, slot, head, position, group, queries, out, scratch);
        default: return attend_single_of<FLOAT16>(cache, slot, head, position, group, queries, out, scratch);
    }
}

// scores[row][t] = q[row] . keys[.][t] for ROWS rows and sixteen positions.
template <int ROWS>
static void score_tile(const float* const* q, const float* keys, int64_t width, float scale, float* scores) {
    __m256 sums[ROWS][2];
    for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = _mm256_setzero_ps();
    for (int64_t h = 0; h < width; h++) {
        const __m256 low = _mm256_loadu_ps(keys + h * KEYS), high = _mm256_loadu_ps(keys + h * KEYS + 8);
        for (int r = 0; r < ROWS; r++) {
            const __m256 v = _mm256_broadcast_ss(q[r] + h);
            sums[r][0] = _mm256_fmadd_ps(low, v, sums[r][0]);
            sums[r][1] = _mm256_fmadd_ps(high, v, sums[r][1]);
        }
    }
    const __m256 factor = _mm256_set1_ps(scale);
    for (int r = 0; r < ROWS; r++)
        for (int half = 0; half < 2; half++)
            _mm256_storeu_ps(scores + r * KEYS + 8 * half, _mm256_mul_ps(sums[r][half], factor));
}

// Tokens first .. first + count of a chunk at `position` on, for the query heads that share a key/value head. Their
// queries and outputs lie `stride` and `out_stride` numbers apart; sums are rescaled as larger scores turn up.
static void attend_block(const Cache& cache, int64_t slot, int64_t head, int64_t position, int64_t count,
                         int64_t group, const float* queries, int64_t stride, float* out, int64_t out_stride,
                         Scratch& scratch) {
    const int64_t width = cache.width, rows = count * group, size = cache.size(), end = position + count;
    const float scale = 1.0f / std::sqrt(float(width));
    float* const sums = scratch.sums.data();
    float* const largest = scratch.largest.data();
    float* const total = scratch.out.data();
    std::fill_n(sums, rows, 0.0f);
    std::fill_n(largest, rows, -INFINITY);
    std::fill_n(total, rows * width, 0.0f);
    const float* q[QUERIES * MOST_HEADS];
    for (int64_t r = 0; r < rows; r++) q[r] = queries + (r / group) * stride + (r % group) * width;
    for (int64_t start = 0; start < end; start += KEYS) {
        const int64_t here = std::min(KEYS, end - start);
        const char* key = cache.keys + cache.offset(slot, head, start);
        const char* value = cache.values + cache.offset(slot, head, start);
        float* const k = scratch.keys.data();
        float* const v = scratch.values.data();
        for (int64_t t = 0; t < KEYS; t++)
            for (int64_t h = 0; h < width; h++) {
                k[h * KEYS + t] = t < here ? load_one(cache.kind, key + (t * width + h) * size) : 0.0f;
                if (t < here) v[t * width + h] = load_one(cache.kind, value + (t * width + h) * size);
            }
        float* const scores = scratch.scores.data();
        int64_t r = 0;
        for (; r + 6 <= rows; r += 6)
            for (int64_t t = 0; t < KEYS; t += 16) score_tile<6>(q + r, k + t, width, scale, scores + r * KEYS + t);
        for (; r < rows; r++)
            for (int64_t t = 0; t < KEYS; t += 16) score_tile<1>(q + r, k + t, width, scale, scores + r * KEYS + t);
        for (r = 0; r < rows; r++) {
            const int64_t seen = std::min(here, position + r / group + 1 - start);
            if (seen <= 0) continue;
            float* const p = scores + r * KEYS;
            for (int64_t t = seen; t < KEYS; t++) p[t] = -INFINITY;
            float most = largest[r];
            for (int64_t t = 0; t < seen; t++) most = std::max(most, p[t]);
            const float shrink = most > largest[r] ? std::exp(largest[r] - most) : 1.0f;
            largest[r] = most;
            sums[r] = sums[r] * shrink + exponentials(p, KEYS, most);
            float* const o = total + r * width;
            const __m256 factor = _mm256_set1_ps(shrink);
            int64_t h = 0;
            for (; h + 32 <= width; h += 32) {
                __m256 part[4];
                for (int i = 0; i < 4; i++) part[i] = _mm256_mul_ps(_mm256_loadu_ps(o + h + 8 * i), factor);
                for (int64_t t = 0; t < seen; t++) {
                    const __m256 weight = _mm256_broadcast_ss(p + t);
                    for (int i = 0; i < 4; i++)
                        part[i] = _mm256_fmadd_ps(_mm256_loadu_ps(v + t * width + h + 8 * i), weight, part[i]);
                }
                for (int i = 0; i < 4; i++) _mm256_storeu_ps(o + h + 8 * i, part[i]);
            }
            for (; h < width; h++) {
                float part = o[h] * shrink;
                for (int64_t t = 0; t < seen; t++) part += p[t] * v[t * width + h];
                o[h] = part;
            }
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        const float inverse = 1.0f / sums[r];
        float* const o = out + (r / group) * out_stride + (r % group) * width;
        for (int64_t h = 0; h < width; h++) o[h] = total[r * width + h] * inverse;
    }
}
