"""Kill trainings at random moments and continue them: nothing may be lost.

    python -m tools.kill_training --kills 30 --processes 1
    python -m tools.kill_training --kills 30 --processes 2

Every run trains a tiny model, gets SIGKILL after a random time, and is continued with `--resume_from_checkpoint latest`. A run
that finishes must have the same weights, optimiser state and loss curve as a run without interruption, bit by bit.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from tests.forked import make_workplace, run, same_end, train_here
from tests.tiny import save_tiny_checkpoint
from train.checkpoints import checkpoints_of


def kill_at_random(root: Path, *, kills: int, processes: int = 1, seed: int = 0, steps: int = 40) -> None:
    """Kill runs of `steps` steps until there are `kills` kills, and print the step of each kill.

    Raises AssertionError if a checkpoint is lost, or if the result differs from that of a run without interruption.
    """
    changes = (f"max_train_steps={steps}", "checkpointing_steps=1", "decoder_heads=2")
    moments, success = random.Random(seed), [0] * processes
    assert run(print, "The trainer is imported.") == [0]
    started = time.monotonic()
    assert run(quietly, root, "whole", changes, processes=processes) == success
    seconds = time.monotonic() - started
    print(f"processes: {processes}; a run without interruption takes {seconds:.1f} s for {steps} steps", flush=True)
    done, finished, last = 0, 0, False
    while not last:
        last = done == kills  # after the last kill, the run continues to its end
        name, moment = f"killed{finished}", 600 if last else moments.uniform(0.1, seconds)
        before = newest(root / name)
        codes = run(quietly, root, name, changes, "latest", processes=processes, seconds=moment)
        if codes == success:
            same_end(root / "whole", root / name)
            finished += 1
            print(f"run {finished} reached its end, equal to the uninterrupted run", flush=True)
        else:
            assert not last, f"the run ended with {codes}"
            done += 1
            after = newest(root / name)
            assert after >= before, f"a checkpoint is lost: {before} -> {after}"
            print(f"kill {done} after {moment:.2f} s: started at step {before}, newest checkpoint {after}", flush=True)
    print(f"{kills} kills, {finished} runs to the end: nothing lost, same weights, optimiser state and loss curve")


def quietly(*arguments: Any) -> None:
    """Call `train_here` without output on the screen."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        train_here(*arguments)


def newest(folder: Path) -> int:
    """Step of the newest complete checkpoint; 0 if there is no checkpoint."""
    checkpoints = checkpoints_of(folder)
    return int(checkpoints[-1].name.rpartition("-")[2]) if checkpoints else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clip = save_tiny_checkpoint(Path(folder) / "tiny", decoders=()) / "clip"
        root = make_workplace(Path(folder), clip)
        kill_at_random(root, kills=options.kills, processes=options.processes, seed=options.seed)


if __name__ == "__main__":
    main()
