/* Products with weights that stay packed: codes of 2 to 8 bits in bit planes, row by row (lowrank/numerics/packing.py), with AVX2 and
   FMA. Few tokens are multiplied as codes come out of the registers; for many, rows are decoded into a buffer that stays in the cache.

   All sums are done in one order, whatever the processor and the number of threads: eight lanes along the inputs. */
#include "lowrank_native.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#pragma GCC target("avx2,fma,f16c")

#define STEP 32       /* codes at a time; groups are multiples of it */
#define MOST_TOKENS 4 /* that one pass over the codes serves */
#define SCALES 256    /* turned into floats at a time */

/* As lowrank/kernels/native.py fills it. */
typedef struct {
    const uint8_t *codes;
    int64_t rows, columns, row_bytes;
    const void *scale; /* (rows, groups) float32, or float16 */
    int64_t half;
    const uint8_t *zero; /* (rows, groups), or NULL: 2^(bits - 1) everywhere */
    int64_t bits, group, groups;
} packed_weight;

/* Of the planes of codes of so many bits, as PLANES in lowrank/numerics/packing.py. */
static const int widths[9][3] = {{0}, {0}, {2}, {2, 1}, {4}, {4, 1}, {4, 2}, {4, 2, 1}, {8}};

/* Where the planes of a row begin; those that there are not are not read. */
typedef struct {
    const uint8_t *first, *second, *third;
} planes;

static inline int64_t plane_bytes(int64_t columns, int width) { return round_up(columns, 8) / 8 * width; }

static inline planes planes_of(const packed_weight *w, int64_t row) {
    const uint8_t *const start = w->codes + row * w->row_bytes;
    const uint8_t *const second = start + plane_bytes(w->columns, widths[w->bits][0]);
    const planes found = {start, second, second + plane_bytes(w->columns, widths[w->bits][1])};
    return found;
}

static inline __m256i four_bits(const uint8_t *p) {
    const __m128i mask = _mm_set1_epi8(15), v = _mm_loadu_si128((const __m128i *)p);
    const __m128i low = _mm_and_si128(v, mask), high = _mm_and_si128(_mm_srli_epi16(v, 4), mask);
    return _mm256_set_m128i(_mm_unpackhi_epi8(low, high), _mm_unpacklo_epi8(low, high));
}

static inline __m256i two_bits(const uint8_t *p) {
    const __m128i mask = _mm_set1_epi8(3), v = _mm_loadl_epi64((const __m128i *)p);
    const __m128i a = _mm_and_si128(v, mask), b = _mm_and_si128(_mm_srli_epi16(v, 2), mask);
    const __m128i c = _mm_and_si128(_mm_srli_epi16(v, 4), mask), d = _mm_and_si128(_mm_srli_epi16(v, 6), mask);
    const __m128i ab = _mm_unpacklo_epi8(a, b), cd = _mm_unpacklo_epi8(c, d);
    return _mm256_set_m128i(_mm_unpackhi_epi16(ab, cd), _mm_unpacklo_epi16(ab, cd));
}

static inline __m256i one_bit(const uint8_t *p) {
    int32_t v;
    memcpy(&v, p, 4);
    const __m256i places = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i bits = _mm256_set1_epi64x((int64_t)0x8040201008040201ULL);
    const __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(v), places), bits);
    return _mm256_and_si256(_mm256_cmpeq_epi8(spread, bits), _mm256_set1_epi8(1));
}

/* The 32 codes from `at` on; `bits` is a constant where this is inlined. */
static inline __attribute__((always_inline)) __m256i codes_at(planes p, int64_t at, const int bits) {
    switch (bits) {
    case 2: return two_bits(p.first + at / 4);
    case 3: return _mm256_or_si256(two_bits(p.first + at / 4), _mm256_slli_epi16(one_bit(p.second + at / 8), 2));
    case 4: return four_bits(p.first + at / 2);
    case 5: return _mm256_or_si256(four_bits(p.first + at / 2), _mm256_slli_epi16(one_bit(p.second + at / 8), 4));
    case 6: return _mm256_or_si256(four_bits(p.first + at / 2), _mm256_slli_epi16(two_bits(p.second + at / 4), 4));
    case 7:
        return _mm256_or_si256(_mm256_or_si256(four_bits(p.first + at / 2), _mm256_slli_epi16(two_bits(p.second + at / 4), 4)),
                               _mm256_slli_epi16(one_bit(p.third + at / 8), 6));
    default: return _mm256_loadu_si256((const __m256i *)(p.first + at));
    }
}

/* The last codes of a row, filled up with zeros: the buffer may end with them. */
static __attribute__((noinline)) __m256i last_codes(planes p, int64_t at, int64_t columns, int bits) {
    uint8_t kept[3][STEP] __attribute__((aligned(32))) = {{0}};
    const uint8_t *const from[3] = {p.first, p.second, p.third};
    const int64_t left = round_up(columns, 8) - at;
    for (int i = 0; i < 3; i++)
        if (widths[bits][i]) memcpy(kept[i], from[i] + at / 8 * widths[bits][i], (size_t)(left / 8 * widths[bits][i]));
    const planes here = {kept[0], kept[1], kept[2]};
    switch (bits) {
    case 2: return codes_at(here, 0, 2);
    case 3: return codes_at(here, 0, 3);
    case 4: return codes_at(here, 0, 4);
    case 5: return codes_at(here, 0, 5);
    case 6: return codes_at(here, 0, 6);
    case 7: return codes_at(here, 0, 7);
    default: return codes_at(here, 0, 8);
    }
}

static inline float scale_at(const packed_weight *w, int64_t index) {
    return w->half ? _cvtsh_ss(((const uint16_t *)w->scale)[index]) : ((const float *)w->scale)[index];
}

static inline int zero_at(const packed_weight *w, int64_t index) { return w->zero ? w->zero[index] : 1 << (w->bits - 1); }

/* 32 codes less their zero, as floats: exact. Of up to 7 bits the difference fits a signed byte, and so it does of 8 about the middle;
   `wide` is a constant that says that it may not. */
static inline __attribute__((always_inline)) void as_floats(__m256i codes, int zero_code, const int wide, __m256 *made) {
    if (!wide) {
        const __m256i less = _mm256_sub_epi8(codes, _mm256_set1_epi8((char)zero_code));
        const __m128i first = _mm256_castsi256_si128(less), second = _mm256_extracti128_si256(less, 1);
        made[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(first));
        made[1] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(first, 8)));
        made[2] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(second));
        made[3] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(second, 8)));
        return;
    }
    const __m256 zero = _mm256_set1_ps((float)zero_code);
    const __m128i low = _mm256_castsi256_si128(codes), high = _mm256_extracti128_si256(codes, 1);
    made[0] = _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(low)), zero);
    made[1] = _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(low, 8))), zero);
    made[2] = _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(high)), zero);
    made[3] = _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(high, 8))), zero);
}

static inline __attribute__((always_inline)) void decode_row(const packed_weight *w, int64_t row, float *to, const int bits, const int wide) {
    const planes p = planes_of(w, row);
    for (int64_t group = 0; group < w->groups; group++) {
        const __m256 scale = _mm256_set1_ps(scale_at(w, row * w->groups + group));
        const int zero = zero_at(w, row * w->groups + group);
        const int64_t start = group * w->group, end = smaller(start + w->group, w->columns);
        for (int64_t at = start; at < end; at += STEP) {
            const int whole = at + STEP <= end;
            __m256 made[4];
            as_floats(whole ? codes_at(p, at, bits) : last_codes(p, at, w->columns, bits), zero, wide, made);
            for (int i = 0; i < 4; i++) made[i] = _mm256_mul_ps(made[i], scale);
            if (whole) {
                for (int i = 0; i < 4; i++) _mm256_storeu_ps(to + at + 8 * i, made[i]);
            } else {
                float rest[STEP] __attribute__((aligned(32)));
                for (int i = 0; i < 4; i++) _mm256_store_ps(rest + 8 * i, made[i]);
                memcpy(to + at, rest, (size_t)(end - at) * sizeof(float));
            }
        }
    }
}

static inline float lanes_sum(__m256 v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}

/* Scales of `count` groups as floats, at most SCALES. */
static inline void scales_from(const packed_weight *w, int64_t base, int64_t count, float *to) {
    int64_t i = 0;
    if (!w->half) {
        memcpy(to, (const float *)w->scale + base, (size_t)count * sizeof(float));
        return;
    }
    const uint16_t *const from = (const uint16_t *)w->scale + base;
    for (; i + 8 <= count; i += 8) _mm256_store_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
    for (; i < count; i++) to[i] = _cvtsh_ss(from[i]);
}

/* 32 codes less their zero by so many tokens. */
static inline __attribute__((always_inline)) void add_products(__m256i codes, int zero, const float *x, int64_t x_stride, const int wide,
                                                               const int tokens, const int apart, __m256 sums[MOST_TOKENS][4]) {
    __m256 made[4];
    as_floats(codes, zero, wide, made);
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) {
        const float *const from = x + t * x_stride;
        sums[t][0] = _mm256_fmadd_ps(made[0], _mm256_load_ps(from), sums[t][0]);
        sums[t][1] = _mm256_fmadd_ps(made[1], _mm256_load_ps(from + 8), sums[t][1]);
        sums[t][apart] = _mm256_fmadd_ps(made[2], _mm256_load_ps(from + 16), sums[t][apart]);
        sums[t][apart + 1] = _mm256_fmadd_ps(made[3], _mm256_load_ps(from + 24), sums[t][apart + 1]);
    }
}

/* One row by `tokens` tokens, which are filled up with zeros to a multiple of 32; `bits` and `tokens` are constants. */
static inline __attribute__((always_inline)) void multiply_row(const packed_weight *w, int64_t row, const float *x, int64_t x_stride,
                                                               const float *bias, float *y, const int bits, const int wide, const int tokens) {
    const planes p = planes_of(w, row);
    __m256 total[MOST_TOKENS];
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) total[t] = _mm256_setzero_ps();
    float scales[SCALES] __attribute__((aligned(32)));
    for (int64_t done = 0; done < w->groups; done += SCALES) {
        const int64_t count = smaller(w->groups - done, SCALES), base = row * w->groups + done;
        scales_from(w, base, count, scales);
        for (int64_t g = 0; g < count; g++) {
            const int zero = w->zero ? w->zero[base + g] : 1 << (bits - 1);
            const int64_t start = (done + g) * w->group, end = smaller(start + w->group, w->columns);
            const int64_t whole = start + (end - start) / STEP * STEP;
            /* Of few tokens four chains of sums each, so that they need not wait for each other. */
            const int apart = tokens <= 2 ? 2 : 0;
            __m256 sums[MOST_TOKENS][4];
#pragma GCC unroll 4
            for (int t = 0; t < tokens; t++) sums[t][0] = sums[t][1] = sums[t][2] = sums[t][3] = _mm256_setzero_ps();
            for (int64_t at = start; at < whole; at += STEP)
                add_products(codes_at(p, at, bits), zero, x + at, x_stride, wide, tokens, apart, sums);
            if (whole < end) add_products(last_codes(p, whole, w->columns, bits), zero, x + whole, x_stride, wide, tokens, apart, sums);
            const __m256 scale = _mm256_broadcast_ss(scales + g);
#pragma GCC unroll 4
            for (int t = 0; t < tokens; t++) {
                __m256 all = _mm256_add_ps(sums[t][0], sums[t][1]);
                if (apart) all = _mm256_add_ps(all, _mm256_add_ps(sums[t][2], sums[t][3]));
                total[t] = _mm256_fmadd_ps(scale, all, total[t]);
            }
        }
    }
    for (int t = 0; t < tokens; t++) y[t * w->rows + row] = lanes_sum(total[t]) + (bias ? bias[row] : 0.0f);
}

#define ROWS_FOR(BITS, WIDE)                                                                                                 \
    static void rows_of_##BITS##_##WIDE(const packed_weight *w, int64_t from, int64_t to, const float *x, int64_t x_stride,       \
                               const float *bias, float *y, int tokens) {                                                \
        for (int64_t row = from; row < to; row++) {                                                                      \
            if (tokens == 1) multiply_row(w, row, x, x_stride, bias, y, BITS, WIDE, 1);                                        \
            else if (tokens == 2) multiply_row(w, row, x, x_stride, bias, y, BITS, WIDE, 2);                                   \
            else if (tokens == 3) multiply_row(w, row, x, x_stride, bias, y, BITS, WIDE, 3);                                   \
            else multiply_row(w, row, x, x_stride, bias, y, BITS, WIDE, 4);                                                    \
        }                                                                                                                \
    }                                                                                                                    \
    static void decode_of_##BITS##_##WIDE(const packed_weight *w, int64_t from, int64_t to, int64_t first, float *made) {         \
        for (int64_t row = from; row < to; row++) decode_row(w, row, made + (row - first) * w->columns, BITS, WIDE);          \
    }
ROWS_FOR(2, 0)
ROWS_FOR(3, 0)
ROWS_FOR(4, 0)
ROWS_FOR(5, 0)
ROWS_FOR(6, 0)
ROWS_FOR(7, 0)
ROWS_FOR(8, 0)
ROWS_FOR(8, 1)

typedef void (*multiply_rows)(const packed_weight *, int64_t, int64_t, const float *, int64_t, const float *, float *, int);
typedef void (*decode_rows)(const packed_weight *, int64_t, int64_t, int64_t, float *);

/* Whether the instructions of this file are there. */
int lowrank_packed_supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

/* y (tokens, rows) = x (tokens, columns), rows `x_stride` apart, times the weight, plus bias. 0, or 1 where there was no memory. */
int lowrank_packed_product(const packed_weight *w, const float *x, int64_t x_stride, float *y, const float *bias, int64_t tokens,
                           int threads) {
    static const multiply_rows of_bits[9] = {0, 0, rows_of_2_0, rows_of_3_0, rows_of_4_0, rows_of_5_0, rows_of_6_0, rows_of_7_0, rows_of_8_0};
    if (tokens == 0 || w->rows == 0) return 0;
    const multiply_rows chosen = w->bits == 8 && w->zero ? rows_of_8_1 : of_bits[w->bits];
    const int64_t filled = round_up(w->columns, STEP);
    float *const copy = aligned_alloc(64, (size_t)round_up(tokens * filled * (int64_t)sizeof(float) + 64, 64));
    if (!copy) return 1;
    for (int64_t t = 0; t < tokens; t++) {
        memcpy(copy + t * filled, x + t * x_stride, (size_t)w->columns * sizeof(float));
        memset(copy + t * filled + w->columns, 0, (size_t)(filled - w->columns) * sizeof(float));
    }
    if (tokens * w->rows * w->columns < PARALLEL_WORK) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int64_t from = share(w->rows, omp_get_thread_num(), omp_get_num_threads());
        const int64_t to = share(w->rows, omp_get_thread_num() + 1, omp_get_num_threads());
        for (int64_t t = 0; t < tokens; t += MOST_TOKENS)
            chosen(w, from, to, copy + t * filled, filled, bias, y + t * w->rows, (int)smaller(tokens - t, MOST_TOKENS));
    }
    free(copy);
    return 0;
}

/* Rows `from` to `to` as floats, (to - from, columns). */
void lowrank_packed_decode(const packed_weight *w, int64_t from, int64_t to, float *made, int threads) {
    static const decode_rows of_bits[9] = {0, 0, decode_of_2_0, decode_of_3_0, decode_of_4_0, decode_of_5_0, decode_of_6_0, decode_of_7_0, decode_of_8_0};
    const decode_rows chosen = w->bits == 8 && w->zero ? decode_of_8_1 : of_bits[w->bits];
    if ((to - from) * w->columns < PARALLEL_WORK) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int64_t count = to - from, part = omp_get_thread_num(), parts = omp_get_num_threads();
        chosen(w, from + share(count, part, parts), from + share(count, part + 1, parts), from, made);
    }
}
#else
int lowrank_packed_supported(void) { return 0; }
#endif
