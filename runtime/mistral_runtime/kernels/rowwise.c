/* What a layer does between its products, each in one pass: norms, rotations, gates.
 *
 * Everything is bfloat16 in memory and float32 in registers, rounded where the torch code beside it rounds. A row goes
 * through the same operations in the same order whatever rows are beside it and however many threads there are.
 *
 * Loops over LANES values are written for a compiler to make vectors of.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "bfloat16.h"

#define LANES 16
#define BLOCK 4096 /* values that a thread takes at once */
#define MANY_VALUES 12000 /* from here on a second thread gains more than it takes to wake it */

#ifdef __FMA__
#define MULTIPLY_ADD __builtin_fmaf /* one instruction; elsewhere it may be a call */
#else
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif

/* Return e to the power of x; e^-87 below -87, infinity above 88. NaN stays NaN. Off by 3e-6 of it at most, which is a
 * thousandth of what bfloat16 can tell apart. */
INLINE float exponential(float x) {
    int is_large = x > 88.0f;
    x = x < -87.0f ? -87.0f : x;
    x = is_large ? 0 : x;
    float n = MULTIPLY_ADD(x, 1.44269504f, 12582912.0f) - 12582912.0f; /* adding 1.5 * 2^23 rounds to an integer */
    float f = MULTIPLY_ADD(n, -0.693147181f, x); /* ln 2 */
    float p = 1 / 120.0f;
    p = MULTIPLY_ADD(p, f, 1 / 24.0f);
    p = MULTIPLY_ADD(p, f, 1 / 6.0f);
    p = MULTIPLY_ADD(p, f, 0.5f);
    p = MULTIPLY_ADD(p, f, 1.0f);
    p = MULTIPLY_ADD(p, f, 1.0f);
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return is_large ? INFINITY : p * power;
}

/* sums = x + added, where there is something to add; normed = sums / rms(sums) * weight. */
static void norm_row(const uint16_t *x, const uint16_t *added, const uint16_t *weight, uint16_t *sums, uint16_t *normed,
                     long dim, float eps) {
    if (added) {
        for (long i = 0; i < dim; i++) sums[i] = narrow(widen(x[i]) + widen(added[i]));
        x = sums;
    }
    float lanes[LANES] = {0}, total = 0;
    long whole = dim / LANES * LANES;
    for (long i = 0; i < whole; i += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] += widen(x[i + l]) * widen(x[i + l]);
    for (long i = whole; i < dim; i++) total += widen(x[i]) * widen(x[i]);
    for (int l = 0; l < LANES; l++) total += lanes[l];
    float factor = 1 / sqrtf(total / (float)dim + eps);
    for (long i = 0; i < dim; i++) normed[i] = narrow(widen(narrow(widen(x[i]) * factor)) * widen(weight[i]));
}

/* x, added, sums and normed (rows, dim); without `added` nothing is written to `sums`. */
void norm_bf16(const uint16_t *x, const uint16_t *added, const uint16_t *weight, uint16_t *sums, uint16_t *normed,
               long rows, long dim, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && rows * dim >= MANY_VALUES)
    for (long row = 0; row < rows; row++)
        norm_row(x + row * dim, added ? added + row * dim : NULL, weight, sums + row * dim, normed + row * dim, dim, eps);
}

/* Rotate the pairs of each of `heads` heads of one position; cos and sin (d) as rope.py makes them. */
static void rotate(const uint16_t *x, const float *cos, const float *sin, uint16_t *turned, long heads, long d) {
    for (long head = 0; head < heads; head++, x += d, turned += d)
        for (long i = 0; i < d; i += 2) {
            float even = widen(x[i]), odd = widen(x[i + 1]);
            turned[i] = narrow(even * cos[i] + odd * sin[i]);
            turned[i + 1] = narrow(odd * cos[i + 1] + even * sin[i + 1]);
        }
}

/* q and turned_q (rows, heads, d), k and turned_k (rows, kv_heads, d); cos and sin (positions, d), of which row r has
 * the one at r mod positions: a batch's sequences stand at the same positions. */
void rope_bf16(const uint16_t *q, const uint16_t *k, const float *cos, const float *sin, uint16_t *turned_q,
               uint16_t *turned_k, long rows, long positions, long heads, long kv_heads, long d, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && rows * heads * d >= MANY_VALUES)
    for (long row = 0; row < rows; row++) {
        long angles = row % positions * d;
        rotate(q + row * heads * d, cos + angles, sin + angles, turned_q + row * heads * d, heads, d);
        rotate(k + row * kv_heads * d, cos + angles, sin + angles, turned_k + row * kv_heads * d, kv_heads, d);
    }
}

static void gate(const uint16_t *a, const uint16_t *b, uint16_t *gated, long count) {
    for (long i = 0; i < count; i++) {
        float x = widen(a[i]);
        gated[i] = narrow(widen(narrow(x / (1 + exponential(-x)))) * widen(b[i]));
    }
}

/* gated = silu(a) * b, value by value. */
void gate_bf16(const uint16_t *a, const uint16_t *b, uint16_t *gated, long count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && count >= MANY_VALUES)
    for (long first = 0; first < count; first += BLOCK)
        gate(a + first, b + first, gated + first, count - first < BLOCK ? count - first : BLOCK);
}
