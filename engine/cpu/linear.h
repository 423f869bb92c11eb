// Products of activations with packed weights: y = x W^T for a range of panels.
//
// A panel holds PANEL rows of a weight matrix, column by column, so that one instruction works on its rows and an
// activation is broadcast to them. Every output is summed over the columns in one fixed order, whatever the number of
// tokens: a sequence's numbers do not depend on who shares its step.
//
//   float32, float16   [panel][column][16]
//   bfloat16           [panel][column / 2][16][2], filled up to 32 columns; where the CPU multiplies pairs, activations
//                      are bfloat16 too
//   int8               [panel][column / 4][16][4], filled up to 64 columns, unsigned with an offset of 128, one scale
//                      per row; activations are 8 bits wide with a scale for every 128
//   int4               [panel][column / 8][16][4]: bytes of two columns that are four apart, unsigned with an offset of
//                      8; scales [panel][column / group][16] in float16; activations have a scale for every 32
#pragma once

#include "vector.h"

constexpr int64_t PANEL = LANES;
constexpr int64_t BLOCK = 32;   // columns that share one activation scale beside int4 weights
constexpr int64_t ROUND = 128;  // the same beside int8, and what activations are filled up to with zeros
constexpr int64_t CHUNK = 4;    // panels that a thread takes at once
constexpr int64_t AHEAD = 2048;  // bytes of a panel that are asked for before they are needed

constexpr int64_t block_of(int kind) { return kind == INT4 ? BLOCK : ROUND; }

static int64_t padded(int64_t count) { return (count + ROUND - 1) / ROUND * ROUND; }

// How far apart tokens lie: not a power of two, for then they would all compete for the same few lines of the cache.
static int64_t stride_of(int64_t count) { return padded(count) + ROUND; }

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
            case FLOAT16: return PANEL * columns * 2;
            case BFLOAT16: return PANEL * ((columns + 31) / 32 * 32) * 2;
            case INT8: return PANEL * ((columns + 63) / 64 * 64);
            default: return PANEL * columns / 2;
        }
    }
};

// The tokens of a step, in whatever form the next matrix wants them.
struct Activations {
    float* values;     // [token][stride]
    uint16_t* pairs;   // [token][stride], for bfloat16 weights
    int8_t* narrow;    // [token][stride], for weights of whole numbers
    float* scales;     // [token][stride / block]
    int32_t* offsets;  // [token][stride / block]: what the weights' offset adds to a block's sum, to be taken away
    int64_t stride;
};

// --- weights of whole numbers: four columns of sixteen rows, and their products with four activations ---

#ifdef WIDE

struct Bytes {
    __m512i v;
};
template <int KIND>
struct Dots {
    __m512i v;
};
template <int KIND>
constexpr int32_t OFFSET = KIND == INT4 ? 8 : 128;

static inline Bytes load_bytes(const char* p) { return {_mm512_loadu_si512(p)}; }
static inline Bytes low_halves(Bytes x) { return {_mm512_and_si512(x.v, _mm512_set1_epi8(15))}; }
static inline Bytes high_halves(Bytes x) {
    return {_mm512_and_si512(_mm512_srli_epi16(x.v, 4), _mm512_set1_epi8(15))};
}
template <int KIND>
static inline Dots<KIND> begin(int32_t offset) {
    return {_mm512_set1_epi32(-offset)};
}
template <int KIND>
static inline Dots<KIND> dot(Dots<KIND> sums, Bytes w, int32_t four) {
    return {add_bytes(sums.v, w.v, _mm512_set1_epi32(four))};
}
template <int KIND>
static inline Floats total(Dots<KIND> sums, int32_t) {
    return {_mm512_cvtepi32_ps(sums.v)};
}

#else

struct Bytes {
    __m256i low, high;
};
// Beside int8 the sums are 32 bits wide; beside int4 sixteen, where a block's eight products of at most 15 * 127 * 2 fit.
template <int KIND>
struct Dots {
    __m256i low, high;
};
template <int KIND>
constexpr int32_t OFFSET = KIND == INT4 ? 8 : 0;

// Written as instructions, because GCC moves additions of whole numbers behind all products and runs out of registers.
static inline void add32(__m256i& sum, __m256i v) { asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(v)); }
static inline void add16(__m256i& sum, __m256i v) { asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(v)); }

static inline Bytes load_bytes(const char* p) {
    const __m256i* v = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1)};
}
static inline Bytes low_halves(Bytes x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.low, mask), _mm256_and_si256(x.high, mask)};
}
static inline Bytes high_halves(Bytes x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(_mm256_srli_epi16(x.low, 4), mask), _mm256_and_si256(_mm256_srli_epi16(x.high, 4), mask)};
}
template <int KIND>
static inline Dots<KIND> begin(int32_t) {
    return {_mm256_setzero_si256(), _mm256_setzero_si256()};
}
// Bytes have no signed product: the sign of the weight goes to the activation.
static inline __m256i signed_products(__m256i w, __m256i x) {
    w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
template <int KIND>
static inline Dots<KIND> dot(Dots<KIND> sums, Bytes w, int32_t four) {
    const __m256i x = _mm256_set1_epi32(four);
    if constexpr (KIND == INT4) {
        add16(sums.low, _mm256_maddubs_epi16(w.low, x));
        add16(sums.high, _mm256_maddubs_epi16(w.high, x));
    } else {
        add32(sums.low, signed_products(w.low, x));
        add32(sums.high, signed_products(w.high, x));
    }
    return sums;
}
template <int KIND>
static inline Floats total(Dots<KIND> sums, int32_t offset) {
    if constexpr (KIND == INT4) {
        const __m256i ones = _mm256_set1_epi16(1), less = _mm256_set1_epi32(offset);
        sums.low = _mm256_sub_epi32(_mm256_madd_epi16(sums.low, ones), less);
        sums.high = _mm256_sub_epi32(_mm256_madd_epi16(sums.high, ones), less);
    }
    return {_mm256_cvtepi32_ps(sums.low), _mm256_cvtepi32_ps(sums.high)};
}

#endif

// --- activations ---

static inline void narrow_sixteen(int8_t* to, Floats x, __m256i& sums) {
    __m256 low, high;
    halves(x, low, high);
    const __m256i a = _mm256_cvtps_epi32(low), b = _mm256_cvtps_epi32(high);
    sums = _mm256_add_epi32(sums, _mm256_add_epi32(a, b));
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

template <int KIND>
static void narrow_activations(const Activations& a, int64_t token, int64_t columns) {
    constexpr int64_t EACH = block_of(KIND);
    const int64_t blocks = (columns + EACH - 1) / EACH, place = token * (a.stride / EACH);
    const float* x = a.values + token * a.stride;
    int8_t* q = a.narrow + token * a.stride;
    for (int64_t b = 0; b < blocks; b++, x += EACH, q += EACH) {
        Floats most = zeros(), none = zeros();
        for (int64_t i = 0; i < EACH; i += LANES) {
            const Floats v = load(x + i);
            most = larger(magnitude(v), most);
            none = fused(v, zeros(), none);  // zero, unless something is no number or infinite
        }
        const float magnitude = largest_of(most);
        const Floats factor = all(magnitude > 0 ? 127.0f / magnitude : 0.0f);
        __m256i sums = _mm256_setzero_si256();
        for (int64_t i = 0; i < EACH; i += LANES) narrow_sixteen(q + i, load(x + i) * factor, sums);
        __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
        s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
        a.offsets[place + b] = OFFSET<KIND> * _mm_cvtsi128_si32(s);
        a.scales[place + b] = magnitude / 127.0f + sum_of(none);
    }
}

// Whether tokens must be brought into another form for this matrix.
static inline bool wants_preparation(const Matrix& w) {
    return w.kind == INT8 || w.kind == INT4 || w.kind == BFLOAT16;
}

static inline void prepare(const Activations& a, int64_t token, const Matrix& w) {
    if (!wants_preparation(w)) return;
    float* x = a.values + token * a.stride;
    // What another matrix left behind the last column.
    std::memset(x + w.columns, 0, (padded(w.columns) - w.columns) * sizeof(float));
    if (w.kind == INT8) narrow_activations<INT8>(a, token, w.columns);
    if (w.kind == INT4) narrow_activations<INT4>(a, token, w.columns);
#ifdef PAIRS
    if (w.kind == BFLOAT16)
        for (int64_t i = 0; i < padded(w.columns); i += LANES)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(a.pairs + token * a.stride + i),
                                reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i))));
#endif
}

// --- products: M tokens, P panels ---

// The CPU alone does not look far enough ahead for weights to come while others are multiplied.
static inline void ahead(const char* p) { _mm_prefetch(p + AHEAD, _MM_HINT_T0); }

static inline void put(float* y, Floats v, bool add) { store(y, add ? load(y) + v : v); }

// One column of sixteen rows, or two where they lie in pairs, times those of a token.
template <int KIND, int M, int P>
static inline void columns_of(const char* const* p, const float* const* x, int64_t k, Floats (&sums)[M][P]) {
    if constexpr (KIND == BFLOAT16) {
        Floats first[P], second[P];
        UNROLL for (int i = 0; i < P; i++) {
            load_pairs(p[i] + k * PANEL * 2, first[i], second[i]);
            ahead(p[i] + k * PANEL * 2);
        }
        UNROLL for (int m = 0; m < M; m++) {
            UNROLL for (int i = 0; i < P; i++) sums[m][i] = fused(first[i], all(x[m][k]), sums[m][i]);
            UNROLL for (int i = 0; i < P; i++) sums[m][i] = fused(second[i], all(x[m][k + 1]), sums[m][i]);
        }
    } else {
        Floats column[P];
        UNROLL for (int i = 0; i < P; i++) {
            const char* place = p[i] + k * PANEL * (KIND == FLOAT32 ? 4 : 2);
            column[i] = load_as<KIND>(place);
            ahead(place);
        }
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int i = 0; i < P; i++) sums[m][i] = fused(column[i], all(x[m][k]), sums[m][i]);
    }
}

template <int KIND, int M, int P>
static void float_tile(const Matrix& w, const Activations& a, const int64_t* tokens, int64_t panel,
                       Floats (&sums)[M][P]) {
    const char* p[P];
    UNROLL for (int i = 0; i < P; i++) p[i] = static_cast<const char*>(w.data) + (panel + i) * w.panel_bytes();
#ifdef PAIRS
    if constexpr (KIND == BFLOAT16) {
        const uint16_t* x[M];
        UNROLL for (int m = 0; m < M; m++) x[m] = a.pairs + tokens[m] * a.stride;
        for (int64_t k = 0; k < w.columns; k += 2) {
            __m512i column[P];
            UNROLL for (int i = 0; i < P; i++) {
                column[i] = _mm512_loadu_si512(p[i] + k * PANEL * 2);
                ahead(p[i] + k * PANEL * 2);
            }
            UNROLL for (int m = 0; m < M; m++) {
                int32_t pair;
                std::memcpy(&pair, x[m] + k, 4);
                const __m512i v = _mm512_set1_epi32(pair);
                UNROLL for (int i = 0; i < P; i++) sums[m][i].v = add_pairs(sums[m][i].v, column[i], v);
            }
        }
        return;
    }
#endif
    const float* x[M];
    UNROLL for (int m = 0; m < M; m++) x[m] = a.values + tokens[m] * a.stride;
    for (int64_t k = 0; k < w.columns; k += KIND == BFLOAT16 ? 2 : 1) columns_of<KIND, M, P>(p, x, k, sums);
}

template <int KIND, int M, int P>
static void whole_tile(const Matrix& w, const Activations& a, const int64_t* tokens, int64_t panel,
                       Floats (&totals)[M][P]) {
    constexpr int64_t EACH = block_of(KIND), STEP = KIND == INT4 ? 8 : 4;  // columns in 64 bytes of a panel
    const int64_t blocks = (w.columns + EACH - 1) / EACH, per_token = a.stride / EACH;
    const int64_t groups = KIND == INT4 ? w.columns / w.group : 1, each = w.group / BLOCK;
    const char* p[P];
    UNROLL for (int i = 0; i < P; i++) p[i] = static_cast<const char*>(w.data) + (panel + i) * w.panel_bytes();
    for (int64_t b = 0; b < blocks; b++) {
        Dots<KIND> sums[M][P];
        const int8_t* x[M];
        UNROLL for (int m = 0; m < M; m++) {
            x[m] = a.narrow + tokens[m] * a.stride + b * EACH;
            UNROLL for (int i = 0; i < P; i++) sums[m][i] = begin<KIND>(a.offsets[tokens[m] * per_token + b]);
        }
        const int64_t steps = (std::min(EACH, w.columns - b * EACH) + STEP - 1) / STEP;
        for (int64_t s = 0; s < steps; s++) {
            Bytes v[P], more[P];
            UNROLL for (int i = 0; i < P; i++) {
                v[i] = load_bytes(p[i]);
                ahead(p[i]);
                p[i] += 64;
                if constexpr (KIND == INT4) more[i] = high_halves(v[i]), v[i] = low_halves(v[i]);
            }
            UNROLL for (int m = 0; m < M; m++) {
                int32_t four;
                std::memcpy(&four, x[m] + s * STEP, 4);
                UNROLL for (int i = 0; i < P; i++) sums[m][i] = dot<KIND>(sums[m][i], v[i], four);
                if constexpr (KIND == INT4) {
                    std::memcpy(&four, x[m] + s * STEP + 4, 4);
                    UNROLL for (int i = 0; i < P; i++) sums[m][i] = dot<KIND>(sums[m][i], more[i], four);
                }
            }
        }
        UNROLL for (int i = 0; i < P; i++) {
            Floats scale;
            if constexpr (KIND == INT4)
                scale = load_as<FLOAT16>(static_cast<const char*>(w.scales) +
                                         ((panel + i) * groups + b / each) * PANEL * 2);
            UNROLL for (int m = 0; m < M; m++) {
                const int64_t place = tokens[m] * per_token + b;
                Floats factor = all(a.scales[place]);
                if constexpr (KIND == INT4) factor = factor * scale;
                totals[m][i] = fused(total<KIND>(sums[m][i], a.offsets[place]), factor, totals[m][i]);
            }
        }
    }
    if constexpr (KIND == INT8)
        UNROLL for (int i = 0; i < P; i++) {
            const Floats scale = load(static_cast<const float*>(w.scales) + (panel + i) * PANEL);
            UNROLL for (int m = 0; m < M; m++) totals[m][i] = totals[m][i] * scale;
        }
}

// `count` tokens, at most M, times the panels from `first` to before `last`, P at once.
template <int KIND, int M, int P>
static void tokens_over(const Matrix& w, const Activations& a, int64_t token, int64_t count, int64_t first,
                        int64_t last, float* y, int64_t stride, bool add) {
    int64_t tokens[M];  // the last one again where there are fewer
    UNROLL for (int m = 0; m < M; m++) tokens[m] = token + std::min<int64_t>(m, count - 1);
    int64_t panel = first;
    for (; panel + P <= last; panel += P) {
        Floats sums[M][P];
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int i = 0; i < P; i++) sums[m][i] = zeros();
        if constexpr (KIND == INT8 || KIND == INT4)
            whole_tile<KIND, M, P>(w, a, tokens, panel, sums);
        else
            float_tile<KIND, M, P>(w, a, tokens, panel, sums);
        UNROLL for (int m = 0; m < M; m++)
            if (m < count)
                UNROLL for (int i = 0; i < P; i++)
                    put(y + (token + m) * stride + (panel + i) * PANEL, sums[m][i], add);
    }
    if constexpr (P > 1)
        if (panel < last) tokens_over<KIND, M, 1>(w, a, token, count, panel, last, y, stride, add);
}

// How many panels keep the multipliers busy and the sums in registers.
constexpr int panels_at_once([[maybe_unused]] int kind, int tokens) {
#ifdef WIDE
    return tokens <= 6 ? 4 : 2;
#else
    if (kind == INT4) return 1;
    return tokens == 1 ? 4 : tokens <= 3 ? 2 : 1;
#endif
}

template <int KIND, int M>
static void few_tokens(const Matrix& w, const Activations& a, int64_t token, int64_t count, int64_t first, int64_t last,
                       float* y, int64_t stride, bool add) {
    tokens_over<KIND, M, panels_at_once(KIND, M)>(w, a, token, count, first, last, y, stride, add);
}

template <int KIND>
static void panels_of(const Matrix& w, const Activations& a, int64_t tokens, int64_t first, int64_t last, float* y,
                      int64_t stride, bool add) {
#ifdef WIDE
    // Up to sixteen at once, so that weights come from memory in one pass (int4 are few and wait for less); more are a
    // matter of computing, which goes best with six.
    const int64_t most = tokens > 16 ? 6 : KIND == INT4 ? 8 : 16;
#else
    constexpr int64_t most = KIND == INT4 ? 4 : 6;
#endif
    const int64_t tiles = (tokens + most - 1) / most;
    int64_t token = 0;
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t count = (tokens - token) / (tiles - i) + ((tokens - token) % (tiles - i) != 0);
        switch (count) {
            case 1: few_tokens<KIND, 1>(w, a, token, count, first, last, y, stride, add); break;
            case 2: few_tokens<KIND, 2>(w, a, token, count, first, last, y, stride, add); break;
            case 3: few_tokens<KIND, 3>(w, a, token, count, first, last, y, stride, add); break;
            case 4: few_tokens<KIND, 4>(w, a, token, count, first, last, y, stride, add); break;
            case 5: few_tokens<KIND, 5>(w, a, token, count, first, last, y, stride, add); break;
            case 6: few_tokens<KIND, 6>(w, a, token, count, first, last, y, stride, add); break;
#ifdef WIDE
            case 7:
            case 8: few_tokens<KIND, 8>(w, a, token, count, first, last, y, stride, add); break;
            case 9:
            case 10:
            case 11:
            case 12: few_tokens<KIND, 12>(w, a, token, count, first, last, y, stride, add); break;
            default: few_tokens<KIND, 16>(w, a, token, count, first, last, y, stride, add); break;
#endif
        }
        token += count;
    }
}

static void by_panels(const Matrix& w, const Activations& a, int64_t tokens, int64_t first, int64_t last, float* y,
                      int64_t stride, bool add) {
    switch (w.kind) {
        case FLOAT32: return panels_of<FLOAT32>(w, a, tokens, first, last, y, stride, add);
        case BFLOAT16: return panels_of<BFLOAT16>(w, a, tokens, first, last, y, stride, add);
        case FLOAT16: return panels_of<FLOAT16>(w, a, tokens, first, last, y, stride, add);
        case INT8: return panels_of<INT8>(w, a, tokens, first, last, y, stride, add);
        default: return panels_of<INT4>(w, a, tokens, first, last, y, stride, add);
    }
}
