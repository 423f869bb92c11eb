// Sixteen numbers at once: one register of AVX-512 or two of AVX2, so that what is built on them is written once.
//
// WIDE says that there is AVX-512 with dot products of bytes, PAIRS that it multiplies pairs of bfloat16 too, TILES that
// the CPU has a unit for whole tiles.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    defined(__AVX512VNNI__)
#define WIDE 1
#if defined(__AVX512BF16__)
#define PAIRS 1
#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define TILES 1
#endif
#endif
#endif

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT8 = 3, INT4 = 4 };

#define UNROLL _Pragma("GCC unroll 16")

constexpr int64_t LANES = 16;

#ifdef WIDE

struct Floats {
    __m512 v;
};

static inline Floats zeros() { return {_mm512_setzero_ps()}; }
static inline Floats all(float x) { return {_mm512_set1_ps(x)}; }
static inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x.v); }
static inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
// In this order of operands what is no number stays none.
static inline Floats larger(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline Floats smaller(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline Floats fused(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline void add_product(Floats& sums, Floats a, Floats b) { sums = fused(a, b, sums); }
static inline Floats magnitude(Floats a) { return {_mm512_abs_ps(a.v)}; }
static inline Floats whole(Floats a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n for a whole n.
static inline Floats scaled(Floats a, Floats n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// b, but zero where a is at most `limit`.
static inline Floats unless_below(Floats a, float limit, Floats b) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, _mm512_set1_ps(limit), _CMP_NLE_UQ), b.v)};
}

static inline void halves(Floats x, __m256& low, __m256& high) {
    low = _mm512_castps512_ps256(x.v);
    high = _mm512_extractf32x8_ps(x.v, 1);
}

// Sixteen entries of a table.
template <int KIND>
static inline Floats load_as(const char* p) {
    if constexpr (KIND == FLOAT32) return {_mm512_loadu_ps(p)};
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (KIND == FLOAT16) return {_mm512_cvtph_ps(v)};
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16))};
}

// Written as instructions, because GCC copies sums that the compiler's own functions for these change, and spills them.
// Each of sixteen sums and the products of four unsigned bytes with four signed ones:
static inline __m512i add_bytes(__m512i sums, __m512i bytes, __m512i signed_bytes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(bytes), "v"(signed_bytes));
    return sums;
}
// ... or the products of two whole numbers of 16 bits:
static inline __m512i add_counted(__m512i sums, __m512i a, __m512i b) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
    return sums;
}
#ifdef PAIRS
// ... or of two bfloat16 with two others.
static inline __m512 add_pairs(__m512 sums, __m512i a, __m512i b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
    return sums;
}
#endif

// The first and the second numbers of sixteen pairs of bfloat16.
static inline void load_pairs(const char* p, Floats& first, Floats& second) {
    const __m512i v = _mm512_loadu_si512(p);
    first.v = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
    second.v = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(int(0xffff0000))));
}

#else

struct Floats {
    __m256 low, high;
};

static inline Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void store(float* p, Floats x) {
    _mm256_storeu_ps(p, x.low);
    _mm256_storeu_ps(p + 8, x.high);
}
static inline Floats operator+(Floats a, Floats b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
static inline Floats operator-(Floats a, Floats b) {
    return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
static inline Floats operator*(Floats a, Floats b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
static inline Floats operator/(Floats a, Floats b) {
    return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
// In this order of operands what is no number stays none.
static inline Floats larger(Floats a, Floats b) {
    return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
static inline Floats smaller(Floats a, Floats b) {
    return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
static inline Floats fused(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
static inline Floats magnitude(Floats a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
static inline Floats whole(Floats a) {
    constexpr int MODE = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.low, MODE), _mm256_round_ps(a.high, MODE)};
}
// a * 2^n for a whole n.
static inline Floats scaled(Floats a, Floats n) {
    const __m256i bias = _mm256_set1_epi32(127);
    const __m256i low = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.low), bias), 23);
    const __m256i high = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.high), bias), 23);
    return a * Floats{_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)};
}
// b, but zero where a is at most `limit`.
static inline Floats unless_below(Floats a, float limit, Floats b) {
    const __m256 least = _mm256_set1_ps(limit);
    return {_mm256_and_ps(b.low, _mm256_cmp_ps(a.low, least, _CMP_NLE_UQ)),
            _mm256_and_ps(b.high, _mm256_cmp_ps(a.high, least, _CMP_NLE_UQ))};
}

static inline void halves(Floats x, __m256& low, __m256& high) { low = x.low, high = x.high; }

static inline __m256 widen_bfloat16(__m128i v) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}

// Sixteen entries of a table.
template <int KIND>
static inline Floats load_as(const char* p) {
    if constexpr (KIND == FLOAT32) return load(reinterpret_cast<const float*>(p));
    const __m128i* v = reinterpret_cast<const __m128i*>(p);
    const __m128i low = _mm_loadu_si128(v), high = _mm_loadu_si128(v + 1);
    if constexpr (KIND == FLOAT16) return {_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)};
    return {widen_bfloat16(low), widen_bfloat16(high)};
}

// The first or the second numbers of sixteen pairs of bfloat16.
static inline Floats load_first(const char* p) {
    const __m256i* v = reinterpret_cast<const __m256i*>(p);
    const __m256i low = _mm256_loadu_si256(v), high = _mm256_loadu_si256(v + 1);
    return {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
}
static inline Floats load_second(const char* p) {
    const __m256i* v = reinterpret_cast<const __m256i*>(p);
    const __m256i low = _mm256_loadu_si256(v), high = _mm256_loadu_si256(v + 1);
    const __m256i mask = _mm256_set1_epi32(int(0xffff0000));
    return {_mm256_castsi256_ps(_mm256_and_si256(low, mask)), _mm256_castsi256_ps(_mm256_and_si256(high, mask))};
}

// Written as instructions that stay in order, because GCC moves sums from register to register and runs out of them.
static inline void add_product(Floats& sums, Floats a, Floats b) {
    asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sums.low) : "x"(a.low), "x"(b.low));
    asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sums.high) : "x"(a.high), "x"(b.high));
}

#endif

static inline float sum_of(Floats x) {
    __m256 low, high;
    halves(x, low, high);
    const __m256 v = _mm256_add_ps(low, high);
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

static inline float largest_of(Floats x) {
    __m256 low, high;
    halves(x, low, high);
    const __m256 v = _mm256_max_ps(low, high);
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

// e^x for x <= 0 and a little above: Cephes' polynomial, good to the last bits of a float.
static inline Floats exponential(Floats x) {
    x = larger(all(-87.3f), smaller(all(88.0f), x));
    const Floats n = whole(x * all(1.44269504088896341f));
    x = fused(n, all(-0.693359375f), x);
    x = fused(n, all(2.12194440e-4f), x);
    Floats y = all(1.9875691500e-4f);
    y = fused(y, x, all(1.3981999507e-3f));
    y = fused(y, x, all(8.3334519073e-3f));
    y = fused(y, x, all(4.1665795894e-2f));
    y = fused(y, x, all(1.6666665459e-1f));
    y = fused(y, x, all(5.0000001201e-1f));
    y = fused(y, x * x, x + all(1.0f));
    return scaled(y, n);
}

static inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 64);  // no number
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
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

static inline void store_as(int32_t kind, char* to, const float* from, int64_t count) {
    if (kind == FLOAT32) {
        std::memcpy(to, from, count * 4);
        return;
    }
    uint16_t* out = reinterpret_cast<uint16_t*>(to);
    for (int64_t i = 0; i < count; i++) out[i] = kind == BFLOAT16 ? to_bfloat16(from[i]) : _cvtss_sh(from[i], 0);
}
