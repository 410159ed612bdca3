"""What ``scripts/gpu_check`` checks on a GPU, a module of ``parts`` for each part; and ``scripts/gpu-wheels``."""
