/* Products of activations with weights that stay as small as their file has them; all sums are in float32.
 *
 * A weight matrix [channels, columns] is cut into panels of 16 channels, which are one, two or four vectors: the parts.
 * Weights become floats in registers, just before they are used: exactly the numbers that the file stands for. Every
 * activation row meets them in the same order whatever else is in the batch, so its results do not depend on its
 * neighbours.
 *
 * A group is 32 columns of a panel: scales and least values where its format has them, then words of 32 bits, one for each
 * channel, that hold as many columns as fit, the first one lowest.
 *
 *   Q4     16 scales and 16 least values in half precision, 4 * 16 words of eight digits from 0 to 15
 *   Q8     16 scales in half precision, 8 * 16 words of four signed bytes
 *   BRAIN  16 * 16 words of two bfloat16
 *   FLOAT  32 * 16 floats
 */

#ifndef CASTOR_MATMUL_H
#define CASTOR_MATMUL_H

#include "pool.h"
#include "vectors.h"

enum { Q4, Q8, BRAIN, FLOAT };
enum { STORE, ADD, GATE };

#define PANEL 16
#define PARTS (PANEL / LANES)
#define GROUP 32
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
typedef void (*Kernel)(const uint8_t *const *w, int panels, int groups, const float *x, Floats (*sums)[MOST_ROWS]);

/* How many rows are computed together where so many are left: the kernels know powers of two. */
INLINE int rows_together(int left) {
    int rows = 1;
    while (rows < left && rows < MOST_ROWS) rows *= 2;
    return rows;
}

INLINE int columns_in_word(int format) { return format == Q4 ? 8 : format == Q8 ? 4 : format == BRAIN ? 2 : 1; }

INLINE int bytes_before_words(int format) { return format == Q4 ? 4 * PANEL : format == Q8 ? 2 * PANEL : 0; }

INLINE int group_bytes(int format) {
    return bytes_before_words(format) + GROUP / columns_in_word(format) * 4 * PANEL;
}

/* A part of a group: every word of it is 16 words after the one before. */
typedef struct {
    const uint8_t *words;
    Floats scale, least;
} Group;

INLINE Group group_at(const uint8_t *panel, int format, int number, int part) {
    const uint8_t *start = panel + (int64_t)number * group_bytes(format);
    if (part == 0)
        for (int line = 0; line < group_bytes(format); line += 64) __builtin_prefetch(start + AHEAD + line);
    Group group = {start + bytes_before_words(format) + 4 * LANES * part, {0}, {0}};
    if (format == Q4 || format == Q8) group.scale = load_halves(start + 2 * LANES * part);
    if (format == Q4) group.least = load_halves(start + 2 * PANEL + 2 * LANES * part);
    return group;
}

/* The weights of one column, number `i` of those that the words hold. */
INLINE Floats weights_in(Words words, int format, int i, const Group *group) {
    if (format == Q4) return digits(words >> 4 * i) * group->scale + group->least;
    if (format == Q8) return __builtin_convertvector((Ints)(words << (24 - 8 * i)) >> 24, Floats) * group->scale;
    if (format == BRAIN) return (Floats)(i ? words & 0xffff0000 : words << 16);
    return (Floats)words;
}

/* Sums over all columns of some panels; x is [column][rows]. */
INLINE void multiply(const uint8_t *const *w, int format, int groups, const float *x, int panels, int rows,
                     Floats (*sums)[MOST_ROWS]) {
    const int together = columns_in_word(format), vectors = panels * PARTS;
    Sums total;
#pragma GCC unroll 16
    for (int v = 0; v < vectors; v++)
#pragma GCC unroll 16
        for (int row = 0; row < rows; row++) total[v][row] = (Floats){0};
    for (int g = 0; g < groups; g++) {
        Group group[MOST_PANELS * PARTS];
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) group[v] = group_at(w[v / PARTS], format, g, v % PARTS);
        for (int word = 0; word < GROUP / together; word++) {
            Words words[MOST_PANELS * PARTS];
#pragma GCC unroll 16
            for (int v = 0; v < vectors; v++) words[v] = load_words(group[v].words + word * 4 * PANEL);
#pragma GCC unroll 8
            for (int i = 0; i < together; i++, x += rows)
#pragma GCC unroll 16
                for (int v = 0; v < vectors; v++) {
                    Floats weights = weights_in(words[v], format, i, &group[v]);
#pragma GCC unroll 16
                    for (int row = 0; row < rows; row++) total[v][row] += weights * x[row];
                }
        }
    }
#pragma GCC unroll 16
    for (int v = 0; v < vectors; v++)
#pragma GCC unroll 16
        for (int row = 0; row < rows; row++) sums[v][row] = total[v][row];
}

/* The panels of a tile: together as far as their sums fit into the registers, then the next ones. */
#define KERNEL(format, rows)                                                                                          \
    static void multiply_##format##_##rows(const uint8_t *const *w, int panels, int groups, const float *x,           \
                                           Floats (*sums)[MOST_ROWS]) {                                               \
        const int fitting = MOST_SUMS / (rows * PARTS), together = fitting < MOST_PANELS ? fitting : MOST_PANELS;      \
        for (int p = 0; p < panels; p += together)                                                                    \
            multiply(w + p, format, groups, x, together, rows, sums + p * PARTS);                                     \
    }
#if MOST_ROWS == 16
#define KERNELS(format) KERNEL(format, 1) KERNEL(format, 2) KERNEL(format, 4) KERNEL(format, 8) KERNEL(format, 16)
#define NAMES(format) {multiply_##format##_1, multiply_##format##_2, multiply_##format##_4, multiply_##format##_8, multiply_##format##_16}
#elif MOST_ROWS == 4
#define KERNELS(format) KERNEL(format, 1) KERNEL(format, 2) KERNEL(format, 4)
#define NAMES(format) {multiply_##format##_1, multiply_##format##_2, multiply_##format##_4}
#else
#define KERNELS(format) KERNEL(format, 1) KERNEL(format, 2)
#define NAMES(format) {multiply_##format##_1, multiply_##format##_2}
#endif

KERNELS(Q4)
KERNELS(Q8)
KERNELS(BRAIN)
KERNELS(FLOAT)

static const Kernel KERNEL_OF[4][5] = {NAMES(Q4), NAMES(Q8), NAMES(BRAIN), NAMES(FLOAT)};

INLINE Kernel kernel_for(int format, int rows) { return KERNEL_OF[format][__builtin_ctz((unsigned)rows)]; }

/* The weights of a panel as floats, exactly what its format stands for: a panel in the format FLOAT. */
INLINE void unpack(const uint8_t *panel, int format, int groups, float *out) {
    const int together = columns_in_word(format);
    for (int g = 0; g < groups; g++, out += GROUP * PANEL)
        for (int part = 0; part < PARTS; part++) {
            Group group = group_at(panel, format, g, part);
            for (int word = 0; word < GROUP / together; word++) {
                Words words = load_words(group.words + word * 4 * PANEL);
                for (int i = 0; i < together; i++)
                    store(out + (word * together + i) * PANEL + part * LANES, weights_in(words, format, i, &group));
            }
        }
}

static void unpack_panel(const uint8_t *panel, int format, int groups, float *out) {
    switch (format) {
        case Q4: unpack(panel, Q4, groups, out); break;
        case Q8: unpack(panel, Q8, groups, out); break;
        case BRAIN: unpack(panel, BRAIN, groups, out); break;
        default: unpack(panel, FLOAT, groups, out);
    }
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
        unpack_panel(w[p], matrix->formats[first + p], matrix->columns / GROUP, floats);
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
        kernel_for(format, rows)(w, panels, matrix->columns / GROUP, packed, sums);
        finish_rows(product, first, rows, first_panel, panels, sums);
    }
}

static int tiles_of(const Matrix *matrix, int rows) {
    return (matrix->num_panels + PANELS_OF(rows) - 1) / PANELS_OF(rows);
}

#endif
