"""What results/ shows: the toys, a picture of each method, all of them in gallery.png, the logs as curves.

Drawn by `python results/table.py pictures`, or `curves`, from the folders of the runs with seed 0 and the
logs.
"""
import sys
import textwrap

from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from table import LOGS, ROOT, grouped, methods, read

PICTURES = dict(                                                 # of the runs with seed 0
    mae="mae-toys-seed0/reconstructions", rotnet="rotnet-toys-seed0/attention",
    simclr="simclr-toys-seed0/neighbours", moco="moco-toys-seed0/neighbours",
    instdisc="instdisc-toys-n=8000-seed0/neighbours", byol="byol-toys-seed0/neighbours",
    simsiam="simsiam-toys-seed0/neighbours", supervised="supervised-toys-seed0/predictions",
    video_colorization="video_colorization-toys-objects=3-frames=6-n=4000-seed0/carried",
    exemplar_cnn="exemplar_cnn-toys-seed0/distortions",
    context_prediction="context_prediction-toys-n=10000-seed0/alike",
    jigsaw="jigsaw-toys-n=8000-seed0/puzzles", colorization="colorization-toys-seed0/colours",
    split_brain="split_brain-toys-seed0/told", context_encoder="context_encoder-toys-seed0/painted",
    barlow_twins="barlow_twins-toys-seed0/correlation", vicreg="vicreg-toys-seed0/covariance",
    dino="dino-toys-grey-seed0/attention", swav="swav-toys-grey-seed0/prototypes",
    bownet="bownet-toys-seed0/words", obow="obow-toys-seed0/words", ibot="ibot-toys-grey-seed0/masks",
    beit="beit-toys-seed0/words", simmim="simmim-toys-seed0/reconstructions",
    slot_attention="slot_attention-toys-objects=3-jitter=1-small=.4-grey-parts=0-seed0/slots",
    slots_apart="slot_attention-toys-objects=3-apart=.8-small=.4-grey-parts=0-seed0/slots",
    dinosaur="dinosaur-toys-objects=3-jitter=1-small=.5-large=.6-grey-parts=0-n=6000-seed0/slots",
    spot="spot-toys-objects=3-jitter=1-small=.5-large=.6-grey-parts=0-n=6000-seed0/slots",
    pixelcnn="pixelcnn-toys-n=4000-noise=0-seed0/samples",
    igpt="igpt-toys-n=6000-noise=0-seed0/completions", igpt_layers="igpt-toys-n=6000-noise=0-seed0/layers",
    transfer="rotnet-toys-seed0/transfer-toys-seed0/places")
# Which rows of a picture the gallery shows; of the others the first.
ROWS = dict(mae=(0, 1), rotnet=(0, 2), colorization=(0, 3), video_colorization=(0, 1), context_encoder=(0, 2),
            jigsaw=(1, 2), context_prediction=(4, 5), split_brain=(1, 2), barlow_twins=(0, 1), vicreg=(0, 1),
            dino=(0, 5), swav=(1, 6), bownet=(7,), obow=(0, 2), ibot=(0, 7), beit=(0, 1), simmim=(0, 1),
            pixelcnn=(1, 2), igpt=(0, 2), slot_attention=(0, 9), dinosaur=(0, 5), spot=(0, 3))
HEIGHT, LEFT, WIDTH = 56, 270, 960                               # of a row, its words and all, in pixels


def pictures():
    """toys.png, what the runs have drawn, the gallery."""
    sys.path.insert(0, str(ROOT))
    from common import save_grid
    from kernels.toys import CLASSES, toys
    calm = toys(400, seed=5, size=64, small=.3, contrast=.25, noise=.01)
    save_grid(ROOT / "results/toys.png", {name: calm["images"][calm["labels"] == i][:12]
                                          for i, name in enumerate(CLASSES)})
    Image.open(ROOT / "results/toys.png").convert("RGB").quantize(256).save(ROOT / "results/toys.png")
    for name, picture in PICTURES.items():
        if (file := ROOT / f"runs/{picture}.png").exists():
            Image.open(file).convert("RGB").save(ROOT / f"results/{name}.png", optimize=True)
    gallery()


def rows_of(image):
    """The rows of images in a picture of save_grid: what is not white, and higher than its title."""
    grey, parts = image.convert("L"), []
    for y in range(grey.height):
        if grey.crop((0, y, grey.width, y + 1)).getextrema()[0] < 250:
            if parts and y - parts[-1][1] < 5:                   # lines between tiles are white, too
                parts[-1][1] = y + 1
            else:
                parts.append([y, y + 1])
    return [image.crop((0, top, image.width, end)) for top, end in parts if end - top > 30]


def gallery():
    """gallery.png: a strip of each method's own picture beside its name and idea."""
    known, strips = methods(), []
    for _, name in grouped():
        if not (file := ROOT / f"results/{name}.png").exists():
            continue
        rows = rows_of(Image.open(file).convert("RGB"))
        rows = [rows[i] for i in ROWS.get(name, (0,))]
        scale = min(HEIGHT / rows[0].height, (WIDTH - LEFT) / rows[0].width)
        size = round(rows[0].width * scale), round(rows[0].height * scale)
        across = (WIDTH - LEFT) // size[0]                       # narrow ones stand side by side
        strip = Image.new("RGB", (WIDTH, (HEIGHT + 4) * -(-len(rows) // across) + 8), "white")
        for i, row in enumerate(rows):
            at = LEFT + i % across * size[0], i // across * (HEIGHT + 4) + 4
            strip.paste(row.resize(size, Image.Resampling.LANCZOS), at)
        draw, (title, year, idea, _) = ImageDraw.Draw(strip), known[name]
        draw.text((8, 4), f"{title} ({year})", "black", ImageFont.load_default(16))
        draw.text((8, 26), textwrap.fill(idea, 40), "#555", ImageFont.load_default(12))
        strips.append(strip)
    whole, y = Image.new("RGB", (WIDTH, sum(strip.height for strip in strips)), "white"), 0
    for strip in strips:
        whole.paste(strip, (0, y))
        y += strip.height
    whole.quantize(256).save(ROOT / "results/gallery.png", optimize=True)


def curves():
    """curves.png: the loss over the steps (blue), what to read it against (dotted), k-NN (orange, right)."""
    names = [name for _, name in grouped() if (LOGS / f"{name}.jsonl").exists()]
    if not names:
        return
    columns = 3
    figure = Figure((3.2 * columns, 2.1 * -(-len(names) // columns)), layout="tight")
    axes = figure.subplots(-(-len(names) // columns), columns, squeeze=False).flat
    for name, axis in zip(names, axes, strict=False):        # names first: it takes no axis too many
        (about, *log), right = read(LOGS / f"{name}.jsonl"), axis.twinx()
        axis.plot([line["step"] for line in log], [line["loss"] for line in log], lw=1.2)
        for i, (label, value) in enumerate(about["reference"].items()):
            axis.axhline(value, color=f"{.3 + .2 * i}", ls=":")
            axis.text(.98 - .32 * i, value, label, transform=axis.get_yaxis_transform(), fontsize=8,
                      ha="right", va="center", bbox=dict(color="white", pad=.5))
        probed = [(line["step"], line["knn"]) for line in log if "knn" in line]
        if probed:
            right.set_ylim(0, 100)
            right.plot(*zip(*probed, strict=True), "o-", color="tab:orange", lw=.8, ms=2.5)
        else:
            right.axis("off")
        for one in (axis, right):
            one.tick_params(labelsize=8)
        axis.set_title(methods()[name][0], fontsize=10)
    for axis in axes:                                            # those left over
        axis.axis("off")
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("loss (blue), its references (dotted); k-NN of a sample, % (orange, right)", fontsize=9)
    figure.savefig(file := ROOT / "results/curves.png", dpi=100)
    Image.open(file).convert("RGB").quantize(32).save(file, optimize=True)       # a third of its size
