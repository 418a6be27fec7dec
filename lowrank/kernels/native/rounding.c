/* Tokens to u8 codes, and int32 sums to floats, in the very float operations of lowrank/kernels/activations.py. */
#include "lowrank_native.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <string.h>
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

#define MAGIC 12582912.0f /* 1.5 · 2²³: what is added to it is rounded to a whole number in the low bits */
#define MAGIC_BITS 0x4B400000
#define TINY 0x1p-126f
#define SMALLEST_EXACT 0x1p-100f

token_extent extent_of(const float *x, int64_t count) {
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

rounding rounding_for(token_extent found, row_scale *scale) {
    const float unit = (float)(1.0 / 254.0);
    float step = found.high * unit - found.low * unit;
    step = step < TINY ? TINY : step;
    const float inverse = 1.0f / step;
    const float offset = -128.0f - rintf(found.low * inverse);
    scale->step = found.finite ? step : NAN;
    scale->more = 1.0f;
    scale->zero = found.finite ? (int32_t)offset + 128 : 128;
    /* 128 more than int8 codes: u8. Even, so that ties still go to the same side. */
    const rounding how = {inverse, offset + MAGIC + 128.0f, scale->zero};
    return how;
}

void round_token(const float *x, int64_t count, uint8_t *codes, row_scale *scale) {
    const rounding how = rounding_for(extent_of(x, count), scale);
    round_with(x, count, codes, how.inverse, how.shift);
}

void round_token_symmetric(const float *x, int64_t count, uint8_t *codes, row_scale *scale) {
    const token_extent found = extent_of(x, count);
    float step = found.largest * (float)(2.0 / 254.0);
    step = step < TINY ? TINY : step;
    scale->step = found.finite ? step : NAN;
    scale->more = 1.0f;
    scale->zero = 128;
    round_with(x, count, codes, 1.0f / step, MAGIC + 128.0f);
}

static float power_of_two(int exponent) {
    const uint32_t bits = (uint32_t)(exponent + 127) << 23;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

void split_token(const float *x, int64_t count, int pieces, uint8_t *codes, int64_t stride, row_scale *scale) {
    const token_extent found = extent_of(x, count);
    const float largest = found.largest < SMALLEST_EXACT ? SMALLEST_EXACT : found.largest;
    uint32_t bits;
    memcpy(&bits, &largest, 4);
    const int exponent = found.finite ? (int)(bits >> 23) - 126 : 0; /* largest < 2^exponent */
    const int places = 8 * pieces - 2;
    scale->step = found.finite ? power_of_two(exponent - places) : NAN;
    scale->more = 1.0f;
    scale->zero = 128;
    /* 128 at each byte makes balanced int8 digits, which carry, of the bytes; and u8 codes of the digits. */
    const __m512i carry = _mm512_set1_epi32((0x808080 & ((1 << 8 * pieces) - 1)) - MAGIC_BITS);
    const __m512 factor = _mm512_set1_ps(power_of_two(places - exponent)), magic = _mm512_set1_ps(MAGIC);
    for (int64_t k = 0; k < count; k += 16) {
        const __m512 value = _mm512_maskz_loadu_ps(first_lanes(count - k), x + k);
        const __m512 whole = _mm512_add_ps(_mm512_mul_ps(value, factor), magic);
        const __m512i number = _mm512_add_epi32(_mm512_castps_si512(whole), carry);
        for (int piece = 0; piece < pieces; piece++)
            _mm_storeu_si128((__m128i *)(codes + piece * stride + k),
                             _mm512_cvtepi32_epi8(_mm512_srli_epi32(number, (unsigned)(8 * (pieces - 1 - piece)))));
    }
}

void finish_tile(const int32_t *sums, int tokens, int pieces, const row_scale *scales, const packed_matrix *matrix,
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
#endif
