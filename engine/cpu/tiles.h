// Products by tiles (AMX): sixteen tokens times sixteen rows of weights in one instruction, where the CPU has such a unit.
//
// The panels of linear.h are tiles as they are: sixteen lines of 64 bytes hold 32 columns of bfloat16, or 64 of bytes,
// of sixteen rows. Whole numbers give the very bits of linear.h, which keeps the steps that tiles would not make
// faster; bfloat16 is summed in another order, so where there are tiles all of it goes through them.
#pragma once

#include "linear.h"

constexpr int64_t TILE_SIDE = 16;  // lines of a tile, and numbers of 32 bits in a line

#ifdef TILES

#include <sys/syscall.h>
#include <unistd.h>

#include <vector>

constexpr int64_t TILE_BYTES = TILE_SIDE * LINE;
constexpr int64_t TWO_SIDES = 2 * TILE_SIDE;  // tokens, or rows, that are multiplied together

// Tiles 0 to 3 are sums: of the first tokens and both panels, then of the others. 4 and 5 are tokens, 6 and 7 weights.
class Tiles {
   public:
    // The system keeps what is in a thread's tiles for whoever asks, once for the process.
    static bool allowed() {
        constexpr int ASK = 0x1023, TILE_DATA = 18;
        static const bool granted = syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
        return granted;
    }

    // `columns`: a line of tokens in bytes, which are as many lines of four of weights.
    explicit Tiles(int64_t columns) {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, unused[14] = {};
            uint16_t bytes[16] = {};
            uint8_t lines[16] = {};
        } config;
        for (int i = 0; i < 8; i++) {
            config.bytes[i] = uint16_t(i == 4 || i == 5 ? columns : LINE);
            config.lines[i] = uint8_t(i < 6 ? TILE_SIDE : columns / 4);
        }
        asm volatile("" : : "r"(&config) : "memory");  // GCC 12 takes the first eight bytes for all that is read
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// Sums of up to 32 tokens and 32 rows.
using Block = float[TWO_SIDES][TWO_SIDES];
using WholeBlock = int32_t[TWO_SIDES][TWO_SIDES];

static inline void zero_sums(bool more) {
    _tile_zero(0);
    _tile_zero(1);
    if (more) {
        _tile_zero(2);
        _tile_zero(3);
    }
}

// What is multiplied: pairs of bfloat16, or bytes with signed or unsigned ones.
enum Bits { PAIR, SIGNED, UNSIGNED };

// A macro, as these functions take nothing but figures for tiles.
#define MULTIPLY_TILE(sums, tokens, weights)                                       \
    do {                                                                           \
        if constexpr (BITS == PAIR) _tile_dpbf16ps(sums, tokens, weights);         \
        if constexpr (BITS == SIGNED) _tile_dpbssd(sums, tokens, weights);         \
        if constexpr (BITS == UNSIGNED) _tile_dpbsud(sums, tokens, weights);       \
    } while (false)

// One line of tiles: tokens times two panels, or what else has lines that lie `stride` bytes apart.
template <Bits BITS>
static inline void multiply_tiles(const void* x, int64_t x_bytes, bool more, const void* p, const void* q,
                                  int64_t stride = LINE) {
    _tile_loadd(4, x, x_bytes);
    _tile_loadd(6, p, stride);
    _tile_loadd(7, q, stride);
    MULTIPLY_TILE(0, 4, 6);
    MULTIPLY_TILE(1, 4, 7);
    if (!more) return;
    _tile_loadd(5, static_cast<const char*>(x) + TILE_SIDE * x_bytes, x_bytes);
    MULTIPLY_TILE(2, 5, 6);
    MULTIPLY_TILE(3, 5, 7);
}

static inline void store_sums(void* to, bool more, int64_t stride = 2 * LINE) {
    char* at = static_cast<char*>(to);
    _tile_stored(0, at, stride);
    _tile_stored(1, at + LINE, stride);
    if (more) {
        _tile_stored(2, at + TILE_SIDE * stride, stride);
        _tile_stored(3, at + TILE_SIDE * stride + LINE, stride);
    }
}

static inline void load_sums(const void* from, bool more, int64_t stride) {
    const char* at = static_cast<const char*>(from);
    _tile_loadd(0, at, stride);
    _tile_loadd(1, at + LINE, stride);
    if (more) {
        _tile_loadd(2, at + TILE_SIDE * stride, stride);
        _tile_loadd(3, at + TILE_SIDE * stride + LINE, stride);
    }
}

static inline void ahead_of_tile(const char* p) {
    UNROLL for (int64_t line = 0; line < TILE_BYTES; line += LINE) _mm_prefetch(p + AHEAD + line, _MM_HINT_T0);
}

// Weights of whole numbers as signed bytes, in this thread's own memory.
template <int KIND>
static const char* as_signed(const char* from, int64_t bytes) {
    static thread_local std::vector<char> memory;
    memory.resize(2 * bytes + LINE);
    char* const to = memory.data() + -reinterpret_cast<uintptr_t>(memory.data()) % LINE;
    const __m512i offset = _mm512_set1_epi8(char(OFFSET<KIND>));
    for (int64_t line = 0; line < bytes; line += LINE) {
        const Bytes<KIND> v = load_bytes<KIND>(from + line);
        if constexpr (KIND == INT4) {
            _mm512_store_si512(to + 2 * line, _mm512_sub_epi8(low_halves(v).v, offset));
            _mm512_store_si512(to + 2 * line + LINE, _mm512_sub_epi8(high_halves(v).v, offset));
        } else {
            _mm512_store_si512(to + line, _mm512_sub_epi8(v.v, offset));
        }
    }
    return to;
}

// `count` tokens, at most 32, times the panels at p and q.
static void pairs_block(const Matrix& w, const Activations& a, int64_t token, bool more, const char* p, const char* q,
                        Block& sums) {
    const uint16_t* x = a.pairs + token * a.stride;
    zero_sums(more);
    for (int64_t k = 0; k < w.panel_bytes(); k += TILE_BYTES, x += LINE / 2) {
        ahead_of_tile(p + k);
        ahead_of_tile(q + k);
        multiply_tiles<PAIR>(x, a.stride * 2, more, p + k, q + k);
    }
    store_sums(sums, more);
}

// Adds what a block of columns came to; a token's scale and a group's are applied as whole_tile does.
template <int KIND, Bits BITS>
static inline void add_sums(const Matrix& w, const Activations& a, int64_t token, int64_t from, int64_t count,
                            int64_t panel, int64_t next, int64_t b, const WholeBlock& sums, Block& totals) {
    const int64_t place = a.place<KIND>(token, b), each = a.each<KIND>();
    Floats scale[2];
    if constexpr (KIND == INT4) {
        const int64_t groups = w.columns / w.group, group = b / (w.group / BLOCK);
        const char* scales = static_cast<const char*>(w.scales);
        scale[0] = load_as<FLOAT16>(scales + (panel * groups + group) * PANEL * 2);
        scale[1] = load_as<FLOAT16>(scales + (next * groups + group) * PANEL * 2);
    }
    for (int64_t m = from; m < count; m++) {
        const Floats factor = all(a.scales[place + m * each]);
        UNROLL for (int i = 0; i < 2; i++) {
            __m512i dots = _mm512_load_si512(sums[m] + i * PANEL);
            if constexpr (BITS == UNSIGNED) dots = _mm512_add_epi32(dots, _mm512_set1_epi32(a.offsets[place + m * each]));
            float* to = totals[m] + i * PANEL;
            store(to, fused(Floats{_mm512_cvtepi32_ps(dots)}, KIND == INT4 ? factor * scale[i] : factor, load(to)));
        }
    }
}

template <int KIND, Bits BITS>
static void whole_block(const Matrix& w, const Activations& a, int64_t token, int64_t count, int64_t panel,
                        int64_t next, const char* p, const char* q, Block& totals) {
    constexpr int64_t EACH = block_of(KIND), PIECE = KIND == INT4 ? BLOCK : LINE;  // columns of a line of tiles
    const int64_t blocks = (w.columns + EACH - 1) / EACH;
    const bool more = count > TILE_SIDE;
    for (int64_t m = 0; m < count; m++) store(totals[m], zeros()), store(totals[m] + PANEL, zeros());
    alignas(64) WholeBlock sums;
    for (int64_t b = 0; b < blocks; b++) {
        zero_sums(more);
        const int64_t end = std::min((b + 1) * EACH, w.columns);
        for (int64_t k = b * EACH; k < end; k += PIECE) {
            if constexpr (BITS == UNSIGNED) {
                ahead_of_tile(p + k * PANEL);
                ahead_of_tile(q + k * PANEL);
            }
            multiply_tiles<BITS>(a.narrow_at(token, k), a.between(), more, p + k * PANEL, q + k * PANEL);
        }
        // The last block's, while this one's products are on their way.
        if (b > 0) add_sums<KIND, BITS>(w, a, token, 0, std::min(count, TILE_SIDE), panel, next, b - 1, sums, totals);
        _tile_stored(0, sums, 2 * LINE);
        _tile_stored(1, sums[0] + PANEL, 2 * LINE);
        if (!more) continue;
        if (b > 0) add_sums<KIND, BITS>(w, a, token, TILE_SIDE, count, panel, next, b - 1, sums, totals);
        _tile_stored(2, sums[TILE_SIDE], 2 * LINE);
        _tile_stored(3, sums[TILE_SIDE] + PANEL, 2 * LINE);
    }
    add_sums<KIND, BITS>(w, a, token, 0, count, panel, next, blocks - 1, sums, totals);
    if constexpr (KIND == INT8) {
        const float* scales = static_cast<const float*>(w.scales);
        const Floats scale[2] = {load(scales + panel * PANEL), load(scales + next * PANEL)};
        for (int64_t m = 0; m < count; m++)
            UNROLL for (int i = 0; i < 2; i++) store(totals[m] + i * PANEL, load(totals[m] + i * PANEL) * scale[i]);
    }
}

template <int KIND, Bits BITS>
static void tiles_of(const Matrix& w, const Activations& a, int64_t tokens, int64_t first, int64_t last, float* y,
                     int64_t stride, bool add) {
    const Tiles tiles(KIND == INT4 ? BLOCK : LINE);
    const char* data = w.panel(first);
    if constexpr (BITS == SIGNED) data = as_signed<KIND>(data, (last - first) * w.panel_bytes());
    const int64_t bytes = w.panel_bytes() * (KIND == INT4 ? 2 : 1);
    for (int64_t token = 0; token < tokens; token += TWO_SIDES) {
        const int64_t count = std::min(TWO_SIDES, tokens - token);
        for (int64_t panel = first; panel < last; panel += 2) {
            const bool one = panel + 1 == last;
            const char *p = data + (panel - first) * bytes, *q = one ? p : p + bytes;
            alignas(LINE) Block sums;
            if constexpr (KIND == BFLOAT16)
                pairs_block(w, a, token, count > TILE_SIDE, p, q, sums);
            else
                whole_block<KIND, BITS>(w, a, token, count, panel, one ? panel : panel + 1, p, q, sums);
            for (int64_t m = 0; m < count; m++) {
                float* to = y + (token + m) * stride + panel * PANEL;
                put(to, load(sums[m]), add);
                if (!one) put(to + PANEL, load(sums[m] + PANEL), add);
            }
        }
    }
}

static void by_tiles(const Matrix& w, const Activations& a, int64_t tokens, int64_t first, int64_t last, float* y,
                     int64_t stride, bool add) {
    if (w.kind == BFLOAT16) return tiles_of<BFLOAT16, PAIR>(w, a, tokens, first, last, y, stride, add);
    if (w.kind == INT4) return tiles_of<INT4, SIGNED>(w, a, tokens, first, last, y, stride, add);
    // A copy with signs saves taking offsets away, but is only worth it if it is used often.
    if (tokens > TWO_SIDES) return tiles_of<INT8, SIGNED>(w, a, tokens, first, last, y, stride, add);
    tiles_of<INT8, UNSIGNED>(w, a, tokens, first, last, y, stride, add);
}

#endif

// Whether tiles are the fastest for so many tokens; for bfloat16 that may not depend on them.
static bool go_by_tiles([[maybe_unused]] const Matrix& w, [[maybe_unused]] int64_t tokens) {
#ifdef TILES
    const bool whole = (w.kind == INT8 && tokens > TILE_SIDE / 2) || (w.kind == INT4 && tokens > TILE_SIDE);
    return Tiles::allowed() && (w.kind == BFLOAT16 || whole);
#endif
    return false;
}

// y[token][row] (+)= x[token] . w[row] for the panels from `first` to before `last`.
static void multiply(const Matrix& w, const Activations& a, int64_t tokens, int64_t first, int64_t last, float* y,
                     int64_t stride, bool add) {
#ifdef TILES
    if (go_by_tiles(w, tokens)) return by_tiles(w, a, tokens, first, last, y, stride, add);
#endif
    by_panels(w, a, tokens, first, last, y, stride, add);
}

// How many panels a thread takes at once: with many tokens as much as its cache can hold while they pass by.
static int64_t share_of(const Matrix& w, int64_t tokens, int64_t threads) {
    if (tokens <= TILE_SIDE || !go_by_tiles(w, tokens)) return w.panels() < 16 * CHUNK * threads ? CHUNK : 2 * CHUNK;
    constexpr int64_t CACHED = 1 << 20;
    const int64_t bytes = w.panel_bytes() * (w.kind == INT4 ? 2 : 1);
    const int64_t most = std::min(CACHED / bytes, w.panels() / (4 * threads));
    return std::max(CHUNK, most / 2 * 2);
}
