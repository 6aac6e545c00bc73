"""How long does an action take, from an extracted policy and from TD-MPC2's planner?

    python -m studies.latency           # a minute: at 48M 3.7 ms against 5,813 on a core
    python -m studies.latency --fast    # the smallest model only

Untrained networks of MT30: the time does not depend on weights. Verdict: that planning is too slow
for large models holds if the policy is at least 20 times faster at 48M.
"""
from dataclasses import dataclass, replace

import data
import pwm
from envs import MT30
from studies.common import StudyArgs, command, finish, judge, open_run, show
from studies.tdmpc2 import PlanningAgent


@dataclass
class Args(StudyArgs):
    task: str = "mt30"
    """whose sizes the networks have"""


def main(args):
    """Time both at every model size; returns what results.json holds."""
    args, run = open_run("latency", args)
    device, _ = data.choose_device(args.device)
    times, rows = {}, []
    for size in (1,) if args.fast else (1, 5, 48):
        made = pwm.Args(task="mt30", model_size=size, seed=args.seed, compile=args.compile)
        made = replace(pwm.fill(made, device, MT30), workers=1)
        times[size] = PlanningAgent(made, MT30, device).latency()
        ratio = times[size]["planner"] / times[size]["ours"]
        rows.append({"size": f"{size}M", **times[size], "times": ratio})
    show(rows, dict(size="model", ours="policy, ms", planner="planner, ms", times="times"), 2)
    largest = rows[-1]
    sentence = f"at {largest['size']} the policy is 20 times faster or more: {largest['times']:.0f}"
    verdict = judge({sentence: largest["times"] >= 20})
    return finish(run, "latency", dict(verdict=verdict, ms_per_action=times))


if __name__ == "__main__":
    command(Args, __doc__, main)
