/* Tokens to u8 codes, in the very float operations of lowrank/kernels/activations.py. */
#include "lowrank_native.h"

#include <math.h>
#include <string.h>

#define TINY 0x1p-126f
#define SMALLEST_EXACT 0x1p-100f

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

void round_token(const instructions *use, const float *x, int64_t count, uint8_t *codes, row_scale *scale) {
    const rounding how = rounding_for(use->extent_of(x, count), scale);
    use->round_with(x, count, codes, how.inverse, how.shift);
}

void round_token_symmetric(const instructions *use, const float *x, int64_t count, uint8_t *codes, row_scale *scale) {
    const token_extent found = use->extent_of(x, count);
    float step = found.largest * (float)(2.0 / 254.0);
    step = step < TINY ? TINY : step;
    scale->step = found.finite ? step : NAN;
    scale->more = 1.0f;
    scale->zero = 128;
    use->round_with(x, count, codes, 1.0f / step, MAGIC + 128.0f);
}

static float power_of_two(int exponent) {
    const uint32_t bits = (uint32_t)(exponent + 127) << 23;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

void split_token(const instructions *use, const float *x, int64_t count, int pieces, uint8_t *codes, int64_t stride, row_scale *scale) {
    const token_extent found = use->extent_of(x, count);
    const float largest = found.largest < SMALLEST_EXACT ? SMALLEST_EXACT : found.largest;
    uint32_t bits;
    memcpy(&bits, &largest, 4);
    const int exponent = found.finite ? (int)(bits >> 23) - 126 : 0; /* largest < 2^exponent */
    const int places = 8 * pieces - 2;
    scale->step = found.finite ? power_of_two(exponent - places) : NAN;
    scale->more = 1.0f;
    scale->zero = 128;
    /* 128 at each byte makes balanced int8 digits, which carry, of the bytes; and u8 codes of the digits. */
    use->split_with(x, count, pieces, codes, stride, power_of_two(places - exponent), (0x808080 & ((1 << 8 * pieces) - 1)) - MAGIC_BITS);
}
