/* Times the products of one decode step: `layers` layers of a Llama-like model, each with its own weights. */

#include "../engine/native/matmul.h"
#include <time.h>

#define MATRICES 4

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static size_t bytes_of_panel(int format, int columns) {
    return (size_t)(columns / LAYOUTS[format].columns) * (size_t)block_bytes(format);
}

static size_t bytes_of(int format, const int32_t *channels, const int32_t *columns) {
    size_t bytes = 0;
    for (int i = 0; i < MATRICES; i++)
        bytes += (size_t)(channels[i] / PANEL) * bytes_of_panel(format, columns[i]);
    return bytes;
}

static const uint8_t *multiply_layer(Pool *pool, const uint8_t *weights, int format, int rows, const int32_t *channels,
                                     const int32_t *columns, const float *packed, float *out, float **scratch) {
    for (int i = 0; i < MATRICES; i++) {
        int panels = channels[i] / PANEL;
        const uint8_t *addresses[panels];
        uint8_t formats[panels];
        for (int panel = 0; panel < panels; panel++) {
            addresses[panel] = weights;
            formats[panel] = (uint8_t)format;
            weights += bytes_of_panel(format, columns[i]);
        }
        Matrix matrix = {addresses, formats, NULL, panels, columns[i]};
        Product product = {&matrix, packed, out, scratch, rows, channels[i], STORE};
        run_phase(pool, multiply_tile, &product, tiles_of(&matrix, rows));
    }
    return weights;
}

/* Seconds of the quickest of `times` steps, or -1 without memory. Sizes are [MATRICES]: channels out, columns in. */
double time_step(int format, int rows, int threads, int layers, int times, const int32_t *channels,
                 const int32_t *columns, int widest) {
    Pool pool = {.threads = threads};
    float *scratch[MAX_THREADS] = {NULL};
    size_t bytes = bytes_of(format, channels, columns) * (size_t)layers, padded = (size_t)(rows + MOST_ROWS);
    uint8_t *weights = aligned_alloc(64, (bytes + 63) / 64 * 64);
    float *packed = aligned_alloc(64, padded * (size_t)widest * sizeof(float));
    float *out = aligned_alloc(64, padded * (size_t)widest * sizeof(float));
    double best = -1;
    for (int thread = 0; thread < threads; thread++)
        scratch[thread] = aligned_alloc(64, (size_t)widest * MOST_PANELS * PANEL * sizeof(float));
    if (weights != NULL && packed != NULL && out != NULL && start_threads(&pool) == 0) {
        memset(weights, 0x11, bytes);
        for (size_t i = 0; i < padded * (size_t)widest; i++) packed[i] = 0.5f;
        for (int time = 0; time < times; time++) {
            const uint8_t *next = weights;
            double start = seconds();
            for (int layer = 0; layer < layers; layer++)
                next = multiply_layer(&pool, next, format, rows, channels, columns, packed, out, scratch);
            double taken = seconds() - start;
            if (best < 0 || taken < best) best = taken;
        }
        stop_threads(&pool);
    }
    for (int thread = 0; thread < threads; thread++) free(scratch[thread]);
    free(weights);
    free(packed);
    free(out);
    return best;
}
