/* The integer product of a register tile: rows of u8 codes by panels of 16 outputs. */
#include "lowrank_native.h"

#if defined(__x86_64__)
#include <immintrin.h>
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

void product_tile(const code_rows *codes, int rows, const packed_matrix *matrix, int64_t panel, int vectors, int32_t *sums) {
    switch (rows * 8 + vectors) {
        TALL(1)
        TALL(2)
        SHORT(3)
        SHORT(4)
        default: break;
    }
}
#else
void product_tile(const code_rows *codes, int rows, const packed_matrix *matrix, int64_t panel, int vectors, int32_t *sums) {
    (void)codes, (void)rows, (void)matrix, (void)panel, (void)vectors, (void)sums;
}
#endif
