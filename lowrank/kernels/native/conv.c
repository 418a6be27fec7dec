/* A 2-d convolution of int8 codes without unfolding: the rows of the product lie in the padded u8 image itself. */
#include "lowrank_native.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

#define PIXELS 16 /* of an output row at a time: what one transpose turns from channels last to channels first */

/* As lowrank/kernels/native.py fills it. The weight's columns: kernel rows, kernel columns, channels (filled up to 4). */
typedef struct {
    int64_t channels, kernel_rows, kernel_columns;
    int64_t row_step, column_step, row_dilation, column_dilation;
    int64_t top, bottom, left, right; /* zeros around the image */
    packed_matrix weight;
    const float *scale;
} conv_layer;

typedef struct {
    const conv_layer *layer;
    const float *x, *bias;
    float *y;
    int64_t samples, rows, columns, out_rows, out_columns;
    int64_t wide, pixel; /* of the codes: columns of a padded row, bytes of a pixel */
    const int64_t *offsets;
    int64_t runs, run;
    uint8_t *codes; /* one padded image a thread, or one for all */
    int64_t image;
    token_extent *extents;
    int by_samples;
} job;

static int64_t share(int64_t count, int64_t part, int64_t parts) { return count * part / parts; }

/* One row of an image, channels first, to codes with channels last. */
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

/* The padded image's rows from `from` to `to`; zero is the code `zero`. */
static void round_rows(const job *all, const float *x, rounding how, uint8_t *codes, int64_t from, int64_t to) {
    const conv_layer *const layer = all->layer;
    const int64_t bytes = all->wide * all->pixel, plane = all->rows * all->columns;
    for (int64_t row = from; row < to; row++) {
        uint8_t *const at = codes + row * bytes;
        const int64_t source = row - layer->top;
        if (source < 0 || source >= all->rows) {
            memset(at, how.zero, (size_t)bytes);
            continue;
        }
        memset(at, how.zero, (size_t)(layer->left * all->pixel));
        memset(at + (layer->left + all->columns) * all->pixel, how.zero, (size_t)(layer->right * all->pixel));
        round_row(x + source * all->columns, plane, layer->channels, all->columns, how, at + layer->left * all->pixel,
                  all->pixel);
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

/* Sums of at most 16 pixels to floats, into the planes of the output channels. */
static void finish_pixels(const int32_t *sums, int64_t pixels, float step, int32_t zero, const conv_layer *layer,
                          const float *bias, int64_t panel, int vectors, float *result, int64_t plane) {
    const __m512 steps = _mm512_set1_ps(step);
    const __mmask16 there = first_lanes(pixels);
    for (int v = 0; v < vectors; v++) {
        const int64_t output = (panel + v) * LANES, count = smaller(LANES, layer->weight.outputs - output);
        const __mmask16 channels = first_lanes(count);
        const __m512i taken = _mm512_mullo_epi32(_mm512_loadu_si512(layer->weight.sums + output), _mm512_set1_epi32(zero));
        const __m512 scale = _mm512_maskz_loadu_ps(channels, layer->scale + output);
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

/* Output rows from `from` to `to` of one sample. */
static void convolve(const job *all, const uint8_t *codes, row_scale scale, float *y, int64_t from, int64_t to) {
    const conv_layer *const layer = all->layer;
    const int64_t panels = round_up(layer->weight.outputs, LANES) / LANES, plane = all->out_rows * all->out_columns;
    int32_t sums[PIXELS * MOST_VECTORS * LANES] __attribute__((aligned(64)));
    memset(sums, 0, sizeof sums);
    for (int64_t panel = 0; panel < panels;) {
        const int64_t groups = (panels - panel + MOST_VECTORS - 1) / MOST_VECTORS;
        const int vectors = (int)((panels - panel + groups - 1) / groups);
        const int most = vectors > 2 ? MOST_ROWS / 2 : MOST_ROWS;
        for (int64_t row = from; row < to; row++)
            for (int64_t column = 0; column < all->out_columns; column += PIXELS) {
                const int64_t count = smaller(PIXELS, all->out_columns - column), blocks = (count + most - 1) / most;
                const uint8_t *const corner =
                    codes + (row * layer->row_step * all->wide + column * layer->column_step) * all->pixel;
                for (int64_t block = 0; block < blocks; block++) {
                    const int64_t first = share(count, block, blocks), last = share(count, block + 1, blocks);
                    const int64_t stride = layer->column_step * all->pixel;
                    const code_rows rows = {corner + first * stride, stride, all->offsets, all->runs, all->run};
                    product_tile(&rows, (int)(last - first), &layer->weight, panel, vectors, sums + first * vectors * LANES);
                }
                finish_pixels(sums, count, scale.step, scale.zero, layer, all->bias, panel, vectors,
                              y + row * all->out_columns + column, plane);
            }
        panel += vectors;
    }
}

/* The part of one thread: its samples, or its rows of each sample. */
static void work(const job *all, int thread, int threads) {
    const conv_layer *const layer = all->layer;
    const int64_t size = layer->channels * all->rows * all->columns;
    const int64_t out_size = layer->weight.outputs * all->out_rows * all->out_columns;
    const int64_t tall = layer->top + all->rows + layer->bottom;
    const int part = all->by_samples ? 0 : thread, parts = all->by_samples ? 1 : threads;
    const int64_t begin = all->by_samples ? share(all->samples, thread, threads) : 0;
    const int64_t end = all->by_samples ? share(all->samples, thread + 1, threads) : all->samples;
    uint8_t *const codes = all->codes + (all->by_samples ? thread : 0) * all->image;
    for (int64_t sample = begin; sample < end; sample++) {
        const float *x = all->x + sample * size;
        const int64_t from = share(size, part, parts), to = share(size, part + 1, parts);
        token_extent extent = extent_of(x + from, to - from);
        if (parts > 1) {
            all->extents[thread] = extent;
#pragma omp barrier
            for (int other = 0; other < threads; other++) extent = joined(extent, all->extents[other]);
        }
        row_scale scale;
        const rounding how = rounding_for(extent, &scale);
        round_rows(all, x, how, codes, share(tall, part, parts), share(tall, part + 1, parts));
        if (parts > 1) {
#pragma omp barrier
        }
        convolve(all, codes, scale, all->y + sample * out_size, share(all->out_rows, part, parts),
                 share(all->out_rows, part + 1, parts));
        /* The next sample's codes go where this one's are: its first barrier comes after this sample's products. */
    }
}

/* y (samples, outputs, out_rows, out_columns) of x (samples, channels, rows, columns), both without gaps; each sample
   is rounded with one step and one zero. 0, or 1 where there was no memory. */
int lowrank_conv(const conv_layer *layer, const float *x, float *y, const float *bias, int64_t samples, int64_t rows,
                 int64_t columns, int64_t out_rows, int64_t out_columns, int threads) {
    if (samples * out_rows * out_columns == 0) return 0;
    job all = {layer, x, bias, y, samples, rows, columns, out_rows, out_columns, 0, 0, NULL, 0, 0, NULL, 0, NULL, 0};
    const int flat = layer->kernel_rows * layer->kernel_columns * layer->row_step * layer->column_step == 1 &&
                     layer->top + layer->bottom + layer->left + layer->right == 0;
    if (samples * out_rows * out_columns * layer->weight.outputs * layer->weight.columns < PARALLEL_WORK) threads = 1;
    all.by_samples = samples >= threads;
    if (flat && all.by_samples) {
        /* A row's end means nothing where the kernel is a single pixel. */
        all.rows = all.out_rows = 1;
        all.columns = all.out_columns = rows * columns;
    }
    all.pixel = round_up(layer->channels, 4);
    all.wide = layer->left + all.columns + layer->right;
    const int joint = layer->column_dilation == 1; /* a row of the kernel lies without gaps */
    all.runs = joint ? layer->kernel_rows : layer->kernel_rows * layer->kernel_columns;
    all.run = joint ? layer->kernel_columns * all.pixel : all.pixel;
    all.image = round_up((layer->top + all.rows + layer->bottom) * all.wide * all.pixel, 64) + 64;
    const int64_t images = all.by_samples ? threads : 1;
    const int64_t offset_bytes = round_up(all.runs * (int64_t)sizeof(int64_t), 64);
    const int64_t extent_bytes = round_up(threads * (int64_t)sizeof(token_extent), 64);
    char *const memory = malloc((size_t)(64 + offset_bytes + extent_bytes + images * all.image));
    if (!memory) return 1;
    char *const at = memory + (64 - (int64_t)(intptr_t)memory % 64) % 64;
    int64_t *const offsets = (int64_t *)at;
    for (int64_t run = 0; run < all.runs; run++) {
        const int64_t row = joint ? run : run / layer->kernel_columns, column = joint ? 0 : run % layer->kernel_columns;
        offsets[run] = (row * layer->row_dilation * all.wide + column * layer->column_dilation) * all.pixel;
    }
    all.offsets = offsets;
    all.extents = (token_extent *)(at + offset_bytes);
    all.codes = (uint8_t *)at + offset_bytes + extent_bytes;
    if (threads == 1)
        work(&all, 0, 1);
    else {
#pragma omp parallel num_threads(threads)
        work(&all, omp_get_thread_num(), omp_get_num_threads());
    }
    free(memory);
    return 0;
}
#endif
