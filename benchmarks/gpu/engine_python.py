"""Make a virtual environment for an engine on the GPU machine, with the packages brought there and the machine's torch.

    python3 benchmarks/gpu/engine_python.py /tmp/vllm /tmp/carried/vllm/site /tmp/site

The first folder is the new environment, the others have packages. A .pth file adds them and torch's folder, because
a run clears PYTHONPATH for its engines, and --system-site-packages would not find torch: the machine's `python3` is
itself in a virtual environment.
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
        sys.exit("error: this Python has no torch; start engine_python.py with the Python that has it")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    python = directory / "bin" / "python"
    command = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    purelib = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    sites.append(str(Path(torch.origin).parents[1]))
    (Path(purelib) / "carried.pth").write_text("\n".join(sites) + "\n")
    subprocess.run([str(python), "-c", "import torch; print('the engine has torch', torch.__version__)"], check=True)


if __name__ == "__main__":
    main()
