"""How long do the updates of `python pwm.py --task mt30` take on a CPU, and what speeds them up?

    python -m studies.speed           # a minute on one thread
    python -m studies.speed --fast    # two updates each

CPU milliseconds of one thread for a model update (256 x 4 steps) and an update of thirty policies
(16 roll-outs each), medians: with PyTorch's own settings, with data.quick_cpu (which cannot be
undone, so it comes last), and with 8 imagined steps instead of 16. Verdict: quick_cpu pays if both
updates take less than 0.8 of the time.
"""
import time
from dataclasses import dataclass

import torch

import data
import pwm
from envs import MT30
from studies.common import StudyArgs, command, finish, judge, open_run, show


@dataclass
class Args(StudyArgs):
    task: str = "mt30"
    """whose sizes the networks have"""


def cpu_ms(fn, repeats):
    """Median CPU milliseconds of fn() in this process."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        fn()
        times.append(1e3 * (time.process_time() - start))
    return sorted(times[1:])[repeats // 2]


def model_update(agent, rand):
    """One step on Eq. (10) with made-up sequences."""
    a, N = agent.args, len(agent.tasks)
    act = rand(a.wm_horizon, a.wm_batch, agent.wm.act_mask.shape[1])
    flat = torch.zeros(a.wm_horizon, a.wm_batch)
    task = torch.arange(a.wm_batch) % N
    obs = rand(a.wm_horizon + 1, a.wm_batch, agent.wm.obs_dim)
    batch = data.Batch(obs, act, flat, flat, flat + 1, task)

    def update():
        agent.wm.requires_grad_(True)
        loss, _, _ = pwm.world_model_loss(agent.wm, batch)
        pwm.descend(loss, agent.opt["model"], 20.0)
    return update


def policy_update(agent, rand, H):
    """One actor step, Eq. (6), and a pass of critic steps, Eq. (9), from made-up observations."""
    N, B = len(agent.tasks), agent.args.policy_batch
    obs, noise = rand(N, B, agent.wm.obs_dim), rand(H, N, B, agent.wm.act_mask.shape[1])
    task, actors, critics = agent.rows.repeat_interleave(B), agent.actors, agent.critics

    def update():
        agent.wm.requires_grad_(False)
        z, rew, alive = pwm.imagine(agent.wm, actors, obs, noise, task)
        J, target, weight = pwm.imagined_returns(critics, z, rew, alive, 0.99, 0.95)
        agent.stats.update(J.detach())
        loss = pwm.actor_loss(J, agent.stats.var)
        pwm.descend(loss, agent.opt["actors"], 1.0, N)
        z, target, weight = (pwm.by_task(x.detach()) for x in (z[:-1], target, weight))
        for m in torch.randperm(H * B).chunk(pwm.CRITIC_BATCHES):
            error = pwm.critic_loss(critics, z[:, m], target[:, m], weight[:, m])
            pwm.descend(error, agent.opt["critics"], 100.0, critics.n)
    return update


def main(args: Args):
    """Time both updates; returns what results.json holds."""
    args, run = open_run("speed", args)
    torch.set_num_threads(1)
    cpu, repeats = torch.device("cpu"), 2 if args.fast else 15
    made = pwm.fill_args(pwm.Args(device="cpu", compile=False, seed=args.seed), cpu, MT30)
    agent, generator = pwm.Agent(made, MT30, cpu), torch.Generator().manual_seed(args.seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    before = torch.get_float32_matmul_precision()
    updates = {"model": model_update(agent, rand)}
    updates |= {f"policies, {H} steps": policy_update(agent, rand, H) for H in (16, 8)}
    rows = [dict(update=name, plain=cpu_ms(fn, repeats)) for name, fn in updates.items()]
    data.quick_cpu()
    precision = torch.get_float32_matmul_precision()
    for row, fn in zip(rows, updates.values()):
        row["quick"] = cpu_ms(fn, repeats)
        row["ratio"] = row["quick"] / row["plain"]
    torch.set_float32_matmul_precision(before)
    show(rows, dict(update="update", plain="CPU ms", quick="with quick_cpu", ratio="ratio"), 2)
    found = {r["update"]: r["ratio"] for r in rows}
    checks = {f"{name} takes less than 0.8 of the time: {x:.2f}": x < 0.8
              for name, x in found.items()}
    result = dict(rows=rows, precision=precision, checks=checks, verdict=judge(checks))
    return finish(run, "speed", result)


if __name__ == "__main__":
    command(Args, __doc__, main)
