// The kernels in plain C++: the definition of the native paths, and what any other CPU runs.
#include <cstring>

#include "kernels.h"
#include "moestro.h"

namespace moestro {
namespace {
#define MOESTRO_LANES 0
#include "elementwise.inc"

inline float half_to_float(uint16_t half) {
    uint32_t sign = uint32_t(half & 0x8000u) << 16, exponent = (half >> 10) & 31u, mantissa = half & 1023u;
    if (exponent == 0) {
        float value = float(mantissa) * 5.9604644775390625e-8f;  // 2^-24: exact
        return sign ? -value : value;
    }
    return bits_to_float(sign | (exponent + 112u) << 23 | mantissa << 13);
}

void multiply_bf16(const Block &b, const Rows &x, float *out, int64_t ld) {
    auto weights = reinterpret_cast<const uint16_t *>(b.data);
    for (int64_t m = 0; m < x.m; m++) {
        const float *row = x.values + m * x.k;
        float sum[COLUMNS] = {};
        for (int64_t k = 0; k < x.k; k += PAIRS) {
            float even[COLUMNS] = {}, odd[COLUMNS] = {};
            for (int64_t i = 0; i < PAIRS; i += 2)
                for (int64_t n = 0; n < COLUMNS; n++) {
                    const uint16_t *pair = weights + ((k + i) / 2 * COLUMNS + n) * 2;
                    even[n] = even[n] + row[k + i] * bits_to_float(uint32_t(pair[0]) << 16);
                    odd[n] = odd[n] + row[k + i + 1] * bits_to_float(uint32_t(pair[1]) << 16);
                }
            for (int64_t n = 0; n < COLUMNS; n++) sum[n] = sum[n] + (even[n] + odd[n]);
        }
        memcpy(out + m * ld, sum, sizeof sum);
    }
}

// Four weights of one column: quad `q` of a group.
inline void quad(const Block &b, const uint8_t *lines, int64_t q, int64_t n, int32_t *w) {
    if (b.kind == MOESTRO_INT8) {
        auto at = reinterpret_cast<const int8_t *>(lines + (q * COLUMNS + n) * 4);
        for (int i = 0; i < 4; i++) w[i] = at[i];
    } else {
        const uint8_t *at = lines + (q / 2 * COLUMNS + n) * 4;
        const int8_t *table = table_of(b.kind);
        for (int i = 0; i < 4; i++) w[i] = table[q % 2 ? at[i] >> 4 : at[i] & 15];
    }
}

void multiply_f32(const Block &b, const Rows &x, float *out, int64_t ld) {
    auto weights = reinterpret_cast<const float *>(b.data);
    for (int64_t m = 0; m < x.m; m++) {
        float sum[COLUMNS] = {};
        for (int64_t k = 0; k < x.k; k++)
            for (int64_t n = 0; n < COLUMNS; n++)
                sum[n] = __builtin_fmaf(x.values[m * x.k + k], weights[k * COLUMNS + n], sum[n]);
        memcpy(out + m * ld, sum, sizeof sum);
    }
}

void transpose_all(const uint8_t *from, int64_t row_bytes, int64_t rows, int64_t words, uint32_t *to) {
    transpose_words(from, row_bytes, rows, 0, words, to);
}

void multiply_bytes(const Block &b, const Rows &x, float *out, int64_t ld) {
    const int64_t groups = x.k / b.group;
    for (int64_t m = 0; m < x.m; m++) {
        float sum[COLUMNS] = {};
        for (int64_t g = 0; g < groups; g++) {
            const uint8_t *at = b.data + g * group_bytes(b.kind, b.group), *lines = at + head_bytes(b.kind);
            auto scales = reinterpret_cast<const uint16_t *>(at);
            const int8_t *row = x.at(m, g, b.group);
            float scale = x.scales[m * groups + g];
            for (int64_t n = 0; n < COLUMNS; n++) {
                int32_t dot = 0, w[4];
                for (int64_t q = 0; q < b.group / 4; q++) {
                    quad(b, lines, q, n, w);
                    for (int i = 0; i < 4; i++) dot += w[i] * row[q * 4 + i];
                }
                sum[n] = __builtin_fmaf(float(dot), half_to_float(scales[n]) * scale, sum[n]);
                if (has_minima(b.kind))
                    sum[n] = __builtin_fmaf(float(x.sums[m * groups + g]), half_to_float(scales[COLUMNS + n]) * scale,
                                            sum[n]);
            }
        }
        memcpy(out + m * ld, sum, sizeof sum);
    }
}

void multiply(const Block &b, const Rows &x, float *out, int64_t ld) {
    if (b.kind == MOESTRO_F32) multiply_f32(b, x, out, ld);
    else if (b.kind == MOESTRO_BF16) multiply_bf16(b, x, out, ld);
    else multiply_bytes(b, x, out, ld);
}

}  // namespace

const Kernels portable = {multiply, ELEMENTWISE};

}  // namespace moestro
