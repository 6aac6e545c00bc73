import importlib.util
import itertools

from t_head import *  # noqa: F401,F403

from studies import (common, ed2_bodies, ed2_cores, ed2_cost, ed2_discovery, ed2_figures,
                     ed2_online, ed2_partitions, ed2_tables)

spec = importlib.util.spec_from_file_location("top_ed2", Path(HERE, "t_ed2.py"))
top = importlib.util.module_from_spec(spec)
spec.loader.exec_module(top)
globals().update({name: getattr(top, name) for name in (
    "WALKER CHEETAH HOPPER HUMANOID FULL9 TINY_DREAMER TUG_TASK TUG_GROUPS tug cheetah small "
    "ed2_args ed2_run recording core_inputs").split()})


# ------------------------------------------------------------------------------------- partitions
def test_ed2_partitions_and_their_agreement():
    for groups in ed2_partitions.LIMBS.values():
        assert ed2_partitions.check_partition(groups, sum(map(len, groups))) == groups
    for groups in ([[0, 1]], [[0, 1], [1, 2]], [[0, 1, 2], []], [[0, 1], [3]]):
        with says("exactly once", "0..2"):
            ed2_partitions.check_partition(groups, 3)
    for seed in range(5):
        got, other = (ed2_partitions.random_partition(HUMANOID, seed + n) for n in (0, 1))
        assert [len(g) for g in got] == [len(g) for g in HUMANOID] and got != other
        assert ed2_partitions.check_partition(got, 21) == got

    def slow(p, q):  # over all pairs of actions: together or apart
        label = [{j: i for i, g in enumerate(x) for j in g} for x in (p, q)]
        pairs = list(itertools.combinations(label[0], 2))
        both = [[x[i] == x[j] for x in label] for i, j in pairs]
        a, b, n = sum(x for x, _ in both), sum(x for _, x in both), len(pairs)
        return (sum(x and y for x, y in both) - a * b / n) / ((a + b) / 2 - a * b / n)

    rand, limbs = ed2_partitions.adjusted_rand, ed2_partitions.LIMBS
    for p, q in ((WALKER, limbs["walker"]), (CHEETAH, WALKER), (HUMANOID, limbs["humanoid"])):
        assert rand(p, q) == pytest.approx(slow(p, q)) == rand(q, p)
    assert rand([[0, 1], [2, 3]], [[0, 1], [2], [3]]) == pytest.approx(4 / 7)
    assert rand([[0, 1], [2, 3]], [[2, 3], [0, 1]]) == 1  # the names of groups do not matter
    one, apart = [[0, 1, 2, 3]], [[0], [1], [2], [3]]
    assert rand(one, one) == rand(apart, apart) == rand([[0]], [[0]]) == 1 and rand(one, apart) == 0


def test_ed2_groups_are_found_in_a_trained_model():
    """A linear system whose state says more about the actions than correlation can untangle."""
    rng = np.random.default_rng(0)
    s = rng.normal(size=(3000, 4))
    act = 0.6 * s @ rng.normal(size=(4, 4)) + rng.normal(size=(3000, 4))  # they look at the state
    act = np.clip(act, -3, 3)
    push = np.array([[1.0, 0.5, 0, 0], [0.8, 0.6, 0, 0], [0, 0, 0.7, 1.0], [0, 0, 0.6, 0.9]])
    rows = [torch.tensor(x, dtype=torch.float32) for x in (s, act, act @ push - 0.3 * s)]
    for seed in range(2):
        groups, log = ed2_partitions.fit_influence(*rows, seed, steps=150, batch=64)
        assert groups == [[0, 1], [2, 3]] and log
        groups = ed2_partitions.learn_partition(*rows, seed, steps=400, batch=64)
        assert groups == [[0, 1], [2, 3]]
    apart = ed2_partitions.fit_influence(*rows, 0, steps=2, eta=2.0)[0]
    assert apart == [[0], [1], [2], [3]]


def test_ed2_influence_is_the_effect_of_a_permuted_action():
    s, act = torch.randn(4000, 2), torch.randn(4000, 3)
    w = torch.tensor([[1.0, 0.0], [0.0, -2.0], [0.0, 0.0]])
    got = ed2_partitions.influence(lambda s, a: s + a @ w, s, act, gen())
    want = w.abs() * 2 / np.pi**0.5  # the mean distance of two normal numbers
    assert torch.allclose(got, want, atol=0.07)
    assert (got[w == 0] < 1e-6).all() and not got.requires_grad


# -------------------------------------------------------------------------------- cores and cost
def test_ed2_heads_of_their_own_average_logits_or_outputs():
    every = WALKER, CHEETAH, HOPPER, HUMANOID
    table = {("pre", "5M"): (216, 168, 208, 88), ("pre", "1M"): (184, 152, 184, 88),
             ("post", "5M"): (208, 168, 208, 88), ("post", "1M"): (184, 152, 184, 88)}
    z, act = torch.randn(5, 16), torch.randn(5, 6)
    for core, kind in (("pre", ed2_cores.PreDynamics), ("post", ed2_cores.PostDynamics)):
        d = top.any_dynamics(WALKER, kind)
        if core == "pre":
            rows = zip(d.trunks(z, act), d.head.weight, d.head.bias)
            logits = sum(x @ weight + bias for x, weight, bias in rows) / 3
            want = ed2.simnorm(F.layer_norm(logits, (16,), d.norm.weight, d.norm.bias))
        else:
            want = top.slow_dynamics(d, z, act, WALKER)
        assert torch.allclose(d(z, act), want, atol=1e-5)
        masked = int((1 - d.assign).sum()) * d.width
        used = sum(p.numel() for p in d.parameters()) - masked
        assert used == ed2_cores.head_params(core, 16, 8, WALKER)
    for (core, size), widths in table.items():
        count, full = ed2.counter("tdmpc2", size)
        args = ed2.Args(model_size=size)
        for groups, width in zip(every, widths):
            found = ed2.match_width(lambda w: ed2_cores.params_of(args, core, groups, w),
                                    count([sum(groups, [])], full))
            assert found == width, (core, size, groups)


def test_ed2_more_errors_of_latents_that_are_states():
    encoder = nn.Linear(4, 4).requires_grad_(False)
    encoder.weight.copy_(torch.eye(4))
    encoder.bias.zero_()
    still = ed2_cores.measure(encoder, lambda z, a: z, top.Push3(10))
    assert still["mse_1"] < still["fast_mse_1"] and still["mse_3"] < 99 * still["fast_mse_1"]
    sampler = top.Push3(10)
    mean = ed2_cores.measure(encoder, lambda z, a: 0 * z, sampler)
    assert torch.equal(sampler.seen[1], sampler.seen[3])  # all errors are of the same samples
    obs = sampler.seen[-1]
    want = (obs[5].square().mean(0) / obs.flatten(0, 1).var(0)).mean().item()
    assert mean["state_nmse_5"] == pytest.approx(want, rel=0.02)
    want = (obs[5].square().mean(0).sum() / obs[0].var(0).sum()).item()
    assert mean["latent_nmse_5"] == pytest.approx(want, rel=1e-3)
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(500, 3)), rng.normal(size=(4, 2))
    assert np.allclose(ed2_cores.ridge(x, np.c_[x, np.ones(500)] @ w, 1e-9), w, atol=1e-6)


@pytest.mark.parametrize("act_dim, groups", [(6, WALKER), (9, FULL9), (6, [list(range(6))] * 3)])
def test_ed2_blocks_are_what_a_loop_computes_and_see_their_own_actions(act_dim, groups):
    torch.manual_seed(0)
    rssm = ed2_cores.BlockRSSM(act_dim, 16, 32, 8, 4, groups, stoch=4)
    for name, p in rssm.named_parameters():
        if "bias" in name or "gain" in name:
            p.data.add_(0.3 * torch.randn(p.shape))
    h, z, act = core_inputs(act_dim)
    weights, parts = rssm.core_weights(), ed2_cores.merged_groups(groups, 8)

    def new(act):
        return rssm.subcores(weights, h, z, rssm.act_input(weights, act))[0]  # (g, B, D/g)

    x0, x1 = rssm.h_in(h), rssm.z_in(z)
    hidden = []
    for b in range(8):
        part = parts[b % len(parts)]
        e = b % len(parts)
        x2 = act[:, part] / act[:, part].abs().clamp(min=1) @ rssm.act_weight[e, part]
        x2 = F.silu(F.rms_norm(x2 + rssm.act_bias[e], (8,), eps=1e-4) * rssm.act_gain[e])
        x = torch.cat([h[:, 4 * b:4 * b + 4], x0, x1, x2], -1)
        hidden.append(x @ rssm.hid.weight[0, b] + rssm.hid.bias[0, b, 0])
    got = new(act)
    for b in range(8):
        team = torch.cat(hidden[b % len(parts)::len(parts)], -1)
        norm = (team.square().mean(-1, keepdim=True) + 1e-4).sqrt()
        x = F.silu(hidden[b] / norm * rssm.hid_gain[0, b])
        r, c, u = (x @ rssm.gru.weight[0, b] + rssm.gru.bias[0, b, 0]).chunk(3, -1)
        u, old = torch.sigmoid(u - 1), h[:, 4 * b:4 * b + 4]
        want = u * torch.tanh(torch.sigmoid(r) * c) + (1 - u) * old
        assert torch.allclose(got[b], want, atol=1e-5)
    for j in range(act_dim):
        other = act.clone()
        other[:, j] = -0.37
        same = [torch.equal(x, y) for x, y in zip(got, new(other))]
        assert same == [j not in parts[b % len(parts)] for b in range(8)]
    used = sum(p.numel() for n, p in rssm.named_parameters() if not n.startswith(("prior", "post")))
    used -= int((1 - rssm.act_mask).sum()) * 8
    assert used == ed2_cores.block_params(32, groups, 32, 8, 0.5)  # 32 latents of half a class


def test_ed2_loop_with_copied_weights_is_the_batched_core():
    shape = dict(deter=32, hidden=8, classes=4, units=16)
    torch.manual_seed(0)
    model = ed2.DreamerV3(3, 6, **shape, groups=WALKER, width=16)
    for p in model.rssm.parameters():
        p.data += 0.2 * torch.randn_like(p)
    loop = copy.deepcopy(model)
    loop.rssm = ed2_cost.LoopedRSSM(WALKER, 6, 16, 16, 32, 8, 4)
    for name in ("prior_net", "post_net"):
        setattr(loop.rssm, name, getattr(model.rssm, name))
    own = {"act_weight", "act_bias", "act_gain", "hid_gain", "hid.weight", "hid.bias", "gru.weight",
           "gru.bias"}
    state = {k: v for k, v in model.rssm.state_dict().items()
             if not k.startswith(("prior", "post"))}
    for i, core in enumerate(loop.rssm.loop):
        mine = {k: v[i:i + 1] if k in own else v for k, v in state.items()}
        assert not core.load_state_dict(mine, strict=False).unexpected_keys
    obs, act, rew = recording()
    gumbel = ed2.draw_gumbel((7, 4, 32, 4), gen())
    a, b = (ed2.rssm_loss(m, obs, 2 * act, rew, gumbel) for m in (model, loop))
    assert torch.allclose(a[2][0], b[2][0], atol=1e-5) and torch.allclose(a[0], b[0], rtol=1e-5)


# ---------------------------------------------------------------------------------------- tables
def test_ed2_variants_of_the_tables():
    for wm, size in (("tdmpc2", "1M"), ("dreamerv3", "1m")):
        count, full = ed2.counter(wm, size)
        for groups in (WALKER, CHEETAH, HOPPER, HUMANOID):
            models = ed2_tables.variants(groups, full, count, 5)
            size_of = {v: count(*m) for v, m in models.items()}
            for v in ("ed2", "random", "nosplit"):
                assert abs(size_of[v] / size_of["single"] - 1) < 0.05
            assert abs(size_of["single_wide"] / size_of["ed2_wide"] - 1) < 0.05
            random, width = models["random"]
            assert sorted(map(len, random)) == sorted(map(len, groups)) and random != groups
            assert width == models["ed2"][1] and models["ed2_wide"] == (groups, full)
            assert models["nosplit"][0] == models["single"][0] * len(groups)


def test_ed2_a_win_needs_every_control(capsys):
    tasks = ("cheetah-run", "hopper-hop")
    errors = dict(single=1.0, ed2=0.7, random=0.9, nosplit=0.8, ed2_wide=0.5, single_wide=0.6)

    def cells(**changed):
        out = []
        for task, (v, x) in itertools.product(tasks, (errors | changed).items()):
            out += [dict(wm="tdmpc2", task=task, regime="frozen", variant=v, seed=s, logged=9.0,
                         per_step_mse=x * (1 + 0.02 * s * (v == "ed2"))) for s in (3, 1, 2)]
        for task, wide in zip(tasks, (1.0, 3.0)):
            out += [dict(wm="tdmpc2", task=task, regime="joint", variant=v, seed=1, logged=x,
                         per_step_mse=99.0) for v, x in (("single", 2.0), ("ed2_wide", wide))]
        return out

    other = [dict(c, wm="dreamerv3", per_step_mse=0.0) for c in cells()]
    got = ed2_tables.summary("tdmpc2", cells() + other, tasks)
    row = got["rows"][0]
    assert row["verdict"] == "win" and row["beats controls"] and got["wins"] == 2
    assert row["change"] == pytest.approx(0.7 * 1.04 - 1)
    assert row["wide change"] == pytest.approx(0.5 / 0.6 - 1)
    assert (row["logged single"], row["logged ED2"], row["paper"]) == (2, 1, 5e-5)
    assert got["lower"] == 1 and not got["reproduces"]  # one of two rows is not most
    assert row["p Holm"] == pytest.approx(2 * row["p"]) and json.loads(json.dumps(got)) == got
    for control in ("random", "nosplit"):
        again = ed2_tables.summary("tdmpc2", cells(**{control: 0.71}), tasks)
        assert again["wins"] == 0 and again["rows"][0]["verdict"] == "tie"
    worse = ed2_tables.summary("tdmpc2", cells(ed2=1.3), tasks)
    assert [r["verdict"] for r in worse["rows"]] == ["loss"] * 2
    ed2_tables.tell("tdmpc2", got)
    assert "beats the matched baseline: 2 of 2 tasks" in capsys.readouterr().out
    assert ed2_tables.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert ed2_tables.holm([0.5, 0.9]) == pytest.approx([1, 1]) and ed2_tables.holm([0.2]) == [0.2]


# ---------------------------------------------------------------------------------- online agent
def acting(groups=None, width=None, obs_dim=3, act_dim=6):
    torch.manual_seed(0)
    return ed2_online.ActingDreamer(obs_dim, act_dim, **TINY_DREAMER, groups=groups, width=width)


def noise_for(model, T, B, H=5, A=6):
    return ed2_online.draw_noise(model.rssm, A, T, B, H, gen(2))


def test_ed2_dreamer_sizes_with_actor_and_critic():
    model = ed2_online.ActingDreamer(24, 6, **ed2.DREAMER_SIZES["1m"])
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in model.named_children()}
    assert (sizes["actor"], sizes["critic"]) == (50_316, 66_111)
    assert ed2_online.count_parameters(model) == 640_867  # as published
    with torch.device("meta"):
        for size, O, A, want in (("12m", 24, 6, 9_738_019), ("1m", 67, 21, 649_324),
                                 ("12m", 67, 21, 9_771_628)):
            model = ed2_online.ActingDreamer(O, A, **ed2.DREAMER_SIZES[size])
            assert sum(p.numel() for p in model.parameters()) == want


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_ed2_lambda_return(lam):
    H = 5
    rew, cont, value = torch.randn(H, 2), torch.rand(H, 2), torch.randn(H + 1, 2)
    out = ed2_online.lambda_return(rew, value, cont, lam)
    for t in range(H):
        def n_step(n, t=t):  # n rewards, then the value
            rewards = sum(cont[t:t + i].prod(0) * rew[t + i] for i in range(n))
            return rewards + cont[t:t + n].prod(0) * value[t + n]
        last = H - t
        want = sum((1 - lam) * lam ** (n - 1) * n_step(n) for n in range(1, last))
        assert torch.allclose(out[t], want + lam ** (last - 1) * n_step(last), atol=1e-5)


def test_ed2_symexp_mean_and_return_range():
    assert (ed2_online.symexp_two_hot_mean(torch.zeros(5, 255)) == 0).all()  # exactly
    logits = torch.randn(4, 255)
    logits[:, :80] = logits[:, -80:] = -1e3
    want = (logits.softmax(-1) * ed2.symexp_bins("cpu")).sum(-1)
    assert torch.allclose(ed2_online.symexp_two_hot_mean(logits), want, rtol=1e-4, atol=1e-3)
    x = torch.randn(1000)
    want = 0.01 * torch.tensor(np.quantile(x, [0.05, 0.95]), dtype=torch.float)
    assert torch.allclose(ed2_online.return_range(torch.zeros(2), x), want, atol=1e-5)


def test_ed2_behaviour_has_the_right_gradient_paths():
    model = acting(WALKER, 16)
    slow = copy.deepcopy(model.critic).requires_grad_(False)
    obs, act, rew = recording()
    noise = noise_for(model, 6, 4)
    loss, _, (h, z) = ed2.rssm_loss(model, obs, act, rew, noise[0])
    loss.backward(retain_graph=True)
    heads = [*model.actor.parameters(), *model.critic.parameters()]
    world = [p for n, p in model.named_parameters() if not n.startswith(("actor", "critic"))]
    assert all(p.grad.isfinite().all() for p in world) and all(p.grad is None for p in heads)
    model.zero_grad()
    nn.init.normal_(model.critic[-1].weight, std=0.1)  # a zero critic would pass no gradient on
    args = model, slow, h.detach(), z.detach(), rew, *noise[1:], torch.zeros(2)
    loss, metrics, new = ed2_online.behaviour_loss(*args)
    loss.backward()
    assert all(p.grad is None for p in world) and all(p.grad is not None for p in heads)
    assert new.shape == (2,) and metrics["scale"] >= 1
    ed2_online.behaviour_loss(model, slow, h, z, rew, *noise[1:], torch.zeros(2))[0].backward()
    assert model.encoder[0].weight.grad.abs().sum() > 0  # the replay loss reaches the world model


def test_ed2_reinforce_prefers_rewarded_actions():
    """A world whose reward is the sign of the action: the loss must raise the mean action."""
    model = acting(act_dim=1)
    h, z = torch.zeros(64, 32), torch.zeros(64, 16)
    with torch.no_grad():
        feat, act = ed2_online.imagine(model, h, z, *noise_for(model, 1, 64, H=3, A=1)[1:])
    logp = torch.distributions.Normal(*model.policy(feat[:-1])).log_prob(act).sum(-1)
    (-(logp * act[..., 0].sign()).mean()).backward()
    assert model.actor[-1].bias.grad[0] < 0 and model.actor[-1].weight.abs().max() < 0.01
    assert feat.shape == (4, 64, 48) and act.shape == (3, 64, 1)


def test_ed2_agent_learns_with_masked_weights_and_remembers_what_it_saw():
    agent = ed2_online.Agent(acting(WALKER, 16), 0, lr=1e-2, warmup=1, horizon=2)
    before = [p.detach().clone() for p in agent.model.parameters()]
    for _ in range(3):
        agent.update(*recording())
    rssm = agent.model.rssm
    assert (rssm.act_weight[(1 - rssm.act_mask).bool().expand_as(rssm.act_weight)] == 0).all()
    assert all(not torch.equal(a, b) for a, b in zip(before, agent.model.parameters()))
    agent = ed2_online.Agent(acting(obs_dim=5, act_dim=2), 0)
    obs = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)

    def play(step, times):
        agent.generator.manual_seed(0)
        return np.stack([step(x, np.arange(3), np.full(3, t)) for x, t in zip(obs, times)])

    a = play(agent.policy(3, mean=True), range(4))
    assert a.shape == (4, 3, 2) and np.abs(a).max() <= 1
    step = agent.policy(3, mean=True)
    for t in range(2):  # after a reset the past does not matter
        step(obs[t] + 1, np.arange(3), np.full(3, t))
    assert np.array_equal(a, play(step, range(4)))
    c = play(agent.policy(3, mean=True), (0, 1, 0, 1))  # a job that starts again at step 2
    assert np.array_equal(a[:2], c[:2]) and not np.array_equal(a[2], c[2])


def test_ed2_online_killed_and_resumed_ends_at_the_same_numbers(tug, small, monkeypatch):
    monkeypatch.setitem(ed2.DREAMER_SIZES, "1m", dict(deter=128, hidden=16, classes=4, units=16))
    args = ed2_online.Args(task=TUG_TASK, device="cpu", workers=1, updates=8, batch=4, length=8,
                           train_ratio=1, seed=3, lr=1e-3, save_every=0)  # 256 steps in 2 rounds
    whole = ed2_online.main(args)
    assert len(whole["returns"]) == 10 and [r["steps"] for r in whole["curve"]] == [128, 256]
    assert whole["groups"] == TUG_GROUPS
    real, calls = ed2_online.Agent.update, []

    def killed(self, *batch):
        calls.append(1)
        if len(calls) == 6:  # in the second round
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *batch)

    with monkeypatch.context() as m:
        m.setattr(ed2_online.Agent, "update", killed)
        with says("stopped; go on with"):
            ed2_online.main(args)
    last = max((p for p in Path("runs").iterdir()), key=lambda p: p.stat().st_mtime)
    again = ed2_online.main(ed2_online.Args(resume=str(last)))
    assert again["returns"] == whole["returns"] and len(calls) == 6
    assert [r["ret"] for r in again["curve"]] == [r["ret"] for r in whole["curve"]]
    file = Path(whole["folder"]) / "checkpoint.pt"
    a, b = (torch.load(f, weights_only=True) for f in (file, last / "checkpoint.pt"))
    assert all(torch.equal(a["model"][k], v) for k, v in b["model"].items())
    assert a["model"]["rssm.act_weight"].shape == (2, 3, 16)
    play = dataclasses.replace(args, eval_only=True, checkpoint=str(file))
    assert ed2_online.main(play)["returns"] == whole["returns"]


# ------------------------------------------------------------------------------- bank of bodies
def rows_of(O, A, n=64):
    g = gen()
    return (torch.randn(n, O, generator=g), torch.rand(n, A, generator=g) * 2 - 1,
            torch.randn(n, O, generator=g))


def test_ed2_bank_of_trunks_equals_a_loop_and_stays_when_frozen():
    torch.manual_seed(0)
    bank = ed2_bodies.Bank(K=3, latent=8, width=16)
    for A in (2, 5):
        z, act, keys = torch.randn(7, 8), torch.randn(7, A), torch.randn(A, 16)
        p, slow = bank.assign(keys), []
        assert p.shape == (A, 3) and (p > 0).all() and torch.allclose(p.sum(1), torch.ones(A))
        for i in range(3):
            own = slice(16 * i, 16 * i + 16)
            x = z @ bank.w_z[:, own] + bank.bias[own]
            for j in range(A):  # action j, as much of it as belongs to trunk i
                x = x + p[j, i] * act[:, j:j + 1] * (keys[j] @ bank.w_a[:, own])
            x = F.mish(F.layer_norm(x, (16,)) * bank.gain[i] + bank.shift[i])
            x = F.layer_norm(x @ bank.second.weight[i] + bank.second.bias[i], (16,))
            slow.append(F.mish(x * bank.second.gain[i] + bank.second.shift[i]))
        assert torch.allclose(bank(z, act, keys), torch.stack(slow).mean(0), atol=1e-6)
    rows = rows_of(5, 2)
    body = ed2_bodies.Body(bank, *rows)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (bank, body)]
    ed2_bodies.fit_bank(bank.requires_grad_(False), [(body, rows)], 20, 16, 0)
    assert all(torch.equal(v, before[0][k]) for k, v in bank.state_dict().items())
    moved = {k for k, v in body.state_dict().items() if not torch.equal(v, before[1][k])}
    assert moved == {"encoder.weight", "encoder.bias", "head.weight", "head.bias", "keys"}
    ed2_bodies.fit_bank(bank.requires_grad_(True), [(body, rows)], 20, 16, 0)
    assert all(not torch.equal(v, before[0][k]) for k, v in bank.state_dict().items())


# ---------------------------------------------------------------------------- whole studies, fast
@pytest.mark.parametrize("study", [
    ed2_tables, ed2_discovery, ed2_partitions, ed2_cores, ed2_bodies, ed2_cost])
def test_ed2_study_runs_and_does_not_run_finished_cells_again(study, small, monkeypatch, cheetah):
    more = {ed2_partitions: dict(task="cheetah-run", partition="random", seeds=2),
            ed2_cores: dict(task="cheetah-run", seeds=2), ed2_cost: dict(task="walker-walk"),
            ed2_discovery: dict(task="cheetah-run")}
    real = ed2.make_data

    def made(task, folder, *rest):
        if task == "cheetah-run" and not Path(folder).exists():
            Path(folder).parent.mkdir(parents=True, exist_ok=True)
            Path(folder).symlink_to(cheetah)
        return real(task, folder, *rest)

    monkeypatch.setattr(ed2, "make_data", made)
    monkeypatch.setattr(ed2_bodies, "HELD_OUT", {"walker-walk": ("cheetah-run",)})
    args = study.Args(**dict(fast=True, workers=1, device="cpu") | more.get(study, {}))
    if study is ed2_bodies:
        result = study.main(args, {"walker-walk": ("cheetah-run",)})
    else:
        result = study.main(args)
    folder = Path(result["folder"])
    files = {p: p.stat().st_mtime_ns for p in (folder / "cells").glob("*.json")}
    assert (len(files) > 0) == (study is not ed2_cost)
    if study is ed2_tables:
        for wm, n in (("tdmpc2", 8), ("dreamerv3", 6)):
            (row,) = result[wm]["rows"]
            assert row["verdict"] == "tie" and (folder / f"table_{wm}.csv").exists()
            assert len([c for c in result["cells"] if c["wm"] == wm]) == n
        assert (folder / "tables.png").exists() and (common.RESULTS / "ed2_tables.json").exists()
    elif study is ed2_discovery:
        rows = result["rows"]
        assert len(rows) == 12 and rows[0]["ari_published"] == rows[0]["ari_between_seeds"] == 1
        assert all(ed2_partitions.check_partition(g, 6) for r in rows for g in r["groups"])
    elif study is ed2_cost:
        names = [f"{x}_ms" for x in ("single", "batched", "looped")]
        assert all(min(r[x] for x in names) > 0 for r in result["rows"])
    elif study is ed2_bodies:
        assert all(np.isfinite([r[a] for a in ("frozen", "scratch", "linear")]).all()
                   for r in result["rows"])
        assert (folder / "bodies.png").exists()
    else:
        assert result["verdict"] in ("win", "tie", "loss") and len(result["cells"]) >= 4
    if files and study is not ed2_bodies:
        again = study.main(study.Args(resume=str(folder)))
        assert files == {p: p.stat().st_mtime_ns for p in files}
        key = "rows" if "rows" in again else "cells"
        assert json.dumps(again[key]) == json.dumps(result[key])


def test_ed2_figures_of_a_run(cheetah, small):
    args = ed2_args(task="cheetah-run", seeds=2)
    folder = ed2.main(ed2.Args(resume=str(ed2_run(args, cheetah))))["folder"]
    errors = ed2_figures.main(ed2_figures.Args(folder=folder))["linear"]
    assert list(errors) == [1, 3, 5, 10] and np.isfinite(list(errors.values())).all()
    assert all((Path(folder) / f"{x}.png").stat().st_size > 5000 for x in ("horizon", "partition"))


@pytest.mark.parametrize("study, settings, words", [
    (ed2_tables, dict(task="fish-swim"), ("published groups", "walker, cheetah")),
    (ed2_partitions, dict(task="fish-swim", partition="human"), ("no human partition", "hopper")),
    (ed2_online, dict(eval_only=True), ("--checkpoint",)),
    (ed2_online, dict(checkpoint="nowhere.pt"), ("nowhere.pt",)),
    (ed2_online, dict(model_size="1M"), ("--model-size 1M", "1m")),
    (ed2_online, dict(train_ratio=0), ("--train-ratio 0",)),
    (ed2_bodies, dict(task="fish-swim"), ("--task fish-swim", "walker-walk")),
    (ed2_cores, dict(task="cartpole-swingup", partition="none"), ("nothing to join",)),
    (ed2_figures, dict(folder="nowhere"), ("--folder nowhere", "results.json"))])
def test_ed2_studies_refuse_bad_input(study, settings, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ed2, "make_data", lambda *a: (None, None, {}))
    with says(*words):
        study.main(study.Args(**settings))
