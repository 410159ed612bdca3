/* The forward of a decoder with rotary positions, RMS norms and gated MLPs (Llama, Qwen, Gemma and their kin) on a CPU.
 *
 * Called from Python through ctypes: `engine/native/library.py` mirrors the structures. One call computes all tokens of a
 * step, laid end to end, and writes their keys and values into the pages.
 */

#include "experts.h"
#include "products.h"
#include "states.h"

/* The embedding of a token is a channel of a panel. */
static void embed_token(void *argument, int token, int thread) {
    const Engine *engine = argument;
    const Matrix *embedding = &engine->model->embedding;
    int hidden = engine->model->hidden, id = engine->batch->ids[token], panel = id / PANEL;
    float *state = engine->states + (int64_t)token * hidden, *floats = engine->scratch[thread];
    if (id < 0) {
        memcpy(state, engine->batch->vectors + (int64_t)(-1 - id) * hidden, (size_t)hidden * sizeof(float));
        return;
    }
    unpack_panel(embedding->panels[panel], embedding->formats[panel], embedding->columns, floats);
    for (int i = 0; i < hidden; i++) state[i] = floats[i * PANEL + id % PANEL] * engine->model->embedding_scale;
}

typedef struct {
    Engine *engine;
    const Layer *layer;
} Rotation;

INLINE void turn_pairs(float *head, int pairs, int step, int apart, const float *cosines, const float *sines) {
    for (int i = 0; i < pairs; i++) {
        float first = head[i * step], second = head[i * step + apart];
        head[i * step] = first * cosines[i] - second * sines[i];
        head[i * step + apart] = second * cosines[i] + first * sines[i];
    }
}

/* Norm the queries or the keys of a token, and rotate them. */
static void turn_heads(const Model *model, const Layer *layer, float *heads, int count, const float *norm, int position) {
    int length = layer->whole_norms ? count * model->size : model->size;
    const float *cosines = layer->cosines + (int64_t)position * layer->pairs;
    const float *sines = layer->sines + (int64_t)position * layer->pairs;
    for (float *vector = heads; norm && vector < heads + count * model->size; vector += length)
        norm_vector(vector, norm, length, model->eps);
    for (float *head = heads; head < heads + count * model->size; head += model->size)
        if (layer->alternating) turn_pairs(head, layer->pairs, 2, 1, cosines, sines);
        else turn_pairs(head, layer->pairs, 1, layer->pairs, cosines, sines);
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
    int size = model->size;
    float *row = engine->qkv + (int64_t)token * qkv_width(model), *keys = row + model->heads * size;
    int position = batch->positions[token], slot = position % model->block_size;
    turn_heads(model, layer, row, model->heads, layer->query_norm, position);
    turn_heads(model, layer, keys, model->kv_heads, layer->key_norm, position);
    const int32_t *table = tables_of(batch, layer) + batch->table_starts[token];
    int64_t page = (int64_t)table[position / model->block_size] * model->kv_heads * size * model->block_size;
    for (int head = 0; head < model->kv_heads; head++, page += (int64_t)size * model->block_size) {
        float *key = keys + head * size, *value = key + model->kv_heads * size;
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
        .groups = engine->groups, .scratch = engine->scratch, .sinks = layer->sinks, .stride = qkv_width(model),
        .heads = model->heads, .kv_heads = model->kv_heads, .size = model->size, .block_size = model->block_size,
        .window = layer->window, .scaling = layer->scaling, .softcap = layer->softcap,
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

static void compute_attention(Engine *engine, const Layer *layer) {
    const Model *model = engine->model;
    int tokens = engine->batch->tokens, hidden = model->hidden, width = model->heads * model->size;
    pack_some(engine, (Packing){.input = engine->states, .norm = layer->before_attention, .rows = tokens, .columns = hidden});
    multiply_all(engine, &layer->qkv, tokens, STORE, engine->qkv, qkv_width(model));
    Rotation rotation = {engine, layer};
    run_phase(&engine->pool, place_token, &rotation, tokens);
    attend_all(engine, layer);
    pack_some(engine, (Packing){.input = engine->mixed, .rows = tokens, .columns = width});
    add_product(engine, &layer->output, layer->after_attention);
}

static void compute_mlp(Engine *engine, const Layer *layer) {
    int tokens = engine->batch->tokens, hidden = engine->model->hidden, inner = layer->down.columns;
    pack_some(engine, (Packing){.input = engine->states, .norm = layer->before_mlp, .rows = tokens, .columns = hidden});
    multiply_all(engine, &layer->gate_up, tokens, STORE, engine->inner, 2 * inner);
    pack_some(engine, (Packing){.input = engine->inner, .rows = tokens, .columns = inner, .gate = &layer->gate});
    add_product(engine, &layer->down, layer->after_mlp);
}

static void compute_layer(Engine *engine, const Layer *layer) {
    compute_attention(engine, layer);
    if (layer->num_experts > 0) compute_experts(engine, layer);
    else compute_mlp(engine, layer);
}

/* Make room at the address of a pointer for numbers of four bytes. Returns 0, or -1 without memory. */
static int renew(void *place, int64_t count) {
    void *room;
    memcpy(&room, place, sizeof room);
    free(room);
    room = aligned_alloc(64, (size_t)((count * 4 + 63) / 64 * 64 + 64));
    memcpy(place, &room, sizeof room);
    return room == NULL ? -1 : 0;
}

/* Room for the activations of a step; kept, and grown where a step is larger. Returns 0, or -1 without memory. */
static int make_room(Engine *engine, int tokens) {
    const Model *m = engine->model;
    if (tokens <= engine->room) return 0;
    int64_t rows = (tokens + MOST_ROWS - 1) / MOST_ROWS * MOST_ROWS, width = m->heads * m->size;
    int64_t widest = larger(larger(m->hidden, m->intermediate), (int)width), mixture = m->num_experts > 0;
    int failed = 0;
    engine->room = 0;
    failed |= renew(&engine->states, rows * m->hidden);
    failed |= renew(&engine->packed, rows * widest);
    failed |= renew(&engine->qkv, rows * qkv_width(m));
    failed |= renew(&engine->mixed, rows * width);
    failed |= renew(&engine->inner, rows * 2 * m->intermediate);
    failed |= renew(&engine->branch, rows * m->hidden);
    failed |= renew(&engine->groups, rows + 1);
    failed |= renew(&engine->scores, rows * (m->num_experts + 2 * PANEL));
    failed |= renew(&engine->merits, rows * m->num_experts);
    failed |= renew(&engine->results, rows * m->hidden * mixture);
    failed |= renew(&engine->shares, rows * m->num_chosen);
    failed |= renew(&engine->weights, rows * m->num_chosen);
    failed |= renew(&engine->chosen, rows * m->num_chosen);
    failed |= renew(&engine->gathered, rows * m->num_chosen);
    failed |= renew(&engine->starts, m->num_experts + 2);
    if (failed == 0) engine->room = (int)rows;
    return failed;
}

/* Returns 0, or -1 where memory ran out. */
int castor_forward(Engine *engine, const Batch *batch) {
    const Model *model = engine->model;
    engine->batch = batch;
    if (make_room(engine, larger(batch->tokens, batch->wanted)) != 0) return -1;
    group_tokens(engine);
    run_phase(&engine->pool, embed_token, engine, batch->tokens);
    for (int layer = 0; layer < model->num_layers; layer++) compute_layer(engine, &model->layers[layer]);
    if (batch->wanted > 0) {
        pack_some(engine, (Packing){.input = engine->states, .norm = model->norm, .chosen = batch->rows,
                                    .rows = batch->wanted, .columns = model->hidden});
        multiply_all(engine, &model->head, batch->wanted, STORE, batch->logits, model->head.num_panels * PANEL);
        bound_logits(engine);
    }
    return 0;
}

void castor_close(Engine *engine) {
    stop_threads(&engine->pool);
    for (int thread = 0; thread < MAX_THREADS; thread++) free(engine->scratch[thread]);
    void *rooms[] = {engine->states, engine->packed, engine->qkv, engine->mixed, engine->inner,
                     engine->branch, engine->groups, engine->scores, engine->merits, engine->results, engine->shares,
                     engine->weights, engine->chosen, engine->gathered, engine->starts};
    for (int room = 0; room < (int)(sizeof rooms / sizeof *rooms); room++) free(rooms[room]);
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
