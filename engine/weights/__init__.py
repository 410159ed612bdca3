"""Where weights come from, and in which form they stay."""
