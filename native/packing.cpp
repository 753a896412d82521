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

constexpr int64_t LEAST_OF_A_TEAM = 1 << 20;  // numbers

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

// Integers and their scales, and minima where the kind has them, of groups of a row.
struct Groups {
    int8_t *q;
    uint16_t *scales, *minima;
};

// Group g of a row; to sums (unless null) as in `quantise_row`.
template <int GROUP>
MOESTRO_INLINE void quantise_group(const float *x, int32_t kind, const Groups &to, int64_t g, float *sums) {
    Eight leasts = eight(x), mosts = leasts;
    for (int i = 8; i < GROUP; i += 8) {
        const Eight each = eight(x + i);
        leasts = each < leasts ? each : leasts, mosts = each > mosts ? each : mosts;
    }
    float lowest = leasts[0], highest = mosts[0];
    for (int j = 1; j < 8; j++) {
        lowest = leasts[j] < lowest ? leasts[j] : lowest;
        highest = mosts[j] > highest ? mosts[j] : highest;
    }
    const bool bytes = kind == MOESTRO_INT8, shifted = has_minima(kind);
    const float size = std::fmax(std::fabs(lowest), std::fabs(highest));
    float range = bytes ? size / 127.0f : (highest - lowest) / 15.0f;
    if (kind == MOESTRO_INT4) {  // of equal sizes the first, also of zeros
        int first = 0;
        while (std::fabs(x[first]) != size) first++;
        range = x[first] / -8.0f;
    }
    to.scales[g] = to_half(range);
    if (shifted) to.minima[g] = to_half(lowest + 0.0f);  // of two zeros the positive one
    const float scale = from_half(to.scales[g]), inverse = scale != 0.0f ? 1.0f / scale : 0.0f;
    const float minimum = shifted ? from_half(to.minima[g]) : 0.0f;
    const float low = bytes ? -127.0f : shifted ? 0.0f : -8.0f, high = bytes ? 127.0f : shifted ? 15.0f : 7.0f;
    const float shift = 12582912.0f;  // adding it rounds |x| < 2^22 to whole numbers, even on ties
    const Eight least = Eight{} + low, most = Eight{} + high;
    alignas(32) float rounded[GROUP];
    Eight error = {}, squares = {};
    for (int i = 0; i < GROUP; i += 8) {
        const Eight each = eight(x + i);
        Eight value = ((each - minimum) * inverse + shift) - shift;
        value = value < least ? least : value;
        value = value > most ? most : value;
        memcpy(rounded + i, &value, sizeof value);
        const Eight off = each - (value * scale + minimum);
        error += off * off, squares += each * each;
    }
    if (sums) sums[0] += sum(error), sums[1] += sum(squares);
    for (int i = 0; i < GROUP; i++) to.q[g * GROUP + i] = int8_t(int32_t(rounded[i]));
}

template <int GROUP>
MOESTRO_INLINE void quantise_groups(const float *x, int64_t count, int32_t kind, const Groups &to, double *sums) {
    float own[2] = {};
    for (int64_t g = 0; g < count; g++, x += GROUP) quantise_group<GROUP>(x, kind, to, g, sums ? own : nullptr);
    if (sums) sums[0] += own[0], sums[1] += own[1];
}

MOESTRO_WIDE void quantise_groups_of_32(const float *x, int64_t count, int32_t kind, const Groups &to, double *sums) {
    quantise_groups<32>(x, count, kind, to, sums);
}
MOESTRO_WIDE void quantise_groups_of_64(const float *x, int64_t count, int32_t kind, const Groups &to, double *sums) {
    quantise_groups<64>(x, count, kind, to, sums);
}

// To sums what integers (or places in a table), scales and minima of 32 differ from the numbers that they stand for.
MOESTRO_WIDE void add_differences(const float *x, int64_t count, const int8_t *table, const Groups &to, double *sums) {
    float own[2] = {};
    for (int64_t g = 0; g < count; g++, x += 32) {
        const float scale = from_half(to.scales[g]), minimum = from_half(to.minima[g]);
        alignas(32) float values[32];
        for (int i = 0; i < 32; i++) values[i] = scale * float(table[to.q[g * 32 + i]]) + minimum;
        Eight error = {}, squares = {};
        for (int i = 0; i < 32; i += 8) {
            const Eight each = eight(x + i), off = each - eight(values + i);
            error += off * off, squares += each * each;
        }
        own[0] += sum(error), own[1] += sum(squares);
    }
    sums[0] += own[0], sums[1] += own[1];
}

// A row of blocks whose integers the packed kind has too; false: there is no such kind, or scales are beyond fp16.
bool keep_integers(const Source &s, int64_t row, int32_t kind, int32_t group, float *x, const Groups &to,
                   double *sums) {
    if (!s.blocks() || group != 32) return false;
    const BlockKind from = block_kind(s.number());
    if (has_minima(kind)) {
        if (!from.nibbles || !read_nibbles(s.number(), s.row(row), s.k, to.q, to.scales, to.minima)) return false;
        if (sums && from.length > 32) s.read(row, x), add_differences(x, s.k / 32, table_of(kind), to, sums);
        return true;
    }
    if (has_table(kind)) {
        bool rounded = false;
        if (from.table != kind || !read_places(s.number(), s.row(row), s.k, to.q, to.scales, &rounded)) return false;
        std::fill_n(to.minima, s.k / 32, uint16_t(0));
        if (sums && rounded) s.read(row, x), add_differences(x, s.k / 32, table_of(kind), to, sums);
        return true;
    }
    const bool held = kind == MOESTRO_INT8 ? from.exact : from.exact && from.nibbles;
    return held && read_integers(s.number(), s.row(row), s.k, to.q, to.scales);
}

// A row as integers and scales. The squared error that this adds goes to sums[0], the squares themselves to sums[1].
bool quantise_row(const Source &s, int64_t row, int32_t kind, int32_t group, float *x, const Groups &to, double *sums) {
    if (keep_integers(s, row, kind, group, x, to, sums)) return true;
    if (has_table(kind)) return false;
    const int64_t inputs = padded(kind, group, s.k);
    s.read(row, x);
    for (int64_t i = s.k; i < inputs; i++) x[i] = 0.0f;
    if (!packable(x, s.k, kind)) return false;
    const auto quantise = group == 32 ? quantise_groups_of_32 : quantise_groups_of_64;
    quantise(x, inputs / group, kind, to, sums);
    return true;
}

// Column n of a packed block of integers.
void place_integers(int32_t kind, int32_t group, int64_t inputs, int64_t n, const Groups &from, uint8_t *out) {
    const int8_t *q = from.q;
    const int offset = kind == MOESTRO_INT4 ? 8 : 0;
    for (int64_t g = 0; g < inputs / group; g++, out += group_bytes(kind, group), q += group) {
        memcpy(out + 2 * n, from.scales + g, 2);
        if (has_minima(kind)) memcpy(out + 64 + 2 * n, from.minima + g, 2);
        uint8_t *at = out + head_bytes(kind) + n * 4;
        if (kind == MOESTRO_INT8) {
            for (int i = 0; i < group; i += 4, at += COLUMNS * 4) memcpy(at, q + i, 4);
            continue;
        }
        for (int i = 0; i < group; i += 8, at += COLUMNS * 4)
            for (int j = 0; j < 4; j++) at[j] = uint8_t((q[i + j] + offset) | (q[i + 4 + j] + offset) << 4);
    }
}

// This thread's rows on their way.
struct Row {
    float *x;
    Groups groups;
    explicit Row(int64_t inputs) {
        x = thread_buffer().get<float>(inputs * 2);
        auto q = reinterpret_cast<int8_t *>(x + inputs);
        auto scales = reinterpret_cast<uint16_t *>(q + inputs);
        groups = {q, scales, scales + inputs / 32};
    }
};

// 32 numbers of 16 bytes, low halves before high ones, as `place_integers` would place them.
MOESTRO_INLINE void place_nibbles(const uint8_t *from, uint8_t *at) {
    const uint32_t low = 0x0f0f0f0fu;
    uint32_t q[4];
    memcpy(q, from, 16);
    const uint32_t words[4] = {(q[0] & low) | (q[1] & low) << 4, (q[2] & low) | (q[3] & low) << 4,
                               (q[0] >> 4 & low) | (q[1] & ~low), (q[2] >> 4 & low) | (q[3] & ~low)};
    for (int i = 0; i < 4; i++) memcpy(at + i * COLUMNS * 4, words + i, 4);
}

// A block of 32 whole rows whose blocks have the integers, scales and minima of the packed kind: they are moved word by
// word, in one pass. False: there is no such kind, or a scale is not the same in fp16.
bool move_block(int32_t kind, int32_t group, const Source &s, int64_t first, uint8_t *out) {
    if (!s.blocks() || group != 32 || first + COLUMNS > s.n || !is_moved(s.number(), kind)) return false;
    const int64_t bytes = block_kind(s.number()).bytes, minima = has_minima(kind) ? 2 : 0;
    for (int64_t g = 0; g < s.k / 32; g++, out += group_bytes(kind, group))
        for (int64_t n = 0; n < COLUMNS; n++) {
            const uint8_t *from = s.row(first + n) + g * bytes;
            uint16_t scale[2];
            if (!scales_of(s.number(), from, scale)) return false;
            memcpy(out + 2 * n, scale, 2);
            if (minima) memcpy(out + 64 + 2 * n, scale + 1, 2);
            uint8_t *at = out + head_bytes(kind) + n * 4;
            if (kind != MOESTRO_INT8) place_nibbles(from + bytes - 16, at);
            else
                for (int i = 0; i < 32; i += 4) memcpy(at + i * COLUMNS, from + 2 + i, 4);
        }
    return true;
}

bool pack_block(int32_t kind, int32_t group, const Source &s, int64_t block, uint8_t *out, double *sums) {
    const int64_t inputs = padded(kind, group, s.k), first = block * COLUMNS;
    if (move_block(kind, group, s, first, out)) return true;
    const Row made(inputs);
    for (int64_t n = 0; n < COLUMNS; n++) {
        const bool there = first + n < s.n;
        if (!is_float(kind)) {
            if (!there) {
                memset(made.groups.q, 0, size_t(inputs));
                std::fill_n(made.groups.scales, inputs / group, uint16_t(kind == MOESTRO_INT4 ? 0x8000 : 0));  // 0 / -8
                std::fill_n(made.groups.minima, inputs / group, uint16_t(0));
            } else if (!quantise_row(s, first + n, kind, group, made.x, made.groups, sums)) {
                return false;
            }
            place_integers(kind, group, inputs, n, made.groups, out);
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

// A group of one row, whose first four numbers are at `lines`.
MOESTRO_INLINE void unpack_group(int32_t kind, int64_t group, const uint8_t *lines, float scale, float minimum,
                                 float *out) {
    if (kind == MOESTRO_INT8) {
        for (int64_t i = 0; i < group; i += 4, lines += COLUMNS * 4)
            for (int64_t j = 0; j < 4; j++) out[i + j] = scale * float(int8_t(lines[j]));
        return;
    }
    const int8_t *table = table_of(kind);
    for (int64_t i = 0; i < group; i += 8, lines += COLUMNS * 4)
        for (int64_t j = 0; j < 4; j++) {
            out[i + j] = scale * float(table[lines[j] & 15]) + minimum;
            out[i + 4 + j] = scale * float(table[lines[j] >> 4]) + minimum;
        }
}

MOESTRO_WIDE void unpack_block(int32_t kind, int32_t group, const uint8_t *in, int64_t n, int64_t k, float *out) {
    if (is_float(kind)) {
        for (int64_t c = 0; c < n; c++)
            for (int64_t i = 0; i < k; i++)
                out[c * k + i] =
                    kind == MOESTRO_F32
                        ? reinterpret_cast<const float *>(in)[i * COLUMNS + c]
                        : from_bf16(reinterpret_cast<const uint16_t *>(in)[(i / 2 * COLUMNS + c) * 2 + i % 2]);
        return;
    }
    float made[64];
    for (int64_t i = 0; i < k; i += group, in += group_bytes(kind, group)) {
        const auto heads = reinterpret_cast<const uint16_t *>(in);
        const int64_t count = std::min<int64_t>(group, k - i);
        for (int64_t c = 0; c < n; c++) {
            const uint8_t *lines = in + head_bytes(kind) + c * 4;
            const float scale = from_half(heads[c]), minimum = has_minima(kind) ? from_half(heads[COLUMNS + c]) : 0.0f;
            unpack_group(kind, group, lines, scale, minimum, made);
            memcpy(out + c * k + i, made, size_t(count) * 4);
        }
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
    const auto pack = [&](Team &team, int) {
        int64_t from, to;
        double own[2] = {};
        while (team.take(blocks, 1, &from, &to))
            if (!pack_block(kind, group, source, from, static_cast<uint8_t *>(dst) + from * step * bytes,
                            sums ? own : nullptr))
                bad = true;
        std::lock_guard<std::mutex> guard(adding);
        if (sums) sums[0] += own[0], sums[1] += own[1];
    };
    // Callers that pack side by side do not wait for each other: while one has the team, others pack alone, and always
    // what is done sooner than a team is together.
    std::unique_lock<std::mutex> lock(one_at_a_time(), std::defer_lock);
    Team alone(1);
    if (n * k > LEAST_OF_A_TEAM && lock.try_lock()) run(blocks, pack);
    else pack(alone, 0);
    return bad ? MOESTRO_EBAD : 0;
}

int32_t moestro_unpack(int32_t kind, int32_t group, const void *src, int64_t n, int64_t k, int64_t step, float *dst) {
    if (!valid(kind, group) || plain(kind) || n < 1 || k < 1 || (step != 1 && step != 2) || !src || !dst)
        return MOESTRO_EBAD;
    const int64_t bytes = block_bytes(kind, group, k);
    for (int64_t first = 0; first < n; first += COLUMNS)
        unpack_block(kind, group, static_cast<const uint8_t *>(src) + first / COLUMNS * step * bytes,
                     std::min(COLUMNS, n - first), k, dst + first * k);
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
