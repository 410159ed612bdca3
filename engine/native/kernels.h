/* Sums over the columns of some panels, for each format and number of rows: weights become floats in registers, just
 * before they are used. Where there are many rows for few registers, some columns become floats in the nearest cache
 * first. Each sum meets the columns in their order in either way, so it is the same bit by bit.
 */

#ifndef CASTOR_KERNELS_H
#define CASTOR_KERNELS_H

#include "formats.h"

/* How far ahead weights are asked for: panels are short, and a processor's own foresight begins anew at each of them. */
#define AHEAD 2048
/* Few rows take more panels together, or each sum would wait for the one before it. */
#define MOST_PANELS 4
/* How many rows of activations are computed together: their sums take half of the registers. */
#define MOST_ROWS (REGISTERS / 2 * LANES / 16)
/* With how many rows weights of any format become floats in registers; those of the usual ones always do. */
#define DIRECT_ROWS (LANES == 16 ? 4 : 2)
/* How many columns become floats together otherwise: a block of any format. */
#define CHUNK 256

/* Sums are [panel, part][row]; `w` has as many panels as are computed together, and more. */
typedef Floats Sums[MOST_PANELS * PARTS][MOST_ROWS];
typedef void (*Kernel)(const uint8_t *const *w, int panels, int columns, const float *x, Floats (*sums)[MOST_ROWS]);

/* Ask for a part of what comes after a block, each time that another group of its columns is begun. */
INLINE void ask_ahead(const uint8_t *block, int format, int group) {
    const int bytes = block_bytes(format), groups = LAYOUTS[format].columns / LAYOUTS[format].scale_columns;
    const int share = (bytes / groups + 63) / 64 * 64;
    const uint8_t *next = block + (bytes > AHEAD ? bytes : AHEAD) + group * share;
    for (int line = 0; line < share; line += 64) __builtin_prefetch(next + line);
}

/* Add the products with some panels to their sums; x is [column][rows]. */
INLINE void multiply(const uint8_t *const *w, int format, int columns, const float *x, int panels, int rows,
                     Floats (*sums)[MOST_ROWS]) {
    const int vectors = panels * PARTS, together = columns_of_step(format), of_scale = LAYOUTS[format].scale_columns;
    Sums total;
#pragma GCC unroll 16
    for (int v = 0; v < vectors; v++)
#pragma GCC unroll 16
        for (int row = 0; row < rows; row++) total[v][row] = sums[v][row];
    for (int64_t block = 0, end = (int64_t)columns / LAYOUTS[format].columns * block_bytes(format); block < end;
         block += block_bytes(format)) {
        Scale scales[MOST_PANELS * PARTS][16], scale[MOST_PANELS * PARTS];
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) read_scales(w[v / PARTS] + block, format, v % PARTS, scales[v]);
        int64_t at = block + LAYOUTS[format].head * PANEL;
        for (int group = 0; group < LAYOUTS[format].columns / of_scale; group++) {
#pragma GCC unroll 16
            for (int v = 0; v < vectors; v++) {
                scale[v] = scales[v][group];
                if (v % PARTS == 0) ask_ahead(w[v / PARTS] + block, format, group);
            }
            for (int step = 0; step < of_scale / together; step++, at += step_bytes(format)) {
                Step digits[MOST_PANELS * PARTS];
#pragma GCC unroll 16
                for (int v = 0; v < vectors; v++) digits[v] = load_digits(w[v / PARTS] + at, v % PARTS, format);
#pragma GCC unroll 16
                for (int i = 0; i < together; i++, x += rows)
#pragma GCC unroll 16
                    for (int v = 0; v < vectors; v++) {
                        Floats weights = weights_in(&digits[v], format, i, &scale[v]);
                        if (rows > 1) weights = in_register(weights);
#pragma GCC unroll 16
                        for (int row = 0; row < rows; row++) total[v][row] += weights * x[row];
                    }
            }
        }
    }
#pragma GCC unroll 16
    for (int v = 0; v < vectors; v++)
#pragma GCC unroll 16
        for (int row = 0; row < rows; row++) sums[v][row] = total[v][row];
}

/* How many panels are computed together: as far as their sums and scales fit into three quarters of the registers. */
INLINE int panels_together(int format, int rows) {
    const int scales = LAYOUTS[format].head > 0 ? 2 : 0;
    int panels = MOST_PANELS;
    while (panels > 1 && panels * PARTS * (rows + scales) > REGISTERS * 3 / 4) panels /= 2;
    return panels;
}

#define KERNEL(format, rows)                                                                                          \
    static void multiply_##format##_##rows(const uint8_t *const *w, int panels, int columns, const float *x,          \
                                           Floats (*sums)[MOST_ROWS]) {                                               \
        const int together = panels_together(format, rows);                                                           \
        for (int p = 0; p < panels; p += together)                                                                    \
            multiply(w + p, format, columns, x, together, rows, sums + p * PARTS);                                    \
    }
#define NAME(format, rows) multiply_##format##_##rows
#if MOST_ROWS == 16
#define FEW_KERNELS(format) KERNEL(format, 1) KERNEL(format, 2) KERNEL(format, 4)
#define KERNELS(format) FEW_KERNELS(format) KERNEL(format, 8) KERNEL(format, 16)
#define FEW_NAMES(format) [format] = {NAME(format, 1), NAME(format, 2), NAME(format, 4)},
#define NAMES(format) \
    [format] = {NAME(format, 1), NAME(format, 2), NAME(format, 4), NAME(format, 8), NAME(format, 16)},
#else
#define FEW_KERNELS(format) KERNEL(format, 1) KERNEL(format, 2)
#define FEW_NAMES(format) [format] = {NAME(format, 1), NAME(format, 2)},
#if MOST_ROWS == 4
#define KERNELS(format) FEW_KERNELS(format) KERNEL(format, 4)
#define NAMES(format) [format] = {NAME(format, 1), NAME(format, 2), NAME(format, 4)},
#else
#define KERNELS FEW_KERNELS
#define NAMES FEW_NAMES
#endif
#endif
#define USUAL_FORMATS(do) do(FLOAT) do(BRAIN) do(Q8_0) do(Q4_0) do(Q4_1)
#define OTHER_FORMATS(do) \
    do(Q5_0) do(Q5_1) do(IQ4_NL) do(MXFP4) do(Q2_K) do(Q3_K) do(Q4_K) do(Q5_K) do(Q6_K) do(IQ4_XS) \
    do(F8_128) do(F8_32) do(I8_128) do(I8_32) do(I4_128) do(I4_32) do(NVFP4) do(NF4) do(FP4) \
    do(IQ1) do(IQ2) do(IQ3_XXS) do(IQ3_S)

USUAL_FORMATS(KERNELS)
OTHER_FORMATS(FEW_KERNELS)

static const Kernel KERNEL_OF[FORMATS][5] = {USUAL_FORMATS(NAMES) OTHER_FORMATS(FEW_NAMES)};

/* NULL where columns become floats first. */
INLINE Kernel kernel_for(int format, int rows) { return KERNEL_OF[format][__builtin_ctz((unsigned)rows)]; }

/* The weights of whole blocks of a panel as floats, exactly what its format stands for: a panel in the format FLOAT. */
INLINE void unpack(const uint8_t *panel, int format, int columns, float *out) {
    const int together = columns_of_step(format), of_scale = LAYOUTS[format].scale_columns;
    for (; columns > 0; columns -= LAYOUTS[format].columns, panel += block_bytes(format)) {
        Scale scales[PARTS][16];
        for (int part = 0; part < PARTS; part++) read_scales(panel, format, part, scales[part]);
        const uint8_t *at = panel + LAYOUTS[format].head * PANEL;
        for (int group = 0; group < LAYOUTS[format].columns / of_scale; group++) {
            ask_ahead(panel, format, group);
            for (int step = 0; step < of_scale / together; step++, at += step_bytes(format), out += together * PANEL)
                for (int part = 0; part < PARTS; part++) {
                    Step digits = load_digits(at, part, format);
#pragma GCC unroll 16
                    for (int i = 0; i < together; i++)
                        store(out + i * PANEL + part * LANES, weights_in(&digits, format, i, &scales[part][group]));
                }
        }
    }
}

#define UNPACKED(format) \
    case format: unpack(panel, format, columns, out); break;
static void unpack_panel(const uint8_t *panel, int format, int columns, float *out) {
    switch (format) { USUAL_FORMATS(UNPACKED) OTHER_FORMATS(UNPACKED) }
}

/* Panels of any formats: a chunk of their columns as floats, then the next one. There must be room for MOST_PANELS. */
static void multiply_unpacked(const uint8_t *const *w, const uint8_t *formats, int panels, int columns, const float *x,
                              int rows, float *room, Floats (*sums)[MOST_ROWS]) {
    const int together = panels_together(FLOAT, rows);
    for (int first = 0; first < panels; first += together)
        for (int column = 0; column < columns; column += CHUNK) {
            int some = columns - column < CHUNK ? columns - column : CHUNK;
            const uint8_t *floats[MOST_PANELS];
            for (int p = 0; p < together; p++) {
                int number = first + p < panels ? p : 0, format = formats[first + number];
                float *out = room + number * some * PANEL;
                floats[p] = (const uint8_t *)out;
                if (number == p)
                    unpack_panel(w[first + p] + (int64_t)column / LAYOUTS[format].columns * block_bytes(format), format,
                                 some, out);
            }
            kernel_for(FLOAT, rows)(floats, together, some, x + (int64_t)column * rows, sums + first * PARTS);
        }
}

/* Panels of several formats: those of each one together, beside the first of them where they are few. */
static void multiply_mixed(const uint8_t *const *w, const uint8_t *formats, int panels, int columns, const float *x,
                           int rows, Floats (*sums)[MOST_ROWS]) {
    for (unsigned left = (1u << panels) - 1; left != 0;) {
        const uint8_t *same[MOST_PANELS];
        int numbers[MOST_PANELS], first = __builtin_ctz(left), count = 0;
        for (int p = first; p < panels; p++)
            if (formats[p] == formats[first]) {
                left &= ~(1u << p);
                same[count] = w[p];
                numbers[count++] = p;
            }
        for (int p = count; p < MOST_PANELS; p++) same[p] = w[first];
        Sums some = {{{0}}};
        kernel_for(formats[first], rows)(same, count, columns, x, some);
        for (int p = 0; p < count; p++) memcpy(sums + numbers[p] * PARTS, some + p * PARTS, PARTS * sizeof *some);
    }
}

#endif
