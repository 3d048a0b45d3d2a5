/* y = x W^T with quantised weights in tiles of 16 outputs, whose sums lie side by side in registers.
 *
 * A tile is a row of lines of 64 bytes, four bytes for each of the 16 outputs, which are read from the first to the last:
 * no sum goes across a register, and a group's scales serve 16 outputs at once.
 *
 *   8 bits  a line holds 4 inputs; byte j of output o is weight q + 128 of input j.
 *   4 bits  a line holds 8 inputs; byte j of output o is q + 8 of input j in its low half and of input 4 + j in its high half.
 *   scales  bfloat16, by tile, group and output.
 *
 * Activations are integers of 16 or 8 bits with a scale per group (activations.h), so the sums of a group are exact. A row
 * of x goes through the same operations in the same order however many rows there are: what a sequence gets does not
 * depend on what is computed beside it.
 *
 * Shapes: n outputs, k inputs, m rows of x. The caller has checked them: groups of weights are 64 or 128 and divide k, a
 * multiple of 128; groups of activations divide those. The last tile is whole; what it has beyond n is not looked at.
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

/* Return one half of a line as unsigned bytes (4 bits) or pairs (16-bit activations), or the whole line as bytes. */
INLINE ints part_of_line(const uint8_t *at, int half, int weight_bits, int x_bits) {
    ints line = load_ints(at);
    if (weight_bits == 8 && x_bits == 8) return line;
    if (half == 1) line = pairs_down(line, weight_bits == 4 ? 4 : 8);
    if (weight_bits == 8 && half == 1) return line;
    return both(line, all_ints(weight_bits == 4 ? 0x0f0f0f0f : 0x00ff00ff));
}

INLINE ints four_bytes(const void *at) {
    int32_t bytes;
    memcpy(&bytes, at, 4);
    return all_ints(bytes);
}

/* Multiply T tiles by a block of M rows; the sum for row i and output o of tile t is sums[(i T + t) 16 + o]. */
INLINE void multiply(const Weights *w, long tile, const Activations *x, int start, int T, int M, int weight_bits,
                     int x_bits, float *sums) {
    const int registers = T * PARTS, halves = weight_bits == 4 || x_bits == 16 ? 2 : 1;
    const long inputs = weight_bits == 4 ? 8 : 4, groups = x->k / x->group, per_scale = w->group / x->group;
    const size_t next_values = values_of_tile(w), next_scales = scales_of_tile(w);
    const uint8_t *line = w->values + tile * next_values;
    const uint16_t *scales = w->scales + tile * next_scales;
    const uint8_t *integers = (const uint8_t *)x->integers + (size_t)start * x->k * x_bits / 8;
    const float *x_scales = x->scales + (size_t)start * groups;
    const int32_t *shifts = x->shifts + (size_t)start * groups;

    for (int j = 0; j < M * T * OUTPUTS; j++) sums[j] = 0;
    for (long b = 0; b < groups; b++) {
        ints acc[TILES * PARTS][MOST_ROWS];
        EACH(i, M) EACH(r, registers) acc[r][i] = all_ints(shifts[i]);
        for (long l = 0; l < x->group / inputs; l++) {
            EACH(t, T) __builtin_prefetch(line + t * next_values + AHEAD, 0, 3);
            EACH(half, halves) {
                ints weights[TILES * PARTS];
                EACH(r, registers) {
                    const uint8_t *at = line + r / PARTS * next_values + r % PARTS * LANES * 4;
                    weights[r] = part_of_line(at, half, weight_bits, x_bits);
                }
                EACH(i, M) {
                    ints row = four_bytes(x_bits == 16 ? integers + i * 8 + half * 4 : integers + (half * M + i) * 4);
                    EACH(r, registers)
                    acc[r][i] = x_bits == 16 ? add_pairs(acc[r][i], weights[r], row) : add_fours(acc[r][i], weights[r], row);
                }
            }
            integers += M * inputs * (x_bits / 8);
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
        if ((b + 1) % per_scale == 0) scales += OUTPUTS;
    }
}

/* ---- the loops above with every number known to the compiler ---- */

#define CASE(T, M, W, X)                                                                                               \
    case (T)*8 + (M): multiply(w, tile, x, start, T, M, W, X, sums); break;
#if LANES == 16
#define CASES4(T, W, X) CASE(T, 1, W, X) CASE(T, 2, W, X) CASE(T, 3, W, X) CASE(T, 4, W, X)
#define CASES_WIDE(W, X) CASES4(1, W, X) CASES4(4, W, X)
#define CASES(W, X) CASES_WIDE(W, X) CASE(1, 5, W, X) CASE(1, 6, W, X) CASE(4, 5, W, X) CASE(4, 6, W, X)
#elif LANES == 8
#define CASES(W, X) CASE(1, 1, W, X) CASE(1, 2, W, X) CASE(1, 3, W, X) CASE(1, 4, W, X)
#define CASES_WIDE CASES
#else
#define CASES(W, X) CASE(1, 1, W, X) CASE(1, 2, W, X)
#define CASES_WIDE CASES
#endif

#define DEFINE(NAME, CASES, W, X)                                                                                      \
    static void NAME(const Weights *w, long tile, const Activations *x, int start, int T, int M, float *sums) {        \
        switch (T * 8 + M) { CASES(W, X) }                                                                             \
    }

typedef void Product(const Weights *, long, const Activations *, int, int, int, float *);
DEFINE(eight_by_16, CASES_WIDE, 8, 16)
DEFINE(four_by_8, CASES, 4, 8)
#ifdef HAS_FOURS
DEFINE(eight_by_8, CASES, 8, 8)
#endif

static Product *product_of(const Weights *w, const Activations *x) {
    if (w->bits == 4) return four_by_8;
#ifdef HAS_FOURS
    if (x->bits == 8) return eight_by_8;
#endif
    return eight_by_16;
}

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
    Product *product = product_of(w, x);
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

/* Say whether 8-bit weights can meet 8-bit activations, and many rows are worth multiplying here. */
int tiles_take_many(void) {
#ifdef HAS_FOURS
    return 1;
#else
    return 0;
#endif
}

/* Return 1 where no memory is left. */
int tiles_multiply(const uint8_t *values, const uint16_t *scales, const uint16_t *x, void *y, int wide, long n, long k,
                   long group, int bits, int x_bits, long x_group, int m, int threads) {
    Weights w = {values, scales, bits, n, k, group};
    Activations rounded = {.bits = x_bits, .m = m, .k = k, .group = x_group};
    int most = x_bits == 16 ? MOST_WIDE_ROWS : MOST_ROWS;
    int has_room = round_activations(&rounded, x, most, 1 << (bits - 1), threads);
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
