// Instructions that the CPU at hand may lack, as plain code: all of AVX-512, products of bfloat16 pairs, and tiles. Put
// before the kernels' sources, it lets their tests compute with what is compiled for other CPUs.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef EMULATED_WIDE
#include "emulated_wide.h"
#ifdef EMULATED_PAIRS
#define __AVX512BF16__ 1
#endif
#ifdef EMULATED_TILES
#define __AMX_TILE__ 1
#define __AMX_INT8__ 1
#define __AMX_BF16__ 1
#endif
#endif

namespace emulated {

inline float number(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
}

inline float add_pair(float sum, uint32_t a, uint32_t b) {
    sum = std::fma(number(uint16_t(a >> 16)), number(uint16_t(b >> 16)), sum);
    return std::fma(number(uint16_t(a)), number(uint16_t(b)), sum);
}

inline __m512 add_pairs(__m512 sums, __m512i a, __m512i b) {
    float s[16];
    uint32_t x[16], y[16];
    std::memcpy(s, &sums, 64);
    std::memcpy(x, &a, 64);
    std::memcpy(y, &b, 64);
    for (int i = 0; i < 16; i++) s[i] = add_pair(s[i], x[i], y[i]);
    std::memcpy(&sums, s, 64);
    return sums;
}

// To the nearest bfloat16, of two the even one; what is no number stays none.
inline __m256bh to_bfloat16(__m512 from) {
    uint32_t x[16];
    uint16_t y[16];
    __m256bh to;
    std::memcpy(x, &from, 64);
    for (int i = 0; i < 16; i++) {
        const bool none = (x[i] & 0x7fffffff) > 0x7f800000;
        y[i] = uint16_t(none ? x[i] >> 16 | 0x40 : (x[i] + 0x7fff + (x[i] >> 16 & 1)) >> 16);
    }
    std::memcpy(&to, y, 32);
    return to;
}

struct Tile {
    uint8_t lines[16][64];
    int count, bytes;
};
inline thread_local Tile tiles[8];

inline void configure(const void* from) {
    const uint8_t* config = static_cast<const uint8_t*>(from);
    for (int t = 0; t < 8; t++) {
        uint16_t bytes;
        std::memcpy(&bytes, config + 16 + 2 * t, 2);
        tiles[t] = {{}, config[48 + t], bytes};
    }
}

inline void clear(int t) { std::memset(tiles[t].lines, 0, sizeof(tiles[t].lines)); }

inline void load(int t, const void* from, int64_t stride) {
    clear(t);
    for (int i = 0; i < tiles[t].count; i++)
        std::memcpy(tiles[t].lines[i], static_cast<const char*>(from) + i * stride, tiles[t].bytes);
}

inline void store(int t, void* to, int64_t stride) {
    for (int i = 0; i < tiles[t].count; i++)
        std::memcpy(static_cast<char*>(to) + i * stride, tiles[t].lines[i], tiles[t].bytes);
}

// sums[m][n] += of a[m][k] and b[k][n], four bytes each.
template <typename T, typename F>
inline void multiply(int sums, int a, int b, F&& add) {
    for (int m = 0; m < tiles[sums].count; m++)
        for (int k = 0; k < tiles[a].bytes / 4; k++)
            for (int n = 0; n < tiles[sums].bytes / 4; n++) {
                T sum;
                uint32_t x, y;
                std::memcpy(&sum, tiles[sums].lines[m] + 4 * n, 4);
                std::memcpy(&x, tiles[a].lines[m] + 4 * k, 4);
                std::memcpy(&y, tiles[b].lines[k] + 4 * n, 4);
                sum = add(sum, x, y);
                std::memcpy(tiles[sums].lines[m] + 4 * n, &sum, 4);
            }
}

template <typename B>
inline int32_t add_four(int32_t sum, uint32_t x, uint32_t y) {
    for (int i = 0; i < 32; i += 8) sum += int8_t(x >> i) * B(y >> i);
    return sum;
}

}  // namespace emulated

#ifdef EMULATED_PAIRS
#define _mm512_cvtneps_pbh emulated::to_bfloat16
#endif

#ifdef EMULATED_TILES
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#undef _tile_dpbsud
#define _tile_loadconfig emulated::configure
#define _tile_release() static_cast<void>(0)
#define _tile_zero emulated::clear
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbf16ps(sums, a, b) emulated::multiply<float>(sums, a, b, emulated::add_pair)
#define _tile_dpbssd(sums, a, b) emulated::multiply<int32_t>(sums, a, b, emulated::add_four<int8_t>)
#define _tile_dpbsud(sums, a, b) emulated::multiply<int32_t>(sums, a, b, emulated::add_four<uint8_t>)
// The system is asked for tiles, which it has not got.
#include <sys/syscall.h>
#include <unistd.h>
#define syscall(...) 0L
#endif
