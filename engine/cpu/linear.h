// Products of activations with packed weights: y = x W^T for a range of panels.
//
// A panel holds PANEL rows of a weight matrix, column by column, so that one instruction works on eight rows and an
// activation is broadcast to them. Every output is summed over the columns in one fixed order, whatever the number of
// tokens: a sequence's numbers do not depend on who shares its step.
//
//   float32, float16   [panel][column][16]
//   bfloat16           [panel][column][8][2]: rows r and r + 8 side by side, so that a shift and a mask widen them
//   int8               [panel][column / 2][16][2], one scale per row; activations are 16 bits wide
//   int4               [panel][column / 32][4][2][8][4]: bytes of two columns that are four apart, unsigned with an
//                      offset of 8; scales [panel][column / group][16] in float16; activations are 8 bits wide
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT8 = 3, INT4 = 4 };

#define UNROLL _Pragma("GCC unroll 16")

constexpr int64_t PANEL = 16;
constexpr int64_t BLOCK = 32;  // columns that share one activation scale beside int4 weights
constexpr int64_t CHUNK = 4;   // panels that a thread takes at once

struct Matrix {
    int32_t kind;
    int32_t group;  // columns that share one int4 scale
    int64_t rows;
    int64_t columns;
    const void* data;
    const void* scales;

    int64_t panels() const { return (rows + PANEL - 1) / PANEL; }
    int64_t panel_bytes() const {
        switch (kind) {
            case FLOAT32: return PANEL * columns * 4;
            case INT8: return PANEL * columns;
            case INT4: return PANEL * columns / 2;
            default: return PANEL * columns * 2;
        }
    }
};

// The tokens of a step, in whatever form the next matrix wants them.
struct Activations {
    float* values;      // [token][stride]
    int16_t* wide;      // [token][stride], for int8 weights
    int8_t* narrow;     // [token][stride], for int4 weights
    float* scales;      // [token] for int8, [token][stride / BLOCK] for int4
    int32_t* offsets;   // [token][stride / BLOCK]: eight times the sum of a block, for int4's unsigned weights
    int64_t stride;
};

static inline __m256 widen_bfloat16(__m128i v) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}

static inline float sum_of(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

static inline float largest_of(__m256 v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

// --- activations ---

static inline float largest_magnitude(const float* x, int64_t count) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 most = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) most = _mm256_max_ps(_mm256_andnot_ps(sign, _mm256_loadu_ps(x + i)), most);
    float result = largest_of(most);
    for (; i < count; i++) result = std::max(result, std::fabs(x[i]));
    return result;
}

// As wide as a sum of `columns` products with int8 fits 32 bits: 13 bits for 2048 columns, 11 for 11008.
static inline void widen_activations(const Activations& a, int64_t token, int64_t columns) {
    const float* x = a.values + token * a.stride;
    int16_t* q = a.wide + token * a.stride;
    const float most = float(std::min<int64_t>(32767, 2147483647 / (127 * columns)));
    const float magnitude = largest_magnitude(x, columns);
    const float inverse = magnitude > 0 ? most / magnitude : 0.0f;
    const __m256 factor = _mm256_set1_ps(inverse);
    a.scales[token] = magnitude / most;
    int64_t i = 0;
    for (; i + 8 <= columns; i += 8) {
        const __m256i v = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), factor));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i),
                         _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
    }
    for (; i < columns; i++) q[i] = int16_t(std::nearbyint(x[i] * inverse));
}

static inline void narrow_activations(const Activations& a, int64_t token, int64_t columns) {
    const float* x = a.values + token * a.stride;
    int8_t* q = a.narrow + token * a.stride;
    float* scales = a.scales + token * (a.stride / BLOCK);
    int32_t* offsets = a.offsets + token * (a.stride / BLOCK);
    for (int64_t b = 0; b < columns / BLOCK; b++, x += BLOCK, q += BLOCK) {
        const float magnitude = largest_magnitude(x, BLOCK);
        const __m256 factor = _mm256_set1_ps(magnitude > 0 ? 127.0f / magnitude : 0.0f);
        __m256i v[4], sum = _mm256_setzero_si256();
        UNROLL for (int i = 0; i < 4; i++) {
            v[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), factor));
            sum = _mm256_add_epi32(sum, v[i]);
        }
        __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
        packed = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), packed);
        __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
        s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
        offsets[b] = 8 * _mm_cvtsi128_si32(s);
        scales[b] = magnitude / 127.0f;
    }
}

// Bring a token into the form that the matrix wants; floats are used as they are.
static inline void prepare(const Activations& a, int64_t token, const Matrix& w) {
    if (w.kind == INT8) widen_activations(a, token, w.columns);
    if (w.kind == INT4) narrow_activations(a, token, w.columns);
}

// --- products: M tokens, P panels ---

// Written as instructions, because GCC moves additions of whole numbers behind all products and runs out of registers.
static inline void add32(__m256i& sum, __m256i v) { asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(v)); }
static inline void add16(__m256i& sum, __m256i v) { asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(v)); }

static inline void put(float* y, __m256 v, bool add) {
    _mm256_storeu_ps(y, add ? _mm256_add_ps(_mm256_loadu_ps(y), v) : v);
}

template <int KIND>
static inline void load_column(const char* w, __m256& low, __m256& high) {
    if constexpr (KIND == FLOAT32) {
        low = _mm256_loadu_ps(reinterpret_cast<const float*>(w));
        high = _mm256_loadu_ps(reinterpret_cast<const float*>(w) + 8);
    } else if constexpr (KIND == BFLOAT16) {
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
        low = _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
        high = _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(int(0xffff0000))));
    } else {
        low = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
        high = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w) + 1));
    }
}

template <int KIND, int M, int P>
static void float_tile(const Matrix& w, const Activations& a, int64_t token, int64_t panel, float* y, int64_t stride,
                       bool add) {
    constexpr int64_t STEP = PANEL * (KIND == FLOAT32 ? 4 : 2);
    const float* x[M];
    const char* p[P];
    UNROLL for (int m = 0; m < M; m++) x[m] = a.values + (token + m) * a.stride;
    UNROLL for (int i = 0; i < P; i++) p[i] = static_cast<const char*>(w.data) + (panel + i) * w.panel_bytes();
    __m256 sums[M][P][2];
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int i = 0; i < P; i++) sums[m][i][0] = sums[m][i][1] = _mm256_setzero_ps();
    for (int64_t k = 0; k < w.columns; k++) {
        __m256 low[P], high[P];
        UNROLL for (int i = 0; i < P; i++) load_column<KIND>(p[i] + k * STEP, low[i], high[i]);
        UNROLL for (int m = 0; m < M; m++) {
            const __m256 v = _mm256_broadcast_ss(x[m] + k);
            UNROLL for (int i = 0; i < P; i++) {
                sums[m][i][0] = _mm256_fmadd_ps(low[i], v, sums[m][i][0]);
                sums[m][i][1] = _mm256_fmadd_ps(high[i], v, sums[m][i][1]);
            }
        }
    }
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int i = 0; i < P; i++)
            UNROLL for (int half = 0; half < 2; half++)
                put(y + (token + m) * stride + (panel + i) * PANEL + 8 * half, sums[m][i][half], add);
}

template <int M, int P>
static void int8_tile(const Matrix& w, const Activations& a, int64_t token, int64_t panel, float* y, int64_t stride,
                      bool add) {
    const int16_t* x[M];
    const char* p[P];
    UNROLL for (int m = 0; m < M; m++) x[m] = a.wide + (token + m) * a.stride;
    UNROLL for (int i = 0; i < P; i++) p[i] = static_cast<const char*>(w.data) + (panel + i) * w.panel_bytes();
    __m256i sums[M][P][2];
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int i = 0; i < P; i++) sums[m][i][0] = sums[m][i][1] = _mm256_setzero_si256();
    for (int64_t k = 0; k < w.columns; k += 2) {
        __m256i low[P], high[P];
        UNROLL for (int i = 0; i < P; i++) {
            const __m128i* v = reinterpret_cast<const __m128i*>(p[i] + k * PANEL);
            low[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128(v));
            high[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128(v + 1));
        }
        UNROLL for (int m = 0; m < M; m++) {
            int32_t pair;
            std::memcpy(&pair, x[m] + k, 4);
            const __m256i v = _mm256_set1_epi32(pair);
            UNROLL for (int i = 0; i < P; i++) {
                add32(sums[m][i][0], _mm256_madd_epi16(low[i], v));
                add32(sums[m][i][1], _mm256_madd_epi16(high[i], v));
            }
        }
    }
    const float* scales = static_cast<const float*>(w.scales) + panel * PANEL;
    UNROLL for (int m = 0; m < M; m++) {
        const __m256 scale = _mm256_set1_ps(a.scales[token + m]);
        UNROLL for (int i = 0; i < P; i++)
            UNROLL for (int half = 0; half < 2; half++) {
                const int64_t row = i * PANEL + 8 * half;
                const __m256 factor = _mm256_mul_ps(_mm256_loadu_ps(scales + row), scale);
                const __m256 v = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[m][i][half]), factor);
                put(y + (token + m) * stride + panel * PANEL + row, v, add);
            }
    }
}

// Eight products of at most 15 * 127 * 2 fit 16 bits, so a block is summed there before it is widened.
template <int M>
static void int4_tile(const Matrix& w, const Activations& a, int64_t token, int64_t panel, float* y, int64_t stride,
                      bool add) {
    const int64_t blocks = w.columns / BLOCK, each = w.group / BLOCK, per_token = a.stride / BLOCK;
    const char* p = static_cast<const char*>(w.data) + panel * w.panel_bytes();
    const __m128i* scales = static_cast<const __m128i*>(w.scales) + panel * (blocks / each) * 2;
    const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256 totals[M][2];
    UNROLL for (int m = 0; m < M; m++) totals[m][0] = totals[m][1] = _mm256_setzero_ps();
    for (int64_t b = 0; b < blocks; b++) {
        __m256i sums[M][2];
        UNROLL for (int m = 0; m < M; m++) sums[m][0] = sums[m][1] = _mm256_setzero_si256();
        UNROLL for (int j = 0; j < 4; j++, p += 64) {
            const __m256i v0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
            const __m256i v1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32));
            const __m256i near0 = _mm256_and_si256(v0, mask), near1 = _mm256_and_si256(v1, mask);
            const __m256i far0 = _mm256_and_si256(_mm256_srli_epi16(v0, 4), mask);
            const __m256i far1 = _mm256_and_si256(_mm256_srli_epi16(v1, 4), mask);
            UNROLL for (int m = 0; m < M; m++) {
                int32_t near, far;
                const int8_t* x = a.narrow + (token + m) * a.stride + b * BLOCK + 8 * j;
                std::memcpy(&near, x, 4);
                std::memcpy(&far, x + 4, 4);
                const __m256i xn = _mm256_set1_epi32(near), xf = _mm256_set1_epi32(far);
                add16(sums[m][0], _mm256_maddubs_epi16(near0, xn));
                add16(sums[m][1], _mm256_maddubs_epi16(near1, xn));
                add16(sums[m][0], _mm256_maddubs_epi16(far0, xf));
                add16(sums[m][1], _mm256_maddubs_epi16(far1, xf));
            }
        }
        const __m128i* scale = scales + (b / each) * 2;
        const __m256 low = _mm256_cvtph_ps(_mm_loadu_si128(scale)), high = _mm256_cvtph_ps(_mm_loadu_si128(scale + 1));
        UNROLL for (int m = 0; m < M; m++) {
            const __m256 factor = _mm256_set1_ps(a.scales[(token + m) * per_token + b]);
            const __m256i offset = _mm256_set1_epi32(a.offsets[(token + m) * per_token + b]);
            const __m256 v0 = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_madd_epi16(sums[m][0], ones), offset));
            const __m256 v1 = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_madd_epi16(sums[m][1], ones), offset));
            totals[m][0] = _mm256_fmadd_ps(v0, _mm256_mul_ps(low, factor), totals[m][0]);
            totals[m][1] = _mm256_fmadd_ps(v1, _mm256_mul_ps(high, factor), totals[m][1]);
        }
    }
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int half = 0; half < 2; half++)
            put(y + (token + m) * stride + panel * PANEL + 8 * half, totals[m][half], add);
}

template <int KIND, int M, int P>
static inline void tile(const Matrix& w, const Activations& a, int64_t token, int64_t panel, float* y, int64_t stride,
                        bool add) {
    if constexpr (KIND == INT4)
        int4_tile<M>(w, a, token, panel, y, stride, add);
    else if constexpr (KIND == INT8)
        int8_tile<M, P>(w, a, token, panel, y, stride, add);
    else
        float_tile<KIND, M, P>(w, a, token, panel, y, stride, add);
}

// M tokens over some panels, P at once: few tokens need several panels to keep the multipliers busy.
template <int KIND, int M, int P>
static void tokens_over(const Matrix& w, const Activations& a, int64_t token, int64_t first, int64_t last, float* y,
                        int64_t stride, bool add) {
    int64_t panel = first;
    for (; panel + P <= last; panel += P) tile<KIND, M, P>(w, a, token, panel, y, stride, add);
    if constexpr (P > 1)
        for (; panel < last; panel++) tile<KIND, M, 1>(w, a, token, panel, y, stride, add);
}

template <int KIND>
static void panels_of(const Matrix& w, const Activations& a, int64_t tokens, int64_t first, int64_t last, float* y,
                      int64_t stride, bool add) {
    constexpr int64_t MOST = KIND == INT4 ? 4 : 6;
    const int64_t tiles = (tokens + MOST - 1) / MOST;
    int64_t token = 0;
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t count = (tokens - token) / (tiles - i) + ((tokens - token) % (tiles - i) != 0);
        constexpr int FEW = KIND == INT4 ? 1 : 4;
        switch (count) {
            case 1: tokens_over<KIND, 1, FEW>(w, a, token, first, last, y, stride, add); break;
            case 2: tokens_over<KIND, 2, FEW == 4 ? 2 : 1>(w, a, token, first, last, y, stride, add); break;
            case 3: tokens_over<KIND, 3, FEW == 4 ? 2 : 1>(w, a, token, first, last, y, stride, add); break;
            case 4: tokens_over<KIND, 4, 1>(w, a, token, first, last, y, stride, add); break;
            case 5: tokens_over<KIND, 5, 1>(w, a, token, first, last, y, stride, add); break;
            default: tokens_over<KIND, 6, 1>(w, a, token, first, last, y, stride, add); break;
        }
        token += count;
    }
}

// y[token][row] (+)= x[token] . w[row] for the panels from `first` to before `last`.
static void multiply(const Matrix& w, const Activations& a, int64_t tokens, int64_t first, int64_t last, float* y,
                     int64_t stride, bool add) {
    switch (w.kind) {
        case FLOAT32: return panels_of<FLOAT32>(w, a, tokens, first, last, y, stride, add);
        case BFLOAT16: return panels_of<BFLOAT16>(w, a, tokens, first, last, y, stride, add);
        case FLOAT16: return panels_of<FLOAT16>(w, a, tokens, first, last, y, stride, add);
        case INT8: return panels_of<INT8>(w, a, tokens, first, last, y, stride, add);
        default: return panels_of<INT4>(w, a, tokens, first, last, y, stride, add);
    }
}
