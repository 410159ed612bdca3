/* Products of activations with weights that stay as small as their file has them; all sums are in float32.
 *
 * A weight matrix [channels, columns] is cut into panels of 16 channels (formats.h), which are one, two or four vectors:
 * the parts. Weights become floats just before they are used: exactly the numbers that the file stands for. Every
 * activation row meets them in the same order whatever else is in the batch, so its results do not depend on its
 * neighbours.
 */

#ifndef CASTOR_MATMUL_H
#define CASTOR_MATMUL_H

#include "kernels.h"
#include "pool.h"

enum { STORE, ADD };

#define PANELS_OF(rows) ((rows) <= 4 ? MOST_PANELS : 2)

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

/* How many rows are computed together where so many are left: the kernels know powers of two. */
INLINE int rows_together(int left) {
    int rows = 1;
    while (rows < left && rows < MOST_ROWS) rows *= 2;
    return rows;
}

/* Give the sums of a tile to where the product is wanted. */
static void finish_rows(const Product *product, int first, int rows, int panel, int panels, Floats (*sums)[MOST_ROWS]) {
    for (int row = 0; row < rows && first + row < product->rows; row++) {
        float *out = product->out + (int64_t)(first + row) * product->stride;
        for (int v = 0; v < panels * PARTS; v++) {
            int number = panel + v / PARTS, lane = v % PARTS * LANES, channel = number * PANEL + lane;
            Floats value = sums[v][row];
            if (product->matrix->bias != NULL) value += load(product->matrix->bias + channel);
            if (product->finish == ADD) value += load(out + channel);
            store(out + channel, value);
        }
    }
}

/* Panels that are multiplied together: as they are, or as floats where they are used again and again. */
typedef struct {
    const uint8_t *w[MOST_PANELS];
    uint8_t formats[MOST_PANELS];
    int panels, mixed;
} Tile;

static Tile tile_of(const Product *product, int first, float *room) {
    const Matrix *matrix = product->matrix;
    int left = matrix->num_panels - first, most = PANELS_OF(product->rows);
    Tile tile = {.panels = left < most ? left : most};
    for (int p = 0; p < tile.panels; p++) {
        tile.w[p] = matrix->panels[first + p];
        tile.formats[p] = matrix->formats[first + p];
        if (tile.formats[p] != FLOAT && product->rows > MOST_ROWS) {
            float *floats = room + (int64_t)p * matrix->columns * PANEL;
            unpack_panel(tile.w[p], tile.formats[p], matrix->columns, floats);
            tile.w[p] = (const uint8_t *)floats;
            tile.formats[p] = FLOAT;
        }
        tile.mixed |= tile.formats[p] != tile.formats[0];
    }
    for (int p = tile.panels; p < MOST_PANELS; p++) tile.w[p] = tile.w[0];
    return tile;
}

static void multiply_rows(const Tile *tile, int columns, const float *x, int rows, float *room,
                          Floats (*sums)[MOST_ROWS]) {
    int direct = 1;
    for (int p = 0; p < tile->panels; p++) direct &= kernel_for(tile->formats[p], rows) != NULL;
    if (!direct)
        multiply_unpacked(tile->w, tile->formats, tile->panels, columns, x, rows, room, sums);
    else if (tile->mixed)
        multiply_mixed(tile->w, tile->formats, tile->panels, columns, x, rows, sums);
    else
        kernel_for(tile->formats[0], rows)(tile->w, tile->panels, columns, x, sums);
}

static void multiply_tile(void *argument, int number, int thread) {
    const Product *product = argument;
    int first_panel = number * PANELS_OF(product->rows), columns = product->matrix->columns;
    float *room = product->scratch[thread];
    Tile tile = tile_of(product, first_panel, room);
    for (int first = 0, rows; first < product->rows; first += rows) {
        rows = rows_together(product->rows - first);
        Sums sums = {{{0}}};
        multiply_rows(&tile, columns, product->packed + (int64_t)first * columns, rows, room, sums);
        finish_rows(product, first, rows, first_panel, tile.panels, sums);
    }
}

static int tiles_of(const Matrix *matrix, int rows) {
    return (matrix->num_panels + PANELS_OF(rows) - 1) / PANELS_OF(rows);
}

#endif
