"""The C code as machine code: as the wheel ships it, else as a compiler makes it here. Free of torch."""
