/* Weights as small as their file has them (block_q4_K and its kin in ggml-common.h, and the blocks of
 * published_schemes.py), and the floats they stand for.
 *
 * A panel is 16 channels side by side, cut into blocks of 32 to 256 columns. A block is as long as the 16 blocks that it
 * is made of; only of GGUF's IQ1 to IQ3, which say where in a grid several numbers are, here are the numbers themselves,
 * of 6 or 16 kinds, in 3 or 4 bits. A block's head holds scales; its body the digits, step after step: words of 32 bits,
 * one for each channel, that hold as many columns as fit, the first one lowest.
 *
 *   bits  columns of a step  words of a step
 *    2          16           1 word of 16 columns
 *    3          16           1 word of 10, half a word of 5, and the last column in the bits left at their ends
 *    4           8           1 word of 8
 *    5          16           2 words of 6, half a word of 3, and the last column in the bits left at their ends
 *    6          16           3 words of 5, and the last column in the bits left at their beginnings
 *    8           1           1 byte
 *   16, 32     2, 1          bfloat16, float
 *
 * Digits that count from below zero are stored as two's complement, which is as good as ggml's offset and needs no
 * subtraction. Numbers are put together in the order of the float32 operations of ggml, or of the scheme's `unpack`; what
 * is rounded there is rounded here, and where a product is added it is exact, so that fusing the two changes nothing.
 */

#ifndef CASTOR_FORMATS_H
#define CASTOR_FORMATS_H

#include "vectors.h"

#define PANEL 16
#define PARTS (PANEL / LANES)

/* As `Format` in packing.py. */
enum {
    FLOAT, BRAIN, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL, MXFP4, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_XS,
    F8_128, F8_32, I8_128, I8_32, I4_128, I4_32, NVFP4, NF4, FP4, IQ1, IQ2, IQ3_XXS, IQ3_S, FORMATS
};

/* What the digits are: counted from 0, from below 0, small integers of a table, any numbers of a table, or E4M3. */
enum { UNSIGNED, SIGNED, TABLE, FLOAT_TABLE, FLOAT8 };

/* What is beside a scale: weights are digit * scale, digit * scale + least, or (digit - zero) * scale. */
enum { NOTHING, LEAST, ZERO };

typedef struct {
    uint8_t bits, digits;
    uint8_t scale_columns; /* how many columns share a scale */
    uint8_t beside;
    uint8_t head;     /* bytes of a channel before its digits */
    uint16_t columns; /* of a block */
    uint8_t singles;  /* the head begins with a scale in float32 */
} Layout;

static const Layout LAYOUTS[FORMATS] = {
    [FLOAT] = {32, SIGNED, 32, NOTHING, 0, 32, 0},    [BRAIN] = {16, SIGNED, 32, NOTHING, 0, 32, 0},
    [Q8_0] = {8, SIGNED, 32, NOTHING, 2, 32, 0},      [Q4_0] = {4, SIGNED, 32, NOTHING, 2, 32, 0},
    [Q4_1] = {4, UNSIGNED, 32, LEAST, 4, 32, 0},      [Q5_0] = {5, SIGNED, 32, NOTHING, 2, 32, 0},
    [Q5_1] = {5, UNSIGNED, 32, LEAST, 4, 32, 0},      [IQ4_NL] = {4, TABLE, 32, NOTHING, 2, 32, 0},
    [MXFP4] = {4, TABLE, 32, NOTHING, 1, 32, 0},      [Q2_K] = {2, UNSIGNED, 16, LEAST, 20, 256, 0},
    [Q3_K] = {3, SIGNED, 16, NOTHING, 14, 256, 0},    [Q4_K] = {4, UNSIGNED, 32, LEAST, 16, 256, 0},
    [Q5_K] = {5, UNSIGNED, 32, LEAST, 16, 256, 0},    [Q6_K] = {6, SIGNED, 16, NOTHING, 18, 256, 0},
    [IQ4_XS] = {4, TABLE, 32, NOTHING, 8, 256, 0},    [F8_128] = {8, FLOAT8, 128, NOTHING, 4, 128, 1},
    [F8_32] = {8, FLOAT8, 32, NOTHING, 4, 32, 1},     [I8_128] = {8, SIGNED, 128, ZERO, 5, 128, 1},
    [I8_32] = {8, SIGNED, 32, ZERO, 5, 32, 1},        [I4_128] = {4, UNSIGNED, 128, ZERO, 5, 128, 1},
    [I4_32] = {4, UNSIGNED, 32, ZERO, 5, 32, 1},      [NVFP4] = {4, TABLE, 16, NOTHING, 8, 64, 1},
    [NF4] = {4, FLOAT_TABLE, 64, NOTHING, 4, 64, 1},  [FP4] = {4, FLOAT_TABLE, 64, NOTHING, 4, 64, 1},
    [IQ1] = {3, FLOAT_TABLE, 16, NOTHING, 10, 256, 0}, [IQ2] = {3, FLOAT_TABLE, 16, NOTHING, 10, 256, 0},
    [IQ3_XXS] = {4, TABLE, 16, NOTHING, 10, 256, 0},  [IQ3_S] = {4, TABLE, 16, NOTHING, 10, 256, 0},
};

INLINE int block_bytes(int format) {
    return PANEL * (LAYOUTS[format].head + LAYOUTS[format].columns * LAYOUTS[format].bits / 8);
}

INLINE int columns_of_step(int format) {
    const int bits = LAYOUTS[format].bits;
    return bits == 16 ? 2 : bits == 4 ? 8 : bits < 8 ? 16 : 1;
}

INLINE int step_bytes(int format) { return PANEL * columns_of_step(format) * LAYOUTS[format].bits / 8; }

/* A part of a step: its words, and the digit that is put together from their ends. */
typedef struct {
    Words words[3], last;
} Step;

/* How many words of a step are whole; how many columns are in each word; which bit is the first one's lowest. */
INLINE int whole_words(int bits) { return bits == 5 ? 2 : bits == 6 ? 3 : 1; }

INLINE int columns_of_word(int bits) { return 32 / bits; }

INLINE int bit_of(int bits, int i) { return i % columns_of_word(bits) * bits + (bits == 6 ? 2 : 0); }

INLINE int is_last(int bits, int i) { return (bits == 3 || bits == 5 || bits == 6) && i == 15; }

/* `at` is where the step begins in the panel. */
INLINE Step load_step(const uint8_t *at, int part, int bits) {
    const int whole = whole_words(bits);
    Step step = {{{0}}, {0}};
    Words *w = step.words;
    if (bits == 8) w[0] = (Words)load_bytes(at + LANES * part);
    if (bits != 8)
        for (int word = 0; word < whole; word++) w[word] = load_words(at + 4 * (word * PANEL + LANES * part));
    if (bits == 3 || bits == 5) w[whole] = load_short_words(at + 4 * whole * PANEL + 2 * LANES * part);
    if (bits == 3) step.last = w[0] >> 30 | (w[1] >> 13 & 4);
    if (bits == 5) step.last = w[0] >> 30 | (w[1] >> 28 & 12) | (w[2] >> 11 & 16);
    if (bits == 6) step.last = (w[0] & 3) | (w[1] & 3) << 2 | w[2] << 4;
    return step;
}

/* Column `i` of a step as the lowest bits of its words; above them is something else. */
INLINE Words lowest(const Step *step, int bits, int i) {
    return is_last(bits, i) ? step->last : step->words[i / columns_of_word(bits)] >> bit_of(bits, i);
}

INLINE Ints unsigned_in(const Step *step, int bits, int i) {
    return (Ints)(lowest(step, bits, i) & ((1u << bits) - 1));
}

/* Column `i` of a step: moved to the top, and from there down with its sign. */
INLINE Ints signed_in(const Step *step, int bits, int i) {
    if (bits == 8) return (Ints)step->words[0];
    const int above = 32 - bits - (is_last(bits, i) ? 0 : bit_of(bits, i));
    return (Ints)((is_last(bits, i) ? step->last : step->words[i / columns_of_word(bits)]) << above) >> (32 - bits);
}

/* bitsandbytes' tables: quantiles of a normal distribution (create_normal_map), and numbers of its own FP4. */
#define NF4_NUMBERS \
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, \
     -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, \
     0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f}
#define FP4_NUMBERS \
    {0, 0.0625 / 12, 8.0 / 12, 1, 4.0 / 12, 0.5, 2.0 / 12, 0.25, \
     0, -0.0625 / 12, -8.0 / 12, -1, -4.0 / 12, -0.5, -2.0 / 12, -0.25}
/* ggml's kvalues_iq4nl and kvalues_mxfp4, which are twice what FP4 (E2M1) stands for. */
#define IQ4_NUMBERS {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113}
#define TWICE_FP4 {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12}
/* What is in ggml's grids (iq2xxs_grid and its kin), with its sign above; of IQ1 as eighths, with the delta added. */
#define IQ1_NUMBERS {1, 7, 9, 0, -1, -7, -9, 0, 1, 7, 9, 0, -1, -7, -9, 0}
#define IQ2_NUMBERS {8, 25, 43, 0, -8, -25, -43, 0, 8, 25, 43, 0, -8, -25, -43, 0}
#define IQ3_XXS_NUMBERS {4, 12, 20, 28, 36, 44, 52, 62, -4, -12, -20, -28, -36, -44, -52, -62}
#define IQ3_S_NUMBERS {1, 3, 5, 7, 9, 11, 13, 15, -1, -3, -5, -7, -9, -11, -13, -15}

#if LANES == 16 && defined(__AVX512F__)
/* What the lowest four bits of a word stand for, whatever is above the digit; and five bits from 16 on. */
#define FROM(n) n, n + 1, n + 2, n + 3
#define FOUR_BITS {FROM(0), FROM(4), FROM(8), FROM(12)}
static const float NUMBERS[FORMATS][16] = {
    [Q4_0] = {FROM(0), FROM(4), FROM(-8), FROM(-4)}, [Q4_1] = FOUR_BITS, [Q5_0] = FOUR_BITS, [Q5_1] = FOUR_BITS,
    [IQ4_NL] = IQ4_NUMBERS, [MXFP4] = TWICE_FP4,
    [Q2_K] = {FROM(0), FROM(0), FROM(0), FROM(0)}, [Q3_K] = {FROM(0), FROM(-4), FROM(0), FROM(-4)},
    [Q4_K] = FOUR_BITS, [Q5_K] = FOUR_BITS, [IQ4_XS] = IQ4_NUMBERS, [I4_128] = FOUR_BITS, [I4_32] = FOUR_BITS,
    [NVFP4] = TWICE_FP4, [NF4] = NF4_NUMBERS, [FP4] = FP4_NUMBERS, [IQ1] = IQ1_NUMBERS, [IQ2] = IQ2_NUMBERS,
    [IQ3_XXS] = IQ3_XXS_NUMBERS, [IQ3_S] = IQ3_S_NUMBERS};
static const float FIFTH[2][16] = {[UNSIGNED] = {FROM(16), FROM(20), FROM(24), FROM(28)},
                                   [SIGNED] = {FROM(-16), FROM(-12), FROM(-8), FROM(-4)}};

INLINE Step load_digits(const uint8_t *at, int part, int format) {
    Step step = {{{0}}, {0}};
    if (LAYOUTS[format].digits != FLOAT8) return load_step(at, part, LAYOUTS[format].bits);
    step.words[0] = (Words)load_float8(at + LANES * part);
    return step;
}

INLINE Floats number_in(const Step *step, int format, int i) {
    const int bits = LAYOUTS[format].bits;
    if (LAYOUTS[format].digits == FLOAT8) return (Floats)step->words[0];
    if (bits > 5) return numbers_of(signed_in(step, bits, i));
    Words words = lowest(step, bits, i);
    if (bits < 5) return look_up_floats(NUMBERS[format], words);
    __m512 fifth = _mm512_loadu_ps(FIFTH[LAYOUTS[format].digits]);
    return (Floats)_mm512_permutex2var_ps(_mm512_loadu_ps(NUMBERS[format]), (__m512i)words, fifth);
}
#else
static const int8_t SMALL_NUMBERS[FORMATS][16] = {
    [IQ4_NL] = IQ4_NUMBERS, [IQ4_XS] = IQ4_NUMBERS, [MXFP4] = TWICE_FP4, [NVFP4] = TWICE_FP4,
    [IQ3_XXS] = IQ3_XXS_NUMBERS, [IQ3_S] = IQ3_S_NUMBERS};
static const float NUMBERS[FORMATS][16] = {
    [NF4] = NF4_NUMBERS, [FP4] = FP4_NUMBERS, [IQ1] = IQ1_NUMBERS, [IQ2] = IQ2_NUMBERS};

/* Small integers of a table are looked up for all columns of a word at once: bytes of the even ones, and of the odd. */
INLINE Step load_digits(const uint8_t *at, int part, int format) {
    Step step = load_step(at, part, LAYOUTS[format].bits);
    if (LAYOUTS[format].digits == FLOAT8) step.words[0] = (Words)load_float8(at + LANES * part);
    if (LAYOUTS[format].digits == TABLE) {
        const int8_t *table = SMALL_NUMBERS[format];
        step.words[1] = look_up(table, step.words[0] >> 4 & 0x0f0f0f0f);
        step.words[0] = look_up(table, step.words[0] & 0x0f0f0f0f);
    }
    return step;
}

INLINE Floats number_in(const Step *step, int format, int i) {
    const int bits = LAYOUTS[format].bits, digits = LAYOUTS[format].digits;
    if (digits == FLOAT8) return (Floats)step->words[0];
    if (digits == FLOAT_TABLE && bits == 3) return look_up_eight(NUMBERS[format], lowest(step, bits, i));
    if (digits == FLOAT_TABLE) return look_up_floats(NUMBERS[format], lowest(step, bits, i));
    if (digits == TABLE) return numbers_of((Ints)(step->words[i % 2] << (24 - i / 2 * 8)) >> 24);
    return numbers_of(digits == SIGNED ? signed_in(step, bits, i) : unsigned_in(step, bits, i));
}
#endif

/* `beside` is the least value or the zero point. */
typedef struct {
    Floats scale, beside;
} Scale;

/* The weights of column `i` of a step. */
INLINE Floats weights_in(const Step *step, int format, int i, const Scale *scale) {
    if (format == FLOAT) return (Floats)step->words[0];
    if (format == BRAIN) return (Floats)(i ? step->words[0] & 0xffff0000 : step->words[0] << 16);
    Floats number = number_in(step, format, i);
    if (LAYOUTS[format].beside == LEAST) return number * scale->scale + scale->beside;
    if (LAYOUTS[format].beside == ZERO) number -= scale->beside;
    return number * scale->scale;
}

/* The scale of a whole block: in half precision, then the least value; in float32, then the zero point in a byte; of
 * MXFP4 an exponent of 2 (E8M0, and half of it because the table's numbers are doubled: ggml_e8m0_to_fp32_half in
 * ggml-impl.h). That of FP8 is 256 times as large because its digits are divided by that: exact, if it is below 2^120. */
INLINE Scale scale_of(const uint8_t *block, int format, int part) {
    Scale scale = {{0}, {0}};
    if (LAYOUTS[format].head == 0) return scale;
    if (format == MXFP4) {
        Ints exponent = load_bytes(block + LANES * part) & 255;
        scale.scale = choose(exponent < 2, (Floats)((exponent + 1) << 21), (Floats)((exponent - 1) << 23));
        return scale;
    }
    if (LAYOUTS[format].singles) {
        scale.scale = load((const float *)(block + 4 * LANES * part)) * (LAYOUTS[format].digits == FLOAT8 ? 256.0f : 1.0f);
        if (LAYOUTS[format].beside == ZERO) scale.beside = numbers_of(load_bytes(block + 4 * PANEL + LANES * part));
        return scale;
    }
    scale.scale = load_halves(block + 2 * LANES * part);
    if (LAYOUTS[format].beside == LEAST) scale.beside = load_halves(block + 2 * PANEL + 2 * LANES * part);
    return scale;
}

/* The scales of a block of 256 columns, which are integers times one or two numbers in half precision. The head has
 * those, then
 *
 *   Q2_K        16 scales and 16 minima, as 4 steps of four bits
 *   Q3_K        16 signed scales, as a step of six bits
 *   Q4_K, Q5_K  8 scales, each followed by its minimum, as a step of six bits
 *   Q6_K        16 signed bytes
 *   IQ4_XS      the high two bits of 8 scales in half a word, and the low four in a word; they count from -32
 *   IQ1 to IQ3  16 scales, as 2 steps of four bits, that count odd numbers: 1, 3, 5 and so on
 */
INLINE void scales_of(const uint8_t *block, int format, int part, Scale *scales) {
    Floats scale = load_halves(block + 2 * LANES * part), least = {0};
    if (LAYOUTS[format].beside == LEAST) least = -load_halves(block + 2 * PANEL + 2 * LANES * part);
    const uint8_t *at = block + (LAYOUTS[format].beside == LEAST ? 4 : 2) * PANEL;
    if (format == Q2_K)
        for (int i = 0; i < 16; i++) {
            Step step = load_step(at + i / 8 * 4 * PANEL, part, 4);
            Step minima = load_step(at + (2 + i / 8) * 4 * PANEL, part, 4);
            scales[i].scale = scale * numbers_of(unsigned_in(&step, 4, i % 8));
            scales[i].beside = least * numbers_of(unsigned_in(&minima, 4, i % 8));
        }
    if (format == IQ2 || format == IQ3_XXS || format == IQ3_S) {
        scale *= format == IQ2 ? 0.125f : format == IQ3_XXS ? 0.25f : 1.0f;
        for (int i = 0; i < 16; i++) {
            Step step = load_step(at + i / 8 * 4 * PANEL, part, 4);
            scales[i].scale = scale * numbers_of(2 * unsigned_in(&step, 4, i % 8) + 1);
        }
    }
    if (format == Q4_K || format == Q5_K) {
        Step step = load_step(at, part, 6);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            scales[i].scale = scale * numbers_of(unsigned_in(&step, 6, 2 * i));
            scales[i].beside = least * numbers_of(unsigned_in(&step, 6, 2 * i + 1));
        }
    }
    if (format == Q3_K) {
        Step step = load_step(at, part, 6);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) scales[i].scale = scale * numbers_of(signed_in(&step, 6, i));
    }
    if (format == Q6_K)
        for (int i = 0; i < 16; i++) scales[i].scale = scale * numbers_of(load_bytes(at + i * PANEL + LANES * part));
    if (format == IQ4_XS) {
        Words high = load_short_words(at + 2 * LANES * part), low = load_words(at + 2 * PANEL + 4 * LANES * part);
        for (int i = 0; i < 8; i++, high >>= 2, low >>= 4)
            scales[i].scale = scale * numbers_of((Ints)((low & 15) | (high & 3) << 4) - 32);
    }
}

/* NVFP4: one in float32 for all, times one in FP8 for each 16 columns; half of that because the table's numbers are
 * doubled, which is exact where the scale is not subnormal. */
INLINE void read_nvfp4(const uint8_t *block, int part, Scale *scales) {
    Floats scale = load((const float *)(block + 4 * LANES * part)) * 128.0f;
    for (int i = 0; i < 4; i++) scales[i].scale = load_float8(block + (4 + i) * PANEL + LANES * part) * scale;
}

/* Once for all kernels: they are read once for 256 columns. */
#define SCALES(format)                                                                                      \
    static __attribute__((noinline)) void scales_##format(const uint8_t *block, int part, Scale *scales) { \
        scales_of(block, format, part, scales);                                                             \
    }
SCALES(Q2_K) SCALES(Q3_K) SCALES(Q4_K) SCALES(Q6_K) SCALES(IQ4_XS)
SCALES(IQ2) SCALES(IQ3_XXS) SCALES(IQ3_S)

/* All scales of a block. */
INLINE void read_scales(const uint8_t *block, int format, int part, Scale *scales) {
    switch (format) {
        case Q2_K: scales_Q2_K(block, part, scales); break;
        case Q3_K: scales_Q3_K(block, part, scales); break;
        case Q4_K: case Q5_K: scales_Q4_K(block, part, scales); break;
        case Q6_K: scales_Q6_K(block, part, scales); break;
        case IQ4_XS: scales_IQ4_XS(block, part, scales); break;
        case IQ1: case IQ2: scales_IQ2(block, part, scales); break;
        case IQ3_XXS: scales_IQ3_XXS(block, part, scales); break;
        case IQ3_S: scales_IQ3_S(block, part, scales); break;
        case NVFP4: read_nvfp4(block, part, scales); break;
        default: scales[0] = scale_of(block, format, part);
    }
}

#endif
