// Reading GGUF's blocks. What each kind means is defined by ggml (ggml-common.h); tests hold every kind against the
// library that ggml's own makers publish.
#include "blocks.h"

#include <cmath>
#include <cstring>

#include "kernels.h"
#include "moestro.h"

namespace moestro {

float from_half(uint16_t half) {
    const uint32_t exponent = (half >> 10) & 31u, mantissa = half & 1023u, sign = uint32_t(half & 0x8000u) << 16;
    uint32_t bits = sign | (exponent + 112u) << 23 | mantissa << 13;
    if (exponent == 31u) bits = sign | 0x7f800000u | mantissa << 13;
    float x;
    memcpy(&x, &bits, 4);
    if (exponent == 0u) {
        x = float(mantissa) * 0x1p-24f;
        return sign ? -x : x;
    }
    return x;
}

uint16_t to_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits >= 0x477ff000u) return sign | 0x7bffu;  // from 65520 on
    if (bits < 0x38800000u) {                        // subnormal: whole steps of 2^-24
        const float steps = (std::fabs(x) * 0x1p24f + 8388608.0f) - 8388608.0f;
        return sign | uint16_t(steps);
    }
    bits += 0xfffu + (bits >> 13 & 1u);
    return sign | uint16_t((bits - 0x38000000u) >> 13);
}

namespace {

enum { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, IQ4_NL = 20, MXFP4 = 39 };
enum { NF4 = MOESTRO_ROWS_NF4 - MOESTRO_ROWS_BLOCKS };

MOESTRO_INLINE uint16_t half_at(const uint8_t *at) {
    uint16_t bits;
    memcpy(&bits, at, 2);
    return bits;
}

// Low halves of 16 bytes, then high halves.
template <class F> MOESTRO_INLINE void nibbles(const uint8_t *qs, int8_t *q, F value) {
    for (int i = 0; i < 16; i++) q[i] = value(qs[i] & 15, i);
    for (int i = 0; i < 16; i++) q[i + 16] = value(qs[i] >> 4, i + 16);
}

// The integers of 32 numbers, of a kind that has one scale for them.
MOESTRO_WIDE void integers(int32_t number, const uint8_t *b, int8_t *q) {
    uint32_t fifth = 0;
    switch (number) {
    case Q8_0:
        memcpy(q, b + 2, 32);
        break;
    case Q4_0:
        nibbles(b + 2, q, [](int x, int) { return int8_t(x - 8); });
        break;
    case Q4_1:
        nibbles(b + 4, q, [](int x, int) { return int8_t(x); });
        break;
    case Q5_0:
        memcpy(&fifth, b + 2, 4);
        nibbles(b + 6, q, [=](int x, int i) { return int8_t((x | int(fifth >> i & 1u) << 4) - 16); });
        break;
    case Q5_1:
        memcpy(&fifth, b + 4, 4);
        nibbles(b + 8, q, [=](int x, int i) { return int8_t(x | int(fifth >> i & 1u) << 4); });
        break;
    default: {  // MXFP4, IQ4_NL, NF4
        const int8_t *table = table_of(block_kind(number).table);
        nibbles(b + (number == MXFP4 ? 1 : 2), q, [=](int x, int) { return table[x]; });
    }
    }
}

// Scale and minimum j of the eight in a super-block, six bits each.
void scale_and_minimum(int j, const uint8_t *s, int *scale, int *minimum) {
    if (j < 4) {
        *scale = s[j] & 63, *minimum = s[j + 4] & 63;
        return;
    }
    *scale = (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
    *minimum = (s[j + 4] >> 4) | (s[j] >> 6) << 4;
}

// Part j of a super-block of Q4_K or Q5_K: 32 integers, of step · q - least each.
MOESTRO_INLINE void part_with_minimum(int32_t number, const uint8_t *b, int j, int8_t *q, float *step, float *least) {
    int scale, minimum;
    scale_and_minimum(j, b + 4, &scale, &minimum);
    *step = from_half(half_at(b)) * float(scale), *least = from_half(half_at(b + 2)) * float(minimum);
    const uint8_t *fifth = b + 16, *at = b + (number == Q5_K ? 48 : 16) + j / 2 * 32;
    const int shift = j % 2 * 4;
    for (int i = 0; i < 32; i++) q[i] = int8_t(at[i] >> shift & 15);
    if (number == Q5_K)
        for (int i = 0; i < 32; i++) q[i] = int8_t(q[i] | (fifth[i] >> j & 1) << 4);
}

MOESTRO_WIDE void super_block_with_minima(int32_t number, const uint8_t *b, float *out) {
    for (int j = 0; j < 8; j++) {
        int8_t q[32];
        float step, least;
        part_with_minimum(number, b, j, q, &step, &least);
        for (int i = 0; i < 32; i++) out[j * 32 + i] = step * float(int(q[i])) - least;
    }
}

MOESTRO_WIDE void super_block_of_six_bits(const uint8_t *b, float *out) {
    const float d = from_half(half_at(b + 208));
    for (int half = 0; half < 2; half++) {
        const uint8_t *low = b + half * 64, *high = b + 128 + half * 32;
        for (int j = 0; j < 4; j++) {
            const uint8_t *four = low + j % 2 * 32;
            int8_t q[32];
            for (int i = 0; i < 32; i++)
                q[i] = int8_t(((four[i] >> (j / 2 * 4) & 15) | (high[i] >> (2 * j) & 3) << 4) - 32);
            for (int part = 0; part < 2; part++) {
                const float step = d * float(int8_t(b[192 + half * 8 + j * 2 + part]));
                float *to = out + half * 128 + j * 32 + part * 16;
                for (int i = 0; i < 16; i++) to[i] = step * float(int(q[part * 16 + i]));
            }
        }
    }
}

}  // namespace

BlockKind block_kind(int32_t number) {
    switch (number) {
    case Q4_0:
        return {32, 18, true, true};
    case IQ4_NL:
        return {32, 18, true, false, MOESTRO_IQ4_NL};
    case NF4:
        return {32, 18, true, false, MOESTRO_NF4};
    case Q4_1:
        return {32, 20, false, true};
    case Q5_0:
        return {32, 22, true, false};
    case Q5_1:
        return {32, 24, false, false};
    case Q8_0:
        return {32, 34, true, false};
    case MXFP4:
        return {32, 17, true, false, MOESTRO_MXFP4};
    case Q4_K:
        return {256, 144, false, true};
    case Q5_K:
        return {256, 176, false, false};
    case Q6_K:
        return {256, 210, false, false};
    default:
        return {0, 0, false, false};
    }
}

void read_blocks(int32_t number, const uint8_t *row, int64_t k, float *out) {
    const BlockKind kind = block_kind(number);
    for (int64_t at = 0; at < k; at += kind.length, row += kind.bytes, out += kind.length) {
        if (number == Q6_K) {
            super_block_of_six_bits(row, out);
            continue;
        }
        if (kind.length == 256) {
            super_block_with_minima(number, row, out);
            continue;
        }
        int8_t q[32];
        integers(number, row, q);
        const float scale = number == MXFP4 ? std::ldexp(1.0f, row[0] - 128) : from_half(half_at(row));
        const bool shifted = number == Q4_1 || number == Q5_1;
        const float least = shifted ? from_half(half_at(row + 2)) : 0.0f;
        for (int i = 0; i < 32; i++) out[i] = shifted ? scale * float(q[i]) + least : scale * float(q[i]);
    }
}

// 2^(e - 128) as fp16, which has the powers from -24 to 15.
static bool power_as_half(uint8_t e, uint16_t *half) {
    const int power = e - 128;
    if (power < -24 || power > 15) return false;
    *half = power < -14 ? uint16_t(1u << (power + 24)) : uint16_t((power + 15) << 10);
    return true;
}

static bool finite(uint16_t half) { return (half & 0x7c00u) != 0x7c00u; }

bool read_integers(int32_t number, const uint8_t *row, int64_t k, int8_t *q, uint16_t *scales) {
    const BlockKind kind = block_kind(number);
    for (int64_t at = 0; at < k; at += 32, row += kind.bytes, q += 32, scales++) {
        integers(number, row, q);
        if (number == MXFP4) {
            if (!power_as_half(row[0], scales)) return false;
        } else {
            *scales = half_at(row);
            if (!finite(*scales)) return false;
        }
    }
    return true;
}

bool is_moved(int32_t number, int32_t packed) {
    switch (packed) {
    case MOESTRO_INT8:
        return number == Q8_0;
    case MOESTRO_INT4:
        return number == Q4_0;
    case MOESTRO_UINT4:
        return number == Q4_1;
    default:
        return has_table(packed) && block_kind(number).table == packed;
    }
}

bool scales_of(int32_t number, const uint8_t *block, uint16_t *scale_and_minimum) {
    if (number == MXFP4) return power_as_half(block[0], scale_and_minimum);
    scale_and_minimum[0] = half_at(block);
    scale_and_minimum[1] = number == Q4_1 ? half_at(block + 2) : uint16_t(0);
    return finite(scale_and_minimum[0]) && finite(scale_and_minimum[1]);
}

// Integers 0 to 15 of 32 numbers, and what they are multiplied by and added to.
static void nibbles_of(int32_t number, const uint8_t *b, int part, int8_t *q, float *scale, float *minimum) {
    if (number == Q4_K) {
        part_with_minimum(number, b, part, q, scale, minimum);
        *minimum = -*minimum;
        return;
    }
    integers(Q4_1, number == Q4_1 ? b : b - 2, q);  // Q4_0's follow its scale at once
    *scale = from_half(half_at(b));
    *minimum = number == Q4_1 ? from_half(half_at(b + 2)) : -8.0f * *scale;
}

bool read_nibbles(int32_t number, const uint8_t *row, int64_t k, int8_t *q, uint16_t *scales, uint16_t *minima) {
    const BlockKind kind = block_kind(number);
    for (int64_t at = 0; at < k; at += kind.length, row += kind.bytes)
        for (int part = 0; part < kind.length / 32; part++, q += 32) {
            float scale, minimum;
            nibbles_of(number, row, part, q, &scale, &minimum);
            if (!(std::fabs(scale) <= 65504.0f && std::fabs(minimum) <= 65504.0f)) return false;
            *scales++ = to_half(scale), *minima++ = to_half(minimum);
        }
    return true;
}

bool read_places(int32_t number, const uint8_t *row, int64_t k, int8_t *q, uint16_t *scales, bool *rounded) {
    const BlockKind kind = block_kind(number);
    for (int64_t at = 0; at < k; at += 32, row += kind.bytes, q += 32, scales++) {
        integers(Q4_1, row + kind.bytes - 20, q);  // whose nibbles end as these do
        const float scale = number == MXFP4 ? std::ldexp(1.0f, row[0] - 128) : from_half(half_at(row));
        if (!(std::fabs(scale) <= 65504.0f)) return false;
        *scales = to_half(scale);
        *rounded |= from_half(*scales) != scale;
    }
    return true;
}

}  // namespace moestro
