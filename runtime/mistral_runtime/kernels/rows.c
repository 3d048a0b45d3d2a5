/* y = x W^T for a few rows of x and weights in bfloat16, as published bit for bit: what decoding is made of. One pass over the
 * weights at the speed of the memory; products are summed in float32.
 *
 * Plain C with OpenMP, compiled on the machine that runs it (see build.py), because no operator of torch was found that
 * reads bfloat16 or 4-bit weights as fast as the memory gives them (docs/decisions/0009-kernels-of-our-own.md). A row of x
 * goes through the same operations in the same order however many rows there are: what a sequence gets does not
 * depend on what is computed beside it.
 *
 * Shapes: n outputs, k inputs, m rows of x. The caller has checked them.
 */
#include <stddef.h>

#include "bfloat16.h"

/* So many rows and outputs at once keep all sums in registers; each load of a weight or an activation serves four. */
#define ROWS 4
#define OUTPUTS 4

/* ---- R outputs of M rows; sums[r * ROWS + i] is what comes out ---- */

INLINE void bf16_block(const uint16_t *w, const uint16_t *x, long k, int R, int M, float *sums) {
    long at = 0;
#ifdef __AVX512BW__
    __m512 acc[OUTPUTS][ROWS];
    EACH(r, R) EACH(i, M) acc[r][i] = _mm512_setzero_ps();
#ifdef __AVX512BF16__
    for (; at + 32 <= k; at += 32) {
        __m512bh weights[OUTPUTS];
        EACH(r, R) weights[r] = (__m512bh)_mm512_loadu_si512(w + (size_t)r * k + at);
        EACH(r, R) _mm_prefetch((const char *)(w + (size_t)(r + R) * k + at), _MM_HINT_T1);
        EACH(i, M) {
            __m512bh row = (__m512bh)_mm512_loadu_si512(x + (size_t)i * k + at);
            EACH(r, R) acc[r][i] = _mm512_dpbf16_ps(acc[r][i], weights[r], row);
        }
    }
#else
    for (; at + 16 <= k; at += 16) {
        __m512 weights[OUTPUTS];
        EACH(r, R) weights[r] = widen16(w + (size_t)r * k + at);
        EACH(i, M) {
            __m512 row = widen16(x + (size_t)i * k + at);
            EACH(r, R) acc[r][i] = _mm512_fmadd_ps(weights[r], row, acc[r][i]);
        }
    }
#endif
    EACH(r, R) EACH(i, M) sums[r * ROWS + i] = _mm512_reduce_add_ps(acc[r][i]);
#else
    float acc[OUTPUTS][ROWS][16] = {{{0}}};
    for (; at + 16 <= k; at += 16)
        EACH(r, R) EACH(i, M) for (int l = 0; l < 16; l++)
            acc[r][i][l] += widen(w[(size_t)r * k + at + l]) * widen(x[(size_t)i * k + at + l]);
    EACH(r, R) EACH(i, M) {
        sums[r * ROWS + i] = 0;
        for (int l = 0; l < 16; l++) sums[r * ROWS + i] += acc[r][i][l];
    }
#endif
    for (; at < k; at++)
        EACH(r, R) EACH(i, M) sums[r * ROWS + i] += widen(w[(size_t)r * k + at]) * widen(x[(size_t)i * k + at]);
}

#define CASE(R, M)                                                                                                     \
    case (R)*8 + (M): bf16_block(w, x, k, R, M, sums); break;

static void multiply(const uint16_t *w, const uint16_t *x, long k, int outputs, int rows, float *sums) {
    switch (outputs * 8 + rows) {
        CASE(4, 1) CASE(4, 2) CASE(4, 3) CASE(4, 4) CASE(1, 1) CASE(1, 2) CASE(1, 3) CASE(1, 4)
    }
}

INLINE void store(void *y, int wide, long n, long output, int outputs, int row, int rows, const float *sums) {
    for (int i = 0; i < rows; i++)
        for (int r = 0; r < outputs; r++) {
            size_t at = (size_t)(row + i) * n + output + r;
            if (wide) ((float *)y)[at] = sums[r * ROWS + i];
            else ((uint16_t *)y)[at] = narrow(sums[r * ROWS + i]);
        }
}

/* Four outputs at a time, the last few one by one; rows in fours, so that weights come from memory once. y is float32 where
 * `wide`, else bfloat16. */
void rows_bf16(const uint16_t *w, const uint16_t *x, void *y, int wide, long n, long k, int m, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long start = 0; start < n; start += OUTPUTS) {
        int outputs = n - start >= OUTPUTS ? OUTPUTS : 1;
        for (long output = start; output < n && output < start + OUTPUTS; output += outputs)
            for (int row = 0; row < m; row += ROWS) {
                int rows = m - row < ROWS ? m - row : ROWS;
                float sums[OUTPUTS * ROWS] = {0};
                multiply(w + (size_t)output * k, x + (size_t)row * k, k, outputs, rows, sums);
                store(y, wide, n, output, outputs, row, rows, sums);
            }
    }
}
