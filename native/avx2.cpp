// The kernels for AVX2 with FMA and F16C: what nearly every x86 machine of the last ten years runs.
// Compiled a second time by avx2_vnni.cpp, with AVX-VNNI for the products of bytes.
#include "kernels.h"
#include "moestro.h"

#if defined(__x86_64__)
#include <immintrin.h>
#ifdef MOESTRO_WITH_VNNI
#pragma GCC target("avx2,fma,f16c,avxvnni")
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace moestro {
namespace {
#define MOESTRO_LANES 256  // bits of a register
#include "elementwise.inc"

constexpr int64_t PREFETCH_DISTANCE = 4096;  // bytes to prefetch ahead of a stream of weights

// Registers of 8 columns that M rows keep sums of at once: with 16 of them, one row takes whole lines of a block.
constexpr int wide(int rows) { return rows <= 2 ? 4 : 2; }

// Fused or not, the sums are the same: a product of two bf16 numbers is exact in fp32.
template <int M>
void bf16_rows(const Block &b, const Rows &x, int64_t at, float *out, int64_t ld) {
    constexpr int H = M == 1 ? 2 : 1;
    const __m256i high = _mm256_set1_epi32(int(0xffff0000u));
    for (int64_t part = 0; part < COLUMNS; part += 8 * H) {
        __m256 sum[M][H];
        for (int m = 0; m < M; m++)
            for (int h = 0; h < H; h++) sum[m][h] = _mm256_setzero_ps();
        for (int64_t k = 0; k < x.k; k += PAIRS) {
            __m256 even[M][H], odd[M][H];
            for (int m = 0; m < M; m++)
                for (int h = 0; h < H; h++) even[m][h] = odd[m][h] = _mm256_setzero_ps();
            for (int64_t i = 0; i < PAIRS; i += 2) {
                const uint8_t *line = b.data + ((k + i) / 2 * COLUMNS + part) * 4;
                _mm_prefetch(reinterpret_cast<const char *>(line + PREFETCH_DISTANCE), _MM_HINT_T0);
                for (int h = 0; h < H; h++) {
                    __m256i pair = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(line + h * 32));
                    __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
                    __m256 second = _mm256_castsi256_ps(_mm256_and_si256(pair, high));
                    for (int m = 0; m < M; m++) {
                        const float *row = x.values + (at + m) * x.k + k + i;
                        even[m][h] = _mm256_fmadd_ps(_mm256_broadcast_ss(row), first, even[m][h]);
                        odd[m][h] = _mm256_fmadd_ps(_mm256_broadcast_ss(row + 1), second, odd[m][h]);
                    }
                }
            }
            for (int m = 0; m < M; m++)
                for (int h = 0; h < H; h++) sum[m][h] = _mm256_add_ps(sum[m][h], _mm256_add_ps(even[m][h], odd[m][h]));
        }
        for (int m = 0; m < M; m++)
            for (int h = 0; h < H; h++) _mm256_storeu_ps(out + (at + m) * ld + part + h * 8, sum[m][h]);
    }
}

template <int M>
void f32_rows(const Block &b, const Rows &x, int64_t at, float *out, int64_t ld) {
    auto weights = reinterpret_cast<const float *>(b.data);
    for (int64_t part = 0; part < COLUMNS; part += 16) {
        __m256 sum[M][2];
        for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = _mm256_setzero_ps();
        for (int64_t k = 0; k < x.k; k++)
            for (int m = 0; m < M; m++)
                for (int h = 0; h < 2; h++)
                    sum[m][h] = _mm256_fmadd_ps(_mm256_broadcast_ss(x.values + (at + m) * x.k + k),
                                                _mm256_loadu_ps(weights + k * COLUMNS + part + h * 8), sum[m][h]);
        for (int m = 0; m < M; m++)
            for (int h = 0; h < 2; h++) _mm256_storeu_ps(out + (at + m) * ld + part + h * 8, sum[m][h]);
    }
}

// 8 rows of 8 words to 8 columns: pairs of words, of pairs, of halves.
inline void transpose8(const uint8_t *from, int64_t row_bytes, uint32_t *to) {
    __m256 r[8], s[8];
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(reinterpret_cast<const float *>(from + i * row_bytes));
    for (int i = 0; i < 8; i += 2) {
        s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm256_shuffle_ps(s[i + j], s[i + j + 2], 0x44);
            r[i + 2 * j + 1] = _mm256_shuffle_ps(s[i + j], s[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        const __m256 low = _mm256_permute2f128_ps(r[i], r[4 + i], 0x20);
        const __m256 high = _mm256_permute2f128_ps(r[i], r[4 + i], 0x31);
        _mm256_storeu_ps(reinterpret_cast<float *>(to + i * COLUMNS), low);
        _mm256_storeu_ps(reinterpret_cast<float *>(to + (4 + i) * COLUMNS), high);
    }
}

void transpose_all(const uint8_t *from, int64_t row_bytes, int64_t rows, int64_t words, uint32_t *to) {
    int64_t w = 0;
    if (rows == COLUMNS)
        for (; w + 8 <= words && (w + 8) * 4 <= row_bytes; w += 8)
            for (int64_t n = 0; n < COLUMNS; n += 8)
                transpose8(from + n * row_bytes + w * 4, row_bytes, to + w * COLUMNS + n);
    transpose_words(from, row_bytes, rows, w, words, to);
}

#ifdef MOESTRO_WITH_VNNI
constexpr bool VNNI = true;
inline __m256i dot4_unsigned(__m256i sum, __m256i w, __m256i a) { return _mm256_dpbusd_avx_epi32(sum, w, a); }
#else
constexpr bool VNNI = false;
inline __m256i dot4_unsigned(__m256i sum, __m256i, __m256i) { return sum; }
#endif

// Kinds whose products of 32 inputs, two by two, stay within 16 bits: 16 · 15 · 127 < 2^15. Without VNNI they are
// summed there, and made 32 bits wide once for 32 inputs.
constexpr bool is_narrow(int32_t kind) { return is_nibbles(kind) && kind != MOESTRO_IQ4_NL && kind != MOESTRO_NF4; }
constexpr bool is_signed(int32_t kind) { return kind == MOESTRO_INT8 || has_table(kind); }

// Compilers that reorder the sums run out of registers.
inline __m256i in_order(__m256i sum) {
    asm("" : "+x"(sum));
    return sum;
}

// Sum of four products per column, exact. VNNI takes weights from 0: signed ones have 128 added. Else the sign of a
// weight goes to the other byte.
template <int32_t KIND>
inline __m256i dot4(__m256i sum, __m256i w, __m256i a) {
    if constexpr (VNNI) return dot4_unsigned(sum, w, a);
    if constexpr (is_signed(KIND)) a = _mm256_sign_epi8(a, w), w = _mm256_abs_epi8(w);
    const __m256i pairs = _mm256_maddubs_epi16(w, a);
    if constexpr (is_narrow(KIND)) return in_order(_mm256_add_epi16(sum, pairs));
    return in_order(_mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
}

template <int32_t KIND>
inline __m256i to_32_bits(__m256i sum) {
    return !VNNI && is_narrow(KIND) ? _mm256_madd_epi16(sum, _mm256_set1_epi16(1)) : sum;
}

inline __m256 halves(const uint8_t *from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
}

inline __m256i four(const int8_t *bytes) {
    int32_t value;
    __builtin_memcpy(&value, bytes, 4);
    return _mm256_set1_epi32(value);
}

// What dot4 takes of 8 columns at `from`: four inputs each, or half 0 or 1 of eight.
template <int32_t KIND>
inline __m256i weights(const uint8_t *from, int half) {
    const __m256i flip = _mm256_set1_epi8(char(128));
    __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
    if constexpr (!is_nibbles(KIND)) return VNNI ? _mm256_xor_si256(w, flip) : w;
    w = _mm256_and_si256(half ? _mm256_srli_epi16(w, 4) : w, _mm256_set1_epi8(15));
    if constexpr (!has_table(KIND)) return w;
    const __m128i values = _mm_load_si128(reinterpret_cast<const __m128i *>(table_of(KIND)));
    const __m256i table = _mm256_broadcastsi128_si256(values);
    return _mm256_shuffle_epi8(VNNI ? _mm256_xor_si256(table, flip) : table, w);
}

// 32 inputs of 8·H columns, from `line` on, times M rows' bytes.
template <int M, int32_t KIND, int H>
inline void byte_line(const uint8_t *line, const int8_t *const (&rows)[M], int64_t from, __m256i (&dot)[M][H]) {
    constexpr int HALVES = is_nibbles(KIND) ? 2 : 1;
#pragma GCC unroll 1
    for (int64_t q = 0; q < 8 / HALVES; q++, line += COLUMNS * 4) {
        for (int h = 0; h < H; h += 2)
            _mm_prefetch(reinterpret_cast<const char *>(line + h * 32 + PREFETCH_DISTANCE), _MM_HINT_T0);
        for (int half = 0; half < HALVES; half++) {
            __m256i a[M];
            for (int m = 0; m < M; m++) a[m] = four(rows[m] + from + (q * HALVES + half) * 4);
            for (int h = 0; h < H; h++) {
                const __m256i w = weights<KIND>(line + h * 32, half);
                for (int m = 0; m < M; m++) dot[m][h] = dot4<KIND>(dot[m][h], w, a[m]);
            }
        }
    }
}

// What weights had added is taken off as a multiple of the row's sum over the group.
template <int M, int32_t KIND, int GROUP>
void grouped_rows(const Block &b, const Rows &x, int64_t at, float *out, int64_t ld) {
    constexpr int H = wide(M);
    constexpr int32_t OFFSET = KIND == MOESTRO_INT4 ? -8 : VNNI && is_signed(KIND) ? -128 : 0;
    const int64_t groups = x.k / GROUP;
    for (int64_t part = 0; part < COLUMNS; part += 8 * H) {
        __m256 sum[M][H];
        const int8_t *rows[M];
        for (int m = 0; m < M; m++) {
            rows[m] = x.at(at + m, 0, GROUP);
            for (int h = 0; h < H; h++) sum[m][h] = _mm256_setzero_ps();
        }
        const uint8_t *block = b.data;
        for (int64_t g = 0; g < groups; g++, block += group_bytes(KIND, GROUP)) {
            __m256i whole[GROUP / 32][M][H];
            for (int from = 0; from < GROUP; from += 32) {
                auto &dot = whole[from / 32];
                for (int m = 0; m < M; m++)
                    for (int h = 0; h < H; h++) dot[m][h] = _mm256_setzero_si256();
                byte_line<M, KIND, H>(block + head_bytes(KIND) + line_bytes(KIND, from) + part * 4, rows, from, dot);
            }
            __m256 scale[H], minimum[H];
            for (int h = 0; h < H; h++)
                scale[h] = halves(block + (part + h * 8) * 2),
                minimum[h] = halves(block + head_bytes(KIND) - 64 + (part + h * 8) * 2);
            for (int m = 0; m < M; m++) {
                rows[m] += TILE * GROUP;
                const int32_t total = x.sums[(at + m) * groups + g];
                const __m256i offset = _mm256_set1_epi32(OFFSET * total);
                const __m256 row_scale = _mm256_set1_ps(x.scales[(at + m) * groups + g]);
                for (int h = 0; h < H; h++) {
                    __m256i dot = to_32_bits<KIND>(whole[0][m][h]);
                    if constexpr (GROUP == 64) dot = _mm256_add_epi32(dot, to_32_bits<KIND>(whole[1][m][h]));
                    if constexpr (OFFSET != 0) dot = _mm256_add_epi32(dot, offset);
                    const __m256 both = _mm256_mul_ps(scale[h], row_scale);
                    sum[m][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), both, sum[m][h]);
                    if constexpr (has_minima(KIND))
                        sum[m][h] = _mm256_fmadd_ps(_mm256_set1_ps(float(total)), _mm256_mul_ps(minimum[h], row_scale),
                                                    sum[m][h]);
                }
            }
        }
        for (int m = 0; m < M; m++)
            for (int h = 0; h < H; h++) _mm256_storeu_ps(out + (at + m) * ld + part + h * 8, sum[m][h]);
    }
}

template <int M, int32_t KIND>
void byte_rows(const Block &b, const Rows &x, int64_t at, float *out, int64_t ld) {
    if (b.group == 32) return grouped_rows<M, KIND, 32>(b, x, at, out, ld);
    if constexpr (!has_table(KIND)) grouped_rows<M, KIND, 64>(b, x, at, out, ld);
}

#include "by_rows.inc"

}  // namespace

#ifdef MOESTRO_WITH_VNNI
const Kernels avx2_vnni = {multiply, ELEMENTWISE};
#else
const Kernels avx2 = {multiply, ELEMENTWISE};
#endif

}  // namespace moestro
#else
namespace moestro {
#ifdef MOESTRO_WITH_VNNI
const Kernels avx2_vnni = portable;
#else
const Kernels avx2 = portable;
#endif
}  // namespace moestro
#endif
