/* Attention over the paged cache: each query of each head alone, over its own sequence's pages, in a fixed order.
 *
 * Pages of keys are [blocks, kv heads, size, block size], so that one vector holds a number of sixteen keys; pages of
 * values are [blocks, kv heads, block size, size].
 */

#ifndef CASTOR_ATTENTION_H
#define CASTOR_ATTENTION_H

#include "vectors.h"

#define HEADS_TOGETHER 4
#define VALUES_TOGETHER 4 /* vectors of a value: with the heads, sixteen sums */

typedef struct {
    const float *query; /* [tokens, stride], the heads side by side */
    float *out;         /* [tokens, heads * size] */
    const float *keys, *values;
    const int32_t *positions;             /* of each token in its sequence */
    const int32_t *tables, *table_starts; /* the pages of all sequences, and where those of each token's sequence begin */
    float *const *scratch;                /* for each thread: scores of HEADS_TOGETHER heads over a whole context */
    int32_t stride, heads, kv_heads, size, block_size, window;
    float scaling;
} Attention;

typedef struct {
    const Attention *all;
    const int32_t *table;
    int kv_head, first, last; /* the positions that the query sees */
} View;

INLINE const float *page_of(const View *view, const float *pages, int block) {
    const Attention *a = view->all;
    return pages + ((int64_t)view->table[block] * a->kv_heads + view->kv_head) * a->size * a->block_size;
}

/* scores[head][position - origin] for all positions of the view; the others of its blocks get minus infinity. */
INLINE void score(const View *view, const float *query, int heads, int origin, int width, float *scores) {
    const Attention *a = view->all;
    const Ints lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int position = origin; position <= view->last; position += LANES) {
        const float *keys = page_of(view, a->keys, position / a->block_size) + position % a->block_size;
        Floats sums[HEADS_TOGETHER] = {{0}};
        for (int d = 0; d < a->size; d++) {
            Floats key = load(keys + (int64_t)d * a->block_size);
            for (int h = 0; h < heads; h++) sums[h] += key * query[h * a->size + d];
        }
        Ints at = lanes + position;
        Ints seen = (at >= view->first) & (at <= view->last);
        for (int h = 0; h < heads; h++)
            store(scores + h * width + position - origin, choose(seen, sums[h] * a->scaling, all(-INFINITY)));
    }
}

/* Turn scores into weights that are not divided by their sum yet; returns the sum. */
static float exponentiate(float *scores, int count) {
    Floats most = all(-INFINITY), total = {0};
    for (int i = 0; i < count; i += LANES) {
        Floats here = load(scores + i);
        most = choose(here > most, here, most);
    }
    float top = most[0];
    for (int lane = 1; lane < LANES; lane++) top = most[lane] > top ? most[lane] : top;
    for (int i = 0; i < count; i += LANES) {
        Floats weight = exponential(load(scores + i) - top);
        total += weight;
        store(scores + i, weight);
    }
    return sum_of(total);
}

/* Mix some vectors of the values, from number `d` on, by the weights of each head. */
INLINE void mix(const View *view, const float *weights, int heads, int origin, int width, int d, int vectors,
                Floats (*sums)[VALUES_TOGETHER]) {
    const Attention *a = view->all;
    for (int h = 0; h < HEADS_TOGETHER; h++)
        for (int v = 0; v < VALUES_TOGETHER; v++) sums[h][v] = (Floats){0};
    for (int position = view->first; position <= view->last; position++) {
        const float *value = page_of(view, a->values, position / a->block_size);
        value += position % a->block_size * a->size + d;
        for (int v = 0; v < vectors; v++) {
            Floats numbers = load(value + v * LANES);
            for (int h = 0; h < heads; h++) sums[h][v] += numbers * weights[h * width + position - origin];
        }
    }
}

INLINE void attend_heads(const View *view, const float *query, int heads, float *scores, float *out) {
    const Attention *a = view->all;
    int origin = view->first - view->first % LANES;
    int width = (view->last - origin) / LANES * LANES + LANES;
    float totals[HEADS_TOGETHER];
    score(view, query, heads, origin, width, scores);
    for (int h = 0; h < heads; h++) totals[h] = exponentiate(scores + h * width, width);
    for (int d = 0; d < a->size; d += VALUES_TOGETHER * LANES) {
        int vectors = (a->size - d) / LANES < VALUES_TOGETHER ? (a->size - d) / LANES : VALUES_TOGETHER;
        Floats sums[HEADS_TOGETHER][VALUES_TOGETHER];
        if (vectors == VALUES_TOGETHER)
            mix(view, scores, heads, origin, width, d, VALUES_TOGETHER, sums);
        else
            mix(view, scores, heads, origin, width, d, vectors, sums);
        for (int h = 0; h < heads; h++)
            for (int v = 0; v < vectors; v++) store(out + h * a->size + d + v * LANES, sums[h][v] / totals[h]);
    }
}

static void attend(void *argument, int index, int thread) {
    const Attention *a = argument;
    int token = index / a->kv_heads, kv_head = index % a->kv_heads, group = a->heads / a->kv_heads;
    int last = a->positions[token];
    int first = a->window > 0 && last - a->window + 1 > 0 ? last - a->window + 1 : 0;
    View view = {a, a->tables + a->table_starts[token], kv_head, first, last};
    for (int h = 0; h < group; h += HEADS_TOGETHER) {
        int head = kv_head * group + h;
        const float *query = a->query + (int64_t)token * a->stride + (int64_t)head * a->size;
        float *out = a->out + ((int64_t)token * a->heads + head) * a->size;
        float *scores = a->scratch[thread];
        switch (group - h) {
            case 1: attend_heads(&view, query, 1, scores, out); break;
            case 2: attend_heads(&view, query, 2, scores, out); break;
            case 3: attend_heads(&view, query, 3, scores, out); break;
            default: attend_heads(&view, query, 4, scores, out);
        }
    }
}

#endif
