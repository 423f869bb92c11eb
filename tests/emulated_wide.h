// What the kernels use of AVX-512, with AVX2's halves of it: included by emulated.h for a CPU without it.
#pragma once

#include <immintrin.h>

#include <bit>
#include <cstdint>
#include <cstring>

namespace emulated {

template <typename H>
struct Two {
    H low, high;
};

// V of what a function of AVX2 makes of the halves, H, of registers.
template <typename V, typename H, typename F, typename... Vs>
inline V by_halves(F&& f, Vs... v) {
    return std::bit_cast<V>(Two<H>{f(std::bit_cast<Two<H>>(v).low...), f(std::bit_cast<Two<H>>(v).high...)});
}
template <typename V, typename H>
inline V twice(H half) {
    return std::bit_cast<V>(Two<H>{half, half});
}
#define FLOATS(name, half)                                                                                \
    template <typename... V>                                                                              \
    inline __m512 name(V... v) {                                                                          \
        return by_halves<__m512, __m256>([](auto... h) { return half(h...); }, v...);                     \
    }
#define WHOLES(name, half)                                                                                \
    template <typename... V>                                                                              \
    inline __m512i name(V... v) {                                                                         \
        return by_halves<__m512i, __m256i>([](auto... h) { return half(h...); }, v...);                   \
    }

FLOATS(add_ps, _mm256_add_ps)
FLOATS(sub_ps, _mm256_sub_ps)
FLOATS(mul_ps, _mm256_mul_ps)
FLOATS(div_ps, _mm256_div_ps)
FLOATS(max_ps, _mm256_max_ps)
FLOATS(min_ps, _mm256_min_ps)
FLOATS(fmadd_ps, _mm256_fmadd_ps)
FLOATS(unpacklo_ps, _mm256_unpacklo_ps)
FLOATS(unpackhi_ps, _mm256_unpackhi_ps)
WHOLES(add_epi32, _mm256_add_epi32)
WHOLES(sub_epi8, _mm256_sub_epi8)
WHOLES(and_si512, _mm256_and_si256)
WHOLES(or_si512, _mm256_or_si256)
WHOLES(unpacklo_epi16, _mm256_unpacklo_epi16)
WHOLES(unpackhi_epi16, _mm256_unpackhi_epi16)
WHOLES(unpacklo_epi32, _mm256_unpacklo_epi32)
WHOLES(unpackhi_epi32, _mm256_unpackhi_epi32)
WHOLES(unpacklo_epi64, _mm256_unpacklo_epi64)
WHOLES(unpackhi_epi64, _mm256_unpackhi_epi64)
#undef FLOATS
#undef WHOLES

inline __m512d unpacklo_pd(__m512d a, __m512d b) { return std::bit_cast<__m512d>(unpacklo_epi64(a, b)); }
inline __m512d unpackhi_pd(__m512d a, __m512d b) { return std::bit_cast<__m512d>(unpackhi_epi64(a, b)); }

// Two groups of four words of each.
template <typename V>
inline V groups(V a, V b, int which) {
    V v;
    for (int i = 0; i < 4; i++)
        std::memcpy(reinterpret_cast<char*>(&v) + 16 * i,
                    reinterpret_cast<const char*>(i < 2 ? &a : &b) + 16 * (which >> 2 * i & 3), 16);
    return v;
}

template <typename V>
inline V read(const void* p) {
    V v;
    std::memcpy(&v, p, 64);
    return v;
}
template <typename V>
inline void write(void* p, V v) {
    std::memcpy(p, &v, 64);
}
inline __m512i read_some(__mmask32 mask, const void* p) {  // and nothing else, which may not be there
    uint16_t x[32] = {};
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) std::memcpy(x + i, static_cast<const char*>(p) + 2 * i, 2);
    return read<__m512i>(x);
}
inline __m256i read_some_of_half(__mmask16 mask, const void* p) {
    return std::bit_cast<Two<__m256i>>(read_some(mask, p)).low;
}

inline __m512 set1_ps(float x) { return twice<__m512>(_mm256_set1_ps(x)); }
inline __m512i setzero_si512() { return __m512i{}; }
inline __m512i set1_epi32(int x) { return twice<__m512i>(_mm256_set1_epi32(x)); }
inline __m512i set1_epi8(char x) { return twice<__m512i>(_mm256_set1_epi8(x)); }
inline __m512 setzero_ps() { return set1_ps(0.0f); }

inline __m512 abs_ps(__m512 a) {
    return by_halves<__m512, __m256>([](__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }, a);
}
inline __m512 round_to_nearest(__m512 a, int) {
    constexpr int MODE = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return by_halves<__m512, __m256>([](__m256 x) { return _mm256_round_ps(x, MODE); }, a);
}
// a * 2^n for whole n, in two steps of which only the second one rounds.
inline __m512 scalef_ps(__m512 a, __m512 n) {
    const auto power = [](__m256i e) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
    };
    const auto scaled = [&](__m256 x, __m256 y) {
        y = _mm256_max_ps(_mm256_min_ps(y, _mm256_set1_ps(250)), _mm256_set1_ps(-250));
        const __m256i e = _mm256_cvtps_epi32(y), first = _mm256_srai_epi32(e, 1);
        return _mm256_mul_ps(_mm256_mul_ps(x, power(first)), power(_mm256_sub_epi32(e, first)));
    };
    return by_halves<__m512, __m256>(scaled, a, n);
}
template <int HOW>
inline __mmask16 compare(__m512 a, __m512 b) {
    const auto x = std::bit_cast<Two<__m256>>(a), y = std::bit_cast<Two<__m256>>(b);
    return __mmask16(_mm256_movemask_ps(_mm256_cmp_ps(x.low, y.low, HOW)) |
                     _mm256_movemask_ps(_mm256_cmp_ps(x.high, y.high, HOW)) << 8);
}
inline __m512 maskz_mov_ps(__mmask16 mask, __m512 a) {
    float x[16];
    std::memcpy(x, &a, 64);
    for (int i = 0; i < 16; i++) x[i] = mask >> i & 1 ? x[i] : 0.0f;
    return read<__m512>(x);
}

inline __m512i slli_epi32(__m512i a, int n) {
    return by_halves<__m512i, __m256i>([n](__m256i x) { return _mm256_slli_epi32(x, n); }, a);
}
inline __m512i srli_epi16(__m512i a, int n) {
    return by_halves<__m512i, __m256i>([n](__m256i x) { return _mm256_srli_epi16(x, n); }, a);
}
// vpdpbusd: neighbours' products fit into 16 bits, their sums do not.
inline __m512i add_bytes(__m512i sums, __m512i bytes, __m512i signed_bytes) {
    const auto add = [](__m256i sum, __m256i x, __m256i y) {
        const __m256i even = _mm256_mullo_epi16(_mm256_and_si256(x, _mm256_set1_epi16(255)),
                                                _mm256_srai_epi16(_mm256_slli_epi16(y, 8), 8));
        const __m256i odd = _mm256_mullo_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(y, 8));
        const __m256i ones = _mm256_set1_epi16(1);
        return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(even, ones), _mm256_madd_epi16(odd, ones)));
    };
    return by_halves<__m512i, __m256i>(add, sums, bytes, signed_bytes);
}

// vpdpwssd
inline __m512i add_counted(__m512i sums, __m512i a, __m512i b) {
    const auto add = [](__m256i sum, __m256i x, __m256i y) { return _mm256_add_epi32(sum, _mm256_madd_epi16(x, y)); };
    return by_halves<__m512i, __m256i>(add, sums, a, b);
}

inline __m512 cvtepi32_ps(__m512i a) {
    const auto x = std::bit_cast<Two<__m256i>>(a);
    return std::bit_cast<__m512>(Two<__m256>{_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)});
}
inline __m512i cvtepi16_epi32(__m256i a) {
    return std::bit_cast<__m512i>(Two<__m256i>{_mm256_cvtepi16_epi32(_mm256_castsi256_si128(a)),
                                               _mm256_cvtepi16_epi32(_mm256_extracti128_si256(a, 1))});
}

inline __m512i cvtepu16_epi32(__m256i a) {
    return std::bit_cast<__m512i>(Two<__m256i>{_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)),
                                               _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1))});
}
inline __m512 cvtph_ps(__m256i a) {
    return std::bit_cast<__m512>(
        Two<__m256>{_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))});
}
inline __m256 half(__m512 a, int which = 0) {
    const auto x = std::bit_cast<Two<__m256>>(a);
    return which ? x.high : x.low;
}

}  // namespace emulated

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#define __AVX512VNNI__ 1

#define _mm512_loadu_ps emulated::read<__m512>
#define _mm512_loadu_si512 emulated::read<__m512i>
#define _mm512_load_si512 emulated::read<__m512i>
#define _mm512_storeu_ps emulated::write<__m512>
#define _mm512_storeu_si512 emulated::write<__m512i>
#define _mm512_store_si512 emulated::write<__m512i>
#define _mm512_maskz_loadu_epi16 emulated::read_some
#define _mm256_maskz_loadu_epi16 emulated::read_some_of_half
#define _mm512_castsi512_ps std::bit_cast<__m512>
#define _mm512_castps_si512 std::bit_cast<__m512i>
#define _mm512_castps_pd std::bit_cast<__m512d>
#define _mm512_castpd_ps std::bit_cast<__m512>
#define _mm512_castps512_ps256 emulated::half
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps emulated::half
#define _mm512_setzero_ps emulated::setzero_ps
#define _mm512_set1_ps emulated::set1_ps
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_setzero_si512 emulated::setzero_si512
#define _mm512_set1_epi8 emulated::set1_epi8
#define _mm512_add_ps emulated::add_ps
#define _mm512_sub_ps emulated::sub_ps
#define _mm512_mul_ps emulated::mul_ps
#define _mm512_div_ps emulated::div_ps
#define _mm512_max_ps emulated::max_ps
#define _mm512_min_ps emulated::min_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_abs_ps emulated::abs_ps
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps emulated::round_to_nearest
#define _mm512_scalef_ps emulated::scalef_ps
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(a, b, how) emulated::compare<how>(a, b)
#define _mm512_maskz_mov_ps emulated::maskz_mov_ps
#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_sub_epi8 emulated::sub_epi8
#define _mm512_and_si512 emulated::and_si512
#define _mm512_or_si512 emulated::or_si512
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 emulated::slli_epi32
#undef _mm512_srli_epi16
#define _mm512_srli_epi16 emulated::srli_epi16
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtepi16_epi32 emulated::cvtepi16_epi32
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_unpacklo_ps emulated::unpacklo_ps
#define _mm512_unpackhi_ps emulated::unpackhi_ps
#define _mm512_unpacklo_pd emulated::unpacklo_pd
#define _mm512_unpackhi_pd emulated::unpackhi_pd
#define _mm512_unpacklo_epi16 emulated::unpacklo_epi16
#define _mm512_unpackhi_epi16 emulated::unpackhi_epi16
#define _mm512_unpacklo_epi32 emulated::unpacklo_epi32
#define _mm512_unpackhi_epi32 emulated::unpackhi_epi32
#define _mm512_unpacklo_epi64 emulated::unpacklo_epi64
#define _mm512_unpackhi_epi64 emulated::unpackhi_epi64
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4 emulated::groups
#undef _mm512_shuffle_i32x4
#define _mm512_shuffle_i32x4 emulated::groups
