"""llama.cpp's own HTTP server, from the package xllamacpp, in the foreground: for the environment of that peer.

    python benchmarks/llama_cpp_server.py MODEL.gguf PORT SLOTS CONTEXT_PER_SLOT THREADS

Everything that is not named here stays at that server's defaults.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import xllamacpp


def main() -> None:
    """Serve on the loopback until a signal."""
    model, port, slots, context, threads = sys.argv[1], *map(int, sys.argv[2:6])
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.model_alias = {Path(model).stem}
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_parallel = slots
    params.n_ctx = slots * context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    print(f"llama.cpp's server listens on {server.listening_address}", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
