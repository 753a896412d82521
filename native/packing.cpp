// Packing weights into blocks, and back. The definition of what is packed is moestro/kernels/packing.py.
#include <algorithm>
#include <atomic>
#include <mutex>

#include "blocks.h"
#include "moestro.h"
#include "pool.h"
#include "rows.h"

namespace moestro {
namespace {

// fp32 → fp16, nearest even, at most its largest number.
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

// What is packed: rows of numbers, or of blocks (dtype MOESTRO_ROWS_BLOCKS + the kind's number).
struct Source {
    int32_t dtype;
    const uint8_t *data;
    int64_t n, k, row_bytes;
    int32_t number() const { return dtype - MOESTRO_ROWS_BLOCKS; }
    bool blocks() const { return dtype >= MOESTRO_ROWS_BLOCKS; }
    const uint8_t *row(int64_t n) const { return data + n * row_bytes; }
    void read(int64_t n, float *out) const {
        if (blocks()) return read_blocks(number(), row(n), k, out);
        if (dtype == MOESTRO_ROWS_F32) memcpy(out, row(n), size_t(k) * 4);
        else {
            const auto bits = reinterpret_cast<const uint16_t *>(row(n));
            for (int64_t i = 0; i < k; i++) out[i] = from_bf16(bits[i]);
        }
    }
};

// Whether all numbers are finite and, for integers with fp16 scales, not too large for them.
MOESTRO_WIDE bool packable(const float *x, int64_t k, int32_t kind) {
    const float limit = is_float(kind) ? 3.3e38f : 65504.0f;
    int unfit = 0;
    for (int64_t i = 0; i < k; i++) unfit |= !(std::fabs(x[i]) <= limit);
    return !unfit;
}

// Eight numbers side by side, in as many registers as the machine needs for them.
typedef float Eight __attribute__((vector_size(32)));
MOESTRO_INLINE Eight eight(const float *from) {
    Eight x;
    memcpy(&x, from, sizeof x);
    return x;
}

MOESTRO_INLINE float sum(Eight x) { return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7])); }

// One group of a row: the scale as fp16 bits, and its integers; to sums (unless null) as in `quantise_row`.
template <int GROUP>
MOESTRO_INLINE uint16_t quantise_group(const float *x, bool bytes, int8_t *q, float *sums) {
    Eight sizes = {};
    for (int i = 0; i < GROUP; i += 8) {
        const Eight each = eight(x + i), positive = each < 0.0f ? -each : each;
        sizes = positive > sizes ? positive : sizes;
    }
    float size = 0.0f;
    for (int j = 0; j < 8; j++) size = sizes[j] > size ? sizes[j] : size;
    float largest = size;
    if (!bytes) {  // of equal sizes the first, also of zeros
        int first = 0;
        while (std::fabs(x[first]) != size) first++;
        largest = x[first];
    }
    const uint16_t half = to_half(bytes ? size / 127.0f : largest / -8.0f);
    const float scale = from_half(half), inverse = scale != 0.0f ? 1.0f / scale : 0.0f;
    const float low = bytes ? -127.0f : -8.0f, high = bytes ? 127.0f : 7.0f;
    const float shift = 12582912.0f;  // adding it rounds |x| < 2^22 to whole numbers, even on ties
    const Eight least = Eight{} + low, most = Eight{} + high;
    alignas(32) float rounded[GROUP];
    Eight error = {}, squares = {};
    for (int i = 0; i < GROUP; i += 8) {
        const Eight each = eight(x + i);
        Eight value = (each * inverse + shift) - shift;
        value = value < least ? least : value;
        value = value > most ? most : value;
        memcpy(rounded + i, &value, sizeof value);
        const Eight off = each - value * scale;
        error += off * off, squares += each * each;
    }
    if (sums) sums[0] += sum(error), sums[1] += sum(squares);
    for (int i = 0; i < GROUP; i++) q[i] = int8_t(int32_t(rounded[i]));
    return half;
}

template <int GROUP>
MOESTRO_INLINE void quantise_groups(const float *x, int64_t count, bool bytes, int8_t *q, uint16_t *scales,
                                    double *sums) {
    float own[2] = {};
    for (int64_t g = 0; g < count; g++, x += GROUP, q += GROUP)
        scales[g] = quantise_group<GROUP>(x, bytes, q, sums ? own : nullptr);
    if (sums) sums[0] += own[0], sums[1] += own[1];
}

MOESTRO_WIDE void quantise_groups_of_32(const float *x, int64_t count, bool bytes, int8_t *q, uint16_t *scales,
                                        double *sums) {
    quantise_groups<32>(x, count, bytes, q, scales, sums);
}
MOESTRO_WIDE void quantise_groups_of_64(const float *x, int64_t count, bool bytes, int8_t *q, uint16_t *scales,
                                        double *sums) {
    quantise_groups<64>(x, count, bytes, q, scales, sums);
}

// A row as integers and scales. The squared error that this adds goes to sums[0], the squares themselves to sums[1].
bool quantise_row(const Source &s, int64_t row, int32_t kind, int32_t group, float *x, int8_t *q, uint16_t *scales,
                  double *sums) {
    const int64_t inputs = padded(kind, group, s.k);
    const bool as_they_are = s.blocks() && group == 32 && block_kind(s.number()).exact &&
                             (kind == MOESTRO_INT8 || s.number() == MOESTRO_BLOCKS_Q4_0);
    if (as_they_are && read_integers(s.number(), s.row(row), s.k, q, scales)) return true;
    s.read(row, x);
    for (int64_t i = s.k; i < inputs; i++) x[i] = 0.0f;
    if (!packable(x, s.k, kind)) return false;
    const auto quantise = group == 32 ? quantise_groups_of_32 : quantise_groups_of_64;
    quantise(x, inputs / group, kind == MOESTRO_INT8, q, scales, sums);
    return true;
}

// Column n of a packed block of integers.
void place_integers(int32_t kind, int32_t group, int64_t inputs, int64_t n, const int8_t *q, const uint16_t *scales,
                    uint8_t *out) {
    const int64_t lines = group * COLUMNS / (kind == MOESTRO_INT4 ? 2 : 1);
    for (int64_t g = 0; g < inputs / group; g++, out += 64 + lines, q += group) {
        memcpy(out + 2 * n, scales + g, 2);
        uint8_t *at = out + 64 + n * 4;
        if (kind == MOESTRO_INT8) {
            for (int i = 0; i < group; i += 4, at += COLUMNS * 4) memcpy(at, q + i, 4);
            continue;
        }
        for (int i = 0; i < group; i += 8, at += COLUMNS * 4)
            for (int j = 0; j < 4; j++) at[j] = uint8_t((q[i + j] + 8) | (q[i + 4 + j] + 8) << 4);
    }
}

// This thread's rows on their way.
struct Row {
    float *x;
    int8_t *q;
    uint16_t *scales;
    explicit Row(int64_t inputs) {
        x = thread_buffer().get<float>(inputs * 2);
        q = reinterpret_cast<int8_t *>(x + inputs);
        scales = reinterpret_cast<uint16_t *>(q + inputs);
    }
};

bool pack_block(int32_t kind, int32_t group, const Source &s, int64_t block, uint8_t *out, double *sums) {
    const int64_t inputs = padded(kind, group, s.k), first = block * COLUMNS;
    const Row made(inputs);
    for (int64_t n = 0; n < COLUMNS; n++) {
        const bool there = first + n < s.n;
        if (!is_float(kind)) {
            if (!there) {
                memset(made.q, 0, size_t(inputs));
                std::fill_n(made.scales, inputs / group, uint16_t(kind == MOESTRO_INT4 ? 0x8000 : 0));  // 0 / -8
            } else if (!quantise_row(s, first + n, kind, group, made.x, made.q, made.scales, sums)) {
                return false;
            }
            place_integers(kind, group, inputs, n, made.q, made.scales, out);
            continue;
        }
        memset(made.x, 0, size_t(inputs) * 4);
        if (there) s.read(first + n, made.x);
        if (!packable(made.x, inputs, kind)) return false;
        if (kind == MOESTRO_F32) {
            for (int64_t k = 0; k < inputs; k++) reinterpret_cast<float *>(out)[k * COLUMNS + n] = made.x[k];
            continue;
        }
        for (int64_t k = 0; k < inputs; k++)
            reinterpret_cast<uint16_t *>(out)[(k / 2 * COLUMNS + n) * 2 + k % 2] = to_bf16(made.x[k]);
    }
    return true;
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

// Bytes of a row of k numbers; 0: there is no such dtype, or k is no multiple of its blocks.
int64_t row_bytes(int32_t dtype, int64_t k) {
    if (dtype == MOESTRO_ROWS_F32) return k * 4;
    if (dtype == MOESTRO_ROWS_BF16) return k * 2;
    if (dtype < MOESTRO_ROWS_BLOCKS) return 0;
    const BlockKind kind = block_kind(dtype - MOESTRO_ROWS_BLOCKS);
    return kind.length && k % kind.length == 0 ? k / kind.length * kind.bytes : 0;
}

}  // namespace
}  // namespace moestro

using namespace moestro;

extern "C" {

int32_t moestro_pack(int32_t kind, int32_t group, int32_t dtype, const void *src, int64_t n, int64_t k, void *dst,
                     int64_t step, double *sums) {
    const int64_t stride = k >= 1 ? row_bytes(dtype, k) : 0;
    const bool shaped = n >= 1 && stride && (step == 1 || step == 2);
    if (!valid(kind, group) || plain(kind) || !shaped || !src || !dst) return MOESTRO_EBAD;
    const Source source{dtype, static_cast<const uint8_t *>(src), n, k, stride};
    const int64_t blocks = blocks_of(n), bytes = block_bytes(kind, group, k);
    std::atomic<bool> bad{false};
    std::mutex adding;
    Lock lock(one_at_a_time());
    run(blocks, [&](Team &team, int) {
        int64_t from, to;
        double own[2] = {};
        while (team.take(blocks, 1, &from, &to))
            if (!pack_block(kind, group, source, from, static_cast<uint8_t *>(dst) + from * step * bytes,
                            sums ? own : nullptr))
                bad = true;
        std::lock_guard<std::mutex> guard(adding);
        if (sums) sums[0] += own[0], sums[1] += own[1];
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

int32_t moestro_read_rows(int32_t dtype, const void *src, int64_t n, int64_t k, float *dst) {
    const int64_t stride = k >= 1 ? row_bytes(dtype, k) : 0;
    if (n < 1 || !stride || !src || !dst) return MOESTRO_EBAD;
    const Source source{dtype, static_cast<const uint8_t *>(src), n, k, stride};
    Lock lock(one_at_a_time());
    run(n, [&](Team &team, int) {
        int64_t from, to;
        while (team.take(n, 16, &from, &to))
            for (; from < to; from++) source.read(from, dst + from * k);
    });
    return 0;
}

}  // extern "C"
