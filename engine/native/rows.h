/* What happens to rows of activations between the products: they are normed, gated, laid out and added. */

#ifndef CASTOR_ROWS_H
#define CASTOR_ROWS_H

#include "model.h"

static float inverse_rms(const float *x, int count, float eps) {
    Floats squares = {0};
    for (int i = 0; i < count; i += LANES) squares += load(x + i) * load(x + i);
    return 1.0f / sqrtf(sum_of(squares) / (float)count + eps);
}

static void norm_vector(float *x, const float *norm, int count, float eps) {
    float factor = inverse_rms(x, count, eps);
    for (int i = 0; i < count; i += LANES) store(x + i, load(x + i) * factor * load(norm + i));
}

typedef struct {
    const float *input;    /* [rows, columns], or with a gate [rows, 2 * columns] */
    const float *norm;     /* NULL: as they are */
    const int32_t *chosen; /* the rows to take, or NULL for all */
    float *packed;
    const Gate *gate;      /* of a gated MLP, or NULL */
    int32_t rows, columns;
    float eps;
} Packing;

/* What a gate makes of the gates and ups of some columns. */
INLINE Floats gated_columns(const Gate *gate, const float *input, int column, int columns) {
    if (!gate->alternating) return gated(gate, load(input + column), load(input + columns + column));
    Floats gates, ups;
    for (int lane = 0; lane < LANES; lane++) {
        gates[lane] = input[2 * (column + lane)];
        ups[lane] = input[2 * (column + lane) + 1];
    }
    return gated(gate, gates, ups);
}

/* Lay some rows out as the kernels read them, [column][rows], normed or gated on the way; rows that only fill up are
 * zero. */
static void pack_block(void *argument, int block, int thread) {
    (void)thread;
    const Packing *p = argument;
    int first = block * MOST_ROWS, rows = rows_together(p->rows - first), width = p->columns * (p->gate ? 2 : 1);
    float *packed = p->packed + (int64_t)first * p->columns;
    for (int row = 0; row < rows; row++) {
        int known = first + row < p->rows;
        int token = !known ? 0 : p->chosen ? p->chosen[first + row] : first + row;
        const float *input = p->input + (int64_t)token * width;
        float factor = known && p->norm ? inverse_rms(input, p->columns, p->eps) : 1.0f;
        for (int column = 0; column < p->columns; column += LANES) {
            Floats value = known ? load(input + column) : (Floats){0};
            if (known && p->norm) value = value * factor * load(p->norm + column);
            if (known && p->gate) value = gated_columns(p->gate, input, column, p->columns);
            float *out = packed + (int64_t)column * rows + row;
            for (int lane = 0; lane < LANES; lane++) out[lane * rows] = value[lane];
        }
    }
}

static void pack_some(Engine *engine, Packing packing) {
    packing.packed = engine->packed;
    packing.eps = engine->model->eps;
    run_phase(&engine->pool, pack_block, &packing, (packing.rows + MOST_ROWS - 1) / MOST_ROWS);
}

static void multiply_all(Engine *engine, const Matrix *matrix, int rows, int how, float *out, int stride) {
    Product product = {matrix, engine->packed, out, engine->scratch, rows, stride, how};
    run_phase(&engine->pool, multiply_tile, &product, tiles_of(matrix, rows));
}

typedef struct {
    const Engine *engine;
    const float *norm;
} Addition;

static void add_row(void *argument, int token, int thread) {
    (void)thread;
    const Addition *addition = argument;
    const Model *model = addition->engine->model;
    float *state = addition->engine->states + (int64_t)token * model->hidden;
    float *branch = addition->engine->branch + (int64_t)token * model->hidden;
    if (addition->norm) norm_vector(branch, addition->norm, model->hidden, model->eps);
    for (int i = 0; i < model->hidden; i += LANES)
        store(state + i, load(state + i) + load(branch + i) * model->branch_scale);
}

static void add_branch(Engine *engine, const float *norm) {
    Addition addition = {engine, norm};
    run_phase(&engine->pool, add_row, &addition, engine->batch->tokens);
}

/* Add what a branch makes of the packed rows to the states; what has to be normed or scaled before waits in between. */
static void add_product(Engine *engine, const Matrix *matrix, const float *norm) {
    int tokens = engine->batch->tokens, hidden = engine->model->hidden;
    int directly = norm == NULL && engine->model->branch_scale == 1.0f;
    multiply_all(engine, matrix, tokens, directly ? ADD : STORE, directly ? engine->states : engine->branch, hidden);
    if (!directly) add_branch(engine, norm);
}

static void finish_logits(void *argument, int panel, int thread) {
    (void)thread;
    const Engine *engine = argument;
    const Model *model = engine->model;
    for (int row = 0; row < engine->batch->wanted; row++) {
        float *logits = engine->batch->logits + ((int64_t)row * model->head.num_panels + panel) * PANEL;
        for (int i = 0; i < PANEL; i += LANES) {
            Floats scaled = load(logits + i) * model->logit_scale;
            store(logits + i, model->logit_softcap > 0 ? softcapped(scaled, model->logit_softcap) : scaled);
        }
    }
}

/* Scale and cap the logits, where a model does. */
static void bound_logits(Engine *engine) {
    const Model *model = engine->model;
    if (model->logit_scale != 1.0f || model->logit_softcap > 0)
        run_phase(&engine->pool, finish_logits, engine, model->head.num_panels);
}

#endif
