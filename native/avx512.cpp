// The kernels for AVX-512 (F, BW, DQ, VL, VNNI), and for AMX beside it where an expert has rows
// enough to fill its tiles.
#include "kernels.h"
#include "moestro.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")

namespace moestro {
namespace {
#define MOESTRO_LANES 512  // bits of a register
#include "elementwise.inc"
#include "tiles.inc"

constexpr int64_t PREFETCH_DISTANCE = 4096;  // bytes to prefetch ahead of a stream of weights

template <int M>
void bf16_rows(const Block &b, const Rows &x, int64_t at, float *out, int64_t ld) {
    const __m512i high = _mm512_set1_epi32(int(0xffff0000u));
    __m512 sum[M][2];
    for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
    const uint8_t *line = b.data;
    for (int64_t k = 0; k < x.k; k += PAIRS) {
        __m512 even[M][2], odd[M][2];
        for (int m = 0; m < M; m++)
            for (int h = 0; h < 2; h++) even[m][h] = odd[m][h] = _mm512_setzero_ps();
        for (int64_t i = 0; i < PAIRS; i += 2, line += 128) {
            for (int h = 0; h < 2; h++) {
                _mm_prefetch(reinterpret_cast<const char *>(line + h * 64 + PREFETCH_DISTANCE), _MM_HINT_T0);
                __m512i pair = _mm512_loadu_si512(line + h * 64);
                __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
                __m512 second = _mm512_castsi512_ps(_mm512_and_si512(pair, high));
                for (int m = 0; m < M; m++) {
                    const float *row = x.values + (at + m) * x.k + k + i;
                    even[m][h] = _mm512_fmadd_ps(_mm512_set1_ps(row[0]), first, even[m][h]);
                    odd[m][h] = _mm512_fmadd_ps(_mm512_set1_ps(row[1]), second, odd[m][h]);
                }
            }
        }
        for (int m = 0; m < M; m++)
            for (int h = 0; h < 2; h++) sum[m][h] = _mm512_add_ps(sum[m][h], _mm512_add_ps(even[m][h], odd[m][h]));
    }
    for (int m = 0; m < M; m++)
        for (int h = 0; h < 2; h++) _mm512_storeu_ps(out + (at + m) * ld + h * 16, sum[m][h]);
}

template <int M>
void f32_rows(const Block &b, const Rows &x, int64_t at, float *out, int64_t ld) {
    const uint8_t *line = b.data;
    __m512 sum[M][2];
    for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < x.k; k++, line += 128)
        for (int h = 0; h < 2; h++) {
            _mm_prefetch(reinterpret_cast<const char *>(line + h * 64 + PREFETCH_DISTANCE), _MM_HINT_T0);
            __m512 w = _mm512_loadu_ps(line + h * 64);
            for (int m = 0; m < M; m++)
                sum[m][h] = _mm512_fmadd_ps(_mm512_set1_ps(x.values[(at + m) * x.k + k]), w, sum[m][h]);
        }
    for (int m = 0; m < M; m++)
        for (int h = 0; h < 2; h++) _mm512_storeu_ps(out + (at + m) * ld + h * 16, sum[m][h]);
}

inline void transpose_square(const uint8_t *from, int64_t row_bytes, const uint8_t *next, uint32_t *to) {
    __m512i r[16];
    for (int i = 0; i < 16; i++) {
        _mm_prefetch(reinterpret_cast<const char *>(next + i * 64), _MM_HINT_T1);
        r[i] = _mm512_loadu_si512(from + i * row_bytes);
    }
    transpose16(r);
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * 32, r[i]);
}

void transpose_all(const uint8_t *from, int64_t row_bytes, int64_t rows, int64_t words, uint32_t *to) {
    int64_t w = 0;
    const uint8_t *next = from + COLUMNS * row_bytes;  // the rows of the next block, in their order
    if (rows == COLUMNS)
        for (; w + 16 <= words && (w + 16) * 4 <= row_bytes; w += 16)
            for (int64_t h = 0; h < 2; h++, next += 1024)
                transpose_square(from + h * 16 * row_bytes + w * 4, row_bytes, next, to + w * 32 + h * 16);
    transpose_words(from, row_bytes, rows, w, words, to);
}

inline __m512i four(const int8_t *bytes) {
    int32_t value;
    __builtin_memcpy(&value, bytes, 4);
    return _mm512_set1_epi32(value);
}

inline __m512 halves(const uint8_t *from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
}

inline __m512i table(int32_t kind) {
    return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i *>(table_of(kind))));
}

// Signed bytes, of a table too, become unsigned by adding 128, int4's nibbles by adding 8; what that adds to a dot
// product is a multiple of the row's sum over the group, taken off before the first product.
template <int M, int32_t KIND>
void byte_rows(const Block &b, const Rows &x, int64_t at, float *out, int64_t ld) {
    constexpr bool NIBBLES = is_nibbles(KIND);
    constexpr int32_t OFFSET = KIND == MOESTRO_INT8 || has_table(KIND) ? -128 : KIND == MOESTRO_INT4 ? -8 : 0;
    const int64_t groups = x.k / b.group;
    const __m512i low = _mm512_set1_epi8(15), flip = _mm512_set1_epi8(char(128));
    const __m512i flipped = _mm512_xor_si512(table(KIND), flip);
    __m512 sum[M][2];
    for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
    const uint8_t *line = b.data;
    for (int64_t g = 0; g < groups; g++) {
        __m512 scale[2], minimum[2];
        for (int h = 0; h < 2; h++)
            scale[h] = halves(line + h * 32), minimum[h] = halves(line + head_bytes(KIND) - 64 + h * 32);
        for (int64_t i = 0; i < head_bytes(KIND); i += 64)
            _mm_prefetch(reinterpret_cast<const char *>(line + i + PREFETCH_DISTANCE), _MM_HINT_T0);
        line += head_bytes(KIND);
        __m512i dot[M][2];
        for (int m = 0; m < M; m++) dot[m][0] = dot[m][1] = _mm512_set1_epi32(OFFSET * x.sums[(at + m) * groups + g]);
        for (int64_t q = 0; q < b.group / 4; q += NIBBLES ? 2 : 1, line += 128) {
            for (int h = 0; h < 2; h++) {
                _mm_prefetch(reinterpret_cast<const char *>(line + h * 64 + PREFETCH_DISTANCE), _MM_HINT_T0);
                __m512i w = _mm512_loadu_si512(line + h * 64);
                for (int m = 0; m < M; m++) {
                    const int8_t *row = x.at(at + m, g, b.group) + q * 4;
                    if constexpr (NIBBLES) {
                        __m512i lower = _mm512_and_si512(w, low);
                        __m512i upper = _mm512_and_si512(_mm512_srli_epi16(w, 4), low);
                        if constexpr (has_table(KIND)) {
                            lower = _mm512_shuffle_epi8(flipped, lower);
                            upper = _mm512_shuffle_epi8(flipped, upper);
                        }
                        dot[m][h] = _mm512_dpbusd_epi32(dot[m][h], lower, four(row));
                        dot[m][h] = _mm512_dpbusd_epi32(dot[m][h], upper, four(row + 4));
                    } else {
                        dot[m][h] = _mm512_dpbusd_epi32(dot[m][h], _mm512_xor_si512(w, flip), four(row));
                    }
                }
            }
        }
        for (int m = 0; m < M; m++) {
            __m512 row_scale = _mm512_set1_ps(x.scales[(at + m) * groups + g]);
            const __m512 whole = _mm512_set1_ps(float(x.sums[(at + m) * groups + g]));
            for (int h = 0; h < 2; h++) {
                __m512 both = _mm512_mul_ps(scale[h], row_scale);
                sum[m][h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[m][h]), both, sum[m][h]);
                if constexpr (has_minima(KIND))
                    sum[m][h] = _mm512_fmadd_ps(whole, _mm512_mul_ps(minimum[h], row_scale), sum[m][h]);
            }
        }
    }
    for (int m = 0; m < M; m++)
        for (int h = 0; h < 2; h++) _mm512_storeu_ps(out + (at + m) * ld + h * 16, sum[m][h]);
}

#include "by_rows.inc"

// ---- AMX.

constexpr int64_t MIN_AMX_ROWS = 8;  // rows below which tiles would be mostly empty

// Blocks lie one after another: while one is multiplied, the next is brought into the cache, a part
// of it in each pass over the rows.
struct Prefetch {
    const uint8_t *at;
    int64_t bytes;  // for each step
    void fetch() {
        for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char *>(at + i), _MM_HINT_T1);
        at += bytes;
    }
};

template <bool TWO>
void bf16_tiles(const Block &b, const uint16_t *x, int64_t k, float *out, int64_t ld, Prefetch next) {
    ZERO(0);
    ZERO(1);
    if (TWO) {
        ZERO(2);
        ZERO(3);
    }
    const uint8_t *line = b.data;
    for (int64_t at = 0; at < k; at += PAIRS, line += 16 * 128, x += TILE * PAIRS) {
        next.fetch();
        LOAD(4, x, 64);
        LOAD(6, line, 128);
        LOAD(7, line + 64, 128);
        DOT_BF16(0, 4, 6);
        DOT_BF16(1, 4, 7);
        if (TWO) {
            LOAD(5, x + TILE * k, 64);
            DOT_BF16(2, 5, 6);
            DOT_BF16(3, 5, 7);
        }
    }
    STORE(0, out, ld * 4);
    STORE(1, out + 16, ld * 4);
    if (TWO) {
        STORE(2, out + 16 * ld, ld * 4);
        STORE(3, out + 16 * ld + 16, ld * 4);
    }
}

// One group of weights as signed bytes, 32 columns by `group` inputs.
inline void unpack_nibbles(const uint8_t *line, int64_t group, __m512i values, int8_t *bytes) {
    const __m512i low = _mm512_set1_epi8(15);
    for (int64_t i = 0; i < group / 8; i++)
        for (int h = 0; h < 2; h++) {
            __m512i w = _mm512_loadu_si512(line + i * 128 + h * 64);
            __m512i upper = _mm512_and_si512(_mm512_srli_epi16(w, 4), low);
            _mm512_store_si512(bytes + i * 256 + h * 64, _mm512_shuffle_epi8(values, _mm512_and_si512(w, low)));
            _mm512_store_si512(bytes + i * 256 + 128 + h * 64, _mm512_shuffle_epi8(values, upper));
        }
}

// sum += whole numbers of one group · its scales + sums of its rows · its minima, for `m` rows of 32 columns.
inline void scale_group(const Block &b, const Rows &x, int64_t at, int64_t m, int64_t g, const int32_t *dot,
                        float *sum) {
    const int64_t groups = x.k / b.group;
    const uint8_t *scales = b.data + g * group_bytes(b.kind, b.group);
    __m512 scale[2], minimum[2];
    for (int h = 0; h < 2; h++)
        scale[h] = halves(scales + h * 32), minimum[h] = halves(scales + head_bytes(b.kind) - 64 + h * 32);
    for (int64_t i = 0; i < m; i++) {
        __m512 row_scale = _mm512_set1_ps(x.scales[(at + i) * groups + g]);
        const __m512 row_sum = _mm512_set1_ps(float(x.sums[(at + i) * groups + g]));
        for (int h = 0; h < 2; h++) {
            float *place = sum + i * 32 + h * 16;
            __m512 whole = _mm512_cvtepi32_ps(_mm512_load_si512(dot + i * 32 + h * 16));
            __m512 both = _mm512_mul_ps(scale[h], row_scale);
            __m512 next = _mm512_fmadd_ps(whole, both, _mm512_load_ps(place));
            if (has_minima(b.kind)) next = _mm512_fmadd_ps(row_sum, _mm512_mul_ps(minimum[h], row_scale), next);
            _mm512_store_ps(place, next);
        }
    }
}

// While the tiles multiply one group, the vector units scale the one before.
template <bool TWO>
void byte_tiles(const Block &b, const Rows &x, int64_t at, int64_t m, float *out, int64_t ld, Prefetch next) {
    alignas(64) int32_t dots[2][32 * 32];
    alignas(64) float sum[32 * 32];
    alignas(64) int8_t unpacked[64 * 32];
    const int64_t groups = x.k / b.group;
    const __m512i values = table(b.kind);
    for (int64_t i = 0; i < m * 32; i += 16) _mm512_store_ps(sum + i, _mm512_setzero_ps());
    const uint8_t *line = b.data + head_bytes(b.kind);
    for (int64_t g = 0; g < groups; g++, line += group_bytes(b.kind, b.group)) {
        auto weights = reinterpret_cast<const int8_t *>(line);
        next.fetch();
        if (is_nibbles(b.kind)) {
            unpack_nibbles(line, b.group, values, unpacked);
            weights = unpacked;
        }
        ZERO(0);
        ZERO(1);
        LOAD(4, x.at(at, g, b.group), b.group);
        LOAD(6, weights, 128);
        LOAD(7, weights + 64, 128);
        DOT_INT8(0, 4, 6);
        DOT_INT8(1, 4, 7);
        if (TWO) {
            ZERO(2);
            ZERO(3);
            LOAD(5, x.at(at + TILE, g, b.group), b.group);
            DOT_INT8(2, 5, 6);
            DOT_INT8(3, 5, 7);
        }
        if (g) scale_group(b, x, at, m, g - 1, dots[(g - 1) % 2], sum);
        int32_t *dot = dots[g % 2];
        STORE(0, dot, 128);
        STORE(1, dot + 16, 128);
        if (TWO) {
            STORE(2, dot + 16 * 32, 128);
            STORE(3, dot + 16 * 32 + 16, 128);
        }
    }
    scale_group(b, x, at, m, groups - 1, dots[(groups - 1) % 2], sum);
    for (int64_t i = 0; i < m; i++)
        for (int h = 0; h < 2; h++) _mm512_storeu_ps(out + i * ld + h * 16, _mm512_load_ps(sum + i * 32 + h * 16));
}

void multiply_amx(const Block &b, const Rows &x, float *out, int64_t ld) {
    if (x.m < MIN_AMX_ROWS || b.kind == MOESTRO_F32) return multiply(b, x, out, ld);
    const bool bf16 = b.kind == MOESTRO_BF16;
    const int64_t steps = x.k / (bf16 ? PAIRS : b.group);
    const int64_t bytes = bf16 ? x.k * 64 : steps * group_bytes(b.kind, b.group);
    Prefetch next{b.data + bytes, round_up(bytes / (round_up(x.m, 32) / 32) / steps, 64)};
    int64_t shaped = 0;
    for (int64_t at = 0; at < x.m; at += 32, next.at += next.bytes * steps) {
        const int64_t m = x.m - at < 32 ? x.m - at : 32;
        if (m != shaped) shape_tiles(m, bf16 ? 16 : b.group / 4), shaped = m;
        float *place = out + at * ld;
        if (bf16) {
            auto tiles = m > 16 ? bf16_tiles<true> : bf16_tiles<false>;
            tiles(b, x.bits + at * x.k, x.k, place, ld, next);
        } else {
            auto tiles = m > 16 ? byte_tiles<true> : byte_tiles<false>;
            tiles(b, x, at, m, place, ld, next);
        }
    }
}

}  // namespace

bool amx_allowed() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

const Kernels avx512 = {multiply, ELEMENTWISE};
const Kernels amx = {multiply_amx, ELEMENTWISE};

}  // namespace moestro
#else
namespace moestro {
bool amx_allowed() { return false; }
const Kernels avx512 = portable, amx = portable;
}  // namespace moestro
#endif
