/* Products of activations with weights that stay as small as their file has them; all sums are in float32.
 *
 * A weight matrix [channels, columns] is cut into panels of 16 channels, one for each lane. Weights become floats in
 * registers, just before they are used: exactly the numbers that the file stands for. Every activation row meets them in
 * the same order whatever else is in the batch, so its results do not depend on its neighbours.
 *
 * A group is 32 columns of a panel: scales and least values where its format has them, then words of 32 bits, one for each
 * lane, that hold as many columns as fit, the first one lowest.
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

#define GROUP 32
/* How far ahead weights are asked for: panels are short, and a processor's own foresight begins anew at each of them. */
#define AHEAD 2048
#define TILE_PANELS 2
#define TILE (TILE_PANELS * LANES)

/* How many rows of activations are computed together: as many sums as the registers of the processor hold. */
#if defined(__AVX512F__)
#define MOST_ROWS 16
#else
#define MOST_ROWS 4
#endif

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

typedef void (*Kernel)(const uint8_t *const *w, int groups, const float *x, Floats (*sums)[MOST_ROWS]);

/* How many rows are computed together where so many are left: the kernels know powers of two. */
INLINE int rows_together(int left) {
    int rows = 1;
    while (rows < left && rows < MOST_ROWS) rows *= 2;
    return rows;
}

INLINE void use(Floats weight, const float *x, int rows, Floats *sums) {
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++) sums[row] += weight * x[row];
}

INLINE int columns_in_word(int format) { return format == Q4 ? 8 : format == Q8 ? 4 : format == BRAIN ? 2 : 1; }

INLINE int bytes_before_words(int format) { return format == Q4 ? 4 * LANES : format == Q8 ? 2 * LANES : 0; }

INLINE int group_bytes(int format) {
    return bytes_before_words(format) + GROUP / columns_in_word(format) * (int)sizeof(Words);
}

typedef struct {
    const uint8_t *words;
    Floats scale, least;
} Group;

INLINE Group group_at(const uint8_t *panel, int format, int number) {
    const uint8_t *start = panel + (int64_t)number * group_bytes(format);
    for (int line = 0; line < group_bytes(format); line += 64) __builtin_prefetch(start + AHEAD + line);
    Group group = {start + bytes_before_words(format), {0}, {0}};
    if (format == Q4 || format == Q8) group.scale = load_halves(start);
    if (format == Q4) group.least = load_halves(start + 2 * LANES);
    return group;
}

/* The weights of one column, number `i` of those that the words hold. */
INLINE Floats weights_in(Words words, int format, int i, const Group *group) {
    if (format == Q4) return digits(words >> 4 * i) * group->scale + group->least;
    if (format == Q8) return __builtin_convertvector((Ints)(words << (24 - 8 * i)) >> 24, Floats) * group->scale;
    if (format == BRAIN) return (Floats)(i ? words & 0xffff0000 : words << 16);
    return (Floats)words;
}

/* sums[panel][row] over all columns; x is [column][rows]. */
INLINE void multiply(const uint8_t *const *w, int format, int groups, const float *x, int panels, int rows,
                     Floats (*sums)[MOST_ROWS]) {
    const int together = columns_in_word(format);
    Floats total[TILE_PANELS][MOST_ROWS];
    for (int p = 0; p < panels; p++)
#pragma GCC unroll 16
        for (int row = 0; row < rows; row++) total[p][row] = (Floats){0};
    for (int g = 0; g < groups; g++) {
        Group group[TILE_PANELS];
        for (int p = 0; p < panels; p++) group[p] = group_at(w[p], format, g);
        for (int word = 0; word < GROUP / together; word++) {
            Words words[TILE_PANELS];
            for (int p = 0; p < panels; p++) words[p] = load_words(group[p].words + word * sizeof(Words));
#pragma GCC unroll 8
            for (int i = 0; i < together; i++, x += rows)
                for (int p = 0; p < panels; p++) use(weights_in(words[p], format, i, &group[p]), x, rows, total[p]);
        }
    }
    for (int p = 0; p < panels; p++)
#pragma GCC unroll 16
        for (int row = 0; row < rows; row++) sums[p][row] = total[p][row];
}

/* A tile has two panels; where the sums of both do not fit into the registers, one comes after the other. */
#define KERNEL(format, rows)                                                                                          \
    static void multiply_##format##_##rows(const uint8_t *const *w, int groups, const float *x,                       \
                                           Floats (*sums)[MOST_ROWS]) {                                               \
        if (rows * TILE_PANELS <= MOST_ROWS) {                                                                        \
            multiply(w, format, groups, x, TILE_PANELS, rows, sums);                                                  \
        } else {                                                                                                      \
            for (int p = 0; p < TILE_PANELS; p++) multiply(w + p, format, groups, x, 1, rows, sums + p);              \
        }                                                                                                             \
    }
#if MOST_ROWS == 16
#define KERNELS(format) KERNEL(format, 1) KERNEL(format, 2) KERNEL(format, 4) KERNEL(format, 8) KERNEL(format, 16)
#define NAMES(format) {multiply_##format##_1, multiply_##format##_2, multiply_##format##_4, multiply_##format##_8, multiply_##format##_16}
#else
#define KERNELS(format) KERNEL(format, 1) KERNEL(format, 2) KERNEL(format, 4)
#define NAMES(format) {multiply_##format##_1, multiply_##format##_2, multiply_##format##_4}
#endif

KERNELS(Q4)
KERNELS(Q8)
KERNELS(BRAIN)
KERNELS(FLOAT)

static const Kernel KERNEL_OF[4][5] = {NAMES(Q4), NAMES(Q8), NAMES(BRAIN), NAMES(FLOAT)};

INLINE Kernel kernel_for(int format, int rows) { return KERNEL_OF[format][__builtin_ctz((unsigned)rows)]; }

/* The weights of a panel as floats, exactly what its format stands for: a panel in the format FLOAT. */
INLINE void unpack(const uint8_t *panel, int format, int groups, float *out) {
    for (int g = 0; g < groups; g++) {
        Group group = group_at(panel, format, g);
        for (int word = 0; word < GROUP / columns_in_word(format); word++) {
            Words words = load_words(group.words + word * sizeof(Words));
            for (int i = 0; i < columns_in_word(format); i++, out += LANES)
                store(out, weights_in(words, format, i, &group));
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

/* Give the sums of a tile to where the product is wanted. GATE: silu of the first panel times the second one. */
static void finish_rows(const Product *product, int first, int rows, int tile, int panels, Floats (*sums)[MOST_ROWS]) {
    for (int row = 0; row < rows && first + row < product->rows; row++) {
        float *out = product->out + (int64_t)(first + row) * product->stride;
        if (product->finish == GATE) {
            Floats gate = sums[0][row], up = sums[1][row];
            store(out + tile * LANES, gate / (1.0f + exponential(-gate)) * up);
            continue;
        }
        for (int p = 0; p < panels; p++) {
            int channel = (tile * TILE_PANELS + p) * LANES;
            Floats value = sums[p][row];
            if (product->matrix->bias != NULL) value += load(product->matrix->bias + channel);
            if (product->finish == ADD) value += load(out + channel);
            store(out + channel, value);
        }
    }
}

static void multiply_tile(void *argument, int tile, int thread) {
    const Product *product = argument;
    const Matrix *matrix = product->matrix;
    int groups = matrix->columns / GROUP, first_panel = tile * TILE_PANELS;
    int panels = matrix->num_panels - first_panel < TILE_PANELS ? 1 : TILE_PANELS;
    const uint8_t *w[TILE_PANELS];
    int format = matrix->formats[first_panel], mixed = 0;
    for (int p = 0; p < TILE_PANELS; p++) {
        int panel = first_panel + (p < panels ? p : 0);
        w[p] = matrix->panels[panel];
        mixed |= matrix->formats[panel] != format;
    }
    if (mixed || (format != FLOAT && product->rows > MOST_ROWS)) {
        for (int p = 0; p < panels; p++) {
            float *floats = product->scratch[thread] + (int64_t)p * matrix->columns * LANES;
            unpack_panel(w[p], matrix->formats[first_panel + p], groups, floats);
            w[p] = (const uint8_t *)floats;
        }
        if (panels == 1) w[1] = w[0];
        format = FLOAT;
    }
    Floats sums[TILE_PANELS][MOST_ROWS];
    for (int first = 0, rows; first < product->rows; first += rows) {
        rows = rows_together(product->rows - first);
        kernel_for(format, rows)(w, groups, product->packed + (int64_t)first * matrix->columns, sums);
        finish_rows(product, first, rows, tile, panels, sums);
    }
}

#endif
