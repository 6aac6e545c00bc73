"""SHAC: PWM's updates through the true, differentiable plant in the place of the world model.

How far do first-order gradients get with perfect foresight? The plant (studies.plants) stands
behind a world model's interface, so that `pwm.train` makes the policy: no model stage, imagination
is the simulation, and windows go on where the bodies of the last ones have got to.

    python -m studies.shac --task planar-hopper          # 16 minutes on a thread: 3,718 with seed 2
    python -m studies.shac --task stiff-hopper           # five times stiffer contacts (Fig. 7a)
    python -m studies.shac --fast                        # under a minute

Verdict: it learned to hop if the mean of 10 deterministic episodes is at least 2,000 (a random
policy has 12). One seed; studies.stiffness compares it with PWM over three.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn

import pwm
from envs import task_facts
from studies.common import StudyArgs, command, judge
from studies.plants import plant


class TruePlant(nn.Module):
    """A differentiable plant behind the interface of a WorldModel. Its latent is the observation,
    centred and scaled by `scale`. Extracting a policy from it is SHAC: the same gradients, through
    the true dynamics."""

    activation = None

    def __init__(self, plant, task, rew_std=1.0):
        super().__init__()
        facts = task_facts(task)
        self.plant, self.ends, self.tasks = plant, hasattr(plant, "ended"), (task,)
        self.obs_dim = self.latent = facts.obs_dim
        self.act_dims = (facts.act_dim,)
        self.scale = pwm.RunningStats(facts.obs_dim)  # until it is updated: mean 0, variance 1
        self.register_buffer("act_mask", torch.ones(1, facts.act_dim), persistent=False)
        self.register_buffer("rew_std", torch.tensor(float(rew_std)))

    def encode(self, obs, task):
        return (obs - self.scale.mean) / self.scale.var.sqrt().clamp(min=1e-3)  # (.., B, O)

    def decode(self, z):
        return z * self.scale.var.sqrt().clamp(min=1e-3) + self.scale.mean  # (.., B, O)

    def next(self, z, act, task):
        state = self.plant.step(self.plant.state(self.decode(z)), act)
        return self.encode(self.plant.observe(state), task)

    def reward(self, z, act, task):
        return self.plant.step_reward(self.decode(z), act)[..., None] / self.rew_std  # (.., B, 1)

    def reward_value(self, logits, pseudo=False):
        return logits[..., 0]

    def end(self, z, task):
        return torch.where(self.plant.ended(self.decode(z)), 30.0, -30.0)  # (.., B) logits: certain


class Beside(pwm.Beside):
    """The plant foresees ends itself: bodies only go on, and data are not needed."""

    @torch.no_grad()
    def roll(self, agent, noise):
        """noise (H, 1, B, A) -> where the bodies are H steps later (1, B, O), and None; what they
        saw on the way updates the scale of observations."""
        wm, seen = agent.wm, []
        z = wm.encode(torch.as_tensor(self.obs), None)
        for eps in noise:
            action = agent.actors(z[None], eps)[0].cpu().numpy()
            self.obs = self.env.step(action)[0]
            seen.append(torch.as_tensor(self.obs))
            z = wm.encode(seen[-1], None)
        self.steps += noise.shape[0] * noise.shape[2]
        wm.scale.update(torch.cat(seen).T)
        return seen[-1][None], None


class Agent(pwm.Agent):
    """Actor and critics on a TruePlant; nothing of the model is trained."""

    shares = pwm.SHARES | {("policy", True): (0.04, 0.3)}
    Beside = Beside

    def world_model(self):
        (task,) = self.tasks
        made = plant(task)
        if not hasattr(made, "ended") or self.device.type != "cpu":
            raise SystemExit(f"SHAC computes gradients through a plant on a CPU, and {task} has "
                             "none that ends: type --task planar-hopper or --task stiff-hopper")
        return TruePlant(made, task)

    def networks(self):
        wm = self.wm
        return dict(actors=pwm.Actors(wm.act_mask, wm.latent), critics=pwm.Critics(1, wm.latent))

    def optimizers(self):
        adam = torch.optim.Adam
        return dict(actors=adam(self.actors.parameters(), 2e-3, pwm.BETAS, fused=True),
                    critics=adam(self.critics.parameters(), 2e-3, pwm.BETAS, fused=True))

    def sampler(self, episodes, horizon):
        """Imagination starts where the bodies are; the data only give the scale of rewards,
        once."""
        if self.wm.scale.count[0] < 1:
            self.wm.rew_std.fill_(pwm.reward_deviation(episodes.arrays(self.tasks[0])))


BUDGET = dict(rounds=10, seed_episodes=4, round_episodes=4, policy_steps=200, policy_batch=64,
              critic_passes=8, policy_lr=2e-3, critic_lr=2e-3, horizon=16)
FAST = dict(rounds=1, seed_episodes=1, round_episodes=1, policy_steps=2, policy_batch=2, horizon=2,
            eval_episodes=1)


@dataclass
class Args(StudyArgs):
    task: str = "planar-hopper"
    """planar-hopper or stiff-hopper, of studies.plants"""


def train(args, inside=None, **budget):
    """What pwm.main returns of one training; budget: what differs from BUDGET."""
    names = "seed device compile workers save_every track".split()
    flags = {name: getattr(args, name) for name in names} | BUDGET
    flags |= budget | (FAST if args.fast else {})
    kind = args.task.removeprefix("studies.plants:")
    made = pwm.Args(task=f"studies.plants:{kind}", ends=True, wm_steps=0, wm_batch=1, wm_horizon=1,
                    wm_lr=0.0, model_size=1, **flags)
    return pwm.main(made, make_agent=Agent, inside=inside)


def main(args):
    """Train, evaluate, judge; returns what results.json holds."""
    if args.resume:
        result = pwm.main(pwm.Args(resume=args.resume), make_agent=Agent)
    else:
        result = train(args)
    mean = result["summary"]["ours"]["mean"]
    verdict = judge({f"it learned to hop, a return of 2,000 or more: {mean:.0f}": mean >= 2000})
    return result | dict(verdict=verdict)


if __name__ == "__main__":
    command(Args, __doc__, main)
