// Attention of several consecutive tokens of one sequence to its past and to each other.
#pragma once
#include "rows.h"

namespace moestro {

// Queries [rows · heads, width], token by token, of the heads that share keys and values. Positions lie `stride`
// numbers apart; token r sees from `oldest`, or the last `window` of them, to last + r, its own.
struct Queries {
    const float *data;
    int64_t rows, heads, width, value_width;
    int64_t oldest, last, window;  // window 0: all
    float scale;
    const float *sinks;  // [heads], or null

    int64_t count() const { return rows * heads; }
    int64_t end(int64_t query) const { return last + query / heads + 1; }
    int64_t begin(int64_t query) const {
        const int64_t first = window ? end(query) - window : oldest;
        return first > oldest ? first : oldest;
    }
};

// Keys and values of a group of heads, of a dtype MOESTRO_ROWS_…; of INT8 with a scale for each position.
struct Past {
    const void *keys, *values;
    int64_t keys_stride, values_stride;
    int32_t dtype;
    const float *key_scales, *value_scales;

    const void *key(int64_t position) const { return at(keys, position * keys_stride); }
    const void *value(int64_t position) const { return at(values, position * values_stride); }

private:
    const void *at(const void *data, int64_t numbers) const {
        return static_cast<const char *>(data) + numbers * cache_bytes(dtype);
    }
};

// Memory of one thread.
struct AttentionMemory {
    Buffer scores, columns, queries;
};

// out [rows · heads, value_width]. What a query gets depends on no other query.
void attend(const Queries &q, const Past &past, float *out, AttentionMemory &memory);

}  // namespace moestro
