from t_head import *  # noqa: F401,F403

from studies import mow_clusters, mow_cost, mow_diagnosis, mow_fidelity, mow_pretrain
from studies import mow_storm_code, mow_tokens, mow_transfer, mow_variants
from t_mow import MOW_SIZES, check_cached_steps, mow_agent, mow_batch, mow_frames, mow_update

MOW_STUDIES = {
    "clusters": (mow_clusters, dict(task="Boxing,Krull,Pong", seeds=1)),
    "cost": (mow_cost, {}), "fidelity": (mow_fidelity, dict(task="Pong")),
    "tokens": (mow_tokens, dict(task="Pong")), "storm_code": (mow_storm_code, dict(task="Pong")),
    "two": (mow_variants, dict(task="Pong,Qbert", question="clusters")),
    "parts": (mow_variants, dict(task="Pong,Qbert", question="experts")),
    "monolith": (mow_variants, dict(question="monolith"))}


def study(module, **more):
    return module.main(module.Args(fast=True, device="cpu", **more))


# ------------------------------------------------------------------------------- measures, by hand
def test_silhouette_and_adjusted_rand_of_planted_clusters():
    rng = np.random.default_rng(0)
    truth = rng.permutation(np.arange(12) % 3)
    grads = rng.normal(size=(3, 7, 64))[truth] + 0.7 * rng.normal(size=(12, 7, 64))
    labels, sim = mow.cluster_tasks(grads, 3), mow.task_similarity(grads)
    assert mow_clusters.adjusted_rand(labels, truth) == 1
    good = mow_clusters.silhouette(sim, labels)
    assert good > 0.3 > mow_clusters.silhouette(sim, rng.permutation(labels))
    assert mow_clusters.adjusted_rand([0, 0, 1, 1], [1, 1, 0, 0]) == 1
    chance = [mow_clusters.adjusted_rand(rng.permutation(truth), truth) for _ in range(300)]
    assert abs(np.mean(chance)) < 0.05


def test_ssim_equals_sums_over_every_window():
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(2, 14, 13)).astype(np.float32)
    y = np.clip(0.8 * x + 0.2 * rng.uniform(size=x.shape), 0, 1).astype(np.float32)
    g = np.exp(-np.arange(-5, 6) ** 2 / 4.5)
    g = np.outer(g, g) / g.sum() ** 2

    def one(p, q):
        mp, mq = (g * p).sum(), (g * q).sum()
        vp, vq = (g * (p - mp) ** 2).sum(), (g * (q - mq) ** 2).sum()
        c = (g * (p - mp) * (q - mq)).sum()
        return ((2 * mp * mq + 1e-4) * (2 * c + 9e-4)
                / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))

    corners = [(i, j) for i in range(4) for j in range(3)]
    want = []
    for a, b in zip(x, y):
        want.append(np.mean([one(a[i:i + 11, j:j + 11], b[i:i + 11, j:j + 11])
                             for i, j in corners]))
    x, y, ssim = torch.from_numpy(x), torch.from_numpy(y), mow_diagnosis.ssim
    assert np.allclose(ssim(x, y), want, atol=1e-4) and ssim(x, x).allclose(torch.ones(2))
    assert ssim(x[None], y[None]).shape == (1, 2) and ssim(x, 1 - x).max() < 0


def test_perceptual_distance():
    perceptual = mow_diagnosis.perceptual
    x = torch.rand(2, 3, 3, 64, 64, generator=gen(0))
    blurred = F.avg_pool2d(x.flatten(0, 1), 5, 1, 2).view_as(x)
    far = perceptual(x, blurred)
    assert perceptual(x, x).abs().max() == 0 and far.shape == (2, 3)
    near = perceptual(x, x + 0.01 * torch.randn(x.shape, generator=gen(1)))
    assert (0 < near).all() and (near < 0.1 * far).all()
    assert torch.allclose(perceptual(x[1, 2], blurred[1, 2]), far[1, 2], atol=1e-5)


def test_noise_of_the_actor_gradient(tmp_path, monkeypatch):
    agent = mow_agent(2, clusters=1, rollouts=16)
    frames = mow_frames(agent, tmp_path / "f")
    mow_update(agent, frames)
    assert all(0 < x < 1e6 for x in mow_fidelity.gradient_noise(agent, frames, 0, 8, 64))
    real = agent.imagine_from
    monkeypatch.setattr(agent, "imagine_from", lambda *a: [
        x[:, :1].expand(-1, 16, *x.shape[2:]) for x in real(*a)])
    assert max(mow_fidelity.gradient_noise(agent, frames, 0, 8, 64)) < 1e-8  # all alike
    rank_correlation = mow_fidelity.rank_correlation
    assert rank_correlation([[1, 2], [3, 9]], [[5, 6], [7, 8]]) == pytest.approx(1)
    assert rank_correlation([[1, 2]], [[5, 5]]) is None


def test_counts_of_parameters_and_products():
    cpu = torch.device("cpu")
    storm = mow.settle(mow.Args(task="Boxing", storm=True, preset="paper"), ["Boxing"], cpu)
    assert mow_cost.parameters(storm, 1, 18) == 16_513_155
    p = mow_cost.products(storm, 18)
    assert p["encoder"] == pytest.approx(30.9e6, rel=0.01) and p["decoder"] == p["encoder"]
    full = mow.settle(mow.Args(task="atari26", preset="paper"), list(envs.ATARI26), cpu)
    assert mow_cost.products(full, 18)["dynamics"] == pytest.approx(16.6e6, rel=0.1)


# ------------------------------------------------------------------------- variants of the method
def token_agent(K=2, segment=1, **more):
    kind = type("Variant", (mow_tokens.TokenAgent,), dict(segment=segment, start_tau=1.0))
    return mow_agent(K, kind, experts=3, topk=1, **more)


@pytest.mark.parametrize("segment", (1, 3))
def test_cached_steps_with_experts_per_token(segment):
    sizes = MOW_SIZES | dict(expert_layers=2, shared_layers=2)
    check_cached_steps(token_agent(3, segment, sizes=sizes))


def test_experts_per_token():
    agent = token_agent(segment=8)
    wm, (obs, act, _, _, first) = agent.wm.eval(), mow_batch(agent, B=1, L=8)
    e, pos = wm.embedding(), torch.arange(8)
    _, J, w = wm.routing(e)
    assert J.tolist() == [[0, 1, 2]] * 2 and w.eq(1).all()
    z = mow.draw_latent(wm.posterior(mow.to_images(obs), e)).detach()
    mask = mow.episode_mask(first, pos)
    h = wm.sequence(z, act, e, J, w, mask, pos)
    h.square().sum().backward()
    assert wm.token_router.weight.grad.abs().sum(1).min() > 0
    chosen = wm.token_scores(z, act, e)[:, 0, 0].argmax(-1, keepdim=True)      # of the first token
    moved = {j for j in range(3) if wm.experts.blocks[0].up.weight.grad[j].any()}
    assert moved == set(chosen.flatten().tolist())
    wm.combine = lambda x, *_: x.flatten(3)
    ones = torch.ones(2, 1)
    assert torch.allclose(h, wm.sequence(z, act, e, chosen, ones, mask, pos), atol=1e-5)


def test_penalties_on_switching_and_on_leaving_the_prior():
    for segment in (1, 4, 8):
        agent = token_agent(segment=segment)
        wm = agent.wm
        torch.manual_seed(0)
        nn.init.normal_(wm.token_router.weight, std=3)
        batch = mow_batch(agent, L=8)
        _, z, _ = agent.model_loss(batch)
        S = wm.routing(wm.embedding())[0]
        p = wm.routed(z, batch[1])
        switch, prior = mow_tokens.penalties(p, S)
        assert (switch > 0).all() == (segment < 8) and prior.min() > 0
        assert mow_tokens.switch_rate(p).max() <= {1: 1, 4: 1 / 7, 8: 0}[segment]
    with torch.no_grad():
        wm.token_router.weight.zero_()
        wm.token_router.bias.zero_()
    p = wm.routed(z, batch[1])
    assert mow_tokens.penalties(p, S)[1].abs().max() < 1e-6
    assert torch.allclose(p.mean((1, 2)), S, atol=1e-6)
    grads = {}
    for name in ("free", "switch_coef", "prior_coef"):  # their weights reach the gradient
        agent = token_agent()
        torch.manual_seed(0)
        nn.init.normal_(agent.wm.token_router.weight)
        weight, batch = agent.wm.token_router.weight, mow_batch(agent, B=1, L=4)
        if name != "free":
            setattr(agent, name, 2.0)
        torch.manual_seed(0)
        loss, z, _ = agent.model_loss(batch)
        grads[name], = torch.autograd.grad(loss, weight)
        S = agent.wm.routing(agent.wm.embedding())[0]
        term = mow_tokens.penalties(agent.wm.routed(z, batch[1]), S)[name == "prior_coef"].sum()
        if name != "free":
            want, = torch.autograd.grad(2 * term, weight)
            assert want.any() and torch.allclose(grads[name] - grads["free"], want, atol=1e-5)


def test_warm_up_without_rewards_leaves_their_heads_alone(tmp_path):
    agent = mow_agent(2, clusters=1)
    frames = mow_frames(agent, tmp_path / "f")

    def moved():
        before = {name: p.clone() for name, p in agent.wm.named_parameters()}
        mow_update(agent, frames, act=False)
        after = dict(agent.wm.named_parameters())
        return {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}

    heads = {"reward_head", "end_head"}
    agent.scored = False
    assert not moved() & heads and "vaes" in moved()
    agent.scored = True
    assert moved() >= heads


def test_variants_of_the_agent_do_what_they_say(tmp_path):
    agent = mow_agent(2, mow_variants.LearnedSigma, lr=1e-2)
    frames = mow_frames(agent, tmp_path / "f")
    mow_update(agent, frames)
    assert (agent.sigma > 0.005).all()  # large losses: sigma grows, by its own rate
    rew, done = torch.tensor([1., 2., 4.]), torch.tensor([0., 1., 0.])
    v, g, lam = torch.tensor([7., 11., 13., 17.]), 0.9, 0.6
    want = torch.tensor([1 + g * (0.4 * 7 + 0.6 * 2), 2, 4 + g * (0.4 * 13 + 0.6 * 17)])
    assert torch.allclose(mow_storm_code.lambda_return(rew, done, v, g, lam), want)
    agent = mow_agent(1, mow_storm_code.Code, storm=True, clusters=None, experts=None, topk=None,
                      warmup=None, rollouts=6, sizes={k: v for k, v in MOW_SIZES.items()
                                                      if k != "emb"})
    seen, act = [], agent.act
    agent.act = lambda *a, **more: seen.append(more) or act(*a, **more)
    frames = mow_frames(agent, tmp_path / "g")
    mow_update(agent, frames)
    agent.play(frames.obs[:, :1].copy(), agent.memory(1), [0])
    assert agent.contexts[0].shape[:3] == (1, 6, 4) and seen == [dict(on_prior=True)]


# ------------------------------------------------------------------------------------ whole studies
@pytest.mark.parametrize("name", MOW_STUDIES)
def test_mow_studies_make_their_tables(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "cost":
        monkeypatch.setattr(mow_cost, "milliseconds", lambda f, device, repeats=5: (f(), 1.0)[1])
    module, more = MOW_STUDIES[name]
    r = study(module, **more)
    rows = {row.get("variant"): row for row in r["rows"]}
    if name == "clusters":
        assert [row["clusters"] for row in r["rows"]] == [2, 3]
    elif name == "cost":
        kinds = [f"{k}_{n}" for k in ("tasks", "experts") for n in (1, 3, 6, 12)]
        assert [row["cell"] for row in r["rows"]] == kinds and "critics_looped_ms" in r["rows"][2]
        assert [p["preset"] for p in r["estimates"]] == ["paper", "gpu", "cpu"]
    elif name == "fidelity":
        assert list(rows) == ["stem2", "stem4", "stem8", "latents2", "latents8", "all together"]
        assert -1 <= rows["all together"]["rho_ssim"] <= 1
        assert len(r["cells"]["stem2_s1"]["points"]) == 5
    elif name == "tokens":
        assert rows["task"]["run_length"] == rows["segment8"]["run_length"] == 8
        assert 1 <= rows["token"]["run_length"] <= 8 and len(rows) == 6
    elif name == "storm_code":
        assert list(rows) == list(mow_storm_code.VARIANTS)
    elif name == "monolith":
        a, b = rows["monolith_params"], rows["mow"]
        assert a["parameters"] == pytest.approx(b["parameters"], rel=0.1)
        assert rows["monolith_flops"]["products"] == pytest.approx(b["products"], rel=0.05)
    else:
        assert len(rows) == {"two": 2 + 1, "parts": 11}[name] - (name == "two")
    folder, = (p for p in Path("runs").iterdir() if re.search("__mow_[a-z]", p.name))
    if name in ("tokens", "two"):  # all cells are there: nothing is done again
        monkeypatch.setattr(module, "work", None)
        assert module.main(module.Args(resume=str(folder)))["rows"] == r["rows"]


def test_transfer_freezes_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    agents, begin = [], mow_diagnosis.begin
    monkeypatch.setattr(mow_diagnosis, "begin", lambda cell: agents.append(
        begin(cell, lr=1e-2)) or agents[-1])
    r = study(mow_transfer)
    (model, *_), *variants = agents
    was, old = dict(model.wm.named_parameters()), model.wm.labels[:2]
    cells = {name: r["cells"][f"{name}_s1"] for name in mow_transfer.FROZEN}
    assert set(old) == {0, 1} and cells["all"]["cluster"] in old
    assert cells["new_cluster"]["cluster"] == 2
    for (variant, frozen), (agent, *_) in zip(mow_transfer.FROZEN.items(), variants, strict=True):
        assert agent.wm.labels == (*old, cells[variant]["cluster"])
        now = dict(agent.wm.named_parameters())
        moved = {name for name in now if not torch.equal(now[name], was[name])}
        assert not [name for name in moved if name.startswith(frozen)], variant
        if variant == "scratch":
            continue
        for part in ("e", "vaes", "experts", "mix", "reward_head"):  # the rest learns
            assert any(n.startswith(part) for n in moved) == (part not in frozen), (variant, part)
        assert torch.equal(now["e"][:2], was["e"][:2]) and not torch.equal(now["e"], was["e"])
    rows = {row["variant"]: row for row in r["rows"]}
    assert rows["scratch"]["auc_ratio"] == 1 and rows["scratch"]["forgetting"] is None
    assert rows["new_cluster"]["forgetting"] == 0 != rows["all"]["forgetting"]
    first = [rows[v]["zero_shot"] for v in ("all", "freeze_vae", "scratch")]
    assert first[0] == first[1] < first[2]
    with says("two or more"):
        study(mow_transfer, task="Pong")


def test_pretraining_without_rewards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mow_diagnosis, "quick", lambda args: dataclasses.replace(
        args, seeds=1, workers=1, random_steps=45, warmup=20, updates=10, sizes=MOW_SIZES))
    begin = mow_diagnosis.begin
    monkeypatch.setattr(mow_diagnosis, "begin", lambda cell: begin(cell, lr=1e-2))
    r = study(mow_pretrain)
    scratch, rewards, free = (r["cells"][f"{v}_s1"] for v in ("scratch", "rewards", "reward_free"))
    assert scratch["updates"][-1] == 10
    assert free["loss"][0] < 0.5 * scratch["loss"][0]            # it knows the images ..
    assert rewards["scores_first"] < 0.5 * free["scores_first"]  # .. and not the rewards,
    assert free["scores_last"] < 0.5 * free["scores_first"]      # which it learns
    assert r["rows"][0]["auc_ratio"] == 1 and r["rows"][2]["auc_ratio"] < 1


def test_diagnosis_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    r = study(mow_diagnosis)
    assert [row["task"] for row in r["rows"]] == ["Boxing", "Krull"]
    assert all(math.isfinite(row["open_loop_psnr"]) for row in r["rows"])
    assert 0 <= r["routing"]["mutual_information"] <= math.log(3)


def test_a_mow_study_without_room_for_a_test_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with says("last fifth", "--random-steps 85 or more"):
        mow_variants.main(mow_variants.Args(task="Pong", random_steps=20, device="cpu"))
