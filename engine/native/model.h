/* A decoder and a step of it, as `engine/native/library.py` describes them, and what the forward keeps between steps. */

#ifndef CASTOR_MODEL_H
#define CASTOR_MODEL_H

#include "attention.h"
#include "matmul.h"

/* Norms are the weights of RMS norms; NULL stands for none. */
typedef struct {
    Matrix qkv, output;
    Matrix gate_up, down; /* of an MLP, or of what all tokens see beside their experts; without panels: there is none */
    Gate gate;
    Matrix router; /* scores of the experts; a panel after those is that of `gates_shared` */
    const Matrix *experts_gate_up, *experts_down;
    Gate experts_gate;
    const float *correction;                     /* added to the scores while experts are chosen, or NULL */
    int32_t num_experts, num_chosen;             /* each token is given to so many */
    int32_t num_groups, groups_chosen;           /* of neighbouring experts; those of the others are not looked at */
    int32_t sigmoid, shares_of_chosen;           /* scores are sigmoids, not a softmax; weights are shares of the chosen */
    int32_t gates_shared;                        /* the shared MLP is multiplied by the sigmoid of its own score */
    float routed_scale;                          /* of the weights */
    const float *before_attention, *after_attention, *before_mlp, *after_mlp;
    const float *query_norm, *key_norm;
    const float *cosines, *sines; /* [max_context, pairs] */
    const float *sinks;
    float *keys, *values;
    int32_t pairs;       /* of dimensions of a head that are rotated */
    int32_t alternating; /* the dimensions of a pair are neighbours, and not half of all apart */
    int32_t whole_norms; /* the heads of a token are normed as one vector, not each by itself */
    int32_t window;      /* 0: sees everything */
    int32_t group;       /* whose block tables it has */
    float scaling, softcap;
} Layer;

typedef struct {
    const Layer *layers;
    Matrix embedding, head;
    const float *norm;
    int32_t num_layers, hidden, intermediate, heads, kv_heads, size, block_size, max_context;
    int32_t num_experts, num_chosen; /* the most of any layer */
    float eps;
    float embedding_scale;
    float branch_scale;               /* of what attention and MLP add to the states */
    float logit_scale, logit_softcap; /* no cap: 0 */
} Model;

typedef struct {
    int32_t tokens, wanted, table_size;
    const int32_t *ids;                               /* [tokens]; below zero: -1 stands for the first vector */
    const float *vectors;                             /* [vectors, hidden]: what takes the place of embeddings */
    const int32_t *positions, *tables, *table_starts; /* see Attention; the tables of each group take table_size */
    const int32_t *rows;                              /* [wanted]: the tokens whose logits are asked for */
    float *logits;                                    /* [wanted, vocabulary, full panels] */
} Batch;

typedef struct {
    Pool pool;
    const Model *model;
    const Batch *batch;
    float *states, *packed, *qkv, *mixed, *inner, *branch; /* activations of a step */
    float *scores, *merits, *shares, *weights, *results;   /* of experts, see `experts.h` */
    int32_t *chosen, *gathered, *starts;
    float *scratch[MAX_THREADS];
    int32_t *groups; /* tokens of one sequence that attend together: the first of each group, and the end of the last */
    int32_t num_groups;
    int32_t room; /* tokens that the activations have room for */
} Engine;

INLINE int larger(int one, int other) { return one > other ? one : other; }

INLINE int qkv_width(const Model *model) { return (model->heads + 2 * model->kv_heads) * model->size; }

#endif
