/* A mixture of experts: a router gives each token to a few gated MLPs, and their results are added up by weight. Tokens
 * are gathered by expert, so that an expert's weights are read once for all of its tokens, and those of others not at
 * all. A token meets its experts in the order of their numbers, whichever tokens are beside it. What all tokens see beside
 * their experts comes first.
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

/* Scores become those of a softmax or sigmoids in their place; merits are what experts are chosen by. */
static void weigh_experts(const Layer *layer, float *scores, float *merits) {
    float most = -INFINITY, total = 0;
    for (int expert = 0; expert < layer->num_experts; expert++) {
        merits[expert] = scores[expert];
        if (scores[expert] > most) most = scores[expert];
    }
    for (int expert = 0; expert < layer->num_experts; expert++) {
        scores[expert] = layer->sigmoid ? 1.0f / (1.0f + expf(-scores[expert])) : expf(scores[expert] - most);
        total += scores[expert];
    }
    for (int expert = 0; expert < layer->num_experts; expert++) {
        if (!layer->sigmoid) scores[expert] /= total;
        if (layer->correction) merits[expert] = scores[expert] + layer->correction[expert];
        if (!(merits[expert] > -FLT_MAX)) merits[expert] = -FLT_MAX; /* nor is one that is no number chosen twice */
    }
}

static float best_two(const float *merits, int count) {
    float first = -INFINITY, second = -INFINITY;
    for (int i = 0; i < count; i++) {
        if (merits[i] > second) second = merits[i];
        if (second > first) second = first, first = merits[i];
    }
    return first + second;
}

/* Leave nothing to groups of experts but to those whose two best have the largest merits together. */
static void limit_groups(const Layer *layer, float *merits, float *sums) {
    int count = layer->num_groups, size = layer->num_experts / count;
    for (int group = 0; group < count; group++) sums[group] = best_two(merits + group * size, size);
    for (int group = 0; group < count; group++) {
        int better = 0;
        for (int other = 0; other < count; other++)
            better += sums[other] > sums[group] || (sums[other] == sums[group] && other < group);
        for (int expert = 0; better >= layer->groups_chosen && expert < size; expert++)
            merits[group * size + expert] = -INFINITY;
    }
}

/* The experts with the largest merits, and their weights. Of equals the first. */
static void choose_experts(void *argument, int token, int thread) {
    const Mixture *mixture = argument;
    const Layer *layer = mixture->layer;
    float *scores = mixture->engine->scores + (int64_t)token * layer->router.num_panels * PANEL;
    float *merits = mixture->engine->merits + (int64_t)token * layer->num_experts;
    int32_t *chosen = mixture->engine->chosen + (int64_t)token * layer->num_chosen;
    float *shares = mixture->engine->shares + (int64_t)token * layer->num_chosen, total = 0;
    weigh_experts(layer, scores, merits);
    if (layer->groups_chosen < layer->num_groups) limit_groups(layer, merits, mixture->engine->scratch[thread]);
    for (int place = 0; place < layer->num_chosen; place++) {
        int best = 0;
        for (int expert = 1; expert < layer->num_experts; expert++)
            if (merits[expert] > merits[best]) best = expert;
        merits[best] = -INFINITY;
        chosen[place] = best;
        shares[place] = scores[best];
        total += scores[best];
    }
    if (!layer->shares_of_chosen) total = 1;
    for (int place = 0; place < layer->num_chosen; place++) shares[place] = shares[place] / total * layer->routed_scale;
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
    pack_some(engine, (Packing){.input = engine->inner, .rows = rows, .columns = down->columns, .gate = &layer->experts_gate});
    multiply_all(engine, down, rows, STORE, engine->results, model->hidden);
    Mixture mixture = {engine, layer, engine->gathered + first, engine->weights + first};
    run_phase(&engine->pool, add_share, &mixture, rows);
}

static void weigh_shared(void *argument, int token, int thread) {
    (void)thread;
    const Mixture *mixture = argument;
    const Layer *layer = mixture->layer;
    int hidden = mixture->engine->model->hidden, panels = layer->router.num_panels;
    float score = mixture->engine->scores[((int64_t)token * panels + panels - 1) * PANEL];
    float *branch = mixture->engine->branch + (int64_t)token * hidden, weight = 1.0f / (1.0f + expf(-score));
    for (int i = 0; i < hidden; i += LANES) store(branch + i, load(branch + i) * weight);
}

/* What all tokens see beside their experts, of the packed rows. */
static void compute_shared(Engine *engine, const Layer *layer) {
    int tokens = engine->batch->tokens, inner = layer->down.columns;
    multiply_all(engine, &layer->gate_up, tokens, STORE, engine->inner, 2 * inner);
    pack_some(engine, (Packing){.input = engine->inner, .rows = tokens, .columns = inner, .gate = &layer->gate});
    multiply_all(engine, &layer->down, tokens, STORE, engine->branch, engine->model->hidden);
    Mixture mixture = {.engine = engine, .layer = layer};
    if (layer->gates_shared) run_phase(&engine->pool, weigh_shared, &mixture, tokens);
}

static void compute_experts(Engine *engine, const Layer *layer) {
    const Model *model = engine->model;
    int tokens = engine->batch->tokens;
    pack_some(engine, (Packing){.input = engine->states, .norm = layer->before_mlp, .rows = tokens, .columns = model->hidden});
    multiply_all(engine, &layer->router, tokens, STORE, engine->scores, layer->router.num_panels * PANEL);
    Mixture mixture = {.engine = engine, .layer = layer};
    run_phase(&engine->pool, choose_experts, &mixture, tokens);
    gather_tokens(engine, layer);
    if (layer->down.num_panels > 0) compute_shared(engine, layer);
    else memset(engine->branch, 0, (size_t)tokens * model->hidden * sizeof(float));
    for (int expert = 0; expert < layer->num_experts; expert++) compute_expert(engine, layer, expert);
    add_branch(engine, layer->after_mlp);
}

#endif
