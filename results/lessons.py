"""Lessons of the lecture, as pictures with the numbers behind them.

    python results/lessons.py matrix                  SimCLR's Figure 5, pairs of transformations
    python results/lessons.py batch_sizes [--seed K]  SimCLR and MoCo, 32 to 1,024 images a step; seeds 0 1 2
    python results/lessons.py mask_ratio [--seed K]   MAE's Figure 5: what is hidden, 25 to 90 %
    python results/lessons.py label_efficiency [--seed K]    fine-tuned and from scratch, 1 to 100 % of labels
    python results/lessons.py tenth [--seed K]        each method, fine-tuned with a tenth of the labels
    python results/lessons.py objects [--seed K]      SPOT with other decoders, and on other encoders
    python results/lessons.py attmask [--seed K]      iBOT: what is hidden, of 5 to 100 % of the images
    python results/lessons.py inpainting              Context Encoder and MAE on the same images
    python results/lessons.py gradients               SPOT: what each patch needs of the slots, in which order

Label efficiency: 900 steps of 64 images, pre-trained or not; layers and places are probed, too, with a tenth
of the labels. A tenth: 300 steps. The rate is 3e-3 for ResNets, else 1e-3, the same for all layers.
Batch sizes: SimCLR's negatives are the rest of its batch, MoCo's are keys of earlier batches. Every run sees
89,600 images; the rate goes with the square root of the batch size, as is usual with AdamW. What has been run
is not run again.
"""
import importlib
import json
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace

from table import ROOT, TWINS, grouped, origin, read, run_all, run_one

SIZES, IMAGES, RATE = (32, 64, 128, 256, 512, 1024), 89_600, 1e-3
METHODS = dict(simclr="SimCLR", moco="MoCo v2")
RATIOS = .25, .5, .75, .9
DECODERS = ["autoregressive", "--no-permutations"], ["autoregressive"], ["parallel"]     # PA
ENCODERS = dict(mae=["--encoder", "vit_micro/8"],
                moco=["--version", "3", "--encoder", "vit_micro/8", "--batch_size", "64", "--steps", "600"])
SHARES = ".01", ".03", ".1", ".3", "1"
STARTS = dict(rotnet="RotNet", simclr="SimCLR", mae="MAE")
NETWORKS = dict(rotnet="ResNet from scratch", mae="ViT from scratch")    # SimCLR's is RotNet's to the bit


def flags(size):
    lr = f"{RATE * (size / 128) ** .5:.2g}"
    return ["--batch_size", str(size), "--steps", str(round(IMAGES / size)), "--lr", lr]


def bars(axis, found, label, **style):
    """found: {x: values over the seeds}: mean and deviation."""
    x, values = zip(*sorted(found.items()), strict=True)
    spread = [statistics.stdev(v) if v[1:] else 0. for v in values]
    style = dict(marker="o", capsize=3) | style
    axis.errorbar(x, list(map(statistics.mean, values)), spread, label=label, **style)


def once(words, file, folder):
    """Run the command if it has no line in `file`; it writes into runs/`folder`."""
    if " ".join(["python", *words]) not in [r["command"] for r in read(file)]:
        run_one(words, file, ROOT.glob(f"runs/{folder}/result.json"))


def run_these(names, more):
    """What is missing of them; stops where a run has failed."""
    if failed := run_all(names, more):
        sys.exit("failed:\n" + "\n".join(failed))


def tune(start, share, seed, file, *more):
    """Fine-tune a run, or train an encoder from scratch, with a share of the labels."""
    folder = start[1].removeprefix("runs/") + "/" if start[0] == "--run" else ""
    words = ["methods/transfer.py", *start, "--labels", share, *more, "--seed", seed]
    once(words, file, f"{folder}transfer-toys*-seed{seed}")


def draw(rows, path):
    """The linear probe over the batch size."""
    from matplotlib.figure import Figure
    figure = Figure((5, 3.2), layout="tight")
    axis = figure.subplots()
    for name, title in METHODS.items():
        found = {}
        for r in (r for r in rows if r["method"] == name):
            size = int(re.search(r"--batch_size (\d+)", r["command"])[1])
            found.setdefault(size, []).append(r["linear"])
        bars(axis, found, title)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="batch size", ylabel="linear probe, %", xticks=SIZES, xticklabels=SIZES)
    axis.legend()
    figure.savefig(path, dpi=110)


def batch_sizes(seeds):
    for size in SIZES:
        run_these([f"variants-batch_sizes:{name}" for name in METHODS], flags(size) + seeds)
    draw(read(ROOT / "results/variants-batch_sizes.jsonl"), ROOT / "results/batch_sizes.png")


def mask_ratio(seeds):
    """Pre-train at each ratio, probe, fine-tune with a tenth of the labels; and the same from scratch."""
    file = ROOT / "results/variants-mask_ratio.jsonl"
    for seed in seeds[1:] or ["0", "1", "2"]:
        for ratio in map(str, RATIOS):
            out, run = f"runs/mae-mask_ratio={ratio}", f"mae-mask_ratio={ratio}/mae-toys-seed{seed}"
            once(["methods/mae.py", "--mask_ratio", ratio, "--out", out, "--seed", seed], file, run)
            tune(["--run", f"runs/{run}"], ".1", seed, file)
        tune(["--run", f"runs/{run}", "--scratch"], ".1", seed, file)    # the ratio is no part of the encoder
    draw_ratios(read(file), ROOT / "results/mask_ratio.png")


def draw_ratios(rows, path):
    """A linear probe of frozen features and fine-tuning, with the same labels, over the mask ratio."""
    from matplotlib.figure import Figure
    figure = Figure((5, 3.2), layout="tight")
    axis = figure.subplots()
    for label, value in {"fine-tuned": lambda r: r["accuracy"],
                         "linear probe, frozen": lambda r: r["untrained"]["linear"]}.items():
        found = {}
        for r in (r for r in rows if "--run" in r["command"] and "--scratch" not in r["command"]):
            found.setdefault(float(re.search(r"mask_ratio=([.\d]+)", r["command"])[1]), []).append(value(r))
        bars(axis, found, label)
    scratch = statistics.mean(r["accuracy"] for r in rows if "--scratch" in r["command"])
    axis.axhline(scratch, color="grey", ls=":", label="from scratch")
    axis.set(xlabel="share of the patches that is hidden", ylabel="%, with 10 % of the labels", xticks=RATIOS)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def label_efficiency(seeds):
    """Fine-tune the networks of the first table's runs with ever more labels; and the same from scratch."""
    file = ROOT / "results/variants-labels.jsonl"
    for seed in seeds[1:] or ["0", "1", "2"]:
        for name in STARTS:
            if not (ROOT / (run := f"runs/{name}-toys-seed{seed}") / "encoder.pt").exists():
                subprocess.run([sys.executable, f"methods/{name}.py", "--seed", seed], cwd=ROOT, check=True)
            for scratch in [[], ["--scratch"]][:1 + (name in NETWORKS)]:
                for share in SHARES[::1 + (name == "mae")]:      # a ViT's runs take long: three shares
                    more = ["--lr", "1e-3" if name == "mae" else "3e-3", "--steps", "900"]
                    more += ["--no-probes"] * (share != ".1")
                    tune(["--run", run, *scratch], share, seed, file, *more)
    draw_labels(read(file), ROOT / "results/labels.png")


def tenth(seeds):
    """The first table's runs without labels, fine-tuned with a tenth of them; their networks from scratch.
    Not of clips: their encoder knows grey images alone."""
    sys.path[:0] = [str(ROOT), str(ROOT / "methods")]
    file = ROOT / "results/variants-tenth.jsonl"
    for seed in seeds[1:] or ["0", "1", "2"]:
        for name in (name for group, name in grouped() if group not in ("Objects", "With labels, the bound")):
            cfg = importlib.import_module(name).Config()
            run = f"runs/{name}-{re.sub('[^a-z0-9.=]+', '-', cfg.data)}-seed{seed}"
            if "frames" in run:
                continue
            if not (ROOT / run / "encoder.pt").exists():
                subprocess.run([sys.executable, f"methods/{name}.py", "--seed", seed], cwd=ROOT, check=True)
            more = ["--lr", "3e-3"] * cfg.encoder.startswith("resnet")
            for scratch in [[], ["--scratch"]][:2 - (name in TWINS)]:
                tune(["--run", run, *scratch], ".1", seed, file, *more, "--no-probes")


def draw_labels(rows, path):
    """Accuracy over the number of labels: fine-tuned, from scratch, and a linear probe of frozen features."""
    from matplotlib.figure import Figure
    figure = Figure((7, 3.6), layout="tight")
    axis = figure.subplots()
    lines = [(name, False, title, dict(color=f"C{i}")) for i, (name, title) in enumerate(STARTS.items())]
    lines += [(name, True, title, dict(color=color, ls=":"))
              for (name, title), color in zip(NETWORKS.items(), ("black", "grey"), strict=True)]
    for name, scratch, title, style in lines:
        tuned, frozen = {}, {}
        own = [r for r in rows if f"/{name}-" in r["command"]]
        for r in (r for r in own if ("--scratch" in r["command"]) == scratch):
            tuned.setdefault(r["labelled"], []).append(r["accuracy"])
            frozen.setdefault(r["labelled"], []).append(r["untrained"]["linear"])
        if tuned:
            bars(axis, tuned, title, **style)
            bars(axis, frozen, None, **style, marker="", capsize=0, lw=.7)
    axis.set_xscale("log")
    ticks = sorted({r["labelled"] for r in rows})
    axis.set(xlabel="labels", ylabel="accuracy, %", xticks=ticks, xticklabels=[f"{n:,}" for n in ticks])
    axis.minorticks_off()
    axis.set_title("fine-tuned; thin: linear probe of frozen features", fontsize=9)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=110)


def attmask(seeds):
    """Block-wise masks of all images are iBOT's default, which is in toys.jsonl."""
    for share in ("1", ".2", ".1", ".05"):
        for mask in ("block", "random", "attmask_high", "attmask_low"):
            if (share, mask) != ("1", "block"):
                run_these(["variants-attmask:ibot"], ["--mask", mask, "--share", share] + seeds)


def objects(seeds):
    """SPOT's decoders by reconstruction alone, on one and the same frozen encoder; SPOT on other encoders;
    both stages with the paper's decoder, also for longer."""
    file = ROOT / "results/variants-spot.jsonl"
    scenes = "toys-objects=3-jitter=1-small=.5-large=.6-grey-parts=0-n=6000"
    for seed in seeds[1:] or ["0", "1", "2"]:
        def spot(*flags, seed=seed):
            once(["methods/spot.py", *flags, "--seed", seed], file, f"spot-{scenes}-seed{seed}")
        for flags in DECODERS:
            spot("--decoder", *flags, "--teacher", "0")
        for name, flags in ENCODERS.items():
            weights = f"runs/{name}-toys-grey-seed{seed}/encoder.pt"
            if not (ROOT / weights).exists():
                command = [f"methods/{name}.py", "--seed", seed, "--data", "toys:grey", *flags]
                subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
            spot("--weights", weights)
    for steps in ([], ["--steps", "4400"]):
        run_these(["variants-spot:spot"], ["--decoder", "autoregressive", *steps, *seeds])


def gradients():
    """SPOT's figure: what each patch needs of the slots, trained and told in one order, and in nine."""
    sys.path[:0] = [str(ROOT), str(ROOT / "methods")]
    import spot
    import torch
    from matplotlib.figure import Figure

    import common
    from kernels.decoders import orders
    from kernels.views import normalise
    if not (ROOT / "runs/dino-toys-grey-seed0/encoder.pt").exists():
        subprocess.run([sys.executable, "methods/dino.py"], cwd=ROOT, check=True)
    figure = Figure((9, 2.8), layout="tight")
    *maps, curves = figure.subplots(1, 3, width_ratios=(1, 1, 1.6))
    ways = ("one order", 1, ["--no-permutations"]), ("nine orders", 9, [])
    for axis, (title, n, flags) in zip(maps, ways, strict=True):
        flags = ["--decoder", "autoregressive", "--teacher", "0", *flags, "--out", f"runs/gradients-{n}",
                 "--weights", "runs/dino-toys-grey-seed0/encoder.pt"]
        cfg = common.parse(spot.Config, spot.PAPER, flags)
        folder = ROOT / f"runs/gradients-{n}/spot-{re.sub('[^a-z0-9.=]+', '-', cfg.data)}-seed0"
        if not (folder / "result.json").exists():
            subprocess.run([sys.executable, "methods/spot.py", *flags], cwd=ROOT, check=True)
        method = spot.build(replace(cfg, weights=str(ROOT / cfg.weights))).eval()
        method.load_state_dict(torch.load(folder / "checkpoint.pt", weights_only=True)["model"])
        method.graduate()
        h, x = (y.detach() for y in method.features(normalise(common.load_data(cfg).test_images[:50])))
        each = torch.stack([spot.gradient_norms(method.student, x, h, i) for i in range(n)])     # [n,N]
        side = int(each.shape[1] ** .5)
        told = each.gather(1, orders(side)[:n].long()).mean(0)   # [N], by the place in its order
        axis.imshow(each.mean(0).view(side, side), vmin=0)
        axis.set_title(f"{title}, by patch", fontsize=9)
        axis.axis("off")
        curves.plot(range(1, len(told) + 1), told / told.mean(), label=title, lw=1.2)
    curves.set_xlabel("place in the order", fontsize=8)
    curves.set_ylim(0)
    curves.set_title("gradient norm, the mean is 1", fontsize=9)
    curves.legend(fontsize=8)
    figure.savefig(ROOT / "results/spot_gradients.png", dpi=110)


def inpainting():
    """Test images as the context encoder and MAE see and paint them, both trained with seed 0."""
    sys.path[:0] = [str(ROOT), str(ROOT / "methods")]
    import context_encoder
    import mae
    import torch

    import common
    from kernels.views import denormalise, normalise
    x, methods = common.load_data(mae.Config()).test_images[:10], []
    for module in (context_encoder, mae):
        method = module.build(module.Config())
        file = ROOT / f"runs/{module.__name__}-toys-seed0/checkpoint.pt"
        if not file.exists():
            subprocess.run([sys.executable, f"methods/{module.__name__}.py"], cwd=ROOT, check=True)
        method.load_state_dict(torch.load(file, weights_only=True)["model"])
        methods.append(method)
    v, mask = normalise(x), context_encoder.draw_masks(context_encoder.Config(), len(x))
    filled, (seen, painted, _) = context_encoder.fills(methods[0], v, mask), mae.painted(methods[1], x, .75)
    common.save_grid(ROOT / "results/inpainting.png", {
        "Context Encoder sees": denormalise(filled["mean_colour"]), "paints": denormalise(filled["hole"]),
        "MAE sees": seen, "MAE paints": painted, "x": x})


def matrix():
    """results/matrix.json: the linear probe of each pair, by the pair's place in the matrix."""
    command = ["methods/simclr.py", "--matrix", "--steps", "200", "--data", "toys:n=6000"]
    about = origin()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    rows = [json.loads(file.read_text()) for file in sorted((ROOT / "runs/matrix").glob("*/*/result.json"))]
    pairs = {row["flags"]["only"]: dict(linear=row["linear"], knn=row["knn"]) for row in rows}
    whole = dict(command=" ".join(["python", *command]), seed=rows[0]["seed"], untrained=rows[0]["untrained"],
                 **about, pairs=pairs)
    (ROOT / "results/matrix.json").write_text(json.dumps(whole, indent=1))
    shutil.copy(ROOT / "runs/matrix.png", ROOT / "results/matrix.png")


def main(name="", *seeds):
    lessons = {f.__name__: f for f in (batch_sizes, mask_ratio, label_efficiency, tenth, attmask, objects)}
    if name in lessons and re.fullmatch(r"(--seed \d+)?", " ".join(seeds)):
        lessons[name](list(seeds))
    elif name in ("matrix", "inpainting", "gradients") and not seeds:
        dict(matrix=matrix, inpainting=inpainting, gradients=gradients)[name]()
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:])
