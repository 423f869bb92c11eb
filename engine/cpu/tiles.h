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
constexpr int64_t AT_ONCE = 2 * CHUNK;        // panels that few tokens are multiplied with in turns,
constexpr int64_t TURN = 1024;                // each time by so many bytes of theirs

// Tiles 0 to 3 are sums: of the first tokens and both panels, then of the others. 4 and 5 are tokens, 6 and 7 weights.
class Tiles {
   public:
    // The system keeps what is in a thread's tiles for whoever asks, once for the process.
    static bool allowed() {
        constexpr int ASK = 0x1023, TILE_DATA = 18;
        static const bool granted = syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
        return granted;
    }

    // `columns`: a line of tokens in bytes, which are as many lines of four of weights. Tiles of few tokens take less time.
    explicit Tiles(int64_t columns, int64_t tokens = TILE_SIDE) {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, unused[14] = {};
            uint16_t bytes[16] = {};
            uint8_t lines[16] = {};
        } config;
        for (int i = 0; i < 8; i++) {
            config.bytes[i] = uint16_t(i == 4 || i == 5 ? columns : LINE);
            config.lines[i] = uint8_t(i < 6 ? tokens : columns / 4);
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

// One line of tiles: tokens times two panels, or what else has lines that lie `stride` bytes apart. `meanwhile` is called
// behind each product, or behind both where there are two.
template <Bits BITS, typename F>
static inline void multiply_tiles(const void* x, int64_t x_bytes, bool more, const void* p, const void* q,
                                  int64_t stride, F&& meanwhile) {
    _tile_loadd(4, x, x_bytes);
    _tile_loadd(6, p, stride);
    _tile_loadd(7, q, stride);
    MULTIPLY_TILE(0, 4, 6);
    if (more) meanwhile();
    MULTIPLY_TILE(1, 4, 7);
    meanwhile();
    if (!more) return;
    _tile_loadd(5, static_cast<const char*>(x) + TILE_SIDE * x_bytes, x_bytes);
    MULTIPLY_TILE(2, 5, 6);
    meanwhile();
    MULTIPLY_TILE(3, 5, 7);
    meanwhile();
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

// What is asked for while weights are multiplied. The CPU reads ahead in as many places as it sees, and a core reads a
// tenth to a quarter faster from eight than from two: so beside few tokens, where reading is what takes time, the next
// columns of several panels are asked for in turns, behind each line of tiles, for what is asked for before them keeps
// them waiting. Panels often lie a power of two apart, where lines of the same number are in each other's way in the
// memory: so each panel begins with another one.
class Asked {
   public:
    Asked() = default;
    // `bytes` of each of so many panels, which lie `between` bytes apart, within so many calls.
    Asked(const char* from, int64_t panels, int64_t between, int64_t bytes, int64_t calls)
        : from_(from), panels_(panels), between_(between), lines_(bytes / LINE), each_((lines_ + calls - 1) / calls) {}

    void next() {
        if (done_ >= lines_) return;
        for (int64_t i = 0, line = done_; i < panels_; i++, line += APART) {
            while (line >= lines_) line -= lines_;
            const char* p = from_ + i * between_ + line * LINE;
            for (int64_t n = 0; n < each_; n++) _mm_prefetch(p + n * LINE, _MM_HINT_T1);
        }
        done_ += each_;
    }

   private:
    static constexpr int64_t APART = 20;  // lines
    const char* from_ = nullptr;
    int64_t panels_ = 0, between_ = 0, lines_ = 0, each_ = 0, done_ = 0;
};

// The same beside many tokens, where it is for weights to come in time.
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
        __m512i first = _mm512_loadu_si512(from + line), second;
        if constexpr (KIND == INT4) {
            load_halves(from + line, first, second);
            _mm512_store_si512(to + 2 * line, _mm512_sub_epi8(first, offset));
            _mm512_store_si512(to + 2 * line + LINE, _mm512_sub_epi8(second, offset));
        } else {
            _mm512_store_si512(to + line, _mm512_sub_epi8(first, offset));
        }
    }
    return to;
}

// A number of tokens, at most 32, times two panels, whose weights are at p and q: what columns from `from` to before `to`
// come to is added to `totals`, or is all that they are.
static void add_pairs(const Activations& a, int64_t token, bool more, int64_t from, int64_t to, const char* p,
                      const char* q, Asked* asked, Block& totals) {
    if (from == 0)
        zero_sums(more);
    else
        load_sums(totals, more, 2 * LINE);
    const uint16_t* x = a.pairs + token * a.stride;
    for (int64_t k = from; k < to; k += LINE / 2) {
        const char *next = p + k * PANEL * 2, *other = q + k * PANEL * 2;
        if (!asked) ahead_of_tile(next), ahead_of_tile(other);
        multiply_tiles<PAIR>(x + k, a.stride * 2, more, next, other, LINE, [] {});
        if (asked) asked->next();
    }
    store_sums(totals, more);
}

// The same with whole numbers. What a piece of columns came to is counted, and what a block did is scaled, while the next
// one's products are on their way: sums of int8 pass by as they are, those of int4 by their groups' counts. Where groups are
// whole blocks, so are pieces, and a count is multiplied with as a float, which rounds what is the same number.
template <int KIND, Bits BITS, int64_t PIECE>
static void add_whole(const Matrix& w, const Activations& a, int64_t token, int64_t count, int64_t from, int64_t to,
                      int64_t panel, int64_t other, const char* p, const char* q, Asked& asked, Block& totals) {
    constexpr int64_t TILE = std::min(PIECE, LINE);  // columns
    const bool more = count > TILE_SIDE;
    const int64_t lines = (more ? TWO_SIDES / 4 : TILE_SIDE) / (PIECE / TILE);  // of sums that are added at once
    if (from == 0) std::memset(totals, 0, count * sizeof(totals[0]));
    alignas(LINE) WholeBlock sums, counted;
    int64_t line = count, place = 0;  // of the sums that are not added yet
    const int64_t each = a.each<KIND>();
    bool first = true, last = true;  // piece of its block
    __m512i counts[2] = {};
    Floats factors[2];
    const auto add_lines = [&](int64_t end) {
        if (PIECE < ROUND<KIND> && !last) {
            for (; line < end; line++)
                UNROLL for (int i = 0; i < 2; i++) {
                    int32_t* const at = counted[line] + i * PANEL;
                    const __m512i before = first ? _mm512_setzero_si512() : _mm512_load_si512(at);
                    _mm512_store_si512(at, add_counted(before, _mm512_load_si512(sums[line] + i * PANEL), counts[i]));
                }
            return;
        }
        for (; line < end; line++) {
            const Floats factor = all(a.scales[place + line * each]);
            UNROLL for (int i = 0; i < 2; i++) {
                __m512i dots = _mm512_load_si512(sums[line] + i * PANEL);
                if constexpr (BITS == UNSIGNED)
                    dots = _mm512_add_epi32(dots, _mm512_set1_epi32(a.offsets[place + line * each]));
                if constexpr (PIECE < ROUND<KIND>) {
                    const __m512i before = first ? _mm512_setzero_si512() : _mm512_load_si512(counted[line] + i * PANEL);
                    dots = add_counted(before, dots, counts[i]);
                }
                Floats sum{_mm512_cvtepi32_ps(dots)};
                if constexpr (KIND == INT4 && PIECE == ROUND<KIND>) sum = sum * factors[i];
                float* const at = totals[line] + i * PANEL;
                store(at, fused(sum, factor, load(at)));
            }
        }
    };
    for (int64_t b = from; b < to; b += PIECE) {
        zero_sums(more);
        for (int64_t k = b; k < std::min(b + PIECE, to); k += TILE) {
            multiply_tiles<BITS>(a.narrow_at<KIND>(token, k), a.between<KIND>(), more, p + k * PANEL, q + k * PANEL,
                                 LINE, [&] { add_lines(std::min(line + lines, count)); });
            asked.next();
        }
        add_lines(count);
        store_sums(sums, more);
        line = 0, place = a.place<KIND>(token, b / ROUND<KIND>);
        if constexpr (KIND == INT4) {
            first = b % ROUND<KIND> == 0, last = (b + PIECE) % ROUND<KIND> == 0 || b + PIECE == w.columns;
            const int16_t* const at[] = {w.counts_at(panel, b), w.counts_at(other, b)};
            UNROLL for (int i = 0; i < 2; i++) {
                if constexpr (PIECE < ROUND<KIND>)
                    counts[i] = load_counts(at[i]);
                else
                    factors[i] = float_counts(at[i]);
            }
        }
    }
    add_lines(count);
}

// `next` says where this thread goes on behind the last panel.
template <int KIND, Bits BITS, typename F>
static void tiles_of(const Matrix& w, const Activations& a, int64_t tokens, int64_t first, int64_t last, float* y,
                     int64_t stride, bool add, F&& next) {
    constexpr int64_t SIZE = KIND == BFLOAT16 ? 2 : 1;  // of a number in a tile
    const bool short_groups = KIND == INT4 && w.group % ROUND<KIND>;
    const Tiles tiles(short_groups ? BLOCK : LINE, std::min(tokens, TILE_SIDE));
    const char* data = w.panel(first);
    if constexpr (BITS == SIGNED) data = as_signed<KIND>(data, (last - first) * w.panel_bytes());
    const int64_t bytes = w.panel_bytes() * (KIND == INT4 ? 2 : 1);
    const bool few = BITS != SIGNED && tokens <= TWO_SIDES;
    const int64_t panels = few ? AT_ONCE : 2, part = few ? TURN / SIZE : w.columns;
    alignas(LINE) Block totals[AT_ONCE / 2];
    for (int64_t token = 0; token < tokens; token += TWO_SIDES) {
        const int64_t count = std::min(TWO_SIDES, tokens - token);
        for (int64_t from = first; from < last; from += panels) {
            const int64_t to = std::min(from + panels, last);
            for (int64_t k = 0; k < w.columns; k += part) {
                const int64_t end = std::min(k + part, w.columns);
                Asked asked;
                if (few) {
                    const int64_t calls = (to - from + 1) / 2 * ((end - k) * SIZE + LINE - 1) / LINE;
                    const bool through = end == w.columns;
                    const int64_t then = through ? next() : from, column = through ? 0 : end;
                    const int64_t columns = std::min(part, w.columns - column);
                    asked = {w.panel(then) + column * SIZE * PANEL, std::min(panels, w.panels() - then), bytes,
                             columns * SIZE * PANEL, calls};
                }
                for (int64_t panel = from; panel < to; panel += 2) {
                    const int64_t other = std::min(panel + 1, to - 1);
                    const char *p = data + (panel - first) * bytes, *q = data + (other - first) * bytes;
                    Block& sums = totals[(panel - from) / 2];
                    if (!few)  // few tokens' outputs are in the cache
                        for (int64_t m = 0; m < count; m++)
                            for (int64_t i : {panel, other}) written_soon(y + (token + m) * stride + i * PANEL);
                    if constexpr (KIND == BFLOAT16)
                        add_pairs(a, token, count > TILE_SIDE, k, end, p, q, few ? &asked : nullptr, sums);
                    else if (!short_groups)
                        add_whole<KIND, BITS, ROUND<KIND>>(w, a, token, count, k, end, panel, other, p, q, asked, sums);
                    else if constexpr (KIND == INT4)
                        add_whole<KIND, BITS, BLOCK>(w, a, token, count, k, end, panel, other, p, q, asked, sums);
                }
            }
            for (int64_t panel = from; panel < to; panel += 2) {
                const Block& sums = totals[(panel - from) / 2];
                for (int64_t m = 0; m < count; m++)
                    for (int64_t i = 0; i < std::min<int64_t>(2, to - panel); i++) {
                        Floats v = load(sums[m] + i * PANEL);
                        if constexpr (KIND != BFLOAT16) v = v * load(w.scales + (panel + i) * PANEL);
                        put(y + (token + m) * stride + (panel + i) * PANEL, v, add);
                    }
            }
        }
    }
}

template <typename F>
static void by_tiles(const Matrix& w, const Activations& a, int64_t tokens, int64_t first, int64_t last, float* y,
                     int64_t stride, bool add, F&& next) {
    if (w.kind == BFLOAT16) return tiles_of<BFLOAT16, PAIR>(w, a, tokens, first, last, y, stride, add, next);
    if (w.kind == INT4) return tiles_of<INT4, SIGNED>(w, a, tokens, first, last, y, stride, add, next);
    // A copy with signs saves taking offsets away, but is only worth it if it is used often.
    if (tokens > TWO_SIDES) return tiles_of<INT8, SIGNED>(w, a, tokens, first, last, y, stride, add, next);
    tiles_of<INT8, UNSIGNED>(w, a, tokens, first, last, y, stride, add, next);
}

#endif

// Whether tiles are the fastest for so many tokens; for bfloat16 that may not depend on them.
static bool go_by_tiles([[maybe_unused]] const Matrix& w, [[maybe_unused]] int64_t tokens) {
#ifdef TILES
    const bool whole = (w.kind == INT8 && tokens > TILE_SIDE / 4) || (w.kind == INT4 && tokens > TILE_SIDE);
    return Tiles::allowed() && (w.kind == BFLOAT16 || whole);
#endif
    return false;
}

// y[token][row] (+)= x[token] . w[row] for the panels from `first` to before `last`; `next` says with which one this
// thread goes on.
template <typename F>
static void multiply(const Matrix& w, const Activations& a, int64_t tokens, int64_t first, int64_t last, float* y,
                     int64_t stride, bool add, [[maybe_unused]] F&& next) {
#ifdef TILES
    if (go_by_tiles(w, tokens)) return by_tiles(w, a, tokens, first, last, y, stride, add, next);
#endif
    by_panels(w, a, tokens, first, last, y, stride, add);
}

// How many panels a thread takes at once: with many tokens as much as its cache can hold while they pass by.
static int64_t share_of(const Matrix& w, int64_t tokens, int64_t threads) {
    if (tokens <= 2 * TILE_SIDE || !go_by_tiles(w, tokens)) return w.panels() < 16 * CHUNK * threads ? CHUNK : 2 * CHUNK;
    constexpr int64_t CACHED = 1 << 20;
    const int64_t bytes = w.panel_bytes() * (w.kind == INT4 ? 2 : 1);
    const int64_t most = std::min(CACHED / bytes, w.panels() / (4 * threads));
    return std::max(CHUNK, most / 2 * 2);
}
