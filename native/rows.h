// How packed weights are laid out, and rows in the form that they multiply.
#pragma once
#include <cmath>
#include <cstring>
#include <new>

#include "kernels.h"
#include "moestro.h"

namespace moestro {

const Kernels &kernels();  // of the chosen path

inline bool valid(int32_t kind, int32_t group) {
    return kind == MOESTRO_BF16 || ((kind == MOESTRO_INT8 || kind == MOESTRO_INT4) && (group == 32 || group == 64));
}

inline int64_t padded(int32_t kind, int32_t group, int64_t k) { return round_up(k, kind == MOESTRO_BF16 ? PAIRS : group); }

inline int64_t block_bytes(int32_t kind, int32_t group, int64_t k) {
    const int64_t inputs = padded(kind, group, k);
    if (kind == MOESTRO_BF16) return inputs * 64;
    return inputs / group * (64 + group * COLUMNS / (kind == MOESTRO_INT4 ? 2 : 1));
}

inline int64_t blocks_of(int64_t n) { return round_up(n, COLUMNS) / COLUMNS; }

inline bool gated(int32_t activation) { return activation <= MOESTRO_CLAMPED; }

inline float from_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
inline float from_bf16(uint16_t bits) { return from_bits(uint32_t(bits) << 16); }

inline uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40u);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Memory that grows and stays: a computation asks for the same sizes again and again.
class Buffer {
public:
    ~Buffer() { operator delete[](data_, std::align_val_t(64)); }
    template <class T> T *get(int64_t count) {
        const size_t bytes = size_t(count) * sizeof(T) + 64;
        if (bytes > size_) {
            operator delete[](data_, std::align_val_t(64));
            data_ = nullptr, size_ = 0;
            data_ = operator new[](bytes, std::align_val_t(64));
            size_ = bytes;
        }
        return static_cast<T *>(data_);
    }

private:
    void *data_ = nullptr;
    size_t size_ = 0;
};

// Rows in the form that a kind of weights multiplies.
struct Prepared {
    Buffer bits, wide, bytes, scales, sums;
    Rows rows;
    int32_t kind = 0, group = 0;

    void shape(int32_t kind_, int32_t group_, int64_t m, int64_t k) {
        kind = kind_, group = group_;
        rows = Rows{};
        rows.m = m, rows.k = padded(kind, group, k);
        if (kind == MOESTRO_BF16) {
            rows.bits = bits.get<uint16_t>(m * rows.k);
            rows.wide = wide.get<float>(m * rows.k);
        } else {
            rows.bytes = bytes.get<int8_t>(m * rows.k);
            rows.scales = scales.get<float>(m * rows.k / group);
            rows.sums = sums.get<int32_t>(m * rows.k / group);
        }
    }
    // Row `to` from fp32 values, padded to rows.k.
    void set(int64_t to, const float *x) {
        const int64_t k = rows.k;
        if (kind == MOESTRO_BF16)
            kernels().round(x, k, const_cast<uint16_t *>(rows.bits) + to * k, const_cast<float *>(rows.wide) + to * k);
        else
            kernels().quantise(x, k, group, const_cast<int8_t *>(rows.bytes) + to * k,
                               const_cast<float *>(rows.scales) + to * (k / group),
                               const_cast<int32_t *>(rows.sums) + to * (k / group));
    }
    Rows part(int64_t from, int64_t m) const {
        Rows some = rows;
        some.m = m;
        if (kind == MOESTRO_BF16) {
            some.bits += from * rows.k, some.wide += from * rows.k;
        } else {
            const int64_t groups = rows.k / group;
            some.bytes += from * rows.k, some.scales += from * groups, some.sums += from * groups;
        }
        return some;
    }
};

inline void read_row(int32_t dtype, const void *x, int64_t row, int64_t k, int64_t padded_k, float *out) {
    if (dtype == MOESTRO_F32) memcpy(out, static_cast<const float *>(x) + row * k, size_t(k) * 4);
    else for (int64_t i = 0; i < k; i++) out[i] = from_bf16(static_cast<const uint16_t *>(x)[row * k + i]);
    for (int64_t i = k; i < padded_k; i++) out[i] = 0.0f;
}

inline void write_row(int32_t dtype, void *y, int64_t at, const float *from, int64_t n) {
    if (dtype == MOESTRO_F32) memcpy(static_cast<float *>(y) + at, from, size_t(n) * 4);
    else for (int64_t i = 0; i < n; i++) static_cast<uint16_t *>(y)[at + i] = to_bf16(from[i]);
}

inline Block block_at(const void *data, int64_t bytes, int64_t number, int32_t kind, int32_t group) {
    return {static_cast<const uint8_t *>(data) + number * bytes, kind, group};
}

}  // namespace moestro
