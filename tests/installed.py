"""Environments that have the package and the start-up line as an installation has them, without pip or a network."""

import configparser
import runpy
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
BACKEND = runpy.run_path(str(ROOT / "_build.py"))
HOOK_FILE, HOOK = BACKEND["HOOK_FILE"], BACKEND["HOOK"]


def link_package(folder: Path) -> None:
    """`folder/prime_v2` with the tree of the installed package, as links into the checkout."""
    package = folder / "prime_v2"
    package.mkdir(parents=True)
    for path in (ROOT / "modeling_prime_v2").iterdir():
        (package / path.name).symlink_to(path)
    rooms = configparser.ConfigParser()
    rooms.read(ROOT / "setup.cfg")
    for line in rooms["options"]["package_dir"].split("\n"):
        module, _, room = line.partition(" = ")
        if module.count(".") == 1:
            (package / room).symlink_to(ROOT / room)


def make_environment(home: Path, *paths: Path) -> Path:
    """The interpreter of a new environment that has the start-up line, and `paths` on its sys.path."""
    venv.create(home, symlinks=True)
    site_packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(home)}))
    # Its name sorts first, as that of an editable install does: the start-up line finds the package.
    (site_packages / "__paths__.pth").write_text("".join(f"{path}\n" for path in paths))
    (site_packages / HOOK_FILE).write_text(HOOK)
    return home / "bin" / "python"
