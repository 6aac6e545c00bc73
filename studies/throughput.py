"""How many agent steps per second do roll-outs and bodies give on this machine?

    python -m studies.throughput                     # one task of each domain, 1 and 2 processes
    python -m studies.throughput --task walker-walk,mw-reach
    python -m studies.throughput --task bodies       # studies.bodies side by side, 1 to all threads
    python -m studies.throughput --fast              # under a minute

Random actions, restarts included. Verdict: two processes are worth having if they give at least 1.5
times the steps of one, in the mean over the tasks (all threads of bodies: likewise).
"""
import os
import time
from dataclasses import dataclass

import numpy as np

import envs
from studies import bodies
from studies.common import StudyArgs, command, finish, judge, open_run, show


@dataclass
class Args(StudyArgs):
    task: str = "domains"
    """tasks with commas between them, domains: one task of each, or bodies"""
    rows: int = 64
    """bodies side by side"""


def rollout_rates(task, workers, episodes):
    """Agent steps per second of Workers.rollout with random actions."""
    act_dim, rng = envs.task_facts(task).act_dim, np.random.default_rng(0)
    jobs = [(task, seed) for seed in range(episodes)]

    def policy(obs, job, t):
        return rng.uniform(-1, 1, (len(obs), act_dim))

    workers.rollout(jobs, policy)  # makes the environments
    began = time.perf_counter()
    steps = sum(len(episode["rew"]) for episode in workers.rollout(jobs, policy))
    return steps / (time.perf_counter() - began)


def herd_rates(task, rows, threads, seconds):
    """Steps per second of a Herd, by the clock and per CPU-second of one core."""
    with envs.beside(task, rows, 0, threads) as herd:
        herd.reset()
        rng, n = np.random.default_rng(0), 0
        act = rng.uniform(-1, 1, (50, rows, herd.facts.act_dim))
        wall, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() - wall < seconds:
            herd.step(act[n % 50])
            n += 1
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return rows * n / wall, rows * n / cpu


def main(args):
    args, run = open_run("throughput", args)
    table = []
    if args.task == "bodies":
        cores, kinds = os.cpu_count() or 1, list(bodies.FACTS)
        for kind in kinds[:2] if args.fast else kinds:
            task = f"studies.bodies:{kind}"
            one, per_cpu = herd_rates(task, args.rows, 1, 0.5 if args.fast else 3.0)
            many, _ = herd_rates(task, args.rows, cores, 0.5 if args.fast else 3.0)
            table.append(dict(task=task, one=round(one), all=round(many), per_cpu=round(per_cpu)))
    else:
        domains = {task.split("-")[0]: task for task in ("mw-reach", *envs.MT30[::-1])}
        tasks = list(domains.values()) if args.task == "domains" else args.task.split(",")
        for task in tasks[:2] if args.fast else tasks:
            rates = []
            for n in (1, 2):
                with envs.Workers(n) as workers:
                    rates.append(rollout_rates(task, workers, 2 if args.fast else 8))
            table.append(dict(task=task, one=round(rates[0]), all=round(rates[1])))
    show(table, {"task": "agent steps per second", "one": "one process or thread",
                 "all": "two processes, all threads", "per_cpu": "per CPU-second"})
    gain = float(np.mean([row["all"] / row["one"] for row in table]))
    verdict = judge({f"side by side gives {gain:.2f} times as much, at least 1.5": gain >= 1.5})
    return finish(run, "throughput", dict(table=table, gain=gain, verdict=verdict))


if __name__ == "__main__":
    command(Args, __doc__, main)
