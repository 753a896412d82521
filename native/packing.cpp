// Packing weights into blocks, and back. The definition of what is packed is moestro/kernels/packing.py.
#include <atomic>

#include "moestro.h"
#include "pool.h"
#include "rows.h"

namespace moestro {
namespace {

// fp32 → fp16, nearest even, at most its largest number.
uint16_t to_half(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000u : 0u;
    x = std::fabs(x);
    if (x == 0.0f) return sign;
    int exponent;
    const float mantissa = std::frexp(x, &exponent);  // [0.5, 1) · 2^exponent
    if (exponent > 16) return sign | 0x7bffu;
    if (exponent < -13) return sign | uint16_t(std::nearbyint(std::ldexp(x, 24)));  // subnormal
    const auto whole = uint32_t(std::nearbyint(mantissa * 2048.0f));                // 1024 … 2048
    const uint32_t bits = (uint32_t(exponent + 14) << 10) + whole - 1024u;
    return sign | uint16_t(bits > 0x7bffu ? 0x7bffu : bits);
}

float from_half(uint16_t half) {
    const int exponent = (half >> 10) & 31, mantissa = half & 1023;
    const float size = exponent ? std::ldexp(float(mantissa + 1024), exponent - 25) : std::ldexp(float(mantissa), -24);
    return half & 0x8000u ? -size : size;
}

float load(int32_t dtype, const void *src, int64_t at) {
    return dtype == MOESTRO_ROWS_F32 ? static_cast<const float *>(src)[at]
                                     : from_bf16(static_cast<const uint16_t *>(src)[at]);
}

struct Source {
    int32_t dtype;
    const void *data;
    int64_t n, k, stride;
    float at(int64_t row, int64_t column) const {
        return row < n && column < k ? load(dtype, data, row * stride + column) : 0.0f;
    }
};

// One group of one column: the scale as fp16 bits, and its integers.
uint16_t quantise_group(const Source &s, int64_t row, int64_t from, int32_t group, int32_t kind, int32_t *q) {
    float largest = s.at(row, from);  // of equal sizes the first, also of zeros
    for (int i = 1; i < group; i++) {
        const float value = s.at(row, from + i);
        if (std::fabs(value) > std::fabs(largest)) largest = value;
    }
    const bool bytes = kind == MOESTRO_INT8;
    const float low = bytes ? -127.0f : -8.0f, high = bytes ? 127.0f : 7.0f;
    const uint16_t half = to_half(bytes ? std::fabs(largest) / 127.0f : largest / -8.0f);
    const float scale = from_half(half), inverse = scale != 0.0f ? 1.0f / scale : 0.0f;
    for (int i = 0; i < group; i++) {
        const float value = std::nearbyint(s.at(row, from + i) * inverse);
        q[i] = int32_t(std::fmin(std::fmax(value, low), high));
    }
    return half;
}

void pack_block(int32_t kind, int32_t group, const Source &s, int64_t block, uint8_t *out) {
    const int64_t inputs = padded(kind, group, s.k), first = block * COLUMNS;
    if (kind == MOESTRO_F32) {
        auto at = reinterpret_cast<float *>(out);
        for (int64_t k = 0; k < inputs; k++)
            for (int64_t n = 0; n < COLUMNS; n++) *at++ = s.at(first + n, k);
        return;
    }
    if (kind == MOESTRO_BF16) {
        auto at = reinterpret_cast<uint16_t *>(out);
        for (int64_t k = 0; k < inputs; k += 2)
            for (int64_t n = 0; n < COLUMNS; n++)
                for (int i = 0; i < 2; i++) *at++ = to_bf16(s.at(first + n, k + i));
        return;
    }
    const int64_t lines = group * COLUMNS / (kind == MOESTRO_INT4 ? 2 : 1);
    int32_t q[64];
    for (int64_t g = 0; g < inputs / group; g++, out += 64 + lines) {
        auto scales = reinterpret_cast<uint16_t *>(out);
        uint8_t *at = out + 64;
        memset(at, 0, size_t(lines));
        for (int64_t n = 0; n < COLUMNS; n++) {
            scales[n] = quantise_group(s, first + n, g * group, group, kind, q);
            for (int i = 0; i < group; i++) {
                const int64_t quad = i / 4;
                if (kind == MOESTRO_INT8) at[(quad * COLUMNS + n) * 4 + i % 4] = uint8_t(int8_t(q[i]));
                else at[(quad / 2 * COLUMNS + n) * 4 + i % 4] |= uint8_t((q[i] + 8) << (quad % 2 ? 4 : 0));
            }
        }
    }
}

void unpack_block(int32_t kind, int32_t group, const uint8_t *in, int64_t n, int64_t k, int64_t block, float *dst) {
    const int64_t lines = group * COLUMNS / (kind == MOESTRO_INT4 ? 2 : 1);
    for (int64_t c = 0; c < COLUMNS && block * COLUMNS + c < n; c++)
        for (int64_t i = 0; i < k; i++) {
            float &place = dst[(block * COLUMNS + c) * k + i];
            if (kind == MOESTRO_F32) {
                place = reinterpret_cast<const float *>(in)[i * COLUMNS + c];
                continue;
            }
            if (kind == MOESTRO_BF16) {
                place = from_bf16(reinterpret_cast<const uint16_t *>(in)[(i / 2 * COLUMNS + c) * 2 + i % 2]);
                continue;
            }
            const uint8_t *at = in + i / group * (64 + lines);
            const float scale = from_half(reinterpret_cast<const uint16_t *>(at)[c]);
            const int64_t quad = i % group / 4;
            if (kind == MOESTRO_INT8) place = scale * float(int8_t(at[64 + (quad * COLUMNS + c) * 4 + i % 4]));
            else
                place = scale * float(((at[64 + (quad / 2 * COLUMNS + c) * 4 + i % 4] >> (quad % 2 ? 4 : 0)) & 15) - 8);
        }
}

// Whether all numbers are finite and, for integers with fp16 scales, not too large for them.
bool packable(const Source &s, int32_t kind) {
    const float limit = is_float(kind) ? 3.3e38f : 65504.0f;
    for (int64_t n = 0; n < s.n; n++)
        for (int64_t k = 0; k < s.k; k++)
            if (!(std::fabs(s.at(n, k)) <= limit)) return false;
    return true;
}

}  // namespace
}  // namespace moestro

using namespace moestro;

extern "C" {

int32_t moestro_pack(int32_t kind, int32_t group, int32_t dtype, const void *src, int64_t n, int64_t k, int64_t stride,
                     void *dst, int64_t step) {
    const bool shaped = n >= 1 && k >= 1 && stride >= k && (step == 1 || step == 2);
    if (!valid(kind, group) || plain(kind) || !shaped || !src || !dst || !valid_rows(dtype)) return MOESTRO_EBAD;
    const Source source{dtype, src, n, k, stride};
    const int64_t blocks = blocks_of(n), bytes = block_bytes(kind, group, k);
    std::atomic<bool> bad{false};
    Lock lock(one_at_a_time());
    run(blocks, [&](Team &team, int) {
        int64_t from, to;
        while (team.take(blocks, 1, &from, &to)) {
            const int64_t rows = n - from * COLUMNS < COLUMNS ? n - from * COLUMNS : COLUMNS;
            const Source part{
                dtype, static_cast<const char *>(src) + from * COLUMNS * stride * (dtype == MOESTRO_ROWS_F32 ? 4 : 2),
                rows, k, stride};
            if (!packable(part, kind)) bad = true;
            else pack_block(kind, group, source, from, static_cast<uint8_t *>(dst) + from * step * bytes);
        }
    });
    return bad ? MOESTRO_EBAD : 0;
}

int32_t moestro_unpack(int32_t kind, int32_t group, const void *src, int64_t n, int64_t k, int64_t step, float *dst) {
    if (!valid(kind, group) || plain(kind) || n < 1 || k < 1 || (step != 1 && step != 2) || !src || !dst)
        return MOESTRO_EBAD;
    const int64_t blocks = blocks_of(n), bytes = block_bytes(kind, group, k);
    for (int64_t b = 0; b < blocks; b++)
        unpack_block(kind, group, static_cast<const uint8_t *>(src) + b * step * bytes, n, k, b, dst);
    return 0;
}

}  // extern "C"
