"""Transfer: whose encoder it is, which labels it has, which layer learns how fast."""
import json

import pytest
import torch
from running import load, train

import common
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


def test_before_fine_tuning_stand_the_runs_own_figures(run, monkeypatch, capsys):
    """Frozen features with all labels: k-NN and probe are those that the run ended with."""
    flags = "--run", str(run), "--steps", "2", "--batch_size", "50"
    cfg = common.parse(transfer.Config, transfer.PAPER, [*flags])
    result = transfer.main(cfg)
    before = json.loads((run / "result.json").read_text())
    assert result["labelled"] == 100 and 0 <= result["accuracy"] <= 100
    assert abs(result["untrained"]["linear"] - before["linear"]) <= 1    # another order, to rounding
    assert result["untrained"]["knn"] == before["knn"] and "before training" in capsys.readouterr().out
    assert (run / "transfer-toys-n=100-seed0" / "result.json").exists()
    files = run / "encoder.pt", run / "transfer-toys-n=100-seed0" / "encoder.pt"
    weights = [torch.load(file, weights_only=True)["norm.weight"] for file in files]
    assert not torch.equal(*weights)


def test_what_is_no_run_is_named(tmp_path):
    for text in (None, '{"method": "mae"', '[]', '{"method": "maee", "flags": {}}', '{"method": "mae"}'):
        if text:
            (tmp_path / "result.json").write_text(text)
        with pytest.raises(SystemExit, match="is no folder of a finished run"):
            transfer.pretrained(tmp_path)


def test_a_share_of_the_labels_is_one_of_each_class():
    torch.manual_seed(0)
    labels = torch.tensor([0] * 50 + [1] * 30 + [7] * 9)[torch.randperm(89)]
    chosen = transfer.some_of_each_class(labels, .1)
    assert labels[chosen].bincount().tolist() == [5, 3, 0, 0, 0, 0, 0, 1] and len(chosen.unique()) == 9
    assert transfer.some_of_each_class(labels, 1.).sort().values.tolist() == list(range(89))
    assert transfer.some_of_each_class(labels, .1).tolist() != chosen.tolist()


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
    assert rates == [[.008], [.00025, .0005, .001, .002, .004, .008]]


def test_smoothing_and_predictions_by_hand():
    torch.manual_seed(0)
    method = transfer.Transfer(create_encoder("resnet_small", 16), 4, smoothing=.2)
    x = torch.randn(6, 3, 16, 16)
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    method.eval()
    log_p = method.classifier(method.encoder(x)).log_softmax(1)
    by_hand = -(.8 * log_p[torch.arange(6), y] + .2 * log_p.mean(1)).mean()
    assert method(x, y).item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert method.predict(x).tolist() == log_p.argmax(1).tolist()


def test_flat_folders_are_refused(tmp_path):
    data = common.load_data(common.Config(data="toys:n=100,objects=2", image_size=16))
    assert data.labels is None and normalise(data.images[:1]).shape == (1, 3, 16, 16)
    cfg = transfer.Config(data="toys:n=100,objects=2", image_size=16, out=str(tmp_path), batch_size=50)
    with pytest.raises(SystemExit, match="has no labels"):
        transfer.main(cfg)
