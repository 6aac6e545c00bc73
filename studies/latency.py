"""How long does an action take, from an extracted policy and from TD-MPC2's planner?

    python -m studies.latency           # a minute: at 48M 3.7 ms against 5,813 on a core
    python -m studies.latency --fast    # the smallest model only

Untrained networks of MT30: the time does not depend on weights. Verdict: that planning is too slow
for large models holds if the policy is at least 20 times faster at 48M.
"""
import time
from dataclasses import dataclass

import torch

import data
import pwm
from envs import MT30
from studies import tdmpc2
from studies.common import StudyArgs, command, finish, judge, open_run, show


@dataclass
class Args(StudyArgs):
    task: str = "mt30"
    """whose sizes the networks have"""


def first(actors):
    """The first task's actor alone, as one would deploy it."""
    widths = [w.shape[2] for w in actors.mu.weight[:-1]]
    one = pwm.Actors(actors.act_mask[:1, 0].cpu(), actors.mu.weight[0].shape[1], widths)
    one.load_state_dict({k: v[:1] for k, v in actors.state_dict().items()})
    return one.to(actors.act_mask.device)


def milliseconds(fn, device, n=50):
    """Median wall-clock of fn() in ms."""
    times = []
    for _ in range(n + 2):
        start = time.perf_counter()
        with torch.no_grad():
            fn()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times[2:])[n // 2]


def measure(agent):
    """{"ours", "planner"}: milliseconds for one action of the first task of a tdmpc2.Agent."""
    wm, row, single, device = agent.wm, agent.rows[:1], first(agent.actors), agent.device
    obs = torch.zeros(1, wm.obs_dim, device=device)
    mean = torch.zeros(1, 3, wm.act_mask.shape[1], device=device)
    gen, heads = torch.Generator(device).manual_seed(0), agent.heads.eval()

    def planner():
        tdmpc2.plan(wm, heads, wm.encode(obs, row), row, mean, agent.discount[row], gen)
    return {"ours": milliseconds(lambda: single(wm.encode(obs, row)[None]), device),
            "planner": milliseconds(planner, device, 5)}


def main(args):
    """Time both at every model size; returns what results.json holds."""
    args, run = open_run("latency", args)
    device, _ = data.choose_device(args.device)
    times, rows = {}, []
    for size in (1,) if args.fast else (1, 5, 48):
        made = pwm.Args(task="mt30", model_size=size, seed=args.seed, compile=args.compile)
        times[size] = measure(tdmpc2.Agent(pwm.fill_args(made, device, MT30), MT30, device))
        ratio = times[size]["planner"] / times[size]["ours"]
        rows.append({"size": f"{size}M", **times[size], "times": ratio})
    show(rows, dict(size="model", ours="policy, ms", planner="planner, ms", times="times"), 2)
    largest = rows[-1]
    sentence = f"at {largest['size']} the policy is 20 times faster or more: {largest['times']:.0f}"
    verdict = judge({sentence: largest["times"] >= 20})
    return finish(run, "latency", dict(verdict=verdict, ms_per_action=times))


if __name__ == "__main__":
    command(Args, __doc__, main)
