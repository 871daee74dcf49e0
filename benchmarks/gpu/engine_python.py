"""Make a Python for an engine on the GPU machine: its carried packages, and the machine's torch beside them.

    python3 benchmarks/gpu/engine_python.py /tmp/vllm /tmp/carried/vllm/site /tmp/site

A run clears PYTHONPATH for its engines, and `python3` there is itself in a virtual environment, so that neither a
target folder nor --system-site-packages gives an engine torch: a .pth file names the folders instead.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit("usage: engine_python.py DIRECTORY SITE...")
    directory, sites = Path(sys.argv[1]), [str(Path(site).resolve()) for site in sys.argv[2:]]
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        sys.exit("error: this Python has no torch; run this by the one that has it")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    python = directory / "bin" / "python"
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    purelib = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    sites.append(str(Path(torch.origin).parents[1]))
    (Path(purelib) / "carried.pth").write_text("\n".join(sites) + "\n")
    subprocess.run([str(python), "-c", "import torch; print('the engine has torch', torch.__version__)"], check=True)


if __name__ == "__main__":
    main()
