// What each instruction set provides: the same functions, with the same bits as results.
#pragma once
#include <cstdint>

#include "moestro.h"

namespace moestro {

constexpr int64_t COLUMNS = 32;  // output columns of a block
constexpr int64_t PAIRS = 32;    // inputs after which bf16 sums are folded, as an AMX tile does

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

constexpr int64_t TILE = 16;  // rows of an AMX tile

// Rows ready to be multiplied. bf16: `bits` and the same values as fp32 in `values` [m, k]; fp32:
// `values` alone. Weights of integers: `bytes` in [-127, 127], with a scale and a sum per group.
// `bits` and `bytes` lie as tiles, 16 rows of 32 inputs or of one group, one tile after another.
struct Rows {
    const uint16_t *bits = nullptr;
    const float *values = nullptr;
    const int8_t *bytes = nullptr;
    const float *scales = nullptr;  // [m, k / group]
    const int32_t *sums = nullptr;  // [m, k / group]
    int64_t k = 0;                  // padded inputs
    int64_t m = 0;

    const int8_t *at(int64_t row, int64_t g, int64_t group) const { return bytes + tile_offset(row, g, group, k); }
    // Where a row's part `step` of `width` inputs begins.
    static int64_t tile_offset(int64_t row, int64_t step, int64_t width, int64_t k) {
        return row / TILE * TILE * k + (step * TILE + row % TILE) * width;
    }
};

// Weights of integers lie group by group: fp16 scales of 32 columns, minima where the kind has them, then integers.
constexpr bool has_minima(int32_t kind) { return kind == MOESTRO_UINT4; }
constexpr bool has_table(int32_t kind) { return kind >= MOESTRO_MXFP4 && kind <= MOESTRO_NF4; }
constexpr bool is_nibbles(int32_t kind) { return kind == MOESTRO_INT4 || kind == MOESTRO_UINT4 || has_table(kind); }
constexpr int64_t head_bytes(int32_t kind) { return has_minima(kind) ? 128 : 64; }
constexpr int64_t line_bytes(int32_t kind, int64_t group) { return group * COLUMNS / (is_nibbles(kind) ? 2 : 1); }
constexpr int64_t group_bytes(int32_t kind, int64_t group) { return head_bytes(kind) + line_bytes(kind, group); }

// The integers that nibbles stand for: as they are, less 8, twice OCP's e2m1, ggml's IQ4_NL, 127 times NF4's numbers.
alignas(16) inline constexpr int8_t TABLES[5][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7},
    {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12},
    {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113},
    {-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127}};
constexpr const int8_t *table_of(int32_t kind) {
    return TABLES[has_table(kind) ? kind - MOESTRO_MXFP4 + 2 : kind == MOESTRO_INT4 ? 1 : 0];
}

struct Block {
    const uint8_t *data;
    int32_t kind, group;
};

// out [m, 32] (distance `ld` between rows) = rows · block.
using Multiply = void (*)(const Block &, const Rows &, float *out, int64_t ld);
// Apply an activation: out[f] from up to 32 gate and up values (plain kinds read `gate` only).
using Activate = void (*)(int32_t activation, const float *gate, const float *up, float *out, int64_t n);
// fp32 [k] → bf16 bits and their fp32 values.
using Round = void (*)(const float *x, int64_t k, uint16_t *bits, float *values);
// fp32 [k] → bytes, one scale and one sum per group.
using Quantise = void (*)(const float *x, int64_t k, int64_t group, int8_t *bytes, float *scales, int32_t *sums);
// y += w · x.
using Add = void (*)(float w, const float *x, float *y, int64_t n);

// Sum of products in one fixed order.
using Dot = float (*)(const float *a, const float *b, int64_t n);
// Several queries [queries, width] against several keys: scores [queries, keys] = scale · query · key.
struct ScoreShape {
    int64_t queries, keys, width, keys_stride, scores_stride;
    float scale;
};
// Keys are fp32 or bf16; `columns` is memory for 32 of them, width · 32 words.
using Scores = void (*)(const float *queries, const void *keys, bool is_fp32, const ScoreShape &s, float *scores,
                        uint32_t *columns);
// The same of keys that are bytes with a scale each, and of queries that are integers of 16 bits, |q| ≤ MOST_WHOLE,
// with a scale each: exact whole numbers times both scales times s.scale. Keys lie `width` apart, queries
// whole_words(width) words: for each four numbers first and third, then second and fourth; zeros at the end.
constexpr int32_t MOST_WHOLE = 16383;
constexpr int64_t WIDEST_WHOLE = 1024;  // 127 · MOST_WHOLE · WIDEST_WHOLE < 2^31
constexpr int64_t whole_words(int64_t width) { return round_up(width, 64) / 2; }
struct WholeQueries {
    const int32_t *data;
    const float *scales;
};
struct WholeKeys {
    const int8_t *data;
    const float *scales;
};
// `columns` is memory for whole_words(width) · 32 words.
using WholeScores = void (*)(const WholeQueries &queries, const WholeKeys &keys, const ScoreShape &s, float *scores,
                             uint32_t *columns);
// out [queries, width] += weights [queries, values] · values, which are of a dtype MOESTRO_ROWS_….
struct MixShape {
    int64_t queries, values, width, values_stride, weights_stride;
};
using Mix = void (*)(const float *weights, const void *values, int32_t dtype, const MixShape &s, float *out);
// y = x · y, number by number.
using Times = void (*)(const float *x, float *y, int64_t n);
// The largest of n ≥ 1 numbers.
using Largest = float (*)(const float *x, int64_t n);
// x → e^(x - max); returns the sum.
using Exponentials = float (*)(float *x, float max, int64_t n);
// Rows of 32-bit words to columns: to[word * 32 + row], zeros for the rows that are missing.
using Transpose = void (*)(const uint8_t *from, int64_t row_bytes, int64_t rows, int64_t words, uint32_t *to);
// Some sum of all bytes, as fast as they can be read.
using Read = uint64_t (*)(const void *data, int64_t bytes);

struct Kernels {
    Multiply multiply;
    Activate activate;
    Round round;
    Quantise quantise;
    Add add;
    Dot dot;
    Scores scores;
    WholeScores whole_scores;
    Mix mix;
    Times times;
    Largest largest;
    Exponentials exponentials;
    Transpose transpose;
    Read read;
};

extern const Kernels portable, avx2, avx2_vnni, avx512, amx;
bool amx_allowed();  // ask the system for AMX state

}  // namespace moestro
