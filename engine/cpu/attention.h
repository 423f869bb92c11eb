// Attention over the cache: single tokens one by one, chunks of prompts in blocks of queries and keys.
//
// The cache is [slot][kv head][position][width], keys already rotated. A token sees the positions up to its own, so
// what lies behind them is never read. Where the CPU multiplies pairs of bfloat16 and the cache has them, queries and
// weights are rounded to bfloat16 as well.
#pragma once

#include <optional>
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
        scores.resize(std::max(group * sixteens(positions), rows * KEYS));
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

// --- a single token ---

#ifdef WIDE
// The sum of each of sixteen registers.
static inline Floats sums_of(const Floats (&x)[LANES]) {
    __m512 a[8], b[4], c[2];
    UNROLL for (int i = 0; i < 8; i++)
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i].v, x[2 * i + 1].v),
                             _mm512_unpackhi_ps(x[2 * i].v, x[2 * i + 1].v));
    UNROLL for (int i = 0; i < 4; i++) {
        const __m512d low = _mm512_castps_pd(a[2 * i]), high = _mm512_castps_pd(a[2 * i + 1]);
        b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
    }
    UNROLL for (int i = 0; i < 2; i++)
        c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
    return {_mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd))};
}
#else
static inline __m256 sums_of_eight(const __m256* a) {
    __m256 b[4], c[2];
    UNROLL for (int i = 0; i < 4; i++)
        b[i] = _mm256_add_ps(_mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]));
    UNROLL for (int i = 0; i < 2; i++)
        c[i] = _mm256_add_ps(_mm256_shuffle_ps(b[2 * i], b[2 * i + 1], 0x44),
                             _mm256_shuffle_ps(b[2 * i], b[2 * i + 1], 0xee));
    return _mm256_add_ps(_mm256_permute2f128_ps(c[0], c[1], 0x20), _mm256_permute2f128_ps(c[0], c[1], 0x31));
}
static inline Floats sums_of(const Floats (&x)[LANES]) {
    __m256 sums[LANES];
    UNROLL for (int i = 0; i < LANES; i++) sums[i] = _mm256_add_ps(x[i].low, x[i].high);
    return {sums_of_eight(sums), sums_of_eight(sums + 8)};
}

// Whole sixteens of q[g] . key[t], [g][t], for four heads and four keys. Sixteen sums would not stay in registers: two
// keys at a time share one for each head.
template <int KIND>
static inline Floats four_by_four(const float* q, const char* key, int64_t width) {
    constexpr int64_t SIZE = KIND == FLOAT32 ? 4 : 2;
    __m256 sums[LANES];
    UNROLL for (int t = 0; t < 4; t += 2) {
        const char *first = key + t * width * SIZE, *second = first + width * SIZE;
        Floats both[4];
        UNROLL for (int g = 0; g < 4; g++) both[g] = zeros();
        for (int64_t h = 0; h + LANES <= width; h += LANES) {
            const Floats a = load_as<KIND>(first + h * SIZE), b = load_as<KIND>(second + h * SIZE);
            UNROLL for (int g = 0; g < 4; g++) {
                const Floats x = load(q + g * width + h);
                add_product(both[g], {a.low, b.low}, {x.low, x.low});
                add_product(both[g], {a.high, b.high}, {x.high, x.high});
            }
        }
        UNROLL for (int g = 0; g < 4; g++) sums[4 * g + t] = both[g].low, sums[4 * g + t + 1] = both[g].high;
    }
    return {sums_of_eight(sums), sums_of_eight(sums + 8)};
}
#endif

// Whole sixteens of q[g] . key[t], [g][t], for G heads and 16 / G keys; `pairs` is q in bfloat16, `words` apart.
template <int KIND, int G>
static inline Floats sixteen_sums(const float* q, const Word* pairs, int64_t words, const char* key, int64_t width) {
#ifndef WIDE
    if constexpr (G == 4) return four_by_four<KIND>(q, key, width);
#endif
    constexpr int T = LANES / G, FOUR = 4;  // keys, and how many of their addresses fit into registers
    constexpr int64_t SIZE = KIND == FLOAT32 ? 4 : 2;
    Floats sums[LANES];
    UNROLL for (int first = 0; first < T; first += FOUR) {
        Floats some[G][FOUR];
        const char* k[FOUR];
        UNROLL for (int t = 0; t < FOUR; t++) {
            k[t] = key + (first + t) * width * SIZE;
            UNROLL for (int g = 0; g < G; g++) some[g][t] = zeros();
        }
        int64_t h = 0;
#ifdef PAIRS
        if constexpr (PAIRED<KIND>)
            for (; h + 2 * LANES <= width; h += 2 * LANES)
                UNROLL for (int t = 0; t < FOUR; t++) {
                    const __m512i v = _mm512_loadu_si512(k[t] + h * 2);
                    UNROLL for (int g = 0; g < G; g++)
                        some[g][t].v = add_pairs(some[g][t].v, v, _mm512_loadu_si512(pairs + g * words + h / 2));
                }
#endif
        for (; h + LANES <= width; h += LANES)
            UNROLL for (int t = 0; t < FOUR; t++) {
                const Floats v = load_as<KIND>(k[t] + h * SIZE);
                UNROLL for (int g = 0; g < G; g++) some[g][t] = fused(v, load(q + g * width + h), some[g][t]);
            }
        UNROLL for (int g = 0; g < G; g++)
            UNROLL for (int t = 0; t < FOUR; t++) sums[g * T + first + t] = some[g][t];
    }
    return sums_of(sums);
}

// scores[g][t] = scale q[g] . key[t] for G heads and 16 / G keys.
template <int KIND, int G>
static inline void score(const float* q, const Word* pairs, int64_t words, const char* key, int64_t width, float scale,
                         float* scores, int64_t stride) {
    constexpr int T = LANES / G;
    constexpr int64_t SIZE = KIND == FLOAT32 ? 4 : 2;
    float result[LANES];
    store(result, sixteen_sums<KIND, G>(q, pairs, words, key, width));
    for (int i = 0; i < LANES && width % LANES; i++) {
        const float* const left = q + i / T * width;
        for (int64_t h = width / LANES * LANES; h < width; h++)
            result[i] += left[h] * load_one(KIND, key + (i % T * width + h) * SIZE);
    }
    store(result, load(result) * all(scale));
    UNROLL for (int g = 0; g < G; g++) std::memcpy(scores + g * stride, result + g * T, T * sizeof(float));
}

// out[g][0 .. 16 C) = the sum over t of p[g][t] values[t][0 .. 16 C), for G heads.
template <int KIND, int G, int C>
static void mix(const float* p, int64_t p_stride, const char* values, int64_t count, int64_t width, float* out) {
    constexpr int64_t SIZE = KIND == FLOAT32 ? 4 : 2;
    Floats sums[G][C];
    UNROLL for (int g = 0; g < G; g++)
        UNROLL for (int c = 0; c < C; c++) sums[g][c] = zeros();
    for (int64_t t = 0; t < count; t++, values += width * SIZE) {
        Floats v[C];
        UNROLL for (int c = 0; c < C; c++) v[c] = load_as<KIND>(values + c * LANES * SIZE);
        UNROLL for (int g = 0; g < G; g++) {
            const Floats weight = all(p[g * p_stride + t]);
            UNROLL for (int c = 0; c < C; c++) sums[g][c] = fused(v[c], weight, sums[g][c]);
        }
    }
    UNROLL for (int g = 0; g < G; g++)
        UNROLL for (int c = 0; c < C; c++) store(out + g * width + c * LANES, sums[g][c]);
}

template <int KIND, int G>
static void mix_heads(const float* p, int64_t p_stride, const char* values, int64_t count, int64_t width, float* out) {
    constexpr int64_t SIZE = KIND == FLOAT32 ? 4 : 2;
#ifdef WIDE
    constexpr int C = 4;
#else
    constexpr int C = 4 / G;
#endif
    int64_t h = 0;
    for (; h + C * LANES <= width; h += C * LANES)
        mix<KIND, G, C>(p, p_stride, values + h * SIZE, count, width, out + h);
    for (; h + LANES <= width; h += LANES) mix<KIND, G, 1>(p, p_stride, values + h * SIZE, count, width, out + h);
    for (; h < width; h++)
        for (int g = 0; g < G; g++) {
            float sum = 0.0f;
            for (int64_t t = 0; t < count; t++)
                sum += p[g * p_stride + t] * load_one(KIND, values + (t * width + h) * SIZE);
            out[g * width + h] = sum;
        }
}

template <int KIND>
static void attend_single_of(const Cache& cache, int64_t slot, int64_t head, int64_t position, int64_t group,
                             const float* queries, float* out, const char* next, Scratch& scratch) {
    const int64_t width = cache.width, count = position + 1, padded = sixteens(count), size = cache.size();
    const char* keys = cache.keys + cache.offset(slot, head, 0);
    const char* values = cache.values + cache.offset(slot, head, 0);
    const float scale = 1.0f / std::sqrt(float(width));
    float* const scores = scratch.scores.data();
    Word* const pairs = scratch.queries.data();
    const int64_t words = (width + 1) / 2, soon = std::min(2 * LANES, padded);
    if constexpr (PAIRED<KIND>)
        for (int64_t g = 0; g < group; g++)
            store_as(BFLOAT16, reinterpret_cast<char*>(pairs + g * words), queries + g * width, width);
    const int64_t fours = group / 4 * 4;
    for (int64_t t = 0; t < count; t += LANES) {
        const int64_t step = width * size;
        const char* key = keys + t * step;
        if (count - t < LANES) {  // nobody reads behind the last one
            std::memcpy(scratch.keys.data(), key, (count - t) * step);
            key = reinterpret_cast<const char*>(scratch.keys.data());
        }
        for (int64_t i = 0; i < LANES; i += 4) {
            // Keys that come soon, in the end those of the next head, and the values that these ones' weights are for: a
            // few at a time, for many at once would keep what is needed now waiting.
            const int64_t at = t + i + soon;
            const char* coming = at < count ? keys + at * step : next + (at - padded) * step;
            const char* these = values + (t + i) * step;
            for (int64_t line = 0; line < 4 * step; line += 64) {
                _mm_prefetch(coming + line, _MM_HINT_T0);
                _mm_prefetch(these + line, _MM_HINT_T1);
            }
            for (int64_t g = 0; g < fours; g += 4)
                score<KIND, 4>(queries + g * width, pairs + g * words, words, key + i * step, width, scale,
                               scores + g * padded + t + i, padded);
        }
        for (int64_t g = fours; g < group; g++)
            score<KIND, 1>(queries + g * width, pairs + g * words, words, key, width, scale, scores + g * padded + t,
                           padded);
    }
    for (int64_t g = 0; g < group; g++) {
        float* const p = scores + g * padded;
        for (int64_t t = count; t < padded; t++) p[t] = -INFINITY;
        const Floats inverse = all(1.0f / exponentials(p, padded, largest_among(p, padded)));
        for (int64_t t = 0; t < padded; t += LANES) store(p + t, load(p + t) * inverse);
    }
    int64_t g = 0;
    for (; g + 4 <= group; g += 4)
        mix_heads<KIND, 4>(scores + g * padded, padded, values, count, width, out + g * width);
    for (; g < group; g++) mix_heads<KIND, 1>(scores + g * padded, padded, values, count, width, out + g * width);
}

// One token over its whole sequence, for the query heads that share a key/value head; `next` are the keys that this
// thread wants after it.
static void attend_single(const Cache& cache, int64_t slot, int64_t head, int64_t position, int64_t group,
                          const float* queries, float* out, const char* next, Scratch& scratch) {
    switch (cache.kind) {
        case FLOAT32: return attend_single_of<FLOAT32>(cache, slot, head, position, group, queries, out, next, scratch);
        case BFLOAT16: return attend_single_of<BFLOAT16>(cache, slot, head, position, group, queries, out, next, scratch);
        default: return attend_single_of<FLOAT16>(cache, slot, head, position, group, queries, out, next, scratch);
    }
}

// --- a chunk ---

template <bool TWO>
static inline void add_times(Floats& sum, Floats column, const Word* word) {
#ifdef PAIRS
    if constexpr (TWO) {
        sum.v = add_pairs(sum.v, _mm512_castps_si512(column.v), _mm512_set1_epi32(int(*word)));
        return;
    }
#endif
    float x;
    std::memcpy(&x, word, 4);
    add_product(sum, column, all(x));
}

// out[row][0 .. 16 C) (+)= left[row][k] right[k][0 .. 16 C) for R rows.
template <bool TWO, int R, int C>
static inline void product_tile(const Word* left, int64_t left_stride, const Word* right, int64_t right_stride,
                                int64_t steps, float* out, int64_t out_stride, bool add) {
    Floats sums[R][C];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) sums[r][c] = add ? load(out + r * out_stride + c * LANES) : zeros();
    for (int64_t k = 0; k < steps; k++) {
        Floats column[C];
        UNROLL for (int c = 0; c < C; c++)
            column[c] = load(reinterpret_cast<const float*>(right + k * right_stride + c * LANES));
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int c = 0; c < C; c++)
                add_times<TWO>(sums[r][c], column[c], left + r * left_stride + k);
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) store(out + r * out_stride + c * LANES, sums[r][c]);
}

template <bool TWO, int C>
static inline void product_columns(const Word* left, int64_t left_stride, const Word* right, int64_t right_stride,
                                   int64_t rows, int64_t steps, float* out, int64_t out_stride, bool add) {
#ifdef WIDE
    constexpr int R = 6;
#else
    constexpr int R = 4;
#endif
    int64_t r = 0;
    for (; r + R <= rows; r += R)
        product_tile<TWO, R, C>(left + r * left_stride, left_stride, right, right_stride, steps, out + r * out_stride,
                                out_stride, add);
    for (; r < rows; r++)
        product_tile<TWO, 1, C>(left + r * left_stride, left_stride, right, right_stride, steps, out + r * out_stride,
                                out_stride, add);
}

#ifdef TILES
// The same for pairs by tiles, in whole ones: steps are a multiple of 16, columns of 32, and up to 15 more rows are
// read and written.
static void product_by_tiles(const Word* left, int64_t left_stride, const Word* right, int64_t right_stride,
                             int64_t rows, int64_t steps, int64_t columns, float* out, int64_t out_stride, bool add) {
    for (int64_t r = 0; r < rows; r += TWO_SIDES) {
        const bool more = rows - r > TILE_SIDE;
        for (int64_t c = 0; c < columns; c += TWO_SIDES) {
            float* const to = out + r * out_stride + c;
            if (add)
                load_sums(to, more, out_stride * 4);
            else
                zero_sums(more);
            for (int64_t k = 0; k < steps; k += TILE_SIDE) {
                const Word* const p = right + k * right_stride + c;
                multiply_tiles<PAIR>(left + r * left_stride + k, left_stride * 4, more, p, p + TILE_SIDE,
                                     right_stride * 4);
            }
            store_sums(to, more, out_stride * 4);
        }
    }
}
#endif

template <bool TWO>
static void product(const Word* left, int64_t left_stride, const Word* right, int64_t right_stride, int64_t rows,
                    int64_t steps, int64_t columns, float* out, int64_t out_stride, bool add) {
#ifdef TILES
    if (TWO && Tiles::allowed())
        return product_by_tiles(left, left_stride, right, right_stride, rows, steps, columns, out, out_stride, add);
#endif
#ifdef WIDE
    constexpr int C = 4;
#else
    constexpr int C = 1;
#endif
    int64_t c = 0;
    for (; c + C * LANES <= columns; c += C * LANES)
        product_columns<TWO, C>(left, left_stride, right + c, right_stride, rows, steps, out + c, out_stride, add);
    for (; c < columns; c += LANES)
        product_columns<TWO, 1>(left, left_stride, right + c, right_stride, rows, steps, out + c, out_stride, add);
}

static inline Word word_of(float x) {
    Word word;
    std::memcpy(&word, &x, 4);
    return word;
}

// to[i][t] = from[t][i]: eight words of each of eight rows.
static inline void turn(Word* to, int64_t to_stride, const __m256 (&from)[8]) {
    __m256 a[8], b[8];
    UNROLL for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(from[i], from[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(from[i], from[i + 1]);
    }
    UNROLL for (int i = 0; i < 8; i += 4)
        UNROLL for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
            b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
        }
    UNROLL for (int i = 0; i < 4; i++) {
        float* const at = reinterpret_cast<float*>(to + i * to_stride);
        _mm256_storeu_ps(at, _mm256_permute2f128_ps(b[i], b[i + 4], 0x20));
        _mm256_storeu_ps(at + 4 * to_stride, _mm256_permute2f128_ps(b[i], b[i + 4], 0x31));
    }
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

// A block of keys and values as words: keys[step][KEYS], values[step][wide]; zeros where there is nothing.
template <int KIND>
static void gather_block(const char* key, const char* value, int64_t here, int64_t width, int64_t wide, Word* keys,
                         Word* values) {
    constexpr int64_t SIZE = KIND == FLOAT32 ? 4 : 2;
#ifdef PAIRS
    if constexpr (PAIRED<KIND>) {
        for (int64_t h = 0; h < width; h += 2 * LANES) {
            const __mmask32 there = width - h >= 2 * LANES ? ~__mmask32(0) : (__mmask32(1) << (width - h)) - 1;
            for (int64_t t = 0; t < KEYS; t += LANES) {
                __m512i rows[LANES];
                UNROLL for (int i = 0; i < LANES; i++)
                    rows[i] = _mm512_maskz_loadu_epi16(t + i < here ? there : 0, key + ((t + i) * width + h) * 2);
                turn(keys + h / 2 * KEYS + t, KEYS, rows);
            }
        }
        for (int64_t h = 0; h < wide; h += LANES) {
            const int64_t left = std::clamp<int64_t>(width - h, 0, LANES);
            const __mmask16 there = __mmask16((1u << left) - 1);
            for (int64_t t = 0; t < KEYS; t += 2) {
                const __m256i even = _mm256_maskz_loadu_epi16(t < here ? there : 0, value + (t * width + h) * 2);
                const __m256i odd = _mm256_maskz_loadu_epi16(t + 1 < here ? there : 0, value + ((t + 1) * width + h) * 2);
                const __m512i low = _mm512_cvtepu16_epi32(even), high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
                _mm512_storeu_si512(values + t / 2 * wide + h, _mm512_or_si512(low, high));
            }
        }
        return;
    }
#endif
    const int64_t whole = width / LANES * LANES;
    for (int64_t t = 0; t < KEYS; t += 8)
        for (int64_t h = 0; h < whole; h += LANES) {
            __m256 low[8], high[8];
            UNROLL for (int i = 0; i < 8; i++)
                halves(t + i < here ? load_as<KIND>(key + ((t + i) * width + h) * SIZE) : zeros(), low[i], high[i]);
            turn(keys + h * KEYS + t, KEYS, low);
            turn(keys + (h + 8) * KEYS + t, KEYS, high);
        }
    for (int64_t t = 0; t < KEYS; t++) {
        for (int64_t h = 0; h < whole; h += LANES)
            store(reinterpret_cast<float*>(values + t * wide + h),
                  t < here ? load_as<KIND>(value + (t * width + h) * SIZE) : zeros());
        for (int64_t h = whole; h < width; h++)
            keys[h * KEYS + t] = t < here ? word_of(load_one(KIND, key + (t * width + h) * SIZE)) : 0;
        for (int64_t h = whole; h < wide; h++)
            values[t * wide + h] =
                t < here && h < width ? word_of(load_one(KIND, value + (t * width + h) * SIZE)) : 0;
    }
}

// Tokens of a chunk at `position` on, for the query heads that share a key/value head. Their queries and outputs lie
// `stride` and `out_stride` numbers apart; sums are rescaled as larger scores turn up.
template <int KIND>
static void attend_block_of(const Cache& cache, int64_t slot, int64_t head, int64_t position, int64_t count,
                            int64_t group, const float* queries, int64_t stride, float* out, int64_t out_stride,
                            Scratch& scratch) {
    constexpr bool TWO = PAIRED<KIND>;
    constexpr int64_t EACH = TWO ? 2 : 1;  // numbers in a word
#ifdef TILES
    std::optional<Tiles> tiles;
    if (TWO && Tiles::allowed()) tiles.emplace(LINE);
#endif
    const int64_t width = cache.width, rows = count * group, end = position + count;
    const int64_t wide = (width + 2 * LANES - 1) / (2 * LANES) * 2 * LANES, steps = TWO ? wide / 2 : width;
    float* const sums = scratch.sums.data();
    float* const largest = scratch.largest.data();
    float* const result = scratch.out.data();
    float* const scores = scratch.scores.data();
    Word* const q = scratch.queries.data();
    Word* const weights = scratch.weights.data();
    std::fill_n(sums, rows, 0.0f);
    std::fill_n(largest, rows, -INFINITY);
    std::fill_n(result, rows * wide, 0.0f);
    std::fill_n(q, rows * steps, 0);
    const float scale = 1.0f / std::sqrt(float(width));
    for (int64_t r = 0; r < rows; r++) {
        const float* from = queries + (r / group) * stride + (r % group) * width;
        store_as(TWO ? BFLOAT16 : FLOAT32, reinterpret_cast<char*>(q + r * steps), from, width);
    }
    for (int64_t start = 0; start < end; start += KEYS) {
        const int64_t here = std::min(KEYS, end - start), place = cache.offset(slot, head, start);
        gather_block<KIND>(cache.keys + place, cache.values + place, here, width, wide, scratch.keys.data(),
                           scratch.values.data());
        const int64_t first = std::max<int64_t>(0, (start - position) * group);  // rows before it see nothing here
        product<TWO>(q + first * steps, steps, scratch.keys.data(), KEYS, rows - first, steps, KEYS,
                     scores + first * KEYS, KEYS, false);
        for (int64_t r = first; r < rows; r++) {
            const int64_t seen = std::min(here, position + r / group + 1 - start);
            float* const p = scores + r * KEYS;
            for (int64_t t = 0; t < KEYS; t += LANES) store(p + t, load(p + t) * all(scale));
            for (int64_t t = seen; t < KEYS; t++) p[t] = -INFINITY;
            const float most = std::max(largest[r], largest_among(p, KEYS));
            const float shrink = std::exp(largest[r] - most);
            largest[r] = most;
            sums[r] = sums[r] * shrink + exponentials(p, KEYS, most);
            if (shrink != 1.0f)
                for (int64_t h = 0; h < wide; h += LANES)
                    store(result + r * wide + h, load(result + r * wide + h) * all(shrink));
#ifdef PAIRS
            if constexpr (TWO)
                for (int64_t t = 0; t < KEYS; t += LANES) pair_words(weights + r * (KEYS / 2) + t / 2, load(p + t));
#endif
            if constexpr (!TWO) std::memcpy(weights + r * KEYS, p, KEYS * 4);
        }
        product<TWO>(weights + first * (KEYS / EACH), KEYS / EACH, scratch.values.data(), wide, rows - first,
                     KEYS / EACH, wide, result + first * wide, wide, true);
    }
    for (int64_t r = 0; r < rows; r++) {
        const float inverse = 1.0f / sums[r];
        float* const o = out + (r / group) * out_stride + (r % group) * width;
        for (int64_t h = 0; h < width; h++) o[h] = result[r * wide + h] * inverse;
    }
}

static void attend_block(const Cache& cache, int64_t slot, int64_t head, int64_t position, int64_t count,
                         int64_t group, const float* queries, int64_t stride, float* out, int64_t out_stride,
                         Scratch& scratch) {
    switch (cache.kind) {
        case FLOAT32:
            return attend_block_of<FLOAT32>(cache, slot, head, position, count, group, queries, stride, out, out_stride,
                                            scratch);
        case BFLOAT16:
            return attend_block_of<BFLOAT16>(cache, slot, head, position, count, group, queries, stride, out,
                                             out_stride, scratch);
        default:
            return attend_block_of<FLOAT16>(cache, slot, head, position, count, group, queries, stride, out, out_stride,
                                            scratch);
    }
}
