"""Which groups of actions are found: by SD2, sd2j and learned, on random and replay data?

    python -m studies.ed2_discovery                       # 25 minutes on 2 cores

For three tasks, in states and in the latents of a TD-MPC2 encoder trained on the replay: adjusted
Rand index with the published groups and between seeds; a seed draws its own 10,000 rows.

Rule, fixed in advance: a method finds a task's groups if its index with the published ones is at
least 0.8. Expected: on random data and states SD2 finds cheetah and hopper but not the walker; on
replay, whose policy correlates the actions, it finds none; in latents nothing is reliable.
"""
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch

import data
import ed2
import envs
from studies import common
from studies.ed2_partitions import adjusted_rand, fit_influence, learn_partition, settings


@dataclass
class Args(common.StudyArgs):
    task: str = "walker-walk,cheetah-run,hopper-hop"
    """tasks with published groups, with commas between"""
    eta: float = 0.0
    """SD2 and sd2j merge while the best score is above this"""


def train_encoder(name, cell, folder):
    """Train a TD-MPC2 agent's model on the replay and keep its encoder."""
    args, task = ed2.Args(**cell), cell["task"]
    torch.set_num_threads(1)
    replay = ed2.make_data(task, folder / "data" / task, args.data_steps, 1)[1]
    O, A = envs.task_facts(task)[:2]
    latent, hidden = ed2.TDMPC2_SIZES[args.model_size]
    torch.manual_seed(args.seed)
    dynamics = ed2.Dynamics(latent, A, hidden, [list(range(A))])
    model = ed2.TDMPC2(O, A, latent, hidden, dynamics)
    run = data.Run("ed2", args, inside=folder / "trainings" / task)
    sampler = replay.sampler([task], args.length, "cpu", held_out=0.1)
    loss = ed2.train(run, model, sampler, args, args.seed)
    run.close()
    data.save_torch(folder / f"encoder-{task}.pt", model.encoder.state_dict())
    return dict(train_loss=loss)


def rows_of(episodes, task, seed, encoder=None):
    """10,000 rows (s, act, change of s), of states or of an encoder's latents."""
    rows = ed2.transitions(episodes, task, 10_000, seed)
    s, act, delta = (torch.from_numpy(np.ascontiguousarray(x)) for x in rows)
    if encoder is None:
        return s, act, delta
    with torch.no_grad():
        z = encoder(s)
        return z, act, encoder(s + delta) - z


def find(method, rows, seed, latents, eta, steps):
    """Groups that a method finds in rows (s, act, change of s)."""
    if method == "sd2":
        return ed2.discover(rows[1], rows[2], eta)
    if method == "learned":
        return learn_partition(*rows, seed, latents, steps)
    return fit_influence(*rows, seed, latents, steps, eta=eta)[0]


def find_all(name, cell, folder):
    """The groups of one method, for all seeds: cell = {task, source, space, method, seeds, ..}."""
    torch.set_num_threads(1)
    task, latents, encoder = cell["task"], cell["space"] == "latent", None
    random, replay, _ = ed2.make_data(task, folder / "data" / task, cell["data_steps"], 1)
    episodes = random if cell["source"] == "random" else replay
    if latents:
        encoder = ed2.tdmpc2_encoder(envs.task_facts(task).obs_dim, cell["latent"])
        encoder.load_state_dict(torch.load(folder / f"encoder-{task}.pt", weights_only=True))
    groups = [find(cell["method"], rows_of(episodes, task, seed, encoder), seed, latents,
                   cell["eta"], cell["steps"]) for seed in cell["seeds"]]
    known = ed2.PUBLISHED[task.split("-")[0]]
    pairs = [adjusted_rand(p, q) for p, q in combinations(groups, 2)]
    return dict(task=task, data=cell["source"], space=cell["space"], method=cell["method"],
                ari_published=float(np.mean([adjusted_rand(g, known) for g in groups])),
                ari_between_seeds=float(np.mean(pairs)) if pairs else None, groups=groups)


def main(args):
    """All methods on all data; returns what results.json holds."""
    args, run = common.open_run("ed2_discovery", args)
    tasks = args.task.split(",")[:1 if args.fast else None]
    inner = settings(args, task=tasks[0], partition="published")
    side = args.workers if inner.device == "cpu" else 1
    encoders, cells = {}, {}
    for task in tasks:
        ed2.make_data(task, run.dir / "data" / task, inner.data_steps, args.workers)
        encoders[f"encoder of {task}"] = vars(replace(inner, task=task, device="cpu"))
        for source in ("random", "replay"):
            for space in ("state", "latent"):
                for method in ("sd2", "sd2j", "learned"):
                    cells[f"{task}, {source}, {space}, {method}"] = dict(
                        task=task, source=source, space=space, method=method, eta=args.eta,
                        data_steps=inner.data_steps, seeds=common.seeds_of(args),
                        latent=ed2.TDMPC2_SIZES[inner.model_size][0],
                        steps=100 if args.fast else 1500)
    data.run_cells(train_encoder, encoders, run.dir, side)
    rows = list(data.run_cells(find_all, cells, run.dir, side).values())
    for row in rows:
        row["found"] = "yes" if row["ari_published"] >= 0.8 else "no"
    columns = ("task", "data", "space", "method", "ari_published", "ari_between_seeds", "found")
    common.show(rows, {k: k for k in columns}, 2)
    data.write_csv(run.dir / "discovery.csv", rows)
    return common.finish(run, "ed2_discovery", dict(rows=rows))


if __name__ == "__main__":
    common.command(Args, __doc__, main)
