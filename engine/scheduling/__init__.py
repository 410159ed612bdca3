"""Who runs next, and how many tokens a step may compute. No torch."""
