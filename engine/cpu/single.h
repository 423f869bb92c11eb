// Attention of single tokens, each over its whole sequence.
#pragma once

#include "attention.h"

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

// Scores of `count` keys become the weights of their values, up to `padded` zeros.
static inline void weigh(float* p, int64_t count, int64_t padded) {
    for (int64_t t = count; t < padded; t++) p[t] = -INFINITY;
    const Floats inverse = all(1.0f / exponentials(p, padded, largest_among(p, padded)));
    for (int64_t t = 0; t < padded; t += LANES) store(p + t, load(p + t) * inverse);
}

// The keys that this thread wants behind those at hand.
struct Coming {
    const char* keys;
    int64_t count;
};

template <int KIND>
static void attend_single_of(const Cache& cache, int64_t slot, int64_t head, int64_t position, int64_t group,
                             const float* queries, float* out, const Coming& next, Scratch& scratch) {
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
            const char* coming = at < count ? keys + at * step : next.keys + (at - padded) * step;
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
    for (int64_t g = 0; g < group; g++) weigh(scores + g * padded, count, padded);
    int64_t g = 0;
    for (; g + 4 <= group; g += 4)
        mix_heads<KIND, 4>(scores + g * padded, padded, values, count, width, out + g * width);
    for (; g < group; g++) mix_heads<KIND, 1>(scores + g * padded, padded, values, count, width, out + g * width);
}

#ifdef TILES
constexpr int64_t TWO_LANES = 2 * LANES;  // bfloat16 in a line of a tile
constexpr int64_t MANY_HEADS = 4;         // that share a key/value head, and
constexpr int64_t MANY_KEYS = 128;        // from which on tiles pay

// Sixteen lines of sixteen words become columns.
static inline void turn(Word* to, const void* from) {
    __m512i rows[LANES];
    UNROLL for (int i = 0; i < LANES; i++) rows[i] = _mm512_load_si512(static_cast<const char*>(from) + i * LINE);
    turn(to, LANES, rows);
}

// scores[g][t] = scale q[g] . key[t] for up to sixteen heads, whose pairs lie side by side in `q`; keys are tiles as they
// lie. There is room at `last` for 32 keys.
static void score_by_tiles(const Word* q, int64_t heads, const char* keys, int64_t count, int64_t width, float scale,
                           float* scores, int64_t stride, char* last, Asked& asked) {
    const Tiles tiles(LINE);
    const int64_t step = width * 2;
    alignas(LINE) float sums[TWO_LANES][LANES];
    alignas(LINE) Word turned[LANES][LANES];
    for (int64_t t = 0; t < count; t += TWO_LANES) {
        const char* key = keys + t * step;
        const int64_t here = std::min(TWO_LANES, count - t);
        const bool more = here > TILE_SIDE;
        if (here < TWO_LANES) {  // nobody reads behind the last one
            std::memcpy(last, key, here * step);
            key = last;
        }
        asked.next();
        zero_sums(false);
        for (int64_t h = 0; h < width; h += TWO_LANES) {
            _tile_loadd(6, q + h / 2 * LANES, LINE);
            _tile_loadd(4, key + h * 2, step);
            _tile_dpbf16ps(0, 4, 6);
            if (!more) continue;
            _tile_loadd(5, key + TILE_SIDE * step + h * 2, step);
            _tile_dpbf16ps(1, 5, 6);
        }
        _tile_stored(0, sums, LINE);
        _tile_stored(1, sums[TILE_SIDE], LINE);
        for (int64_t i = 0; i < here; i += LANES) {
            turn(turned[0], sums[i]);
            for (int64_t g = 0; g < heads; g++)
                store(scores + g * stride + t + i, load(reinterpret_cast<float*>(turned[g])) * all(scale));
        }
    }
}

// out[g] = the sum over t of p[g][t] values[t] for up to sixteen heads, whose weights are pairs: 64 columns after the other.
static void mix_by_tiles(const float* p, int64_t stride, int64_t heads, const char* values, int64_t count, int64_t width,
                         float* out, Asked& asked) {
    const Tiles tiles(LINE, heads);
    alignas(LINE) __m512i pairs[2][4][TILE_SIDE];  // one block's are read while the next one's are written
    alignas(LINE) float sums[4][TILE_SIDE][LANES];
    for (int64_t from = 0; from < width; from += 2 * TWO_LANES) {
        const int halves = width - from > TWO_LANES ? 2 : 1;
        zero_sums(true);
        for (int64_t t = 0; t < count; t += TWO_LANES) {
            asked.next();
            auto& block = pairs[t / TWO_LANES % 2];
            for (int half = 0; half < halves; half++)
                UNROLL for (int i = 0; i < TILE_SIDE; i++) {
                    const int64_t place = t + 2 * i;
                    const char* at = values + (place * width + from + half * TWO_LANES) * 2;
                    const __m512i even = _mm512_maskz_loadu_epi16(place < count ? ~__mmask32(0) : 0, at);
                    const __m512i odd = _mm512_maskz_loadu_epi16(place + 1 < count ? ~__mmask32(0) : 0, at + width * 2);
                    block[2 * half][i] = _mm512_unpacklo_epi16(even, odd);
                    block[2 * half + 1][i] = _mm512_unpackhi_epi16(even, odd);
                }
            _tile_loadd(4, p + t / 2, stride * 4);
            _tile_loadd(6, block[0], LINE);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, block[1], LINE);
            _tile_dpbf16ps(1, 4, 7);
            if (halves == 1) continue;
            _tile_loadd(6, block[2], LINE);
            _tile_dpbf16ps(2, 4, 6);
            _tile_loadd(7, block[3], LINE);
            _tile_dpbf16ps(3, 4, 7);
        }
        _tile_stored(0, sums[0], LINE);
        _tile_stored(1, sums[1], LINE);
        _tile_stored(2, sums[2], LINE);
        _tile_stored(3, sums[3], LINE);
        for (int64_t g = 0; g < heads; g++)
            for (int half = 0; half < halves; half++) {
                // As they were put together: four columns of the one, then four of the other.
                const __m512 low = load(sums[2 * half][g]).v, high = load(sums[2 * half + 1][g]).v;
                const __m512 first = _mm512_shuffle_f32x4(low, high, 0x44), second = _mm512_shuffle_f32x4(low, high, 0xee);
                float* const to = out + g * width + from + half * TWO_LANES;
                store(to, {_mm512_shuffle_f32x4(first, first, 0xd8)});
                store(to + LANES, {_mm512_shuffle_f32x4(second, second, 0xd8)});
            }
    }
}

// Up to sixteen heads, of a cache of bfloat16 whose rows are whole lines of tiles. Beside the scores the values are asked
// for, and beside the values the next keys: so the memory is busy all the time.
static void attend_by_tiles(const Cache& cache, int64_t slot, int64_t head, int64_t position, int64_t heads,
                            const float* queries, float* out, const Coming& next, Scratch& scratch) {
    const int64_t width = cache.width, count = position + 1, step = width * 2;
    const int64_t blocks = (count + TWO_LANES - 1) / TWO_LANES, padded = blocks * TWO_LANES;
    const int64_t passes = (width + 2 * TWO_LANES - 1) / (2 * TWO_LANES);
    const char* keys = cache.keys + cache.offset(slot, head, 0);
    const char* values = cache.values + cache.offset(slot, head, 0);
    Word* const q = scratch.queries.data();
    float* const scores = scratch.scores.data();
    for (int64_t h = 0; h < width; h += TWO_LANES) {
        alignas(LINE) Word lines[LANES][LANES] = {};
        for (int64_t g = 0; g < heads; g++)
            for (int64_t i = 0; i < 2; i++) pair_words(lines[g] + i * 8, load(queries + g * width + h + i * LANES));
        turn(q + h / 2 * LANES, lines[0]);
    }
    Asked these(values, 1, 0, count * step, blocks), then(next.keys, 1, 0, next.count * step, blocks * passes);
    score_by_tiles(q, heads, keys, count, width, 1.0f / std::sqrt(float(width)), scores, padded,
                   reinterpret_cast<char*>(scratch.keys.data()), these);
    for (int64_t g = 0; g < heads; g++) {
        float* const p = scores + g * padded;
        weigh(p, count, padded);
        for (int64_t t = 0; t < padded; t += LANES) pair_words(reinterpret_cast<Word*>(p) + t / 2, load(p + t));
    }
    mix_by_tiles(scores, padded, heads, values, count, width, out, then);
}
#endif

// One token over its whole sequence, for the query heads that share a key/value head.
static void attend_single(const Cache& cache, int64_t slot, int64_t head, int64_t position, int64_t group,
                          const float* queries, float* out, const Coming& next, Scratch& scratch) {
#ifdef TILES
    if (cache.kind == BFLOAT16 && cache.width % TWO_LANES == 0 && group >= MANY_HEADS && position >= MANY_KEYS &&
        Tiles::allowed()) {
        for (int64_t g = 0; g < group; g += TILE_SIDE)
            attend_by_tiles(cache, slot, head, position, std::min(TILE_SIDE, group - g), queries + g * cache.width,
                            out + g * cache.width, next, scratch);
        return;
    }
#endif
    switch (cache.kind) {
        case FLOAT32: return attend_single_of<FLOAT32>(cache, slot, head, position, group, queries, out, next, scratch);
        case BFLOAT16: return attend_single_of<BFLOAT16>(cache, slot, head, position, group, queries, out, next, scratch);
        default: return attend_single_of<FLOAT16>(cache, slot, head, position, group, queries, out, next, scratch);
    }
}
