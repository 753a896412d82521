// Training's products of bf16, by AMX tiles or by AVX-512's own dot products, and what goes around them.
#include "kernels.h"
#include "training.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")

namespace moestro {
namespace {
#include "tiles.inc"

inline void prefetch(const void *at) { _mm_prefetch(static_cast<const char *>(at), _MM_HINT_T1); }

inline __m512i narrow(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
// 32 numbers as bf16.
inline __m512i read32(const float *at) { return narrow(_mm512_loadu_ps(at), _mm512_loadu_ps(at + 16)); }
inline __m512i read32(const uint16_t *at) { return _mm512_loadu_si512(at); }
// 16 numbers as fp32.
inline __m512 read16(const uint16_t *at) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline void write16(float *to, __m512i x) { _mm512_storeu_si512(to, x); }
inline void write16(uint16_t *to, __m512i x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(x)));
}

// ---- Rows and weights in the form of tiles: a tile of weights holds pairs (of rows) for each column.

// Rows a and b, 32 wide, as 32 pairs (a[n], b[n]).
inline void pair_up(__m512i a, __m512i b, __m512i *low, __m512i *high) {
    alignas(64) static const uint16_t FIRST[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                   8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i first = _mm512_load_si512(FIRST), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    *low = _mm512_permutex2var_epi16(a, first, b);
    *high = _mm512_permutex2var_epi16(a, second, b);
}

template <class T> void pack_rows_of(const T *w, int64_t k, uint16_t *to) {
    const T *next = w + 32 * k;  // the rows of the next block, in their order
    for (int64_t at = 0; at < k; at += 32)
        for (int half = 0; half < 2; half++, next += 512) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) {
                if (sizeof(T) == 4) prefetch(next + i * 16), prefetch(next + 256 + i * 16);
                r[i] = read32(w + (half * 16 + i) * k + at);
            }
            transpose16(r);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + (at / 2 + i) * 64 + half * 32, r[i]);
        }
}

template <class T> void pack_columns_of(const T *x, int64_t ld, int64_t rows, int64_t n, int64_t depth, uint16_t *to) {
    const __m512i none = _mm512_setzero_si512();
    for (int64_t at = 0; at < 32; at += 2, to += 64) {
        const T *a = x + at * ld, *b = a + ld, *later = a + 8 * ld;
        for (int64_t j = 0; j < n; j += 32) {
            for (int64_t q = 0; q < 32; q += 64 / int64_t(sizeof(T))) {
                _mm_prefetch(reinterpret_cast<const char *>(later + j + q), _MM_HINT_T0);
                _mm_prefetch(reinterpret_cast<const char *>(later + ld + j + q), _MM_HINT_T0);
            }
            __m512i low, high;
            pair_up(at < rows ? read32(a + j) : none, at + 1 < rows ? read32(b + j) : none, &low, &high);
            _mm512_storeu_si512(to + j * depth, low);
            _mm512_storeu_si512(to + j * depth + 32, high);
        }
    }
}

void pack_rows(bool is_fp32, const void *w, int64_t k, uint16_t *to) {
    if (is_fp32) pack_rows_of(static_cast<const float *>(w), k, to);
    else pack_rows_of(static_cast<const uint16_t *>(w), k, to);
}

void pack_columns(bool is_fp32, const void *x, int64_t ld, int64_t rows, int64_t n, int64_t depth, uint16_t *to) {
    if (is_fp32) pack_columns_of(static_cast<const float *>(x), ld, rows, n, depth, to);
    else pack_columns_of(static_cast<const uint16_t *>(x), ld, rows, n, depth, to);
}

void transpose(const uint16_t *x, int64_t ld, int64_t rows, uint16_t *to, int64_t stride) {
    const __m512i none = _mm512_setzero_si512();
    __m512i r[2][16];
    for (int i = 0; i < 16; i++)
        pair_up(2 * i < rows ? read32(x + 2 * i * ld) : none, 2 * i + 1 < rows ? read32(x + (2 * i + 1) * ld) : none,
                &r[0][i], &r[1][i]);
    for (int half = 0; half < 2; half++) {
        transpose16(r[half]);
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + half * stride + i * 32, r[half][i]);
    }
}

// ---- Products. What the vectors do (rounding, fetching) goes between the tiles' instructions.

// Sums of the block before, [rows, 32], to be rounded to bf16.
struct Rounding {
    const float *from = nullptr;
    uint16_t *to = nullptr;
    int64_t ld = 0, rows = 0, at = 0;
    inline void advance(int64_t count) {
        for (const int64_t end = at + count < rows ? at + count : rows; at < end; at++)
            _mm512_storeu_si512(to + at * ld, read32(from + at * 32));
    }
};

inline void prefetch_lines(Prefetch &next, int64_t &column) {
    for (int64_t i = 0; i < next.lines && next.rows; i++) {
        prefetch(static_cast<const char *>(next.at) + column);
        column += 64;
        if (column >= next.row_bytes)
            next.at = static_cast<const char *>(next.at) + next.step_bytes, column = 0, next.rows--;
    }
}

// What the vector units do between the steps of a product.
struct Overlap {
    Rounding rounding;
    int64_t each = 0;  // rows to round at each step
    Prefetch next;
    int64_t column = 0;
    inline void step() {
        rounding.advance(each);
        prefetch_lines(next, column);
    }
};

// Tiles 0-3 += rows · 32 columns over k inputs. The rows' tiles begin at a and a2; each step is `next` values on.
template <bool TWO>
inline void dots(const uint16_t *a, const uint16_t *a2, int64_t ld, int64_t next, const uint16_t *b, int64_t k,
                 Overlap &overlap) {
    for (int64_t at = 0; at < k; at += 32, a += next, a2 += next, b += 1024) {
        LOAD(4, a, ld * 2);
        LOAD(6, b, 128);
        LOAD(7, b + 32, 128);
        DOT_BF16(0, 4, 6);
        DOT_BF16(1, 4, 7);
        if (TWO) {
            LOAD(5, a2, ld * 2);
            DOT_BF16(2, 5, 6);
            DOT_BF16(3, 5, 7);
        }
        overlap.step();
    }
}

inline void zero_tiles() {
    ZERO(0);
    ZERO(1);
    ZERO(2);
    ZERO(3);
}

void multiply(const uint16_t *x, int64_t m, int64_t k, const uint16_t *packed, int64_t n, uint16_t *y, Prefetch next) {
    alignas(64) float sums[2][32 * 32];
    Overlap overlap;
    overlap.each = (32 * 32 + k - 1) / k, overlap.next = next;
    int64_t shaped = 0;
    int current = 0;
    for (int64_t block = 0; block < n; block += 32, packed += 32 * k)
        for (int64_t at = 0; at < m; at += 32, current ^= 1) {
            const int64_t rows = m - at < 32 ? m - at : 32;
            if (rows != shaped) shape_tiles(rows, 16), shaped = rows;
            const uint16_t *a = x + at * k;
            if (block == 0)
                for (int64_t i = 0; i < 32 * k; i += 32) prefetch(a + 32 * k + i);
            zero_tiles();
            if (rows > 16) dots<true>(a, a + 16 * k, k, 32, packed, k, overlap);
            else dots<false>(a, a, k, 32, packed, k, overlap);
            overlap.rounding.advance(32);
            float *sum = sums[current];
            STORE(0, sum, 128);
            STORE(1, sum + 16, 128);
            if (rows > 16) {
                STORE(2, sum + 16 * 32, 128);
                STORE(3, sum + 16 * 32 + 16, 128);
            }
            overlap.rounding = {sum, y + at * n + block, n, rows, 0};
        }
    overlap.rounding.advance(32);
}

// Rows of the other matrix, from row `at` on, as columns.
inline void pack_grad_block(const GradBlock &p, int64_t at, int64_t rows, uint16_t *to) {
    for (int64_t r = 0; r < rows; r += 32)
        pack_columns(false, p.other + (at + r) * p.ld, p.ld, rows - r, p.width, round_up(rows, 32), to + r * 32);
}

void sum_grad_block(const GradBlock &p, uint16_t *scratch, float *sums) {
    shape_tiles(32, 16);
    for (int64_t at = 0; at < p.rows; at += GRAD_BLOCK) {
        const int64_t rows = p.rows - at < GRAD_BLOCK ? p.rows - at : GRAD_BLOCK, depth = round_up(rows, 32);
        pack_grad_block(p, at, rows, scratch);
        Overlap overlap;
        const int64_t rest = p.rows - at - rows;
        if (rest)
            overlap.next = {p.other + (at + rows) * p.ld, p.width * 2, p.ld * 2, rest < GRAD_BLOCK ? rest : GRAD_BLOCK,
                            5};
        for (int64_t i = 0; i < p.height; i += 32) {
            const uint16_t *a = p.transposed + i * p.depth + at * 16;
            for (int64_t j = 0; j < p.width; j += 32) {
                float *sum = sums + i * GRAD_BLOCK + j;
                if (at) {
                    LOAD(0, sum, GRAD_BLOCK * 4);
                    LOAD(1, sum + 16, GRAD_BLOCK * 4);
                    LOAD(2, sum + 16 * GRAD_BLOCK, GRAD_BLOCK * 4);
                    LOAD(3, sum + 16 * GRAD_BLOCK + 16, GRAD_BLOCK * 4);
                } else {
                    zero_tiles();
                }
                dots<true>(a, a + 16 * p.depth, 32, 512, scratch + j * depth, rows, overlap);
                STORE(0, sum, GRAD_BLOCK * 4);
                STORE(1, sum + 16, GRAD_BLOCK * 4);
                STORE(2, sum + 16 * GRAD_BLOCK, GRAD_BLOCK * 4);
                STORE(3, sum + 16 * GRAD_BLOCK + 16, GRAD_BLOCK * 4);
            }
        }
    }
}

// ---- The same products by vectors, where there are no tiles.

constexpr int TOGETHER = 8;  // rows whose sums share registers

// sums of M rows and 32 columns += rows · columns over k inputs, laid out as for `dots`.
template <int M>
inline void vector_dots(const uint16_t *a, int64_t ld, int64_t next, const uint16_t *b, int64_t k,
                        __m512 (&sums)[M][2]) {
    for (int64_t at = 0; at < k; at += 32, a += next)
        for (int64_t i = 0; i < 32; i += 2, b += 64) {
            const __m512bh low = (__m512bh)read32(b), high = (__m512bh)read32(b + 32);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                int32_t pair;
                __builtin_memcpy(&pair, a + m * ld + i, 4);
                const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
                sums[m][0] = _mm512_dpbf16_ps(sums[m][0], both, low);
                sums[m][1] = _mm512_dpbf16_ps(sums[m][1], both, high);
            }
        }
}

template <int M> inline void multiply_rows(const uint16_t *x, int64_t k, const uint16_t *packed, int64_t n,
                                           uint16_t *y) {
    __m512 sums[M][2] = {};
    vector_dots(x, k, 32, packed, k, sums);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) _mm512_storeu_si512(y + m * n, narrow(sums[m][0], sums[m][1]));
}

void vector_multiply(const uint16_t *x, int64_t m, int64_t k, const uint16_t *packed, int64_t n, uint16_t *y,
                     Prefetch) {
    for (int64_t block = 0; block < n; block += 32, packed += 32 * k) {
        int64_t at = 0;
        for (; at + TOGETHER <= m; at += TOGETHER)
            multiply_rows<TOGETHER>(x + at * k, k, packed, n, y + at * n + block);
        for (; at + 2 <= m; at += 2) multiply_rows<2>(x + at * k, k, packed, n, y + at * n + block);
        if (at < m) multiply_rows<1>(x + at * k, k, packed, n, y + at * n + block);
    }
}

void vector_sum_grad_block(const GradBlock &p, uint16_t *scratch, float *sums) {
    for (int64_t at = 0; at < p.rows; at += GRAD_BLOCK) {
        const int64_t rows = p.rows - at < GRAD_BLOCK ? p.rows - at : GRAD_BLOCK, depth = round_up(rows, 32);
        pack_grad_block(p, at, rows, scratch);
        for (int64_t j = 0; j < p.width; j += 32)
            for (int64_t i = 0; i < p.height; i += TOGETHER) {
                const uint16_t *a = p.transposed + i / TILE * TILE * p.depth + at * TILE + i % TILE * 32;
                float *place = sums + i * GRAD_BLOCK + j;
                __m512 some[TOGETHER][2] = {};
#pragma GCC unroll 8
                for (int m = 0; m < TOGETHER; m++)
                    for (int h = 0; at && h < 2; h++) some[m][h] = _mm512_loadu_ps(place + m * GRAD_BLOCK + h * 16);
                vector_dots(a, 32, 512, scratch + j * depth, rows, some);
#pragma GCC unroll 8
                for (int m = 0; m < TOGETHER; m++)
                    for (int h = 0; h < 2; h++) _mm512_storeu_ps(place + m * GRAD_BLOCK + h * 16, some[m][h]);
            }
    }
}

template <class T> void write_grad_block_of(const float *sums, int64_t height, int64_t width, bool transpose, T *to,
                                            int64_t ld) {
    for (int64_t i = 0; i < height; i += 16)
        for (int64_t j = 0; j < width; j += 16) {
            __m512i r[16];
            for (int q = 0; q < 16; q++) r[q] = _mm512_loadu_si512(sums + (i + q) * GRAD_BLOCK + j);
            if (transpose) transpose16(r);
            T *place = transpose ? to + j * ld + i : to + i * ld + j;
            for (int q = 0; q < 16; q++) write16(place + q * ld, r[q]);
        }
}

void write_grad_block(const float *sums, int64_t height, int64_t width, bool transpose, bool is_fp32, void *to,
                      int64_t ld) {
    if (is_fp32) write_grad_block_of(sums, height, width, transpose, static_cast<float *>(to), ld);
    else write_grad_block_of(sums, height, width, transpose, static_cast<uint16_t *>(to), ld);
}

// ---- SwiGLU.

// 1 / (1 + e^-x): e^-x = 2^n · p(r) and one step of Newton's after the estimate, together within 5e-6;
// 0 below -87, where e^-x leaves fp32.
inline __m512 sigmoid16(__m512 x) {
    const __m512 one = _mm512_set1_ps(1);
    const __m512 cut = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87)), _mm512_set1_ps(87));
    const __m512 t = _mm512_mul_ps(cut, _mm512_set1_ps(-1.44269504088896341f));
    const __m512 n = _mm512_roundscale_ps(t, 8), r = _mm512_sub_ps(t, n);
    __m512 p = _mm512_set1_ps(9.61812911e-3f);
    constexpr float REST[] = {5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f};
    for (float c : REST) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    const __m512 below = _mm512_add_ps(_mm512_scalef_ps(p, n), one), near = _mm512_rcp14_ps(below);
    const __mmask16 there = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87), _CMP_NLT_UQ);
    return _mm512_maskz_fmadd_ps(there, near, _mm512_fnmadd_ps(below, near, one), near);
}

void swiglu(const uint16_t *hidden, int64_t m, int64_t f, uint16_t *act) {
    for (int64_t row = 0; row < m; row++, hidden += 2 * f, act += f)
        for (int64_t i = 0; i < f; i += 32) {
            __m512 y[2];
            for (int half = 0; half < 2; half++) {
                const __m512 gate = read16(hidden + i + half * 16), up = read16(hidden + f + i + half * 16);
                y[half] = _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid16(gate)), up);
            }
            _mm512_storeu_si512(act + i, narrow(y[0], y[1]));
        }
}

void swiglu_back(const uint16_t *grad, const uint16_t *hidden, int64_t m, int64_t f, uint16_t *grad_hidden,
                 uint16_t *act) {
    for (int64_t row = 0; row < m; row++, grad += f, hidden += 2 * f, grad_hidden += 2 * f, act += f)
        for (int64_t i = 0; i < f; i += 32) {
            __m512 of_gate[2], of_up[2], y[2];
            for (int half = 0; half < 2; half++) {
                const int64_t at = i + half * 16;
                const __m512 gate = read16(hidden + at), up = read16(hidden + f + at), dy = read16(grad + at);
                const __m512 s = sigmoid16(gate), silu = _mm512_mul_ps(gate, s);
                // The slope of silu: s + silu · (1 - s).
                const __m512 slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(_mm512_set1_ps(1), s), s);
                y[half] = _mm512_mul_ps(silu, up);
                of_gate[half] = _mm512_mul_ps(_mm512_mul_ps(dy, up), slope);
                of_up[half] = _mm512_mul_ps(dy, silu);
            }
            _mm512_storeu_si512(act + i, narrow(y[0], y[1]));
            _mm512_storeu_si512(grad_hidden + i, narrow(of_gate[0], of_gate[1]));
            _mm512_storeu_si512(grad_hidden + f + i, narrow(of_up[0], of_up[1]));
        }
}

}  // namespace

const TrainingKernels *training_kernels(int32_t path) {
    static const TrainingKernels tiles = {pack_rows,   pack_columns, multiply,       swiglu,
                                          swiglu_back, transpose,    sum_grad_block, write_grad_block};
    static const TrainingKernels vectors = {pack_rows,   pack_columns, vector_multiply,       swiglu,
                                            swiglu_back, transpose,    vector_sum_grad_block, write_grad_block};
    if (!__builtin_cpu_supports("avx512bf16")) return nullptr;
    return path == MOESTRO_AMX ? &tiles : path == MOESTRO_AVX512 ? &vectors : nullptr;
}

}  // namespace moestro
#else
namespace moestro {
const TrainingKernels *training_kernels(int32_t) { return nullptr; }
}  // namespace moestro
#endif
