from t_head import *  # noqa: F401,F403

# ------------------------------------------------------------------------------------------ mow.py
GAMES = "Boxing,Krull,RoadRunner"
MOW_SIZES = dict(stem=4, latents=4, classes=4, width=16, heads=2, hidden=16, emb=8)
MOW_TINY = dict(steps=44, random_steps=12, warmup=4, train_every=1, batch=2, length=8, rollouts=4,
                context=3, horizon=3, eval_episodes=1, sizes=MOW_SIZES, atari={"frame_cap": 80},
                device="cpu", compile=False, bf16=False)
CPU = torch.device("cpu")


def mow_settled(**more):
    args = mow.Args(**MOW_TINY | more)
    return mow.settle(args, mow.task_list(args.task), CPU)


def mow_agent(K=3, make=mow.Agent, **more):
    """A tiny agent for K games, its clusters given in turn."""
    args = mow_settled(task=",".join(envs.ATARI26[:K]), **more)
    agent = make(args, [list(range(18))] * K, CPU)
    agent.wm.assign([k % args.clusters for k in range(K)])
    return agent


def mow_batch(agent, B=2, L=6, seed=0):
    K, g = agent.K, gen(seed)
    obs = torch.randint(0, 256, (K, B, L, 64, 64, 3), generator=g, dtype=torch.uint8)
    act = F.one_hot(torch.randint(0, 18, (K, B, L), generator=g), agent.A).float()
    flags = torch.zeros(K, B, L, dtype=torch.bool)
    return obs, act, torch.randn(K, B, L, generator=g), flags, flags.clone()


def mow_frames(agent, path, n=40):
    frames = data.Frames(path, agent.K, n, agent.A)
    rng = np.random.default_rng(0)
    for t in range(n):
        frames.append(rng.integers(0, 256, (agent.K, 64, 64, 3)),
                      np.eye(agent.A)[rng.integers(0, 18, agent.K)], rng.normal(size=agent.K),
                      [t % 9 == 8] * agent.K, [t % 9 == 0] * agent.K)
    return frames


def mow_update(agent, frames, act=True):
    """One update of the world model, and of the agent."""
    batch = agent.sample(frames)
    loss, z, metrics = agent.model_loss(batch)
    mow.descend(loss, agent.opt, 1000.0)
    agent.updates += 1
    if act:
        loss, more = agent.policy_loss(agent.imagine(z, batch))
        mow.descend(loss, agent.agent_opt, 100.0)
        agent.follow()
        metrics |= more
    return metrics


def mow_numbers(*parts):
    """All tensors of agents or checkpoints, by name."""
    parts = [p if isinstance(p, dict) else p.state_dict() for p in parts]
    leaves, _ = torch.utils._pytree.tree_flatten_with_path(parts)
    return {str(path): x.detach().clone() for path, x in leaves if torch.is_tensor(x)}


def mow_words(**more):
    """MOW_TINY as words of a command line."""
    out = ["--no-compile", "--no-bf16"]
    for k, v in (MOW_TINY | more).items():
        if isinstance(v, dict):
            out += [data.flag(k), *[str(x) for pair in v.items() for x in pair]]
        elif not isinstance(v, bool):
            out += [data.flag(k), str(v)]
    return out


# ------------------------------------------------------------------------------------------- maths
def test_mow_means_in_log_space_and_returns_by_hand():
    mixed = torch.full((255,), -1e4)  # STORM's choice: 100 with probability 0.1 is read as 0.6
    at = 127 + int(math.log(101) * 254 / 40)
    mixed[127], mixed[at] = math.log(0.9), math.log(0.1)
    assert mow.two_hot_inv(mixed).item() == pytest.approx(0.59, abs=0.02)
    rew, done = torch.tensor([1., 2., 4.]), torch.tensor([0., 1., 0.])
    v, g, lam = torch.tensor([7., 11., 13., 17.]), 0.9, 0.6
    want = torch.tensor([1 + g * (0.4 * 11 + 0.6 * 2), 2, 4 + g * 17])
    assert torch.allclose(mow.lambda_return(rew, done, v, g, lam), want)


def test_sigma_in_closed_form_minimises_the_harmonious_loss():
    loss = torch.tensor([0.01, 1.0, 10.0, 300.0], dtype=torch.double)
    s = mow.best_sigma(loss)

    def f(s):
        return loss / s + s.log1p()

    assert (f(s) < f(s * 1.01)).all() and (f(s) < f(s * 0.99)).all()
    assert (1 / s)[2:].tolist() == pytest.approx([0.092, 0.0033], rel=0.02)
    agent = mow_agent(2)
    losses, means = torch.tensor([3.0, 5.0]), torch.tensor([10.0, 300.0])
    assert torch.allclose(agent.weigh(losses, means), losses / mow.best_sigma(means))
    agent.harmonise = False
    assert agent.weigh(losses, means) is losses


def test_balance_lifts_an_unused_expert_and_routes_are_per_task_ordered_and_random_with_noise():
    assert mow.balance_loss(torch.full((6, 4), 0.25), 2) == 0
    logits = torch.tensor([[4., 4., 0.]] * 3, requires_grad=True)
    mow.balance_loss(logits.softmax(-1), 2).backward()
    assert (logits.grad[:, 2] < 0).all() and (logits.grad[:, :2] > 0).all()
    one = torch.tensor([[1., 0., 0.]])
    big, small = (mow.balance_loss(one.expand(K, 3), 1) for K in (26, 3))
    assert big == pytest.approx(float(small))
    router = torch.nn.Linear(8, 5)
    e = F.normalize(torch.randn(40, 8, generator=gen(1)), dim=-1)
    S, J, w = mow.route(e, router, 2)
    ones = torch.ones(40)
    assert torch.allclose(S.sum(-1), ones) and torch.allclose(w.sum(-1), ones)
    assert (J[:, 0] < J[:, 1]).all() and torch.equal(J, S.topk(2).indices.sort().values)
    assert torch.equal(mow.route(e, router, 2, tau=5.0)[1], J)  # temperature changes no choice
    assert not torch.equal(mow.route(e, router, 2, tau=5.0, noise=1.0)[1], J)
    assert mow.route(e, router, 2, tau=5.0)[0].max() < S.max()


def test_planted_clusters_are_found_sizes_are_capped_and_sketches_keep_cosines():
    rng = np.random.default_rng(0)
    truth = rng.permutation(np.arange(12) % 3)
    grads = rng.normal(size=(3, 7, 64))[truth] + 0.7 * rng.normal(size=(12, 7, 64))
    grads *= rng.uniform(0.01, 100, size=(12, 7, 1))  # scale means nothing
    labels = mow.cluster_tasks(grads, 3)
    assert labels[0] == 0 and labels == mow.cluster_tasks(grads, 3)
    assert len(set(zip(labels, truth))) == len(set(labels)) == 3
    same = np.ones((12, 1, 8)) + 1e-3 * rng.normal(size=(12, 1, 8))
    for n in (1, 2, 3, 5, 12):
        sizes = np.bincount(mow.cluster_tasks(same, n))
        assert len(sizes) == n and sizes.max() <= max(math.ceil(18 / n), 2)
    with says("fewer --clusters"):
        mow.cluster_tasks(grads, 13)
    a, b = torch.randn(2, 200_000, generator=gen())
    cosine = F.cosine_similarity(mow.sketch(a), mow.sketch(0.6 * a + 0.8 * b), dim=0).item()
    assert cosine == pytest.approx(0.6, abs=0.05) and torch.equal(mow.sketch(a), mow.sketch(a))


# ---------------------------------------------------------------------------------------- networks
def test_storm_has_exactly_its_published_size():
    args = mow.settle(mow.Args(task="Boxing", storm=True, preset="paper"), ["Boxing"], CPU)
    agent = mow.Agent(args, [list(range(18))], CPU)
    wm = agent.wm
    assert sum(p.numel() for p in wm.parameters()) == 16_513_155
    assert wm.router is wm.join is wm.shared is wm.task_head is None
    assert isinstance(wm.vaes[0].conv[1], nn.BatchNorm2d) and args.rollouts == 1024
    assert not agent.harmonise and not agent.reset_mask
    full = mow.settle(mow.Args(task="atari26", preset="paper"), list(envs.ATARI26), CPU)
    assert (full.clusters, full.experts, full.topk, full.rollouts) == (12, 12, 2, 256)
    assert mow.settle(mow.Args(task="mt10", preset="paper"), list(envs.MT10), CPU).steps == 300_000


@pytest.mark.parametrize("K,N_m,N_e,n", [(1, 1, 1, 1), (3, 2, 3, 2), (6, 3, 6, 2)])
def test_mow_shapes(K, N_m, N_e, n):
    agent = mow_agent(K, clusters=N_m, experts=N_e, topk=n)
    batch, wm = mow_batch(agent), agent.wm
    losses, more = mow.world_model_loss(wm, *batch, torch.tensor(2.0), 0.5)
    assert set(losses) == {"rec", "rew", "end", "dyn", "rep"} | ({"task"} if K > 1 else set())
    assert all(x.shape == (K,) and torch.isfinite(x).all() for x in losses.values())
    assert more["z"].shape == (K, 2, 6, 16)
    assert more["J"].shape == (K, n) and more["scores"].shape == (K, N_e)
    assert torch.allclose(wm.embedding().norm(dim=-1), torch.ones(K))
    dream = mow.imagine(wm.eval(), agent.actor, more["z"], batch[1], batch[4], 5, torch.tensor(1.0))
    x, a, rew, done = dream
    assert x.shape == (K, 2, 6, 16 + 16 + 8) and a.shape == (K, 2, 5, 18)
    assert rew.shape == done.shape == (K, 2, 5) and (a.sum(-1) == 1).all()
    assert (x[..., :16].unflatten(-1, (4, 4)).sum(-1) == 1).all()
    loss, low, high, _ = mow.agent_loss(agent.actor, agent.critic, agent.slow, wm.cluster_of,
                                        *dream, agent.low, agent.high)
    assert loss.ndim == 0 and low.shape == (K,) and (high >= low).all()


def test_a_tasks_loss_leaves_other_clusters_and_unchosen_experts_alone():
    agent = mow_agent(3, clusters=3, experts=3, topk=1)
    wm = agent.wm.eval()
    losses, more = mow.world_model_loss(wm, *mow_batch(agent), torch.tensor(1.0), 0.0)
    chosen = more["J"].flatten().tolist()

    def touched(p):
        return p.grad is not None and bool(p.grad.abs().sum() > 0)

    for k in range(3):
        wm.zero_grad()
        mow.total_loss(losses)[k].backward(retain_graph=True)
        heads = [p for h in (wm.prior_head, wm.reward_head, wm.end_head) for p in h.parameters()]
        for c in range(3):
            assert any(map(touched, wm.vaes[c].parameters())) == (c == k)
            assert any(p.grad[c].abs().sum() > 0 for p in heads) == (c == k)
        for j in range(3):
            experts = (*wm.mix.parameters(), *wm.experts.parameters())
            used = [bool(p.grad[j].abs().sum() > 0) for p in experts]
            assert all(used) == any(used) == (j == chosen[k])
        assert touched(wm.shared.blocks[0].qkv.weight)


def test_gate_trains_the_router_without_changing_values():
    agent = mow_agent(3, experts=3, topk=2)
    wm, batch, grads = agent.wm.eval(), mow_batch(agent), {}
    for gate in (True, False):
        torch.manual_seed(0)
        losses, _ = mow.world_model_loss(wm, *batch, torch.tensor(1.0), 0.0, gate=gate)
        wm.zero_grad()
        mow.total_loss(losses).sum().backward()
        g = wm.router[0].weight.grad
        grads[gate] = 0.0 if g is None else g.abs().sum().item(), mow.total_loss(losses).detach()
    assert grads[True][0] > 0 == grads[False][0]
    assert torch.allclose(grads[True][1], grads[False][1], rtol=1e-5)


def test_gathered_products_equal_a_loop_over_tasks():
    agent = mow_agent(6, clusters=3, experts=6, topk=2)
    wm, batch = agent.wm.eval(), mow_batch(agent)
    e, pos = wm.embedding(), torch.arange(6)
    _, J, w = wm.routing(e)
    z = mow.draw_latent(wm.posterior(mow.to_images(batch[0]), e))
    mask = mow.episode_mask(batch[4], pos)
    h = wm.sequence(z, batch[1], e, J, w, mask, pos)
    rew, images = wm.head(wm.reward_head, h, e), wm.decode(z, e)
    for k in range(6):
        one = slice(k, k + 1)
        alone = wm.sequence(*(x[one] for x in (z, batch[1], e, J, w, mask)), pos)
        assert torch.allclose(alone[0], h[k], atol=1e-5)
        assert torch.allclose(wm.head(wm.reward_head, alone, e[one], [k])[0], rew[k], atol=1e-5)
        assert torch.allclose(wm.decode(z[one], e[one], [k])[0], images[k], atol=1e-5)


def check_cached_steps(agent):
    """Steps with a cache equal the full pass, which is causal and stays within an episode."""
    wm, (_, act, _, _, first) = agent.wm.eval(), mow_batch(agent, L=8)
    first[0, 0, 3] = first[2, 1, 1] = True
    e, pos, z = wm.embedding(), torch.arange(8), torch.randn(3, 2, 8, 16)
    _, J, w = wm.routing(e)
    mask = mow.episode_mask(first, pos)
    full = wm.sequence(z, act, e, J, w, mask, pos)
    cache, parts = wm.new_cache(3, 2, 8, z), []
    with torch.no_grad():
        for t in (slice(0, 3), *(slice(t, t + 1) for t in range(3, 8))):
            some = z[:, :, t], act[:, :, t], e, J, w, mask[:, :, t], pos[t]
            parts.append(wm.sequence(*some, cache))
    assert torch.allclose(torch.cat(parts, 2), full, atol=1e-4)

    def changed(z, mask):
        return wm.sequence(z, act, e, J, w, mask, pos)

    later, before = z.clone(), z.clone()
    later[:, :, 5:] += 1
    before[0, 0, :3] += 1  # another episode
    assert torch.allclose(changed(later, mask)[:, :, :5], full[:, :, :5], atol=1e-6)
    other, free = changed(before, mask), mow.episode_mask(first, pos, False)
    assert torch.allclose(other[0, 0, 3:], full[0, 0, 3:], atol=1e-6)
    assert not torch.allclose(other[0, 0, :3], full[0, 0, :3])
    assert not torch.allclose(changed(before, free)[0, 0, 3:], changed(z, free)[0, 0, 3:])


def test_cached_steps_equal_the_full_pass_and_it_is_causal():
    deep = dict(sizes=MOW_SIZES | dict(expert_layers=2, shared_layers=2))
    check_cached_steps(mow_agent(3, experts=3, topk=2, **deep))


def test_open_loop_imagines_what_comes_of_the_real_actions(monkeypatch):
    agent, asked, real = mow_agent(2), [], mow.imagine_step
    batch = mow_batch(agent, L=8)

    def step(*args):
        out = real(*args)
        asked.append(out[1])
        return out

    monkeypatch.setattr(mow, "imagine", functools.partial(mow.imagine, step=step))
    images = mow.open_loop_images(agent, batch, 3)
    assert all(x.shape == (2, 2, 8, 3, 64, 64) for x in images)
    assert torch.equal(torch.stack(asked, 2), batch[1][:, :, 3:-1])
    assert torch.equal(images[1][:, :, :3], images[2][:, :, :3])
    assert not torch.equal(images[1][:, :, 3:], images[2][:, :, 3:])


def test_free_bits_are_per_task_and_kl_stops_at_episodes(monkeypatch):
    agent = mow_agent(2, clusters=1)
    batch = mow_batch(agent, L=5)
    batch[4][1, :, 2] = True
    shapes = []

    def kl(p, q):  # 0.2 and 3 nats; index 1 leads into step 2, which opens an episode of task 1
        shapes.append(p.shape[:3])
        values = torch.tensor([0.2, 3.0])[:, None, None].expand(p.shape[:3]).clone()
        return values.index_fill_(2, torch.tensor([1]), 9.0)

    monkeypatch.setattr(mow, "kl", kl)
    losses, more = mow.world_model_loss(agent.wm, *batch, torch.tensor(1.0), 0.0)
    assert more["dyn_raw"].tolist() == pytest.approx([(0.2 * 3 + 9) / 4, 3.0])
    assert losses["dyn"][0] > 1 and shapes[0] == (2, 2, 4)


def test_actor_masks_games_and_mixes_kinds_of_actions():
    legal = torch.zeros(3, 18, dtype=torch.bool)
    legal[0, [0, 3]] = legal[1] = True
    actor = mow.Actor(5, 16, legal, torch.tensor([False, False, True]), 4)
    x = torch.randn(3, 200, 5, generator=gen())
    a = actor.sample(x)
    assert a.shape == (3, 200, 22) and set(a[0].argmax(-1).tolist()) == {0, 3}
    assert (a[:2, :, :18].sum(-1) == 1).all() and (a[:2, :, 18:] == 0).all()
    assert (a[2, :, :18] == 0).all() and a[2, :, 18:].std() > 0.05
    logp, ent = actor.evaluate(x, a)
    p, mean, std = actor(x)
    want = torch.distributions.Independent(torch.distributions.Normal(mean[2], std[2]), 1)
    assert torch.allclose(logp[2], want.log_prob(a[2, :, 18:]), atol=1e-5)
    assert torch.allclose(ent[2], want.entropy(), atol=1e-5)
    assert torch.allclose(logp[:2], (p * a[..., :18]).sum(-1)[:2])
    assert (ent[0] <= math.log(2) + 1e-6).all() and (std >= 0.1).all() and (std <= 1).all()
    for n_disc, n_cont in ((18, 0), (0, 4)):
        kinds = torch.ones(2, n_disc, dtype=torch.bool), torch.tensor([n_disc == 0] * 2)
        one = mow.Actor(5, 16, *kinds, n_cont)
        a = one.sample(x[:2])
        logp, ent = one.evaluate(x[:2], a)
        assert a.shape == (2, 200, n_disc + n_cont) and logp.shape == ent.shape == (2, 200)
        (logp + ent).sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in one.parameters())


def test_agent_loss_raises_good_actions_and_scales_tasks_apart():
    agent = mow_agent(2, clusters=2)
    x = torch.randn(2, 64, 4, 16 + 16 + 8, generator=gen())
    act = F.one_hot(torch.randint(0, 18, (2, 64, 3), generator=gen(1)), 18).float()
    # in task 1 a thousand times as much
    rew = act[..., :5].sum(-1) * torch.tensor([1.0, 1000.0])[:, None, None]

    def good():
        return agent.actor(x[:, :, 0])[0][..., :5].exp().sum(-1).mean(1)

    low, high, before = agent.low, agent.high, good()
    for _ in range(30):
        loss, low, high, _ = mow.agent_loss(
            agent.actor, agent.critic, agent.slow, agent.wm.cluster_of, x, act, rew,
            torch.zeros_like(rew), low, high, gamma=0.9)
        agent.agent_opt.zero_grad()
        loss.backward()
        agent.agent_opt.step()
    assert (good() > before).all() and high[1] > 300 * high[0]
    assert all(p.grad is None for p in agent.slow.parameters())


def test_imagined_steps_after_an_imagined_end_do_not_count():
    agent = mow_agent(1, clusters=1)
    x = torch.randn(1, 8, 4, 16 + 16 + 8, generator=gen())
    act = F.one_hot(torch.randint(0, 18, (1, 8, 3), generator=gen(1)), 18).float()
    rew, done = torch.randn(1, 8, 3, generator=gen(2)), torch.tensor([0.0, 1.0, 0.0])

    def gradient(act, rew):
        parts = agent.actor, agent.critic, agent.slow, agent.wm.cluster_of, x, act, rew
        scale = torch.zeros(1), torch.ones(1)
        loss, *_ = mow.agent_loss(*parts, done.expand(1, 8, 3), *scale)
        params = [*agent.actor.parameters(), *agent.critic.parameters()]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])

    usual = gradient(act, rew)
    for t, same in ((0, False), (1, False), (2, True)):
        other = act.clone()
        other[:, :, t] = act[:, :, t].roll(1, -1)
        assert torch.allclose(gradient(other, rew), usual, atol=1e-7) == same, t


def test_imagination_starts_from_the_frame_that_opens_an_episode():
    agent = mow_agent(2, clusters=1)
    wm, (obs, act, _, _, first) = agent.wm.eval(), mow_batch(agent, L=5)
    first[0, 1, 4] = True
    e, z = wm.embedding(), mow.draw_latent(wm.posterior(mow.to_images(obs), wm.embedding()))
    x, a, *_ = mow.imagine(wm, agent.actor, z, act, first, 3, torch.tensor(1.0))
    assert torch.equal(x[0, 1, 0], torch.cat([z[0, 1, 4], torch.zeros(16), e[0]]))
    assert (x[..., 0, 16:32].abs().sum(-1) > 0).tolist() == [[True, False], [True, True]]
    _, J, w = wm.routing(e)
    alone = x[:1, 1:, :3, :16], a[:1, 1:], e[:1], J[:1], torch.ones_like(w[:1])
    mask = torch.ones(3, 3).tril().bool()[None, None]
    h = wm.sequence(*alone, mask, torch.arange(4, 7))  # nothing of what was before the episode
    assert torch.allclose(h[0, 0], x[0, 1, 1:, 16:32], atol=1e-5)


def test_playing_uses_the_posterior_and_the_episode_so_far(monkeypatch):
    agent = mow_agent(2, clusters=1)
    wm, seen = agent.wm.eval(), []

    def sample(x):
        seen.append(x)
        return F.one_hot(torch.full(x.shape[:2], len(seen) % 18), 18).float()

    monkeypatch.setattr(agent.actor, "sample", sample)
    memory, zs, acts = agent.memory(1), [], []
    _, J, w = wm.routing(wm.embedding())
    obs = np.random.default_rng(0).integers(0, 256, (20, 2, 1, 64, 64, 3), np.uint8)
    for t in range(20):
        if t == 2:
            memory[2][1] = 0  # task 1 starts anew
        a, memory = agent.play(obs[t], memory, [t])
        zs.append(seen[-1][..., :16])
        acts.append(torch.from_numpy(a))
        begin = max(t - agent.window, 0)
        for k, start in ((0, begin), (1, max(begin, 2 * (t > 1)))):
            h = seen[-1][k, 0, 16:32]
            if start == t:
                assert (h == 0).all()
                continue
            z, past = (torch.stack(x[start:t], 2)[k:k + 1] for x in (zs, acts))
            pos, one = torch.arange(t - start), slice(k, k + 1)
            mask = (pos[:, None] >= pos).expand(1, 1, -1, -1)
            chosen = wm.embedding([k]), J[one], torch.ones_like(w[one])
            want = wm.sequence(z, past, *chosen, mask, pos)
            assert torch.allclose(h, want[0, 0, -1], atol=1e-5), (t, k)
    assert memory[2].flatten().tolist() == [agent.window] * 2


@pytest.mark.parametrize("preset,window", [("cpu", 8), ("gpu", 15), ("paper", 16)])
def test_the_agent_acts_on_positions_that_its_imagination_visits(preset, window):
    args = mow.Args(task="Boxing", storm=True, preset=preset, device="cpu", compile=False,
                    sizes=dict(stem=4, width=16))
    args = mow.settle(args, ["Boxing"], CPU)
    agent = mow.Agent(args, [list(range(18))], CPU)
    assert agent.memory(2)[0].shape[2] == window
    assert args.context <= window < args.context + args.horizon <= args.length


def test_clusters_are_cloned_with_their_adam_moments(tmp_path):
    agent = mow_agent(3, clusters=3)
    agent.wm.assign([0, 0, 0])
    frames = mow_frames(agent, tmp_path / "f")
    for _ in range(3):
        mow_update(agent, frames, act=False)
    grads = mow.task_gradients(agent, frames, batches=2)
    assert grads.shape[0] == 3 and grads.shape[2] == mow.SKETCH
    assert np.abs(grads).sum((1, 2)).min() > 0
    assert np.array_equal(grads, mow.task_gradients(agent, frames, batches=2))
    agent.clone_modules([2, 0, 1])
    assert agent.wm.labels == (2, 0, 1) == tuple(agent.wm.cluster_of.tolist())
    for a, b in zip(agent.wm.vaes[0].parameters(), agent.wm.vaes[2].parameters()):
        s, t = agent.opt.state[a], agent.opt.state[b]
        assert torch.equal(a, b) and torch.equal(s["exp_avg_sq"], t["exp_avg_sq"])
        assert s["step"] == t["step"] and s["exp_avg"] is not t["exp_avg"]
    w = agent.wm.reward_head.out.weight
    moments = agent.opt.state[w]["exp_avg"]
    assert torch.equal(w[0], w[2]) and torch.equal(moments[0], moments[1])
    old = w.detach().clone()
    mow_update(agent, frames)
    assert (w.detach() - old).abs().max() < 5 * agent.args.lr


# ------------------------------------------------------------------------------- several processes
MOW_RANK = """
import os, sys
sys.path.insert(0, sys.argv.pop())
import mow, torch, torch.nn.functional as F, tyro
agents = []
class Quiet(mow.Agent):              # no dropout and the likeliest latents: shares draw no noise
    start_tau = 1.0
    def __init__(self, *args):
        super().__init__(*args)
        agents.append(self)
        for m in self.wm.modules():
            m.dropout = 0.0
mow.sample_onehot = lambda logp: F.one_hot(logp.argmax(-1), logp.shape[-1]).to(logp.dtype)
mow.main(tyro.cli(mow.Args), Quiet)
agent, = agents
state = dict(agent=agent.state_dict(), opt=agent.opt.state_dict(), act=agent.agent_opt.state_dict())
torch.save(state, f"rank{os.environ.get('RANK', '')}.pt")
"""


def test_two_processes_train_the_model_of_one(tmp_path):
    (tmp_path / "rank.py").write_text(MOW_RANK)
    words = mow_words(task="Boxing,Krull", warmup=10, steps=16)
    env, logs = os.environ | {"OMP_NUM_THREADS": "1"}, []
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, launcher in (("one", []), ("two", torchrun)):
        (tmp_path / name).mkdir()
        p = subprocess.run([sys.executable, *launcher, "../rank.py", *words, HERE], env=env,
                           cwd=tmp_path / name, capture_output=True, text=True)
        assert p.returncode == 0, p.stderr[-3000:]
        folder, = (tmp_path / name / "runs").iterdir()
        lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        result = json.loads((folder / "results.json").read_text())
        terms = "rec", "rew", "end", "dyn", "dyn_raw", "rep", "task", "grad_norm"
        warmup, = [x for x in lines if "losses/warmup/rec" in x]  # its end; roll-outs then differ
        rows = [row[k] for row in result["history"][:2] for k in ("rec", "rew", "dyn_raw")]
        logs.append([warmup[f"losses/warmup/{k}"] for k in terms] + np.ravel(rows).tolist())
        assert result["rows"][0]["episodes"] == 1 and result["history"][1]["updates"] == 10
    assert np.allclose(*logs, rtol=1e-4), logs
    a, b = (mow_numbers(torch.load(tmp_path / f"two/rank{i}.pt", weights_only=True))
            for i in (0, 1))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert "threads x 2" in p.stdout and p.stdout.count("playing 1 episodes") == 1


# -------------------------------------------------------------------------------------- whole runs
@pytest.fixture(scope="module")
def mow_run(tmp_path_factory):
    """One tiny run on three games, from start to end."""
    with contextlib.chdir(tmp_path_factory.mktemp("mow")):
        result = mow.main(mow.Args(task=GAMES, capture_video=True, **MOW_TINY))
        yield result, next(Path("runs").resolve().iterdir())


def test_a_tiny_run_makes_its_table_and_files(mow_run):
    result, folder = mow_run
    assert [r["task"] for r in result["rows"]] == GAMES.split(",")
    assert result["rows"][0]["storm"] == 79.7
    for name in ("results.json", "results.csv", "frames.png", "checkpoint.pt", "Krull.mp4",
                 "metrics.jsonl", "envs.py", "data.py"):
        assert (folder / name).stat().st_size > 0
    saved = json.loads((folder / "results.json").read_text())
    assert saved["rows"] == result["rows"] and saved["args"]["atari"]["sticky"] == 0.25
    for who, name in (("agent", "return"), ("blind", "blind"), ("random", "random")):
        means = [np.mean([x for x, _ in episodes]) for episodes in saved["played"][who]]
        assert means == [r[name] for r in saved["rows"]]
    assert len(saved["clusters"]["labels"]) == len(saved["clusters"]["similarity"]) == 3
    assert np.shape(saved["routing"]["scores"]) == (3, 3)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["agent"]["_extra_state"]["updates"] == 36 and state["frames"]["count"] == 44


def test_the_blind_control_acts_as_often_and_never_looks(monkeypatch):
    args = mow_settled(task="Boxing", atari={"frame_cap": 40})
    options = mow.task_options(args, ["Boxing"])
    agent = mow.Agent(args, [list(range(18))], CPU)
    played, taken = mow.evaluate(agent, ["Boxing"], options, 2, 1, agent.play)
    assert taken.shape == (1, 20, 18) and (taken.sum(-1) == 1).all()  # 2 environments, 10 steps
    assert len(played[0]) == 2
    looks, play = [], agent.play
    monkeypatch.setattr(agent, "play", lambda *a: looks.append(1) or play(*a))
    out = mow.evaluate_all(agent, ["Boxing"], options, 2, seed=1)
    assert len(looks) == 10 and out["agent"] == played
    assert all(len(episodes[0]) == 2 for episodes in out.values())


def test_killed_at_any_moment_it_ends_at_the_same_numbers(mow_run, tmp_path, monkeypatch):
    whole, folder = mow_run
    monkeypatch.chdir(tmp_path)

    class Killed(BaseException):
        pass

    def die(kind, name, *when):
        real, calls = getattr(kind, name), []

        def mortal(self, *a):
            calls.append(1)
            if len(calls) in when:
                raise Killed
            return real(self, *a)
        monkeypatch.setattr(kind, name, mortal)

    die(mow.Agent, "model_loss", 3, 15)  # in the warm-up, in play
    die(mow.Stage, "send", 6)            # in random play
    args, kills, result = dict(save_every=0.0, capture_video=True, **MOW_TINY), 0, None
    while result is None:
        try:
            runs = list(Path("runs").glob("*"))
            again = mow.Args(resume=str(runs[0])) if runs else mow.Args(task=GAMES, **args)
            result = mow.main(again)
        except Killed:
            kills += 1
    assert kills == 3
    want, got = (mow_numbers(torch.load(x / "checkpoint.pt", weights_only=True))
                 for x in (folder, next(Path("runs").iterdir())))
    assert want.keys() == got.keys()
    assert all(torch.equal(want[k], got[k]) for k in want if want[k].dtype != torch.bool)
    for name in ("rows", "finished", "clusters", "routing", "history", "played"):
        assert result[name] == whole[name], name


def test_forty_sweeps_on_a_cpu_learn_to_see(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = MOW_TINY | dict(sizes=MOW_SIZES | dict(stem=8, width=32, hidden=32), lr=2e-3, steps=80,
                            random_steps=40, warmup=40, clusters=2, atari={"frame_cap": 400})
    agents = []

    class Watched(mow.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            agents.append((self, mow_numbers(self)))

    gradients = mow.task_gradients
    monkeypatch.setattr(mow, "task_gradients", lambda agent, frames: gradients(agent, frames, 2))
    history = mow.main(mow.Args(task=GAMES, **small), Watched)["history"]
    assert np.isfinite([row["rec"] for row in history]).all()
    assert all(b < 0.35 * a for a, b in zip(history[0]["rec"], history[-1]["rec"]))
    agent, before = agents[0]
    after = mow_numbers(agent)
    still = [k for k in before if torch.equal(before[k], after[k])
             and before[k].is_floating_point() and "position" not in k]
    assert not still, still


def test_checkpoint_of_another_run_plays_and_goes_on(mow_run, tmp_path, monkeypatch):
    whole, folder = mow_run
    monkeypatch.chdir(tmp_path)
    given = dict(task=GAMES, checkpoint=str(folder / "checkpoint.pt"))
    play = {k: v for k, v in MOW_TINY.items() if k in (
        "length", "context", "horizon", "sizes", "atari", "eval_episodes", "compile", "bf16")}
    result = mow.main(mow.Args(eval_only=True, **given, **play))
    assert result["rows"] == whole["rows"] and "history" not in result
    more = mow.main(mow.Args(**given, **MOW_TINY | dict(steps=26, warmup=None)))
    assert more["clusters"] == {"labels": whole["clusters"]["labels"]}
    assert more["history"][0]["updates"] == 50
    for words, task, file in ((("does not fit",), "Pong", given["checkpoint"]),
                              (("add --checkpoint",), "Pong", None),
                              (("cannot be read",), "Pong", "nowhere.pt")):
        with says(*words):
            mow.main(mow.Args(task=task, checkpoint=file, eval_only=True, **play))


def test_bfloat16_stays_close_to_float32(tmp_path):
    results = []
    for bf16 in (False, True):
        agent = mow_agent(2, clusters=2, experts=3, topk=2, bf16=bf16)
        metrics = mow_update(agent, mow_frames(agent, tmp_path / f"{bf16}"))
        assert all(p.dtype == torch.float32 for p in agent.wm.parameters())
        assert agent.low.dtype == torch.float32
        values = [metrics[k].mean() for k in ("rec", "rew", "dyn_raw", "critic")]
        results.append(torch.stack(values))
    assert torch.allclose(*results, rtol=0.05)


def test_mow_compiled_functions_were_compiled_and_agree_with_eager(tmp_path, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile",
                        lambda f, **kw: real(f, backend="eager", fullgraph=True, **kw))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    results = []
    for enabled in (False, True):
        agent = mow_agent(2, clusters=2, experts=3, compile=enabled)
        agent.wm.assign([0, 0])
        frames = mow_frames(agent, tmp_path / f"{enabled}")
        for i in range(4):
            if i == 2:
                agent.clone_modules([0, 1])
            mow_update(agent, frames)
        a, _ = agent.play(frames.obs[:, :1].copy(), agent.memory(1), [0])
        results.append(mow_numbers(agent) | {"act": torch.from_numpy(a)})
    counters = torch._dynamo.utils.counters
    # world model twice (before and after clustering), imagined step, agent, acting
    assert not counters["graph_break"]
    assert 4 <= counters["stats"]["unique_graphs"] <= 8, counters["stats"]
    eager, compiled = results
    assert all(torch.allclose(eager[k].float(), compiled[k].float(), atol=2e-3, equal_nan=True)
               for k in eager)


def test_storm_and_runs_of_robots_and_games(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real, sizes = mow.task_options, {k: v for k, v in MOW_SIZES.items() if k != "emb"}
    monkeypatch.setattr(mow, "task_options", lambda args, tasks: {
        t: o | ({"length": 20} if t in envs.METAWORLD50 else {})
        for t, o in real(args, tasks).items()})
    r = mow.main(mow.Args(task="mw-reach,Pong", **MOW_TINY | dict(steps=24)))
    assert [row["task"] for row in r["rows"]] == ["mw-reach", "Pong"]
    assert r["rows"][0]["storm"] is None and 0 <= r["rows"][0]["score"] <= 1
    storm = MOW_TINY | dict(warmup=None, sizes=sizes)
    r = mow.main(mow.Args(task="Pong", storm=True, **storm))
    assert r["args"]["sizes"]["emb"] == 0 and r["rows"][0]["episodes"] == 1


# --------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("words,more", [
    (("'Boxin'", "nearest: Boxing"), dict(task="Boxin")), (("twice",), dict(task="Pong,Pong")),
    (("--clusters 4", "1 to 3"), dict(task=GAMES, clusters=4)),
    (("--topk 4", "1 to 3"), dict(task=GAMES, experts=3, topk=4)),
    (("--storm", "3 tasks"), dict(task=GAMES, storm=True)),
    (("heads that divide",), dict(task=GAMES, sizes=dict(width=15, heads=2))),
    (("positive numbers",), dict(task=GAMES, sizes=dict(stem=0))),
    (("--sizes depth", "expected some of stem"), dict(task=GAMES, sizes=dict(depth=3))),
    (("--atari lives", "expected some of sticky"), dict(task=GAMES, atari=dict(lives=3))),
    (("--random-steps 4", "--length 8"), dict(task=GAMES, random_steps=4)),
    (("--length 12 or more",), dict(task=GAMES, context=4, horizon=8, length=11)),
    (("--batch 0", "at least 1"), dict(task=GAMES, batch=0)),
    (("--steps 44", "does not train"), dict(task=GAMES, eval_only=True)),
    (("--warmup 4", "clusters"), dict(task=GAMES, checkpoint="other.pt")),
    (("args.json",), dict(resume="nowhere")), (("no GPU",), dict(device="cuda")),
    (("multiples of 3",), dict(task="Pong", WORLD_SIZE="3")),
    (("replay of 1 x 100,000", "GB free"), dict(task="Pong", steps=100_000, free=10**6))])
def test_mow_bad_input_is_one_sentence(words, more, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if world := more.pop("WORLD_SIZE", None):
        monkeypatch.setenv("WORLD_SIZE", world)
    if free := more.pop("free", None):
        monkeypatch.setattr(data.shutil, "disk_usage", lambda p: types.SimpleNamespace(free=free))
    with says(*words):
        mow.main(mow.Args(**MOW_TINY | more))
    assert free or not Path("runs").exists()


def test_missing_games_are_named(monkeypatch):
    from ale_py import roms
    monkeypatch.setattr(roms, "get_rom_path", lambda name: None)
    with says("Boxing", "ROM", "pip install"):
        envs.make_env("Boxing", obs="pixels")
    with says("obs='pixels'"):
        envs.make_env("Pong")


def test_atari_modes_and_difficulties():
    def play(task):
        env = envs.make_env(task, obs="pixels", sticky=0.0)
        return np.stack([env.reset(seed=3)[0], *(env.step(t % 4)[0] for t in range(20))])

    frames = play("Breakout")
    for end, same in (("m0d0", True), ("m16d0", False), ("m0d1", False)):
        assert np.array_equal(frames, play(f"Breakout@{end}")) == same
    for task in ("Boxing@m1d0", "Boxing@m0d4", "Boxing@hard", "Boxing@m0"):
        with says(task, "Boxing@m<mode>d<difficulty>", "a mode of", "0, 1, 2, 3"):
            envs.make_env(task, obs="pixels")


def test_mow_a_loss_that_is_not_finite_stops_with_its_terms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mow, "two_hot_loss", lambda logits, x: logits.sum(-1) * math.nan)
    with says("not finite", "'rew': nan", "smaller learning rate"):
        mow.main(mow.Args(task="Pong", **MOW_TINY | dict(clusters=1)))


def test_mow_copied_with_its_two_helpers_it_runs(tmp_path):
    for name in ("mow.py", "envs.py", "data.py"):
        (tmp_path / name).write_text(Path(HERE, name).read_text())
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    p = subprocess.run([sys.executable, "mow.py", *mow_words(task="Pong")], cwd=tmp_path, env=env,
                       capture_output=True, text=True)
    assert p.returncode == 0 and "mean score" in p.stdout, p.stderr[-2000:]
    folder = next((tmp_path / "runs").iterdir())
    assert (folder / "mow.py").read_text() == (tmp_path / "mow.py").read_text()
