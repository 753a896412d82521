// How packed weights are laid out, and rows in the form that they multiply.
#pragma once
#include <cmath>
#include <cstring>
#include <new>

#include "kernels.h"
#include "moestro.h"
#include "pool.h"

namespace moestro {

const Kernels &kernels();  // of the chosen path

inline bool plain(int32_t kind) { return kind == MOESTRO_PLAIN_BF16 || kind == MOESTRO_PLAIN_F32; }

inline bool is_fp32(int32_t kind) { return kind == MOESTRO_F32 || kind == MOESTRO_PLAIN_F32; }

// Bytes of a plain matrix.
inline int64_t plain_bytes(int32_t kind, int64_t n, int64_t k) { return n * k * (is_fp32(kind) ? 4 : 2); }

// Whether weights are floating-point numbers, not integers with scales.
inline bool is_float(int32_t kind) { return kind != MOESTRO_INT8 && !is_nibbles(kind); }

inline bool valid(int32_t kind, int32_t group) {
    if (kind < MOESTRO_BF16 || kind > MOESTRO_PLAIN_F32) return false;
    return is_float(kind) || group == 32 || (group == 64 && !has_table(kind));
}

inline bool valid(const moestro_matrix &w) { return w.data && valid(w.kind, w.group) && w.n >= 1 && w.k >= 1; }

inline bool is(const moestro_matrix &w, int64_t n, int64_t k) { return valid(w) && w.n == n && w.k == k; }

inline bool gated(int32_t activation) { return activation <= MOESTRO_CAPPED; }

// Steps of plain matrices [n, k]; both 0 were never set.
inline bool valid(const moestro_steps &steps, int64_t n, int64_t k) {
    return steps.expert >= 0 && steps.output >= 0 && steps.input >= 0 &&
           (steps.output || steps.input || (n == 1 && k == 1));
}

inline bool valid(const moestro_experts &w) {
    const bool kinds = valid(w.kind, w.group) && valid(w.down_kind, w.group),
               alike = plain(w.kind) || plain(w.down_kind) ? w.kind == w.down_kind : true,
               known = kinds && alike && w.activation >= MOESTRO_SWIGLU && w.activation <= MOESTRO_RELU2,
               placed = valid(w.up_steps, w.hidden, w.dim) && valid(w.down_steps, w.dim, w.hidden),
               whole = !plain(w.kind) || (w.down && (w.up || !gated(w.activation)) && placed),
               there = w.data ? !w.residency && whole : w.residency && !plain(w.kind);
    return known && there && w.experts >= 1 && w.dim >= 1 && w.hidden >= 1;
}

// Bytes of a number in a cache.
inline int64_t cache_bytes(int32_t dtype) { return dtype == MOESTRO_ROWS_F32 ? 4 : dtype == MOESTRO_ROWS_BF16 ? 2 : 1; }

inline bool valid_rows(int32_t dtype) { return dtype == MOESTRO_ROWS_F32 || dtype == MOESTRO_ROWS_BF16; }

// Inputs as they are multiplied, zeros at the end.
inline int64_t padded(int32_t kind, int32_t group, int64_t k) {
    if (is_fp32(kind)) return k;
    return round_up(k, is_float(kind) ? PAIRS : group);
}

// Bytes of a packed block of 32 columns.
inline int64_t block_bytes(int32_t kind, int32_t group, int64_t k) {
    const int64_t inputs = padded(kind, group, k);
    if (is_float(kind)) return inputs * COLUMNS * (is_fp32(kind) ? 4 : 2);
    return inputs / group * group_bytes(kind, group);
}

inline int64_t blocks_of(int64_t n) { return round_up(n, COLUMNS) / COLUMNS; }

inline float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
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

// This thread's memory for the block that it works on.
inline Buffer &thread_buffer() {
    static thread_local Buffer memory;
    return memory;
}

// Rows in the form that a kind of weights multiplies.
class Prepared {
public:
    Rows rows;

    // Make room for m rows of k inputs. Throws std::bad_alloc.
    void shape(int32_t kind, int32_t group, int64_t m, int64_t k) {
        kind_ = kind, group_ = group;
        rows = Rows{};
        rows.m = m, rows.k = padded(kind, group, k);
        const int64_t capacity = round_up(m, TILE) * rows.k;
        if (is_float(kind)) {
            values_ = values_buffer_.get<float>(capacity);
            bits_ = bits_buffer_.get<uint16_t>(capacity);
        } else {
            bytes_ = bytes_buffer_.get<int8_t>(capacity);
            scales_ = scales_buffer_.get<float>(capacity / group);
            sums_ = sums_buffer_.get<int32_t>(capacity / group);
        }
        rows.bits = bits_, rows.values = values_, rows.bytes = bytes_, rows.scales = scales_, rows.sums = sums_;
    }

    // Row `row` from fp32 values, padded to rows.k with zeros.
    void set(int64_t row, const float *x) {
        const int64_t k = rows.k, groups = is_float(kind_) ? 0 : k / group_;
        if (is_fp32(kind_)) {
            memcpy(values_ + row * k, x, size_t(k) * 4);
        } else if (is_float(kind_)) {
            for (int64_t step = 0; step < k / PAIRS; step++)
                kernels().round(x + step * PAIRS, PAIRS, bits_ + Rows::tile_offset(row, step, PAIRS, k),
                                values_ + row * k + step * PAIRS);
        } else {
            for (int64_t g = 0; g < groups; g++)
                kernels().quantise(x + g * group_, group_, group_, bytes_ + Rows::tile_offset(row, g, group_, k),
                                   scales_ + row * groups + g, sums_ + row * groups + g);
        }
    }

    // Row `row` as row `source` of others of the same kind, group and inputs.
    void copy(int64_t row, const Prepared &from, int64_t source) {
        const int64_t k = rows.k, width = is_float(kind_) ? PAIRS : group_;
        if (is_float(kind_)) memcpy(values_ + row * k, from.values_ + source * k, size_t(k) * 4);
        for (int64_t step = 0; !is_fp32(kind_) && step < k / width; step++) {
            const int64_t to = Rows::tile_offset(row, step, width, k), at = Rows::tile_offset(source, step, width, k);
            if (is_float(kind_)) memcpy(bits_ + to, from.bits_ + at, size_t(width) * 2);
            else memcpy(bytes_ + to, from.bytes_ + at, size_t(width));
        }
        if (is_float(kind_)) return;
        const int64_t groups = k / group_;
        memcpy(scales_ + row * groups, from.scales_ + source * groups, size_t(groups) * 4);
        memcpy(sums_ + row * groups, from.sums_ + source * groups, size_t(groups) * 4);
    }

    // Some rows, the first a multiple of TILE.
    Rows part(int64_t from, int64_t m) const {
        Rows some = rows;
        some.m = m;
        if (is_float(kind_)) {
            some.bits += from * rows.k, some.values += from * rows.k;
        } else {
            const int64_t groups = rows.k / group_;
            some.bytes += from * rows.k, some.scales += from * groups, some.sums += from * groups;
        }
        return some;
    }

private:
    int32_t kind_ = 0, group_ = 0;
    Buffer bits_buffer_, values_buffer_, bytes_buffer_, scales_buffer_, sums_buffer_;
    uint16_t *bits_ = nullptr;
    float *values_ = nullptr, *scales_ = nullptr;
    int8_t *bytes_ = nullptr;
    int32_t *sums_ = nullptr;
};

inline void read_row(int32_t dtype, const void *x, int64_t row, int64_t k, int64_t padded_k, float *out) {
    if (dtype == MOESTRO_ROWS_F32) memcpy(out, static_cast<const float *>(x) + row * k, size_t(k) * 4);
    else
        for (int64_t i = 0; i < k; i++) out[i] = from_bf16(static_cast<const uint16_t *>(x)[row * k + i]);
    for (int64_t i = k; i < padded_k; i++) out[i] = 0.0f;
}

inline void write_row(int32_t dtype, void *y, int64_t at, const float *from, int64_t n) {
    if (dtype == MOESTRO_ROWS_F32) memcpy(static_cast<float *>(y) + at, from, size_t(n) * 4);
    else
        for (int64_t i = 0; i < n; i++) static_cast<uint16_t *>(y)[at + i] = to_bf16(from[i]);
}

// Up to 32 columns of plain numbers of `size` bytes, `output` numbers apart, whose k inputs are `input` apart, as a
// block of `words` words a column.
void gather(const uint8_t *from, int64_t size, int64_t output, int64_t input, int64_t columns, int64_t k, int64_t words,
            uint32_t *to);

// The blocks of one matrix: packed ones where they lie, plain ones brought together in a thread's own memory.
class Blocks {
public:
    static constexpr int64_t MOST_AHEAD = 1 << 17;  // bytes: a part of a core's own cache
    // A packed matrix whose blocks are `step` blocks apart, or a plain one, rows [n, k].
    Blocks(const void *data, int32_t kind, int32_t group, int64_t n, int64_t k, int64_t step = 1)
        : data_(static_cast<const uint8_t *>(data)), kind_(kind), group_(group), n_(n), k_(k),
          bytes_(block_bytes(kind, group, k)), step_(step), output_(k) {}
    // Matrix `expert` of plain ones, that lie anywhere.
    Blocks(const void *data, int32_t kind, int64_t expert, const moestro_steps &steps, int64_t n, int64_t k)
        : Blocks(static_cast<const uint8_t *>(data) + plain_bytes(kind, expert, steps.expert), kind, 32, n, k) {
        output_ = steps.output, input_ = steps.input;
    }

    Block at(int64_t b, Buffer &transposed) const {
        if (!plain(kind_)) return {data_ + b * step_ * bytes_, kind_, group_};
        const int64_t row_bytes = plain_bytes(kind_, 1, k_);
        auto to = transposed.get<uint32_t>(bytes_ / 4);
        kernels().transpose(data_ + b * COLUMNS * row_bytes, row_bytes, columns(b), bytes_ / 4 / COLUMNS, to);
        return {reinterpret_cast<uint8_t *>(to), is_fp32(kind_) ? MOESTRO_F32 : MOESTRO_BF16, group_};
    }

    // What a thread reads first that begins with block b.
    Ahead ahead(int64_t b) const {
        if (plain(kind_) || b >= blocks_of(n_)) return {};
        const int64_t left = (blocks_of(n_) - b) * step_ * bytes_;
        return {data_ + b * step_ * bytes_, left < MOST_AHEAD ? left : MOST_AHEAD};
    }

    // Plain weights that are no rows one after another.
    bool spread() const { return plain(kind_) && (input_ != 1 || output_ != k_); }
    // Of such, `inputs` inputs of block b from input k0 on, zeros after the last.
    Block piece(int64_t b, int64_t k0, int64_t inputs, Buffer &gathered) const {
        const int64_t size = plain_bytes(kind_, 1, 1), there = k_ - k0 < inputs ? k_ - k0 : inputs;
        auto to = gathered.get<uint32_t>(inputs * COLUMNS);
        gather(data_ + (b * COLUMNS * output_ + k0 * input_) * size, size, output_, input_, columns(b), there,
               inputs * size / 4, to);
        return {reinterpret_cast<uint8_t *>(to), is_fp32(kind_) ? MOESTRO_F32 : MOESTRO_BF16, group_};
    }

private:
    int64_t columns(int64_t b) const { return n_ - b * COLUMNS < COLUMNS ? n_ - b * COLUMNS : COLUMNS; }

    const uint8_t *data_;
    int32_t kind_, group_;
    int64_t n_, k_, bytes_, step_, output_, input_ = 1;
};

}  // namespace moestro
