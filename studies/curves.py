"""What did the policies of a PWM run reach, and when? One panel per task.

    python -m studies.curves --task runs/mt30__pwm__1__1700000000   # seconds; curves.png there

Points are the mean returns of roll-outs with current policies, stars evaluations on the way
(--eval-every), lines the final returns, a random policy's and the paper's (released result files).
Nothing is decided here.
"""
import json
from dataclasses import dataclass
from pathlib import Path

from envs import task_facts
from studies.common import command, figure, save_figure

STYLES = {"random": ("gray", ":"), "ours": ("tab:blue", "-"), "PWM paper": ("tab:red", "--")}


@dataclass
class Args:
    task: str
    """folder of a finished run, or its results.json"""
    out: str | None = None
    """the picture; default: curves.png in the folder"""


def draw(path, table, history):
    """table: rows {task, random, ours, PWM paper}; history: dicts with "return" or "evaluation"."""
    wide = min(6, len(table))
    high = -(-len(table) // wide)
    size = max(2.6 * wide, 5), max(2 * high, 3.5)
    fig, axes = figure(*size, high, wide, sharex=True, squeeze=False)
    for ax, row in zip(axes.flat, table):
        task = row["task"]
        for key, marker in (("return", "."), ("evaluation", "*")):
            timed = [h for h in history if key in h and "seconds" in h]
            points = [(h["seconds"] / 60, h[key][task]) for h in timed]
            if points and task_facts(task).scale != 0.0:  # Meta-World's table has another scale
                ax.plot(*zip(*points), color="tab:blue", marker=marker, lw=1, alpha=0.6)
        for name, (color, style) in STYLES.items():
            if row.get(name) is not None:
                ax.axhline(row[name], color=color, ls=style, lw=1.2, label=name)
        ax.set_title(task, fontsize=8)
        ax.tick_params(labelsize=7)
    for ax in axes.flat[len(table):]:
        ax.axis("off")
    fig.supxlabel("minutes", fontsize=8)
    fig.supylabel("return", fontsize=8)
    lines = axes[0, 0].get_legend_handles_labels()
    fig.legend(*lines, loc="outside upper center", ncols=3, fontsize=8)
    save_figure(fig, path, 120)


def main(args):
    """Read results.json, draw; returns the picture's path."""
    file = Path(args.task)
    file = file / "results.json" if file.is_dir() else file
    if not file.exists():
        raise SystemExit(f"{file} is not there: expected the folder of a finished run of pwm.py")
    result = json.loads(file.read_text())
    out = Path(args.out or file.with_name("curves.png"))
    draw(out, result["table"], result["history"])
    print(f"files: {out}")
    return dict(picture=str(out))


if __name__ == "__main__":
    command(Args, __doc__, main)
