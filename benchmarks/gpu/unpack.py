"""On the GPU machine: collect the pieces that this command brought, and unpack each set that is whole.

    python3 benchmarks/gpu/unpack.py [--from .carry] [--to /tmp/carried]

A set of pack.py lands in /tmp/carried/SET. Pieces are moved away, so that the next command's do not mix with them.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import tarfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, default=Path(".carry"))
    parser.add_argument("--to", type=Path, default=Path("/tmp/carried"))
    args = parser.parse_args()
    for line in unpack(args.source, args.to):
        print(line, flush=True)


def unpack(source: Path, store: Path) -> list[str]:
    """A line for each set with its outcome."""
    parts = store / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.glob("*.[0-9]*/*")):
        shutil.move(file, parts / file.name)
    names = sorted({file.name.split(".")[0] for file in parts.iterdir()})
    return [_unpack_set(name, parts, store / name) for name in names]


def _unpack_set(name: str, parts: Path, target: Path) -> str:
    pieces, sums = sorted(parts.glob(f"{name}.part.*")), parts / f"{name}.sha256"
    checksum = hashlib.sha256()
    whole = parts / f"{name}.tar.xz"
    with whole.open("wb") as out:
        for piece in pieces:
            data = piece.read_bytes()
            checksum.update(data)
            out.write(data)
    if not sums.exists() or checksum.hexdigest() != sums.read_text().strip():
        whole.unlink()
        return f"{name}: not whole yet, {len(pieces)} pieces are here"
    work = target.with_suffix(".new")
    shutil.rmtree(work, ignore_errors=True)
    with tarfile.open(whole) as tar:
        tar.extractall(work, filter="data")
    shutil.rmtree(target, ignore_errors=True)
    work.rename(target)
    for file in (*pieces, sums, whole):
        file.unlink()
    return f"{name}: unpacked to {target}"


if __name__ == "__main__":
    main()
