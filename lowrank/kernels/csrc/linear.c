/* A linear layer of int8 codes, or of two int8 factors, in one call: rounding, products, and back to floats. */
#include "lowrank_native.h"

#if defined(__x86_64__)
#include <omp.h>
#include <stdlib.h>

#define ROWS_A_THREAD 12        /* from here on threads share the rows and not the outputs: no waiting for each other */
#define CHUNK_BYTES (384 << 10) /* of codes at a time: with a panel of weights they stay in L2 */
#define LONG_COLUMNS 6144       /* above, four panels of them are too much for L2 and two go with taller tiles */
#define TOKENS_ALL_ROUND 3      /* up to here each thread rounds all tokens for itself */

/* As lowrank/kernels/native.py fills it. `second.outputs` is 0 where the layer is not factored. */
typedef struct {
    int64_t inputs;
    packed_matrix first, second;
    const float *scale; /* of the first matrix's outputs */
    double gain;        /* a power of two taken out of the scale of factors */
    int64_t level;      /* of instructions */
} linear_layer;

typedef struct {
    uint8_t *codes, *component_codes;
    float *components;
    row_scale *scales, *component_scales;
} scratch;

typedef struct {
    const linear_layer *layer;
    const instructions *use;
    const float *x, *bias;
    float *y;
    int64_t x_stride, tokens;
    int pieces, rounded; /* rows of codes a token; whether tokens are rounded to one int8 */
    int by_rows;
    int64_t chunk, first_stride, second_stride, component_stride;
    char *memory;
    int64_t memory_each;
} job;

/* Rows of codes fall into different cache sets, as panels do. */
static int64_t row_stride(int64_t columns) { return (round_up(columns, 64) / 64 | 1) * 64; }

static int64_t place(char **at, int64_t bytes) {
    bytes = round_up(bytes, 64);
    if (*at) *at += bytes;
    return bytes;
}

/* Where a thread's scratch lies; with no memory, only how much it is. */
static int64_t lay_out(const job *all, char *memory, scratch *mine) {
    char *at = memory;
    const int64_t rows = all->chunk * all->pieces;
    int64_t bytes = 0;
    mine->codes = (uint8_t *)at, bytes += place(&at, rows * all->first_stride);
    mine->scales = (row_scale *)at, bytes += place(&at, all->chunk * (int64_t)sizeof(row_scale));
    if (all->layer->second.outputs) {
        mine->components = (float *)at, bytes += place(&at, all->chunk * all->component_stride * 4);
        mine->component_codes = (uint8_t *)at, bytes += place(&at, rows * all->second_stride);
        mine->component_scales = (row_scale *)at, bytes += place(&at, all->chunk * (int64_t)sizeof(row_scale));
    }
    return bytes;
}

/* All tokens by the panels from `panel` to `end`, tile by tile; a panel stays in L2 for all tokens. */
static void multiply(const instructions *use, const code_rows *codes, int64_t tokens, int pieces, const row_scale *scales,
                     const packed_matrix *matrix, int64_t panel, int64_t end, finish how) {
    int32_t sums[MOST_ROWS * 2 * LANES] __attribute__((aligned(64)));
    float *const result = how.result;
    const int widest = matrix->columns > LONG_COLUMNS && tokens * pieces > MOST_ROWS / 2 ? 2 : MOST_VECTORS;
    while (panel < end) {
        const int64_t groups = (end - panel + widest - 1) / widest;
        const int vectors = (int)((end - panel + groups - 1) / groups);
        const int most = (vectors > 2 ? MOST_ROWS / 2 : MOST_ROWS) / pieces;
        const int64_t blocks = (tokens + most - 1) / most;
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t token = share(tokens, block, blocks), count = share(tokens, block + 1, blocks) - token;
            code_rows rows = *codes;
            rows.start += token * pieces * codes->stride;
            use->product_tile(&rows, (int)count * pieces, matrix, panel, vectors, sums);
            how.result = result + token * how.stride;
            use->finish_tile(sums, (int)count, pieces, scales + token, matrix, panel, vectors, &how);
        }
        panel += vectors;
    }
}

static void wait_for_all(const job *all, int threads) {
    if (all->by_rows || threads == 1) return;
#pragma omp barrier
}

/* The part of one thread of several: its rows, or its outputs of all rows. */
static void work(const job *all, int thread, int threads) {
    const linear_layer *const layer = all->layer;
    const packed_matrix *const first = &layer->first, *const second = &layer->second;
    const int by_rows = all->by_rows, pieces = all->pieces, factored = second->outputs != 0;
    const int alone = by_rows || all->tokens <= TOKENS_ALL_ROUND || threads == 1;
    const int64_t from = by_rows ? share(all->tokens, thread, threads) : 0;
    const int64_t to = by_rows ? share(all->tokens, thread + 1, threads) : all->tokens;
    const int part = by_rows ? 0 : thread, parts = by_rows ? 1 : threads;
    scratch mine, shared;
    lay_out(all, all->memory + (alone ? thread : 0) * all->memory_each, &mine);
    lay_out(all, all->memory + (by_rows ? thread : 0) * all->memory_each, &shared);
    const int64_t start = 0, first_panels = round_up(first->outputs, LANES) / LANES;
    const int64_t chunks = (to - from + all->chunk - 1) / all->chunk;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t token = from + share(to - from, chunk, chunks);
        const int64_t count = from + share(to - from, chunk + 1, chunks) - token;
        const int64_t begin = alone ? 0 : share(count, thread, threads), end = alone ? count : share(count, thread + 1, threads);
        const code_rows codes = {mine.codes, all->first_stride, &start, 1, first->columns};
        if (chunk) wait_for_all(all, threads);
        for (int64_t t = begin; t < end; t++) {
            const float *x = all->x + (token + t) * all->x_stride;
            uint8_t *const row = mine.codes + t * pieces * all->first_stride;
            if (all->rounded)
                round_token(all->use, x, layer->inputs, row, mine.scales + t);
            else
                split_token(all->use, x, layer->inputs, pieces, row, all->first_stride, mine.scales + t);
        }
        if (!alone) wait_for_all(all, threads);
        finish last = {layer->scale, all->bias, 1, all->y, 0};
        if (factored) {
            const finish between = {layer->scale, NULL, 0, shared.components, all->component_stride};
            multiply(all->use, &codes, count, pieces, mine.scales, first, share(first_panels, part, parts),
                     share(first_panels, part + 1, parts), between);
            wait_for_all(all, threads);
            for (int64_t t = begin; t < end; t++) {
                const float *components = shared.components + t * all->component_stride;
                uint8_t *const row = mine.component_codes + t * pieces * all->second_stride;
                row_scale *const scale = mine.component_scales + t;
                if (all->rounded) {
                    round_token_symmetric(all->use, components, first->outputs, row, scale);
                    scale->step = mine.scales[t].step * scale->step * (float)layer->gain;
                } else {
                    split_token(all->use, components, first->outputs, pieces, row, all->second_stride, scale);
                    scale->more = mine.scales[t].step * (float)layer->gain;
                }
            }
            if (!alone) wait_for_all(all, threads);
            last.scale = NULL;
            last.stepped = all->rounded ? 1 : 2;
        }
        const packed_matrix *const matrix = factored ? second : first;
        const code_rows rows = {factored ? mine.component_codes : mine.codes,
                                factored ? all->second_stride : all->first_stride, &start, 1, matrix->columns};
        const int64_t panels = round_up(matrix->outputs, LANES) / LANES;
        last.stride = matrix->outputs;
        last.result = all->y + token * matrix->outputs;
        multiply(all->use, &rows, count, pieces, factored ? mine.component_scales : mine.scales, matrix, share(panels, part, parts),
                 share(panels, part + 1, parts), last);
    }
}

/* y (tokens, outputs) of x (tokens, inputs), rows `x_stride` apart. `pieces` 0: tokens rounded to int8; 1 to 3: tokens
   as fixed-point numbers of so many digits. 0, or 1 where there was no memory. */
int lowrank_linear(const linear_layer *layer, const float *x, int64_t x_stride, float *y, const float *bias,
                   int64_t tokens, int pieces, int threads) {
    if (tokens == 0) return 0;
    job all = {layer, instructions_of(layer->level), x, bias, y, x_stride, tokens, pieces ? pieces : 1, pieces == 0, 0, 0, 0, 0, 0, NULL, 0};
    const int64_t rows = tokens * all.pieces, columns = layer->first.columns;
    const int64_t products = rows * layer->first.outputs * columns + rows * layer->second.outputs * layer->second.columns;
    if (products < PARALLEL_WORK) threads = 1;
    all.by_rows = threads > 1 && rows >= (int64_t)ROWS_A_THREAD * threads;
    const int64_t most = (all.by_rows ? (tokens + threads - 1) / threads : tokens);
    const int64_t block = MOST_ROWS / all.pieces;
    all.chunk = smaller(most, round_up(CHUNK_BYTES / (columns * all.pieces) + 1, block));
    all.first_stride = row_stride(columns);
    all.second_stride = layer->second.outputs ? row_stride(layer->second.columns) : 0;
    all.component_stride = round_up(layer->first.outputs, LANES);
    scratch unused;
    all.memory_each = lay_out(&all, NULL, &unused);
    char *const memory = malloc((size_t)(all.memory_each * threads + 64));
    if (!memory) return 1;
    all.memory = memory + (64 - (int64_t)(intptr_t)memory % 64) % 64;
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
