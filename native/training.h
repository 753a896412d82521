// What AMX tiles, or vectors in their place, do for the training of experts. All widths are multiples of 32; sums are
// fp32.
#pragma once
#include <cstdint>

namespace moestro {

constexpr int64_t CHUNK = 64;        // rows that go through a network together, while the cache holds them
constexpr int64_t GRAD_BLOCK = 256;  // largest height and width of a gradient's block, and rows at a time

// Memory to bring into the cache, a few lines at each step of a product.
struct Prefetch {
    const void *at = nullptr;
    int64_t row_bytes = 0, step_bytes = 0, rows = 0;
    int64_t lines = 0;  // at each step
};

// A block of dyᵀ · x over one group's rows: `height` columns of the transposed matrix, `width` of the other.
struct GradBlock {
    const uint16_t *transposed;  // its first column; tiles of 16 columns by 32 rows
    int64_t depth;               // rows of the group, rounded up to 32
    const uint16_t *other;       // its first column
    int64_t ld;                  // values between rows of the other
    int64_t rows, height, width;
};

struct TrainingKernels {
    // 32 rows [32, k] of fp32 or bf16 (`is_fp32`) weights as the 32 columns that their transpose has: k · 32.
    void (*pack_rows)(bool is_fp32, const void *w, int64_t k, uint16_t *to);
    // `rows` ≤ 32 rows [rows, n] (distance `ld`) as part of n / 32 blocks of 32 columns, `depth` · 32 apart;
    // rows that are missing are zero.
    void (*pack_columns)(bool is_fp32, const void *x, int64_t ld, int64_t rows, int64_t n, int64_t depth, uint16_t *to);
    // y [m, n] = x [m, k] · packed, for a few rows.
    void (*multiply)(const uint16_t *x, int64_t m, int64_t k, const uint16_t *packed, int64_t n, uint16_t *y,
                     Prefetch next);
    // act [m, f] = silu(gate) · up of hidden [m, 2f].
    void (*swiglu)(const uint16_t *hidden, int64_t m, int64_t f, uint16_t *act);
    // The gradient of hidden from that of act, and act again.
    void (*swiglu_back)(const uint16_t *grad, const uint16_t *hidden, int64_t m, int64_t f, uint16_t *grad_hidden,
                        uint16_t *act);
    // `rows` ≤ 32 rows (distance `ld`) of 32 columns as two tiles of 16 columns, `stride` values apart.
    void (*transpose)(const uint16_t *x, int64_t ld, int64_t rows, uint16_t *to, int64_t stride);
    // sums [GRAD_BLOCK, GRAD_BLOCK] of a block; `scratch` holds GRAD_BLOCK · GRAD_BLOCK values.
    void (*sum)(const GradBlock &block, uint16_t *scratch, float *sums);
    // Part of sums, or its transpose, at rows of fp32 or bf16 (`is_fp32`) `ld` values apart.
    void (*write)(const float *sums, int64_t height, int64_t width, bool transpose, bool is_fp32, void *to, int64_t ld);
};

// Those of a path; null where the processor has no bf16 products on it.
const TrainingKernels *training_kernels(int32_t path);

}  // namespace moestro
