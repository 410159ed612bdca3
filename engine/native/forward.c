/* The forward of a decoder with rotary positions, RMS norms and a gated MLP (Llama, Mistral, Qwen and their kin) on a CPU.
 *
 * Called from Python through ctypes: `engine/native/library.py` mirrors the structures. One call computes all tokens of a
 * step, laid end to end, and writes their keys and values into the pages.
 */

#include "attention.h"
#include "matmul.h"
#include "products.h"
#include "states.h"

typedef struct {
    Matrix qkv, output, gate_up, down;
    const float *attention_norm, *mlp_norm;
    const float *query_norm, *key_norm; /* one for all heads, or NULL */
    float *keys, *values;
    int32_t window; /* 0: sees everything */
    int32_t group; /* whose block tables it has */
} Layer;

typedef struct {
    const Layer *layers;
    Matrix head;
    const float *norm;
    const float *cosines, *sines; /* [max_context, rotary] */
    int32_t num_layers, hidden, intermediate, heads, kv_heads, size, rotary, block_size, max_context;
    float eps, scaling;
} Model;

typedef struct {
    int32_t tokens, wanted, table_size;
    const int32_t *positions, *tables, *table_starts; /* see Attention; the tables of each group take table_size */
    const int32_t *rows;                              /* [wanted]: the tokens whose logits are asked for */
    float *states;                                    /* [tokens, hidden]: the embeddings; used up */
    float *logits;                                    /* [wanted, vocabulary, full panels] */
} Batch;

typedef struct {
    Pool pool;
    const Model *model;
    const Batch *batch;
    float *packed, *qkv, *mixed, *inner; /* activations of a step */
    float *scratch[MAX_THREADS];
    int32_t *groups; /* tokens of one sequence that attend together: the first of each group, and the end of the last */
    int32_t num_groups;
    int32_t room; /* tokens that the activations have room for */
} Engine;

typedef struct {
    const float *input, *norm; /* norm NULL: as they are */
    const int32_t *chosen;     /* the rows to take, or NULL for all */
    float *packed;
    int32_t rows, columns;
    float eps;
} Packing;

static float inverse_rms(const float *x, int count, float eps) {
    Floats squares = {0};
    for (int i = 0; i < count; i += LANES) squares += load(x + i) * load(x + i);
    return 1.0f / sqrtf(sum_of(squares) / (float)count + eps);
}

/* Lay some rows out as the kernels read them, [column][rows], normed on the way; rows that only fill up are zero. */
static void pack_block(void *argument, int block, int thread) {
    (void)thread;
    const Packing *p = argument;
    int first = block * MOST_ROWS, rows = rows_together(p->rows - first);
    float *out = p->packed + (int64_t)first * p->columns;
    for (int row = 0; row < rows; row++) {
        int known = first + row < p->rows;
        int token = !known ? 0 : p->chosen ? p->chosen[first + row] : first + row;
        const float *input = p->input + (int64_t)token * p->columns;
        float factor = !known ? 0.0f : p->norm ? inverse_rms(input, p->columns, p->eps) : 1.0f;
        for (int column = 0; column < p->columns; column++)
            out[(int64_t)column * rows + row] = known ? input[column] * factor * (p->norm ? p->norm[column] : 1.0f) : 0.0f;
    }
}

static void pack(Engine *engine, const float *input, const float *norm, const int32_t *chosen, int rows, int columns) {
    Packing packing = {input, norm, chosen, engine->packed, rows, columns, engine->model->eps};
    run_phase(&engine->pool, pack_block, &packing, (rows + MOST_ROWS - 1) / MOST_ROWS);
}

static void multiply_all(Engine *engine, const Matrix *matrix, int rows, int how, float *out, int stride) {
    Product product = {matrix, engine->packed, out, engine->scratch, rows, stride, how};
    run_phase(&engine->pool, multiply_tile, &product, tiles_of(matrix, rows));
}

typedef struct {
    Engine *engine;
    const Layer *layer;
} Rotation;

static void turn_head(const Model *model, float *head, const float *norm, int position) {
    int half = model->rotary / 2;
    const float *cosines = model->cosines + (int64_t)position * model->rotary;
    const float *sines = model->sines + (int64_t)position * model->rotary;
    if (norm) {
        float factor = inverse_rms(head, model->size, model->eps);
        for (int i = 0; i < model->size; i++) head[i] = head[i] * factor * norm[i];
    }
    for (int i = 0; i < half; i++) {
        float first = head[i], second = head[i + half];
        head[i] = first * cosines[i] - second * sines[i];
        head[i + half] = second * cosines[i + half] + first * sines[i + half];
    }
}

static const int32_t *tables_of(const Batch *batch, const Layer *layer) {
    return batch->tables + (int64_t)layer->group * batch->table_size;
}

/* Rotate the queries and keys of a token, and write its key and value into their page. Numbers that are not finite would
 * outlive the sequence in the page; none is written. */
static void place_token(void *argument, int token, int thread) {
    (void)thread;
    const Rotation *rotation = argument;
    const Engine *engine = rotation->engine;
    const Model *model = engine->model;
    const Batch *batch = engine->batch;
    const Layer *layer = rotation->layer;
    int size = model->size, width = (model->heads + 2 * model->kv_heads) * size;
    float *row = engine->qkv + (int64_t)token * width;
    int position = batch->positions[token], slot = position % model->block_size;
    for (int head = 0; head < model->heads; head++) turn_head(model, row + head * size, layer->query_norm, position);
    const int32_t *table = tables_of(batch, layer) + batch->table_starts[token];
    int64_t page = (int64_t)table[position / model->block_size] * model->kv_heads * size * model->block_size;
    for (int head = 0; head < model->kv_heads; head++, page += (int64_t)size * model->block_size) {
        float *key = row + (model->heads + head) * size, *value = key + model->kv_heads * size;
        turn_head(model, key, layer->key_norm, position);
        for (int i = 0; i < size; i++) {
            layer->keys[page + (int64_t)i * model->block_size + slot] = isfinite(key[i]) ? key[i] : 0;
            layer->values[page + (int64_t)slot * size + i] = isfinite(value[i]) ? value[i] : 0;
        }
    }
}

static void attend_all(Engine *engine, const Layer *layer) {
    const Model *model = engine->model;
    const Batch *batch = engine->batch;
    Attention attention = {
        .query = engine->qkv, .out = engine->mixed, .keys = layer->keys, .values = layer->values,
        .positions = batch->positions, .tables = tables_of(batch, layer), .table_starts = batch->table_starts,
        .groups = engine->groups, .scratch = engine->scratch, .stride = (model->heads + 2 * model->kv_heads) * model->size,
        .heads = model->heads, .kv_heads = model->kv_heads, .size = model->size, .block_size = model->block_size,
        .window = layer->window, .scaling = model->scaling,
    };
    run_phase(&engine->pool, attend, &attention, engine->num_groups * model->kv_heads);
}

/* Tokens whose tables begin at the same place follow each other in one sequence. */
static void group_tokens(Engine *engine) {
    const Batch *batch = engine->batch;
    int most = queries_together(engine->model->heads / engine->model->kv_heads), count = 0;
    for (int token = 0; token < batch->tokens; token++)
        if (token == 0 || batch->table_starts[token] != batch->table_starts[token - 1] ||
            token - engine->groups[count - 1] == most)
            engine->groups[count++] = token;
    engine->groups[count] = batch->tokens;
    engine->num_groups = count;
}

static void compute_layer(Engine *engine, const Layer *layer) {
    const Model *model = engine->model;
    float *states = engine->batch->states;
    int tokens = engine->batch->tokens, width = model->heads * model->size;
    pack(engine, states, layer->attention_norm, NULL, tokens, model->hidden);
    multiply_all(engine, &layer->qkv, tokens, STORE, engine->qkv, width + 2 * model->kv_heads * model->size);
    Rotation rotation = {engine, layer};
    run_phase(&engine->pool, place_token, &rotation, tokens);
    attend_all(engine, layer);
    pack(engine, engine->mixed, NULL, NULL, tokens, width);
    multiply_all(engine, &layer->output, tokens, ADD, states, model->hidden);
    pack(engine, states, layer->mlp_norm, NULL, tokens, model->hidden);
    multiply_all(engine, &layer->gate_up, tokens, GATE, engine->inner, model->intermediate);
    pack(engine, engine->inner, NULL, NULL, tokens, model->intermediate);
    multiply_all(engine, &layer->down, tokens, ADD, states, model->hidden);
}

static int larger(int one, int other) { return one > other ? one : other; }

/* Room for the activations of a step; kept, and grown where a step is larger. Returns 0, or -1 without memory. */
static int make_room(Engine *engine, int tokens) {
    const Model *m = engine->model;
    if (tokens <= engine->room) return 0;
    int64_t rows = (tokens + MOST_ROWS - 1) / MOST_ROWS * MOST_ROWS, width = m->heads * m->size;
    int64_t widest = larger(larger(m->hidden, m->intermediate), (int)width);
    struct { float **place; int64_t columns; } wanted[] = {
        {&engine->packed, widest}, {&engine->qkv, width + 2 * m->kv_heads * m->size},
        {&engine->mixed, width}, {&engine->inner, m->intermediate},
    };
    engine->room = 0;
    for (int i = 0; i < 4; i++) {
        free(*wanted[i].place);
        *wanted[i].place = aligned_alloc(64, (size_t)(rows * wanted[i].columns) * sizeof(float));
        if (*wanted[i].place == NULL) return -1;
    }
    free(engine->groups);
    engine->groups = malloc((size_t)(rows + 1) * sizeof *engine->groups);
    if (engine->groups == NULL) return -1;
    engine->room = (int)rows;
    return 0;
}

/* Returns 0, or -1 where memory ran out. */
int castor_forward(Engine *engine, const Batch *batch) {
    const Model *model = engine->model;
    engine->batch = batch;
    if (make_room(engine, larger(batch->tokens, batch->wanted)) != 0) return -1;
    group_tokens(engine);
    for (int layer = 0; layer < model->num_layers; layer++) compute_layer(engine, &model->layers[layer]);
    if (batch->wanted > 0) {
        pack(engine, batch->states, model->norm, batch->rows, batch->wanted, model->hidden);
        multiply_all(engine, &model->head, batch->wanted, STORE, batch->logits, model->head.num_panels * PANEL);
    }
    return 0;
}

void castor_close(Engine *engine) {
    stop_threads(&engine->pool);
    for (int thread = 0; thread < MAX_THREADS; thread++) free(engine->scratch[thread]);
    free(engine->packed);
    free(engine->qkv);
    free(engine->mixed);
    free(engine->inner);
    free(engine->groups);
    free(engine);
}

/* NULL where memory or threads cannot be had. `model` must live as long as the engine. */
Engine *castor_open(const Model *model, int threads) {
    Engine *engine = calloc(1, sizeof *engine);
    if (engine == NULL) return NULL;
    engine->model = model;
    int64_t widest = larger(larger(model->hidden, model->intermediate), model->heads * model->size);
    int64_t scores = (int64_t)MOST_ATTENDING * (model->max_context + 2 * LANES);
    int64_t weights = widest * MOST_PANELS * PANEL, floats = weights > scores ? weights : scores;
    engine->pool.threads = threads < 1 ? 1 : threads < MAX_THREADS ? threads : MAX_THREADS;
    int ready = start_threads(&engine->pool) == 0;
    for (int thread = 0; thread < engine->pool.threads; thread++) {
        engine->scratch[thread] = aligned_alloc(64, (size_t)(floats + PANEL - floats % PANEL) * sizeof(float));
        ready &= engine->scratch[thread] != NULL;
    }
    if (ready) return engine;
    castor_close(engine);
    return NULL;
}
