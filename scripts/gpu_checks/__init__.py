"""What ``scripts/gpu_check`` checks: the numbers first, then the speed."""
