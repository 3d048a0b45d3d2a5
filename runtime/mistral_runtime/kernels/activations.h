/* Rows of x as integers with a scale per group, laid out as tiles.c reads them.
 *
 * Rows are taken in blocks of at most `most`, all within one of the same size. In a block of r rows the inputs 4c..4c+3 of
 * row i are the four integers at (c r + i) 4: what meets one line of weights lies side by side. Integers of 16 bits are in
 * the order 0, 2, 1, 3, as weights are taken apart into even and odd bytes.
 */
#ifndef ACTIVATIONS_H
#define ACTIVATIONS_H

#include <math.h>
#include <stdlib.h>

#include "bfloat16.h"

typedef struct {
    int bits, m, blocks;
    long k, group;
    void *integers;  /* int8_t or int16_t, m k of them */
    float *scales;   /* by block, group and row */
    int32_t *shifts; /* likewise: `zero` times the sum of the group's integers, which unsigned weights give too much */
} Activations;

INLINE int first_row(const Activations *x, int block) { return (int)((long)block * x->m / x->blocks); }

/* Return a group's largest magnitude; not finite where one of its values is not. */
INLINE float largest_of(const uint16_t *x, long count) {
    uint16_t largest = 0; /* without its sign, a bfloat16 is ordered as the integer of its bits */
    for (long l = 0; l < count; l++) {
        uint16_t magnitude = x[l] & 0x7fff;
        largest = magnitude > largest ? magnitude : largest;
    }
    return widen(largest);
}

/* Below this the inverse of a group's scale would overflow; products of such a group vanish beside any other. */
#define LEAST 1e-30f

/* Round a group to integers of magnitude up to `top`; infinity and NaN make its scale NaN, which is looked for in the logits. */
INLINE float round_group(const uint16_t *from, long count, float top, int16_t *to, int32_t *sum) {
    float largest = largest_of(from, count);
    float inverse = largest >= LEAST && isfinite(largest) ? top / largest : 0;
    *sum = 0;
    for (long l = 0; l < count; l++) {
        float scaled = inverse != 0 ? widen(from[l]) * inverse : 0;
        to[l] = (int16_t)(int32_t)(scaled + copysignf(0.5f, scaled));
        *sum += to[l];
    }
    return isfinite(largest) ? largest / top : NAN;
}

INLINE void spread8(const int16_t *from, int8_t *to, long count, int rows) {
    int8_t bytes[128];
    for (long l = 0; l < count; l++) bytes[l] = (int8_t)from[l];
    for (long c = 0; c < count / 4; c++) memcpy(to + c * rows * 4, bytes + c * 4, 4);
}

INLINE void spread16(const int16_t *from, int16_t *to, long count, int rows) {
    for (long c = 0; c < count / 4; c++) {
        const int16_t four[4] = {from[4 * c], from[4 * c + 2], from[4 * c + 1], from[4 * c + 3]};
        memcpy(to + c * rows * 4, four, sizeof four);
    }
}

static void round_row(Activations *x, const uint16_t *from, int block, int row, int rows, int zero) {
    long groups = x->k / x->group;
    size_t start = (size_t)first_row(x, block);
    int16_t rounded[128];
    for (long b = 0; b < groups; b++) {
        int32_t sum;
        float scale = round_group(from + b * x->group, x->group, x->bits == 16 ? 32767.0f : 127.0f, rounded, &sum);
        size_t at = start * groups + b * rows + row, first = start * x->k + b * x->group * rows + row * 4;
        x->scales[at] = scale;
        x->shifts[at] = -zero * sum;
        if (x->bits == 16) spread16(rounded, (int16_t *)x->integers + first, x->group, rows);
        else spread8(rounded, (int8_t *)x->integers + first, x->group, rows);
    }
}

static void free_activations(Activations *x) {
    free(x->integers);
    free(x->scales);
    free(x->shifts);
}

/* Weights are taken as integers from 0, with `zero` for naught. Return whether there was room. */
static int round_activations(Activations *x, const uint16_t *from, int most, int zero, int threads) {
    size_t size = (size_t)x->m * x->k, numbers = size / x->group;
    x->blocks = (x->m + most - 1) / most;
    x->integers = aligned_alloc(64, (size * x->bits / 8 + 63) / 64 * 64);
    x->scales = malloc(numbers * sizeof *x->scales);
    x->shifts = malloc(numbers * sizeof *x->shifts);
    if (!x->integers || !x->scales || !x->shifts) return 0;
#pragma omp parallel for num_threads(threads < x->m ? threads : x->m) schedule(static) if (x->m > most)
    for (int row = 0; row < x->m; row++) {
        int block = (int)((((long)row + 1) * x->blocks - 1) / x->m);
        round_row(x, from + (size_t)row * x->k, block, row - first_row(x, block), first_row(x, block + 1) - first_row(x, block), zero);
    }
    return 1;
}

#endif
