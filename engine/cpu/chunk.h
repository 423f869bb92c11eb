// Attention of a chunk of a prompt, in blocks of queries and keys.
#pragma once

#include <optional>

#include "attention.h"

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
                                     right_stride * 4, [] {});
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
