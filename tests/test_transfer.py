"""Transfer: whose encoder it is, which labels it has, which layer learns how fast, what is probed."""
import importlib
import json
import re

import pytest
import torch
import torch.nn.functional as F
from running import METHODS, ROOT, load, train

import common
from kernels import evaluation
from kernels.encoders import create_encoder
from kernels.views import normalise

transfer = load("transfer")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of MAE, three steps long."""
    out = tmp_path_factory.mktemp("runs")
    flags = "--data toys:n=100 --image_size 16 --steps 3 --batch_size 50 --decoder_dim 32 --out"
    mae = load("mae")
    mae.main(common.parse(mae.Config, mae.PAPER, [*flags.split(), str(out)]))
    return out / "mae-toys-n=100-seed0"


def test_the_encoder_of_a_run_comes_back_with_its_features(run):
    encoder, cfg = transfer.pretrained(run)
    assert (cfg.data, cfg.image_size, cfg.decoder_dim) == ("toys:n=100", 16, 32) and encoder.pool == "mean"
    saved = torch.load(run / "encoder.pt", weights_only=True)
    assert all(torch.equal(saved[name], p) for name, p in encoder.state_dict().items())
    assert all(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"transfer", "slot_attention"}))
def test_a_run_of_any_method_is_taken_up(name, tmp_path):
    """Its encoder comes back, has a map for the dense probe, and layers with rates of their own (but for slot
    attention's, which is two bare convolutions)."""
    module = load(name)
    torch.save(module.build(module.Config()).encoder.state_dict(), tmp_path / "encoder.pt")
    (tmp_path / "result.json").write_text(json.dumps(dict(method=name, flags={})))
    encoder, cfg = transfer.pretrained(tmp_path)
    method, size = transfer.Transfer(encoder), cfg.image_size
    scales = {id(g["params"][0]): g["scale"] for g in transfer.by_layer(method, .5, .3)}
    assert len(set(scales.values())) >= 5 and max(scales.values()) == 1
    x = torch.randn(2, 3, size, size)
    a = encoder.layers(x)[-1]
    assert a.shape[0] == 2 and min(a.shape[2:]) >= 4             # [B,D,h,w]
    method(x, torch.tensor([0, 1])).backward()
    moving = [p for p in method.parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert len({scales[id(p)] for p in moving}) >= (2 if name == "pixelcnn" else 4)      # features of layer 1


def test_from_scratch_a_run_gives_its_network_and_its_data_alone(run, monkeypatch):
    """--scratch: the weights are random, the same for the same seed; all layers learn at one rate."""
    monkeypatch.setattr(common.Run, "finish", lambda self, **more: None)

    def start(seed):
        seen, begin = [], common.Run.start
        monkeypatch.setattr(common.Run, "start", lambda self, method, data, reference, optimizer: (
            seen.extend([method.encoder.state_dict()["blocks.0.attn.qkv.weight"].clone(), optimizer]),
            begin(self, method, data, reference, optimizer))[1])
        flags = f"--run {run} --scratch --steps 1 --batch_size 20 --no-probes --seed {seed}".split()
        transfer.main(cfg := common.parse(transfer.Config, transfer.PAPER, flags))
        monkeypatch.setattr(common.Run, "start", begin)
        assert cfg.data == "toys:n=100" and {g["scale"] for g in seen[1].param_groups} == {1.}
        return seen[0]
    learned = torch.load(run / "encoder.pt", weights_only=True)["blocks.0.attn.qkv.weight"]
    first, again, other = start(0), start(0), start(1)
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first, learned)


def test_from_scratch_igpt_keeps_its_palette_alone(tmp_path):
    """Without it all pixels would be one word, and all images one feature."""
    module = load("igpt")
    learned = module.build(module.Config()).encoder
    learned.centres.uniform_(-1, 1)
    torch.save(learned.state_dict(), tmp_path / "encoder.pt")
    (tmp_path / "result.json").write_text(json.dumps(dict(method="igpt", flags={})))
    encoder, cfg = transfer.pretrained(tmp_path, scratch=True)
    assert torch.equal(encoder.centres, learned.centres)
    fresh = {k for k, p in encoder.named_parameters() if not torch.equal(p, learned.state_dict()[k])}
    assert {"colour", "position", "blocks.0.qkv.weight"} <= fresh
    h = encoder(torch.randn(2, 3, cfg.image_size, cfg.image_size))
    assert (h[0] - h[1]).abs().max() > 1e-3


def test_a_run_moves_to_other_data(run):
    """Such as a run on clips, which have no labels: --data names images of the same size that have."""
    flags = f"--run {run} --steps 1 --batch_size 20 --data toys:n=200,grey --no-probes".split()
    result = transfer.main(common.parse(transfer.Config, transfer.PAPER, flags))
    assert result["labelled"] == 200 and result["data"] == "toys:n=200,grey"
    assert (run / "transfer-toys-n=200-grey-seed0" / "result.json").exists()


def test_where_it_writes_and_where_data_lie_can_be_said_beside_a_run(run, tmp_path, monkeypatch):
    """Only what is not said is the run's."""
    seen, load = [], common.load_data
    monkeypatch.setattr(transfer, "load_data", lambda cfg, device: (seen.append(cfg), load(cfg))[1])
    flags = f"--run {run} --steps 1 --batch_size 20 --no-probes --out {tmp_path} --data_dir elsewhere".split()
    transfer.main(common.parse(transfer.Config, transfer.PAPER, flags))
    assert (tmp_path / "transfer-toys-n=100-seed0" / "result.json").exists()
    assert seen[0].data_dir == "elsewhere" and seen[0].data == "toys:n=100"


@pytest.mark.parametrize("flags", ["--weights x.pt", "--optimizer sgd"])
def test_two_networks_are_one_too_many_and_another_optimizer_is_none(run, flags):
    with pytest.raises(SystemExit, match="give --run or --weights, not both, and no --optimizer but adamw"):
        transfer.main(common.parse(transfer.Config, transfer.PAPER, ["--run", str(run), *flags.split()]))


def test_toys_can_be_named_beside_a_run_on_other_data(run, monkeypatch):
    """They are not mistaken for what a run without --data has."""
    seen, fail = [], common.fail
    monkeypatch.setattr(transfer, "load_data", lambda cfg, device: seen.append(cfg.data) or fail("stop"))
    for flags in [], ["--data", "toys"], ["--data", "cifar10"]:
        with pytest.raises(SystemExit, match="stop"):
            transfer.main(common.parse(transfer.Config, transfer.PAPER, ["--run", str(run), *flags]))
    with pytest.raises(SystemExit, match="stop"):
        transfer.main(common.parse(transfer.Config, transfer.PAPER, ["--out", str(run)]))
    assert seen == ["toys:n=100", "toys", "cifar10", "toys"]


def test_before_fine_tuning_stand_the_runs_own_figures(run, monkeypatch, capsys):
    """Frozen features with all labels: k-NN and probe are those that the run ended with."""
    flags = "--run", str(run), "--steps", "2", "--batch_size", "50"
    cfg = common.parse(transfer.Config, transfer.PAPER, [*flags])
    result = transfer.main(cfg)
    before = json.loads((run / "result.json").read_text())
    assert result["labelled"] == 100 and 0 <= result["accuracy"] <= 100
    assert result["untrained"] == {k: before[k] for k in ("knn", "linear")}
    assert "before training" in capsys.readouterr().out
    assert list(result["layers"]) == [f"layer {i}" for i in (1, 2, 3, 4)]
    assert (run / "transfer-toys-n=100-seed0" / "result.json").exists()
    files = run / "encoder.pt", run / "transfer-toys-n=100-seed0" / "encoder.pt"
    weights = [torch.load(file, weights_only=True)["norm.weight"] for file in files]
    assert not torch.equal(*weights)
    method, data = transfer.build(cfg, transfer.pretrained(run)[0]), common.load_data(cfg)
    method.load_state_dict(torch.load(files[1].with_name("checkpoint.pt"), weights_only=True)["model"])
    told = method.eval().classifier(method.encoder(normalise(data.test_images))).argmax(1)
    assert result["accuracy"] == common.percent(told, data.test_labels)


def test_every_layer_is_probed_before_and_after(run):
    """The frozen one as common does it for a pre-trained encoder, on the labels that were chosen."""
    flags = "--run", str(run), "--steps", "2", "--batch_size", "20", "--labels", ".5"
    result = transfer.main(common.parse(transfer.Config, transfer.PAPER, [*flags]))
    data = common.load_data(common.Config(data="toys:n=100", image_size=16))
    torch.manual_seed(0)
    encoder, _ = transfer.pretrained(run)
    torch.manual_seed(0)
    chosen = transfer.some_of_each_class(data.labels, .5)
    few = data._replace(images=data.images[chosen], labels=data.labels[chosen])
    assert result["labelled"] == 50 == len(few.images)
    maps = [encoder.eval().layers(normalise(x)) for x in (few.images, data.test_images)]
    for i, pair in enumerate(zip(*maps, strict=True), 1):
        cells = [F.adaptive_avg_pool2d(a.detach(), 2).flatten(1) for a in pair]
        told = result["layers"][f"layer {i}"]["untrained"]["linear"]
        assert told == pytest.approx(common.probe(*cells, few)["linear"])


def test_the_dense_probe_sees_the_class_of_each_pixel(run, monkeypatch):
    """Maps of the frozen encoder, ground 0, toy of class c: c + 1, of at most n images."""
    seen = []
    monkeypatch.setattr(evaluation, "dense_probe", lambda *a: seen.extend(a) or "told")
    data = common.load_data(common.Config(data="toys:n=100", image_size=16))
    encoder, _ = transfer.pretrained(run)
    told, y_test = transfer.segment(lambda x: encoder.eval().layers(normalise(x))[-1], data, n=70)
    a, y, a_test, size = seen
    assert told == "told" and size == (16, 16)
    torch.testing.assert_close(a, encoder.eval().layers(normalise(data.images[:70]))[-1].detach())
    assert a.shape == (70, 128, 8, 8) and a_test.shape == (100, 128, 8, 8) and not a.requires_grad
    assert len(y) == 70 and len(y_test) == 100
    for told, masks, labels in ((y, data.masks, data.labels), (y_test, data.test_masks, data.test_labels)):
        for t, m, c in zip(told, masks, labels.tolist(), strict=False):
            assert torch.equal(t, (m > 0) * (c + 1)) and t.max() == c + 1


def test_places_are_told_better_by_the_pixels_than_by_chance(tmp_path, monkeypatch):
    """Maps of pixels find more than the ground; the probes and their picture can be left out."""
    data = common.load_data(common.Config(data="toys:n=400,grey", image_size=16))
    ground = (data.test_masks == 0).float().mean().item() / 11   # what class 0 alone would have
    told, truth = transfer.segment(lambda x: F.avg_pool2d(normalise(x), 2), data)
    assert ground < transfer.class_iou(told, truth) < .5
    flags = "--data toys:n=100 --image_size 16 --steps 1 --batch_size 50 --out".split()
    results, drawn = [], []
    monkeypatch.setattr(common, "save_grid", lambda path, rows: drawn.append((path.name, rows)))
    for more in ([], ["--no-probes"]):
        cfg = common.parse(transfer.Config, transfer.PAPER, [*flags, str(tmp_path), *more])
        results.append(transfer.main(cfg))
    (name, rows), = drawn
    assert name == "places.png" and list(rows) == ["x", "truth", "frozen", "tuned"]
    assert all(x.shape == (10, 3, 16, 16) for x in rows.values()) and len(rows["truth"].unique()) > 5
    assert all(0 < results[0][k] < 1 for k in ("miou", "miou_untrained"))
    assert "layers" not in results[1] and "miou" not in results[1] and results[0]["knn"] == results[1]["knn"]


def test_what_is_no_run_is_named(tmp_path):
    for text in (None, '{"method": "mae"', '[]', '{"method": "maee", "flags": {}}', '{"method": "mae"}'):
        if text:
            (tmp_path / "result.json").write_text(text)
        with pytest.raises(SystemExit, match="is no folder of a finished run"):
            transfer.pretrained(tmp_path)


def test_beits_shared_biases_learn_at_the_rate_of_the_head():
    """They belong to all blocks, and are a parameter of the first."""
    method = transfer.Transfer(load("beit").build(load("beit").Config()).encoder)
    scales = {id(g["params"][0]): g["scale"] for g in transfer.by_layer(method, .5, 0.)}
    names = {name: scales[id(p)] for name, p in method.named_parameters()}
    assert names["encoder.blocks.0.bias.table"] == names["classifier.weight"] == 1
    assert names["encoder.blocks.0.attn.qkv.bias"] == .5 ** 4 and names["encoder.blocks.3.norm1.weight"] == .5


def test_from_scratch_there_must_be_a_run():
    with pytest.raises(SystemExit, match="is no folder of a finished run"):
        transfer.main(common.parse(transfer.Config, transfer.PAPER, ["--scratch"]))


def test_a_share_of_the_labels_is_one_of_each_class():
    torch.manual_seed(0)
    labels = torch.tensor([0] * 50 + [1] * 30 + [7] * 9)[torch.randperm(89)]
    chosen = transfer.some_of_each_class(labels, .1)
    assert labels[chosen].bincount().tolist() == [5, 3, 0, 0, 0, 0, 0, 1] and len(chosen.unique()) == 9
    assert transfer.some_of_each_class(labels, 1.).sort().values.tolist() == list(range(89))
    assert len(transfer.some_of_each_class(torch.zeros(100), .07)) == 7  # .07 x 100 is 7.000000000000001
    assert transfer.some_of_each_class(labels, .1).tolist() != chosen.tolist()


    assert transfer.some_of_each_class(labels, 1.).tolist() == list(range(89))


def published(name, size, seed=0):
    """A file as others publish it: torchvision's ResNet with fc, DINO's teacher with wrappers and a head."""
    torch.manual_seed(seed)
    state = create_encoder(name, size).state_dict()
    if name.startswith("resnet"):
        return state | {"fc.weight": torch.ones(1000, 512), "fc.bias": torch.ones(1000)}
    teacher = {"backbone." + k: v for k, v in state.items()} | {"head.mlp.0.weight": torch.ones(8, 128)}
    return dict(teacher=teacher, student=teacher, epoch=100)


@pytest.mark.parametrize("name, size, more", [("resnet18", 64, []), ("vit_micro/4", 16, []),
                                              ("vit_micro/4", 16, ["--cls"])])
def test_published_weights_are_tuned_as_a_run_is(tmp_path, monkeypatch, capsys, name, size, more):
    """They are what is probed before training, and layers learn at rates of their own."""
    file, starts, start = tmp_path / "published.pth", [], common.Run.start
    torch.save(published(name, size), file)
    monkeypatch.setattr(common.Run, "start", lambda self, method, data, reference, optimizer: (
        starts.append(optimizer), start(self, method, data, reference, optimizer))[1])
    flags = ["--weights", str(file), "--encoder", name, "--image_size", str(size), "--data", "toys:n=100",
             "--steps", "1", "--batch_size", "20", "--decay", ".75", "--out", str(tmp_path), *more]
    result = transfer.main(common.parse(transfer.Config, transfer.PAPER, flags))
    assert len({g["scale"] for g in starts[0].param_groups}) == 6        # embedding, four layers, head
    assert "before training" in capsys.readouterr().out and 0 < result["miou_untrained"] < 1
    theirs = create_encoder(name, size, **dict(pool="cls" if more else "mean") if name != "resnet18" else {})
    torch.manual_seed(0)
    theirs.load_state_dict({k.removeprefix("backbone."): v for k, v in published(name, size).get(
        "teacher", published(name, size)).items() if not k.startswith(("fc.", "head."))})
    data = common.load_data(common.Config(data="toys:n=100", image_size=size))
    own = common.probe(*(common.features(theirs, x) for x in (data.images, data.test_images)), data)
    assert result["untrained"] == own
    encode = lambda x: theirs.eval().layers(normalise(x))[-1]    # noqa: E731
    assert result["miou_untrained"] == pytest.approx(evaluation.class_iou(
        *evaluation.segment(encode, data)), abs=1e-6)


def test_k_nn_probe_and_training_see_the_chosen_labels_alone(tmp_path, monkeypatch):
    seen, views = [], transfer.views
    monkeypatch.setattr(transfer, "views", lambda x, **o: seen.append(x) or views(x, **o))
    flags = "--labels", ".1", "--steps", "3", "--batch_size", "10"
    method, _, _ = train("transfer", tmp_path, monkeypatch, *flags, images=100)
    assert [len(x.flatten(1).unique(dim=0)) for x in seen] == [10, 10, 10]
    assert len(torch.cat(seen).flatten(1).unique(dim=0)) == 10


@pytest.mark.parametrize("name, known", [
    ("vit_micro/4", {"encoder.cls_token": 5, "encoder.patch_embed.proj.weight": 5, "encoder.pos_embed": 5,
                     "encoder.blocks.0.attn.qkv.weight": 4, "encoder.blocks.3.mlp.fc2.bias": 1,
                     "encoder.norm.weight": 0, "classifier.weight": 0}),
    ("resnet_small", {"encoder.conv1.weight": 4, "encoder.bn1.bias": 4, "encoder.layer1.0.conv1.weight": 3,
                      "encoder.layer3.0.downsample.1.weight": 1, "classifier.bias": 0})])
def test_rates_fall_by_layer(name, known):
    """Powers of the decay; nothing that has one dimension decays."""
    method = transfer.Transfer(create_encoder(name, 16))
    groups = {id(g["params"][0]): g for g in transfer.by_layer(method, .5, .3)}
    assert len(groups) == len(list(method.parameters()))
    for weight, power in known.items():
        p = method.get_parameter(weight)
        assert groups[id(p)]["scale"] == .5 ** power, weight
        assert groups[id(p)]["weight_decay"] == .3 * (p.ndim > 1), weight


def test_the_step_uses_the_scaled_rates_and_from_scratch_there_is_one(tmp_path, monkeypatch, run):
    rates, step = [], torch.optim.AdamW.step
    def spy(self, *args):
        rates.append(sorted({round(g["lr"], 9) for g in self.param_groups}))
        return step(self, *args)
    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    flags = "--steps", "1", "--lr", "8e-3", "--warmup", "0", "--batch_size", "50"
    train("transfer", tmp_path, monkeypatch, *flags, "--encoder", "vit_micro", images=50)
    train("transfer", tmp_path, monkeypatch, *flags, "--run", str(run), "--decay", ".5", images=50)
    train("transfer", tmp_path, monkeypatch, *flags, "--run", str(run), images=50)
    assert rates == [[.008], [.00025, .0005, .001, .002, .004, .008], [.008]]


def test_smoothing_by_hand():
    torch.manual_seed(0)
    method = transfer.Transfer(create_encoder("resnet_small", 16), 4, smoothing=.2)
    x = torch.randn(6, 3, 16, 16)
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    method.eval()
    log_p = method.classifier(method.encoder(x)).log_softmax(1)
    by_hand = -(.8 * log_p[torch.arange(6), y] + .2 * log_p.mean(1)).mean()
    assert method(x, y).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_flat_folders_are_refused(tmp_path):
    data = common.load_data(common.Config(data="toys:n=100,objects=2", image_size=16))
    assert data.labels is None and normalise(data.images[:1]).shape == (1, 3, 16, 16)
    cfg = transfer.Config(data="toys:n=100,objects=2", image_size=16, out=str(tmp_path), batch_size=50)
    with pytest.raises(SystemExit, match="has no labels"):
        transfer.main(cfg)


@pytest.fixture
def lessons(tmp_path, monkeypatch):
    """results/lessons.py with its commands written down, not run; a row for each."""
    monkeypatch.syspath_prepend(ROOT / "results")
    module, ran = importlib.import_module("lessons"), []
    (tmp_path / "results").mkdir()

    def run_one(words, file, results):
        ran.append(words)
        cfg = common.parse(transfer.Config, transfer.PAPER, words[1:])
        row = dict(command=" ".join(["python", *words]), seed=cfg.seed, labelled=int(100 * cfg.labels),
                   accuracy=90 * cfg.labels, untrained=dict(linear=50 * cfg.labels), machine="m", torch="t")
        with open(file, "a") as f:
            f.write(json.dumps(row) + "\n")
        written = tmp_path / (cfg.run or "runs") / f"transfer-toys-seed{cfg.seed}/result.json"
        written.parent.mkdir(parents=True, exist_ok=True)
        written.touch()
        assert list(results) == [written]

    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "run_one", run_one)
    monkeypatch.setattr(module.subprocess, "run", lambda words, **o: ran.append(words[1:]))
    return module, ran, tmp_path


@pytest.mark.parametrize("words", [
    "", "mask", "tenth 7", "tenth --seed=0", "attmask --sed 0", "matrix --seed 1"])
def test_a_lesson_that_is_none_starts_no_run(lessons, words):
    module, ran, _ = lessons
    with pytest.raises(SystemExit, match="Lessons of the lecture"):
        module.main(*words.split())
    assert not ran


def test_label_efficiency_runs_what_is_missing_and_draws(lessons):
    module, ran, root = lessons
    module.label_efficiency(["--seed", "3"])
    trained, tuned = ([words for words in ran if ("transfer" in words[0]) == t] for t in (False, True))
    assert trained == [[f"methods/{name}.py", "--seed", "3"] for name in module.STARTS]
    for words in tuned:
        cfg = common.parse(transfer.Config, transfer.PAPER, words[1:])
        assert cfg.seed == 3 and cfg.steps == 900 and cfg.run.startswith("runs/")
        assert cfg.lr == (1e-3 if "mae" in cfg.run else 3e-3) and cfg.probes == (cfg.labels == .1)
    assert ["--scratch" in words for words in tuned] == [False] * 5 + [True] * 5 + [False] * 8 + [True] * 3
    assert (root / "results/labels.png").stat().st_size > 1000
    file = root / "results/variants-labels.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:4] + lines[5:]) + "\n")  # the fifth of the runs is lost
    for name in module.STARTS:
        (root / f"runs/{name}-toys-seed3/encoder.pt").touch()
    ran.clear()
    module.label_efficiency(["--seed", "3"])
    assert ran == [tuned[4]]


def test_a_tenth_of_the_labels_for_every_method_of_the_first_table(lessons, monkeypatch):
    """Trained where there is no run, then fine-tuned and from scratch; what has been run is not run again."""
    module, ran, root = lessons
    (root / "runs/mae-toys-seed2").mkdir(parents=True)
    (root / "runs/mae-toys-seed2/encoder.pt").touch()
    module.tenth(["--seed", "2"])
    names = [name for group, name in module.grouped() if group not in ("Objects", "With labels, the bound")]
    names.remove("video_colorization")
    trained, tuned = ([w for w in ran if ("transfer" in w[0]) == which] for which in (False, True))
    assert trained == [[f"methods/{name}.py", "--seed", "2"] for name in names if name != "mae"]
    twins = importlib.import_module("table").TWINS
    assert [re.search("runs/([a-z_]+)-", words[2])[1] for words in tuned if "--scratch" in words] == [
        name for name in names if name not in twins]
    for name, words in zip(names, [words for words in tuned if "--scratch" not in words], strict=True):
        cfg = common.parse(transfer.Config, transfer.PAPER, words[1:])
        own = common.Config(data=load(name).Config().data, seed=2, out=str(root))
        assert cfg.run == f"runs/{common.Run(own, ROOT / f'methods/{name}.py').folder.name}"
        assert (cfg.labels, cfg.steps) == (.1, 300)
        assert cfg.lr == (.003 if load(name).Config().encoder == "resnet_small" else .001)
    ran.clear()
    module.tenth(["--seed", "2"])
    assert not [words for words in ran if "transfer" in words[0]]
    table = importlib.import_module("table")
    lines = table.tenth_table(root / "results/variants-tenth.jsonl").splitlines()
    assert lines[2 + names.index("mae")] == "| MAE | 10 | 9.0 | 9.0 | 5.0 |"
    assert len(lines[2:-3]) == len(names)                        # those with a twin have its row from scratch


def test_twins_start_alike_on_the_same_data():
    """So that one run from scratch stands for both: the rest of transfer.py knows the name of neither."""
    from table import TWINS

    def start(name):
        module = load(name)
        cfg = module.Config()
        torch.manual_seed(1)                                     # as transfer.py does
        return module.build(cfg).encoder.state_dict(), (cfg.data, cfg.image_size, cfg.encoder)

    for name, other in TWINS.items():
        (state, about), (twin, of_twin) = start(name), start(other)
        assert about == of_twin and state.keys() == twin.keys()
        assert all(torch.equal(p, twin[key]) for key, p in state.items())


def test_the_lessons_draw_the_means_over_the_seeds(lessons, monkeypatch):
    """Fine-tuned and frozen, a line each per start; numbers of labels and means as in the rows."""
    module, _, root = lessons
    for seed in "01":
        module.label_efficiency(["--seed", seed])
    drawn = {}
    monkeypatch.setattr(module, "bars", lambda axis, found, label, **style: (
        axis.plot([], label=label), drawn.setdefault(label, found)))
    rows = [json.loads(line) for line in (root / "results/variants-labels.jsonl").read_text().splitlines()]
    rows[-1]["accuracy"] += 5                                    # the last start with all labels, seed 1
    module.draw_labels(rows, root / "labels.png")
    for name, labels in (("ResNet from scratch", (1, 3, 10, 30, 100)), ("MAE", (1, 10, 100))):
        assert drawn[name] == {n: [pytest.approx(.9 * n)] * 2 for n in labels}
    assert set(drawn) == {None, *module.STARTS.values(), *module.NETWORKS.values()}
    assert drawn["ViT from scratch"][100] == [90., 95.]


def test_mask_ratios_are_read_beside_the_same_network_from_scratch(lessons, monkeypatch):
    """MAE's own encoder: its positions and start are not those of --encoder vit_micro. Drawn as the line."""
    module, _, root = lessons
    ran, level = [], []

    def run_one(words, file, results):
        ran.append(words)
        row = dict(command=" ".join(["python", *words]), accuracy=40. + len(ran), untrained=dict(linear=30.))
        with open(file, "a") as f:
            f.write(json.dumps(row) + "\n")

    monkeypatch.setattr(module, "run_one", run_one)
    monkeypatch.setattr("matplotlib.axes.Axes.axhline", lambda self, y, **style: level.append(y))
    module.mask_ratio(["--seed", "3"])
    assert [words[0][8:] for words in ran] == ["mae.py", "transfer.py"] * 4 + ["transfer.py"]
    assert ["--scratch" in words for words in ran] == [False] * 8 + [True]
    assert ran[-1][ran[-1].index("--run") + 1] == ran[-2][ran[-2].index("--run") + 1]
    assert level == [49.] and (root / "results/mask_ratio.png").stat().st_size > 1000
