/* A mixture of experts: a router gives each token to a few gated MLPs, and their results are added up by weight. Tokens
 * are gathered by expert, so that an expert's weights are read once for all of its tokens, and those of others not at
 * all. A token meets its experts in the order of their numbers, whichever tokens are beside it.
 */

#ifndef CASTOR_EXPERTS_H
#define CASTOR_EXPERTS_H

#include "rows.h"

typedef struct {
    Engine *engine;
    const Layer *layer;
    const int32_t *tokens; /* of one expert */
    const float *weights;
} Mixture;

/* The experts with the largest scores, and their shares: of all experts, or of the chosen ones. Of equals the first. */
static void choose_experts(void *argument, int token, int thread) {
    (void)thread;
    const Mixture *mixture = argument;
    const Layer *layer = mixture->layer;
    const float *scores = mixture->engine->scores + (int64_t)token * layer->router.num_panels * PANEL;
    int32_t *chosen = mixture->engine->chosen + (int64_t)token * layer->num_chosen;
    float *shares = mixture->engine->shares + (int64_t)token * layer->num_chosen, total = 0;
    for (int place = 0; place < layer->num_chosen; place++) {
        int best = -1;
        for (int expert = 0; expert < layer->num_experts; expert++) {
            int taken = 0;
            for (int before = 0; before < place; before++) taken |= chosen[before] == expert;
            if (!taken && (best < 0 || scores[expert] > scores[best])) best = expert;
        }
        chosen[place] = best;
        shares[place] = expf(scores[best] - scores[chosen[0]]);
    }
    if (layer->shares_of_chosen)
        for (int place = 0; place < layer->num_chosen; place++) total += shares[place];
    else
        for (int expert = 0; expert < layer->num_experts; expert++) total += expf(scores[expert] - scores[chosen[0]]);
    for (int place = 0; place < layer->num_chosen; place++) shares[place] /= total;
}

/* The tokens of one expert after those of another, with their shares; `starts` are where those of each expert begin. */
static void gather_tokens(Engine *engine, const Layer *layer) {
    int32_t *starts = engine->starts, places = engine->batch->tokens * layer->num_chosen;
    memset(starts, 0, (size_t)(layer->num_experts + 2) * sizeof *starts);
    for (int place = 0; place < places; place++) starts[engine->chosen[place] + 2]++;
    for (int expert = 0; expert < layer->num_experts; expert++) starts[expert + 2] += starts[expert + 1];
    for (int place = 0; place < places; place++) { /* starts[expert + 1] counts up to where the next one begins */
        int32_t at = starts[engine->chosen[place] + 1]++;
        engine->gathered[at] = place / layer->num_chosen;
        engine->weights[at] = engine->shares[place];
    }
}

static void add_share(void *argument, int row, int thread) {
    (void)thread;
    const Mixture *mixture = argument;
    int hidden = mixture->engine->model->hidden;
    const float *result = mixture->engine->results + (int64_t)row * hidden;
    float *branch = mixture->engine->branch + (int64_t)mixture->tokens[row] * hidden;
    for (int i = 0; i < hidden; i += LANES) store(branch + i, load(branch + i) + load(result + i) * mixture->weights[row]);
}

static void compute_expert(Engine *engine, const Layer *layer, int expert) {
    const Model *model = engine->model;
    const Matrix *down = &layer->experts_down[expert];
    int first = engine->starts[expert], rows = engine->starts[expert + 1] - first;
    if (rows == 0) return;
    pack_some(engine, (Packing){.input = engine->states, .norm = layer->before_mlp, .chosen = engine->gathered + first,
                                .rows = rows, .columns = model->hidden});
    multiply_all(engine, &layer->experts_gate_up[expert], rows, STORE, engine->inner, 2 * down->columns);
    pack_some(engine, (Packing){.input = engine->inner, .rows = rows, .columns = down->columns, .gate = &layer->gate});
    multiply_all(engine, down, rows, STORE, engine->results, model->hidden);
    Mixture mixture = {engine, layer, engine->gathered + first, engine->weights + first};
    run_phase(&engine->pool, add_share, &mixture, rows);
}

static void compute_experts(Engine *engine, const Layer *layer) {
    const Model *model = engine->model;
    int tokens = engine->batch->tokens;
    pack_some(engine, (Packing){.input = engine->states, .norm = layer->before_mlp, .rows = tokens, .columns = model->hidden});
    multiply_all(engine, &layer->router, tokens, STORE, engine->scores, layer->router.num_panels * PANEL);
    Mixture mixture = {.engine = engine, .layer = layer};
    run_phase(&engine->pool, choose_experts, &mixture, tokens);
    gather_tokens(engine, layer);
    memset(engine->branch, 0, (size_t)tokens * model->hidden * sizeof(float));
    for (int expert = 0; expert < layer->num_experts; expert++) compute_expert(engine, layer, expert);
    add_branch(engine, layer->after_mlp);
}

#endif
