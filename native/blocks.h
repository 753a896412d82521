// Rows as GGUF files hold them: blocks of integers with scales, by ggml's numbers of kinds.
#pragma once
#include <cstdint>

// Loops that the compiler spreads over as wide registers as there are; all widths give the same bits, since nothing
// is fused or summed in another order.
#define MOESTRO_WIDE __attribute__((target_clones("avx2", "default")))
#define MOESTRO_INLINE static inline __attribute__((always_inline))

namespace moestro {

// fp16 → fp32, exact.
float from_half(uint16_t half);
// fp32 → fp16, nearest even, at most its largest number.
uint16_t to_half(float x);

// A kind of blocks; length 0: not known here.
struct BlockKind {
    int32_t length, bytes;
    bool exact;         // every 32 numbers are integers of eight bits times an fp16 scale
    bool nibbles;       // they are 0 to 15, less 8 or with a minimum; the scale and minimum of 32 may need rounding
    int32_t table = 0;  // the packed kind whose table its nibbles are places in; 0: none
};
BlockKind block_kind(int32_t number);

// The fp32 numbers of a row of `k`, a multiple of the kind's length.
void read_blocks(int32_t number, const uint8_t *row, int64_t k, float *out);

// The same as integers and a scale for each 32, where the kind is exact; false: a scale is not a finite fp16.
bool read_integers(int32_t number, const uint8_t *row, int64_t k, int8_t *q, uint16_t *scales);

// The same as integers 0 to 15, a scale and a minimum for each 32, where the kind is of nibbles; false: they are
// beyond fp16.
bool read_nibbles(int32_t number, const uint8_t *row, int64_t k, int8_t *q, uint16_t *scales, uint16_t *minima);

// The same as places in the kind's table, where it has one, and a scale for each 32: exact, but for powers of MXFP4
// below 2^-24, which set `rounded`; false: a scale is beyond fp16.
bool read_places(int32_t number, const uint8_t *row, int64_t k, int8_t *q, uint16_t *scales, bool *rounded);

// Whether every 32 numbers of a kind have the packed kind's own integers, scale and minimum, nibbles in the last 16
// bytes of the block.
bool is_moved(int32_t number, int32_t packed);

// Scale and minimum of such a block as fp16; false: they are beyond it, or would be rounded.
bool scales_of(int32_t number, const uint8_t *block, uint16_t *scale_and_minimum);

}  // namespace moestro
