"""The machine: its GPU, its memory and its CPUs, as far as this process may use them."""
