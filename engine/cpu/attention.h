// Attention over the cache: what its two forms have in common, for single tokens (single.h) and for chunks of prompts
// (chunk.h).
//
// The cache is [slot][kv head][position][width], keys already rotated. A token sees the positions up to its own, so
// what lies behind them is never read. Where the CPU multiplies pairs of bfloat16 and the cache has them, queries and
// weights are rounded to bfloat16 as well.
#pragma once

#include <vector>

#include "tiles.h"

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

constexpr int64_t QUERIES = 16;     // tokens of a chunk that are looked at together
constexpr int64_t KEYS = 64;        // positions of the cache that they meet at once
constexpr int64_t MOST_HEADS = 64;  // query heads that share a key/value head

// A float, or where they are multiplied two by two a pair of bfloat16.
using Word = uint32_t;

#ifdef PAIRS
template <int KIND>
constexpr bool PAIRED = KIND == BFLOAT16;
#else
template <int KIND>
constexpr bool PAIRED = false;
#endif

static inline int64_t sixteens(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// What one thread needs besides its stack.
struct Scratch {
    std::vector<float> scores, out, largest, sums;
    std::vector<Word> queries, keys, values, weights;

    void fit(int64_t positions, int64_t group, int64_t width) {
        const int64_t rows = QUERIES * group + TILE_SIDE, wide = (width + 2 * LANES - 1) / (2 * LANES) * 2 * LANES;
        scores.resize(std::max(group * sixteens(positions + LANES), rows * KEYS));  // up to 31 more than there are
        queries.resize(rows * wide);
        keys.resize(wide * KEYS);
        values.resize(KEYS * wide);
        weights.resize(rows * KEYS);
        out.resize(rows * wide);
        largest.resize(rows);
        sums.resize(rows);
    }
};

// What weighs so much less than the most changes no sum, and with numbers too small for a float's usual form the CPU
// would multiply a hundred times as slowly.
constexpr float NOTHING = -70.0f;

// p[i] = e^(p[i] - largest) and their sum; `count` is a multiple of LANES, and what counts for nothing is -infinity.
static inline float exponentials(float* p, int64_t count, float largest) {
    const Floats shift = all(largest);
    Floats sum = zeros();
    for (int64_t i = 0; i < count; i += LANES) {
        const Floats x = load(p + i) - shift, e = unless_below(x, NOTHING, exponential(x));
        store(p + i, e);
        sum = sum + e;
    }
    return sum_of(sum);
}

static inline float largest_among(const float* p, int64_t count) {
    Floats most = load(p);
    for (int64_t i = LANES; i < count; i += LANES) most = larger(most, load(p + i));
    return largest_of(most);
}

#ifdef PAIRS
// Sixteen pairs side by side of two rows of sixteen.
static inline void pair_words(Word* to, Floats x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v)));
}

// to[i][t] = from[t][i]: sixteen words of each of sixteen rows.
static inline void turn(Word* to, int64_t to_stride, const __m512i (&from)[LANES]) {
    __m512i a[LANES], b[LANES];
    UNROLL for (int i = 0; i < LANES; i += 2) {
        a[i] = _mm512_unpacklo_epi32(from[i], from[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(from[i], from[i + 1]);
    }
    UNROLL for (int i = 0; i < LANES; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        const __m512i low0 = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x44), high0 = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xee);
        const __m512i low1 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x44);
        const __m512i high1 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xee);
        _mm512_storeu_si512(to + i * to_stride, _mm512_shuffle_i32x4(low0, low1, 0x88));
        _mm512_storeu_si512(to + (i + 4) * to_stride, _mm512_shuffle_i32x4(low0, low1, 0xdd));
        _mm512_storeu_si512(to + (i + 8) * to_stride, _mm512_shuffle_i32x4(high0, high1, 0x88));
        _mm512_storeu_si512(to + (i + 12) * to_stride, _mm512_shuffle_i32x4(high0, high1, 0xdd));
    }
}
#endif
