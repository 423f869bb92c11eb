// Products of activations with packed weights: y = x W^T for a range of panels.
//
// Every output is summed over the columns in one fixed order, whatever the number of tokens: a sequence's numbers do not
// depend on who shares its step.
#pragma once

#include "whole.h"

// Whether tokens must be brought into another form for this matrix.
static inline bool wants_preparation(const Matrix& w) {
    return w.kind == INT8 || w.kind == INT4 || w.kind == BFLOAT16;
}

static inline void prepare(const Activations& a, int64_t token, const Matrix& w) {
    if (!wants_preparation(w)) return;
    float* x = a.values + token * a.stride;
    // What another matrix left behind the last column.
    std::memset(x + w.columns, 0, (padded(w.columns) - w.columns) * sizeof(float));
    if (w.kind == INT8) narrow_activations<INT8>(a, token, w);
    if (w.kind == INT4) narrow_activations<INT4>(a, token, w);
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

// The same, unless something else was said.
template <int KIND, int P>
static inline void ahead(const char* p, const Ahead& said, int64_t line) {
    if (SHARED<KIND, P>)
        _mm_prefetch(said.from + line * said.step, _MM_HINT_T0);
    else
        ahead(p);
}

// Asks for memory that put() will write to: another core may have it.
static inline void written_soon(const float* y) { asm volatile("prefetchw %0" ::"m"(*y)); }

static inline void put(float* y, Floats v, bool add) { store(y, add ? load(y) + v : v); }

// One column of sixteen rows, or two where they lie in pairs, times those of a token.
template <int KIND, int M, int P>
static inline void columns_of(const char* const* p, const Ahead& said, const float* const* x, int64_t k,
                              Floats (&sums)[M][P]) {
    if constexpr (KIND == BFLOAT16) {
#ifdef WIDE
        Floats first[P], second[P];
        UNROLL for (int i = 0; i < P; i++) {
            load_pairs(p[i] + k * PANEL * 2, first[i], second[i]);
            ahead(p[i] + k * PANEL * 2);
        }
        UNROLL for (int m = 0; m < M; m++) {
            UNROLL for (int i = 0; i < P; i++) sums[m][i] = fused(first[i], all(x[m][k]), sums[m][i]);
            UNROLL for (int i = 0; i < P; i++) sums[m][i] = fused(second[i], all(x[m][k + 1]), sums[m][i]);
        }
#else
        Floats column[P];  // registers are too few for both
        UNROLL for (int i = 0; i < P; i++) {
            column[i] = load_first(p[i] + k * PANEL * 2);
            ahead<KIND, P>(p[i] + k * PANEL * 2, said, k / 2);
        }
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int i = 0; i < P; i++) add_product(sums[m][i], column[i], all(x[m][k]));
        UNROLL for (int i = 0; i < P; i++) column[i] = load_second(p[i] + k * PANEL * 2);
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int i = 0; i < P; i++) add_product(sums[m][i], column[i], all(x[m][k + 1]));
#endif
    } else {
        constexpr int64_t BYTES = PANEL * (KIND == FLOAT32 ? 4 : 2);
        Floats column[P];
        UNROLL for (int i = 0; i < P; i++) {
            column[i] = load_as<KIND>(p[i] + k * BYTES);
            ahead<KIND, P>(p[i] + k * BYTES, said, k * BYTES / LINE);
        }
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int i = 0; i < P; i++) add_product(sums[m][i], column[i], all(x[m][k]));
    }
}

template <int KIND, int M, int P>
static void float_tile(const Matrix& w, const Activations& a, const int64_t* tokens, int64_t panel,
                       const Ahead& said, Floats (&sums)[M][P]) {
    const char* p[P];
    UNROLL for (int i = 0; i < P; i++) p[i] = w.panel(panel + i);
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
    const Ahead coming = said.from ? said : Ahead{p[0] + AHEAD, LINE};
    for (int64_t k = 0; k < w.columns; k += KIND == BFLOAT16 ? 2 : 1) columns_of<KIND, M, P>(p, coming, x, k, sums);
}

// `count` tokens, at most M, times the panels from `first` to before `last`, P at once.
template <int KIND, int M, int P>
static void tokens_over(const Matrix& w, const Activations& a, int64_t token, int64_t count, int64_t first,
                        int64_t last, float* y, int64_t stride, bool add, const Ahead& said = {}) {
    int64_t tokens[M];  // the last one again where there are fewer
    UNROLL for (int m = 0; m < M; m++) tokens[m] = token + std::min<int64_t>(m, count - 1);
    int64_t panel = first;
    for (; panel + P <= last; panel += P) {
        Floats sums[M][P];
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int i = 0; i < P; i++) sums[m][i] = zeros();
#ifdef WIDE
        if constexpr (KIND == INT8 || KIND == INT4)
            whole_tile<KIND, M, P>(w, a, token, panel, sums);
        else
#endif
            float_tile<KIND, M, P>(w, a, tokens, panel, said, sums);
        UNROLL for (int m = 0; m < M; m++)
            if (m < count)
                UNROLL for (int i = 0; i < P; i++)
                    put(y + (token + m) * stride + (panel + i) * PANEL, sums[m][i], add);
    }
    if constexpr (P > 1)
        if (panel < last) tokens_over<KIND, M, 1>(w, a, token, count, panel, last, y, stride, add);
}

#ifdef WIDE

// A core reads as fast as it asks, and it asks for more at once where weights come from four panels than from two. Sums
// of four tokens times four panels are what registers hold: so a block of weights comes to the first cache once and is
// multiplied by one group of four tokens after the other. Where `count` is no multiple
// of four, the last group takes tokens of the one before again.
template <int GROUPS>
static void groups_over(const Matrix& w, const Activations& a, int64_t token, int64_t count, int64_t first,
                        int64_t last, float* y, int64_t stride, bool add) {
    constexpr int M = 4, P = 4, N = (P + GROUPS - 1) / GROUPS;  // together groups ask for a block of each panel
    constexpr int64_t BYTES = ROUND<INT8> * PANEL;
    const int64_t blocks = (w.columns + ROUND<INT8> - 1) / ROUND<INT8>;
    int64_t panel = first;
    for (; panel + P <= last; panel += P) {
        Floats totals[GROUPS][M][P];
        for (auto& group : totals)
            for (auto& one : group)
                for (Floats& v : one) v = zeros();
        for (int64_t b = 0; b < blocks; b++) {
            // Behind the last block comes the first one of the next panels, if they are this thread's.
            const bool turn = b + 1 == blocks && panel + 2 * P <= last;
            const char *p[P], *next[P];
            UNROLL for (int i = 0; i < P; i++) {
                p[i] = w.panel(panel + i) + b * BYTES;
                next[i] = turn ? w.panel(panel + P + i) : p[i] + BYTES;
            }
            for (int g = 0; g < GROUPS; g++) {
                const int64_t from = token + std::min<int64_t>(g * M, count - M);
                Dots<M, P> sums;
                whole_sums<INT8, M, P, N>(w, a, from, panel, b, p, next, sums);
                add_block<INT8, M, P>(a, from, b, sums, totals[g]);
                UNROLL for (int i = 0; i < P; i++) next[i] += BYTES * N / P;
            }
        }
        for (int g = 0; g < GROUPS; g++) {
            scale_rows<M, P>(w, panel, totals[g]);
            const int64_t from = std::min<int64_t>(g * M, count - M);
            for (int64_t m = g * M - from; m < M; m++)
                for (int i = 0; i < P; i++)
                    put(y + (token + from + m) * stride + (panel + i) * PANEL, totals[g][m][i], add);
        }
    }
    for (; panel < last; panel++)
        for (int64_t m = 0; m < count; m++)
            tokens_over<INT8, 1, 1>(w, a, token + m, 1, panel, panel + 1, y, stride, add);
}

#else

// Chains of four tokens times a panel are what registers hold: so one group of tokens after the other is multiplied by a
// block of weights while that is in the first cache.
constexpr int64_t GROUPS = 8, GROUP = 4;

// `count` tokens in groups of M, the last ones of one less where that comes to them, times panels, P at once.
template <int KIND, int M, int P>
static void groups_over(const Matrix& w, const Activations& a, int64_t token, int64_t count, int64_t first,
                        int64_t last, float* y, int64_t stride, bool add) {
    constexpr int64_t COLUMNS = ROUND<KIND>, N = RUNS<KIND>, LESS = std::max(M - 1, 1);
    constexpr int64_t BYTES = COLUMNS / 8 * EIGHT<KIND>, LINES = EIGHT<KIND> / LINE;
    const int64_t groups = (count + M - 1) / M, full = groups - (groups * M - count);
    const int64_t between = w.panel_bytes(), part = BYTES / groups, step = EIGHT<KIND> / groups;
    const auto add_full = groups == 1 ? add_eights<KIND, M, P, LINES> : add_eights<KIND, M, P, 1>;
    int64_t panel = first;
    for (; panel + P <= last; panel += P) {
        Floats totals[GROUPS * GROUP][P];
        for (int64_t m = 0; m < count; m++)
            for (Floats& v : totals[m]) v = zeros();
        for (int64_t m = 0; m < count; m++)
            for (int i = 0; i < P; i++) written_soon(y + (token + m) * stride + (panel + i) * PANEL);
        const char* p = w.panel(panel);
        for (int64_t b = 0; b * COLUMNS < w.columns; b++, p += BYTES) {
            const int8_t* x = a.narrow_at<KIND>(token, b * COLUMNS);
            const int64_t place = a.place<KIND>(token, b), columns = std::min(COLUMNS, w.columns - b * COLUMNS);
            const int32_t* offsets = a.offsets + place * N;
            const float* scales = a.scales + place;
            const char* next = p + 2 * BYTES;
            Counts counts[N][P];
            if constexpr (KIND == INT4)
                for (int64_t k = 0; k < columns; k += BLOCK)
                    for (int i = 0; i < P; i++) load_counts(w.counts_at(panel + i, b * COLUMNS + k), counts[k / BLOCK][i]);
            add_full(full, x, columns, offsets, scales, p, between, counts, next, part, step, totals);
            if (const int64_t m = full * M; m < count)
                add_eights<KIND, LESS, P, 1>(groups - full, x + m * COLUMNS, columns, offsets + m * N, scales + m, p,
                                             between, counts, next + full * part, part, step, totals + m);
        }
        for (int i = 0; i < P; i++) {
            const Floats scale = load(w.scales + (panel + i) * PANEL);
            for (int64_t m = 0; m < count; m++)
                put(y + (token + m) * stride + (panel + i) * PANEL, totals[m][i] * scale, add);
        }
    }
    if constexpr (P > 1)
        if (panel < last) groups_over<KIND, M, 1>(w, a, token, count, panel, last, y, stride, add);
}

template <int KIND>
static void whole_of(const Matrix& w, const Activations& a, int64_t tokens, int64_t first, int64_t last, float* y,
                     int64_t stride, bool add) {
    const int64_t passes = (tokens + GROUPS * GROUP - 1) / (GROUPS * GROUP);
    for (int64_t i = 0, token = 0; i < passes; i++) {
        const int64_t count = (tokens - token) / (passes - i), groups = (count + GROUP - 1) / GROUP;
        switch ((count + groups - 1) / groups) {
            case 1: groups_over<KIND, 1, 4>(w, a, token, count, first, last, y, stride, add); break;
            case 2: groups_over<KIND, 2, 2>(w, a, token, count, first, last, y, stride, add); break;
            case 3: groups_over<KIND, 3, 1>(w, a, token, count, first, last, y, stride, add); break;
            default: groups_over<KIND, 4, 1>(w, a, token, count, first, last, y, stride, add);
        }
        token += count;
    }
}

#endif

// How many panels keep the multipliers busy and the sums in registers.
constexpr int panels_at_once(int tokens) {
#ifdef WIDE
    return tokens <= 6 ? 4 : 2;
#else
    return tokens == 1 ? 4 : tokens <= 3 ? 2 : 1;
#endif
}

template <int KIND, int M>
static void few_tokens(const Matrix& w, const Activations& a, int64_t token, int64_t count, int64_t first, int64_t last,
                       float* y, int64_t stride, bool add, const Ahead& said) {
#ifdef WIDE
    if constexpr (KIND == INT8 && M > 6) return groups_over<M / 4>(w, a, token, count, first, last, y, stride, add);
#else
    if (said.from) return tokens_over<KIND, M, 1>(w, a, token, count, first, last, y, stride, add, said);
#endif
    tokens_over<KIND, M, panels_at_once(M)>(w, a, token, count, first, last, y, stride, add);
}

template <int KIND>
static void some_tokens(const Matrix& w, const Activations& a, int64_t token, int64_t count, int64_t first,
                        int64_t last, float* y, int64_t stride, bool add, const Ahead& said = {}) {
    switch (count) {
        case 1: return few_tokens<KIND, 1>(w, a, token, count, first, last, y, stride, add, said);
        case 2: return few_tokens<KIND, 2>(w, a, token, count, first, last, y, stride, add, said);
        case 3: return few_tokens<KIND, 3>(w, a, token, count, first, last, y, stride, add, said);
        case 4: return few_tokens<KIND, 4>(w, a, token, count, first, last, y, stride, add, said);
        case 5: return few_tokens<KIND, 5>(w, a, token, count, first, last, y, stride, add, said);
        case 6: return few_tokens<KIND, 6>(w, a, token, count, first, last, y, stride, add, said);
#ifdef WIDE
        case 7:
        case 8: return few_tokens<KIND, 8>(w, a, token, count, first, last, y, stride, add, said);
        case 9:
        case 10:
        case 11:
        case 12: return few_tokens<KIND, 12>(w, a, token, count, first, last, y, stride, add, said);
        default: return few_tokens<KIND, 16>(w, a, token, count, first, last, y, stride, add, said);
#endif
    }
}

template <int KIND>
static void panels_of(const Matrix& w, const Activations& a, int64_t tokens, int64_t first, int64_t last, float* y,
                      int64_t stride, bool add) {
#ifdef WIDE
    // Up to sixteen at once, so that weights come from memory in one pass (int4 are few and wait for less); more are a
    // matter of computing, which goes best with six.
    const int64_t most = tokens > FEW ? 6 : KIND == INT4 ? 8 : 16;
#else
    const int64_t most = 6;
#endif
    const int64_t passes = (tokens + most - 1) / most;
    const auto pass = [&](int64_t number) {  // whose tokens begin there
        return tokens / passes * number + std::min(number, tokens % passes);
    };
#ifndef WIDE
    // Several passes over a panel, which lies in the cache after the first: meanwhile they ask for the next one, each for
    // its part, so that the memory is never idle. With many tokens it is the multipliers that are waited for.
    if (passes > 1 && tokens <= 2 * FEW) {
        for (int64_t panel = first; panel < last; panel++) {
            const bool unasked = panel == first;
            const int64_t parts = passes - unasked;
            for (int64_t i = 0; i < passes; i++) {
                Ahead said{w.panel(panel), 0};
                if (i < unasked)
                    said = {};
                else if (panel + 1 < last)
                    said = {w.panel(panel + 1) + w.panel_bytes() / parts * (i - unasked), LINE / parts};
                some_tokens<KIND>(w, a, pass(i), pass(i + 1) - pass(i), panel, panel + 1, y, stride, add, said);
            }
        }
        return;
    }
#endif
    for (int64_t i = 0; i < passes; i++)
        some_tokens<KIND>(w, a, pass(i), pass(i + 1) - pass(i), first, last, y, stride, add);
}

static void by_panels(const Matrix& w, const Activations& a, int64_t tokens, int64_t first, int64_t last, float* y,
                      int64_t stride, bool add) {
    switch (w.kind) {
        case FLOAT32: return panels_of<FLOAT32>(w, a, tokens, first, last, y, stride, add);
        case BFLOAT16: return panels_of<BFLOAT16>(w, a, tokens, first, last, y, stride, add);
        case FLOAT16: return panels_of<FLOAT16>(w, a, tokens, first, last, y, stride, add);
#ifdef WIDE
        case INT8: return panels_of<INT8>(w, a, tokens, first, last, y, stride, add);
        default: return panels_of<INT4>(w, a, tokens, first, last, y, stride, add);
#else
        case INT8: return whole_of<INT8>(w, a, tokens, first, last, y, stride, add);
        default: return whole_of<INT4>(w, a, tokens, first, last, y, stride, add);
#endif
    }
}
