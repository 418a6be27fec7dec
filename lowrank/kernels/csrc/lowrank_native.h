/* Integer layers in C: rounding of activations, u8 × s8 products, and the way back to floats, with AVX512-VNNI or with AVX2;
   and the plain integer product (narrow.c) for what these layers leave to torch on machines without VNNI.

   Every float operation here is one that the torch route does too, in the same order and without fused multiply-adds
   (the file is compiled with -ffp-contract=off), so both routes give the same bits. Loaded with ctypes; nothing of
   Python is needed to build it. */
#ifndef LOWRANK_NATIVE_H
#define LOWRANK_NATIVE_H

#include <stddef.h>
#include <stdint.h>

#define LANES 16       /* outputs of a panel: the int32 lanes of a 512-bit register */
#define MOST_ROWS 12   /* rows of the tallest register tile */
#define MOST_VECTORS 4 /* panels of the widest register tile */
#define PIXELS 16      /* of an output row at a time: what one transpose turns from channels last to channels first */
#define PARALLEL_WORK (1 << 19) /* products below which a second thread costs more than it brings */

/* A weight of int8 codes (outputs, columns), packed: panels of 16 outputs, in them 4 columns of each output side by
   side, as vpdpbusd wants them. `sums` are those of each output's codes. Both are filled up with zeros. */
typedef struct {
    int64_t outputs;
    int64_t columns;      /* after filling up: of `runs` pieces of `run` columns, each a multiple of 4 */
    const int8_t *panels;
    const int32_t *sums;
} packed_matrix;

/* Bytes from one panel to the next. An odd number of cache lines, so that panels do not fall into the same cache sets. */
static inline int64_t panel_stride(int64_t columns) { return 16 * columns + ((columns / 4) % 2 ? 0 : 64); }
static inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
/* Where the part of a thread begins. */
static inline int64_t share(int64_t count, int64_t part, int64_t parts) { return count * part / parts; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Where the rows of u8 codes of a product lie: row r, columns k of run s at `start + r * stride + offsets[s] + k`. */
typedef struct {
    const uint8_t *start;
    int64_t stride;
    const int64_t *offsets;
    int64_t runs;
    int64_t run;
} code_rows;

/* What a row of codes stands for: a token is (codes − zero) · step, or a fixed-point number of several rows. */
typedef struct {
    float step;
    float more; /* a second factor, multiplied after the step */
    int32_t zero;
} row_scale;

/* What a token's rounding depends on, and the rounding: code = low byte of x · inverse + shift. */
typedef struct {
    float high, low, largest; /* max(x, 0), min(x, 0), max |x| */
    int finite;
} token_extent;
typedef struct {
    float inverse, shift;
    int zero;
} rounding;
rounding rounding_for(token_extent extent, row_scale *scale);
static inline token_extent joined(token_extent a, token_extent b) {
    const token_extent both = {a.high > b.high ? a.high : b.high, a.low < b.low ? a.low : b.low,
                               a.largest > b.largest ? a.largest : b.largest, a.finite && b.finite};
    return both;
}

/* Sums of `tokens` times `pieces` rows to floats: ·scale[j] ·step ·more + bias[j], each where it is there. */
typedef struct {
    const float *scale; /* of the outputs, or NULL */
    const float *bias;  /* of the outputs, or NULL */
    int stepped;        /* how many of a row's step and more to multiply by */
    float *result;
    int64_t stride;
} finish;

#define MAGIC 12582912.0f /* 1.5 · 2²³: what is added to it is rounded to a whole number in the low bits */
#define MAGIC_BITS 0x4B400000

/* What is written anew for each set of instructions (avx512.c, avx2.c); all else is plain C. */
typedef struct {
    /* Exact integer products of `rows` rows with `vectors` panels from `panel` on, as (rows, 16 * vectors) int32; at most
       MOST_ROWS rows of two panels, or half as many of MOST_VECTORS. Codes may be read to a multiple of 16 past a run. */
    void (*product_tile)(const code_rows *codes, int rows, const packed_matrix *matrix, int64_t panel, int vectors, int32_t *sums);
    token_extent (*extent_of)(const float *x, int64_t count);
    /* Codes are filled up with anything to a multiple of 16. */
    void (*round_with)(const float *x, int64_t count, uint8_t *codes, float inverse, float shift);
    /* The low `pieces` bytes of x · factor + MAGIC + carry, the highest first, `stride` apart. */
    void (*split_with)(const float *x, int64_t count, int pieces, uint8_t *codes, int64_t stride, float factor, int32_t carry);
    void (*finish_tile)(const int32_t *sums, int tokens, int pieces, const row_scale *scales, const packed_matrix *matrix,
                        int64_t panel, int vectors, const finish *how);
    /* One row of an image, channels first and `plane` apart, to codes with channels last, `pixel` bytes (a multiple of 4) each. */
    void (*round_row)(const float *x, int64_t plane, int64_t channels, int64_t columns, rounding how, uint8_t *codes, int64_t pixel);
    /* Sums of at most PIXELS pixels to floats, into the planes of the output channels. */
    void (*finish_pixels)(const int32_t *sums, int64_t pixels, row_scale scale, const packed_matrix *weight, const float *scales,
                          const float *bias, int64_t panel, int vectors, float *result, int64_t plane);
} instructions;
extern const instructions avx512, avx2;
static inline const instructions *instructions_of(int64_t level) { return level > 1 ? &avx512 : &avx2; }

/* `count` floats of one token to u8 codes. */
void round_token(const instructions *use, const float *x, int64_t count, uint8_t *codes, row_scale *scale);
void round_token_symmetric(const instructions *use, const float *x, int64_t count, uint8_t *codes, row_scale *scale);
void split_token(const instructions *use, const float *x, int64_t count, int pieces, uint8_t *codes, int64_t stride, row_scale *scale);

#endif
