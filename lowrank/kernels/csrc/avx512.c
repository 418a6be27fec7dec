/* The loops of the layers with AVX512 and VNNI. */
#include "lowrank_native.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <string.h>
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

/* Panels are read in order; from memory or L3 the hardware's own prefetch alone leaves a third of the bandwidth. */
#define AHEAD 768

/* `rows` and `vectors` are constants where this is inlined, so the sums stay in registers. */
static inline __attribute__((always_inline)) void tile(const code_rows *codes, const int rows, const packed_matrix *matrix,
                                                       int64_t panel, const int vectors, int32_t *result) {
    const int64_t stride = panel_stride(matrix->columns), one = codes->stride;
    const int8_t *weight = matrix->panels + panel * stride;
    __m512i sums[MOST_ROWS][MOST_VECTORS];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sums[r][v] = _mm512_setzero_si512();
    for (int64_t s = 0; s < codes->runs; s++) {
        const uint8_t *base[4];
#pragma GCC unroll 4
        for (int i = 0; i < (rows + 2) / 3; i++) base[i] = codes->start + codes->offsets[s] + 3 * i * one;
        const int8_t *const end = weight + codes->run / 4 * 64;
        for (; weight < end; weight += 64) {
            __m512i right[MOST_VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                right[v] = _mm512_loadu_si512((const void *)(weight + v * stride));
                _mm_prefetch((const char *)(weight + v * stride + AHEAD), _MM_HINT_T0);
            }
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++) {
                int32_t four;
                memcpy(&four, base[r / 3] + r % 3 * one, 4);
                const __m512i left = _mm512_set1_epi32(four);
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++) sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], left, right[v]);
            }
#pragma GCC unroll 4
            for (int i = 0; i < (rows + 2) / 3; i++) base[i] += 4;
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) _mm512_storeu_si512(result + (r * vectors + v) * LANES, sums[r][v]);
}

#define CASE(rows, vectors)                                       \
    case rows * 8 + vectors:                                      \
        tile(codes, rows, matrix, panel, vectors, sums); \
        break;
#define SHORT(vectors) CASE(1, vectors) CASE(2, vectors) CASE(3, vectors) CASE(4, vectors) CASE(5, vectors) CASE(6, vectors)
#define TALL(vectors) SHORT(vectors) CASE(7, vectors) CASE(8, vectors) CASE(9, vectors) CASE(10, vectors) CASE(11, vectors) CASE(12, vectors)

static void product_tile(const code_rows *codes, int rows, const packed_matrix *matrix, int64_t panel, int vectors, int32_t *sums) {
    switch (rows * 8 + vectors) {
        TALL(1)
        TALL(2)
        SHORT(3)
        SHORT(4)
        default: break;
    }
}

static inline __mmask16 first_lanes(int64_t count) { return (__mmask16)(count >= 16 ? 0xFFFF : count <= 0 ? 0 : (1u << count) - 1u); }

static token_extent extent_of(const float *x, int64_t count) {
    __m512 high[4], low[4], odd[4];
    const __m512 zero = _mm512_setzero_ps();
    for (int i = 0; i < 4; i++) high[i] = low[i] = odd[i] = zero;
    int64_t k = 0;
    for (; k + 64 <= count; k += 64)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const __m512 value = _mm512_loadu_ps(x + k + 16 * i);
            high[i] = _mm512_max_ps(value, high[i]);
            low[i] = _mm512_min_ps(value, low[i]);
            odd[i] = _mm512_fmadd_ps(value, zero, odd[i]); /* NaN from the first NaN or Inf on */
        }
    for (; k < count; k += 16) {
        const __m512 value = _mm512_maskz_loadu_ps(first_lanes(count - k), x + k);
        high[0] = _mm512_max_ps(value, high[0]);
        low[0] = _mm512_min_ps(value, low[0]);
        odd[0] = _mm512_fmadd_ps(value, zero, odd[0]);
    }
    for (int i = 1; i < 4; i++) {
        high[0] = _mm512_max_ps(high[0], high[i]);
        low[0] = _mm512_min_ps(low[0], low[i]);
        odd[0] = _mm512_add_ps(odd[0], odd[i]);
    }
    token_extent found;
    found.high = _mm512_reduce_max_ps(high[0]);
    found.low = _mm512_reduce_min_ps(low[0]);
    found.largest = fmaxf(found.high, -found.low);
    found.finite = _mm512_cmp_ps_mask(odd[0], odd[0], _CMP_UNORD_Q) == 0;
    return found;
}

static void round_with(const float *x, int64_t count, uint8_t *codes, float inverse, float shift) {
    const __m512 factor = _mm512_set1_ps(inverse), term = _mm512_set1_ps(shift);
    for (int64_t k = 0; k < count; k += 16) {
        const __m512 value = _mm512_maskz_loadu_ps(first_lanes(count - k), x + k);
        const __m512i bits = _mm512_castps_si512(_mm512_add_ps(_mm512_mul_ps(value, factor), term));
        _mm_storeu_si128((__m128i *)(codes + k), _mm512_cvtepi32_epi8(bits));
    }
}

static void split_with(const float *x, int64_t count, int pieces, uint8_t *codes, int64_t stride, float factor, int32_t carry) {
    const __m512i added = _mm512_set1_epi32(carry);
    const __m512 factors = _mm512_set1_ps(factor), magic = _mm512_set1_ps(MAGIC);
    for (int64_t k = 0; k < count; k += 16) {
        const __m512 value = _mm512_maskz_loadu_ps(first_lanes(count - k), x + k);
        const __m512 whole = _mm512_add_ps(_mm512_mul_ps(value, factors), magic);
        const __m512i number = _mm512_add_epi32(_mm512_castps_si512(whole), added);
        for (int piece = 0; piece < pieces; piece++)
            _mm_storeu_si128((__m128i *)(codes + piece * stride + k),
                             _mm512_cvtepi32_epi8(_mm512_srli_epi32(number, (unsigned)(8 * (pieces - 1 - piece)))));
    }
}

static void finish_tile(const int32_t *sums, int tokens, int pieces, const row_scale *scales, const packed_matrix *matrix,
                 int64_t panel, int vectors, const finish *how) {
    const int64_t width = LANES * vectors, first = panel * LANES;
    const __m512 base = _mm512_set1_ps(256.0f);
    for (int v = 0; v < vectors; v++) {
        const int64_t output = first + v * LANES;
        const __mmask16 there = first_lanes(matrix->outputs - output);
        const __m512i code_sums = _mm512_loadu_si512(matrix->sums + output);
        const __m512 scale = how->scale ? _mm512_maskz_loadu_ps(there, how->scale + output) : _mm512_set1_ps(1.0f);
        const __m512 bias = how->bias ? _mm512_maskz_loadu_ps(there, how->bias + output) : _mm512_setzero_ps();
        const __m512i correction = _mm512_slli_epi32(code_sums, 7);
        for (int t = 0; t < tokens; t++) {
            const int32_t *row = sums + t * pieces * width + v * LANES;
            __m512 total;
            if (pieces == 1) {
                const __m512i taken = _mm512_mullo_epi32(code_sums, _mm512_set1_epi32(scales[t].zero));
                total = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(row), taken));
            } else {
                total = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(row), correction));
                for (int piece = 1; piece < pieces; piece++) {
                    const __m512i more = _mm512_sub_epi32(_mm512_loadu_si512(row + piece * width), correction);
                    /* The product is exact: fused or not is all one. */
                    total = _mm512_fmadd_ps(total, base, _mm512_cvtepi32_ps(more));
                }
            }
            total = _mm512_mul_ps(total, scale);
            if (how->stepped > 0) total = _mm512_mul_ps(total, _mm512_set1_ps(scales[t].step));
            if (how->stepped > 1) total = _mm512_mul_ps(total, _mm512_set1_ps(scales[t].more));
            if (how->bias) total = _mm512_add_ps(total, bias);
            _mm512_mask_storeu_ps(how->result + t * how->stride + output, there, total);
        }
    }
}

static void round_row(const float *x, int64_t plane, int64_t channels, int64_t columns, rounding how, uint8_t *codes,
                      int64_t pixel) {
    const __m512 factor = _mm512_set1_ps(how.inverse), term = _mm512_set1_ps(how.shift);
    for (int64_t column = 0; column < columns; column += 16) {
        const __mmask16 there = first_lanes(columns - column);
        const int64_t count = smaller(16, columns - column);
        for (int64_t channel = 0; channel < pixel; channel += 16) {
            __m512i fours[4]; /* of each of 16 pixels, four channels */
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                __m512i bits[4];
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    const int64_t at = channel + 4 * i + j;
                    const __m512 value = at < channels ? _mm512_maskz_loadu_ps(there, x + at * plane + column) : _mm512_setzero_ps();
                    bits[j] = _mm512_castps_si512(_mm512_add_ps(_mm512_mul_ps(value, factor), term));
                }
                fours[i] = _mm512_mask_blend_epi8(0x2222222222222222ull, bits[0], _mm512_slli_epi32(bits[1], 8));
                fours[i] = _mm512_mask_blend_epi8(0x4444444444444444ull, fours[i], _mm512_slli_epi32(bits[2], 16));
                fours[i] = _mm512_mask_blend_epi8(0x8888888888888888ull, fours[i], _mm512_slli_epi32(bits[3], 24));
            }
            const __m512i a = _mm512_unpacklo_epi32(fours[0], fours[1]), b = _mm512_unpackhi_epi32(fours[0], fours[1]);
            const __m512i c = _mm512_unpacklo_epi32(fours[2], fours[3]), d = _mm512_unpackhi_epi32(fours[2], fours[3]);
            /* Of whole[j], lane l is pixel 4l + j. */
            const __m512i whole[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c),
                                      _mm512_unpacklo_epi64(b, d), _mm512_unpackhi_epi64(b, d)};
            const __mmask16 bytes = first_lanes(pixel - channel);
            uint8_t pixels[256] __attribute__((aligned(64)));
            for (int j = 0; j < 4; j++) _mm512_store_si512(pixels + 64 * j, whole[j]);
            for (int64_t p = 0; p < count; p++)
                _mm_mask_storeu_epi8(codes + (column + p) * pixel + channel, bytes,
                                     _mm_load_si128((const __m128i *)(pixels + p % 4 * 64 + p / 4 * 16)));
        }
    }
}

static void transpose(__m512 *rows) {
    __m512 t[16], u[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
    }
#define PD(how, a, b) _mm512_castpd_ps(_mm512_unpack##how##_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)))
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        u[i] = PD(lo, t[i], t[i + 2]), u[i + 1] = PD(hi, t[i], t[i + 2]);
        u[i + 2] = PD(lo, t[i + 1], t[i + 3]), u[i + 3] = PD(hi, t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512 a = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88), b = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd);
        const __m512 c = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88), d = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
        rows[j] = _mm512_shuffle_f32x4(a, c, 0x88), rows[4 + j] = _mm512_shuffle_f32x4(b, d, 0x88);
        rows[8 + j] = _mm512_shuffle_f32x4(a, c, 0xdd), rows[12 + j] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
}

static void finish_pixels(const int32_t *sums, int64_t pixels, row_scale row, const packed_matrix *weight, const float *scales,
                          const float *bias, int64_t panel, int vectors, float *result, int64_t plane) {
    const __m512 steps = _mm512_set1_ps(row.step);
    const __mmask16 there = first_lanes(pixels);
    for (int v = 0; v < vectors; v++) {
        const int64_t output = (panel + v) * LANES, count = smaller(LANES, weight->outputs - output);
        const __mmask16 channels = first_lanes(count);
        const __m512i taken = _mm512_mullo_epi32(_mm512_loadu_si512(weight->sums + output), _mm512_set1_epi32(row.zero));
        const __m512 scale = _mm512_maskz_loadu_ps(channels, scales + output);
        const __m512 added = bias ? _mm512_maskz_loadu_ps(channels, bias + output) : _mm512_setzero_ps();
        __m512 values[16];
        for (int p = 0; p < 16; p++) {
            const __m512i sum = _mm512_loadu_si512(sums + (p * vectors + v) * LANES);
            values[p] = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum, taken)), scale), steps);
            if (bias) values[p] = _mm512_add_ps(values[p], added);
        }
        transpose(values);
        for (int64_t c = 0; c < count; c++) _mm512_mask_storeu_ps(result + (output + c) * plane, there, values[c]);
    }
}

const instructions avx512 = {product_tile, extent_of, round_with, split_with, finish_tile, round_row, finish_pixels};
#endif
