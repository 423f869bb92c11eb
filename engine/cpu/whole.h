// Products with weights of whole numbers: four or eight columns of sixteen rows at once, and one scale for a block's sum.
// Of int4 each 32 columns come to at most 32 * 8 * 127, and count by their group's number of at most 16,383: so four
// times that fits 32 bits.
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

#ifndef WIDE

// Written as instructions, because GCC moves additions of whole numbers behind all products and runs out of registers:
// eight columns of a token times sixteen rows, added to the chains of the low and of the high rows. `first` are four
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

#endif

// --- activations ---

// What may not exceed 127 when activations are rounded: their sizes.
template <int KIND>
static inline Floats sizes(Floats x) {
    return magnitude(x);
}

// AVX2 adds products in 16 bits, in chains: of 32 columns sixteen make one, the first two of every four columns, and sixteen
// the other. Whether sums overflow on the way there does not matter, as what they come to is known to fit: with int4 always,
// with int8 it is at most the norm of a row's weights times that of the activations (Cauchy and Schwarz), which are rounded
// so.
#ifdef WIDE
constexpr bool CHAINED = false;
#else
constexpr bool CHAINED = true;

// Nor may two neighbours' sums exceed it, for an instruction adds two products first and cuts off what exceeds 16 bits:
// beside weights of up to 255, 128 would fit, and rounding contributes 1.
static inline __m256 sums_of_two(__m256 x) { return _mm256_add_ps(x, _mm256_permute_ps(x, 0xb1)); }
template <>
inline Floats sizes<INT8>(Floats x) {
    return larger(magnitude(x), magnitude({sums_of_two(x.low), sums_of_two(x.high)}));
}
#endif

// Whether each 32 columns are summed for themselves, and so begin with an offset of theirs.
template <int KIND>
constexpr bool BY_RUNS = CHAINED || KIND == INT4;

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
    for (int64_t i = 0; i < ROUND<INT8>; i += BLOCK, tightness++) {
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
    const int64_t blocks = (w.columns + ROUND<KIND> - 1) / ROUND<KIND>;
    const float* x = a.values + token * a.stride;
    for (int64_t b = 0; b < blocks; b++, x += ROUND<KIND>) {
        int8_t* q = a.narrow_at<KIND>(token, b * ROUND<KIND>);
        const int64_t place = a.place<KIND>(token, b);
        Floats most = zeros(), none = zeros();
        for (int64_t i = 0; i < ROUND<KIND>; i += LANES) {
            const Floats v = load(x + i);
            most = larger(sizes<KIND>(v), most);
            none = fused(v, zeros(), none);  // zero, unless something is no number or infinite
        }
        const float largest = largest_of(most);
        const float most_of = largest > 4e-37f ? largest : 0.0f;  // below, the factor would be infinite
        float scale = most_of / 127, factor = most_of > 0 ? 127 / most_of : 0.0f;
        if constexpr (CHAINED && KIND == INT8) {
            const float more = stretch(x, factor, w.tightness + b * RUNS<INT8>);
            scale *= more;
            factor /= more;
        }
        int32_t offset = 0;
        for (int64_t i = 0; i < ROUND<KIND>; i += BLOCK) {
            __m256i sums = _mm256_setzero_si256();
            for (int64_t k = i; k < i + BLOCK; k += LANES) narrow_sixteen(q + k, load(x + k) * all(factor), sums);
            __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
            s = _mm_mullo_epi32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)), _mm_set1_epi32(-OFFSET<KIND>));
            const int32_t first = _mm_cvtsi128_si32(s), second = _mm_extract_epi32(s, 2);
            if constexpr (CHAINED)  // what the two chains begin with
                a.offsets[RUNS<KIND> * place + i / BLOCK] = int32_t(uint32_t(second) << 16 | (first & 0xffff));
            else if constexpr (BY_RUNS<KIND>)
                a.offsets[RUNS<KIND> * place + i / BLOCK] = first + second;
            else
                offset += first + second;
        }
        if constexpr (!BY_RUNS<KIND>) a.offsets[place] = offset;
        a.scales[place] = scale + sum_of(none);
    }
}

#ifdef WIDE

// What the sums of 32 columns count by: the low halves of 32 bits.
static inline __m512i load_counts(const int16_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

static inline Floats float_counts(const int16_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))))};
}

// Four columns of int4 for sixteen rows, and the next four.
static inline void load_halves(const char* p, __m512i& first, __m512i& second) {
    const __m512i both = _mm512_loadu_si512(p), low = _mm512_set1_epi8(15);
    first = _mm512_and_si512(both, low);
    second = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
}

// M tokens times P panels.
template <int M, int P>
using Dots = __m512i[M][P];

// Adds the products with so many columns, from `column` of the block on, whose weights are at `p`. Meanwhile N lines in
// every step, from one panel after the other, are asked for, beginning at `next`.
template <int KIND, int M, int P, int N>
static inline void add_columns(const int8_t* const (&x)[M], int64_t column, int64_t columns, const char* const (&p)[P],
                               const char* const (&next)[P], Dots<M, P>& sums) {
    constexpr int64_t STEP = KIND == INT4 ? 8 : 4;  // columns in 64 bytes of a panel
    constexpr int TURN = N == P ? 1 : P;  // steps that are written out, so that every panel gets its turn
    const int64_t first = column / STEP, last = first + (columns + STEP - 1) / STEP;
    for (int64_t s = first; s < last; s += TURN)
        UNROLL for (int u = 0; u < TURN; u++) {
            __m512i v[P], more[P];
            UNROLL for (int i = 0; i < P; i++) {
                const char* at = p[i] + (s + u) * LINE;
                if constexpr (KIND == INT4)
                    load_halves(at, v[i], more[i]);
                else
                    v[i] = _mm512_loadu_si512(at);
            }
            UNROLL for (int i = 0; i < N; i++) {
                const int n = u * N + i;
                _mm_prefetch(next[n % P] + (s * N / P + n / P) * LINE, _MM_HINT_T0);
            }
            UNROLL for (int m = 0; m < M; m++) {
                const int8_t* at = x[m] + (s + u) * STEP;
                __m512i four = _mm512_set1_epi32(load_int(at));
                UNROLL for (int i = 0; i < P; i++) sums[m][i] = add_bytes(sums[m][i], v[i], four);
                if constexpr (KIND == INT4) {
                    four = _mm512_set1_epi32(load_int(at + 4));
                    UNROLL for (int i = 0; i < P; i++) sums[m][i] = add_bytes(sums[m][i], more[i], four);
                }
            }
        }
}

// The sums of one block of columns, whose weights are at `p`; the rest as above.
template <int KIND, int M, int P, int N>
static inline void whole_sums(const Matrix& w, const Activations& a, int64_t token, int64_t panel, int64_t b,
                              const char* const (&p)[P], const char* const (&next)[P], Dots<M, P>& sums) {
    if (M > 6 && !a.few()) __builtin_unreachable();  // then all lie at places that the compiler knows
    const int64_t between = a.between<KIND>(), each = a.each<KIND>();
    const int64_t columns = std::min(ROUND<KIND>, w.columns - b * ROUND<KIND>);
    const int8_t* x[M];
    x[0] = a.narrow_at<KIND>(token, b * ROUND<KIND>);
    UNROLL for (int m = 1; m < M; m++) x[m] = x[m - 1] + between;
    const int32_t* offset = a.offsets + a.place<KIND>(token, b) * (BY_RUNS<KIND> ? RUNS<KIND> : 1);
    if constexpr (KIND == INT8) {
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int i = 0; i < P; i++) sums[m][i] = _mm512_set1_epi32(offset[m * each]);
        add_columns<KIND, M, P, N>(x, 0, columns, p, next, sums);
    } else {
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int i = 0; i < P; i++) sums[m][i] = _mm512_setzero_si512();
        const int64_t next_panel = w.counts_between();
        for (int64_t k = 0; k < columns; k += BLOCK, offset++) {
            const int16_t* const count = w.counts_at(panel, b * ROUND<KIND> + k);
            Dots<M, P> run;
            __m512i counts[P];
            UNROLL for (int m = 0; m < M; m++)
                UNROLL for (int i = 0; i < P; i++) run[m][i] = _mm512_set1_epi32(offset[m * each * RUNS<KIND>]);
            add_columns<KIND, M, P, N>(x, k, BLOCK, p, next, run);
            UNROLL for (int i = 0; i < P; i++) counts[i] = load_counts(count + i * next_panel);
            UNROLL for (int m = 0; m < M; m++)
                UNROLL for (int i = 0; i < P; i++) sums[m][i] = add_counted(sums[m][i], run[m][i], counts[i]);
        }
    }
}

// What a block's sums are worth, but for the rows' scales.
template <int KIND, int M, int P>
static inline void add_block(const Activations& a, int64_t token, int64_t b, const Dots<M, P>& sums,
                             Floats (&totals)[M][P]) {
    if (M > 6 && !a.few()) __builtin_unreachable();
    const float* scale = a.scales + a.place<KIND>(token, b);
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int i = 0; i < P; i++)
            totals[m][i] = fused(Floats{_mm512_cvtepi32_ps(sums[m][i])}, all(scale[m * a.each<KIND>()]), totals[m][i]);
}

template <int M, int P>
static inline void scale_rows(const Matrix& w, int64_t panel, Floats (&totals)[M][P]) {
    UNROLL for (int i = 0; i < P; i++) {
        const Floats scale = load(w.scales + (panel + i) * PANEL);
        UNROLL for (int m = 0; m < M; m++) totals[m][i] = totals[m][i] * scale;
    }
}

template <int KIND, int M, int P>
static void whole_tile(const Matrix& w, const Activations& a, int64_t token, int64_t panel, Floats (&totals)[M][P]) {
    constexpr int64_t BYTES = ROUND<KIND> * PANEL / (KIND == INT4 ? 2 : 1);  // of a block's panel
    const char *p[P], *next[P];
    UNROLL for (int i = 0; i < P; i++) p[i] = w.panel(panel + i);
    for (int64_t b = 0; b * ROUND<KIND> < w.columns; b++) {
        Dots<M, P> sums;
        UNROLL for (int i = 0; i < P; i++) next[i] = p[i] + AHEAD;
        whole_sums<KIND, M, P, P>(w, a, token, panel, b, p, next, sums);
        add_block<KIND, M, P>(a, token, b, sums, totals);
        UNROLL for (int i = 0; i < P; i++) p[i] += BYTES;
    }
    scale_rows<M, P>(w, panel, totals);
}

#else

template <int KIND>
constexpr int64_t EIGHT = 8 * PANEL / (KIND == INT4 ? 2 : 1);  // bytes of eight columns

// What the sums of 32 columns count by, for the low and the high rows.
using Counts = __m256i[2];

static inline void load_counts(const int16_t* p, Counts& to) {
    UNROLL for (int i = 0; i < 2; i++) {
        const __m256i low = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i));
        to[i] = _mm256_or_si256(low, _mm256_slli_epi32(low, 16));
    }
}

// Four columns of sixteen rows, and the next four.
template <int KIND>
static inline void load_eight(const char* p, __m256i (&first)[2], __m256i (&second)[2]) {
    const __m256i* const at = reinterpret_cast<const __m256i*>(p);
    const __m256i low = _mm256_set1_epi8(15);
    UNROLL for (int i = 0; i < 2; i++) {
        first[i] = _mm256_loadu_si256(at + i);
        if constexpr (KIND == INT8) {
            second[i] = _mm256_loadu_si256(at + 2 + i);
        } else {
            second[i] = _mm256_and_si256(_mm256_srli_epi16(first[i], 4), low);
            first[i] = _mm256_and_si256(first[i], low);
        }
    }
}

// Adds what one block of weights, at `weights` and `between` bytes further for each of P panels, comes to with `groups` of
// M tokens, which lie ROUND bytes apart. Meanwhile LINES lines of each panel from `next` on are asked for with every eight
// columns, the next ones `step` bytes further, and `part` bytes further for the next group. A function of its own, for GCC
// keeps the chains of a larger one in memory.
template <int KIND, int M, int P, int LINES>
[[gnu::noinline]] static void add_eights(int64_t groups, const int8_t* tokens, int64_t columns, const int32_t* offsets,
                                         const float* scales, const char* weights, int64_t between,
                                         [[maybe_unused]] const Counts (*counts)[P], const char* next, int64_t part,
                                         int64_t step, Floats (*totals)[P]) {
    constexpr int64_t BYTES = ROUND<KIND>, N = RUNS<KIND>;
    for (; groups > 0; groups--, tokens += M * BYTES, offsets += M * N, scales += M, next += part, totals += M) {
        __m256i sums[M][P][2] = {};
        const char *p = weights, *n = next;
        for (int64_t run = 0; run * BLOCK < columns; run++) {
            const int8_t* x = tokens + run * BLOCK;
            __m256i chains[M][P][2];
            UNROLL for (int m = 0; m < M; m++)
                UNROLL for (int i = 0; i < P; i++)
                    chains[m][i][0] = chains[m][i][1] = _mm256_set1_epi32(offsets[m * N + run]);
            UNROLL for (int k = 0; k < BLOCK; k += 8, x += 8, p += EIGHT<KIND>, n += step)
                UNROLL for (int i = 0; i < P; i++) {
                    UNROLL for (int line = 0; line < LINES; line++)
                        _mm_prefetch(n + i * between + line * LINE, _MM_HINT_T0);
                    __m256i first[2], second[2];
                    load_eight<KIND>(p + i * between, first, second);
                    UNROLL for (int m = 0; m < M; m++) add_eight(chains[m][i], first, second, x + m * BYTES);
                }
            UNROLL for (int m = 0; m < M; m++)
                UNROLL for (int i = 0; i < P; i++)
                    UNROLL for (int h = 0; h < 2; h++) {
                        const __m256i count = KIND == INT4 ? counts[run][i][h] : _mm256_set1_epi16(1);
                        sums[m][i][h] = _mm256_add_epi32(sums[m][i][h], _mm256_madd_epi16(chains[m][i][h], count));
                    }
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
