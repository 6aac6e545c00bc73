"""Does a world model of ed2.py carry an agent that acts: DreamerV3, decomposed or not, online?

    python -m studies.ed2_online --task cartpole-swingup        # 2 hours on 2 cores: return 297
    python -m studies.ed2_online --checkpoint runs/NAME/checkpoint.pt --eval-only

The agent plays with its actor, stores what it sees and trains world model, actor and critic on
it, as DreamerV3 does (arXiv 2301.04104, version 2); Fig. 2 shows such runs. --partition none is
DreamerV3 itself, else the world model is ED2's, of equal parameters.

Rule, fixed in advance: it has learned if 10 episodes of the mean action return more than twice what
random actions do. Expected: yes.
"""
import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import data
import ed2
import envs
from studies import common

EPISODES = 2  # of a round of playing


@dataclass
class Args(common.StudyArgs):
    task: str = "cartpole-swingup"
    """any task of envs.py that does not end by itself"""
    seeds: int = 1
    """one agent; several are several commands"""
    partition: Literal["sd2", "published", "full", "none"] = "sd2"
    """groups of actions, as in ed2.py; none: DreamerV3 itself"""
    updates: int | None = None
    """updates; they set the agent steps (CPU: 6,250, GPU: 250,000)"""
    batch: int = 16
    """sequences per update"""
    length: int | None = None
    """steps per sequence (CPU: 32, DreamerV3: 64)"""
    lr: float | None = None
    """learning rate (CPU: 5e-4, DreamerV3: 4e-5)"""
    model_size: str | None = None
    """1m, 12m, 25m or 50m (CPU: 1m, GPU: 12m)"""
    train_ratio: int = 128
    """steps trained on per agent step played (DreamerV3: 512 or 1024)"""
    checkpoint: str | None = None
    """start from the checkpoint.pt of another run"""
    eval_only: bool = False
    """with --checkpoint: only play the agent"""
    capture_video: bool = False
    """one episode of the mean action as mp4 at the end (needs OpenGL: EGL or OSMesa)"""


# ------------------------------------------------------------------------------------------ maths
def lambda_return(rew, value, cont, lam):
    """R_t = r_{t+1} + c_{t+1} [(1-lam) v_{t+1} + lam R_{t+1}], R_H = v_H, for t = 0..H-1: Eq. (4).

    rew, cont (H, ..) hold r_1..r_H and c_1..c_H (the discount is part of c); value (H+1, ..),
    value[0] is not used.
    """
    R, out = value[-1], []
    for t in reversed(range(len(rew))):
        R = rew[t] + cont[t] * ((1 - lam) * value[t + 1] + lam * R)
        out.append(R)
    return torch.stack(out[::-1])  # (H, ..)


def symexp_two_hot_mean(logits):
    """logits (.., 255) -> (..). Mirrored bins in pairs: uniform logits give 0 and not e^20s."""
    p = logits.softmax(-1)
    half = ed2.symexp_bins(logits.device)[128:]
    return ((p[..., 128:] - p[..., :127].flip(-1)) * half).sum(-1)


def return_range(old, returns):
    """Moving 5th and 95th percentile of the returns: old (2,) -> (2,)"""
    ends = torch.tensor([0.05, 0.95], device=returns.device)
    return 0.99 * old + 0.01 * torch.quantile(returns.flatten(), ends)


# --------------------------------------------------------------------------------------- networks
class ActingDreamer(ed2.DreamerV3):
    """The world model with actor and critic. The slow critic lives outside."""

    def __init__(self, obs_dim, act_dim, deter, hidden, classes, units, groups=None, width=None,
                 stoch=32):
        super().__init__(obs_dim, act_dim, deter, hidden, classes, units, groups, width, stoch)
        feat = deter + stoch * classes
        self.actor = ed2.mlp(feat, units, 3, 2 * act_dim, scale=0.01)
        self.critic = ed2.mlp(feat, units, 3, 255, scale=0.0)

    def policy(self, feat):
        """Mean and deviation (.., A) of a Gaussian that the environment clips, not squashed."""
        mean, std = self.actor(feat).chunk(2, -1)
        return torch.tanh(mean), 0.9 * torch.sigmoid(std + 2) + 0.1


def count_parameters(model):
    """Trainable parameters that are in use: masked action weights are not."""
    masked = (1 - model.rssm.act_mask).sum().item() * model.rssm.act_bias.shape[-1]
    return sum(p.numel() for p in model.parameters() if p.requires_grad) - int(masked)


# ----------------------------------------------------------------------------------------- losses
def draw_noise(rssm, act_dim, T, B, horizon, generator):
    """Noise of an update: Gumbel for T+1 posteriors and H priors, normal for H actions."""
    latent = rssm.stoch, rssm.classes
    return (ed2.draw_gumbel((T + 1, B, *latent), generator),
            ed2.draw_gumbel((horizon, T * B, *latent), generator),
            torch.randn(horizon, T * B, act_dim, generator=generator, device=generator.device))


def imagine(model, h, z, gumbel, eps):
    """Roll the actor through the prior: h (N, D), z (N, S C), noise (H, N, S, C) and (H, N, A).

    Returns feat (H+1, N, F) and the unclipped actions (H, N, A); run it without gradients.
    """
    rssm = model.rssm
    weights, feats, acts = rssm.core_weights(), [torch.cat([h, z], -1)], []
    for g, e in zip(gumbel.unbind(0), eps.unbind(0)):
        mean, std = model.policy(feats[-1])
        acts.append(mean + std * e)
        h = rssm.step(weights, h, z, rssm.act_input(weights, acts[-1]))
        z = ed2.sample_latent(rssm.prior(h), g)
        feats.append(torch.cat([h, z], -1))
    return torch.stack(feats), torch.stack(acts)


def critic_loss(logits, target, slow_value):
    """Cross-entropy with the return, and with the slow critic's value as a regulariser: (..)."""
    return ed2.symexp_two_hot_loss(logits, target) + ed2.symexp_two_hot_loss(logits, slow_value)


def behaviour_loss(model, slow, h, z, rew, gumbel, eps, old_range, lam=0.95):
    """Actor and critic: REINFORCE in imagination from every state, and the critic on the replay.

    slow: the slow critic; h (T+1, B, D), z (T+1, B, S C) posterior states with gradient; rew
    (T, B); old_range (2,) percentiles of earlier returns. Imagination starts at states 1..T. Only
    the replay loss has a gradient into the world model. -> loss, metrics, the new range.
    """
    T, B = rew.shape
    with torch.no_grad():
        feat, act = imagine(model, h[1:].flatten(0, 1), z[1:].flatten(0, 1), gumbel, eps)
        reward = symexp_two_hot_mean(model.reward(feat[1:]))  # (H, N) of arriving
        cont = torch.sigmoid(model.cont(feat)[..., 0])  # (H+1, N)
        weight = cont.cumprod(0)[:-1]  # (H, N)
        slow_value = symexp_two_hot_mean(slow(feat[:-1]))
    logits = model.critic(feat)  # (H+1, N, 255)
    with torch.no_grad():
        value = symexp_two_hot_mean(logits)
        ret = lambda_return(reward, value, cont[1:], lam)  # (H, N)
        new_range = return_range(old_range, ret)
        scale = (new_range[1] - new_range[0]).clamp(min=1)
        adv = (ret - value[:-1]) / scale
    mean, std = model.policy(feat[:-1])
    logp = (-0.5 * ((act - mean) / std).square() - std.log()).sum(-1)  # without the constant
    entropy = (std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)  # (H, N)
    policy = -(weight * (logp * adv + 3e-4 * entropy)).mean()
    critic = (weight * critic_loss(logits[:-1], ret, slow_value)).mean()

    # the replay: recorded rewards, and the imagined return of a state as its value
    boot = ret[0].view(T, B)
    cont = torch.full_like(rew, ed2.CONT)
    target = lambda_return(rew, torch.cat([boot[:1], boot]), cont, lam)  # (T, B)
    feat = torch.cat([h, z], -1)[:-1]
    with torch.no_grad():
        slow_value = symexp_two_hot_mean(slow(feat))
    replay = critic_loss(model.critic(feat), target, slow_value).mean()
    metrics = dict(
        policy=policy, value=critic, replay_value=replay, imag_reward=reward.mean(),
        imag_return=ret.mean(), replay_return=target.mean(), adv=adv.abs().mean(), scale=scale,
        entropy=entropy.mean())
    loss = policy + critic + 0.3 * replay
    return loss, {k: x.detach() for k, x in metrics.items()}, new_range


def dreamer_loss(model, slow, old_range, obs, act, rew, noise):
    """Everything DreamerV3 minimises on one batch; noise from `draw_noise`."""
    loss, metrics, (h, z) = ed2.rssm_loss(model, obs, act, rew, noise[0])
    behaviour, more, new_range = behaviour_loss(model, slow, h, z, rew, *noise[1:], old_range)
    return loss + behaviour, metrics | more, new_range


class Agent:
    """A DreamerV3 that acts and learns; `parts` are all that an exact resume needs of it."""

    def __init__(self, model, seed, lr=4e-5, warmup=1000, horizon=15, loss=dreamer_loss):
        self.model, self.horizon, self.loss = model, horizon, loss
        self.device = next(model.parameters()).device
        self.slow = copy.deepcopy(model.critic).requires_grad_(False)
        self.opt = ed2.LaProp(model, lr, warmup)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.where = dict(range=torch.zeros(2))  # 5th and 95th percentile of imagined returns

    @property
    def parts(self):
        return dict(model=self.model, slow=self.slow, opt=self.opt, rng=self.generator,
                    where=self.where)

    def load(self, state):
        """Go on as the agent of a checkpoint.pt."""
        for part in ("model", "slow", "opt"):
            getattr(self, part).load_state_dict(state[part])
        self.generator.set_state(state["rng"].cpu())
        self.where.update(state["where"])

    def update(self, obs, act, rew):
        """One gradient step on obs (T+1, B, O), act (T, B, A), rew (T, B); returns 0-d metrics."""
        noise = draw_noise(self.model.rssm, act.shape[-1], *rew.shape, self.horizon,
                           self.generator)
        old = self.where["range"].to(self.device)
        loss, metrics, new = self.loss(self.model, self.slow, old, obs, act, rew, noise)
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
        fast = [p.detach() for p in self.model.critic.parameters()]
        torch._foreach_lerp_(list(self.slow.parameters()), fast, 0.02)
        self.where["range"] = new
        return dict(metrics, loss=loss.detach())

    def policy(self, jobs, mean=False):
        """A policy for `Workers.rollout` with `jobs` jobs: filters what each sees, then acts.

        Its own memory is (h, z, previous action) per job, reset at the first step of an episode.
        """
        model, rssm = self.model, self.model.rssm
        widths = rssm.deter, rssm.stoch * rssm.classes, rssm.act_weight.shape[1]
        h, z, act = (torch.zeros(jobs, n, device=self.device) for n in widths)
        with torch.no_grad():
            weights = rssm.core_weights()

        @torch.no_grad()
        def step(obs, job, t):  # (n, O), (n,), (n,) -> (n, A)
            obs, i = torch.from_numpy(obs).to(self.device), torch.from_numpy(job).to(self.device)
            old = torch.from_numpy(t > 0).to(self.device)[:, None]
            before = rssm.act_input(weights, act[i] * old)
            new = rssm.step(weights, h[i] * old, z[i] * old, before)
            post = rssm.posterior(new, model.encoder(ed2.symlog(obs)))
            gumbel = ed2.draw_gumbel(post.shape, self.generator)
            h[i], z[i] = new, ed2.sample_latent(post, gumbel)
            mu, std = model.policy(torch.cat([h[i], z[i]], -1))
            eps = torch.randn(mu.shape, generator=self.generator, device=self.device)
            act[i] = (mu if mean else mu + std * eps).clamp(-1, 1)
            return act[i].cpu().numpy()
        return step


# --------------------------------------------------------------------------------------- training
def learn(run, agent, episodes, workers, args):
    """Alternate {play two episodes, store them, train} for as many updates as --updates says."""
    T, repeat = episodes.facts[args.task][2], envs.task_facts(args.task).action_repeat
    per_update = args.batch * args.length
    rounds = math.ceil(args.updates * per_update / args.train_ratio / (EPISODES * T))
    run.keeps(episodes=episodes, **agent.parts)
    run.expects(play=rounds, update=rounds * EPISODES * T * args.train_ratio // per_update)
    for r in run.rounds(rounds):
        steps = [n * EPISODES * T for n in (r, r + 1)]  # agent steps before and after
        for _ in run.once("play"):
            jobs = [(args.task, 100_000 * args.seed + EPISODES * r + i) for i in range(EPISODES)]
            played = workers.rollout(jobs, agent.policy(EPISODES))
            names = ("obs", "act", "rew", "term")
            episodes.append(args.task, *([e[name] for e in played] for name in names))
            ret = float(np.mean([e["ret"] for e in played]))
            run.history.append(dict(steps=steps[1], env_steps=steps[1] * repeat,
                                    minutes=run.seconds / 60, ret=ret))
            run.log({"charts/episodic_return": ret})
            run.say(f"{steps[1]:,} agent steps: return {ret:.1f}")
        sampler = episodes.sampler([args.task], args.length, agent.device)
        done, until = (n * args.train_ratio // per_update for n in steps)
        for _ in run.steps("update", until - done):
            obs, act, rew, *_ = sampler.sequences(args.batch, agent.generator)
            run.note(agent.update(obs, act, rew))


def plot(curve, random, task, path):
    """Return of the stochastic policy against agent steps."""
    fig, ax = common.figure(5, 3.4)
    ax.plot([row["steps"] for row in curve], [row["ret"] for row in curve], "o-", ms=3, lw=1)
    ax.axhline(random, ls="--", color="gray", lw=1, label="random policy")
    ax.set(xlabel="agent steps", ylabel="return of the stochastic policy", title=task)
    ax.legend(fontsize=8)
    common.save_figure(fig, path)


def film(task, agent, path):
    """One episode of the mean action as a video."""
    import imageio
    env, policy, t = envs.make_env(task, 0), agent.policy(1, mean=True), 0
    obs, _ = env.reset(seed=10**9)
    frames, done = [env.render()], False
    while not done:
        act = policy(obs[None], np.array([0]), np.array([t]))[0]
        obs, _, terminated, truncated, _ = env.step(act)
        frames.append(env.render())
        done, t = terminated or truncated, t + 1
    env.close()
    imageio.mimwrite(path, frames, fps=40, macro_block_size=1)
    print(f"video: {path}")


def fill(args):
    """The args with the flags that were left out. SystemExit: some that do not fit."""
    cuda = data.choose_device(args.device)[0].type == "cuda"
    budget = dict(updates=250_000, length=64, lr=4e-5, model_size="12m") if cuda else dict(
        updates=6250, length=32, lr=5e-4, model_size="1m")
    if args.fast:
        budget = dict(updates=250, length=8, lr=1e-3, model_size="1m")
        args = replace(args, batch=4, train_ratio=4)
    args = replace(args, **{k: v for k, v in budget.items() if getattr(args, k) is None})
    if args.eval_only and not args.checkpoint:
        raise SystemExit("--eval-only plays an agent that has learned: type its --checkpoint "
                         "runs/NAME/checkpoint.pt")
    if args.checkpoint and not Path(args.checkpoint).is_file():
        raise SystemExit(f"--checkpoint {args.checkpoint}: expected the checkpoint.pt of a run of "
                         "studies.ed2_online")
    if args.model_size not in ed2.DREAMER_SIZES:
        raise SystemExit(f"--model-size {args.model_size}: expected one of "
                         f"{', '.join(ed2.DREAMER_SIZES)}")
    least = {k: (1, None) for k in ("updates", "batch", "length", "train_ratio")}
    data.check_ranges(args, least | dict(lr=(0, 1), seeds=(1, 1)))
    return replace(args, device="cuda" if cuda else "cpu")


def main(args):
    """Let an agent learn and play it; returns what results.json holds."""
    args = fill(data.resumed(args))
    shape = envs.task_facts(args.task)[:3]
    ed2.check(ed2.Args(task=args.task, partition=args.partition))
    args, run = common.open_run("ed2_online", args)
    device = torch.device(args.device)
    made = run.dir / "data"  # SD2 reads it, and it is the baseline
    random, _, notes = ed2.make_data(args.task, made, 0, args.workers)
    groups = ed2.find_partition(args.partition, args.task, random)[0]
    inner = ed2.Args(wm="dreamerv3", model_size=args.model_size)
    groups, width = list(ed2.plan(inner, groups).values())[-1]
    torch.manual_seed(args.seed)
    sizes = ed2.DREAMER_SIZES[args.model_size]
    model = ActingDreamer(*shape[:2], **sizes, groups=groups, width=width).to(device)
    loss = torch.compile(dreamer_loss, dynamic=False) if args.compile else dreamer_loss
    agent = Agent(model, args.seed, args.lr, max(1, min(1000, args.updates // 10)), loss=loss)
    if args.checkpoint:
        agent.load(torch.load(args.checkpoint, device, weights_only=True))
    print(f"groups {groups}, {count_parameters(model):,} parameters, random policy "
          f"{notes['random_return']:.1f}", flush=True)
    with envs.Workers(args.workers) as workers:
        if not args.eval_only:
            episodes = data.Episodes.create(run.dir / "episodes", {args.task: shape})
            learn(run, agent, episodes, workers, args)
        jobs = [(args.task, 10**9 + i) for i in range(10)]
        played = workers.rollout(jobs, agent.policy(10, mean=True))
    returns = [float(e["ret"]) for e in played]
    print(f"\n{args.task}: mean action {np.mean(returns):.1f} (10 episodes), random "
          f"{notes['random_return']:.1f}")
    learned = bool(np.mean(returns) > 2 * notes["random_return"])
    common.judge({"it returns more than twice what random actions do": learned})
    if run.history:
        plot(run.history, notes["random_return"], args.task, run.dir / "curve.png")
    if args.capture_video:
        film(args.task, agent, run.dir / "video.mp4")
    return run.finish(dict(groups=groups, random_return=notes["random_return"], returns=returns,
                           curve=run.history, learned=learned))


if __name__ == "__main__":
    common.command(Args, __doc__, main)
