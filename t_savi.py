from t_head import *  # noqa: F401,F403


# ------------------------------------------------------------------------------------------ savi.py
@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A folder of small caches that all tests share; made by the first test that asks."""
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("video")


@pytest.fixture(autouse=True)
def few_clips(monkeypatch):
    monkeypatch.setattr(savi, "EVAL_CLIPS", 4)


def savi_args(cache, **flags):
    small = dict(device="cpu", compile=False, workers=1, clips=30, clip_frames=12, updates=6,
                 batch=4, dim=16, data_dir=str(cache))
    return savi.Args(**{**small, **flags})


def small_savi(**flags):
    kw = dict(size=32, slots=4, dim=16, frames=2)
    return savi.make_model(savi.filled(savi.Args(**{**kw, **flags}), torch.device("cpu")))


# ------------------------------------------------------------------------------------- metrics
def pair_ari(a, b):
    """The adjusted Rand index from all pairs of pixels, one by one."""
    n = len(a)
    pairs = [(a[i] == a[j], b[i] == b[j]) for i in range(n) for j in range(i)]
    both = sum(p and q for p, q in pairs)
    in_a, in_b = (sum(x) for x in zip(*pairs))
    expected, most = in_a * in_b / len(pairs), (in_a + in_b) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def test_savi_fg_ari_against_counting_pairs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        true, pred = rng.integers(0, 4, (2, 5, 4)), rng.integers(0, 5, (2, 5, 4))
        fg = true > 0
        assert np.isclose(savi.fg_ari(true, pred), pair_ari(true[fg], pred[fg]))
        assert np.isclose(savi.ari(true, pred), pair_ari(true.ravel(), pred.ravel()))
        names = rng.permutation(5)
        assert np.isclose(savi.fg_ari(true, names[pred]), savi.fg_ari(true, pred))
    assert savi.fg_ari(true, true) == 1 and savi.fg_ari(true, np.zeros_like(true)) == 0
    assert savi.fg_ari(torch.tensor(true), torch.tensor(pred)) == savi.fg_ari(true, pred)
    one = np.zeros((2, 5, 4), int)
    one[:, :2] = 1
    assert savi.fg_ari(one, np.zeros_like(one)) == 1.0  # one object, one slot
    assert savi.fg_ari(np.zeros_like(one), one) == 1.0  # nor an empty foreground
    big = np.arange(4_000_000) % 3 + 1  # squares of such counts need more than float32
    assert savi.fg_ari(big, big * 2) == 1.0
    assert abs(savi.fg_ari(big, np.zeros_like(big))) < 1e-12
    with says("masks of", "one shape"):
        savi.fg_ari(true, pred[:1])
    with says("from -1", "labels from 0"):
        savi.fg_ari(np.array([1, 1, 2, 2]), np.array([-1, -1, 0, 0]))
    with says("from -1", "labels from 0"):
        savi.fg_ari(np.array([-1, 1, 2, 2]), np.array([1, 1, 0, 0]))
    with says("float64", "argmax"):
        savi.fg_ari(true, pred / 5)


def test_savi_segment_scores_and_usage():
    true = np.zeros((1, 4, 4), int)
    true[0, :2, :2], true[0, 2:, 2:] = 1, 2
    assert savi.segment_scores(true, true) == {"miou": 1.0, "mbo": 1.0}
    s = savi.segment_scores(true, np.zeros_like(true))
    assert np.isclose(s["miou"], (8 / 16) / 3) and np.isclose(s["mbo"], 4 / 16)
    monopoly = np.zeros((1, 3, 4, 4))
    monopoly[:, 1] = true > 0
    monopoly[:, 0] = true == 0
    u = savi.usage(true, monopoly)
    assert np.allclose((u["top1"], u["eff"], u["conf"], u["whole"], u["top1_hard"]), 1)
    assert savi.fg_ari(true, monopoly.argmax(1)) == 0
    u = savi.usage(true, np.full((1, 3, 4, 4), 1 / 3))
    assert np.allclose((u["top1"], u["eff"], u["conf"]), (1 / 3, 3, 1 / 3))
    movie, swap = np.repeat(true, 4, 0), np.repeat(true, 4, 0)
    swap[3] = np.array([0, 2, 1])[swap[3]]
    assert savi.consistency(movie, movie) == 1 and savi.consistency(movie, swap) == 0.75


def test_savi_baselines_score_as_expected():
    true = np.zeros((2, 12, 12), np.int64)
    true[:, :6, :6], true[:, 6:, 6:] = 1, 2
    video = np.zeros((2, 12, 12, 3), np.uint8)
    video[true == 1], video[true == 2] = (255, 0, 0), (0, 0, 255)
    masks = savi.baseline_masks(true, video, k=2)
    score = {name: savi.fg_ari(true, m) for name, m in masks.items()}
    assert score["one slot"] == 0 and score["k-means rgb"] == 1 and abs(score["random"]) < 0.1
    assert score["k-means xy"] > 0.9 and score["grid 7x1"] < 1
    whole = {name: savi.ari(true, m) for name, m in masks.items()}  # with the background
    assert whole["k-means rgb, all"] == 1 and (masks["k-means rgb, all"] > 0).any()
    assert len(np.unique(masks["grid 2x3"])) == 6


# ------------------------------------------------------------------------------------ networks
def test_slot_attention_competes_and_is_equivariant():
    torch.manual_seed(0)
    f = savi.SlotAttention(12, 16)
    slots, tokens = torch.randn(2, 5, 16), torch.randn(2, 30, 12)
    out, attention = f(slots, tokens, iters=3)
    assert out.shape == (2, 5, 16) and attention.shape == (2, 30, 5)
    assert torch.allclose(attention.sum(-1), torch.ones(2, 30), atol=1e-6)
    order, other = torch.randperm(5), torch.randperm(30)
    assert torch.allclose(f(slots[:, order], tokens[:, other], 3)[0], out[:, order], atol=1e-5)
    same, _ = f(slots[:, :1].expand(2, 5, 16), tokens)
    assert torch.allclose(same, same[:, :1].expand_as(same), atol=1e-6)  # equal slots never part


@pytest.mark.parametrize("size,decoder", [(32, "mlp"), (32, "conv"), (64, "conv"), (128, "conv")])
def test_savi_shapes(size, decoder):
    model = small_savi(size=size, decoder=decoder, target="flow", predictor="transformer")
    tokens = {32: 256, 64: 4096, 128: 4096}[size]
    video = torch.rand(2, 1, 3, size, size)
    assert model.encoder(video[0]).shape == (1, tokens, 64 if size == 128 else 32)
    before, after, kl = model(video, torch.zeros(2, 1, 4))
    assert before.shape == after.shape == (2, 1, 4, 16) and float(kl) == 0
    picture, alpha, each = model.decode(after)
    assert picture.shape == (2, 1, 2, size, size) and each.shape == (2, 1, 4, 2, size, size)
    assert torch.allclose(alpha.sum(2), torch.ones(2, 1, size, size), atol=1e-5)


def test_savi_decodes_slots_in_one_batch_as_in_a_loop():
    for decoder in ("mlp", "conv"):
        model, slots = small_savi(decoder=decoder), torch.randn(2, 3, 4, 16)
        frames = []
        for s in slots:
            frames.append(torch.stack([model.decoder(s[:, j]) for j in range(4)], 1))
        x = torch.stack(frames)
        alpha = x[:, :, :, -1].softmax(2)
        picture = (alpha[:, :, :, None] * x[:, :, :, :-1]).sum(2)
        assert torch.allclose(model.decode(slots)[1], alpha, atol=1e-5)
        assert torch.allclose(model.decode(slots)[0], picture, atol=1e-5)


def test_savi_first_slots_and_noise():
    video, act = torch.rand(3, 2, 3, 32, 32), torch.zeros(3, 2, 0)

    def seen(model, seed):
        torch.manual_seed(seed)
        return model(video, act)

    gauss = small_savi(init="gauss")
    assert torch.equal(seen(gauss, 0)[1], seen(gauss, 0)[1])
    assert not torch.equal(seen(gauss, 0)[1], seen(gauss, 1)[1])
    cue, com = torch.rand(2, 4, 3), small_savi(init="com").initial
    assert torch.equal(com(act[0], cue)[0, 1], com(act[0], cue.flip(1))[0, 2])
    sto = small_savi(noise=1e-4)
    assert seen(sto, 0)[2] > 0 and not torch.equal(seen(sto, 0)[1], seen(sto, 1)[1])
    slots = seen(sto, 0)[1]
    mean, change = sto.sampler.spread(slots).chunk(2, -1)
    prior = torch.distributions.Normal(mean.detach(), 0.1)
    ours = torch.distributions.Normal(mean, 0.1 * (0.5 * change).exp())
    kl = torch.distributions.kl_divergence(ours, prior)
    assert torch.allclose(sto.sampler(slots)[1], kl.sum(-1).mean(), rtol=1e-4)
    long = sto(torch.rand(24, 2, 3, 32, 32), torch.zeros(24, 2, 0))
    assert long[1].abs().max() < 20 and long[2] < 20  # the noise does not feed itself
    masks = np.zeros((1, 1, 4, 6), int)
    masks[0, 0, 1:3, 2] = 2
    assert np.allclose(savi.centres(masks, 3)[0, 0], [[0, 0, 0], [0.5, 2.5 / 6, 1], [0, 0, 0]])


def test_savi_loss_terms_and_schedule():
    model, video, act = small_savi(), torch.rand(3, 2, 3, 32, 32), torch.rand(3, 2, 4)
    for weight in (1.0, 0.0):
        loss, terms = savi.savi_loss(model, video, video, act, None, weight, 0.0)
        assert (float(terms["pred"]) > 0) == (weight > 0)
        assert torch.allclose(loss, terms["recon"] + weight * terms["pred"])
    assert np.isclose(savi.warm_cosine(0, 100, 1.0), 1 / 7) and savi.warm_cosine(7, 100, 1.0) == 1
    assert savi.warm_cosine(99, 100, 1.0) < 1e-3


def test_savi_compiled_loss_was_compiled_and_agrees_with_eager(monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile",
                        lambda f, **kw: real(f, backend="eager", fullgraph=True, **kw))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = small_savi(pred_weight=1.0)
    video = torch.rand(2, 2, 3, 32, 32)
    batch = video, video, torch.rand(2, 2, 4), None, 1.0, 0.0
    f = torch.compile(savi.savi_loss, dynamic=False)
    a, b = f(model, *batch)[0], savi.savi_loss(model, *batch)[0]
    f(model, *batch)
    assert torch.allclose(a, b) and counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


# --------------------------------------------------------------------------------- whole script
def test_savi_smoke_loss_falls_and_files_are_written(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    moved, real = [], savi.train

    def spy(model, *rest):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        real(model, *rest)
        moved.extend(k for k, v in model.state_dict().items() if not torch.equal(v, before[k]))
        assert set(moved) == {k for k, _ in model.named_parameters()}

    monkeypatch.setattr(savi, "train", spy)
    result = savi.main(savi_args(cache, updates=60, capture_video=True, seed=3, frames=2))
    curve = result["curve"]
    assert curve[-1]["recon"] < 0.5 * curve[0]["recon"] and moved and curve[-1]["update"] == 60
    run = next((tmp_path / "runs").glob("objects__savi__3__*"))
    for name in ("slots.png", "time.png", "slots.gif", "slots.mp4", "results.json",
                 "checkpoint.pt", "args.json", "metrics.jsonl"):
        assert (run / name).stat().st_size > 0, name
    out = capsys.readouterr().out
    assert "k-means xy" in out and "grid 2x3" in out and "best trivial baseline" in out
    assert "update 60/60" in out and "/s, loss" in out
    kept = json.loads((run / "results.json").read_text())
    assert kept["baselines"]["one slot"]["fg_ari"] == 0 and kept["scores"] == result["scores"]
    # the same numbers from the checkpoint alone, with the network's flags read from it
    again = savi.main(savi.Args(checkpoint=str(run / "checkpoint.pt"), eval_only=True, workers=1,
                                data_dir=str(cache)))
    assert again["scores"] == result["scores"]
    with says("--dim 32", "leave it out"):
        savi.main(savi.Args(checkpoint=str(run / "checkpoint.pt"), dim=32))
    # a folder of video is a task too
    folder = next(p for p in cache.iterdir() if p.name.endswith("32px-30x12"))
    again = savi.main(savi.Args(task=str(folder), size=32, frames=2, dim=16, updates=2, workers=1))
    assert again["baselines"] == result["baselines"]
    with says("12 frames of 32 pixels", "--size 64"):
        savi.main(savi.Args(task=str(folder), size=64, updates=2, workers=1))


@pytest.mark.parametrize("flags", [dict(), dict(noise=1e-4, init="gauss", pred_weight=1.0)])
def test_savi_killed_and_resumed_ends_at_the_same_numbers(cache, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    flags = dict(updates=30, frames=2, **flags)
    whole = savi.main(savi_args(cache, **flags))
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    real, count = savi.savi_loss, []

    def dies(*a):
        count.append(0)
        if len(count) == 17:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*a)

    monkeypatch.setattr(savi, "savi_loss", dies)
    with says("stopped", "--resume runs/objects__savi__1__"):
        savi.main(savi_args(cache, **flags))
    assert len(count) == 17
    run = next((tmp_path / "b" / "runs").glob("objects*"))
    done = savi.main(savi.Args(resume=str(run)))
    assert len(count) == 30 and done["scores"] == whole["scores"]
    assert done["curve"] == whole["curve"]
    steps = [json.loads(x)["step"] for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and set(steps) == {10, 20, 30}
    again = savi.main(savi.Args(resume=str(run)))  # finished: measured, not trained
    assert len(count) == 30 and again["scores"] == whole["scores"]


@pytest.mark.parametrize("flags,words", [
    (dict(clip_frames=4, frames=5), ("clips of 4 frames", "--frames 4")),
    (dict(clip_frames=1, frames=1), ("--clip-frames 1", "at least 2")),
    (dict(frames=1, pred_weight=1.0), ("--pred-weight", "--frames 2")),
    (dict(pred_weight=-1.0), ("--pred-weight -1", "at least 0")),
    (dict(noise=-1e-4), ("--noise -0.0001", "at least 0")),
    (dict(lr=-1.0), ("--lr -1", "expected")), (dict(lr=float("nan")), ("--lr nan", "expected")),
    (dict(clip=0.0), ("--clip 0", "at least")), (dict(updates=0), ("--updates 0", "at least 1")),
    (dict(iters=(0, 1)), ("--iters (0, 1)", "at least 1")),
    (dict(dim=30, predictor="transformer"), ("--dim 30", "multiple of 4")),
    (dict(clips=5), ("--clips 5", "at least 10")),
    (dict(task="humanoid"), ("studies.scenes:Humanoid",)),
    (dict(task="nothing:Here"), ("nothing:Here", "expected objects")),
    (dict(eval_only=True, updates=None, batch=None), ("--checkpoint",)),
    (dict(checkpoint="nothing.pt", eval_only=True), ("--updates 6", "trains nothing")),
    (dict(checkpoint="nothing.pt"), ("--clips 30", "read from there")),
    (dict(resume="nothing"), ("no readable args.json",)),
    (dict(fast=True, preset="gpu"), ("--preset gpu", "--fast")),
    (dict(device="cuda"), ("no GPU", "--device cpu"))])
def test_savi_bad_flags_are_one_sentence(cache, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with says(*words):
        savi.main(savi_args(cache, **flags))
    assert not list(tmp_path.glob("runs/*"))


def test_savi_foreign_checkpoint_and_numbers_that_are_not_finite(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with says("nothing.pt", "savi.py"):
        savi.main(savi.Args(checkpoint="nothing.pt"))
    real = savi.savi_loss

    def broken(*a):
        loss, terms = real(*a)
        return loss * float("nan"), terms | dict(loss=torch.tensor(float("nan")))

    monkeypatch.setattr(savi, "savi_loss", broken)
    with says("not finite", "learning rate"):
        savi.main(savi_args(cache, frames=2))


def test_savi_runs_from_an_empty_folder(cache, tmp_path):
    for name in ("savi.py", "data.py", "envs.py"):
        shutil.copy(Path(HERE) / name, tmp_path)
    command = [sys.executable, "savi.py", "--fast", "--updates", "2", "--clips", "10",
               "--device", "cpu", "--workers", "1"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert out.returncode == 0, out.stderr[-2000:]
    assert "best trivial baseline" in out.stdout
    copy = next((tmp_path / "runs").glob("objects__*"))
    assert {"savi.py", "data.py", "envs.py", "results.json"} <= {p.name for p in copy.iterdir()}
