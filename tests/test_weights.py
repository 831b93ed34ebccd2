"""Published weights: the names are timm's and torchvision's; files of other projects load, or say why not.

The names below were written down from timm's vision_transformer.py and torchvision's resnet.py. Where these
packages are installed (pip install timm torchvision) the same tests compare with them, outputs included.
"""
import argparse
import os
import pickle

import pytest
import torch
import torch.nn.functional as F

import common
from kernels.encoders import create_encoder, load_weights, read_checkpoint


def vit_names(dim, depth):
    """vit_*_patch16_224 of timm without its head: name -> shape."""
    names = {"cls_token": (1, 1, dim), "pos_embed": (1, 197, dim), "norm.weight": (dim,), "norm.bias": (dim,),
             "patch_embed.proj.weight": (dim, 3, 16, 16), "patch_embed.proj.bias": (dim,)}
    linear = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    for block in (f"blocks.{i}." for i in range(depth)):
        for name, (a, b) in linear.items():
            names |= {f"{block}{name}.weight": (a * dim, b * dim), f"{block}{name}.bias": (a * dim,)}
        for name in ("norm1", "norm2"):
            names |= {f"{block}{name}.weight": (dim,), f"{block}{name}.bias": (dim,)}
    return names


def bn_names(name, c):
    vectors = {f"{name}.{k}": (c,) for k in ("weight", "bias", "running_mean", "running_var")}
    return vectors | {f"{name}.num_batches_tracked": ()}


def resnet_names(depths, bottleneck):
    """resnet18 and resnet50 of torchvision without fc: name -> shape."""
    names, c_in = {"conv1.weight": (64, 3, 7, 7)} | bn_names("bn1", 64), 64
    for stage, depth in enumerate(depths, 1):
        c = 32 * 2 ** stage
        for j in range(depth):
            block, out = f"layer{stage}.{j}", 4 * c if bottleneck else c
            shapes = [(c, c_in, 3, 3), (c, c, 3, 3)]
            if bottleneck:
                shapes = [(c, c_in, 1, 1), (c, c, 3, 3), (out, c, 1, 1)]
            for i, shape in enumerate(shapes, 1):
                names |= {f"{block}.conv{i}.weight": shape} | bn_names(f"{block}.bn{i}", shape[0])
            if j == 0 and c_in != out:
                names |= {f"{block}.downsample.0.weight": (out, c_in, 1, 1)}
                names |= bn_names(f"{block}.downsample.1", out)
            c_in = out
    return names


NAMES = {"vit_tiny": vit_names(192, 12), "vit_small": vit_names(384, 12), "vit_base": vit_names(768, 12),
         "vit_large": vit_names(1024, 24),
         "resnet18": resnet_names((2, 2, 2, 2), False), "resnet50": resnet_names((3, 4, 6, 3), True)}
COUNTS = {"vit_tiny": 5_524_416, "vit_small": 21_665_664, "vit_base": 85_798_656, "vit_large": 303_301_632,
          "resnet18": 11_176_512, "resnet50": 23_508_032}   # parameters as published, less the head or fc


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_the_published_ones(name):
    with torch.device("meta"):
        encoder = create_encoder(name, 224)
    assert {k: tuple(v.shape) for k, v in encoder.state_dict().items()} == NAMES[name]
    assert sum(p.numel() for p in encoder.parameters()) == COUNTS[name]
    eps = {m.eps for m in encoder.modules() if hasattr(m, "eps")}
    assert eps == {1e-6 if name.startswith("vit") else 1e-5}


def random_state(encoder, seed=0):
    """Its state with random numbers everywhere, positive where a variance stands."""
    g = torch.Generator().manual_seed(seed)
    state = {k: .1 * torch.randn(v.shape, generator=g) for k, v in encoder.state_dict().items()}
    return {k: v.abs() + .5 if k.endswith("running_var") else v.long() if k.endswith("tracked") else v
            for k, v in state.items()}


def other(name, size):
    """The same architecture from timm or torchvision, without a head, or skip."""
    if name.startswith("vit"):
        timm = pytest.importorskip("timm", reason="timm is not installed: not compared with it")
        return timm.create_model(f"{name}_patch16_{size}", pretrained=False, num_classes=0)
    tv = pytest.importorskip("torchvision", reason="torchvision is not installed: not compared with it")
    model = getattr(tv.models, name)(weights=None)
    model.fc = torch.nn.Identity()
    return model


@pytest.mark.parametrize("name", ["vit_tiny", "vit_small", "resnet18", "resnet50"])
def test_same_names_and_same_output_as_the_other_implementation(name, tmp_path):
    """Ours loads into theirs and theirs into ours, strictly, and the same input gives the same features."""
    theirs, ours = other(name, 224).eval(), create_encoder(name, 224).eval()
    assert {k: tuple(v.shape) for k, v in theirs.state_dict().items()} == NAMES[name]
    ours.load_state_dict(random_state(ours))
    torch.save(ours.state_dict(), tmp_path / "encoder.pt")
    theirs.load_state_dict(torch.load(tmp_path / "encoder.pt", weights_only=True), strict=True)
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = ours(x), theirs(x)
    assert a.std() > 1e-2
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    back = load_weights(create_encoder(name, 224), tmp_path / "theirs.pth")
    assert all(v.equal(ours.state_dict()[k]) for k, v in back.state_dict().items())


def under(prefix, state):
    return {prefix + k: v for k, v in state.items()}


def files():
    """Name -> (encoder, what the project saves, its weights for the encoder)."""
    vit, resnet = create_encoder("vit_micro", 32), create_encoder("resnet_small", 32)
    v, w, r, s = random_state(vit), random_state(vit, 1), random_state(resnet), random_state(resnet, 1)
    one, args = torch.ones(3), argparse.Namespace(lr=.1, arch="vit")
    decoder = {"mask_token": one, "decoder_pos_embed": one, "decoder_embed.weight": one,
               "decoder_blocks.0.attn.qkv.weight": one, "decoder_norm.bias": one, "decoder_pred.weight": one}
    head = {"head.mlp.0.weight": one, "head.last_layer.weight_g": one}
    student, teacher = (under("module.", under("backbone.", x) | head) for x in (w, v))
    q, k = (under(f"module.encoder_{x}.", y | {"fc.0.weight": one}) for x, y in (("q", r), ("k", s)))
    twins = under("module.backbone.", r) | {"module.projector.0.weight": one}
    base = under("module.base_encoder.", r | {"fc.0.weight": one}) | {"module.predictor.0.weight": one}
    return {
        "ours": (vit, v, v),
        "torchvision": (resnet, r | {"fc.weight": one, "fc.bias": one}, r),
        "timm": (vit, v | {"head.weight": one, "head.bias": one}, v),
        "mae": (vit, {"model": v | decoder}, v),
        "mae in training": (vit, {"model": v | decoder, "epoch": 3, "args": args}, v),
        "dino": (vit, {"student": student, "teacher": teacher, "epoch": 9}, v),
        "barlow twins": (resnet, {"model": twins}, r),
        "moco, evaluated": (resnet, {"state_dict": under("module.", r), "epoch": 1}, r),
        "moco": (resnet, {"epoch": 200, "arch": "resnet50",
                          "state_dict": q | k | {"module.queue": one, "module.queue_ptr": one}}, r),
        "moco v3": (resnet, {"state_dict": base | under("module.momentum_encoder.", s)}, r)}


@pytest.mark.parametrize("project", list(files()))
def test_files_of_other_projects_load(project, tmp_path):
    encoder, saved, weights = files()[project]
    torch.save(saved, tmp_path / "file.pth")
    loaded = load_weights(encoder, tmp_path / "file.pth")
    assert loaded is encoder and all(v.equal(weights[k]) for k, v in encoder.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("name, where", [("resnet18", "conv1"), ("resnet50", "conv2")])
def test_a_block_by_hand(name, where):
    """The stride is the first 3 x 3's, as torchvision's and MoCo's weights ask for; ReLU after the sum."""
    block = create_encoder(name, 64).eval().layer2[0]
    strides = {k: m.stride for k, m in block.named_children() if k.startswith("conv")}
    assert {k for k, stride in strides.items() if stride == (2, 2)} == {where}
    x = torch.randn(2, block.conv1.in_channels, 8, 8)
    y, last = x, len(strides)
    for i in range(1, last + 1):
        y = getattr(block, f"bn{i}")(getattr(block, f"conv{i}")(y))
        y = y.clamp(min=0) if i < last else (y + block.downsample(x)).clamp(min=0)
    torch.testing.assert_close(block(x), y)


@torch.no_grad()
def test_a_vits_block_by_hand():
    """Pre-norm, the exact GELU, 1 / sqrt(d) in each head."""
    block, x = create_encoder("vit_micro/4", 16).blocks[0].double(), torch.randn(1, 5, 128).double()
    q, k, v = block.attn.qkv(block.norm1(x))[0].split(128, 1)
    parts = [slice(i, i + 32) for i in range(0, 128, 32)]
    heads = [(q[:, p] @ k[:, p].T / 32 ** .5).softmax(1) @ v[:, p] for p in parts]
    y = x[0] + block.attn.proj(torch.cat(heads, 1))
    z = block.mlp.fc1(block.norm2(y))
    y = y + block.mlp.fc2(z * (1 + torch.erf(z / 2 ** .5)) / 2)
    torch.testing.assert_close(block(x)[0], y)


def test_positions_are_resized_to_the_image():
    """As torch's bicubic resizes them; the position of [CLS] and all other weights are kept."""
    small, large = create_encoder("vit_micro/4", 32), create_encoder("vit_micro/4", 48)
    state = random_state(small)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernels.encoders.read_checkpoint", lambda file: dict(state))
        load_weights(large, "file")
    grid = F.interpolate(state["pos_embed"][:, 1:].mT.reshape(1, 128, 8, 8), (12, 12), mode="bicubic")
    assert large.pos_embed[:, 1:].equal(grid.reshape(1, 128, 144).mT)
    assert large.pos_embed[:, 0].equal(state["pos_embed"][:, 0])
    assert all(v.equal(state[k]) for k, v in large.state_dict().items() if k != "pos_embed")


def refused(encoder, file):
    with pytest.raises(ValueError) as e:
        load_weights(encoder, file)
    assert "\n" not in str(e.value) and str(file) in str(e.value) and len(str(e.value)) < 500
    return str(e.value)


@pytest.mark.parametrize("what, change, why", [
    ("missing", {"blocks.1.norm1.weight": None}, 'Missing key(s) in state_dict: "blocks.1.norm1.weight"'),
    ("extra", {"new": (1,)}, 'Unexpected key(s) in state_dict: "new"'),
    ("shape", {"norm.weight": (7,)}, "size mismatch for norm.weight"),
    ("width of the positions", {"pos_embed": (1, 65, 7)}, "size mismatch for pos_embed"),
    ("no square", {"pos_embed": (1, 64, 128)}, "does not fit"),
    ("no grid", {"pos_embed": (1, 63, 128)}, "does not fit"),
    ("one dimension", {"pos_embed": (65,)}, "positions [65] are no [CLS] and a square"),
    ("no positions", {"pos_embed": (1, 0, 128)}, "does not fit"),
    ("[CLS] alone", {"pos_embed": (1, 1, 128)}, "does not fit"),
    ("two grids", {"pos_embed": (2, 65, 128)}, "does not fit"),
    ("number as name", {5: (1,)}, "does not fit")])
def test_what_does_not_fit_is_named_in_one_line(what, change, why, tmp_path):
    encoder, file = create_encoder("vit_micro", 32), tmp_path / "file.pth"
    state = random_state(encoder) | {k: v and torch.ones(v) for k, v in change.items()}
    torch.save({k: v for k, v in state.items() if v is not None}, file)
    assert why in refused(encoder, file)
    with pytest.raises(SystemExit, match="--encoder or --weights: ") as e:
        common.make_encoder(common.Config(encoder="vit_micro", weights=str(file)))
    assert "\n" not in e.value.code


def test_the_12_heads_of_moco_v3_are_asked_for(tmp_path):
    """No shape tells them from the 6 of all others; only the file's arch does."""
    with torch.device("meta"):
        blank = create_encoder("vit_small_moco/16", 32)
    assert blank.blocks[0].attn.heads == 12 and blank.dim == 384
    vit = create_encoder("vit_small_moco/16", 32)
    state = {"module.base_encoder." + k: v for k, v in vit.state_dict().items()}
    torch.save(dict(arch="vit_small", state_dict=state), tmp_path / "moco.pth")
    loaded = load_weights(create_encoder("vit_small_moco/16", 32), tmp_path / "moco.pth")
    x = torch.randn(1, 3, 32, 32)
    assert loaded(x).equal(vit(x))
    with pytest.raises(ValueError, match="12 heads: give --encoder vit_small_moco/16"):
        load_weights(create_encoder("vit_small/16", 32), tmp_path / "moco.pth")


def test_weights_of_another_architecture_are_refused(tmp_path):
    torch.save(random_state(create_encoder("resnet_small", 32)), tmp_path / "file.pth")
    for name in ("vit_micro", "resnet18"):
        assert "does not fit" in refused(create_encoder(name, 32), tmp_path / "file.pth")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["torch", "legacy torch", "pickle", "text", "empty", "missing", "folder"])
def test_what_is_no_file_of_weights_is_refused_and_runs_no_code(kind, tmp_path):
    file, state = tmp_path / "file.pth", {"model": {"w": torch.ones(1)}, "bomb": Bomb(tmp_path / "boom")}
    if "torch" in kind:
        torch.save(state, file, _use_new_zipfile_serialization=kind == "torch")
    elif kind == "folder":
        file.mkdir()
    elif kind != "missing":
        raw = {"pickle": pickle.dumps(state["bomb"]), "text": b"<html>404</html>", "empty": b""}
        file.write_bytes(raw[kind])
    line = refused(create_encoder("resnet_small", 32), file)
    assert ("cannot read" if kind in ("missing", "folder") else "not loaded") in line
    assert not (tmp_path / "boom").exists()


def test_the_bomb_is_a_live_one(tmp_path):
    torch.save(Bomb(tmp_path / "boom"), tmp_path / "file.pth")
    torch.load(tmp_path / "file.pth", weights_only=False)
    assert (tmp_path / "boom").exists()


def test_plain_dictionaries_are_read(tmp_path):
    torch.save({"a": [1, 2.], "b": {"c": torch.arange(3)}, "d": "text", "e": None}, tmp_path / "file.pt")
    state = read_checkpoint(tmp_path / "file.pt")
    assert state["b"]["c"].tolist() == [0, 1, 2] and state["a"] == [1, 2.] and state["d"] == "text"
