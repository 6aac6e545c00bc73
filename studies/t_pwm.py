import copy
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

import envs
import pwm
from studies import ablations, ball_wall, curves, double_pendulum, latency, shac, stiffness, tdmpc2
from studies.plants import plant


def pgen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def agent_of(cls, task, **flags):
    """An agent of a study for tasks, on the CPU."""
    tasks, cpu = task.split(","), torch.device("cpu")
    args = pwm.Args(task=task, device="cpu", compile=False, workers=1, **flags)
    return cls(pwm.fill_args(args, cpu, tasks), tasks, cpu)


def last_run():
    return max(Path("runs").iterdir(), key=lambda p: p.stat().st_mtime)


def tiny_model(n=3, seed=0):
    torch.manual_seed(seed)
    wm = pwm.WorldModel(7, range(1, n + 1), 2, 16, 24, 16, 4 if n > 1 else 0)
    nn.init.normal_(wm.reward_head[-1].weight, std=0.3)
    return wm


def inputs(n=3, B=6, H=5):
    g = pgen()
    return (torch.randn(n, B, 7, generator=g), torch.randn(H, n, B, 3, generator=g),
            torch.arange(n).repeat_interleave(B))


# -------------------------------------------------------------------------------- TD-MPC2 baseline
@pytest.mark.parametrize("size, mt80, total", [
    (1, False, 1_426_427), (5, False, 5_241_066), (19, False, 16_031_210), (48, False, 48_242_410),
    (317, False, 317_316_889), (48, True, 48_791_146)])
def test_tdmpc2_parameter_counts_are_the_published_ones(size, mt80, total):
    tasks = envs.MT80 if mt80 else envs.MT30
    with torch.device("meta"):
        dims = pwm.model_dims(size, len(tasks), mt80)
        wm = pwm.WorldModel(39 if mt80 else 24, [6] * len(tasks), **dims)
        heads = tdmpc2.Heads(wm, pwm.SIZES[size][2], pwm.SIZES[size][4])
    parts = wm, heads.pi, heads.q
    assert sum(p.numel() for part in parts for p in part.parameters()) == total


def test_tdmpc2_q_begins_at_zero_with_its_own_initialisation():
    wm = pwm.WorldModel(24, [6] * 30, **pwm.model_dims(5, 30))
    heads, task = tdmpc2.Heads(wm, 512, 5), torch.arange(9)
    assert abs(heads.q.weight[1].std() - 0.02) < 5e-4  # tdmpc2#72: not to be skipped
    z, pair = wm.encode(torch.randn(9, 24), task), torch.tensor([0, 3])
    q = heads.q_value(heads.q, z, torch.rand(9, 6), task, pair, torch.amin)
    assert torch.allclose(q, torch.zeros(9), atol=1e-4)


def test_planner_finds_the_best_action_and_respects_masks():
    wm, task = tiny_model(2), torch.arange(2)
    heads = tdmpc2.Heads(wm, 24, 5).eval()

    def reward(z, a, task):  # best first action: 0.6
        return 50 * pwm.two_hot(400 - 400 * (a[..., 0] - 0.6).square())
    wm.reward, z = reward, wm.encode(torch.randn(2, 7), task)

    def draw():
        return tdmpc2.plan(wm, heads, z, task, torch.zeros(2, 3, 2), torch.full((2,), 0.99), pgen())
    a, mean = draw()
    assert ((a[:, 0] - 0.6).abs() < 0.2).all() and a.abs().max() <= 1
    assert a[0, 1] == 0 and mean.shape == (2, 3, 2)
    assert torch.equal(a, draw()[0])


def test_tdmpc2_value_and_prior_learn():
    agent = agent_of(tdmpc2.Agent, "cup-catch,walker-walk", model_size=1)
    g, opt = pgen(), agent.opt["model"]
    rew = torch.ones(4, 32)
    batch = pwm.Batch(torch.randn(5, 32, 24, generator=g), torch.rand(4, 32, 6, generator=g), rew,
                      0 * rew, rew, torch.randint(2, (32,), generator=g))
    before = copy.deepcopy(agent.heads.state_dict())
    for _ in range(150):
        pwm.set_rates(opt, 3e-4)
        loss, metrics, z = agent.functions.world_model_loss(batch, 0.99)
        pwm.descend(loss, opt, 20.0)
        agent.after_model_step(z, batch, metrics)
    assert all((v != before[k]).any() for k, v in agent.heads.state_dict().items() if k != "scale")
    heads, wm = agent.heads.eval(), agent.wm
    z, pair = wm.encode(batch.obs[0], batch.task), torch.tensor([0, 1])
    q = heads.q_value(heads.q, z, batch.act[0], batch.task, pair, torch.mean)
    assert metrics["value"] < 3 and q.mean() > 0.5  # a reward of 1 everywhere: values rise from 0


def test_published_q_layouts_load(tmp_path):
    wm = pwm.WorldModel(24, [6] * 30, **pwm.model_dims(1, 30))
    heads, tensors = tdmpc2.Heads(wm, 384, 2), []
    nn.init.normal_(heads.q.weight[-1])
    for k in range(3):
        tensors += [heads.q.weight[k].transpose(1, 2), heads.q.bias[k][:, 0]]
        tensors += [heads.q.gain[k][:, 0], heads.q.shift[k][:, 0]] if k < 2 else []
    names = [f"{k}.{f}" for k in range(3) for f in tdmpc2.FIELDS][:10]
    pi = {f"_pi.{k}": v for k, v in heads.pi.state_dict().items()}
    z, a, task = torch.rand(4, 128), torch.rand(4, 6), torch.arange(4)
    for i, keys in enumerate((range(10), names)):
        q = {f"_Qs.params.{k}": x.detach().clone() for k, x in zip(keys, tensors)}
        torch.save({"model": pi | q}, tmp_path / f"{i}.pt")
        got = tdmpc2.load_tdmpc2(wm, tmp_path / f"{i}.pt").eval()
        mine = heads.eval().q_logits(heads.q, z, a, task)
        assert torch.equal(got.q_logits(got.q, z, a, task), mine)
        assert torch.equal(got.policy(z, task, a)[0], heads.policy(z, task, a)[0])
    torch.save({"model": {}}, tmp_path / "none.pt")
    with pytest.raises(SystemExit, match="no policy prior and Q functions"):
        tdmpc2.load_tdmpc2(wm, tmp_path / "none.pt")


def test_planner_study_runs_and_its_checkpoint_serves_again(folder):
    result = tdmpc2.main(tdmpc2.Args(fast=True, workers=1, device="cpu"))
    assert result["verdict"] in ("reproduced", "not reproduced")
    assert len(result["episodes"]["planner"]["cup-catch"]) == 1
    assert np.isfinite(result["episodes"]["prior"]["cup-catch"]).all()
    file = last_run() / "checkpoint.pt"
    heads = tdmpc2.load_tdmpc2(pwm.load_world_model(file), file)
    assert len(heads.q.weight[0]) == 2
    with pytest.raises(SystemExit, match="--planner-episodes 0"):
        tdmpc2.main(tdmpc2.Args(device="cpu", workers=1, planner_episodes=0))


# --------------------------------------------------------------------------------------- ablations
def test_the_td_objective_is_the_mean_lambda_return():
    wm, (obs, noise, task) = tiny_model(), inputs()
    actors, critics = pwm.Actors(wm.act_mask, 16), pwm.Critics(3, 16)
    z, rew, alive = pwm.imagine(wm, actors, obs, noise, task)
    G, want = critics(z[-1]).amin(1), 0
    for h in reversed(range(5)):
        G = rew[h] + 0.99 * (0.05 * critics(z[h + 1]).amin(1) + 0.95 * G)
        want = want + G / 5
    J, target, _ = ablations.td_returns(critics, z, rew, alive, 0.99, 0.95)
    assert torch.allclose(J, want, atol=1e-5) and torch.allclose(target[0], G, atol=1e-5)
    plain = pwm.imagined_returns(critics, z, rew, alive, 0.99, 0.95)[0]
    assert not torch.allclose(plain, J, atol=1e-3)


def test_one_policy_for_all_tasks_sees_which_task_it_is():
    wm, rows = tiny_model(), torch.tensor([2, 0, 1])
    nn.init.normal_(wm.task_emb.weight)
    actor, critics = ablations.SharedActor(wm, rows), ablations.SharedCritics(wm, rows)
    z, eps = torch.rand(3, 6, 16), torch.randn(3, 6, 3)
    a, v = actor(z, eps), critics(z)
    assert a.shape == (3, 6, 3) and v.shape == (3, 3, 6)
    for k, row in enumerate(rows):  # one network on [z; e], one task at a time
        x = torch.cat([z[k], wm.task_emb.weight[row].expand(6, -1)], -1)[None]
        u = actor.mu(x)[0] + actor.log_std[0].exp() * eps[k]
        assert torch.allclose(a[k], u.tanh() * wm.act_mask[row], atol=1e-6)
        assert torch.allclose(v[k], critics.v(x.expand(3, -1, -1))[..., 0], atol=1e-5)
    assert len(actor.log_std) == 1 and critics.n == 1
    assert not [k for k in actor.state_dict() if "emb" in k]


def test_ablations_train_variants_on_the_same_data(folder, capsys, monkeypatch):
    tasks = "cup-catch,pendulum-spin"
    monkeypatch.setattr(ablations, "FAST", dict(ablations.FAST, seed_episodes=2, round_episodes=1))
    args = ablations.Args(task=tasks, fast=True, seeds=2, device="cpu", workers=1, eval_every=2,
                          eval_episodes=1, only="shared,prior,batch")
    first = ablations.main(args)
    assert [r["variant"] for r in first["rows"]] == [
        "base", "one policy for all tasks", "PWM on TD-MPC2's model", "TD-MPC2 without planning",
        "batch of 64, equal time", "batch of 256, equal time"]
    cells = first["cells"]
    base, shared, prior = ([cells[f"{name}-{s}"] for s in (1, 2)] for name in (
        "base", "one policy for all tasks", "TD-MPC2 without planning"))
    mean = {c: np.array([np.mean(list(x["returns"][c].values())) for x in prior])
            for c in ("ours", "prior")}
    assert first["rows"][2]["returns"] == pytest.approx(mean["ours"])
    gap = (mean["prior"] - mean["ours"]).mean()
    assert first["rows"][3]["difference"] == pytest.approx(gap)
    assert [c["args"]["seed"] for c in base] == [1, 2]
    assert base[0]["args"]["data_dir"] == shared[1]["args"]["data_dir"]
    assert base[0]["errors"] and not shared[1]["errors"] and base[0]["args"]["checkpoint"] is None
    assert shared[1]["args"]["checkpoint"] == base[1]["folder"] + "/checkpoint.pt"
    assert [x for x, _ in base[0]["curve"]] == [2, 3]  # of three policy updates
    assert base[0]["curve"][-1][1] == pytest.approx(
        np.mean(list(base[0]["returns"]["ours"].values())), abs=1e-3)
    run = last_run()
    assert (run / "efficiency.png").stat().st_size > 5000
    assert first["rows"][0]["ci95"] == [0, 0]
    assert all(r["verdict"] in ("", "undecided") for r in first["rows"])
    (run / "cells" / "base-2.json").unlink()  # as if it had been killed there
    capsys.readouterr()
    again = ablations.main(ablations.Args(resume=str(run)))
    assert "base-1:" not in capsys.readouterr().out
    assert again["cells"]["base-2"]["returns"]["ours"] == base[1]["returns"]["ours"]
    with pytest.raises(SystemExit, match="--only activatoin: expected all or some of activation"):
        ablations.main(ablations.Args(only="activatoin"))


def test_ablation_activations_are_of_the_models():
    for kind in ("mish", "relu"):
        made = agent_of(ablations.AGENTS[kind], "cup-catch", model_size=1)
        assert made.wm.activation == kind


def test_claims_are_judged_by_paired_differences():
    def cells(*returns):
        return [dict(returns=dict(ours={"a": x, "b": x}, prior={"a": 0, "b": 0}), errors={})
                for x in returns]
    row = functools.partial(ablations.row, base=cells(100, 500, 900), tasks=["a", "b"])
    assert row("batch", "v", cells(90, 480, 890), expected=-1)["verdict"] == "holds"
    assert row("batch", "v", cells(110, 520, 910), expected=-1)["verdict"] == "fails"
    assert row("batch", "v", cells(110, 480, 910), expected=-1)["verdict"] == "undecided"
    assert row("batch", "v", cells(90, 480), expected=-1)["verdict"] == "undecided"  # two seeds
    assert row("prior", "v", cells(999, 999, 999), expected=-1)["difference"] == -500


# ----------------------------------------------------------------------------------------- Sec. 3
def test_toy_networks_start_alike_and_learn_apart():
    acts = torch.relu, pwm.simnorm
    nets = [ball_wall.fit_landscape(act, lambda x: x.sin(), 3, 1, seed=5)[0] for act in acts]
    torch.manual_seed(5)
    start = ball_wall.ToyNet(3, torch.relu)
    assert not torch.equal(nets[0].weight[0], start.weight[0])
    assert not torch.equal(start.weight[1][0], start.weight[1][1])
    x = torch.linspace(-3, 3, 7)

    def groups(h):
        return h.unflatten(-1, (4, 8)).softmax(-1).flatten(-2)
    for net, act in zip(nets, (torch.relu, groups)):
        h = x[:, None]
        for i in range(3):
            h = h @ net.weight[i][1] + net.bias[i][1]
            h = act(h) if i < 2 else h
        assert torch.allclose(net(x.expand(3, -1))[1], h[:, 0], atol=1e-5)
    alone = ball_wall.fit_landscape(torch.relu, lambda x: x.sin(), 2, 6, seed=5)[1]
    assert alone.shape == (6, 2) and (alone[-1] < 0.8 * alone[0]).all()


def test_descent_ends_in_the_minimum_and_stays_in_range():
    theta = ball_wall.descend(lambda t: (t - 0.5) ** 2, 2)
    assert torch.allclose(theta, torch.tensor([0.5, 0.5]), atol=1e-3)
    assert torch.allclose(ball_wall.descend(lambda t: -t, 1), torch.tensor([torch.pi]))


def test_ball_wall_study_runs_and_judges(folder, capsys):
    result = ball_wall.main(ball_wall.Args(fast=True, seeds=3, device="cpu"))
    assert result["verdict"] == "not reproduced" and len(result["table"]) == 9
    assert "NO " in capsys.readouterr().out
    assert {"figure2.png", "results.json", "args.json"} <= {p.name for p in last_run().iterdir()}
    saved = json.loads((last_run() / "results.json").read_text())
    gap, angle = (saved["table"]["SimNorm"][k] for k in ("gap", "theta"))
    cost = plant("ball-wall").cost(torch.tensor(angle))
    assert len(saved["table"]["ReLU"]["gap"]) == 3 and np.allclose(gap, cost + 21.8505, atol=0.01)
    good = dict(rmse=[9.0] * 20, gap=[1.0] * 20), dict(rmse=[4.0] * 20, gap=[20.0] * 20)
    assert all(ball_wall.verdict(good[1], good[0]).values())
    assert not any(list(ball_wall.verdict(good[0], good[1]).values()))
    with pytest.raises(SystemExit, match="--seeds 1 .*at least 2"):
        ball_wall.main(ball_wall.Args(seeds=1))


def test_the_true_plant_is_a_world_model():
    p, task, a = plant("double-pendulum"), torch.zeros(5, dtype=torch.long), torch.rand(5, 1)
    wm, state = shac.TruePlant(p, double_pendulum.TASK, rew_std=2.0), p.reset(5, pgen())
    z, after = wm.encode(p.observe(state), task), p.step(state, a)
    assert torch.allclose(wm.next(z, a, task), p.observe(after), atol=1e-5)
    rew = wm.reward_value(wm.reward(z, a, task))
    assert torch.allclose(rew, p.reward(p.observe(after)) / 2, atol=1e-4)
    actors, noise = pwm.Actors(torch.ones(1, 1), 6, (8,)), torch.randn(3, 1, 5, 1)
    zs, rew, alive = pwm.imagine(wm, actors, z[None], noise, task)
    assert zs.shape == (4, 1, 5, 6) and rew.shape == (3, 1, 5) and (alive == 1).all()

    def act(o, t):
        return actors(o[None], noise[t])[0]
    obs, acts, real = double_pendulum.play_pendulum(p, act, state, 3)
    assert torch.allclose(zs[:, 0], obs, atol=1e-4)
    assert torch.allclose(rew[:, 0], real / 2, atol=1e-4)


def test_gradient_statistics_against_plain_autograd():
    p, N, H = plant("double-pendulum"), 4, 5
    wm, actors = shac.TruePlant(p, double_pendulum.TASK), pwm.Actors(torch.ones(1, 1), 6, (8,))
    start, eps = p.reset(N, pgen(3)), torch.randn(H, 1, N, 1, generator=pgen(4))

    def act(o, t):
        return actors(o[None], eps[t])[0]
    with torch.no_grad():
        seen, acts, _ = double_pendulum.play_pendulum(p, act, start, H)
    jac = double_pendulum.policy_jacobian(actors, seen[:-1].flatten(0, 1), eps[:, 0].flatten(0, 1))
    weights = double_pendulum.action_gradients(wm, seen[0], acts)
    stats, means = double_pendulum.gradient_statistics(weights, jac.view(H, N, -1))
    for h in (1, 3, 5):
        grads = []
        for n in range(N):
            state, total = start[n:n + 1], 0
            for t in range(h):  # the policy sees the recorded observation, cut from the graph
                state = p.step(state, actors(seen[t, n][None, None], eps[t, :, n:n + 1])[0])
                total = total + p.reward(p.observe(state))
            parts = torch.autograd.grad(-total.sum(), list(actors.parameters()))
            grads.append(torch.cat([g.flatten() for g in parts]))
        mean, var = torch.stack(grads).mean(0), torch.stack(grads).var(0)
        want = dict(variance=var.mean(), esnr=mean.square().sum() / var.sum(),
                    esnr_code=(mean**2 / (var + 1e-9)).mean())
        assert torch.allclose(means[h - 1], mean, rtol=1e-3, atol=1e-5)
        for k, x in want.items():
            assert stats[k][h - 1] == pytest.approx(float(x), rel=1e-3)


def test_first_order_gradients_through_the_true_plant_improve_a_policy():
    p, g = plant("double-pendulum"), pgen(1)
    torch.manual_seed(0)
    near = 0.2 * torch.randn(64, 4, generator=g)  # near upright it needs to learn to balance only
    wm = shac.TruePlant(p, double_pendulum.TASK, 3.0)
    policy = double_pendulum.extract(wm, p.observe(near), 30, 8, g)
    with torch.no_grad():
        acts = (lambda o, t: policy(o[None])[0]), (lambda o, t: torch.zeros(64, 1))
        ours, none = (double_pendulum.play_pendulum(p, a, near, 20)[2].sum(0).mean() for a in acts)
    assert ours > none + 1, (ours, none)


def test_verdict_on_gradients_follows_the_rule():
    def curve(at_16, at_50):
        start = at_16 ** (1 + 15 / 34) / at_50 ** (15 / 34)
        return np.geomspace(start, at_50, 50).tolist()

    def wrong(**change):
        return list(double_pendulum.checks_of({**good, **change}, 3).values()).count(False)
    flat, long = [1.0] * 50, "WM, H = 16"
    good = {"true": [dict(variance=curve(0.1, 50), esnr=[0.05] * 50)],
            "WM, H = 3": [dict(variance=curve(0.1, 90), esnr=[0.1] * 50)] * 3,
            long: [dict(variance=curve(0.1, 5), esnr=flat)] * 3}
    assert wrong() == 0 and not all(double_pendulum.checks_of(good, 2).values())
    assert wrong(**{long: [dict(variance=curve(0.1, 20), esnr=flat)] * 3}) == 1
    assert wrong(**{long: [dict(variance=curve(0.1, 5), esnr=[0.08] * 50)] * 3}) == 2
    assert wrong(true=[dict(variance=curve(1, 50), esnr=[0.05] * 50)]) == 1


def test_double_pendulum_study_runs_end_to_end(folder, capsys):
    result = double_pendulum.main(double_pendulum.Args(fast=True, seeds=1, device="cpu"))
    assert result["verdict"] == "not reproduced"
    assert "cosine to the true mean gradient" in capsys.readouterr().out
    models = result["gradients"]["random"]
    assert set(models) == {"true", "WM, H = 3", "WM, H = 16"}
    assert len(models["true"][0]["esnr"]) == 50 and (last_run() / "figure3.png").exists()
    assert models["true"][0]["cosine"][30] == pytest.approx(1)
    assert set(result["returns"]) == {"random", "SHAC, true plant", "PWM, WM, H = 3",
                                      "PWM, WM, H = 16"}


# ------------------------------------------------------------------------------- SHAC and bodies
HOPPER = "studies.plants:planar-hopper"


def shac_agent(seed=1):
    flags = dict(shac.BUDGET, policy_batch=3, horizon=4, ends=True, wm_steps=0, seed=seed)
    agent = agent_of(shac.Agent, HOPPER, **flags)
    agent.beside = agent.Beside(agent.args, HOPPER, agent.facts[0], None)
    return agent


def test_windows_of_shac_go_on_where_the_last_ones_ended():
    one, seen, herd = shac_agent(), [], envs.beside(HOPPER, 3, 1, 1)
    obs, noise = herd.reset(), torch.randn(4, 1, 3, 3, generator=pgen(5))
    for _ in range(2):
        for eps in noise:
            z = one.wm.encode(torch.from_numpy(obs), None)[None]
            obs = herd.step(one.actors(z, eps)[0].detach().numpy())[0]
            seen.append(obs)
        start, alive = one.starts(None, noise)
        assert np.allclose(start[0], obs, atol=1e-5) and start.shape == (1, 3, 11) and alive is None
        scale, every = one.wm.scale, np.concatenate(seen)  # of all seen, and used from now on
        assert np.allclose(scale.mean, every.mean(0), atol=1e-4)
        assert np.allclose(scale.var.sqrt(), every.std(0), atol=1e-3)
    z = one.wm.encode(start[0], None)
    assert torch.allclose(one.wm.decode(z), start[0], atol=1e-5)
    assert not torch.allclose(z, start[0], atol=0.5)
    other = shac_agent(seed=2)
    for name in ("nets", "beside"):
        getattr(other, name).load_state_dict(getattr(one, name).state_dict())
    assert torch.equal(one.starts(None, noise)[0], other.starts(None, noise)[0])


def test_shac_and_the_verdict_on_stiffness(folder, capsys, monkeypatch):
    real, made = stiffness.work, []

    def some(name, cell, where):  # one real training of each method, the others made up
        made.append(name)
        if cell["task"] == "stiff-hopper" and cell["seed"] == 1:
            return real(name, cell, where)
        return dict(cell, returns=[500.0 + 9 * cell["seed"]], args={})
    monkeypatch.setattr(stiffness, "work", some)
    result = stiffness.main(stiffness.Args(fast=True, seeds=3, device="cpu", workers=1))
    assert len(made) == 12 and "three seeds or more: 3" in capsys.readouterr().out
    cell = result["cells"]["SHAC-stiff-hopper-1"]
    inside = last_run() / "cells" / "SHAC-stiff-hopper-1"
    state = torch.load(inside / "checkpoint.pt", weights_only=True)
    assert "opt_model" not in state and state["_run"]["done"]["policy"] == 2
    assert "0 model updates" in (inside / "log.txt").read_text() and cell["args"]["wm_steps"] == 0
    drop = 1 - (np.mean(cell["returns"]) + 518 + 527) / (509 + 518 + 527)
    assert result["rows"][0]["drop"] == pytest.approx(drop)
    assert (result["verdict"] == "reproduced") == (
        drop > 0.2 and result["rows"][1]["drop"] < 0.1)
    with pytest.raises(SystemExit, match="gradients through a plant"):
        shac.main(shac.Args(task="double-pendulum", device="cpu"))


def test_bodies_do_what_imagination_does_and_tell_which_windows_ended():
    task = "studies.bodies:hopper"
    agent = agent_of(pwm.Agent, task, policy_batch=16)
    assert agent.args.horizon == 6 and agent.args.policy_lr == 3e-4 and agent.args.critic_lr == 1e-3
    lasts = [x.actors.mu.weight[-1].abs().max() for x in (agent, shac_agent())]
    assert lasts[0] < 0.002 < 0.05 < lasts[1]  # begins by doing next to nothing; SHAC as published
    agent.beside = agent.Beside(agent.args, task, agent.facts[0], None)
    herd = envs.beside(task, 16, 1, 1)
    obs, row, ended = herd.reset(), torch.zeros(16, dtype=torch.long), 0
    lived, played = [[[obs[b]], [], [], []] for b in range(16)], []  # obs, act, rew, term of each
    for k in range(12):
        noise = torch.randn(6, 1, 16, 3, generator=pgen(k))
        start, alive = agent.starts(None, noise)
        assert torch.equal(start[0], torch.from_numpy(obs))
        z, _, told = pwm.imagine(agent.wm, agent.actors, start, noise, row, alive)
        done = np.zeros(16, bool)
        for h in range(6):  # the actions of the imagined states, not of the observed ones
            act = agent.actors(z[h], noise[h])[0].detach().numpy()
            obs, rew, terminated, _, last = herd.step(act)
            done |= terminated
            assert (told[h, 0].numpy() == ~done).all()
            for b in range(16):
                for book, x in zip(lived[b], (last[b], act[b], rew[b], terminated[b])):
                    book.append(x)
                if terminated[b]:
                    played.append(lived[b])
                    lived[b] = [[obs[b]], [], [], []]
        ended += int(done.sum())
    assert ended > 8  # a policy that has learnt nothing falls
    torn = agent.beside.complete
    assert len(torn) == len(played) and max(len(p[2]) for p in torn) < pwm.PIECE

    def first(piece):
        return np.asarray(piece[0])[0].tolist()
    for mine, theirs in zip(sorted(torn, key=first), sorted(played, key=first)):
        for x, y in zip(mine, theirs):
            assert np.allclose(x, np.asarray(y), atol=1e-5)


def test_latency_of_policy_and_planner(folder):
    result = latency.main(latency.Args(fast=True, device="cpu"))
    assert 0 < result["ms_per_action"][1]["ours"] < result["ms_per_action"][1]["planner"]
    actors = pwm.Actors(torch.ones(3, 2), 8, (8,))
    z = torch.rand(3, 5, 8)
    assert torch.allclose(latency.first(actors)(z[:1]), actors(z)[:1], atol=1e-6)


def test_curves_of_a_run(folder):
    table = [dict(task=t, random=1.0, ours=9.0, **{"PWM paper": None}) for t in envs.MT30[:8]]
    returns = {r["task"]: 2.0 for r in table}
    history = [{"seconds": 60.0 * k, "return": returns} for k in range(3)]
    Path("results.json").write_text(json.dumps(dict(table=table, history=history)))
    made = curves.main(curves.Args(task="."))
    assert Path(made["picture"]).stat().st_size > 5000
    with pytest.raises(SystemExit, match="is not there"):
        curves.main(curves.Args(task="nowhere"))
