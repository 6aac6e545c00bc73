"""STORM's released code differs from its paper in three places: does that change the returns?

    python -m studies.mow_storm_code      # Boxing, 5 variants, 3 seeds: two hours on two cores

fresh: imagination starts from contexts that are sampled and encoded anew, not from windows of the
batch that the world model was trained on. prior: the agent acts on the predicted latent of a frame,
one frame late. lambda: V(s_t) instead of V(s_t+1) in the lambda-return. code: all three.

Rule: a variant is `better` or `worse` than mow.py if the 95 % interval of the difference of their
scores, paired by seed, lies on one side of 0; fewer than three seeds decide nothing.
"""
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import numpy as np
import torch

import mow
from studies.common import StudyArgs, command, finish, open_run, paired, seeds_of, show, verdict
from studies.mow_diagnosis import TINY, over_seeds, per_seed, run_cells


@dataclass
class Args(StudyArgs):
    task: str = "Boxing"
    """a game, as in mow.py"""
    steps: int = 2500
    """agent steps"""
    preset: Literal["auto", "cpu", "gpu", "paper"] = "auto"
    """sizes and batches, as in mow.py"""
    sizes: dict[str, int] = field(default_factory=dict)
    """sizes of networks other than the preset's, as in mow.py"""


def lambda_return(rew, done, value, gamma=0.985, lam=0.95):
    """As in the released code: (1 - lam) V(s_t) in place of (1 - lam) V(s_t+1)."""
    R, out = value[..., -1], []
    for t in range(rew.shape[-1] - 1, -1, -1):
        R = rew[..., t] + gamma * (1 - done[..., t]) * ((1 - lam) * value[..., t] + lam * R)
        out.append(R)
    return torch.stack(out[::-1], -1)


class Fresh(mow.Agent):
    """Imagines from contexts that are sampled and encoded anew."""

    def sample(self, frames, tasks=None):
        batch, a = super().sample(frames, tasks), self.args
        rng = np.random.default_rng([*self.draw, 1])
        contexts = frames.sample(a.rollouts, a.context + 1, rng, self.device, tasks)
        self.contexts = [x[:, self.rank::self.world] for x in contexts]
        return batch

    def imagine(self, z, batch):
        obs, act, _, _, first = self.contexts
        with torch.no_grad(), self.autocast():
            post = self.wm.eval().posterior(mow.to_images(obs), self.wm.embedding())
            return self.imagine_from(mow.draw_latent(post), act, first)


class Prior(mow.Agent):
    """Acts on the predicted latent of a frame."""

    def play(self, obs, memory, seed):
        return super().play(obs, memory, seed, on_prior=True)


class Lambda(mow.Agent):
    """The released code's lambda-return."""

    def policy_loss(self, dream):
        return super().policy_loss(dream, returns=lambda_return)


class Code(Fresh, Prior, Lambda):
    """All of it."""


VARIANTS = {"mow.py": mow.Agent, "fresh": Fresh, "prior": Prior, "lambda": Lambda, "code": Code}


def work(name, cell, folder):
    result = mow.main(mow.Args(**cell["args"]), VARIANTS[cell["variant"]])
    row = result["rows"][0]
    return {"variant": cell["variant"], "return": row["return"], "blind": row["blind"],
            "score": row["score"], "folder": result["folder"]}


def main(args):
    args = replace(args, seeds=1, workers=1) if args.fast else args
    args, run = open_run("mow_storm_code", args)
    more = dict(steps=args.steps)
    if args.fast:
        more = dict(steps=30, random_steps=20, length=8, context=3, horizon=3, rollouts=4, batch=2,
                    eval_episodes=1, sizes=TINY, atari={"frame_cap": 80})
    cells = {}
    for seed in seeds_of(args):
        a = mow.Args(task=args.task, storm=True, seed=seed, preset=args.preset,
                     device=args.device, compile=args.compile, **{"sizes": args.sizes, **more})
        for name in VARIANTS:
            cells[f"{name}_s{seed}"] = {"variant": name, "args": asdict(a)}
    found = run_cells(work, cells, run, args)
    rows = over_seeds(found, ("return", "blind", "score"))
    for row in rows[1:]:
        ours, usual = (per_seed(found, v, "score") for v in (row["variant"], "mow.py"))
        row["change"], low, high = paired(ours, usual)
        words = {"holds": "better", "fails": "worse", "undecided": "undecided"}
        row["verdict"] = words[verdict(low, high, 1, len(ours))]
    show(rows, {"variant": "variant", "return": "return", "return_sd": "+-", "blind": "blind",
                "score": "score", "change": "change of score", "verdict": "verdict"})
    return finish(run, "mow_storm_code", dict(rows=rows, cells=found))


if __name__ == "__main__":
    command(Args, __doc__, main)
