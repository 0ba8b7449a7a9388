"""A trace of GenRep's joint training step, the one of bench_training_step.py, by torch's profiler.

    python benchmarks/profile_step.py [--backend cpu] [--steps 3] [--output runs/profile]

Prints where the time goes and writes trace.json, for chrome://tracing or Perfetto.
"""

import argparse
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from genrep_fast.benchmarks.bench_training_step import (
    BATCH,
    METHODS,
    Update,
    setting_of,
    whole_step,
)
from genrep_fast.benchmarks.measurement import DEVICE


def main():
    backends = {backend for _, backend in METHODS.values()}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--backend", choices=sorted(backends), default="cpu" if DEVICE == "cpu" else "cuda"
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/profile"))
    options = parser.parse_args()
    setting = setting_of(BATCH)
    update = Update(setting.parameters, setting.groups, setting.gradients)
    whole_step(options.backend, setting, update)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(options.steps):
            with record_function("training step"):
                whole_step(options.backend, setting, update)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    print(
        profiler.key_averages().table(
            sort_by=f"self_{DEVICE}_time_total", row_limit=25, max_name_column_width=60
        )
    )
    options.output.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(options.output / "trace.json"))
    print(f"wrote {options.output / 'trace.json'}")


if __name__ == "__main__":
    main()
