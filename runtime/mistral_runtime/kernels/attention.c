/* What queries gather from the keys and values of a cache: softmax(q kT / sqrt(d)) v, one pass over the cache.
 *
 * The H/K query heads that share a key head, of all T new positions, are rows that go over its keys together, four at a
 * time. Positions are taken in chunks of CHUNK, counted from the first slot, each with a maximum and a sum of its own; the
 * chunks are then joined (Dao et al. 2023, "Flash-Decoding"). So threads share even one head's cache, and a
 * row goes through the same operations in the same order however many rows and threads there are. A position that is
 * hidden from a row adds zeros to it, so a row gets bit for bit what it would get if it were alone.
 *
 * Products are of bfloat16, sums and exponentials of float32. A weight of the softmax is rounded to bfloat16, and what
 * the weights are divided by is the sum of the rounded ones: they add up to one.
 *
 * A call is for the rows of many sequences, each with a cache of its own. A sequence's new keys and values are stored by
 * whoever goes over the slots they belong in, just before, so that nobody waits for anybody.
 *
 * Shapes: q (T, H, D) with the rows of all sequences, out likewise; new keys and values (T, K, D); a cache's (K, C, D) with
 * rows of D side by side, of which S are seen; visible (T, S) for a sequence's own T, a byte each, or none where
 * everything can be seen.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "bfloat16.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_BF16_PRODUCTS 1
#endif

#define CHUNK 256 /* keys and values of 128 dimensions: 128 KB, which stay in the second-level cache for all rows */
#define ROWS 4
#define POSITIONS 32 /* new positions at once: what the partial results of a long prompt's chunk may take is bounded */
#define MOST_DIMENSIONS 512
#define FLOATS_PER_LINE 16

/* Keys and values are of bfloat16, or of 8 bits with a scale per position that is multiplied in later. */
INLINE float value_at(const void *values, long at, int is_int8) {
    return is_int8 ? (float)((const int8_t *)values)[at] : widen(((const uint16_t *)values)[at]);
}
INLINE const void *behind(const void *values, long n, int is_int8) { return (const char *)values + n * (is_int8 ? 1 : 2); }

#ifdef HAS_BF16_PRODUCTS
/* Return 32 values from `at` on, as bfloat16, which holds every integer of 8 bits. */
INLINE __m512i load32(const void *values, long at, int is_int8) {
    if (!is_int8) return _mm512_loadu_si512((const uint16_t *)values + at);
    __m256i bytes = _mm256_loadu_si256((const __m256i *)((const int8_t *)values + at));
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

/* Return the sums of sixteen registers, in their order. */
INLINE __m512 sums_of_16(const __m512 *a) {
    __m512 fours[4];
    EACH(i, 4) {
        __m512 left = _mm512_add_ps(_mm512_unpacklo_ps(a[4 * i], a[4 * i + 1]), _mm512_unpackhi_ps(a[4 * i], a[4 * i + 1]));
        __m512 right =
            _mm512_add_ps(_mm512_unpacklo_ps(a[4 * i + 2], a[4 * i + 3]), _mm512_unpackhi_ps(a[4 * i + 2], a[4 * i + 3]));
        __m512d l = _mm512_castps_pd(left), r = _mm512_castps_pd(right);
        fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(l, r)), _mm512_castpd_ps(_mm512_unpackhi_pd(l, r)));
    }
#define JOIN(x, y) _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd))
    __m512 low = JOIN(fours[0], fours[1]), high = JOIN(fours[2], fours[3]);
    return JOIN(low, high);
#undef JOIN
}

/* Return e to the power of x <= 0, zero far below; within 2 units in the last place. NaN stays NaN. */
INLINE __m512 exp16(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x); /* the second operand is what comes of NaN */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x); /* ln 2 in two parts */
    f = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), f);
    static const float terms[] = {1 / 720.0f, 1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 0.5f, 1.0f, 1.0f};
    __m512 p = _mm512_set1_ps(1 / 5040.0f);
    for (int i = 0; i < 7; i++) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(terms[i]));
    return _mm512_scalef_ps(p, n);
}
#endif

/* scores[i * CHUNK + j] = scale * q_i k_j. A few behind the last key may be written: the caller hides them.
 * Meanwhile `next`, values of the same positions, is asked of the memory: arithmetic and waiting then overlap. */
INLINE void score(const uint16_t *q, const void *k, const void *next, long count, long d, float scale, int M, int is_int8,
                  float *scores) {
#ifdef HAS_BF16_PRODUCTS
    if (d % 64 == 0) {
        for (long j = 0; j < count; j += 4) {
            __m512 acc[16];
            EACH(a, 16) acc[a] = _mm512_setzero_ps();
            const void *key[4];
            EACH(c, 4) key[c] = behind(k, (j + c < count ? j + c : count - 1) * d, is_int8);
            for (long at = 0; at < d; at += 32) {
                __m512bh keys[4];
                EACH(c, 4) keys[c] = (__m512bh)load32(key[c], at, is_int8);
                EACH(c, 4) _mm_prefetch(behind(next, (j + c) * d + at, is_int8), _MM_HINT_T1);
                EACH(i, M) {
                    __m512bh row = (__m512bh)_mm512_loadu_si512(q + i * d + at);
                    EACH(c, 4) acc[4 * i + c] = _mm512_dpbf16_ps(acc[4 * i + c], keys[c], row);
                }
            }
            float sums[16];
            _mm512_storeu_ps(sums, _mm512_mul_ps(sums_of_16(acc), _mm512_set1_ps(scale)));
            EACH(i, M) memcpy(scores + i * CHUNK + j, sums + 4 * i, 16);
        }
        return;
    }
#endif
    (void)next;
    for (long j = 0; j < count; j++)
        EACH(i, M) {
            float lanes[FLOATS_PER_LINE] = {0}, sum = 0;
            long at = 0;
            for (; at + FLOATS_PER_LINE <= d; at += FLOATS_PER_LINE)
                for (int l = 0; l < FLOATS_PER_LINE; l++)
                    lanes[l] += widen(q[i * d + at + l]) * value_at(k, j * d + at + l, is_int8);
            for (; at < d; at++) sum += widen(q[i * d + at]) * value_at(k, j * d + at, is_int8);
            for (int l = 0; l < FLOATS_PER_LINE; l++) sum += lanes[l];
            scores[i * CHUNK + j] = sum * scale;
        }
}

/* Turn one row of scores into weights of bfloat16, relative to their largest, which is returned; and their sum. */
static float weigh(float *scores, const uint8_t *visible, long count, uint16_t *weights, float *sum) {
    float largest = -INFINITY;
    long padded = (count + FLOATS_PER_LINE - 1) / FLOATS_PER_LINE * FLOATS_PER_LINE;
    for (long j = count; j < padded; j++) scores[j] = -INFINITY;
    if (visible)
        for (long j = 0; j < count; j++) scores[j] = visible[j] ? scores[j] : -INFINITY;
    float lanes[FLOATS_PER_LINE] = {0}, tops[FLOATS_PER_LINE]; /* in lanes, which a compiler makes registers of */
    for (int l = 0; l < FLOATS_PER_LINE; l++) tops[l] = -INFINITY;
    for (long j = 0; j < padded; j += FLOATS_PER_LINE)
        for (int l = 0; l < FLOATS_PER_LINE; l++) tops[l] = scores[j + l] > tops[l] ? scores[j + l] : tops[l];
    for (int l = 0; l < FLOATS_PER_LINE; l++) largest = tops[l] > largest ? tops[l] : largest;
    float base = largest == -INFINITY ? 0 : largest; /* a chunk that is hidden as a whole weighs nothing */
    *sum = 0;
#ifdef HAS_BF16_PRODUCTS
    (void)lanes;
    __m512 total = _mm512_setzero_ps();
    for (long j = 0; j < padded; j += 16) {
        __m512 weight = exp16(_mm512_sub_ps(_mm512_loadu_ps(scores + j), _mm512_set1_ps(base)));
        __m256i rounded = (__m256i)_mm512_cvtneps_pbh(weight);
        _mm256_storeu_si256((__m256i *)(weights + j), rounded);
        total = _mm512_add_ps(total, widen16(weights + j));
    }
    *sum = _mm512_reduce_add_ps(total);
#else
    for (long j = 0; j < padded; j++) {
        weights[j] = narrow(expf(scores[j] - base));
        lanes[j % FLOATS_PER_LINE] += widen(weights[j]);
    }
    for (int l = 0; l < FLOATS_PER_LINE; l++) *sum += lanes[l];
#endif
    return largest;
}

/* mixed[i * d ..] = sum over j of weights[i * CHUNK + j] v_j. `next` is the keys behind these. */
INLINE void mix(const uint16_t *weights, const void *v, const void *next, long count, long d, int M, int is_int8,
                float *mixed) {
#ifdef HAS_BF16_PRODUCTS
    if (d % 64 == 0) {
        for (long at = 0; at < d; at += 64) {
            __m512 acc[ROWS][4];
            EACH(i, M) EACH(c, 4) acc[i][c] = _mm512_setzero_ps();
            for (long j = 0; j < count; j += 2) { /* the weight behind the last is zero */
                long even = j * d + at, odd = j + 1 < count ? even + d : even;
                __m512i e0 = load32(v, even, is_int8), e1 = load32(v, even + 32, is_int8);
                __m512i o0 = load32(v, odd, is_int8), o1 = load32(v, odd + 32, is_int8);
                EACH(c, 4) _mm_prefetch(behind(next, (j + c / 2) * d + at + c % 2 * 32, is_int8), _MM_HINT_T1);
                __m512bh pairs[4] = {
                    (__m512bh)_mm512_unpacklo_epi16(e0, o0), (__m512bh)_mm512_unpackhi_epi16(e0, o0),
                    (__m512bh)_mm512_unpacklo_epi16(e1, o1), (__m512bh)_mm512_unpackhi_epi16(e1, o1)};
                EACH(i, M) {
                    int32_t two;
                    memcpy(&two, weights + i * CHUNK + j, 4);
                    __m512bh both = (__m512bh)_mm512_set1_epi32(two);
                    EACH(c, 4) acc[i][c] = _mm512_dpbf16_ps(acc[i][c], pairs[c], both);
                }
            }
            /* Interleaving within 128 bits has left dimensions 0-3, 8-11, ... in one register, 4-7, 12-15, ... in the next. */
            const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
            const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
            EACH(i, M) EACH(c, 2) {
                float *to = mixed + i * d + at + 32 * c;
                _mm512_storeu_ps(to, _mm512_permutex2var_ps(acc[i][2 * c], first, acc[i][2 * c + 1]));
                _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(acc[i][2 * c], second, acc[i][2 * c + 1]));
            }
        }
        return;
    }
#endif
    (void)next;
    EACH(i, M) {
        for (long at = 0; at < d; at++) mixed[i * d + at] = 0;
        for (long j = 0; j < count; j++) {
            float weight = widen(weights[i * CHUNK + j]);
            for (long at = 0; at < d; at++) mixed[i * d + at] += weight * value_at(v, j * d + at, is_int8);
        }
    }
}

/* One sequence of a call, as attention.py lays it out. */
typedef struct {
    void *k, *v;
    float *key_scales, *value_scales; /* (K, C), for keys and values of 8 bits; else none */
    const uint8_t *visible;
    long row, t, s; /* its first row in q, how many it has, and how many slots they are compared with */
    long head_stride; /* values from one head's keys to the next one's */
    long slot, capacity; /* where its first new key belongs; the i-th goes to (slot + i) mod capacity. No new keys: -1 */
} Sequence;

typedef struct {
    const uint16_t *q, *new_k, *new_v;
    long heads, kv_heads, d;
    float scale;
} Problem;

/* Where a sequence's work begins in that of all of them; the element behind the last has the sums. */
typedef struct { long task, item, partial; } Place;

INLINE long chunks_of(const Sequence *sequence) { return (sequence->s + CHUNK - 1) / CHUNK; }

/* How many rows, of new positions times query heads of a key head, are computed at once from `first` position on. */
INLINE long rows_from(const Sequence *sequence, long first, long groups) {
    long left = sequence->t - first;
    return left <= 0 ? 0 : (left < POSITIONS ? left : POSITIONS) * groups;
}

/* Keep one vector in 8 bits; kv_int8.py says the same in torch. Where there is NaN or infinity, the scale has it. */
static void quantize(const uint16_t *from, int8_t *to, float *scale, long d) {
    float largest = 0;
    for (long i = 0; i < d; i++) {
        float size = fabsf(widen(from[i]));
        largest = size > largest || isnan(size) ? size : largest;
    }
    *scale = largest / 127;
    for (long i = 0; i < d; i++) {
        float value = rintf(widen(from[i]) / *scale);
        to[i] = value >= -127 && value <= 127 ? (int8_t)value : 0;
    }
}

static void store(const Problem *p, const Sequence *sequence, long head, long begin, long count) {
    for (long i = 0; i < sequence->t; i++) {
        long slot = (sequence->slot + i) % sequence->capacity, from = ((sequence->row + i) * p->kv_heads + head) * p->d;
        if (slot < begin || slot >= begin + count) continue;
        long to = head * sequence->head_stride + slot * p->d, scale = head * sequence->capacity + slot;
        if (sequence->key_scales) {
            quantize(p->new_k + from, (int8_t *)sequence->k + to, sequence->key_scales + scale, p->d);
            quantize(p->new_v + from, (int8_t *)sequence->v + to, sequence->value_scales + scale, p->d);
        } else {
            memcpy((uint16_t *)sequence->k + to, p->new_k + from, p->d * 2);
            memcpy((uint16_t *)sequence->v + to, p->new_v + from, p->d * 2);
        }
    }
}

/* Say whether none of M rows may see any position of a chunk. */
static int is_hidden(const Sequence *sequence, long groups, long begin, long count, long row, int M) {
    for (long position = row / groups; position <= (row + M - 1) / groups; position++)
        if (memchr(sequence->visible + position * sequence->s + begin, 1, count)) return 0;
    return 1;
}

/* M rows of one key head over one chunk: what they gather, their largest scores and the sums of their weights. */
INLINE void chunk_of_rows(const Problem *p, const Sequence *sequence, long head, long begin, long count, long row, int M,
                          int is_int8, float *mixed, float *largest, float *sum) {
    long groups = p->heads / p->kv_heads, d = p->d, offset = head * sequence->head_stride + begin * d;
    const void *k = behind(sequence->k, offset, is_int8), *v = behind(sequence->v, offset, is_int8);
    long scales = head * sequence->capacity + begin;
    if (sequence->visible && is_hidden(sequence, groups, begin, count, row, M)) { /* the future, or behind a window */
        memset(mixed, 0, M * d * sizeof *mixed);
        for (int i = 0; i < M; i++) largest[i] = -INFINITY, sum[i] = 0;
        return;
    }
    float scores[ROWS * CHUNK];
    uint16_t weights[ROWS * CHUNK], rows[ROWS * MOST_DIMENSIONS];
    for (int i = 0; i < M; i++) { /* row = position * groups + head within the group: they lie side by side */
        long position = sequence->row + (row + i) / groups, member = (row + i) % groups;
        memcpy(rows + i * d, p->q + (position * p->heads + head * groups + member) * d, d * 2);
    }
    score(rows, k, v, count, d, p->scale, M, is_int8, scores);
    for (int i = 0; i < M; i++) {
        const uint8_t *visible = sequence->visible ? sequence->visible + (row + i) / groups * sequence->s + begin : NULL;
        if (is_int8)
            for (long j = 0; j < count; j++) scores[i * CHUNK + j] *= sequence->key_scales[scales + j];
        largest[i] = weigh(scores + i * CHUNK, visible, count, weights + i * CHUNK, sum + i);
        if (is_int8)
            for (long j = 0; j < count; j++)
                weights[i * CHUNK + j] = narrow(widen(weights[i * CHUNK + j]) * sequence->value_scales[scales + j]);
    }
    mix(weights, v, behind(k, count * d, is_int8), count, d, M, is_int8, mixed);
}

/* Rows `first` to first + rows of one key head over one chunk; partial results lie row by row. */
static void chunk_task(const Problem *p, const Sequence *sequence, long head, long chunk, long first, long rows,
                       float *mixed, float *largest, float *sum) {
    long begin = chunk * CHUNK, count = sequence->s - begin < CHUNK ? sequence->s - begin : CHUNK;
    if (first == 0 && sequence->slot >= 0) store(p, sequence, head, begin, count);
    for (long row = 0; row < rows; row += ROWS) {
#define CALL(M) \
    if (sequence->key_scales) \
        chunk_of_rows(p, sequence, head, begin, count, first + row, M, 1, mixed + row * p->d, largest + row, sum + row); \
    else chunk_of_rows(p, sequence, head, begin, count, first + row, M, 0, mixed + row * p->d, largest + row, sum + row)
        switch (rows - row) {
        case 1: CALL(1); break;
        case 2: CALL(2); break;
        case 3: CALL(3); break;
        default: CALL(4);
        }
#undef CALL
    }
}

/* Join one row's chunks. */
static void join(const float *mixed, const float *largest, const float *sum, long chunks, long stride, long d,
                 uint16_t *out) {
    float top = -INFINITY, total = 0, values[MOST_DIMENSIONS];
    for (long c = 0; c < chunks; c++) top = largest[c * stride] > top ? largest[c * stride] : top;
    for (long at = 0; at < d; at++) values[at] = 0;
    for (long c = 0; c < chunks; c++) {
        float factor = expf(largest[c * stride] - top);
        total += factor * sum[c * stride];
        for (long at = 0; at < d; at++) values[at] += factor * mixed[c * stride * d + at];
    }
    for (long at = 0; at < d; at++) out[at] = narrow(values[at] / total);
}

/* Lay out the work from `first` position on; partial results of a later stretch take no more room than the first's. */
static void lay_out(const Sequence *sequences, long n, long first, long kv_heads, long groups, Place *places) {
    places[0] = (Place){0, 0, 0};
    for (long i = 0; i < n; i++) {
        long rows = rows_from(sequences + i, first, groups), chunks = rows ? chunks_of(sequences + i) : 0;
        places[i + 1].task = places[i].task + kv_heads * chunks;
        places[i + 1].item = places[i].item + kv_heads * rows;
        places[i + 1].partial = places[i].partial + kv_heads * chunks * rows;
    }
}

/* Returns 1 where there is no memory, 2 where there are more dimensions than room. */
int attend_bf16(const Sequence *sequences, long n, const uint16_t *q, const uint16_t *new_k, const uint16_t *new_v,
                uint16_t *out, long heads, long kv_heads, long d, float scale, int threads) {
    if (d > MOST_DIMENSIONS) return 2;
    Problem p = {q, new_k, new_v, heads, kv_heads, d, scale};
    long groups = heads / kv_heads, longest = 0;
    for (long i = 0; i < n; i++) longest = sequences[i].t > longest ? sequences[i].t : longest;
    Place *places = malloc((n + 1) * sizeof *places);
    if (places) lay_out(sequences, n, 0, kv_heads, groups, places);
    long most = places ? places[n].partial : 0;
    float *mixed = malloc((size_t)most * (d + 2) * sizeof *mixed), *largest = mixed + most * d, *sum = largest + most;
    if (!mixed || !places) return free(places), free(mixed), 1;
#pragma omp parallel num_threads(threads)
    for (long first = 0; first < longest; first += POSITIONS) {
        if (first) {
#pragma omp single
            lay_out(sequences, n, first, kv_heads, groups, places);
        }
        long i = 0;
        /* In runs: each thread reads stretches of memory, and has as many heads' hidden chunks as the others. */
#pragma omp for schedule(static)
        for (long task = 0; task < places[n].task; task++) {
            while (task >= places[i + 1].task) i++;
            long rows = rows_from(sequences + i, first, groups), chunks = chunks_of(sequences + i);
            long own = task - places[i].task, at = places[i].partial + own * rows;
            chunk_task(&p, sequences + i, own / chunks, own % chunks, first * groups, rows, mixed + at * d, largest + at,
                       sum + at);
        }
        i = 0;
#pragma omp for schedule(static)
        for (long item = 0; item < places[n].item; item++) {
            while (item >= places[i + 1].item) i++;
            long rows = rows_from(sequences + i, first, groups), chunks = chunks_of(sequences + i);
            long row = (item - places[i].item) % rows, head = (item - places[i].item) / rows;
            long at = places[i].partial + head * chunks * rows + row, position = sequences[i].row + first + row / groups;
            uint16_t *to = out + (position * heads + head * groups + row % groups) * d;
            join(mixed + at * d, largest + at, sum + at, chunks, rows, d, to);
        }
    }
    return free(places), free(mixed), 0;
}
