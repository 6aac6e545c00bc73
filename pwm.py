"""PWM: policy learning with multi-task world models (Georgiev et al., arXiv 2407.02466) in one file.

A world model with task embeddings (TD-MPC2's architecture) is trained on episodes of all tasks. It is then frozen and
used as a differentiable simulator: one actor and three critics per task learn by first-order gradients through imagined
roll-outs, all tasks at once as stacked tensors. Without data, rounds of {roll out, train the model, improve all
policies} make it. TD-MPC2's policy prior, Q ensemble and MPPI planner are here as the baseline (--planner-episodes).

    python pwm.py --task cartpole-swingup     # 2 CPU cores, no data: see README for minutes and return
    python pwm.py --task mt30                 # thirty policies and a table beside the paper's
    python pwm.py --task hopper               # one body of LOCOMOTION or a gymnasium id: episodes that end (--episodic)
    python pwm.py --task ball-wall            # Fig. 2; --task double-pendulum: Fig. 3, and SHAC on the true plant
    python pwm.py --task planar-hopper --true-plant    # SHAC: the same updates through the true, differentiable plant
    python pwm.py --ablation all              # Figs. 7b, 8, 14, 18, 19 as one table; --ablation stiffness: Fig. 7a

Copy me together with envs.py and data.py. Shapes: N tasks, B batch, H horizon, O obs, A action, L latent, E critics
or Qs, K = 101 bins; time first: obs (H+1, B, O), act (H, B, A), rew (H, B); stacked networks (N, ..).

Deviations from the paper (the released code's own are not repeated):
 1. Loss weights 20 : 0.1 and means, as in the trainer of the published models; Eq. (10) prints 1 : 1 and sums.
 2. Critic minibatches are reshuffled in every pass (App. C.2 says uniform; the release takes contiguous quarters).
 3. On a CPU the world model trains on 4-step sequences at learning rate 1e-3 instead of 16 and 3e-4 (--wm-horizon,
    --wm-lr), and everywhere its rate falls in the second half of a round (--wm-final-lr). Imagination keeps H = 16.
 4. On a CPU the critics take one pass over the imagined data per update instead of eight (--critic-passes), but for 10.
 5. Actions are masked to the task's own dimensions in imagination too; the release lets policies use untrained inputs.
 6. gamma^H discounts the terminal value (Eq. 6; the release has gamma^(H+1)); start states come from every episode.
 7. Own data: half of the roll-outs with current policies are disturbed by short random actions (see `collect`).
 8. Single tasks that end (--episodic): the flags come, as in the release, from bodies that do in the environment what
    imagination does, and what they did is data (`Windows`). Given data (--data-dir) have no bodies: there a head, which
    the release has not, learns which steps end an episode, and imagined returns and the critics' steps are weighted by
    the probability to come so far.
 9. There, rewards are divided by their deviation and not centred, which would make an end as good as going on; and own
    data of mixed quality take the place of SHAC's. On given data imagination starts in every stored state.
10. On a CPU these tasks imagine 6 steps instead of 16, train on 6-step sequences, learn in sixty short rounds, and
    critics at 1e-3 and actors at 3e-4 instead of 5e-4: critics have to keep up with values that change when a policy
    begins to stand, and Adam at 1e-3 moves the 153,000 parameters of an actor by up to 0.39 per update (their root
    times the rate), where steps of 0.1 along the gradient gained no more than steps of 0.02.
11. There too, critics predict the distance from a running mean of their targets. Without centred rewards (9) those of
    an ant lie near 250 and differ by 2: networks that had to follow the 250 lagged behind, and their slopes misled the
    actor.
12. And actors begin with actions near 0: an untrained one throws down an ANYmal that stands by itself.
13. Their world models have no SimNorm: F predicts the change of a latent without activation, and observations are
    scaled. In 1/60 s a body changes less than F, trained for minutes, errs when it has to make a latent anew: SimNorm
    models knew a hopper's next state worse than "nothing changes" does (--activation simnorm is the paper's).
14. And their rate falls from round to round, as the policies' does: every round moves the latent, and an ANYmal's actor
    that got 6,898 with its model got 14 with that of four rounds later.
"""
import contextlib
import copy
import csv
import functools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

from data import Episodes, LegacyRun as Run, bootstrap_ci, convert_tdmpc2, iqm, safe_load
from envs import LOCOMOTION, SUITES, TOY, Flock, Herd, Workers, choose_gl, make_env, plant, score, task_facts

MT30, MT80 = SUITES["mt30"], SUITES["mt80"]


@dataclass
class Args:
    task: str = "mt30"
    """mt30, mt80, one task (cartpole-swingup, mw-reach), a comma list, or a gymnasium id (my_file:MyTask-v0)"""
    seed: int = 1
    """seeds networks, sampling and environments"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute; auto takes the GPU when there is one"""
    compile: bool = field(default_factory=torch.cuda.is_available)
    """torch.compile for the losses: by default with a GPU; on a CPU it costs minutes at the start (an estimate)"""
    bf16: bool = False
    """bfloat16 matrix products, everything else float32; 1.05-1.35x faster on a CPU that has it"""
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """environment processes for roll-outs"""
    fast: bool = False
    """tiny budgets: the whole pipeline in under 3 minutes, to see that it works (it does not learn much)"""
    track: bool = False
    """also send metrics to Weights & Biases (pip install wandb)"""
    capture_video: bool = False
    """one mp4 per task after evaluation, of the better of last and kept policy (needs OpenGL: EGL or OSMesa)"""
    resume: str | None = None
    """continue the run in this folder, e.g. runs/mt30__pwm__1__1700000000; its flags are read from there"""
    checkpoint: str | None = None
    """published world model (TD-MPC2 or PWM) or checkpoint.pt of a run: skips world-model training"""
    eval_only: bool = False
    """with --checkpoint runs/../checkpoint.pt: only evaluate its policies"""
    data_dir: str | None = None
    """published chunk_*.pt (converted once into data_dir/episodes) or a folder of episodes; without it data is made"""

    episodic: bool | None = None
    """the paper's single-task variant: a scalar head for scaled rewards, ends of episodes, short episodes used,
    roll-outs counted in steps; default: for one body of LOCOMOTION or one gymnasium id (deviations 8 and 9)"""

    # ablations
    ablation: str | None = None
    """all, or some of activation, model-updates, prior, wm-horizon, batch, objective, shared (comma list): one table on
    four tasks, or on those of --task; stiffness: SHAC and PWM on soft and stiff contacts; latency: ms per action"""
    activation: Literal["simnorm", "mish", "relu", "residual"] | None = None
    """of the world model: Mish, with SimNorm where a latent is made (Sec. 3.3); Mish or ReLU everywhere (Fig. 8a);
    residual: Mish, and a latent without activation whose change F predicts (default for --episodic: deviation 13)"""
    shared_policy: bool = False
    """one actor and critic for all tasks, which see the task's embedding (Fig. 18)"""
    td_actor: bool = False
    """the actor maximises the mean TD(lambda) return of the imagined steps instead of Eq. (6) (Fig. 19)"""
    true_plant: bool = False
    """SHAC: the task's differentiable plant in the place of the world model (planar-hopper, stiff-hopper), which is not
    trained: --model-size and --wm-.. are without effect"""

    # budget: left out, these follow from device and number of tasks and are printed at the start
    model_size: Literal[1, 5, 19, 48, 317] | None = None
    """millions of parameters of the TD-MPC2 agent with this world model (Table 1 uses 48)"""
    rounds: int | None = None
    """own data: rounds of {roll out, train the world model, improve all policies}"""
    seed_episodes: int | None = None
    """own data: episodes per task with random actions in the first round (--episodic: or as many short ones)"""
    round_episodes: int | None = None
    """own data: episodes per task with the current policies in each later round (episodic: as above)"""
    wm_steps: int | None = None
    """world-model gradient steps over all rounds (published models: 4.9 million on MT30)"""
    wm_batch: int | None = None
    """sequences per world-model step (Table 1: 1024)"""
    policy_steps: int | None = None
    """policy updates of every task over all rounds (Sec. 4.2: 10,000)"""
    policy_batch: int | None = None
    """B, imagined roll-outs per task and update (Table 1: 64; the multi-task release ran 512)"""
    critic_passes: int | None = None
    """passes over the imagined data per update (App. C.2: 8); the costliest part on a CPU: deviation 4"""
    wm_horizon: int | None = None
    """steps of world-model training sequences (Table 1: 16): deviation 3"""
    wm_lr: float | None = None
    """world-model learning rate (Table 1: 3e-4); the encoder's is 0.3 of it: deviation 3"""
    wm_final_lr: float = 0.03
    """the world-model rate falls linearly to this share in the second half of each round (1: constant, as published)"""
    critic_batches: int = 4
    """minibatches per pass (App. C.2: 4)"""

    # algorithm
    horizon: int | None = None
    """H, imagined steps (Table 1: 16): deviation 10"""
    gamma: float = 0.99
    """discount (Table 1)"""
    lam: float = 0.95
    """lambda of the critic's targets (Table 1)"""
    rho: float = 0.99
    """weight of step t in the world-model loss is rho^t (Eq. 10 calls it gamma)"""
    policy_lr: float | None = None
    """actor learning rate, falling linearly to 1e-5 (Table 1: 5e-4): deviation 10"""
    critic_lr: float | None = None
    """critic learning rate, falling as the actor's (Table 1: 5e-4; left out: as --policy-lr): deviation 10"""
    beta1: float = 0.7
    """first Adam coefficient of actor and critic (released code; the second is 0.95)"""
    symexp: bool = False
    """imagine true rewards; the paper (App. C.1) leaves out the symexp and maximises rewards in log space"""
    first_model: float | None = None
    """share of the world-model updates in the first round, where the latent model starts from nothing"""
    last_model: float | None = None
    """share of the world-model updates in the last round"""
    first_policy: float | None = None
    """share of the policy updates in the first round"""
    last_policy: float | None = None
    """share of the policy updates in the last round"""
    held_out: float = 0.1
    """fraction of episodes on which the world model is tested, never trained"""

    # evaluation
    eval_episodes: int | None = None
    """deterministic episodes per task at the end, and as many of a random policy (default 10)"""
    eval_every: int = 0
    """policy updates after which all policies are evaluated on the way, for a curve (Fig. 8b); 0: only at the end"""
    seeds: int | None = None
    """toys: networks of ball-wall (default 100), learned models per horizon of double-pendulum (default 3); --ablation:
    trainings of every variant (default 3, activation 5)"""
    planner_episodes: int = 0
    """also train TD-MPC2's prior and Q on the same model and data, and evaluate its planner for so many episodes"""
    prior: bool = False
    """also train them, and evaluate the prior: TD-MPC2 without planning (Figs. 8b and 18)"""
    save_every: float = 60.0
    """seconds between checkpoints"""


# ------------------------------------------------------------------------------------------------------------ maths
BINS, BIN_LIMIT = 101, 10.0  # reward and Q classes, equally spaced in symlog space


def symlog(x):
    """sign(x) ln(1 + |x|)   (App. C.1)"""
    return x.sign() * x.abs().log1p()


def symexp(x):
    """sign(x) (e^|x| - 1), the inverse of symlog   (App. C.1)"""
    return x.sign() * x.abs().expm1()


def two_hot(x):
    """x (..) raw reward -> (.., 101): symlog(x) as weights on its two neighbouring bins   (App. C.1)"""
    y = (symlog(x).clamp(-BIN_LIMIT, BIN_LIMIT) + BIN_LIMIT) * ((BINS - 1) / (2 * BIN_LIMIT))  # in units of a bin
    k = y.floor()
    frac, k = (y - k)[..., None], k.long()[..., None]
    out = torch.zeros(*x.shape, BINS, device=x.device, dtype=x.dtype)
    out.scatter_(-1, (k + 1) % BINS, frac)
    return out.scatter_(-1, k, 1 - frac)


def two_hot_inv(logits, pseudo=False):
    """logits (.., 101) -> scalar (..). `pseudo` leaves out the symexp: PWM's reward in log space (App. C.1)."""
    bins = torch.linspace(-BIN_LIMIT, BIN_LIMIT, BINS, device=logits.device)
    y = (logits.softmax(-1) * bins).sum(-1)  # not a matmul: autocast would round the bins to bfloat16
    return y if pseudo else symexp(y)


def two_hot_loss(logits, x):
    """Cross-entropy of logits (.., 101) against two_hot(x), x (..) -> (..), without building the two-hot rows."""
    y = (symlog(x).clamp(-BIN_LIMIT, BIN_LIMIT) + BIN_LIMIT) * ((BINS - 1) / (2 * BIN_LIMIT))
    k = y.floor()
    frac, k = y - k, k.long()[..., None]
    logp = logits.log_softmax(-1)
    return -((1 - frac) * logp.gather(-1, k)[..., 0] + frac * logp.gather(-1, (k + 1) % BINS)[..., 0])


def lambda_return(rew, value, gamma, lam, alive=None):
    """TD(lambda) targets, Eqs. (7)-(8): G_h = r_h + gamma [(1-lam) v_{h+1} + lam G_{h+1}], G_H = v_H.

    rew (H, ..), value (H+1, ..) with value[h] = V(z_h); value[0] is not used. alive (H, ..): probability that the
    episode goes on after step h, which multiplies gamma there. Returns G (H, ..).
    """
    G, out = value[-1], []
    for h in reversed(range(len(rew))):
        g = gamma if alive is None else gamma * alive[h]
        G = rew[h] + g * ((1 - lam) * value[h + 1] + lam * G)
        out.append(G)
    return torch.stack(out[::-1])


def reward_loss(logits, x):
    """Error of a reward head (..), x (..): cross-entropy of 101 logits (App. C.1), squared error of a scalar head."""
    return (logits[..., 0] - x).square() if logits.shape[-1] == 1 else two_hot_loss(logits, x)


def reward_value(logits, pseudo=False):
    """What a reward head (.., 101) or (.., 1) predicts, (..)."""
    return logits[..., 0] if logits.shape[-1] == 1 else two_hot_inv(logits, pseudo)


def batch_mean(x, live=None):
    """Mean over all axes but the first, with live (H, B) = 0 counting as 0: x (H, B, ..) -> (H,)."""
    if live is None:
        return x.mean(tuple(range(1, x.ndim)))
    x = x.flatten(2).mean(2) if x.ndim > 2 else x
    return (x * live).mean(1)  # of the whole batch, so that several ranks average to what one computes


class FastMish(torch.autograd.Function):
    """x tanh(softplus(x)) = x (1-s^2)/(1+s^2) with s = sigmoid(-x): PyTorch's CPU kernel costs as much as the matrix
    product before it; this form, with its derivative kept for the backward pass, takes less than half the time."""

    @staticmethod
    def forward(ctx, x):
        s = x.neg().sigmoid_()
        q = s * s
        r = q.add(1).reciprocal_()
        t = (1 - q).mul_(r)
        if ctx.needs_input_grad[0]:  # d/dx = t + 4 x s^2 (1-s) / (1+s^2)^2
            ctx.save_for_backward(s.neg_().add_(1).mul_(q).mul_(r).mul_(r).mul_(x).mul_(4).add_(t))
        return t.mul_(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


class FastSimNorm(torch.autograd.Function):
    """Softmax over a last axis of 8, three times faster on a CPU than the kernel made for long rows."""

    @staticmethod
    def forward(ctx, x):
        p = (x - x.amax(-1, keepdim=True)).exp_()
        p = p.div_(p.sum(-1, keepdim=True))
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx, grad):
        (p,) = ctx.saved_tensors
        gp = grad * p
        return gp.addcmul_(p, gp.sum(-1, keepdim=True), value=-1)


def mish(x):
    if torch.compiler.is_compiling():  # fused into one pass by the compiler
        q = torch.sigmoid(-x).square()
        return x * (1 - q) / (1 + q)
    return F.mish(x) if x.is_cuda else FastMish.apply(x)


def simnorm(x, V=8):
    """Eq. (4): softmax over groups of V; x (.., L) -> (.., L), each group sums to 1."""
    g = x.unflatten(-1, (-1, V))
    g = g.softmax(-1) if x.is_cuda or torch.compiler.is_compiling() else FastSimNorm.apply(g)
    return g.flatten(-2)


# --------------------------------------------------------------------------------------------------------- networks
class NormedLinear(nn.Linear):
    """Linear -> LayerNorm -> activation, TD-MPC2's block: (.., I) -> (.., J). Autocast makes only the product bf16."""

    def __init__(self, i, j, act=mish):
        super().__init__(i, j)
        self.ln, self.act = nn.LayerNorm(j), act

    def forward(self, x):
        return self.act(self.ln(super().forward(x).float()))


class WorldModel(nn.Module):
    """TD-MPC2's encoder E, dynamics F and reward R with task embeddings (Sec. 3.3, Table 1).

    obs (.., B, O), act (.., B, A), task (B,) ints, z (.., B, L). Observations and actions are zero-padded to the widest
    task; `act_dims[task]` entries of an action are real and the rest is masked.
    `episodic` is the single-task variant: a scalar head for rewards divided by `rew_std`, a head for ends, and
    observations centred and scaled by `obs_mean` and `obs_std`; `activation`: see Args (deviation 13).
    """

    def __init__(self, obs_dim, act_dims, enc_layers, enc_hidden, hidden, latent, task_dim, episodic=False,
                 activation="simnorm"):
        super().__init__()
        inner, last = {"simnorm": (mish, simnorm), "mish": (mish, mish), "relu": (F.relu, F.relu),
                       "residual": (mish, nn.Identity())}[activation]
        block = functools.partial(NormedLinear, act=inner)
        self.episodic, self.activation, self.residual = bool(episodic), activation, activation == "residual"
        self.obs_dim, self.act_dims, self.latent, self.task_dim = obs_dim, tuple(act_dims), latent, task_dim
        self.tasks = ()  # names of the task rows, where known
        A = max(act_dims)
        self.register_buffer("act_mask", torch.tensor([[float(j < d) for j in range(A)] for d in act_dims]),
                             persistent=False)
        widths = [obs_dim + task_dim] + [enc_hidden] * max(enc_layers - 1, 1)
        self.encoder = nn.Sequential(*(block(i, j) for i, j in zip(widths, widths[1:])),
                                     NormedLinear(widths[-1], latent, last))
        i = latent + task_dim + A
        self.dynamics = nn.Sequential(block(i, hidden), block(hidden, hidden), nn.Linear(hidden, latent)
                                      if self.residual else NormedLinear(hidden, latent, last))
        self.reward_head = nn.Sequential(block(i, hidden), block(hidden, hidden),
                                         nn.Linear(hidden, 1 if episodic else BINS))
        if episodic:
            self.end_head = nn.Sequential(block(latent + task_dim, hidden), nn.Linear(hidden, 1))
            self.register_buffer("rew_std", torch.ones(()))  # this and the next two: of all steps collected so far
            self.register_buffer("obs_mean", torch.zeros(obs_dim))
            self.register_buffer("obs_std", torch.ones(obs_dim))
        if task_dim:
            self.task_emb = nn.Embedding(len(act_dims), task_dim)
            nn.init.uniform_(self.task_emb.weight, -0.02, 0.02)
        self.apply(init_trunc_normal)
        nn.init.zeros_(self.reward_head[-1].weight)  # uniform reward logits at the start

    def with_task(self, x, task):
        if not self.task_dim:
            return x
        return torch.cat([x, self.task_emb(task).expand(*x.shape[:-1], -1)], -1)

    def encode(self, obs, task):
        if self.episodic:
            obs = (obs - self.obs_mean) / self.obs_std
        return self.encoder(self.with_task(obs, task))  # (.., B, L)

    def next(self, z, act, task):
        out = self.dynamics(torch.cat([self.with_task(z, task), act], -1))  # (.., B, L)
        return z + out if self.residual else out

    def reward(self, z, act, task):
        return self.reward_head(torch.cat([self.with_task(z, task), act], -1)).float()  # (.., B, 101) logits, or 1

    def end(self, z, task):
        return self.end_head(self.with_task(z, task))[..., 0].float()  # (.., B) logits: the step into z ended it

    def forward(self, *batch):  # what DistributedDataParallel calls
        return world_model_loss(self, *batch)

    @torch.no_grad()
    def project_embeddings(self):
        """Rows of the task table keep a norm of at most 1; done after each step, so that the graph stays pure."""
        if self.task_dim:
            norm = self.task_emb.weight.norm(dim=1, keepdim=True)
            self.task_emb.weight.mul_(torch.where(norm > 1, 1 / (norm + 1e-7), 1.0))


class TruePlant(nn.Module):
    """A differentiable plant behind the interface of a WorldModel. Its latent is the observation, centred and scaled by
    `scale`. Extracting a policy from it by `update_policies` is SHAC: the same gradients, through the true dynamics."""

    def __init__(self, plant, task, rew_std=1.0):
        super().__init__()
        facts = task_facts(task)
        self.plant, self.episodic, self.tasks, self.activation = plant, hasattr(plant, "ended"), (task,), None
        self.obs_dim = self.latent = facts.obs_dim
        self.act_dims = (facts.act_dim,)
        self.scale = RunningStats(facts.obs_dim)  # until it is updated: mean 0, variance 1
        self.register_buffer("act_mask", torch.ones(1, facts.act_dim), persistent=False)
        self.register_buffer("rew_std", torch.tensor(float(rew_std)))

    def encode(self, obs, task):
        return (obs - self.scale.mean) / self.scale.var.sqrt().clamp(min=1e-3)  # (.., B, O)

    def decode(self, z):
        return z * self.scale.var.sqrt().clamp(min=1e-3) + self.scale.mean  # (.., B, O)

    def next(self, z, act, task):
        return self.encode(self.plant.observe(self.plant.step(self.plant.state(self.decode(z)), act)), task)

    def reward(self, z, act, task):
        return self.plant.step_reward(self.decode(z), act)[..., None] / self.rew_std  # (.., B, 1)

    def end(self, z, task):
        return torch.where(self.plant.ended(self.decode(z)), 30.0, -30.0)  # (.., B) logits: certain


def init_trunc_normal(m):
    if isinstance(m, nn.Linear):
        nn.init.trunc_normal_(m.weight, std=0.02)
        nn.init.zeros_(m.bias)


class StackedMLP(nn.Module):
    """n independent MLPs as stacked tensors: x (n, B, I) -> (n, B, J), one baddbmm per layer.

    Blocks are Linear -> Mish -> LayerNorm (PWM's actor and critic) or, with `norm_first`, Linear -> Dropout (first
    layer only) -> LayerNorm -> Mish (TD-MPC2's Q functions).
    """

    def __init__(self, n, widths, init, norm_first=False, dropout=0.0):
        super().__init__()
        self.norm_first, self.dropout = norm_first, dropout
        pairs = list(zip(widths, widths[1:]))
        layers = [[init(i, j) for _ in range(n)] for i, j in pairs]
        self.weight = nn.ParameterList(torch.stack([w for w, _ in layer]) for layer in layers)  # (n, I, J)
        self.bias = nn.ParameterList(torch.stack([b for _, b in layer])[:, None] for layer in layers)  # (n, 1, J)
        self.gain = nn.ParameterList(torch.ones(n, 1, j) for _, j in pairs[:-1])
        self.shift = nn.ParameterList(torch.zeros(n, 1, j) for _, j in pairs[:-1])

    def forward(self, x):
        for k, (W, b) in enumerate(zip(self.weight, self.bias)):
            x = torch.baddbmm(b, x, W).float()  # (n, B, J)
            if k == len(self.gain):
                return x
            if self.norm_first:
                x = F.dropout(x, self.dropout, self.training and k == 0)
                x = mish(self.norm(x, k))
            else:
                x = self.norm(mish(x), k)

    def norm(self, x, k):
        return torch.addcmul(self.shift[k], F.layer_norm(x, x.shape[-1:]), self.gain[k])


def init_default(i, j):
    """PyTorch's default Linear initialisation, as (weight (I, J), bias (J,))."""
    layer = nn.Linear(i, j)
    return layer.weight.detach().T, layer.bias.detach()


def init_orthogonal(i, j):
    return nn.init.orthogonal_(torch.empty(j, i), 2**0.5).T, torch.zeros(j)


class Actors(nn.Module):
    """One Gaussian tanh policy per task: z (N, B, L), noise eps (N, B, A) or None -> act (N, B, A) in [-1, 1]."""

    MIN_LOG_STD = -1.427  # sigma >= 0.24 (App. C.3)

    def __init__(self, act_mask, latent, widths=(400, 200, 100)):
        super().__init__()
        n, A = act_mask.shape
        self.mu = StackedMLP(n, (latent, *widths, A), init_default)
        self.log_std = nn.Parameter(torch.full((n, 1, A), -1.0))
        self.register_buffer("act_mask", act_mask[:, None].clone(), persistent=False)

    def forward(self, z, eps=None):
        u = self.mu(z)
        if eps is not None:
            u = u + self.log_std.exp() * eps
        return torch.tanh(u) * self.act_mask

    @torch.no_grad()
    def clamp_std(self):
        self.log_std.clamp_(min=self.MIN_LOG_STD)

    def first(self):
        """The first task's actor alone, as one would deploy it."""
        one = Actors(self.act_mask[:1, 0], self.mu.weight[0].shape[1], [w.shape[2] for w in self.mu.weight[:-1]])
        one.load_state_dict({k: v[:1] for k, v in self.state_dict().items()})
        return one.to(self.act_mask.device)


class Critics(nn.Module):
    """E value functions per task: z (N, B, L) -> (N, E, B). A network tells only how far a value is from `offset`."""

    def __init__(self, n, latent, E=3, widths=(400, 200)):
        super().__init__()
        self.n, self.E = n, E
        self.v = StackedMLP(n * E, (latent, *widths, 1), init_orthogonal)
        self.register_buffer("offset", torch.zeros(n * E, 1))

    def forward(self, z):
        x = z[:, None].expand(-1, self.E, -1, -1).flatten(0, 1)  # (N E, B, L)
        return (self.v(x)[..., 0] + self.offset).view(self.n, self.E, -1)

    @torch.no_grad()
    def follow(self, target):
        """Move the offset towards the mean of the targets (n, M) by a tenth of the way (deviation 11)."""
        self.offset.lerp_(target.mean(1).repeat_interleave(self.E)[:, None], 0.1)


def tell_task(z, wm, rows):
    """z (N, B, L) -> (1, N B, L + e): every latent with its task's embedding, in one batch."""
    e = wm.task_emb(rows).detach()[:, None].expand(-1, z.shape[1], -1)
    return torch.cat([z, e], -1).flatten(0, 1)[None]


class SharedActor(Actors):
    """--shared-policy: the interface of Actors with one network for all tasks (Fig. 18)."""

    def __init__(self, wm, rows):
        super().__init__(torch.ones(1, wm.act_mask.shape[1]), wm.latent + wm.task_dim)
        self.wm, self.rows = [wm], rows  # in a list: not a sub-module
        self.act_mask = wm.act_mask[rows][:, None]

    def forward(self, z, eps=None):
        u = self.mu(tell_task(z, self.wm[0], self.rows.to(z.device))).view(*z.shape[:2], -1)
        if eps is not None:
            u = u + self.log_std.exp() * eps
        return torch.tanh(u) * self.act_mask

    def first(self):
        one = SharedActor(self.wm[0], self.rows[:1]).to(self.act_mask.device)
        one.load_state_dict(self.state_dict())
        return one


class SharedCritics(Critics):
    """The interface of Critics with one set of critics for all tasks."""

    def __init__(self, wm, rows):
        super().__init__(1, wm.latent + wm.task_dim)
        self.wm, self.rows = [wm], rows

    def forward(self, z):
        v = super().forward(tell_task(z, self.wm[0], self.rows.to(z.device)))  # (1, E, N B)
        return v.view(self.E, *z.shape[:2]).transpose(0, 1)


# ----------------------------------------------------------------------------------------------- losses and updates
def world_model_loss(wm, obs, act, rew, task, rho, term=None, live=None):
    """Eq. (10) with TD-MPC2's weights: consistency 20, reward 0.1, both means over batch, latent and horizon.

    obs (H+1, B, O), act (H, B, A), rew (H, B), task (B,). Episodic: term (H, B) says which steps ended their episode
    and live (H, B) which are real (1) or beyond the end (0). Returns loss, metrics, z (H+1, B, L), targets (H, B, L).
    """
    with torch.no_grad():  # no slow copy of the encoder: its own output on the next observation is the target
        target = wm.encode(obs[1:], task)  # (H, B, L)
    z = [wm.encode(obs[0], task)]
    for a in act:
        z.append(wm.next(z[-1], a, task))
    z = torch.stack(z)  # (H+1, B, L)
    logits = wm.reward(z[:-1], act, task)  # (H, B, 101) or (H, B, 1)
    if wm.episodic:
        rew = (rew / wm.rew_std).clamp(-5, 5)  # not centred: that would make an end as good as going on (deviation 9)
    discount = rho ** torch.arange(len(act), device=z.device)  # (H,)
    consistency = (discount * batch_mean((z[1:] - target).square(), live)).mean()
    reward = (discount * batch_mean(reward_loss(logits, rew), live)).mean()
    loss, metrics = 20 * consistency + 0.1 * reward, dict(consistency=consistency.detach(), reward=reward.detach())
    if wm.episodic:
        end = F.binary_cross_entropy_with_logits(wm.end(z[1:], task), term, reduction="none")  # (H, B)
        end = (discount * batch_mean(end, live)).mean()
        loss, metrics["end"] = loss + end, end.detach()  # not weighted by 0.1 as rewards are: ends are rare
    return loss, metrics, z, target


def imagine(wm, actors, obs, eps, task, pseudo=True):
    """Roll all policies through the model: obs (N, B, O), eps (H, N, B, A), task (N B,).

    Returns z (H+1, N, B, L), rewards (H, N, B), in log space if `pseudo` (App. C.1), and the probabilities (H, N, B)
    that the episode goes on, or None if it always does. Gradients flow through F and R by state and action; the only
    cut is the actor's input. wm may be anything with encode, next and reward: with a true plant this is SHAC.
    """
    N, B = obs.shape[:2]
    z = [wm.encode(obs.flatten(0, 1), task)]  # (N B, L)
    acts = []
    for e in eps:
        acts.append(actors(z[-1].detach().view(N, B, -1), e).flatten(0, 1))  # (N B, A)
        z.append(wm.next(z[-1], acts[-1], task))
    z = torch.stack(z)
    rew = reward_value(wm.reward(z[:-1], torch.stack(acts), task), pseudo)
    alive = (-wm.end(z[1:], task)).sigmoid().view(-1, N, B) if wm.episodic else None
    return z.view(len(z), N, B, -1), rew.view(-1, N, B), alive


def actor_loss(wm, actors, critics, stats, obs, eps, task, gamma, lam, pseudo=True, td=False, alive=None):
    """Eq. (6) with returns divided by their running deviation; and the critic's data (z, lambda-returns).

    td: the mean TD(lambda) return of the imagined steps in the place of Eq. (6) (App. F.3), through model and critic.
    alive: (H, N, B), 0 from the step on that ended a body that did the same in the environment (`Windows`); without it
    the probabilities that the model tells.
    Returns (sum of the tasks' losses, J (N,), z (N, H B, L), targets (N, H B), weights (N, H B) or None).
    """
    z, rew, foreseen = imagine(wm, actors, obs, eps, task, pseudo)
    alive = foreseen if alive is None else alive
    H, N, B = rew.shape
    discount = (gamma ** torch.arange(H + 1, device=z.device))[:, None, None]
    reached = torch.ones_like(discount)
    if alive is not None:  # steps count by the probability that the episode has come so far; an end has no value
        reached = torch.cat([torch.ones_like(alive[:1]), alive.cumprod(0)])  # (H+1, N, B)
    value_H = critics(z[-1]).amin(1)  # (N, B), differentiable
    if td:
        values = [critics(x).amin(1) for x in z[1:-1]] + [value_H]
        goal = lambda_return(rew, torch.stack([value_H, *values]), gamma, lam, alive)  # (H, N, B)
        J = (reached[:-1] * goal).mean(0)
    else:
        weight = discount * reached
        J = (weight[:-1] * rew).sum(0) + weight[-1] * value_H  # (N, B)
    with torch.no_grad():
        stats.update(J)
        flat = z[1:-1].transpose(0, 1).flatten(1, 2)  # (N, (H-1) B, L)
        value = critics(flat).amin(1).view(N, H - 1, B).transpose(0, 1)
        value = torch.cat([value_H[None], value, value_H[None]])  # (H+1, N, B); entry 0 is not read
        target = lambda_return(rew, value, gamma, lam, alive)  # (H, N, B)
    loss = (-J.mean(1) / (stats.var + 1e-5).sqrt()).sum()
    flat = z[:-1].detach().transpose(0, 1).flatten(1, 2)
    weight = None if alive is None else reached[:-1].detach().transpose(0, 1).flatten(1)
    return loss, J.detach().mean(1), flat, target.transpose(0, 1).flatten(1), weight


def critic_loss(critics, z, target, weight=None):
    """Eq. (9): z (N, M, L), target (N, M) -> sum over tasks of the mean over critics and batch; the steps count by
    weight (N, M), the probability that the episode has come so far."""
    error = (critics(z) - target[:, None]).square()
    return (error if weight is None else error * weight[:, None]).mean((1, 2)).sum()


class RunningStats(nn.Module):
    """Running mean and variance of n quantities: of imagined returns per task (Chan's update; never decays)."""

    def __init__(self, n):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n))
        self.register_buffer("var", torch.ones(n))
        self.register_buffer("count", torch.full((n,), 1e-4))

    def update(self, J):  # (n, samples)
        b = J.shape[1]
        mean, var = J.mean(1), J.var(1, unbiased=False)
        total, delta = self.count + b, mean - self.mean
        m2 = self.var * self.count + var * b + delta.square() * self.count * b / total
        self.mean.copy_(self.mean + delta * b / total)
        self.var.copy_(m2 / total)
        self.count.copy_(total)


def clip_per_task(params, max_norm, n):
    """Clip the gradients of n stacked networks one network at a time; returns the norms (n,) before clipping."""
    grads = [p.grad.view(n, -1) for p in params]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dim=1) for g in grads]), dim=0)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)[:, None]
    for g in grads:
        g.mul_(scale)
    return norm


def update_world_model(model_fn, wm, opt, batch, rho, heads=None, prior_opt=None, discount=None, generator=None):
    """One Adam step on Eq. (10), gradient norm clipped at 20. With `heads` also TD-MPC2's Q (same step) and prior.

    batch: obs (H+1, B, O), act (H, B, A), rew (H, B), task (B,) and, episodic, term and live (H, B). Returns detached
    0-d metrics.
    """
    obs, act, rew, task, *ends = batch
    loss, metrics, z, next_z = model_fn(obs, act, rew, task, rho, *ends)
    if heads is not None:
        rand = functools.partial(torch.randn, generator=generator, device=z.device)
        pair = torch.randperm(len(heads.q.weight[0]), generator=generator, device=z.device)[:2]
        value = value_loss(heads, z[:-1], next_z, act, rew, task, discount, rho, rand(*act.shape), pair)
        loss, metrics["value"] = loss + 0.1 * value, value.detach()
    opt.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_([p for g in opt.param_groups for p in g["params"]], 20.0)
    opt.step()
    wm.project_embeddings()
    if heads is not None:
        prior = prior_loss(heads, z.detach(), task, rho, rand(len(z), *act.shape[1:]), pair)
        prior_opt.zero_grad(set_to_none=True)
        prior.backward(inputs=list(heads.pi.parameters()))  # Q is not trained by the policy
        nn.utils.clip_grad_norm_(heads.pi.parameters(), 20.0)
        prior_opt.step()
        metrics["prior"] = prior.detach()
        with torch.no_grad():
            for slow, fast in zip(heads.q_target.parameters(), heads.q.parameters()):
                slow.lerp_(fast, 0.01)
    return dict(metrics, loss=loss.detach(), grad_norm=norm)


def update_policies(fns, nets, opts, obs, noise, perm, task, hp, alive=None):
    """One iteration of Alg. 1 for all tasks: one actor step, then passes x minibatches critic steps (App. C.2).

    obs (N, B, O) start states, noise (H, N, B, A), perm (passes, H B) shuffles, task (N B,) world-model task rows;
    alive (H, N, B): see actor_loss.
    """
    wm, actors, critics, stats = (nets[k] for k in ("wm", "actors", "critics", "stats"))
    actor_fn, critic_fn = fns
    n = len(actors.log_std)
    loss, J, z, target, weight = actor_fn(wm, actors, critics, stats, obs, noise, task, hp.gamma, hp.lam,
                                          not hp.symexp, hp.td_actor, alive)
    opts["actors"].zero_grad(set_to_none=True)
    loss.backward()
    actor_norm = clip_per_task(list(actors.parameters()), 1.0, n)
    opts["actors"].step()
    actors.clamp_std()
    if wm.episodic:
        critics.follow(target)
    for rows in perm:
        for m in rows.chunk(hp.critic_batches):
            opts["critics"].zero_grad(set_to_none=True)  # also clears what the actor loss left in the critics
            critic = critic_fn(critics, z[:, m], target[:, m], None if weight is None else weight[:, m])
            critic.backward()
            critic_norm = clip_per_task(list(critics.parameters()), 100.0, n)
            opts["critics"].step()
    return dict(actor_loss=loss.detach() / n, critic_loss=critic.detach() / n, imagined_return=J.mean(),
                actor_grad_norm=actor_norm.mean(), critic_grad_norm=critic_norm.mean(),
                sigma=actors.log_std.detach().exp().mean())


# ------------------------------------------------------------------------------- TD-MPC2 baseline: prior, Q, planner
class TDMPC2(nn.Module):
    """TD-MPC2's policy prior pi([z; e]) and Q ensemble Q_i([z; e; a]) on a WorldModel (arXiv 2310.16828)."""

    def __init__(self, wm, hidden, num_q):
        super().__init__()
        self.wm = [wm]  # in a list: not a sub-module, its parameters are counted and saved once
        A = wm.act_mask.shape[1]
        i = wm.latent + wm.task_dim
        self.pi = nn.Sequential(NormedLinear(i, hidden), NormedLinear(hidden, hidden), nn.Linear(hidden, 2 * A))
        self.pi.apply(init_trunc_normal)
        self.q = StackedMLP(num_q, (i + A, hidden, hidden, BINS), init_normal, norm_first=True, dropout=0.01)
        nn.init.zeros_(self.q.weight[-1])  # Q = 0 at the start
        self.q_target = copy.deepcopy(self.q).requires_grad_(False).eval()
        self.register_buffer("scale", torch.ones(()))  # running P95 - P5 of Q

    def policy(self, z, task, eps):
        """z (.., B, L), eps (.., B, A) -> act (.., B, A), log-prob scaled by the task's action dimension (.., B)."""
        wm = self.wm[0]
        mask = wm.act_mask[task]
        with torch.no_grad():
            x = wm.with_task(z.detach(), task)  # no gradient into the task table from here
        mean, s = self.pi(x).float().chunk(2, -1)
        log_std = (-10 + 6 * (torch.tanh(s) + 1)) * mask  # in [-10, 2]
        eps = eps * mask
        act = torch.tanh(mean * mask + log_std.exp() * eps)
        gauss = (-0.5 * eps.square() - log_std).sum(-1) - 0.5 * math.log(2 * math.pi)
        return act, mask.sum(-1) * gauss - (F.relu(1 - act.square()) + 1e-6).log().sum(-1)

    def q_logits(self, net, z, act, task):
        """(.., B) -> (E, .., B, 101)"""
        x = torch.cat([self.wm[0].with_task(z, task), act], -1)
        out = net(x.flatten(0, -2).expand(len(net.weight[0]), -1, -1))
        return out.view(len(out), *x.shape[:-1], BINS)

    def q_value(self, net, z, act, task, pair, reduce):
        """`reduce` over the two Q functions numbered by pair (2,), decoded from their bins: (.., B)"""
        return reduce(two_hot_inv(self.q_logits(net, z, act, task).index_select(0, pair)), 0)


def init_normal(i, j):
    return nn.init.trunc_normal_(torch.empty(i, j), std=0.02), torch.zeros(j)


def value_loss(heads, z, next_z, act, rew, task, discount, rho, noise, pair):
    """TD-MPC2's Q loss on the model's roll-out: cross-entropy to r + gamma min_2 Q_target(z', pi(z')).

    z (H, B, L) with gradient, next_z (H, B, L) encoded, discount (B,), noise (H, B, A), pair (2,) ints.
    """
    with torch.no_grad():
        a, _ = heads.policy(next_z, task, noise)
        target = rew + discount * heads.q_value(heads.q_target, next_z, a, task, pair, torch.amin)  # (H, B)
    logits = heads.q_logits(heads.q, z, act, task)  # (E, H, B, 101)
    weight = rho ** torch.arange(len(rew), device=z.device)
    return (weight[:, None] * two_hot_loss(logits, target.expand(len(logits), -1, -1))).mean()


def prior_loss(heads, z, task, rho, noise, pair):
    """TD-MPC2's policy loss over all H+1 detached latents: entropy weight 1e-4, Q divided by its running scale."""
    act, logp = heads.policy(z, task, noise)  # (H+1, B, A), (H+1, B)
    q = heads.q_value(heads.q, z, act, task, pair, torch.mean)
    with torch.no_grad():
        p5, p95 = torch.quantile(q[0], torch.tensor([0.05, 0.95], device=z.device))
        heads.scale.lerp_((p95 - p5).clamp(min=1.0), 0.01)
    weight = rho ** torch.arange(len(z), device=z.device)
    return (weight[:, None] * (1e-4 * logp - q / heads.scale)).mean()


def task_discount(length):
    """TD-MPC2's discount heuristic: 0.99 for 500 agent steps, 0.95 for 100."""
    return min(max((length / 5 - 1) / (length / 5), 0.95), 0.995)


@torch.no_grad()
def plan(wm, heads, z, task, mean, discount, generator, horizon=3, samples=512, priors=24, elites=64,
         iterations=6, temperature=0.5, min_std=0.05, max_std=2.0):
    """MPPI in latent space: z (B, L), task (B,), mean (B, 3, A) of the last step, shifted -> act (B, A), mean.

    24 action sequences come from the policy prior, the rest from a Gaussian that is refitted to the 64 best, six times.
    """
    B, A = mean.shape[0], mean.shape[2]
    rand = functools.partial(torch.randn, generator=generator, device=z.device)
    mask = wm.act_mask[task][:, None, None]  # (B, 1, 1, A)
    def spread(n):
        return z[:, None].expand(-1, n, -1).flatten(0, 1), task.repeat_interleave(n)  # (B n, L), (B n,)

    zs, ts = spread(priors)
    prior = []
    for _ in range(horizon):
        prior.append(heads.policy(zs, ts, rand(len(zs), A))[0])
        zs = wm.next(zs, prior[-1], ts)
    prior = torch.stack(prior, 1).view(B, priors, horizon, A)
    std = torch.full_like(mean, max_std)
    pair = torch.randperm(len(heads.q.weight[0]), generator=generator, device=z.device)[:2]
    for _ in range(iterations + 2 * (A >= 20)):
        drawn = mean[:, None] + std[:, None] * rand(B, samples - priors, horizon, A)
        act = torch.cat([prior, drawn.clamp(-1, 1)], 1) * mask  # (B, S, 3, A)
        zs, ts = spread(samples)
        value, g = 0, 1.0
        for h in range(horizon):
            a = act[:, :, h].flatten(0, 1)
            value = value + g * two_hot_inv(wm.reward(zs, a, ts))
            zs, g = wm.next(zs, a, ts), g * discount.repeat_interleave(samples)
        a, _ = heads.policy(zs, ts, rand(len(zs), A))
        value = (value + g * heads.q_value(heads.q, zs, a, ts, pair, torch.mean)).view(B, samples)
        best, index = value.topk(elites, 1)
        elite = act.gather(1, index[..., None, None].expand(-1, -1, horizon, A))  # (B, E, 3, A)
        weight = (temperature * (best - best[:, :1])).exp()
        weight = weight / (weight.sum(1, keepdim=True) + 1e-9)
        w = weight[..., None, None]
        mean = (w * elite).sum(1) * mask[:, 0]
        std = ((w * (elite - mean[:, None]).square()).sum(1) + 1e-9).sqrt().clamp(min_std, max_std) * mask[:, 0]
    pick = torch.multinomial(weight, 1, generator=generator)[..., None, None].expand(-1, -1, horizon, A)
    return elite.gather(1, pick)[:, 0, 0], mean


# ------------------------------------------------------------------------------------------- published world models
def read_layers(weights, prefix):
    """The tensors of one MLP in network order, [{weight, bias, ln.weight, ln.bias}, ..], whatever the file's indices.

    Layouts: `0.weight, 0.ln.weight` (TD-MPC2 now, PWM) and a plain Sequential `1.weight` (Linear), `2.weight` (LN).
    """
    modules = {}
    for key, value in weights.items():
        if key.startswith(prefix + "."):
            path, _, field = key[len(prefix) + 1:].rpartition(".")
            modules.setdefault(path, {})[field] = value
    order = sorted(modules, key=lambda path: [(p == "ln", int(p) if p.isdigit() else 0) for p in path.split(".")])
    layers = []
    for path in order:
        if modules[path]["weight"].ndim == 2:
            layers.append(dict(modules[path]))
        else:  # a LayerNorm belongs to the Linear before it
            layers[-1].update({f"ln.{k}": v for k, v in modules[path].items()})
    return layers


def find_world_model(file, path):
    """The world model's state dict in what `safe_load` returned, its keys without `state.`."""
    for key in ("wm", "model", "world_model"):
        if isinstance(file, dict) and isinstance(file.get(key), dict):
            file = file[key]
            break
    weights = {k.replace("_encoder.state.", "_encoder.").removeprefix("_"): v for k, v in file.items()
               if torch.is_tensor(v)} if isinstance(file, dict) else {}
    found = {k.split(".")[0] for k in weights}
    parts = [found & names for names in ({"encoder"}, {"dynamics"}, {"reward", "reward_head"})]
    if not all(parts):
        raise SystemExit(f"{path} has no world model: found keys {sorted(weights)[:5]}, expected _encoder.*, "
                         "_dynamics.* and _reward.* of TD-MPC2 or PWM, or a checkpoint.pt of pwm.py")
    return weights, parts[2].pop()


def load_world_model(path, device="cpu"):
    """A WorldModel from TD-MPC2's and PWM's published files (three key layouts) or from our own checkpoint.pt.

    Sizes are inferred from shapes. SystemExit: not a world model, or shapes that do not fit together.
    """
    file = safe_load(path)
    weights, reward = find_world_model(file, path)
    enc, dyn, rew = (read_layers(weights, p) for p in ("encoder", "dynamics", reward))
    emb = weights.get("task_emb.weight")
    n, e = emb.shape if emb is not None else (1, 0)
    latent = dyn[-1]["weight"].shape[0]
    act_dim = dyn[0]["weight"].shape[1] - latent - e
    suite = {30: MT30, 80: MT80}.get(n)
    dims = file.get("act_dims") or ([task_facts(t).act_dim for t in suite] if suite else [act_dim] * n)
    end = read_layers(weights, "end_head")
    if rew[-1]["weight"].shape[0] != (1 if end else BINS) or max(dims) != act_dim:
        raise SystemExit(f"{path} has {rew[-1]['weight'].shape[0]} reward classes and {act_dim} actions for {n} tasks; "
                         f"expected {BINS} and {max(dims)}: not a world model of this family")
    wm = WorldModel(enc[0]["weight"].shape[1] - e, dims, len(enc), enc[0]["weight"].shape[0],
                    dyn[0]["weight"].shape[0], latent, e, bool(end), file.get("args", {}).get("activation", "simnorm"))
    scales = {k: v for k, v in wm.state_dict().items() if k in ("obs_mean", "obs_std")}  # not in older files: 0 and 1
    state = scales | {k: weights[k] for k in ("task_emb.weight", "rew_std", *scales) if k in weights}
    for name, layers in (("encoder", enc), ("dynamics", dyn), ("reward_head", rew), ("end_head", end)):
        state |= {f"{name}.{i}.{field}": x for i, layer in enumerate(layers) for field, x in layer.items()}
    try:
        wm.load_state_dict(state)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:300]
        raise SystemExit(f"{path} does not fit together as a world model: {why}") from None
    wm.project_embeddings()
    wm.tasks = tuple(file.get("tasks") or suite or ())
    return wm.to(device)


def load_tdmpc2(wm, path):
    """The TDMPC2 prior and Q ensemble stored beside a world model: TD-MPC2's two Q layouts, or our own checkpoint.

    SystemExit: the file has none (PWM's agents do not), so there is nothing for the planner to use.
    """
    file = safe_load(path)
    if "tdmpc2" in file:
        heads = TDMPC2(wm, *(file["tdmpc2"]["q.weight.1"].shape[k] for k in (1, 0)))
        heads.load_state_dict(file["tdmpc2"])
        return heads
    file = file.get("model", file)
    pi = read_layers(file, "_pi")
    layers = {}  # (layer, field) -> (E, ..); old files number the ten tensors, new ones name them
    for key, x in file.items():
        if torch.is_tensor(x) and key.startswith("_Qs.params."):
            name = key.removeprefix("_Qs.params.")
            fields = ("weight", "bias", "ln.weight", "ln.bias")
            layer, field = (int(name) // 4, fields[int(name) % 4]) if name.isdigit() else name.split(".", 1)
            layers[int(layer), field] = x
    if not pi or (2, "weight") not in layers:
        raise SystemExit(f"{path} has no policy prior and Q functions (_pi.*, _Qs.params.*) for TD-MPC2's planner: "
                         "leave --planner-episodes out, or train them with the world model (no --checkpoint)")
    heads = TDMPC2(wm, layers[0, "bias"].shape[1], layers[0, "bias"].shape[0])
    heads.pi.load_state_dict({f"{i}.{field}": x for i, layer in enumerate(pi) for field, x in layer.items()})
    state = {}
    for k in range(3):
        state |= {f"weight.{k}": layers[k, "weight"].transpose(1, 2), f"bias.{k}": layers[k, "bias"][:, None]}
        if k < 2:
            state |= {f"gain.{k}": layers[k, "ln.weight"][:, None], f"shift.{k}": layers[k, "ln.bias"][:, None]}
    heads.q.load_state_dict(state)
    heads.q_target.load_state_dict(state)  # some published files lack their targets
    return heads


# ------------------------------------------------------------------------------------------------- acting, measuring
@torch.no_grad()
def act(wm, actors, rows, obs, task, eps=None):
    """Closed-loop actions for a mixed batch: obs (n, O), task (n,) numbers of actors, rows (N,) their model's tasks.

    The batch is laid out as (N, M, ..) with M the most frequent task's count, so that every actor runs once.
    """
    z = wm.encode(obs, rows[task])  # (n, L)
    N, order = len(rows), task.argsort(stable=True)
    count = task.bincount(minlength=N)
    column = torch.empty_like(task)
    column[order] = torch.arange(len(task), device=task.device) - (count.cumsum(0) - count)[task[order]]
    M = int(count.max())
    grid = z.new_zeros(N, M, z.shape[1])
    grid[task, column] = z
    noise = None
    if eps is not None:
        noise = eps.new_zeros(N, M, eps.shape[1])
        noise[task, column] = eps
    return actors(grid, noise)[task, column]  # (n, A)


def random_actions(T, act_dim, hold, rng):
    """Uniform actions (T, A), each held for `hold` agent steps: slow bodies do not move under white noise."""
    return rng.uniform(-1, 1, (-(-T // hold), act_dim)).repeat(hold, 0)[:T].astype(np.float32)


@torch.no_grad()
def open_loop_error(wm, batch, rows, horizons=(1, 4, 16)):
    """Normalised squared error of open-loop prediction on held-out slices: {latent_nmse_h, reward_nmse_h}.

    1.0 is what predicting each task's mean would give; sums over tasks are taken before the ratio. Steps beyond the end
    of an episode do not count; a horizon that no episode reaches is left out.
    """
    obs, actions, rew, _, live, task = batch
    row = rows[task]
    z, true = wm.encode(obs[0], row), wm.encode(obs, row)
    within = F.one_hot(task, len(rows)).float()  # (B, N): variance is counted within a task

    def centred(x, keep):  # (B, D) minus the mean of its task
        w = within[keep]
        return x - w @ ((w.T @ x) / w.sum(0).clamp(min=1)[:, None])

    out = {}
    for h, a in enumerate(actions, 1):
        r = reward_value(wm.reward(z, a, row)) * (wm.rew_std if wm.episodic else 1.0)
        z = wm.next(z, a, row)
        keep = live[h - 1] > 0
        if h in horizons and len(task[keep]):
            goal, real = true[h][keep], rew[h - 1][keep]
            out[f"latent_nmse_{h}"] = (z[keep] - goal).square().sum() / centred(goal, keep).square().sum()
            spread = centred(real[:, None], keep).square().sum().clamp(min=1e-4 * len(real))  # sparse: maybe all 0
            out[f"reward_nmse_{h}"] = (r[keep] - real).square().sum() / spread
    return out


# ----------------------------------------------------------------------------------------------------------- set-up
# millions of parameters: encoder layers, encoder hidden, other hidden, latent, Q functions, task embedding   (Table 1)
SIZES = {1: (2, 256, 384, 128, 2, 96), 5: (2, 256, 512, 512, 5, 64), 19: (3, 1024, 1024, 512, 5, 64),
         48: (4, 1792, 1792, 768, 5, 64), 317: (5, 4096, 4096, 1376, 8, 96)}

DEFAULTS = dict(activation="simnorm", eval_episodes=10, horizon=16, policy_lr=5e-4, first_model=0.25, last_model=0.2,
                first_policy=0.04, last_policy=0.3)
BUDGETS = {  # what the flags that were left out become, by device and number of tasks, where it is not DEFAULTS
    ("cpu", "one"): dict(model_size=1, rounds=12, seed_episodes=16, round_episodes=4, wm_steps=10_000, wm_batch=64,
                         wm_horizon=4, wm_lr=1e-3, policy_steps=3_000, policy_batch=64, critic_passes=1),
    ("cpu", "many"): dict(model_size=1, rounds=6, seed_episodes=18, round_episodes=8, wm_steps=24_000, wm_batch=256,
                          wm_horizon=4, wm_lr=1e-3, policy_steps=2_400, policy_batch=16, critic_passes=1),
    ("cpu", "episodic"): dict(model_size=1, rounds=60, seed_episodes=12, round_episodes=6, wm_steps=8_000,
                              wm_batch=128, wm_horizon=6, wm_lr=1e-3, policy_steps=2_160, policy_batch=64,
                              critic_passes=8, horizon=6, policy_lr=3e-4, critic_lr=1e-3, first_model=0.3,
                              last_model=0.05, first_policy=0.01, last_policy=0.05),
    ("cpu", "plant"): dict(rounds=10, seed_episodes=4, round_episodes=4, policy_steps=200, policy_batch=64,
                           critic_passes=8, policy_lr=2e-3),
    ("cuda", "one"): dict(model_size=5, rounds=20, seed_episodes=20, round_episodes=10, wm_steps=40_000, wm_batch=256,
                          wm_horizon=16, wm_lr=3e-4, policy_steps=20_000, policy_batch=64, critic_passes=8),
    ("cuda", "episodic"): dict(model_size=5, rounds=60, seed_episodes=20, round_episodes=64, wm_steps=60_000,
                               wm_batch=256, wm_horizon=16, wm_lr=3e-4, policy_steps=15_000, policy_batch=64,
                               critic_passes=8),
    ("cuda", "plant"): dict(rounds=40, seed_episodes=4, round_episodes=4, policy_steps=2_000, policy_batch=64,
                            critic_passes=8, policy_lr=2e-3),
    ("cuda", "many"): dict(model_size=48, rounds=6, seed_episodes=40, round_episodes=20, wm_steps=100_000,
                           wm_batch=1024, wm_horizon=16, wm_lr=3e-4, policy_steps=10_000, policy_batch=64,
                           critic_passes=8),
    "fast": dict(model_size=1, rounds=2, seed_episodes=4, round_episodes=1, wm_steps=200, wm_batch=64, wm_horizon=4,
                 wm_lr=1e-3, policy_steps=20, policy_batch=8, critic_passes=1, eval_episodes=1)}


def model_dims(size, n_tasks, mt80=False):
    """Keyword arguments of WorldModel for a model size; 19M and the task embedding differ between MT30 and MT80."""
    layers, enc, hidden, latent, _, emb = SIZES[size]
    if mt80:
        latent, emb = 768 if size == 19 else latent, 96
    return dict(enc_layers=layers, enc_hidden=enc, hidden=hidden, latent=latent, task_dim=emb if n_tasks > 1 else 0)


def task_list(text):
    tasks = {"mt30": MT30, "mt80": MT80}.get(text) or tuple(t.strip() for t in text.split(",") if t.strip())
    if len(set(tasks)) < max(len(tasks), 1):
        raise SystemExit(f"--task {text!r} names no task, or one twice: expected mt30, mt80 or walker-walk,cup-catch")
    return tasks


def choose_device(args, rank):
    """Returns (device, why)."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda, but PyTorch sees no GPU: install its CUDA build or type --device cpu")
    if args.device == "cpu" or not torch.cuda.is_available():
        reason = "as asked" if args.device == "cpu" else "no GPU"
        return torch.device("cpu"), f"{torch.get_num_threads()} threads ({reason})"
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")  # TF32
    return device, torch.cuda.get_device_name(device) + ", TF32"


def read_resume(args):
    """The flags of the run in --resume, as Args; a task typed beside it must be that run's."""
    file = Path(args.resume) / "args.json"
    if not file.exists():
        raise SystemExit(f"--resume {args.resume}: no args.json there; expected the folder of a run, runs/<name>")
    saved = json.loads(file.read_text())["args"]
    if args.task not in (saved["task"], Args.task):
        raise SystemExit(f"--resume {args.resume} is a run of {saved['task']}, not {args.task}: leave --task out")
    return Args(**{**saved, "resume": args.resume})


def fill_budget(args, device, n_tasks, world):
    """Args with the defaults of this device for the flags that were left out. SystemExit: flags that contradict."""
    heads = args.planner_episodes or args.prior
    if world > 1 and heads:
        raise SystemExit("the TD-MPC2 baseline trains on one process: leave --planner-episodes and --prior out under "
                         "torchrun")
    if args.eval_every < 0:
        raise SystemExit(f"--eval-every {args.eval_every}: expected policy updates, e.g. 100, or 0 for none")
    if args.eval_only and not args.checkpoint:
        raise SystemExit("--eval-only needs --checkpoint runs/<name>/checkpoint.pt")
    if args.workers < 1:
        raise SystemExit(f"--workers {args.workers}: expected at least 1, e.g. --workers {os.cpu_count()}")
    if args.episodic and (n_tasks > 1 or heads):
        raise SystemExit("--episodic is for one task and without --planner-episodes and --prior, whose rewards come in "
                         "101 classes: name one task, or type --no-episodic")
    if args.shared_policy and (n_tasks == 1 or args.eval_only):
        raise SystemExit("--shared-policy trains one policy for several tasks: type --task with two or more, and leave "
                         "--eval-only out")
    if args.activation and (args.checkpoint or args.true_plant) and not args.resume:
        raise SystemExit(f"--activation {args.activation} is of a world model that is trained here: leave it out with "
                         "--checkpoint, whose file says it, and with --true-plant")
    if args.true_plant:
        if n_tasks > 1 or not hasattr(plant(args.task), "ended") or args.checkpoint or args.data_dir or world > 1:
            raise SystemExit(f"--true-plant computes gradients through a plant, and {args.task} has none: type --task "
                             "planar-hopper or stiff-hopper, alone and without --checkpoint and --data-dir")
        args = replace(args, model_size=1, wm_steps=0, wm_batch=1, wm_horizon=1, wm_lr=0.0)
    kind = "many" if n_tasks > 1 else "plant" if args.true_plant else "episodic" if args.episodic else "one"
    budget = dict(BUDGETS["fast"] if args.fast else BUDGETS[device.type, kind])
    if args.checkpoint:
        del budget["model_size"]  # the file says
    budget = DEFAULTS | (dict(activation="residual") if args.episodic else {}) | budget
    args = replace(args, **{k: v for k, v in budget.items() if getattr(args, k) is None})
    return args if args.critic_lr is not None else replace(args, critic_lr=args.policy_lr)


def open_data(args, tasks, run_dir, rank, wait):
    """(Episodes, whether this run fills them): published chunks (converted once), a folder of episodes, or our own."""
    if args.data_dir is None:
        own = Path(run_dir) / "episodes"
        if rank == 0:
            facts = {t: task_facts(t) for t in tasks}
            Episodes.create(own, {t: (f.obs_dim, f.act_dim, min(f.episode_length, PIECE) if args.episodic
                                      else f.episode_length) for t, f in facts.items()})
        wait()
        return Episodes.open(own, tasks), True
    folder = Path(args.data_dir)
    if chunks := list(folder.glob("chunk_*.pt")):
        suite = MT80 if any(t.startswith("mw-") for t in tasks) or len(chunks) > 4 else MT30
        if rank == 0:
            convert_tdmpc2(folder, folder / "episodes", suite, {t: task_facts(t)[:2] for t in suite})
        wait()
        folder = folder / "episodes"
    return Episodes.open(folder, tasks), False


def shares(total, rounds, first, last):
    """Split `total` updates over rounds: fractions for the first and the last, the rest equally between."""
    if rounds == 1:
        return [total]
    cuts = [first + k * (1 - first - last) / max(rounds - 2, 1) for k in range(rounds - 1)]
    ends = [round(c * total) for c in cuts] + [total]
    return [b - a for a, b in zip([0, *ends], ends)]


def make_plan(args, own, given_model):
    """[(kind, round, amount)]: collect episodes per task, then updates of the model, then of the policies; every
    --eval-every of them, evaluate (amount: episodes per task)."""
    rounds = args.rounds if own else 1
    model = [0] * rounds if given_model else shares(args.wm_steps, rounds, args.first_model, args.last_model)
    policy = shares(args.policy_steps, rounds, args.first_policy, args.last_policy)
    plan = []
    for r in range(rounds):
        plan += [("collect", r, args.round_episodes if r else args.seed_episodes)] * own
        plan.append(("model", r, model[r]))
        every = args.eval_every or max(policy[r], 1)
        for first in range(0, policy[r], every):
            plan.append(("policy", r, min(every, policy[r] - first)))
            plan += [("evaluate", r, args.eval_episodes)] * bool(args.eval_every)
    return plan


def collect(workers, tasks, n, r, args, policy, note):
    """Roll out n episodes per task, or if they end early as many as have the steps of n (64 n at most)."""
    played, steps = [], 0
    while not played or (args.episodic and steps < n * task_facts(tasks[0]).episode_length and len(played) < 64 * n):
        left = n * task_facts(tasks[0]).episode_length - steps
        more = min(64, 2 * math.ceil(left * len(played) / steps / 2)) if played else n + n % 2 * args.episodic
        played += play_round(workers, tasks, more, r, args, policy, note, len(played))
        steps = sum(len(e["rew"]) for e in played)
    return played


def play_round(workers, tasks, n, r, args, policy, note, first=0):
    """Episodes first .. first + n - 1 of every task: random actions with several hold lengths in round 0, then the
    current stochastic policies, those of odd number disturbed.

    All noise is drawn per episode beforehand, so neither the number of workers nor their timing changes anything.
    """
    jobs = [(t, 10**6 * args.seed + 10**4 * r + first + i) for t in tasks for i in range(n)]
    facts = [task_facts(t) for t, _ in jobs]
    A = max(f.act_dim for f in facts)
    rng = [np.random.default_rng([args.seed, r, first + j]) for j in range(len(jobs))]
    if r == 0:
        holds = (1, 2, 4, 8, 16, 32)
        actions = [random_actions(f.episode_length, A, holds[j % n % len(holds)], g)
                   for j, (f, g) in enumerate(zip(facts, rng))]
        return workers.rollout(jobs, lambda obs, job, t: np.stack([actions[j][k] for j, k in zip(job, t)]), note)
    owner = np.repeat(np.arange(len(tasks)), n)
    noise = [g.standard_normal((f.episode_length, A), np.float32) for f, g in zip(facts, rng)]
    # Every other episode is disturbed: the policies soon repeat one path, and a model that saw only that path does not
    # know how to come back to it. About every 50 steps a random action takes over for 10.
    held = [random_actions(f.episode_length, A, 10, g) for f, g in zip(facts, rng)]
    taken = [np.convolve(g.random(f.episode_length) < 0.02 * (j % 2), np.ones(10))[:f.episode_length] > 0
             for j, (f, g) in enumerate(zip(facts, rng))]

    def disturbed(obs, job, t):
        act = policy(obs, owner[job], np.stack([noise[j][k] for j, k in zip(job, t)]))
        for i, (j, k) in enumerate(zip(job, t)):
            if taken[j][k]:
                act[i] = held[j][k]
        return act

    return workers.rollout(jobs, disturbed, note)


class Progress:
    """Rates and time left over the whole plan; `totals` counts agent steps, model and policy updates, and the agent
    steps of the planner, which are slow."""

    def __init__(self, totals, every=15.0):
        self.totals, self.every, self.printed = dict(totals), every, time.time()
        self.done, self.seconds, self.measured = ({k: 0 for k in totals} for _ in range(3))

    def add(self, kind, n, seconds):
        if not self.done[kind]:
            self.seconds[kind] = self.measured[kind] = 0  # what `guess` said has served
        self.done[kind] += n
        self.measured[kind] += n
        self.seconds[kind] += seconds

    def guess(self, kind, rate):
        self.measured[kind], self.seconds[kind] = rate, 1.0

    def rate(self, kind):
        return self.measured[kind] / max(self.seconds[kind], 1e-9)

    def line(self, text, force=False):
        if force or time.time() - self.printed > self.every:
            self.printed = time.time()
            left = sum((total - self.done[k]) / max(self.rate(k), 1e-9) for k, total in self.totals.items())
            print(f"{text} | {timedelta(seconds=round(max(left, 0)))} left", flush=True)


PIECE = 100  # --episodic: steps of a stored piece of an episode; files have room for full ones, and falls are short


def pieces(episode):
    """An episode's obs, act, rew and term as the pieces in which it is stored."""
    o, a, r, e = (episode[k] for k in ("obs", "act", "rew", "term"))
    return [(o[t:t + PIECE + 1], a[t:t + PIECE], r[t:t + PIECE], e[t:t + PIECE]) for t in range(0, len(r), PIECE)]


class Windows:
    """Bodies beside the imagination, as in the released code (deviation 8): B of them go on for H steps with the
    actions of the next imagined windows, which start where they are, and tell which windows ended. A body that has
    ended, or done all its steps, begins anew; a window in which the latter happens goes on in imagination. An end has
    no slope: policies learn to avoid it from the values of windows that went on, so that H has to be well below the
    length of episodes.
    What they did is data for the world model: `pieces` holds what `store` has not written yet."""

    def __init__(self, trainer):
        a, f = trainer.args, trainer.facts[0]
        self.trainer, self.steps, t = trainer, 0, trainer.tasks[0]
        self.herd = (Herd(t, a.policy_batch, a.seed, a.workers) if t in LOCOMOTION
                     else Flock(t, a.policy_batch, a.seed))
        self.obs = self.herd.reset()  # (B, O)
        rows = {"obs": (PIECE + 1, f.obs_dim), "act": (PIECE, f.act_dim), "rew": (PIECE,)}
        self.book = {k: np.zeros((a.policy_batch, *row), np.float32) for k, row in rows.items()}  # of unfinished pieces
        self.book["t"], self.pieces = np.zeros(a.policy_batch, int), []
        self.book["obs"][:, 0] = self.obs

    @torch.no_grad()
    def roll(self, noise):
        """noise (H, 1, B, A) of the imagined steps -> start observations (1, B, O), alive (H, 1, B): 0 from the step on
        that ended. With a true plant, which foresees ends: where the bodies are H steps later, and None; what they saw
        on the way updates the scale of observations."""
        wm, task, device = self.trainer.wm, self.trainer.rows[0], self.trainer.device
        start, true, seen = torch.as_tensor(self.obs, device=device), isinstance(wm, TruePlant), []
        alive, z = torch.ones(len(noise), 1, len(start)), wm.encode(start, task)
        for h, eps in enumerate(noise):
            act = self.trainer.nets["actors"](z[None], eps)[0]
            act_now = act.cpu().numpy()
            self.obs, rew, terminated, truncated, last = self.herd.step(act_now)
            if not true:  # which needs no data
                self.note(act_now, rew, terminated, truncated, last)
            seen.append(torch.as_tensor(self.obs, device=device))
            alive[h:, 0, terminated] = 0
            z = wm.encode(seen[-1], task) if true else wm.next(z, act, task)
        self.steps += alive.numel()
        if true:
            wm.scale.update(torch.cat(seen).T)
            return seen[-1][None], None
        return start[None], alive.to(device)

    def note(self, act, rew, terminated, truncated, last):
        """Write what `Herd.step` returned into the book of every body, and tear out the pieces that are complete."""
        book, i = self.book, np.arange(len(act))
        t = book["t"]
        book["act"][i, t], book["rew"][i, t], book["obs"][i, t + 1] = act, rew, last
        t += 1
        for b in np.flatnonzero(terminated | truncated | (t == PIECE)):
            term = np.zeros(t[b], bool)
            term[-1] = terminated[b]
            self.pieces.append((book["obs"][b, :t[b] + 1].copy(), book["act"][b, :t[b]].copy(),
                                book["rew"][b, :t[b]].copy(), term))
            book["obs"][b, 0], t[b] = self.obs[b], 0

    def store(self, episodes):
        """Append the complete pieces; called before every checkpoint, which holds the rest."""
        episodes.append(self.trainer.tasks[0], *zip(*self.pieces))
        self.pieces = []

    def state(self):
        state = {"steps": np.array(self.steps), **self.herd.state()} | {f"book.{k}": v for k, v in self.book.items()}
        return {k: torch.from_numpy(v.copy()) for k, v in state.items()}

    def load(self, state):
        state = {k: v.cpu().numpy() for k, v in state.items()}
        self.book = {k: state.pop(f"book.{k}").copy() for k in self.book}
        self.steps = int(state.pop("steps"))
        self.obs = self.herd.load(state)


class Trainer:
    """Networks, optimisers and random generators of a run, its two updates, and its state for checkpoints."""

    def __init__(self, args, tasks, device, world=1):
        self.args, self.tasks, self.device = args, tasks, device
        self.facts = [task_facts(t) for t in tasks]
        torch.manual_seed(args.seed)
        if args.true_plant:
            wm = TruePlant(plant(tasks[0]), tasks[0])
        else:
            wm = load_world_model(args.checkpoint) if args.checkpoint else WorldModel(
                max(f.obs_dim for f in self.facts), [f.act_dim for f in self.facts], episodic=args.episodic,
                activation=args.activation, **model_dims(args.model_size, len(tasks), tasks == MT80))
        wm.tasks = wm.tasks or tasks
        self.args = args = replace(args, episodic=wm.episodic, activation=wm.activation)  # a file says what it is
        if args.checkpoint and args.model_size:
            asked = model_dims(args.model_size, len(wm.act_dims), len(wm.act_dims) == len(MT80))["latent"]
            if asked != wm.latent:
                raise SystemExit(f"{args.checkpoint} has {wm.latent} latents and --model-size {args.model_size} means "
                                 f"{asked}: leave --model-size out, the file says the sizes")
        self.rows = task_rows(wm, tasks, self.facts, args.checkpoint)  # (N,) rows of the world model's task table
        policies = ((SharedActor(wm, self.rows), SharedCritics(wm, self.rows)) if args.shared_policy
                    else (Actors(wm.act_mask[self.rows], wm.latent), Critics(len(tasks), wm.latent)))
        self.nets = nn.ModuleDict(dict(wm=wm, actors=policies[0], critics=policies[1], stats=RunningStats(len(tasks))))
        if args.planner_episodes or args.prior:
            self.nets["tdmpc2"] = (load_tdmpc2(wm, args.checkpoint) if args.checkpoint
                                   else TDMPC2(wm, SIZES[args.model_size][2], SIZES[args.model_size][4]))
        if args.episodic and not args.true_plant:
            with torch.no_grad():  # begin by doing next to nothing: random torques throw a body that could stand
                policies[0].mu.weight[-1].mul_(0.01)
        if args.episodic:  # such policies come and go: what acted in the round with the best roll-outs is kept
            self.nets["best"] = copy.deepcopy(nn.ModuleDict(dict(wm=wm, actors=policies[0])))
        self.nets.to(device)
        self.wm, self.rows = wm, self.rows.to(device)
        self.heads = self.nets["tdmpc2"] if "tdmpc2" in self.nets else None
        self.discount = torch.tensor([task_discount(f.episode_length) for f in self.facts], device=device)
        self.opts = make_optimizers(self.nets, args.wm_lr, args.policy_lr, args.beta1)
        self.rng = {k: torch.Generator(device).manual_seed(args.seed + i) for i, k in enumerate(("model", "policy"))}
        amp = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=args.bf16)
        parallel = nn.parallel.DistributedDataParallel(wm) if world > 1 else wm
        self.model_fn, *self.policy_fns = (prepare(f, amp, args.compile) for f in (parallel, actor_loss, critic_loss))
        self.where = dict(stage=0, step=0, policy_updates=0, seconds=0.0, best=-math.inf)  # next work, best roll-outs
        self.history = []
        self.windows = Windows(self) if args.episodic and not (args.data_dir or args.eval_only) else None

    def update_model(self, sampler, progress, rank=0, world=1, calm=1.0):
        """One world-model step; its learning rate follows `progress` in [0, 1), the position in the round, and `calm`,
        which falls from round to round (deviation 14)."""
        args = self.args
        fall = calm * min(1.0, args.wm_final_lr + 2 * (1 - args.wm_final_lr) * (1 - progress))
        for group, share in zip(self.opts["model"].param_groups, (0.3, 1.0)):
            group["lr"] = share * args.wm_lr * fall
        obs, act, rew, term, live, task = sampler.sequences(args.wm_batch, self.rng["model"])
        ends = (term, live) if self.wm.episodic else ()
        part = slice(rank, None, world)  # every rank draws the global batch and keeps its share
        batch = obs[:, part], act[:, part], rew[:, part], self.rows[task[part]], *(e[:, part] for e in ends)
        return update_world_model(self.model_fn, self.wm, self.opts["model"], batch, args.rho, self.heads,
                                  self.opts.get("prior"), self.discount[task[part]], self.rng["model"])

    def update_policies(self, sampler, progress):
        """One update of all policies; `progress` in [0, 1) over the whole run sets the learning rates (Table 1)."""
        args, rng = self.args, self.rng["policy"]
        for name in ("actors", "critics"):
            lr = args.critic_lr if name == "critics" else args.policy_lr
            self.opts[name].param_groups[0]["lr"] = lr + (1e-5 - lr) * progress
        N, B = len(self.tasks), args.policy_batch
        noise = torch.randn(args.horizon, N, B, self.wm.act_mask.shape[1], generator=rng, device=self.device)
        obs, alive = self.windows.roll(noise) if self.windows else (sampler.starts(B, rng), None)
        perm = torch.rand(args.critic_passes, args.horizon * B, generator=rng, device=self.device).argsort(1)
        task = self.rows.repeat_interleave(B)
        return update_policies(self.policy_fns, self.nets, self.opts, obs, noise, perm, task, args, alive)

    def policy(self, obs, task, eps=None, best=False):
        """What roll-outs call: numpy obs (n, o), task (n,), noise (n, A) or None for the mean -> actions (n, A)."""
        nets = self.nets["best"] if best else self.nets
        task = torch.as_tensor(task, device=self.device)
        eps = None if eps is None else pad(eps, self.wm.act_mask.shape[1], self.device)
        a = act(nets["wm"], nets["actors"], self.rows, pad(obs, self.wm.obs_dim, self.device), task, eps)
        return a[:, :max(f.act_dim for f in self.facts)].cpu().numpy()

    def state(self):
        """Tensors and plain values; `wm`, `tasks` and `act_dims` make the file a loadable world model."""
        return dict({name: net.state_dict() for name, net in self.nets.items()}, tasks=list(self.wm.tasks),
                    act_dims=list(self.wm.act_dims), policy_tasks=list(self.tasks), where=self.where,
                    opts={k: o.state_dict() for k, o in self.opts.items()}, history=self.history,
                    rng={k: g.get_state() for k, g in self.rng.items()}, args=asdict(self.args),
                    windows=self.windows and self.windows.state())

    def load_state(self, state):
        missing = [name for name in (*self.nets, "windows") if name not in state]
        missing += [f"{name}.{k}" for name, net in self.nets.items() if not missing for k in net.state_dict()
                    if k not in state[name]]
        if missing:
            raise SystemExit(f"the checkpoint has no {missing[0]!r}, so an older version of this script wrote it: go "
                             "on with the copy of the code in the run's folder")
        for name, net in self.nets.items():
            net.load_state_dict(state[name])
        for name, opt in self.opts.items():
            opt.load_state_dict(state["opts"][name])
        for name, g in self.rng.items():
            g.set_state(state["rng"][name].cpu())
        self.where, self.history = state["where"], state["history"]
        if self.windows:
            self.windows.load(state["windows"])

    def load_policies(self, path):
        """The actors of `tasks` from a run's checkpoint, whatever its order of tasks."""
        file = torch.load(path, map_location=self.device, weights_only=True)
        known = file.get("policy_tasks", [])
        missing = [t for t in self.tasks if t not in known]
        if missing:
            raise SystemExit(f"{path} has no policy for {missing[0]}: --eval-only needs runs/<name>/checkpoint.pt of a "
                             f"run with that task; this file has policies for {', '.join(known) or 'no task'}")
        pick = torch.tensor([known.index(t) for t in self.tasks])
        self.nets["actors"].load_state_dict({k: v[pick] for k, v in file["actors"].items()})
        if "best" in self.nets and "best" in file:
            self.nets["best"].load_state_dict(self.nets["best"].state_dict() | file["best"])
            self.where["best"] = file["where"]["best"]

    def trial(self):
        """Seconds of one model and one policy update, measured on copies with made-up data, for the first estimate."""
        twin = copy.copy(self)
        nets = copy.deepcopy(nn.ModuleDict({k: v for k, v in self.nets.items() if k != "tdmpc2"}))
        twin.nets, twin.wm, twin.opts, twin.heads = nets, nets["wm"], make_optimizers(nets), None
        twin.rng = {k: torch.Generator(self.device) for k in self.rng}
        twin.model_fn, twin.policy_fns, twin.windows = twin.wm, (actor_loss, critic_loss), None
        a, (N, A) = self.args, self.nets["actors"].act_mask.shape[::2]
        fake = lambda *shape: torch.rand(*shape, device=self.device)  # noqa: E731
        sequences = (fake(a.wm_horizon + 1, a.wm_batch, self.wm.obs_dim), fake(a.wm_horizon, a.wm_batch, A),
                     *(fake(a.wm_horizon, a.wm_batch) for _ in range(3)),
                     torch.zeros(a.wm_batch, dtype=torch.long, device=self.device))
        starts = fake(N, a.policy_batch, self.wm.obs_dim)
        sampler = SimpleNamespace(sequences=lambda *_: sequences, starts=lambda *_: starts)
        seconds = []
        for freeze, update in ((False, twin.update_model), (True, twin.update_policies)):
            if a.true_plant and not freeze:
                seconds.append(1.0)  # never done
                continue
            twin.wm.requires_grad_(not freeze)
            for _ in range(2):  # the first call warms up
                start = time.perf_counter()
                float(next(iter(update(sampler, 0.0).values())))
            seconds.append(time.perf_counter() - start)
        return seconds


def task_rows(wm, tasks, facts, path):
    """Rows of the world model's task table for our tasks, (N,) ints. SystemExit: a world model of other tasks."""
    known = wm.tasks if len(wm.tasks) == len(wm.act_dims) else tasks if len(tasks) == len(wm.act_dims) else ()
    fits = all(t in known and wm.act_dims[known.index(t)] == f.act_dim and f.obs_dim <= wm.obs_dim
               for t, f in zip(tasks, facts))
    if not fits:
        size = sum(p.numel() for p in wm.parameters()) / 1e6
        names = ", ".join(tasks[:3]) + " .." * (len(tasks) > 3)
        raise SystemExit(f"{path} is a world model ({size:.1f}M parameters, {len(wm.act_dims)} tasks, obs "
                         f"{wm.obs_dim}) not trained on {names}: expected --task mt30, mt80 or one of its tasks")
    return torch.tensor([known.index(t) for t in tasks])


def make_optimizers(nets, wm_lr=3e-4, policy_lr=5e-4, beta1=0.7):
    """{name: Adam}: world model (encoder at 0.3 lr), actors, critics and, with the baseline, its prior."""
    wm, adam = nets["wm"], functools.partial(torch.optim.Adam, fused=True)
    rest = [p for name, p in wm.named_parameters() if not name.startswith("encoder")]
    q = list(nets["tdmpc2"].q.parameters()) if "tdmpc2" in nets else []
    opts = dict(actors=adam(nets["actors"].parameters(), lr=policy_lr, betas=(beta1, 0.95)),
                critics=adam(nets["critics"].parameters(), lr=policy_lr, betas=(beta1, 0.95)))
    if rest:  # a true plant has no parameters
        model = [dict(params=list(wm.encoder.parameters()), lr=0.3 * wm_lr), dict(params=rest + q, lr=wm_lr)]
        opts["model"] = adam(model, lr=wm_lr)
    if "tdmpc2" in nets:
        opts["prior"] = adam(nets["tdmpc2"].pi.parameters(), lr=wm_lr, eps=1e-5)
    return opts


def prepare(fn, amp, compiled):
    """fn under autocast and, if asked for, compiled for fixed shapes."""
    def run(*inputs):
        with amp():
            return fn(*inputs)
    return torch.compile(run, dynamic=False) if compiled else run


def announce(trainer, own, plan, device_text, folder):
    """Print what was chosen and why."""
    a, n = trainer.args, len(trainer.tasks)
    print(f"PWM on {n} task{'s' * (n > 1)} ({a.task}), seed {a.seed}, {device_text}, "
          f"{'bfloat16 products' if a.bf16 else 'float32'}, {'compiled' if a.compile else 'eager'}, "
          f"{a.workers} roll-out workers")
    print(("SHAC: gradients through the true plant" if a.true_plant else
           f"world model of {sum(p.numel() for p in trainer.wm.parameters()):,} parameters, "
           + (f"from {a.checkpoint}" if a.checkpoint else f"--model-size {a.model_size}"))
          + ("" if a.eval_only else ", own data" if own else f", data from {a.data_dir}")
          + (f", episodic: scalar rewards, {'real' if trainer.windows else 'learnt'} ends" if a.episodic else ""))
    if plan:
        sums = {k: sum(n for kind, _, n in plan if kind == k) for k in ("collect", "model", "policy")}
        print(f"budget: {len({r for _, r, _ in plan})} rounds, {sums['collect']} episodes per task, {sums['model']} "
              f"model updates ({a.wm_batch} x {a.wm_horizon} steps), {sums['policy']} policy updates ({n} x "
              f"{a.policy_batch} x {a.horizon} imagined steps, {a.critic_passes} x {a.critic_batches} critic steps)")
    print(f"run folder {folder}", flush=True)


# ------------------------------------------------------------------------------------------------------- evaluation
PUBLISHED = {  # final returns on MT30 of PWM and of TD-MPC2 with planning, both 48M (released result files)
    "walker-stand": (995.4, 989.2), "walker-walk": (985.8, 979.0), "walker-run": (857.8, 617.6),
    "cheetah-run": (414.5, 148.1), "reacher-easy": (991.7, 981.4), "reacher-hard": (988.3, 974.5),
    "acrobot-swingup": (116.4, 9.7), "pendulum-swingup": (869.1, 814.8), "cartpole-balance": (999.7, 990.5),
    "cartpole-balance-sparse": (1000.0, 1000.0), "cartpole-swingup": (896.6, 0.5),
    "cartpole-swingup-sparse": (953.4, 0.0), "cup-catch": (471.6, 964.3), "finger-spin": (977.6, 928.2),
    "finger-turn-easy": (879.7, 983.4),
    "finger-turn-hard": (871.2, 981.1), "fish-swim": (844.4, 487.6), "hopper-stand": (394.7, 493.1),
    "hopper-hop": (162.4, 69.6), "walker-walk-backwards": (977.8, 959.9), "walker-run-backwards": (791.6, 186.7),
    "cheetah-run-backwards": (601.0, 324.6), "cheetah-run-front": (549.4, 122.8), "cheetah-run-back": (825.9, 156.8),
    "cheetah-jump": (793.8, 301.8), "hopper-hop-backwards": (165.1, 273.0), "reacher-three-easy": (989.1, 979.1),
    "reacher-three-hard": (974.9, 580.8), "cup-spin": (839.6, 828.8), "pendulum-spin": (866.9, 820.5)}


DFLEX = {  # Table 4: PPO, SAC, TD-MPC2, SHAC, PWM on bodies of the same name in another simulator, best of training
    "hopper": (4742, 4126, 4027, 4837, 5680), "ant": (6605, 6275, 7080, 7662, 9672),
    "anymal": (12029, 11788, 11787, 15157, 13928), "humanoid": (7293, 7285, 7634, 8387, 8661),
    "muscle-humanoid": (4114, 3620, 1121, 5924, 5767)}


def play(workers, tasks, n, seed, policy, note=None):
    """n episodes per task -> {task: {"return": [n], "success": [n]}}; policy(obs, task index, job, t) -> actions."""
    jobs = [(t, 10**9 + 10**4 * seed + i) for t in tasks for i in range(n)]
    owner = np.repeat(np.arange(len(tasks)), n)
    episodes = workers.rollout(jobs, lambda obs, job, t: policy(obs, owner[job], job, t), note)
    return {t: {"return": [float(e["ret"]) for e in episodes[k * n:k * n + n]],
                "success": [float(e["success"]) for e in episodes[k * n:k * n + n]]} for k, t in enumerate(tasks)}


def evaluate(workers, trainer, progress):
    """Returns {column: {task: {"return", "success"}}} for random, ours and, if asked, planner; and ms per action."""
    args, tasks, facts, wm, device = trainer.args, trainer.tasks, trainer.facts, trainer.wm, trainer.device
    rows, heads, discount = trainer.rows, trainer.heads, trainer.discount
    rng = np.random.default_rng([args.seed, 7])
    A = max(f.act_dim for f in facts)
    def run(n, policy, kind="steps"):
        last = [0, time.time()]

        def note(done, total):
            progress.add(kind, done - last[0], time.time() - last[1])
            last[:] = done, time.time()
            progress.line(f"evaluating: {done:,}/{total:,} agent steps")
        return play(workers, tasks, n, args.seed, policy, note)

    columns = dict(random=run(args.eval_episodes, lambda obs, *_: rng.uniform(-1, 1, (len(obs), A))),
                   ours=run(args.eval_episodes, lambda obs, task, *_: trainer.policy(obs, task)))
    if trainer.where["best"] > -math.inf:
        columns["best round"] = run(args.eval_episodes, lambda obs, task, *_: trainer.policy(obs, task, best=True))
    if args.prior:
        def prior(obs, task, *_):
            row = rows[torch.as_tensor(task, device=device)]
            z = wm.encode(pad(obs, wm.obs_dim, device), row)
            return heads.policy(z, row, z.new_zeros(len(z), wm.act_mask.shape[1]))[0][:, :A].cpu().numpy()

        with torch.no_grad():
            columns["prior"] = run(args.eval_episodes, prior)
    if args.planner_episodes:
        heads.eval()  # no dropout
        gen = torch.Generator(device).manual_seed(args.seed)
        means = torch.zeros(len(tasks) * args.planner_episodes, 3, wm.act_mask.shape[1], device=device)

        def planner(obs, task, job, t):
            job, task = torch.as_tensor(job, device=device), torch.as_tensor(task, device=device)
            z = wm.encode(pad(obs, wm.obs_dim, device), rows[task])
            means[job[torch.as_tensor(t, device=device) == 0]] = 0
            a, mean = plan(wm, heads, z, rows[task], means[job], discount[task], gen)
            means[job] = F.pad(mean[:, 1:], (0, 0, 0, 1))
            return a[:, :A].cpu().numpy()

        columns["planner"] = run(args.planner_episodes, planner, "planner")
    return columns, action_latency(trainer, args.planner_episodes)


def evaluate_now(trainer, workers, progress, log):
    """The evaluate stage: deterministic episodes of all policies as they are, into the history."""
    began, n, updates = time.time(), trainer.args.eval_episodes, trainer.where["policy_updates"]
    played = play(workers, trainer.tasks, n, trainer.args.seed, lambda obs, task, *_: trainer.policy(obs, task))
    returns = {t: float(np.mean(points(t, played[t]))) for t in trainer.tasks}
    trainer.history.append({"policy_updates": updates, "evaluation": returns})
    log({f"eval/{t}/return": v for t, v in returns.items()})
    progress.add("steps", n * sum(f.episode_length for f in trainer.facts), time.time() - began)
    progress.line(f"after {updates} policy updates: mean return {np.mean(list(returns.values())):.1f}", True)


def action_latency(trainer, planner):
    """Median milliseconds for one action of the first task: {"ours"} and, if asked, {"planner"}."""
    wm, rows, device = trainer.wm, trainer.rows[:1], trainer.device
    obs, single = torch.zeros(1, wm.obs_dim, device=device), trainer.nets["actors"].first()
    out = dict(ours=milliseconds(lambda: single(wm.encode(obs, rows)[None]), device))
    if planner:
        mean, gen = torch.zeros(1, 3, wm.act_mask.shape[1], device=device), torch.Generator(device).manual_seed(0)
        out["planner"] = milliseconds(lambda: plan(wm, trainer.heads.eval(), wm.encode(obs, rows), rows, mean,
                                                   trainer.discount[:1], gen), device, 5)
    return out


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


def pad(obs, width, device):
    """numpy (n, o) -> tensor (n, width) with zeros at the end"""
    obs = torch.as_tensor(obs, device=device)
    return F.pad(obs, (0, width - obs.shape[1]))


def points(task, played):
    """Per-episode results on the table's scale: return for dm_control and gymnasium, 1000 x success for Meta-World."""
    scale = 1.0 if task not in MT80 and score(task, 1.0, 0.0) == 1.0 else 1000.0
    return [scale * score(task, r, s) for r, s in zip(played["return"], played["success"])]


def report(run, trainer, columns, latency, seconds, device_text):
    """Print the final table and write results.json, results.csv and results.png; returns what results.json holds."""
    args, tasks = trainer.args, trainer.tasks
    raw = {c: {t: points(t, played[t]) for t in tasks} for c, played in columns.items()}
    rows = [{"task": t, **{c: float(np.mean(raw[c][t])) for c in raw},
             **dict(zip(("PWM paper", "TD-MPC2 paper"), PUBLISHED.get(t, (None, None))))} for t in tasks]
    names = [c for c in rows[0] if c != "task" and any(r[c] is not None for r in rows)]
    summary = {c: {"mean": float(np.mean([r[c] for r in rows if r[c] is not None])),
                   "iqm": iqm([r[c] for r in rows if r[c] is not None])} for c in names}
    for c in raw:  # 95 % interval over evaluation episodes of this one training seed
        low, high = bootstrap_ci(np.array([raw[c][t] for t in tasks]).T, np.mean)
        summary[c]["mean_ci95"] = [low, high]
    width = max(len(t) for t in tasks) + 2
    lines = ["".join([f"{'task':<{width}}", *(f"{c:>15}" for c in names)])]
    stats = [{"task": stat, **{c: summary[c][stat] for c in names}} for stat in ("mean", "iqm")] * (len(rows) > 1)
    for r in rows + stats:
        cells = ["-" if r[c] is None else f"{r[c]:.1f}" for c in names]
        lines.append(f"{r['task']:<{width}}" + "".join(f"{x:>15}" for x in cells))
    print("\n" + "\n".join(lines))
    for c, ms in latency.items():
        print(f"{c}: {ms:.2f} ms per action")
    if tasks[0] in DFLEX:
        names_of = zip(("PPO", "SAC", "TD-MPC2", "SHAC", "PWM"), DFLEX[tasks[0]])
        print("published for other physics, not comparable: " + ", ".join(f"{k} {v}" for k, v in names_of))
    result = dict(stamp(args, seconds, device_text), folder=str(run.dir), summary=summary, table=rows, episodes=raw,
                  ms_per_action=latency, history=trainer.history)
    write_text(run.dir / "results.json", json.dumps(result, indent=1))
    with open(run.dir / "results.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, ["task", *names], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, names, trainer.history, seconds, run.dir)
    kinds = (".json", ".jsonl", ".csv", ".png", ".pt")
    print(f"files: {run.dir}/", *sorted(p.name for p in run.dir.iterdir() if p.suffix in kinds))
    return result


def stamp(args, seconds, device_text):
    """What every results.json begins with: how to get these numbers again."""
    git = subprocess.run("git rev-parse --short HEAD", shell=True, capture_output=True, text=True)  # maybe none
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    return dict(command=command, commit=git.stdout.strip() or None, seed=args.seed, hardware=device_text,
                seconds=round(seconds, 1), args=asdict(args))


def write_text(path, text):
    tmp = path.with_suffix(".tmp")
    tmp.write_text(text)
    os.replace(tmp, path)


def plot(rows, names, history, seconds, folder):
    """results.png: bars of every column per task; curve.png: roll-out return of every task against minutes."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(max(5, 0.55 * len(rows) + 2), 4), layout="constrained")
    x, width = np.arange(len(rows)), 0.8 / len(names)
    for k, c in enumerate(names):
        ax.bar(x + (k - len(names) / 2 + 0.5) * width, [r[c] or 0 for r in rows], width, label=c)
    ax.set_xticks(x, [r["task"] for r in rows], **(dict(rotation=60, ha="right") if len(rows) > 4 else {}))
    ax.set_ylabel("return, or 1000 x success" if any(r["task"].startswith("mw-") for r in rows) else "return")
    ax.margins(x=0.01)
    fig.legend(loc="outside upper center", ncols=len(names), fontsize=8)
    fig.savefig(folder / "results.png", dpi=120)
    plt.close(fig)
    rounds, tests = ([h for h in history if k in h] for k in ("return", "evaluation"))
    if not rounds and tests:
        fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
        for r in rows:
            ax.plot([h["policy_updates"] for h in tests], [h["evaluation"][r["task"]] for h in tests], "o-", ms=3,
                    label=r["task"])
        ax.set(xlabel="policy updates", ylabel="return")
        ax.legend(fontsize=6)
        fig.savefig(folder / "curve.png", dpi=120)
        plt.close(fig)
    if not rounds:
        return
    minutes = [h["seconds"] / 60 for h in rounds]
    against = {"minutes": (minutes, seconds / 60)}
    if "steps" in rounds[0]:
        steps = np.cumsum([h["steps"] for h in rounds]) + [h["window_steps"] for h in rounds]
        against["environment steps"] = (steps, steps[-1])
    fig, axes = plt.subplots(1, len(against), figsize=(6 * len(against), 4), sharey=True, squeeze=False,
                             layout="constrained")
    for ax, (label, (x, end)) in zip(axes[0], against.items()):
        for r in rows:
            (line,) = ax.plot(x, [h["return"][r["task"]] for h in rounds], "o-", ms=3, lw=1, alpha=0.6)
            if not r["task"].startswith("mw-"):
                ax.plot(end, r["ours"], "*", color=line.get_color(), ms=8)
        if len(rows) > 1:
            ax.plot(x, [np.mean(list(h["return"].values())) for h in rounds], "k-", lw=2, label="mean over tasks")
            ax.legend(fontsize=8)
        ax.set_xlabel(label)
    axes[0, 0].set_ylabel("return of roll-outs (star: final evaluation)")
    fig.savefig(folder / "curve.png", dpi=120)
    plt.close(fig)


def record(run, tasks, greedy, seed):
    """One deterministic episode per task as video_<task>.mp4 in the run's folder."""
    import imageio
    for k, t in enumerate(tasks):
        env = make_env(t, seed)
        obs, _ = env.reset(seed=10**9 + 10**4 * seed)
        frames, done = [env.render()], False
        while not done:
            a = greedy(obs[None], np.array([k]))[0]
            obs, _, terminated, truncated, _ = env.step(a[:env.action_space.shape[0]])
            frames.append(env.render())
            done = terminated or truncated
        path = run.dir / f"video_{t.replace('/', '_').replace(':', '_')}.mp4"
        imageio.mimwrite(path, frames, fps=40, macro_block_size=1)
        env.close()
        print(f"video: {path}")


# ---------------------------------------------------------------------------------- the two toys of Sec. 3 (Figs. 2, 3)
class ToyNet(nn.Module):
    """n small networks 1-32-32-1 side by side, without normalisation: theta (n, B) -> J (n, B)."""

    def __init__(self, n, act):
        super().__init__()
        self.act = act
        layers = [[init_default(i, j) for _ in range(n)] for i, j in ((1, 32), (32, 32), (32, 1))]
        self.weight = nn.ParameterList(torch.stack([w for w, _ in layer]) for layer in layers)
        self.bias = nn.ParameterList(torch.stack([b for _, b in layer])[:, None] for layer in layers)

    def forward(self, x):
        x = x[..., None]
        for k, (W, b) in enumerate(zip(self.weight, self.bias)):
            x = torch.baddbmm(b, x, W)
            x = self.act(x) if k < 2 else x
        return x[..., 0]


def fit_landscape(act, cost, n, epochs, seed):
    """Regress cost(theta) with n networks of activation `act`: 1000 uniform angles each, MSE, Adam 2e-3, batch 50.

    Every call with the same n and seed starts from the same weights and angles (App. A). Returns net and losses
    (epochs, n).
    """
    torch.manual_seed(seed)
    net, g = ToyNet(n, act), torch.Generator().manual_seed(seed)
    theta = (2 * torch.rand(n, 1000, generator=g) - 1) * math.pi
    J = cost(theta)
    opt = torch.optim.Adam(net.parameters(), 2e-3, fused=True)
    losses = []
    for _ in range(epochs):
        order, total = torch.rand(n, 1000, generator=g).argsort(1), 0
        for rows in order.split(50, 1):
            error = (net(theta.gather(1, rows)) - J.gather(1, rows)).square().mean(1)  # (n,)
            opt.zero_grad(set_to_none=True)
            error.sum().backward()  # the networks share nothing
            opt.step()
            total = total + error.detach() / 20
        losses.append(total)
    return net, torch.stack(losses)


def descend(net, n, steps=2000, lr=0.01):
    """Gradient descent on n fitted landscapes from theta = -pi, kept in [-pi, pi] -> angles (n,)."""
    theta = torch.full((n, 1), -math.pi, requires_grad=True)
    for _ in range(steps):
        (grad,) = torch.autograd.grad(net(theta).sum(), theta)
        with torch.no_grad():
            theta.sub_(lr * grad).clamp_(-math.pi, math.pi)
    return theta.detach()[:, 0]


def ball_wall(args, run, device_text):
    """Fig. 2, its table and Fig. 10: networks fitted to a landscape with cliffs, and where descending them ends."""
    n, began, ball = 100 if args.seeds is None else args.seeds, time.time(), plant("ball-wall")
    if n < 2:
        raise SystemExit(f"--seeds {n}: expected at least 2 networks, 20 or more for a verdict")
    grid = torch.linspace(-math.pi, math.pi, 4001)
    few = min(n, 20)
    nets = {"ReLU": (torch.relu, 100, 1), "SimNorm": (simnorm, 100, 1),
            **{f"SimNorm, groups of {V}": (functools.partial(simnorm, V=V), 100, 1) for V in (4, 16, 32)},
            "ReLU, 10 x training": (torch.relu, 1000, 1), "SimNorm, 10 x training": (simnorm, 1000, 1),
            "ReLU, right contact time": (torch.relu, 100, 2), "SimNorm, right contact time": (simnorm, 100, 2)}
    rows, kept = {}, {}
    for name, (act, epochs, k) in nets.items():
        size = n if name in ("ReLU", "SimNorm") else few
        cost = functools.partial(ball.cost, k=k)
        net, losses = fit_landscape(act, cost, size, epochs // 50 if args.fast else epochs, args.seed)
        with torch.no_grad():
            fitted, true = net(grid.expand(size, -1)), cost(grid)
            rmse = (fitted - true).square().mean(1).sqrt()
        theta = descend(net, size)
        best = grid[true.argmin()]
        rows[name] = dict(seeds=size, epochs=epochs, k=k, rmse=rmse.tolist(), theta=theta.tolist(),
                          gap=(cost(theta) - true.min()).tolist(), angle_error=(theta - best).abs().tolist())
        kept[name] = fitted, losses
        print(f"{name:28} {size:4} seeds   error {rmse.median():6.2f}   gap {np.median(rows[name]['gap']):6.2f}   "
              f"theta {theta.median():6.3f}   ({time.time() - began:.0f} s)", flush=True)
    relu, smooth = rows["ReLU"], rows["SimNorm"]
    ratio = np.median(smooth["rmse"]) / np.median(relu["rmse"])
    gaps, share = [np.median(x["gap"]) for x in (relu, smooth)], float(np.mean(np.array(smooth["gap"]) < 5))
    checks = {f"model error of SimNorm at least twice that of ReLU: {ratio:.2f} times": ratio >= 2,
              f"its median gap at most a third of ReLU's: {gaps[1]:.2f} against {gaps[0]:.2f}": gaps[1] <= gaps[0] / 3,
              f"its gap below 5 in 90 % of 20 seeds or more: {share:.0%} of {n}": share >= 0.9 and n >= 20}
    figure_ball_wall(run.dir / "figure2.png", ball, grid, rows, kept)
    notes = ["networks as the text says, without the LayerNorm of the released code (whose 'ReLU' is Mish)",
             "gradient descent is run (SGD 0.01, 2000 steps); the released code takes the argmin of the model",
             "contact time with k = 1 as printed (a slip), the right one (k = 2) beside it",
             "needs under-fitting and groups of 4 or 8: see the other rows of the table"]
    return finish_toy(args, run, device_text, began, checks, notes, dict(table=rows))


def figure_ball_wall(path, ball, grid, rows, kept):
    """Figs. 2 and 10: the throw, the landscapes with start and end of a typical seed, training losses, the table."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (sketch, land, loss, table) = plt.subplots(1, 4, figsize=(17, 4), layout="constrained",
                                                    width_ratios=(1, 1.4, 1, 1.3))
    for theta in (-0.6, 0.0, 0.26, 0.8):
        x, y = ball.path(theta).T
        sketch.plot(x, y, "o-", ms=2, lw=1, label=f"θ = {theta:.2f}")
    sketch.plot([ball.WALL, ball.WALL], [-15, ball.TOP], "k", lw=4)
    sketch.set(title="throw over the wall", xlabel="x [m]", ylabel="y [m]", ylim=(-15, 6))
    sketch.legend(fontsize=7)
    land.plot(grid, ball.cost(grid), "k", lw=1.5, label="true J(θ)")
    for name, color in (("ReLU", "tab:red"), ("SimNorm", "tab:blue")):
        gap, (fitted, losses) = np.array(rows[name]["gap"]), kept[name]
        i = int(np.argsort(gap)[len(gap) // 2])  # the seed with the median gap
        end, at = rows[name]["theta"][i], lambda x, y=fitted[i]: float(np.interp(x, grid, y))
        land.plot(grid, fitted[i], color=color, lw=1.2, label=name)
        land.plot(-math.pi, at(-math.pi), "x", color=color, ms=9, mew=2)
        land.plot(end, at(end), "*", color=color, ms=14, mec="k")
        q = losses.quantile(torch.tensor([0.25, 0.5, 0.75]), 1)
        loss.plot(q[1], color=color, label=name)
        loss.fill_between(range(len(q[1])), q[0], q[2], color=color, alpha=0.2)
    land.set(title="landscapes: start ×, end ★ (typical seed)", xlabel="θ [rad]", ylabel="J")
    loss.set(title="training loss (quartiles over seeds)", xlabel="epoch", ylabel="MSE", yscale="log")
    for ax in (land, loss):
        ax.legend(fontsize=8)
    table.axis("off")
    cells = [[name, f"{np.median(r['rmse']):.2f}", f"{np.median(r['gap']):.2f}"] for name, r in rows.items()]
    made = table.table(cells, colLabels=["model", "error (RMSE)", "gap |J(θ*) - J(θ̂)|"], loc="center",
                       colWidths=[0.5, 0.22, 0.33])
    made.auto_set_font_size(False)
    made.set_fontsize(8)
    made.scale(1, 1.4)
    table.set_title("medians over seeds")
    fig.savefig(path, dpi=110)
    plt.close(fig)


PENDULUM = dict(  # budget of one study: 235 CPU seconds with three models per horizon
    episodes=32, shac_updates=150, shac_horizon=32, random_episodes=480, base_updates=1000, model_updates=600,
    model_batch=128, latent=64, hidden=128, policy_updates=60, rollouts=100)
PENDULUM_FAST = dict(episodes=2, shac_updates=2, shac_horizon=4, random_episodes=4, base_updates=4, model_updates=2,
                     model_batch=8, latent=16, hidden=16, policy_updates=2, rollouts=4)  # it only shows that it runs


def play_pendulum(pendulum, act, state, steps):
    """Closed loop from state (B, 4): act(obs (B, 6), t) -> (B, 1). Returns obs (steps+1, B, 6), act, rew (steps, B)."""
    obs, acts, rew = [pendulum.observe(state)], [], []
    for t in range(steps):
        acts.append(act(obs[-1], t))
        state = pendulum.step(state, acts[-1])
        obs.append(pendulum.observe(state))
        rew.append(pendulum.reward(obs[-1]))
    return torch.stack(obs), torch.stack(acts), torch.stack(rew)


def extract(wm, starts, updates, horizon, gen, args, lr=2e-3, collect=None):
    """A policy for the pendulum by first-order gradients through wm (a WorldModel or TruePlant).

    starts (M, 6) start observations. collect(actors, share done) -> more starts, called before every 15th update.
    Returns the actors (one). Learning rate falls linearly to 1e-5; small networks, as the observation has 6 numbers.
    """
    nets = nn.ModuleDict(dict(wm=wm, actors=Actors(torch.ones(1, 1), getattr(wm, "latent", 6), (128, 64, 32)),
                              critics=Critics(1, getattr(wm, "latent", 6), widths=(128, 64)), stats=RunningStats(1)))
    opts = {k: torch.optim.Adam(nets[k].parameters(), lr, betas=(args.beta1, 0.95), fused=True)
            for k in ("actors", "critics")}
    hp = SimpleNamespace(gamma=args.gamma, lam=args.lam, symexp=False, critic_batches=args.critic_batches,
                         td_actor=False)
    wm.requires_grad_(False)
    task = torch.zeros(64, dtype=torch.long)
    for i in range(updates):
        if collect and i % 15 == 0:
            starts = torch.cat([starts, collect(nets["actors"], i / updates)])
        for opt in opts.values():
            opt.param_groups[0]["lr"] = lr + (1e-5 - lr) * i / updates
        obs = starts[torch.randint(len(starts), (64,), generator=gen)][None]
        noise = torch.randn(horizon, 1, 64, 1, generator=gen)
        perm = torch.rand(2, horizon * 64, generator=gen).argsort(1)
        update_policies((actor_loss, critic_loss), nets, opts, obs, noise, perm, task, hp)
    return nets["actors"]


def action_gradients(wm, obs, acts):
    """How later rewards depend on every action, along given actions: d(r_0 + .. + r_k)/d a_t for k, t < H.

    obs (N, O) starts, acts (H, N, 1). Returns (H, H, N): [k, t]. Gradients flow from action to state to reward only.
    """
    acts = acts.detach().requires_grad_()
    task = torch.zeros(len(obs), dtype=torch.long)
    z = [wm.encode(obs, task)]
    for a in acts[:-1]:
        z.append(wm.next(z[-1], a, task))
    rew = reward_value(wm.reward(torch.stack(z), acts, task))  # (H, N)
    grads = [torch.autograd.grad(r.sum(), acts, retain_graph=True)[0][..., 0] for r in rew]  # rollouts are independent
    return torch.stack(grads).cumsum(0)


def policy_jacobian(actors, obs, eps):
    """d a / d(actor parameters) of single actions: obs (M, O), eps (M, 1) -> (M, P)."""
    params = list(actors.parameters())
    rows = [torch.autograd.grad(actors(o[None, None], e[None, None]).sum(), params) for o, e in zip(obs, eps)]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def gradient_statistics(weights, jacobian):
    """Policy gradients g_n = sum_t dJ_H/da_t da_t/dtheta of N roll-outs for every horizon, and what Fig. 3 shows.

    weights (H, T, N) from action_gradients, jacobian (T, N, P). Returns {"variance": mean over parameters of the sample
    variance, "esnr": Eq. (5), "esnr_code": mean of the ratios as the released code has it}, each (H,); means (H, P).
    """
    out, means = {"variance": [], "esnr": [], "esnr_code": []}, []
    for w in weights:  # (T, N)
        g = -torch.einsum("tn,tnp->np", w, jacobian)  # of the loss -J_H
        mean, var = g.mean(0), g.var(0)
        out["variance"].append(float(var.mean()))
        out["esnr"].append(float(mean.square().sum() / var.sum()))
        out["esnr_code"].append(float((mean.square() / (var + 1e-9)).mean()))
        means.append(mean)
    return out, torch.stack(means)


def fit_pendulum_model(wm, data, horizon, updates, lr, batch, gen):
    """Train wm on `horizon`-step sequences of obs (T+1, M, 6), act (T, M, 1), rew (T, M); returns the last loss."""
    obs, act, rew = data
    opt, steps = torch.optim.Adam(wm.parameters(), lr, fused=True), torch.arange(horizon + 1)[:, None]
    for i in range(updates):
        opt.param_groups[0]["lr"] = lr * min(1.0, 0.03 + 2 * (1 - i / updates))
        e = torch.randint(act.shape[1], (batch,), generator=gen)
        t = torch.randint(len(act) - horizon + 1, (batch,), generator=gen) + steps  # (horizon+1, B)
        term = torch.zeros(horizon, batch)  # it never ends, and its head learns so
        metrics = update_world_model(functools.partial(world_model_loss, wm), wm, opt,
                                     (obs[t, e], act[t[:-1], e], rew[t[:-1], e], e * 0, term, term + 1), 0.99)
    return float(metrics["loss"])


def train_pendulum_models(data, seed, budget, note):
    """{3: WorldModel, 16: WorldModel} of one seed: the same start on 3-step sequences, then each on its own horizon
    (long sequences from nothing need far more updates than the minutes of this study)."""
    torch.manual_seed(seed)
    gen = torch.Generator().manual_seed(seed)
    base = WorldModel(6, [1], 2, budget["hidden"], budget["hidden"], budget["latent"], 0, episodic=True)
    base.rew_std.copy_(data[2].std())
    fit_pendulum_model(base, data, 3, budget["base_updates"], 1e-3, budget["model_batch"], gen)
    models = {}
    for horizon in (3, 16):
        models[horizon] = copy.deepcopy(base)
        loss = fit_pendulum_model(models[horizon], data, horizon, budget["model_updates"], 6e-4, budget["model_batch"],
                                  gen)
        models[horizon].requires_grad_(False)
        note(f"model {seed} of horizon {horizon}: loss {loss:.4f}")
    return models


def pendulum_data(pendulum, args, budget, gen, note):
    """SHAC on the true plant, and the episodes it leaves: a third random, a third the policies on the way, a third the
    last one with wide noise. Returns actors, (obs (T+1, M, 6), act (T, M, 1), rew (T, M)), returns on the way (random
    actions first)."""
    T, m = pendulum.STEPS, budget["random_episodes"]
    held = (2 * torch.rand(T // 4, m, 1, generator=gen) - 1).repeat_interleave(4, 0)
    episodes = [play_pendulum(pendulum, lambda o, t: held[t], pendulum.reset(m, gen), T)]
    history = [float(episodes[0][2].sum(0).mean())]

    @torch.no_grad()
    def roll(actors, n, sigma):  # n episodes of the policy with its noise times sigma
        noise = torch.randn(T, 1, n, 1, generator=gen) * sigma
        episodes.append(play_pendulum(pendulum, lambda o, t: actors(o[None], noise[t])[0], pendulum.reset(n, gen), T))

    def collect(actors, done):
        roll(actors, budget["episodes"], 1.0)
        obs, _, rew = episodes[-1]
        history.append(float(rew.sum(0).mean()))
        if len(history) % 4 == 2:
            note(f"SHAC {done:.0%}: return {history[-1]:.0f} (random actions {history[0]:.0f})")
        return obs[:-1].flatten(0, 1)

    true = TruePlant(pendulum, "double-pendulum", float(episodes[0][2].std()))
    starts = pendulum.observe(pendulum.reset(64, gen))
    actors = extract(true, starts, budget["shac_updates"], budget["shac_horizon"], gen, args, collect=collect)
    roll(actors, m, 3.0)
    return actors, [torch.cat(x, 1) for x in zip(*episodes)], history


def double_pendulum(args, run, device_text):
    """Fig. 3: variance, ESNR and direction of policy gradients through the true plant and learned models.

    SHAC on the true plant makes the policy and the data; models train on 3 and 16 steps; all see the same actions.
    """
    n, began, cpu = 3 if args.seeds is None else args.seeds, time.time(), time.process_time()
    if n < 1:
        raise SystemExit(f"--seeds {n}: expected at least 1 model per horizon, 3 or more for a verdict")
    pendulum, gen = plant("double-pendulum"), torch.Generator().manual_seed(args.seed)
    budget = PENDULUM_FAST if args.fast else PENDULUM
    torch.manual_seed(args.seed)

    def note(text):
        print(f"{text} ({time.time() - began:.0f} s, {time.process_time() - cpu:.0f} CPU-s)", flush=True)

    actors, data, history = pendulum_data(pendulum, args, budget, gen, note)
    test, zero = pendulum.reset(64, torch.Generator().manual_seed(7)), torch.zeros(64, dtype=torch.long)

    @torch.no_grad()
    def mean_return(actors, wm):
        return float(play_pendulum(pendulum, lambda o, t: actors(wm.encode(o, zero)[None])[0], test,
                                   pendulum.STEPS)[2].sum(0).mean())

    models = {"true": [TruePlant(pendulum, "double-pendulum", float(data[2].std()))]}
    returns = {"random": history[0], "SHAC, true plant": mean_return(actors, models["true"][0])}
    note(f"SHAC: return {returns['SHAC, true plant']:.0f}")
    learned = [train_pendulum_models(data, args.seed + k, budget, note) for k in range(n)]
    for horizon in (3, 16):
        name, starts = f"WM, H = {horizon}", data[0][:-1].flatten(0, 1)
        models[name] = [pair[horizon] for pair in learned]
        returns[f"PWM, {name}"] = [
            mean_return(extract(wm, starts, budget["policy_updates"], 16, gen, args), wm) for wm in models[name]]
        note(f"PWM on models of horizon {horizon}: returns {np.round(returns[f'PWM, {name}'])}")
    studies = pendulum_gradients(pendulum, actors, models, budget["rollouts"], gen, note)
    checks = pendulum_checks(studies["upright"], n)
    figure_pendulum(run.dir / "figure3.png", studies)
    print("\n" + "cosine to the true mean gradient, random starts".ljust(50)
          + "".join(f"{f'H = {h}':>10}" for h in (16, 30, 50)))
    for name, stats in studies["random"].items():
        for k, x in enumerate(stats):
            print(f"{f'{name}, model {k}':50}" + "".join(f"{x['cosine'][h - 1]:10.2f}" for h in (16, 30, 50)))
    print(f"\nreturns over 240 steps: {json.dumps({k: np.round(v, 0).tolist() for k, v in returns.items()})}")
    size = sum(p.numel() for p in models["WM, H = 3"][0].parameters())
    notes = [f"models of {size:,} parameters and {budget['base_updates'] + budget['model_updates']} updates of "
             f"{budget['model_batch']} sequences instead of 5M and 100k, the first {budget['base_updates']} on "
             f"3 steps for both horizons; {data[1].shape[1]} episodes instead of 24,000",
             "a true acrobot; the reference's two hinges sit at one point, so that its links do not pull at each other",
             "all models see the same starts, noise, actions and reward scale; the released code lets the true plant "
             "go on from its last state and adds a term that grows with H to its ESNR",
             "the gradient flows action -> state -> reward; the policy's input is cut, as in the released code"]
    return finish_toy(args, run, device_text, began, checks, notes, dict(
        gradients=studies, returns=returns, shac_returns=history, cpu_seconds=round(time.process_time() - cpu, 1)))


def pendulum_gradients(pendulum, actors, models, N, gen, note, H=50):
    """{"upright", "random": {model: [gradient_statistics and "cosine" for every seed]}}, of N roll-outs for horizons
    1..H."""
    studies = {}
    for where, start in (("upright", torch.zeros(N, 4)), ("random", pendulum.reset(N, gen))):
        eps = torch.randn(H, 1, N, 1, generator=gen)
        with torch.no_grad():
            seen, acts, _ = play_pendulum(pendulum, lambda o, t, eps=eps: actors(o[None], eps[t])[0], start, H)
        jacobian = policy_jacobian(actors, seen[:-1].flatten(0, 1), eps[:, 0].flatten(0, 1)).view(H, N, -1)
        studies[where], true = {}, None
        for name, seeds in models.items():
            studies[where][name] = []
            for wm in seeds:
                numbers, mean = gradient_statistics(action_gradients(wm, seen[0], acts), jacobian)
                true = mean if true is None else true
                studies[where][name].append(dict(numbers, cosine=F.cosine_similarity(mean, true, dim=1).tolist()))
        note(f"gradients from {where} starts")
    return studies


def pendulum_checks(upright, n):
    """What counts as reproduced, {sentence: bool}; lists in `upright` are over H = 1..50."""
    true, models = upright["true"][0], {h: upright[f"WM, H = {h}"] for h in (3, 16)}
    growth = true["variance"][49] / true["variance"][15]
    over = [true["variance"][49] / m["variance"][49] for m in models[16]]
    gain = [min(m["esnr"][h] / true["esnr"][h] for h in range(15, 50)) for m in models[16]]
    better = [min(a["esnr"][h] / b["esnr"][h] for h in range(7, 30)) for a, b in zip(models[16], models[3])]
    def shown(x):
        return ", ".join(f"{v:.3g}" for v in x)
    return {f"three models per horizon or more: {n}": n >= 3,
            f"true variance grows at least 100 times from H = 16 to 50: {growth:.3g} times": growth >= 100,
            f"there it is at least 5 times that of models trained on 16 steps: {shown(over)} times": min(over) >= 5,
            f"their ESNR is at least 10 times the true one for all H >= 16: at least {shown(gain)}": min(gain) >= 10,
            f"and above that of models trained on 3 steps for 8 <= H <= 30: at least {shown(better)} times":
                min(better) > 1}


def figure_pendulum(path, studies):
    """Fig. 3, with the direction of the gradients below: rows fixed upright start and random starts."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(len(studies), 3, figsize=(14, 4 * len(studies)), layout="constrained", squeeze=False)
    colors = dict(zip(studies["upright"], ("black", "tab:orange", "tab:blue")))
    for row, (where, models) in zip(axes, studies.items()):
        for ax, (key, title) in zip(row, (("variance", "variance of the gradient"), ("esnr", "ESNR (Eq. 5)"),
                                          ("cosine", "cosine to the true mean gradient"))):
            for name, stats in models.items():
                for k, x in enumerate(stats):
                    ax.plot(range(1, len(x[key]) + 1), x[key], color=colors[name], lw=1.3, alpha=0.8,
                            label=None if k else name)
            ax.set(title=f"{title}, {where} start{'s' * (where == 'random')}", xlabel="H")
            if key != "cosine":
                ax.set_yscale("log")
        row[0].legend(fontsize=8)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def finish_toy(args, run, device_text, began, checks, notes, numbers):
    """Print the verdict by the rule of `checks` {sentence: bool}, write results.json; returns what it holds."""
    print()
    for sentence, holds in checks.items():
        print(f"{'yes' if holds else 'NO ':4} {sentence}")
    verdict = "reproduced" if all(checks.values()) else "not reproduced"
    print(f"{args.task}: {verdict}\ndeviations from the paper's protocol:")
    for note in notes:
        print(f"  - {note}")
    result = dict(stamp(args, time.time() - began, device_text), verdict=verdict, deviations=notes,
                  checks={k: bool(v) for k, v in checks.items()}, **numbers)
    write_text(run.dir / "results.json", json.dumps(result, indent=1))
    print(f"files: {run.dir}/", *sorted(p.name for p in run.dir.iterdir() if p.suffix in (".json", ".png")))
    return result


# -------------------------------------------------------------------------- ablations (Figs. 7, 8, 14, 17, 18 and 19)
ABLATION_TASKS = "cartpole-swingup,walker-walk,cheetah-run,cup-catch"
ABLATION_DATA = dict(wm_steps=6000, wm_batch=128, policy_steps=1200, policy_batch=16)  # the run that fills the data
ABLATION_CELL = dict(wm_steps=2000, wm_batch=128, wm_horizon=3, policy_steps=400, policy_batch=16)  # one training
ABLATION_FAST = dict(wm_steps=6, wm_batch=8, wm_horizon=3, policy_steps=3, policy_batch=4, eval_episodes=1)

# name: (what the paper says of its variants, +1 if they are better than the base and -1 if worse, {variant: flags})
ABLATIONS = {
    "activation": ("less regularised models predict better, their policies are worse (Fig. 8a)", -1,
                   {"Mish without SimNorm": dict(activation="mish"), "ReLU without SimNorm": dict(activation="relu")}),
    "model-updates": ("policies need a well-trained model (Fig. 8b)", -1,
                      {"400 model updates, not 2,000": dict(wm_steps=400)}),
    "prior": ("TD-MPC2 without planning is below PWM on the same model, the row before it (Figs. 8b, 18)", -1,
              {"TD-MPC2 without planning": dict(prior=True)}),
    "wm-horizon": ("models trained on 16 steps are marginally better (Fig. 14)", 1,
                   {"model trained on 16 steps": dict(wm_horizon=16)}),
    "batch": ("at equal time, small batches are better (Fig. 7b)", -1,
              {"batch of 64, equal time": dict(policy_batch=64),
               "batch of 256, equal time": dict(policy_batch=256)}),
    "objective": ("a TD(lambda) objective is worse (Fig. 19)", -1, {"TD(lambda) objective": dict(td_actor=True)}),
    "shared": ("one policy for all tasks fails (Fig. 18)", -1, {"one policy for all tasks": dict(shared_policy=True)})}
OWN_MODEL = ("activation", "wm_steps", "prior", "wm_horizon")  # flags for which a variant trains a model of its own


def ablations(args, run, device_text):
    """Train the base and its variants on the same data with the same seeds; table of paired differences.

    Variants that leave the world model alone start from the base's. Returns what results.json holds.
    """
    began, wanted = time.time(), list(ABLATIONS) if args.ablation == "all" else args.ablation.split(",")
    if unknown := [x for x in wanted if x not in ABLATIONS]:
        raise SystemExit(f"--ablation {unknown[0]}: expected all, stiffness, latency or some of "
                         + ", ".join(ABLATIONS))
    if args.seeds is not None and args.seeds < 2:
        raise SystemExit(f"--seeds {args.seeds}: expected 2 trainings of every variant or more, 3 for a verdict")
    few, tasks = args.seeds or 3, task_list(args.task)
    base = replace(args, ablation=None, seeds=None, resume=None, **{
        k: v for k, v in (ABLATION_FAST if args.fast else ABLATION_CELL).items() if getattr(args, k) is None})
    if base.data_dir is None:
        made = replace(args, ablation=None, seeds=None, resume=None, eval_every=0,
                       **(ABLATION_FAST if args.fast else ABLATION_DATA))
        data = run_cell(made, run, "data")
        base = replace(base, data_dir=f"{data['folder']}/episodes")
    many = args.seeds or (5 if "activation" in wanted else 3)
    seeds = [args.seed + k for k in range(many)]
    cells = {"base": [run_cell(replace(base, seed=seed), run, f"base-{seed}") for seed in seeds]}
    device = choose_device(args, 0)[0]

    def update_seconds(cell):
        return Trainer(fill_budget(replace(cell, checkpoint=None), device, len(tasks), 1), tasks, device).trial()[1]

    for name in wanted:
        for variant, flags in ABLATIONS[name][2].items():
            flags = flags | {k: v for k, v in ABLATION_FAST.items() if args.fast and k in flags}
            if name == "batch":  # as many updates as fit into the base's time
                ratio = update_seconds(base) / update_seconds(replace(base, **flags))
                flags["policy_steps"] = max(1, round(base.policy_steps * ratio))
            cells[variant] = []
            for k, seed in enumerate(seeds if name == "activation" else seeds[:few]):
                cell = replace(base, seed=seed, **flags)
                if not set(flags) & set(OWN_MODEL):
                    cell = replace(cell, checkpoint=f"{cells['base'][k]['folder']}/checkpoint.pt", model_size=None,
                                   activation=None)  # the file says both
                cells[variant].append(run_cell(cell, run, f"{variant.replace(' ', '-')}-{seed}"))
    rows = [ablation_row("base", "base", cells["base"], cells["base"], tasks, 0)]
    for name in wanted:
        for variant in ABLATIONS[name][2]:
            against = cells[variant if name == "prior" else "base"]
            if name == "prior":  # TD-MPC2's Q has a part in this model: what it does to PWM's policies is another row
                rows.append(ablation_row("base", "PWM on TD-MPC2's model", against, cells["base"], tasks, 0))
            rows.append(ablation_row(name, variant, cells[variant], against, tasks, ABLATIONS[name][1]))
    print(f"\n{'variant':34}{'seeds':>6}{'return, mean over tasks':>25}{'minus base, paired':>26}{'latent error':>14}"
          "   claim")
    for r in rows:
        low, high = r["ci95"]
        change = "" if r["variant"] == "base" else f"{r['difference']:+.0f} [{low:+.0f}, {high:+.0f}]"
        latent = f"{r['latent']:.3f}" if r["latent"] else "-"
        print(f"{r['variant']:34}{len(r['returns']):6}{np.mean(r['returns']):25.0f}{change:>26}{latent:>14}   "
              f"{r['verdict']}")
    for name in wanted:
        print(f"{name}: {ABLATIONS[name][0]}")
    if base.eval_every:
        figure_efficiency(run.dir / "efficiency.png", cells, base)
    result = dict(stamp(args, time.time() - began, device_text), tasks=tasks, rows=rows, cells=cells)
    write_text(run.dir / "results.json", json.dumps(result, indent=1))
    print(f"files: {run.dir}/results.json")
    return result


def figure_efficiency(path, cells, base):
    """Fig. 8b: return against policy updates (mean and range of the seeds), and as a line what TD-MPC2's prior gets."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, made in cells.items():
        curves = np.array([c["curve"] for c in made])  # (seeds, evaluations, 2)
        priors = [np.mean(list(c["returns"]["prior"].values())) for c in made if "prior" in c["returns"]]
        label = f"{base.wm_steps:,} model updates" if name == "base" else "PWM on TD-MPC2's model" if priors else name
        (line,) = ax.plot(curves[0, :, 0], curves[..., 1].mean(0), "o-", ms=3, label=label)
        color = line.get_color()
        ax.fill_between(curves[0, :, 0], curves[..., 1].min(0), curves[..., 1].max(0), color=color, alpha=0.15)
        if priors:
            ax.axhline(np.mean(priors), color=color, ls="--", label=name)
    ax.set(xlabel="policy updates", ylabel="return, mean over tasks")
    ax.legend(fontsize=8)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def run_cell(args, run, name):
    """One training in its own folder below run.dir: {folder, returns {column: {task: mean}}, errors, seconds, ..}. A
    cell that is there is not run again."""
    file, began = run.dir / "cells" / f"{name}.json", time.time()
    if file.exists():
        return json.loads(file.read_text())
    file.parent.mkdir(exist_ok=True)
    print(f"{name} ..", end="", flush=True)
    with open(file.with_suffix(".log"), "w") as log, contextlib.redirect_stdout(log):
        result = main(args, root=run.dir / "cells" / name)
    history = result["history"]
    errors = {k: v for h in history for k, v in h.items() if "nmse" in k}  # of the last round
    tests = [h for h in history if "evaluation" in h]
    curve = [[h["policy_updates"], float(np.mean(list(h["evaluation"].values())))] for h in tests]
    cell = dict(folder=result["folder"], errors=errors, curve=curve, seconds=round(time.time() - began, 1),
                args=result["args"],
                returns={c: {t: float(np.mean(x)) for t, x in v.items()} for c, v in result["episodes"].items()})
    write_text(file, json.dumps(cell, indent=1))
    shown = {c: round(float(np.mean(list(v.values()))), 1) for c, v in cell["returns"].items()}
    print(f" {cell['seconds']:.0f} s, {shown}", flush=True)
    return cell


def ablation_row(name, variant, cells, base, tasks, expected):
    """One line of the table: returns per seed (mean over tasks), paired difference to PWM's policies of `base` with its
    95 % interval over seeds (redrawn within each task), and one word for the paper's claim."""
    column = "prior" if name == "prior" else "ours"
    mine = np.array([[c["returns"][column][t] for t in tasks] for c in cells])  # (seeds, tasks)
    theirs = np.array([[c["returns"]["ours"][t] for t in tasks] for c in base])[:len(mine)]
    low, high = bootstrap_ci(mine - theirs, np.mean)
    undecided = len(mine) < 3 or low <= 0 <= high
    verdict = "undecided" if undecided else "holds" if expected * low > 0 else "fails"
    latent = [v for c in cells for k, v in c["errors"].items() if k == "latent_nmse_16"]  # none with the base's model
    return dict(ablation=name, variant=variant, returns=mine.mean(1).tolist(), tasks=dict(zip(tasks, mine.mean(0))),
                difference=float((mine - theirs).mean()), ci95=[low, high], verdict=verdict if expected else "",
                latent=float(np.mean(latent)) if latent else None)


STIFFNESS = {"SHAC": dict(true_plant=True, horizon=32, rounds=4, policy_steps=120),
             "PWM": dict(rounds=30, wm_steps=4000, policy_steps=1080)}
STIFFNESS_FAST = dict(rounds=1, seed_episodes=1, round_episodes=1, wm_steps=2, wm_batch=4, policy_steps=2,
                      policy_batch=2, horizon=2, eval_episodes=1)


def stiffness(args, run, device_text):
    """Fig. 7a: SHAC through the true hopper and PWM through models of it, on soft and on five times stiffer contacts.
    All is trained anew on each."""
    began, n, rows = time.time(), args.seeds or 3, {}
    base = replace(args, ablation=None, seeds=None, resume=None)
    for method, flags in STIFFNESS.items():
        flags = flags | (STIFFNESS_FAST if args.fast else {})
        for task in ("planar-hopper", "stiff-hopper"):
            made = [run_cell(replace(base, task=task, seed=seed, **flags), run, f"{method}-{task}-{seed}")
                    for seed in range(args.seed, args.seed + n)]
            rows[f"{method}, {task}"] = dict(cells=made, returns=[c["returns"]["ours"][task] for c in made])
    drop = {m: 1 - np.mean(rows[f"{m}, stiff-hopper"]["returns"]) / np.mean(rows[f"{m}, planar-hopper"]["returns"])
            for m in STIFFNESS}
    print()
    for name, row in rows.items():
        print(f"{name:22}" + "".join(f"{x:9.0f}" for x in row["returns"])
              + f"{np.mean(row['returns']):11.0f} on average")
    checks = {f"three seeds or more: {n}": n >= 3,
              f"SHAC loses by stiff contacts (paper: 48 %): {drop['SHAC']:.1%}": drop["SHAC"] > 0.2,
              f"PWM does not: {drop['PWM']:.1%}": drop["PWM"] < 0.1}
    notes = ["a planar hopper with the contact springs of the paper's simulator and the masses of gymnasium's; no PPO"]
    return finish_toy(replace(args, task="stiffness"), run, device_text, began, checks, notes, dict(rows=rows))


def latency(args, run, device_text):
    """Milliseconds per action of an extracted policy and of TD-MPC2's planner, by model size, with untrained networks
    of MT30 (the time does not depend on weights)."""
    began, device, rows = time.time(), choose_device(args, 0)[0], {}
    for size in (1,) if args.fast else (1, 5, 48):
        cell = replace(args, ablation=None, model_size=size, prior=True, episodic=False)
        rows[size] = action_latency(Trainer(fill_budget(cell, device, len(MT30), 1), MT30, device), True)
        print(f"{size:3}M: policy {rows[size]['ours']:.2f} ms, planner {rows[size]['planner']:.0f} ms, "
              f"{rows[size]['planner'] / rows[size]['ours']:.0f} times", flush=True)
    result = dict(stamp(args, time.time() - began, device_text), ms_per_action=rows)
    write_text(run.dir / "results.json", json.dumps(result, indent=1))
    return result


# ------------------------------------------------------------------------------------------------------------- main
def main(args: Args, root="runs"):
    """Run everything in a folder below root; returns what results.json holds (None on the other ranks of torchrun)."""
    if args.resume:
        args = read_resume(args)
    if args.capture_video:
        choose_gl()  # now: mujoco looks at the choice once, and hours of training should not end without OpenGL
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun
    device, why = choose_device(args, rank)
    if args.task in TOY or args.ablation:
        return study(args)
    if args.seeds is not None:
        raise SystemExit(f"--seeds {args.seeds} counts the models of a toy or --ablation, not of --task {args.task}: "
                         "type --seed and run it once per seed")
    tasks = task_list(args.task)
    if args.episodic is None:  # tasks that may end are those without a published scale of returns
        own_scale = len(tasks) == 1 and score(tasks[0], 1.0, 0.0) == 1.0
        args = replace(args, episodic=own_scale and not (args.planner_episodes or args.prior))
    args = fill_budget(args, device, len(tasks), world)
    if world > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=2))
    wait = torch.distributed.barrier if world > 1 else lambda: None
    trainer = Trainer(args, tasks, device, world)
    args = trainer.args
    if args.eval_only:
        trainer.load_policies(args.checkpoint)

    run = Run(args.task, "pwm", args.seed, asdict(args), args.resume, root) if rank == 0 else None
    box = [run and str(run.dir)]
    if world > 1:
        torch.distributed.broadcast_object_list(box)
    episodes, own = (None, False) if args.eval_only else open_data(args, tasks, box[0], rank, wait)
    plan = [] if args.eval_only else make_plan(args, own, bool(args.checkpoint) or args.true_plant)
    total = {kind: sum(n for k, _, n in plan if k == kind) for kind in ("collect", "model", "policy", "evaluate")}
    episode = sum(f.episode_length for f in trainer.facts)  # agent steps of one episode of every task
    total["steps"] = episode * (total.pop("collect") + total.pop("evaluate")
                                + (2 + args.prior + args.episodic) * args.eval_episodes)
    progress = Progress(total | dict(planner=episode * args.planner_episodes))
    where = trainer.where
    if args.resume:
        file = Path(box[0]) / "checkpoint.pt"
        state = run.load(device=device) if rank == 0 else torch.load(file, device, weights_only=True)
        trainer.load_state(state)
        where = trainer.where
        progress.done |= state["done"]
        if own and rank == 0:
            episodes.truncate(state["counts"])
    if rank == 0:
        announce(trainer, own, plan, f"{device.type}: {why}", run.dir)
        progress.guess("steps", 1_000 * args.workers)
        progress.guess("planner", 1_000 if device.type == "cuda" else 5)  # until it has been seen at work
        for kind, seconds in zip(("model", "policy"), trainer.trial() if plan else ()):
            progress.guess(kind, 1 / seconds)
    if args.track and rank == 0:
        import wandb
        wandb.init(project="pwm", name=run.dir.name, config=asdict(args), sync_tensorboard=True)

    stop, clock = [], [time.time()]
    signal.signal(signal.SIGINT, lambda *_: stop.append(1) or signal.signal(signal.SIGINT, signal.default_int_handler))

    def save(stage, step):
        where.update(stage=stage, step=step, seconds=where["seconds"] + time.time() - clock[0])
        clock[0] = time.time()
        if trainer.windows and trainer.windows.pieces:
            trainer.windows.store(episodes)
        if rank == 0:
            run.save(dict(trainer.state(), counts=episodes.counts() if own else {}, done=progress.done))
        if stop:
            raise SystemExit(f"stopped; go on with: python {Path(sys.argv[0]).name} --resume {box[0]}")

    def log(numbers):
        run.log(progress.done["model"] + progress.done["policy"], numbers)

    sampler = None
    with Workers(args.workers) if rank == 0 else contextlib.nullcontext() as workers:
        for stage in range(where["stage"], len(plan)):
            kind, r, n = plan[stage]
            if kind == "collect":
                if rank == 0:
                    roll_out(trainer, workers, episodes, n, r, episode, progress, log)
                wait()
                sampler = None
            elif kind == "evaluate":
                if rank == 0:
                    evaluate_now(trainer, workers, progress, log)
            elif n and (kind == "model" or rank == 0):
                if sampler is None:
                    sampler = episodes.sampler(tasks, args.wm_horizon, device, trainer.wm.obs_dim,
                                               trainer.wm.act_mask.shape[1], args.held_out, ends=args.episodic)
                    if args.episodic and (kind == "model" or args.true_plant and not r):  # that has no such stage
                        set_scales(trainer.wm, episodes, tasks[0])
                trainer.wm.requires_grad_(kind == "model")  # frozen in extraction: no weight gradients are computed
                first, began = where["step"], time.time()
                for step in range(first, n):
                    if kind == "model":
                        calm = 1 - r / args.rounds if args.episodic and own else 1.0
                        metrics = trainer.update_model(sampler, step / n, rank, world, calm)
                    else:
                        metrics = trainer.update_policies(sampler, where["policy_updates"] / total["policy"])
                        where["policy_updates"] += 1
                    if (step + 1) % 50 == 0 or step + 1 == n:
                        numbers = read_metrics(metrics, kind, world)
                        if not np.isfinite(list(numbers.values())).all():
                            raise SystemExit(f"update {step} of {kind}, round {r}, is not finite: {numbers}; the last "
                                             f"checkpoint is in {box[0]}: try a smaller --wm-lr or --policy-lr")
                        if rank == 0:
                            progress.add(kind, step + 1 - first, time.time() - began)
                            first, began = step + 1, time.time()
                            log({f"losses/{kind}/{k}": v for k, v in numbers.items()}
                                | {"charts/UPS": progress.rate(kind)})
                            shown = ", ".join(f"{k} {v:.3g}" for k, v in numbers.items())
                            progress.line(f"round {r}: {kind} {step + 1}/{n}, {progress.rate(kind):.1f}/s, {shown}",
                                          step + 1 == n)
                    if stop or time.time() - clock[0] > args.save_every:
                        progress.add(kind, step + 1 - first, time.time() - began)
                        first, began = step + 1, time.time()
                        save(stage, step + 1)
                if kind == "model" and rank == 0:
                    check_model(trainer, episodes, r, log)
            save(stage + 1, 0)
            where["step"] = 0
        if world > 1:
            torch.distributed.destroy_process_group()  # its threads would abort a process that ends with them
        if rank:
            return None
        columns, latency = evaluate(workers, trainer, progress)
    result = report(run, trainer, columns, latency, where["seconds"] + time.time() - clock[0], f"{device.type}: {why}")
    log({f"eval/{t}/{k}": float(np.mean(v)) for t in tasks for k, v in columns["ours"][t].items()})
    if args.capture_video:
        better = "best round" in columns and result["summary"]["best round"]["mean"] > result["summary"]["ours"]["mean"]
        record(run, tasks, functools.partial(trainer.policy, best=better), args.seed)
    run.close()
    return result


def study(args):
    """A task of TOY, minutes on the CPU, so that it starts again rather than resumes; or --ablation, whose finished
    trainings are kept."""
    if args.task in TOY and (args.resume or args.checkpoint or args.ablation):
        raise SystemExit(f"--task {args.task} is a study of minutes: start it again without --resume, --checkpoint and "
                         "--ablation")
    if args.ablation and args.checkpoint:
        raise SystemExit("--ablation trains its own world models: leave --checkpoint out")
    if args.ablation and args.task == Args.task:
        args = replace(args, task=ABLATION_TASKS)
    studies = {"ball-wall": ball_wall, "double-pendulum": double_pendulum, "stiffness": stiffness, "latency": latency}
    run = Run(args.ablation or args.task, "pwm", args.seed, asdict(args), args.resume)
    result = studies.get(args.ablation or args.task, ablations)(args, run, f"cpu: {torch.get_num_threads()} threads")
    run.close()
    return result


def read_metrics(metrics, kind, world):
    """0-d tensors -> floats, the model's averaged over ranks. The only place in training that waits for a GPU."""
    values = torch.stack([v.float() for v in metrics.values()])
    if world > 1 and kind == "model":
        torch.distributed.all_reduce(values)
        values /= world
    return dict(zip(metrics, values.tolist()))


def set_scales(wm, episodes, task, most=1000):
    """The scales of rewards and observations: deviation of all rewards of a task, and mean and deviation of the
    observations of `most` pieces at equal distances."""
    arrays = episodes.arrays(task)
    length = np.asarray(arrays["length"])
    real = np.arange(arrays["rew"].shape[1]) < length[:, None]
    wm.rew_std.fill_(max(float(np.asarray(arrays["rew"])[real].std(dtype=np.float64)), 1e-3))
    if not isinstance(wm, TruePlant):  # which scales them itself
        pick = np.unique(np.linspace(0, len(length) - 1, most).astype(int))
        seen = np.concatenate([arrays["obs"][i, :length[i]] for i in pick])
        wm.obs_mean.copy_(torch.from_numpy(seen.mean(0)))
        wm.obs_std.copy_(torch.from_numpy(seen.std(0)).clamp(min=1e-3))


def roll_out(trainer, workers, episodes, n, r, episode, progress, log):
    """The collect stage: play, store, log the mean return of every task."""
    began, tasks = time.time(), trainer.tasks

    def note(done, total):
        progress.line(f"round {r}: rolling out: {done:,}/{total:,} agent steps")
    played = collect(workers, tasks, n, r, trainer.args, trainer.policy, note)
    returns = {}
    for t in tasks:
        mine = [e for e in played if e["task"] == t]
        if trainer.args.episodic:
            episodes.append(t, *zip(*(piece for e in mine for piece in pieces(e))))
        else:
            episodes.append(t, *([e[x] for e in mine] for x in ("obs", "act", "rew", "term")))
        returns[t] = float(np.mean([e["ret"] for e in (mine[::2] if trainer.args.episodic and r else mine)]))
    mean = float(np.mean(list(returns.values())))
    trainer.history.append({"round": r, "seconds": trainer.where["seconds"], "return": returns})
    if trainer.args.episodic and r and mean > trainer.where["best"]:
        trainer.where["best"] = mean
        trainer.nets["best"].load_state_dict({k: v for k, v in trainer.nets.state_dict().items()
                                              if k.startswith(("wm.", "actors."))})
    if trainer.args.episodic:  # the return is of undisturbed episodes
        length = [len(e["rew"]) for e in played]
        trainer.history[-1] |= {"steps": sum(length), "length": float(np.mean(length)),
                                "window_steps": trainer.windows.steps if trainer.windows else 0}  # in all so far
        progress.line(f"round {r}: {len(played)} episodes of {np.mean(length):.0f} steps on average", True)
        if np.mean(length) < trainer.args.horizon and trainer.windows:
            print(f"round {r}: nearly all imagined windows of {trainer.args.horizon} steps end, and only those that go "
                  f"on teach what an end costs: try --horizon {max(1, round(np.mean(length) / 2))}")
    log({f"rollout/{t}/return": v for t, v in returns.items()} | {"charts/episodic_return": mean})
    progress.add("steps", n * episode, time.time() - began)
    progress.line(f"round {r}: {n} episodes per task, mean return {mean:.1f}", True)


def check_model(trainer, episodes, r, log):
    """Held-out open-loop error after a model stage: a world model is not trusted unseen."""
    wm, a = trainer.wm, trainer.args
    test = episodes.sampler(trainer.tasks, a.horizon, trainer.device, wm.obs_dim, wm.act_mask.shape[1], a.held_out,
                            ends=a.episodic)
    batch = test.sequences(512, torch.Generator(trainer.device).manual_seed(0), held_out=True)
    errors = {k: float(v) for k, v in open_loop_error(wm, batch, trainer.rows, (1, 4, a.horizon)).items()}
    trainer.history.append({"round": r, **errors})
    log({f"eval/{k}": v for k, v in errors.items()})
    print(f"round {r}: held-out open-loop error (1 = predicting the mean): "
          + ", ".join(f"{k} {v:.3f}" for k, v in errors.items()), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
