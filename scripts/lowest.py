"""Makes an environment with the lowest versions that setup.cfg allows: `make test-lowest` runs the tests in it.

    python scripts/lowest.py .venv-lowest        without a folder it prints the versions alone

Standard library only. Every `name>=version` of setup.cfg becomes `name==version`, but for extras of accelerators.
"""

import configparser
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
ACCELERATORS = {"tpu", "cuda13"}


def pins(root: pathlib.Path) -> list[str]:
    """`name==version` of what setup.cfg declares; ValueError for something without a lower bound."""
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg")
    extras = config["options.extras_require"]
    texts = [config["options"]["install_requires"]]
    texts += [text for name, text in extras.items() if name not in ACCELERATORS]
    found = {}
    for line in "\n".join(texts).split("\n"):
        if not line or line.startswith("msa-jax["):
            continue
        match = re.match(r"([\w-]+)>=([\w.]+)", line)
        if match is None:
            raise ValueError(f"setup.cfg: {line!r} has no lower bound: give it one, as in name>=1.2.")
        found[match[1]] = match[2]
    return [f"{name}=={version}" for name, version in found.items()]


def main() -> None:
    wanted = pins(ROOT)
    print("\n".join(wanted), flush=True)
    if len(sys.argv) < 2:
        return
    folder = ROOT / sys.argv[1]
    if not (folder / "bin/python").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *wanted], check=True)
    subprocess.run([*pip, "--no-deps", "--editable", ROOT], check=True)


if __name__ == "__main__":
    main()
