/* The C interface of moestro's native CPU kernels: packed matrices, linear maps, whole experts, and their
 * training.
 *
 * Letters: N outputs and K inputs of a matrix, M rows, T tokens, D width, F hidden width, E
 * experts, A assignments (token, expert, weight), Q group length.
 *
 * Every path (AMX, AVX-512, AVX2, portable) gives the same bits (training has AMX alone), whatever the number of rows,
 * the other rows and the number of threads: sums run in one fixed order. One exception: products of bf16 numbers
 * below 1.2e-38, where fp32 loses precision, are zero to AMX, and AVX-512 and AVX2 round bf16 products there once less.
 *
 * Functions return 0, or a negative MOESTRO_E... code; what is written then is of no use. Any number
 * of threads may call; they take turns. A child made by fork computes on one thread until it asks
 * for more.
 */
#ifndef MOESTRO_H
#define MOESTRO_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MOESTRO_ABI 12
#define MOESTRO_API __attribute__((visibility("default")))

/* Kinds of weights: packed, or plain numbers as they are. Plain rows one after another (of experts: output step K,
 * input step 1) have K times their size a multiple of 4; with other steps K is any. UINT4 has a minimum beside each
 * scale; the four bits of MXFP4, IQ4_NL and NF4 are places in a table of 16 integers. */
enum {
    MOESTRO_BF16 = 0,
    MOESTRO_INT8 = 1,
    MOESTRO_INT4 = 2,
    MOESTRO_F32 = 3,
    MOESTRO_UINT4 = 4,
    MOESTRO_MXFP4 = 5,
    MOESTRO_IQ4_NL = 6,
    MOESTRO_NF4 = 7,
    MOESTRO_PLAIN_BF16 = 8,
    MOESTRO_PLAIN_F32 = 9
};
/* Dtypes of rows: numbers, or blocks of a GGUF file (MOESTRO_ROWS_BLOCKS + ggml's number of their kind), which are
 * only packed and read. Blocks of NF4, which ggml lacks, are as those of IQ4_NL. INT8, of a cache alone: bytes in
 * [-127, 127], with an fp32 scale for each row of them. */
enum {
    MOESTRO_ROWS_F32 = 0,
    MOESTRO_ROWS_BF16 = 1,
    MOESTRO_ROWS_INT8 = 2,
    MOESTRO_ROWS_BLOCKS = 256,
    MOESTRO_ROWS_NF4 = 768
};
enum { MOESTRO_PORTABLE = 0, MOESTRO_AVX2 = 1, MOESTRO_AVX2_VNNI = 2, MOESTRO_AVX512 = 3, MOESTRO_AMX = 4 }; /* paths */
/* Activations, those with gates first. */
enum {
    MOESTRO_SWIGLU = 0,
    MOESTRO_GEGLU = 1,
    MOESTRO_CLAMPED = 2,
    MOESTRO_GEGLU_TANH = 3,
    MOESTRO_LIMITED = 4,
    MOESTRO_CAPPED = 5,
    MOESTRO_RELU = 6,
    MOESTRO_GELU = 7,
    MOESTRO_RELU2 = 8
};
enum { MOESTRO_EBAD = -1, MOESTRO_EMEMORY = -2, MOESTRO_EPATH = -3, MOESTRO_EREAD = -4 };

/* A packed matrix: blocks of 32 output columns, each one stream of K inputs. */
typedef struct {
    const void *data;
    int64_t n, k;  /* outputs, inputs (before padding) */
    int32_t kind;  /* MOESTRO_BF16 … */
    int32_t group; /* Q: 32, or 64 where there is no table; ignored for fp32 and bf16 */
} moestro_matrix;

/* Experts that are read from a file as they are wanted; see moestro_residency_open. */
typedef struct moestro_residency moestro_residency;

/* Where the numbers of plain experts lie: numbers from expert to expert, output to output, input to input. None is
 * below 0, and the last two are both 0 only for matrices of one number. */
typedef struct {
    int64_t expert, output, input;
} moestro_steps;

/* Stacked experts: slab e holds gate_up (gate and up blocks alternating), then down, of a kind of its own. */
typedef struct {
    const void *data;   /* null: read from a file */
    const void *up;     /* plain: what the gates [E, F, D] in data multiply; else, or without gates, null */
    const void *down;   /* plain: the down projections [E, D, F]; else null */
    int64_t slab_bytes; /* distance between packed experts */
    int64_t experts, dim, hidden;
    int32_t kind, group, activation, down_kind;
    int32_t mixture;        /* data null: which of the file's */
    const float *up_bias;   /* [E, 2F] or [E, F]; null: none */
    const float *down_bias; /* [E, D]; null: none */
    moestro_residency *residency;
    moestro_steps up_steps, down_steps; /* plain: of data and up, and of down */
} moestro_experts;

MOESTRO_API int32_t moestro_abi(void);
/* The best path that this machine can run, and the one in use. */
MOESTRO_API int32_t moestro_best_path(void);
MOESTRO_API int32_t moestro_path(void);
MOESTRO_API int32_t moestro_use_path(int32_t path);
/* Threads to compute with. With `team`, another runtime's threads (the address of its
 * GOMP_parallel) are used instead of own ones, so that two pools never compete. */
MOESTRO_API int32_t moestro_threads(void);
MOESTRO_API int32_t moestro_use_threads(int32_t threads, void *team);

/* Pack rows [n, k] (fp32, bf16 or blocks) at dst. `step` 2 leaves every other block free for a second matrix (gate
 * and up). Input that is not finite is refused (EBAD), and so are sizes above 65504 for int8, int4 and uint4. In groups
 * of 32, blocks of integers with one fp16 scale for 32 become int8 as they are, Q4_0 int4, and those of four bits with
 * minima uint4; MXFP4, IQ4_NL and NF4 are packed from their own blocks alone. To sums (or null) are added the squared
 * error of what is rounded here, and the sum of its squares. */
MOESTRO_API int32_t moestro_pack(int32_t kind, int32_t group, int32_t dtype, const void *src, int64_t n, int64_t k,
                                 void *dst, int64_t step, double *sums);
/* Rows [n, k] of any dtype as fp32. */
MOESTRO_API int32_t moestro_read_rows(int32_t dtype, const void *src, int64_t n, int64_t k, float *dst);
/* The fp32 matrix [n, k] that the packed one stands for. */
MOESTRO_API int32_t moestro_unpack(int32_t kind, int32_t group, const void *src, int64_t n, int64_t k, int64_t step,
                                   float *dst);

/* y [m, n] = x [m, k] · wᵀ + bias. x and y have the same dtype; bias fp32 or null. */
MOESTRO_API int32_t moestro_linear(const moestro_matrix *w, int32_t dtype, const void *x, int64_t m, void *y,
                                   const float *bias);

/* The packed experts of one mixture in a file, on whole pages: at most `slots` of them are in memory. */
typedef struct {
    int64_t offset, slab_bytes, experts, slots;
} moestro_slabs;
/* Experts wanted that were there or not, bytes read, nanoseconds that computing stood still for them; and of the last
 * read that failed the errno or MOESTRO_READ_… and its place in the file. */
enum { MOESTRO_READ_ENDS = -1, MOESTRO_READ_CHANGED = -2 };
typedef struct {
    int64_t hits, misses, bytes, waited_ns, place;
    int32_t error, reserved;
} moestro_reads;
/* Read the experts of `count` mixtures from a file in `readers` threads, directly if it was opened with O_DIRECT and
 * its file system can. The file must stay open. A call that computes with them returns EREAD where one cannot be read;
 * the next may try again. Close it when nothing computes with it. */
MOESTRO_API int32_t moestro_residency_open(int32_t fd, const moestro_slabs *mixtures, int64_t count, int32_t readers,
                                           moestro_residency **residency);
MOESTRO_API int32_t moestro_residency_close(moestro_residency *residency);
MOESTRO_API int32_t moestro_residency_counts(moestro_residency *residency, moestro_reads *counts);

/* y [t, dim] = Σ over a token's assignments, in their order, of weight · expert(x[token]).
 * tokens must not fall; experts are in [0, E). A token without an assignment gets zero. */
MOESTRO_API int32_t moestro_mixture(const moestro_experts *w, int32_t dtype, const void *x, int64_t t,
                                    const int64_t *tokens, const int64_t *experts, const float *weights,
                                    int64_t assignments, void *y);

/* Multi-head latent attention: R the latent width, N and A' a head's widths without and with positions, O of its
 * values. What is kept of a position, as its key and its value, are R + A' numbers, of one group. */
typedef struct {
    int64_t q_rank, kv_rank, nope, value; /* width of the queries' vector, or 0; R, N, O */
    moestro_matrix q_down, q;             /* [q_rank, D], not read where that is 0; [H·(N + A'), q_rank or D] */
    moestro_matrix kv_down;               /* [R + A', D] */
    const float *q_norm, *kv_norm;        /* [q_rank], [R] */
    const void *kv_up;                    /* plain rows [H·(N + O), R] */
    int32_t kv_up_dtype;                  /* MOESTRO_ROWS_… */
    float eps;                            /* of both norms */
} moestro_latent;

/* A gated DeltaNet: G key heads, H value heads, A and O widths of a key and a value, W of the convolution of I = 2·G·A
 * + H·O channels. A sequence keeps in place of keys its last W - 1 inputs [W - 1, I], in place of values the state
 * [H, A, O], fp32; both are read and then written. Its room in positions is what the sequence may grow to. */
typedef struct {
    int64_t key_heads, value_heads, key_dim, value_dim, conv_width;
    moestro_matrix qkvz;           /* [I + H·O, D]: queries, keys, values, gates of the outputs */
    const float *ba;               /* [2H, D], of β and of the decay */
    const float *conv;             /* [W, I] */
    const float *rate, *time_bias; /* [H] */
    const float *gain;             /* [O], of the norm */
    float length_eps, eps;         /* added to squared lengths of queries and keys; of the norm */
} moestro_delta;

/* One layer of a decoder. Pointers to fp32 may be null where the layer has no such part. */
typedef struct {
    const float *attention_norm, *ffn_norm;           /* [D] gains */
    const float *attention_norm_bias, *ffn_norm_bias; /* [D]: layer norms; null: RMSNorms */
    moestro_matrix qkv, out;                          /* [(H + 2G)·A, D], gated: [(2H + 2G)·A, D]; [D, H·A] */
    const float *qkv_bias, *out_bias;
    const float *q_norm, *k_norm;             /* [A], of each head; norm_all: [H·A], [G·A] */
    const float *sinks;                       /* [H] */
    int64_t window;                           /* positions seen, itself included; 0: all */
    const float *router;                      /* [E, D]; null: a dense layer, experts.experts is 1 */
    const float *logit_bias, *selection_bias; /* [E] */
    const moestro_latent *latent;             /* at most one of both; null: grouped-query attention by qkv */
    const moestro_delta *delta;
    moestro_experts experts;
    moestro_experts shared;   /* data null: none */
    const float *shared_gate; /* [D] */
} moestro_layer;

/* A decoder: grouped-query or latent attention with rotary positions, RMSNorm, softmax, sigmoid or sparsemixer
 * router. */
typedef struct {
    int64_t layers, dim, heads, groups, head_dim, vocab;
    int64_t turning;                                  /* A', the first numbers of a head, which turn */
    int32_t top_k, sigmoid, renormalize, cache_dtype; /* MOESTRO_ROWS_… */
    int32_t norm_all;                                 /* queries, and keys, have one norm over all heads */
    int32_t norm_rotated;                             /* each head's norm comes after its rotation */
    int32_t gated; /* behind each head's query stand its gates: its output is multiplied by their sigmoids */
    /* Experts are chosen in the best `top_groups` of `expert_groups` (1: no groups), of which each counts as much as
     * its best `group_best` experts. */
    int32_t expert_groups, top_groups, group_best;
    /* Above 0: each choice's weight is its share of a softmax over the rivals left, whose logits are no further below
     * than this times the larger of it and their size (sparsemixer). */
    float rivals;
    float router_scale, eps, score_scale, head_scale;
    const moestro_layer *layer;
    const float *norm, *norm_bias; /* as a layer's */
    moestro_matrix head;
    const float *head_bias;
} moestro_decoder;

/* The past of one sequence: for each layer keys and values [G, room, A], consecutive positions side
 * by side: `kept` of them before `place`, where the first of `rows` new ones is written. A cache of INT8 has scales
 * [G, room] beside both. Logits are wanted after the last `told` of these, at least one. */
typedef struct {
    void *const *keys;
    void *const *values;
    float *const *key_scales;
    float *const *value_scales;
    const int64_t *room, *place, *kept;
    int64_t rows, told;
} moestro_past;

/* New tokens of b sequences, T = all their rows, sequence by sequence. x [T, D] fp32 are their
 * embeddings; cosines and sines [T, A'/2]; logits [N, V], N = all their `told`, sequence by
 * sequence, and the routing, experts and weights [layers, T, K], are written. With the same
 * angles a token gets the same bits however its sequence is cut, and whatever runs beside it. */
MOESTRO_API int32_t moestro_step(const moestro_decoder *d, int64_t b, const float *x, const float *cosines,
                                 const float *sines, const moestro_past *past, float *logits, int64_t *experts,
                                 float *weights);

/* Rows grouped by expert: group g ends before row ends[g], and is experts[g]'s, each expert once
 * (null: group g is expert g's). Rows past the last end are neither read nor written. */
typedef struct {
    const int64_t *ends, *experts;
    int64_t count; /* E: of experts, and of groups */
    int64_t rows;  /* R */
} moestro_groups;

/* Training: products of bf16 rows, sums in fp32, by AMX tiles or AVX-512. Weights and their gradients are bf16 or fp32
 * (`dtype`, MOESTRO_ROWS_…); fp32 weights are rounded to bf16. Widths are multiples of 32. What
 * belongs to one row depends on no other row, and nothing depends on the threads. EPATH where
 * moestro_trains() is 0: another path is in use, or the processor cannot. */
MOESTRO_API int32_t moestro_trains(void);
/* y [R, o] = x [R, i] · wᵀ, w [E, o, i]; with `back` y [R, i] = x [R, o] · w. */
MOESTRO_API int32_t moestro_grouped(const moestro_groups *g, int32_t dtype, const void *w, int64_t o, int64_t i,
                                    int32_t back, const void *x, void *y);
/* dw [E, o, i] = dyᵀ · x over each expert's rows, zero where it has none; dy [R, o], x [R, i]. */
MOESTRO_API int32_t moestro_grouped_grad(const moestro_groups *g, int32_t dtype, int64_t o, int64_t i, const void *dy,
                                         const void *x, void *dw);
/* Whole SwiGLU experts, up [E, 2f, d] (gate first) and down [E, d, f]. Forward: y [R, d] of x [R, d], and what
 * the backward wants, hidden [R, 2f], unless null. Backward: from dy [R, d] the gradient of hidden
 * [R, 2f] and the activated rows [R, f], which the weights' gradients want, and dx [R, d]. */
MOESTRO_API int32_t moestro_ffn(const moestro_groups *g, int32_t dtype, const void *up, const void *down, int64_t d,
                                int64_t f, const void *x, void *hidden, void *y);
MOESTRO_API int32_t moestro_ffn_back(const moestro_groups *g, int32_t dtype, const void *up, const void *down,
                                     int64_t d, int64_t f, const void *dy, const void *hidden, void *dhidden, void *act,
                                     void *dx);

/* Read `bytes` at `data` once with all threads; returns a sum so that nothing is optimised away. */
MOESTRO_API uint64_t moestro_read(const void *data, int64_t bytes);

#ifdef __cplusplus
}
#endif
#endif
