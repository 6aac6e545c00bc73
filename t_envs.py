import tempfile

from t_head import *  # noqa: F401,F403

# ------------------------------------------------------------------------------------------ envs.py
OWN_TASKS = '''
import gymnasium, numpy as np, envs

class Walk(gymnasium.Env):  # a seeded random walk that ends by itself after 3 to 12 steps
    action_space = gymnasium.spaces.Box(-2.0, 4.0, (1,), np.float32)
    observation_space = gymnasium.spaces.Dict(
        x=gymnasium.spaces.Box(-99.0, 99.0, (2,), np.float64),
        n=gymnasium.spaces.Box(0.0, 99.0, (), np.float64))

    def __init__(self, fault=""):
        self.fault = fault

    def _obs(self):
        return {"x": self.x.copy(), "n": np.array(float(self.n))}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.n = self.np_random.normal(size=2), 0
        self.end = int(self.np_random.integers(3, 13))
        return self._obs(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.n += 1
        self.x = self.x + 0.1 * action + 0.1 * self.np_random.normal(size=2)
        if self.n == 3 and self.fault == "nan":
            self.x[0] = np.nan
        if self.n == 3 and self.fault == "raise":
            raise ValueError("the gripper fell off")
        done = self.n == self.end
        return self._obs(), float(self.x[0]), done, False, {"is_success": done and self.x[0] > 0}

class Dot(Walk):  # with a picture and flat observations
    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gymnasium.spaces.Box(-99.0, 99.0, (3,), np.float64)

    def _obs(self):
        return np.array([*self.x, self.n])

    def render(self):
        return np.full((20, 20, 3), self.n, np.uint8)

def rows(n, seed, workers, mode="DISABLED", make=Dot):
    return gymnasium.vector.SyncVectorEnv(
        [make] * n, autoreset_mode=getattr(gymnasium.vector.AutoresetMode, mode))

for name, fault in (("Walk", ""), ("WalkNaN", "nan"), ("WalkRaise", "raise")):
    gymnasium.register(f"{name}-v0", entry_point=Walk, kwargs={"fault": fault})
facts = envs.Facts(obs_dim=3, act_dim=1, episode_length=9, action_repeat=1, scale=4.0, ends=True)
make = lambda seed, obs: Dot()
envs.register("own_tasks:dot", facts, make)
envs.register("own_tasks:dots", facts, make, batch=rows)
envs.register("own_tasks:again", facts, make, batch=lambda *a: rows(*a, "SAME_STEP"))
envs.register("own_tasks:bad-dots", facts, make,
              batch=lambda *a: rows(*a, make=lambda: Dot("nan")))
envs.register("own_tasks:twice", facts._replace(action_repeat=2), make)
envs.register("own_tasks:more", facts, make, batch=lambda n, *a: rows(n + 1, *a))
envs.register("own_tasks:wide", facts._replace(obs_dim=4), make)
'''
OWN_FOLDER = tempfile.mkdtemp()  # a light module: worker processes import it too
(Path(OWN_FOLDER) / "own_tasks.py").write_text(OWN_TASKS)
sys.path.insert(0, OWN_FOLDER)
WALK, DOT = "own_tasks:Walk-v0", "own_tasks:dot"


def wave(width):
    """A row-wise deterministic policy: no row sees another; a redone episode comes out the same."""
    def act(obs, job, t):
        assert len(obs) == len(job) == len(t) and obs.dtype == np.float32
        phase = obs[:, :1] + 0.7 * t[:, None] + job[:, None] + np.arange(width)
        return np.sin(phase).astype(np.float32)
    return act


def idle(obs, job, t):
    return np.zeros((len(obs), 1))


def plain_loop(jobs, act, width):
    """What Workers.rollout must equal: one environment after the other."""
    out = []
    for j, (task, seed) in enumerate(jobs):
        env = envs.make_env(task)
        obs, acts, steps = [env.reset(seed=seed)[0]], [], []
        while not (steps and (steps[-1][1] or steps[-1][2])):
            row = np.zeros((1, width), np.float32)
            row[0, :len(obs[-1])] = obs[-1]
            acts.append(act(row, np.array([j]), np.array([len(acts)]))[0][:env.facts.act_dim])
            after, *step = env.step(acts[-1])
            obs.append(after)
            steps.append(step)
        rew, term, _, info = zip(*steps)
        out.append(dict(task=task, seed=seed, obs=np.stack(obs), act=np.stack(acts),
                        rew=np.array(rew, np.float32), term=np.array(term),
                        success=info[-1]["success"], ret=float(sum(rew))))
        env.close()
    return out


def same_episodes(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert list(x) == list(y)
        for key in x:
            np.testing.assert_array_equal(x[key], y[key], err_msg=f"{x['task']} {x['seed']} {key}")
            assert getattr(x[key], "dtype", None) == getattr(y[key], "dtype", None)


JOBS = [("walker-walk", 3), (WALK, 1), ("mw-reach", 5), ("cup-spin", 2), (WALK, 7),
        ("Pendulum-v1", 0), (DOT, 8), ("walker-walk", 4), ("mw-reach", 6)]


# -------------------------------------------------------------------------------------------- tasks
@pytest.mark.parametrize("task, w, seed, ret", [
    ("walker-walk-backwards", 0.1, 1, 30.19), ("walker-run-backwards", 0.1, 1, 16.45),
    ("cheetah-run-backwards", 0.1, 1, 17.93), ("cheetah-run-front", 0.1, 1, 8.98),
    ("cheetah-run-back", 0.1, 1, 28.70), ("cheetah-jump", 0.1, 1, 190.49),
    ("pendulum-spin", 0.1, 1, 254.85), ("reacher-three-easy", 0.02, 1, 41.0),
    ("reacher-three-hard", 0.02, 0, 18.0), ("cup-spin", 0.5, 1, 290.79),
    ("hopper-hop-backwards", 0.5, 3, 2.30)])
def test_custom_task_parity(task, w, seed, ret):
    env = envs._load_suite(task, seed)
    env.reset()
    phase = np.arange(env.action_spec().shape[0])
    played = sum(env.step(np.sin(w * i + phase)).reward for i in range(1000))
    assert played == pytest.approx(ret, rel=0.02)


@pytest.mark.parametrize("task", ["walker-run", "cup-catch", "finger-turn-hard", "fish-swim",
                                  "acrobot-swingup", "point_mass-easy", "cheetah-jump",
                                  "humanoid_CMU-stand", "quadruped-walk"])
def test_direct_stepping_equals_dm_control(task):
    env, other = envs.make_env(task, seed=11), envs._load_suite(task, 11)
    obs, _ = env.reset(seed=11)
    step = other.reset()
    rng, spec = np.random.default_rng(0), other.action_spec()
    middle, half = (spec.maximum + spec.minimum) / 2, (spec.maximum - spec.minimum) / 2
    n = 500 if task == "walker-run" else 60
    for t in range(n + 1):
        want = np.concatenate([np.ravel(x) for x in step.observation.values()])
        np.testing.assert_array_equal(obs, want.astype(np.float32))
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
    assert facts == env.facts and facts[2:] == (500, 2, 1000.0, False)
    assert env.metadata["render_fps"] in (12, 20, 25, 50)
    assert obs.shape == (facts.obs_dim,) and info == {"success": 0.0}
    obs, rew, *_ = env.step(np.zeros(facts.act_dim, np.float32))
    assert obs.dtype == np.float32 and 0 <= rew <= 2


def test_names_facts_and_scores():
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    assert len(envs.MT30) == 30 and len(set(envs.METAWORLD50)) == 50
    assert envs.MT80 == envs.MT30 + envs.METAWORLD50 and envs.MT80[79] == "mw-hand-insert"
    assert envs.MT30[19] == "walker-walk-backwards" and envs.MT80[30] == "mw-assembly"
    assert len(envs.MT10) == 10 and set(envs.MT10) <= set(envs.METAWORLD50)
    assert {f"{n[3:]}-v3" for n in envs.METAWORLD50} == set(ALL_V3_ENVIRONMENTS)
    sizes = np.array([envs.task_facts(task)[:2] for task in envs.MT80])
    assert [*sizes[:30].max(0)] == [24, 6] and [*sizes.max(0)] == [39, 6]
    assert envs.task_facts("mw-reach") == envs.Facts(39, 4, 100, 2, 0.0, False)
    assert envs.task_facts("Pendulum-v1") == envs.Facts(3, 1, 200, 1, None, True)
    assert envs.task_facts(WALK) == envs.Facts(3, 1, 1000, 1, None, True)
    assert envs.task_facts(DOT) == envs.Facts(3, 1, 9, 1, 4.0, True)
    scores = [envs.score(*x) for x in (
        ("walker-walk", 500, 0), ("mw-reach", 900, 1), ("Pendulum-v1", -300, 0), (DOT, 6, 0),
        ("Boxing", 12.1, 0), ("Boxing", 0.1, 0), ("Boxing@m0d1", 12.1, 0))]
    assert scores == pytest.approx([0.5, 1.0, -300.0, 1.5, 1, 0, 1])


@pytest.mark.filterwarnings("ignore")  # that observations are unbounded is intended
@pytest.mark.parametrize("task", ["cartpole-swingup", "cup-spin", "reacher-three-hard",
                                  "point_mass-easy", "lqr-lqr-2-1", "mw-assembly", "Pendulum-v1",
                                  WALK, DOT])
def test_gymnasium_check_env(task):
    check_env(envs.make_env(task), skip_render_check=True)


@pytest.mark.parametrize("task", [
    "walker-walk", "reacher-three-easy", "cup-spin", "hopper-hop-backwards", "swimmer-swimmer6",
    "mw-assembly", "mw-reach", "mw-peg-insert-side", "mw-lever-pull", "mw-drawer-open",
    "Pendulum-v1", WALK, DOT])
def test_reset_seed_fixes_the_episode(task):
    used, fresh = envs.make_env(task, seed=1), envs.make_env(task, seed=2)
    acts = np.random.default_rng(0).uniform(-1, 1, (12, *used.action_space.shape))

    def play(env, seed):
        out = [env.reset(seed=seed)[0]]
        for a in acts:
            obs, rew, term, trunc, _ = env.step(a.astype(np.float32))
            out += [obs, np.float32(rew)]
            if term or trunc:
                break
        return np.hstack(out)

    before = play(used, 5)  # leaves traces of an earlier episode behind
    np.testing.assert_array_equal(play(used, 9), play(fresh, 9))
    np.testing.assert_array_equal(play(used, 5), before)
    assert not np.array_equal(used.reset()[0], used.reset()[0])  # unseeded resets go on drawing
    first, again = (envs.make_env(task, seed=2).reset()[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_metaworld_episodes_and_pixels_from_the_moved_camera():
    env = envs.make_env("mw-reach")
    assert len({tuple(env.reset()[0][-3:]) for _ in range(3)}) == 3  # goals
    for t in range(100):
        obs, rew, terminated, truncated, info = env.step(np.ones(4))
        assert not terminated and truncated == (t == 99) and 0 <= rew <= 20
        assert isinstance(info["success"], float)
    assert np.abs(obs[-3:]).sum() > 0  # the goal stays visible after steps
    options = dict(obs="pixels", camera="corner4", repeat=1, length=500)
    env, again = envs.make_env("mw-reach", **options), envs.make_env("mw-reach", **options)
    obs, _ = env.reset(seed=0)
    assert obs.shape == (64, 64, 3) and env.action_space.shape == (4,)
    assert env.facts[2:] == (500, 1, 0.0, False) and env.metadata["render_fps"] == 80
    table = obs[40:].astype(float).mean((0, 1))
    assert table[0] > table[2] + 20  # the wooden table is at the bottom: not upside down
    assert np.array_equal(again.reset(seed=0)[0], obs)
    again._frame = lambda: obs  # drawing 500 of them takes long
    assert [again.step(np.zeros(4))[3] for _ in range(500)] == [False] * 499 + [True]


def breakout(seed, n=40, **options):
    env = envs.make_env("Breakout", obs="pixels", **options)
    first, _ = env.reset(seed=seed)
    obs, *rest, infos = zip(*[env.step([1, 3, 4, 1][t % 4]) for t in range(n)])
    return np.stack([first, *obs]), [*zip(*rest, [info["life_lost"] for info in infos])]


def test_atari_games_follow_the_protocol():
    assert len(envs.ATARI26) == 26 and set(mow.STORM_RETURN) == set(envs.ATARI26)
    for game, n in dict(Alien=18, Breakout=4, Freeway=3, UpNDown=6, KungFuMaster=14).items():
        assert len(envs.make_env(game, obs="pixels").legal) == n
    env = envs.make_env("Boxing", obs="pixels")
    check_env(env, skip_render_check=True)
    facts = envs.task_facts("Boxing@m0d1")
    assert facts == env.facts == envs.Facts(12288, 18, 27_000, 4, 12.0, True)
    (a, ra), (b, rb), (c, _) = breakout(3), breakout(3), breakout(4)
    assert np.array_equal(a, b) and ra == rb and not np.array_equal(a, c)
    still = dict(sticky=0.0)  # then nothing is left to chance
    assert np.array_equal(breakout(3, **still)[0], breakout(4, **still)[0])
    assert not np.array_equal(*(breakout(seed, noop=30, **still)[0] for seed in (3, 4)))
    lost = breakout(3, n=60)[1]
    assert any(x[3] for x in lost) and not any(x[1] for x in lost[:20])  # the game goes on
    assert not any(x[3] for x in breakout(3, n=60, life_loss=False)[1])
    assert [x[2] for x in breakout(3, n=5, frame_cap=20)[1]] == [False] * 4 + [True]


def test_atari_frames_are_averages_over_areas_and_maxima_of_two_frames():
    rows = envs._areas(210, 64)
    assert rows.shape == (64, 210) and np.allclose(rows.sum(1), 1)
    assert np.allclose(rows.sum(0), 64 / 210, atol=1e-6)
    screen = np.random.default_rng(0).integers(0, 256, (210, 160, 3), np.uint8)
    env = envs.make_env("Boxing", obs="pixels")
    large = torch.from_numpy(screen).double().repeat_interleave(32, 0).repeat_interleave(2, 1)
    want = F.avg_pool2d(large.permute(2, 0, 1)[None], (105, 5))[0].permute(1, 2, 0)
    assert np.abs(env._shrink(screen).astype(float) - want.numpy()).max() <= 0.51
    env.reset(seed=0)
    frames, real, names = [], env._env, ("getScreenRGB", "game_over", "lives")

    def act(a):
        rew = real.act(a)
        frames.append(real.getScreenRGB())
        return rew
    env._env = types.SimpleNamespace(act=act, **{name: getattr(real, name) for name in names})
    obs = env.step(2)[0]
    assert len(frames) == 4
    assert np.array_equal(obs, env._shrink(np.maximum(frames[2], frames[3])))


# ------------------------------------------------------------------------------------- side by side
@pytest.mark.parametrize("task", ["InvertedPendulum-v5", "hopper-hop", DOT, "own_tasks:dots"])
def test_rows_equal_single_environments_and_go_on_from_their_actions(task):
    facts = envs.task_facts(task)
    acts = np.random.default_rng(0).uniform(-1, 1, (40, 3, facts.act_dim))
    with envs.beside(task, 3, 4, 1) as rows, envs.beside(task, 3, 5, 1) as other:
        out = [rows.reset()]
        for act in acts[:20]:
            out.append(rows.step(act))
        state = {k: torch.as_tensor(v) for k, v in rows.state_dict().items()}
        for act in acts[20:]:
            out.append(rows.step(act))
        assert any(x[2].any() for x in out[1:]) == facts.ends
        other.seed = 4
        np.testing.assert_array_equal(other.load_state_dict(state), out[20][0])
        for act, want in zip(acts[20:], out[21:]):
            for x, y in zip(other.step(act), want, strict=True):
                np.testing.assert_array_equal(x, y)
        with says("(2, ", "expected finite (3, "):
            rows.step(acts[0, :2])
    for i in range(3):  # every row alone
        env, want, k = envs.make_env(task), None, 0
        for t, act in enumerate(acts):
            if t == 0 or want[2] or want[3]:
                (seed,) = np.random.SeedSequence([4, i, k]).generate_state(1)
                start, k = env.reset(seed=int(seed))[0], k + 1
                np.testing.assert_array_equal(out[t][0][i] if t else out[0][i], start)
            want = env.step(act[i].astype(np.float32))
            obs, rew, term, trunc, last = (x[i] for x in out[t + 1])
            np.testing.assert_array_equal(last, want[0])
            assert rew == np.float32(want[1]) and (term, trunc) == want[2:4]
            assert term or trunc or (obs == last).all()
    assert (k > 2) == facts.ends


def test_a_registered_family_draws_is_truncated_and_has_its_own_scale():
    env = envs.make_env(DOT, obs="pixels", size=10)
    frames = [env.reset(seed=0)[0]] + [env.step(np.zeros(1))[0] for _ in range(2)]
    assert [f.shape for f in frames] == [(10, 10, 3)] * 3 and [f.max() for f in frames] == [0, 1, 2]
    with envs.Fleet([DOT, DOT]) as fleet:
        assert fleet.legal == [None, None] and fleet.reset([0, 1])[1].shape == (64, 64, 3)
    with envs.Workers(1) as workers:
        episodes = workers.rollout([(DOT, seed) for seed in range(20)], idle)
    ends = {(len(e["rew"]), bool(e["term"][-1])) for e in episodes}
    assert (9, False) in ends and len(ends) > 3
    assert all(t < 9 for t, terminated in ends if terminated) and max(ends)[0] == 9
    env, once = envs.make_env("own_tasks:twice"), envs.make_env(DOT)
    env.reset(seed=1), once.reset(seed=1)
    (obs, rew, *_), first, second = (x.step(np.ones(1)) for x in (env, once, once))
    assert np.array_equal(obs, second[0]) and rew == first[1] + second[1]


# ---------------------------------------------------------------------------------------- roll-outs
@pytest.fixture(scope="module")
def want():
    return plain_loop(JOBS, wave(6), 39)


@pytest.mark.parametrize("n, max_envs", [(2, 64), (2, 3)])
def test_rollout_equals_plain_loop(want, n, max_envs):
    calls, seen, act = [], [], wave(6)

    with envs.Workers(n, max_envs) as workers:
        got = workers.rollout(JOBS, lambda o, j, t: (calls.append(len(o)), act(o, j, t))[1],
                              lambda *x: seen.append(x))
        same_episodes(got, want)
        if max_envs == 64:
            one = workers.rollout(JOBS[1:2] * 2, lambda o, j, t: act(o, j * 0 + 1, t)[:, :1])
            same_episodes(one, [want[1]] * 2)
            assert workers.rollout([], act) == []
        pids = [p.pid for p, _ in workers.procs]
    assert max(calls) == min(max_envs, len(JOBS)) and seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    own = [e for e in got if e["task"] in (WALK, DOT)]
    assert all(len(e["rew"]) <= 12 for e in own) and any(e["term"][-1] for e in own)
    assert not any(e["term"].any() for e in got if e not in own)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_same_policy_calls_for_any_number_of_workers():
    traces, act = {1: [], 3: []}, wave(1)
    for n, calls in traces.items():
        with envs.Workers(n, 4) as workers:
            workers.rollout([(WALK, s) for s in range(12)] + [("Pendulum-v1", 1)],
                            lambda *x, to=calls: (to.append([y.copy() for y in x]), act(*x))[1])
    assert len(traces[1]) == len(traces[3])
    for one, three in zip(sum(traces[1], []), sum(traces[3], []), strict=True):
        np.testing.assert_array_equal(one, three)


def test_killed_worker_is_replaced_and_its_episodes_redone(want, capsys):
    act, kills = wave(6), []
    with envs.Workers(2) as workers:
        def killer(obs, job, t):
            if t.max() in (30, 60) and len(kills) < 2:
                kills.append(workers.procs[len(kills)][0].pid)
                os.kill(kills[-1], signal.SIGKILL)
            return act(obs, job, t)

        same_episodes(workers.rollout(JOBS, killer), want)
        err = capsys.readouterr().err
        assert len(kills) == 2 and all(f"pid {pid}" in err for pid in kills)
        assert "walker-walk" in err
        os.kill(workers.procs[1][0].pid, signal.SIGKILL)  # dead between two roll-outs
        got = workers.rollout(JOBS[1:3], lambda o, j, t: act(o, j + 1, t)[:, :4])
        same_episodes(got, [{**e, "act": e["act"][:, :4]} for e in want[1:3]])


def test_third_death_stops():
    with envs.Workers(1) as workers:
        with says("while playing Pendulum-v1", "third death", "max_envs"):
            workers.rollout([("Pendulum-v1", 0)], lambda *x: (
                os.kill(workers.procs[0][0].pid, signal.SIGKILL), idle(*x))[1])
        assert len(workers.rollout([("Pendulum-v1", 0)], idle)) == 1  # still usable


def alive(pid):  # a zombie that waits for a lazy init is dead enough
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_import_is_light_and_workers_need_no_guard_and_exit_with_their_parent(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys, time; sys.path.insert(0, {HERE!r})
import envs, numpy as np
print({{'torch', 'dm_control', 'metaworld', 'mujoco'}} & set(sys.modules))
workers = envs.Workers(2)
jobs = [("Pendulum-v1", 0), ("Pendulum-v1", 1)]
print(len(workers.rollout(jobs, lambda o, j, t: np.zeros((len(o), 1)))))
print(*[p.pid for p, _ in workers.procs], flush=True); time.sleep(60)""")
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert [parent.stdout.readline().strip() for _ in range(2)] == ["set()", "2"]
    pids = [int(p) for p in parent.stdout.readline().split()]
    parent.kill()
    assert parent.communicate()[0] == ""  # the processes did not run the script again
    until = time.time() + 5
    while any(map(alive, pids)) and time.time() < until:
        time.sleep(0.05)
    assert len(pids) == 2 and not any(map(alive, pids))


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
        assert all(np.array_equal(a, s[0]) for a, s in zip(again, steps))
        assert not np.array_equal(first[0], again[0])
        os.kill(fleet.procs[1][0].pid, signal.SIGKILL)
        fleet.send([0, 0], [1, 1])
        with says("Pong died", "--resume"):
            fleet.receive()


# ---------------------------------------------------------------------------------------- bad input
def stepped(env, act, speed=None):
    with contextlib.closing(env):
        env.reset()
        if speed:
            env._physics.data.qvel[:] = speed
        for _ in range(20):
            env.step(act)


def played(*tasks, act=idle):
    with envs.Workers(1) as workers:
        workers.rollout([(task, 0) for task in tasks], act)


@pytest.mark.parametrize("call, words", [
    (lambda: envs.make_env("walker-wlak"), "unknown task 'walker-wlak' | walker-walk"),
    (lambda: envs.make_env("mw-asembly"), "mw-assembly"),
    (lambda: envs.make_env("Pendulum"), "Pendulum-v1"),
    (lambda: envs.task_facts("cup_spin"), "cup-spin"),
    (lambda: envs.make_env("zzzzzz"), "nearest: none"),
    (lambda: envs.make_env("own_tasks:Walkk-v0"), "own_tasks:Walkk-v0 | Walk-v0"),
    (lambda: envs.make_env("own_tasks:dott"), "own_tasks:dott | own_tasks:dot,"),
    (lambda: envs.make_env("no_such_module:Walk-v0"), "no_such_module | module that Python"),
    (lambda: envs.make_env("CartPole-v1"), "CartPole-v1 | Discrete | continuous Box"),
    (lambda: envs.make_env("walker-walk", obs="rgb"), "obs='rgb' | 'state' or 'pixels'"),
    (lambda: envs.make_env("walker-walk", sticky=0.1), "sticky | no options"),
    (lambda: envs.make_env("ant"), "ant has moved | type --task studies.bodies:ant"),
    (lambda: envs.task_facts("ball-wall"), "type --task studies.plants:ball-wall"),
    (lambda: envs.make_env("Pong"), "Pong has no state | obs='pixels'"),
    (lambda: envs.make_env("Pong@m9d9", obs="pixels"), "Pong@m<mode>d<difficulty>"),
    (lambda: envs.make_env(WALK, obs="pixels").reset(), "draws no frames | obs='state'"),
    (lambda: envs.make_env("own_tasks:wide"), "own_tasks:wide | (4, 1) | (3, 1)"),
    (lambda: envs.register("dot", envs.Facts(3, 1, 9, 1), None), "'dot' | 'module:name'"),
    (lambda: envs.register("a:dot", (3, 1, 9, 1), None), "(3, 1, 9, 1) | Facts(obs_dim"),
    (lambda: envs.beside(DOT, 0), "n=0 | 1 or more"),
    (lambda: envs.beside("own_tasks:again", 2), "AutoresetMode.DISABLED | SAME_STEP"),
    (lambda: envs.beside("own_tasks:more", 2), "has 3 rows | expected 2"),
    (lambda: stepped(envs.beside("own_tasks:bad-dots", 2), np.zeros((2, 1))),
     "bad-dots | non-finite observation"),
    (lambda: stepped(envs.beside("own_tasks:WalkNaN-v0", 2), np.zeros((2, 1))),
     "WalkNaN | non-finite reward | step 2"),
    (lambda: envs.Workers(0), "n=0 | 1 or more of each"),
    (lambda: envs.Fleet(["Boxin"]), "nearest | Boxing"),
    (lambda: played("Pendulum-v1", "own_tasks:WalkNaN-v0"), "WalkNaN | non-finite | step"),
    (lambda: played("Pendulum-v1", "own_tasks:WalkRaise-v0"), "WalkRaise | gripper fell off"),
    (lambda: played("Pendulum-v1", act=lambda o, j, t: np.zeros((1, 3))),
     "shape (1, 3) | expected (1, 1)"),
    (lambda: stepped(envs.make_env("walker-walk"), np.full(6, np.nan)),
     "walker-walk | non-finite action | step 0"),
    (lambda: stepped(envs.make_env("cheetah-run"), np.ones(6), speed=1e12),
     "cheetah-run | non-finite | step")])
def test_bad_input_of_envs_is_one_sentence(call, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log
    with says(*words.split(" | ")):
        call()


def test_a_missing_package_or_opengl_is_one_sentence(monkeypatch):
    for module in ("metaworld", "metaworld.env_dict", "ale_py"):
        monkeypatch.setitem(sys.modules, module, None)
    with says("pip install metaworld==3.1.1"):
        envs.make_env("mw-reach")
    with says("pip install ale-py==0.12.1"):
        envs.make_env("Pong", obs="pixels")
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(envs.subprocess, "run", lambda *a, **k: failed)
    with says("libegl1", "libosmesa6", "MUJOCO_GL"):
        envs.make_env("walker-walk", obs="pixels")
    assert "MUJOCO_GL" not in os.environ
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    assert envs.choose_gl() == "glfw"
