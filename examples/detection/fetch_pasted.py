"""Fetches the pictures of `--data pasted` from Debian's archive, into a folder of their own.

python -m examples.detection.fetch_pasted DIR

It wants apt, and no root. The pictures are free software (GPL, CC): DIR/licences says whose.
"""

import argparse
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from itertools import compress
from pathlib import Path

from examples.detection.processes import JobError

STAMPS = "tuxpaint-stamps-default"
PACKAGES = (STAMPS, "mate-backgrounds", "plasma-workspace-wallpapers", "lomiri-wallpapers-16.04")
# Folders of stamps: those of a class, of which there are enough, and those of none.
CLASSES = {
    "bird": ("animals/birds",),
    "coin": ("symbols/money/*/coins", "symbols/money/japanese"),
    "fruit": ("food/fruit",),
    "mammal": ("animals/mammals", "animals/marsupials"),
    "vegetable": ("food/vegetables",),
}
DISTRACTORS = (
    *(f"animals/{name}" for name in ("amphibians", "fish", "insects", "lizards", "shellfish")),
    *("hobbies", "household", "plants/flowers", "space", "sports", "vehicles"),
)
# Folders of drawings, and a drawing among photographs.
DRAWN = {"cartoon", "toys", "plastic", "hedgehog"}
BACKGROUNDS = (
    "backgrounds/*.jpg",
    "backgrounds/mate/nature/*.jpg",
    "wallpapers/*/contents/images/2560x1600.jpg",
)
LEFT_OUT = {
    # Drawings.
    *("Autumn", "analogpattern_by_Peter_Nerlich", "umang_by_Abhishek_Mudgal"),
    # They hold a fruit, a bird and dogs, which no box would say.
    *("Picture_0B_by_freespace", "free_by_Peter_Nerlich"),
    "friends_by_Aitzol_Berasategi",
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.detection.fetch_pasted",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="new, or empty")
    folder: Path = parser.parse_args(arguments).folder
    try:
        fetch(folder)
    except (JobError, OSError) as error:
        raise SystemExit(str(error)) from error
    counts = [f"{len(list((folder / part).rglob('*.*')))} {part}" for part in parts()]
    print(f"{folder}: {', '.join(counts)}")


def parts() -> list[str]:
    return [*(f"cutouts/{name}" for name in CLASSES), "distractors", "backgrounds"]


def fetch(folder: Path) -> None:
    """Nothing is left in `folder` where that fails."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise JobError(f"DIR must be a new folder or an empty one, got {folder}")
    if not all(map(shutil.which, ("apt-get", "dpkg-deb"))):
        raise JobError("there is no apt here: run this on Debian or Ubuntu, and copy the folder")
    with tempfile.TemporaryDirectory() as scratch:
        root, made = Path(scratch, "root"), Path(scratch, "made")
        run("apt-get", "download", *PACKAGES, within=scratch)
        for package in sorted(Path(scratch).glob("*.deb")):
            run("dpkg-deb", "-x", str(package), str(root), within=scratch)
        arrange(root / "usr/share", made)
        shutil.copytree(made, folder, dirs_exist_ok=True)


def run(*command: str, within: str) -> None:
    result = subprocess.run(command, cwd=within, capture_output=True, text=True, check=False)
    if result.returncode:
        said = " ".join(result.stderr.split())[-300:]
        raise JobError(f"{' '.join(command[:2])} failed: {said}; `apt-get update` may help")


def arrange(share: Path, made: Path) -> None:
    """From the packages' tree to that of :class:`Pasted`."""
    stamps = share / "tuxpaint/stamps"
    for name, patterns in CLASSES.items():
        for file in photographs(stamps, patterns):
            copy(file, made / "cutouts" / name / file.relative_to(stamps))
    for file in photographs(stamps, DISTRACTORS):
        copy(file, made / "distractors" / file.relative_to(stamps))
    found = [file for pattern in BACKGROUNDS for file in share.glob(pattern)]
    for file in found:
        # A wallpaper's file is named by its size alone.
        name = file.parents[2].name if file.parent.name == "images" else file.stem
        if name not in LEFT_OUT:
            copy(file, made / "backgrounds" / f"{name}.jpg")
    for file in share.glob("doc/*/copyright"):
        copy(file, made / "licences" / file.parent.name)
    if empty := [part for part in parts() if not (made / part).is_dir()]:
        raise JobError(f"the packages must hold pictures for {', '.join(empty)}, got none")


def photographs(stamps: Path, patterns: Iterable[str]) -> list[Path]:
    """Without the mirrored copies."""
    found = [file for pattern in patterns for file in stamps.glob(f"{pattern}/**/*.png")]
    names = [file.relative_to(stamps).with_suffix("").parts for file in found]
    kept = [not DRAWN & {*each} and not each[-1].endswith("_mirror") for each in names]
    return list(compress(found, kept))


def copy(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target)


if __name__ == "__main__":
    main()
