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

// No fused multiply-add is needed: a product of two bf16 numbers is exact in fp32.
template <int M>
void bf16_rows(const Block &b, const Rows &x, int64_t at, float *out, int64_t ld) {
    const __m256i high = _mm256_set1_epi32(int(0xffff0000u));
    for (int64_t part = 0; part < COLUMNS; part += 8) {  // 8 columns at a time
        __m256 sum[M];
        for (int m = 0; m < M; m++) sum[m] = _mm256_setzero_ps();
        for (int64_t k = 0; k < x.k; k += PAIRS) {
            __m256 even[M], odd[M];
            for (int m = 0; m < M; m++) even[m] = odd[m] = _mm256_setzero_ps();
            for (int64_t i = 0; i < PAIRS; i += 2) {
                const uint8_t *line = b.data + ((k + i) / 2 * COLUMNS + part) * 4;
                __m256i pair = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(line));
                __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
                __m256 second = _mm256_castsi256_ps(_mm256_and_si256(pair, high));
                for (int m = 0; m < M; m++) {
                    const float *row = x.values + (at + m) * x.k + k + i;
                    even[m] = _mm256_add_ps(even[m], _mm256_mul_ps(_mm256_broadcast_ss(row), first));
                    odd[m] = _mm256_add_ps(odd[m], _mm256_mul_ps(_mm256_broadcast_ss(row + 1), second));
                }
            }
            for (int m = 0; m < M; m++) sum[m] = _mm256_add_ps(sum[m], _mm256_add_ps(even[m], odd[m]));
        }
        for (int m = 0; m < M; m++) _mm256_storeu_ps(out + (at + m) * ld + part, sum[m]);
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

// Sum of four products of a byte from 0 and a signed one per column, exact: pairs stay within 16 bits.
inline __m256i dot4_positive(__m256i sum, __m256i w, __m256i a) {
#ifdef MOESTRO_WITH_VNNI
    return _mm256_dpbusd_avx_epi32(sum, w, a);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, a), _mm256_set1_epi16(1)));
#endif
}

// Of signed weights the sign goes to the other byte.
inline __m256i dot4(__m256i sum, __m256i w, __m256i a) {
    return dot4_positive(sum, _mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
}

// Nibbles are 0 to 15: no sign to move, and int4's offset of 8 is taken off with the group's sum. A table has signs.
template <int32_t KIND>
inline __m256i dot4_nibbles(__m256i sum, __m256i w, __m256i table, __m256i a) {
    if constexpr (has_table(KIND)) return dot4(sum, _mm256_shuffle_epi8(table, w), a);
    else return dot4_positive(sum, w, a);
}

inline __m256 halves(const uint8_t *from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
}

inline __m256i four(const int8_t *bytes) {
    int32_t value;
    __builtin_memcpy(&value, bytes, 4);
    return _mm256_set1_epi32(value);
}

template <int M, int32_t KIND>
void byte_rows(const Block &b, const Rows &x, int64_t at, float *out, int64_t ld) {
    constexpr bool NIBBLES = is_nibbles(KIND);
    const int64_t groups = x.k / b.group, bytes = group_bytes(KIND, b.group);
    const __m256i low = _mm256_set1_epi8(15);
    const __m256i table =
        _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i *>(table_of(KIND))));
    for (int64_t part = 0; part < COLUMNS; part += 8) {
        __m256 sum[M];
        for (int m = 0; m < M; m++) sum[m] = _mm256_setzero_ps();
        for (int64_t g = 0; g < groups; g++) {
            const uint8_t *block = b.data + g * bytes;
            __m256i dot[M];
            for (int m = 0; m < M; m++)
                dot[m] = _mm256_set1_epi32(KIND == MOESTRO_INT4 ? -8 * x.sums[(at + m) * groups + g] : 0);
            for (int64_t q = 0; q < b.group / 4; q += NIBBLES ? 2 : 1) {
                const uint8_t *line = block + head_bytes(KIND) + ((NIBBLES ? q / 2 : q) * COLUMNS + part) * 4;
                __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(line));
                // One row waits for memory: ask for the block that follows this one.
                if (M == 1 && part % 16 == 0)
                    _mm_prefetch(reinterpret_cast<const char *>(line + groups * bytes), _MM_HINT_T0);
                for (int m = 0; m < M; m++) {
                    const int8_t *row = x.at(at + m, g, b.group) + q * 4;
                    if constexpr (NIBBLES) {
                        dot[m] = dot4_nibbles<KIND>(dot[m], _mm256_and_si256(w, low), table, four(row));
                        __m256i upper = _mm256_and_si256(_mm256_srli_epi16(w, 4), low);
                        dot[m] = dot4_nibbles<KIND>(dot[m], upper, table, four(row + 4));
                    } else {
                        dot[m] = dot4(dot[m], w, four(row));
                    }
                }
            }
            const __m256 scale = halves(block + part * 2), minimum = halves(block + head_bytes(KIND) - 64 + part * 2);
            for (int m = 0; m < M; m++) {
                const __m256 row_scale = _mm256_set1_ps(x.scales[(at + m) * groups + g]);
                sum[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[m]), _mm256_mul_ps(scale, row_scale), sum[m]);
                if constexpr (has_minima(KIND)) {
                    const __m256 whole = _mm256_set1_ps(float(x.sums[(at + m) * groups + g]));
                    sum[m] = _mm256_fmadd_ps(whole, _mm256_mul_ps(minimum, row_scale), sum[m]);
                }
            }
        }
        for (int m = 0; m < M; m++) _mm256_storeu_ps(out + (at + m) * ld + part, sum[m]);
    }
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
