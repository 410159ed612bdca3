/* One token of recurrent layers for many sequences: each state is read and written once, where it lies.
 *
 * The structures are mirrored in states.py, field by field. All numbers are float32; strides count floats.
 */

#ifndef CASTOR_STATES_H
#define CASTOR_STATES_H

#include "pool.h"
#include "vectors.h"

#define CHANNELS 512 /* of a convolution that one item computes: what the first cache holds of states and weights */
#define COLUMNS (4 * LANES) /* of a state that are kept in registers */
#define TAPS 16 /* the widest convolution */

/* Gated delta rule. query, key [n, key_heads, key_size]; value, out [n, heads, value_size]; beta [n, heads]; decay
 * [n, heads] or with gates for each channel [n, heads, key_size]; states [slot][heads, key_size, value_size]. */
typedef struct {
    const float *query, *key, *value, *beta, *decay;
    float *out, *states;
    const int64_t *slots;
    int64_t stride;
    int32_t sequences, heads, key_heads, key_size, value_size, by_channel;
} Delta;

/* State space with a scalar decay. x, out [n, heads, size]; dt, decay [n, heads]; writing, reading [n, groups, width];
 * skip [heads] or NULL; states [slot][heads, size, width]. */
typedef struct {
    const float *x, *dt, *decay, *writing, *reading, *skip;
    float *out, *states;
    const int64_t *slots;
    int64_t stride;
    int32_t sequences, heads, groups, size, width;
} Mamba2;

/* Causal convolution of each channel. x, out [tokens, channels]; weights [taps, channels]; bias [channels] or NULL;
 * states [slot][taps - 1, channels]. Sequence i has lengths[i] tokens from starts[i] on. */
typedef struct {
    const float *x, *weights, *bias;
    float *out, *states;
    const int64_t *starts, *lengths, *slots;
    int64_t stride;
    int32_t sequences, channels, taps;
} Convolution;

/* For columns [first, first + COLUMNS) of one head's state, or fewer at its end. */
INLINE void delta_columns(const Delta *d, const float *query, const float *key, const float *decay, int by_channel,
                          float beta, const float *value, float *out, float *state, int first) {
    int count = d->value_size - first < COLUMNS ? d->value_size - first : COLUMNS;
    if (count < COLUMNS) {
        float told[COLUMNS] = {0}, read[COLUMNS] = {0};
        for (int k = 0; k < d->key_size; k++) {
            float kept = key[k] * decay[by_channel ? k : 0];
            for (int c = 0; c < count; c++) told[c] += kept * state[(int64_t)k * d->value_size + first + c];
        }
        for (int c = 0; c < count; c++) told[c] = (value[first + c] - told[c]) * beta;
        for (int k = 0; k < d->key_size; k++)
            for (int c = 0; c < count; c++) {
                float *at = state + (int64_t)k * d->value_size + first + c;
                *at = *at * decay[by_channel ? k : 0] + key[k] * told[c];
                read[c] += query[k] * *at;
            }
        for (int c = 0; c < count; c++) out[first + c] = read[c];
        return;
    }
    Floats told[4] = {0}, read[4] = {0};
    for (int k = 0; k < d->key_size; k++) {
        Floats kept = all(key[k] * decay[by_channel ? k : 0]);
        const float *row = state + (int64_t)k * d->value_size + first;
        for (int c = 0; c < 4; c++) told[c] += kept * load(row + c * LANES);
    }
    for (int c = 0; c < 4; c++) told[c] = (load(value + first + c * LANES) - told[c]) * all(beta);
    for (int k = 0; k < d->key_size; k++) {
        Floats fading = all(decay[by_channel ? k : 0]), writing = all(key[k]), reading = all(query[k]);
        float *row = state + (int64_t)k * d->value_size + first;
        for (int c = 0; c < 4; c++) {
            Floats now = load(row + c * LANES) * fading + writing * told[c];
            store(row + c * LANES, now);
            read[c] += reading * now;
        }
    }
    for (int c = 0; c < 4; c++) store(out + first + c * LANES, read[c]);
}

static void delta_item(void *argument, int index, int thread) {
    (void)thread;
    const Delta *d = argument;
    int sequence = index / d->heads, head = index % d->heads, shared = d->heads / d->key_heads;
    int64_t keys = ((int64_t)sequence * d->key_heads + head / shared) * d->key_size;
    int64_t values = (int64_t)index * d->value_size;
    const float *decay = d->decay + (d->by_channel ? (int64_t)index * d->key_size : index);
    float *state = d->states + d->slots[sequence] * d->stride + (int64_t)head * d->key_size * d->value_size;
    for (int first = 0; first < d->value_size; first += COLUMNS)
        delta_columns(d, d->query + keys, d->key + keys, decay, d->by_channel, d->beta[index], d->value + values,
                      d->out + values, state, first);
}

static void mamba2_item(void *argument, int index, int thread) {
    (void)thread;
    const Mamba2 *m = argument;
    int sequence = index / m->heads, head = index % m->heads, shared = m->heads / m->groups;
    int64_t group = ((int64_t)sequence * m->groups + head / shared) * m->width;
    const float *writing = m->writing + group, *reading = m->reading + group, *x = m->x + (int64_t)index * m->size;
    float *out = m->out + (int64_t)index * m->size;
    float *state = m->states + m->slots[sequence] * m->stride + (int64_t)head * m->size * m->width;
    Floats fading = all(m->decay[index]);
    for (int p = 0; p < m->size; p++, state += m->width) {
        float added = m->dt[index] * x[p], sum = m->skip ? m->skip[head] * x[p] : 0;
        Floats sums = {0}, adding = all(added);
        int n = 0;
        for (; n + LANES <= m->width; n += LANES) {
            Floats now = load(state + n) * fading + adding * load(writing + n);
            store(state + n, now);
            sums += now * load(reading + n);
        }
        for (; n < m->width; n++) {
            state[n] = state[n] * m->decay[index] + added * writing[n];
            sum += state[n] * reading[n];
        }
        for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
        out[p] = sum;
    }
}

static void convolution_item(void *argument, int index, int thread) {
    (void)thread;
    const Convolution *c = argument;
    int parts = (c->channels + CHANNELS - 1) / CHANNELS, sequence = index / parts, first = index % parts * CHANNELS;
    int count = c->channels - first < CHANNELS ? c->channels - first : CHANNELS, kept = c->taps - 1;
    float *state = c->states + c->slots[sequence] * c->stride + first;
    const float *x = c->x + c->starts[sequence] * c->channels + first, *rows[TAPS];
    float *out = c->out + c->starts[sequence] * c->channels + first;
    int64_t length = c->lengths[sequence];
    for (int64_t token = 0; token < length; token++) {
        for (int tap = 0; tap < c->taps; tap++) {
            int64_t at = token + tap - kept;
            rows[tap] = at < 0 ? state + (at + kept) * c->channels : x + at * c->channels;
        }
        float *to = out + token * c->channels;
        if (c->bias) memcpy(to, c->bias + first, (size_t)count * sizeof *to);
        else memset(to, 0, (size_t)count * sizeof *to);
        for (int tap = 0; tap < c->taps; tap++) {
            const float *weights = c->weights + (int64_t)tap * c->channels + first, *row = rows[tap];
            for (int i = 0; i < count; i++) to[i] += weights[i] * row[i];
        }
    }
    /* The last inputs, oldest first: those of before move up where the tokens are fewer. */
    for (int row = 0; row < kept; row++) {
        int64_t at = length - kept + row;
        const float *from = at < 0 ? state + (at + kept) * c->channels : x + at * c->channels;
        memcpy(state + (int64_t)row * c->channels, from, (size_t)count * sizeof *from);
    }
}

/* NULL where memory cannot be had; fewer threads than were asked for are no error. */
Pool *castor_states_open(int threads) {
    Pool *pool = calloc(1, sizeof *pool);
    if (pool == NULL) return NULL;
    pool->threads = threads < 1 ? 1 : threads < MAX_THREADS ? threads : MAX_THREADS;
    start_threads(pool);
    return pool;
}

void castor_states_close(Pool *pool) {
    stop_threads(pool);
    free(pool);
}

void castor_delta(Pool *pool, Delta *step) { run_phase(pool, delta_item, step, step->sequences * step->heads); }

void castor_mamba2(Pool *pool, Mamba2 *step) { run_phase(pool, mamba2_item, step, step->sequences * step->heads); }

void castor_convolution(Pool *pool, Convolution *step) {
    int parts = (step->channels + CHANNELS - 1) / CHANNELS;
    run_phase(pool, convolution_item, step, step->sequences * parts);
}

#endif
