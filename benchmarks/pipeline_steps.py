"""What a step of a pipeline costs beside its own work, in a loop of a thousand, and the memory of who drives it.

python benchmarks/pipeline_steps.py [--steps 1000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from pathlib import Path

import psutil

from _machine import TALLY, environment, introduce, scratch, show, take_turns

CAVEATS = """
Each step is a container template whose command is 'true', with one parameter, and a file system of its own; eight run
at once. "bare" starts as many processes of 'true' one after the other. Seconds of processors are those of all
processes: the command, the launcher, and the steps. Memory is the most that the command itself held, sampled ten times
a second. The aim is less than 20 ms a step.
"""
UNITS = {"time a step": "ms", "processors a step": "ms", "memory": "MiB"}
WORKFLOW = """
apiVersion: argoproj.io/v1alpha1
kind: Workflow
metadata: {{generateName: many-}}
spec:
  entrypoint: main
  templates:
  - name: main
    steps:
    - - {{name: each, template: one, withSequence: {{count: {steps}}}, arguments: {{parameters: [{{name: i, value: "{{{{item}}}}"}}]}}}}
  - name: one
    inputs: {{parameters: [{{name: i}}]}}
    container: {{image: busybox, command: ["true", "{{{{inputs.parameters.i}}}}"]}}
"""  # noqa: E501 - one line of YAML is one step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    introduce("pipeline steps", CAVEATS)
    with scratch() as folder:
        contenders = {
            "tally": lambda: of_tally(folder, given.steps),
            "tally, a tenth": lambda: of_tally(folder, given.steps // 10),
            "bare": lambda: bare(given.steps),
        }
        found = take_turns(contenders, given.rounds)
    for measure, unit in UNITS.items():
        show(measure, found[measure], first="tally", unit=unit, digits=1)


def of_tally(folder: Path, steps: int) -> dict[str, float]:
    """One run: a step's milliseconds, of the clock and of processors, less those of a run with one step."""
    many, one = run(folder, steps), run(folder, 1)
    return {
        "time a step": 1000 * (many["clock"] - one["clock"]) / steps,
        "processors a step": 1000 * (many["processors"] - one["processors"]) / steps,
        "memory": many["memory"] / 2**20,
    }


def run(folder: Path, steps: int) -> dict[str, float]:
    file = folder / f"{steps}.yaml"
    file.write_text(WORKFLOW.format(steps=steps))
    before, began, most = os.times(), time.perf_counter(), 0
    process = psutil.Popen(
        [*TALLY, "pipeline", "run", "-q", str(file)], env=environment(folder), stderr=subprocess.DEVNULL
    )
    while process.poll() is None:
        try:
            most = max(most, process.memory_info().rss)
        except psutil.Error:
            break
        time.sleep(0.1)
    assert process.wait() == 0
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return {"clock": time.perf_counter() - began, "processors": used, "memory": float(most)}


def bare(steps: int) -> dict[str, float]:
    before, began = os.times(), time.perf_counter()
    for _ in range(steps):
        subprocess.run(["/bin/true"], check=True)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    used += after.user + after.system - before.user - before.system
    return {"time a step": 1000 * (time.perf_counter() - began) / steps, "processors a step": 1000 * used / steps}


if __name__ == "__main__":
    main()
