/* Rows of x as integers with a scale per group, laid out as tiles.c reads them.
 *
 * A word holds what meets half a line of weights: four inputs of 8 bits in their order, or two of 16 bits: of four inputs the
 * first word has 0 and 2, the second 1 and 3, since weights are taken apart into even and odd bytes. Rows are taken in blocks
 * whose numbers differ by one at most, and word c of row i of a block of r is its word c r + i: what meets one line lies side
 * by side.
 */
#ifndef ACTIVATIONS_H
#define ACTIVATIONS_H

#include <math.h>
#include <stdlib.h>

#include "bfloat16.h"

typedef struct {
    int bits, m, blocks;
    long k, group;
    int32_t *words;
    float *scales;   /* by block, group and row */
    int32_t *shifts; /* likewise: what makes up for weights that are unsigned */
} Activations;

INLINE int32_t *words_of(const Activations *x, int row) { return x->words + (size_t)row * x->k * x->bits / 32; }
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

/* Round a group to integers of magnitude up to `top` and return their scale; infinity and NaN make it NaN, which is looked
 * for in the logits. */
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

/* Put a group's integers where their words belong, rows of the block apart. */
INLINE void spread(const int16_t *from, long count, int bits, int rows, int32_t *to) {
    int16_t pairs[128];
    int8_t bytes[128];
    int32_t words[64];
    if (bits == 16) {
        for (long c = 0; c < count; c += 4)
            for (int j = 0; j < 4; j++) pairs[c + j] = from[c + (j % 2) * 2 + j / 2];
        memcpy(words, pairs, count * 2);
    } else {
        for (long l = 0; l < count; l++) bytes[l] = (int8_t)from[l];
        memcpy(words, bytes, count);
    }
    for (long l = 0; l < count * bits / 32; l++) to[l * rows] = words[l];
}

/* `zero` is what weights have for naught. */
static void round_row(Activations *x, const uint16_t *from, int row, int zero) {
    int block = (int)((((long)row + 1) * x->blocks - 1) / x->m), start = first_row(x, block);
    int rows = first_row(x, block + 1) - start;
    long groups = x->k / x->group, words = x->group * x->bits / 32;
    int16_t rounded[128];
    for (long b = 0; b < groups; b++) {
        long at = start * groups + b * rows + row - start;
        int32_t sum;
        x->scales[at] = round_group(from + b * x->group, x->group, x->bits == 16 ? 32767.0f : 127.0f, rounded, &sum);
        x->shifts[at] = -zero * sum;
        spread(rounded, x->group, x->bits, rows, words_of(x, start) + b * words * rows + row - start);
    }
}

static void free_activations(Activations *x) {
    free(x->words);
    free(x->scales);
    free(x->shifts);
}

/* Round m rows, in blocks of at most `most`. Return whether there was room. */
static int round_activations(Activations *x, const uint16_t *from, int most, int zero, int threads) {
    size_t size = (size_t)x->m * x->k, groups = size / x->group;
    x->blocks = (x->m + most - 1) / most;
    x->words = malloc(size * x->bits / 8);
    x->scales = malloc(groups * sizeof *x->scales);
    x->shifts = malloc(groups * sizeof *x->shifts);
    if (!x->words || !x->scales || !x->shifts) return 0;
#pragma omp parallel for num_threads(threads) schedule(static) if (x->blocks > 1)
    for (int row = 0; row < x->m; row++) round_row(x, from + (size_t)row * x->k, row, zero);
    return 1;
}

#endif
