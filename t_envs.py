from t_head import *  # noqa: F401,F403

# ------------------------------------------------------------------------------------------------------------ envs.py
class Walk(gymnasium.Env):
    """A seeded random walk that ends by itself after 3 to 12 steps."""

    action_space = gymnasium.spaces.Box(-2.0, 4.0, (1,), np.float32)
    observation_space = gymnasium.spaces.Dict(
        x=gymnasium.spaces.Box(-99.0, 99.0, (2,), np.float64),
        n=gymnasium.spaces.Box(0.0, 99.0, (), np.float64),
    )

    def __init__(self, fault=""):
        self.fault = fault

    def _obs(self):
        return {"x": self.x.copy(), "n": np.array(float(self.n))}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.n, self.end = self.np_random.normal(size=2), 0, int(self.np_random.integers(3, 13))
        return self._obs(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.n += 1
        self.x = np.clip(self.x + 0.1 * action + 0.1 * self.np_random.normal(size=2), -99, 99)
        if self.n == 3 and self.fault == "nan":
            self.x[0] = np.nan
        if self.n == 3 and self.fault == "raise":
            raise ValueError("the gripper fell off")
        done = self.n == self.end
        return self._obs(), float(self.x[0]), done, False, {"is_success": done and self.x[0] > 0}


for name, fault in (("Walk", ""), ("WalkNaN", "nan"), ("WalkRaise", "raise")):
    if f"{name}-v0" not in gymnasium.registry:
        gymnasium.register(f"{name}-v0", entry_point=Walk, kwargs={"fault": fault})
WALK = f"{__name__}:Walk-v0"


def policy(width):
    """A row-wise deterministic policy: no row sees another, so a redone episode comes out the same."""

    def act(obs, job, t):
        assert len(obs) == len(job) == len(t) and obs.dtype == np.float32
        phase = obs[:, :1] + 0.7 * t[:, None] + job[:, None] + np.arange(width)
        return np.sin(phase).astype(np.float32)

    return act


def plain_loop(jobs, act, width):
    """What Workers.rollout must equal: one environment after the other."""
    out = []
    for j, (task, seed) in enumerate(jobs):
        env = envs.make_env(task)
        o, _ = env.reset(seed=seed)
        obs, acts, rew, term, done = [o], [], [], [], False
        while not done:
            row = np.zeros((1, width), np.float32)
            row[0, : len(o)] = o
            a = act(row, np.array([j]), np.array([len(acts)]))[0][: env.facts.act_dim]
            o, r, terminated, truncated, info = env.step(a)
            done = terminated or truncated
            obs.append(o), acts.append(a), rew.append(r), term.append(terminated)
        out.append(
            {
                "task": task,
                "seed": seed,
                "obs": np.stack(obs),
                "act": np.stack(acts),
                "rew": np.array(rew, np.float32),
                "term": np.array(term),
                "success": info["success"],
                "ret": float(sum(rew)),
            }
        )
        env.close()
    return out


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert list(x) == list(y)
        for key in x:
            np.testing.assert_array_equal(x[key], y[key], err_msg=f"{x['task']} {x['seed']} {key}")
            assert getattr(x[key], "dtype", None) == getattr(y[key], "dtype", None)


JOBS = [
    ("walker-walk", 3),
    (WALK, 1),
    ("mw-reach", 5),
    ("cup-spin", 2),
    (WALK, 7),
    ("Pendulum-v1", 0),
    (WALK, 8),
    ("walker-walk", 4),
    ("mw-reach", 6),
]


# ------------------------------------------------------------------------------------------------- tasks
@pytest.mark.parametrize(
    "task, w, seed, ret",
    [
        ("walker-walk-backwards", 0.1, 1, 30.19),
        ("walker-run-backwards", 0.1, 1, 16.45),
        ("cheetah-run-backwards", 0.1, 1, 17.93),
        ("cheetah-run-front", 0.1, 1, 8.98),
        ("cheetah-run-back", 0.1, 1, 28.70),
        ("cheetah-jump", 0.1, 1, 190.49),
        ("pendulum-spin", 0.1, 1, 254.85),
        ("cup-spin", 0.5, 1, 290.79),
        ("reacher-three-easy", 0.02, 1, 41.0),
        ("reacher-three-hard", 0.02, 0, 18.0),
        ("hopper-hop-backwards", 0.5, 3, 2.30),
    ],
)
def test_custom_task_parity(task, w, seed, ret):
    env = envs._CUSTOM[task](envs._import_suite(), seed)
    env.reset()
    phase = np.arange(env.action_spec().shape[0])
    assert sum(env.step(np.sin(w * i + phase)).reward for i in range(1000)) == pytest.approx(ret, rel=0.02)


@pytest.mark.parametrize(
    "task",
    [
        "walker-run",
        "cup-catch",
        "finger-turn-hard",
        "fish-swim",
        "acrobot-swingup",
        "point_mass-easy",
        "cheetah-jump",
        "humanoid_CMU-stand",
        "quadruped-walk",
    ],
)
def test_direct_stepping_equals_dm_control(task):
    suite, env = envs._import_suite(), envs.make_env(task, seed=11)
    domain, _, name = task.partition("-")
    other = (
        envs._CUSTOM[task](suite, 11)
        if task in envs._CUSTOM
        else suite.load(domain.replace("cup", "ball_in_cup"), name.replace("-", "_"), {"random": 11})
    )
    obs, _ = env.reset(seed=11)
    step = other.reset()
    rng, spec = np.random.default_rng(0), other.action_spec()
    middle, half = (
        (spec.maximum + spec.minimum) / 2,
        (spec.maximum - spec.minimum) / 2,
    )  # quadruped: not [-1, 1]
    n = 500 if task == "walker-run" else 60
    for t in range(n + 1):
        want = np.concatenate([np.ravel(x) for x in step.observation.values()]).astype(np.float32)
        np.testing.assert_array_equal(obs, want)
        if t == n:
            break
        act = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        obs, rew, terminated, truncated, _ = env.step(act)
        first, step = other.step(middle + half * act), other.step(middle + half * act)
        assert rew == first.reward + step.reward and not terminated and truncated == (t == 499)
    assert n < 500 or step.last()


@pytest.mark.parametrize("task", envs.MT30)
def test_mt30_dims_match_the_table(task):
    env, facts = envs.make_env(task), envs.task_facts(task)
    obs, info = env.reset(seed=0)
    assert (
        facts == env.facts
        and facts[2:] == (500, 2, 1000.0, False)
        and obs.shape == (facts.obs_dim,)
        and info == {"success": 0.0}
    )
    obs, rew, *_ = env.step(np.zeros(facts.act_dim, np.float32))
    assert obs.dtype == np.float32 and 0 <= rew <= 2


def test_names():
    assert (
        len(envs.MT30) == 30
        and len(set(envs.METAWORLD50)) == 50
        and envs.MT80 == envs.MT30 + envs.METAWORLD50
    )
    assert (
        envs.MT30[19] == "walker-walk-backwards"
        and envs.MT80[30] == "mw-assembly"
        and envs.MT80[79] == "mw-hand-insert"
    )
    facts = [envs.task_facts(task) for task in envs.MT80]
    assert [max(f[k] for f in facts[:30]) for k in (0, 1)] == [24, 6]
    assert [max(f[k] for f in facts) for k in (0, 1)] == [39, 6]
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    assert {f"{n[3:]}-v3" for n in envs.METAWORLD50} == set(ALL_V3_ENVIRONMENTS)
    assert envs.task_facts("Pendulum-v1")[:4] == (3, 1, 200, 1) and envs.task_facts(WALK)[:4] == (3, 1, 1000, 1)
    assert envs.score("walker-walk", 500.0, 0.0) == 0.5 and envs.score("mw-reach", 900.0, 1.0) == 1.0
    assert envs.score("Pendulum-v1", -300.0, 0.0) == -300.0


@pytest.mark.parametrize(
    "task",
    [
        "cartpole-swingup",
        "cup-spin",
        "reacher-three-hard",
        "point_mass-easy",
        "lqr-lqr-2-1",
        "mw-assembly",
        "Pendulum-v1",
        WALK,
    ],
)
def test_gymnasium_check_env(task):
    from gymnasium.utils.env_checker import check_env

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that observations are unbounded, which is intended
        check_env(envs.make_env(task), skip_render_check=True)


@pytest.mark.parametrize(
    "task",
    [
        "walker-walk",
        "reacher-three-easy",
        "cup-spin",
        "hopper-hop-backwards",
        "swimmer-swimmer6",
        "mw-assembly",
        "mw-reach",
        "mw-peg-insert-side",
        "mw-lever-pull",
        "mw-drawer-open",
        "Pendulum-v1",
        WALK,
    ],
)
def test_reset_seed_fixes_the_episode(task):
    used, fresh = envs.make_env(task, seed=1), envs.make_env(task, seed=2)
    acts = np.random.default_rng(0).uniform(-1, 1, (12, *used.action_space.shape)).astype(np.float32)

    def play(env, seed):
        out = [env.reset(seed=seed)[0]]
        for a in acts:
            obs, rew, term, trunc, _ = env.step(a)
            out += [obs, np.float32(rew)]
            if term or trunc:
                break
        return np.hstack(out)

    before = play(used, 5)  # leaves traces of an earlier episode behind
    np.testing.assert_array_equal(play(used, 9), play(fresh, 9))
    np.testing.assert_array_equal(play(used, 5), before)
    assert not np.array_equal(used.reset()[0], used.reset()[0])  # unseeded resets go on drawing
    again = envs.make_env(task, seed=2)
    np.testing.assert_array_equal(again.reset()[0], envs.make_env(task, seed=2).reset()[0])


def test_metaworld_episode():
    env = envs.make_env("mw-reach")
    goals = {tuple(env.reset()[0][-3:]) for _ in range(3)}
    assert len(goals) == 3
    for t in range(100):
        obs, rew, terminated, truncated, info = env.step(np.ones(4))
        assert (
            not terminated
            and truncated == (t == 99)
            and 0 <= rew <= 20
            and isinstance(info["success"], float)
        )
    assert np.abs(obs[-3:]).sum() > 0  # the goal stays visible after steps


# ------------------------------------------------------------------------------------------------- roll-outs
@pytest.fixture(scope="module")
def want():
    return plain_loop(JOBS, policy(6), 39)


@pytest.mark.parametrize("n, max_envs", [(2, 64), (2, 3)])
def test_rollout_equals_plain_loop(want, n, max_envs):
    calls, seen = [], []
    act = policy(6)
    with envs.Workers(n, max_envs) as workers:
        got = workers.rollout(
            JOBS, lambda o, j, t: (calls.append(len(o)), act(o, j, t))[1], lambda *x: seen.append(x)
        )
        same(got, want)
        if n == 1:
            same(workers.rollout(JOBS[1:2] * 2, lambda o, j, t: act(o, j * 0 + 1, t)[:, :1]), [want[1]] * 2)
            assert workers.rollout([], act) == []
        pids = [p.pid for p in workers.procs]
    assert max(calls) == min(max_envs, len(JOBS)) and seen[-1][0] == seen[-1][1] and seen == sorted(seen)
    assert {len(e["rew"]) for e in got if e["task"] == WALK} != {1000} and all(
        e["term"][-1] for e in got if e["task"] == WALK
    )
    assert not any(e["term"].any() for e in got if e["task"] != WALK)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_same_policy_calls_for_any_number_of_workers():
    def trace(n):
        calls, act = [], policy(6)

        def record(obs, job, t):
            calls.append((obs.copy(), job.copy(), t.copy()))
            return act(obs, job, t)

        with envs.Workers(n, 4) as workers:
            workers.rollout(
                [(WALK, s) for s in range(12)] + [("Pendulum-v1", 1)], lambda *x: record(*x)[:, :1]
            )
        return calls

    for one, three in zip(trace(1), trace(3), strict=True):
        for a, b in zip(one, three, strict=True):
            np.testing.assert_array_equal(a, b)


def test_killed_worker_is_replaced_and_its_episodes_redone(want, capsys):
    act, kills = policy(6), []
    with envs.Workers(2) as workers:

        def killer(obs, job, t):
            if t.max() in (30, 60) and len(kills) < 2:
                kills.append(workers.procs[len(kills)].pid)
                os.kill(kills[-1], signal.SIGKILL)
            return act(obs, job, t)

        same(workers.rollout(JOBS, killer), want)
        err = capsys.readouterr().err
        assert len(kills) == 2 and all(f"pid {pid}" in err for pid in kills) and "walker-walk" in err
        os.kill(workers.procs[1].pid, signal.SIGKILL)  # dead between two roll-outs
        same(
            workers.rollout(JOBS[1:3], lambda o, j, t: act(o, j + 1, t)[:, :4]),
            [{**e, "act": e["act"][:, :4]} for e in want[1:3]],
        )


def test_third_death_stops():
    with envs.Workers(1) as workers:

        def killer(obs, job, t):
            os.kill(workers.procs[0].pid, signal.SIGKILL)
            return np.zeros((len(obs), 1))

        with pytest.raises(SystemExit, match="while playing Pendulum-v1.*third death.*max_envs"):
            workers.rollout([("Pendulum-v1", 0)], killer)
        assert (
            len(workers.rollout([("Pendulum-v1", 0)], lambda o, j, t: np.zeros((1, 1)))) == 1
        )  # still usable


def test_workers_exit_when_the_parent_is_killed(tmp_path):
    code = f"""
import sys, time; sys.path.insert(0, {HERE!r})
import envs, numpy as np
workers = envs.Workers(2)
workers.rollout([("Pendulum-v1", 0), ("Pendulum-v1", 1)], lambda o, j, t: np.zeros((len(o), 1)))
print(*[p.pid for p in workers.procs], flush=True); time.sleep(60)"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pids = [int(p) for p in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()

    def alive(pid):  # a zombie waiting for a lazy init is dead enough
        try:
            with open(f"/proc/{pid}/stat") as f:
                return f.read().rsplit(")", 1)[1].split()[0] != "Z"
        except FileNotFoundError:
            return False

    for _ in range(100):
        if not any(map(alive, pids)):
            break
        time.sleep(0.05)
    assert len(pids) == 2 and not any(map(alive, pids))


def test_workers_do_not_import_the_parent_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys; sys.path.insert(0, {HERE!r})
print("imported")
import envs, numpy as np
workers = envs.Workers(2)
print(len(workers.rollout([("Pendulum-v1", 0)] * 2, lambda o, j, t: np.zeros((len(o), 1)))))
workers.close()""")  # no __main__ guard on purpose
    out = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert out.stdout.split() == ["imported", "2"] and out.stderr == ""


def test_import_is_light():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import envs; "
        "print([m for m in ('torch', 'dm_control', 'metaworld', 'mujoco') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, HERE],
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: envs.make_env("walker-wlak"), "unknown task 'walker-wlak'.*walker-walk"),
        (lambda: envs.make_env("mw-asembly"), "mw-assembly"),
        (lambda: envs.make_env("Pendulum"), "Pendulum-v1"),
        (lambda: envs.task_facts("cup_spin"), "cup-spin"),
        (lambda: envs.make_env("zzzzzz"), "nearest: none"),
        (lambda: envs.make_env(f"{__name__}:Walkk-v0"), "test_all:Walkk-v0.*Walk-v0"),
        (lambda: envs.make_env("no_such_module:Walk-v0"), "no_such_module.*module"),
        (lambda: envs.make_env("CartPole-v1"), "CartPole-v1.*Discrete.*continuous Box"),
        (lambda: envs.make_env("walker-walk", obs="rgb"), "obs='rgb'.*'state' or 'pixels'"),
        (lambda: envs.Workers(0), "n=0.*1 or more of each"),
    ],
)
def test_bad_input_gives_one_sentence(call, sentence):
    with pytest.raises(SystemExit, match=sentence) as error:
        call()
    assert "\n" not in str(error.value)


def test_missing_metaworld(monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    monkeypatch.setitem(sys.modules, "metaworld.env_dict", None)
    with pytest.raises(SystemExit, match="pip install metaworld==3.1.1"):
        envs.make_env("mw-reach")


def test_no_opengl(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(envs.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(SystemExit, match="libegl1.*libosmesa6.*MUJOCO_GL"):
        envs.make_env("walker-walk", obs="pixels")
    assert "MUJOCO_GL" not in os.environ
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    assert envs.choose_gl() == "glfw"


@pytest.mark.parametrize(
    "task, sentence",
    [
        (f"{__name__}:WalkNaN-v0", "WalkNaN.*non-finite.*step"),
        (f"{__name__}:WalkRaise-v0", "WalkRaise.*gripper fell off"),
    ],
)
def test_bad_environment_is_named(task, sentence):
    with envs.Workers(1) as workers, pytest.raises(SystemExit, match=sentence):
        workers.rollout([("Pendulum-v1", 0), (task, 0)], lambda o, j, t: np.zeros((len(o), 1)))


def test_bad_policy_is_named():
    env = envs.make_env("walker-walk")
    env.reset()
    with pytest.raises(SystemExit, match="walker-walk.*non-finite action.*step 0"):
        env.step(np.full(6, np.nan))
    with envs.Workers(1) as workers, pytest.raises(SystemExit, match=r"shape \(1, 3\).*expected \(1, 1\)"):
        workers.rollout([("Pendulum-v1", 0)], lambda o, j, t: np.zeros((1, 3)))


def test_diverged_simulation_is_named():
    env = envs.make_env("cheetah-run")
    env.reset(seed=0)
    env._physics.data.qvel[:] = 1e12
    with pytest.raises(SystemExit, match="cheetah-run.*non-finite.*step"):
        for _ in range(20):
            env.step(np.ones(6))


# ------------------------------------------------------------------------------------------------------------- envs.py
def test_atari_games_follow_the_protocol():
    counts = dict(zip(envs.ATARI26, (18, 10, 7, 9, 18, 18, 18, 4, 18, 9, 6, 3, 18, 8, 18, 18, 18, 18, 14, 9, 6, 18, 6,
                                     18,
                                     18, 6)))
    assert len(envs.ATARI26) == 26 and set(mow.STORM_RETURN) == set(envs.ATARI26)
    for game in ("Alien", "Breakout", "Freeway", "UpNDown", "KungFuMaster"):
        assert len(envs.make_env(game, obs="pixels").legal) == counts[game]
    check_env(envs.make_env("Boxing", obs="pixels"), skip_render_check=True)

    def play(seed, n=40, **options):
        env = envs.make_env("Breakout", obs="pixels", **options)
        obs = [env.reset(seed=seed)[0]]
        infos = []
        for t in range(n):
            o, r, term, trunc, info = env.step([1, 3, 4, 1][t % 4])
            obs.append(o)
            infos.append((r, term, trunc, info["life_lost"]))
        return np.stack(obs), infos

    a, b, c = play(3), play(3), play(4)
    assert np.array_equal(a[0], b[0]) and a[1] == b[1] and not np.array_equal(a[0], c[0])
    assert np.array_equal(play(3, sticky=0.0)[0], play(4, sticky=0.0)[0])  # then nothing is left to chance
    assert not np.array_equal(play(3, sticky=0.0, noop=30)[0], play(4, sticky=0.0, noop=30)[0])
    lost = play(3, n=60)[1]
    assert any(x[3] for x in lost) and not any(x[1] for x in lost[:20])  # a life is lost, the game goes on
    assert not any(x[3] for x in play(3, n=60, life_loss=False)[1])
    assert [x[2] for x in play(3, n=5, frame_cap=20)[1]] == [False] * 4 + [True]
    assert envs.score("Boxing", 12.1, 0) == pytest.approx(1) and envs.score("Boxing", 0.1, 0) == pytest.approx(0)


def test_atari_frames_are_averages_over_areas_and_maxima_of_two_frames():
    rows = envs._areas(210, 64)
    assert rows.shape == (64, 210) and np.allclose(rows.sum(1), 1) and np.allclose(rows.sum(0), 64 / 210, atol=1e-6)
    screen = np.random.default_rng(0).integers(0, 256, (210, 160, 3), np.uint8)
    env = envs.make_env("Boxing", obs="pixels")
    want = F.interpolate(torch.from_numpy(screen).double().permute(2, 0, 1)[None].repeat_interleave(32, 2)
                         .repeat_interleave(2, 3), size=None, scale_factor=1)[0]
    want = torch.stack([F.avg_pool2d(x[None, None], (105, 5))[0, 0] for x in want], -1)  # 210*32/64, 160*2/64
    assert np.abs(env._shrink(screen).astype(float) - want.numpy()).max() <= 0.51
    env.reset(seed=0)
    frames, real = [], env._env

    class Spy:
        def __getattr__(self, name):
            return getattr(real, name)

        def act(self, a):
            out = real.act(a)
            frames.append(real.getScreenRGB())
            return out
    env._env = Spy()
    obs = env.step(2)[0]
    assert len(frames) == 4 and np.array_equal(obs, env._shrink(np.maximum(frames[2], frames[3])))


def test_a_fleet_steps_restarts_and_comes_back_by_replay():
    with envs.Fleet(["Breakout", "Pong"], {"Breakout": dict(frame_cap=40)}) as fleet:
        assert [len(x) for x in fleet.legal] == [4, 6]
        first = fleet.reset([5, 6])
        for t in range(12):
            fleet.send([t % 4, t % 6], [7, 8])
            steps = fleet.receive()
            if t == 9:
                assert steps[0][3]  # the cap of 10 steps
                env = envs.make_env("Breakout", obs="pixels")
                assert np.array_equal(steps[0][0], env.reset(seed=7)[0])
        again = fleet.reset([7, 6], [[10 % 4, 11 % 4], [t % 6 for t in range(12)]])
        assert all(np.array_equal(a, s[0]) for a, s in zip(again, steps)) and not np.array_equal(first[0], again[0])
        fleet._links[1][0].kill()
        fleet.send([0, 0], [1, 1])
        with says("Pong died", "--resume"):
            fleet.receive()
    with says("nearest", "Boxing"):
        envs.Fleet(["Boxin"])


def test_frames_sample_windows_and_go_back(tmp_path):
    frames = data.Frames(tmp_path / "f", 2, 12, 3, size=4)
    for t in range(10):
        frames.append(np.full((2, 4, 4, 3), t), np.full((2, 3), t), [t, -t], [False, t == 3], [t == 0, t == 4])
    obs, act, rew, term, first = frames.sample(5, 4, np.random.default_rng(0))
    assert obs.shape == (2, 5, 4, 4, 4, 3) and obs.dtype == torch.uint8 and first.dtype == torch.bool
    assert (rew[0].diff(dim=-1) == 1).all() and (rew[1].diff(dim=-1) == -1).all()
    assert (obs[..., 0, 0, 0] == act[..., 0]).all() and rew[0].min() >= 0 and rew[0].max() <= 9
    assert frames.sample(50, 3, np.random.default_rng(0), tasks=[1], since=6)[2].max() == -6
    frames.flush()
    again = data.Frames(tmp_path / "f", 2, 12, 3, size=4)
    assert again.count == 0 and np.array_equal(again.rew, frames.rew)
    with says("10 steps", "of a window"):
        frames.sample(1, 11, np.random.default_rng(0))
    with says("expected", "choose another folder"):
        data.Frames(tmp_path / "f", 2, 13, 3, size=4)


def test_a_replay_that_does_not_fit_on_the_disk_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(data.shutil, "disk_usage", lambda p: types.SimpleNamespace(free=10**6))
    with says("replay of 26 x 100,000 frames", "GB free"):
        data.Frames(tmp_path / "f", 26, 100_000, 18)
    assert not list((tmp_path / "f").iterdir())


def test_metaworld_pixels_from_the_moved_camera():
    env = envs.make_env("mw-reach", obs="pixels", camera="corner4", repeat=1, length=500)
    obs, _ = env.reset(seed=0)
    assert obs.shape == (64, 64, 3) and env.facts[2:] == (500, 1, 0.0, False) and env.action_space.shape == (4,)
    table = obs[40:].astype(float).mean((0, 1))
    assert table[0] > table[2] + 20  # the wooden table is at the bottom: not upside down
    again = envs.make_env("mw-reach", obs="pixels", camera="corner4", repeat=1, length=500)
    assert np.array_equal(again.reset(seed=0)[0], obs)
    again._frame = lambda: obs  # drawing 500 of them takes long
    assert [again.step(np.zeros(4))[3] for _ in range(500)] == [False] * 499 + [True]
    assert len(envs.MT10) == 10 and set(envs.MT10) <= set(envs.METAWORLD50)


# ---------------------------------------------------------------------------------------------- bodies and toys of PWM
BODY_FACTS = {"hopper": (11, 3, 6, 6, 15.8, 1.25), "ant": (37, 8, 15, 14, 18.2, 0.75),
              "anymal": (49, 12, 19, 18, 53.1, 0.55), "humanoid": (76, 21, 28, 27, 40.8, 1.35),
              "muscle-humanoid": (53, 152, 29, 24, 37.0, 1.0)}


@pytest.mark.parametrize("task", BODY_FACTS)
def test_bodies_have_the_papers_sizes_and_start_as_it_says(task):
    body, (O, A, nq, nv, mass, height) = envs._Body(task), BODY_FACTS[task]
    m = body.model
    joints = m.dof_damping[3 if task == "hopper" else 6:]  # behind the root's
    lowest = {"hopper": 1, "ant": 1 + 10, "anymal": 2 + 10, "humanoid": 0.2 + 10, "muscle-humanoid": 2 + 10}[task]
    assert lowest <= joints.min() < lowest + 1 and len(joints) == nv - (3 if task == "hopper" else 6)
    assert tuple(envs.task_facts(task)[:4]) == (O, A, 1000, 1) and (m.nq, m.nv, m.nu) == (nq, nv, A)
    assert sum(m.body_mass) == pytest.approx(mass, abs=0.06) and body._rest[1 if task == "hopper" else 2] == height
    assert m.opt.timestep == 1 / 240 and ((m.geom_contype > 0) == (m.geom_type == 0)).all()  # only the floor is touched
    rows = np.stack([body.start(np.random.default_rng(i)) for i in range(500)])
    assert (rows[:, 0] == 0).all() and body.observe(rows, np.zeros((500, A))).shape == (500, O)
    off, scale = rows[:, 1:1 + nq] - body._rest, 0.1 if task == "hopper" else 0.2
    assert scale * 0.48 < np.abs(off[:, :2]).max() <= scale / 2
    fast = 0.1 if task == "hopper" else 0.5
    assert fast * 0.48 < np.abs(rows[:, 1 + nq:]).max() <= fast / 2
    for a in [3, *body._balls] if task != "hopper" else []:
        assert np.allclose(np.linalg.norm(rows[:, 1 + a:5 + a], axis=1), 1) and (rows[:, 1 + a] > 0.98).all()
    joints = off[:, 7:] if task in ("ant", "anymal", "humanoid") else np.zeros((1, 1))
    assert np.abs(joints).max() <= 0.2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(envs.make_env(task), skip_render_check=True)


def test_bodies_stand_on_their_springs_or_fall():
    lasts = {}
    for task in ("hopper", "anymal", "humanoid"):
        body = envs._Body(task)
        state = np.concatenate([[0.0], body._rest, np.zeros(body.model.nv)])[None]
        if task == "anymal":  # at 0 its springs hold the legs straight
            state[0, 8:1 + body.nq], state[0, 3] = 0, 0.65
        for _ in range(200):
            state, ended = body.advance(state, np.zeros((1, body.facts.act_dim)))
            if ended[0]:
                break
        lasts[task] = state[0, 0], state[0, 3]
    assert lasts["anymal"][0] == pytest.approx(200 / 60) and lasts["anymal"][1] == pytest.approx(0.6, abs=0.02)
    assert lasts["hopper"][0] < 2.5 and lasts["humanoid"][0] < 2.5


def test_body_rewards_and_observations_by_hand():
    for task in BODY_FACTS:
        body = envs._Body(task)
        rng = np.random.default_rng(1)
        state, act = body.start(rng)[None], rng.uniform(-1, 1, (1, body.facts.act_dim))
        q, v, last = state[0, 1:1 + body.nq], state[0, 1 + body.nq:], rng.uniform(-1, 1, (1, body.facts.act_dim))
        obs = body.observe(state, last)
        cost = (act**2).sum()
        if task == "hopper":
            want_obs = [q[1] - 1.25, *q[2:], *v]
            x = min(q[1] - 0.95, 0.3)
            want = v[0] + (x if x >= 0 else -200 * x * x) + 1 - (q[2] / 0.5235988) ** 2 - 0.1 * cost
        else:
            w, x, y, z = q[3:7]
            R = np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                          [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                          [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]])
            want_obs = [*q[2:7], *v[:3], *(R @ v[3:6]), *q[7:], *0.1 * v[6:], R[2, 2], R[0, 0],
                        *([] if task == "muscle-humanoid" else last[0])]
            want = v[0] + 0.1 * R[2, 2] + R[0, 0]
            if task == "humanoid":
                x = min(q[2] - 0.84, 0.1)
                want += (10 * x if x >= 0 else -200 * x * x) - 0.002 * cost
            elif task == "muscle-humanoid":
                want -= 0.001 * ((act + 1) / 2).sum()
            else:
                want += q[2] - body.floor - (0.005 * cost if task == "anymal" else 0)
        assert np.allclose(obs[0], want_obs) and body.reward(obs, act)[0] == pytest.approx(want), task
    assert envs._height_term(np.array([-2.0, -0.1, 0.05, 1]), 0.1, 10) == pytest.approx([-200, -2, 0.5, 1])


def test_the_reward_is_that_of_the_state_before_the_step():
    env = envs.make_env("ant")
    obs, _ = env.reset(seed=3)
    act = np.full(8, 0.3, np.float32)
    _, rew, *_ = env.step(act)
    assert rew == pytest.approx(env._env.reward(obs[None].astype(float), act[None])[0], abs=1e-6)


def test_an_ants_action_drives_the_joint_of_its_place():
    body = envs._Body("ant")
    for i in range(8):
        state = np.concatenate([[0.0], body._rest, np.zeros(14)])[None]
        state[0, 3] = 5  # in the air
        act = np.zeros((1, 8))
        act[0, i] = 1
        for _ in range(2):
            state, _ = body.advance(state, act)
        assert np.argmax(np.abs(state[0, 1 + 15 + 6:])) == i


def test_the_muscles_are_152_and_only_pull():
    import mujoco
    m = envs._Body("muscle-humanoid").model
    names = [m.actuator(i).name for i in range(m.nu)]
    assert m.ntendon == m.nu == 152 == len(set(names)) and sum(n.startswith("left") for n in names) == 76
    assert (m.actuator_gainprm[:, 0] < 0).all() and (m.actuator_ctrlrange == [0, 1]).all() and m.na == 0
    assert -m.actuator_gainprm[:, 0].sum() == pytest.approx(2 * 0.36 * 26680, rel=1e-6)  # of spec A.4's F0
    d = mujoco.MjData(m)
    d.qpos[:] = envs._Body("muscle-humanoid")._rest

    def torque(*groups):  # of the left leg at rest: hip x y z, knee, ankle x y z
        d.ctrl[:] = [n.startswith("left") and n[5:-2] in groups for n in names]
        mujoco.mj_forward(m, d)
        return d.qfrc_actuator[-9:-2]

    knee, ankle = ("vastus_lat", "vastus_med_int", "rectus_femoris"), ("gastrocnemius", "soleus")
    assert torque(*knee)[3] == pytest.approx(-107, abs=3) and torque(*ankle)[5] == pytest.approx(96, abs=3)
    assert torque("tibialis_ant_extensors")[5] == pytest.approx(-29, abs=1) and torque("gluteus_max")[1] > 50
    d.ctrl[:] = [n.startswith("right") for n in names]
    mujoco.mj_forward(m, d)
    right = d.qfrc_actuator[6:13].copy()
    d.ctrl[:] = [n.startswith("left") for n in names]
    mujoco.mj_forward(m, d)
    assert np.allclose(right * [-1, 1, -1, 1, -1, 1, -1], d.qfrc_actuator[-9:-2])  # mirrored
    body = envs._Body("muscle-humanoid")  # action -1 is no activation: falling freely, muscles change nothing
    state = np.concatenate([[0.0], body._rest, np.zeros(24)])[None]
    slack, _ = body.advance(state, -np.ones((1, 152)))
    tense, _ = body.advance(state, np.ones((1, 152)))
    assert np.abs(slack[0, -18:]).max() < 0.2 < np.abs(tense[0, -18:]).max()


def sine_herd(task, threads, n=6, steps=60):
    with envs.Herd(task, n, seed=4, threads=threads) as herd:
        out = [(herd.reset(),)]
        for t in range(steps):
            out.append(herd.step(np.sin(0.7 * t + np.arange(n)[:, None] + np.arange(herd.facts.act_dim))))
    return out


@pytest.mark.parametrize("task", ["hopper", "muscle-humanoid"])
def test_a_herd_equals_single_environments_for_any_number_of_threads(task):
    one, two = sine_herd(task, 1), sine_herd(task, 2)
    for a, b in zip(one, two):
        for x, y in zip(a, b):
            np.testing.assert_array_equal(x, y)
    i, ends = 2, 0
    env = envs.make_env(task)
    env.reset(seed=0)
    env._state = env._env.start(np.random.default_rng([4, i, 0]))[None]
    for t in range(60):
        obs, rew, term, trunc, _ = env.step(np.sin(0.7 * t + i + np.arange(env.facts.act_dim)))
        herd_obs, herd_rew, herd_term, _, last = (x[i] for x in one[t + 1])
        np.testing.assert_allclose(last, obs, rtol=1e-3, atol=1e-4)  # its actions are float32
        assert rew == pytest.approx(float(herd_rew), abs=1e-2) and term == herd_term and not trunc
        if term:
            ends += 1
            env.reset(seed=0)
            env._state = env._env.start(np.random.default_rng([4, i, ends]))[None]
            start = env._env.observe(env._state, np.zeros((1, env.facts.act_dim)))[0]
            np.testing.assert_allclose(herd_obs, start, rtol=1e-5)
            break
        np.testing.assert_array_equal(herd_obs, last)
    assert ends == 1


@pytest.mark.parametrize("task", ["InvertedPendulum-v5", "hopper-hop"])
def test_a_flock_equals_single_environments_and_goes_on_from_its_actions(task):
    acts = np.random.default_rng(0).uniform(-1, 1, (40, 3, envs.task_facts(task).act_dim))
    with envs.Flock(task, 3, seed=4) as flock, envs.Flock(task, 3, seed=5) as other:
        out = [flock.reset()]
        for act in acts[:20]:
            out.append(flock.step(act))
        state = flock.state()
        for act in acts[20:]:
            out.append(flock.step(act))
        assert any(a.any() for _, _, a, _, _ in out[1:]) == (task == "InvertedPendulum-v5")
        other.seed = 4
        np.testing.assert_array_equal(other.load(state), out[20][0])
        for act, want in zip(acts[20:], out[21:]):
            for x, y in zip(other.step(act), want):
                np.testing.assert_array_equal(x, y)
        with pytest.raises(SystemExit, match=r"\(2, .*expected finite \(3, "):
            flock.step(acts[0, :2])
    env, i, k = envs.make_env(task), 1, 0
    for t, act in enumerate(acts):
        if t == 0 or want[2]:
            (seed,) = np.random.SeedSequence([4, i, k]).generate_state(1)
            start, k = env.reset(seed=int(seed))[0], k + 1
            np.testing.assert_array_equal(out[t][0][i] if t else out[0][i], start)
        want = env.step(act[i])
        obs, rew, term, trunc, last = (x[i] for x in out[t + 1])
        np.testing.assert_array_equal(last, want[0])
        assert rew == np.float32(want[1]) and (term, trunc) == want[2:4] and (term or (obs == last).all())
    assert (k > 2) == (task == "InvertedPendulum-v5")


def test_rollouts_of_a_body_equal_the_plain_loop():
    jobs = [("hopper", s) for s in (5, 6, 7, 5)]
    want = plain_loop(jobs, policy(3), 11)
    for n, max_envs in ((1, 64), (2, 2)):
        with envs.Workers(n, max_envs) as workers:
            same(workers.rollout(jobs, policy(3)), want)
    assert all(e["term"][-1] and not e["term"][:-1].any() for e in want) and len({len(e["rew"]) for e in want}) > 1


def test_rows_that_explode_end_and_stay_finite_and_time_is_no_end():
    with envs.Herd("ant", 3, threads=1) as herd:
        herd.reset()
        herd._state[1, 1 + 15 + 3] = 1e30
        herd.t[2] = 999
        before = herd._body.observe(herd._state, herd._last)
        obs, rew, term, trunc, last = herd.step(np.zeros((3, 8)))
        assert term.tolist() == [False, True, False] and trunc.tolist() == [False, False, True]
        assert np.isfinite(obs).all() and np.isfinite(rew).all() and np.isfinite(last).all()
        np.testing.assert_array_equal(last[1], before[1].astype(np.float32))
        assert herd.t.tolist() == [1, 0, 0] and (last[2] != obs[2]).any() and (last[0] == obs[0]).all()
    env = envs.make_env("hopper")
    for limit in (False, True):  # falling at the last step is an end, not a lack of time
        env.reset(seed=0)
        env.t = 999
        if limit:
            env._state[0, 2] = 0.5
        _, _, term, trunc, _ = env.step(np.zeros(3))
        assert (term, trunc) == ((True, False) if limit else (False, True))


def test_ball_wall_has_its_landscape():
    ball = envs.plant("ball-wall")
    theta = torch.linspace(-math.pi, math.pi, 200_001, dtype=torch.float64)
    for k, at, best in ((1, 0.1223, -21.8505), (2, 0.2492, -21.382)):
        J = ball.cost(theta, k)
        assert float(theta[J.argmin()]) == pytest.approx(at, abs=1e-3)
        assert float(J.min()) == pytest.approx(best, abs=1e-3)
        assert float(J[0]) == float(J[-1]) == pytest.approx(18)
    left, plateau, right = ball.cost(torch.tensor([-1.55, -1.0, 0.13], dtype=torch.float64)).tolist()
    assert left == pytest.approx(-2.5, abs=0.2) and plateau == -5 and right < -21
    x = torch.tensor(-math.pi, dtype=torch.float64, requires_grad=True)
    assert abs(float(torch.autograd.grad(ball.cost(x), x)[0])) < 1e-12
    assert float(ball.path(-0.5)[-1, 0]) < 5 < float(ball.path(0.3)[-1, 0])


def test_the_double_pendulum_keeps_energy_and_is_chaotic():
    p = envs.plant("double-pendulum")
    none, drift = torch.zeros(1, 1, dtype=torch.float64), []
    for dt, steps in ((1 / 60, 240), (1 / 120, 480)):
        p.DT = dt
        x = torch.tensor([[0.3, 0.2, 0.0, 0.0]], dtype=torch.float64)
        before = p.energy(x)
        for _ in range(steps):
            x = p.step(x, none, friction=0.0)
        drift.append(float((p.energy(x) - before).abs()))
    assert drift[0] < 0.2 and drift[1] < drift[0] / 16  # an order of 4
    p = envs.plant("double-pendulum")
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
    assert p.reward(p.observe(x))[0] == pytest.approx(-float(x[0, 0]**2 + x[0, 1]**2 + 0.1 * (x[0, 2:]**2).sum()))


def test_the_planar_hopper_has_mujocos_masses_and_its_own_contacts():
    import mujoco
    p, model = envs.PlanarHopper(), envs._body_model("hopper")
    data, rng = mujoco.MjData(model), np.random.default_rng(0)
    for _ in range(3):
        data.qpos[:], data.qvel[:] = rng.normal(size=6), 3 * rng.normal(size=6)
        mujoco.mj_forward(model, data)
        inertia = np.zeros((6, 6))
        for i in range(6):
            mujoco.mj_mulM(model, data, inertia[i], np.eye(6)[i])
        q, v = torch.tensor(data.qpos), torch.tensor(data.qvel)
        root = np.diag([1.0, 1, 1, 0, 0, 0])  # armature 1 on the root too, as in the reference
        assert np.allclose(p.mass_matrix(q), inertia + root, atol=1e-12)
        assert np.allclose(p.forces(q, v)[0], data.qfrc_bias, atol=1e-11)
    body, obs, act = envs._Body("hopper"), torch.randn(50, 11), 2 * torch.rand(50, 3) - 1
    assert np.allclose(body.reward(obs.numpy(), act.numpy()), p.step_reward(obs, act), atol=1e-5)
    state = p.state(obs)
    assert torch.allclose(p.observe(state), obs) and torch.equal(p.ended(obs), state[:, 1] < 0.8)
    deep = torch.tensor([[0.0, 1.2, 0, 0, 0, 0]], dtype=torch.float64)  # foot 1 cm in the floor, falling and sliding
    soft, stiff = (x.forces(deep, torch.tensor([[1.0, -1, 0, 0, 0, 0]], dtype=torch.float64))[1][0, :2]
                   for x in (p, envs.PlanarHopper(5.0)))
    assert soft[1] == pytest.approx(2 * 0.01 * (2e4 + 2e3)) and stiff[1] == pytest.approx(5 * float(soft[1]))
    assert soft[0] == pytest.approx(-2 * 0.9 * 2e4 * 0.01) and (p.forces(deep + 0.2, deep)[1] == 0).all()


def test_gradients_through_the_planar_hopper_are_those_of_differences():
    p = envs.PlanarHopper()
    start = torch.zeros(1, 12, dtype=torch.float64)
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
        assert torch.allclose(J[:, i], (final(act + d) - final(act - d)) / 2e-6, rtol=1e-4, atol=1e-6)
    with envs.Herd("planar-hopper", 4, threads=1) as herd:  # rows of a herd are steps of the plant
        obs = herd.reset()
        a = np.random.default_rng(0).uniform(-1, 1, (4, 3))
        after = herd.step(a)[4]
    want = p.observe(p.step(p.state(torch.tensor(obs, dtype=torch.float64)), torch.tensor(a)))
    assert np.allclose(after, want, atol=1e-4)


@pytest.mark.parametrize("task", envs.TOY)
def test_toys_are_environments_too(task):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(envs.make_env(task), skip_render_check=True)
    env = envs.make_env(task)
    env.reset(seed=0)
    _, rew, term, trunc, _ = env.step(np.array([0.13 / math.pi]))
    assert (term, trunc) == (task == "ball-wall", False) and (rew > 21 or task != "ball-wall")
    assert envs.plant("ant") is None and envs.score(task, -7.5, 0) == -7.5 and envs.score("ant", 900, 0) == 900


@pytest.mark.parametrize("call, sentence", [
    (lambda: envs.Herd("walker-walk", 2), "hopper, ant.*'walker-walk'.*Flock"),
    (lambda: envs.Herd("ant", 0), "n=0.*1 or more of each"),
    (lambda: envs.make_env("hoper"), "unknown task 'hoper'.*hopper"),
    (lambda: envs.make_env("ball-wall", obs="pixels"), "draws no frames.*obs='state'"),
    (lambda: walk_into_nan(), "WalkNaN.*non-finite reward.*step 2"),
    (lambda: sine_herd_with(np.zeros((2, 8))), r"\(2, 8\), all finite; expected finite \(3, 8\)"),
    (lambda: sine_herd_with(np.full((3, 8), np.nan)), "not all finite"),
    (lambda: envs.Workers(1).rollout([("ant", 0)], lambda o, j, t: np.zeros((1, 3))), r"\(1, 3\).*\(1, 8\)")])
def test_bad_input_of_bodies_and_toys_is_one_sentence(call, sentence):
    with pytest.raises(SystemExit, match=sentence) as error:
        call()
    assert "\n" not in str(error.value)


def walk_into_nan():
    with envs.Flock(f"{__name__}:WalkNaN-v0", 2) as flock:
        flock.reset()
        for _ in range(3):
            flock.step(np.zeros((2, 1)))


def sine_herd_with(act):
    with envs.Herd("ant", 3, threads=1) as herd:
        herd.reset()
        herd.step(act)
