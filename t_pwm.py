from t_head import *  # noqa: F401,F403

# ------------------------------------------------------------------------------------------------------------- pwm.py
def tiny_world(n=3, size=None, seed=0):
    """A small world model with n tasks of 1..n actions, stacked networks and their optimisers."""
    torch.manual_seed(seed)
    wm = pwm.WorldModel(7, range(1, n + 1), 2, enc_hidden=16, hidden=24, latent=16, task_dim=4 if n > 1 else 0)
    nn.init.normal_(wm.reward_head[-1].weight, std=0.3)  # a reward that differs between states
    nets = nn.ModuleDict({"wm": wm, "actors": pwm.Actors(wm.act_mask, 16), "critics": pwm.Critics(n, 16),
                          "stats": pwm.RunningStats(n)})
    return nets, pwm.make_optimizers(nets)


@pytest.mark.parametrize("size, mt80, total, world", [
    (1, False, 1_426_427, 632_101), (5, False, 5_241_066, 1_599_717), (19, False, 16_031_210, 5_603_301),
    (48, False, 48_242_410, 18_983_909), (317, False, 317_316_889, 108_280_805), (48, True, 48_791_146, 19_188_581)])
def test_parameter_counts_are_the_published_ones(size, mt80, total, world):
    tasks = envs.MT80 if mt80 else envs.MT30
    with torch.device("meta"):
        wm = pwm.WorldModel(39 if mt80 else 24, [6] * len(tasks), **pwm.model_dims(size, len(tasks), mt80))
        heads = pwm.TDMPC2(wm, pwm.SIZES[size][2], pwm.SIZES[size][4])
    count = lambda *parts: sum(p.numel() for part in parts for p in part.parameters())  # noqa: E731
    assert count(wm) == world
    assert count(wm, heads.pi, heads.q) == total


def test_two_hot_against_its_definition():
    x = torch.tensor([0.0, 0.5, 2.0, -3.0, 1e9, -1e9, 20_000.0])
    t = pwm.two_hot(x)
    assert torch.allclose(t.sum(-1), torch.ones(7)) and ((t > 0).sum(-1) <= 2).all()
    bins = torch.linspace(-10, 10, 101)
    assert torch.allclose((t * bins).sum(-1), pwm.symlog(x).clamp(-10, 10), atol=1e-5)
    inside = x[x.abs() < 1e4]
    assert torch.allclose(pwm.two_hot_inv((pwm.two_hot(inside) + 1e-12).log()), inside, rtol=1e-4, atol=1e-4)
    assert torch.allclose(pwm.two_hot_inv((t[2:3] + 1e-12).log(), pseudo=True), torch.tensor([3.0]).log(), atol=1e-4)
    logits = torch.randn(7, 101)
    assert torch.allclose(pwm.two_hot_loss(logits, x), -(t * logits.log_softmax(-1)).sum(-1), atol=1e-5)


def test_lambda_return_against_equations_7_and_8():
    H, gamma, lam = 6, 0.9, 0.7
    r, v = torch.randn(H, 5, dtype=torch.float64), torch.randn(H + 1, 5, dtype=torch.float64)

    def n_step(t, h):  # Eq. (7)
        return sum(gamma**k * r[t + k] for k in range(h)) + gamma**h * v[t + h]

    for t in range(H):
        n = H - t  # Eq. (8): weights (1 - lam) lam^(h-1), the longest return takes the rest
        slow = (1 - lam) * sum(lam**(h - 1) * n_step(t, h) for h in range(1, n)) + lam**(n - 1) * n_step(t, n)
        assert torch.allclose(pwm.lambda_return(r, v, gamma, lam)[t], slow)
    assert torch.allclose(pwm.lambda_return(r, v, gamma, 0.0), r + gamma * v[1:])
    assert torch.allclose(pwm.lambda_return(r, v, gamma, 1.0)[0], n_step(0, H))


def test_fast_activations_equal_torchs_and_their_gradients():
    x = torch.cat([torch.randn(64, 16).double() * 4, torch.tensor([[-90.0, 90.0] * 8]).double()])
    assert torch.allclose(pwm.mish(x), F.mish(x), atol=1e-12)
    assert torch.allclose(pwm.simnorm(x), x.view(-1, 2, 8).softmax(-1).view(-1, 16), atol=1e-12)
    x = x[:4].requires_grad_()
    assert torch.autograd.gradcheck(pwm.mish, x) and torch.autograd.gradcheck(pwm.simnorm, x)


def test_initialisation():
    wm = pwm.WorldModel(24, [6] * 30, **pwm.model_dims(5, 30))
    w = wm.dynamics[1].weight
    assert abs(w.std() - 0.02) < 5e-4 and (wm.dynamics[1].bias == 0).all()
    assert (wm.task_emb.weight.abs() <= 0.02).all()
    logits = wm.reward(torch.rand(4, 512), torch.rand(4, 6), torch.arange(4))
    assert (logits == 0).all()
    heads = pwm.TDMPC2(wm, 512, 5)
    assert abs(heads.q.weight[1].std() - 0.02) < 5e-4  # tdmpc2#72: the ensemble must not be skipped
    z = wm.encode(torch.randn(9, 24), torch.arange(9))
    assert torch.allclose(z.view(9, -1, 8).sum(-1), torch.ones(9, 64), atol=1e-5)
    q = heads.q_value(heads.q, z, torch.rand(9, 6), torch.arange(9), torch.tensor([0, 3]), torch.amin)
    assert torch.allclose(q, torch.zeros(9), atol=1e-4)


def test_padded_actions_are_masked_and_get_no_gradient():
    nets, _ = tiny_world()
    a = nets["actors"](torch.rand(3, 5, 16), torch.randn(3, 5, 3))
    assert (a[0, :, 1:] == 0).all() and (a[1, :, 2:] == 0).all() and (a[2] != 0).all()
    a.square().sum().backward()
    assert (nets["actors"].log_std.grad[0, 0, 1:] == 0).all() and nets["actors"].log_std.grad[0, 0, 0] != 0


def test_world_model_update_learns_and_keeps_its_rules():
    nets, opts = tiny_world()
    wm = nets["wm"]
    g = torch.Generator().manual_seed(0)
    obs = torch.randn(5, 32, 7, generator=g).cumsum(0) * 0.3
    batch = obs, torch.rand(4, 32, 3, generator=g), obs[1:, :, 0].abs(), torch.randint(3, (32,), generator=g)
    with torch.no_grad():
        wm.task_emb.weight.mul_(1000)
    before = {k: v.clone() for k, v in wm.state_dict().items()}
    losses = [float(pwm.update_world_model(wm, wm, opts["model"], batch, 0.99)["loss"])
              for _ in range(150)]
    assert losses[-1] < 0.7 * losses[0]
    assert all((v != before[k]).any() for k, v in wm.state_dict().items())  # every tensor is trained
    assert (wm.task_emb.weight.norm(dim=1) <= 1 + 1e-6).all()
    assert [round(g["lr"] / 3e-4, 6) for g in opts["model"].param_groups] == [0.3, 1.0]


def test_world_model_loss_against_a_slow_reference():
    nets, _ = tiny_world()
    wm = nets["wm"]
    obs, act, rew, task = torch.randn(4, 6, 7), torch.rand(3, 6, 3), torch.rand(3, 6), torch.tensor([0, 1, 2, 0, 1, 2])
    loss, metrics, _, _ = pwm.world_model_loss(wm, obs, act, rew, task, 0.9)
    consistency = reward = 0
    for b in range(6):  # one sequence at a time, Eq. (10) with TD-MPC2's weights
        k = task[b:b + 1]
        z = wm.encode(obs[0, b:b + 1], k)
        for t in range(3):
            ce = -(pwm.two_hot(rew[t, b:b + 1]) * wm.reward(z, act[t, b:b + 1], k).log_softmax(-1)).sum()
            z = wm.next(z, act[t, b:b + 1], k)
            reward += 0.9**t * ce / 18
            consistency += 0.9**t * (z - wm.encode(obs[t + 1, b:b + 1], k)).square().mean() / 18
    assert torch.allclose(loss, 20 * consistency + 0.1 * reward, atol=1e-5)
    assert torch.allclose(metrics["consistency"], consistency.detach(), atol=1e-6)


def policy_inputs(n, B=6, H=5, passes=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, B, 7, generator=g), torch.randn(H, n, B, 3, generator=g),
            torch.rand(passes, H * B, generator=g).argsort(1))


def test_all_policies_at_once_equal_one_at_a_time():
    nets, opts = tiny_world()
    nets["wm"].requires_grad_(False)
    hp = dataclasses.replace(pwm.Args(), critic_batches=3)
    singles = []
    for k in range(3):  # the same initial networks, one task each
        one = nn.ModuleDict({"wm": nets["wm"], "actors": pwm.Actors(nets["wm"].act_mask[k:k + 1], 16),
                             "critics": pwm.Critics(1, 16), "stats": pwm.RunningStats(1)})
        for name, width in (("actors", 1), ("critics", 3)):
            one[name].load_state_dict({x: v[k * width:(k + 1) * width] for x, v in nets[name].state_dict().items()})
        singles.append((one, pwm.make_optimizers(one)))
    start = copy.deepcopy(nets["actors"].state_dict())
    fns = pwm.actor_loss, pwm.critic_loss
    for i in range(3):
        obs, noise, perm = policy_inputs(3, seed=i)
        pwm.update_policies(fns, nets, opts, obs, noise, perm, torch.arange(3).repeat_interleave(6), hp)
        for k, (one, opt) in enumerate(singles):
            pwm.update_policies(fns, one, opt, obs[k:k + 1], noise[:, k:k + 1], perm, torch.full((6,), k), hp)
    assert all((v != start[k]).any() for k, v in nets["actors"].state_dict().items())
    for name in ("actors", "critics", "stats"):
        for x, v in nets[name].state_dict().items():
            loop = torch.cat([one[name].state_dict()[x] for one, _ in singles])
            error = (v - loop).abs()  # Adam divides by tiny second moments, so one entry in 10^5 may differ more
            assert error.max() < 1e-3 and (error > 2e-5).float().mean() < 1e-4, (name, x)


def test_actor_gradient_against_finite_differences():
    nets, _ = tiny_world(1)
    nets["wm"].requires_grad_(False)
    task, bias = torch.zeros(6, dtype=torch.long), nets["actors"].mu.bias[-1]

    def loss(H):  # Eq. (6) with fresh statistics; returns (loss, imagined return)
        obs, noise, _ = policy_inputs(1, H=H)
        nets["stats"] = pwm.RunningStats(1)
        return pwm.actor_loss(*nets.values(), obs, noise[..., :1], task, 0.99, 0.95)[:2]

    # One step: sg(z) cuts nothing, so the gradient is that of J, here by central differences of J / deviation
    value, _ = loss(1)
    value.backward()
    scale = (nets["stats"].var + 1e-5).sqrt()
    J = []
    for sign in (1, -1):
        with torch.no_grad():
            bias.add_(sign * 0.01)
            J.append(loss(1)[1])
            bias.sub_(sign * 0.01)
    assert torch.allclose(bias.grad[0, 0], -(J[0] - J[1]) / 0.02 / scale, rtol=0.03)
    bias.grad = None
    loss(5)[0].backward()
    with torch.no_grad():
        before = loss(5)[1]
        bias.sub_(0.01 * bias.grad.sign())
        assert loss(5)[1] > before  # descending the loss raises the imagined return


def test_the_td_objective_is_the_mean_lambda_return():
    nets, _ = tiny_world()
    wm, actors, critics = (nets[k] for k in ("wm", "actors", "critics"))
    obs, noise, _ = policy_inputs(3)
    task = torch.arange(3).repeat_interleave(6)
    z, rew, _ = pwm.imagine(wm, actors, obs, noise, task)
    G, want = critics(z[-1]).amin(1), 0
    for h in reversed(range(5)):
        G = rew[h] + 0.99 * (0.05 * critics(z[h + 1]).amin(1) + 0.95 * G)
        want = want + G / 5
    loss, J, _, target, weight = pwm.actor_loss(*nets.values(), obs, noise, task, 0.99, 0.95, td=True)
    assert weight is None  # no episode ends: every step counts
    assert torch.allclose(J, want.mean(1), atol=1e-5)
    assert torch.allclose(target.view(3, 5, 6)[:, 0], G, atol=1e-5)
    nets["stats"] = pwm.RunningStats(3)
    plain = pwm.actor_loss(*nets.values(), obs, noise, task, 0.99, 0.95)[1]
    assert not torch.allclose(plain, J, atol=1e-3)


def test_one_policy_for_all_tasks_sees_which_task_it_is():
    nets, _ = tiny_world()
    wm, rows = nets["wm"], torch.tensor([2, 0, 1])
    nn.init.normal_(wm.task_emb.weight)
    actor, critics = pwm.SharedActor(wm, rows), pwm.SharedCritics(wm, rows)
    z, eps = torch.rand(3, 6, 16), torch.randn(3, 6, 3)
    a, v = actor(z, eps), critics(z)
    assert a.shape == (3, 6, 3) and v.shape == (3, 3, 6)
    for k, row in enumerate(rows):  # one network on [z; e], one task at a time
        x = torch.cat([z[k], wm.task_emb.weight[row].expand(6, -1)], -1)[None]
        u = actor.mu(x)[0] + actor.log_std[0].exp() * eps[k]
        assert torch.allclose(a[k], u.tanh() * wm.act_mask[row], atol=1e-6)
        assert torch.allclose(v[k], critics.v(x.expand(3, -1, -1))[..., 0], atol=1e-5)
    assert torch.allclose(actor.first()(z[:1]), actor(z)[:1], atol=1e-6)
    assert len(actor.log_std) == 1 and not [k for k in actor.state_dict() if "emb" in k]
    nets["actors"], nets["critics"] = actor, critics
    before, opts = copy.deepcopy(actor.state_dict()), pwm.make_optimizers(nets)
    obs, noise, perm = policy_inputs(3)
    wm.requires_grad_(False)
    pwm.update_policies((pwm.actor_loss, pwm.critic_loss), nets, opts, obs, noise, perm, rows.repeat_interleave(6),
                        pwm.Args())
    assert all((v != before[k]).any() for k, v in actor.state_dict().items())


@pytest.mark.parametrize("activation", ["simnorm", "mish", "relu", "residual"])
def test_activations_are_those_of_the_flag_and_of_the_file(activation, tmp_path):
    wm = pwm.WorldModel(7, [3, 2], 2, 16, 16, 16, 4, activation=activation)
    z = wm.encode(torch.randn(5, 7), torch.zeros(5, dtype=torch.long))
    simplex = torch.allclose(z.unflatten(-1, (2, 8)).sum(-1), torch.ones(5, 2), atol=1e-5)
    assert simplex == (activation == "simnorm") and ((z >= 0).all() == (activation in ("simnorm", "relu")))
    hidden = wm.reward_head[0](torch.randn(64, 23))
    assert (hidden.min() < 0) == (activation != "relu")
    torch.save(dict(wm=wm.state_dict(), act_dims=[3, 2], args=dict(activation=activation)), tmp_path / "wm.pt")
    again = pwm.load_world_model(tmp_path / "wm.pt")
    assert again.activation == activation
    with torch.no_grad():
        for p in wm.dynamics[-1].parameters():
            p.zero_()
    still = torch.equal(wm.next(z, torch.ones(5, 3), torch.ones(5, dtype=torch.long)), z)
    assert still == (activation == "residual")  # whose dynamics tell the change
    wm.load_state_dict(again.state_dict())
    assert torch.equal(again.next(z, torch.ones(5, 3), torch.ones(5, dtype=torch.long)),
                       wm.next(z, torch.ones(5, 3), torch.ones(5, dtype=torch.long)))


def test_imagined_rewards_are_in_log_space_unless_asked():
    nets, _ = tiny_world()
    obs, noise, _ = policy_inputs(3)
    pseudo, true = (pwm.imagine(nets["wm"], nets["actors"], obs, noise, torch.arange(3).repeat_interleave(6), p)[1]
                    for p in (True, False))
    assert pseudo.shape == (5, 3, 6) and torch.allclose(pwm.symexp(pseudo), true, atol=1e-5)


def test_open_loop_error_is_zero_for_a_perfect_model_and_one_for_the_mean():
    nets, _ = tiny_world(2)
    wm, task = nets["wm"], torch.arange(2).repeat(200)
    obs, act = torch.randn(3, 400, 7), torch.rand(2, 400, 2)
    z = [wm.encode(obs[0], task)]
    rew = []
    for a in act:
        rew.append(pwm.two_hot_inv(wm.reward(z[-1], a, task)))
        z.append(wm.next(z[-1], a, task))
    encode = wm.encode
    wm.encode = lambda o, t: torch.stack(z) if o.ndim == 3 else z[0]  # observations that the model predicts exactly
    rew = torch.stack(rew)
    exact = pwm.open_loop_error(wm, (obs, act, rew, 0 * rew, 0 * rew + 1, task), torch.arange(2), (1, 2))
    assert all(v < 1e-6 for v in exact.values()), exact
    wm.encode = encode
    means = torch.stack([torch.stack([r[task == k].mean() for k in range(2)])[task] for r in rew])
    wm.reward = lambda z, a, t: (pwm.two_hot(means[0]) + 1e-12).log()
    mean = pwm.open_loop_error(wm, (obs, act, rew, 0 * rew, 0 * rew + 1, task), torch.arange(2), (1,))
    assert abs(mean["reward_nmse_1"] - 1) < 0.02


def test_act_serves_a_mixed_batch_like_single_rows():
    nets, _ = tiny_world()
    task, obs, eps = torch.tensor([2, 0, 2, 2, 1, 0]), torch.randn(6, 7), torch.randn(6, 3)
    rows = torch.arange(3)
    a = pwm.act(nets["wm"], nets["actors"], rows, obs, task, eps)
    for i in range(6):
        z = nets["wm"].encode(obs[i:i + 1], task[i:i + 1]).expand(3, 1, -1)
        assert torch.allclose(a[i], nets["actors"](z, eps[i].expand(3, 1, -1))[task[i], 0], atol=1e-6)
    one = nets["actors"].first()
    z = nets["wm"].encode(obs[1:2], task[1:2])
    mean = pwm.act(nets["wm"], nets["actors"], rows, obs[1:2], task[1:2])
    assert torch.allclose(one(z[None])[0], mean, atol=1e-6)


def test_compiled_losses_were_compiled_and_agree_with_eager():
    nets, opts = tiny_world()
    nets["wm"].requires_grad_(False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    amp = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=False)
    compiled = [pwm.prepare(f, amp, True) for f in (pwm.actor_loss, pwm.critic_loss)]
    other = copy.deepcopy(nets)
    other_opts = pwm.make_optimizers(other)
    obs, noise, perm = policy_inputs(3, H=3)
    task = torch.arange(3).repeat_interleave(6)
    a = pwm.update_policies((pwm.actor_loss, pwm.critic_loss), nets, opts, obs, noise, perm, task, pwm.Args())
    b = pwm.update_policies(compiled, other, other_opts, obs, noise, perm, task, pwm.Args())
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 2
    assert not torch._dynamo.utils.counters["graph_break"]
    for k in a:
        assert torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-4), k


def test_planner_finds_the_best_action_and_respects_masks():
    nets, _ = tiny_world(2)
    wm = nets["wm"]
    heads = pwm.TDMPC2(wm, 24, 5).eval()
    wm.reward = lambda z, a, task: 50 * pwm.two_hot(400 - 400 * (a[..., 0] - 0.6).square())  # best first action: 0.6
    z, task = wm.encode(torch.randn(2, 7), torch.arange(2)), torch.arange(2)
    draw = lambda: pwm.plan(wm, heads, z, task, torch.zeros(2, 3, 2), torch.full((2,), 0.99),  # noqa: E731
                            torch.Generator().manual_seed(0))
    a, mean = draw()
    assert ((a[:, 0] - 0.6).abs() < 0.2).all() and a.abs().max() <= 1 and a[0, 1] == 0 and mean.shape == (2, 3, 2)
    assert torch.equal(a, draw()[0])


def test_tdmpc2_value_and_prior_learn():
    nets, _ = tiny_world()
    nets["tdmpc2"] = pwm.TDMPC2(nets["wm"], 24, 5)
    opts = pwm.make_optimizers(nets)
    g = torch.Generator().manual_seed(0)
    batch = (torch.randn(5, 32, 7, generator=g), torch.rand(4, 32, 3, generator=g), torch.ones(4, 32),
             torch.randint(3, (32,), generator=g))
    before = copy.deepcopy(nets["tdmpc2"].state_dict())
    for _ in range(400):
        m = pwm.update_world_model(nets["wm"], nets["wm"], opts["model"], batch, 0.99,
                                   nets["tdmpc2"], opts["prior"], torch.full((32,), 0.99), g)
    assert all((v != before[k]).any() for k, v in nets["tdmpc2"].state_dict().items() if k != "scale")
    heads, wm = nets["tdmpc2"].eval(), nets["wm"]
    z = wm.encode(batch[0][0], batch[3])
    q = heads.q_value(heads.q, z, batch[1][0], batch[3], torch.tensor([0, 1]), torch.mean)
    assert m["value"] < 3 and q.mean() > 0.5  # a reward of 1 everywhere: values rise from 0


# --------------------------------------------------------------------------------------- published checkpoint layouts
def published_files(wm):
    """The same weights in the layouts of TD-MPC2 now, TD-MPC2 of October 2023, and PWM's agent."""
    now, sequential, agent = {"_task_emb.weight": wm.task_emb.weight.detach()}, {}, {}
    sequential |= now
    agent |= now
    for ours, theirs in (("encoder", "_encoder.state"), ("dynamics", "_dynamics"), ("reward_head", "_reward")):
        for key, v in wm.state_dict().items():
            if key.startswith(ours + "."):
                i, field = key[len(ours) + 1:].split(".", 1)
                now[f"{theirs}.{i}.{field}"] = v
                agent[f"{theirs.removesuffix('.state')}.{i}.{field}"] = v
                first = 1 if ours == "encoder" else 0
                index = first + 3 * int(i) + field.startswith("ln.")
                sequential[f"{theirs}.{index}.{field.removeprefix('ln.')}"] = v
    now |= {"_pi.0.weight": torch.zeros(3, 3), "_Qs.params.0": torch.zeros(2, 3, 3), "log_std_min": torch.zeros(1)}
    return {"now": {"model": now}, "bare": now, "sequential": {"model": sequential},
            "agent": {"actor": {}, "critic": {}, "world_model": agent}}


def test_world_models_load_in_every_published_layout(tmp_path):
    torch.manual_seed(0)
    dims = [envs.task_facts(t).act_dim for t in envs.MT30]
    wm = pwm.WorldModel(24, dims, enc_layers=3, enc_hidden=20, hidden=28, latent=32, task_dim=8)
    nn.init.normal_(wm.task_emb.weight)  # rows longer than 1: the loader must project them
    obs, act, task = torch.randn(30, 24), torch.rand(30, 6), torch.arange(30)
    for name, file in published_files(wm).items():
        torch.save(file, tmp_path / f"{name}.pt")
        got = pwm.load_world_model(tmp_path / f"{name}.pt")
        assert got.tasks == envs.MT30 and got.task_emb.weight.norm(dim=1).max() <= 1 + 1e-6
        ref = copy.deepcopy(wm)
        ref.project_embeddings()
        z = ref.encode(obs, task)
        assert torch.equal(got.encode(obs, task), z), name
        assert torch.equal(got.next(z, act, task), ref.next(z, act, task))
        assert torch.equal(got.reward(z, act, task), ref.reward(z, act, task))


def test_wrong_checkpoints_say_what_was_expected(tmp_path):
    torch.save({"model": {"layer.weight": torch.zeros(2, 2)}}, tmp_path / "other.pt")
    with pytest.raises(SystemExit, match="no world model.*expected _encoder"):
        pwm.load_world_model(tmp_path / "other.pt")
    wm = pwm.WorldModel(24, [6] * 30, **pwm.model_dims(1, 30))
    file = published_files(wm)["now"]
    torch.save(file, tmp_path / "mt30.pt")
    with pytest.raises(SystemExit, match="not trained on mw-reach"):
        pwm.main(pwm.Args(task="mw-reach", checkpoint=str(tmp_path / "mt30.pt")))
    file["model"]["_dynamics.1.weight"] = torch.zeros(3, 3)
    torch.save(file, tmp_path / "bad.pt")
    with pytest.raises(SystemExit, match="does not fit together"):
        pwm.load_world_model(tmp_path / "bad.pt")


# ------------------------------------------------------------------------------------------------- whole runs of pwm.py
class Push(gymnasium.Env):
    """A point on a line is to be pushed to the origin: 40 steps, reward 1 at the goal, falling with the distance."""

    observation_space = gymnasium.spaces.Box(-9, 9, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = np.array([self.np_random.uniform(-1, 1), 0.0], np.float32)
        return self.x.copy(), {}

    def step(self, action):
        v = np.clip(0.9 * self.x[1] + 0.1 * action[0], -1, 1)
        self.x = np.array([np.clip(self.x[0] + v, -9, 9), v], np.float32)
        return self.x.copy(), float(np.exp(-4 * self.x[0] ** 2)), False, False, {}


gymnasium.register("Push-v0", entry_point=Push, max_episode_steps=40)
TINY = dict(task="test_all:Push-v0", device="cpu", workers=1, rounds=2, seed_episodes=6, round_episodes=2, wm_steps=60,
            wm_batch=16, policy_steps=30, policy_batch=8, horizon=4, wm_horizon=3, eval_episodes=1, first_policy=0.5,
            first_model=0.5, last_model=0.5, last_policy=0.5)


def flags(**settings):
    """Keyword settings as command-line words."""
    return [x for k, v in settings.items() for x in ([f"--{k.replace('_', '-')}"] if v is True
                                                     else [f"--{k.replace('_', '-')}", str(v)])]


def start(cwd, *words, launcher=("python",), **settings):
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=f"{HERE}:{cwd}", PYTHONUNBUFFERED="1", MPLCONFIGDIR=str(cwd))
    command = [sys.executable, *launcher[1:], f"{HERE}/pwm.py", *words, *flags(**settings)]
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    out = process.communicate(timeout=240)[0]
    assert process.returncode == 0, out[-3000:]
    return out


def last_run(cwd):
    return max(Path(cwd, "runs").iterdir(), key=lambda p: p.stat().st_mtime)


def test_it_learns_a_tiny_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = pwm.main(pwm.Args(**{**TINY, "rounds": 3, "seed_episodes": 20, "wm_steps": 900, "wm_batch": 32,
                                  "policy_steps": 250, "policy_batch": 16, "horizon": 10, "wm_horizon": 4,
                                  "wm_lr": 1e-3, "eval_episodes": 5, "first_model": 0.6, "last_model": 0.2,
                                  "first_policy": 0.2}))
    lines = [json.loads(x) for x in (last_run(tmp_path) / "metrics.jsonl").read_text().splitlines()]
    loss = [x["losses/model/loss"] for x in lines if "losses/model/loss" in x]
    assert loss[-1] < 0.5 * loss[0]
    table = result["table"][0]
    assert table["ours"] > 30 > 15 > table["random"], table  # of 40
    assert [x for x in result["history"] if "latent_nmse_4" in x][-1]["latent_nmse_4"] < 0.3
    assert {"results.json", "results.csv", "results.png", "checkpoint.pt", "args.json", "envs.py"} <= {
        p.name for p in last_run(tmp_path).iterdir()}


def test_killed_in_every_stage_and_resumed_it_ends_at_the_same_numbers(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    process = start(whole, **TINY)
    p = start(killed, **TINY, save_every=0)
    stages, deadline = [], time.time() + 200
    for wanted in (0, 1, 2, 4):  # kill as soon as the checkpoint says that this stage is under way
        while p.poll() is None and time.time() < deadline:
            try:
                state = torch.load(last_run(killed) / "checkpoint.pt", weights_only=True)["where"]
            except (OSError, ValueError, RuntimeError, FileNotFoundError):
                time.sleep(0.02)
                continue
            if state["stage"] > wanted or (state["stage"] == wanted and state["step"] > 2):
                break
            time.sleep(0.005)
        if p.poll() is None:
            p.send_signal(signal.SIGKILL)
            stages.append(state["stage"])
        p.communicate()
        p = start(killed, "--resume", str(last_run(killed)))
    finish(p)
    finish(process)
    assert len(set(stages)) >= 3, stages
    a, b = (torch.load(last_run(x) / "checkpoint.pt", weights_only=True) for x in (whole, killed))
    for part in ("wm", "actors", "critics", "stats"):
        for k in a[part]:
            assert torch.equal(a[part][k], b[part][k]), (part, k)
    a, b = (json.loads((last_run(x) / "results.json").read_text()) for x in (whole, killed))
    assert a["episodes"] == b["episodes"] and a["table"] == b["table"]
    steps = [json.loads(x)["step"] for x in (last_run(killed) / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_two_ranks_reproduce_one_rank(tmp_path):
    rng = np.random.default_rng(0)
    episodes = Episodes.create(tmp_path / "data", {TINY["task"]: (2, 1, 40)})
    obs, act = rng.normal(size=(8, 41, 2)).cumsum(1) / 9, rng.uniform(-1, 1, (8, 40, 1))
    episodes.append(TINY["task"], list(obs), list(act), list(np.abs(obs[:, 1:, 0])), list(np.zeros((8, 40), bool)))
    torchrun = ("python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    launchers = dict(one=("python",), two=torchrun)
    runs = []
    for name, launcher in launchers.items():
        (tmp_path / name).mkdir()
        settings = {**TINY, "policy_steps": 2, "data_dir": tmp_path / "data"}
        runs.append(start(tmp_path / name, launcher=launcher, **settings))
    losses = []
    for name, p in zip(launchers, runs):
        finish(p)
        lines = [json.loads(x) for x in (last_run(tmp_path / name) / "metrics.jsonl").read_text().splitlines()]
        lines = [x for x in lines if "losses/model/loss" in x]
        losses.append([[x[f"losses/model/{k}"] for k in ("loss", "grad_norm")] for x in lines])
    # after 50 and 60 updates: Adam makes something of the rounding of sums in another order
    assert len(losses[0]) == 2 and np.allclose(losses[0], losses[1], rtol=1e-3), losses


def test_copied_with_its_two_helpers_it_runs_and_evaluates(tmp_path):
    for name in ("pwm.py", "envs.py", "data.py"):
        (tmp_path / name).write_text(Path(HERE, name).read_text())
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def run(*words):
        p = subprocess.run([sys.executable, "pwm.py", *words], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert p.returncode == 0, p.stderr[-2000:]
        return p.stdout

    out = run("--task", "cartpole-swingup,cup-catch", "--fast", "--device", "cpu", "--wm-steps", "40")
    assert "latent_nmse_16" in out and "left" in out and "ms per action" in out
    folder = last_run(tmp_path)
    first = json.loads((folder / "results.json").read_text())
    assert {p.name for p in folder.iterdir()} >= {"pwm.py", "envs.py", "data.py"}
    run("--task", "cup-catch,cartpole-swingup", "--eval-only", "--checkpoint", str(folder / "checkpoint.pt"), "--fast")
    again = json.loads((last_run(tmp_path) / "results.json").read_text())  # other order of tasks, same policies
    for t, returns in first["episodes"]["ours"].items():
        assert np.allclose(returns, again["episodes"]["ours"][t], rtol=1e-3)
    wm = pwm.load_world_model(folder / "checkpoint.pt")
    assert wm.tasks == ("cartpole-swingup", "cup-catch")
    assert wm.encode(torch.zeros(1, 8), torch.tensor([1])).shape == (1, 128)
    out = run("--task", "cup-catch", "--checkpoint", str(folder / "checkpoint.pt"), "--fast", "--capture-video")
    assert "from " + str(folder) in out and "0 model updates" in out and "round 0: model" not in out  # a given model
    frames = imageio.mimread(last_run(tmp_path) / "video_cup-catch.mp4", memtest=False)
    assert len(frames) == 501 and np.std(frames[0]) > 5 and np.abs(frames[0].astype(int) - frames[400]).max() > 50


def test_the_baseline_plans_on_the_same_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = pwm.main(pwm.Args(**{**TINY, "task": WALK, "planner_episodes": 1, "prior": True, "seed_episodes": 10}))
    assert set(result["ms_per_action"]) == {"ours", "planner"} and len(result["episodes"]["planner"][WALK]) == 1
    assert np.isfinite(result["episodes"]["prior"][WALK]).all()
    file = last_run(tmp_path) / "checkpoint.pt"
    again = pwm.load_tdmpc2(pwm.load_world_model(file), file)
    assert len(again.q.weight[0]) == 2


def test_published_q_layouts_load(tmp_path):
    wm = pwm.WorldModel(24, [6] * 30, **pwm.model_dims(1, 30))
    heads = pwm.TDMPC2(wm, 384, 2)
    nn.init.normal_(heads.q.weight[-1])
    tensors = []
    for k in range(3):
        tensors += [heads.q.weight[k].transpose(1, 2), heads.q.bias[k][:, 0]]
        tensors += [heads.q.gain[k][:, 0], heads.q.shift[k][:, 0]] if k < 2 else []
    names = [f"{k}.{f}" for k in range(3) for f in ("weight", "bias", "ln.weight", "ln.bias")][:10]
    pi = {f"_pi.{k}": v for k, v in heads.pi.state_dict().items()}
    for i, keys in enumerate((range(10), names)):
        q = {f"_Qs.params.{k}": x.detach().clone() for k, x in zip(keys, tensors)}
        torch.save({"model": pi | q}, tmp_path / f"{i}.pt")
        got = pwm.load_tdmpc2(wm, tmp_path / f"{i}.pt")
        z, a, task = torch.rand(4, 128), torch.rand(4, 6), torch.arange(4)
        assert torch.equal(got.eval().q_logits(got.q, z, a, task), heads.eval().q_logits(heads.q, z, a, task))
        assert torch.equal(got.policy(z, task, a)[0], heads.policy(z, task, a)[0])
    torch.save({"model": {}}, tmp_path / "none.pt")
    with pytest.raises(SystemExit, match="no policy prior and Q functions"):
        pwm.load_tdmpc2(wm, tmp_path / "none.pt")


@pytest.mark.parametrize("settings, words", [
    (dict(task="walker-wolk"), "walker-walk"), (dict(task="cup-catch,cup-catch"), "twice"), (dict(task=","), "no task"),
    (dict(task="CartPole-v1"), "CartPole-v1.*[Dd]iscrete"), (dict(task="cup-catch", workers=0), "--workers 0"),
    (dict(eval_only=True), "--checkpoint"), (dict(resume="nowhere"), "no args.json"),
    (dict(task="cup-catch", checkpoint="nowhere.pt"), "nowhere.pt"),
    (dict(task="cup-catch", data_dir="nowhere"), "no episodes in nowhere")])
def test_bad_flags_get_one_sentence(settings, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=words) as error:
        pwm.main(pwm.Args(device="cpu", **settings))
    assert "\n" not in str(error.value)


def test_resume_of_another_task_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run("cup-catch", "pwm", 1, dataclasses.asdict(pwm.Args(task="cup-catch")))
    run.close()
    with pytest.raises(SystemExit, match="is a run of cup-catch, not walker-walk"):
        pwm.main(pwm.Args(task="walker-walk", resume=str(run.dir)))
    with pytest.raises(SystemExit, match="before its first checkpoint"):
        pwm.main(pwm.Args(resume=str(run.dir), device="cpu"))


def test_interrupted_it_saves_and_says_how_to_go_on(tmp_path):
    p = start(tmp_path, **{**TINY, "wm_steps": 100_000})
    for line in p.stdout:
        if "rolling out" in line or "round 0: 6 episodes" in line:
            break
    time.sleep(1)
    p.send_signal(signal.SIGINT)
    out = p.communicate(timeout=60)[0]
    assert "stopped; go on with: python pwm.py --resume runs/" in out and p.returncode == 1
    assert torch.load(last_run(tmp_path) / "checkpoint.pt", weights_only=True)["where"]["step"] > 0


def test_published_chunks_train_a_model_and_one_policy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    g = torch.Generator().manual_seed(0)
    N, T = 60, 501  # two episodes of each MT30 task, values within the padded layout of the published files
    task = torch.arange(30).repeat(2)
    dims = [envs.task_facts(t) for t in envs.MT30]
    obs_mask = torch.stack([(torch.arange(24) < d.obs_dim).float() for d in dims])[task][:, None]
    act_mask = torch.stack([(torch.arange(6) < d.act_dim).float() for d in dims])[task][:, None]
    chunk = dict(obs=torch.randn(N, T, 24, generator=g) * obs_mask, action=torch.rand(N, T, 6, generator=g) * act_mask,
                 reward=torch.rand(N, T, generator=g), task=task.int()[:, None].expand(N, T).contiguous())
    chunk["reward"][:, 0] = chunk["action"][:, 0] = float("nan")
    (tmp_path / "mt30").mkdir()
    torch.save(chunk, tmp_path / "mt30" / "chunk_0.pt")
    result = pwm.main(pwm.Args(**{**TINY, "task": "cup-catch", "data_dir": "mt30", "policy_steps": 4}))
    assert result["table"][0]["PWM paper"] == 471.6 and np.isfinite(result["table"][0]["ours"])


def test_readme_commands_parse_and_its_files_exist():
    text = Path(HERE, "README.md").read_text()
    scripts = {"pwm.py": pwm, "ed2.py": ed2, "mow.py": mow, "savi.py": savi}
    parsed = []
    for line in [line for block in text.split("```")[1::2] for line in block.splitlines()]:
        words = line.split("#")[0].split("&&")[-1].split()
        for name in scripts.keys() & set(words):
            parsed.append(name)
            args = tyro.cli(scripts[name].Args, args=words[words.index(name) + 1:])
            assert isinstance(args, scripts[name].Args)
    assert all(parsed.count(name) >= 5 for name in scripts)
    files = set(re.findall(r"results/\w+\.\w+", text))
    assert len(files) > 20
    for name in files:
        assert Path(HERE, name).exists(), name


def test_readmes_own_task_and_own_data_run(tmp_path, monkeypatch):
    blocks = [b for b in Path(HERE, "README.md").read_text().split("```python\n")[1:]]
    blocks = [b.split("```")[0] for b in blocks]
    own_task = next(b for b in blocks if "gymnasium.register" in b)
    own_data = next(b for b in blocks if "Episodes.create" in b)
    (tmp_path / "my_task.py").write_text(own_task)
    p = start(tmp_path, task="my_task:Slide-v0", fast=True, device="cpu")
    out = finish(p)
    assert "my_task:Slide-v0" in out
    monkeypatch.chdir(tmp_path)
    exec(compile(own_data, "README", "exec"), {})
    assert Episodes.open("my_data").counts() == {"cup-catch": 3}


def test_every_flag_has_a_doc_and_help_reads_it():
    out = subprocess.run([sys.executable, f"{HERE}/pwm.py", "--help"], capture_output=True, text=True).stdout
    for f in dataclasses.fields(pwm.Args):
        assert f"--{f.name.replace('_', '-')}" in out
    assert "Deviations from the paper" in out and "--no-compile" in out


# --------------------------------------------------------------------------------------------- PWM's studies of Sec. 3
def test_toy_networks_start_alike_and_learn_apart():
    nets = [pwm.fit_landscape(act, lambda x: x.sin(), 3, 1, seed=5)[0] for act in (torch.relu, pwm.simnorm)]
    torch.manual_seed(5)
    start = pwm.ToyNet(3, torch.relu)
    assert not torch.equal(nets[0].weight[0], start.weight[0])
    assert not torch.equal(start.weight[1][0], start.weight[1][1])
    x = torch.linspace(-3, 3, 7)
    for k, act in ((0, torch.relu), (1, lambda h: h.unflatten(-1, (4, 8)).softmax(-1).flatten(-2))):
        h = x[:, None]
        for i in range(3):
            h = h @ nets[k].weight[i][1] + nets[k].bias[i][1]
            h = act(h) if i < 2 else h
        assert torch.allclose(nets[k](x.expand(3, -1))[1], h[:, 0], atol=1e-5)
    alone = pwm.fit_landscape(torch.relu, lambda x: x.sin(), 2, 6, seed=5)[1]
    assert alone.shape == (6, 2) and (alone[-1] < 0.8 * alone[0]).all()


def test_descent_ends_in_the_minimum_and_stays_in_range():
    assert torch.allclose(pwm.descend(lambda t: (t - 0.5) ** 2, 2), torch.tensor([0.5, 0.5]), atol=1e-3)
    assert torch.allclose(pwm.descend(lambda t: -t, 1), torch.tensor([math.pi]))


def test_ball_wall_study_runs_and_judges(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    result = pwm.main(pwm.Args(task="ball-wall", fast=True, seeds=3, device="cpu"))
    out = capsys.readouterr().out
    assert "not reproduced" in out and result["verdict"] == "not reproduced" and len(result["table"]) == 9
    folder = last_run(tmp_path)
    assert {"figure2.png", "results.json", "args.json"} <= {p.name for p in folder.iterdir()}
    saved = json.loads((folder / "results.json").read_text())
    assert saved["deviations"] and len(saved["table"]["ReLU"]["gap"]) == 3
    gap, ball = saved["table"]["SimNorm"]["gap"], envs.plant("ball-wall")
    angle = torch.tensor(saved["table"]["SimNorm"]["theta"])
    assert np.allclose(gap, ball.cost(angle) + 21.8505, atol=0.01)


def test_the_true_plant_is_a_world_model():
    p = envs.plant("double-pendulum")
    wm, state = pwm.TruePlant(p, "double-pendulum", rew_std=2.0), p.reset(5, gen())
    task, a = torch.zeros(5, dtype=torch.long), torch.rand(5, 1)
    z = wm.encode(p.observe(state), task)
    after = p.step(state, a)
    assert torch.allclose(wm.next(z, a, task), p.observe(after), atol=1e-5)
    assert torch.allclose(pwm.reward_value(wm.reward(z, a, task)), p.reward(p.observe(after)) / 2, atol=1e-4)
    actors, noise = pwm.Actors(torch.ones(1, 1), 6, (8,)), torch.randn(3, 1, 5, 1)
    zs, rew, alive = pwm.imagine(wm, actors, z[None], noise, task)
    assert zs.shape == (4, 1, 5, 6) and rew.shape == (3, 1, 5) and alive is None
    obs, acts, real = pwm.play_pendulum(p, lambda o, t: actors(o[None], noise[t])[0], state, 3)
    assert torch.allclose(zs[:, 0], obs, atol=1e-4) and torch.allclose(rew[:, 0], real / 2, atol=1e-4)


def test_gradient_statistics_against_plain_autograd():
    p = envs.plant("double-pendulum")
    wm, actors, N, H = pwm.TruePlant(p, "double-pendulum"), pwm.Actors(torch.ones(1, 1), 6, (8,)), 4, 5
    start, eps = p.reset(N, gen(3)), torch.randn(H, 1, N, 1, generator=gen(4))
    with torch.no_grad():
        seen, acts, _ = pwm.play_pendulum(p, lambda o, t: actors(o[None], eps[t])[0], start, H)
    jac = pwm.policy_jacobian(actors, seen[:-1].flatten(0, 1), eps[:, 0].flatten(0, 1)).view(H, N, -1)
    stats, means = pwm.gradient_statistics(pwm.action_gradients(wm, seen[0], acts), jac)
    for h in (1, 3, 5):
        grads = []
        for n in range(N):
            state, total = start[n:n + 1], 0
            for t in range(h):  # the policy sees the recorded observation, cut from the graph
                state = p.step(state, actors(seen[t, n][None, None], eps[t, :, n:n + 1])[0])
                total = total + p.reward(p.observe(state))
            parts = torch.autograd.grad(-total.sum(), list(actors.parameters()))
            grads.append(torch.cat([g.flatten() for g in parts]))
        g = torch.stack(grads)
        assert torch.allclose(means[h - 1], g.mean(0), rtol=1e-3, atol=1e-5)
        assert stats["variance"][h - 1] == pytest.approx(float(g.var(0).mean()), rel=1e-3)
        assert stats["esnr"][h - 1] == pytest.approx(float(g.mean(0).square().sum() / g.var(0).sum()), rel=1e-3)
        assert stats["esnr_code"][h - 1] == pytest.approx(float((g.mean(0)**2 / (g.var(0) + 1e-9)).mean()), rel=1e-3)


def shac(**flags):
    args = pwm.Args(task="planar-hopper", true_plant=True, episodic=True, policy_batch=3, horizon=4, device="cpu",
                    compile=False, workers=1, **flags)
    return pwm.Trainer(pwm.fill_budget(args, torch.device("cpu"), 1, 1), ["planar-hopper"], torch.device("cpu"))


def test_windows_of_shac_go_on_where_the_last_ones_ended():
    one, seen, herd = shac(), [], envs.Herd("planar-hopper", 3, seed=1)
    obs, noise = herd.reset(), torch.randn(4, 1, 3, 3, generator=gen(5))
    for _ in range(2):
        for eps in noise:
            obs = herd.step(one.nets["actors"](one.wm.encode(torch.from_numpy(obs), None)[None], eps)[0].detach())[0]
            seen.append(obs)
        start, alive = one.windows.roll(noise)
        assert np.allclose(start[0], obs, atol=1e-5) and start.shape == (1, 3, 11) and alive is None
        scale = one.wm.scale  # of all that was seen, and used from now on
        assert np.allclose(scale.mean, np.concatenate(seen).mean(0), atol=1e-4)
        assert np.allclose(scale.var.sqrt(), np.concatenate(seen).std(0), atol=1e-3)
    assert one.windows.herd.t.tolist() == [8, 8, 8]
    z = one.wm.encode(start[0], None)
    assert torch.allclose(one.wm.decode(z), start[0], atol=1e-5) and not torch.allclose(z, start[0], atol=0.5)
    other, state = shac(seed=2), io.BytesIO()
    torch.save(one.state(), state)
    state.seek(0)
    other.load_state(torch.load(state, weights_only=True))
    assert torch.equal(one.windows.roll(noise)[0], other.windows.roll(noise)[0])
    with says("no 'windows'", "older version", "copy of the code"):
        other.load_state({k: v for k, v in one.state().items() if k != "windows"})
    old = one.state()
    del old["critics"]["offset"]
    with says("no 'critics.offset'", "older version"):
        other.load_state(old)


def test_bodies_do_what_imagination_does_and_tell_which_windows_ended():
    args = pwm.Args(task="hopper", policy_batch=16, horizon=6, device="cpu", compile=False, workers=1, episodic=True)
    trainer = pwm.Trainer(pwm.fill_budget(args, torch.device("cpu"), 1, 1), ["hopper"], torch.device("cpu"))
    wm, actors, herd, ended = trainer.wm, trainer.nets["actors"], envs.Herd("hopper", 16, seed=1), 0
    lasts = [x.nets["actors"].mu.weight[-1].abs().max() for x in (trainer, shac())]
    assert lasts[0] < 0.002 < 0.05 < lasts[1]  # begins by doing next to nothing; SHAC as its authors
    assert trainer.args.critic_lr == 1e-3 and trainer.args.policy_lr == 3e-4
    trainer.update_policies(None, 0.0)
    assert [trainer.opts[x].param_groups[0]["lr"] for x in ("actors", "critics")] == [3e-4, 1e-3]
    trainer.windows = pwm.Windows(trainer)
    obs, task = herd.reset(), torch.zeros(16, dtype=torch.long)
    lived = [[[obs[b]], [], [], []] for b in range(16)]  # obs, act, rew, term of the episode that every body is in
    played = [[] for _ in range(16)]
    for k in range(12):
        noise = torch.randn(6, 1, 16, 3, generator=gen(k))
        start, alive = trainer.windows.roll(noise)
        assert torch.equal(start[0], torch.from_numpy(obs))
        z, _, _ = pwm.imagine(wm, actors, start, noise, task)
        done = np.zeros(16, bool)
        for h in range(6):  # the actions of the imagined states, not of the observed ones
            act = actors(z[h], noise[h])[0].detach().numpy()
            obs, rew, terminated, _, last = herd.step(act)
            done |= terminated
            assert (alive[h, 0].numpy() == ~done).all()
            for b in range(16):
                for book, x in zip(lived[b], (last[b], act[b], rew[b], terminated[b])):
                    book.append(x)
                if terminated[b]:
                    played[b].append(lived[b])
                    lived[b] = [[obs[b]], [], [], []]
        ended += int(done.sum())
    assert ended > 8  # a policy that has learnt nothing falls
    stored, torn = sum(played, []), trainer.windows.pieces
    assert len(torn) == len(stored) and max(len(p[2]) for p in torn) < pwm.PIECE
    key = lambda p: np.asarray(p[0])[0].tolist()  # noqa: E731
    for mine, theirs in zip(sorted(torn, key=key), sorted(stored, key=key)):
        for x, y in zip(mine, theirs):
            assert np.allclose(x, np.asarray(y), atol=1e-5)


def test_long_episodes_are_stored_in_pieces(monkeypatch):
    monkeypatch.setattr(pwm, "PIECE", 4)
    args = pwm.Args(task="ant", policy_batch=3, horizon=5, device="cpu", compile=False, workers=1, episodic=True)
    trainer = pwm.Trainer(pwm.fill_budget(args, torch.device("cpu"), 1, 1), ["ant"], torch.device("cpu"))
    trainer.windows.roll(torch.randn(5, 1, 3, 8))
    assert [len(p[2]) for p in trainer.windows.pieces] == [4, 4, 4] and trainer.windows.book["t"].tolist() == [1, 1, 1]
    for b, (obs, *_, term) in enumerate(trainer.windows.pieces):  # the next piece begins where this one stopped
        assert np.array_equal(obs[-1], trainer.windows.book["obs"][b, 0]) and not term.any()
    rng = np.random.default_rng(0)
    whole = dict(obs=rng.normal(size=(11, 2)), act=rng.normal(size=(10, 1)), rew=np.arange(10), term=np.arange(10) == 9)
    parts = pwm.pieces(whole)
    assert [len(p[2]) for p in parts] == [4, 4, 2] and [p[3].any() for p in parts] == [False, False, True]
    assert np.array_equal(np.concatenate([p[0][:-1] for p in parts]), whole["obs"][:-1])
    assert np.array_equal(parts[2][0][-1], whole["obs"][-1]) and np.array_equal(parts[1][0][0], parts[0][0][-1])


@pytest.mark.parametrize("task", ["hopper", "InvertedPendulum-v5"])
def test_a_body_stopped_among_its_windows_and_resumed_ends_at_the_same_numbers(task, tmp_path, monkeypatch):
    tiny = {**TINY, "task": task, "wm_steps": 6, "policy_steps": 12, "seed_episodes": 1, "round_episodes": 1,
            "critic_passes": 1, "save_every": 0.0}
    ends = []
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        update, calls = pwm.update_policies, []

        def dies(*a, update=update, calls=calls):
            calls.append(1)
            if len(calls) == 10:  # in the middle of the second round
                raise KeyboardInterrupt
            return update(*a)
        if name == "stopped":
            with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
                m.setattr(pwm, "update_policies", dies)
                pwm.main(pwm.Args(**tiny))
            stored = Episodes.open(last_run(".") / "episodes")
            arrays = stored.arrays(task)
            stored.append(task, *([arrays[k][0, :n]] for k, n in (("obs", arrays["length"][0] + 1), *(
                (k, arrays["length"][0]) for k in ("act", "rew", "term")))))  # written, and no checkpoint after it
            pwm.main(pwm.Args(resume=str(last_run("."))))
        else:
            pwm.main(pwm.Args(**tiny))
        state = torch.load(last_run(".") / "checkpoint.pt", weights_only=True)
        rows = Episodes.open(last_run(".") / "episodes").arrays(task)
        ends.append((state, rows))
    (a, one), (b, two) = ends
    assert a["windows"]["steps"] == 12 * 4 * 8 and a["counts"] == b["counts"]
    rates = [g["lr"] for g in a["opts"]["model"]["param_groups"]]  # of step 3 of 3 in round 2 of 2
    assert rates == pytest.approx([0.3 * rates[1], 1e-3 / 2 * (0.03 + 2 * 0.97 / 3)])
    collected = sum(h["steps"] for h in a["history"] if "steps" in h)
    assert collected < one["length"].sum() <= collected + 12 * 4 * 8  # what the windows did is data
    for part in ("wm", "actors", "critics", "windows"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part]), part
    assert all(np.array_equal(one[k], two[k]) for k in one)


def test_the_scales_of_a_body_are_those_of_its_data(tmp_path):
    episodes = Episodes.create(tmp_path, {"hopper": (11, 3, 9)})
    rng = np.random.default_rng(0)
    for n in (9, 4):
        episodes.append("hopper", rng.normal(3, 2, (n + 1, 11)), rng.uniform(-1, 1, (n, 3)), rng.normal(5, 7, n),
                        np.arange(n) < 0)
    wm = pwm.WorldModel(11, [3], 2, 16, 16, 16, 0, episodic=True, activation="residual")
    arrays = episodes.arrays("hopper")
    pwm.set_scales(wm, episodes, "hopper")
    seen = np.concatenate([arrays["obs"][0, :9], arrays["obs"][1, :4]])
    assert np.allclose(wm.obs_mean, seen.mean(0), atol=1e-5) and np.allclose(wm.obs_std, seen.std(0), atol=1e-5)
    assert wm.rew_std == pytest.approx(np.concatenate([arrays["rew"][0], arrays["rew"][1, :4]]).std(), rel=1e-5)
    task, plain = torch.zeros(13, dtype=torch.long), copy.deepcopy(wm)
    plain.obs_mean.zero_(), plain.obs_std.fill_(1)
    x = torch.from_numpy(seen)
    assert torch.allclose(wm.encode(x, task), plain.encode((x - wm.obs_mean) / wm.obs_std, task), atol=1e-5)
    state = {k: v for k, v in wm.state_dict().items() if not k.startswith("obs_")}  # as in files of older versions
    torch.save(dict(wm=state, act_dims=[3], args=dict(activation="residual")), tmp_path / "wm.pt")
    assert torch.equal(pwm.load_world_model(tmp_path / "wm.pt").encode(x, task), plain.encode(x, task))


def test_policies_are_evaluated_on_the_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = pwm.main(pwm.Args(**{**TINY, "eval_every": 6, "policy_steps": 30}))  # rounds of 15 and 15 updates
    tests = [h for h in result["history"] if "evaluation" in h]
    assert [h["policy_updates"] for h in tests] == [6, 12, 15, 21, 27, 30]
    assert tests[-1]["evaluation"][TINY["task"]] == pytest.approx(result["table"][0]["ours"], abs=1e-3)


def test_a_window_that_ended_has_no_value_beyond():
    nets = episodic_world()
    obs, eps, task = torch.randn(1, 6, 3), torch.randn(5, 1, 6, 2), torch.zeros(6, dtype=torch.long)
    alive = torch.ones(5, 1, 6)
    alive[2:, 0, 4] = 0
    z, rew, _ = pwm.imagine(nets["wm"], nets["actors"], obs, eps, task)
    _, J, _, target, weight = pwm.actor_loss(*(nets[k] for k in ("wm", "actors", "critics", "stats")), obs, eps, task,
                                             0.9, 0.8, alive=alive)
    value = nets["critics"](z[-1]).amin(1)[0]
    returns = sum(0.9**h * rew[h, 0] for h in range(5)) + 0.9**5 * value
    returns[4] = sum(0.9**h * rew[h, 0, 4] for h in range(3))
    assert torch.allclose(J, returns.mean(), atol=1e-5)
    target, weight = target.view(5, 6), weight.view(5, 6)
    assert torch.allclose(target[2, 4], rew[2, 0, 4]) and weight[:, 4].tolist() == [1, 1, 1, 0, 0]
    assert (weight[:, :4] == 1).all()


def test_first_order_gradients_through_the_true_plant_improve_a_policy():
    p, args, g = envs.plant("double-pendulum"), pwm.Args(task="double-pendulum"), gen(1)
    torch.manual_seed(0)
    near = 0.2 * torch.randn(64, 4, generator=g)  # near upright it needs to learn to balance only
    policy = pwm.extract(pwm.TruePlant(p, "double-pendulum", 3.0), p.observe(near), 30, 8, g, args)
    with torch.no_grad():
        ours, none = (pwm.play_pendulum(p, act, near, 20)[2].sum(0).mean()
                      for act in (lambda o, t: policy(o[None])[0], lambda o, t: torch.zeros(64, 1)))
    assert ours > none + 1, (ours, none)


def test_verdict_on_gradients_follows_the_rule():
    def curve(at_16, at_50):
        return np.geomspace(at_16 ** (1 + 15 / 34) / at_50 ** (15 / 34), at_50, 50).tolist()
    flat = [1.0] * 50
    true = [dict(variance=curve(0.1, 50), esnr=[0.05] * 50)]
    good = {"true": true, "WM, H = 3": [dict(variance=curve(0.1, 90), esnr=[0.1] * 50)] * 3,
            "WM, H = 16": [dict(variance=curve(0.1, 5), esnr=flat)] * 3}
    assert all(pwm.pendulum_checks(good, 3).values()) and not all(pwm.pendulum_checks(good, 2).values())
    noisy = {**good, "WM, H = 16": [dict(variance=curve(0.1, 20), esnr=flat)] * 3}
    weak = {**good, "WM, H = 16": [dict(variance=curve(0.1, 5), esnr=[0.08] * 50)] * 3}
    tame = {**good, "true": [dict(variance=curve(1, 50), esnr=[0.05] * 50)]}
    assert [list(pwm.pendulum_checks(x, 3).values()).count(False) for x in (noisy, weak, tame)] == [1, 2, 1]


def test_double_pendulum_study_runs_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    result = pwm.main(pwm.Args(task="double-pendulum", fast=True, seeds=1, device="cpu"))
    assert result["verdict"] == "not reproduced" and "cosine to the true mean gradient" in capsys.readouterr().out
    models = result["gradients"]["random"]
    assert set(models) == {"true", "WM, H = 3", "WM, H = 16"} and len(models["true"][0]["esnr"]) == 50
    assert models["true"][0]["cosine"][30] == pytest.approx(1) and (last_run(tmp_path) / "figure3.png").exists()
    assert set(result["returns"]) == {"random", "SHAC, true plant", "PWM, WM, H = 3", "PWM, WM, H = 16"}


# -------------------------------------------------------------------------------- PWM's single tasks: episodes that end
def test_sequences_with_ends_use_every_step_of_short_episodes(tmp_path):
    eps = Episodes.create(tmp_path, {"a-b": (3, 2, 12)})
    lengths, ended = [12, 2, 1, 5], [False, True, True, False]
    for n, (t, term) in enumerate(zip(lengths, ended)):
        o, a, r, flags = episode("a-b", n, t, {"a-b": (3, 2, 12)})
        flags[-1] = term
        eps.append("a-b", o, a, r, flags)
    samplers = [eps.sampler(["a-b"], 4, ends=True, resident=x) for x in (True, False)]
    batch, again = (s.sequences(4000, gen(1)) for s in samplers)
    for x, y in zip(batch, again):
        assert torch.equal(x, y)
    obs, act, rew, term, live, task = batch
    n, t = (rew[0] // 1000).long(), (rew[0] % 1000).long()
    for i in range(4):
        starts = t[n == i]
        # as many as the episode is long: a hundred failures of 20 steps shall not hide a success of 1000
        assert set(starts.tolist()) == set(range(lengths[i])) and abs(len(starts) - 200 * lengths[i]) < 40 * lengths[i]
    step = t + torch.arange(4)[:, None]
    length = torch.tensor(lengths)[n]
    assert torch.equal(live, (step < length).float())
    assert torch.equal(term, ((step == length - 1) & torch.tensor(ended)[n]).float())
    where = torch.minimum(t + torch.arange(5)[:, None], length)
    assert torch.equal(obs[..., 0], 1000.0 * n + where)
    assert torch.equal(act[..., 0][live > 0], obs[:-1, :, 0][live > 0] + .5)
    firsts = samplers[0].starts(4000, gen(2))[0, :, 0]
    assert {int(x) for x in firsts} == {1000 * i + t for i in range(4) for t in range(lengths[i])}


def test_steps_of_several_tasks_with_ends_are_equally_likely(tmp_path):
    dims = {"a-b": (3, 2, 12), "c-d": (3, 2, 12)}
    eps = Episodes.create(tmp_path, dims)
    lengths = {"a-b": [12, 3, 1, 2], "c-d": [2, 8]}  # number 3 of a task is held out
    for task, all_of_it in lengths.items():
        for n, t in enumerate(all_of_it):
            eps.append(task, *episode(task, n, t, dims))
    sampler = eps.sampler(["a-b", "c-d"], 4, ends=True, held_out=0.25)
    _, _, rew, _, _, task = sampler.sequences(8000, gen(1))
    for k, count in enumerate(([12, 3, 1], [2, 8])):
        n = (rew[0][task == k].long() // 1000).bincount(minlength=len(count)) / (task == k).sum()
        assert torch.allclose(n, torch.tensor(count) / sum(count), atol=0.03)


def test_offset_of_the_critics_follows_the_targets():
    torch.manual_seed(0)
    critics, z = pwm.Critics(2, 16, widths=(8,)), torch.rand(2, 5, 16)
    plain = critics(z)
    assert not critics.offset.any()  # of no effect where it is not used
    target = torch.tensor([[250.0, 252.0], [-10.0, -12.0]])
    critics.follow(target)
    assert torch.allclose(critics(z), plain + torch.tensor([25.1, -1.1])[:, None, None], atol=1e-5)
    for _ in range(100):
        critics.follow(target)
    assert torch.allclose(critics(z) - plain, torch.tensor([251.0, -11.0])[:, None, None].expand(2, 3, 5), atol=0.01)
    for episodic in (True, False):  # tasks with episodes that end use it, the others do not
        nets = episodic_world()
        nets["wm"].requires_grad_(False).episodic = episodic
        opts = pwm.make_optimizers(nets)
        pwm.update_policies((pwm.actor_loss, pwm.critic_loss), nets, opts, torch.rand(1, 4, 3), torch.randn(2, 1, 4, 2),
                            torch.arange(8)[None], torch.zeros(4, dtype=torch.long), pwm.Args())
        assert bool(nets["critics"].offset.any()) == episodic


def episodic_world(seed=0):
    torch.manual_seed(seed)
    wm = pwm.WorldModel(3, [2], 2, 16, 16, 16, 0, episodic=True)
    for p in wm.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    wm.rew_std.fill_(2.0)
    nets = nn.ModuleDict(dict(wm=wm, actors=pwm.Actors(torch.ones(1, 2), 16, (8,)), critics=pwm.Critics(1, 16),
                              stats=pwm.RunningStats(1)))
    return nets


def test_episodic_world_model_loss_against_a_slow_reference():
    wm, H, B = episodic_world()["wm"], 4, 5
    obs, act, rew = torch.randn(H + 1, B, 3), torch.rand(H, B, 2), 4 * torch.randn(H, B)
    term, live = torch.zeros(H, B), torch.ones(H, B)
    term[1, 2], live[2:, 2], rew[0, 0] = 1, 0, 100.0
    task = torch.zeros(B, dtype=torch.long)
    loss, metrics, *_ = pwm.world_model_loss(wm, obs, act, rew, task, 0.9, term, live)
    want = dict(consistency=0, reward=0, end=0)
    for b in range(B):
        z = wm.encode(obs[0, b], task[b])
        for h in range(H):
            r = wm.reward(z, act[h, b], task[b])[0]
            z = wm.next(z, act[h, b], task[b])
            w = 0.9**h / (H * B) * float(live[h, b])
            p = wm.end(z, task[b]).sigmoid()
            want["consistency"] += w * (z - wm.encode(obs[h + 1, b], task[b])).square().mean()
            want["reward"] += w * (r - min(max(float(rew[h, b]) / 2, -5), 5)) ** 2
            want["end"] -= w * (p.log() if term[h, b] else (1 - p).log())
    for k, v in want.items():
        assert float(metrics[k]) == pytest.approx(v.item(), rel=1e-4), k
    total = 20 * want["consistency"] + 0.1 * want["reward"] + want["end"]
    assert loss.item() == pytest.approx(total.item(), rel=1e-4)


def test_imagined_returns_are_weighted_by_the_chance_to_go_on():
    nets, N, B, H, g, lam = episodic_world(), 1, 6, 5, 0.9, 0.8
    wm, actors, critics, stats = (nets[k] for k in ("wm", "actors", "critics", "stats"))
    obs, eps, task = torch.randn(N, B, 3), torch.randn(H, N, B, 2), torch.zeros(B, dtype=torch.long)
    z, rew, alive = pwm.imagine(wm, actors, obs, eps, task)
    assert alive.shape == (H, N, B) and 0 < alive.min() < alive.max() < 1
    v = torch.stack([critics(x).amin(1) for x in z])
    J, so_far = 0, 1
    for h in range(H):
        J, so_far = J + g**h * so_far * rew[h], so_far * alive[h]
    J = J + g**H * so_far * v[H]
    _, got, flat, target, weight = pwm.actor_loss(wm, actors, critics, stats, obs, eps, task, g, lam)
    assert torch.allclose(got, J.mean(1), atol=1e-5)
    reached = torch.cat([torch.ones(1, N, B), alive.cumprod(0)[:-1]])
    assert torch.allclose(weight.view(N, H, B).transpose(0, 1), reached)
    error = [(critics(flat[:, i:i + 1])[0, :, 0] - target[0, i]).square().mean() * weight[0, i] for i in range(H * B)]
    assert torch.allclose(pwm.critic_loss(critics, flat, target, weight), sum(error) / (H * B), rtol=1e-4)
    G = v[H]
    for h in reversed(range(H)):
        G = rew[h] + g * alive[h] * ((1 - lam) * v[h + 1] + lam * G)
        assert torch.allclose(target.view(N, H, B)[:, h], G, atol=1e-5)
    x = torch.rand(4, 7)
    assert torch.equal(pwm.lambda_return(x[:3], x, g, lam), pwm.lambda_return(x[:3], x, g, lam, torch.ones(3, 7)))


class Cliff(gymnasium.Env):
    """A point drifts to the right, is paid for going there, and ends beyond 0.5; at most 60 steps. Best is to stay."""

    observation_space = gymnasium.spaces.Box(-9, 9, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-0.4, 0.4, 1).astype(np.float32)
        return self.x.copy(), {}

    def step(self, action):
        self.x = np.clip(self.x + 0.15 * action + 0.05, -1, 1).astype(np.float32)
        return self.x.copy(), 1.0 + 0.5 * float(action[0]), bool(self.x[0] > 0.5), False, {}


gymnasium.register("Cliff-v0", entry_point=Cliff, max_episode_steps=60)


def test_a_policy_learns_not_to_end_the_episode(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {**TINY, "task": "test_all:Cliff-v0", "rounds": 3, "seed_episodes": 6, "round_episodes": 4,
                "wm_steps": 400, "wm_batch": 32, "policy_steps": 120, "policy_batch": 16, "horizon": 6,
                "wm_horizon": 4, "wm_lr": 1e-3, "eval_episodes": 4, "first_model": 0.6, "last_model": 0.2,
                "first_policy": 0.3}
    result = pwm.main(pwm.Args(**settings))
    table = result["table"][0]
    assert table["ours"] > 40 > 25 > table["random"], table  # 50 for staying; running right earns 1.5 for a few steps
    rounds = [h for h in result["history"] if "steps" in h]
    assert rounds[0]["length"] < 40 and 6 * 60 <= rounds[0]["steps"] < 12 * 60
    folder = last_run(tmp_path)
    wm = pwm.load_world_model(folder / "checkpoint.pt")
    assert wm.episodic and wm.rew_std < 1
    x = torch.tensor([[0.45], [-0.5]])
    task = torch.zeros(2, dtype=torch.long)
    ends = wm.end(wm.next(wm.encode(x, task), torch.ones(2, 1), task), task).sigmoid()
    assert ends[0] > 0.8 > 0.2 > ends[1]
    films = []  # of the better of the last and the kept policy
    monkeypatch.setattr(pwm, "choose_gl", lambda: None)
    monkeypatch.setattr(pwm, "record", lambda run, tasks, greedy, seed: films.append(greedy.keywords["best"]))
    again = pwm.main(pwm.Args(task=settings["task"], device="cpu", workers=1, eval_only=True, eval_episodes=4,
                              capture_video=True, checkpoint=str(folder / "checkpoint.pt")))
    assert films == [again["table"][0]["best round"] > again["table"][0]["ours"]]
    assert again["table"][0]["ours"] == pytest.approx(table["ours"], abs=8)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["where"]["best"] == max(h["return"][settings["task"]] for h in rounds if h["round"])
    assert not torch.equal(state["best"]["actors.log_std"], state["actors"]["log_std"])  # kept before the last updates
    assert again["table"][0]["best round"] == pytest.approx(table["best round"], abs=8) and table["best round"] > 25
    given = pwm.main(pwm.Args(**{**settings, "data_dir": str(folder / "episodes"), "horizon": 12,
                             "policy_steps": 60}))
    assert given["table"][0]["ours"] > 40  # on given data no environments tell the ends: the head does


def test_episodes_shorter_than_the_horizon_and_a_body_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny = {**TINY, "wm_steps": 8, "policy_steps": 4, "seed_episodes": 2, "horizon": 16, "wm_horizon": 16}
    walk = pwm.main(pwm.Args(**{**tiny, "task": WALK, "round_episodes": 1, "workers": 1}))
    assert np.isfinite(walk["table"][0]["ours"]) and walk["args"]["episodic"]
    assert "windows of 16 steps end" in (out := capsys.readouterr().out) and re.search(r"try --horizon [1-6]\n", out)
    stored = Episodes.open(last_run(tmp_path) / "episodes").arrays(WALK)
    assert stored["length"].max() <= 12 and len(stored["length"]) >= 2 * 64
    body = pwm.main(pwm.Args(**{**tiny, "task": "hopper", "seed_episodes": 1, "round_episodes": 1}))
    assert "not comparable: PPO 4742, SAC 4126" in capsys.readouterr().out
    rounds = [h for h in body["history"] if "length" in h]
    assert body["table"][0]["ours"] > -1000 and rounds[0]["length"] < 120 and rounds[0]["window_steps"] == 0
    assert rounds[-1]["window_steps"] % (16 * body["args"]["policy_batch"]) == 0 < rounds[-1]["window_steps"]
    plain = pwm.main(pwm.Args(**{**tiny, "wm_horizon": 3, "horizon": 4, "episodic": False}))
    assert not plain["args"]["episodic"] and "end_head.1.weight" not in torch.load(
        last_run(tmp_path) / "checkpoint.pt", weights_only=True)["wm"]


@pytest.mark.parametrize("settings, words", [
    (dict(task="ball-wall", seeds=1), "--seeds 1.*at least 2"), (dict(task="double-pendulum", seeds=0), "--seeds 0"),
    (dict(task="ball-wall", checkpoint="x.pt"), "study of minutes"),
    (dict(task="cup-catch", seeds=3), "--seeds 3 .*not of --task cup-catch"),
    (dict(task="cup-catch,hopper", episodic=True), "one task.*--no-episodic"),
    (dict(task="cup-catch", ablation="activatoin"), "activatoin: expected all, stiffness, latency or some of activat"),
    (dict(ablation="shared", seeds=1), "--seeds 1: expected 2"), (dict(ablation="all", checkpoint="x.pt"), "its own"),
    (dict(task="cup-catch", shared_policy=True), "two or more"),
    (dict(task="cup-catch", activation="relu", checkpoint="x.pt"), "--activation relu.*whose file says it"),
    (dict(task="hopper", eval_every=-1), "--eval-every -1: expected"),
    (dict(task="hopper", true_plant=True), "hopper has none: type --task planar-hopper or stiff-hopper"),
    (dict(task="hopper", episodic=True, planner_episodes=1), "--planner-episodes.*--no-episodic"),
    (dict(task="hoper"), "nearest: .*hopper")])
def test_bad_flags_of_studies_and_bodies_get_one_sentence(settings, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=words) as error:
        pwm.main(pwm.Args(device="cpu", **settings))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------- PWM's ablations
def test_ablations_train_variants_on_the_same_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = dict(task=f"{TINY['task']},{WALK}", fast=True, seeds=2, device="cpu", workers=1, horizon=4,
                    activation="relu")
    first = pwm.main(pwm.Args(ablation="shared,prior", eval_every=2, **settings))
    names = list(first["cells"])
    assert names == ["base", "one policy for all tasks", "TD-MPC2 without planning"]
    assert [r["variant"] for r in first["rows"]] == [*names[:2], "PWM on TD-MPC2's model", names[2]]
    base, shared, tdmpc2 = (first["cells"][k] for k in names)
    mean = {c: np.array([np.mean(list(x["returns"][c].values())) for x in tdmpc2]) for c in ("ours", "prior")}
    assert first["rows"][2]["returns"] == pytest.approx(mean["ours"])
    assert first["rows"][3]["difference"] == pytest.approx((mean["prior"] - mean["ours"]).mean())
    assert [c["args"]["seed"] for c in base] == [1, 2] and base[0]["args"]["data_dir"] == shared[1]["args"]["data_dir"]
    assert base[0]["errors"] and shared[0]["args"]["shared_policy"] and base[0]["args"]["checkpoint"] is None
    assert shared[1]["args"]["checkpoint"] == base[1]["folder"] + "/checkpoint.pt" and not shared[1]["errors"]
    assert shared[1]["args"]["activation"] == "relu"  # the file says so: a checkpoint made from it must say it again
    curves = [c["curve"] for k in names for c in first["cells"][k]]
    assert [[x for x, _ in curve] for curve in curves] == [[2, 3]] * 6  # of three policy updates
    assert curves[0][-1][1] == pytest.approx(np.mean(list(base[0]["returns"]["ours"].values())), abs=1e-3)
    assert next((tmp_path / "runs").glob("shared*/efficiency.png")).stat().st_size > 5000
    assert first["rows"][0]["ci95"] == [0, 0] and all(r["verdict"] in ("", "undecided") for r in first["rows"])
    out, folder = capsys.readouterr().out, str(tmp_path / "runs" / Path(first["cells"]["base"][0]["folder"]).parts[1])
    assert "minus base, paired" in out and (tmp_path / "runs").is_dir()
    (Path(folder) / "cells" / "base-2.json").unlink()  # as if it had been killed there
    again = pwm.main(pwm.Args(resume=folder))
    assert "base-1" not in capsys.readouterr().out
    assert again["cells"]["base"][1]["returns"]["ours"] == base[1]["returns"]["ours"]


def test_claims_are_judged_by_paired_differences():
    def cells(*returns):
        return [dict(returns=dict(ours={"a": x, "b": x}, prior={"a": 0, "b": 0}), errors={}) for x in returns]
    base = cells(100, 500, 900)
    row = functools.partial(pwm.ablation_row, base=base, tasks=["a", "b"])
    assert row("batch", "v", cells(90, 480, 890), expected=-1)["verdict"] == "holds"
    assert row("batch", "v", cells(110, 520, 910), expected=-1)["verdict"] == "fails"
    assert row("batch", "v", cells(110, 480, 910), expected=-1)["verdict"] == "undecided"
    assert row("batch", "v", cells(90, 480), expected=-1)["verdict"] == "undecided"  # two seeds decide nothing
    assert row("prior", "v", cells(999, 999, 999), expected=-1)["difference"] == -500


def test_shac_and_the_verdict_on_stiffness(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, cells = pwm.run_cell, []

    def some(args, folder, name):  # one real training, the others made up
        cells.append(name)
        real = run(args, folder, name) if name == "SHAC-stiff-hopper-1" else None
        return real or dict(returns=dict(ours={args.task: 500.0 + 9 * args.seed}), args=dataclasses.asdict(args))
    monkeypatch.setattr(pwm, "run_cell", some)
    result = pwm.main(pwm.Args(ablation="stiffness", fast=True, seeds=3, device="cpu", workers=1))
    assert len(cells) == 12 and "three seeds or more: 3" in capsys.readouterr().out
    cell = result["rows"]["SHAC, stiff-hopper"]["cells"][0]
    state = torch.load(Path(cell["folder"]) / "checkpoint.pt", weights_only=True)
    assert cell["args"]["true_plant"] and "model" not in state["opts"] and state["where"]["policy_updates"] == 2
    logs = next((tmp_path / "runs").glob("stiffness*/cells/SHAC-stiff-hopper-1.log")).read_text()
    assert "SHAC: gradients through the true plant" in logs and "0 model updates" in logs
    drop = 1 - (cell["returns"]["ours"]["stiff-hopper"] + 518 + 527) / (509 + 518 + 527)
    assert result["verdict"] == ("reproduced" if drop > 0.2 else "not reproduced")
    assert not result["rows"]["PWM, planar-hopper"]["cells"][0]["args"]["true_plant"]


def test_latency_of_policy_and_planner(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    result = pwm.main(pwm.Args(ablation="latency", fast=True, device="cpu"))
    ms = result["ms_per_action"][1]
    assert 0 < ms["ours"] < ms["planner"] and "1M: policy" in capsys.readouterr().out
