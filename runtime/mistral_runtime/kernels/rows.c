/* y = x W^T for a few rows of x: what decoding is made of. One pass over the weights at the speed of the memory.
 *
 * Plain C with OpenMP, compiled on the machine that runs it (see build.py), because no operator of torch was found that
 * reads bfloat16 or 4-bit weights as fast as the memory gives them (docs/decisions/0009-kernels-of-our-own.md). A row of x
 * goes through the same operations in the same order however many rows there are: what a sequence gets does not
 * depend on what is computed beside it.
 *
 *   bf16   weights as published, bit for bit; products summed in float32.
 *   int8   weights q s; activations rounded to 16 bits, a scale per group.
 *   int4   weights (q - 8) s; activations rounded to 8 bits, a scale per group. 128 weights are 64 bytes: the low half of
 *          byte i is weight i, the high half weight 64 + i.
 *
 * So activations are always rounded 16 times finer than, or as finely as, the weights beside them need, and the sums over a
 * group are exact integers.
 *
 * Shapes: n outputs, k inputs, m rows of x, groups of g along k. The caller has checked them: g is 64 or 128 and divides k,
 * which is a multiple of 128; for bf16 any k.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

/* So many rows and outputs at once keep all sums in registers; each load of a weight or an activation serves four. */
#define ROWS 4
#define OUTPUTS 4
#define INLINE static inline __attribute__((always_inline))
#define EACH(index, count) _Pragma("GCC unroll 4") for (int index = 0; index < (count); index++)

INLINE float widen(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

INLINE uint16_t narrow(float value) { /* to nearest, ties to even, as torch does */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#ifdef __AVX512BW__
INLINE __m512 widen16(const uint16_t *bits) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)bits));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

INLINE __m512i add_products16(__m512i sum, __m512i left, __m512i right) {
#ifdef __AVX512VNNI__
    return _mm512_dpwssd_epi32(sum, left, right);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(left, right));
#endif
}

/* left is 0..15, right -127..127: two products fit into 16 bits. */
INLINE __m512i add_products8(__m512i sum, __m512i left, __m512i right) {
#ifdef __AVX512VNNI__
    return _mm512_dpbusd_epi32(sum, left, right);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(left, right), _mm512_set1_epi16(1)));
#endif
}
#endif

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

INLINE void int8_block(const int8_t *w, const uint16_t *scale, const int16_t *x, const float *x_scale, long k, long g,
                       int R, int M, float *sums) {
    long groups = k / g;
#ifdef __AVX512BW__
    __m512 total[OUTPUTS][ROWS];
    EACH(r, R) EACH(i, M) total[r][i] = _mm512_setzero_ps();
    for (long b = 0; b < groups; b++) {
        __m512i acc[OUTPUTS][ROWS];
        EACH(r, R) EACH(i, M) acc[r][i] = _mm512_setzero_si512();
        for (long at = b * g; at < (b + 1) * g; at += 32) {
            __m512i weights[OUTPUTS];
            if (at % 64 == 0) EACH(r, R) _mm_prefetch((const char *)(w + (size_t)(r + R) * k + at), _MM_HINT_T1);
            EACH(r, R)
            weights[r] = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(w + (size_t)r * k + at)));
            EACH(i, M) {
                __m512i row = _mm512_loadu_si512(x + (size_t)i * k + at);
                EACH(r, R) acc[r][i] = add_products16(acc[r][i], weights[r], row);
            }
        }
        EACH(r, R) EACH(i, M) {
            float factor = widen(scale[r * groups + b]) * x_scale[(size_t)i * groups + b];
            total[r][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r][i]), _mm512_set1_ps(factor), total[r][i]);
        }
    }
    EACH(r, R) EACH(i, M) sums[r * ROWS + i] = _mm512_reduce_add_ps(total[r][i]);
#else
    EACH(r, R) EACH(i, M) {
        float sum = 0;
        for (long b = 0; b < groups; b++) {
            int32_t dot = 0;
            for (long at = b * g; at < (b + 1) * g; at++)
                dot += (int32_t)w[(size_t)r * k + at] * x[(size_t)i * k + at];
            sum += (float)dot * (widen(scale[r * groups + b]) * x_scale[(size_t)i * groups + b]);
        }
        sums[r * ROWS + i] = sum;
    }
#endif
}

/* Weights are taken as 0..15; x_shift, -8 times the sum of each group of x, is what that is too much. */
INLINE void int4_block(const uint8_t *w, const uint16_t *scale, const int8_t *x, const float *x_scale,
                       const float *x_shift, long k, long g, int R, int M, float *sums) {
    long groups = k / g, per_block = 128 / g;
#ifdef __AVX512BW__
    const __m512i low = _mm512_set1_epi8(15);
    __m512 total[OUTPUTS][ROWS];
    EACH(r, R) EACH(i, M) total[r][i] = _mm512_setzero_ps();
    long b = 0;
    for (; b + 16 <= groups; b += 16)
        EACH(r, R) {
            __m512 scales = widen16(scale + r * groups + b);
            EACH(i, M) {
                __m512 shifts = _mm512_loadu_ps(x_shift + (size_t)i * groups + b);
                total[r][i] = _mm512_fmadd_ps(scales, shifts, total[r][i]);
            }
        }
    for (; b < groups; b++)
        EACH(r, R) EACH(i, M) {
            float shift = widen(scale[r * groups + b]) * x_shift[(size_t)i * groups + b];
            total[r][i] = _mm512_add_ps(total[r][i], _mm512_zextps128_ps512(_mm_set_ss(shift)));
        }
    for (long block = 0; block < k / 128; block++) {
        __m512i acc[OUTPUTS][ROWS], halves[2][OUTPUTS];
        EACH(r, R) {
            const uint8_t *at = w + (size_t)r * (k / 2) + block * 64;
            __m512i bytes = _mm512_loadu_si512(at);
            _mm_prefetch((const char *)(at + (size_t)R * (k / 2)), _MM_HINT_T1);
            halves[0][r] = _mm512_and_si512(bytes, low);
            halves[1][r] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
        }
        EACH(half, 2) {
            EACH(i, M) {
                __m512i row = _mm512_loadu_si512(x + (size_t)i * k + block * 128 + half * 64);
                EACH(r, R) {
                    __m512i from = half == 0 || per_block == 2 ? _mm512_setzero_si512() : acc[r][i];
                    acc[r][i] = add_products8(from, halves[half][r], row);
                }
            }
            if (half == 0 && per_block == 1) continue;
            long group = block * per_block + (per_block == 2 ? half : 0);
            EACH(r, R) {
                __m512 weight_scale = _mm512_set1_ps(widen(scale[r * groups + group]));
                EACH(i, M) {
                    __m512 row_scale = _mm512_set1_ps(x_scale[(size_t)i * groups + group]);
                    __m512 products = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[r][i]), row_scale);
                    total[r][i] = _mm512_fmadd_ps(products, weight_scale, total[r][i]);
                }
            }
        }
    }
    EACH(r, R) EACH(i, M) sums[r * ROWS + i] = _mm512_reduce_add_ps(total[r][i]);
#else
    (void)per_block;
    EACH(r, R) EACH(i, M) {
        float sum = 0;
        for (long b = 0; b < groups; b++) {
            int32_t dot = 0;
            for (long at = b * g; at < (b + 1) * g; at++) {
                uint8_t pair = w[(size_t)r * (k / 2) + at / 128 * 64 + at % 64];
                dot += (at % 128 < 64 ? pair & 15 : pair >> 4) * (int32_t)x[(size_t)i * k + at];
            }
            float scaled = (float)dot * x_scale[(size_t)i * groups + b] + x_shift[(size_t)i * groups + b];
            sum += scaled * widen(scale[r * groups + b]);
        }
        sums[r * ROWS + i] = sum;
    }
#endif
}

/* ---- activations as integers ---- */

/* Return a group's largest magnitude; not finite where one of its values is not. */
INLINE float largest_of(const uint16_t *x, long g) {
    uint16_t largest = 0; /* without its sign, a bfloat16 is ordered as the integer of its bits */
    for (long l = 0; l < g; l++) {
        uint16_t magnitude = x[l] & 0x7fff;
        largest = magnitude > largest ? magnitude : largest;
    }
    return widen(largest);
}

/* Below this the inverse of a group's scale would overflow; products of such a group vanish beside any other. */
#define LEAST 1e-30f

/* Infinity and NaN make the whole group NaN, which is looked for in the logits. */
#define ROUND_GROUPS(TYPE, TOP)                                                                                        \
    for (long b = 0; b < count; b++) {                                                                                 \
        const uint16_t *from = x + b * g;                                                                              \
        float largest = largest_of(from, g);                                                                           \
        float inverse = largest >= LEAST && isfinite(largest) ? (TOP) / largest : 0;                                   \
        int32_t sum = 0;                                                                                               \
        for (long l = 0; l < g; l++) {                                                                                 \
            float scaled = inverse != 0 ? widen(from[l]) * inverse : 0;                                                \
            TYPE value = (TYPE)(int32_t)(scaled + copysignf(0.5f, scaled));                                            \
            q[b * g + l] = value;                                                                                      \
            sum += value;                                                                                              \
        }                                                                                                              \
        scales[b] = isfinite(largest) ? largest / (TOP) : NAN;                                                         \
        if (shifts) shifts[b] = -8.0f * (float)sum * scales[b];                                                        \
    }

static void round_to_16(const uint16_t *x, long count, long g, int16_t *q, float *scales, float *shifts) {
    ROUND_GROUPS(int16_t, 32767.0f)
}

static void round_to_8(const uint16_t *x, long count, long g, int8_t *q, float *scales, float *shifts) {
    ROUND_GROUPS(int8_t, 127.0f)
}

/* ---- entries: y is float32 where `wide`, else bfloat16; 1 is returned where no memory is left ---- */

#define FOR_SHAPE(R, M, CALL)                                                                                          \
    switch ((R)*8 + (M)) {                                                                                             \
    case 4 * 8 + 1: CALL(4, 1); break;                                                                                 \
    case 4 * 8 + 2: CALL(4, 2); break;                                                                                 \
    case 4 * 8 + 3: CALL(4, 3); break;                                                                                 \
    case 4 * 8 + 4: CALL(4, 4); break;                                                                                 \
    case 1 * 8 + 1: CALL(1, 1); break;                                                                                 \
    case 1 * 8 + 2: CALL(1, 2); break;                                                                                 \
    case 1 * 8 + 3: CALL(1, 3); break;                                                                                 \
    case 1 * 8 + 4: CALL(1, 4); break;                                                                                 \
    }

INLINE void store(void *y, int wide, long n, long output, int outputs, int row, int rows, const float *sums) {
    for (int i = 0; i < rows; i++)
        for (int r = 0; r < outputs; r++) {
            size_t at = (size_t)(row + i) * n + output + r;
            if (wide) ((float *)y)[at] = sums[r * ROWS + i];
            else ((uint16_t *)y)[at] = narrow(sums[r * ROWS + i]);
        }
}

/* Four outputs at a time, the last few one by one; rows in fours, so that weights come from memory once. */
#define FOR_ALL(CALL)                                                                                                  \
    _Pragma("omp parallel for num_threads(threads) schedule(static)") for (long start = 0; start < n;                 \
                                                                           start += OUTPUTS) {                         \
        int outputs = n - start >= OUTPUTS ? OUTPUTS : 1;                                                              \
        for (long output = start; output < n && output < start + OUTPUTS; output += outputs)                           \
            for (int row = 0; row < m; row += ROWS) {                                                                  \
                int rows = m - row < ROWS ? m - row : ROWS;                                                            \
                float sums[OUTPUTS * ROWS] = {0};                                                                          \
                FOR_SHAPE(outputs, rows, CALL)                                                                         \
                store(y, wide, n, output, outputs, row, rows, sums);                                                   \
            }                                                                                                          \
    }

int rows_bf16(const uint16_t *w, const uint16_t *x, void *y, int wide, long n, long k, int m, int threads) {
#define ONE(R, M) bf16_block(w + output * k, x + (size_t)row * k, k, R, M, sums)
    FOR_ALL(ONE)
#undef ONE
    return 0;
}

static void *room(size_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

int rows_int8(const int8_t *w, const uint16_t *scale, const uint16_t *x, void *y, int wide, long n, long k, long g, int m,
              int threads) {
    long groups = k / g;
    int16_t *q = room((size_t)m * k * sizeof *q);
    float *scales = room((size_t)m * groups * sizeof *scales);
    if (q && scales) {
        round_to_16(x, m * groups, g, q, scales, NULL);
#define ONE(R, M)                                                                                                      \
    int8_block(w + output * k, scale + output * groups, q + (size_t)row * k, scales + (size_t)row * groups, k, g, R, M, sums)
        FOR_ALL(ONE)
#undef ONE
    }
    int failed = !q || !scales;
    free(q);
    free(scales);
    return failed;
}

int rows_int4(const uint8_t *w, const uint16_t *scale, const uint16_t *x, void *y, int wide, long n, long k, long g, int m,
              int threads) {
    long groups = k / g;
    int8_t *q = room((size_t)m * k);
    float *scales = room((size_t)m * groups * 2 * sizeof *scales);
    if (q && scales) {
        float *shifts = scales + m * groups;
        round_to_8(x, m * groups, g, q, scales, shifts);
#define ONE(R, M)                                                                                                      \
    int4_block(w + output * (k / 2), scale + output * groups, q + (size_t)row * k, scales + (size_t)row * groups,      \
               shifts + (size_t)row * groups, k, g, R, M, sums)
        FOR_ALL(ONE)
#undef ONE
    }
    int failed = !q || !scales;
    free(q);
    free(scales);
    return failed;
}

/* ---- weights as bfloat16, rows first..first+count, for products of many rows ---- */

void expand_int8(const int8_t *w, const uint16_t *scale, uint16_t *out, long first, long count, long k, long g,
                 int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < count; row++)
        for (long b = 0; b < k / g; b++) {
            const int8_t *from = w + (first + row) * k + b * g;
            float s = widen(scale[(first + row) * (k / g) + b]);
            for (long l = 0; l < g; l++) out[row * k + b * g + l] = narrow((float)from[l] * s);
        }
}

void expand_int4(const uint8_t *w, const uint16_t *scale, uint16_t *out, long first, long count, long k, long g,
                 int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < count; row++)
        for (long half = 0; half < k / 64; half++) {
            const uint8_t *from = w + (first + row) * (k / 2) + half / 2 * 64;
            float s = widen(scale[(first + row) * (k / g) + half * 64 / g]);
            int shift = half % 2 * 4;
            for (long l = 0; l < 64; l++) out[row * k + half * 64 + l] = narrow((float)(((from[l] >> shift) & 15) - 8) * s);
        }
}
