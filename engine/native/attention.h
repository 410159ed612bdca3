/* Attention over the paged cache: some queries that follow each other in a sequence, and see nearly the same pages, with
 * the heads that share their keys. What a query gets does not depend on which others are computed with it: it meets its
 * keys and values in the order of their positions, and those that only the others see weigh exactly nothing.
 *
 * Pages of keys are [blocks, kv heads, size, block size], so that one vector holds a number of several keys; pages of
 * values are [blocks, kv heads, block size, size].
 */

#ifndef CASTOR_ATTENTION_H
#define CASTOR_ATTENTION_H

#include "activations.h"

/* A row is a query of a head. Its sums stay in registers, and with those of the rows beside it they fill most of them. */
#define MOST_ATTENDING 8
#define SUMS (REGISTERS * 3 / 4)

typedef struct {
    const float *query; /* [tokens, stride], the heads side by side */
    float *out;         /* [tokens, heads * size] */
    const float *keys, *values;
    const int32_t *positions;             /* of each token in its sequence */
    const int32_t *tables, *table_starts; /* the pages of all sequences, and where those of each token's sequence begin */
    const int32_t *groups;                /* the first token of each group, and the end of the last one */
    float *const *scratch;                /* for each thread: scores of MOST_ATTENDING rows over a whole context */
    const float *sinks;                   /* for each head a score that has no value, or NULL */
    int32_t stride, heads, kv_heads, size, block_size, window;
    float scaling, softcap; /* no cap: 0 */
} Attention;

typedef struct {
    const Attention *all;
    const int32_t *table;
    int kv_head, origin, first, last; /* the positions that any of the rows sees; the vector in which the first one is */
    const float *query[MOST_ATTENDING];
    float *out[MOST_ATTENDING];
    int from[MOST_ATTENDING], to[MOST_ATTENDING]; /* the positions that each row sees */
    float sink[MOST_ATTENDING];
    float *scores;                                /* [rows, width], from the origin on */
    int width;
} View;

INLINE const float *page_of(const View *view, const float *pages, int block) {
    const Attention *a = view->all;
    return pages + ((int64_t)view->table[block] * a->kv_heads + view->kv_head) * a->size * a->block_size;
}

/* Scores of some vectors of keys, from a position on; those that a row does not see get minus infinity. */
INLINE void score_vectors(const View *view, int rows, int position, int vectors) {
    const Attention *a = view->all;
    const float *keys[SUMS];
    Floats sums[MOST_ATTENDING][SUMS];
    for (int v = 0; v < vectors; v++) {
        int at = position + v * LANES;
        keys[v] = page_of(view, a->keys, at / a->block_size) + at % a->block_size;
    }
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 24
        for (int v = 0; v < vectors; v++) sums[row][v] = (Floats){0};
    for (int d = 0; d < a->size; d++) {
        Floats key[SUMS];
#pragma GCC unroll 24
        for (int v = 0; v < vectors; v++) key[v] = load(keys[v] + d * a->block_size);
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++)
#pragma GCC unroll 24
            for (int v = 0; v < vectors; v++) sums[row][v] += key[v] * view->query[row][d];
    }
    for (int v = 0; v < vectors; v++) {
        Ints at = lane_numbers() + (position + v * LANES);
        for (int row = 0; row < rows; row++) {
            Ints seen = (at >= view->from[row]) & (at <= view->to[row]);
            Floats scores = sums[row][v] * a->scaling;
            if (a->softcap > 0) scores = softcapped(scores, a->softcap);
            store(view->scores + row * view->width + position + v * LANES - view->origin,
                  choose(seen, scores, all(-INFINITY)));
        }
    }
}

INLINE void score(const View *view, int rows) {
    const int together = SUMS / rows < 4 ? SUMS / rows : 4;
    int position = view->origin;
    for (; position + (together - 1) * LANES <= view->last; position += together * LANES)
        score_vectors(view, rows, position, together);
    for (; position <= view->last; position += LANES) score_vectors(view, rows, position, 1);
}

/* Turn scores into weights that are not divided by their sum yet; returns the sum, with the share of the sink. */
static float exponentiate(float *scores, int count, float sink) {
    Floats most = all(-INFINITY), total = {0};
    for (int i = 0; i < count; i += LANES) {
        Floats here = load(scores + i);
        most = choose(here > most, here, most);
    }
    float top = sink;
    for (int lane = 0; lane < LANES; lane++) top = most[lane] > top ? most[lane] : top;
    for (int i = 0; i < count; i += LANES) {
        Floats weight = exponential(load(scores + i) - top);
        total += weight;
        store(scores + i, weight);
    }
    return sum_of(total) + exponential(all(sink - top))[0];
}

/* Mix some vectors of the values, from number `d` on, by the weights of each row, and give them out. */
INLINE void mix(const View *view, int rows, int d, int vectors, const float *totals) {
    const Attention *a = view->all;
    Floats sums[MOST_ATTENDING][SUMS];
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 24
        for (int v = 0; v < vectors; v++) sums[row][v] = (Floats){0};
    for (int position = view->first; position <= view->last;) {
        const float *value = page_of(view, a->values, position / a->block_size);
        value += position % a->block_size * a->size + d;
        int end = position - position % a->block_size + a->block_size;
        if (end > view->last + 1) end = view->last + 1;
        for (const float *weights = view->scores + position - view->origin; position < end;
             position++, value += a->size, weights++) {
            Floats numbers[SUMS];
#pragma GCC unroll 24
            for (int v = 0; v < vectors; v++) numbers[v] = load(value + v * LANES);
#pragma GCC unroll 8
            for (int row = 0; row < rows; row++)
#pragma GCC unroll 24
                for (int v = 0; v < vectors; v++) sums[row][v] += numbers[v] * weights[row * view->width];
        }
    }
    for (int row = 0; row < rows; row++)
        for (int v = 0; v < vectors; v++) store(view->out[row] + d + v * LANES, sums[row][v] / totals[row]);
}

INLINE void attend_rows(const View *view, int rows) {
    const int fitting = SUMS / rows, together = fitting < 4 ? fitting : 4, size = view->all->size;
    float totals[MOST_ATTENDING];
    score(view, rows);
    for (int row = 0; row < rows; row++)
        totals[row] = exponentiate(view->scores + row * view->width, view->width, view->sink[row]);
    int d = 0;
    for (; d + together * LANES <= size; d += together * LANES) mix(view, rows, d, together, totals);
    for (; d < size; d += LANES) mix(view, rows, d, 1, totals);
}

#define ATTEND(rows) static void attend_##rows(const View *view) { attend_rows(view, rows); }
ATTEND(1) ATTEND(2) ATTEND(3) ATTEND(4) ATTEND(5) ATTEND(6) ATTEND(7) ATTEND(8)

static void (*const ATTEND_OF[])(const View *) = {NULL,     attend_1, attend_2, attend_3, attend_4,
                                                  attend_5, attend_6, attend_7, attend_8};

/* How many queries of a sequence are computed together: as many as give full rows with the heads that share a key. */
INLINE int queries_together(int heads_of_a_key) {
    return heads_of_a_key >= MOST_ATTENDING ? 1 : MOST_ATTENDING / heads_of_a_key;
}

/* The rows from number `begin` on of a group of tokens: heads that share a key, token after token. */
static void attend_some(const Attention *a, int token, int begin, int rows, int kv_head, float *scratch) {
    int heads = a->heads / a->kv_heads;
    View view = {.all = a, .table = a->tables + a->table_starts[token], .kv_head = kv_head, .scores = scratch,
                 .first = INT32_MAX, .last = 0};
    for (int row = 0; row < rows; row++) {
        int t = token + (begin + row) / heads, head = kv_head * heads + (begin + row) % heads, to = a->positions[t];
        view.query[row] = a->query + (int64_t)t * a->stride + (int64_t)head * a->size;
        view.out[row] = a->out + ((int64_t)t * a->heads + head) * a->size;
        view.sink[row] = a->sinks ? a->sinks[head] : -INFINITY;
        view.to[row] = to;
        view.from[row] = a->window > 0 && to - a->window + 1 > 0 ? to - a->window + 1 : 0;
        if (view.from[row] < view.first) view.first = view.from[row];
        if (to > view.last) view.last = to;
    }
    view.origin = view.first - view.first % LANES;
    view.width = (view.last - view.origin) / LANES * LANES + LANES;
    ATTEND_OF[rows](&view);
}

static void attend(void *argument, int index, int thread) {
    const Attention *a = argument;
    int group = index / a->kv_heads, first = a->groups[group];
    int rows = (a->groups[group + 1] - first) * (a->heads / a->kv_heads);
    for (int begin = 0; begin < rows; begin += MOST_ATTENDING) {
        int some = rows - begin < MOST_ATTENDING ? rows - begin : MOST_ATTENDING;
        attend_some(a, first, begin, some, index % a->kv_heads, a->scratch[thread]);
    }
}

#endif
