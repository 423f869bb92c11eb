// Products with weights of whole numbers: four or eight columns of sixteen rows at once, and one scale for a block's sum.
#pragma once

#include "packed.h"

static inline int32_t load_int(const int8_t* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return v;
}

// What has been added to weights, to make them unsigned.
template <int KIND>
constexpr int32_t OFFSET = KIND == INT4 ? 8 : 128;

#ifdef WIDE

template <int KIND>
struct Bytes {
    __m512i v;
};
template <int KIND>
struct Dots {
    __m512i v;
};
template <int KIND>
struct Four {
    __m512i v;
};
template <int KIND>
static inline Bytes<KIND> load_bytes(const char* p) {
    return {_mm512_loadu_si512(p)};
}
static inline Bytes<INT4> low_halves(Bytes<INT4> x) { return {_mm512_and_si512(x.v, _mm512_set1_epi8(15))}; }
static inline Bytes<INT4> high_halves(Bytes<INT4> x) {
    return {_mm512_and_si512(_mm512_srli_epi16(x.v, 4), _mm512_set1_epi8(15))};
}
// Four columns of a token, for all rows.
template <int KIND>
static inline Four<KIND> load_four(const int8_t* p) {
    return {_mm512_set1_epi32(load_int(p))};
}
template <int KIND>
static inline Dots<KIND> begin(int32_t offset) {
    return {_mm512_set1_epi32(offset)};
}
template <int KIND>
static inline Dots<KIND> dot(Dots<KIND> sums, Bytes<KIND> w, Four<KIND> x) {
    return {add_bytes(sums.v, w.v, x.v)};
}
template <int KIND>
static inline Floats total(Dots<KIND> sums, int32_t) {
    return {_mm512_cvtepi32_ps(sums.v)};
}

#else

// For int4: sums of 16 bits, which hold a block's eight products of at most 15 * 127 * 2.
template <int KIND>
struct Bytes {
    __m256i low, high;
};
template <int KIND>
struct Dots {
    __m256i low, high;
};
template <int KIND>
struct Four {
    __m256i v;
};

// Written as instructions, because GCC moves additions of whole numbers behind all products and runs out of registers.
static inline void add16(__m256i& sum, __m256i v) { asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(v)); }
// Eight columns of a token times sixteen rows: `first` are the first four columns of the low and of the high rows, behind
// which the other four lie in `second` and at `high`, for registers are too few. Sums of four products are 16 bits wide,
// as activations beside int8 are rounded so that they fit.
static inline void add_eight(__m256i (&sums)[2], const __m256i (&first)[2], __m256i second, const __m256i& high,
                             const int8_t* x) {
    __m256i a, b, c, d;
    asm volatile(
        "vpbroadcastd %6, %0\n\tvpbroadcastd %7, %1\n\t"
        "vpmaddubsw %0, %8, %2\n\tvpmaddubsw %1, %10, %3\n\tvpaddw %2, %3, %2\n\tvpmaddwd %2, %12, %2\n\t"
        "vpaddd %2, %4, %4\n\tvmovdqu %11, %3\n\t"
        "vpmaddubsw %0, %9, %0\n\tvpmaddubsw %1, %3, %1\n\tvpaddw %0, %1, %0\n\tvpmaddwd %0, %12, %0\n\t"
        "vpaddd %0, %5, %5"
        : "=&x"(a), "=&x"(b), "=&x"(c), "=&x"(d), "+x"(sums[0]), "+x"(sums[1])
        : "m"(*reinterpret_cast<const int8_t(*)[4]>(x)), "m"(*reinterpret_cast<const int8_t(*)[4]>(x + 4)),
          "x"(first[0]), "x"(first[1]), "x"(second), "m"(high), "x"(_mm256_set1_epi16(1)));
}

template <int KIND>
static inline Bytes<KIND> load_bytes(const char* p) {
    const __m256i* v = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1)};
}
static inline Bytes<INT4> low_halves(Bytes<INT4> x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.low, mask), _mm256_and_si256(x.high, mask)};
}
static inline Bytes<INT4> high_halves(Bytes<INT4> x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(_mm256_srli_epi16(x.low, 4), mask), _mm256_and_si256(_mm256_srli_epi16(x.high, 4), mask)};
}
template <int KIND>
static inline Four<KIND> load_four(const int8_t* p) {
    return {_mm256_set1_epi32(load_int(p))};
}
template <int KIND>
static inline Dots<KIND> begin(int32_t) {
    return {_mm256_setzero_si256(), _mm256_setzero_si256()};
}
template <int KIND>
static inline Dots<KIND> dot(Dots<KIND> sums, Bytes<KIND> w, Four<KIND> x) {
    add16(sums.low, _mm256_maddubs_epi16(w.low, x.v));
    add16(sums.high, _mm256_maddubs_epi16(w.high, x.v));
    return sums;
}
template <int KIND>
static inline Floats total(Dots<KIND> sums, int32_t offset) {
    const __m256i ones = _mm256_set1_epi16(1), begun = _mm256_set1_epi32(offset);
    return {_mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(sums.low, ones), begun)),
            _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(sums.high, ones), begun))};
}

#endif

// --- activations ---

// What may not exceed MOST_OF<KIND> when activations are rounded: their sizes.
template <int KIND>
constexpr float MOST_OF = 127;
template <int KIND>
static inline Floats sizes(Floats x) {
    return magnitude(x);
}

#ifndef WIDE

// Or, of each four whose products add_eight() sums in 16 bits, what the positive or what the negative ones come to,
// whichever is more: with weights of up to 255 it may be 128, to which rounding contributes 2.
template <>
constexpr float MOST_OF<INT8> = 126;
static inline __m256 sums_of_four(__m256 x) {
    x = _mm256_add_ps(x, _mm256_permute2f128_ps(x, x, 1));
    return _mm256_add_ps(x, _mm256_permute_ps(x, 0xb1));
}
template <>
inline Floats sizes<INT8>(Floats x) {
    const Floats size = magnitude(x), sum{sums_of_four(x.low), sums_of_four(x.high)};
    return (Floats{sums_of_four(size.low), sums_of_four(size.high)} + magnitude(sum)) * all(0.5f);
}

#endif

// Sixteen of a block, and the sums of what the weights' offset counts for.
static inline void narrow_sixteen(int8_t* to, Floats x, __m256i& sums) {
    __m256 low, high;
    halves(x, low, high);
    const __m256i a = _mm256_cvtps_epi32(low), b = _mm256_cvtps_epi32(high);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    sums = _mm256_add_epi32(sums, _mm256_add_epi32(a, b));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
}

template <int KIND>
static void narrow_activations(const Activations& a, int64_t token, int64_t columns) {
    constexpr int64_t EACH = block_of(KIND);
    const int64_t blocks = (columns + EACH - 1) / EACH;
    const float* x = a.values + token * a.stride;
    for (int64_t b = 0; b < blocks; b++, x += EACH) {
        int8_t* q = a.narrow_at(token, b * EACH);
        const int64_t place = a.place<KIND>(token, b);
        Floats most = zeros(), none = zeros();
        for (int64_t i = 0; i < EACH; i += LANES) {
            const Floats v = load(x + i);
            most = larger(sizes<KIND>(v), most);
            none = fused(v, zeros(), none);  // zero, unless something is no number or infinite
        }
        const float largest = largest_of(most);
        const float most_of = largest > 4e-37f ? largest : 0.0f;  // below, the factor would be infinite
        const Floats factor = all(most_of > 0 ? MOST_OF<KIND> / most_of : 0.0f);
        __m256i sums = _mm256_setzero_si256();
        for (int64_t i = 0; i < EACH; i += LANES) narrow_sixteen(q + i, load(x + i) * factor, sums);
        __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
        s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
        a.offsets[place] = -OFFSET<KIND> * _mm_cvtsi128_si32(s);
        a.scales[place] = most_of / MOST_OF<KIND> + sum_of(none);
    }
}

// The sums of one block of columns, whose weights are at `p`. Meanwhile N lines in every step, from one panel after the
// other, are asked for, beginning at `next`.
template <int KIND, int M, int P, int N>
static inline void whole_sums(const Activations& a, int64_t token, int64_t b, int64_t columns,
                              const char* const (&p)[P], const char* const (&next)[P], Dots<KIND> (&sums)[M][P]) {
    constexpr int64_t EACH = block_of(KIND), STEP = KIND == INT4 ? 8 : 4;  // columns in 64 bytes of a panel
    constexpr int TURN = N == P ? 1 : P;  // steps that are written out, so that every panel gets its turn
    if (M > 6 && !a.few()) __builtin_unreachable();  // then all lie at places that the compiler knows
    const int64_t between = a.between(), each = a.each<KIND>();
    const int8_t* x[M];
    x[0] = a.narrow_at(token, b * EACH);
    UNROLL for (int m = 1; m < M; m++) x[m] = x[m - 1] + between;
    const int32_t* offset = a.offsets + a.place<KIND>(token, b);
    UNROLL for (int m = 0; m < M; m++, offset += each)
        UNROLL for (int i = 0; i < P; i++) sums[m][i] = begin<KIND>(*offset);
    const int64_t steps = (std::min(EACH, columns - b * EACH) + STEP - 1) / STEP;
    for (int64_t s = 0; s < steps; s += TURN)
        UNROLL for (int u = 0; u < TURN; u++) {
            Bytes<KIND> v[P], more[P];
            UNROLL for (int i = 0; i < P; i++) {
                v[i] = load_bytes<KIND>(p[i] + (s + u) * 64);
                if constexpr (KIND == INT4) more[i] = high_halves(v[i]), v[i] = low_halves(v[i]);
            }
            UNROLL for (int i = 0; i < N; i++) {
                const int n = u * N + i;
                _mm_prefetch(next[n % P] + (s * N / P + n / P) * LINE, _MM_HINT_T0);
            }
            UNROLL for (int m = 0; m < M; m++) {
                const int8_t* at = x[m] + (s + u) * STEP;
                Four<KIND> four = load_four<KIND>(at);
                UNROLL for (int i = 0; i < P; i++) sums[m][i] = dot<KIND>(sums[m][i], v[i], four);
                if constexpr (KIND == INT4) {
                    four = load_four<KIND>(at + 4);
                    UNROLL for (int i = 0; i < P; i++) sums[m][i] = dot<KIND>(sums[m][i], more[i], four);
                }
            }
        }
}

// What a block's sums are worth: by the tokens' scales and, of int4, the weights'.
template <int KIND, int M, int P>
static inline void add_block(const Activations& a, int64_t token, int64_t b, const Dots<KIND> (&sums)[M][P],
                             [[maybe_unused]] const Floats* scales, Floats (&totals)[M][P]) {
    if (M > 6 && !a.few()) __builtin_unreachable();
    const int64_t place = a.place<KIND>(token, b), each = a.each<KIND>();
    UNROLL for (int m = 0; m < M; m++) {
        const Floats of_token = all(a.scales[place + m * each]);
        UNROLL for (int i = 0; i < P; i++) {
            const Floats factor = KIND == INT4 ? of_token * scales[i] : of_token;
            totals[m][i] = fused(total<KIND>(sums[m][i], a.offsets[place + m * each]), factor, totals[m][i]);
        }
    }
}

// Totals of an int8 matrix by its rows' scales.
template <int M, int P>
static inline void scale_rows(const Matrix& w, int64_t panel, Floats (&totals)[M][P]) {
    UNROLL for (int i = 0; i < P; i++) {
        const Floats scale = load(static_cast<const float*>(w.scales) + (panel + i) * PANEL);
        UNROLL for (int m = 0; m < M; m++) totals[m][i] = totals[m][i] * scale;
    }
}

template <int KIND, int M, int P>
static void whole_tile(const Matrix& w, const Activations& a, int64_t token, int64_t panel, Floats (&totals)[M][P]) {
    constexpr int64_t EACH = block_of(KIND), BYTES = EACH * PANEL / (KIND == INT4 ? 2 : 1);  // of a block's panel
    const int64_t blocks = (w.columns + EACH - 1) / EACH;
    const int64_t groups = KIND == INT4 ? w.columns / w.group : 1, each = w.group / BLOCK;
    const char *p[P], *next[P];
    UNROLL for (int i = 0; i < P; i++) p[i] = w.panel(panel + i);
    for (int64_t b = 0; b < blocks; b++) {
        Dots<KIND> sums[M][P];
        UNROLL for (int i = 0; i < P; i++) next[i] = p[i] + AHEAD;
        whole_sums<KIND, M, P, P>(a, token, b, w.columns, p, next, sums);
        Floats scales[P];
        if constexpr (KIND == INT4)
            UNROLL for (int i = 0; i < P; i++)
                scales[i] = load_as<FLOAT16>(static_cast<const char*>(w.scales) +
                                             ((panel + i) * groups + b / each) * PANEL * 2);
        add_block<KIND, M, P>(a, token, b, sums, scales, totals);
        UNROLL for (int i = 0; i < P; i++) p[i] += BYTES;
    }
    if constexpr (KIND == INT8) scale_rows<M, P>(w, panel, totals);
}

#ifndef WIDE

// Adds what one block of int8 weights, at `weights` and `between` bytes further for each of P panels, comes to with
// `groups` of M tokens, which lie ROUND bytes apart. Meanwhile LINES lines of each panel from `next` on are asked for with
// every eight columns, the next ones `step` bytes further, and `part` bytes further for the next group. A function of its
// own, for GCC keeps the sums of a larger one in memory.
template <int M, int P, int LINES>
[[gnu::noinline]] static void add_eights(int64_t groups, const int8_t* tokens, int64_t columns, const int32_t* offsets,
                                         const float* scales, const char* weights, int64_t between, const char* next,
                                         int64_t part, int64_t step, Floats (*totals)[P]) {
    for (; groups > 0; groups--, tokens += M * ROUND, offsets += M, scales += M, next += part, totals += M) {
        __m256i sums[M][P][2];
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int i = 0; i < P; i++) sums[m][i][0] = sums[m][i][1] = _mm256_set1_epi32(offsets[m]);
        const char *p = weights, *n = next;
        for (const int8_t *x = tokens, *end = x + columns; x < end; x += 8, p += 8 * PANEL, n += step)
            UNROLL for (int i = 0; i < P; i++) {
                UNROLL for (int line = 0; line < LINES; line++)
                    _mm_prefetch(n + i * between + line * LINE, _MM_HINT_T0);
                const __m256i* const at = reinterpret_cast<const __m256i*>(p + i * between);
                const __m256i first[] = {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
                const __m256i second = _mm256_loadu_si256(at + 2);
                UNROLL for (int m = 0; m < M; m++) add_eight(sums[m][i], first, second, at[3], x + m * ROUND);
            }
        UNROLL for (int m = 0; m < M; m++) {
            const Floats factor = all(scales[m]);
            UNROLL for (int i = 0; i < P; i++) {
                const Floats sum{_mm256_cvtepi32_ps(sums[m][i][0]), _mm256_cvtepi32_ps(sums[m][i][1])};
                totals[m][i] = fused(sum, factor, totals[m][i]);
            }
        }
    }
}

#endif
