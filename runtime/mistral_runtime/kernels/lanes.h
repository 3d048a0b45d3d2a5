/* The few operations on registers that tiles.c is made of, for three kinds of processor.
 *
 * A register holds LANES 32-bit numbers. `add_pairs` adds to each two products of 16-bit numbers, `add_fours` four products
 * of a byte from 0 and a byte with a sign. All are exact, so every kind of processor gets the same integers.
 */
#ifndef LANES_H
#define LANES_H

#include "bfloat16.h"

#if defined(__AVX512BW__)
#include <immintrin.h>
#define LANES 16
#define TILES 4 /* with MOST_ROWS: 24 sums, 4 weights, an activation and a mask are what 32 registers hold */
#define MOST_ROWS 6
typedef __m512i ints;
typedef __m512 floats;

INLINE ints load_ints(const void *at) { return _mm512_loadu_si512(at); }
INLINE ints all_ints(int32_t value) { return _mm512_set1_epi32(value); }
INLINE ints both(ints left, ints right) { return _mm512_and_si512(left, right); }
INLINE ints pairs_down(ints pairs, int bits) { return _mm512_srli_epi16(pairs, bits); }
INLINE floats load_floats(const float *at) { return _mm512_loadu_ps(at); }
INLINE void store_floats(float *at, floats value) { _mm512_storeu_ps(at, value); }
INLINE floats widen_lanes(const uint16_t *at) { return widen16(at); }
INLINE floats times(floats left, float right) { return _mm512_mul_ps(left, _mm512_set1_ps(right)); }
INLINE floats add_scaled(floats sum, ints left, floats right) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(left), right, sum);
}

#ifdef __AVX512VNNI__
#define HAS_FAST_PRODUCTS 1
/* Not the intrinsics: around those gcc 12 moves half of the sums to memory and back (three times the instructions). */
INLINE ints add_pairs(ints sum, ints left, ints right) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(left), "v"(right));
    return sum;
}

INLINE ints add_fours(ints sum, ints left, ints right) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(left), "v"(right));
    return sum;
}
#else
INLINE ints add_pairs(ints sum, ints left, ints right) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(left, right));
}

/* Exact for left up to 15 only. */
INLINE ints add_fours(ints sum, ints left, ints right) {
    return add_pairs(sum, _mm512_maddubs_epi16(left, right), _mm512_set1_epi16(1));
}
#endif

#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define LANES 8
#define TILES 1
#define MOST_ROWS 4
typedef __m256i ints;
typedef __m256 floats;

INLINE ints load_ints(const void *at) { return _mm256_loadu_si256((const __m256i *)at); }
INLINE ints all_ints(int32_t value) { return _mm256_set1_epi32(value); }
INLINE ints both(ints left, ints right) { return _mm256_and_si256(left, right); }
INLINE ints pairs_down(ints pairs, int bits) { return _mm256_srli_epi16(pairs, bits); }
INLINE floats load_floats(const float *at) { return _mm256_loadu_ps(at); }
INLINE void store_floats(float *at, floats value) { _mm256_storeu_ps(at, value); }
INLINE floats widen_lanes(const uint16_t *at) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE floats times(floats left, float right) { return _mm256_mul_ps(left, _mm256_set1_ps(right)); }
INLINE floats add_scaled(floats sum, ints left, floats right) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(left), right, sum);
}

INLINE ints add_pairs(ints sum, ints left, ints right) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(left, right));
}

/* Exact for left up to 15 only. */
INLINE ints add_fours(ints sum, ints left, ints right) {
    return add_pairs(sum, _mm256_maddubs_epi16(left, right), _mm256_set1_epi16(1));
}

#else /* 128 bits, in the words of gcc and clang: NEON and SSE come out of it */
#define LANES 4
#define TILES 1
#define MOST_ROWS 2
typedef int32_t ints __attribute__((vector_size(16)));
typedef uint32_t unsigned_ints __attribute__((vector_size(16)));
typedef uint16_t unsigned_pairs __attribute__((vector_size(16)));
typedef float floats __attribute__((vector_size(16)));

INLINE ints load_ints(const void *at) {
    ints value;
    memcpy(&value, at, sizeof value);
    return value;
}
INLINE ints all_ints(int32_t value) { return (ints){value, value, value, value}; }
INLINE ints both(ints left, ints right) { return left & right; }
INLINE ints pairs_down(ints pairs, int bits) { return (ints)((unsigned_pairs)pairs >> bits); }
INLINE floats load_floats(const float *at) {
    floats value;
    memcpy(&value, at, sizeof value);
    return value;
}
INLINE void store_floats(float *at, floats value) { memcpy(at, &value, sizeof value); }
INLINE floats widen_lanes(const uint16_t *at) { return (floats){widen(at[0]), widen(at[1]), widen(at[2]), widen(at[3])}; }
INLINE floats times(floats left, float right) { return left * right; }
INLINE floats add_scaled(floats sum, ints left, floats right) {
    return sum + __builtin_convertvector(left, floats) * right;
}

/* Left is from 0 here as well, as tiles.c has it. */
INLINE ints add_pairs(ints sum, ints left, ints right) {
    return sum + (left & 0xffff) * ((ints)((unsigned_ints)right << 16) >> 16) + (left >> 16) * (right >> 16);
}

INLINE ints add_fours(ints sum, ints left, ints right) {
    EACH(j, 4) sum += ((left >> 8 * j) & 255) * ((ints)((unsigned_ints)right << (24 - 8 * j)) >> 24);
    return sum;
}
#endif

#define PARTS (16 / LANES) /* registers that hold a tile's outputs */

#endif
