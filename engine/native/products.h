/* One product at a time, for models whose layers are computed elsewhere: rows of activations by a matrix in panels. */

#ifndef CASTOR_PRODUCTS_H
#define CASTOR_PRODUCTS_H

#include "matmul.h"

typedef struct {
    Pool pool;
    float *packed; /* the activations of a product */
    int64_t packed_room;
    float *scratch[MAX_THREADS]; /* a tile of weights as floats */
    int64_t scratch_room;
} Products;

typedef struct {
    const float *input; /* [rows, columns] */
    float *packed;
    int32_t rows, columns;
} Rows;

/* Lay some rows out as the kernels read them, [column][rows]; rows that only fill up are zero. */
static void lay_out(void *argument, int block, int thread) {
    (void)thread;
    const Rows *r = argument;
    int first = block * MOST_ROWS, rows = rows_together(r->rows - first);
    float *out = r->packed + (int64_t)first * r->columns;
    for (int row = 0; row < rows; row++) {
        const float *input = r->input + (int64_t)(first + row) * r->columns;
        int known = first + row < r->rows;
        for (int column = 0; column < r->columns; column++)
            out[(int64_t)column * rows + row] = known ? input[column] : 0.0f;
    }
}

static int grow(float **place, int64_t *room, int64_t floats) {
    if (floats <= *room) return 0;
    free(*place);
    *room = 0;
    *place = aligned_alloc(64, (size_t)(floats + PANEL - floats % PANEL) * sizeof(float));
    if (*place == NULL) return -1;
    *room = floats;
    return 0;
}

/* out [rows, channels in full panels] = input [rows, columns] times the matrix. Returns 0, or -1 without memory. */
int castor_product(Products *products, const Matrix *matrix, const float *input, float *out, int32_t rows) {
    int64_t filled = (rows + MOST_ROWS - 1) / MOST_ROWS * MOST_ROWS;
    if (grow(&products->packed, &products->packed_room, filled * matrix->columns) != 0) return -1;
    int64_t tile = (int64_t)matrix->columns * MOST_PANELS * PANEL;
    for (int thread = 0; tile > products->scratch_room && thread < products->pool.threads; thread++) {
        int64_t none = 0;
        if (grow(&products->scratch[thread], &none, tile) != 0) return products->scratch_room = 0, -1;
    }
    if (tile > products->scratch_room) products->scratch_room = tile;
    Rows laid = {input, products->packed, rows, matrix->columns};
    run_phase(&products->pool, lay_out, &laid, (rows + MOST_ROWS - 1) / MOST_ROWS);
    Product product = {matrix, products->packed, out, products->scratch, rows, matrix->num_panels * PANEL, STORE};
    run_phase(&products->pool, multiply_tile, &product, tiles_of(matrix, rows));
    return 0;
}

void castor_products_close(Products *products) {
    stop_threads(&products->pool);
    for (int thread = 0; thread < MAX_THREADS; thread++) free(products->scratch[thread]);
    free(products->packed);
    free(products);
}

/* NULL where memory or threads cannot be had. */
Products *castor_products_open(int threads) {
    Products *products = calloc(1, sizeof *products);
    if (products == NULL) return NULL;
    products->pool.threads = threads < 1 ? 1 : threads < MAX_THREADS ? threads : MAX_THREADS;
    if (start_threads(&products->pool) == 0) return products;
    castor_products_close(products);
    return NULL;
}

#endif
