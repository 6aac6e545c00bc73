import itertools
import tempfile

from t_head import *  # noqa: F401,F403

# ------------------------------------------------------------------------------------------ ed2.py
# Two carts: actions 0 and 1 pull the first, 2 the second. A file: roll-outs import it elsewhere.
TUG = """
import gymnasium
import numpy as np


class Tug(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-99, 99, (4,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.s = self.np_random.normal(size=4).astype(np.float32)
        return self.s.copy(), {}

    def step(self, a):
        v = 0.8 * self.s[2:] + 0.2 * np.array([a[0] + a[1], 2 * a[2]], np.float32)
        self.s = np.concatenate([0.95 * self.s[:2] + 0.1 * v, v]).astype(np.float32)
        return self.s.copy(), float(np.exp(-np.abs(self.s[:2]).sum())), False, False, {}


gymnasium.register("Tug-v0", entry_point=Tug, max_episode_steps=64)
"""
TUG_TASK, TUG_GROUPS = "tug:Tug-v0", [[0, 1], [2]]
WALKER, CHEETAH, HOPPER, HUMANOID = (
    ed2.PUBLISHED[x] for x in ("walker", "cheetah", "hopper", "humanoid"))


def ed2_args(**settings):
    """Flags of a run on the two carts that takes seconds."""
    wm = settings.get("wm", "tdmpc2")
    tiny = dict(length=3, model_size="1M") if wm == "tdmpc2" else dict(length=10, model_size="1m")
    tiny |= dict(task=TUG_TASK, device="cpu", compile=False, workers=1, seeds=1, updates=12)
    made = {} if "data_dir" in settings else dict(data_steps=1)
    return ed2.Args(**tiny | dict(batch=4, lr=1e-3) | made | settings)


def ed2_run(args, made):
    """The folder of a run that has not begun, with `made` in place of data that it would make."""
    run = Run("ed2", args)
    run.close()
    (run.dir / "data").mkdir()
    (run.dir / "data" / args.task).symlink_to(made)
    return run.dir


def ed2_train(model, sampler, args, seed=0, encoder=None, folder=None):
    """ed2.train in a folder that is forgotten, or kept for a resume."""
    with tempfile.TemporaryDirectory() as other:
        run = Run("ed2", args, inside=folder or other)
        loss = ed2.train(run, model, sampler, args, seed, encoder)
        run.close()
    return loss


@pytest.fixture(scope="module")
def tug(tmp_path_factory):
    """The two carts can be imported, and this folder has their data, made in spite of a kill."""
    folder = tmp_path_factory.mktemp("tug")
    (folder / "tug.py").write_text(TUG)
    with pytest.MonkeyPatch.context() as m:
        m.syspath_prepend(str(folder))
        with pytest.MonkeyPatch.context() as inner:  # killed between random data and search
            def stop(*a, **k):
                raise KeyboardInterrupt
            inner.setattr(ed2, "search", stop)
            with pytest.raises(KeyboardInterrupt):
                ed2.make_data(TUG_TASK, folder / "data", 3000, 1)
        ed2.make_data(TUG_TASK, folder / "data", 3000, 1)
        yield folder / "data"


def suite_episodes(task, n, folder):
    """n episodes of random actions, in the layout of ed2.make_data, random and replay alike."""
    env, rng = envs.make_env(task), np.random.default_rng(0)
    O, A, T = envs.task_facts(task)[:3]
    eps = Episodes.create(folder / "random", {task: (O, A, T)})
    for seed in range(n):
        obs, rew = [env.reset(seed=seed)[0]], []
        act = rng.uniform(-1, 1, (T, A)).astype(np.float32)
        for a in act:
            o, r, _, _, _ = env.step(a)
            obs.append(o)
            rew.append(r)
        eps.append(task, np.stack(obs), act, np.array(rew, np.float32), np.zeros(T, bool))
    env.close()
    (folder / "replay").symlink_to(folder / "random")
    notes = {"random_return": 0.0, "returns": [[0.0, 0.0]]}
    (folder / "data.json").write_text(json.dumps(notes))
    return folder


@pytest.fixture(scope="module")
def cheetah(tmp_path_factory):
    return suite_episodes("cheetah-run", 10, tmp_path_factory.mktemp("cheetah"))


# ------------------------------------------------------------------------------------------ SD2
def slow_agglomerate(sim, eta):
    """Pairs word for word: mean similarity inside the pair minus mean similarity to all else."""
    m = len(sim)
    groups = [(i,) for i in range(m)]
    while len(groups) > 1:
        best = None
        for P, Q in itertools.combinations(groups, 2):
            inside = [sim[i][j] for i in P for j in Q]
            outside = [sim[i][j] for X, Y in ((P, Q), (Q, P)) for i in X for j in range(m)
                       if j not in Y]
            score = sum(inside) / len(inside) - sum(outside) / len(outside)
            if best is None or score > best[0] + 1e-10:
                best = score, P, Q
        if best[0] <= eta:
            break
        merged = tuple(sorted(best[1] + best[2]))
        groups = sorted([g for g in groups if g not in best[1:]] + [merged])
    return [list(g) for g in groups]


def test_ed2_merging_against_a_slow_reference():
    rng, sizes = np.random.default_rng(0), set()
    for trial in range(60):
        m, n = int(rng.integers(1, 10)), int(rng.integers(1, 6))
        features = rng.random((m, n)) ** 4
        sim, eta = ed2.cosine(features), (0.0, -0.12, 0.1)[trial % 3]
        norm = np.linalg.norm(features, axis=1)
        assert np.allclose(sim, features @ features.T / norm[:, None] / norm)
        groups, log = ed2.agglomerate(sim, eta)
        assert groups == slow_agglomerate(sim, eta)
        assert sorted(sum(groups, [])) == list(range(m))
        assert all(x["done"] == (x["score"] > eta) for x in log)
        assert all(x["done"] for x in log[:-1])
        assert len(groups) == m - sum(x["done"] for x in log)
        assert ed2.agglomerate(sim, 2.0)[0] == [[i] for i in range(m)]
        assert len(ed2.agglomerate(sim, -2.0)[0]) == 1
        sizes.add(len(groups))
    assert len(sizes) > 3


def test_ed2_features_are_absolute_correlations():
    rng = np.random.default_rng(0)
    act, delta = rng.uniform(-1, 1, (500, 4)), rng.normal(size=(500, 6)) + 1e4
    delta[:, 1] -= act[:, 0]
    delta[:, 2], act[:, 3] = 7.0, 0.5  # a state that never changes, an actuator that never moves
    F_ = ed2.pearson_features(act, delta)
    assert F_.shape == (4, 5) and (F_[3] == 0).all()
    for i, (d, column) in itertools.product(range(3), enumerate((0, 1, 3, 4, 5))):
        want = abs(np.corrcoef(act[:, i], delta[:, column])[0, 1])
        assert F_[i, d] == pytest.approx(want, abs=1e-9)
    assert F_[0, 1] > 0.3


def test_ed2_edges_of_discovery():
    rng = np.random.default_rng(1)
    act = rng.uniform(-1, 1, (400, 3))
    delta = np.c_[act[:, 0] + act[:, 1], rng.normal(size=400) + 0.5 * act[:, 2], np.full(400, 3.0)]
    assert ed2.discover(act, delta) == [[0, 1], [2]]
    act[:, 2] = 0.1
    assert ed2.discover(act, delta) == [[0, 1], [2]]  # an inert one is a group of its own
    assert ed2.discover(act, np.ones((400, 2))) == [[0], [1], [2]]  # nothing moves
    assert ed2.discover(act[:, :1], delta) == [[0]]
    assert ed2.discover(act[:, :2], delta) == [[0], [1]]  # two actions never merge
    assert ed2.agglomerate(np.ones((2, 2)))[1][0]["score"] == 0
    same = np.eye(4)
    same[0, 1] = same[1, 0] = same[2, 3] = same[3, 2] = 0.5
    groups, log = ed2.agglomerate(same)
    assert groups == [[0, 1], [2, 3]] and log[0]["merge"] == [[0], [1]]  # ties: the lowest first
    bad = delta.copy()
    bad[3, 0] = np.nan
    for x, y in ((act, bad), (act[:-1], delta), (act[:1], delta[:1]), (act * np.inf, delta)):
        with says("discover got actions", "all finite"):
            ed2.discover(x, y)


@pytest.mark.parametrize("task", ["cheetah-run", "hopper-hop"])
def test_ed2_published_groups_from_5000_random_steps(task, tmp_path, request):
    here = task == "cheetah-run"
    folder = request.getfixturevalue("cheetah") if here else suite_episodes(task, 10, tmp_path)
    random = Episodes.open(folder / "random", [task])
    assert len(ed2.transitions(random, task)[0]) == 5000
    known = ed2.PUBLISHED[task.split("-")[0]]
    groups, log = ed2.find_partition("sd2", task, random)
    assert groups == known and log[-1]["done"] is False
    assert len(log) == 1 + sum(len(g) - 1 for g in known)
    _, act, delta = ed2.transitions(random, task, n=2500, seed=3)
    assert ed2.discover(act, delta) == known
    every = list(range(act.shape[1]))
    for name, want in (("published", known), ("full", [[j] for j in every]), ("none", [every])):
        assert ed2.find_partition(name, task, random) == (want, [])


def test_ed2_walker_has_some_partition(tmp_path):
    """Its deciding score is near 0, so draws differ: the ankles, 2 and 5, stay alone in all."""
    random = Episodes.open(suite_episodes("walker-walk", 3, tmp_path) / "random")
    groups, log = ed2.find_partition("sd2", "walker-walk", random)
    assert sorted(sum(groups, [])) == list(range(6)) and 3 <= len(groups) <= 5
    assert [2] in groups and [5] in groups and all(np.isfinite(x["score"]) for x in log)


def test_ed2_transitions_stay_inside_episodes(tmp_path):
    eps = Episodes.create(tmp_path, {"a": (3, 2, 12)})
    for e, t in enumerate((12, 5, 7)):
        obs = 100 * e + np.arange(t + 1)[:, None] + np.zeros(3)
        eps.append("a", obs, obs[:-1, :2] + 0.5, np.zeros(t), np.zeros(t, bool))
    obs, act, delta = ed2.transitions(eps, "a")
    assert len(obs) == len(act) == 24
    assert (delta == 1).all() and (act[:, 0] - obs[:, 0] == 0.5).all()
    few = ed2.transitions(eps, "a", n=7, seed=1)
    assert few[0].shape == (7, 3)
    assert np.array_equal(few[0], ed2.transitions(eps, "a", n=7, seed=1)[0])


def test_ed2_published_tables():
    sizes = {k: sorted(sum(v, [])) for k, v in ed2.PUBLISHED.items()}
    assert sizes == {k: list(range(n)) for k, n in dict(
        walker=6, cheetah=6, hopper=4, reacher=2, finger=2, humanoid=21).items()}
    assert ed2.assignment(HOPPER, 4).tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]


# ------------------------------------------------------------------ decomposed TD-MPC2 dynamics
def any_dynamics(groups, kind=ed2.Dynamics):
    """Dynamics whose biases and gains matter."""
    torch.manual_seed(0)
    d = kind(16, sum(map(len, groups)), 8, groups)
    for p in d.parameters():
        p.data += 0.4 * torch.randn_like(p)
    return d


def slow_norm(x, gain, shift):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    return x * gain + shift


def slow_dynamics(d, z, act, groups):
    """One trunk after the other, each with its own actions only; with one head, or a head each."""
    def mish(x):
        return x * torch.tanh(x.exp().log1p())

    def head(x, i):
        x = x @ d.head.weight[i] + d.head.bias[i, 0]
        x = slow_norm(x, d.head.gain[i, 0], d.head.shift[i, 0])
        return torch.cat([part.softmax(1) for part in x.split(8, 1)], 1)

    hidden, w = [], d.width
    for i, g in enumerate(groups):
        own = slice(i * w, (i + 1) * w)
        w_in = torch.cat([d.w_z[:, own], d.w_a[g][:, own]])
        x = torch.cat([z, act[:, g]], 1) @ w_in + d.bias[own]
        x = mish(slow_norm(x, d.gain[i], d.shift[i])) @ d.second.weight[i] + d.second.bias[i, 0]
        hidden.append(mish(slow_norm(x, d.second.gain[i, 0], d.second.shift[i, 0])))
    if len(d.head.weight) == 1:
        return head(sum(hidden) / len(groups), 0)
    return sum(head(x, i) for i, x in enumerate(hidden)) / len(groups)


@pytest.mark.parametrize("groups", [WALKER, [[0, 1, 2]], [[2], [0], [1, 3]]])
def test_ed2_batched_trunks_are_the_looped_ones(groups):
    d, A = any_dynamics(groups), sum(map(len, groups))
    z, act = torch.randn(7, 16), torch.randn(7, A)
    got = d(z, act)
    assert torch.allclose(got, slow_dynamics(d, z, act, groups), atol=1e-5)
    assert torch.allclose(got.unflatten(1, (2, 8)).sum(2), torch.ones(7, 2), atol=1e-5)
    assert got.std() > 0.02


def test_ed2_one_group_is_the_plain_network():
    d = any_dynamics([[0, 1, 2]])
    mlp = nn.Sequential(ed2.NormedLinear(19, 8), ed2.NormedLinear(8, 8),
                        ed2.NormedLinear(8, 16, ed2.simnorm))
    weights = [torch.cat([d.w_z, d.w_a]), d.second.weight[0], d.head.weight[0]]
    rest = [(d.bias, d.gain[0], d.shift[0])]
    rest += [(m.bias[0, 0], m.gain[0, 0], m.shift[0, 0]) for m in (d.second, d.head)]
    for layer, w, (bias, gain, shift) in zip(mlp, weights, rest):
        layer.load_state_dict(
            {"weight": w.T, "bias": bias, "ln.weight": gain, "ln.bias": shift})
    z, act = torch.randn(9, 16), torch.randn(9, 3)
    assert torch.allclose(d(z, act), mlp(torch.cat([z, act], 1)), atol=1e-5)
    assert sum(p.numel() for p in d.parameters()) == sum(p.numel() for p in mlp.parameters())


def test_ed2_a_trunk_sees_its_own_actions_only(monkeypatch):
    d = any_dynamics(WALKER)
    masked = (1 - d.assign).bool().repeat_interleave(d.width, 1)
    z, act = torch.randn(5, 16), torch.randn(5, 6)
    before = d.trunks(z, act)
    for j in range(6):
        other = act.clone()
        other[:, j] = -3.0
        same = [torch.equal(x, y) for x, y in zip(before, d.trunks(z, other))]
        assert same == [j not in g for g in WALKER]
    start = copy.deepcopy(d.state_dict())
    opt = torch.optim.Adam(d.parameters(), 1e-2)
    for _ in range(5):
        opt.zero_grad()
        d(z, act).square().sum().backward()
        assert (d.w_a.grad[masked] == 0).all() and (d.w_a.grad[~masked] != 0).all()
        opt.step()
    assert torch.equal(d.w_a[masked], start["w_a"][masked])
    assert (d.w_a[~masked] != start["w_a"][~masked]).all()
    used = sum(p.numel() for p in d.parameters()) - int(masked.sum())
    monkeypatch.setitem(ed2.TDMPC2_SIZES, "tiny", (16, 8))
    assert used == ed2.counter("tdmpc2", "tiny")[0](WALKER, d.width)


@pytest.mark.parametrize("wm, size, widths, tolerance, unmatched", [
    ("tdmpc2", "5M", (272, 224, 272, 136), 0.04, None),
    ("tdmpc2", "1M", (216, 184, 216, 120), 0.04, None),
    ("dreamerv3", "1m", (168, 128, 168, 64), 0.05, (2.7, 3.5, 2.7, 6.9)),
    ("dreamerv3", "12m", (680, 512, 680, 256), 0.05, (2.7, 3.5, 2.7, 6.9))])
def test_ed2_matched_widths(wm, size, widths, tolerance, unmatched):
    args, (count, full) = ed2.Args(wm=wm, model_size=size), ed2.counter(wm, size)
    for i, groups in enumerate((WALKER, CHEETAH, HOPPER, HUMANOID)):
        every = [list(range(sum(map(len, groups))))]
        assert ed2.plan(args, groups) == {"single": (every, full), "ed2": (groups, widths[i])}
        assert ed2.plan(args, every) == {"single": (every, full)}
        single = count(every, full)
        assert abs(count(groups, widths[i]) / single - 1) < tolerance
        assert not unmatched or count(groups, full) / single == pytest.approx(unmatched[i], abs=.06)
    assert size != "5M" or 790_000 < single < 803_000
    assert ed2.match_width(lambda w: 10 * w, 803) == 80
    with says("within 5 %", "--model-size", "width 8"):
        ed2.match_width(lambda w: 1000 * w, 4000)


# -------------------------------------------------------------------------------- TD-MPC2's losses
class Push3:
    """A sampler of slices of a linear system that keeps what it gave."""

    device = "cpu"

    def __init__(self, steps=3):
        self.steps, self.seen = steps, []

    def sequences(self, n, generator, held_out=False):
        obs = [torch.randn(n, 4, generator=generator)]
        act = 2 * torch.rand(self.steps, n, 3, generator=generator) - 1
        for a in act:
            obs.append(0.9 * obs[-1] + 0.3 * torch.cat([a, a[:, :1]], 1))
        self.seen.append(torch.stack(obs))
        rew = obs[0][:, 0] * torch.ones(self.steps, 1)
        return data.Batch(torch.stack(obs), act, rew, 0 * rew, 0 * rew + 1, torch.zeros(n).long())


def tiny_tdmpc2(groups=None, seed=0, E=3):
    torch.manual_seed(seed)
    dynamics = ed2.Dynamics(16, 3, 24, groups or [[0, 1, 2]])
    torch.manual_seed(seed)
    return ed2.TDMPC2(4, 3, 16, 24, dynamics, E)


def test_ed2_consistency_against_its_definition():
    d = any_dynamics(TUG_GROUPS)
    z, act, target = torch.rand(5, 16), torch.randn(4, 5, 3), torch.rand(4, 5, 16)
    want, now = 0.0, z
    for t in range(4):
        now = slow_dynamics(d, now, act[t], TUG_GROUPS)
        assert torch.allclose(ed2.unroll(d, z, act)[t], now, atol=1e-5)
        want += 0.7**t / 4 * ((now - target[t]) ** 2).sum().item() / 80
    got = ed2.consistency_loss(d, z, act, target, rho=0.7).item()
    assert got == pytest.approx(want, rel=1e-4)


def test_ed2_policy_of_tdmpc2_is_a_squashed_normal():
    model, z, noise = tiny_tdmpc2(), torch.rand(6, 16), torch.randn(6, 3)
    mean, s = model.prior(z).chunk(2, -1)
    std = (-10 + 6 * (torch.tanh(s) + 1)).exp()
    squash = torch.distributions.TanhTransform()
    normal = torch.distributions.Normal(mean, std)
    want = torch.distributions.TransformedDistribution(normal, squash)
    act, logp = model.policy(z, noise)
    assert torch.allclose(act, torch.tanh(mean + std * noise)) and act.abs().max() <= 1
    assert torch.allclose(logp, want.log_prob(act).sum(-1), atol=1e-2)


def test_ed2_tdmpc2_loss_against_a_slow_reference():
    model = tiny_tdmpc2(TUG_GROUPS)
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    obs, act, *_ = Push3().sequences(4, gen())
    rew, noise, pair = torch.randn(3, 4), torch.randn(3, 4, 3), torch.tensor([2, 0])
    loss, metrics, z = ed2.tdmpc2_loss(model, obs, act, rew, noise, pair)
    want = dict(dyn=0.0, reward=0.0, value=0.0)
    with torch.no_grad():
        for b in range(4):
            now = model.encoder(obs[0, b])
            for t in range(3):
                assert torch.allclose(z[t, b], now, atol=1e-5)
                x = torch.cat([now, act[t, b]])
                reward = ed2.two_hot_loss(model.reward(x), rew[t, b]).item()
                want["reward"] += 0.5**t / 12 * reward
                true = model.encoder(obs[t + 1, b])
                y = torch.cat([true, model.policy(true, noise[t, b])[0]]).expand(3, 1, -1)
                q = ed2.two_hot_inv(model.q_slow(y))[:, 0]
                value = (rew[t, b] + 0.99 * min(q[2], q[0])).expand(3, 1)
                losses = ed2.two_hot_loss(model.q(x.expand(3, 1, -1)), value)
                want["value"] += 0.5**t / 36 * losses.sum().item()
                now = model.dynamics(now[None], act[t, b, None])[0]
                want["dyn"] += 0.5**t / 12 * (now - true).square().mean().item()
    for k, v in want.items():
        assert metrics[k].item() == pytest.approx(v, rel=1e-4), k
    total = 20 * want["dyn"] + 0.1 * (want["reward"] + want["value"])
    assert loss.item() == pytest.approx(total, rel=1e-4) and not z.requires_grad
    loss.backward()
    assert all(p.grad is None for p in [*model.prior.parameters(), *model.q_slow.parameters()])
    trained = nn.ModuleList([model.encoder, model.dynamics, model.reward, model.q])
    assert all(p.grad is not None for p in trained.parameters())


def test_ed2_prior_climbs_the_value():
    model, scale = tiny_tdmpc2(), torch.ones(())
    nn.init.normal_(model.q[-1].weight, std=0.3)
    model.q.requires_grad_(False)
    opt, losses = torch.optim.Adam(model.prior.parameters(), 3e-3), []
    z, noise = torch.rand(4, 32, 16), torch.randn(4, 32, 3)
    for _ in range(40):
        loss, scale = ed2.policy_loss(model, z, noise, scale)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02 and scale >= 1 and not scale.requires_grad


def test_ed2_joint_training_learns_and_variants_see_the_same(monkeypatch):
    monkeypatch.setattr(ed2, "linear_fall", lambda step, total, lr: lr)
    args = ed2_args(updates=80, batch=16, lr=3e-3)
    seen, tails = [], []
    for groups in (None, TUG_GROUPS):
        model, sampler = tiny_tdmpc2(groups), Push3()
        before = copy.deepcopy(model)
        rewards = tiny_tdmpc2().reward.parameters(), model.reward.parameters()
        assert all(torch.equal(a, b) for a, b in zip(*rewards))
        tails.append([ed2_train(model, sampler, dataclasses.replace(args, updates=u), 5)
                      for u in (10, 80)])
        seen.append(torch.stack(sampler.seen))
        for name, m in model.named_children():
            pairs = zip(m.parameters(), getattr(before, name).parameters())
            assert all((a != b).any() for a, b in pairs), name
        drift, full = ([(a - b).norm() for a, b in zip(x.parameters(), y.parameters())]
                       for x, y in ((model.q_slow, before.q_slow), (model.q, before.q)))
        assert all(0 < a < 0.9 * b for a, b in zip(drift, full))
        assert all(p.requires_grad for p in model.q.parameters())
        assert not any(p.requires_grad for p in model.q_slow.parameters())
    assert torch.equal(*seen) and len(seen[0]) == 90
    assert all(late < 0.6 * early for early, late in tails), tails


def test_ed2_dynamics_alone_learn_on_a_fixed_encoder():
    encoder = nn.Sequential(ed2.NormedLinear(4, 32), ed2.NormedLinear(32, 16, ed2.simnorm))
    encoder.requires_grad_(False)
    before, seen = copy.deepcopy(encoder.state_dict()), []
    args = ed2_args(updates=60, batch=32, lr=3e-3)
    for groups in ([[0, 1, 2]], TUG_GROUPS):
        torch.manual_seed(0)
        d, sampler = ed2.Dynamics(16, 3, 24, groups), Push3()
        start = copy.deepcopy(d)
        ed2_train(d, sampler, args, 3, encoder)
        assert all(torch.equal(encoder.state_dict()[k], v) for k, v in before.items())
        assert all((a != b).any() for a, b in zip(d.parameters(), start.parameters()))
        obs, act, *_ = Push3().sequences(200, gen(9))
        z = encoder(obs)
        new, old = (ed2.consistency_loss(x, z[0], act, z[1:]).item() for x in (d, start))
        assert new < 0.5 * old
        seen.append(torch.stack(sampler.seen))
    assert torch.equal(*seen)
    other = Push3()
    ed2_train(d, other, args, 4, encoder)
    assert not torch.equal(torch.stack(other.seen), seen[0])


def test_ed2_rate_falls_and_a_loss_that_is_not_finite_stops():
    rates = [ed2.linear_fall(t, 200, 2.0) for t in range(201)]
    assert rates[0] == rates[100] == 2.0 and rates[200] == pytest.approx(0.06)
    assert rates[150] == pytest.approx(1.03) and all(a >= b for a, b in zip(rates, rates[1:]))
    encoder = nn.Sequential(ed2.NormedLinear(4, 16, ed2.simnorm)).requires_grad_(False)
    model = ed2.Dynamics(16, 3, 24, TUG_GROUPS)
    model.w_z.data[0] = float("nan")
    with says("not finite", "learning rate"):
        ed2_train(model, Push3(), ed2_args(), 0, encoder)
    bad = Push3(9)
    bad.sequences = lambda *a: Push3.sequences(bad, *a)._replace(rew=torch.full((9, 4), math.nan))
    for wm, model in (("tdmpc2", tiny_tdmpc2()), ("dreamerv3", tiny_dreamer(4, 3))):
        with says("not finite", "learning rate"):
            ed2_train(model, bad, ed2_args(wm=wm))


def test_ed2_two_hot_losses_carry_nan_to_the_finite_check():
    x, logits = torch.tensor([0.3, math.nan, -math.inf, 2e9]), torch.randn(4, 255)
    for script in (pwm, ed2, mow):
        loss = script.two_hot_loss(logits[:, :script.BINS], x)
        assert loss.isnan().tolist() == [False, True, False, False]
    loss = ed2.symexp_two_hot_loss(logits, x)
    assert loss[1].isnan() and loss[[0, 3]].isfinite().all()


# ------------------------------------------------------------------------------------- measuring
def test_ed2_latent_errors_of_models_that_are_known():
    class Oracle(nn.Module):  # the latents are the states
        def forward(self, z, a):
            return 0.9 * z + 0.3 * torch.cat([a, a[:, :1]], 1)

    encoder = nn.Linear(4, 4).requires_grad_(False)
    encoder.weight.copy_(torch.eye(4))
    encoder.bias.zero_()
    right = ed2.measure_latents(encoder, Oracle(), Push3(10))
    errors = [v for k, v in right.items() if not k.startswith("persistence")]
    assert max(errors) < 1e-6 < right["persistence_mse_1"] and right["logged"] < 1e-9
    still = ed2.measure_latents(encoder, lambda z, a: z, Push3(10))
    for h in (1, 3, 5, 10):
        assert still[f"mse_{h}"] == pytest.approx(still[f"persistence_mse_{h}"], rel=1e-5)
    assert still["mse_1"] < still["per_step_mse"] < still["mse_3"]


def test_ed2_nmse():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(1000, 3)) * [1, 5, 0]
    assert ed2.nmse(true.mean(0), true, true.var(0)) == pytest.approx(1)
    assert ed2.nmse(true, true, true.var(0)) == 0


@pytest.mark.parametrize("wm", ["tdmpc2", "dreamerv3"])
def test_ed2_learns_cheetah(wm, cheetah):
    """Held-out error of dynamics in latents, or of reconstruction, falls to a third."""
    replay = Episodes.open(cheetah / "replay")
    torch.manual_seed(0)
    if wm == "tdmpc2":
        sampler = replay.sampler(["cheetah-run"], 3, held_out=0.1)
        encoder = nn.Sequential(ed2.NormedLinear(17, 64), ed2.NormedLinear(64, 64, ed2.simnorm))
        model = ed2.Dynamics(64, 6, 96, CHEETAH)
        obs, act, *_ = sampler.sequences(256, gen(), held_out=True)
        z = encoder.requires_grad_(False)(obs)
        before = ed2.consistency_loss(model, z[0], act, z[1:]).item()
        ed2_train(model, sampler, ed2_args(updates=150, batch=64, lr=3e-3), 0, encoder)
        after = ed2.consistency_loss(model, z[0], act, z[1:]).item()
    else:
        sampler = replay.sampler(["cheetah-run"], 12, held_out=0.1)
        model = ed2.DreamerV3(17, 6, 64, 16, 8, 32, groups=CHEETAH, width=32, stoch=8)
        obs, act, rew, *_ = sampler.sequences(16, gen(), held_out=True)
        batch = obs, act, rew, ed2.draw_gumbel((13, 16, 8, 8), gen())
        before = ed2.rssm_loss(model, *batch)[1]["rec"].item()
        ed2_train(model, sampler, ed2_args(wm=wm, updates=60, batch=16, lr=1e-2, length=12))
        after = ed2.rssm_loss(model, *batch)[1]["rec"].item()
    assert after < before / 3, (before, after)


# -------------------------------------------------------------- DreamerV3 with a decomposed core
FULL9 = [[j] for j in range(9)]  # more groups than blocks
TINY_DREAMER = dict(deter=32, hidden=8, classes=4, units=16, stoch=4)


def tiny_dreamer(obs_dim=3, act_dim=6, seed=0, **kw):
    torch.manual_seed(seed)
    return ed2.DreamerV3(obs_dim, act_dim, **TINY_DREAMER | kw)


def any_core(act_dim=6, seed=0, **kw):
    torch.manual_seed(seed)
    rssm = ed2.RSSM(act_dim, 16, 32, 8, 4, stoch=4, **kw)
    for name, p in rssm.named_parameters():  # biases and gains that matter
        if "bias" in name or "gain" in name or p.ndim == 1:
            p.data.add_(0.3 * torch.randn(p.shape))
    return rssm


def recording(T=6, B=4, O=3, A=6, seed=1):
    g = gen(seed)
    return (torch.randn(T + 1, B, O, generator=g), 2 * torch.rand(T, B, A, generator=g) - 1,
            torch.randn(T, B, generator=g))


GUMBEL = ed2.draw_gumbel((7, 4, 4, 4), gen(2))


def test_ed2_dreamer_symexp_two_hot():
    x = torch.tensor([0.0, 1e-3, -0.3, 1.0, 7.7, -250.0, 1e4])
    bins = ed2.symexp_bins("cpu")
    assert bins.shape == (255,) and bins[127] == 0 and torch.equal(bins, -bins.flip(0))
    k = torch.searchsorted(bins, x, right=True) - 1
    high = (x - bins[k]) / (bins[k + 1] - bins[k])
    p = torch.zeros(len(x), 255).scatter(1, k[:, None], 1 - high[:, None])
    p = p.scatter(1, k[:, None] + 1, high[:, None])
    assert torch.allclose((p * bins).sum(-1), x, rtol=1e-4, atol=1e-5)
    logits = torch.randn(len(x), 255, requires_grad=True)
    loss = ed2.symexp_two_hot_loss(logits, x)
    assert torch.allclose(loss, -(p * logits.log_softmax(-1)).sum(-1), atol=1e-3)
    loss.sum().backward()
    assert torch.allclose(logits.grad, logits.softmax(-1) - p, atol=1e-4)
    assert torch.allclose(ed2.symexp(ed2.symlog(x)), x, rtol=1e-5)


def test_ed2_dreamer_latents():
    logits = torch.randn(3, 4, requires_grad=True)
    logp = ed2.unimix(logits)
    p = logp.exp()
    assert torch.allclose(p, 0.99 * logits.softmax(-1) + 0.0025, atol=1e-6)
    assert ed2.unimix(torch.tensor([[0.0, 1e4]])).exp().min() == pytest.approx(0.005)
    gumbel = ed2.draw_gumbel((20_000, 3, 4), gen())
    z = ed2.sample_latent(logp.expand(20_000, 3, 4), gumbel).unflatten(-1, (3, 4))
    assert torch.equal(z.sum(-1).round(), torch.ones(20_000, 3))
    assert torch.allclose(z.mean(0), p, atol=0.02)
    w = torch.randn(3, 4)  # straight-through: the gradient of p
    sample = ed2.sample_latent(logp, torch.zeros(3, 4)).unflatten(-1, (3, 4))
    a, b = (torch.autograd.grad((x * w).sum(), logits, retain_graph=True)[0] for x in (sample, p))
    assert torch.allclose(a, b)
    q = ed2.unimix(torch.randn(3, 4))
    both = (torch.distributions.Categorical(x.exp()) for x in (logp, q))
    want = torch.distributions.kl_divergence(*both)
    assert torch.allclose(ed2.kl(logp, q), want.sum(), atol=1e-5)


def test_ed2_dreamer_parameter_counts():
    model = ed2.DreamerV3(24, 6, **ed2.DREAMER_SIZES["1m"])
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in model.named_children()}
    assert sizes == dict(encoder=10_112, rssm=364_416, decoder=51_096, reward=57_663, cont=41_153)
    assert ed2.counter("dreamerv3", "1m")[0]([list(range(6))], 512) == 273_664


@pytest.mark.parametrize("kw", [
    dict(), dict(groups=WALKER, width=16), dict(groups=[list(range(6))] * 3, width=16)])
def test_ed2_dreamer_counter_counts_what_is_used(kw, monkeypatch):
    rssm = any_core(**kw)
    used = sum(p.numel() for name, p in rssm.named_parameters()
               if not name.startswith(("prior", "post")))
    used -= int((1 - rssm.act_mask).sum()) * 8
    monkeypatch.setitem(ed2.DREAMER_SIZES, "tiny", dict(deter=32, hidden=8, classes=0.5, units=16))
    count, full = ed2.counter("dreamerv3", "tiny")  # half a class: 32 of them as 4 of 4 classes
    assert used == count(kw.get("groups", [list(range(6))]), kw.get("width", 32)) and full == 32


def slow_core(rssm, h, z, act, groups):
    """'Block GRU' of DreamerV3, word by word, a sub-core and a block at a time: h_i (k, B, D)."""
    def norm(x, gain):
        return x / (x.square().mean(-1, keepdim=True) + 1e-4).sqrt() * gain
    silu, sigmoid, g, d = F.silu, torch.sigmoid, rssm.blocks, rssm.deter
    x0, x1 = (silu(norm(m[0](x), m[1].weight)) for m, x in ((rssm.h_in, h), (rssm.z_in, z)))
    a, out = act / act.abs().clamp(min=1), []
    for i, part in enumerate(groups):
        x2 = a[:, part] @ rssm.act_weight[i, part] + rssm.act_bias[i]
        x2 = silu(norm(x2, rssm.act_gain[i]))
        hidden, new = [], []
        for b in range(g):
            x = torch.cat([h[:, b * d // g:(b + 1) * d // g], x0, x1, x2], -1)
            hidden.append(x @ rssm.hid.weight[i, b] + rssm.hid.bias[i, b, 0])
        whole = silu(norm(torch.cat(hidden, -1), rssm.hid_gain[i].flatten()))
        for b, x in enumerate(whole.chunk(g, -1)):
            r, c, u = (x @ rssm.gru.weight[i, b] + rssm.gru.bias[i, b, 0]).chunk(3, -1)
            u, old = sigmoid(u - 1), h[:, b * d // g:(b + 1) * d // g]
            new.append(u * torch.tanh(sigmoid(r) * c) + (1 - u) * old)
        out.append(torch.cat(new, -1))
    return torch.stack(out)


CORES = [(6, [list(range(6))], None), (6, WALKER, 16), (6, WALKER, None), (9, FULL9, 8),
         (6, [list(range(6))] * 3, 16)]


def core_inputs(act_dim, B=5):
    g = gen(3)
    return [torch.randn(B, n, generator=g) for n in (32, 16, act_dim)]


@pytest.mark.parametrize("act_dim, groups, width", CORES)
def test_ed2_dreamer_batched_core_is_the_looped_one(act_dim, groups, width):
    rssm = any_core(act_dim, groups=groups, width=width)
    h, z, act = core_inputs(act_dim)
    weights = rssm.core_weights()
    act_in = rssm.act_input(weights, act)
    got = rssm.subcores(weights, h, z, act_in).permute(0, 2, 1, 3).flatten(2)
    want = slow_core(rssm, h, z, act, groups)
    assert torch.allclose(got, want, atol=1e-5)
    assert torch.allclose(rssm.step(weights, h, z, act_in), want.mean(0), atol=1e-5)


def test_ed2_dreamer_one_group_is_the_single_model():
    single, one = tiny_dreamer(), tiny_dreamer(seed=1, groups=[list(range(6))])
    one.load_state_dict(single.state_dict())
    a, b = (ed2.rssm_loss(m, *recording(), GUMBEL) for m in (single, one))
    assert torch.allclose(a[0], b[0], atol=1e-5) and torch.allclose(a[2][0], b[2][0], atol=1e-5)


@pytest.mark.parametrize("act_dim, groups, width", CORES[1:4])
def test_ed2_dreamer_foreign_actions_do_not_matter(act_dim, groups, width):
    rssm = any_core(act_dim, groups=groups, width=width)
    h, z, act = core_inputs(act_dim)
    weights = rssm.core_weights()
    before = rssm.subcores(weights, h, z, rssm.act_input(weights, act))
    for j in range(act_dim):
        other = act.clone()
        other[:, j] = -0.37
        after = rssm.subcores(weights, h, z, rssm.act_input(weights, other))
        assert [torch.equal(x, y) for x, y in zip(before, after)] == [j not in g for g in groups]
    after.square().sum().backward()
    masked = (1 - rssm.act_mask).bool().expand_as(rssm.act_weight)
    assert (rssm.act_weight.grad[masked] == 0).all() and (rssm.act_weight[masked] == 0).all()
    assert (rssm.act_weight.grad[~masked] != 0).all()


def test_ed2_dreamer_initial_scale_follows_the_true_fan_in():
    torch.manual_seed(0)
    rssm = ed2.RSSM(6, 16, 32, 512, 4, stoch=4, groups=WALKER, width=16)
    for i, part in enumerate(WALKER):
        assert rssm.act_weight[i, part].std().item() == pytest.approx(len(part) ** -0.5, rel=0.1)
        assert rssm.act_weight[i, part].abs().max() <= 2 * 1.1368 * len(part) ** -0.5
    assert rssm.hid.weight.std().item() == pytest.approx((8 * (4 + 3 * 512)) ** -0.5, rel=0.1)
    assert (tiny_dreamer().reward[-1].weight == 0).all()


def test_ed2_dreamer_kl_floor():
    model = tiny_dreamer()
    for net in (model.rssm.prior_net, model.rssm.post_net):
        nn.init.zeros_(net[-1].weight)
    loss, metrics, _ = ed2.rssm_loss(model, *recording(), GUMBEL)
    assert metrics["dyn"] == 1 and metrics["rep"] == 1 and metrics["dyn_raw"].abs() < 1e-6
    assert metrics["prior_entropy"].item() == pytest.approx(4 * np.log(4), rel=1e-5)
    loss.backward()
    assert all((p.grad == 0).all() for p in model.rssm.prior_net.parameters())
    trained = [p for n, p in model.named_parameters() if "prior_net" not in n]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_ed2_dreamer_time_alignment():
    model = tiny_dreamer()
    obs, act, rew = recording()
    h = ed2.rssm_loss(model, obs, act, rew, GUMBEL)[2][0]
    other = act.clone()
    other[2] = 0.9
    h2 = ed2.rssm_loss(model, obs, other, rew, GUMBEL)[2][0]
    assert torch.equal(h[:3], h2[:3]) and not torch.equal(h[3], h2[3])
    # no reward of the first state: a head that is right about rew has the entropy as loss
    nn.init.zeros_(model.reward[-1].weight)
    model.reward[-1].bias.data[127] = 50.0
    _, metrics, _ = ed2.rssm_loss(model, obs, act, torch.zeros_like(rew), GUMBEL)
    assert metrics["rew"] < 1e-6
    late, whole = (ed2.rssm_loss(model, obs, act, rew, GUMBEL, skip)[1] for skip in (3, 0))
    assert set(late) == {"rec", "rew", "con", "dyn", "rep", "dyn_raw", "post_entropy",
                         "prior_entropy"}
    assert late["rec"] != whole["rec"]
    assert all(not x.requires_grad and x.ndim == 0 for x in late.values())


def test_ed2_dreamer_open_loop():
    model = tiny_dreamer(groups=WALKER, width=16)
    obs, act, _ = recording()
    a = ed2.open_loop(model, obs, act, GUMBEL, 3)
    assert a.shape == (4, 4, 3)
    changed, later = obs.clone(), act.clone()
    changed[3:] += 1
    later[4] = 0.5
    assert torch.equal(a, ed2.open_loop(model, changed, act, GUMBEL, 3))  # reads the context only
    b = ed2.open_loop(model, obs, later, GUMBEL, 3)  # act[4] matters to obs[5] = prediction 2
    assert torch.equal(a[:2], b[:2]) and not torch.equal(a[2], b[2])
    h, _, _ = model.rssm.observe(model.encoder(ed2.symlog(obs)), act, GUMBEL)
    z = ed2.sample_latent(model.rssm.prior(h[3]), GUMBEL[3])
    want = ed2.symexp(model.decoder(torch.cat([h[3], z], -1)))
    assert torch.allclose(a[0], want, atol=1e-5)


def test_ed2_dreamer_laprop_against_a_slow_reference():
    class Parts(nn.Module):
        apart = ("stacked",)

        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.randn(4, 3))
            self.stacked = nn.Parameter(torch.randn(2, 3, 5))
            self.last = nn.Parameter(torch.zeros(3))

    torch.manual_seed(0)
    parts = Parts()
    opt = ed2.LaProp(parts, lr=0.01, warmup=3)

    def pieces(grad=False):
        p, stacked, last = (x.grad if grad else x.detach() for x in parts.parameters())
        return [x.clone() for x in (p, *stacked, last)]

    mine = pieces()
    mu, nu = ([torch.zeros_like(x) for x in mine] for _ in range(2))
    for t in range(1, 6):
        scale = 10.0 if t % 2 else 0.01
        for p in parts.parameters():
            p.grad = scale * torch.randn(p.shape)
        if t == 1:
            parts.last.grad = torch.zeros(3)
        grads = pieces(grad=True)
        opt.step()
        for i, g in enumerate(grads):
            limit = 0.3 * max(1e-3, mine[i].norm().item())
            g = g * min(1.0, limit / max(g.norm().item(), 1e-30))
            nu[i] = 0.999 * nu[i] + 0.001 * g * g
            g = g / ((nu[i] / (1 - 0.999**t)).sqrt() + 1e-20)
            mu[i] = 0.9 * mu[i] + 0.1 * g
            mine[i] = mine[i] - 0.01 * min(1, t / 3) * mu[i] / (1 - 0.9**t)
        for a, b in zip(pieces(), mine):
            assert torch.allclose(a, b, atol=1e-5) and a.isfinite().all()


def test_ed2_dreamer_sub_cores_are_clipped_apart_and_masked_weights_stay_zero():
    model = copy.deepcopy(tiny_dreamer(groups=WALKER, width=16))
    opt = ed2.LaProp(model, 1e-2, 1)
    params = opt.param_groups[0]["params"]
    assert list(map(id, params)) == list(map(id, model.parameters()))
    apart = {name for (name, p), dims in zip(model.named_parameters(), opt.dims)
             if dims == list(range(1, p.ndim))}
    rssm = {"act_weight", "act_bias", "act_gain", "hid_gain"}
    rssm |= {f"{m}.{x}" for m in ("hid", "gru") for x in ("weight", "bias")}
    assert apart == {f"rssm.{name}" for name in rssm}
    assert all(model.get_parameter(name).shape[0] == len(WALKER) for name in apart)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        opt.zero_grad()
        ed2.rssm_loss(model, *recording(), GUMBEL)[0].backward()
        opt.step()
    masked = (1 - model.rssm.act_mask).bool().expand_as(model.rssm.act_weight)
    assert (model.rssm.act_weight[masked] == 0).all()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


# ------------------------------------------------------------------------------------- statistics
def test_ed2_relative_change_and_verdict():
    old, new = [1.0, 2.0, 4.0], [0.9, 1.6, 2.8]
    mean, low, high, p = ed2.relative_change(new, old)
    half = 4.302653 * 0.1 / 3**0.5  # t of 0.975 with 2 degrees of freedom; changes -10, -20, -30 %
    assert (mean, low, high) == pytest.approx((-0.2, -0.2 - half, -0.2 + half))
    assert p == pytest.approx(0.0742, abs=1e-3)
    one = ed2.relative_change([2.0], [1.0])
    assert one[0] == 1 and np.isnan(one[1:]).all()
    assert ed2.relative_change([1.0, 1.0], [1.0, 1.0]) == (0, 0, 0, 1)
    assert ed2.relative_change([2.0, 2.0], [1.0, 1.0]) == (1, 1, 1, 0)
    assert ed2.verdict(-0.2, -0.3, -0.1) == "win" and ed2.verdict(-0.2, -0.3, -0.1, False) == "tie"
    assert ed2.verdict(0.2, 0.1, 0.3) == ed2.verdict(0.2, 0.1, 0.3, False) == "loss"
    nan = float("nan")
    for row in ((-0.2, -0.5, 0.1), (-0.04, -0.045, -0.035), (0.04, 0.03, 0.045), (-0.9, nan, nan)):
        assert ed2.verdict(*row) == "tie"


# ------------------------------------------------------------------------------ data and bad input
def test_ed2_data_of_the_carts(tug):
    random, replay, notes = ed2.make_data(TUG_TASK, tug, 3000, 1)
    x, y = random.arrays(TUG_TASK), replay.arrays(TUG_TASK)
    assert x["length"].sum() >= 20_000
    assert np.abs(x["act"]).max() <= 1 and abs(x["act"].mean()) < 0.02
    assert len(y["length"]) == 48 and len(notes["returns"]) == 3  # 3 rounds of 8 and opposites
    ret = y["rew"].sum(1).reshape(3, 16)
    assert np.allclose([(r.mean(), r.max()) for r in ret], notes["returns"], rtol=1e-4)
    assert notes["random_return"] == pytest.approx(x["rew"].sum(1).mean(), rel=1e-4)
    assert ret[-1].max() > notes["random_return"]
    assert np.allclose(y["obs"][:8, 0], y["obs"][8:16, 0])  # opposite directions start alike
    assert ed2.find_partition("sd2", TUG_TASK, random)[0] == TUG_GROUPS
    sampler = replay.sampler([TUG_TASK], 64, held_out=0.1)
    held, train = ({o.numpy().tobytes() for o in sampler.sequences(200, gen(), held_out=out)[0][-1]}
                   for out in (True, False))
    assert 4 <= len(held) <= 5 and not held & train


def test_ed2_search_climbs(tmp_path, tug):
    class Pool:  # the return is how well action 0 follows state 0
        def rollout(self, jobs, policy):
            n, rng = len(jobs), np.random.default_rng(0)
            s = rng.normal(size=(64, n, 4)).astype(np.float32)
            act = np.stack([policy(s[t], np.arange(n), np.full(n, t)) for t in range(64)])
            rew = -np.abs(act[:, :, 0] - s[:, :, 0].clip(-1, 1))
            return [dict(obs=np.r_[s[:, i], s[:1, i]], act=act[:, i], rew=rew[:, i],
                         term=np.zeros(64, bool), ret=rew[:, i].sum()) for i in range(n)]

    eps = Episodes.create(tmp_path, {TUG_TASK: (4, 3, 64)})
    random = Pool().rollout([None] * 4, lambda obs, job, t: np.zeros((4, 3)))
    curve = ed2.search(TUG_TASK, Pool(), random, eps, 20 * 16 * 64)
    assert len(curve) == 20 and eps.counts()[TUG_TASK] == 320
    assert np.mean(curve[-3:]) > 0.75 * np.mean(curve[0])  # returns are negative


def test_ed2_bad_data(tmp_path, tug):
    def folder(name, facts, n=5, end=False):
        O, A, T = facts
        eps = Episodes.create(tmp_path / name, {TUG_TASK: facts})
        for _ in range(n):
            term = np.zeros(T, bool)
            term[-1] = end
            eps.append(TUG_TASK, np.random.randn(T + 1, O), np.zeros((T, A)), np.zeros(T), term)
        return str(tmp_path / name)

    with says("action repeat", "(4, 3, 32)", "(4, 3, 64)"):
        ed2.make_data(TUG_TASK, tmp_path / "x", 1, 1, folder("half", (4, 3, 32)))
    with says("no episodes", "nowhere"):
        ed2.make_data(TUG_TASK, tmp_path / "x", 1, 1, str(tmp_path / "nowhere"))
    assert not (tmp_path / "x").exists()  # said before anything is rolled out
    with says("end early", "termination"):
        ed2.make_data(TUG_TASK, tug, 1, 1, folder("falls", (4, 3, 64), end=True))
    with says("3 episodes", "at least 4"):
        ed2.make_data(TUG_TASK, tug, 1, 1, folder("few", (4, 3, 64), n=3))


@pytest.mark.parametrize("settings, words", [
    (dict(resume="nowhere"), ("nowhere", "args.json")), (dict(workers=0), ("--workers 0",)),
    (dict(seeds=0), ("--seeds 0",)), (dict(seed=-1), ("--seed -1",)),
    (dict(device="cuda"), ("no GPU",)), (dict(task="walker-wolk"), ("walker-walk",)),
    (dict(data_dir="x", data_steps=9), ("--data-steps 9", "--data-dir")),
    (dict(model_size="99m", wm="dreamerv3"), ("--model-size 99m", "1m", "12m")),
    (dict(model_size="1m"), ("--model-size 1m", "1M", "5M")), (dict(updates=0), ("--updates 0",)),
    (dict(length=4, wm="dreamerv3"), ("--length 4",)), (dict(lr=-1e-3), ("--lr -0.001",)),
    (dict(partition="published", task="cup-catch"), ("no published partition", "walker, cheetah")),
    (dict(partition="full", eta=0.1), ("--eta 0.1",)), (dict(data_steps=-5), ("--data-steps -5",))])
def test_ed2_bad_flags_get_one_sentence(settings, words, tmp_path, monkeypatch):
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    for name in ("make_data", "Workers"):
        monkeypatch.setattr(ed2, name, lambda *a, **k: pytest.fail("began to work"))
    with says(*words):
        ed2.main(ed2.Args(**{"device": "cpu"} | settings))
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------- whole runs of ed2.py
@pytest.fixture
def small(tmp_path, monkeypatch):
    """Smaller models and test sets; runs/ goes to tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ed2.TDMPC2_SIZES, "1M", (64, 160))
    size = dict(deter=256, hidden=32, classes=4, units=32)
    monkeypatch.setitem(ed2.DREAMER_SIZES, "1m", size)
    rssm = functools.partial(ed2.measure_rssm, batch=16, draws=2)
    monkeypatch.setattr(ed2, "measure_rssm", rssm)
    monkeypatch.setattr(ed2, "measure_latents", functools.partial(ed2.measure_latents, batch=64))


@pytest.mark.parametrize("wm", ["tdmpc2", "dreamerv3"])
def test_ed2_compare_killed_inside_a_training_ends_at_the_same_numbers(wm, tug, small, monkeypatch,
                                                                       capsys):
    args = ed2_args(wm=wm, seeds=2, save_every=0)
    runs = [ed2_run(args, tug) for _ in range(2)]
    whole = ed2.main(ed2.Args(resume=str(runs[0])))
    out = capsys.readouterr().out
    assert f"groups {TUG_GROUPS}" in out and "  merge [0] + [1]: +" in out
    assert f"verdict on {ed2.PRIMARY[wm]}" in out and "95 % interval" in out
    names = {p.name for p in runs[0].iterdir()}
    assert names >= {"results.json", "results.csv", "cells", "trainings"}
    saved = json.loads((runs[0] / "results.json").read_text())
    assert saved["table"] == whole["table"]
    lines = (runs[0] / "results.csv").read_text().splitlines()
    assert lines[0] == "metric,single,ed2,change,low,high" and len(lines) == 1 + len(whole["table"])
    regime = "frozen" if wm == "tdmpc2" else "replay"
    wanted = [("joint", "single")] * (wm == "tdmpc2") + [(regime, "single"), (regime, "ed2")]
    kinds = [(c["seed"], c["regime"], c["variant"]) for c in whole["cells"]]
    assert kinds == [(s, *w) for s in (1, 2) for w in wanted]
    for c in whole["cells"]:
        assert c["dynamics_params"] == ed2.counter(wm, args.model_size)[0](c["groups"], c["width"])
        numbers = [x for x in c.values() if isinstance(x, float)]
        assert len(numbers) > 10 and np.isfinite(numbers).all()
    row = next(r for r in whole["table"] if r["metric"] == ed2.PRIMARY[wm])
    a, b = (np.array([c[ed2.PRIMARY[wm]] for c in whole["cells"] if c["regime"] == regime
                      and c["variant"] == v]) for v in ("single", "ed2"))
    assert (row["single"], row["ed2"]) == (a.mean(), b.mean())
    assert row["change"] == pytest.approx((b / a - 1).mean())
    assert whole["verdict"] == ed2.verdict(row["change"], row["low"], row["high"])

    real, calls = ed2.linear_fall, []

    def killed(*a, **k):  # amid the third training, whose last step was saved
        calls.append(1)
        if len(calls) == 2 * args.updates + 6:
            raise KeyboardInterrupt
        return real(*a, **k)

    with monkeypatch.context() as m:
        m.setattr(ed2, "linear_fall", killed)
        with says("stopped; go on with: python", f"--resume {runs[1]}"):
            ed2.main(ed2.Args(resume=str(runs[1])))
    stamps = {p: p.stat().st_mtime_ns for p in (runs[1] / "cells").iterdir()}
    assert len(stamps) == 2 and len(list((runs[1] / "trainings").glob("*/checkpoint.pt"))) == 1
    monkeypatch.setattr(ed2, "linear_fall", lambda *a, **k: calls.append(1) or real(*a, **k))
    again = ed2.main(ed2.Args(resume=str(runs[1])))
    assert again["table"] == whole["table"] and again["partition"] == whole["partition"]
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}
    assert len(calls) == len(whole["cells"]) * args.updates + 1  # no update was done twice


@pytest.mark.parametrize("settings", [
    dict(partition="full"), dict(wm="dreamerv3", partition="full"),
    dict(partition="none", updates=2), dict(wm="dreamerv3", partition="none", updates=2)])
def test_ed2_variants_of_a_run(settings, tug, small, capsys):
    """Other groups, on given data; one group, for which the baseline runs alone and says so."""
    args = ed2_args(data_dir=str(tug / "replay"), **settings)
    result = ed2.main(ed2.Args(resume=str(ed2_run(args, tug))))
    cells = {c["variant"]: c for c in result["cells"]}
    assert all(np.isfinite(c["train_loss"]) for c in result["cells"])
    if args.partition == "none":
        assert "verdict" not in result and set(cells) == {"single"}
        assert "ED2 is the single model, which runs alone" in capsys.readouterr().out
    else:
        assert set(cells) == {"single", "ed2"} and result["verdict"] == "none, 1 seed"
        sizes = [cells[v]["dynamics_params"] for v in ("ed2", "single")]
        assert sizes[0] / sizes[1] == pytest.approx(1, abs=0.05)
        assert cells["ed2"]["groups"] == [[0], [1], [2]]


def test_ed2_compiled_losses_were_compiled_and_agree_with_eager(monkeypatch):
    real = torch.compile
    checked = functools.partial(real, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", checked)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    encoder = nn.Sequential(ed2.NormedLinear(4, 16, ed2.simnorm)).requires_grad_(False)
    counters, results = torch._dynamo.utils.counters, []
    for compiled in (False, True):
        args = ed2_args(updates=10, compile=compiled)
        model = tiny_tdmpc2(TUG_GROUPS)
        joint = ed2_train(model, Push3(), args)
        ed2_train(model.dynamics, Push3(), args, 0, encoder)
        rssm = tiny_dreamer(4, 3, groups=TUG_GROUPS, width=16)
        args = dataclasses.replace(args, wm="dreamerv3", updates=3)
        ed2_train(rssm, Push3(9), args)
        results.append([joint, *(p.detach() for p in [*model.parameters(), *rssm.parameters()])])
    assert counters["stats"]["unique_graphs"] == 4 and not counters["graph_break"]  # compiled once
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-3)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(results[0][1:], results[1][1:]))


def test_ed2_copied_with_its_two_helpers_it_runs(tmp_path, tug):
    for name in ("ed2.py", "envs.py", "data.py"):
        (tmp_path / name).write_text(Path(HERE, name).read_text())
    (tmp_path / "tug.py").write_text(TUG)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def run(*words):
        p = subprocess.run([sys.executable, "ed2.py", *words], cwd=tmp_path, env=env,
                           capture_output=True, text=True)
        assert p.returncode == 0, p.stderr[-2000:]
        return p.stdout

    out = run("--help")
    assert all(data.flag(f.name) in out for f in dataclasses.fields(ed2.Args))
    assert "Deviations" in out and "--no-compile" in out
    out = run("--task", TUG_TASK, "--fast", "--seeds", "1", "--workers", "2", "--updates", "10",
              "--data-dir", str(tug / "replay"))
    (folder,) = (tmp_path / "runs").iterdir()
    assert "updates 10," in out and f"files: {folder.relative_to(tmp_path)}/" in out
    assert {f.name for f in folder.iterdir()} >= {"ed2.py", "envs.py", "data.py", "args.json"}
    result = json.loads((folder / "results.json").read_text())
    assert result["partition"] == TUG_GROUPS and "--task tug:Tug-v0" in result["command"]
    assert len(result["cells"]) == 3
