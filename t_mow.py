from t_head import *  # noqa: F401,F403

# --------------------------------------------------------------------------------------------------------------- mow.py
GAMES = "Boxing,Krull,RoadRunner"
MOW_TINY = dict(steps=44, random_steps=12, warmup=4, train_every=1, batch=2, length=8, rollouts=4, context=3, horizon=3,
            stem=4, latents=4, classes=4, width=16, heads=2, hidden=16, emb=8, eval_episodes=1, frame_cap=80,
            device="cpu", compile=False, bf16=False)


def mow_args(**more):
    args = mow.Args(**MOW_TINY | more)
    return mow.fill(args, mow.task_list(args.task))


def mow_agent(K=3, legal=None, **more):
    """A tiny agent for K games, its clusters given in turn."""
    args = mow_args(task=",".join(envs.ATARI26[:K]), **more)
    agent = mow.make_agent(args, mow.task_list(args.task), legal or [list(range(18))] * K, torch.device("cpu"))
    agent.wm.assign([k % args.clusters for k in range(K)])
    return agent


def mow_batch(agent, B=2, L=6, seed=0, K=None):
    K, g = K or agent.K, torch.Generator().manual_seed(seed)
    obs = torch.randint(0, 256, (K, B, L, 64, 64, 3), generator=g, dtype=torch.uint8)
    act = F.one_hot(torch.randint(0, 18, (K, B, L), generator=g), agent.A).float()
    flags = torch.zeros(K, B, L, dtype=torch.bool)
    return obs, act, torch.randn(K, B, L, generator=g), flags, flags.clone()


def mow_frames(agent, path, n=40):
    frames = data.Frames(path, agent.K, n, agent.A)
    rng = np.random.default_rng(0)
    for t in range(n):
        frames.append(rng.integers(0, 256, (agent.K, 64, 64, 3)), np.eye(agent.A)[rng.integers(0, 18, agent.K)],
                      rng.normal(size=agent.K), [t % 9 == 8] * agent.K, [t % 9 == 0] * agent.K)
    return frames


def everything(agent):
    """All numbers of an agent, in one tensor per name."""
    flat = {}

    def walk(x, name):
        if isinstance(x, dict):
            for k, v in x.items():
                walk(v, f"{name}/{k}")
        elif isinstance(x, (list, tuple)):
            walk(dict(enumerate(x)), name)
        elif torch.is_tensor(x):
            flat[name] = x
    walk(agent if isinstance(agent, dict) else agent.state(), "")
    return flat


# ---------------------------------------------------------------------------------------------------------------- maths
def test_mow_two_hot_and_returns_by_hand():
    x = torch.tensor([-3e9, -7.3, 0.0, 0.4, 12.0, 5e8, 1e12])
    logits = torch.randn(7, 255, generator=torch.Generator().manual_seed(0))
    logp, bins = logits.log_softmax(-1), torch.linspace(-20, 20, 255)
    y = mow.symlog(x).clamp(-20, 20)
    i = torch.searchsorted(bins, y).clamp(1, 254)
    w = (y - bins[i - 1]) / (bins[i] - bins[i - 1])
    want = -(logp.gather(1, i[:, None] - 1)[:, 0] * (1 - w) + logp.gather(1, i[:, None])[:, 0] * w)
    assert torch.allclose(mow.two_hot_loss(logits, x), want, atol=1e-3)
    sharp = torch.full((1, 255), -1e4)
    sharp[0, 127 + 20] = 0
    assert mow.two_hot_mean(sharp).item() == pytest.approx(math.expm1(20 * 40 / 254), rel=1e-4)
    rew, done, v = torch.tensor([1., 2., 4.]), torch.tensor([0., 1., 0.]), torch.tensor([7., 11., 13., 17.])
    g, lam = 0.9, 0.6
    R2 = 4 + g * 17
    R1 = 2.0
    R0 = 1 + g * (0.4 * 11 + 0.6 * R1)
    assert torch.allclose(mow.lambda_return(rew, done, v, g, lam), torch.tensor([R0, R1, R2]))
    R0 = 1 + g * (0.4 * 7 + 0.6 * R1)
    assert torch.allclose(mow.lambda_return(rew, done, v, g, lam, compat=True),
                          torch.tensor([R0, R1, 4 + g * (0.4 * 13 + 0.6 * 17)]))


def test_sigma_in_closed_form_minimises_the_harmonious_loss():
    loss = torch.tensor([0.01, 1.0, 10.0, 300.0], dtype=torch.double)
    s = mow.best_sigma(loss)
    f = lambda s: loss / s + s.log1p()  # noqa: E731
    assert (f(s) < f(s * 1.01)).all() and (f(s) < f(s * 0.99)).all()
    assert (1 / s)[2:].tolist() == pytest.approx([0.092, 0.0033], rel=0.02)


def test_balance_loss_is_zero_at_uniform_use_and_lifts_an_unused_expert():
    assert mow.balance_loss(torch.full((6, 4), 0.25), 2) == 0
    logits = torch.tensor([[4., 4., 0.]] * 3, requires_grad=True)
    mow.balance_loss(logits.softmax(-1), 2).backward()
    assert (logits.grad[:, 2] < 0).all() and (logits.grad[:, :2] > 0).all()
    big, small = (mow.balance_loss(torch.tensor([[1., 0., 0.]]).expand(K, 3), 1) for K in (26, 3))
    assert big == pytest.approx(float(small))


def test_route_is_per_task_ordered_and_random_only_with_noise():
    router = torch.nn.Linear(8, 5)
    e = F.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    S, J, w = mow.route(e, router, 2)
    assert torch.allclose(S.sum(-1), torch.ones(40)) and (J[:, 0] < J[:, 1]).all() and torch.allclose(w.sum(-1),
                                                                                                      torch.ones(40))
    assert torch.equal(J, S.topk(2).indices.sort().values)
    assert torch.equal(mow.route(e, router, 2, tau=5.0)[1], J)  # temperature alone changes no choice
    assert not torch.equal(mow.route(e, router, 2, tau=5.0, noise=1.0)[1], J)
    assert mow.route(e, router, 2, tau=5.0)[0].max() < S.max()


def test_planted_clusters_are_found_and_sizes_are_capped():
    rng = np.random.default_rng(0)
    truth = rng.permutation(np.arange(12) % 3)
    centre = rng.normal(size=(3, 7, 64))
    grads = centre[truth] + 0.7 * rng.normal(size=(12, 7, 64))
    grads *= rng.uniform(0.01, 100, size=(12, 7, 1))  # scale means nothing
    labels = mow.cluster_tasks(grads, 3)
    assert mow.adjusted_rand(labels, truth) == 1 and labels[0] == 0 and labels == mow.cluster_tasks(grads, 3)
    sim = mow.task_similarity(grads)
    assert mow.silhouette(sim, labels) > 0.3 > mow.silhouette(sim, rng.permutation(labels))
    same = np.ones((12, 1, 8)) + 1e-3 * rng.normal(size=(12, 1, 8))
    for n in (1, 2, 3, 5, 12):
        sizes = np.bincount(mow.cluster_tasks(same, n))
        assert len(sizes) == n and sizes.max() <= max(math.ceil(18 / n), 2)
    assert mow.adjusted_rand([0, 0, 1, 1], [1, 1, 0, 0]) == 1
    chance = [mow.adjusted_rand(rng.permutation(truth), truth) for _ in range(300)]
    assert abs(np.mean(chance)) < 0.05
    with says("fewer --clusters"):
        mow.cluster_tasks(grads, 13)


def test_sketches_keep_cosines():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(200_000, generator=g)
    b = 0.6 * a + 0.8 * torch.randn(200_000, generator=g)
    assert F.cosine_similarity(mow.sketch(a), mow.sketch(b), dim=0).item() == pytest.approx(0.6, abs=0.05)
    assert torch.equal(mow.sketch(a), mow.sketch(a))


# ------------------------------------------------------------------------------------------------------------- networks
def test_storm_has_exactly_its_published_size():
    wm = mow.WorldModel(1, 18, 1, 1, 1, 0, 32, 32, 32, 512, 8, 2, 0, 512, "bn")
    assert sum(p.numel() for p in wm.parameters()) == 16_513_155
    assert wm.router is wm.join is wm.shared is wm.task_head is None
    args = mow.fill(mow.Args(task="Boxing", storm=True, preset="full", device="cpu"), ["Boxing"])
    assert mow.parameters(args, 1, 18) == 16_513_155 and (args.norm, args.harmony, args.rollouts) == ("bn", "off", 1024)
    p = mow.products(args, 18)
    assert p["encoder"] == pytest.approx(30.9e6, rel=0.01) and p["decoder"] == p["encoder"]
    full = mow.fill(mow.Args(task="atari26", preset="full", device="cpu"), list(envs.ATARI26))
    assert (full.clusters, full.experts, full.topk, full.norm) == (12, 12, 2, "gn")
    assert mow.products(full, 18)["dynamics"] == pytest.approx(16.6e6, rel=0.1)


@pytest.mark.parametrize("K,N_m,N_e,n", [(1, 1, 1, 1), (3, 2, 3, 2), (6, 3, 6, 2)])
def test_mow_shapes(K, N_m, N_e, n):
    agent = mow_agent(K, clusters=N_m, experts=N_e, topk=n)
    batch, wm = mow_batch(agent), agent.wm
    losses, more = mow.world_model_loss(wm, *batch, torch.tensor(2.0), 0.5)
    assert set(losses) == {"rec", "rew", "end", "dyn", "rep"} | ({"task"} if K > 1 else set())
    assert all(x.shape == (K,) and torch.isfinite(x).all() for x in losses.values())
    assert more["z"].shape == (K, 2, 6, 16) and more["J"].shape == (K, n) and more["scores"].shape == (K, N_e)
    assert torch.allclose(wm.embedding().norm(dim=-1), torch.ones(K))
    x, a, rew, done = mow.imagine(wm.eval(), agent.actor, more["z"], batch[1], batch[4], 5, torch.tensor(1.0))
    assert x.shape == (K, 2, 6, 16 + 16 + 8) and a.shape == (K, 2, 5, 18) and rew.shape == done.shape == (K, 2, 5)
    assert ((x[..., :16].unflatten(-1, (4, 4)).sum(-1) == 1).all()) and (a.sum(-1) == 1).all()
    loss, low, high, _ = mow.agent_loss(agent.actor, agent.critic, agent.slow, wm.cluster_of, x, a, rew, done,
                                        agent.low,
                                        agent.high, 0.985, 0.95, 3e-4, False)
    assert loss.ndim == 0 and low.shape == (K,) and (high >= low).all()


def test_a_tasks_loss_leaves_other_clusters_and_unchosen_experts_alone():
    agent = mow_agent(3, clusters=3, experts=3, topk=1)
    wm = agent.wm.eval()
    losses, more = mow.world_model_loss(wm, *mow_batch(agent), torch.tensor(1.0), 0.0)
    chosen = more["J"].flatten().tolist()
    for k in range(3):
        wm.zero_grad()
        mow.total_loss(losses)[k].backward(retain_graph=True)
        for c in range(3):
            touched = any(p.grad is not None and p.grad.abs().sum() > 0 for p in wm.vaes[c].parameters())
            heads = [p.grad[c].abs().sum() > 0 for h in (wm.prior_head, wm.reward_head,
                                                         wm.end_head) for p in h.parameters()]
            assert touched == (c == k) and any(heads) == (c == k)
        for j in range(3):
            used = [p.grad[j].abs().sum() > 0 for p in (*wm.mix.parameters(), *wm.experts.parameters())]
            assert all(used) == any(used) == (j == chosen[k])
        assert wm.shared.blocks[0].qkv.weight.grad.abs().sum() > 0


def test_gate_trains_the_router_without_changing_values():
    agent = mow_agent(3, experts=3, topk=2)
    wm, batch, grads = agent.wm.eval(), mow_batch(agent), {}
    for gate in ("st", "none"):
        torch.manual_seed(0)
        losses, _ = mow.world_model_loss(wm, *batch, torch.tensor(1.0), 0.0, gate)
        wm.zero_grad()
        mow.total_loss(losses).sum().backward()
        g = wm.router[0].weight.grad
        grads[gate] = (0.0 if g is None else g.abs().sum().item(), mow.total_loss(losses).detach())
    assert grads["st"][0] > 0 == grads["none"][0] and torch.allclose(grads["st"][1], grads["none"][1], rtol=1e-5)


def test_gathered_products_equal_a_loop_over_tasks():
    agent = mow_agent(6, clusters=3, experts=6, topk=2)
    wm, batch = agent.wm.eval(), mow_batch(agent)
    e, pos = wm.embedding(), torch.arange(6)
    _, J, w = wm.routing(e)
    z = mow.sample_latent(wm.posterior(mow.to_images(batch[0]), e))
    mask = mow.episode_mask(batch[4], pos)
    h = wm.sequence(z, batch[1], e, J, w, mask, pos)
    rew = wm.head(wm.reward_head, h, e)
    for k in range(6):
        one = [x[k:k + 1] for x in (z, batch[1], e, J, w, mask)]
        alone = wm.sequence(*one, pos)
        assert torch.allclose(alone[0], h[k], atol=1e-5)
        assert torch.allclose(wm.head(wm.reward_head, alone, e[k:k + 1], [k])[0], rew[k], atol=1e-5)
        assert torch.allclose(wm.decode(z[k:k + 1], e[k:k + 1], [k])[0], wm.decode(z, e)[k], atol=1e-5)


@pytest.mark.parametrize("routing", (dict(topk=2), dict(routing="token"), dict(routing="token", segment=3)))
def test_cached_steps_equal_the_full_pass_and_it_is_causal(routing):
    agent = mow_agent(3, experts=3, expert_layers=2, shared_layers=2, **routing)
    wm, (_, act, _, _, first) = agent.wm.eval(), mow_batch(agent, L=8)
    first[0, 0, 3] = first[2, 1, 1] = True
    e, pos, z = wm.embedding(), torch.arange(8), torch.randn(3, 2, 8, 16)
    _, J, w = wm.routing(e)
    mask = mow.episode_mask(first, pos)
    full = wm.sequence(z, act, e, J, w, mask, pos)
    cache = wm.new_cache(3, 2, 8, z)
    with torch.no_grad():
        parts = [wm.sequence(z[:, :, :3], act[:, :, :3], e, J, w, mask[:, :, :3], pos[:3], cache)]
        parts += [wm.sequence(z[:, :, t:t + 1], act[:, :, t:t + 1], e, J, w, mask[:, :, t:t + 1], pos[t:t + 1], cache)
                  for t in range(3, 8)]
    assert torch.allclose(torch.cat(parts, 2), full, atol=1e-4)
    later = z.clone()
    later[:, :, 5:] += 1
    assert torch.allclose(wm.sequence(later, act, e, J, w, mask, pos)[:, :, :5], full[:, :, :5], atol=1e-6)
    before = z.clone()
    before[0, 0, :3] += 1  # another episode
    other = wm.sequence(before, act, e, J, w, mask, pos)
    assert torch.allclose(other[0, 0, 3:], full[0, 0, 3:], atol=1e-6)
    assert not torch.allclose(other[0, 0, :3], full[0, 0, :3])
    free = mow.episode_mask(first, pos, False)
    assert not torch.allclose(wm.sequence(before, act, e, J, w, free, pos)[0, 0, 3:],
                              wm.sequence(z, act, e, J, w, free, pos)[0, 0, 3:])


def test_experts_per_token():
    agent = mow_agent(2, experts=3, routing="token", segment=8)
    wm, (obs, act, _, _, first) = agent.wm.eval(), mow_batch(agent, B=1, L=8)
    e, pos = wm.embedding(), torch.arange(8)
    _, J, w = wm.routing(e)
    assert J.tolist() == [[0, 1, 2]] * 2 and w.eq(1).all()
    z, mask = mow.sample_latent(wm.posterior(mow.to_images(obs), e)).detach(), mow.episode_mask(first, pos)
    h = wm.sequence(z, act, e, J, w, mask, pos)
    h.square().sum().backward()
    assert wm.token_router.weight.grad.abs().sum(1).min() > 0
    chosen = wm.token_scores(z, act, e)[:, 0, 0].argmax(-1, keepdim=True)                  # of the first token
    moved = {j for j in range(3) if wm.experts.blocks[0].up.weight.grad[j].any()}
    assert moved == set(chosen.flatten().tolist())
    wm.segment = 0
    assert torch.allclose(h, wm.sequence(z, act, e, chosen, torch.ones(2, 1), mask, pos), atol=1e-5)

    for segment in (1, 4, 8):
        agent = mow_agent(2, experts=3, routing="token", segment=segment)
        torch.manual_seed(0)
        nn.init.normal_(agent.wm.token_router.weight, std=3)
        more = mow.world_model_loss(agent.wm, *mow_batch(agent, L=8), torch.tensor(1.0), 0.0)[1]
        assert (more["switch"] > 0).all() == (segment < 8) and more["prior"].min() > 0
        assert more["switch_rate"].max() <= {1: 1, 4: 1 / 7, 8: 0}[segment]
    with torch.no_grad():
        agent.wm.token_router.weight.zero_()
        agent.wm.token_router.bias.zero_()
    more = mow.world_model_loss(agent.wm, *mow_batch(agent, L=8), torch.tensor(1.0), 0.0)[1]
    assert more["prior"].abs().max() < 1e-6 and torch.allclose(more["scores"], wm_scores(agent), atol=1e-6)


def wm_scores(agent):
    return agent.wm.routing(agent.wm.embedding())[0]


def test_penalties_on_switching_and_on_leaving_the_prior():
    grads = {}
    for name, more in (("free", {}), ("switch", dict(switch_coef=2.0)), ("prior", dict(prior_coef=2.0))):
        agent = mow_agent(2, experts=3, routing="token", tau=1.0, **more)
        torch.manual_seed(0)
        nn.init.normal_(agent.wm.token_router.weight)
        batch, weight = mow_batch(agent, B=1, L=4), agent.wm.token_router.weight
        torch.manual_seed(0)
        agent.update_world(batch)
        grads[name] = weight.grad - grads.get("free", 0)
        if more:
            agent = mow_agent(2, experts=3, routing="token")
            torch.manual_seed(0)
            nn.init.normal_(agent.wm.token_router.weight)
            torch.manual_seed(0)
            penalty = mow.world_model_loss(agent.wm, *batch, torch.tensor(1.0), 0.0)[1][name].sum()
            want, = torch.autograd.grad(2 * penalty, agent.wm.token_router.weight)
            assert want.any() and torch.allclose(grads[name], want, atol=1e-5)


def test_noise_of_the_actor_gradient(tmp_path, monkeypatch):
    agent = mow_agent(2, clusters=1, rollouts=16)
    frames = mow_frames(agent, tmp_path / "f")
    agent.update(frames)
    assert all(0 < x < 1e6 for x in mow.gradient_noise(agent, frames, 0))
    real = mow.imagine
    monkeypatch.setattr(mow, "imagine", lambda *a, **k: [x[:, :1].expand(-1, 16, *x.shape[2:]) for x in real(*a, **k)])
    assert max(mow.gradient_noise(agent, frames, 0)) < 1e-8  # all roll-outs alike
    assert mow.rank_correlation([[1, 2], [3, 9]], [[5, 6], [7, 8]]) == pytest.approx(1)
    assert mow.rank_correlation([[1, 2]], [[5, 5]]) is None


def test_free_bits_are_per_task_and_kl_stops_at_episodes():
    agent = mow_agent(2, clusters=1)
    batch = mow_batch(agent, L=5)
    batch[4][1, :, 2] = True
    seen = []
    real = mow.kl
    try:
        mow.kl = lambda p, q: seen.append(torch.full(p.shape[:3], 3.0)) or torch.tensor(
            [0.2, 3.0])[:, None, None].expand(p.shape[:3]).clone().index_fill_(2, torch.tensor([1]), 9.0)
        losses, more = mow.world_model_loss(agent.wm, *batch, torch.tensor(1.0), 0.0)
    finally:
        mow.kl = real
    # pairs (t, t+1): index 1 leads into step 2, which opens an episode of task 1
    assert more["dyn_raw"].tolist() == pytest.approx([(0.2 * 3 + 9) / 4, 3.0]) and losses["dyn"][0] > 1
    assert seen[0].shape == (2, 2, 4)


def test_actor_masks_games_and_mixes_kinds_of_actions():
    legal = torch.zeros(3, 18, dtype=torch.bool)
    legal[0, [0, 3]] = True
    legal[1] = True
    actor = mow.Actor(5, 16, legal, torch.tensor([False, False, True]), 4)
    x = torch.randn(3, 200, 5, generator=torch.Generator().manual_seed(0))
    a = actor.sample(x)
    assert a.shape == (3, 200, 22) and (a[:2, :, :18].sum(-1) == 1).all() and (a[:2, :, 18:] == 0).all()
    assert set(a[0].argmax(-1).tolist()) == {0, 3} and (a[2, :, :18] == 0).all() and a[2, :, 18:].std() > 0.05
    logp, ent = actor.evaluate(x, a)
    p, mean, std = actor(x)
    want = torch.distributions.Independent(torch.distributions.Normal(mean[2], std[2]), 1)
    assert torch.allclose(logp[2], want.log_prob(a[2, :, 18:]), atol=1e-5) and torch.allclose(ent[2], want.entropy(),
                                                                                              atol=1e-5)
    assert torch.allclose(logp[:2], (p * a[..., :18]).sum(-1)[:2]) and (ent[0] <= math.log(2) + 1e-6).all()
    assert (std >= 0.1).all() and (std <= 1).all()
    for n_disc, n_cont in ((18, 0), (0, 4)):
        one = mow.Actor(5, 16, torch.ones(2, n_disc, dtype=torch.bool), torch.tensor([n_disc == 0] * 2), n_cont)
        a = one.sample(x[:2])
        assert a.shape == (2, 200, n_disc + n_cont) and all(y.shape == (2, 200) for y in one.evaluate(x[:2], a))


def test_agent_loss_raises_good_actions_and_scales_tasks_apart():
    agent = mow_agent(2, clusters=2)
    x = torch.randn(2, 64, 4, 16 + 16 + 8, generator=torch.Generator().manual_seed(0))
    act = F.one_hot(torch.randint(0, 18, (2, 64, 3), generator=torch.Generator().manual_seed(1)), 18).float()
    rew = act[..., :5].sum(-1) * torch.tensor([1.0, 1000.0])[:, None, None]  # in task 1 a thousand times as much
    done = torch.zeros_like(rew)
    args = (agent.wm.cluster_of, x, act, rew, done)
    low, high = agent.low, agent.high
    before = agent.actor(x[:, :, 0])[0][..., :5].exp().sum(-1).mean(1)
    for _ in range(30):
        loss, low, high, _ = mow.agent_loss(agent.actor, agent.critic, agent.slow, *args, low, high, 0.9, 0.95, 3e-4,
                                            False)
        agent.agent_opt.zero_grad()
        loss.backward()
        agent.agent_opt.step()
    after = agent.actor(x[:, :, 0])[0][..., :5].exp().sum(-1).mean(1)
    assert (after > before).all() and high[1] > 300 * high[0]
    assert all(p.grad is None for p in agent.slow.parameters())


def test_playing_uses_the_posterior_and_the_episode_so_far(monkeypatch):
    agent = mow_agent(2, clusters=1)
    wm, seen = agent.wm.eval(), []
    monkeypatch.setattr(agent.actor, "sample", lambda x: seen.append(x) or F.one_hot(
        torch.full(x.shape[:2], len(seen) % 18), 18).float())
    memory, zs, acts = agent.memory(1), [], []
    obs = np.random.default_rng(0).integers(0, 256, (20, 2, 1, 64, 64, 3), np.uint8)
    for t in range(20):
        if t == 2:
            memory[2][1] = 0  # task 1 starts anew
        a, memory = agent.play(obs[t], memory, [t])
        zs.append(seen[-1][..., :16])
        acts.append(torch.from_numpy(a))
        if t:
            begin = max(t - agent.window, 0)
            for k, start in ((0, begin), (1, max(begin, 2 * (t > 1)))):
                h = seen[-1][k, 0, 16:32]
                if start == t:
                    assert (h == 0).all()
                    continue
                z, past = (torch.stack(x[start:t], 2)[k:k + 1] for x in (zs, acts))
                e, pos = wm.embedding([k]), torch.arange(t - start)
                _, J, w = wm.routing(wm.embedding())
                mask = (pos[:, None] >= pos).expand(1, 1, -1, -1)
                want = wm.sequence(z, past, e, J[k:k + 1], torch.ones_like(w[:1]), mask, pos)[0, 0, -1]
                assert torch.allclose(h, want, atol=1e-5), (t, k)
    assert memory[2].flatten().tolist() == [agent.window] * 2


@pytest.mark.parametrize("preset,window", [("smoke", 8), ("mid", 15), ("full", 16)])
def test_the_agent_acts_on_positions_that_its_imagination_visits(preset, window):
    args = mow.fill(mow.Args(task="Boxing", storm=True, preset=preset, device="cpu", stem=4, width=16), ["Boxing"])
    agent = mow.make_agent(args, ["Boxing"], [list(range(18))], torch.device("cpu"))
    assert agent.memory(2)[0].shape[2] == window and args.context <= window < args.context + args.horizon
    assert args.context + args.horizon <= args.length
    with pytest.raises(SystemExit, match="--length 12 or more"):
        mow_args(context=4, horizon=8, length=11)


def test_clusters_are_cloned_with_their_adam_moments(tmp_path):
    agent = mow_agent(3, clusters=3, task_coef=1.0)
    agent.wm.assign([0, 0, 0])
    frames = mow_frames(agent, tmp_path / "f")
    for _ in range(3):
        agent.update(frames, learn_to_act=False)
    grads = mow.task_gradients(agent, frames, batches=2)
    assert grads.shape[0] == 3 and grads.shape[2] == mow.SKETCH and np.abs(grads).sum((1, 2)).min() > 0
    again = mow.task_gradients(agent, frames, batches=2)
    assert np.array_equal(grads, again)
    agent.args.grad_reduce = "mean"
    assert mow.task_gradients(agent, frames, batches=1).shape[:2] == (3, 1)
    agent.spread([2, 0, 1])
    assert agent.wm.labels == (2, 0, 1) == tuple(agent.wm.cluster_of.tolist())
    for a, b in zip(agent.wm.vaes[0].parameters(), agent.wm.vaes[2].parameters()):
        assert torch.equal(a, b)
        s, t = agent.opt.state[a], agent.opt.state[b]
        assert torch.equal(s["exp_avg_sq"],
                           t["exp_avg_sq"]) and s["step"] == t["step"] and s["exp_avg"] is not t["exp_avg"]
    w = agent.wm.reward_head.out.weight
    assert torch.equal(w[0], w[2]) and torch.equal(*(agent.opt.state[w]["exp_avg"][i] for i in (0, 1)))
    old = w.detach().clone()
    agent.update(frames)
    assert (w.detach() - old).abs().max() < 5 * agent.args.lr


MOW_RANK = """
import os, sys
sys.path.insert(0, sys.argv.pop())
import mow, torch, torch.nn.functional as F, tyro
made, agents = mow.make_agent, []
def make_agent(*args):                                    # no dropout and the likeliest latents: shares draw no noise
    agents.append(made(*args))
    for m in agents[0].wm.modules():
        m.dropout = 0.0
    return agents[0]
mow.make_agent = make_agent
mow.sample_onehot = lambda logp: F.one_hot(logp.argmax(-1), logp.shape[-1]).to(logp.dtype)
mow.main(tyro.cli(mow.Args))
torch.save(agents[0].state(), f"rank{os.environ.get('RANK', '')}.pt")
"""


def test_two_processes_train_the_model_of_one(tmp_path):
    (tmp_path / "rank.py").write_text(MOW_RANK)
    words = MOW_TINY | dict(task="Boxing,Krull", warmup=10, steps=16, tau=1.0)
    words = [f"--{k.replace('_', '-')}={v}" for k, v in words.items() if k not in ("compile", "bf16")]
    env, logs = os.environ | {"OMP_NUM_THREADS": "1"}, []
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, launcher in (("one", []), ("two", torchrun)):
        (tmp_path / name).mkdir()
        p = subprocess.run([sys.executable, *launcher, "../rank.py", *words, HERE], cwd=tmp_path / name, env=env,
                           capture_output=True, text=True)
        assert p.returncode == 0, p.stderr[-3000:]
        folder, = (tmp_path / name / "runs").iterdir()
        lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        logs.append([[x[f"losses/{k}"] for k in ("rec", "rew", "end", "dyn", "dyn_raw", "rep", "task", "grad_norm")]
                     for x in lines if x["step"] <= 10])      # the warm-up; roll-outs then begin in other windows
        assert json.loads((folder / "results.json").read_text())["rows"][0]["episodes"] == 1
    assert len(logs[0]) == 2 and np.allclose(*logs, rtol=1e-4), logs
    a, b = (everything(torch.load(tmp_path / f"two/rank{i}.pt", weights_only=True)) for i in (0, 1))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert "2 processes" in p.stdout and p.stdout.count("playing 1 episodes") == 1
    with says("start them with python"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WORLD_SIZE", "2")
            mow.main(mow.Args(task="Pong", experiment="cost", **MOW_TINY))
    with says("multiples of 3"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WORLD_SIZE", "3")
            mow.main(mow.Args(task="Pong", **MOW_TINY))


def test_ssim_equals_sums_over_every_window():
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(2, 14, 13)).astype(np.float32)
    y = np.clip(0.8 * x + 0.2 * rng.uniform(size=x.shape), 0, 1).astype(np.float32)
    g = np.exp(-np.arange(-5, 6) ** 2 / 4.5)
    g = np.outer(g, g) / g.sum() ** 2
    want = []
    for a, b in zip(x, y):
        values = []
        for i in range(4):
            for j in range(3):
                p, q = a[i:i + 11, j:j + 11], b[i:i + 11, j:j + 11]
                mp, mq = (g * p).sum(), (g * q).sum()
                vp, vq, c = (g * (p - mp) ** 2).sum(), (g * (q - mq) ** 2).sum(), (g * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + 1e-4) * (2 * c + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
        want.append(np.mean(values))
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    assert np.allclose(mow.ssim(x, y), want, atol=1e-4) and mow.ssim(x, x).allclose(torch.ones(2))
    assert mow.ssim(x[None], y[None]).shape == (1, 2) and mow.ssim(x, 1 - x).max() < 0


def test_atari_modes_and_difficulties():
    def play(task):
        env = envs.make_env(task, obs="pixels", sticky=0.0)
        return np.stack([env.reset(seed=3)[0], *(env.step(t % 4)[0] for t in range(20))])

    frames = play("Breakout")
    assert np.array_equal(frames, play("Breakout@m0d0"))
    assert not np.array_equal(frames, play("Breakout@m16d0")) and not np.array_equal(frames, play("Breakout@m0d1"))
    assert envs.score("Boxing@m0d1", 12.1, 0.0) == 1.0
    for task in ("Boxing@m1d0", "Boxing@m0d4", "Boxing@hard", "Boxing@m0"):
        with says(task, "Boxing@m<mode>d<difficulty>", "a mode of 0", "difficulty of 0, 1, 2, 3"):
            envs.make_env(task, obs="pixels")


# ----------------------------------------------------------------------------------------------------------- whole runs
@pytest.fixture(scope="module")
def mow_run(tmp_path_factory):
    """One tiny run on three games, from start to end."""
    old = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("mow"))
    try:
        result = mow.main(mow.Args(task=GAMES, capture_video=True, **MOW_TINY))
        yield result, next(Path("runs").resolve().iterdir())
    finally:
        os.chdir(old)


def test_a_tiny_run_makes_its_table_and_files(mow_run):
    result, folder = mow_run
    assert [r["task"] for r in result["rows"]] == GAMES.split(",") and result["rows"][0]["storm"] == 79.7
    for name in ("results.json", "results.csv", "frames.png", "routing.png", "curve.png", "checkpoint.pt", "Krull.mp4",
                 "metrics.jsonl", "envs.py", "data.py"):
        assert (folder / name).stat().st_size > 0
    saved = json.loads((folder / "results.json").read_text())
    assert saved["rows"] == result["rows"] and saved["args"]["sticky"] == 0.25
    assert all(r["blind"] == np.mean([x for x, _ in b]) for r, b in zip(saved["rows"], saved["played_blind"]))
    assert len(saved["clusters"]["labels"]) == 3 and -1 <= saved["clusters"]["silhouette"] <= 1
    assert len(saved["fidelity"]["open_loop_psnr"]) == 3 and np.isfinite(saved["fidelity"]["dyn_kl"]).all()
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["updates"] == 36 and state["sweep"] == 44 and state["player"]["count"] == 44


def test_the_blind_control_acts_as_often_and_never_looks(monkeypatch):
    args = mow_args(task="Boxing", frame_cap=40)
    options = mow.task_options(args, ["Boxing"])
    agent = mow.make_agent(args, ["Boxing"], [list(range(18))], torch.device("cpu"))
    played, taken = mow.evaluate(agent, ["Boxing"], options, 2, seed=1)
    assert taken.shape == (1, 20, 18) and (taken.sum(-1) == 1).all() and len(played[0]) == 2  # 2 environments, 10 steps
    monkeypatch.setattr(agent, "play", None)
    pool = np.eye(18, dtype=np.float32)[None, [2, 2, 5]]
    blind, drawn = mow.evaluate(agent, ["Boxing"], options, 2, seed=1, pool=pool)
    assert set(drawn.argmax(-1).ravel()) == {2, 5} and len(blind[0]) == 2


def test_killed_at_any_moment_it_ends_at_the_same_numbers(mow_run, tmp_path, monkeypatch):
    whole, folder = mow_run
    want = everything(torch.load(folder / "checkpoint.pt", weights_only=True))
    monkeypatch.chdir(tmp_path)
    real_update, calls = mow.Agent.update, []
    real_send = mow.Player.send

    class Killed(BaseException):
        pass

    def update(self, *a, **k):
        calls.append(self.updates)
        if len(calls) in (3, 15):  # in the warm-up, in play
            raise Killed
        return real_update(self, *a, **k)

    def send(self, sweep, random):
        if sweep == 5 and not calls and len(sends) < 6:
            sends.extend([0] * 9)
            raise Killed
        sends.append(sweep)
        return real_send(self, sweep, random)

    sends, args = [], mow.Args(task=GAMES, save_every=0.0, capture_video=True, **MOW_TINY)
    monkeypatch.setattr(mow.Agent, "update", update)
    monkeypatch.setattr(mow.Player, "send", send)
    result, kills = None, 0
    while result is None:
        try:
            runs = list(Path("runs").glob("*"))
            result = mow.main(dataclasses.replace(args, resume=str(runs[0])) if runs else args)
        except Killed:
            kills += 1
    assert kills == 3
    got = everything(torch.load(next(Path("runs").iterdir()) / "checkpoint.pt", weights_only=True))
    assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want if want[k].dtype != torch.bool)
    assert result["rows"] == whole["rows"] and result["finished"] == whole["finished"]
    assert result["clusters"] == whole["clusters"] and result["routing"] == whole["routing"]


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": HERE}
    words = [f"--{k.replace('_', '-')}={v}" for k, v in (MOW_TINY | dict(steps=5000)).items() if k not in ("compile",
                                                                                                           "bf16")]
    p = subprocess.Popen([sys.executable, f"{HERE}/mow.py", "--task", "Boxing", *words], cwd=tmp_path, env=env,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in p.stdout:
        if "steps," in line and "updates:" in line:
            break
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert "stopped; go on with: python mow.py --resume runs/Boxing__mow__1__" in err, err[-500:]
    assert list(tmp_path.glob("runs/*/checkpoint.pt"))


def test_forty_sweeps_on_a_cpu_learn_to_see(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = dict(MOW_TINY, stem=8, lr=2e-3, width=32, hidden=32, batch=2, steps=80, random_steps=40, warmup=40,
                 clusters=2,
                 frame_cap=400)
    agents, real, gradients = [], mow.make_agent, mow.task_gradients
    monkeypatch.setattr(mow, "task_gradients", lambda agent, frames: gradients(agent, frames, 2))
    monkeypatch.setattr(mow, "make_agent", lambda *a: agents.append((x := real(*a), copy.deepcopy(everything(x)))) or x)
    result = mow.main(mow.Args(task=GAMES, **small))
    history, (agent, before) = result["history"], agents[0]
    assert np.isfinite([row["rec"] for row in history]).all()
    assert all(last < 0.35 * first for first, last in zip(history[0]["rec"], history[-1]["rec"]))
    after = everything(agent)
    still = [k for k in before if k.startswith(("/wm", "/actor", "/critic", "/slow")) and torch.equal(before[k],
                                                                                                      after[k])
             and before[k].is_floating_point()]
    assert not [k for k in still if "position" not in k], still


def test_storm_runs_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = mow.main(mow.Args(task="Pong", storm=True, fresh_contexts=True, act_on_prior=True, lambda_compat=True,
                               **{k: v for k, v in MOW_TINY.items() if k not in ("emb", "warmup")}))
    assert result["args"]["emb"] == 0 and result["args"]["norm"] == "bn" and result["rows"][0]["episodes"] == 1


def test_a_run_with_experts_per_token(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = mow.main(mow.Args(task="Pong", routing="token", segment=4, switch_coef=0.1, prior_coef=0.1, **MOW_TINY))
    assert result["args"]["topk"] == 1 and 8 / 2 <= result["fidelity"]["run_length"][0] <= 8


def test_checkpoint_of_another_run_plays_and_goes_on(mow_run, tmp_path, monkeypatch):
    whole, folder = mow_run
    monkeypatch.chdir(tmp_path)
    result = mow.main(mow.Args(task=GAMES, eval_only=True, checkpoint=str(folder / "checkpoint.pt"), **MOW_TINY))
    assert result["rows"] == whole["rows"] and "history" not in result
    more = mow.main(mow.Args(task=GAMES, checkpoint=str(folder / "checkpoint.pt"), **MOW_TINY | dict(steps=20)))
    assert more["clusters"] == {"labels": whole["clusters"]["labels"]} and more["history"][0]["updates"] == 37
    with says("does not fit", "tasks and sizes"):
        mow.main(mow.Args(task="Pong", checkpoint=str(folder / "checkpoint.pt"), eval_only=True, **MOW_TINY))
    with says("cannot be read"):
        mow.main(mow.Args(task="Pong", checkpoint="nowhere.pt", eval_only=True, **MOW_TINY))


def test_bfloat16_stays_close_to_float32(tmp_path):
    results, frames = [], None
    for bf16 in (False, True):
        agent = mow_agent(2, clusters=2, experts=3, topk=2, bf16=bf16)
        frames = frames or mow_frames(agent, tmp_path / "f")
        metrics = agent.update(frames)
        assert all(p.dtype == torch.float32 for p in agent.wm.parameters()) and agent.low.dtype == torch.float32
        results.append(torch.stack([metrics[k].mean() for k in ("rec", "rew", "dyn_raw", "critic")]))
    assert torch.allclose(*results, rtol=0.05)


def test_mow_compiled_functions_were_compiled_and_agree_with_eager(tmp_path, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: real(f, backend="eager", fullgraph=True, **kw))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    results = []
    for enabled in (False, True):
        agent = mow_agent(2, clusters=2, experts=3, compile=enabled)
        agent.wm.assign([0, 0])
        frames = mow_frames(agent, tmp_path / "f")
        frames.count = 40
        for i in range(4):
            if i == 2:
                agent.spread([0, 1])
            agent.update(frames)
        a, _ = agent.play(frames.obs[:, :1].copy(), agent.memory(1), [0])
        results.append(everything(agent) | {"act": torch.from_numpy(a)})
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    # world model twice (before and after clustering), imagined step, agent, acting: nothing is compiled at every update
    assert 4 <= counters["stats"]["unique_graphs"] <= 8, counters["stats"]
    assert all(torch.allclose(results[0][k].float(), results[1][k].float(), atol=2e-3,
                              equal_nan=True) for k in results[0])


def test_mow_studies_make_their_tables_and_resume(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = MOW_TINY | dict(steps=46, random_steps=45, warmup=2)
    fidelity, gradients = mow.fidelity, mow.task_gradients
    monkeypatch.setattr(mow, "fidelity", lambda agent, frames, since=0, batches=8: fidelity(agent, frames, since, 1))
    monkeypatch.setattr(mow, "task_gradients", lambda agent, frames: gradients(agent, frames, 2))
    r = mow.main(mow.Args(task=GAMES, cluster_only=True, seeds=2, **small))
    assert [row["clusters"] for row in r["rows"]] == [2] and -1 <= r["rows"][0]["ari_seeds"] <= 1
    r = mow.main(mow.Args(task="Pong", experiment="fidelity", seeds=1, **small | dict(rollouts=8)))
    assert [row["variant"] for row in r["rows"]] == ["stem2", "stem4", "stem8", "latents2", "latents8", "all together"]
    assert -1 <= r["rows"][-1]["rho_ssim"] <= 1 and len(r["cells"]["stem2_s1"]["points"]) == 5
    for name, task, variants in (("tokens", "Pong", 6), ("clusters", "Pong,Qbert", 2), ("monolith", GAMES, 4)):
        r = mow.main(mow.Args(task=task, experiment=name, seeds=1, **small))
        assert len(r["rows"]) == variants and all(np.isfinite(row["open_loop_psnr"]) for row in r["rows"])
        if name == "tokens":
            runs = {row["variant"]: row["run_length"] for row in r["rows"]}
            assert runs["task"] == runs["segment8"] == 8 and 1 <= runs["token"] <= 8
        if name == "monolith":
            size = {row["variant"]: row["parameters"] for row in r["rows"]}
            work = {row["variant"]: row["products"] for row in r["rows"]}
            assert size["monolith_params"] == pytest.approx(size["mow"], rel=0.1)
            assert work["monolith_flops"] == pytest.approx(work["mow"], rel=0.05)
    monkeypatch.setattr(mow, "random_frames", None)  # all cells are there: nothing is done again
    folder = max(Path("runs").iterdir(), key=lambda p: p.stat().st_mtime)
    assert mow.main(mow.Args(resume=str(folder)))["rows"] == r["rows"]


def test_transfer_freezes_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    agents, make, gradients = [], mow.make_agent, mow.task_gradients
    monkeypatch.setattr(mow, "make_agent", lambda *a: agents.append(make(*a)) or agents[-1])
    monkeypatch.setattr(mow, "task_gradients", lambda agent, frames: gradients(agent, frames, 1))
    fidelity, loss = mow.fidelity, mow.held_out_loss
    monkeypatch.setattr(mow, "fidelity", lambda agent, frames, since: fidelity(agent, frames, since, 1))
    monkeypatch.setattr(mow, "held_out_loss", lambda agent, frames, task, since=0: loss(agent, frames, task, since, 1))
    small = MOW_TINY | dict(steps=48, random_steps=45, warmup=3, lr=1e-2)
    r = mow.main(mow.Args(task="Boxing,Krull,Boxing@m0d1", experiment="transfer", seeds=1, **small))
    _, model, *variants = agents
    was, labels, old = dict(model.wm.named_parameters()), r["cells"]["all_s1"]["cluster"], model.wm.labels[:2]
    assert set(old) == {0, 1} and labels in old and r["cells"]["new_cluster_s1"]["cluster"] == 2
    for (variant, frozen), agent in zip(mow.FROZEN.items(), variants, strict=True):
        assert agent.wm.labels[:2] == old and agent.wm.labels[2] == r["cells"][f"{variant}_s1"]["cluster"]
        moved = {name for name, p in agent.wm.named_parameters() if not torch.equal(p, was[name])}
        assert not [name for name in moved if name.startswith(frozen)], variant
        for part in ("e", "vaes", "experts", "mix", "shared", "reward_head"):  # the rest learns
            if variant != "scratch" and part not in frozen:
                assert any(name.startswith(part) for name in moved) == (part != "shared" or "shared" not in frozen)
        if variant != "scratch":
            assert torch.equal(agent.wm.e[:2], was["e"][:2]) and not torch.equal(agent.wm.e[2], was["e"][2])
    rows = {row["variant"]: row for row in r["rows"]}
    assert rows["scratch"]["auc_ratio"] == 1 and rows["scratch"]["forgetting"] is None
    assert rows["new_cluster"]["forgetting"] == 0 != rows["all"]["forgetting"]
    assert rows["all"]["zero_shot"] == rows["freeze_vae"]["zero_shot"] < rows["scratch"]["zero_shot"]
    assert (next(Path("runs").iterdir()) / "transfer.png").stat().st_size > 0


def test_warm_up_without_rewards_leaves_their_heads_alone(tmp_path):
    agent = mow_agent(2, clusters=1, warmup=2, reward_free=True)
    frames = mow_frames(agent, tmp_path / "f")

    def moved():
        before = {name: p.clone() for name, p in agent.wm.named_parameters()}
        agent.update(frames, learn_to_act=False)
        return {name.split(".")[0] for name, p in agent.wm.named_parameters() if not torch.equal(p, before[name])}

    heads = {"reward_head", "end_head"}
    assert not moved() & heads and "vaes" in moved() and moved() >= heads  # two updates of warm-up, then one after it


def test_pretraining_without_rewards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fidelity, loss = mow.fidelity, mow.held_out_loss
    monkeypatch.setattr(mow, "fidelity", lambda agent, frames, since: fidelity(agent, frames, since, 1))
    monkeypatch.setattr(mow, "held_out_loss", lambda *a, only=None: loss(*a, 1, only))
    small = MOW_TINY | dict(steps=60, random_steps=45, warmup=5, lr=1e-2)
    r = mow.main(mow.Args(task="Boxing,Krull", experiment="pretrain", seeds=1, **small))
    cells, rows = (r["cells"][f"{v}_s1"] for v in ("scratch", "rewards", "reward_free")), r["rows"]
    scratch, rewards, free = cells
    assert scratch["updates"][-1] == 10 and [row["variant"] for row in rows] == ["scratch", "rewards", "reward_free"]
    assert free["loss"][0] < 0.5 * scratch["loss"][0]  # it knows the images ..
    assert rewards["scores_first"] < 0.5 * free["scores_first"]  # .. and not the rewards,
    assert free["scores_last"] < 0.5 * free["scores_first"]  # which it learns
    assert rows[0]["auc_ratio"] == 1 and rows[2]["auc_ratio"] < 1
    assert (next(Path("runs").iterdir()) / "pretrain.png").stat().st_size > 0


def test_perceptual_distance():
    x = torch.rand(2, 3, 3, 64, 64, generator=gen(0))
    blurred = F.avg_pool2d(x.flatten(0, 1), 5, 1, 2).view_as(x)
    assert mow.perceptual(x, x).abs().max() == 0 and mow.perceptual(x, blurred).shape == (2, 3)
    near = mow.perceptual(x, x + 0.01 * torch.randn(x.shape, generator=gen(1)))
    assert (0 < near).all() and (near < 0.1 * mow.perceptual(x, blurred)).all()
    one = mow.perceptual(x[1, 2], blurred[1, 2])  # an image alone, without leading axes
    assert torch.allclose(one, mow.perceptual(x, blurred)[1, 2], atol=1e-5)


def test_mow_cost_measures_tasks_experts_and_loops(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mow, "milliseconds", lambda f, device, repeats=5: (f(), 1.0)[1])
    r = mow.main(mow.Args(task=GAMES, experiment="cost", **MOW_TINY))
    assert [row["cell"] for row in r["rows"]] == [f"{k}_{n}" for k in ("tasks", "experts") for n in (1, 3, 6, 12)]
    assert "critics_looped_ms" in r["rows"][2] and [p["preset"] for p in r["estimates"]] == ["full", "mid", "smoke"]


def test_metaworld_and_mixed_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real = mow.task_options
    monkeypatch.setattr(mow, "task_options", lambda a, t: {k: v | ({"length": 20} if k.startswith("mw-") else {})
                                                            for k, v in real(a, t).items()})
    r = mow.main(mow.Args(task="mw-reach,Pong", mix_actions=True, **MOW_TINY | dict(steps=24)))
    assert [row["task"] for row in r["rows"]] == ["mw-reach", "Pong"] and r["rows"][0]["storm"] is None
    assert 0 <= r["rows"][0]["score"] <= 1


# ------------------------------------------------------------------------------------------------------------ bad input
def test_mow_bad_input_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, more in ((("'Boxin'", "nearest: Boxing"), dict(task="Boxin")), (("twice",), dict(task="Pong,Pong")),
                        (("--mix-actions",), dict(task="Pong,mw-reach")), (("--clusters 3 or less",), dict(task=GAMES,
                                                                                                           clusters=4)),
                        (("--topk 3 or less",), dict(task=GAMES, experts=3, topk=4)), (("--storm",), dict(task=GAMES,
                                                                                                          storm=True)),
                        (("--heads",), dict(task=GAMES, width=15)), (("--random-steps",), dict(task=GAMES,
                                                                                               random_steps=4)),
                        (("last fifth",), dict(task=GAMES, experiment="experts", random_steps=20)),
                        (("add --routing token",), dict(task="Pong", segment=4)),
                        (("not --topk 2",), dict(task="Pong", routing="token", topk=2)),
                        (("--warmup 1000",), dict(task="Pong", warmup=0, reward_free=True)),
                        (("two or more",), dict(task="Pong", experiment="transfer", random_steps=45, steps=45)),
                        (("--batch 0", "positive"), dict(task=GAMES, batch=0)), (("--checkpoint",),
                                                                                 dict(eval_only=True)),
                        (("args.json",), dict(resume="nowhere")), (("no GPU",), dict(device="cuda"))):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with says(*words):
            mow.main(mow.Args(**MOW_TINY | more))
    assert not Path("runs").exists()
    monkeypatch.setattr(data.shutil, "disk_usage", lambda p: types.SimpleNamespace(free=10**6))
    with says("replay of 1 x 100,000", "GB free"):
        mow.main(mow.Args(**MOW_TINY | dict(task="Pong", steps=100_000)))


def test_missing_games_and_packages_are_named(monkeypatch):
    from ale_py import roms
    monkeypatch.setattr(roms, "get_rom_path", lambda name: None)
    with says("Boxing", "ROM", "pip install"):
        envs.make_env("Boxing", obs="pixels")
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with says("Boxing", "pip install ale-py"):
        envs.make_env("Boxing", obs="pixels")
    monkeypatch.setitem(sys.modules, "metaworld.env_dict", None)
    with says("mw-reach", "pip install metaworld"):
        envs.make_env("mw-reach", obs="pixels")
    with says("obs='pixels'"):
        envs.make_env("Pong")
    with says("sticky", "no options"):
        envs.make_env("walker-walk", sticky=0.1)


def test_a_loss_that_is_not_finite_stops_with_its_terms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mow, "two_hot_loss", lambda logits, x: logits.sum(-1) * math.nan)
    with says("not finite", "losses/rew", "--lr"):
        mow.main(mow.Args(task="Pong", **MOW_TINY | dict(clusters=1)))


def test_mow_copied_with_its_two_helpers_it_runs(tmp_path):
    for name in ("mow.py", "envs.py", "data.py"):
        (tmp_path / name).write_text(Path(HERE, name).read_text())
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    words = [f"--{k.replace('_', '-')}={v}" for k, v in MOW_TINY.items() if k not in ("compile", "bf16")]
    p = subprocess.run([sys.executable, "mow.py", "--task", "Pong", "--no-compile", *words], cwd=tmp_path, env=env,
                       capture_output=True, text=True)
    assert p.returncode == 0 and "mean score" in p.stdout, p.stderr[-2000:]
    folder = next((tmp_path / "runs").iterdir())
    assert (folder / "mow.py").read_text() == (tmp_path / "mow.py").read_text()
    parsed = tyro.cli(mow.Args, args=["--task", "atari26", "--experiment", "experts", "--no-reset-mask"])
    assert (parsed.experiment, parsed.reset_mask) == ("experts", False)
