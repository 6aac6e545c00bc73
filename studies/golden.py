"""Do tiny runs of every script still give the same numbers, to the last bit, after a change?

    python -m studies.golden record      # on the code as it is: results/golden.json; 10 minutes
    python -m studies.golden             # on the code as it has become: which cases agree
    python -m studies.golden pwm_mt30    # one case

A case is a command. `record` runs it twice, once undisturbed and once killed (SIGKILL) in the
middle and resumed, and keeps the numbers with a fractional part that both runs wrote to
metrics.jsonl and results.json: times are not among them. A check runs it once and looks for these
numbers wherever they are now, so that tags and tables may be renamed.

Verdict: a case agrees if every number is there. Numbers depend on the processor: record first.
"""

import collections
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
FILE = HERE / "results" / "golden.json"
BODY = (
    "--rounds 2 --seed-episodes 2 --round-episodes 1 --wm-steps 60 --policy-steps 20 "
    "--policy-batch 8 --wm-batch 16 --eval-episodes 2 --workers 1 --save-every 0"
)
GAME = "--steps 90 --random-steps 60 --eval-episodes 2 --atari frame_cap 400 --save-every 0"
CUP = "ed2.py --task cup-catch --data-steps 8000 --workers 1"
CASES = {  # name: (words of the command, seconds after which the second run is killed)
    "pwm_mt30": ("pwm.py --task mt30 --fast --workers 1 --save-every 1", 15),
    "pwm_hopper": (f"pwm.py --task studies.bodies:hopper {BODY}", 5),
    "pwm_gymnasium": (f"pwm.py --task InvertedPendulum-v5 {BODY}", 5),
    "ed2_tdmpc2": (f"{CUP} --updates 40 --seeds 2", 8),
    "ed2_dreamerv3": (f"{CUP} --wm dreamerv3 --updates 8 --batch 4 --length 16 --seeds 1", 7),
    "ed2_online": (
        "studies.ed2_online --task cup-catch --updates 250 --batch 4 --length 8 --train-ratio 1 "
        "--workers 1",
        10,
    ),
    "mow": (f"mow.py --warmup 20 {GAME}", 10),
    "mow_storm": (f"mow.py --task Boxing --storm {GAME}", 6),
    "savi": ("savi.py --clips 20 --updates 60 --workers 1", 8),
}


def floats(x):
    """All numbers with a fractional part in nested lists and dicts."""
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, list):
        return [y for z in x for y in floats(z)]
    return [x] if isinstance(x, float) and x != round(x) else []


def read(folder):
    """Counter of the numbers of the only run below folder."""
    (run,) = Path(folder).glob("runs/*/results.json")
    lines = (run.parent / "metrics.jsonl").read_text().splitlines()
    return collections.Counter(
        map(repr, floats([json.loads(x) for x in [run.read_text(), *lines]]))
    )


def start(words, folder):
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(HERE),
    }
    with open(Path(folder) / "log.txt", "a") as log:
        script, *rest = words.split()
        program = ["-m", script] if script.startswith("studies.") else [HERE / script]
        return subprocess.Popen(
            [sys.executable, *program, *rest],
            cwd=folder,
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def play(words, kill=None):
    """The numbers of one run, or of one that is killed after so many seconds and resumed."""
    with tempfile.TemporaryDirectory() as folder:
        process, began = start(words, folder), time.time()
        if kill:
            try:
                process.wait(kill)
                print(f"  ended before it could be killed, after {time.time() - began:.0f} s")
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                (run,) = Path(folder).glob("runs/*__*")
                process = start(f"{words.split()[0]} --resume {run}", folder)
        if process.wait():
            raise SystemExit(f"{words} failed:\n{(Path(folder) / 'log.txt').read_text()[-2000:]}")
        return read(folder), time.time() - began


def main(words):
    recording = "record" in words
    cases = [w for w in words if w != "record"] or list(CASES)
    book = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name in cases:
        command, kill = CASES[name]
        found, seconds = play(command)
        if recording:
            again, _ = play(command, kill)
            both = found & again
            book[name] = dict(
                command=command,
                numbers=sorted(both.elements()),
                only_here=sum((found - both).values()),
            )
            kept, lost = sum(both.values()), sum((found - both).values())
            print(f"{name}: {kept} numbers, {lost} not seen after a kill (times), {seconds:.0f} s")
            FILE.write_text(json.dumps(book))
        else:
            want = collections.Counter(book[name]["numbers"])
            missing = want - found
            word, gone = "DIFFERS" if missing else "agrees", sum(missing.values())
            print(f"{name}: {word}, {gone} of {sum(want.values())} missing, {seconds:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
