"""TD-MPC2 as a baseline on PWM's own world model and data (Hansen et al., arXiv 2310.16828).

Does planning on the same model beat the policies that PWM extracts from it? TD-MPC2's Q functions
train with the model (their loss shapes its latents), its policy prior beside it; prior and MPPI
planner are then evaluated beside PWM's policies, in the same table.

    python -m studies.tdmpc2 --task cup-catch            # a world model with Q, planner beside PWM
    python -m studies.tdmpc2 --task mt30 --checkpoint mt30-48M.pt --data-dir data/mt30
    python -m studies.tdmpc2 --fast                      # under a minute

On a core the planner takes hundreds of times longer per action than a policy (studies.latency), so
that it plays few episodes. Verdict: PWM holds its own if its mean return over tasks is at least the
planner's (Fig. 6 says 27 per cent above); with one seed this is no proof.
"""
import copy
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import pwm
from pwm import BINS, NormedLinear, StackedMLP, init_trunc_normal, two_hot_inv, two_hot_loss
from studies.common import StudyArgs, command, judge


@dataclass
class Args(StudyArgs):
    task: str = "cup-catch"
    """as pwm.py --task, but none that ends"""
    checkpoint: str | None = None
    """published TD-MPC2 agent, or checkpoint.pt of such a run: nothing of the model is trained"""
    data_dir: str | None = None
    """as pwm.py --data-dir"""
    planner_episodes: int = 2
    """episodes per task of the planner"""
    model_size: int | None = None
    """as pwm.py --model-size"""


class StackedQ(StackedMLP):
    """Blocks are Linear -> Dropout (first layer only) -> LayerNorm -> Mish."""

    def block(self, x, k):
        x = F.dropout(x, 0.01, self.training and k == 0)
        return pwm.mish(self.norm(x, k))


class Heads(nn.Module):
    """TD-MPC2's policy prior pi([z; e]) and Q ensemble Q_i([z; e; a]) on a WorldModel."""

    def __init__(self, wm, hidden, num_q):
        super().__init__()
        self.wm = [wm]  # in a list: not a sub-module, its parameters are counted and saved once
        A = wm.act_mask.shape[1]
        i = wm.latent + wm.task_dim
        layers = [NormedLinear(a, b, pwm.mish) for a, b in ((i, hidden), (hidden, hidden))]
        self.pi = nn.Sequential(*layers, nn.Linear(hidden, 2 * A))
        self.pi.apply(init_trunc_normal)
        self.q = StackedQ(num_q, (i + A, hidden, hidden, BINS), init_normal)
        nn.init.zeros_(self.q.weight[-1])  # Q = 0 at the start
        self.q_target = copy.deepcopy(self.q).requires_grad_(False).eval()
        self.register_buffer("scale", torch.ones(()))  # running P95 - P5 of Q

    def policy(self, z, task, eps):
        """z (.., B, L), eps (.., B, A) -> act (.., B, A), and its log-probability scaled by the
        task's action dimension (.., B)."""
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
        """`reduce` over the two Q functions numbered by pair (2,), decoded from bins: (.., B)"""
        logits = self.q_logits(net, z, act, task).index_select(0, pair)
        return reduce(two_hot_inv(logits), 0)


def init_normal(i, j):
    return nn.init.trunc_normal_(torch.empty(i, j), std=0.02), torch.zeros(j)


def value_loss(heads, z, next_z, act, rew, task, discount, rho, noise, pair):
    """TD-MPC2's Q loss on the model's roll-out: cross-entropy to r + gamma min_2 Q_slow(z',
    pi(z')).

    z (H, B, L) with gradient, next_z (H, B, L) encoded, discount (B,), noise (H, B, A), pair (2,).
    """
    with torch.no_grad():
        a, _ = heads.policy(next_z, task, noise)
        value = heads.q_value(heads.q_target, next_z, a, task, pair, torch.amin)
        target = rew + discount * value  # (H, B)
    logits = heads.q_logits(heads.q, z, act, task)  # (E, H, B, 101)
    weight = rho ** torch.arange(len(rew), device=z.device)
    return (weight[:, None] * two_hot_loss(logits, target.expand(len(logits), -1, -1))).mean()


def prior_loss(heads, z, task, rho, noise, pair):
    """TD-MPC2's policy loss over all H+1 detached latents: entropy weight 1e-4, Q divided by its
    running scale."""
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
def plan(wm, heads, z, task, mean, discount, generator, horizon=3, samples=512, priors=24,
         elites=64, iterations=6, temperature=0.5, min_std=0.05, max_std=2.0):
    """MPPI in latent space: z (B, L), task (B,), mean (B, 3, A) of the last step, shifted.

    24 action sequences come from the policy prior, the rest from a Gaussian that is refitted to the
    64 best, six times. Returns act (B, A) and the mean.
    """
    B, A = mean.shape[0], mean.shape[2]
    rand = functools.partial(torch.randn, generator=generator, device=z.device)
    mask = wm.act_mask[task][:, None, None]  # (B, 1, 1, A)

    def spread(n):
        return z[:, None].expand(-1, n, -1).flatten(0, 1), task.repeat_interleave(n)

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
            value = value + g * wm.reward_value(wm.reward(zs, a, ts))
            zs, g = wm.next(zs, a, ts), g * discount.repeat_interleave(samples)
        a, _ = heads.policy(zs, ts, rand(len(zs), A))
        value = value + g * heads.q_value(heads.q, zs, a, ts, pair, torch.mean)
        best, index = value.view(B, samples).topk(elites, 1)
        elite = act.gather(1, index[..., None, None].expand(-1, -1, horizon, A))  # (B, E, 3, A)
        weight = (temperature * (best - best[:, :1])).exp()
        weight = weight / (weight.sum(1, keepdim=True) + 1e-9)
        w = weight[..., None, None]
        mean = (w * elite).sum(1) * mask[:, 0]
        var = (w * (elite - mean[:, None]).square()).sum(1)
        std = (var + 1e-9).sqrt().clamp(min_std, max_std) * mask[:, 0]
    pick = torch.multinomial(weight, 1, generator=generator)[..., None, None]
    return elite.gather(1, pick.expand(-1, -1, horizon, A))[:, 0, 0], mean


FIELDS = "weight", "bias", "ln.weight", "ln.bias"  # of a layer in published files, in this order


def read_q(file):
    """{(layer, field): (E, ..)} of a published Q ensemble; old files number the ten tensors, new
    ones name them."""
    layers = {}
    for key, x in file.items():
        if torch.is_tensor(x) and key.startswith("_Qs.params."):
            name = key.removeprefix("_Qs.params.")
            layer, _, field = name.partition(".")
            if name.isdigit():
                layer, field = int(name) // 4, FIELDS[int(name) % 4]
            layers[int(layer), field] = x
    return layers


def load_tdmpc2(wm, path):
    """The Heads stored beside a world model: TD-MPC2's two Q layouts, or our own checkpoint.

    SystemExit: the file has none (PWM's agents do not), so there is nothing for the planner to use.
    """
    file = data.safe_load(path)
    if "tdmpc2" in file:
        heads = Heads(wm, *(file["tdmpc2"]["q.weight.1"].shape[k] for k in (1, 0)))
        heads.load_state_dict(file["tdmpc2"])
        return heads
    file = file.get("model", file)
    pi, layers = pwm.read_layers(file, "_pi"), read_q(file)
    if not pi or (2, "weight") not in layers:
        raise SystemExit(f"{path} has no policy prior and Q functions (_pi.*, _Qs.params.*): leave "
                         "--checkpoint out, and they are trained with the world model")
    heads = Heads(wm, layers[0, "bias"].shape[1], layers[0, "bias"].shape[0])
    weights = {f"{i}.{field}": x for i, layer in enumerate(pi) for field, x in layer.items()}
    heads.pi.load_state_dict(weights)
    state = {}
    for k in range(3):
        state[f"weight.{k}"] = layers[k, "weight"].transpose(1, 2)
        state[f"bias.{k}"] = layers[k, "bias"][:, None]
        if k < 2:
            state[f"gain.{k}"] = layers[k, "ln.weight"][:, None]
            state[f"shift.{k}"] = layers[k, "ln.bias"][:, None]
    heads.q.load_state_dict(state)
    heads.q_target.load_state_dict(state)  # some published files lack their targets
    return heads


class Agent(pwm.Agent):
    """PWM's with TD-MPC2's Q functions and prior, which train with the world model."""

    planner_episodes = 0  # per task; 0: only the prior is evaluated
    search = {}  # settings of `plan` that are not its defaults

    def __init__(self, args, tasks, device, world=1):
        if world > 1:
            raise SystemExit("TD-MPC2 trains on one process: start it without torchrun")
        super().__init__(args, tasks, device, world)
        lengths = torch.full((len(self.wm.act_dims),), 500)  # of every row of the model's table
        lengths[self.rows.cpu()] = torch.tensor([f.episode_length for f in self.facts])
        discounts = [task_discount(n) for n in lengths.tolist()]
        self.discount = torch.tensor(discounts, device=device)
        self.model_loss = self.functions.world_model_loss
        self.functions.world_model_loss = self.loss

    def networks(self):
        nets = super().networks()
        if self.args.ends:
            raise SystemExit("TD-MPC2's rewards and values come in 101 classes, and a task that "
                             "ends has a scalar head: name a task that does not")
        if self.args.checkpoint:
            self.heads = load_tdmpc2(self.wm, self.args.checkpoint)
        else:
            sizes = pwm.SIZES[self.args.model_size]
            self.heads = Heads(self.wm, sizes[2], sizes[4])
        return nets | dict(tdmpc2=self.heads)

    def optimizers(self):
        opts = super().optimizers()
        opts["model"].param_groups[1]["params"] += list(self.heads.q.parameters())
        opts["prior"] = torch.optim.Adam(self.heads.pi.parameters(), self.args.wm_lr, eps=1e-5,
                                         fused=True)
        return opts

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.rng["model"], device=self.device)

    def loss(self, batch, rho):
        """Eq. (10) and, in the same step, 0.1 times the Q loss."""
        loss, metrics, z = self.model_loss(batch, rho)
        obs, act, rew, *_, task = batch
        self.pair = torch.randperm(len(self.heads.q.weight[0]), generator=self.rng["model"],
                                   device=self.device)[:2]
        with torch.no_grad():
            next_z = self.wm.encode(obs[1:], task)
        value = value_loss(self.heads, z[:-1], next_z, act, rew, task, self.discount[task], rho,
                           self.randn(*act.shape), self.pair)
        metrics["value"] = value.detach()
        return loss + 0.1 * value, metrics, z

    def after_model_step(self, z, batch, metrics):
        """One step of the prior, and of the slow copy of Q."""
        super().after_model_step(z, batch, metrics)
        heads, opt = self.heads, self.opt["prior"]
        noise = self.randn(len(z), *batch.act.shape[1:])
        prior = prior_loss(heads, z.detach(), batch.task, pwm.RHO, noise, self.pair)
        opt.zero_grad(set_to_none=True)
        prior.backward(inputs=list(heads.pi.parameters()))  # Q is not trained by the policy
        nn.utils.clip_grad_norm_(heads.pi.parameters(), 20.0)
        opt.step()
        metrics["prior"] = prior.detach()
        with torch.no_grad():
            for slow, fast in zip(heads.q_target.parameters(), heads.q.parameters()):
                slow.lerp_(fast, 0.01)

    def encoded(self, obs, task):
        row = self.rows[torch.as_tensor(task, device=self.device)]
        return self.wm.encode(pwm.pad(obs, self.wm.obs_dim, self.device), row), row

    def contestants(self):
        A = max(f.act_dim for f in self.facts)

        @torch.no_grad()
        def prior(obs, task, *_):
            z, row = self.encoded(obs, task)
            eps = z.new_zeros(len(z), self.wm.act_mask.shape[1])
            return self.heads.policy(z, row, eps)[0][:, :A].cpu().numpy()

        out = super().contestants() | {"prior": (prior, self.args.eval_episodes)}
        if self.planner_episodes:
            out["planner"] = self.planner(A), self.planner_episodes
        return out

    def planner(self, A):
        """Closed-loop MPPI; every episode's plan is shifted by a step and taken up in the next."""
        self.heads.eval()  # no dropout
        gen = torch.Generator(self.device).manual_seed(self.args.seed)
        means = torch.zeros(len(self.tasks) * self.planner_episodes, 3, self.wm.act_mask.shape[1],
                            device=self.device)

        @torch.no_grad()
        def act(obs, task, job, t):
            job = torch.as_tensor(job, device=self.device)
            z, row = self.encoded(obs, task)
            means[job[torch.as_tensor(t, device=self.device) == 0]] = 0
            a, mean = plan(self.wm, self.heads, z, row, means[job], self.discount[row], gen,
                           **self.search)
            means[job] = F.pad(mean[:, 1:], (0, 0, 0, 1))
            return a[:, :A].cpu().numpy()
        return act


class PlanningAgent(Agent):
    planner_episodes = 2


class HastyAgent(Agent):
    planner_episodes, search = 1, dict(samples=32, priors=8, elites=8, iterations=1)


FAST = dict(wm_steps=6, wm_batch=8, policy_steps=2, rounds=1, seed_episodes=2, eval_episodes=1)


def main(args):
    """Train (or load), extract, evaluate; returns what results.json holds."""
    data.check_ranges(args, dict(planner_episodes=(1, None)))
    PlanningAgent.planner_episodes = args.planner_episodes
    names = ("seed device compile workers save_every track task checkpoint data_dir model_size "
             "fast").split()
    settings = dict({name: getattr(args, name) for name in names}, ends=False)
    if args.fast:
        skipped = ("wm_steps", "wm_batch") if args.checkpoint else ()
        settings |= {k: v for k, v in FAST.items() if k not in skipped}
    if args.resume:  # with the flags of its beginning
        settings = dict(resume=args.resume)
    agent = HastyAgent if args.fast else PlanningAgent
    result = pwm.main(pwm.Args(**settings), make_agent=agent)
    mean = {name: x["mean"] for name, x in result["summary"].items()}
    sentence = f"PWM's {mean['ours']:.0f} is at least the planner's {mean['planner']:.0f}"
    return result | dict(verdict=judge({sentence: mean["ours"] >= mean["planner"]}))


if __name__ == "__main__":
    command(Args, __doc__, main)
