/* As many numbers at a time as a register of the processor holds, in the vector extension that GCC and Clang share: one
 * source for every processor. Wider vectors would compile too, but live in memory: ten times as slow.
 */

#ifndef CASTOR_VECTORS_H
#define CASTOR_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* REGISTERS: how many there are for vectors. */
#if defined(__AVX512F__)
#define LANES 16
#define REGISTERS 32
#elif defined(__AVX__)
#define LANES 8
#define REGISTERS 16
#else
#define LANES 4
#if defined(__aarch64__)
#define REGISTERS 32
#else
#define REGISTERS 16
#endif
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

INLINE Floats load(const float *from) {
    Floats value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE void store(float *to, Floats value) { memcpy(to, &value, sizeof value); }

INLINE Floats all(float value) { return value - (Floats){0}; } /* plus would not keep a negative zero: an addition */

INLINE Words load_words(const void *from) {
    Words value;
    memcpy(&value, from, sizeof value);
    return value;
}

/* IEEE half precision; the product with 2^112 puts the exponent right and is exact, also for subnormal numbers. */
INLINE Floats load_halves(const uint8_t *from) {
    Halves halves;
    memcpy(&halves, from, sizeof halves);
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps((__m256i)halves);
#elif defined(__AVX__) && defined(__F16C__)
    return (Floats)_mm256_cvtph_ps((__m128i)halves);
#else
    Words bits = __builtin_convertvector(halves, Words);
    Floats size = (Floats)((bits & 0x7fff) << 13) * 0x1p112f;
    return (Floats)((Words)size | (bits & 0x8000) << 16);
#endif
}

/* The lowest four bits of each word as a number. */
INLINE Floats digits(Words words) {
#if defined(__AVX512F__)
    const __m512 numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (Floats)_mm512_permutexvar_ps((__m512i)words, numbers);
#else
    return __builtin_convertvector((Ints)(words & 15), Floats);
#endif
}

/* 0, 1, 2 and so on, one for each lane. */
INLINE Ints lane_numbers(void) {
    Ints numbers;
    for (int lane = 0; lane < LANES; lane++) numbers[lane] = lane;
    return numbers;
}

INLINE Floats choose(Ints condition, Floats yes, Floats no) {
    return (Floats)((condition & (Ints)yes) | (~condition & (Ints)no));
}

INLINE float sum_of(Floats value) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += value[lane];
    return total;
}

/* exp(x) within two units in the last place, 0 below -87: Cephes' expf (S. Moshier), x = n ln 2 + r, |r| <= ln 2 / 2. */
INLINE Floats exponential(Floats x) {
    Ints tiny = x < -87.0f;
    x = choose(tiny, all(-87.0f), x);
    x = choose(x > 88.0f, all(88.0f), x);
    Floats shifted = x * 1.44269504088896341f + 12582912.0f; /* 1.5 * 2^23: the sum is rounded to an integer */
    Floats n = shifted - 12582912.0f;
    Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Ints power = __builtin_convertvector(n, Ints) << 23;
    return choose(tiny, (Floats){0}, (Floats)((Ints)p + power));
}

#endif
