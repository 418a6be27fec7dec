/* The plain integer product for machines with AVX2 and no VNNI, where torch's is exact but one product at a time. Codes
   are widened to int16, whose products vpmaddwd adds in pairs to int32: nothing saturates. */
#include "lowrank_native.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>
#pragma GCC target("avx2")

#define WIDE 4 /* outputs at a time */
#define TALL 2 /* rows at a time: with the codes of four outputs and one row, all 16 registers are spoken for */
/* Rows of the left matrix that stay in the second-level cache while all outputs pass. */
#define BLOCK_BYTES (1 << 18)

static inline __m256i widened(const int8_t *codes) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)codes)); }

static inline __m256i widened_end(const int8_t *codes, int64_t count) {
    int8_t filled[16] = {0};
    memcpy(filled, codes, (size_t)count);
    return widened(filled);
}

static inline int32_t lanes_sum(__m256i value) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
}

/* `rows` and `outputs` are constants where this is inlined, so the sums stay in registers. */
static inline __attribute__((always_inline)) void tile(const int8_t *left, const int8_t *right, int64_t columns, const int rows,
                                                       const int outputs, int32_t *result, int64_t result_stride) {
    __m256i sums[TALL][WIDE];
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int o = 0; o < outputs; o++) sums[r][o] = _mm256_setzero_si256();
    const int64_t whole = columns / 16 * 16;
    for (int64_t k = 0; k < columns; k += 16) {
        __m256i codes[WIDE];
#pragma GCC unroll 4
        for (int o = 0; o < outputs; o++)
            codes[o] = k < whole ? widened(right + o * columns + k) : widened_end(right + o * columns + k, columns - k);
#pragma GCC unroll 2
        for (int r = 0; r < rows; r++) {
            const __m256i row = k < whole ? widened(left + r * columns + k) : widened_end(left + r * columns + k, columns - k);
#pragma GCC unroll 4
            for (int o = 0; o < outputs; o++) sums[r][o] = _mm256_add_epi32(sums[r][o], _mm256_madd_epi16(row, codes[o]));
        }
    }
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int o = 0; o < outputs; o++) result[r * result_stride + o] = lanes_sum(sums[r][o]);
}

static void block(const int8_t *left, const int8_t *right, int64_t columns, int64_t rows, int outputs, int32_t *result,
                  int64_t result_stride) {
    int64_t r = 0;
    if (outputs == WIDE) {
        for (; r + TALL <= rows; r += TALL)
            tile(left + r * columns, right, columns, TALL, WIDE, result + r * result_stride, result_stride);
        for (; r < rows; r++) tile(left + r * columns, right, columns, 1, WIDE, result + r * result_stride, result_stride);
        return;
    }
    for (; r < rows; r++)
        for (int o = 0; o < outputs; o++)
            tile(left + r * columns, right + o * columns, columns, 1, 1, result + r * result_stride + o, result_stride);
}

/* result (rows, outputs) int32 = left (rows, columns) · right (outputs, columns)ᵀ, all row after row. */
void lowrank_narrow(const int8_t *left, const int8_t *right, int32_t *result, int64_t rows, int64_t outputs, int64_t columns,
                    int threads) {
    const int64_t high = columns ? smaller(rows, round_up(BLOCK_BYTES / columns + 1, TALL)) : rows;
    const int64_t blocks = high ? (rows + high - 1) / high : 0, groups = (outputs + WIDE - 1) / WIDE;
    if (rows * outputs * columns < PARALLEL_WORK) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t job = 0; job < blocks * groups; job++) {
        const int64_t row = job / groups * high, output = job % groups * WIDE;
        block(left + row * columns, right + output * columns, columns, smaller(high, rows - row),
              (int)smaller(WIDE, outputs - output), result + row * outputs + output, outputs);
    }
}
#else
void lowrank_narrow(const int8_t *left, const int8_t *right, int32_t *result, int64_t rows, int64_t outputs, int64_t columns,
                    int threads) {
    (void)left, (void)right, (void)result, (void)rows, (void)outputs, (void)columns, (void)threads;
}
#endif
