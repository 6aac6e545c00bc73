from t_head import *  # noqa: F401,F403

# ------------------------------------------------------------------------------------------------------------- ed2.py
# Two carts: actions 0 and 1 pull at the first, action 2 at the second. A file, because roll-outs import it elsewhere.
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
WALKER, CHEETAH, HOPPER, HUMANOID = (ed2.PUBLISHED[x] for x in ("walker", "cheetah", "hopper", "humanoid"))


def ed2_args(**settings):
    """Flags of a run on the two carts that takes seconds."""
    wm = settings.get("wm", "tdmpc2")
    tiny = dict(length=3, size="1M") if wm == "tdmpc2" else dict(length=10, size="1m")
    return ed2.Args(**dict(task=TUG_TASK, device="cpu", compile=False, workers=1, seeds=1, updates=12, batch=4, lr=1e-3,
                           data_steps=1) | tiny | settings)


def ed2_run(args, data, inside=True):
    """The folder of a run that has not begun, with `data` in place of data that it would make."""
    run = Run(args.task, "ed2", args.seed, dataclasses.asdict(args))
    run.close()
    (run.dir / "data").mkdir() if inside else (run.dir / "data").symlink_to(data)
    if inside:
        (run.dir / "data" / args.task).symlink_to(data)
    return run.dir


@pytest.fixture(scope="module")
def tug(tmp_path_factory):
    """The two carts can be imported, and this folder has their data; fails if the data depend on being interrupted."""
    folder = tmp_path_factory.mktemp("tug")
    (folder / "tug.py").write_text(TUG)
    with pytest.MonkeyPatch.context() as m:
        m.syspath_prepend(str(folder))
        with pytest.MonkeyPatch.context() as inner:  # killed between random data and search
            inner.setattr(ed2, "search", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                ed2.make_data(TUG_TASK, folder / "data", 3000, 1)
        ed2.make_data(TUG_TASK, folder / "data", 3000, 1)
        yield folder / "data"


def suite_episodes(task, n, folder):
    """n episodes of uniform random actions, in the layout of ed2.make_data, random and replay alike."""
    env, rng = envs.make_env(task), np.random.default_rng(0)
    O, A, T, _ = env.facts
    eps = Episodes.create(folder / "random", {task: (O, A, T)})
    for seed in range(n):
        obs, act, rew = [env.reset(seed=seed)[0]], rng.uniform(-1, 1, (T, A)).astype(np.float32), []
        for a in act:
            o, r, _, _, _ = env.step(a)
            obs.append(o), rew.append(r)
        eps.append(task, np.stack(obs), act, np.array(rew, np.float32), np.zeros(T, bool))
    env.close()
    (folder / "replay").symlink_to(folder / "random")
    (folder / "data.json").write_text(json.dumps({"random_return": 0.0, "returns": [[0.0, 0.0]]}))
    return folder


@pytest.fixture(scope="module")
def cheetah(tmp_path_factory):
    return suite_episodes("cheetah-run", 10, tmp_path_factory.mktemp("cheetah"))


# ------------------------------------------------------------------------------------------ sub-dynamics discovery
def slow_agglomerate(sim, eta):
    """Pairs of groups compared word for word: mean similarity inside the pair minus mean similarity to all else."""
    m = len(sim)
    groups = [(i,) for i in range(m)]
    while len(groups) > 1:
        best = None
        for P in groups:
            for Q in groups:
                if P >= Q:
                    continue
                inside, n_in, outside, n_out = 0.0, 0, 0.0, 0
                for i in P:
                    for j in Q:
                        inside, n_in = inside + sim[i][j], n_in + 1
                for X, Y in ((P, Q), (Q, P)):
                    for i in X:
                        for j in range(m):
                            if j not in Y:
                                outside, n_out = outside + sim[i][j], n_out + 1
                score = inside / n_in - outside / n_out
                if best is None or score > best[0] + 1e-10:
                    best = score, P, Q
        if best[0] <= eta:
            break
        groups = sorted([g for g in groups if g not in best[1:]] + [tuple(sorted(best[1] + best[2]))])
    return [list(g) for g in groups]


def test_ed2_merging_against_a_slow_reference():
    rng, sizes = np.random.default_rng(0), set()
    for trial in range(60):
        m, n = int(rng.integers(1, 10)), int(rng.integers(1, 6))
        features = rng.random((m, n)) ** 4
        sim, eta = ed2.cosine(features), (0.0, -0.12, 0.1)[trial % 3]
        slow = [[float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for b in features] for a in features]
        assert np.allclose(sim, slow)
        groups, log = ed2.agglomerate(sim, eta)
        assert groups == slow_agglomerate(sim, eta) == ed2.check_partition(groups, m)
        assert all(x["done"] == (x["score"] > eta) for x in log) and all(x["done"] for x in log[:-1])
        assert len(groups) == m - sum(x["done"] for x in log)
        assert ed2.agglomerate(sim, 2.0)[0] == [[i] for i in range(m)] and len(ed2.agglomerate(sim, -2.0)[0]) == 1
        sizes.add(len(groups))
    assert len(sizes) > 3


def test_ed2_features_are_absolute_correlations():
    rng = np.random.default_rng(0)
    act, delta = rng.uniform(-1, 1, (500, 4)), rng.normal(size=(500, 6)) + 1e4
    delta[:, 1] -= act[:, 0]
    delta[:, 2], act[:, 3] = 7.0, 0.5  # a state that never changes, an actuator that never moves
    F_ = ed2.pearson_features(act, delta)
    assert F_.shape == (4, 5) and (F_[3] == 0).all()
    for i in range(3):
        for d, column in enumerate((0, 1, 3, 4, 5)):
            assert F_[i, d] == pytest.approx(abs(np.corrcoef(act[:, i], delta[:, column])[0, 1]), abs=1e-9)
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
    assert ed2.discover(act[:, :2], delta) == [[0], [1]]  # two actions never merge, however alike
    assert ed2.agglomerate(np.ones((2, 2)))[1][0]["score"] == 0
    same = np.eye(4)
    same[0, 1] = same[1, 0] = same[2, 3] = same[3, 2] = 0.5
    groups, log = ed2.agglomerate(same)
    assert groups == [[0, 1], [2, 3]] and log[0]["merge"] == [[0], [1]]  # of equal pairs the lowest comes first
    assert all(ed2.agglomerate(np.eye(5))[0] == [[i] for i in range(5)] for _ in range(2))
    bad = delta.copy()
    bad[3, 0] = np.nan
    for x, y in ((act, bad), (act[:-1], delta), (act[:1], delta[:1]), (act * np.inf, delta)):
        with says("discover got actions", "all finite"):
            ed2.discover(x, y)


@pytest.mark.parametrize("task", ["cheetah-run", "hopper-hop"])
def test_ed2_published_groups_from_5000_random_steps(task, tmp_path, request):
    folder = request.getfixturevalue("cheetah") if task == "cheetah-run" else suite_episodes(task, 10, tmp_path)
    random = Episodes.open(folder / "random", [task])
    assert len(ed2.transitions(random, task)[0]) == 5000
    known = ed2.PUBLISHED[task.split("-")[0]]
    groups, log = ed2.find_partition("sd2", task, random)
    assert groups == known and log[-1]["done"] is False and len(log) == 1 + sum(len(g) - 1 for g in known)
    _, act, delta = ed2.transitions(random, task, n=2500, seed=3)
    assert ed2.discover(act, delta) == known
    assert ed2.find_partition("published", task, random)[0] == known
    assert ed2.find_partition("full", task, random)[0] == [[j] for j in range(act.shape[1])]
    assert ed2.find_partition("none", task, random)[0] == [list(range(act.shape[1]))]
    other = ed2.find_partition("random", task, random, seed=1)[0]
    assert sorted(map(len, other)) == sorted(map(len, known)) and ed2.check_partition(other, act.shape[1])
    assert ed2.find_partition("human", task, random)[0] == ed2.LIMBS[task.split("-")[0]]


def test_ed2_walker_has_some_partition(tmp_path):
    """Its deciding score is near 0, so that draws differ: the ankles, 2 and 5, stay alone in all of them."""
    random = Episodes.open(suite_episodes("walker-walk", 3, tmp_path) / "random")
    groups, log = ed2.find_partition("sd2", "walker-walk", random)
    assert ed2.check_partition(groups, 6) == groups and 3 <= len(groups) <= 5 and [2] in groups and [5] in groups
    assert 0 < ed2.adjusted_rand(groups, WALKER) <= 1 and all(np.isfinite(x["score"]) for x in log)


def test_ed2_transitions_stay_inside_episodes(tmp_path):
    eps = fill(tmp_path, LENGTHS)
    obs, act, delta = ed2.transitions(eps, "a-b")
    assert len(obs) == len(act) == sum(LENGTHS["a-b"]) and (delta == 1).all() and (act[:, 0] - obs[:, 0] == 0.5).all()
    few = ed2.transitions(eps, "a-b", n=7, seed=1)
    assert few[0].shape == (7, 3) and np.array_equal(few[0], ed2.transitions(eps, "a-b", n=7, seed=1)[0])


def test_ed2_partitions_and_their_agreement():
    for table in (ed2.PUBLISHED, ed2.LIMBS):
        for groups in table.values():
            assert ed2.check_partition(groups, sum(map(len, groups))) == groups
    assert {k: sum(map(len, v)) for k, v in ed2.PUBLISHED.items()} == dict(walker=6, cheetah=6, hopper=4, reacher=2,
                                                                           finger=2, humanoid=21)
    for groups in ([[0, 1]], [[0, 1], [1, 2]], [[0, 1, 2], []], [[0, 1], [3]]):
        with says("exactly once", "0..2"):
            ed2.check_partition(groups, 3)
    for seed in range(5):
        got = ed2.random_partition(HUMANOID, seed)
        assert [len(g) for g in got] == [len(g) for g in HUMANOID] and ed2.check_partition(got, 21) == got
        assert got == ed2.random_partition(HUMANOID, seed) != ed2.random_partition(HUMANOID, seed + 1)
    mask = ed2.assignment(HOPPER, 4)
    assert mask.tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]

    def slow(p, q):  # over all pairs of actions: together or apart
        label = [{j: i for i, g in enumerate(x) for j in g} for x in (p, q)]
        pairs = [(i, j) for i in label[0] for j in label[0] if i < j]
        both = [[x[i] == x[j] for x in label] for i, j in pairs]
        a, b, ab, n = sum(x for x, _ in both), sum(x for _, x in both), sum(x and y for x, y in both), len(pairs)
        return (ab - a * b / n) / ((a + b) / 2 - a * b / n)

    for p, q in ((WALKER, ed2.LIMBS["walker"]), (CHEETAH, WALKER), (HUMANOID, ed2.LIMBS["humanoid"])):
        assert ed2.adjusted_rand(p, q) == pytest.approx(slow(p, q)) == ed2.adjusted_rand(q, p)
    assert ed2.adjusted_rand([[0, 1], [2, 3]], [[0, 1], [2], [3]]) == pytest.approx(4 / 7)
    assert ed2.adjusted_rand([[0, 1], [2, 3]], [[2, 3], [0, 1]]) == 1  # the names of groups do not matter
    one, apart = [[0, 1, 2, 3]], [[0], [1], [2], [3]]
    assert ed2.adjusted_rand(one, one) == ed2.adjusted_rand(apart, apart) == 1 and ed2.adjusted_rand(one, apart) == 0
    assert ed2.adjusted_rand([[0]], [[0]]) == 1


@pytest.mark.parametrize("learned", [False, True])
def test_ed2_groups_are_found_in_a_trained_model(learned):
    """A linear system whose state says more about the actions than correlation can untangle."""
    rng = np.random.default_rng(0)
    s = rng.normal(size=(3000, 4))
    act = np.clip(0.6 * s @ rng.normal(size=(4, 4)) + rng.normal(size=(3000, 4)), -3, 3)  # they look at the state
    push = np.array([[1.0, 0.5, 0, 0], [0.8, 0.6, 0, 0], [0, 0, 0.7, 1.0], [0, 0, 0.6, 0.9]])
    data_ = [torch.tensor(x, dtype=torch.float32) for x in (s, act, act @ push - 0.3 * s)]
    for seed in range(2):
        groups, log = ed2.fit_influence(*data_, seed, steps=400 if learned else 150, batch=64, learned=learned)
        assert groups == [[0, 1], [2, 3]] and bool(log) != learned
    assert ed2.fit_influence(*data_, 0, steps=2, eta=2.0)[0] == [[0], [1], [2], [3]]


def test_ed2_influence_is_the_effect_of_a_permuted_action():
    s, act = torch.randn(4000, 2), torch.randn(4000, 3)
    w = torch.tensor([[1.0, 0.0], [0.0, -2.0], [0.0, 0.0]])
    got = ed2.influence(lambda s, a: s + a @ w, s, act, gen())
    assert torch.allclose(got, w.abs() * 2 / np.pi**0.5, atol=0.07)  # the mean distance of two normal numbers
    assert (got[w == 0] < 1e-6).all() and not got.requires_grad
# ------------------------------------------------------------------------------------------ decomposed TD-MPC2 dynamics
AGGS = ("hidden", "pre", "post")


def any_dynamics(groups, agg, n=16, width=8, simnorm=True, seed=0):
    """Dynamics whose biases and gains matter."""
    torch.manual_seed(seed)
    A = sum(map(len, groups))
    d = ed2.Dynamics(n, A, n, width, ed2.assignment(groups, A), agg, simnorm)
    for p in d.parameters():
        p.data += 0.4 * torch.randn_like(p)
    return d


def slow_norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()


def slow_dynamics(d, s, act, groups):
    """One trunk after the other, each with its own actions only."""
    hidden, out, w = [], [], d.width
    for i, g in enumerate(groups):
        own = slice(i * w, (i + 1) * w)
        x = torch.cat([s, act[:, g]], 1) @ torch.cat([d.w_s[:, own], d.w_a[g][:, own]]) + d.bias[own]
        x = slow_norm(x) * d.gain[i] + d.shift[i]
        x = x * torch.tanh(x.exp().log1p()) @ d.second.weight[i] + d.second.bias[i, 0]
        x = slow_norm(x) * d.second.gain[i, 0] + d.second.shift[i, 0]
        hidden.append(x * torch.tanh(x.exp().log1p()))

    def end(x, i):
        x = slow_norm(x) * d.out_gain[i, 0] + d.out_shift[i, 0]
        return torch.cat([part.softmax(1) for part in x.split(8, 1)], 1)

    if d.agg == "hidden":
        return end(sum(hidden) / len(groups) @ d.head.weight[0] + d.head.bias[0, 0], 0)
    logits = [x @ d.head.weight[i] + d.head.bias[i, 0] for i, x in enumerate(hidden)]
    if d.agg == "pre":
        return end(sum(logits) / len(groups), 0)
    out = [end(x, i) for i, x in enumerate(logits)]
    return sum(out) / len(groups)


@pytest.mark.parametrize("agg", AGGS)
@pytest.mark.parametrize("groups", [WALKER, [[0, 1, 2]], [[2], [0], [1, 3]]])
def test_ed2_batched_trunks_are_the_looped_ones(groups, agg):
    d, A = any_dynamics(groups, agg), sum(map(len, groups))
    s, act = torch.randn(7, 16), torch.randn(7, A)
    got = d(s, act)
    assert torch.allclose(got, slow_dynamics(d, s, act, groups), atol=1e-5)
    assert torch.allclose(got.unflatten(1, (2, 8)).sum(2), torch.ones(7, 2), atol=1e-5) and got.std() > 0.02
    flat = any_dynamics(groups, agg, simnorm=False)
    assert flat.out_gain is None and (flat(s, act) < 0).any()


@pytest.mark.parametrize("agg", AGGS)
def test_ed2_one_group_is_the_plain_network(agg):
    d = any_dynamics([[0, 1, 2]], agg)
    mlp = nn.Sequential(ed2.NormedLinear(19, 8), ed2.NormedLinear(8, 8), ed2.NormedLinear(8, 16, ed2.simnorm))
    weights = [torch.cat([d.w_s, d.w_a]), d.second.weight[0], d.head.weight[0]]
    rest = [(d.bias, d.gain[0], d.shift[0]), (d.second.bias[0, 0], d.second.gain[0, 0], d.second.shift[0, 0]),
            (d.head.bias[0, 0], d.out_gain[0, 0], d.out_shift[0, 0])]
    for layer, w, (bias, gain, shift) in zip(mlp, weights, rest):
        layer.load_state_dict({"weight": w.T, "bias": bias, "ln.weight": gain, "ln.bias": shift})
    s, act = torch.randn(9, 16), torch.randn(9, 3)
    assert torch.allclose(d(s, act), mlp(torch.cat([s, act], 1)), atol=1e-5)
    assert sum(p.numel() for p in d.parameters()) == sum(p.numel() for p in mlp.parameters()) == ed2.dynamics_params(
        16, 3, 8, [3], agg)


@pytest.mark.parametrize("agg", AGGS)
def test_ed2_a_trunk_sees_its_own_actions_only(agg):
    d = any_dynamics(WALKER, agg)
    masked = (1 - d.assign).bool().repeat_interleave(d.width, 1)
    s, act = torch.randn(5, 16), torch.randn(5, 6)
    before = d.trunks(s, act)
    for j in range(6):
        other = act.clone()
        other[:, j] = -3.0
        after = d.trunks(s, other)
        assert [torch.equal(x, y) for x, y in zip(before, after)] == [j not in g for g in WALKER]
    start = copy.deepcopy(d.state_dict())
    opt = torch.optim.Adam(d.parameters(), 1e-2)
    for _ in range(5):
        opt.zero_grad()
        d(s, act).square().sum().backward()
        assert (d.w_a.grad[masked] == 0).all() and (d.w_a.grad[~masked] != 0).all()
        opt.step()
    assert torch.equal(d.w_a[masked], start["w_a"][masked]) and (d.w_a[~masked] != start["w_a"][~masked]).all()
    used = sum(p.numel() for p in d.parameters()) - int(masked.sum())
    assert used == ed2.dynamics_params(16, 6, d.width, [4, 1, 1], agg)
    soft = torch.rand(6, 3)  # an assignment that is being learned
    assert torch.allclose(d.trunks(s, act, soft)[1], d.trunks(s, act * soft[:, 1], torch.ones(6, 3))[1], atol=1e-5)


@pytest.mark.parametrize("size, agg, widths", [
    ("5M", "hidden", (272, 224, 272, 136)), ("5M", "pre", (216, 168, 208, 88)), ("5M", "post", (208, 168, 208, 88)),
    ("1M", "hidden", (216, 184, 216, 120)), ("1M", "pre", (184, 152, 184, 88)), ("1M", "post", (184, 152, 184, 88))])
def test_ed2_matched_widths_of_dynamics(size, agg, widths):
    latent, hidden = ed2.TDMPC2_SIZES[size]
    for groups, width in zip((WALKER, CHEETAH, HOPPER, HUMANOID), widths):
        A = sum(map(len, groups))

        def count(groups, width, A=A):
            return ed2.dynamics_params(latent, A, width, [len(g) for g in groups], agg)

        single = count([list(range(A))], hidden)
        assert ed2.variant("ed2", groups, hidden, count, 0) == (groups, width)
        assert abs(count(groups, width) / single - 1) < 0.04
        assert ed2.variant("single", groups, hidden, count, 0) == ([list(range(A))], hidden)
        assert ed2.variant("ed2_wide", groups, hidden, count, 0) == (groups, hidden)
        other, w = ed2.variant("random", groups, hidden, count, 5)
        assert w == width and sorted(map(len, other)) == sorted(map(len, groups))
        every, w = ed2.variant("nosplit", groups, hidden, count, 0)
        assert every == [list(range(A))] * len(groups) and abs(count(every, w) / single - 1) < 0.05
        whole, w = ed2.variant("single_wide", groups, hidden, count, 0)
        assert len(whole) == 1 and abs(count(whole, w) / count(groups, hidden) - 1) < 0.05
    assert size == "1M" or 790_000 < single < 803_000


def test_ed2_no_width_fits():
    assert ed2.match_width(lambda w: 10 * w, 803) == 80
    with says("within 5 %", "--match none", "width 8"):
        ed2.match_width(lambda w: 1000 * w, 4000)


# -------------------------------------------------------------------------------------------------- TD-MPC2's losses
class Push3:
    """A sampler of slices of a linear system that keeps what it gave."""

    def __init__(self, steps=3):
        self.steps, self.seen = steps, []

    def sequences(self, n, generator, held_out=False):
        obs = [torch.randn(n, 4, generator=generator)]
        act = 2 * torch.rand(self.steps, n, 3, generator=generator) - 1
        for a in act:
            obs.append(0.9 * obs[-1] + 0.3 * torch.cat([a, a[:, :1]], 1))
        self.seen.append(torch.stack(obs))
        return torch.stack(obs), act, obs[0][:, 0] * torch.ones(self.steps, 1), torch.zeros(n, dtype=torch.long)


def tiny_tdmpc2(groups=None, seed=0, E=3):
    torch.manual_seed(seed)
    groups = groups or [[0, 1, 2]]
    dynamics = ed2.Dynamics(16, 3, 16, 24, ed2.assignment(groups, 3))
    torch.manual_seed(seed)
    return ed2.TDMPC2(4, 3, 16, 24, dynamics, E)


def test_ed2_consistency_against_its_definition():
    d = any_dynamics(TUG_GROUPS, "pre")
    z, act, target = torch.rand(5, 16), torch.randn(4, 5, 3), torch.rand(4, 5, 16)
    want, now = 0.0, z
    for t in range(4):
        now = slow_dynamics(d, now, act[t], TUG_GROUPS)
        assert torch.allclose(ed2.unroll(d, z, act)[t], now, atol=1e-5)
        error = sum(((now[b, i] - target[t, b, i]) ** 2).item() for b in range(5) for i in range(16)) / 80
        want += 0.7**t * error / 4
    assert ed2.consistency_loss(d, z, act, target, rho=0.7).item() == pytest.approx(want, rel=1e-4)


def test_ed2_two_hot_and_policy_of_tdmpc2():
    x = torch.tensor([0.0, 0.3, -7.0, 500.0, 1e9])
    logits = torch.randn(5, 101)
    got = ed2.two_hot_loss(logits, x)
    for i in range(5):
        y = np.clip(np.sign(x[i].item()) * np.log1p(abs(x[i].item())), -10, 10)
        weight = np.maximum(0, 1 - abs(np.linspace(-10, 10, 101) - y) / 0.2)
        assert got[i].item() == pytest.approx(-(torch.tensor(weight) * logits[i].log_softmax(0)).sum().item(), rel=1e-3)
    sharp = torch.full((1, 101), -1e3)
    sharp[0, 60] = 0
    assert ed2.two_hot_mean(sharp).item() == pytest.approx(np.expm1(2.0), rel=1e-4)
    model, z, noise = tiny_tdmpc2(), torch.rand(6, 16), torch.randn(6, 3)
    mean, s = model.prior(z).chunk(2, -1)
    std = (-10 + 6 * (torch.tanh(s) + 1)).exp()
    normal = torch.distributions.Normal(mean, std)
    want = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform())
    act, logp = model.policy(z, noise)
    assert torch.allclose(act, torch.tanh(mean + std * noise)) and act.abs().max() <= 1
    assert torch.allclose(logp, want.log_prob(act).sum(-1), atol=1e-2)


def test_ed2_world_model_loss_against_a_slow_reference():
    model = tiny_tdmpc2(TUG_GROUPS)
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    obs, act, *_ = Push3().sequences(4, gen())
    rew, noise, pair = torch.randn(3, 4), torch.randn(3, 4, 3), torch.tensor([2, 0])
    loss, metrics, z = ed2.world_model_loss(model, obs, act, rew, noise, pair)
    want = dict(consistency=0.0, reward=0.0, value=0.0)
    with torch.no_grad():
        for b in range(4):
            now = model.encoder(obs[0, b])
            for t in range(3):
                assert torch.allclose(z[t, b], now, atol=1e-5)
                x = torch.cat([now, act[t, b]])
                want["reward"] += 0.5**t / 12 * ed2.two_hot_loss(model.reward(x), rew[t, b]).item()
                true = model.encoder(obs[t + 1, b])
                y = torch.cat([true, model.policy(true, noise[t, b])[0]]).expand(3, 1, -1)
                q = ed2.two_hot_mean(model.q_slow(y))[:, 0]
                value = rew[t, b] + 0.99 * min(q[2], q[0])
                for e in range(3):
                    want["value"] += 0.5**t / 36 * ed2.two_hot_loss(model.q(x.expand(3, 1, -1))[e, 0], value).item()
                now = model.dynamics(now[None], act[t, b, None])[0]
                want["consistency"] += 0.5**t / 12 * (now - true).square().mean().item()
    for k, v in want.items():
        assert metrics[k].item() == pytest.approx(v, rel=1e-4), k
    total = 20 * want["consistency"] + 0.1 * (want["reward"] + want["value"])
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
        losses.append(ed2.prior_loss(model, z, noise, scale))
        opt.zero_grad()
        losses[-1].backward()
        opt.step()
    assert losses[-1] < losses[0] - 0.02 and scale >= 1 and not scale.requires_grad


def test_ed2_joint_training_learns_and_variants_see_the_same(monkeypatch):
    monkeypatch.setattr(ed2, "rate", lambda step, total, lr: lr)
    args = ed2_args(updates=80, batch=16, lr=3e-3)
    seen, tails = [], []
    for groups in (None, TUG_GROUPS):
        model, sampler = tiny_tdmpc2(groups), Push3()
        before = copy.deepcopy(model)
        assert all(torch.equal(a, b) for a, b in zip(tiny_tdmpc2().reward.parameters(), model.reward.parameters()))
        tails.append([ed2.train_tdmpc2(model, sampler, dataclasses.replace(args, updates=u), 5, ed2.compiler(False))
                      for u in (10, 80)])
        seen.append(torch.stack(sampler.seen))
        for name, m in model.named_children():
            assert all((a != b).any() for a, b in zip(m.parameters(), getattr(before, name).parameters())), name
        drift = [(a - b).norm() for a, b in zip(model.q_slow.parameters(), before.q_slow.parameters())]
        full = [(a - b).norm() for a, b in zip(model.q.parameters(), before.q.parameters())]
        assert all(0 < a < 0.9 * b for a, b in zip(drift, full))
        assert all(p.requires_grad for p in model.q.parameters())
        assert not any(p.requires_grad for p in model.q_slow.parameters())
    assert torch.equal(*seen) and len(seen[0]) == 90
    assert all(late < 0.6 * early for early, late in tails), tails


def test_ed2_dynamics_alone_learn_on_a_fixed_encoder():
    encoder = nn.Sequential(ed2.NormedLinear(4, 32), ed2.NormedLinear(32, 16, ed2.simnorm))
    before, seen, args = copy.deepcopy(encoder.state_dict()), [], ed2_args(updates=60, batch=32, lr=3e-3)
    for groups in ([[0, 1, 2]], TUG_GROUPS):
        torch.manual_seed(0)
        d, sampler = ed2.Dynamics(16, 3, 16, 24, ed2.assignment(groups, 3)), Push3()
        start = copy.deepcopy(d)
        ed2.train_dynamics(d, encoder, sampler, args, 3, ed2.compiler(False))
        assert all(torch.equal(encoder.state_dict()[k], v) for k, v in before.items())
        assert all(p.grad is None for p in encoder.parameters())
        assert all((a != b).any() for a, b in zip(d.parameters(), start.parameters()))
        obs, act, *_ = Push3().sequences(200, gen(9))
        z = encoder(obs).detach()
        new, old = (ed2.consistency_loss(x, z[0], act, z[1:]).item() for x in (d, start))
        assert new < 0.5 * old
        seen.append(torch.stack(sampler.seen))
    assert torch.equal(*seen)
    other = Push3()
    ed2.train_dynamics(d, encoder, other, args, 4, ed2.compiler(False))
    assert not torch.equal(torch.stack(other.seen), seen[0])


def test_ed2_rate_and_checks():
    rates = [ed2.rate(t, 200, 2.0) for t in range(201)]
    assert rates[0] == rates[100] == 2.0 and rates[200] == pytest.approx(0.06) and rates[150] == pytest.approx(1.03)
    assert all(a >= b for a, b in zip(rates, rates[1:]))
    assert ed2.check_finite(3, {"loss": torch.tensor(1.0)}, 2.0) == {"loss": 1.0, "grad_norm": 2.0}
    for metrics, norm in (({"loss": torch.tensor(float("nan"))}, 0.0), ({"loss": 0.0}, float("inf"))):
        with says("update 7 is not finite", "smaller --lr"):
            ed2.check_finite(7, metrics, norm)


def test_ed2_latent_errors_of_models_that_are_known():
    class Oracle(nn.Module):  # the latents are the states
        def forward(self, s, a):
            return 0.9 * s + 0.3 * torch.cat([a, a[:, :1]], 1)

    encoder = nn.Linear(4, 4)
    with torch.no_grad():
        encoder.weight.copy_(torch.eye(4))
        encoder.bias.zero_()
    right = ed2.measure_latents(encoder, Oracle(), Push3(10))
    assert max(v for k, v in right.items() if not k.startswith("persistence")) < 1e-6 < right["persistence_mse_1"]
    still = ed2.measure_latents(encoder, lambda s, a: s, Push3(10))
    for h in (1, 3, 5, 10):
        assert still[f"mse_{h}"] == pytest.approx(still[f"persistence_mse_{h}"], rel=1e-5)
    errors = [(still[f"mse_{h}"]) for h in (1, 3)]
    assert errors[0] < still["per_step_mse"] < errors[1] and still["fast_mse_1"] > errors[0]
    sampler = Push3(10)
    mean = ed2.measure_latents(encoder, lambda s, a: 0 * s, sampler)
    obs = sampler.seen[-1]
    want = (obs[5].square().mean(0) / obs.flatten(0, 1).var(0)).mean().item()
    assert mean["state_nmse_5"] == pytest.approx(want, rel=0.02)
    want = (obs[5].square().mean(0).sum() / obs[0].var(0).sum()).item()
    assert mean["latent_nmse_5"] == pytest.approx(want, rel=1e-3)
    assert right["logged"] < 1e-9


def test_ed2_ridge_and_nmse():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(500, 3)), rng.normal(size=(4, 2))
    assert np.allclose(ed2.ridge(x, np.c_[x, np.ones(500)] @ w, 1e-9), w, atol=1e-6)
    true = rng.normal(size=(1000, 3)) * [1, 5, 0]
    assert ed2.nmse(true.mean(0), true, true.var(0)) == pytest.approx(1) and ed2.nmse(true, true, true.var(0)) == 0


def test_ed2_tdmpc2_dynamics_learn_cheetah(cheetah):
    replay = Episodes.open(cheetah / "replay")
    sampler = ed2.sampler_of(replay, "cheetah-run", 3, "cpu")
    torch.manual_seed(0)
    encoder = nn.Sequential(ed2.NormedLinear(17, 64), ed2.NormedLinear(64, 64, ed2.simnorm))
    d = ed2.Dynamics(64, 6, 64, 96, ed2.assignment(CHEETAH, 6))
    obs, act, *_ = sampler.sequences(256, gen(), held_out=True)
    z = encoder(obs).detach()
    before = ed2.consistency_loss(d, z[0], act, z[1:]).item()
    ed2.train_dynamics(d, encoder, sampler, ed2_args(updates=150, batch=64, lr=3e-3), 0, ed2.compiler(False))
    assert ed2.consistency_loss(d, z[0], act, z[1:]).item() < before / 3


# --------------------------------------------------------------------------------- DreamerV3 with a decomposed core
FULL9 = [[j] for j in range(9)]  # more groups than blocks
TINY_DREAMER = dict(deter=32, hidden=8, classes=4, units=16, stoch=4)


def tiny_dreamer(obs_dim=3, act_dim=6, seed=0, **kw):
    torch.manual_seed(seed)
    return ed2.DreamerV3(obs_dim, act_dim, **TINY_DREAMER | kw)


def any_core(act_dim=6, seed=0, **kw):
    torch.manual_seed(seed)
    rssm = ed2.RSSM(act_dim, 16, 32, 8, 4, stoch=4, **kw)
    for p in rssm.parameters():  # biases and gains that matter
        if p.ndim < 3 and not (p.ndim == 2 and p.shape[1] > 8):
            p.data.add_(0.3 * torch.randn(p.shape))
    return rssm


def recording(T=6, B=4, O=3, A=6, seed=1):
    g = gen(seed)
    return (torch.randn(T + 1, B, O, generator=g), 2 * torch.rand(T, B, A, generator=g) - 1,
            torch.randn(T, B, generator=g))


def noise_for(model, T, B, H=5, A=6, seed=2):
    return ed2.draw_noise(model.rssm, A, T, B, H, gen(seed))


def test_ed2_dreamer_symexp_two_hot():
    assert (ed2.symexp_two_hot_mean(torch.zeros(5, 255)) == 0).all()  # exactly
    x = torch.tensor([0.0, 1e-3, -0.3, 1.0, 7.7, -250.0, 1e4])
    k, high = ed2.symexp_two_hot(x)
    bins = ed2.symexp_bins("cpu")
    assert bins.shape == (255,) and bins[127] == 0 and torch.equal(bins, -bins.flip(0))
    assert torch.allclose(bins[k] * (1 - high) + bins[k + 1] * high, x, rtol=1e-4, atol=1e-5)
    assert ((bins[k] <= x + 1e-5 * x.abs()) & (x <= bins[k + 1] + 1e-5 * x.abs())).all()
    p = torch.zeros(len(x), 255).scatter(1, k[:, None], 1 - high[:, None]).scatter(1, k[:, None] + 1, high[:, None])
    logits = torch.randn(len(x), 255, requires_grad=True)
    loss = ed2.symexp_two_hot_loss(logits, x)
    assert torch.allclose(loss, -(p * logits.log_softmax(-1)).sum(-1), atol=1e-5)
    assert torch.allclose(ed2.symexp_two_hot_loss(logits, x, x), 2 * loss, atol=1e-5)
    loss.sum().backward()
    assert torch.allclose(logits.grad, logits.softmax(-1) - p, atol=1e-5)
    assert torch.allclose(ed2.symexp_two_hot_mean((p + 1e-30).log()), x, rtol=1e-4, atol=1e-5)
    assert torch.allclose(ed2.symexp(ed2.symlog(x)), x, rtol=1e-5)


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_ed2_dreamer_lambda_return(lam):
    H = 5
    rew, cont, value = torch.randn(H, 2), torch.rand(H, 2), torch.randn(H + 1, 2)
    out = ed2.dreamer_lambda_return(rew, value, cont, lam)
    for t in range(H):
        def n_step(n, t=t):  # n rewards, then the value
            return sum(cont[t:t + i].prod(0) * rew[t + i] for i in range(n)) + cont[t:t + n].prod(0) * value[t + n]
        last = H - t
        want = sum((1 - lam) * lam ** (n - 1) * n_step(n) for n in range(1, last)) + lam ** (last - 1) * n_step(last)
        assert torch.allclose(out[t], want, atol=1e-5)


def test_ed2_dreamer_latents():
    logits = torch.randn(3, 4, requires_grad=True)
    p = ed2.unimix(logits)
    assert torch.allclose(p, 0.99 * logits.softmax(-1) + 0.0025, atol=1e-6)
    assert ed2.unimix(torch.tensor([[0.0, 1e4]])).min() == pytest.approx(0.005)
    g = gen()
    z = ed2.sample_latent(p.expand(20_000, 3, 4), ed2.draw_gumbel((20_000, 3, 4), g)).unflatten(-1, (3, 4))
    assert torch.equal(z.sum(-1).round(), torch.ones(20_000, 3))
    assert torch.allclose(z.mean(0), p, atol=0.02)
    w = torch.randn(3, 4)  # straight-through: the gradient of p
    a = torch.autograd.grad((ed2.sample_latent(p, torch.zeros(3, 4)).unflatten(-1, (3, 4)) * w).sum(), logits,
                            retain_graph=True)[0]
    assert torch.allclose(a, torch.autograd.grad((p * w).sum(), logits)[0])
    q = ed2.unimix(torch.randn(3, 4))
    want = torch.distributions.kl_divergence(torch.distributions.Categorical(p), torch.distributions.Categorical(q))
    assert torch.allclose(ed2.kl(p, q), want.sum(), atol=1e-5)


def test_ed2_dreamer_parameter_counts():
    model = ed2.DreamerV3(24, 6, **ed2.DREAMER_SIZES["1m"])
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in model.named_children()}
    assert sizes == dict(encoder=10_112, rssm=364_416, decoder=51_096, reward=57_663, cont=41_153, actor=50_316,
                         critic=66_111)
    assert ed2.count_parameters(model) == 640_867
    assert ed2.core_params(6, [list(range(6))], "mean", 512, 512, 64, 128) == 273_664
    with torch.device("meta"):
        assert sum(p.numel() for p in ed2.DreamerV3(24, 6, **ed2.DREAMER_SIZES["12m"]).parameters()) == 9_738_019
        assert sum(p.numel() for p in ed2.DreamerV3(67, 21, **ed2.DREAMER_SIZES["1m"]).parameters()) == 649_324
        assert sum(p.numel() for p in ed2.DreamerV3(67, 21, **ed2.DREAMER_SIZES["12m"]).parameters()) == 9_771_628


@pytest.mark.parametrize("kw", [
    dict(), dict(groups=WALKER, width=16), dict(groups=WALKER, agg="blocks"),
    dict(groups=[[0, 1, 2, 3, 4, 5]] * 3, width=16)])
def test_ed2_dreamer_core_params_counts_what_is_used(kw):
    rssm = any_core(**kw)
    used = sum(p.numel() for name, p in rssm.named_parameters() if not name.startswith(("prior", "post")))
    used -= int((1 - rssm.act_mask).sum()) * 8
    groups = kw.get("groups", [list(range(6))])
    assert used == ed2.core_params(6, groups, kw.get("agg", "mean"), kw.get("width", 32), 32, 8, 16)


def slow_core(rssm, h, z, act, groups, agg):
    """Sec. 'Block GRU' of DreamerV3, word by word, one sub-core and one block at a time: h_i (k, B, D)"""
    def norm(x, gain):
        return x / (x.square().mean(-1, keepdim=True) + 1e-4).sqrt() * gain
    silu, sigmoid, g, d = F.silu, torch.sigmoid, rssm.blocks, rssm.deter
    x0, x1 = (silu(norm(m[0](x), m[1].gain)) for m, x in ((rssm.h_in, h), (rssm.z_in, z)))
    a = act / act.abs().clamp(min=1)
    parts = groups if agg == "mean" else [sum(groups[e::g], []) for e in range(min(g, len(groups)))]
    x2 = [silu(norm(a[:, part] @ rssm.act_weight[part, e] + rssm.act_bias[e], rssm.act_gain[e]))
          for e, part in enumerate(parts)]
    out = []
    for i in range(len(groups) if agg == "mean" else 1):
        hidden = []
        for b in range(g):
            mine = x2[i] if agg == "mean" else x2[b % len(parts)]
            x = torch.cat([h[:, b * d // g:(b + 1) * d // g], x0, x1, mine], -1)
            hidden.append(x @ rssm.hid.weight[i, b] + rssm.hid.bias[i, b])
        if agg == "mean":
            teams = [list(range(g))]
        else:
            teams = [list(range(e, g, len(parts))) for e in range(len(parts))]
        for team in teams:
            whole = torch.cat([hidden[b] for b in team], -1)
            whole = silu(norm(whole, torch.cat([rssm.hid_gain[i, b] for b in team])))
            for b, x in zip(team, whole.chunk(len(team), -1)):
                hidden[b] = x
        new = []
        for b in range(g):
            r, c, u = (hidden[b] @ rssm.gru.weight[i, b] + rssm.gru.bias[i, b]).chunk(3, -1)
            u, old = sigmoid(u - 1), h[:, b * d // g:(b + 1) * d // g]
            new.append(u * torch.tanh(sigmoid(r) * c) + (1 - u) * old)
        out.append(torch.cat(new, -1))
    return torch.stack(out)


CORES = [(6, [list(range(6))], "mean", None), (6, WALKER, "mean", 16), (6, WALKER, "mean", None), (9, FULL9, "mean", 8),
         (6, [list(range(6))] * 3, "mean", 16), (6, [list(range(6))], "blocks", None), (6, WALKER, "blocks", None),
         (9, FULL9, "blocks", None), (6, [list(range(6))] * 3, "blocks", None)]


def core_inputs(act_dim, B=5):
    g = gen(3)
    return [torch.randn(B, n, generator=g) for n in (32, 16, act_dim)]


@pytest.mark.parametrize("act_dim, groups, agg, width", CORES)
def test_ed2_dreamer_batched_core_is_the_looped_one(act_dim, groups, agg, width):
    rssm = any_core(act_dim, groups=groups, agg=agg, width=width)
    h, z, act = core_inputs(act_dim)
    weights = rssm.core_weights()
    got = rssm.subcores(weights, h, z, rssm.act_input(weights, act)).permute(0, 2, 1, 3).flatten(2)
    want = slow_core(rssm, h, z, act, groups, agg)
    assert torch.allclose(got, want, atol=1e-5)
    assert torch.allclose(rssm.step(weights, h, z, rssm.act_input(weights, act)), want.mean(0), atol=1e-5)


@pytest.mark.parametrize("agg", ["mean", "blocks"])
def test_ed2_dreamer_one_group_is_the_single_model(agg):
    single, one = tiny_dreamer(), tiny_dreamer(seed=1, groups=[list(range(6))], agg=agg)
    assert ed2.count_parameters(single) == ed2.count_parameters(one)
    one.load_state_dict(single.state_dict())
    obs, act, rew = recording()
    noise = noise_for(single, 6, 4)
    a, b = (ed2.rssm_loss(m, obs, act, rew, noise[0]) for m in (single, one))
    assert torch.allclose(a[0], b[0], atol=1e-5) and torch.allclose(a[2][0], b[2][0], atol=1e-5)


@pytest.mark.parametrize("act_dim, groups, agg, width", [c for c in CORES if len(c[1]) > 1 and len(c[1][0]) < c[0]])
def test_ed2_dreamer_foreign_actions_do_not_matter(act_dim, groups, agg, width):
    rssm = any_core(act_dim, groups=groups, agg=agg, width=width)
    h, z, act = core_inputs(act_dim)
    weights = rssm.core_weights()
    parts = groups if agg == "mean" else ed2.merged_groups(groups, 8)
    before = rssm.subcores(weights, h, z, rssm.act_input(weights, act))
    for j in range(act_dim):
        other = act.clone()
        other[:, j] = -0.37
        after = rssm.subcores(weights, h, z, rssm.act_input(weights, other))
        for n in range(len(groups) if agg == "mean" else 8):  # sub-core, or block
            x, y = (t[n] if agg == "mean" else t[0, n] for t in (before, after))
            assert torch.equal(x, y) == (j not in parts[n % len(parts)])
    after.square().sum().backward()
    masked = (1 - rssm.act_mask).bool().expand_as(rssm.act_weight)
    assert (rssm.act_weight.grad[masked] == 0).all() and (rssm.act_weight[masked] == 0).all()
    assert (rssm.act_weight.grad[~masked] != 0).all()


def test_ed2_dreamer_initial_scale_follows_the_true_fan_in():
    torch.manual_seed(0)
    rssm = ed2.RSSM(6, 16, 32, 512, 4, stoch=4, groups=WALKER, width=16)
    for e, part in enumerate(WALKER):
        assert rssm.act_weight[part, e].std().item() == pytest.approx(len(part) ** -0.5, rel=0.1)
        assert rssm.act_weight[part, e].abs().max() <= 2 * 1.1368 * len(part) ** -0.5
    assert rssm.hid.weight.std().item() == pytest.approx((8 * (4 + 3 * 512)) ** -0.5, rel=0.1)
    model = tiny_dreamer()
    assert (model.reward[-1].weight == 0).all() and (model.critic[-1].weight == 0).all()
    assert model.actor[-1].weight.abs().max() < 0.01


def test_ed2_dreamer_kl_floor():
    model = tiny_dreamer()
    for net in (model.rssm.prior_net, model.rssm.post_net):
        nn.init.zeros_(net[-1].weight)
    obs, act, rew = recording()
    loss, metrics, _ = ed2.rssm_loss(model, obs, act, rew, noise_for(model, 6, 4)[0])
    assert metrics["dyn"] == 1 and metrics["rep"] == 1 and metrics["dyn_raw"] == 0
    assert metrics["prior_entropy"].item() == pytest.approx(4 * np.log(4), rel=1e-5)
    loss.backward()
    assert all((p.grad == 0).all() for p in model.rssm.prior_net.parameters())


def test_ed2_dreamer_time_alignment():
    model = tiny_dreamer()
    obs, act, rew = recording()
    gumbel = noise_for(model, 6, 4)[0]
    h = ed2.rssm_loss(model, obs, act, rew, gumbel)[2][0]
    other = act.clone()
    other[2] = 0.9
    h2 = ed2.rssm_loss(model, obs, other, rew, gumbel)[2][0]
    assert torch.equal(h[:3], h2[:3]) and not torch.equal(h[3], h2[3])
    # the reward of the first state does not exist: a reward head that is right about rew has the entropy as loss
    nn.init.zeros_(model.reward[-1].weight)
    model.reward[-1].bias.data[127] = 50.0
    _, metrics, _ = ed2.rssm_loss(model, obs, act, torch.zeros_like(rew), gumbel)
    assert metrics["rew"] < 1e-6
    # metrics of late steps only
    _, late, _ = ed2.rssm_loss(model, obs, act, rew, gumbel, skip=3)
    _, all_steps, _ = ed2.rssm_loss(model, obs, act, rew, gumbel)
    assert set(late) == {"rec", "rew", "con", "dyn", "rep", "dyn_raw", "post_entropy", "prior_entropy"}
    assert late["rec"] != all_steps["rec"] and all(not x.requires_grad and x.ndim == 0 for x in late.values())


def test_ed2_dreamer_world_model_alone_and_gradient_paths():
    model = tiny_dreamer(groups=WALKER, width=16)
    slow = copy.deepcopy(model.critic).requires_grad_(False)
    obs, act, rew = recording()
    noise = noise_for(model, 6, 4)
    loss, _, (h, z) = ed2.rssm_loss(model, obs, act, rew, noise[0])
    loss.backward(retain_graph=True)
    assert all(p.grad is not None and p.grad.isfinite().all() for m in model.world() for p in m.parameters())
    assert all(p.grad is None for p in [*model.actor.parameters(), *model.critic.parameters()])
    model.zero_grad()
    nn.init.normal_(model.critic[-1].weight, std=0.1)  # a zero critic would pass no gradient on
    loss, metrics, new = ed2.behaviour_loss(model, slow, h.detach(), z.detach(), rew, *noise[1:], torch.zeros(2))
    loss.backward()
    assert all(p.grad is None for m in model.world() for p in m.parameters())  # imagination is detached
    assert all(p.grad is not None for p in [*model.actor.parameters(), *model.critic.parameters()])
    assert new.shape == (2,) and metrics["scale"] >= 1
    ed2.behaviour_loss(model, slow, h, z, rew, *noise[1:], torch.zeros(2))[0].backward()
    assert model.encoder[0].weight.grad.abs().sum() > 0  # the replay loss reaches the world model


def test_ed2_dreamer_reinforce_prefers_rewarded_actions():
    """A world whose reward is the sign of the action: the policy loss must raise the mean action."""
    model = tiny_dreamer(act_dim=1)
    with torch.no_grad():
        feat, act = ed2.imagine(model, *model.rssm.initial(64, "cpu"), *noise_for(model, 1, 64, H=3, A=1)[1:])
    mean, std = model.policy(feat[:-1])
    logp = torch.distributions.Normal(mean, std).log_prob(act).sum(-1)
    (-(logp * act[..., 0].sign()).mean()).backward()
    assert model.actor[-1].bias.grad[0] < 0
    assert feat.shape == (4, 64, 48) and act.shape == (3, 64, 1)


def test_ed2_dreamer_return_range():
    x = torch.randn(1000)
    got = ed2.return_range(torch.zeros(2), x)
    assert torch.allclose(got, 0.01 * torch.tensor(np.quantile(x, [0.05, 0.95]), dtype=torch.float), atol=1e-5)


def test_ed2_dreamer_open_loop():
    model = tiny_dreamer(groups=WALKER, agg="blocks")
    obs, act, _ = recording()
    gumbel = noise_for(model, 6, 4)[0]
    a = ed2.open_loop(model, obs, act, gumbel, 3)
    assert a.shape == (4, 4, 3)
    changed, later = obs.clone(), act.clone()
    changed[3:] += 1
    later[4] = 0.5
    assert torch.equal(a, ed2.open_loop(model, changed, act, gumbel, 3))  # only the context is read
    b = ed2.open_loop(model, obs, later, gumbel, 3)  # act[4] first matters to obs[5] = prediction 2
    assert torch.equal(a[:2], b[:2]) and not torch.equal(a[2], b[2])
    h, _, _ = model.rssm.observe(model.encoder(ed2.symlog(obs)), act, gumbel)
    z = ed2.sample_latent(model.rssm.prior(h[3]), gumbel[3])
    assert torch.allclose(a[0], ed2.symexp(model.decoder(torch.cat([h[3], z], -1))), atol=1e-5)


def test_ed2_dreamer_laprop_against_a_slow_reference():
    torch.manual_seed(0)
    p, stacked = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3, 2, 5))
    tiny_p = nn.Parameter(torch.zeros(3))
    keep = [(), (1,), ()]
    opt = ed2.LaProp([p, stacked, tiny_p], keep, lr=0.01, warmup=3)
    mine = [p.detach().clone(), *stacked.detach().clone().unbind(1), tiny_p.detach().clone()]
    mu, nu = ([torch.zeros_like(x) for x in mine] for _ in range(2))
    for t in range(1, 6):
        scale = 10.0 if t % 2 else 0.01
        p.grad, stacked.grad = scale * torch.randn(4, 3), scale * torch.randn(3, 2, 5)
        tiny_p.grad = torch.zeros(3) if t == 1 else torch.randn(3)
        grads = [p.grad.clone(), *stacked.grad.clone().unbind(1), tiny_p.grad.clone()]
        opt.step()
        for i, g in enumerate(grads):
            limit = 0.3 * max(1e-3, mine[i].norm().item())
            g = g * min(1.0, limit / max(g.norm().item(), 1e-30))
            nu[i] = 0.999 * nu[i] + 0.001 * g * g
            g = g / ((nu[i] / (1 - 0.999**t)).sqrt() + 1e-20)
            mu[i] = 0.9 * mu[i] + 0.1 * g
            mine[i] = mine[i] - 0.01 * min(1, t / 3) * mu[i] / (1 - 0.9**t)
        for a, b in zip([p, *stacked.unbind(1), tiny_p], mine):
            assert torch.allclose(a, b, atol=1e-5) and a.isfinite().all()
    other = ed2.LaProp([p, stacked, tiny_p], keep, lr=0.01, warmup=3)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert other.steps == 5 and torch.equal(other.mu[1], opt.mu[1]) and torch.equal(other.nu[0], opt.nu[0])


def test_ed2_dreamer_sub_cores_are_clipped_apart():
    model = copy.deepcopy(tiny_dreamer(groups=WALKER, width=16))
    params, keep = ed2.clip_units(model)
    assert [id(p) for p in params] == [id(p) for p in model.parameters()]
    kept = {name: dims for (name, _), dims in zip(model.named_parameters(), keep) if dims}
    rssm = dict(act_weight=(1,), act_bias=(0,), act_gain=(0,), hid_gain=(0,))
    rssm |= {f"{m}.{x}": (0,) for m in ("hid", "gru") for x in ("weight", "bias")}
    assert kept == {f"rssm.{name}": dims for name, dims in rssm.items()}
    for name, p in model.named_parameters():
        if name in kept:
            assert p.shape[kept[name][0]] == len(WALKER)
    assert sum(map(len, ed2.clip_units(*model.world()))) < 2 * len(params)


def test_ed2_dreamer_masked_weights_stay_zero():
    agent = ed2.Agent(tiny_dreamer(groups=WALKER, width=16), 0, lr=1e-2, warmup=1, horizon=2)
    before = [p.detach().clone() for p in agent.model.parameters()]
    for _ in range(3):
        agent.update(*recording())
    masked = (1 - agent.model.rssm.act_mask).bool().expand_as(agent.model.rssm.act_weight)
    assert (agent.model.rssm.act_weight[masked] == 0).all()
    assert all(not torch.equal(a, b) for a, b in zip(before, agent.model.parameters()))


class FakeWorkers:
    """A point on a line, 40 steps; the policy sees it with noise from the seed."""

    def rollout(self, jobs, policy):
        obs = np.stack([np.random.default_rng(seed).normal(size=(41, 5)) for _, seed in jobs], 1).astype(np.float32)
        act = []
        for t in range(40):
            act.append(policy(obs[t], np.arange(len(jobs)), np.full(len(jobs), t)))
            obs[t + 1, :, 0] = obs[t, :, 0] + act[-1][:, 0]
        rew, act = -np.abs(obs[1:, :, 0]), np.stack(act)
        return [dict(obs=obs[:, i], act=act[:, i], rew=rew[:, i], term=np.zeros(40, bool), ret=float(rew[:, i].sum()))
                for i in range(len(jobs))]


def test_ed2_dreamer_resume_is_exact(tmp_path):
    def start(folder):
        torch.manual_seed(0)
        agent = ed2.Agent(ed2.DreamerV3(5, 1, **TINY_DREAMER), 3, lr=1e-3, warmup=5, horizon=3)
        return agent, Episodes.create(folder, {"cartpole-swingup": (5, 1, 500)})

    def learn(agent, episodes, steps):
        return ed2.learn_online(agent, episodes, FakeWorkers(), "cartpole-swingup", steps, 2, batch=4, length=8,
                              train_ratio=1, log=lambda row, metrics: None, save=saved.append)

    saved = []
    agent, episodes = start(tmp_path / "a")
    want = learn(agent, episodes, 240)
    assert agent.updates == 240 // 32 and len(want) == len(saved) == 3
    agent, episodes = start(tmp_path / "b")
    learn(agent, episodes, 160)
    file = io.BytesIO()
    torch.save(agent.state(), file)
    learn(agent, episodes, 240)  # goes on; then we pretend that it was killed
    file.seek(0)
    again, _ = start(tmp_path / "b")
    again.load_state(torch.load(file, weights_only=True))
    curve = learn(again, episodes, 240)
    assert [r[:2] + r[3:] for r in curve] == [r[:2] + r[3:] for r in want]
    first = start(tmp_path / "c")[0]
    first.load_state(saved[-1])
    for a, b in zip(again.state()["model"].values(), first.state()["model"].values()):
        assert torch.equal(a, b)
    assert episodes.counts() == {"cartpole-swingup": 6}


def test_ed2_dreamer_policy_memory():
    agent = ed2.Agent(tiny_dreamer(5, 2), 0)
    obs = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)

    def play(order, reset):
        agent.generator.manual_seed(0)
        step, out = agent.policy(3, mean=True), []
        for t in range(4):
            out.append(step(obs[t][order], np.array(order), np.full(3, t - reset * (t > 1) * 2)))
        return np.stack(out)

    a = play([0, 1, 2], 0)
    assert a.shape == (4, 3, 2) and np.abs(a).max() <= 1
    agent.generator.manual_seed(0)
    step = agent.policy(3, mean=True)
    for t in range(2):  # after a reset the past does not matter
        step(obs[t] + 1, np.arange(3), np.full(3, t))
    agent.generator.manual_seed(0)
    b = np.stack([step(obs[t], np.arange(3), np.full(3, t)) for t in range(4)])
    assert np.array_equal(a, b)
    c = play([0, 1, 2], 1)  # a job that starts again at step 2
    assert np.array_equal(a[:2], c[:2]) and not np.array_equal(a[2], c[2])


@pytest.mark.parametrize("size, groups, width, unmatched", [
    ("1m", WALKER, 168, 2.7), ("1m", CHEETAH, 128, 3.5), ("1m", HOPPER, 168, 2.7), ("1m", HUMANOID, 64, 6.9),
    ("12m", WALKER, 680, 2.7), ("12m", CHEETAH, 512, 3.5), ("12m", HOPPER, 680, 2.7), ("12m", HUMANOID, 256, 6.9)])
def test_ed2_dreamer_matched_widths(size, groups, width, unmatched):
    d, U, latent = (ed2.DREAMER_SIZES[size][k] for k in ("deter", "hidden", "classes"))
    latent, A = 32 * latent, sum(map(len, groups))

    def count(groups, width):
        return ed2.core_params(A, groups, "mean", width, d, U, latent)

    single = count([list(range(A))], d)
    assert ed2.match_width(lambda w: count(groups, w), single) == width
    assert ed2.variant("ed2", groups, d, count, 0) == (groups, width) and abs(count(groups, width) / single - 1) < 0.05
    assert count(groups, d) / single == pytest.approx(unmatched, abs=0.06)
    assert ed2.variant("single_wide", groups, d, count, 0)[1] > d  # a single core of the unmatched size exists, too


def test_ed2_dreamer_loop_with_copied_weights_is_the_batched_core():
    shape = dict(deter=32, hidden=8, classes=4, units=16)
    torch.manual_seed(0)
    model = ed2.DreamerV3(3, 6, **shape, groups=WALKER, width=16)
    for p in model.rssm.parameters():
        p.data += 0.2 * torch.randn_like(p)
    loop = copy.deepcopy(model)
    loop.rssm = ed2.LoopedRSSM(ed2.assignment(WALKER, 6).T, 16, shape)
    for name in ("prior_net", "post_net"):
        setattr(loop.rssm, name, getattr(model.rssm, name))
    own = dict(act_weight=1, act_bias=0, act_gain=0, hid_gain=0) | {
        f"{m}.{x}": 0 for m in ("hid", "gru") for x in ("weight", "bias")}
    state = {k: v for k, v in model.rssm.state_dict().items() if not k.startswith(("prior", "post"))}
    for i, core in enumerate(loop.rssm.loop):
        mine = {k: v.narrow(own[k], i, 1) if k in own else v for k, v in state.items()}
        assert not core.load_state_dict(mine, strict=False).unexpected_keys
    obs, act, rew = recording()
    gumbel = ed2.draw_gumbel((7, 4, 32, 4), gen())
    a, b = (ed2.rssm_loss(m, obs, 2 * act, rew, gumbel) for m in (model, loop))
    assert torch.allclose(a[2][0], b[2][0], atol=1e-5) and torch.allclose(a[0], b[0], rtol=1e-5)


def test_ed2_dreamer_learns_cheetah(cheetah):
    torch.manual_seed(0)
    model = ed2.DreamerV3(17, 6, 64, 16, 8, 32, groups=CHEETAH, width=32, stoch=8)
    sampler = ed2.sampler_of(Episodes.open(cheetah / "replay"), "cheetah-run", 12, "cpu")
    opt, g, rec = ed2.LaProp(*ed2.clip_units(*model.world()), 1e-2, 5), gen(), []
    for _ in range(60):
        obs, act, rew, *_ = sampler.sequences(16, g)
        loss, metrics, _ = ed2.rssm_loss(model, obs, act, rew, ed2.draw_gumbel((13, 16, 8, 8), g))
        opt.zero_grad()
        loss.backward()
        opt.step()
        rec.append(metrics["rec"].item())
    assert np.mean(rec[-5:]) < rec[0] / 3, rec[::10]


# ------------------------------------------------------------------------------------------------------- statistics
def test_ed2_relative_change_holm_and_verdict():
    old, new = [1.0, 2.0, 4.0], [0.9, 1.6, 2.8]
    mean, low, high, p = ed2.relative_change(new, old)
    half = 4.302653 * 0.1 / 3**0.5  # t of 0.975 with 2 degrees of freedom; changes -10, -20, -30 %
    assert (mean, low, high) == pytest.approx((-0.2, -0.2 - half, -0.2 + half)) and p == pytest.approx(0.0742, abs=1e-3)
    assert ed2.relative_change([2.0], [1.0])[0] == 1 and np.isnan(ed2.relative_change([2.0], [1.0])[1:]).all()
    assert ed2.relative_change([1.0, 1.0], [1.0, 1.0]) == (0, 0, 0, 1)
    assert ed2.relative_change([2.0, 2.0], [1.0, 1.0]) == (1, 1, 1, 0)
    assert ed2.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert ed2.holm([0.5, 0.9]) == pytest.approx([1, 1]) and ed2.holm([0.2]) == [0.2]
    assert ed2.verdict(-0.2, -0.3, -0.1) == "win" and ed2.verdict(-0.2, -0.3, -0.1, False) == "tie"
    assert ed2.verdict(0.2, 0.1, 0.3) == ed2.verdict(0.2, 0.1, 0.3, False) == "loss"
    for row in ((-0.2, -0.5, 0.1), (-0.04, -0.045, -0.035), (0.04, 0.03, 0.045), (-0.9, float("nan"), float("nan"))):
        assert ed2.verdict(*row) == "tie"


def test_ed2_a_win_needs_every_control(capsys):
    tasks, errors = ("cheetah-run", "hopper-hop"), dict(single=1.0, ed2=0.7, random=0.9, nosplit=0.8, ed2_wide=0.5,
                                                        single_wide=0.6)

    def cells(**changed):
        out = []
        for task in tasks:
            for v, x in (errors | changed).items():
                out += [dict(wm="tdmpc2", task=task, regime="frozen", variant=v, seed=s, logged=9.0,
                             per_step_mse=x * (1 + 0.02 * s * (v == "ed2"))) for s in (3, 1, 2)]
            for v, x in (("single", 2.0), ("ed2_wide", 1.0 if task == "cheetah-run" else 3.0)):
                out.append(dict(wm="tdmpc2", task=task, regime="joint", variant=v, seed=1, logged=x, per_step_mse=99.0))
        return out

    other = [dict(c, wm="dreamerv3", per_step_mse=0.0) for c in cells()]
    got = ed2.summarise("tdmpc2", cells() + other, tasks)
    row = got["rows"][0]
    assert row["verdict"] == "win" and row["beats controls"] and got["wins"] == 2
    assert row["change"] == pytest.approx(0.7 * 1.04 - 1) and row["wide change"] == pytest.approx(0.5 / 0.6 - 1)
    assert (row["logged single"], row["logged ED2"], row["paper"]) == (2, 1, 5e-5)
    assert got["lower"] == 1 and not got["reproduces"]  # one of two rows is not most
    assert row["p Holm"] == pytest.approx(2 * row["p"]) and json.loads(json.dumps(got)) == got
    for control in ("random", "nosplit"):
        again = ed2.summarise("tdmpc2", cells(**{control: 0.71}), tasks)
        assert again["wins"] == 0 and again["rows"][0]["verdict"] == "tie"
    worse = ed2.summarise("tdmpc2", cells(ed2=1.3), tasks)
    assert [r["verdict"] for r in worse["rows"]] == ["loss"] * 2
    out = capsys.readouterr().out
    assert "beats the matched baseline: 2 of 2 tasks" in out and "reproduces the paper" in out


# ---------------------------------------------------------------------------------------------- data and bad input
def test_ed2_data_of_the_carts(tug):
    random, replay, notes = ed2.make_data(TUG_TASK, tug, 3000, 1)
    x, y = random.arrays(TUG_TASK), replay.arrays(TUG_TASK)
    assert x["length"].sum() >= 20_000 and np.abs(x["act"]).max() <= 1 and abs(x["act"].mean()) < 0.02
    assert len(y["length"]) == 48 and len(notes["returns"]) == 3  # 3 rounds of 8 directions and their opposites
    ret = y["rew"].sum(1).reshape(3, 16)
    assert np.allclose([(r.mean(), r.max()) for r in ret], notes["returns"], rtol=1e-4)
    assert notes["random_return"] == pytest.approx(x["rew"].sum(1).mean(), rel=1e-4)
    assert ret[-1].max() > notes["random_return"]
    assert np.allclose(y["obs"][:8, 0], y["obs"][8:16, 0])  # opposite directions start alike
    assert ed2.find_partition("sd2", TUG_TASK, random)[0] == TUG_GROUPS
    sampler = ed2.sampler_of(replay, TUG_TASK, 64, "cpu")
    held = {o.numpy().tobytes() for o in sampler.sequences(200, gen(), held_out=True)[0][-1]}
    train = {o.numpy().tobytes() for o in sampler.sequences(200, gen())[0][-1]}
    assert 4 <= len(held) <= 5 and not held & train


def test_ed2_search_climbs(tmp_path, tug):
    class Pool:  # the return is how well action 0 follows state 0
        def rollout(self, jobs, policy):
            out, s = [], np.random.default_rng(0).normal(size=(64, len(jobs), 4)).astype(np.float32)
            act = np.stack([policy(s[t], np.arange(len(jobs)), np.full(len(jobs), t)) for t in range(64)])
            rew = -np.abs(act[:, :, 0] - s[:, :, 0].clip(-1, 1))
            for i in range(len(jobs)):
                out.append(dict(obs=np.r_[s[:, i], s[:1, i]], act=act[:, i], rew=rew[:, i], term=np.zeros(64, bool),
                                ret=rew[:, i].sum()))
            return out

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
    good = folder("good", (4, 3, 64), n=3)
    replay = ed2.make_data(TUG_TASK, tug, 1, 1, good)[1]
    with says("3 episodes of 64 steps", "at least 4", "--length"):
        ed2.sampler_of(replay, TUG_TASK, 10, "cpu")
    with says("3 episodes of 64 steps", "65 steps", "--length"):
        ed2.sampler_of(replay, TUG_TASK, 65, "cpu")
    random = Episodes.open(tug / "random")
    for name, words in (("published", "walker, cheetah"), ("human", "walker, cheetah, hopper")):
        with says(f"no {name} partition of 'fish'", words, "sd2"):
            ed2.find_partition(name, "fish-swim", random)


@pytest.mark.parametrize("settings, words", [
    (dict(agg="mean"), ("--agg mean", "hidden, pre or post")), (dict(tables=True, cost=True), ("choose one",)),
    (dict(agg="post", wm="dreamerv3"), ("--agg post", "mean or blocks")), (dict(workers=0), ("at least 1",)),
    (dict(agg="blocks", wm="dreamerv3", match="none"), ("--match none",)),
    (dict(resume="nowhere"), ("no args.json", "ed2")),
    (dict(tables=True, mode="online"), ("tables", "online")), (dict(task="walker-wolk"), ("walker-walk",)),
    (dict(tables=True, size="1M"), ("--size 1M",)), (dict(seeds=0), ("--seeds 0",)),
    (dict(device="cuda"), ("no GPU",))])
def test_ed2_bad_flags_get_one_sentence(settings, words, tmp_path, monkeypatch):
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    with says(*words):
        ed2.main(ed2.Args(**{"device": "cpu"} | settings))
    assert not (tmp_path / "runs").exists()


def test_ed2_flags_of_the_command_line():
    args = tyro.cli(ed2.Args, args=["--wm", "dreamerv3", "--agg", "blocks", "--seeds", "2", "--no-compile"])
    assert (args.wm, args.agg, args.seeds, args.compile) == ("dreamerv3", "blocks", 2, False)


# ------------------------------------------------------------------------------------------------- whole runs of ed2.py
@pytest.fixture
def small(tmp_path, monkeypatch):
    """Smaller models and test sets; runs/ goes to tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ed2.TDMPC2_SIZES, "1M", (64, 160))
    monkeypatch.setitem(ed2.DREAMER_SIZES, "1m", dict(deter=256, hidden=32, classes=4, units=32))
    monkeypatch.setattr(ed2, "measure_rssm", functools.partial(ed2.measure_rssm, batch=16, draws=2))
    real = ed2.sampler_of

    def sampler_of(*args):
        sampler = real(*args)
        full = sampler.sequences
        sampler.sequences = lambda n, *a, **k: full(min(n, 64), *a, **k)
        return sampler

    monkeypatch.setattr(ed2, "sampler_of", sampler_of)


def numbers(x):
    """All numbers in a result, at any depth."""
    if isinstance(x, dict):
        return [n for v in x.values() for n in numbers(v)]
    if isinstance(x, (list, tuple)):
        return [n for v in x for n in numbers(v)]
    return [float(x)] if isinstance(x, (int, float)) else []


def test_ed2_compare_tdmpc2_killed_and_resumed_ends_at_the_same_numbers(tug, small, monkeypatch, capsys):
    args = ed2_args(seeds=2)
    real, calls = ed2.measure_latents, []

    def killed(*a, **k):  # at the end of the fifth training
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*a, **k)

    runs = [ed2_run(args, tug) for _ in range(2)]
    whole = ed2.main(ed2.Args(resume=str(runs[0])))
    out = capsys.readouterr().out
    assert "6/6" in out and "min left" in out
    assert f"partition sd2: {TUG_GROUPS}" in out and "  merge [0] + [1]: +" in out
    assert "verdict on per_step_mse" in out and "95 % interval" in out
    assert all(np.isfinite(numbers(whole[part])).all() for part in ("table", "cells", "data"))
    assert {p.name for p in runs[0].iterdir()} >= {"results.json", "results.csv", "horizon.png", "partition.png"}
    assert json.loads((runs[0] / "results.json").read_text())["table"] == whole["table"]
    csv_ = (runs[0] / "results.csv").read_text().splitlines()
    assert csv_[0] == "metric,single,ed2,change,low,high" and len(csv_) == 1 + len(whole["table"])
    kinds = {(c["regime"], c["variant"], c["seed"]) for c in whole["cells"]}
    wanted = ("joint", "single"), ("frozen", "single"), ("frozen", "ed2")
    assert kinds == {(*w, s) for s in (1, 2) for w in wanted} and len(whole["cells"]) == 6
    for c in whole["cells"]:
        sizes = [len(g) for g in c["trained_on"]]
        assert c["dynamics_params"] == ed2.dynamics_params(64, 3, c["width"], sizes, "hidden")
    row = next(r for r in whole["table"] if r["metric"] == "per_step_mse")
    a, b = ([c["per_step_mse"] for c in sorted(whole["cells"], key=lambda c: c["seed"])
             if (c["regime"], c["variant"]) == ("frozen", v)] for v in ("single", "ed2"))
    assert (row["single"], row["ed2"]) == (np.mean(a), np.mean(b))
    assert row["change"] == pytest.approx(np.mean([(y - x) / x for x, y in zip(a, b)]))
    assert whole["verdict"] == ed2.verdict(row["change"], row["low"], row["high"])
    with monkeypatch.context() as m:
        m.setattr(ed2, "measure_latents", killed)
        with says("stopped; go on with: python", f"--resume {runs[1]}"):
            ed2.main(ed2.Args(resume=str(runs[1])))
    files = sorted((runs[1] / "cells").iterdir())
    stamps = [p.stat().st_mtime_ns for p in files]
    assert len(files) == 4
    again = ed2.main(ed2.Args(resume=str(runs[1])))
    assert again["table"] == whole["table"] and again["partition"] == whole["partition"]
    assert [p.stat().st_mtime_ns for p in files] == stamps and len(list((runs[1] / "cells").iterdir())) == 6


@pytest.mark.parametrize("settings", [dict(agg="mean"), dict(agg="blocks", partition="full", match="params")])
def test_ed2_compare_dreamerv3(settings, tug, small, capsys):
    run = ed2_run(ed2_args(wm="dreamerv3", updates=10, **settings), tug)
    result = ed2.main(ed2.Args(resume=str(run)))
    metrics = {r["metric"]: r for r in result["table"]}
    assert {"dyn", "dyn_raw", "rec", "nmse_1", "nmse_15", "nmse_45", "post_entropy"} <= set(metrics)
    assert np.isfinite(numbers(result["cells"])).all() and metrics["dyn"]["single"] >= 1
    assert all(r["change"] == pytest.approx(r["ed2"] / r["single"] - 1, rel=1e-6) for r in result["table"])
    assert result["verdict"] == "none, 1 seed"
    assert {p.name for p in run.iterdir()} >= {"results.json", "results.csv", "horizon.png", "partition.png"}
    stamps = {p: p.stat().st_mtime_ns for p in (run / "cells").iterdir()}
    ed2.main(ed2.Args(resume=str(run)))
    assert stamps == {p: p.stat().st_mtime_ns for p in (run / "cells").iterdir()} and len(stamps) == 2
    assert "verdict on nmse_15" in capsys.readouterr().out


def test_ed2_variants_of_a_run(tmp_path, tug, small, capsys):
    """A joint encoder; full width; given data; one action, for which the baseline runs alone and says so."""
    args = ed2_args(encoder="joint", match="none", data_dir=str(tug / "replay"))
    result = ed2.main(ed2.Args(resume=str(ed2_run(args, tug))))
    assert {(c["regime"], c["variant"]) for c in result["cells"]} == {("joint", "single"), ("joint", "ed2_wide")}
    single, wide = sorted(result["cells"], key=lambda c: c["dynamics_params"])
    assert single["width"] == wide["width"] == 160 and wide["dynamics_params"] > 1.5 * single["dynamics_params"]
    assert all(np.isfinite(c["train_loss"]) for c in result["cells"])
    eps = Episodes.create(tmp_path / "pole" / "random", {"cartpole-swingup": (5, 1, 500)})
    for _ in range(5):
        act = np.random.uniform(-1, 1, (500, 1))
        eps.append("cartpole-swingup", np.random.randn(501, 5), act, np.zeros(500), np.zeros(500, bool))
    (tmp_path / "pole" / "replay").symlink_to(tmp_path / "pole" / "random")
    (tmp_path / "pole" / "data.json").write_text('{"random_return": 0.0, "returns": [[0.0, 0.0]]}')
    run = ed2_run(ed2_args(task="cartpole-swingup"), tmp_path / "pole")
    result = ed2.main(ed2.Args(resume=str(run)))
    assert "has 1 action in one group: ED2 is the baseline" in capsys.readouterr().out
    assert "verdict" not in result and {c["variant"] for c in result["cells"]} == {"single"}
    assert (run / "horizon.png").exists()


def test_ed2_tables(cheetah, small, monkeypatch, capsys):
    for wm in ("tdmpc2", "dreamerv3"):
        tiny = {k: v for k, v in dataclasses.asdict(ed2_args(wm=wm)).items()
                if k in ("updates", "batch", "length", "lr", "size")}
        monkeypatch.setitem(ed2.BUDGETS, ("tables", wm), (tiny, tiny))
    args = ed2.Args(task="cheetah-run", tables=True, device="cpu", compile=False, workers=1, seeds=1, data_steps=1)
    run = Run("tables", "ed2", 1, dataclasses.asdict(args))
    (run.dir / "data").mkdir()
    (run.dir / "data" / "cheetah-run").symlink_to(cheetah)
    result = ed2.tables(args, run, tasks=("cheetah-run",))
    out = capsys.readouterr().out
    for wm, old, metric in (("tdmpc2", "logged", "per_step_mse"), ("dreamerv3", "dyn", "nmse_15")):
        (row,) = result[wm]["rows"]
        filled = [row[f"{metric} {v}"] for v in ed2.VARIANTS] + [row[f"{old} single"], row[f"{old} ED2"]]
        assert np.isfinite(filled).all() and row["verdict"] == "tie"
        cells = [c for c in result["cells"] if c["wm"] == wm]
        assert len(cells) == (8 if wm == "tdmpc2" else 6) and (run.dir / f"table_{wm}.csv").exists()
        sizes = {c["variant"]: c["dynamics_params"] for c in cells}
        for v in ("ed2", "random", "nosplit"):
            assert abs(sizes[v] / sizes["single"] - 1) < 0.05
        assert abs(sizes["single_wide"] / sizes["ed2_wide"] - 1) < 0.05 < sizes["ed2_wide"] / sizes["single"] - 1.5
        groups = {c["variant"]: c["trained_on"] for c in cells}
        assert groups["ed2"] == CHEETAH and sorted(map(len, groups["random"])) == [1, 1, 2, 2]
    assert result["tdmpc2"]["rows"][0]["paper"] == 5e-5 and result["dreamerv3"]["rows"][0]["paper"] == ""
    assert out.count("beats the matched baseline: 0 of 1 tasks") == 2 and out.count("reproduces the paper") == 2
    assert "undecided" in out and (run.dir / "tables.png").exists()
    json.dumps(result)
    run.close()


def test_ed2_discovery_and_cost(cheetah, small, monkeypatch):
    monkeypatch.setitem(ed2.DREAMER_SIZES, "1m", dict(deter=512, hidden=64, classes=4, units=32))
    for wm, size in (("tdmpc2", "1M"), ("dreamerv3", "1m")):
        tiny = dict(updates=10, batch=4, length=3, lr=1e-3, size=size)
        monkeypatch.setitem(ed2.BUDGETS, ("full", wm), (tiny, tiny))
    args = ed2_args(task="cheetah-run", seeds=2, updates=10)
    run = Run("discovery", "ed2", 1, {})
    (run.dir / "data").mkdir()
    (run.dir / "data" / "cheetah-run").symlink_to(cheetah)
    monkeypatch.setattr(ed2, "fit_influence", functools.partial(ed2.fit_influence, steps=20, batch=16))
    rows = ed2.discovery(args, run, tasks=("cheetah-run",))["rows"]
    assert len(rows) == 12 and {(r["data"], r["space"], r["method"]) for r in rows} == {
        (d, s, m) for d in ("random", "replay") for s in ("state", "latent") for m in ("sd2", "sd2j", "learned")}
    assert all(ed2.check_partition(g, 6) for r in rows for g in r["groups"])
    assert rows[0]["ari_published"] == rows[0]["ari_between_seeds"] == 1 and rows[0]["groups"] == [CHEETAH] * 2
    assert (run.dir / "discovery.csv").exists()
    args = dataclasses.replace(args, updates=None, batch=None, length=None, lr=None, size=None)
    rows = ed2.cost(args, run, repeats=1)["rows"]
    assert [(r["task"], r["wm"], r["k"]) for r in rows] == [
        (t, wm, k) for t, k in (("walker-walk", 3), ("humanoid-walk", 8)) for wm in ("tdmpc2", "dreamerv3")]
    assert all(r[f"{name}_ms"] > 0 for r in rows for name in ("single", "batched", "looped"))
    run.close()


def test_ed2_compiled_losses_were_compiled_and_agree_with_eager(monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: real(f, backend="eager", fullgraph=True, **kw))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    args, encoder = ed2_args(updates=10), nn.Sequential(ed2.NormedLinear(4, 16, ed2.simnorm))
    results = []
    for enabled in (False, True):
        compiled = ed2.compiler(enabled)
        model = tiny_tdmpc2(TUG_GROUPS)
        joint = ed2.train_tdmpc2(model, Push3(), args, 0, compiled)
        ed2.train_dynamics(model.dynamics, encoder, Push3(), args, 0, compiled)
        assert compiled(ed2.prior_loss) is compiled(ed2.prior_loss)  # made once
        results.append([joint, *(p.detach() for p in model.parameters())])
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]  # and none was compiled twice
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-3)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(results[0][1:], results[1][1:]))
    model = tiny_dreamer(groups=WALKER, width=16)
    slow = copy.deepcopy(model.critic).requires_grad_(False)
    batch, noise = recording(T=2, B=2), noise_for(model, 2, 2, H=2)
    a, b = (f(model, slow, torch.zeros(2), *batch, noise) for f in (ed2.dreamer_loss, compiled(ed2.dreamer_loss)))
    assert torch.allclose(a[0], b[0], atol=1e-4) and torch.allclose(a[2], b[2], atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 4 and ed2.compiler(False)(ed2.rssm_loss) is ed2.rssm_loss


def test_ed2_copied_with_its_two_helpers_it_runs(tmp_path, tug):
    for name in ("ed2.py", "envs.py", "data.py"):
        (tmp_path / name).write_text(Path(HERE, name).read_text())
    (tmp_path / "tug.py").write_text(TUG)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def run(*words):
        p = subprocess.run([sys.executable, "ed2.py", *words], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert p.returncode == 0, p.stderr[-2000:]
        return p.stdout

    out = run("--help")
    for f in dataclasses.fields(ed2.Args):
        assert f"--{f.name.replace('_', '-')}" in out
    assert "Deviations" in out and "--no-compile" in out
    names = "task", "device", "workers", "seeds", "updates", "batch", "length", "lr", "size"
    settings = {k: v for k, v in dataclasses.asdict(ed2_args(updates=10)).items() if k in names}
    out = run(*flags(**settings, encoder="joint", data_dir=tug / "replay"))
    folder = last_run(tmp_path)
    assert "budget: size 1M, 10 updates of 4 x 3 steps" in out and f"files: {folder.relative_to(tmp_path)}/" in out
    assert {f.name for f in folder.iterdir()} >= {"ed2.py", "envs.py", "data.py", "args.json", "results.csv"}
    result = json.loads((folder / "results.json").read_text())
    assert result["partition"] == TUG_GROUPS and "--task tug:Tug-v0" in result["command"] and len(result["cells"]) == 2


def test_ed2_online_stopped_and_resumed_ends_at_the_same_numbers(tug, small, monkeypatch, capsys):
    monkeypatch.setitem(ed2.DREAMER_SIZES, "1m", dict(deter=128, hidden=16, classes=4, units=16))
    args = ed2_args(wm="dreamerv3", mode="online", updates=8, length=8, train_ratio=1, seed=3)  # 256 steps in 2 rounds
    real = Run.save

    def killed(self, state, name="checkpoint.pt"):
        real(self, state, name)
        raise KeyboardInterrupt

    runs = [ed2_run(args, tug, inside=False) for _ in range(2)]
    whole = ed2.main(ed2.Args(resume=str(runs[0])))
    with monkeypatch.context() as m:
        m.setattr(Run, "save", killed)
        with says("stopped; go on with", str(runs[1])):
            ed2.main(ed2.Args(resume=str(runs[1])))
    assert torch.load(runs[1] / "checkpoint.pt", weights_only=True)["steps"] == 128
    again = ed2.main(ed2.Args(resume=str(runs[1])))
    assert again["returns"] == whole["returns"] and len(whole["returns"]) == 10 and len(whole["curve"]) == 2
    assert [r[:2] + r[3:] for r in again["curve"]] == [r[:2] + r[3:] for r in whole["curve"]]
    a, b = (torch.load(r / "checkpoint.pt", weights_only=True) for r in runs)
    assert all(torch.equal(a["model"][k], v) for k, v in b["model"].items()) and a["updates"] == b["updates"] == 8
    assert a["model"]["rssm.act_weight"].shape == (3, 2, 16) and whole["groups"] == TUG_GROUPS
    lines = [json.loads(x) for x in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [128, 256] and {"losses/rec", "charts/episodic_return"} <= set(lines[1])
    assert (runs[0] / "curve.png").exists() and "random policy" in capsys.readouterr().out
    args = dataclasses.replace(args, eval_only=True, checkpoint=str(runs[0] / "checkpoint.pt"))
    play = ed2_run(args, tug, inside=False)
    assert ed2.main(ed2.Args(resume=str(play)))["returns"] == whole["returns"]


@pytest.mark.parametrize("settings", [dict(), dict(wm="dreamerv3")])
def test_ed2_few_updates_are_enough_for_a_number(settings, tug, small):
    args = ed2_args(updates=2, partition="none", encoder="joint", **settings)
    result = ed2.main(ed2.Args(resume=str(ed2_run(args, tug))))
    assert np.isfinite(result["cells"][0]["train_loss"])


@pytest.mark.parametrize("settings, words", [
    (dict(size="99m", wm="dreamerv3"), ("--size 99m", "1m", "12m")), (dict(size="1m"), ("--size 1m", "1M", "5M")),
    (dict(length=4, wm="dreamerv3"), ("--length 4",)), (dict(updates=0), ("--updates 0",)),
    (dict(mode="online", agg="hidden"), ("--agg hidden",)), (dict(eval_only=True, mode="online"), ("--checkpoint",)),
    (dict(mode="online", checkpoint="nowhere.pt", task="cup-catch"), ("nowhere.pt",))])
def test_ed2_more_bad_flags(settings, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("make_data", "Workers"):
        monkeypatch.setattr(ed2, name, lambda *a, **k: pytest.fail("began to work"))
    with says(*words):
        ed2.main(ed2.Args(**{"device": "cpu"} | settings))


def test_ed2_online_takes_the_recurrent_aggregations(tug, small):
    args = ed2_args(mode="online", wm="dreamerv3", agg="blocks", updates=1, length=8, train_ratio=1)
    result = ed2.main(ed2.Args(resume=str(ed2_run(dataclasses.replace(args, wm="tdmpc2"), tug, inside=False))))
    assert len(result["returns"]) == 10


def rows_of(O, A, n=64):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, O, generator=g), torch.rand(n, A, generator=g) * 2 - 1, torch.randn(n, O, generator=g)


def test_ed2_bank_of_trunks_equals_a_loop_and_serves_every_robot():
    torch.manual_seed(0)
    bank = ed2.Bank(K=3, latent=8, width=16)
    for A in (2, 5):
        z, act, keys = torch.randn(7, 8), torch.randn(7, A), torch.randn(A, 16)
        p = bank.assign(keys)
        assert p.shape == (A, 3) and (p > 0).all() and torch.allclose(p.sum(1), torch.ones(A))
        slow = []
        for i in range(3):
            own = slice(16 * i, 16 * i + 16)
            x = z @ bank.w_z[:, own] + bank.bias[own]
            for j in range(A):  # action j, as much of it as belongs to trunk i
                x = x + p[j, i] * act[:, j:j + 1] * (keys[j] @ bank.w_a[:, own])
            x = torch.nn.functional.mish(torch.nn.functional.layer_norm(x, (16,)) * bank.gain[i] + bank.shift[i])
            x = x @ bank.second.weight[i] + bank.second.bias[i]
            slow.append(torch.nn.functional.mish(
                torch.nn.functional.layer_norm(x, (16,)) * bank.second.gain[i] + bank.second.shift[i]))
        assert torch.allclose(bank(z, act, keys), torch.stack(slow).mean(0), atol=1e-6)


def test_ed2_frozen_bank_stays_while_the_body_learns():
    torch.manual_seed(0)
    rows, bank = rows_of(5, 2), ed2.Bank(K=2, latent=8, width=8)
    body = ed2.Body(bank, *rows)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (bank, body)]
    bank.requires_grad_(False)
    ed2.fit_bank(bank, [(body, rows)], 20, 16, 0)
    assert all(torch.equal(v, before[0][k]) for k, v in bank.state_dict().items())
    learned = {"encoder.weight", "encoder.bias", "head.weight", "head.bias", "keys"}
    assert {k for k, v in body.state_dict().items() if not torch.equal(v, before[1][k])} == learned
    bank.requires_grad_(True)
    ed2.fit_bank(bank, [(body, rows)], 20, 16, 0)
    assert all(not torch.equal(v, before[0][k]) for k, v in bank.state_dict().items())


def test_ed2_bodies_runs_end_to_end_and_goes_on_where_it_stopped(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for task, (O, A) in {"cheetah-run": (6, 3), "hopper-hop": (5, 2), "cheetah-run-backwards": (6, 3)}.items():
        folder = tmp_path / "data" / task
        for part in ("random", "replay"):
            episodes = Episodes.create(folder / part, {task: (O, A, 40)})
            M = rng.normal(size=(O + A, O)) * 0.05
            for _ in range(9):
                act = rng.uniform(-1, 1, (40, A))
                obs = [rng.normal(size=O)]
                for a in act:
                    obs.append(0.95 * obs[-1] + np.r_[obs[-1], a] @ M)
                episodes.append(task, np.array(obs, "f4"), act.astype("f4"), np.zeros(40, "f4"), np.zeros(40, bool))
        (folder / "data.json").write_text("{}")
    args, run = ed2.Args(bodies=True, seeds=2, workers=1, device="cpu"), types.SimpleNamespace(dir=tmp_path)
    sizes = dict(cases={"cheetah-run-backwards": ("cheetah-run", "hopper-hop"), "hopper-hop": ("cheetah-run",)},
                 shots=(1, 3), pretrain=20, updates=40, batch=16, K=2, latent=8, width=8)
    first = ed2.bodies(args, run, **sizes)
    assert len(first["rows"]) == 4 and len(first["cells"]) == 8
    arms = ("frozen", "tuned", "scratch", "random", "linear", "persistence")
    assert all(np.isfinite([r[arm] for arm in arms]).all() for r in first["rows"])
    assert ["zero_shot" in r for r in first["rows"]] == [True, True, False, False]  # there, a known body
    assert (tmp_path / "bodies.csv").read_text().count("\n") == 5 and (tmp_path / "bodies.png").stat().st_size > 5000
    assert "the frozen bank is" in capsys.readouterr().out
    file = tmp_path / "cells" / "hopper-hop_3_2.json"
    file.unlink()  # killed before this cell: computed again, to the same numbers; the others are read
    other = file.with_name("hopper-hop_3_1.json")
    other.write_text(json.dumps(json.loads(other.read_text()) | {"frozen": 7.0}))
    again = ed2.bodies(args, run, **sizes)["cells"]
    assert again[-1] == first["cells"][-1] and again[-2]["frozen"] == 7.0
