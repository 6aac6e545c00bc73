from t_head import *  # noqa: F401,F403

from studies import bodies, plants, throughput
from studies.bodies import Body, Herd, Walker
from studies.body_models import body_model

# ------------------------------------------------------------------------------- bodies and plants
BODY_FACTS = {"hopper": (11, 3, 6, 6, 15.8, 1.25), "ant": (37, 8, 15, 14, 18.2, 0.75),
              "anymal": (49, 12, 19, 18, 53.1, 0.55), "humanoid": (76, 21, 28, 27, 40.8, 1.35),
              "muscle-humanoid": (53, 152, 29, 24, 37.0, 1.0)}


def rest_state(body):
    return np.concatenate([[0.0], body.rest, np.zeros(body.nv)])[None]


def same(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.filterwarnings("ignore")  # that observations are unbounded is intended
@pytest.mark.parametrize("kind", BODY_FACTS)
def test_bodies_have_the_papers_sizes_and_start_as_it_says(kind):
    body, (O, A, nq, nv, mass, height) = Body(kind), BODY_FACTS[kind]
    m, hopper = body.model, kind == "hopper"
    joints = m.dof_damping[3 if hopper else 6:]  # behind the root's
    lowest = {"hopper": 1, "ant": 11, "anymal": 12, "humanoid": 10.2, "muscle-humanoid": 12}[kind]
    assert lowest <= joints.min() < lowest + 1 and len(joints) == nv - (3 if hopper else 6)
    facts = envs.task_facts(f"studies.bodies:{kind}")
    assert facts == envs.Facts(O, A, 1000, 1, None, True)
    assert (m.nq, m.nv, m.nu) == (nq, nv, A) and sum(m.body_mass) == pytest.approx(mass, abs=0.06)
    assert body.rest[1 if hopper else 2] == height and m.opt.timestep == 1 / 240
    assert ((m.geom_contype > 0) == (m.geom_type == 0)).all()  # only the floor is touched
    rows = np.stack([body.start(np.random.default_rng(i)) for i in range(500)])
    assert (rows[:, 0] == 0).all() and body.observe(rows, np.zeros((500, A))).shape == (500, O)
    off, scale, fast = rows[:, 1:1 + nq] - body.rest, *((0.1, 0.1) if hopper else (0.2, 0.5))
    assert scale * 0.48 < np.abs(off[:, :2]).max() <= scale / 2
    assert fast * 0.48 < np.abs(rows[:, 1 + nq:]).max() <= fast / 2
    for a in [] if hopper else [3, *body.balls]:
        assert np.allclose(np.linalg.norm(rows[:, 1 + a:5 + a], axis=1), 1)
        assert (rows[:, 1 + a] > 0.98).all()
    if kind in ("ant", "anymal", "humanoid"):
        assert np.abs(off[:, 7:]).max() <= 0.2
    check_env(envs.make_env(f"studies.bodies:{kind}"), skip_render_check=True)


def test_bodies_stand_on_their_springs_or_fall():
    for kind in ("hopper", "anymal", "humanoid"):
        body, state, ended = Body(kind), rest_state(Body(kind)), [False]
        if kind == "anymal":  # at 0 its springs hold the legs straight
            state[0, 8:1 + body.nq], state[0, 3] = 0, 0.65
        while state[0, 0] < 200 / 60 - 1e-6 and not ended[0]:
            state, ended = body.advance(state, np.zeros((1, body.facts.act_dim)))
        if kind == "anymal":
            assert state[0, [0, 3]] == pytest.approx((200 / 60, 0.6), abs=0.02)
        else:
            assert state[0, 0] < 2.5


@pytest.mark.parametrize("kind", BODY_FACTS)
def test_body_rewards_and_observations_by_hand(kind):
    body, rng = Body(kind), np.random.default_rng(1)
    A = body.facts.act_dim
    state, act = body.start(rng)[None], rng.uniform(-1, 1, (1, A))
    q, v, last = state[0, 1:1 + body.nq], state[0, 1 + body.nq:], rng.uniform(-1, 1, (1, A))
    obs, cost = body.observe(state, last), (act**2).sum()
    if kind == "hopper":
        want_obs, x = [q[1] - 1.25, *q[2:], *v], min(q[1] - 0.95, 0.3)
        want = v[0] + (x if x >= 0 else -200 * x * x) + 1 - (q[2] / 0.5235988) ** 2 - 0.1 * cost
    else:
        w, x, y, z = q[3:7]
        R = np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                      [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                      [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]])
        want_obs = [*q[2:7], *v[:3], *(R @ v[3:6]), *q[7:], *0.1 * v[6:], R[2, 2], R[0, 0],
                    *([] if kind == "muscle-humanoid" else last[0])]
        want, x = v[0] + 0.1 * R[2, 2] + R[0, 0], min(q[2] - 0.84, 0.1)
        want += {"humanoid": (10 * x if x >= 0 else -200 * x * x) - 0.002 * cost,
                 "muscle-humanoid": -0.001 * ((act + 1) / 2).sum(),
                 "ant": q[2] - 0.27, "anymal": q[2] - 0.25 - 0.005 * cost}[kind]
    assert np.allclose(obs[0], want_obs) and body.reward(obs, act)[0] == pytest.approx(want)
    terms = bodies.height_term(np.array([-2.0, -0.1, 0.05, 1]), 0.1, 10)
    assert terms == pytest.approx([-200, -2, 0.5, 1])


def test_an_ants_reward_is_of_the_state_before_and_its_action_drives_the_joint_of_its_place():
    env, body = envs.make_env("studies.bodies:ant"), Body("ant")
    obs, _ = env.reset(seed=3)
    act = np.full(8, 0.3, np.float32)
    rew = env.step(act)[1]
    assert rew == pytest.approx(body.reward(obs[None].astype(float), act[None])[0], abs=1e-6)
    for i in range(8):
        state, act = rest_state(body), np.zeros((1, 8))
        state[0, 3], act[0, i] = 5, 1  # in the air
        for _ in range(2):
            state, _ = body.advance(state, act)
        assert np.argmax(np.abs(state[0, 1 + 15 + 6:])) == i


def test_the_muscles_are_152_and_only_pull():
    import mujoco
    body = Body("muscle-humanoid")
    m, names = body.model, [body.model.actuator(i).name for i in range(body.model.nu)]
    assert m.ntendon == m.nu == 152 == len(set(names)) and m.na == 0
    assert sum(n.startswith("left") for n in names) == 76
    assert (m.actuator_gainprm[:, 0] < 0).all() and (m.actuator_ctrlrange == [0, 1]).all()
    # The sum of the groups' forces F0 at their common share of tension.
    assert -m.actuator_gainprm[:, 0].sum() == pytest.approx(2 * 0.36 * 26680, rel=1e-6)
    d = mujoco.MjData(m)
    d.qpos[:] = body.rest

    def torque(side, *groups):  # of a leg at rest: hip x y z, knee, ankle x y z
        d.ctrl[:] = [n.startswith(side) and (not groups or n[5:-2] in groups) for n in names]
        mujoco.mj_forward(m, d)
        return d.qfrc_actuator[-9:-2] if side == "left" else d.qfrc_actuator[6:13].copy()

    knee = torque("left", "vastus_lat", "vastus_med_int", "rectus_femoris")[3]
    assert knee == pytest.approx(-107, abs=3)
    assert torque("left", "gastrocnemius", "soleus")[5] == pytest.approx(96, abs=3)
    assert torque("left", "tibialis_ant_extensors")[5] == pytest.approx(-29, abs=1)
    assert torque("left", "gluteus_max")[1] > 50
    mirror = [-1, 1, -1, 1, -1, 1, -1]
    assert np.allclose(torque("right") * mirror, torque("left"))
    # Action -1 is no activation: falling freely, muscles change nothing.
    slack, tense = (body.advance(rest_state(body), x * np.ones((1, 152)))[0] for x in (-1, 1))
    assert np.abs(slack[0, -18:]).max() < 0.2 < np.abs(tense[0, -18:]).max()


def sine_herd(kind, threads, n=6, steps=60):
    with Herd(kind, n, seed=4, threads=threads) as herd:
        out, A = [(herd.reset(),)], np.arange(herd.facts.act_dim)
        for t in range(steps):
            out.append(herd.step(np.sin(0.7 * t + np.arange(n)[:, None] + A)))
    return out


@pytest.mark.parametrize("kind", ["hopper", "muscle-humanoid"])
def test_a_herd_equals_single_environments_for_any_number_of_threads(kind):
    one, two = sine_herd(kind, 1), sine_herd(kind, 2)
    same(sum(one, ()), sum(two, ()))
    env, i = Walker(Body(kind)), 2
    A = np.arange(env.body.facts.act_dim)
    env.reset()
    env.state = env.body.start(np.random.default_rng([4, i, 0]))[None]
    for t in range(60):
        obs, rew, term, *_ = env.step(np.sin(0.7 * t + i + A))
        herd_obs, herd_rew, herd_term, _, last = (x[i] for x in one[t + 1])
        np.testing.assert_allclose(last, obs, rtol=1e-3, atol=1e-4)
        assert rew == pytest.approx(float(herd_rew), abs=1e-2) and term == herd_term
        if term:
            break
        np.testing.assert_array_equal(herd_obs, last)
    assert term
    start = env.body.start(np.random.default_rng([4, i, 1]))[None]
    start = env.body.observe(start, np.zeros((1, len(A))))[0]
    np.testing.assert_allclose(herd_obs, start, rtol=1e-5)


@pytest.mark.parametrize("task", ["studies.bodies:hopper", "studies.plants:planar-hopper"])
def test_a_herd_goes_on_from_its_state(task):
    acts = np.random.default_rng(0).uniform(-1, 1, (30, 3, 3))
    with envs.beside(task, 3, 4, 1) as herd, envs.beside(task, 3, 4, 1) as other:
        herd.reset()
        for act in acts[:20]:
            obs = herd.step(act)[0]
        state = {k: torch.as_tensor(v) for k, v in herd.state_dict().items()}
        np.testing.assert_array_equal(other.load_state_dict(state), obs)
        for act in acts[20:]:
            same(herd.step(act), other.step(act))


@pytest.mark.parametrize("kind, seeds", [("bodies:hopper", (5, 6, 7, 5)),
                                         ("plants:double-pendulum", (5, 6))])
def test_rollouts_of_bodies_and_plants_equal_single_environments(kind, seeds):
    task = f"studies.{kind}"
    env, want = envs.make_env(task), []

    def act(obs, job, t):
        wave = obs[:, :1] + 0.7 * t[:, None] + job[:, None] + np.arange(env.facts.act_dim)
        return np.sin(wave).astype(np.float32)

    for j, seed in enumerate(seeds):
        obs, rows, done = env.reset(seed=seed)[0], [], False
        while not done:
            a = act(obs[None], np.array([j]), np.array([len(rows)]))[0]
            after, rew, terminated, truncated, _ = env.step(a)
            rows.append((obs, a, np.float32(rew), terminated))
            obs, done = after, terminated or truncated
        want.append([np.stack(x) for x in zip(*rows)])
    for n, max_envs in ((1, 64), (2, 2)):
        with envs.Workers(n, max_envs) as workers:
            got = workers.rollout([(task, seed) for seed in seeds], act)
        for e, w in zip(got, want, strict=True):
            seen = e["obs"][:-1], e["act"], e["rew"], e["term"]
            same(seen, w)
            assert [x.dtype for x in seen] == [x.dtype for x in w]
            assert e["task"] == task and e["ret"] == pytest.approx(float(e["rew"].sum()), rel=1e-4)
    lengths = {len(e["rew"]) for e in got}
    assert lengths == {240} if len(seeds) == 2 else len(lengths) > 1 and got[0]["term"][-1]


def test_rows_that_explode_end_and_stay_finite_and_time_is_no_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log
    with Herd("ant", 3, threads=1) as herd:
        herd.reset()
        herd._state[1, 1 + 15 + 3] = 1e30
        herd.t[2] = 999
        before = herd.body.observe(herd._state, herd._last)
        obs, rew, term, trunc, last = herd.step(np.zeros((3, 8)))
        assert term.tolist() == [False, True, False] and trunc.tolist() == [False, False, True]
        assert np.isfinite(obs).all() and np.isfinite(rew).all() and np.isfinite(last).all()
        np.testing.assert_array_equal(last[1], before[1].astype(np.float32))
        assert herd.t.tolist() == [1, 0, 0]
        assert (last[2] != obs[2]).any() and (last[0] == obs[0]).all()
    env = envs.make_env("studies.bodies:hopper")
    for low in (False, True):  # falling at the last step is an end, not a lack of time
        env.reset(seed=0)
        env.t = 999
        if low:
            env._env.state[0, 2] = 0.5
        assert env.step(np.zeros(3))[2:4] == ((True, False) if low else (False, True))


def test_ball_wall_has_its_landscape():
    ball = plants.plant("ball-wall")
    theta = torch.linspace(-math.pi, math.pi, 200_001, dtype=torch.float64)
    for k, *best in ((1, 0.1223, -21.8505), (2, 0.2492, -21.382)):
        J = ball.cost(theta, k)
        assert [float(theta[J.argmin()]), float(J.min())] == pytest.approx(best, rel=0, abs=1e-3)
        assert float(J[0]) == float(J[-1]) == pytest.approx(18)
    points = torch.tensor([-1.55, -1.0, 0.13], dtype=torch.float64)
    left, plateau, right = ball.cost(points).tolist()
    assert left == pytest.approx(-2.5, abs=0.2) and plateau == -5 and right < -21
    x = torch.tensor(-math.pi, dtype=torch.float64, requires_grad=True)
    assert abs(float(torch.autograd.grad(ball.cost(x), x)[0])) < 1e-12
    assert float(ball.path(-0.5)[-1, 0]) < 5 < float(ball.path(0.3)[-1, 0])


def test_the_double_pendulum_keeps_energy_and_is_chaotic():
    p, none, drift = plants.DoublePendulum(), torch.zeros(1, 1, dtype=torch.float64), []
    for dt, steps in ((1 / 60, 240), (1 / 120, 480)):
        p.DT = dt
        x = torch.tensor([[0.3, 0.2, 0.0, 0.0]], dtype=torch.float64)
        before = p.energy(x)
        for _ in range(steps):
            x = p.step(x, none, friction=0.0)
        drift.append(float((p.energy(x) - before).abs()))
    assert drift[0] < 0.2 and drift[1] < drift[0] / 16  # an order of 4
    p = plants.plant("studies.plants:double-pendulum")
    for T, want in ((10, 10.5), (30, 111), (50, 1082)):
        def roll(x, T=T):
            for _ in range(T):
                x = p.step(x, none[0])
            return x
        J = torch.autograd.functional.jacobian(roll, torch.zeros(4, dtype=torch.float64))
        assert float(torch.linalg.matrix_norm(J, 2)) == pytest.approx(want, rel=0.03)
    x = p.reset(1000, gen(), torch.float64)
    assert x[:, :2].abs().max() < math.pi / 2 and x[:, 2:].abs().max() < 0.25
    assert torch.allclose(p.state(p.observe(x)), x)
    want = -float(x[0, 0]**2 + x[0, 1]**2 + 0.1 * (x[0, 2:]**2).sum())
    assert p.reward(p.observe(x))[0] == pytest.approx(want)


def test_the_planar_hopper_has_mujocos_masses_and_its_own_contacts():
    import mujoco
    p, model = plants.PlanarHopper(), body_model("hopper")
    d, rng = mujoco.MjData(model), np.random.default_rng(0)
    for _ in range(3):
        d.qpos[:], d.qvel[:] = rng.normal(size=6), 3 * rng.normal(size=6)
        mujoco.mj_forward(model, d)
        inertia = np.zeros((6, 6))
        for i in range(6):
            mujoco.mj_mulM(model, d, inertia[i], np.eye(6)[i])
        q, v = torch.tensor(d.qpos), torch.tensor(d.qvel)
        root = np.diag([1.0, 1, 1, 0, 0, 0])  # armature 1 on the root too, as in the reference
        assert np.allclose(p.mass_matrix(q), inertia + root, atol=1e-12)
        assert np.allclose(p.forces(q, v)[0], d.qfrc_bias, atol=1e-11)
    body, obs = Body("hopper"), torch.randn(50, 11, generator=gen())
    act = 2 * torch.rand(50, 3, generator=gen()) - 1
    assert np.allclose(body.reward(obs.numpy(), act.numpy()), p.step_reward(obs, act), atol=1e-5)
    assert torch.allclose(p.observe(p.state(obs)), obs, atol=1e-6)
    assert torch.equal(p.ended(obs), p.state(obs)[:, 1] < 0.8)
    # The foot is 1 cm in the floor, falling and sliding.
    deep = torch.tensor([[0.0, 1.2, 0, 0, 0, 0]], dtype=torch.float64)
    moving = torch.tensor([[1.0, -1, 0, 0, 0, 0]], dtype=torch.float64)
    soft, stiff = (x.forces(deep, moving)[1][0, :2] for x in (p, plants.plant("stiff-hopper")))
    assert soft.tolist() == pytest.approx([-2 * 0.9 * 2e4 * 0.01, 2 * 0.01 * (2e4 + 2e3)])
    assert stiff[1] == pytest.approx(5 * float(soft[1]))
    assert (p.forces(deep + 0.2, deep)[1] == 0).all()


def test_gradients_through_the_planar_hopper_are_those_of_differences():
    p, start = plants.PlanarHopper(), torch.zeros(1, 12, dtype=torch.float64)
    start[0, 1], start[0, 3:6] = 1.22, torch.tensor([-0.1, -0.2, 0.1])  # its foot is on the floor
    act = torch.tensor([[0.1, -0.2, 0.3]], dtype=torch.float64)

    def final(a):
        x = start
        for _ in range(4):
            x = p.step(x, a)
        return x[0]
    J = torch.autograd.functional.jacobian(final, act)[:, 0]
    for i in range(3):
        d = 1e-6 * torch.eye(3, dtype=torch.float64)[i]
        slope = (final(act + d) - final(act - d)) / 2e-6
        assert torch.allclose(J[:, i], slope, rtol=1e-4, atol=1e-6)
    with envs.beside("studies.plants:planar-hopper", 4) as herd:  # its rows are the plant's steps
        obs = herd.reset()
        a = np.random.default_rng(0).uniform(-1, 1, (4, 3))
        after = herd.step(a)[4]
    want = p.observe(p.step(p.state(torch.tensor(obs, dtype=torch.float64)), torch.tensor(a)))
    assert np.allclose(after, want, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # as above
@pytest.mark.parametrize("kind", ["ball-wall", "double-pendulum"])
def test_toys_are_environments_too(kind):
    env = envs.make_env(task := f"studies.plants:{kind}")
    check_env(env, skip_render_check=True)
    env.reset(seed=0)
    _, rew, term, trunc, _ = env.step(np.array([0.13 / math.pi]))
    assert (term, trunc) == (kind == "ball-wall", False) and (rew > 21 or kind != "ball-wall")
    assert plants.plant("studies.bodies:ant") is None and envs.score(task, -7.5, 0) == -7.5
    assert envs.task_facts(task).ends == (kind == "ball-wall")


@pytest.mark.parametrize("call, words", [
    (lambda: Herd("walker-walk", 2), "hopper, ant | 'walker-walk' | Flock"),
    (lambda: Herd("ant", 0), "n=0 | 1 or more of each"),
    (lambda: envs.make_env("studies.bodies:hoper"), "unknown task | studies.bodies:hopper"),
    (lambda: envs.make_env("studies.plants:ball-wall", obs="pixels").reset(),
     "draws no frames | obs='state'"),
    (lambda: Herd("ant", 3).step(np.zeros((2, 8))), "(2, 8), all finite; expected finite (3, 8)"),
    (lambda: Herd("ant", 3).step(np.full((3, 8), np.nan)), "not all finite"),
    (lambda: envs.Workers(1).rollout([("studies.bodies:ant", 0)], lambda o, j, t: np.zeros((1, 3))),
     "(1, 3) | (1, 8)")])
def test_bad_input_of_bodies_and_plants_is_one_sentence(call, words):
    with says(*words.split(" | ")):
        call()


def test_throughput_of_bodies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = throughput.main(throughput.Args(task="bodies", fast=True, rows=4))
    assert [row["task"][15:] for row in result["table"]] == ["hopper", "ant"]
    assert all(row["one"] > 100 and row["per_cpu"] > 100 for row in result["table"])
