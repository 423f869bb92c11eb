// How weights lie in memory, and the activations that they are multiplied with.
//
// A panel holds PANEL rows of a weight matrix, column by column, so that one instruction works on its rows and an
// activation is broadcast to them.
//
//   float32, float16   [panel][column][16]
//   bfloat16           [panel][column / 2][16][2], filled up to 32 columns; where the CPU multiplies pairs, activations
//                      are bfloat16 too
//   int8               [panel][column / 4][16][4], filled up to 64 columns, unsigned with an offset of 128
//   int4               [panel][column / 8][16][4]: bytes of two columns that are four apart, unsigned with an offset of
//                      8; [panel][column / group][16] whole numbers of 16 bits, by which a group's sums count
//
// A row of whole numbers has one scale, and activations beside it are 8 bits wide with a scale for every 128 columns, with
// AMX and int8 for every 256. So what these come to is added as whole numbers, for int4 too.
#pragma once

#include "vector.h"

constexpr int64_t PANEL = LANES;
constexpr int64_t BLOCK = 32;   // columns whose sums fit 16 bits where they must, which groups of int4 are made of
constexpr int64_t CHUNK = 4;    // panels that a thread takes at once, or twice as many of large matrices
constexpr int64_t FEW = 16;     // tokens whose activations lie side by side
constexpr int64_t AHEAD = 2048;  // bytes of a panel that are asked for before they are needed
constexpr int64_t LINE = 64;     // bytes that come together

// What is asked for while a panel is read: beside its first line what lies at `from`, beside the next one `step` bytes
// further. Nothing said: what comes AHEAD bytes later.
struct Ahead {
    const char* from = nullptr;
    int64_t step = LINE;
};
// Whether several passes over a panel share out what is asked for.
#ifdef WIDE
template <int KIND, int P>
constexpr bool SHARED = false;
#else
template <int KIND, int P>
constexpr bool SHARED = P == 1;
#endif

// Columns that share one activation scale, filled up with zeros. Tiles are fast enough for the scaling of their sums to
// count. (With int4 those of more columns would not fit 32 bits.)
#ifdef TILES
template <int KIND>
constexpr int64_t ROUND = KIND == INT8 ? 256 : 128;
#else
template <int KIND>
constexpr int64_t ROUND = 128;
#endif
constexpr int64_t LONGEST = ROUND<INT8>;
template <int KIND>
constexpr int64_t RUNS = ROUND<KIND> / BLOCK;

static int64_t padded(int64_t count) { return (count + LONGEST - 1) / LONGEST * LONGEST; }

// How far apart many tokens lie: not a power of two, for then all would compete for the same few lines of the cache.
static int64_t stride_of(int64_t count) { return padded(count) + LONGEST; }

struct Matrix {
    int32_t kind;
    int32_t group;  // columns of int4 that count by the same number
    int64_t rows;
    int64_t columns;
    const void* data;
    const float* scales;    // of rows of whole numbers
    const int16_t* counts;  // of groups of int4
    const float (*tightness)[2];  // int8 with AVX2 alone: see whole.h

    // By what a panel's columns from `column` on count, and how far behind it that of the next panel is. (To divide 64 bits
    // takes long.)
    const int16_t* counts_at(int64_t panel, int64_t column) const {
        return counts + panel * counts_between() + uint32_t(column) / uint32_t(group) * PANEL;
    }
    int64_t counts_between() const { return uint32_t(columns) / uint32_t(group) * PANEL; }
    int64_t panels() const { return (rows + PANEL - 1) / PANEL; }
    const char* panel(int64_t number) const { return static_cast<const char*>(data) + number * panel_bytes(); }
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

// The tokens of a step, in whatever form the next matrix wants them. Whole numbers lie as they are read, in pieces of
// ROUND columns, [piece][token][ROUND], or with AVX-512 and many tokens as [token][piece][ROUND].
struct Activations {
    float* values;     // [token][stride]
    uint16_t* pairs;   // [token][stride], for bfloat16 weights
    int8_t* narrow;    // for weights of whole numbers
    float* scales;     // one for every block of them: [block][token], or [token][stride / block]
    // The same, as the weights' offset makes sums wrong by so much: what they begin with, RUNS times as many where each 32
    // columns are summed for themselves.
    int32_t* offsets;
    int64_t stride;
    int64_t tokens;

#ifdef WIDE
    bool few() const { return tokens <= FEW; }
#else
    static constexpr bool few() { return true; }
#endif
    template <int KIND>
    int64_t between() const { return few() ? ROUND<KIND> : stride; }  // one token of `narrow` and the next
    template <int KIND>
    int8_t* narrow_at(int64_t token, int64_t column) const {
        const int64_t piece = few() ? (tokens | 1) * ROUND<KIND> : ROUND<KIND>;  // odd, as stride_of() says
        return narrow + token * between<KIND>() + column / ROUND<KIND> * piece + column % ROUND<KIND>;
    }
    // Where the scale and the offset of a block are, and how far behind them those of the next token.
    template <int KIND>
    int64_t place(int64_t token, int64_t block) const {
        return few() ? block * tokens + token : token * each<KIND>() + block;
    }
    template <int KIND>
    int64_t each() const { return few() ? 1 : stride / ROUND<KIND>; }
};
