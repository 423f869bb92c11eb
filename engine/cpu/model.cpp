// A step of a Llama on CPUs with AVX2 or AVX-512: all of it in one call, so that Python and its lock stay out of the way.
//
// The layers go through phases that the threads share out. With tensor parallelism each call runs one half of a layer
// on this rank's shard and leaves a partial sum for the all-reduce; the next call adds it to the residual stream.

#include "single.h"
#include "chunk.h"
#include "sampling.h"
#include "threads.h"

struct Layer {
    Matrix qkv, wo, gate_up, w2;  // gate_up: panels of the gate and of what it gates take turns
    const float* attention_norm;
    const float* ffn_norm;
};

struct Shape {
    int64_t layers, dim, heads, kv_heads, width, hidden, vocabulary;
    int64_t slots, positions, tokens, rows;  // the most that a step may have
    int32_t cache_kind, threads, partial;    // partial: the sums are to be reduced over ranks
    float epsilon;
};

struct Weights {
    const Layer* layers;
    const float* norm;
    Matrix embedding, output;
    int64_t first_row;  // of the embedding, on this rank
    int32_t embedding_is_packed;
    const float* rope;  // [position][2][width]: cosines, and sines with alternating signs
    char* keys;
    char* values;
};

struct Chunk {
    int64_t slot, position, first, count;
};

struct Step {
    int64_t tokens, singles, chunks, rows;
    const int64_t* ids;
    const int64_t* positions;
    const int64_t* slots;
    const Chunk* chunk;
    const int64_t* wanted;  // which tokens' logits
    float* logits;          // [row][logits_stride]
    int64_t logits_stride;
    float* sums;            // [token][dim]: what the ranks add up, when partial
};

class Buffer {
   public:
    void fit(int64_t bytes) {
        memory_.reset(static_cast<char*>(std::aligned_alloc(64, (bytes + 127) / 64 * 64)));
        std::memset(memory_.get(), 0, bytes);
    }
    template <typename T>
    T* as() const { return reinterpret_cast<T*>(memory_.get()); }

   private:
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    std::unique_ptr<char, Free> memory_;
};

class Model {
   public:
    Model(const Shape& shape, const Weights& weights)
        : shape_(shape), weights_(weights), layers_(weights.layers, weights.layers + shape.layers), team_(shape.threads) {
        const int64_t queries = shape.heads * shape.width, keys = shape.kv_heads * shape.width;
        const int64_t most = std::max(shape.tokens, shape.rows);
        qkv_stride_ = stride_of(queries + 2 * keys);
        gate_stride_ = 2 * padded(shape.hidden);
        residual_stride_ = stride_of(shape.dim);
        residual_.fit(shape.tokens * residual_stride_ * 4);
        qkv_.fit(shape.tokens * qkv_stride_ * 4);
        gate_.fit(shape.tokens * std::max(gate_stride_, residual_stride_) * 4);  // contribute() needs it too
        const int64_t widest = stride_of(std::max({shape.dim, queries, shape.hidden}));
        const int64_t whole = most + TILE_SIDE;  // a tile's lines behind the last token are read, but not used
        values_.fit(most * widest * 4);
        pairs_.fit(whole * widest * 2);
        narrow_.fit(whole * widest);
        scales_.fit(whole * widest / ROUND<INT4> * 4);
        offsets_.fit(whole * widest / BLOCK * 4);
        samplers_.resize(shape.threads);
        scratch_.resize(shape.threads);
        for (auto& scratch : scratch_) scratch.fit(shape.positions, shape.heads / shape.kv_heads, shape.width);
        if constexpr (CHAINED) measure();
    }

    // Stage 0 is the embedding, 1 + 2 l and 2 + 2 l are the halves of layer l, the last one makes the logits.
    void run(const Step& step, int64_t first, int64_t last) {
        team_.run([&](int thread) {
            int phase = 0;
            for (int64_t stage = first; stage < last; stage++) {
                if (stage == 0)
                    embed(step, phase);
                else if (stage > 2 * shape_.layers)
                    head(step, phase);
                else if (stage % 2)
                    attention(step, stage / 2, phase, thread);
                else
                    feed_forward(step, stage / 2 - 1, phase);
            }
        });
    }

    // A token for each row of logits, which are `count` numbers each.
    void draw(const float* logits, int64_t stride, int64_t count, int64_t rows, const Draw* options, int64_t* tokens) {
        team_.run([&](int thread) {
            int phase = 0;
            team_.share(phase, rows, 1, [&](int64_t row, int64_t) {
                tokens[row] = samplers_[thread].draw(logits + row * stride, count, options[row]);
            });
        });
    }

   private:
    // What activations must fit, for each int8 matrix, whose products are added in 16 bits.
    void measure() {
        std::vector<Matrix*> matrices;
        for (Layer& layer : layers_)
            for (Matrix* w : {&layer.qkv, &layer.wo, &layer.gate_up, &layer.w2}) matrices.push_back(w);
        matrices.push_back(&weights_.output);
        std::erase_if(matrices, [](const Matrix* w) { return w->kind != INT8; });
        tightness_.resize(matrices.size());
        for (size_t i = 0; i < matrices.size(); i++) {
            tightness_[i].fit(padded(matrices[i]->columns) / BLOCK * sizeof(float[2]));
            matrices[i]->tightness = tightness_[i].as<float[2]>();
        }
        team_.run([&](int) {
            int phase = 0;
            for (size_t i = 0; i < matrices.size(); i++) {
                const Matrix& w = *matrices[i];
                team_.share(phase, w.panel_bytes() / (PANEL * BLOCK), 8, [&](int64_t first, int64_t last) {
                    measure_chains(w, first, last, tightness_[i].as<float[2]>());
                });
            }
        });
    }

    Activations activations(int64_t columns, int64_t tokens) {
        return {values_.as<float>(), pairs_.as<uint16_t>(), narrow_.as<int8_t>(), scales_.as<float>(),
                offsets_.as<int32_t>(), stride_of(columns), tokens};
    }

    float* residual(int64_t token) { return residual_.as<float>() + token * residual_stride_; }

    void embed(const Step& step, int& phase) {
        team_.share(phase, step.tokens, 1, [&](int64_t token, int64_t) {
            float* x = residual(token);
            const int64_t row = step.ids[token] - weights_.first_row;
            float* to = shape_.partial ? step.sums + token * shape_.dim : x;
            if (shape_.partial) std::memset(x, 0, shape_.dim * 4);
            if (row < 0 || row >= weights_.embedding.rows)
                std::memset(to, 0, shape_.dim * 4);
            else
                for (int64_t i = 0; i < shape_.dim; i++) to[i] = entry(row, i);
        });
    }

    // One number of the embedding, which is a plain table or, with tied embeddings, the packed output matrix.
    float entry(int64_t row, int64_t column) const {
        const Matrix& w = weights_.embedding;
        const char* data = static_cast<const char*>(w.data);
        if (!weights_.embedding_is_packed)
            return load_one(w.kind, data + (row * w.columns + column) * (w.kind == FLOAT32 ? 4 : 2));
        const int64_t panel = row / PANEL, r = row % PANEL;
        const char* p = data + panel * w.panel_bytes();
        if (w.kind == FLOAT32) return load_one(w.kind, p + (column * PANEL + r) * 4);
        if (w.kind == FLOAT16) return load_one(w.kind, p + (column * PANEL + r) * 2);
        if (w.kind == BFLOAT16) return load_one(w.kind, p + (column / 2 * PANEL + r) * 4 + column % 2 * 2);
        // A quantized one has 8 bits in every scheme.
        return (uint8_t(p[(column / 4 * PANEL + r) * 4 + column % 4]) - 128) * w.scales[row];
    }

    // The normalised residual stream of `token`, as activation number `to`, in the form that `w` wants.
    void normalise(const Step& step, int64_t token, const Activations& a, int64_t to, const float* gain,
                   const Matrix& w) {
        float* x = residual(token);
        if (shape_.partial) {
            const float* more = step.sums + token * shape_.dim;
            for (int64_t i = 0; i < shape_.dim; i++) x[i] += more[i];
        }
        float* out = a.values + to * a.stride;
        Floats squares = zeros();
        int64_t i = 0;
        for (; i + LANES <= shape_.dim; i += LANES) squares = fused(load(x + i), load(x + i), squares);
        float sum = sum_of(squares);
        for (; i < shape_.dim; i++) sum += x[i] * x[i];
        const float factor = 1.0f / std::sqrt(sum / float(shape_.dim) + shape_.epsilon);
        for (i = 0; i < shape_.dim; i++) out[i] = x[i] * factor * gain[i];
        prepare(a, to, w);
    }

    void product(int& phase, const Matrix& w, const Activations& a, int64_t tokens, float* y,
                 int64_t stride, bool add) {
        team_.share_ahead(phase, w.panels(), share_of(w, tokens, team_.size()),
                          [&](int64_t first, int64_t last, const auto& next) {
                              multiply(w, a, tokens, first, last, y, stride, add, next);
                          });
    }

    // Onto the residual stream, or into the sums that the ranks add up.
    void contribute(const Step& step, int& phase, const Matrix& w, const Activations& a) {
        if (!shape_.partial) {
            product(phase, w, a, step.tokens, residual_.as<float>(), residual_stride_, true);
            return;
        }
        // Panels are whole, rows may not be: through a buffer with room behind the last row.
        float* y = gate_.as<float>();
        product(phase, w, a, step.tokens, y, residual_stride_, false);
        team_.share(phase, step.tokens, 1, [&](int64_t token, int64_t) {
            std::memcpy(step.sums + token * shape_.dim, y + token * residual_stride_, shape_.dim * 4);
        });
    }

    void attention(const Step& step, int64_t number, int& phase, int thread) {
        const Layer& layer = layers_[number];
        const int64_t width = shape_.width, group = shape_.heads / shape_.kv_heads;
        const int64_t queries = shape_.heads * width, keys = shape_.kv_heads * width;
        Cache cache{shape_.cache_kind, shape_.kv_heads, shape_.positions, width, nullptr, nullptr};
        const int64_t bytes = cache.offset(shape_.slots, 0, 0) * number;
        cache.keys = weights_.keys + bytes;
        cache.values = weights_.values + bytes;
        float* qkv = qkv_.as<float>();

        const Activations before = activations(shape_.dim, step.tokens);
        team_.share(phase, step.tokens, 1, [&](int64_t token, int64_t) {
            normalise(step, token, before, token, layer.attention_norm, layer.qkv);
        });
        product(phase, layer.qkv, before, step.tokens, qkv, qkv_stride_, false);
        team_.share(phase, step.tokens, 1, [&](int64_t token, int64_t) {
            float* x = qkv + token * qkv_stride_;
            const int64_t position = step.positions[token], slot = step.slots[token];
            const float* turn = weights_.rope + position * 2 * width;
            for (int64_t head = 0; head < shape_.heads + shape_.kv_heads; head++) rotate(x + head * width, turn);
            for (int64_t head = 0; head < shape_.kv_heads; head++) {
                const int64_t place = cache.offset(slot, head, position);
                store_as(cache.kind, cache.keys + place, x + queries + head * width, width);
                store_as(cache.kind, cache.values + place, x + queries + keys + head * width, width);
            }
        });
        const Activations a = activations(queries, step.tokens);
        // A thread takes some heads of single tokens one after the other.
        const int64_t singles = step.singles * shape_.kv_heads;
        const int64_t each = std::clamp<int64_t>(singles / (8 * team_.size()), 1, 4), runs = (singles + each - 1) / each;
        int64_t blocks = 0;
        for (int64_t i = 0; i < step.chunks; i++) blocks += (step.chunk[i].count + QUERIES - 1) / QUERIES;
        // The last blocks of a chunk see most: they go first.
        team_.share_ahead(phase, runs + blocks * shape_.kv_heads, 1, [&](int64_t item, int64_t, const auto& next) {
            const int64_t end = std::min(singles, (item + 1) * each);
            for (int64_t i = item * each; i < end; i++) {
                const auto place = [&](int64_t which) {
                    return cache.offset(step.slots[which / shape_.kv_heads], which % shape_.kv_heads, 0);
                };
                const int64_t then = i + 1 < end ? i + 1 : next() * each;
                Coming coming{cache.keys + place(i), 0};
                if (then < singles) coming = {cache.keys + place(then), step.positions[then / shape_.kv_heads] + 1};
                const int64_t token = i / shape_.kv_heads, head = i % shape_.kv_heads;
                attend_single(cache, step.slots[token], head, step.positions[token], group,
                              qkv + token * qkv_stride_ + head * group * width,
                              a.values + token * a.stride + head * group * width, coming, scratch_[thread]);
            }
            if (item < runs) return;
            const int64_t head = (item - runs) % shape_.kv_heads;
            int64_t block = blocks - 1 - (item - runs) / shape_.kv_heads, i = 0;
            for (int64_t n; block >= (n = (step.chunk[i].count + QUERIES - 1) / QUERIES); i++) block -= n;
            const Chunk& chunk = step.chunk[i];
            const int64_t from = block * QUERIES, count = std::min(QUERIES, chunk.count - from);
            const int64_t token = chunk.first + from;
            attend_block(cache, chunk.slot, head, chunk.position + from, count, group,
                         qkv + token * qkv_stride_ + head * group * width, qkv_stride_,
                         a.values + token * a.stride + head * group * width, a.stride, scratch_[thread]);
        });
        if (wants_preparation(layer.wo))
            team_.share(phase, step.tokens, 1, [&](int64_t token, int64_t) { prepare(a, token, layer.wo); });
        contribute(step, phase, layer.wo, a);
    }

    void rotate(float* x, const float* turn) const {
        const int64_t width = shape_.width;
        int64_t h = 0;
        for (; h + 8 <= width; h += 8) {
            const __m256 v = _mm256_loadu_ps(x + h), swapped = _mm256_permute_ps(v, 0xb1);
            _mm256_storeu_ps(x + h, _mm256_fmadd_ps(v, _mm256_loadu_ps(turn + h),
                                                    _mm256_mul_ps(swapped, _mm256_loadu_ps(turn + width + h))));
        }
        for (; h < width; h += 2) {
            const float even = x[h], odd = x[h + 1];
            x[h] = even * turn[h] + odd * turn[width + h];
            x[h + 1] = odd * turn[h + 1] + even * turn[width + h + 1];
        }
    }

    void feed_forward(const Step& step, int64_t number, int& phase) {
        const Layer& layer = layers_[number];
        float* gate = gate_.as<float>();
        const Activations before = activations(shape_.dim, step.tokens);
        team_.share(phase, step.tokens, 1, [&](int64_t token, int64_t) {
            normalise(step, token, before, token, layer.ffn_norm, layer.gate_up);
        });
        product(phase, layer.gate_up, before, step.tokens, gate, gate_stride_, false);
        const Activations a = activations(shape_.hidden, step.tokens);
        team_.share(phase, step.tokens, 1, [&](int64_t token, int64_t) {
            const float* x = gate + token * gate_stride_;
            float* out = a.values + token * a.stride;
            for (int64_t i = 0; i < (shape_.hidden + PANEL - 1) / PANEL * PANEL; i += LANES) {
                const Floats g = load(x + 2 * i), up = load(x + 2 * i + PANEL);
                store(out + i, g / (all(1.0f) + exponential(zeros() - g)) * up);
            }
            prepare(a, token, layer.w2);
        });
        contribute(step, phase, layer.w2, a);
    }

    void head(const Step& step, int& phase) {
        const Activations a = activations(shape_.dim, step.rows);
        team_.share(phase, step.rows, 1, [&](int64_t row, int64_t) {
            normalise(step, step.wanted[row], a, row, weights_.norm, weights_.output);
        });
        product(phase, weights_.output, a, step.rows, step.logits, step.logits_stride,
                false);
    }

    const Shape shape_;
    Weights weights_;
    std::vector<Layer> layers_;
    Team team_;
    int64_t qkv_stride_, gate_stride_, residual_stride_;
    Buffer residual_, qkv_, gate_, values_, pairs_, narrow_, scales_, offsets_;
    std::vector<Buffer> tightness_;
    std::vector<Scratch> scratch_;
    std::vector<Sampler> samplers_;
};

extern "C" {

Model* model_new(const Shape* shape, const Weights* weights) { return new Model(*shape, *weights); }

void model_run(Model* model, const Step* step, int64_t first, int64_t last) { model->run(*step, first, last); }

void model_draw(Model* model, const float* logits, int64_t stride, int64_t count, int64_t rows, const Draw* options,
                int64_t* tokens) {
    model->draw(logits, stride, count, rows, options, tokens);
}

void model_delete(Model* model) { delete model; }
}
