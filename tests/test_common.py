"""common.py and kernels/encoders.py: what they promise, against a loop, a formula or a small file."""
import copy
import hashlib
import importlib
import io
import math
import os
import pickle
import re
import signal
import tarfile
import threading
from dataclasses import dataclass, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import common
from common import Config, cosine, features, knn, linear_probe, load_data, make_optimizer, parse, spread
from kernels.encoders import Attention, ViTBlock, create_encoder, resize_positions, sincos_positions
from kernels.evaluation import class_iou, dense_probe, histogram_nats, logits_of, patches_by_word
from kernels.toys import toys
from kernels.views import normalise


@dataclass
class Flags(Config):
    tau: float = .2                # temperature
    flip: bool = True              # 50 % of the images are mirrored
    crop: float = 1.               # smallest share of the area in a crop


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def stops(*call):
    """The one line with which a call stops the program."""
    with pytest.raises(SystemExit) as e:
        call[0](*call[1:])
    assert isinstance(e.value.code, str) and "\n" not in e.value.code, e.value.code
    return e.value.code


# ---- flags

def test_every_flag_is_explained(capsys):
    """--help has each flag with its comment, default and the paper's value."""
    with pytest.raises(SystemExit) as e:
        parse(Flags, dict(tau=.1), ["--help"])
    out = " ".join(capsys.readouterr().out.partition("options:")[2].split())
    flags = {part.split()[0].rstrip(","): part for part in re.split(r" --(?=\w+ |\w+, )", out)}
    assert e.value.code == 0
    for f in fields(Flags):
        assert re.search(rf"{f.name},? .*\(default {f.default}[;)]", flags[f.name]), f.name
    assert flags["tau"] == "tau temperature (default 0.2; paper 0.1)"
    assert "50 % of the images are mirrored (default True)" in flags["flip"]


@pytest.mark.parametrize("argv, why", [
    ("--batchsize 64", "unknown flag --batchsize, did you mean --batch_size?"),
    ("--wieght_decay=1", "did you mean --weight_decay?"), ("--zzz", "unknown flag --zzz, see --help"),
    ("--batch 64", "did you mean --batch_size?"), ("stray", "unknown flag stray"),
    ("--batch_size 0", "--batch_size is 0: give a number above 0"), ("--lr nan", "--lr is nan"),
    ("--lr inf", "--lr is inf"), ("--tau -1", "--tau is -1.0: give a number above 0"),
    ("--weight_decay -1", "--weight_decay is -1.0: give a number from 0"), ("--tau 0", "--tau is 0"),
    ("--steps 1.5", "invalid int value: '1.5'"), ("--lr", "expected one argument"),
    ("--seed -1", "--seed is -1"), ("--flip 1", "unknown flag 1"),
    ("--momentum 1", "--momentum is 1.0"), ("--beta2 1", "--beta2 is 1.0"),
    ("--crop 1.5", "--crop is 1.5: give a number from 0 to 1"), ("--seed 9" + 19 * "0", "--seed is 9")])
def test_bad_flags_are_named(argv, why, capsys):
    with pytest.raises(SystemExit) as e:
        parse(Flags, {}, argv.split())
    line = capsys.readouterr().err.splitlines()[-1]
    assert e.value.code == 2 and "error: " in line and why in line


@pytest.mark.parametrize("method, argv, why", [
    ("dino", "--crop .3 --crop_local .4", "--crop_local 0.4 is above --crop 0.3"),
    ("obow", "--crop .9 --crop_max .5", "--crop 0.9 is above --crop_max 0.5"),
    ("mae", "--mask_ratio 0", "--mask_ratio is 0.0: give a number above 0, below 1"),
    ("simmim", "--mask_ratio 1.1", "--mask_ratio is 1.1"),
    ("byol", "--m 2", "--m is 2.0: give a number from 0 to 1"),
    ("beit", "--mask_ratio 2", "--mask_ratio is 2.0"),
    ("dino", "--tau_t 0", "--tau_t is 0.0: give a number above 0"),
    ("simclr", "--hidden 0", "--hidden is 0"), ("mae", "--decoder_heads 0", "--decoder_heads is 0"),
    ("obow", "--crop_size 0", "--crop_size is 0"), ("swav", "--prototypes 0", "--prototypes is 0"),
    ("vicreg", "--solarise 2", "--solarise is 2.0: give a number from 0 to 1"),
    ("slot_attention", "--rounds 0", "--rounds is 0")])
def test_flags_of_a_method_out_of_range(method, argv, why, capsys):
    module = importlib.import_module(f"methods.{method}")
    with pytest.raises(SystemExit) as e:
        parse(module.Config, module.PAPER, argv.split())
    assert e.value.code == 2 and why in capsys.readouterr().err.splitlines()[-1]


def test_bad_flags_show_one_line_of_usage(capsys):
    with pytest.raises(SystemExit):
        parse(Flags, {}, ["--batchsize", "64"])
    assert len(capsys.readouterr().err.splitlines()) <= 2


def test_flags_and_the_paper():
    """--paper starts from its values, a given flag beats them; booleans have both forms."""
    paper = dict(lr=3., tau=.1, epochs=100., flip=False)
    assert parse(Flags, paper, []) == Flags()
    cfg = parse(Flags, paper, "--paper --tau .5 --flip --resume".split())
    assert (cfg.lr, cfg.tau, cfg.epochs, cfg.flip, cfg.resume) == (3., .5, 100., True, True)
    assert not parse(Flags, {}, "--no-resume --no-flip".split()).flip
    assert parse(Flags, {}, ["--batch_size=7"]).batch_size == 7


def test_given_steps_beat_the_epochs_of_the_paper():
    """epochs win over steps, so --paper --steps 7 must leave the paper's epochs out."""
    paper = dict(epochs=100.)
    cfg = parse(Flags, paper, "--paper --steps 7".split())
    assert (cfg.steps, cfg.epochs) == (7, 0)
    assert parse(Flags, paper, "--paper --steps 7 --epochs 2".split()).epochs == 2


# ---- data

def test_toys_switches_reach_the_toys():
    data = load_data(Flags(data="toys:n=40,sky,rho=0", image_size=16))
    train, test = toys(40, sky=True, rho=0., size=16), toys(100, seed=1, sky=True, rho=0., size=16)
    assert data.images.equal(train["images"]) and data.labels.equal(train["labels"])
    assert data.test_images.equal(test["images"]) and data.test_masks.equal(test["masks"])
    assert not data.images.equal(toys(40, size=16)["images"])


@pytest.mark.parametrize("switch", ["skyy", "rho=much", "n=nan", "n=inf", "n=-4", "=3", "n=2=3"])
def test_bad_toys_switches_are_named(switch):
    line = stops(load_data, Flags(data=f"toys:{switch}"))
    assert f"toys:{switch} " in line and "n, seed, objects" in line and "sky" in line


def test_unknown_data_is_named():
    for name in ("nowhere", "cifar", "folder:", "folder", "cifar10:x"):
        assert f"--data {name} is unknown" in stops(load_data, Flags(data=name))


RAW = np.random.default_rng(0).integers(0, 256, (6, 3, 3, 32, 32), np.uint8)  # [file,image,channel,y,x]
NAMES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def contents(kind):
    """Bytes of the six files: records of label, red, green, blue; or dictionaries as of Python 2."""
    labels = [[(3 * f + i) % 10 for i in range(3)] for f in range(6)]
    if kind == "bin":
        return [b"".join(bytes([labels[f][i]]) + RAW[f, i].tobytes() for i in range(3)) for f in range(6)]
    return [pickle.dumps({b"data": x.reshape(3, 3072), b"labels": y, b"batch_label": b"x"}, protocol=2)
            for x, y in zip(RAW, labels, strict=True)]


def write_cifar(root, kind, monkeypatch):
    end, out = {"bin": ".bin", "py": ""}[kind], root / f"cifar-10-batches-{kind}"
    out.mkdir(parents=True)
    md5 = {e: " ".join("0" * 32 for _ in NAMES) for e in common.CIFAR_MD5}
    md5[end] = " ".join(hashlib.md5(raw).hexdigest() for raw in contents(kind))
    monkeypatch.setattr(common, "CIFAR_MD5", md5)
    for name, raw in zip(NAMES, contents(kind), strict=True):
        (out / (name + end)).write_bytes(raw)
    return out


@pytest.mark.parametrize("kind", ["bin", "py"])
def test_cifar10_reads_both_layouts(kind, tmp_path, monkeypatch):
    write_cifar(tmp_path, kind, monkeypatch)
    data = load_data(Flags(data="cifar10", data_dir=str(tmp_path)))
    assert data.images.equal(torch.from_numpy(RAW[:5].reshape(15, 3, 32, 32)))
    assert data.test_images.equal(torch.from_numpy(RAW[5])) and data.images.dtype == torch.uint8
    assert data.labels.tolist() == [(3 * f + i) % 10 for f in range(5) for i in range(3)]
    assert data.test_labels.tolist() == [5, 6, 7] and data.labels.dtype == torch.int64
    assert data.classes[3] == "cat"
    assert common.cifar10(tmp_path, 48).images.shape == (15, 3, 48, 48)
    (tmp_path / f"cifar-10-batches-{kind}").rename(tmp_path / "x")  # the files alone, without their folder
    assert common.cifar10(tmp_path / "x").images.equal(data.images)


@pytest.mark.parametrize("kind", ["bin", "py"])
def test_cifar10_names_the_damaged_file(kind, tmp_path, monkeypatch):
    file = write_cifar(tmp_path, kind, monkeypatch) / f"data_batch_3{'.bin' if kind == 'bin' else ''}"
    raw = bytearray(file.read_bytes())
    raw[100] ^= 1
    file.write_bytes(raw)
    assert f"{file} is damaged" in stops(common.cifar10, tmp_path)


def test_cifar10_fetches_again_what_was_deleted(tmp_path, monkeypatch):
    """'delete it and run again' must work for every file, not only for the first."""
    (write_cifar(tmp_path, "bin", monkeypatch) / "data_batch_3.bin").unlink()
    monkeypatch.setattr(common, "CIFAR_URL", "http://127.0.0.1:9/cifar-10-binary.tar.gz")
    assert "cannot download" in stops(common.cifar10, tmp_path)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_cifar10_unpickles_nothing_before_the_check(tmp_path, monkeypatch):
    file = write_cifar(tmp_path, "py", monkeypatch) / "data_batch_1"
    file.write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    assert "data_batch_1 is damaged" in stops(common.cifar10, tmp_path) and not (tmp_path / "boom").exists()
    pickle.loads(file.read_bytes())
    assert (tmp_path / "boom").exists()                                    # the bomb is a live one


def test_cifar10_without_files_or_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "CIFAR_URL", "http://127.0.0.1:9/cifar-10-binary.tar.gz")
    line = stops(common.cifar10, tmp_path / "data")
    assert "cifar-10-binary.tar.gz" in line and f"into {tmp_path / 'data'}" in line and "--data_dir" in line
    monkeypatch.setenv("PATH", "")                                         # a machine without curl
    assert "'curl'" in stops(common.cifar10, tmp_path / "data")


def test_cifar10_unpacks_the_archive(tmp_path, monkeypatch):
    out = write_cifar(tmp_path / "there", "bin", monkeypatch)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(out, out.name)
    monkeypatch.setattr(common, "download", lambda url, root, md5: tmp_path / "a.tar.gz")
    assert common.cifar10(tmp_path / "here").test_images.equal(torch.from_numpy(RAW[5]))


@pytest.fixture
def server():
    """Serves BLOB with Range support; .ranges: what was asked for."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers["Range"]
            web.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
            if start >= len(BLOB):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(BLOB)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{len(BLOB) - 1}/{len(BLOB)}")
            self.send_header("Content-Length", str(len(BLOB) - start))
            self.end_headers()
            self.wfile.write(BLOB[start:])

        def log_message(self, *_):
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.ranges, web.url = [], f"http://127.0.0.1:{web.server_port}/blob.tar.gz"
    threading.Thread(target=web.serve_forever, args=(.02,), daemon=True).start()
    yield web
    web.shutdown()


BLOB = os.urandom(100_001)


@pytest.mark.parametrize("have, asked", [(0, [None]), (50_000, ["bytes=50000-"])])
def test_download_goes_on(have, asked, server, tmp_path, monkeypatch):
    """Only what a cut download lacks is fetched; a second call fetches nothing."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    if have:
        (tmp_path / "blob.tar.part").write_bytes(BLOB[:have])
    for _ in range(2):
        assert common.download(server.url, tmp_path, hashlib.md5(BLOB).hexdigest()).read_bytes() == BLOB
    assert server.ranges == asked and [f.name for f in tmp_path.iterdir()] == ["blob.tar.gz"]


def test_download_that_was_cut_before_its_last_rename(server, tmp_path, monkeypatch):
    """The whole file is there under its .part name; the server has nothing to add and answers 416."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "blob.tar.part").write_bytes(BLOB)
    common.download(server.url, tmp_path, hashlib.md5(BLOB).hexdigest())
    assert (tmp_path / "blob.tar.gz").read_bytes() == BLOB


def test_download_checks_what_came(server, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert "blob.tar.gz is damaged" in stops(common.download, server.url, tmp_path, "0" * 32)


def shade(file, value, size=(8, 8)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 255 - value)).save(file)


def test_folder_with_a_folder_per_class(tmp_path, capsys):
    for i in range(24):
        shade(tmp_path / "cd"[i % 2] / f"{i:02}.png", i)
    (tmp_path / "c" / "notes.txt").write_text("no image")
    data = load_data(Flags(data=f"folder:{tmp_path}", image_size=4))
    order = [*range(0, 24, 2), *range(1, 24, 2)]                           # sorted by class, then name
    x, test = data.images[:, 0, 3, 3], data.test_images[:, 0, 0, 0]
    assert sorted(test.tolist()) == sorted([order[9], order[19]])
    assert sorted(x.tolist()) == sorted(v for i, v in enumerate(order) if i % 10 != 9)
    assert data.labels.tolist() == (x % 2).tolist() and data.test_labels.tolist() == (test % 2).tolist()
    assert 3 <= data.labels[:11].sum() <= 8                                # the first n are of all classes
    assert common.folder(tmp_path, 4).images.equal(data.images)            # the same order each time
    assert data.classes == ("c", "d") and data.images.shape == (22, 3, 4, 4)
    assert "24 images, 2 for testing, 2 classes, 0 broken" in capsys.readouterr().out


@pytest.mark.parametrize("splits", [("train", "val"), ("train", "test"), ("train", "val", "test")])
def test_folder_with_splits(splits, tmp_path):
    for i, split in enumerate(splits):
        for j, name in enumerate(("ant", "bee")):
            shade(tmp_path / split / name / "1.PNG", 10 * i + j)
    data = common.folder(tmp_path, 4)
    assert sorted(data.images[:, 0, 0, 0].tolist()) == [0, 1]
    assert data.labels.tolist() == data.images[:, 0, 0, 0].tolist()
    shades = data.test_images[:, 0, 0, 0]
    assert sorted(shades.tolist()) == [v for i in range(1, len(splits)) for v in (10 * i, 10 * i + 1)]
    assert data.test_labels.tolist() == (shades % 10).tolist() and data.classes == ("ant", "bee")


def test_images_of_a_folder_stand_upright(tmp_path):
    """Red is on the left, in training and in test images."""
    for i in range(20):
        image = Image.new("RGB", (8, 8))
        image.paste((200, 0, 0), (0, 0, 4, 8))
        image.save(tmp_path / f"{i}.png")
    data = common.folder(tmp_path, 8)
    for x in data.images, data.test_images:
        assert (x[:, 0, :, :4] == 200).all() and not x[:, 0, :, 4:].any() and not x[:, 1:].any()


def test_flat_folder_has_no_labels_and_odd_images_are_read(tmp_path):
    for i in range(20):
        shade(tmp_path / f"{i:02}.jpg", i, (9 + i, 40 - i))
    Image.new("L", (7, 5), 9).save(tmp_path / "x.png")
    Image.new("RGBA", (7, 5), (9, 9, 9, 0)).save(tmp_path / "y.webp", lossless=True, exact=True)
    palette = Image.new("P", (7, 5), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "z.gif")
    data = common.folder(tmp_path, 6)
    assert data.labels is data.test_labels is None and data.classes == () and len(data.test_images) == 2
    assert data.images.shape == (21, 3, 6, 6)
    assert ((data.images.int() - 9).abs().amax((1, 2, 3)) <= 1).sum() == 3


def many(tmp_path, n, broken):
    for i in range(n):
        shade(tmp_path / "ab"[i % 2] / f"{i:03}.jpg", i)
    for i in range(broken):
        file = tmp_path / "ab"[i % 2] / f"{i:03}.jpg"
        file.write_bytes(file.read_bytes()[:-60])


def test_folder_skips_names_and_counts_one_percent_of_broken_images(tmp_path, capsys):
    many(tmp_path, 101, 1)
    data = common.folder(tmp_path, 8)
    out = capsys.readouterr().out
    assert len(data.images) + len(data.test_images) == 100 == len(data.labels) + len(data.test_labels)
    assert f"skipped a broken image: {tmp_path}/a/000.jpg (OSError: " in out and "1 broken" in out


def test_folder_stops_at_more_than_one_percent(tmp_path, capsys):
    many(tmp_path, 101, 2)
    assert "2 of 101 images" in stops(common.folder, tmp_path, 8)
    assert capsys.readouterr().out.count("skipped a broken image") == 2


def test_an_image_of_16_bits_is_named_and_not_turned_white(tmp_path):
    Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)).save(tmp_path / "x.png")
    assert "8 bits" in common.decode(tmp_path / "x.png", 8)


def test_folder_without_images(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "notes.txt"):
        assert f"no images in {path}" in stops(common.folder, path, 8)


@pytest.mark.parametrize("names", [("train", "valid"), ("Train", "Val"), ("train",),
                                   ("train", "test", "unlabeled"), ("train", "validation"),
                                   ("training", "testing"), ("train", "val", "extra")])
def test_a_folder_of_parts_by_other_names_is_not_one_of_classes(names, tmp_path):
    for name in names:
        for kind in "ab":
            (tmp_path / name / kind).mkdir(parents=True)
            for i in range(6):
                shade(tmp_path / name / kind / f"{i}.png", i)
    assert "give train/ and val/ or test/" in stops(common.folder, tmp_path, 8)
    assert common.folder(tmp_path / names[0], 8).classes == ("a", "b")


def test_the_side_of_toys_is_that_of_the_images():
    assert "toys:size=64 is no switch" in stops(load_data, Flags(data="toys:n=20,size=64"))


def test_neighbours_of_few_images(tmp_path):
    data = load_data(Flags(data="toys:n=5", image_size=16))
    common.save_neighbours(tmp_path / "x.png", torch.nn.Flatten(), data)
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_the_probe_names_k_nn_and_linear_rightly():
    """Two classes by the sign of x y: the nearest tell them, no line does."""
    x = torch.randn(900, 2)
    y = (x.prod(1) > 0).long()
    found = common.probe(x[:600], x[600:], common.Data(x, y[:600], x, y[600:], ("a", "b")))
    assert found["knn"] > 90 and found["linear"] < 70


def test_the_protocol_learns_from_training_images_alone():
    """Where test images bear the other class's label, all is wrong: nobody saw them."""
    y = torch.arange(200) % 2
    x = rand(200, 4) + 20 * torch.eye(4)[y]
    assert common.probe(x, x, common.Data(x, y, x, y, ("a", "b"))) == dict(knn=100., linear=100.)
    assert common.probe(x, x, common.Data(x, y, x, 1 - y, ("a", "b"))) == dict(knn=0., linear=0.)


def test_steps_deal_each_image_of_a_batch_to_one_process(monkeypatch):
    """Of two: parts of one batch, all images once an epoch, in another order, and other draws each time."""
    dealt, drawn = [], []
    monkeypatch.setattr(common, "world", lambda: 2)
    monkeypatch.setattr(common.dist, "all_reduce", lambda *args: None)
    for rank, seed in (0, 0), (1, 0), (0, 1):
        cfg = common.Config(batch_size=8, seed=seed)
        monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
        run = common.Run.__new__(common.Run)
        vars(run).update(cfg=cfg, name="x", first=0, total=99, per_epoch=5, seconds=0., save=lambda: None,
                         device=torch.device("cpu"))
        steps = run.steps(40)
        mine = [(index, torch.rand(1).item()) for (_, index), _ in zip(steps, range(10), strict=False)]
        dealt.append(torch.stack([index for index, _ in mine]))  # [10,4]
        drawn += [x for _, x in mine]
    both, other = torch.cat(dealt[:2], 1), dealt[2]              # [10,8], [10,4] of another seed
    assert all(epoch.flatten().sort().values.equal(torch.arange(40)) for epoch in both.split(5))
    assert not both[:5].equal(both[5:]) and not both[:, :4].equal(other) and len(set(drawn)) == 30


def test_a_run_is_saved_ten_times_and_leaves_signals_as_they_were():
    saved, numbers = [], (signal.SIGINT, signal.SIGTERM)
    before, run = [signal.getsignal(s) for s in numbers], common.Run.__new__(common.Run)
    vars(run).update(cfg=common.Config(batch_size=8), name="x", first=0, total=40, per_epoch=5, seconds=0.,
                     device=torch.device("cpu"), save=lambda: saved.append(run.step))
    during = [[signal.getsignal(s) for s in numbers] for _ in run.steps(40)]
    assert saved == list(range(3, 40, 4)) and [signal.getsignal(s) for s in numbers] == before
    assert len(during) == 40 and not any(set(handlers) & set(before) for handlers in during)


def test_neighbours_are_the_nearest_training_images(tmp_path, monkeypatch):
    """Test images are training images, turned in another order: each finds itself first."""
    images, rows = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8), {}
    monkeypatch.setattr(common, "save_grid", lambda path, given, title: rows.update(given))
    common.save_neighbours(tmp_path / "x.png", torch.nn.Flatten(),
                           common.Data(images, None, images.flip(0), None, ()))
    for x, row in zip(images.flip(0)[:6], rows.values(), strict=True):
        assert len(row) == 8 and row[0].equal(x) and row[1].equal(x) and not row[2].equal(x)


def test_the_seed_is_that_of_the_weights(tmp_path):
    drawn = [(common.Run(common.Config(seed=seed, out=str(tmp_path)), __file__), torch.rand(1).item())[1]
             for seed in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1]


def test_autocast_is_that_of_the_flag(tmp_path):
    for precision, there in (("bf16", True), ("fp32", False), ("auto", False)):
        cfg = common.Config(precision=precision, device="cpu", out=str(tmp_path))
        with common.Run(cfg, __file__).autocast():
            assert torch.is_autocast_enabled("cpu") == there
            assert (torch.eye(2) @ torch.eye(2)).dtype == (torch.bfloat16 if there else torch.float32)


@pytest.mark.parametrize("rank, known", [(0, ["cifar10", "barrier"]), (1, ["barrier", "cifar10"])])
def test_of_several_processes_the_first_downloads_alone(rank, known, monkeypatch):
    calls, x = [], torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    monkeypatch.setattr(common, "rank", lambda: rank)
    monkeypatch.setattr(common, "world", lambda: 2)
    monkeypatch.setattr(common.dist, "barrier", lambda: calls.append("barrier"))
    monkeypatch.setattr(common, "cifar10", lambda *a: calls.append("cifar10") or common.Data(x, x, x, x, ()))
    load_data(Flags(data="cifar10"))
    assert calls == known


def test_folder_with_an_image_beside_the_classes(tmp_path):
    """An image that lies in no class folder has no label: one line that names it, not a traceback."""
    many(tmp_path, 20, 0)
    shade(tmp_path / "stray.png", 1)
    assert "stray.png" in stops(common.folder, tmp_path, 8)


def test_folder_too_small_for_a_test_image(tmp_path):
    """Every tenth image tests; of nine none does, and the pictures would fail after the training."""
    many(tmp_path, 9, 0)
    assert "9 images" in stops(common.folder, tmp_path, 8)


def test_images_are_turned_cropped_and_reduced_as_a_viewer_shows_them(tmp_path):
    """Orientation 6: turned by 90 degrees clockwise, so what is stored on top is seen on the right."""
    x = np.zeros((64, 64, 3), np.uint8)
    x[:32], x[32:] = (250, 0, 0), (0, 0, 250)
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(x).save(tmp_path / "turned.jpg", exif=exif, quality=95, subsampling=0)
    seen = np.frombuffer(common.decode(tmp_path / "turned.jpg", 16), np.uint8).reshape(16, 16, 3)
    assert (seen[:, 10:, 0] > 240).all() and (seen[:, :6, 2] > 240).all() and (seen[:, :6, 0] < 10).all()
    wide = np.full((64, 256, 3), (250, 0, 0), np.uint8)
    wide[:, 96:160] = 0, 250, 0                             # only this is in the central square
    Image.fromarray(wide).save(tmp_path / "wide.jpg", quality=95, subsampling=0)
    seen = np.frombuffer(common.decode(tmp_path / "wide.jpg", 8), np.uint8).reshape(8, 8, 3).astype(int)
    assert np.abs(seen[:, 1:7] - (0, 250, 0)).max() < 20


# ---- encoders

@pytest.mark.parametrize("name, size, dim", [
    ("resnet_small", 32, 128), ("resnet_small", 63, 128), ("resnet18", 32, 512), ("resnet18", 64, 512),
    ("resnet50", 32, 2048)])
def test_resnet_dimensions(name, size, dim):
    """The features are the mean of the last map, which below 64 px is at least 4x4."""
    encoder = create_encoder(name, size).eval()
    x = rand(2, 3, size, size)
    with torch.no_grad():
        h, maps = encoder(x), encoder.layers(x)
    assert encoder.dim == dim and h.shape == (2, dim) and h.equal(maps[-1].mean((2, 3)))
    assert [len(m[0]) for m in maps] == ([32, 64, 128] if name == "resnet_small" else
                                         [dim // 8, dim // 4, dim // 2, dim])
    assert min(maps[-1].shape[2:]) >= 4 if size < 64 else maps[-1].shape[2:] == (2, 2)


def test_encoder_names():
    """Patches: as given, else 16, and an eighth of the image below 128 px; mistakes are named."""
    with torch.device("meta"):
        assert [create_encoder("vit_tiny", s).patch for s in (32, 64, 128, 224)] == [4, 8, 16, 16]
        assert create_encoder("vit_small/8", 224).pos_embed.shape == (1, 1 + 28 ** 2, 384)
    cfg = Flags(encoder="resnt18")
    assert "did you mean resnet18?" in stops(common.make_encoder, cfg)
    for name in ("vit_tiny/x", "vit_tiny/-4", "vit_tiny/5", "resnet18x"):
        assert "--encoder or --weights: " in stops(common.make_encoder, Flags(encoder=name))
    for name in ("vit_tiny/0", "vit_tiny/", "resnet18/8"):
        said = stops(common.make_encoder, Flags(encoder=name))
        assert f"{name}: a patch is that of a ViT, a whole number" in said


def test_widths_that_do_not_fit_are_named():
    for options in dict(pool="avg"), dict(positions="sin-cos"):
        with pytest.raises(ValueError, match="pool: cls or mean, positions: learned or sincos; got "):
            create_encoder("vit_micro", 32, **options)
    with pytest.raises(ValueError, match="a width of 64 is no multiple of 3 heads"):
        ViTBlock(64, 3)
    with pytest.raises(ValueError, match="a width that 4 divides, got 66"):
        sincos_positions(66, 8, 8)


def vit(**options):
    torch.manual_seed(0)
    encoder = create_encoder("vit_micro", 32, **options).double().eval()
    for p in encoder.parameters():                          # biases and tokens that are not about zero
        p.data += .1 * torch.randn_like(p)
    return encoder


@torch.no_grad()
def test_vit_seams_agree():
    """embed, encode and forward, with registers and both ways to pool; layers() ends where encode() does."""
    x = rand(2, 3, 32, 32, dtype=torch.float64)
    for registers in (0, 3):
        encoder = vit(registers=registers, pool="cls")
        tokens = encoder.embed(x)
        out = encoder.encode(tokens)
        assert tokens.shape == (2, 64, 128) and out.shape == (2, 1 + registers + 64, 128)
        assert encoder(x).equal(out[:, 0]) and encoder.prefix == 1 + registers
        maps = encoder.layers(x)
        assert len(maps) == 4 and maps[-1].shape == (2, 128, 8, 8)
        torch.testing.assert_close(maps[-1].flatten(2).mT, out[:, encoder.prefix:])
        encoder.pool = "mean"
        torch.testing.assert_close(encoder(x), maps[-1].mean((2, 3)))
    encoder.reg_token[0, 0, 0] += 1
    assert not torch.allclose(encoder.encode(tokens)[:, 1:4], out[:, 1:4])  # the registers are really there


@torch.no_grad()
def test_vit_takes_a_subset_of_the_tokens_in_any_order():
    """Permuted tokens give the permuted output, so no position is added twice; a part sees only itself."""
    encoder, x = vit(), rand(2, 3, 32, 32, dtype=torch.float64)
    tokens, order = encoder.embed(x), torch.randperm(64)
    out = encoder.encode(tokens)[:, 1:]
    torch.testing.assert_close(encoder.encode(tokens[:, order])[:, 1:], out[:, order])
    other, keep = x.clone(), order[order != 0][:16]
    other[:, :, :4, :4] += 1                                # patch 0
    part = encoder.encode(tokens[:, keep])
    assert part.shape == (2, 17, 128) and part.equal(encoder.encode(encoder.embed(other)[:, keep]))


@torch.no_grad()
def test_vit_takes_other_image_sizes():
    """Positions are resized as torch's bicubic resizes an image of them; the [CLS] position is not."""
    encoder, x = vit(), rand(2, 3, 48, 24, dtype=torch.float64)
    assert encoder(x).shape == (2, 128) and encoder.layers(x)[0].shape == (2, 128, 12, 6)
    grid = encoder.pos_embed[0, 1:].T.reshape(1, 128, 8, 8)
    expected = F.interpolate(grid, (12, 6), mode="bicubic")[0].reshape(128, 72).T
    added = encoder.embed(x) - encoder.patch_embed.proj(x).flatten(2).mT
    torch.testing.assert_close(added, expected.expand(2, -1, -1))
    assert resize_positions(encoder.pos_embed[:, 1:], 8, 8).equal(encoder.pos_embed[:, 1:])


@torch.no_grad()
def test_attention_map_is_the_softmax_of_the_last_block():
    encoder, x, seen = vit(registers=2), rand(2, 3, 32, 32, dtype=torch.float64), {}
    encoder.blocks[-1].attn.qkv.register_forward_hook(lambda m, inputs, output: seen.update(qkv=output))
    encoder(x)
    a, qkv = encoder.attention(x), seen["qkv"].view(2, 67, 3, 4, 32)       # [B,N,qkv,head,D/h], as in timm
    for b in range(2):
        for head in range(4):
            q, k = qkv[b, 0, 0, head], qkv[b, :, 1, head]
            p = (k @ q / math.sqrt(32)).exp()
            torch.testing.assert_close(a[b, head].flatten(), p[3:] / p.sum())
    assert a.shape == (2, 4, 8, 8) and (a > 0).all() and (a.sum((2, 3)) < 1).all()


@torch.no_grad()
def test_attention_is_softmax_attention():
    attn, x = Attention(12, 3).double(), rand(2, 5, 12, dtype=torch.float64)
    qkv, out = attn.qkv(x), torch.zeros(2, 5, 12, dtype=torch.float64)
    for head in range(3):
        q, k, v = (qkv[..., 12 * i + 4 * head:12 * i + 4 * head + 4] for i in range(3))
        out[..., 4 * head:4 * head + 4] = (q @ k.mT / 2).softmax(-1) @ v
    torch.testing.assert_close(attn(x), attn.proj(out))


def test_sincos_positions_by_the_formula():
    """As in MAE's official code: half the channels for the column, half for the row, sines before cosines."""
    dim, h, w = 16, 3, 5
    for i, row in enumerate(sincos_positions(dim, h, w).tolist()):
        angles = [[pos / 10_000 ** (c / (dim / 4)) for c in range(dim // 4)] for pos in (i % w, i // w)]
        expected = [f(a) for axis in angles for f in (math.sin, math.cos) for a in axis]
        assert row == pytest.approx(expected, abs=1e-6)
    encoder = create_encoder("vit_micro", 32, positions="sincos")
    assert encoder.pos_embed[0, 1:].equal(sincos_positions(128, 8, 8)) and not encoder.pos_embed.requires_grad
    assert encoder.pos_embed[0, 0].abs().max() == 0


# ---- optimizers

def holder(**tensors):
    method = nn.Module()
    for name, value in tensors.items():
        method.register_parameter(name, nn.Parameter(torch.tensor(value)))
    return method


def test_lars_by_hand():
    """Two steps, lr 1, m .5, decay .1, trust .001. Weight: |w| = 5, |g + .1 w| = 1. Bias: plain momentum."""
    method = holder(w=[[3., 4.]], b=[2.], zero=[[0., 0.]])
    lars = make_optimizer(Flags(optimizer="lars", lr=1., momentum=.5, weight_decay=.1), method)
    for g, w, b, zero in (([.3, .4], [3 - .003, 4 - .004], 2 - .5, -1.),
                          # |w| = 4.995, v = .5 [.003,.004] + .004995 [.6,.8];  bias: v = .5 x .5 + .5
                          ([.6 - .2997, .8 - .3996], [2.997 - .004497, 3.996 - .005996], 1.5 - .75, None)):
        method.w.grad, method.b.grad = torch.tensor([g]), torch.tensor([.5])
        method.zero.grad = torch.tensor([[1., 1.]])
        lars.step()
        assert method.w[0].tolist() == pytest.approx(w, rel=1e-6) and method.b.item() == pytest.approx(b)
        assert zero is None or method.zero[0].tolist() == [zero, zero]     # a zero weight: trust ratio 1


def test_lars_calls_a_closure():
    method = holder(w=[[3., 4.]])
    lars = make_optimizer(Flags(optimizer="lars", lr=1.), method)

    def closure():
        lars.zero_grad()
        loss = method.w.square().sum()
        loss.backward()
        return loss
    assert lars.step(closure).item() == 25 and method.w[0, 0] < 3


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_optimizer_groups(name):
    """Decay on what has two or more dimensions only; nothing frozen; momentum and beta2 arrive."""
    encoder = create_encoder("vit_micro", 32, positions="sincos")
    cfg = Flags(optimizer=name, lr=.5, momentum=.8, beta2=.7, weight_decay=.3)
    optimizer = make_optimizer(cfg, encoder)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert type(optimizer).__name__.lower() == name
    assert decay == {id(p): .3 * (p.ndim > 1) for p in encoder.parameters() if p.requires_grad}
    assert id(encoder.pos_embed) not in decay and decay[id(encoder.cls_token)] == .3
    for g in optimizer.param_groups:
        assert g["lr"] == .5 and (g["betas"] == (.8, .7) if name == "adamw" else g["momentum"] == .8)
    assert name != "sgd" or optimizer.param_groups[0]["nesterov"]
    common.set_lr(optimizer, .1)
    assert {g["lr"] for g in optimizer.param_groups} == {.1}


def test_unknown_optimizer_is_named():
    method = holder(w=[[1.]])
    assert "give adamw, sgd or lars" in stops(make_optimizer, Flags(optimizer="foo"), method)
    make_optimizer(Flags(optimizer="sgd", momentum=0.), method)            # Nesterov needs momentum


def test_cosine():
    """Ends, middle, warm-up without a zero step and without a jump, and the rise of a momentum."""
    assert cosine(0, 100, 3.) == 3. and cosine(100, 100, 3.) == 0.
    assert cosine(50, 100, 3.) == pytest.approx(1.5)
    assert cosine(25, 100, 1.) == pytest.approx((1 + math.sqrt(.5)) / 2)
    rise = [cosine(s, 100, 1., warmup=.1) for s in range(12)]
    assert rise[:11] == pytest.approx([(s + 1) / 11 for s in range(11)]) and rise[10] == 1. > rise[11]
    assert cosine(55, 100, 1., warmup=.1) == pytest.approx(.5) and cosine(100, 100, 1., warmup=.1) == 0.
    assert [cosine(s, 10, .9, 1.) for s in (0, 5, 10)] == pytest.approx([.9, .95, 1.])
    assert cosine(0, 1, 1.) == 1. and cosine(0, 1, 1., warmup=1.) == .5


# ---- evaluation

def test_layers_are_read_in_cells_and_k_is_20():
    """Each quarter of each map by hand; the k of the table is that of the call."""
    class Maps(nn.Module):
        def layers(self, x):
            return [x, F.avg_pool2d(x, 2)[:, :2]]
    cells, x = common.Cells(Maps()), torch.randn(5, 3, 8, 8)
    first, second = cells(x).split(cells.widths, 1)
    quarters = [x[:, :, i:i + 4, j:j + 4].mean((2, 3)) for i in (0, 4) for j in (0, 4)]
    assert torch.allclose(first, torch.stack(quarters, 2).flatten(1), atol=1e-6) and second.shape == (5, 8)
    bank, queries, y = torch.randn(90, 4), torch.randn(300, 4), torch.arange(90) % 3
    said = knn(bank, y, queries)
    assert said.equal(knn(bank, y, queries, 20)) and not said.equal(knn(bank, y, queries, 1))


@pytest.mark.parametrize("k", [1, 5, 20, 1000])
def test_knn_by_a_loop(k):
    """Also with k beyond the bank, more queries than a chunk, and lengths that must not count."""
    bank, labels = rand(60, 4) * torch.arange(1, 61)[:, None], torch.arange(60) % 3
    queries = rand(501, 4, seed=1)
    expected = []
    for q in queries.tolist():
        near = []
        for x, y in zip(bank.tolist(), labels.tolist(), strict=True):
            s = sum(a * b for a, b in zip(q, x, strict=True)) / math.hypot(*q) / math.hypot(*x)
            near.append((s, y))
        votes = [0, 0, 0]
        for s, y in sorted(near, reverse=True)[:k]:
            votes[y] += math.exp(s / .07)
        expected.append(votes.index(max(votes)))
    assert knn(bank, labels, queries, k).tolist() == expected


@pytest.mark.parametrize("dtype, tau", [(torch.float16, .07), (torch.float32, .01)])
def test_knn_does_not_overflow(dtype, tau):
    """e^14 is too much for fp16, e^100 for fp32."""
    labels = torch.arange(100) % 5
    x = (torch.eye(5, 16)[labels] + .05 * rand(100, 16)).to(dtype)
    assert knn(x, labels, x, tau=tau).equal(labels)


def test_linear_probe_separates_what_is_separable():
    x, y = rand(300, 6), torch.arange(300) % 3
    x[range(300), y] += 20
    assert linear_probe(x[:200], y[:200], x[200:]).equal(y[200:])
    with torch.no_grad():                                   # as in finish(), and in another unit and offset
        assert linear_probe(64 * x[:200] + 512, y[:200], 64 * x[200:] + 512).equal(y[200:])


def test_linear_probe_takes_what_an_encoder_gives():
    """Features of 16 bits, or of 64, or with their graph, as numbers that they are."""
    x, y = rand(300, 6), torch.arange(300) % 3
    x[range(300), y] += 20
    for given in (x.bfloat16(), x.double(), x.clone().requires_grad_()):
        assert linear_probe(given[:200], y[:200], given[200:]).equal(y[200:])


def test_linear_probe_finds_the_minimum(monkeypatch):
    """Objective, gradient and predictions beside an independent minimisation in float64 by SciPy."""
    solved = []

    class Spy(torch.optim.LBFGS):
        def __init__(self, params, **options):
            super().__init__(params, **options)
            solved.extend(params)

    monkeypatch.setattr(torch.optim, "LBFGS", Spy)
    x, x_test = rand(400, 5) * 3 + 1, rand(2000, 5, seed=1) * 3 + 1
    y = ((x.sum(1) + 2 * rand(400, seed=2)) / 4).long().clamp(0, 3)
    predicted = linear_probe(x, y, x_test)
    a, b = ((t.double() - x.double().mean(0)) / (x.double().std(0) + 1e-6) for t in (x, x_test))

    def objective(flat):
        w = torch.tensor(flat).view(6, 4).requires_grad_()
        logits = a @ w[:5] + w[5]
        loss = (logits.logsumexp(1) - logits[range(400), y]).mean() + .0005 * (w[:5] ** 2).sum()
        loss.backward()
        return loss.item(), w.grad.flatten().numpy()

    best = scipy.optimize.minimize(objective, np.zeros(24), jac=True, method="BFGS", options=dict(gtol=1e-9))
    ours, gradient = objective(solved[0].detach().double().flatten().numpy())
    assert np.abs(gradient).max() < 1e-4 and ours - best.fun < 1e-7
    w = torch.tensor(best.x).view(6, 4)
    logits = b @ w[:5] + w[5]
    assert predicted.equal(logits.argmax(1))


def test_linear_probe_does_not_depend_on_units():
    """Powers of two rescale floats exactly, so only the 1e-6 on the standard deviation is left."""
    x, y, x_test = rand(200, 6), torch.arange(200) % 4, rand(500, 6, seed=1)
    unit = 2. ** torch.arange(-3, 3)
    assert linear_probe(x * unit, y, x_test * unit).equal(linear_probe(x, y, x_test))


def test_shares_of_the_classes_count_as_so_many_rows():
    """Half a row of each class is the same as both rows; one class alone is its number."""
    x, x_test, y = rand(120, 4), rand(50, 4, seed=1), torch.arange(120) % 3
    other = (rand(120, seed=2) > 0).long()
    shares = (F.one_hot(y, 3) + F.one_hot(other, 3)) / 2
    twice = logits_of(x.repeat(2, 1), torch.cat([y, other]), x_test)
    # the deviation of x divides by N - 1, with every row twice by 2 N - 1
    torch.testing.assert_close(logits_of(x, shares, x_test), twice, rtol=0, atol=.01)
    assert twice.std() > .1 and logits_of(x, F.one_hot(y, 3).float(), x_test).shape == (50, 3)
    torch.testing.assert_close(logits_of(x, F.one_hot(y, 3).float(), x_test), logits_of(x, y, x_test))


def test_class_iou_by_hand():
    """Over the pixels of both images together: class 0 has 3 of 5, class 1 has 1 of 3, class 2 has 1 of 2,
    class 3 is nowhere, class 4 is told where it is not."""
    truth = torch.tensor([[[0, 0], [0, 1]], [[0, 1], [2, 2]]], dtype=torch.uint8)
    told = torch.tensor([[[0, 0], [1, 1]], [[0, 0], [2, 4]]])
    assert class_iou(told, truth) == pytest.approx((3 / 5 + 1 / 3 + 1 / 2 + 0) / 4)
    assert class_iou(truth.long(), truth) == 1.


def test_dense_probe_by_hand():
    """What can be told from the place's own features is told, at the right place; the borders between cells
    are in the middle; a map that tells nothing gives every pixel the class with the largest share."""
    y = torch.randint(3, (40, 3, 5), generator=torch.Generator().manual_seed(0))     # [N,h,w]
    a = torch.cat([4 * F.one_hot(y, 3).movedim(3, 1), rand(40, 2, 3, 5)], 1)         # [N,5,h,w]
    assert torch.equal(dense_probe(a[:30], y[:30].byte(), a[30:], (3, 5)), y[30:])
    cells = torch.tensor([[[0, 1]], [[1, 0]], [[0, 0]], [[1, 1]]])       # [4,1,2], of 4 x 4 pixels
    large = cells.repeat_interleave(4, 1).repeat_interleave(4, 2)        # [4,4,8]
    assert torch.equal(dense_probe(cells[:, None].float(), large, cells[:, None].float(), (4, 8)), large)
    three = torch.tensor([[[0, 2], [2, 2]]]).repeat(4, 1, 2)     # [4,2,4], cells of 2 x 2: 3 of 4 are class 2
    assert (dense_probe(torch.ones(4, 7, 1, 2), three, torch.ones(4, 7, 1, 2), (6, 12)) == 2).all()


def test_patches_by_word_are_the_places_nearest_to_it():
    """Dark images with one light place; distances of brightness. The rarer words are the odd places."""
    images = torch.randint(0, 20, (24, 3, 20, 20), dtype=torch.uint8)
    for i in range(24):
        images[i, :, 4:8, 4 * (i % 3) + 4:4 * (i % 3) + 8] += 200
    bright = F.avg_pool2d(images.float(), 4)[:, :1].flatten(2).mT        # [24,25,1], cells of 4 x 4 pixels
    d = torch.cdist(bright, torch.tensor([[220.], [999.], [0.]]))
    rows = list(patches_by_word(d, images, n=8).items())
    assert [title for title, _ in rows] == ["word 2, 96.0%", "word 0, 4.0%", "word 1, 0.0%"]
    patches = rows[1][1]                                         # 3 x 3 cells around the light one
    known = [images[i, :, :12, 4 * (i % 3):4 * (i % 3) + 12] for i in range(24)]
    assert patches.shape == (8, 3, 12, 12) and patches.dtype == torch.uint8
    one = list(patches_by_word(d, images[:, :, :19, :19], n=8).values())[1]      # 25 places, 3.8 pixels each
    assert one.shape == (8, 3, 9, 9) and (one[:, :, 4, 4] >= 200).all()
    found = [[i for i in range(24) if torch.equal(known[i], p)] for p in patches]
    assert all(len(f) == 1 for f in found) and len({f[0] for f in found}) == 8  # eight images


def test_histogram_baselines_by_hand():
    """Place 0 is always token 1, place 1 is 0, 0, 2 in three images; three tokens, each counted once more."""
    train, test = torch.tensor([[1, 0], [1, 0], [1, 2]]), torch.tensor([[1, 2], [0, 0]])
    by_hand = -sum(math.log(n / 6) for n in (4, 2, 1, 3)) / 4
    assert histogram_nats(train, test, 3) == pytest.approx(by_hand, rel=1e-5)
    by_hand = -sum(math.log(n / 9) for n in (4, 2, 3, 3)) / 4    # unigram: counts 2, 3, 1, and one each
    assert histogram_nats(train.view(-1, 1), test.view(-1, 1), 3) == pytest.approx(by_hand, rel=1e-5)
    noise = torch.randint(256, (20_000, 12))                     # no histogram of noise is better than none
    assert 0 < histogram_nats(noise[:10_000], noise[10_000:], 256) - math.log(256) < .05


def test_spread_by_hand():
    """Where the numbers are known: sphere, plus and minus each axis, line, constant, constant with noise."""
    std, rank = spread(rand(8192, 64))
    assert std == pytest.approx(1, abs=.01) and 63 < rank <= 64
    axes = torch.cat([torch.eye(4), -torch.eye(4)])         # a column: 1, -1, six 0; variance 2 / (8 - 1)
    assert spread(5 * axes) == pytest.approx((2 * math.sqrt(2 / 7), 4), rel=1e-5)
    line = torch.linspace(-1, 1, 32)[:, None] * torch.tensor([1., 1., -1., 1.])
    std, rank = spread(line)                                # a column: 16 times -.5, 16 times .5
    assert std == pytest.approx(2 * .5 * math.sqrt(32 / 31), rel=1e-5) and rank == pytest.approx(1, abs=1e-3)
    std, rank = spread(torch.ones(32, 16))
    assert std == 0. and rank == pytest.approx(1)
    std, rank = spread(1 + 1e-3 * rand(512, 16))            # the constant's own direction is lost: D - 1
    assert std < .005 and 14 < rank < 15.1
    assert spread(rand(8, 4).to(torch.bfloat16))[1] > 2


@pytest.mark.parametrize("training", [True, False])
def test_features_leave_the_encoder_as_it_was(training):
    encoder = create_encoder("resnet_small", 16).train(training)
    before, images = copy.deepcopy(encoder.state_dict()), toys(30, size=16)["images"]
    out = features(encoder, images, batch=8)
    assert all(m.training == training for m in encoder.modules()) and not out.requires_grad
    assert all(v.equal(before[k]) for k, v in encoder.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(out, encoder.eval()(normalise(images)), rtol=1e-5, atol=1e-5)
    assert out.dtype == torch.float32 and out.shape == (30, 128)


def test_save_grid_and_curves_draw(tmp_path):
    """Rows of different length, uint8 beside floats; a value that is logged rarely."""
    common.save_grid(tmp_path / "g.png", {"a": toys(3)["images"], "b": torch.rand(2, 3, 32, 32)}, "note")
    (tmp_path / "log.jsonl").write_text('{"step": 0, "loss": 1, "knn": 5}\n{"step": 1, "loss": 2}\n')
    common.save_curves(tmp_path / "c.png", tmp_path / "log.jsonl", {"ln 2": .693})
    for name in ("g.png", "c.png"):
        assert Image.open(io.BytesIO((tmp_path / name).read_bytes())).convert("L").getextrema()[0] < 200
