"""The forward of Llama-like models on a CPU, in C: weights stay as small as their file has them, sums are float32."""
