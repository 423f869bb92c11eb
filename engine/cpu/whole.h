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
// Eight columns of a token times sixteen rows, added to the chains of the low and of the high rows: `first` are four
// columns of these rows, `second` the other four.
static inline void add_eight(__m256i (&chains)[2], const __m256i (&first)[2], const __m256i (&second)[2],
                             const int8_t* x) {
    __m256i a, b;
    asm volatile(
        "vpbroadcastd %4, %0\n\tvpmaddubsw %0, %6, %1\n\tvpmaddubsw %0, %7, %0\n\t"
        "vpaddw %1, %2, %2\n\tvpaddw %0, %3, %3\n\t"
        "vpbroadcastd %5, %0\n\tvpmaddubsw %0, %8, %1\n\tvpmaddubsw %0, %9, %0\n\t"
        "vpaddw %1, %2, %2\n\tvpaddw %0, %3, %3"
        : "=&x"(a), "=&x"(b), "+x"(chains[0]), "+x"(chains[1])
        : "m"(*reinterpret_cast<const int8_t(*)[4]>(x)), "m"(*reinterpret_cast<const int8_t(*)[4]>(x + 4)),
          "x"(first[0]), "x"(first[1]), "x"(second[0]), "x"(second[1]));
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

// What may not exceed 127 when activations are rounded: their sizes.
template <int KIND>
static inline Floats sizes(Floats x) {
    return magnitude(x);
}

// Products with int8 are added in 16 bits by AVX2, in chains: of 32 columns sixteen make one, the first two of every four
// columns, and sixteen the other. Whether sums overflow on the way there does not matter, as what they come to is known to
// fit: it is at most the norm of a row's weights times that of the activations (Cauchy and Schwarz), which are rounded so.
#ifdef WIDE
template <int KIND>
constexpr bool CHAINED = false;
#else
template <int KIND>
constexpr bool CHAINED = KIND == INT8;

// Nor may two neighbours' sums exceed it, for an instruction adds two products first and cuts off what exceeds 16 bits:
// beside weights of up to 255, 128 would fit, and rounding contributes 1.
static inline __m256 sums_of_two(__m256 x) { return _mm256_add_ps(x, _mm256_permute_ps(x, 0xb1)); }
template <>
inline Floats sizes<INT8>(Floats x) {
    return larger(magnitude(x), magnitude({sums_of_two(x.low), sums_of_two(x.high)}));
}
#endif

// Of 32 columns of all rows, from `run` on to before `last`: 1 by the square of what the norm of a chain's activations
// may be before they are rounded, which adds at most 2 to it.
static void measure_chains(const Matrix& w, int64_t run, int64_t last, float (*tightness)[2]) {
    for (; run < last; run++) {
        __m256i most = _mm256_setzero_si256();  // of a row's squares, for the two chains in turns
        for (int64_t panel = 0; panel < w.panels(); panel++) {
            const char* p = w.panel(panel) + run * BLOCK * PANEL;
            __m256i sums[4] = {};
            for (int64_t k = 0; k < BLOCK; k += 4, p += 4 * PANEL)
                UNROLL for (int i = 0; i < 4; i++) {
                    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i);
                    const __m256i v = _mm256_cvtepi8_epi16(_mm_xor_si128(bytes, _mm_set1_epi8(-128)));
                    sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(v, v));
                }
            UNROLL for (int i = 0; i < 4; i++) most = _mm256_max_epi32(most, sums[i]);
        }
        int32_t squares[8];
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(squares), most);
        for (int i = 0; i < 2; i++) {
            const int32_t largest = std::max({squares[i], squares[i + 2], squares[i + 4], squares[i + 6]});
            const float longest = 32767 / std::sqrt(float(largest)) - 2.01f;
            tightness[run][i] = 1 / (longest * longest);
        }
    }
}

// How much longer than it may be is the longest chain of a block's activations, or 1.
static inline float stretch(const float* x, float factor, const float (*tightness)[2]) {
    __m128 most = _mm_set1_ps(1);
    for (int64_t i = 0; i < ROUND; i += BLOCK, tightness++) {
        __m256 squares = _mm256_setzero_ps();
        for (int64_t k = i; k < i + BLOCK; k += 8) {
            const __m256 v = _mm256_mul_ps(_mm256_loadu_ps(x + k), _mm256_set1_ps(factor));
            squares = _mm256_fmadd_ps(v, v, squares);
        }
        const __m128 fours = _mm_add_ps(_mm256_castps256_ps128(squares), _mm256_extractf128_ps(squares, 1));
        const __m128 chains = _mm_add_ps(fours, _mm_permute_ps(fours, 0xb1));
        const __m128 each = _mm_castpd_ps(_mm_load_sd(reinterpret_cast<const double*>(tightness)));
        most = _mm_max_ps(_mm_mul_ps(chains, _mm_unpacklo_ps(each, each)), most);
    }
    return std::sqrt(std::max(_mm_cvtss_f32(most), _mm_cvtss_f32(_mm_movehl_ps(most, most))));
}

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
static void narrow_activations(const Activations& a, int64_t token, const Matrix& w) {
    constexpr int64_t EACH = block_of(KIND);
    const int64_t blocks = (w.columns + EACH - 1) / EACH;
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
        float scale = most_of / 127, factor = most_of > 0 ? 127 / most_of : 0.0f;
        if constexpr (CHAINED<KIND>) {
            const float more = stretch(x, factor, w.tightness + b * EACH / BLOCK);
            scale *= more;
            factor /= more;
        }
        int32_t offset = 0;
        for (int64_t i = 0; i < EACH; i += BLOCK) {
            __m256i sums = _mm256_setzero_si256();
            for (int64_t k = i; k < i + BLOCK; k += LANES) narrow_sixteen(q + k, load(x + k) * all(factor), sums);
            __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
            s = _mm_mullo_epi32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)), _mm_set1_epi32(-OFFSET<KIND>));
            const int32_t first = _mm_cvtsi128_si32(s), second = _mm_extract_epi32(s, 2);
            if constexpr (CHAINED<KIND>)  // what the two chains begin with
                a.offsets[EACH / BLOCK * place + i / BLOCK] = int32_t(uint32_t(second) << 16 | (first & 0xffff));
            else
                offset += first + second;
        }
        if constexpr (!CHAINED<KIND>) a.offsets[place] = offset;
        a.scales[place] = scale + sum_of(none);
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
// own, for GCC keeps the chains of a larger one in memory.
template <int M, int P, int LINES>
[[gnu::noinline]] static void add_eights(int64_t groups, const int8_t* tokens, int64_t columns, const int32_t* offsets,
                                         const float* scales, const char* weights, int64_t between, const char* next,
                                         int64_t part, int64_t step, Floats (*totals)[P]) {
    constexpr int64_t RUNS = ROUND / BLOCK;
    for (; groups > 0; groups--, tokens += M * ROUND, offsets += M * RUNS, scales += M, next += part, totals += M) {
        __m256i sums[M][P][2] = {};
        const char *p = weights, *n = next;
        const int32_t* offset = offsets;
        for (const int8_t *x = tokens, *end = x + columns; x < end; offset++) {
            __m256i chains[M][P][2];
            UNROLL for (int m = 0; m < M; m++)
                UNROLL for (int i = 0; i < P; i++)
                    chains[m][i][0] = chains[m][i][1] = _mm256_set1_epi32(offset[m * RUNS]);
            UNROLL for (int k = 0; k < BLOCK; k += 8, x += 8, p += 8 * PANEL, n += step)
                UNROLL for (int i = 0; i < P; i++) {
                    UNROLL for (int line = 0; line < LINES; line++)
                        _mm_prefetch(n + i * between + line * LINE, _MM_HINT_T0);
                    const __m256i* const at = reinterpret_cast<const __m256i*>(p + i * between);
                    const __m256i first[] = {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
                    const __m256i second[] = {_mm256_loadu_si256(at + 2), _mm256_loadu_si256(at + 3)};
                    UNROLL for (int m = 0; m < M; m++) add_eight(chains[m][i], first, second, x + m * ROUND);
                }
            UNROLL for (int m = 0; m < M; m++)
                UNROLL for (int i = 0; i < P; i++)
                    UNROLL for (int h = 0; h < 2; h++)
                        sums[m][i][h] = _mm256_add_epi32(
                            sums[m][i][h], _mm256_madd_epi16(chains[m][i][h], _mm256_set1_epi16(1)));
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
