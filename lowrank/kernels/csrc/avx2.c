/* The loops of the layers with AVX2: codes are widened to int16, whose products vpmaddwd adds in pairs to int32, so that
   nothing saturates. */
#include "lowrank_native.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <string.h>
#pragma GCC target("avx2")

#define HIGH 6     /* rows at a time: with half a panel's sums of each, all 16 registers are spoken for */
#define BLOCK 1024 /* columns at a time: the widened rows and a panel stay in the first-level cache */
/* Panels are read in order; the hardware's own prefetch stops at the end of a page; 768 bytes ahead, layers took 1.3 to 2 times as long. */
#define AHEAD 4096

/* Which of 8 lanes are within `count`. */
static inline __m256i first_lanes(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int32_t)smaller(count, 8)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

static inline __m256i widened(const int8_t *codes) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)codes)); }

/* Of one panel and `columns` columns of widened rows, on top of the sums that are there. A register of sums holds four
   outputs, two sums each; they are joined when they are stored. `rows` is a constant where this is inlined. */
static inline __attribute__((always_inline)) void panel_tile(const int16_t *codes, const int rows, const int8_t *weight,
                                                             int64_t columns, int32_t *result, int64_t width, int first) {
    const int parts = rows > 2 ? 2 : 4, halves = 4 / parts; /* quarters of a panel at a time */
    for (int half = 0; half < halves; half++) {
        __m256i sums[HIGH][4];
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int q = 0; q < parts; q++) sums[r][q] = _mm256_setzero_si256();
        const int8_t *from = weight + half * 32;
        for (int64_t k = 0; k < columns; k += 4, from += 64) {
            __m256i right[4];
            _mm_prefetch((const char *)(from + AHEAD), _MM_HINT_T0);
            if (rows > 2) {
                right[0] = widened(from), right[1] = widened(from + 16);
#pragma GCC unroll 6
                for (int r = 0; r < rows; r++) {
                    int64_t four;
                    memcpy(&four, codes + r * BLOCK + k, 8);
                    const __m256i left = _mm256_set1_epi64x(four);
                    sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(left, right[0]));
                    sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(left, right[1]));
                    /* Without this line the compiler loads all rows first, and has no registers left for the sums. */
                    __asm__ volatile("" : "+x"(sums[r][0]), "+x"(sums[r][1]));
                }
            } else {
                __m256i left[2];
#pragma GCC unroll 2
                for (int r = 0; r < rows; r++) {
                    int64_t four;
                    memcpy(&four, codes + r * BLOCK + k, 8);
                    left[r] = _mm256_set1_epi64x(four);
                }
#pragma GCC unroll 4
                for (int q = 0; q < 4; q++) {
                    const __m256i one = widened(from + 16 * q);
#pragma GCC unroll 2
                    for (int r = 0; r < rows; r++) sums[r][q] = _mm256_add_epi32(sums[r][q], _mm256_madd_epi16(left[r], one));
                }
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int q = 0; q < parts; q += 2) {
                __m256i *const to = (__m256i *)(result + r * width + half * 8 + q * 4);
                /* Pairs of lanes, in the order 0 1 4 5 2 3 6 7 of the outputs. */
                __m256i joint = _mm256_permute4x64_epi64(_mm256_hadd_epi32(sums[r][q], sums[r][q + 1]), 0xD8);
                if (!first) joint = _mm256_add_epi32(joint, _mm256_loadu_si256(to));
                _mm256_storeu_si256(to, joint);
            }
    }
}

#define CASE(rows)                                                                  \
    case rows:                                                                      \
        panel_tile(codes, rows, weight, columns, result, width, first);             \
        break;

static void few_rows(const int16_t *codes, int rows, const int8_t *weight, int64_t columns, int32_t *result, int64_t width, int first) {
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
        default: break;
    }
}

/* Columns from `column` on of one row, run after run, as int16. Reads and writes to a multiple of 16 past what is asked. */
static void widen(const code_rows *codes, int64_t row, int64_t column, int64_t columns, int16_t *to) {
    const uint8_t *const start = codes->start + row * codes->stride;
    int64_t run = column / codes->run, at = column % codes->run;
    while (columns > 0) {
        const uint8_t *from = start + codes->offsets[run] + at;
        const int64_t count = smaller(codes->run - at, columns);
        for (int64_t k = 0; k < count; k += 16)
            _mm256_storeu_si256((__m256i *)(to + k), _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(from + k))));
        to += count, columns -= count, run++, at = 0;
    }
}

static void product_tile(const code_rows *codes, int rows, const packed_matrix *matrix, int64_t panel, int vectors, int32_t *sums) {
    int16_t wide[HIGH * BLOCK + 16] __attribute__((aligned(64)));
    const int64_t stride = panel_stride(matrix->columns), width = vectors * LANES, all = codes->runs * codes->run;
    for (int row = 0; row < rows; row += HIGH) {
        const int count = rows - row < HIGH ? rows - row : HIGH;
        for (int64_t column = 0; column < all; column += BLOCK) {
            const int64_t columns = smaller(BLOCK, all - column);
            for (int r = 0; r < count; r++) widen(codes, row + r, column, columns, wide + r * BLOCK);
            for (int v = 0; v < vectors; v++)
                few_rows(wide, count, matrix->panels + (panel + v) * stride + column * LANES, columns,
                         sums + row * width + v * LANES, width, column == 0);
        }
    }
}

static inline float largest_of(__m256 value) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}

static token_extent extent_of(const float *x, int64_t count) {
    __m256 high[4], low[4], odd[4];
    const __m256 zero = _mm256_setzero_ps();
    for (int i = 0; i < 4; i++) high[i] = low[i] = odd[i] = zero;
    int64_t k = 0;
    for (; k + 32 <= count; k += 32)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const __m256 value = _mm256_loadu_ps(x + k + 8 * i);
            high[i] = _mm256_max_ps(value, high[i]);
            low[i] = _mm256_min_ps(value, low[i]);
            odd[i] = _mm256_add_ps(odd[i], _mm256_mul_ps(value, zero)); /* NaN from the first NaN or Inf on */
        }
    for (; k < count; k += 8) {
        const __m256 value = _mm256_maskload_ps(x + k, first_lanes(count - k));
        high[0] = _mm256_max_ps(value, high[0]);
        low[0] = _mm256_min_ps(value, low[0]);
        odd[0] = _mm256_add_ps(odd[0], _mm256_mul_ps(value, zero));
    }
    for (int i = 1; i < 4; i++) {
        high[0] = _mm256_max_ps(high[0], high[i]);
        low[0] = _mm256_min_ps(low[0], low[i]);
        odd[0] = _mm256_add_ps(odd[0], odd[i]);
    }
    token_extent found;
    found.high = largest_of(high[0]);
    found.low = -largest_of(_mm256_sub_ps(zero, low[0]));
    found.largest = fmaxf(found.high, -found.low);
    found.finite = _mm256_movemask_ps(_mm256_cmp_ps(odd[0], odd[0], _CMP_UNORD_Q)) == 0;
    return found;
}

/* The low bytes of 16 numbers. */
static inline __m128i low_bytes(__m256i a, __m256i b) {
    const __m256i mask = _mm256_set1_epi32(0xFF);
    const __m256i shorts = _mm256_packus_epi32(_mm256_and_si256(a, mask), _mm256_and_si256(b, mask));
    const __m256i in_order = _mm256_permute4x64_epi64(shorts, 0xD8);
    return _mm_packus_epi16(_mm256_castsi256_si128(in_order), _mm256_extracti128_si256(in_order, 1));
}

static inline __m256 loaded(const float *x, int64_t count) {
    return count >= 8 ? _mm256_loadu_ps(x) : count > 0 ? _mm256_maskload_ps(x, first_lanes(count)) : _mm256_setzero_ps();
}

static inline __m256i rounded(__m256 value, __m256 factor, __m256 term) {
    return _mm256_castps_si256(_mm256_add_ps(_mm256_mul_ps(value, factor), term));
}

static void round_with(const float *x, int64_t count, uint8_t *codes, float inverse, float shift) {
    const __m256 factor = _mm256_set1_ps(inverse), term = _mm256_set1_ps(shift);
    for (int64_t k = 0; k < count; k += 16) {
        const __m256i a = rounded(loaded(x + k, count - k), factor, term), b = rounded(loaded(x + k + 8, count - k - 8), factor, term);
        _mm_storeu_si128((__m128i *)(codes + k), low_bytes(a, b));
    }
}

static void split_with(const float *x, int64_t count, int pieces, uint8_t *codes, int64_t stride, float factor, int32_t carry) {
    const __m256i added = _mm256_set1_epi32(carry);
    const __m256 factors = _mm256_set1_ps(factor), magic = _mm256_set1_ps(MAGIC);
    for (int64_t k = 0; k < count; k += 16) {
        const __m256i a = _mm256_add_epi32(rounded(loaded(x + k, count - k), factors, magic), added);
        const __m256i b = _mm256_add_epi32(rounded(loaded(x + k + 8, count - k - 8), factors, magic), added);
        for (int piece = 0; piece < pieces; piece++) {
            const __m128i down = _mm_cvtsi32_si128(8 * (pieces - 1 - piece));
            _mm_storeu_si128((__m128i *)(codes + piece * stride + k), low_bytes(_mm256_srl_epi32(a, down), _mm256_srl_epi32(b, down)));
        }
    }
}

static void finish_tile(const int32_t *sums, int tokens, int pieces, const row_scale *scales, const packed_matrix *matrix,
                        int64_t panel, int vectors, const finish *how) {
    const int64_t width = LANES * vectors, first = panel * LANES;
    const __m256 base = _mm256_set1_ps(256.0f);
    for (int64_t lane = 0; lane < width && first + lane < matrix->outputs; lane += 8) {
        const int64_t output = first + lane, left = matrix->outputs - output;
        const __m256i there = first_lanes(left);
        const __m256i code_sums = _mm256_loadu_si256((const __m256i *)(matrix->sums + output));
        const __m256 scale = how->scale ? loaded(how->scale + output, left) : _mm256_set1_ps(1.0f);
        const __m256 bias = how->bias ? loaded(how->bias + output, left) : _mm256_setzero_ps();
        const __m256i correction = _mm256_slli_epi32(code_sums, 7);
        for (int t = 0; t < tokens; t++) {
            const int32_t *row = sums + t * pieces * width + lane;
            const __m256i taken = pieces == 1 ? _mm256_mullo_epi32(code_sums, _mm256_set1_epi32(scales[t].zero)) : correction;
            __m256 total = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_loadu_si256((const __m256i *)row), taken));
            for (int piece = 1; piece < pieces; piece++) {
                const __m256i more = _mm256_sub_epi32(_mm256_loadu_si256((const __m256i *)(row + piece * width)), correction);
                total = _mm256_add_ps(_mm256_mul_ps(total, base), _mm256_cvtepi32_ps(more));
            }
            total = _mm256_mul_ps(total, scale);
            if (how->stepped > 0) total = _mm256_mul_ps(total, _mm256_set1_ps(scales[t].step));
            if (how->stepped > 1) total = _mm256_mul_ps(total, _mm256_set1_ps(scales[t].more));
            if (how->bias) total = _mm256_add_ps(total, bias);
            float *const to = how->result + t * how->stride + output;
            if (left >= 8)
                _mm256_storeu_ps(to, total);
            else
                _mm256_maskstore_ps(to, there, total);
        }
    }
}

static void round_row(const float *x, int64_t plane, int64_t channels, int64_t columns, rounding how, uint8_t *codes, int64_t pixel) {
    const __m256 factor = _mm256_set1_ps(how.inverse), term = _mm256_set1_ps(how.shift);
    const __m256i byte = _mm256_set1_epi32(0xFF);
    for (int64_t column = 0; column < columns; column += 8) {
        const int64_t count = smaller(8, columns - column);
        for (int64_t channel = 0; channel < pixel; channel += 16) {
            __m256i fours[4]; /* of each of 8 pixels, four channels */
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                fours[i] = _mm256_setzero_si256();
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    const int64_t at = channel + 4 * i + j;
                    const __m256 value = at < channels ? loaded(x + at * plane + column, count) : _mm256_setzero_ps();
                    const __m256i code = _mm256_and_si256(rounded(value, factor, term), byte);
                    fours[i] = _mm256_or_si256(fours[i], _mm256_slli_epi32(code, 8 * j));
                }
            }
            const __m256i a = _mm256_unpacklo_epi32(fours[0], fours[1]), b = _mm256_unpackhi_epi32(fours[0], fours[1]);
            const __m256i c = _mm256_unpacklo_epi32(fours[2], fours[3]), d = _mm256_unpackhi_epi32(fours[2], fours[3]);
            /* Of whole[j], lane l is pixel 4l + j. */
            const __m256i whole[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c),
                                      _mm256_unpacklo_epi64(b, d), _mm256_unpackhi_epi64(b, d)};
            const int64_t bytes = smaller(16, pixel - channel);
            uint8_t pixels[128] __attribute__((aligned(32)));
            for (int j = 0; j < 4; j++) _mm256_store_si256((__m256i *)(pixels + 32 * j), whole[j]);
            for (int64_t p = 0; p < count; p++)
                memcpy(codes + (column + p) * pixel + channel, pixels + p % 4 * 32 + p / 4 * 16, (size_t)bytes);
        }
    }
}

static void transpose(__m256 *rows) {
    __m256 t[8], u[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44), u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
        u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44), u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        rows[j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x20);
        rows[4 + j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x31);
    }
}

static void finish_pixels(const int32_t *sums, int64_t pixels, row_scale row, const packed_matrix *weight, const float *scales,
                          const float *bias, int64_t panel, int vectors, float *result, int64_t plane) {
    const __m256 steps = _mm256_set1_ps(row.step);
    const int64_t width = LANES * vectors, first = panel * LANES;
    for (int64_t lane = 0; lane < width && first + lane < weight->outputs; lane += 8) {
        const int64_t output = first + lane, count = smaller(8, weight->outputs - output);
        const __m256i code_sums = _mm256_loadu_si256((const __m256i *)(weight->sums + output));
        const __m256i taken = _mm256_mullo_epi32(code_sums, _mm256_set1_epi32(row.zero));
        const __m256 scale = loaded(scales + output, count);
        const __m256 added = bias ? loaded(bias + output, count) : _mm256_setzero_ps();
        for (int64_t pixel = 0; pixel < pixels; pixel += 8) {
            const __m256i there = first_lanes(pixels - pixel);
            __m256 values[8];
#pragma GCC unroll 8
            for (int p = 0; p < 8; p++) {
                const __m256i sum = _mm256_loadu_si256((const __m256i *)(sums + (pixel + p) * width + lane));
                values[p] = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(sum, taken)), scale), steps);
                if (bias) values[p] = _mm256_add_ps(values[p], added);
            }
            transpose(values);
            for (int64_t c = 0; c < count; c++) {
                float *const to = result + (output + c) * plane + pixel;
                if (pixels - pixel >= 8)
                    _mm256_storeu_ps(to, values[c]);
                else
                    _mm256_maskstore_ps(to, there, values[c]);
            }
        }
    }
}

const instructions avx2 = {product_tile, extent_of, round_with, split_with, finish_tile, round_row, finish_pixels};
#endif
