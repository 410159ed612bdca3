/* Products of activations with weights that stay as small as their file has them; all sums are in float32.
 *
 * A weight matrix [channels, columns] is cut into panels of 16 channels (formats.h), which are one, two or four vectors: the
 * parts. Weights become floats just before they are used: exactly the numbers that the file stands for. Every activation
 * row meets them in the same order whatever else is in the batch, so its results do not depend on its neighbours.
 */

#ifndef CASTOR_MATMUL_H
#define CASTOR_MATMUL_H

#include "formats.h"
#include "pool.h"

enum { STORE, ADD, GATE };

/* How far ahead weights are asked for: panels are short, and a processor's own foresight begins anew at each of them. */
#define AHEAD 2048
/* Few rows take more panels together, or each sum would wait for the one before it. */
#define MOST_PANELS 4
#define PANELS_OF(rows) ((rows) <= 4 ? MOST_PANELS : 2)

/* How many sums of a vector are computed together, and so how many rows of activations: half of the registers hold sums. */
#define MOST_SUMS (REGISTERS / 2)
#define MOST_ROWS (REGISTERS / 2 * LANES / 16)

typedef struct {
    const uint8_t *const *panels;
    const uint8_t *formats;
    const float *bias; /* one for each channel, or NULL */
    int32_t num_panels, columns;
} Matrix;

typedef struct {
    const Matrix *matrix;
    const float *packed; /* the activations, see `pack` */
    float *out;          /* [rows, stride] */
    float *const *scratch; /* for each thread: room for a tile of weights as floats */
    int32_t rows, stride, finish;
} Product;

/* Sums are [panel, part][row]; `w` has as many panels as are computed together, and more. */
typedef Floats Sums[MOST_PANELS * PARTS][MOST_ROWS];
typedef void (*Kernel)(const uint8_t *const *w, int panels, int columns, const float *x, Floats (*sums)[MOST_ROWS]);

/* How many rows are computed together where so many are left: the kernels know powers of two. */
INLINE int rows_together(int left) {
    int rows = 1;
    while (rows < left && rows < MOST_ROWS) rows *= 2;
    return rows;
}

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
    for (int64_t offset = 0, end = (int64_t)columns / LAYOUTS[format].columns * block_bytes(format); offset < end;) {
        Scale scales[MOST_PANELS * PARTS][16], scale[MOST_PANELS * PARTS];
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) read_scales(w[v / PARTS] + offset, format, v % PARTS, scales[v]);
        int64_t at = offset + LAYOUTS[format].head * PANEL;
        for (int group = 0; group < LAYOUTS[format].columns / of_scale; group++) {
#pragma GCC unroll 16
            for (int v = 0; v < vectors; v++) {
                scale[v] = scales[v][group];
                if (v % PARTS == 0) ask_ahead(w[v / PARTS] + offset, format, group);
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
#pragma GCC unroll 16
                        for (int row = 0; row < rows; row++) total[v][row] += weights * x[row];
                    }
            }
        }
        offset += block_bytes(format);
    }
#pragma GCC unroll 16
    for (int v = 0; v < vectors; v++)
#pragma GCC unroll 16
        for (int row = 0; row < rows; row++) sums[v][row] = total[v][row];
}

/* The panels of a tile: together as far as their sums fit into the registers, then the next ones. */
#define KERNEL(format, rows)                                                                                          \
    static void multiply_##format##_##rows(const uint8_t *const *w, int panels, int columns, const float *x,          \
                                           Floats (*sums)[MOST_ROWS]) {                                               \
        const int fitting = MOST_SUMS / (rows * PARTS), together = fitting < MOST_PANELS ? fitting : MOST_PANELS;      \
        for (int p = 0; p < panels; p += together)                                                                    \
            multiply(w + p, format, columns, x, together, rows, sums + p * PARTS);                                    \
    }
#if MOST_ROWS == 16
#define KERNELS(format) KERNEL(format, 1) KERNEL(format, 2) KERNEL(format, 4) KERNEL(format, 8) KERNEL(format, 16)
#define NAMES(format) [format] = {multiply_##format##_1, multiply_##format##_2, multiply_##format##_4, multiply_##format##_8, multiply_##format##_16}
#elif MOST_ROWS == 4
#define KERNELS(format) KERNEL(format, 1) KERNEL(format, 2) KERNEL(format, 4)
#define NAMES(format) [format] = {multiply_##format##_1, multiply_##format##_2, multiply_##format##_4}
#else
#define KERNELS(format) KERNEL(format, 1) KERNEL(format, 2)
#define NAMES(format) [format] = {multiply_##format##_1, multiply_##format##_2}
#endif
#define EACH_FORMAT(do)                                                                                               \
    do(FLOAT) do(BRAIN) do(Q8_0) do(Q4_0) do(Q4_1) do(Q5_0) do(Q5_1) do(IQ4_NL) do(MXFP4) do(Q2_K) do(Q3_K) do(Q4_K) \
    do(Q5_K) do(Q6_K) do(IQ4_XS)

EACH_FORMAT(KERNELS)

#define NAMES_OF(format) NAMES(format),
static const Kernel KERNEL_OF[FORMATS][5] = {EACH_FORMAT(NAMES_OF)};

INLINE Kernel kernel_for(int format, int rows) { return KERNEL_OF[format][__builtin_ctz((unsigned)rows)]; }

/* The weights of some columns of a panel as floats, exactly what its format stands for: a panel in the format FLOAT. */
INLINE void unpack(const uint8_t *panel, int format, int columns, float *out) {
    const int together = columns_of_step(format);
    for (; columns > 0; columns -= LAYOUTS[format].columns, panel += block_bytes(format))
        for (int part = 0; part < PARTS; part++) {
            Scale scales[16];
            read_scales(panel, format, part, scales);
            const uint8_t *at = panel + LAYOUTS[format].head * PANEL;
            for (int column = 0; column < LAYOUTS[format].columns; column += together, at += step_bytes(format)) {
                Step digits = load_digits(at, part, format);
#pragma GCC unroll 16
                for (int i = 0; i < together; i++)
                    store(out + (column + i) * PANEL + part * LANES,
                          weights_in(&digits, format, i, &scales[column / LAYOUTS[format].scale_columns]));
            }
            if (part == PARTS - 1) out += LAYOUTS[format].columns * PANEL;
        }
}

#define UNPACKED(format) case format: unpack(panel, format, columns, out); break;
static void unpack_panel(const uint8_t *panel, int format, int columns, float *out) {
    switch (format) { EACH_FORMAT(UNPACKED) }
}

/* Give the sums of a tile to where the product is wanted. GATE: silu of the even panels times the odd ones. */
static void finish_rows(const Product *product, int first, int rows, int panel, int panels, Floats (*sums)[MOST_ROWS]) {
    for (int row = 0; row < rows && first + row < product->rows; row++) {
        float *out = product->out + (int64_t)(first + row) * product->stride;
        for (int v = 0; v < panels * PARTS; v++) {
            int number = panel + v / PARTS, lane = v % PARTS * LANES, channel = number * PANEL + lane;
            Floats value = sums[v][row];
            if (product->finish == GATE) {
                if (number % 2 == 0) continue;
                Floats gate = sums[v - PARTS][row];
                store(out + number / 2 * PANEL + lane, gate / (1.0f + exponential(-gate)) * value);
                continue;
            }
            if (product->matrix->bias != NULL) value += load(product->matrix->bias + channel);
            if (product->finish == ADD) value += load(out + channel);
            store(out + channel, value);
        }
    }
}

/* The panels of a tile. They become floats first where they are used again and again, or differ in their formats. */
static int prepare_panels(const Product *product, int first, int panels, float *room, const uint8_t **w) {
    const Matrix *matrix = product->matrix;
    int format = matrix->formats[first], mixed = 0;
    for (int p = 0; p < MOST_PANELS; p++) {
        w[p] = matrix->panels[first + (p < panels ? p : 0)];
        if (p < panels) mixed |= matrix->formats[first + p] != format;
    }
    if (!mixed && (format == FLOAT || product->rows <= MOST_ROWS)) return format;
    for (int p = 0; p < panels; p++) {
        float *floats = room + (int64_t)p * matrix->columns * PANEL;
        unpack_panel(w[p], matrix->formats[first + p], matrix->columns, floats);
        w[p] = (const uint8_t *)floats;
    }
    for (int p = panels; p < MOST_PANELS; p++) w[p] = w[0];
    return FLOAT;
}

static void multiply_tile(void *argument, int tile, int thread) {
    const Product *product = argument;
    const Matrix *matrix = product->matrix;
    int first_panel = tile * PANELS_OF(product->rows), left = matrix->num_panels - first_panel;
    int panels = left < PANELS_OF(product->rows) ? left : PANELS_OF(product->rows);
    const uint8_t *w[MOST_PANELS];
    int format = prepare_panels(product, first_panel, panels, product->scratch[thread], w);
    Sums sums;
    for (int first = 0, rows; first < product->rows; first += rows) {
        rows = rows_together(product->rows - first);
        const float *packed = product->packed + (int64_t)first * matrix->columns;
        memset(sums, 0, sizeof sums);
        kernel_for(format, rows)(w, panels, matrix->columns, packed, sums);
        finish_rows(product, first, rows, first_panel, panels, sums);
    }
}

static int tiles_of(const Matrix *matrix, int rows) {
    return (matrix->num_panels + PANELS_OF(rows) - 1) / PANELS_OF(rows);
}

#endif
