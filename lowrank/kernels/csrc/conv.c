/* A 2-d convolution of int8 codes without unfolding: the rows of the product lie in the padded u8 image itself. */
#include "lowrank_native.h"

#if defined(__x86_64__)
#include <omp.h>
#include <stdlib.h>
#include <string.h>

/* As lowrank/kernels/native.py fills it. The weight's columns: kernel rows, kernel columns, channels (filled up to 4). */
typedef struct {
    int64_t channels, kernel_rows, kernel_columns;
    int64_t row_step, column_step, row_dilation, column_dilation;
    int64_t top, bottom, left, right; /* zeros around the image */
    packed_matrix weight;
    const float *scale;
    int64_t level; /* of instructions */
} conv_layer;

typedef struct {
    const conv_layer *layer;
    const instructions *use;
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
        all->use->round_row(x + source * all->columns, plane, layer->channels, all->columns, how,
                            at + layer->left * all->pixel, all->pixel);
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
                    all->use->product_tile(&rows, (int)(last - first), &layer->weight, panel, vectors, sums + first * vectors * LANES);
                }
                all->use->finish_pixels(sums, count, scale, &layer->weight, layer->scale, all->bias, panel, vectors,
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
        token_extent extent = all->use->extent_of(x + from, to - from);
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
    job all = {layer, instructions_of(layer->level), x, bias, y, samples, rows, columns, out_rows, out_columns, 0, 0, NULL, 0, 0, NULL, 0, NULL, 0};
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
