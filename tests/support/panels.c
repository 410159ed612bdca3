/* What tests call of the kernels: a panel as floats, and the product of a matrix with some rows. */

#include "../../engine/native/matmul.h"

int lanes(void) { return LANES; }

int bytes_of_block(int format) { return block_bytes(format); }

void unpack_one(const uint8_t *panel, int format, int columns, float *out) {
    unpack_panel(panel, format, columns, out);
}

/* x is [rows, columns], out [rows, channels]. */
void product(const Matrix *matrix, const float *x, int rows, float *out) {
    int padded = (rows + MOST_ROWS - 1) / MOST_ROWS * MOST_ROWS;
    size_t columns = (size_t)matrix->columns;
    float *packed = calloc((size_t)padded * columns, sizeof *packed);
    float *scratch = aligned_alloc(64, columns * MOST_PANELS * PANEL * sizeof *scratch);
    for (int first = 0; first < rows; first += MOST_ROWS) {
        int together = rows_together(rows - first);
        for (int row = 0; row < together && first + row < rows; row++)
            for (size_t column = 0; column < columns; column++)
                packed[(size_t)first * columns + column * (size_t)together + (size_t)row] =
                    x[(size_t)(first + row) * columns + column];
    }
    Product all = {matrix, packed, out, &scratch, rows, matrix->num_panels * PANEL, STORE};
    for (int tile = 0; tile < tiles_of(matrix, rows); tile++) multiply_tile(&all, tile, 0);
    free(packed);
    free(scratch);
}
