"""Mistakes that people make at a command line: each gets one short message that says what is wrong and what to do.

A row of the table is what is typed, as in a shell, and what the message must hold: what was given, where it stands,
what is wanted. The programs run as their users run them, but in forks of a process that has imported what they need.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

from processes import ROOT, write_config, write_images

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

T = "engine/train.py --config c.yaml"
K = "engine/evaluate.py knn run/jepa-latest --out out --device cpu"
IMAGES = "--train images --val images"
X = "engine/export.py run/jepa-latest --out weights"
V = "engine/visualize.py --out pictures"
B = "benchmarks/throughput.py --config c.yaml"

TABLE: list[tuple[str, ...]] = [
    # the config
    ("engine/train.py data.root_path=images", "--config"),
    ("engine/train.py --config nowhere.yaml", "nowhere.yaml", "No such file"),
    ("engine/train.py --config images", "images", "Is a directory"),
    ("engine/train.py --config images/class0/00.jpg", "00.jpg", "is not a text file"),
    ("engine/train.py --config tab.yaml", "tab.yaml", "is not YAML: line 2"),
    ("engine/train.py --config list.yaml", "list.yaml", "must map sections"),
    ("engine/train.py --config 'a b.yaml' --configs", "unrecognized arguments: --configs"),
    ("engine/train.py --config based.yaml", "based.yaml", "gone.yaml", "is a base, but there is no such file"),
    ("engine/train.py --config typo.yaml", "typo.yaml", "data.bath_size", "the nearest known key is data.batch_size"),
    ("engine/train.py --config $UNSET/c.yaml", "$UNSET is not set"),
    # overrides
    (f"{T} data.bath_size=3", "data.bath_size", "data.batch_size"),
    (f"{T} dta.root_path=images", "dta.root_path", "data.root_path"),
    (f"{T} data.root_path images", "'data.root_path': an override must have the form section.key=value"),
    (f"{T} data.batch_size=many", "data.batch_size = 'many'", "integer"),
    (f"{T} data.batch_size=0", "data.batch_size = 0", "greater than or equal to 1"),
    (f"{T} data.crop_scale=[.9,.3]", "data.crop_scale", "low <= high"),
    (f"{T} data.crop_scale=[.3", "data.crop_scale=[.3", "is not YAML"),
    (f"{T} optimization.lr=-1", "optimization.lr = -1", "greater than or equal to 0"),
    (f"{T} optimization.lr=nan", "optimization.lr = nan", "finite"),
    (f"{T} mask.patch_size=5", "mask.patch_size = 5", "must divide data.crop_size 32"),
    (f"{T} meta.num_heads=5", "meta.num_heads = 5", "must divide meta.embed_dim 24"),
    (f"{T} meta.model_name=vit_hugo", "meta.model_name = 'vit_hugo'", "'vit_huge'"),
    (f"{T} loss.objective=byol", "loss.objective = 'byol'", "ijepa"),
    (f"{T} loss.objective=ijepa loss.projector=[8]", "loss.projector", "no setting of this loss.objective"),
    (f"{T} optimization.warmup=50", "optimization.warmup = 50", "engine.max_steps"),
    (f"{T} eval.every=5", "eval.every = 5", "eval.train_path"),
    (f"{T} engine.global_batch_size=6", "engine.global_batch_size = 6", "must be a multiple of"),
    (f"{T} engine.attention=flash_attn", "engine.attention = 'flash_attn'", "needs bf16 and a GPU"),
    (f"{T} data.decoder=gpu", "data.decoder = 'gpu'", "needs a GPU"),
    (f"{T} meta.copy_data=true", "meta.copy_data", "copy the images yourself"),
    (f"{T} logging.folder=$UNSET/x", "logging.folder", "$UNSET is not set"),
    # images
    (f"{T} data.root_path=null", "data.root_path", "data.synthetic"),
    (f"{T} data.root_path=nowhere", "'nowhere', which does not exist"),
    (f"{T} data.root_path=broken", "'broken', which is a link to 'gone'"),
    (f"{T} data.root_path=empty", "'empty', which contains no image", ".jpg"),
    (f"{T} data.root_path=images data.suffixes=[.gif]", "looked for .gif", "left out: 40 .jpg"),
    (f"{T} data.root_path=c.yaml", "'c.yaml', which is neither a .txt list nor an uncompressed .tar"),
    (f"{T} data.root_path=zipped.tar", "zipped.tar is not a complete, uncompressed tar"),
    (f"{T} data.root_path=gone.txt", "gone.txt: none of the 2 paths looked for is there", "a/1.jpg"),
    (f"{T} data.root_path=gone-{{0..3}}.tar", "names 4 shards that are no files", "gone-0.tar"),
    (f"{T} data.batch_size=64", "40 images, fewer than the 64 of a step", "lower data.batch_size"),
    (f"{T} data.root_path=junk", "none of the 8 images of junk can be decoded"),
    (f"{T} eval.every=5 eval.train_path=images eval.val_path=nowhere", "'nowhere', which does not exist"),
    (f"{T} eval.every=5 eval.train_path=flat eval.val_path=flat", "flat", "one sub-folder per class"),
    # folders, checkpoints and weights
    (f"{T} logging.folder=c.yaml/run", "logging.folder c.yaml/run cannot be used", "Not a directory"),
    (f"{T} logging.folder=run", "run already holds checkpoints", "add --resume"),
    (f"{T} logging.folder=new1 --resume", "no checkpoint of 'jepa' in new", "start without"),
    (f"{T} logging.folder=run1 --resume run/jepa-step9", "run/jepa-step9 does not exist"),
    (f"{T} logging.folder=run2 --resume meta.depth=3", "holds a different model", "blocks.2"),
    (f"{T} logging.folder=run3 --resume engine.seed=5", "engine.seed", "Restore the old value"),
    (f"{T} logging.folder=run4 --resume data.crop_scale=[.5,1]", "data.crop_scale", "--accept-changes"),
    (f"{T} logging.folder=run5 --replay-step 9999", "--replay-step: given 9999", "0 to 19"),
    (f"{T} logging.folder=new2 meta.init_from=nowhere.pth", "nowhere.pth"),
    (f"{T} logging.folder=new3 meta.init_from=images/class0/00.jpg", "meta.init_from", "00.jpg"),
    (f"{T} logging.folder=new4 meta.init_from=run", "run is a folder of checkpoints", "run/jepa-"),
    (f"{T} data.root_path=latin-\udcfc", "data.root_path", "not in UTF-8"),
    (f"{T} logging.folder=new5 meta.load_checkpoint=true", "meta.load_checkpoint", "new"),
    # how a run is started
    (f"{T} engine.device=cuda", "can use no GPU", "engine.device=cpu"),
    (f"{T} --max-minutes 0", "--max-minutes: '0'", "minutes above 0"),
    (f"{T} --max-minutes soon", "--max-minutes", "'soon'"),
    (f"{T} --world-size 8", "--world-size is for --dry-run"),
    (f"{T} --dry-run --world-size 0", "--world-size: given 0"),
    (f"WORLD_SIZE=two {T} --dry-run", "WORLD_SIZE='two'", "wanted a number"),
    (f"RANK=0 WORLD_SIZE=two {T}", "WORLD_SIZE='two'", "wanted a number"),
    (f"RANK=2 WORLD_SIZE=2 {T}", "RANK=2", "0 <= RANK < WORLD_SIZE"),
    (f"SLURM_NTASKS=4 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_JOB_ID=7 {T}", "4 tasks", "put srun before"),
    (f"PMI_SIZE=2 PMI_RANK=1 {T}", "PMI_SIZE", "MPI_LOCALRANKID", "torchrun"),
    (f"OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_LOCAL_RANK=1 {T}", "pass MASTER_ADDR"),
    # evaluate.py
    ("engine/evaluate.py", "PROTOCOL"),
    ("engine/evaluate.py knn", "WEIGHTS", "--train", "--val"),
    (f"engine/evaluate.py knn nowhere {IMAGES} --out out", "nowhere does not exist", "checkpoint folder"),
    (f"engine/evaluate.py knn run {IMAGES} --out out", "run is a folder of checkpoints", "run/jepa-"),
    (f"engine/evaluate.py knn images {IMAGES} --out out", "images", "state.json"),
    (f"engine/evaluate.py knn c.yaml {IMAGES} --out out", "c.yaml cannot be read as safetensors"),
    (f"engine/evaluate.py knn theirs.pth.tar {IMAGES} --out out", "theirs.pth.tar: a config is needed"),
    (f"{K} --train images --val nowhere", "'nowhere', which does not exist"),
    (f"{K} --train images --val flat", "flat: the images have no labels", "one sub-folder per class"),
    (f"{K} --train images --val others", "'class'", "are in images and not in others", "'class1'"),
    (f"{K} {IMAGES} --label kind", "--label kind: there is no images/labels.csv"),
    (f"{K} --train named --val named --label size", "--label size: named/labels.csv has only the columns file, kind"),
    (f"{K} {IMAGES} --k 0", "--k", "at least 1"),
    (f"{K} {IMAGES} --layers 9", "--layers 9", "2 blocks"),
    (f"{K} {IMAGES} --precision fp16", "--precision", "'fp16'", "bf16"),
    (f"{K} --train junk --val junk", "none of the 8 images of junk can be decoded"),
    (f"engine/evaluate.py knn run/jepa-latest {IMAGES} --out c.yaml", "--out: given c.yaml; wanted a folder"),
    (f"engine/evaluate.py knn run/jepa-latest {IMAGES} --out out --device cuda", "can use no GPU", "--device cpu"),
    ("engine/evaluate.py clevr run/jepa-latest --data images --out out", "images is not in CLEVR's layout"),
    (f"engine/evaluate.py lowshot run/jepa-latest {IMAGES} --labels few --out out", "--labels few", "1%"),
    ("engine/evaluate.py report empty", "no results"),
    # export.py and visualize.py
    (f"{X} --to onnx", "--to", "'onnx'", "safetensors"),
    (f"{X} --to timm --part predictor", "--part predictor", "--to timm"),
    (f"{X} --to timm meta.depth=3", "meta.depth=3: an override needs --config"),
    ("engine/export.py run/jepa-latest --to timm --out c.yaml", "c.yaml already exists", "choose another name"),
    ("engine/export.py nowhere --to timm --out weights", "nowhere does not exist"),
    (
        "engine/export.py theirs.pth.tar --to timm --out weights --config c.yaml meta.depth=3",
        "theirs.pth.tar",
        "config",
    ),
    ("engine/visualize.py run/jepa-latest --images images", "--out"),
    (V, "nothing to draw", "--images"),
    (f"{V} run/jepa-latest", "given a checkpoint alone", "--images"),
    (f"{V} run/jepa-latest --images nowhere", "'nowhere', which does not exist"),
    (f"{V} run/jepa-latest --images images --count 0", "--count: given 0"),
    (f"{V} run/jepa-latest --images junk", "--images", "can be decoded"),
    (f"{V} --log nowhere.jsonl", "--log", "nowhere.jsonl", "No such file"),
    (f"{V} --log run/jepa_r0.csv", "line 1 of run/jepa_r0.csv is not a logged step"),
    (f"{V} --log empty.jsonl", "empty.jsonl holds no logged step"),
    ("engine/visualize.py --log run/jepa.jsonl --out c.yaml", "--out", "c.yaml"),
    # doctor.py
    ("engine/doctor.py --data nowhere", "'nowhere', which does not exist"),
    ("engine/doctor.py --list good.txt", "--list needs --data"),
    ("engine/doctor.py --data images --list good.csv", "good.csv", ".txt"),
    ("engine/doctor.py --data images --workers 0", "--workers: given 0"),
    ("engine/doctor.py --device tpu", "--device", "'tpu'", "cuda"),
    # benchmarks and what draws the demo's images
    (f"{B} data.bath_size=3", "data.bath_size", "data.batch_size"),
    (f"{B} --against elsewhere", "--against elsewhere", "reference=PATH"),
    (f"{B} --against reference=nowhere", "--against reference=nowhere", "no checkout"),
    (f"{B} --steps 0", "--steps", "at least 1"),
    (f"{B} --out c.yaml/x", "c.yaml"),
    ("benchmarks/throughput.py --config nowhere.yaml", "nowhere.yaml", "No such file"),
    ("benchmarks/kernels.py --op blur", "--op", "'blur'", "gather"),
    ("benchmarks/data.py --images nowhere", "'nowhere', which does not exist"),
    ("benchmarks/scaling.py --config nowhere.yaml --no-check", "nowhere.yaml", "No such file"),
    ("engine/jepa/data/synthetic.py c.yaml", "c.yaml"),
]


class Ended(NamedTuple):
    code: int
    output: str
    said: str


class Shell:
    """A folder in which programs are typed."""

    def __init__(self, folder: Path, forks: "subprocess.Popen[str]") -> None:
        self.folder, self.forks, self.typed = folder, forks, 0

    def run(self, *commands: str) -> list[Ended]:
        """All at once."""
        work, files = [], []
        for command in commands:
            words = shlex.split(command)
            given = dict(word.split("=", 1) for word in words if re.match("[A-Z_]+=", word))
            program, *rest = words[len(given) :]
            if program == "engine/train.py" and "logging.folder=" not in command:
                rest.append(f"logging.folder=runs{self.typed}")  # a folder has one run at a time
            files.append([self.folder / f"{kind}-{self.typed}" for kind in ("stdout", "stderr")])
            self.typed += 1
            work.append([str(ROOT / program), rest, given, *map(str, files[-1])])
        assert self.forks.stdin and self.forks.stdout
        print(json.dumps(work), file=self.forks.stdin, flush=True)
        codes = json.loads(self.forks.stdout.readline())
        return [Ended(c, *(f.read_text() for f in of)) for c, of in zip(codes, files, strict=True)]


def make_what_is_there(folder: Path) -> None:
    """Images: of other classes, without classes, and what is none. Configs, lists and tars that are wrong."""
    config = write_config(folder / "c.yaml", write_images(folder / "images"))
    text = config.read_text().replace(str(folder) + "/", "").replace("folder: nowhere", "folder: runs")
    config.write_text(text)
    (folder / "typo.yaml").write_text(text.replace("batch_size", "bath_size") + "\n")
    (folder / "tab.yaml").write_text("data:\n\tbatch_size: 3\n")
    (folder / "list.yaml").write_text("- data\n- mask\n")
    (folder / "based.yaml").write_text("base: gone.yaml\n")
    for name in ("empty", "flat", "others/class0", "others/other", "junk/class0", "junk/class1", "named"):
        (folder / name).mkdir(parents=True)
    for i in range(4):
        for name in (f"flat/{i}", f"named/{i}", f"others/class0/{i}", f"others/other/{i}"):
            Image.new("RGB", (40, 40), (60 * i, 0, 0)).save(folder / f"{name}.png")
        for label in range(2):
            (folder / f"junk/class{label}/{i}.jpg").write_bytes(os.urandom(500))
    (folder / "named/labels.csv").write_text("file,kind\n" + "".join(f"{i}.png,{i % 2}\n" for i in range(4)))
    (folder / "gone.txt").write_text("a/1.jpg\nb/2.jpg\n")
    (folder / "zipped.tar").write_bytes(b"\x1f\x8b\x08" + os.urandom(2000))
    (folder / "empty.jsonl").write_text("")
    os.symlink("gone", folder / "broken")
    torch.save({"encoder": {"module.norm.bias": torch.zeros(24)}, "epoch": 1}, folder / "theirs.pth.tar")


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """With a run of two steps in `run`, and copies of it."""
    folder = tmp_path_factory.mktemp("shell")
    make_what_is_there(folder)
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    environment |= {"PYTHONPATH": f"{ROOT}/kernels", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command, pipe = [sys.executable, str(ROOT / "tests/support/forks.py"), str(ROOT)], subprocess.PIPE
    with subprocess.Popen(command, cwd=folder, env=environment, text=True, stdin=pipe, stdout=pipe) as forks:
        made = Shell(folder, forks)
        (trained,) = made.run(f"{T} logging.folder=run engine.max_steps=2")
        assert trained.code == 0, trained
        for number in range(1, 6):  # one run per folder, and rows are typed side by side
            shutil.copytree(folder / "run", folder / f"run{number}", symlinks=True)
        yield made
        assert forks.stdin
        forks.stdin.close()


# What DeepSpeed and torch print, and what is said of each bad image.
OTHERS = r"\[\d{4}-\d\d-\d\d .*\] \[(INFO|WARNING)\]|\[?W\d{4} |.* cannot be used \("


def own_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip() and not re.match(OTHERS, line)]


def test_each_mistake_has_one_short_message_that_says_what_and_where(shell: Shell) -> None:
    """All at once takes less than half of the time, and all that is wrong is told."""
    assert len(TABLE) >= 40
    before = sorted(path.name for path in shell.folder.iterdir())
    wrong = []
    for first in range(0, len(TABLE), 4):
        rows = TABLE[first : first + 4]
        for (typed, *held), ended in zip(rows, shell.run(*(row[0] for row in rows)), strict=True):
            lines = own_lines(ended.said)
            missing = [words for words in held if words not in ended.said]
            bad_words = [word for word in ("Traceback", "Error(", "NoneType") if word in ended.said + ended.output]
            short = 1 <= len(lines) <= 3 and max(map(len, lines)) < 600
            if not (0 < ended.code < 128 and short) or missing or bad_words:
                told = f"code {ended.code}, without {missing}, with {bad_words}:\n{ended.said[-2000:]}"
                wrong.append(f"{typed}\n  {told}")
    assert not wrong, "\n".join(wrong)
    left = {path.name for path in shell.folder.iterdir()} - {*before}
    assert {name for name in left if not name.startswith(("stdout", "stderr", "new", "runs"))} <= {"out"}
    assert not [*shell.folder.glob("new*/*")]


def test_a_traceback_is_shown_with_debug_alone(shell: Shell) -> None:
    typed = [
        f"{T} data.root_path=nowhere",
        f"{K} --train images --val nowhere",
        "engine/export.py nowhere --to timm --out weights",
        f"{V} --log nowhere.jsonl",
        "engine/doctor.py --data nowhere",
    ]
    for plain, debugged in zip(shell.run(*typed), shell.run(*(f"{words} --debug" for words in typed)), strict=True):
        assert "Traceback" not in plain.said and "Traceback (most recent call last)" in debugged.said
        assert debugged.code == plain.code and own_lines(debugged.said)[-1] == own_lines(plain.said)[-1]
