// What a step's layers share: its tokens, and the kinds of attention, each of which projects, keeps and mixes.
#pragma once
#include <vector>

#include "attention.h"
#include "mixture.h"

namespace moestro {

// Consecutive tokens of one sequence that attend together: `first` of all tokens, `before` of the sequence's.
struct Part {
    int64_t sequence, first, before, rows;
};

// Memory of one thread.
struct Memory {
    std::vector<float> row, normed, queries, mixed;
    AttentionMemory attention;
};

// The new tokens of several sequences, sequence by sequence.
struct Batch {
    moestro_decoder d{};
    const moestro_past *pasts = nullptr;
    const float *cosines = nullptr, *sines = nullptr;
    int64_t b = 0, t = 0;  // sequences, tokens
    std::vector<int64_t> sequence, offset,
        told;                     // of each token: whose, and which of it; those whose logits are wanted
    std::vector<float> x, added;  // [T, D]: the residual, and what attention adds to it

    // Throws std::bad_alloc.
    void plan(const moestro_decoder &decoder, int64_t sequences, const moestro_past *their_pasts);
    // Parts of at most so many tokens.
    std::vector<Part> parts(int64_t rows) const;
    // Turn the first numbers of a token's head to its position.
    void turn(float *head, int64_t token) const;
    const float *residual(int64_t token) const { return x.data() + token * d.dim; }
    int64_t position(int64_t token, int64_t layer) const {
        return pasts[sequence[size_t(token)]].place[layer] + offset[size_t(token)];
    }
};

// x · gain / sqrt(mean(x²) + eps); with a bias of x - mean(x), and the bias added.
void norm(const float *from, const float *gain, const float *bias, int64_t dim, float eps, float *to);
// A row as it is multiplied, zeros after `count` values.
void set(Prepared &to, int64_t row, const float *from, int64_t count, Memory &memory);
// The normed residual of a token.
const float *before_attention(const Batch &batch, const moestro_layer &layer, int64_t token, Memory &memory);
float sigmoid(float x);
// x · sigmoid(by), in place; `by` may be x.
void gate(float *x, const float *by, int64_t count, Memory &memory);
// Room for `width` numbers of each token, at least.
void grow(std::vector<float> &numbers, int64_t tokens, int64_t width);
// What is added to the residual: every token's `mixed` [width] through the layer's last matrix. All threads; ends
// with a wait. `rows` has been shaped for it.
void project(Team &team, Batch &batch, const moestro_layer &layer, const std::vector<float> &mixed, int64_t width,
             Prepared &rows, Memory &memory);
// A row of numbers into a cache of rows, in its dtype.
void keep(const float *from, int32_t dtype, void *to, float *scales, int64_t row, int64_t width);

// Keys and values of groups of heads.
class GroupedAttention {
public:
    static bool good(const moestro_layer &layer, const moestro_decoder &d);
    void plan(const Batch &batch);  // by one thread; throws std::bad_alloc
    // All threads; ends with a wait. False: see `Team::once`.
    bool run(Team &team, Batch &batch, int64_t l, Memory &memory);

private:
    void place(const Batch &batch, int64_t l, int64_t t);
    void turn(const Batch &batch, float *head, const float *gain, int64_t t) const;
    void attend(const Batch &batch, int64_t l, const Part &part, int64_t g, Memory &memory);

    int64_t heads_ = 0, groups_ = 0, width_ = 0;  // H, G, A
    int64_t step_ = 0, inner_ = 0, wide_ = 0;     // from one query to the next; H·A; all that is projected
    std::vector<Part> parts_;
    std::vector<float> qkv_, mixed_;
    Prepared rows_, inner_rows_;
};

// Latent vectors that all heads share.
class LatentAttention {
public:
    static bool good(const moestro_layer &layer, const moestro_decoder &d);
    void plan(const Batch &batch);  // by one thread; throws std::bad_alloc
    // All threads; ends with a wait. False: see `Team::once`.
    bool run(Team &team, Batch &batch, int64_t l, Memory &memory);

private:
    void place(const Batch &batch, const moestro_latent &w, int64_t l, int64_t t);
    void lower(const Batch &batch, const moestro_latent &w, int64_t t, int64_t count, int64_t h, Memory &memory);
    void raise(const Batch &batch, const moestro_latent &w, int64_t t, int64_t count, int64_t h, Memory &memory);
    void attend(const Batch &batch, const moestro_latent &w, int64_t l, const Part &part, int64_t first,
                Memory &memory);
    // A row of the matrix that keys and values come from.
    static const void *up(const moestro_latent &w, int64_t row) {
        return static_cast<const char *>(w.kv_up) + row * w.kv_rank * (w.kv_up_dtype == MOESTRO_ROWS_F32 ? 4 : 2);
    }

    std::vector<Part> parts_;
    // [T, ·]: queries before and after the rank's norm, what is kept, queries [H, R + A], mixed [H, R], values [H, O].
    std::vector<float> low_, queries_, kept_, down_, mixed_, values_;
    Prepared rows_, kv_rows_, low_rows_, out_rows_;
};

// A state of fixed size in place of keys and values.
class DeltaNet {
public:
    static bool good(const moestro_layer &layer, const moestro_decoder &d);
    void plan(const Batch &batch);  // by one thread; throws std::bad_alloc
    // All threads; ends with a wait. False: see `Team::once`.
    bool run(Team &team, Batch &batch, int64_t l, Memory &memory);

private:
    void convolve(const Batch &batch, const moestro_delta &w, int64_t l, int64_t t, Memory &memory);
    void carry(const Batch &batch, const moestro_delta &w, int64_t l, int64_t s, int64_t h, Memory &memory);
    void remember(const Batch &batch, const moestro_delta &w, int64_t l, int64_t s);

    std::vector<int64_t> first_;                             // token of each sequence, and the number of all
    std::vector<float> projected_, convolved_, ba_, mixed_;  // [T, ·]
    Prepared rows_, out_rows_;
};

}  // namespace moestro
