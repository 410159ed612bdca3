"""From a prepared folder to a model whose attention is paged."""
