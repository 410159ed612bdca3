/* As many numbers at a time as a register of the processor holds, in the vector extension that GCC and Clang share: one
 * source for every processor. Wider vectors would compile too, but live in memory: ten times as slow.
 */

#ifndef CASTOR_VECTORS_H
#define CASTOR_VECTORS_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* REGISTERS: how many there are for vectors. A test that defines LANES gets the code of another processor. */
#if defined(LANES)
#define REGISTERS (LANES == 16 ? 32 : 16)
#elif defined(__AVX512F__)
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
typedef int8_t Bytes __attribute__((vector_size(LANES)));

INLINE Floats load(const float *from) {
    Floats value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE void store(float *to, Floats value) { memcpy(to, &value, sizeof value); }

/* The same, in a register: where a compiler would rather load it for each of its uses, loading takes the time. */
INLINE Floats in_register(Floats value) {
#if LANES == 16 && defined(__AVX512F__)
    __asm__("" : "+v"(value));
#elif (LANES == 8 && defined(__AVX__)) || (LANES == 4 && defined(__x86_64__))
    __asm__("" : "+x"(value));
#elif LANES == 4 && defined(__aarch64__)
    __asm__("" : "+w"(value));
#endif
    return value;
}

INLINE Floats all(float value) { return value - (Floats){0}; } /* plus would not keep a negative zero: an addition */

INLINE Words load_words(const void *from) {
    Words value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE Floats numbers_of(Ints integers) { return __builtin_convertvector(integers, Floats); }

/* Words of 16 bits, as words of 32. */
INLINE Words load_short_words(const uint8_t *from) {
    Halves halves;
    memcpy(&halves, from, sizeof halves);
    return __builtin_convertvector(halves, Words);
}

/* Signed bytes. Compilers widen these lane by lane where they are not told how. */
INLINE Ints load_bytes(const uint8_t *from) {
#if LANES == 16 && defined(__AVX512F__)
    return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif LANES == 8 && defined(__AVX2__)
    return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from));
#elif LANES == 4 && defined(__x86_64__)
    int32_t four;
    memcpy(&four, from, sizeof four);
    __m128i high = _mm_unpacklo_epi8(_mm_setzero_si128(), _mm_cvtsi32_si128(four));
    return (Ints)_mm_unpacklo_epi16(_mm_setzero_si128(), high) >> 24;
#elif LANES == 4 && defined(__aarch64__)
    int32_t four;
    memcpy(&four, from, sizeof four);
    return (Ints)vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)))));
#else
    Bytes bytes;
    memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(bytes, Ints);
#endif
}

/* IEEE half precision; the product with 2^112 puts the exponent right and is exact, also for subnormal numbers. */
INLINE Floats load_halves(const uint8_t *from) {
#if LANES == 16 && defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif LANES == 8 && defined(__AVX__) && defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#else
    Words bits = load_short_words(from);
    Floats size = (Floats)((bits & 0x7fff) << 13) * 0x1p112f;
    return (Floats)((Words)size | (bits & 0x8000) << 16);
#endif
}

/* FP8 (E4M3), divided by 256: the number in half precision with the same exponent and mantissa. NaN is not known. */
INLINE Floats load_float8(const uint8_t *from) {
#if LANES == 16 && defined(__AVX512F__)
    __m256i bits = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from)), 7);
    return (Floats)_mm512_cvtph_ps(_mm256_and_si256(bits, _mm256_set1_epi16((short)0xbf80)));
#elif LANES == 8 && defined(__AVX__) && defined(__F16C__)
    __m128i bits = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)from)), 7);
    return (Floats)_mm256_cvtph_ps(_mm_and_si128(bits, _mm_set1_epi16((short)0xbf80)));
#elif LANES == 4 && defined(__aarch64__)
    int32_t four;
    memcpy(&four, from, sizeof four);
    int16x4_t bits = vshl_n_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)))), 7);
    return (Floats)vcvt_f32_f16(vreinterpret_f16_s16(vand_s16(bits, vdup_n_s16((int16_t)0xbf80))));
#else
    return (Floats)((Words)load_bytes(from) << 20 & 0x87f00000) * 0x1p112f;
#endif
}

/* For each byte, which is below 16, the number in that place of a table. */
INLINE Words look_up(const int8_t *table, Words bytes) {
#if LANES == 8 && defined(__AVX2__)
    __m256i numbers = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    return (Words)_mm256_shuffle_epi8(numbers, (__m256i)bytes);
#elif LANES == 4 && defined(__SSSE3__)
    return (Words)_mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)table), (__m128i)bytes);
#elif LANES == 4 && defined(__aarch64__)
    return (Words)vqtbl1q_s8(vld1q_s8(table), (uint8x16_t)bytes);
#else
    uint8_t places[4 * LANES];
    memcpy(places, &bytes, sizeof bytes);
    for (int i = 0; i < 4 * LANES; i++) places[i] = (uint8_t)table[places[i]];
    memcpy(&bytes, places, sizeof bytes);
    return bytes;
#endif
}

/* Where there is no instruction for it; a function of its own, or each of its many uses would be that long. */
__attribute__((noinline, unused)) static Floats look_up_each(const float *table, Words places) {
    Floats numbers;
    for (int lane = 0; lane < LANES; lane++) numbers[lane] = table[places[lane] & 15];
    return numbers;
}

/* For each word, whose lowest four bits say a place, the number there in a table. */
INLINE Floats look_up_floats(const float *table, Words places) {
#if LANES == 16 && defined(__AVX512F__)
    return (Floats)_mm512_permutexvar_ps((__m512i)places, _mm512_loadu_ps(table));
#elif LANES == 8 && defined(__AVX2__)
    __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)places);
    __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)places);
    return (Floats)_mm256_blendv_ps(low, high, (__m256)(places << 28));
#elif LANES == 4 && defined(__aarch64__)
    uint8x16_t bytes = (uint8x16_t)((places & 15) * 0x04040404 + 0x03020100);
    return (Floats)vqtbl4q_u8(vld1q_u8_x4((const uint8_t *)table), bytes);
#else
    return look_up_each(table, places);
#endif
}

/* The same for three bits: the table has its eight numbers twice. */
INLINE Floats look_up_eight(const float *table, Words places) {
#if LANES == 8 && defined(__AVX2__)
    return (Floats)_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)places);
#elif LANES == 4 && defined(__aarch64__)
    uint8x16_t bytes = (uint8x16_t)((places & 7) * 0x04040404 + 0x03020100);
    return (Floats)vqtbl2q_u8(vld1q_u8_x2((const uint8_t *)table), bytes);
#else
    return look_up_floats(table, places);
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
