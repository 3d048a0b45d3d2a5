/* y = x W^T with quantised weights in tiles of 16 outputs, whose sums lie side by side in registers.
 *
 * A tile is a row of lines of 64 bytes, four bytes for each of the 16 outputs, which are read from the first to the last:
 * no sum goes across a register, and a group's scales serve 16 outputs at once.
 *
 *   8 bits  a line holds 4 inputs; byte j of output o is weight q + 128 of input j.
 *   4 bits  a line holds 8 inputs; byte j of output o is q + 8 of input j in its low half and of input 4 + j in its high half.
 *   scales  bfloat16, by tile, group and output.
 *
 * Weights of 8 bits meet activations of 16, weights of 4 bits activations of 8, rounded with a scale per group of weights
 * (activations.h): 16 times finer than, or as finely as, the weights beside them need. The sums of a group are exact. A row of
 * x goes through the same operations in the same order however many rows there are: what a sequence gets does not depend
 * on what is computed beside it, nor on whether it came in a prompt or one by one.
 *
 * Shapes: n outputs, k inputs, m rows of x. The caller has checked them: groups of weights are 64 or 128 and divide k, a
 * multiple of 128. The last tile is whole; what it has beyond n is not looked at.
 */
#include <stddef.h>

#include "activations.h"
#include "lanes.h"

#define OUTPUTS 16
#define LINE 64
#define AHEAD 512 /* bytes of a tile that are asked for early: in a page of 4 KB the processor notices a stream late */

typedef struct {
    const uint8_t *values;
    const uint16_t *scales;
    int bits;
    long n, k, group;
} Weights;

INLINE size_t values_of_tile(const Weights *w) { return (size_t)OUTPUTS * w->k * w->bits / 8; }
INLINE size_t scales_of_tile(const Weights *w) { return (size_t)OUTPUTS * (w->k / w->group); }

/* Return one half of a line: of 4 bits as bytes, of 8 bits (the even or the odd bytes) as pairs. */
INLINE ints half_of_line(const uint8_t *at, int half, int bits) {
    ints line = load_ints(at);
    if (half == 1) line = pairs_down(line, bits);
    return both(line, all_ints(bits == 4 ? 0x0f0f0f0f : 0x00ff00ff));
}

/* Multiply T tiles by a block of M rows; the sum for row i and output o of tile t is sums[(i T + t) 16 + o]. */
INLINE void multiply(const Weights *w, long tile, const Activations *x, int start, int T, int M, int bits, float *sums) {
    const int registers = T * PARTS;
    const long groups = w->k / w->group, lines = w->group * bits / 32;
    const size_t next_values = values_of_tile(w), next_scales = scales_of_tile(w);
    const uint8_t *line = w->values + tile * next_values;
    const uint16_t *scales = w->scales + tile * next_scales;
    const int32_t *words = words_of(x, start), *shifts = x->shifts + start * groups;
    const float *x_scales = x->scales + start * groups;

    for (int j = 0; j < M * T * OUTPUTS; j++) sums[j] = 0;
    for (long b = 0; b < groups; b++) {
        ints acc[TILES * PARTS][MOST_ROWS];
        EACH(i, M) EACH(r, registers) acc[r][i] = all_ints(shifts[i]);
        for (long l = 0; l < lines; l++) {
            EACH(t, T) __builtin_prefetch(line + t * next_values + AHEAD, 0, 3);
            EACH(half, 2) {
                ints weights[TILES * PARTS];
                EACH(r, registers)
                weights[r] = half_of_line(line + r / PARTS * next_values + r % PARTS * LANES * 4, half, bits);
                EACH(i, M) {
                    ints row = all_ints(words[half * M + i]);
                    EACH(r, registers)
                    acc[r][i] = bits == 8 ? add_pairs(acc[r][i], weights[r], row) : add_fours(acc[r][i], weights[r], row);
                }
            }
            words += 2 * M;
            line += LINE;
        }
        EACH(r, registers) {
            floats scale = widen_lanes(scales + r / PARTS * next_scales + r % PARTS * LANES);
            EACH(i, M) {
                float *sum = sums + i * T * OUTPUTS + r * LANES;
                store_floats(sum, add_scaled(load_floats(sum), acc[r][i], times(scale, x_scales[i])));
            }
        }
        shifts += M;
        x_scales += M;
        scales += OUTPUTS;
    }
}

/* ---- the loops above with every number known to the compiler ---- */

#define CASE(T, M, BITS)                                                                                               \
    case (T)*8 + (M): multiply(w, tile, x, start, T, M, BITS, sums); break;
#define CASES4(T, BITS) CASE(T, 1, BITS) CASE(T, 2, BITS) CASE(T, 3, BITS) CASE(T, 4, BITS)
#if LANES == 16
#define CASES6(T, BITS) CASES4(T, BITS) CASE(T, 5, BITS) CASE(T, 6, BITS)
#define CASES(BITS) CASES6(1, BITS) CASES6(4, BITS)
#elif LANES == 8
#define CASES(BITS) CASES4(1, BITS)
#else
#define CASES(BITS) CASE(1, 1, BITS) CASE(1, 2, BITS)
#endif

#define DEFINE(NAME, BITS)                                                                                             \
    static void NAME(const Weights *w, long tile, const Activations *x, int start, int T, int M, float *sums) {        \
        switch (T * 8 + M) { CASES(BITS) }                                                                             \
    }

typedef void Product(const Weights *, long, const Activations *, int, int, int, float *);
DEFINE(multiply_8_bits, 8)
DEFINE(multiply_4_bits, 4)

/* y is float32 where `wide`, else bfloat16 */
INLINE void store(const Weights *w, long tile, int T, int row, int M, void *y, int wide, const float *sums) {
    long first = tile * OUTPUTS, count = w->n - first < T * OUTPUTS ? w->n - first : T * OUTPUTS;
    for (int i = 0; i < M; i++) {
        const float *from = sums + i * T * OUTPUTS;
        size_t at = (size_t)(row + i) * w->n + first;
        if (wide) memcpy((float *)y + at, from, count * sizeof *from);
        else
            for (long o = 0; o < count; o++) ((uint16_t *)y)[at + o] = narrow(from[o]);
    }
}

static void multiply_all(const Weights *w, const Activations *x, void *y, int wide, int threads) {
    Product *product = w->bits == 8 ? multiply_8_bits : multiply_4_bits;
    long tiles = (w->n + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long first = 0; first < tiles; first += TILES) {
        int T = tiles - first >= TILES ? TILES : 1;
        for (int block = 0; block < x->blocks; block++) {
            int start = first_row(x, block), M = first_row(x, block + 1) - start;
            for (long tile = first; tile < tiles && tile < first + TILES; tile += T) {
                float sums[MOST_ROWS * TILES * OUTPUTS];
                product(w, tile, x, start, T, M, sums);
                store(w, tile, T, start, M, y, wide, sums);
            }
        }
    }
}

/* ---- entries ---- */

/* Say whether many rows are multiplied faster here than expanded weights by others. */
int tiles_take_many(void) {
#ifdef HAS_FAST_PRODUCTS
    return 1;
#else
    return 0;
#endif
}

/* Return 1 where no memory is left. */
int tiles_multiply(const uint8_t *values, const uint16_t *scales, const uint16_t *x, void *y, int wide, long n, long k,
                   long group, int bits, int m, int threads) {
    Weights w = {values, scales, bits, n, k, group};
    Activations rounded = {.bits = bits == 8 ? 16 : 8, .m = m, .k = k, .group = group};
    int has_room = round_activations(&rounded, x, MOST_ROWS, 1 << (bits - 1), threads);
    if (has_room) multiply_all(&w, &rounded, y, wide, threads);
    free_activations(&rounded);
    return !has_room;
}

/* Write tiles as bfloat16, (16 tiles, k), for a product with many rows that others compute. */
void tiles_expand(const uint8_t *values, const uint16_t *scales, uint16_t *out, long tiles, long k, long group, int bits,
                  int threads) {
    Weights w = {values, scales, bits, tiles * OUTPUTS, k, group};
    long inputs = bits == 4 ? 8 : 4;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < w.n; row++) {
        long tile = row / OUTPUTS, o = row % OUTPUTS;
        const uint8_t *from = values + tile * values_of_tile(&w) + o * 4;
        const uint16_t *scale = scales + tile * scales_of_tile(&w) + o;
        for (long at = 0; at < k; at += inputs) {
            const uint8_t *bytes = from + at / inputs * LINE;
            float s = widen(scale[at / group * OUTPUTS]);
            for (int j = 0; j < inputs; j++) {
                int q = bits == 8 ? bytes[j] - 128 : ((bytes[j % 4] >> (j / 4 * 4)) & 15) - 8;
                out[row * k + at + j] = narrow((float)q * s);
            }
        }
    }
}
