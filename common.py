"""What every method shares: flags, data, encoders, many GPUs, evaluation, the run folder, pictures.

A method calls these functions; nothing here calls a method back or knows one. Losses, heads and teachers are
the method, so they stay in its file; views, encoders and what else can be lifted out alone are in `kernels/`.

    parse -> Config -> Run --> for step, index in run.steps(N): run.finite(loss).backward() ... run.log(loss)
    load_data -> Data: uint8 images on the device      |
    make_encoder -> ResNet | ViT                       '--> checkpoint, log.jsonl, run.finish(): the table
"""
import copy
import difflib
import hashlib
import inspect
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import time
from argparse import ArgumentParser, BooleanOptionalAction
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from tqdm import tqdm

from kernels.batchnorm import SyncBatchNorm
from kernels.encoders import create_encoder, load_weights, read_checkpoint
from kernels.evaluation import knn, linear_probe, percent, spread
from kernels.lars import LARS
from kernels.toys import CLASSES, toys
from kernels.views import normalise


def fail(message: str):
    """Stop with one line that says what to do, and exit status 1."""
    raise SystemExit(f"{Path(sys.argv[0]).name}: {message}")

@dataclass
class Config:
    """The flags that every method has; a method adds its own. The comment behind a field is its --help."""
    data: str = "toys"             # toys, toys:sky,rho=0 (any switch of toys()), cifar10, folder:PATH
    data_dir: str = "data"         # where cifar10 lies, or is downloaded to
    image_size: int = 32           # side of the images in pixels
    encoder: str = "resnet_small"  # resnet_small, resnet18, resnet50, vit_micro, vit_tiny, vit_small/8 ...
    weights: str = ""              # file of published weights for the encoder: torchvision, timm, DINO, MAE
    steps: int = 1000              # optimisation steps
    epochs: float = 0.             # when positive, steps become so many passes over the data
    batch_size: int = 128          # images a step, all processes together
    optimizer: str = "adamw"       # adamw, sgd (Nesterov) or lars
    lr: float = 1e-3               # peak learning rate: linear warm-up, then half a cosine to 0
    momentum: float = .9           # momentum of sgd and lars, beta1 of adamw
    beta2: float = .999            # beta2 of adamw
    weight_decay: float = 1e-4     # on weights and tokens, not on biases and norms
    warmup: float = .05            # part of the run in which the learning rate rises
    seed: int = 0                  # of weights, data order and augmentation
    device: str = "auto"           # auto, cpu, cuda, cuda:1 or mps
    precision: str = "auto"        # fp32 or bf16 autocast; auto is bf16 on a GPU that has it
    out: str = "runs"              # run folders go here
    resume: bool = False           # go on from this run's last checkpoint
    save_every: int = 0            # steps between checkpoints; 0 makes ten in a run

POSITIVE = ("steps|.*(size|dim|heads).*|lr.*|tau.*|eps|layers|depth|width|hidden|k|cells?|square|patch|first|"
            "splits|rounds|grid|stride|mask_ratio|hide|classes|orders|kernel|times|prototypes|colours")
SHARES = "crop(_max|_local)?|labels|dropout|m|share|keep|adversarial|blur|solarise|rise|freeze|decay"
BELOW_ONE = "momentum|beta2|warmup|mask_ratio|hide|smoothing"
MAY_CHANGE = "resume", "save_every", "device", "data_dir", "out"  # what may differ when a run is resumed

def parse(config, paper: dict, argv: list[str] | None = None):
    """Command line -> config: fields are flags, trailing comments their help; --paper starts from `paper`."""
    source = "".join(inspect.getsource(cls) for cls in reversed(config.__mro__[:-1]))
    helps = dict(re.findall(r"^    (\w+): \w+ = .*?# (.+)$", source, re.M))
    parser = ArgumentParser(allow_abbrev=False, description=inspect.getmodule(config).__doc__.split("\n")[0],
                            usage="%(prog)s [--flag value ...], see --help")
    parser.add_argument("--paper", action="store_true", help="start from the paper's values")
    for f in fields(config):
        text = f"{helps[f.name]} (default {f.default}{f'; paper {paper[f.name]}' if f.name in paper else ''})"
        kind = dict(action=BooleanOptionalAction) if f.type is bool else dict(type=f.type, metavar="")
        parser.add_argument(f"--{f.name}", help=text.replace("%", "%%"), **kind)
    given, unknown = parser.parse_known_args(argv)
    for word in unknown:
        near = difflib.get_close_matches(word.split("=")[0], parser._option_string_actions, 1, .5)
        parser.error(f"unknown flag {word}" + (f", did you mean {near[0]}?" if near else ", see --help"))
    given = {k: v for k, v in vars(given).items() if v is not None}
    start = (paper if given.pop("paper") else {}) | (dict(epochs=0.) if "steps" in given else {})
    cfg = config(**(start | given))
    for name, value in ((f.name, getattr(cfg, f.name)) for f in fields(cfg) if f.type in (int, float)):
        above, share, below = (bool(re.fullmatch(x, name)) for x in (POSITIVE, SHARES, BELOW_ONE))
        limit = 1 if share or below else 2 ** 63 if isinstance(value, int) else math.inf
        if not (0 < value < limit or value == 0 and not above or value == 1 and share):
            parser.error(f"--{name} is {value}: give a number {'above' if above else 'from'} 0"
                         + " to 1" * share + ", below 1" * below)
    for low, high in (("crop_local", "crop"), ("crop", "crop_max")):
        if getattr(cfg, low, 0) > getattr(cfg, high, 1):
            parser.error(f"--{low} {getattr(cfg, low)} is above --{high} {getattr(cfg, high)}")
    return cfg

class Data(NamedTuple):
    images: Tensor                                   # uint8 [N,3,H,W]
    labels: Tensor | None                            # int64 [N]; None for a flat folder
    test_images: Tensor
    test_labels: Tensor | None
    classes: tuple[str, ...]
    masks: Tensor | None = None                      # uint8 [N,H,W], 0 = background; toys has them
    test_masks: Tensor | None = None

def load_data(cfg: Config, device="cpu") -> Data:
    """`cfg.data` as tensors on `device`. Of several processes the first goes ahead, so that one downloads."""
    kind, _, rest = cfg.data.partition(":")
    if rank():
        dist.barrier()
    if kind == "toys":
        options = dict(n=20_000, seed=0, size=cfg.image_size) | toy_switches(rest)
        a = toys(**options)
        b = toys(**options | dict(n=max(options["n"] // 10, 100), seed=options["seed"] + 1))
        single = options.get("objects", 1) == options.get("frames", 1) == 1    # scenes, clips: no one label
        y = [t["labels"] if single else None for t in (a, b)]
        data = Data(a["images"], y[0], b["images"], y[1], CLASSES, a["masks"], b["masks"])
    elif cfg.data == "cifar10":
        data = cifar10(Path(cfg.data_dir).expanduser(), cfg.image_size)
    elif kind == "folder" and rest:
        data = folder(Path(rest).expanduser(), cfg.image_size)
    else:
        fail(f"--data {cfg.data} is unknown: give toys, toys:SWITCHES, cifar10 or folder:PATH")
    if data.images.ndim > 4 and "frames" not in type(cfg).data:
        fail(f"--data {cfg.data} are clips, which video_colorization.py alone learns from")
    if world() > 1 and not rank():
        dist.barrier()
    return Data(*(x.to(device) if torch.is_tensor(x) else x for x in data))

def toy_switches(text: str) -> dict:
    """'sky,rho=0' -> {'sky': True, 'rho': 0.}, typed as the defaults of toys() are."""
    switches = {}
    known = {k: p.default for k, p in inspect.signature(toys).parameters.items() if k != "size"}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            switches[name] = type(known[name])(float(value or 1))
            if not (name in ("n", "objects", "frames")) <= switches[name] < 2 ** 63:
                raise ValueError
        except (KeyError, ValueError, OverflowError):
            fail(f"--data toys:{part} is no switch of toys with a number; there are {', '.join(known)}")
    return switches

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_CLASSES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
CIFAR_MD5 = {  # by the ending of the file names: data_batch_1 to 5, test_batch
    ".bin":
    "5dd7e06a14cb22eb9f671a540d1b7c25 5ea93a67294ea407fff1d09f752e9692 942cd6a4bcdd0dd3c604fbe906cb4421"
    " ae636b3ba5c66a11e91e8cb52e771fcb 53f37980c15c3d472c316c40844f3f0d 803d5f7f4d78ea53de84dbe85f74fb6d",
    "": "c99cafc152244af753f735de768cd75f d4bba439e000b95fd0a9bffe97cbabec 54ebc095f3ab1f0389bbae665268c751"
    " 634d18415352ddfa80567beed471001a 482c414d41f54cd18b22e5b47cb7c3cb 40351d587109b95175f43aff81a1287e"}

def cifar10(root: Path, size: int = 32) -> Data:
    """The real CIFAR-10 (Krizhevsky 2009), binary or pickle files; downloaded if `root` has neither."""
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    folders = root / "cifar-10-batches-bin", root / "cifar-10-batches-py", root
    places = [(folder, end) for folder in folders for end in CIFAR_MD5]
    place, end = next((p for p in places if all((p[0] / (n + p[1])).is_file() for n in names)), places[0])
    if not all((place / (name + end)).is_file() for name in names):
        with tarfile.open(download(CIFAR_URL, root, "c32a1d4ab5d03f1284b67883e8d87530")) as tar:
            tar.extractall(root, filter="data")
    images, labels = [], []
    for file, md5 in zip((place / (name + end) for name in names), CIFAR_MD5[end].split(), strict=True):
        raw = checked(file, md5)                                 # before anything is unpickled
        if end:                                                  # a record: label, red, green, blue plane
            record = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, 3073)
            x, y = record[:, 1:], record[:, 0]
        else:
            record = pickle.loads(raw, encoding="bytes")
            x, y = torch.from_numpy(record[b"data"]), torch.tensor(record[b"labels"])
        x = x.reshape(-1, 3, 32, 32)
        images.append(x if size == 32 else F.interpolate(x, (size, size), mode="bilinear", antialias=True))
        labels.append(y.long())
    return Data(torch.cat(images[:5]), torch.cat(labels[:5]), images[5], labels[5], CIFAR_CLASSES)

def checked(file: Path, md5: str) -> bytes:
    raw = file.read_bytes()
    if hashlib.md5(raw).hexdigest() != md5:
        fail(f"{file} is damaged (its md5 is not {md5}): delete it and run again")
    return raw

def download(url: str, root: Path, md5: str) -> Path:
    """Fetch `url` into `root` by curl: it shows its progress, and goes on with a download that was cut."""
    file = root / url.rpartition("/")[2]
    part = file.with_suffix(".part")
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            if not part.exists() or hashlib.md5(part.read_bytes()).hexdigest() != md5:
                subprocess.run(["curl", "-fL#", "--connect-timeout", "9", "-C-", "-o", part, url], check=True)
            part.rename(file)
    except (OSError, subprocess.CalledProcessError) as e:
        fail(f"cannot download {url} ({e}): put it, or the files in it, into {root}, or give --data_dir")
    checked(file, md5)
    return file

def decode(file: Path, size: int) -> bytes | str:
    """An image file as size*size RGB pixels (short side resized, centre cropped), or why not."""
    from PIL import Image, ImageOps
    try:
        with Image.open(file) as image:
            if image.mode[0] in "IF":
                raise ValueError("more than 8 bits a colour: save it with 8")
            image.draft("RGB", (2 * size, 2 * size))             # JPEG decodes at a fraction of its size
            image = ImageOps.exif_transpose(image).convert("RGB")
            return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC).tobytes()
    except Exception as e:                                       # PIL raises many kinds on a broken file
        return f"{type(e).__name__}: {e}"

def folder(root: Path, size: int) -> Data:
    """Class folders, or a flat folder without labels; train/ and val/ or test/, else every tenth tests."""
    endings = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() in endings)
    if not files:
        fail(f"no images in {root}: give --data folder:PATH of images, or of a folder of images per class")
    with ProcessPoolExecutor() as pool:
        found = pool.map(partial(decode, size=size), files, chunksize=16)
        decoded = dict(zip(files, tqdm(found, "decoding", len(files), leave=False), strict=True))
    broken = {f: why for f, why in decoded.items() if isinstance(why, str)}
    print(*(f"skipped a broken image: {f} ({why})\n" for f, why in broken.items()), sep="", end="")
    if len(broken) > len(files) / 100:
        fail(f"{len(broken)} of {len(files)} images in {root} are broken, more than 1 %: mend or remove them")
    parts = [f.relative_to(root).parts for f in files if f not in broken]  # (split?, class, ..., name)
    split = (tops := {p[0] for p in parts}) in ({"train", "val"}, {"train", "test"}, {"train", "val", "test"})
    test = torch.tensor([p[0] != "train" if split else i % 10 == 9 for i, p in enumerate(parts)])
    nested = any(len(p) > 2 and p[0].lower().startswith("train") for p in parts)     # train/CLASS/NAME
    if not split and (nested or {t.lower() for t in tops} <= {"train", "val", "valid", "test", "unlabeled"}):
        fail(f"{root} has {sorted(tops)}: give train/ and val/ or test/, or one of these folders by itself")
    classes = tuple(sorted({p[split] for p in parts if len(p) > 1 + split}))
    if len(classes) > 1 and (stray := [p for p in parts if len(p) == 1 + split]):
        fail(f"{root.joinpath(*stray[0])} lies in no class folder, as other images do: move it")
    if test.all() or not test.any():
        fail(f"{len(parts)} images in {root} leave none to train or none to test: give at least ten")
    y = torch.tensor([classes.index(p[split]) for p in parts]) if len(classes) > 1 else None
    x = torch.frombuffer(bytearray(b"".join(decoded[f] for f in files if f not in broken)), dtype=torch.uint8)
    x = x.view(-1, size, size, 3).permute(0, 3, 1, 2).contiguous()
    print(f"{root}: {len(x)} images, {test.sum()} for testing, {len(classes)} classes, {len(broken)} broken")
    mixed = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))   # the first n: of all classes
    return Data(*(t if t is None else t[mixed[s[mixed]]] for s in (~test, test) for t in (x, y)), classes)

def make_encoder(cfg: Config, **vit_options) -> nn.Module:
    """The encoder that `cfg.encoder` names, with `cfg.weights` if given. It has `.dim`."""
    try:
        encoder = create_encoder(cfg.encoder, cfg.image_size, **vit_options)
        return load_weights(encoder, cfg.weights) if cfg.weights else encoder
    except ValueError as e:
        fail(f"--encoder or --weights: {e}")

def make_optimizer(cfg: Config, method: nn.Module) -> torch.optim.Optimizer:
    """`cfg.optimizer` over everything trained; weight decay on tensors of two or more dimensions only."""
    params = [p for p in method.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in params if p.ndim > 1], weight_decay=cfg.weight_decay),
              dict(params=[p for p in params if p.ndim <= 1], weight_decay=0.)]
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(groups, cfg.lr, betas=(cfg.momentum, cfg.beta2), fused=True)
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(groups, cfg.lr, cfg.momentum, nesterov=cfg.momentum > 0)
    if cfg.optimizer == "lars":
        return LARS(groups, cfg.lr, cfg.momentum)
    fail(f"--optimizer {cfg.optimizer} is unknown: give adamw, sgd or lars")

def cosine(step: int, steps: int, start: float, end: float = 0., warmup: float = 0.) -> float:
    """Linear from 0 to `start` in the first `warmup` of the run, then half a cosine from `start` to `end`."""
    rise = warmup * steps
    if step < rise:
        return start * (step + 1) / (rise + 1)
    return end + (start - end) * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2

def set_lr(optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr

def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0

def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1

def gather(z: Tensor) -> Tensor:
    """Rows of all processes, [B,...] -> [W*B,...], with the gradient back to each process's own rows.
    Every process computes the same loss of all rows: backward sums W copies, DDP's mean divides by W."""
    return torch.cat(all_gather(z.contiguous())) if world() > 1 else z

def distribute(method: nn.Module) -> nn.Module:
    """DistributedDataParallel with synchronised BatchNorm under torchrun; `method` itself on one process."""
    if world() == 1:
        return method
    if next(method.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(method)
    else:
        for m in method.modules():
            m.__class__ = SyncBatchNorm if isinstance(m, nn.modules.batchnorm._BatchNorm) else m.__class__
    return nn.parallel.DistributedDataParallel(method, broadcast_buffers=False)

@torch.no_grad()
def features(encoder: nn.Module, images: Tensor, batch: int = 100) -> Tensor:
    """uint8 images [N,3,H,W] -> features [N,D] in float32: evaluation mode, no augmentation."""
    training, encoder = encoder.training, encoder.eval()
    out = torch.cat([encoder(normalise(x)).float() for x in images.split(batch)])
    encoder.train(training)
    return out

class Cells(nn.Module):
    """All layers of an encoder as one: their maps averaged to 2 x 2 cells, side by side."""
    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, x):                                        # [B,3,H,W] -> [B,4(C_1+C_2+...)]
        cells = [F.adaptive_avg_pool2d(a, 2).flatten(1) for a in self.encoder.layers(x)]
        self.widths = [c.shape[1] for c in cells]
        return torch.cat(cells, 1)

def probe(x: Tensor, x_test: Tensor, data: Data) -> dict[str, float]:
    """The one protocol for all: k-NN and linear accuracy in percent of features x [N,D], x_test [M,D]."""
    return dict(knn=percent(knn(x, data.labels, x_test), data.test_labels),
                linear=percent(linear_probe(x, data.labels, x_test), data.test_labels))

def seed_of(*parts) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")

def pick_device(cfg: Config) -> torch.device:
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    name = best if cfg.device == "auto" else cfg.device
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        fail(f"--device {name} is not here: this machine has {best}")
    return device

class Run:
    """One training run: device, seed, folder, progress bar, log, checkpoints, final table."""
    def __init__(self, cfg: Config, file: str):
        self.cfg, self.name, self.source = cfg, Path(file).stem, Path(file).read_text()
        self.device, self.first, self.seconds, self.last, self.warned = pick_device(cfg), 0, 0., {}, set()
        if on_gpu := self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if "RANK" in os.environ and not dist.is_initialized():   # under torchrun
            dist.init_process_group("nccl" if on_gpu else "gloo")
        if cfg.batch_size % world():
            fail(f"--batch_size {cfg.batch_size} must be a multiple of the {world()} processes")
        if cfg.precision not in ("auto", "fp32", "bf16"):
            fail(f"--precision {cfg.precision} is unknown: give auto, fp32 or bf16 (fp16 overflows here)")
        auto = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        bf16 = dict(auto=auto, fp32=False, bf16=True)[cfg.precision]
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=bf16)
        data = re.sub(r"[^\w.=-]+", "-", cfg.data.removeprefix("folder:")).strip("-.")
        self.folder = Path(cfg.out).expanduser() / f"{self.name}-{data}-seed{cfg.seed}"
        self.checkpoint, self.log_file = self.folder / "checkpoint.pt", self.folder / "log.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            fail(f"cannot write to {self.folder} ({e.strerror}): choose another place with --out")
        torch.manual_seed(cfg.seed)
        where = torch.cuda.get_device_name() if on_gpu else f"{self.device} ({torch.get_num_threads()} cores)"
        self.flags = {f.name: getattr(cfg, f.name) for f in fields(cfg) if getattr(cfg, f.name) != f.default}
        differs = " ".join(f"--{k} {v}" for k, v in self.flags.items()) or "nothing"
        self.print(f"{self.name} on {world()} x {where}; differs from the defaults: {differs}")

    def print(self, text: str):
        if not rank():
            tqdm.write(text)

    def start(self, method: nn.Module, data: Data, reference: dict[str, float], *optimizers) -> nn.Module:
        """Keeps the untrained encoder, resumes, returns what the loop calls: `method`, or its DDP (torchrun).
        reference: what the loss is read against, by name, such as {"ln 4": 1.386}."""
        self.method, self.data, self.reference = method.to(memory_format=torch.channels_last), data, reference
        self.untrained, self.optimizers = copy.deepcopy(method.encoder), optimizers
        self.per_epoch = len(data.images) // self.cfg.batch_size
        if not self.per_epoch:
            fail(f"--batch_size {self.cfg.batch_size} is more than the {len(data.images)} training images")
        if self.cfg.batch_size == 1 and any(isinstance(m, nn.BatchNorm1d) for m in method.modules()):
            fail("--batch_size 1 does not fit: BatchNorm compares images, give 2 or more")
        self.total = max(1, round(self.cfg.epochs * self.per_epoch)) if self.cfg.epochs else self.cfg.steps
        if self.cfg.resume:
            self.load()
        elif self.checkpoint.exists() and not rank():
            names = (self.folder / f"previous{i or ''}.pt" for i in range(10 ** 6))      # none is lost
            os.replace(self.checkpoint, spare := next(f for f in names if not f.exists()))
            self.print(f"the checkpoint of an earlier run is now {spare}")
        lines = self.log_file.read_text().splitlines() if self.first and self.log_file.exists() else []
        self.lines = [x for x in lines if x.endswith("}") and json.loads(x)["step"] < self.first]
        self.print("read the loss against " + ", ".join(f"{k} = {v:.3f}" for k, v in reference.items()))
        return distribute(method)

    def steps(self, n: int):
        """Yields (step, indices [B/W] of this process's images). The random state is a function of (seed,
        step, process), the order one of (seed, epoch): a resumed run has the bits of an unbroken one."""
        seed, stop, epoch, every = self.cfg.seed, [0], None, self.cfg.save_every or max(1, self.total // 10)
        before = {s: signal.signal(s, lambda number, _: stop.append(number)) for s in (2, 15)}  # INT, TERM
        self.bar = tqdm(None, self.name, self.total, initial=self.first, disable=rank() > 0,
                        dynamic_ncols=True, mininterval=.5 if sys.stderr.isatty() else 20)
        began = time.perf_counter() - self.seconds
        for step in range(self.first, self.total):
            self.step = step
            if epoch != step // self.per_epoch:
                epoch = step // self.per_epoch
                shuffle = torch.Generator().manual_seed(seed_of(seed, "epoch", epoch))
                batches = torch.randperm(n, generator=shuffle).split(self.cfg.batch_size)
            index = batches[step % self.per_epoch][rank()::world()]
            torch.manual_seed(seed_of(seed, step, rank()))
            yield step, index.to(self.device)
            self.seconds = time.perf_counter() - began
            self.bar.update()
            halt = stop[-1]
            if world() > 1:                                      # all processes stop after the same step
                flag = torch.tensor(halt, device=self.device)
                dist.all_reduce(flag, dist.ReduceOp.MAX)
                halt = int(flag)
                stop.append(max(stop[-1], halt))                 # a signal that has just come: after the next
            if halt or (step + 1) % every == 0 or step + 1 == self.total:
                self.save()
            if halt:
                self.bar.close()
                self.print(f"stopped after step {step + 1}: add --resume to the command to go on from there")
                raise SystemExit(128 + halt)
        self.bar.close()
        torch.manual_seed(seed_of(seed, "end"))                  # for what is drawn in the evaluation
        for s, handler in before.items():
            signal.signal(s, handler)
        if world() > 1:                                          # what follows is for the first process alone
            others = rank()
            dist.destroy_process_group()
            if others:
                os._exit(0)                                      # gloo may hang in the interpreter's own exit

    def finite(self, loss: Tensor) -> Tensor:
        """`loss` itself; stops at the first that is not finite, before it reaches the weights."""
        if not loss.isfinite():
            saved = f"; {self.checkpoint} is from before" * self.checkpoint.exists()
            fail(f"the loss is {loss.item()} at step {self.step}: lower --lr or try --precision fp32{saved}")
        return loss

    def log(self, loss: Tensor, **parts):
        """Fifty times a run: a line to log.jsonl and the bar, six times with the k-NN accuracy of a sample.
        Parts are numbers, or features [B,D]. Warns of a collapse, and of a loss that sits on a reference."""
        every, last, data = max(1, self.total // 50), self.step + 1 == self.total, self.data
        if rank() or self.step % every and not last:
            return
        line = dict(step=self.step, loss=loss.item(), seconds=self.seconds)
        for name, value in parts.items():
            if getattr(value, "ndim", 0):
                line[f"{name}_std"], line[f"{name}_rank"] = spread(value)
            else:
                line[name] = float(value)
        if data.labels is not None and (last or self.step % (10 * every) == 0):
            sample = data.images[:2000], data.test_images[:500]
            bank, queries = (features(self.method.encoder, x) for x in sample)
            line["knn"] = percent(knn(bank, data.labels[:2000], queries), data.test_labels[:500])
        self.lines.append(json.dumps({k: round(v, 5) for k, v in line.items()}))
        write(self.log_file, lambda f: f.write("\n".join([*self.lines, ""]).encode()))
        alarms = {k: f"{k} is {v:.3g}, a collapse" for k, v in line.items() if self.step > self.total / 10
                  and v < dict(std=.05, rank=2., perplexity=2.).get(k.rpartition("_")[2], -math.inf)}
        alarms |= {k: f"the loss sits on {k} = {v:.3f}" for k, v in self.reference.items()
                   if self.step > self.total / 2 and abs(line["loss"] - v) < .01 * (abs(v) or 1)}
        for name in alarms.keys() - self.warned:
            self.warned.add(name)
            self.print(f"WARNING, step {self.step}: {alarms[name]}")
        self.last |= line
        shown = {k: v for k, v in (self.reference | self.last).items() if k not in ("step", "seconds")}
        self.bar.set_postfix({k: f"{v:.3g}" for k, v in shown.items()}, refresh=False)

    def save(self):
        """All that a resumed run needs. The random state is not among it, see steps()."""
        if not all(p.isfinite().all() for p in self.method.parameters()):
            fail(f"the weights are not finite after step {self.step}: lower --lr or try --precision fp32")
        if not rank():
            state = dict(method=self.name, step=self.step + 1, source=self.source, seconds=self.seconds,
                         config=asdict(self.cfg) | dict(images=len(self.data.images)), last=self.last,
                         model=self.method.state_dict(), optimizers=[o.state_dict() for o in self.optimizers])
            write(self.checkpoint, lambda f: torch.save(state, f))

    def load(self):
        if not self.checkpoint.exists():
            fail(f"nothing to resume in {self.folder}: run without --resume")
        try:
            state = read_checkpoint(self.checkpoint)
            if state.get("method") != self.name:
                fail(f"{self.checkpoint} is one of {state.get('method')}, not {self.name}: change --out")
            for key, value in (asdict(self.cfg) | dict(images=len(self.data.images))).items():
                if key not in MAY_CHANGE and value != (old := state["config"].get(key)):
                    fail(f"the checkpoint was made with {key} {old}, not {value}: resume with the same")
            self.method.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.first, self.seconds, self.last = state["step"], state["seconds"], state["last"]
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as e:
            fail(f"cannot resume: {str(e).splitlines()[0]} ({self.checkpoint}; has the script changed?)")
        self.print(f"resumed at step {self.first}")

    def probe_layers(self) -> dict:
        """The probe of every layer's map, averaged to 2 x 2 cells; the same before training beside it."""
        def each(encoder):
            cells = Cells(encoder)
            both = features(cells, self.data.images), features(cells, self.data.test_images)
            layers = zip(*(x.split(cells.widths, 1) for x in both), strict=True)
            return [probe(*layer, self.data) for layer in layers]

        pairs = zip(each(self.method.encoder), each(self.untrained), strict=True)
        rows = {f"layer {i}": row | dict(untrained=before) for i, (row, before) in enumerate(pairs, 1)}
        for name, row in rows.items():
            self.print(f"{name}, 2 x 2 cells".ljust(27) + f"{row['knn']:12.1f} {row['linear']:13.1f}   "
                       "untrained {knn:.1f} {linear:.1f}".format(**row["untrained"]))
        return rows

    def finish(self, layers: bool = False, **extra) -> dict:
        """Evaluate, print the table, write result.json, encoder.pt and curves.png. -> the result
        layers: probe every layer too; the last one of a pretext task's encoder is often not the best."""
        data, rows = self.data, {}
        if data.labels is None:
            self.print("k-NN and linear probe are left out: these images have no one label each")
        else:
            before = "before training" if self.cfg.weights else "untrained encoder"
            pixels = nn.Sequential(nn.AdaptiveAvgPool2d(16), nn.Flatten())
            encoders = {"pixels, 16 x 16": pixels, before: self.untrained, self.name: self.method.encoder}
            for name, encoder in encoders.items():
                rows[name] = probe(features(encoder, data.images), features(encoder, data.test_images), data)
            self.print(f"\n% of {len(data.test_labels)} test images".ljust(28) + "k-NN (k=20, T=.07)  linear")
            for name, row in rows.items():
                self.print(f"{name:27}{row['knn']:12.1f} {row['linear']:13.1f}")
            extra |= dict(layers=self.probe_layers()) if layers else {}
        for name, value in ((k, v) for k, v in extra.items() if isinstance(v, float)):
            self.print(f"{name:27}{value:12.3f}")
        pixels, untrained, trained = rows.values() if rows else ({}, {}, {})
        monitors = {k: round(v, 4) for k, v in self.last.items() if k not in ("step", "seconds", "knn")}
        result = dict(method=self.name, data=self.cfg.data, seed=self.cfg.seed, **trained, pixels=pixels,
                      untrained=untrained, **extra, **monitors, reference=self.reference, steps=self.total,
                      seconds=round(self.seconds, 1),
                      images_per_second=round(self.total * self.cfg.batch_size / self.seconds),
                      parameters=sum(p.numel() for p in self.method.encoder.parameters()), flags=self.flags,
                      device=str(self.device), python=sys.version.split()[0], torch=torch.__version__)
        write(self.folder / "result.json", lambda f: f.write(json.dumps(result, indent=1).encode()))
        write(self.folder / "encoder.pt", lambda f: torch.save(self.method.encoder.state_dict(), f))
        save_curves(self.folder / "curves.png", self.log_file, self.reference)
        self.print(f"\n{self.total} steps in {self.seconds:.0f} s; result, encoder, pictures: {self.folder}")
        return result

def write(path: Path, how):
    """A file, whole or not at all; how: what writes into an open one."""
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as f:
            how(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as e:                         # RuntimeError: torch.save on a full disk
        part.unlink(missing_ok=True)
        fail(f"cannot write {path} ({str(e).splitlines()[0]}): make room and --resume; nothing is lost")

def save_grid(path: Path, rows: dict[str, Tensor], note: str = "") -> None:
    """A PNG with one titled row of images [n,3,H,W] (uint8, or floats in [0,1]) for each entry."""
    from matplotlib.figure import Figure
    n = max(len(x) for x in rows.values())
    figure = Figure((n * .8 + 1.6, len(rows) * .85 + .3 * bool(note)), layout="tight")
    for axis, (title, x) in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows.items(), strict=True):
        x = x.float().cpu() / 255 if x.dtype == torch.uint8 else x.float().cpu().clamp(0, 1)
        x = rearrange(F.pad(x, (1, 1, 1, 1), value=1), "n c h w -> h (n w) c").numpy()
        axis.imshow(x, interpolation="nearest")
        axis.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.suptitle(note, fontsize=9)
    write(path, lambda f: figure.savefig(f, dpi=110, bbox_inches="tight"))

def save_curves(path: Path, log_file: Path, reference: dict[str, float]) -> None:
    """Loss beside its reference value, monitors and k-NN over the steps, a panel each."""
    from matplotlib.figure import Figure
    log = [json.loads(line) for line in log_file.read_text().splitlines()]
    names = [k for k in dict.fromkeys(k for line in log for k in line) if k not in ("step", "seconds")]
    figure = Figure((2.4 * len(names), 2), layout="tight")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axis.plot(*zip(*[(line["step"], line[name]) for line in log if name in line], strict=True), lw=1.2)
        for label, value in reference.items() if name == "loss" else ():
            axis.axhline(value, color="grey", ls=":", lw=1, label=label)
            axis.legend(fontsize=7)
        axis.set_title(name, fontsize=9)
    write(path, lambda f: figure.savefig(f, dpi=110, bbox_inches="tight"))

def save_neighbours(path: Path, encoder: nn.Module, data: Data, rows: int = 6) -> None:
    """Test images beside their seven nearest training images in feature space."""
    bank, query = features(encoder, data.images), features(encoder, data.test_images[:rows])
    nearest = (F.normalize(query, dim=1) @ F.normalize(bank, dim=1).T).topk(min(7, len(bank))).indices
    save_grid(path, {f"test image {i}": torch.cat([data.test_images[i:i + 1], data.images[nearest[i]]])
                     for i in range(len(query))},
              "test images, and the training images nearest in feature space")
